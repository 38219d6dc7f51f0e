// exchange.c: which token goes to which rank, and the messages that carry it there and back.
//
// E experts live on P ranks, E/P on each: expert e is local expert e mod E/P of rank e / (E/P). A token is sent ONCE to
// each rank that owns one of its experts, with its K local ids (-1: elsewhere) and weights in the same message; the
// rank returns one row, already weighted and summed over its experts; the source adds at most min(P,K) rows in rank
// order.
//
//   plan      send_S  = the pairs (token t, rank p) as t*P + p, by rank, then by token      place_TP = its inverse
//   pack      row s   = x[t], local ids of t at p, weights[t]                               of send[s] = t*P + p
//   unpack    x, ids, weights = the parts of each row received
//   combine   y[t]    = sum over p of row place[t,p]                 weights[t,k] = row place[t, owner of k].weights[k]
// One plan serves four messages: dispatch forward packs x with ids and weights; combine forward sends rows as they are;
// the backward of combine packs dy alone; the backward of dispatch packs dx with dweights (row r for row r) and
// combines them. Limits: T*P fits int32, P and K <= MOE_MAX_EXPERTS.
#include "kernels.h"
#include "message.h"
#include <string.h>

int64_t moe_message_bytes(const moe_message *m) { return message_layout(m).bytes; }

// -- plan -------------------------------------------------------------------------------------------------------------
typedef struct {
    int64_t        T, P;
    const int32_t *counts;
    int32_t       *send, *place;
} plan_job;

static void place_ranks(int64_t begin, int64_t end, void *arg) {
    const plan_job *j = arg;
    int64_t row = 0;
    for (int64_t p = 0; p < begin; p++) row += j->counts[2 * p];
    for (int64_t p = begin; p < end; p++)
        for (int64_t t = 0; t < j->T; t++)
            if (j->place[t * j->P + p] >= 0) {
                j->send[row] = (int32_t)(t * j->P + p);
                j->place[t * j->P + p] = (int32_t)row++;
            }
}

size_t moe_exchange_plan_workspace(int64_t T, int64_t P) {
    (void)T, (void)P;                           // the twin's needs some
    return 0;
}

int moe_exchange_plan(int64_t T, int64_t K, int64_t E, int64_t P, const int32_t *ids_TK, void *workspace,
                      int32_t *counts_P2, int32_t *send_M, int32_t *place_TP) {
    (void)workspace;
    int status = exchange_check(T, E, P);
    if (status != MOE_OK) return status;
    if (K < 0 || K > MOE_MAX_EXPERTS) return MOE_BAD_SHAPE;
    for (int64_t f = 0; f < T * K; f++)
        if (ids_TK[f] < -1 || ids_TK[f] >= E) return MOE_BAD_INDEX;
    plan_job j = {T, P, counts_P2, send_M, place_TP};
    memset(counts_P2, 0, (size_t)(P * 8));
    for (int64_t i = 0; i < T * P; i++) place_TP[i] = -1;
    for (int64_t f = 0; f < T * K; f++) {
        if (ids_TK[f] < 0) continue;
        const int64_t p = ids_TK[f] / (E / P);
        int32_t *place = place_TP + f / K * P + p;
        counts_P2[2 * p] += *place < 0;         // the token's first expert there
        counts_P2[2 * p + 1]++;
        *place = 0;
    }
    moe_parallel(P, moe_row_grain(T), place_ranks, &j);
    int64_t S = 0;
    for (int64_t p = 0; p < P; p++) S += counts_P2[2 * p];
    for (int64_t s = S; s < T * (P < K ? P : K); s++) send_M[s] = -1;
    return MOE_OK;
}

// -- messages ---------------------------------------------------------------------------------------------------------
typedef struct {
    const moe_message *m;
    message_parts      at;
    int64_t            P, local;
    const int32_t     *send, *place, *ids;
    const char        *x, *weights, *rows;      // in
    char              *to, *to_weights;         // out
    int32_t           *to_ids;
} message_job;

// `bytes` and zeros up to `end`.
static void part(char *to, const void *from, int64_t bytes, int64_t end) {
    memcpy(to, from, (size_t)bytes);
    memset(to + bytes, 0, (size_t)(end - bytes));
}

static void pack_rows(int64_t begin, int64_t end, void *arg) {
    const message_job *j = arg;
    const moe_message *m = j->m;
    const int64_t x_bytes = m->D * message_size(m->dtype), w_bytes = m->K * message_size(m->wdtype);
    for (int64_t s = begin; s < end; s++) {
        const int64_t t = j->send ? j->send[s] / j->P : s, p = j->send ? j->send[s] % j->P : 0;
        char *row = j->to + s * j->at.bytes;
        part(row, j->x + t * x_bytes, x_bytes, j->at.ids);
        if (m->ids) {
            int32_t *word_K = (int32_t *)(void *)(row + j->at.ids);
            for (int64_t k = 0; k < m->K; k++) {
                const int64_t id = j->ids[t * m->K + k];
                word_K[k] = id >= 0 && id / j->local == p ? (int32_t)(id % j->local) + 1 : 0;
            }
            memset(word_K + m->K, 0, (size_t)(j->at.weights - j->at.ids - 4 * m->K));
        }
        if (m->weights) part(row + j->at.weights, j->weights + t * w_bytes, w_bytes, j->at.bytes - j->at.weights);
    }
}

