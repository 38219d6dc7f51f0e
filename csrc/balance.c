// balance.c: what keeps experts evenly loaded: capacity, the two balance losses, the z-loss, the selection-bias rule.
//
//   capacity      in scope g, S rows, an expert keeps capacity[g] copies, the rest become -1
//   balance loss  per scope g, from counts_GE and the mean score per expert m_e = mean_{t in g} scores[t,e]:
//                 switch  E / (S*K) * sum_e counts[g,e] * m_e     mse  mean_e (m_e - 1/E)^2     then the mean over g
//   z-loss        mean_t logsumexp(logits[t])^2
//   select bias   bias += rate * sign(mean(counts) - counts)
//
// A scope is S consecutive rows, T = G*S. E <= MOE_MAX_EXPERTS. Sums over rows run in double and in row order, so
// that they do not know the number of threads.
#include "real.h"
#include <math.h>
#include <string.h>

static int check_scopes(int64_t T, int64_t S, int64_t K, int64_t E) {
    if (T < 0 || S < 0 || (S == 0 ? T != 0 : T % S != 0)) return MOE_BAD_SHAPE;
    if (K < 1 || K > E || S > INT32_MAX / K) return MOE_BAD_SHAPE;
    return check_rows(MOE_F64, T, E);
}

static int check_ids(int64_t n, int64_t E, const int32_t *ids) {
    for (int64_t i = 0; i < n; i++)
        if (ids[i] < -1 || ids[i] >= E) return MOE_BAD_INDEX;
    return MOE_OK;
}

// ---- capacity ------------------------------------------------------------------------------------------------------
// One scope's flat ids, grouped by expert in ascending order: copies of e at flat[start[e] .. start[e+1]).
typedef struct { int32_t *start, *flat; size_t bytes; } capacity_space;

static capacity_space capacity_carve(int64_t S, int64_t K, int64_t E, void *workspace) {
    int32_t *start = workspace;
    return (capacity_space){start, workspace ? start + E + 1 : NULL, (size_t)(E + 1 + S * K) * sizeof *start};
}
size_t moe_capacity_workspace(int64_t S, int64_t K, int64_t E) { return capacity_carve(S, K, E, NULL).bytes; }

typedef struct {
    int            dtype;
    int64_t        capacity;
    const void    *priority;    // of this scope; NULL: the first copies win
    capacity_space space;
    int32_t       *kept;        // of this scope
} capacity_job;

// Whether copy a is dropped before copy b.
static bool loses(const capacity_job *job, int32_t a, int32_t b) {
    double x = real_get(job->dtype, job->priority, a), y = real_get(job->dtype, job->priority, b);
    return x < y || (x == y && a > b);
}

// Restores the heap below node i: the copy at the root is the first to be dropped.
static void sift_down(const capacity_job *job, int64_t n, int32_t *heap, int64_t i) {
    for (int64_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && loses(job, heap[child + 1], heap[child])) child++;
        if (!loses(job, heap[child], heap[i])) return;
        int32_t swap = heap[i];
        heap[i] = heap[child];
        heap[child] = swap;
    }
}

static void drop_experts(int64_t begin, int64_t end, void *arg) {
    const capacity_job *job = arg;
    for (int64_t e = begin; e < end; e++) {
        int32_t *flat = job->space.flat + job->space.start[e];
        const int64_t n = job->space.start[e + 1] - job->space.start[e], C = job->capacity;
        if (n <= C) continue;
        if (job->priority && C > 0) {           // flat[0..C) becomes the heap of the best C so far
            for (int64_t i = C / 2; i-- > 0;) sift_down(job, C, flat, i);
            for (int64_t i = C; i < n; i++) {
                if (!loses(job, flat[0], flat[i])) continue;
                int32_t dropped = flat[0];
                flat[0] = flat[i];
                flat[i] = dropped;
                sift_down(job, C, flat, 0);
            }
        }
        for (int64_t i = C; i < n; i++) job->kept[flat[i]] = -1;
    }
}

int moe_capacity(int dtype, int64_t T, int64_t S, int64_t K, int64_t E, const int32_t *ids_TK, const void *priority_TK,
                 const int32_t *capacity_G, void *workspace, int32_t *kept_TK) {
    if (!moe_is_float(dtype)) return MOE_BAD_DTYPE;
    int status = check_scopes(T, S, K, E);
    if (status || (status = check_ids(T * K, E, ids_TK))) return status;
    const int64_t G = T ? T / S : 0;
    for (int64_t g = 0; g < G; g++)
        if (capacity_G[g] < 0) return MOE_BAD_VALUE;
    for (int64_t i = 0; priority_TK && i < T * K; i++)
        if (isnan(real_get(dtype, priority_TK, i))) return MOE_BAD_VALUE;

    const capacity_space space = capacity_carve(S, K, E, workspace);
    for (int64_t g = 0; g < G; g++) {
        const int64_t  first = g * S * K;
        const int32_t *ids = ids_TK + first;
        memcpy(kept_TK + first, ids, (size_t)(S * K) * sizeof *ids);
        // Counting sort. start[e+1] counts e, then is where e's next copy goes, then where e ends.
        memset(space.start, 0, (size_t)(E + 1) * sizeof *space.start);
        for (int64_t f = 0; f < S * K; f++) space.start[ids[f] + 1] += ids[f] >= 0;
        int32_t total = 0;
        for (int64_t e = 0; e < E; e++) {
            int32_t count = space.start[e + 1];
            space.start[e + 1] = total;
            total += count;
        }
        for (int64_t f = 0; f < S * K; f++)
            if (ids[f] >= 0) space.flat[space.start[ids[f] + 1]++] = (int32_t)f;
        const void *priority = priority_TK ? (const char *)priority_TK + first * moe_real_size(dtype) : NULL;
        capacity_job job = {dtype, capacity_G[g], priority, space, kept_TK + first};
        moe_parallel(E, 16384 * E / (S * K) + 1, drop_experts, &job);
    }
    return MOE_OK;
}