static int64_t message_grain(const message_job *j) { return moe_row_grain(j->at.bytes / 4); }

int moe_exchange_pack(const moe_message *m, int64_t T, int64_t S, int64_t E, int64_t P, const int32_t *send_S,
                      const void *x_TD, const int32_t *ids_TK, const void *weights_TK, void *rows_SB) {
    int status = message_check(m);
    if (status == MOE_OK) status = exchange_check(T, E, P);
    if (status != MOE_OK) return status;
    if (S < 0 || S > T * P || (!send_S && S > 0 && (S != T || m->ids))) return MOE_BAD_SHAPE;
    for (int64_t s = 0; send_S && s < S; s++)
        if (send_S[s] < 0 || send_S[s] >= T * P) return MOE_BAD_INDEX;
    message_job j = {.m = m, .at = message_layout(m), .P = P, .local = E / P, .send = send_S, .ids = ids_TK, .x = x_TD,
                     .weights = weights_TK, .to = rows_SB};
    moe_parallel(S, message_grain(&j), pack_rows, &j);
    return MOE_OK;
}

static void unpack_rows(int64_t begin, int64_t end, void *arg) {
    const message_job *j = arg;
    const moe_message *m = j->m;
    const int64_t x_bytes = m->D * message_size(m->dtype), w_bytes = m->K * message_size(m->wdtype);
    for (int64_t r = begin; r < end; r++) {
        const char *row = j->rows + r * j->at.bytes;
        memcpy(j->to + r * x_bytes, row, (size_t)x_bytes);
        const uint32_t *word_K = (const uint32_t *)(const void *)(row + j->at.ids);
        for (int64_t k = 0; m->ids && k < m->K; k++) j->to_ids[r * m->K + k] = (int32_t)(word_K[k] - 1);
        if (m->weights) memcpy(j->to_weights + r * w_bytes, row + j->at.weights, (size_t)w_bytes);
    }
}

int moe_exchange_unpack(const moe_message *m, int64_t R, const void *rows_RB, void *x_RD, int32_t *ids_RK,
                        void *weights_RK) {
    int status = message_check(m);
    if (status != MOE_OK) return status;
    if (R < 0 || R > INT32_MAX) return MOE_BAD_SHAPE;
    message_job j = {.m = m, .at = message_layout(m), .rows = rows_RB, .to = x_RD, .to_ids = ids_RK,
                     .to_weights = weights_RK};
    moe_parallel(R, message_grain(&j), unpack_rows, &j);
    return MOE_OK;
}

// y[t] = sum over p of row place[t,p]: from +0, in rank order, in real, rounded once.
static void combine_rows(int64_t begin, int64_t end, void *arg) {
    const message_job *j = arg;
    const moe_message *m = j->m;
    const int64_t x_bytes = m->D * message_size(m->dtype), w_size = message_size(m->wdtype);
    const bool    f64 = m->dtype == MOE_F64;
    union { float f32[MOE_MAX_EXPERTS]; double f64[MOE_MAX_EXPERTS]; } ones;
    const void *row_p[MOE_MAX_EXPERTS];
    for (int64_t p = 0; p < j->P; p++)
        if (f64) ones.f64[p] = 1;
        else ones.f32[p] = 1;
    for (int64_t t = begin; t < end; t++) {
        const int32_t *place_P = j->place + t * j->P;
        int64_t        n = 0;
        for (int64_t p = 0; p < j->P; p++)
            if (place_P[p] >= 0) row_p[n++] = j->rows + place_P[p] * j->at.bytes;
        moe_k->sum(m->dtype, m->D, n, &ones, row_p, j->to + t * x_bytes);
        for (int64_t k = 0; m->weights && k < m->K; k++) {
            const int64_t id  = j->ids[t * m->K + k], row = id < 0 ? -1 : place_P[id / j->local];
            char         *to  = j->to_weights + (t * m->K + k) * w_size;
            if (row < 0) memset(to, 0, (size_t)w_size);
            else memcpy(to, j->rows + row * j->at.bytes + j->at.weights + k * w_size, (size_t)w_size);
        }
    }
}

int moe_exchange_combine(const moe_message *m, int64_t T, int64_t S, int64_t E, int64_t P, const int32_t *place_TP,
                         const int32_t *ids_TK, const void *rows_SB, void *y_TD, void *weights_TK) {
    int status = message_check(m);
    if (status == MOE_OK) status = exchange_check(T, E, P);
    if (status != MOE_OK) return status;
    if (S < 0 || S > T * P) return MOE_BAD_SHAPE;
    for (int64_t i = 0; i < T * P; i++)
        if (place_TP[i] < -1 || place_TP[i] >= S) return MOE_BAD_INDEX;
    for (int64_t f = 0; m->weights && f < T * m->K; f++)
        if (ids_TK[f] < -1 || ids_TK[f] >= E) return MOE_BAD_INDEX;
    message_job j = {.m = m, .at = message_layout(m), .P = P, .local = E / P, .place = place_TP, .ids = ids_TK,
                     .rows = rows_SB, .to = y_TD, .to_weights = weights_TK};
    moe_parallel(T, message_grain(&j), combine_rows, &j);
    return MOE_OK;
}