// ---- balance loss --------------------------------------------------------------------------------------------------
int moe_balance_counts(int64_t T, int64_t S, int64_t K, int64_t E, const int32_t *ids_TK, int32_t *counts_GE) {
    int status = check_scopes(T, S, K, E);
    if (status || (status = check_ids(T * K, E, ids_TK))) return status;
    if (S == 0) memset(counts_GE, 0, (size_t)E * sizeof *counts_GE);     // no tokens: one empty scope
    for (int64_t t = 0; t < T; t++) {
        int32_t *counts_E = counts_GE + t / S * E;
        if (t % S == 0) memset(counts_E, 0, (size_t)E * sizeof *counts_E);
        for (int64_t k = 0; k < K; k++)
            if (ids_TK[t * K + k] >= 0) counts_E[ids_TK[t * K + k]]++;
    }
    return MOE_OK;
}

typedef struct {
    int         dtype;
    int64_t     S, E;
    const char *scores_SE;
    double     *mean_E;
} mean_job;

static void mean_experts(int64_t begin, int64_t end, void *arg) {
    const mean_job *job = arg;
    double *mean_E = job->mean_E;
    real_row tile;
    for (int64_t e = begin; e < end; e++) mean_E[e] = 0;
    for (int64_t t = 0; t < job->S; t++) {
        moe_k->load(job->dtype, end - begin, job->scores_SE + (t * job->E + begin) * moe_size(job->dtype), &tile);
        for (int64_t e = begin; e < end; e++) mean_E[e] += real_get(job->dtype, &tile, e - begin);
    }
    for (int64_t e = begin; e < end; e++) mean_E[e] /= (double)job->S;
}

static void mean_scores(int dtype, int64_t S, int64_t E, const void *scores_TE, int64_t g, double *mean_E) {
    mean_job job = {dtype, S, E, (const char *)scores_TE + g * S * E * moe_size(dtype), mean_E};
    moe_parallel(E, 65536 / S + 8, mean_experts, &job);
}

static int check_balance(int dtype, int form, int64_t T, int64_t S, int64_t K, int64_t E) {
    if (!moe_is_float(dtype)) return MOE_BAD_DTYPE;
    if (form != MOE_BALANCE_SWITCH && form != MOE_BALANCE_MSE) return MOE_BAD_VALUE;
    return check_scopes(T, S, K, E);
}

size_t moe_balance_loss_workspace(int64_t T, int64_t S, int64_t E) {     // its CUDA twin has some
    (void)T, (void)S, (void)E;
    return 0;
}

int moe_balance_loss(int dtype, int form, int64_t T, int64_t S, int64_t K, int64_t E, const void *scores_TE,
                     const int32_t *counts_GE, void *workspace, void *loss) {
    (void)workspace;
    int status = check_balance(dtype, form, T, S, K, E);
    if (status) return status;
    const int64_t G = T ? T / S : 0;
    double mean_E[MOE_MAX_EXPERTS], total = 0;
    for (int64_t g = 0; g < G; g++) {
        mean_scores(dtype, S, E, scores_TE, g, mean_E);
        double sum = 0;
        for (int64_t e = 0; e < E; e++) {
            const double off = mean_E[e] - 1.0 / (double)E;
            sum += form == MOE_BALANCE_MSE ? off * off : counts_GE[g * E + e] * mean_E[e];
        }
        total += form == MOE_BALANCE_MSE ? sum / (double)E : sum * (double)E / (double)(S * K);
    }
    real_set(dtype, loss, 0, G ? total / (double)G : 0);
    return MOE_OK;
}

// Forward was: loss = 1/G sum_g E/(S*K) sum_e counts[g,e] * m_e, or 1/G sum_g 1/E sum_e (m_e - 1/E)^2, with
// m_e = 1/S sum_t scores[t,e]; so every row of a scope has the same gradient.
int moe_balance_loss_backward(int dtype, int form, int64_t T, int64_t S, int64_t K, int64_t E, const void *scores_TE,
                              const int32_t *counts_GE, const void *dloss, void *workspace, void *dscores_TE) {
    (void)workspace;
    int status = check_balance(dtype, form, T, S, K, E);
    if (status) return status;
    const size_t row_bytes = (size_t)(E * moe_size(dtype));
    double mean_E[MOE_MAX_EXPERTS];
    real_row drow;
    for (int64_t t = 0; t < T; t++) {
        char *dscores_E = (char *)dscores_TE + (size_t)t * row_bytes;
        if (t % S) {
            memcpy(dscores_E, dscores_E - row_bytes, row_bytes);
            continue;
        }
        if (form == MOE_BALANCE_MSE) mean_scores(dtype, S, E, scores_TE, t / S, mean_E);
        for (int64_t e = 0; e < E; e++) {
            const double dmean = form == MOE_BALANCE_MSE ? 2 * (mean_E[e] - 1.0 / (double)E) / (double)E
                                                         : (double)E / (double)(S * K) * counts_GE[t / S * E + e];
            real_set(dtype, &drow, e, real_get(dtype, dloss, 0) * dmean / (double)T);           // 1/G * 1/S
        }
        moe_k->store(dtype, E, &drow, dscores_E);
    }
    return MOE_OK;
}

// ---- z-loss --------------------------------------------------------------------------------------------------------
typedef struct {
    int         dtype;
    int64_t     T, E;
    const char *logits_TE;
    const void *lse_T;
    void       *new_lse_T;
    char       *dlogits_TE;
    double      dloss;
} z_job;

static void z_rows(int64_t begin, int64_t end, void *arg) {
    const z_job *job = arg;
    real_row row;
    for (int64_t t = begin; t < end; t++) {
        moe_k->load(job->dtype, job->E, job->logits_TE + t * job->E * moe_size(job->dtype), &row);
        real_set(job->dtype, job->new_lse_T, t, moe_k->softmax(job->dtype == MOE_F64, job->E, &row, &row));
    }
}

int moe_z_loss(int dtype, int64_t T, int64_t E, const void *logits_TE, void *lse_T, void *loss) {
    int status = check_rows(dtype, T, E);
    if (status) return status;
    z_job job = {.dtype = dtype, .T = T, .E = E, .logits_TE = logits_TE, .new_lse_T = lse_T};
    moe_parallel(T, moe_row_grain(E), z_rows, &job);
    double sum = 0;
    for (int64_t t = 0; t < T; t++) {
        const double lse = real_get(dtype, lse_T, t);
        sum += lse * lse;
    }
    real_set(dtype, loss, 0, T ? sum / (double)T : 0);
    return MOE_OK;
}

// Forward was: loss = 1/T sum_t lse_t^2, and dlse/dlogit = softmax.
static void z_rows_backward(int64_t begin, int64_t end, void *arg) {
    const z_job *job = arg;
    const int64_t E = job->E, bytes = moe_size(job->dtype);
    real_row row;
    for (int64_t t = begin; t < end; t++) {
        const double dlse = job->dloss * 2 * real_get(job->dtype, job->lse_T, t) / (double)job->T;
        moe_k->load(job->dtype, E, job->logits_TE + t * E * bytes, &row);
        moe_k->softmax(job->dtype == MOE_F64, E, &row, &row);
        for (int64_t e = 0; e < E; e++) real_set(job->dtype, &row, e, dlse * real_get(job->dtype, &row, e));
        moe_k->store(job->dtype, E, &row, job->dlogits_TE + t * E * bytes);
    }
}

int moe_z_loss_backward(int dtype, int64_t T, int64_t E, const void *logits_TE, const void *lse_T, const void *dloss,
                        void *dlogits_TE) {
    int status = check_rows(dtype, T, E);
    if (status) return status;
    z_job job = {.dtype = dtype, .T = T, .E = E, .logits_TE = logits_TE, .lse_T = lse_T, .dlogits_TE = dlogits_TE,
                 .dloss = real_get(dtype, dloss, 0)};
    moe_parallel(T, moe_row_grain(E), z_rows_backward, &job);
    return MOE_OK;
}

// ---- selection bias ------------------------------------------------------------------------------------------------
// mean - counts[e] has the sign of total - E * counts[e]: integers, so that every rank decides alike.
int moe_select_bias_update(int64_t E, double rate, const int64_t *counts_E, float *bias_E) {
    if (E < 1 || E > MOE_MAX_EXPERTS) return MOE_BAD_SHAPE;
    if (!isfinite(rate)) return MOE_BAD_VALUE;
    int64_t total = 0;
    for (int64_t e = 0; e < E; e++) {
        if (counts_E[e] < 0 || counts_E[e] > INT64_MAX / (2 * MOE_MAX_EXPERTS)) return MOE_BAD_VALUE;
        total += counts_E[e];
    }
    for (int64_t e = 0; e < E; e++) {
        const int sign = (total > E * counts_E[e]) - (total < E * counts_E[e]);
        bias_E[e] += (float)(rate * sign);
    }
    return MOE_OK;
}
