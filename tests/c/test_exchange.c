// test_exchange.c: plan, pack, unpack and combine of a deduplicated token exchange, against their definitions, for any
// ids, ranks and widths; and what they refuse.
#include "check.h"
#include "message.h"

enum { T = 23, K = 4 };
static const int all_dtypes[] = {MOE_F64, MOE_F32, MOE_BF16, MOE_F16};

static void draw_ids(int32_t *ids_TK, int64_t E, uint64_t seed) {
    for (int f = 0; f < T * K; f++) ids_TK[f] = (int32_t)check_below(&seed, E + 2) - 1;
    for (int f = 0; f < T * K; f++) if (ids_TK[f] >= E) ids_TK[f] = -1;
}

static bool owns(const int32_t *ids_TK, int64_t t, int64_t p, int64_t local) {
    for (int k = 0; k < K; k++) if (ids_TK[t * K + k] >= 0 && ids_TK[t * K + k] / local == p) return true;
    return false;
}

static int64_t check_plan(const int32_t *ids_TK, int64_t E, int64_t P, int32_t *send_M, int32_t *place_TP) {
    int32_t *counts_P2 = check_alloc(P * 8);
    int64_t  S = 0, M = T * (P < K ? P : K);
    CHECK_OK(moe_exchange_plan(T, K, E, P, ids_TK, NULL, counts_P2, send_M, place_TP));
    for (int64_t p = 0; p < P; p++) {
        int64_t rows = 0, copies = 0;
        for (int f = 0; f < T * K; f++) copies += ids_TK[f] >= 0 && ids_TK[f] / (E / P) == p;
        for (int64_t t = 0; t < T; t++) {
            const int64_t want = owns(ids_TK, t, p, E / P) ? S + rows++ : -1, got = place_TP[t * P + p];
            CHECK(got == want, "place of token %d at rank %d is %d, want %d", (int)t, (int)p, (int)got, (int)want);
            if (want >= 0) CHECK(send_M[want] == t * P + p, "send %d is %d", (int)want, (int)send_M[want]);
        }
        CHECK(counts_P2[2 * p] == rows && counts_P2[2 * p + 1] == copies, "counts of rank %d", (int)p);
        S += rows;
    }
    for (int64_t s = S; s < M; s++) CHECK(send_M[s] == -1, "send %d is %d", (int)s, (int)send_M[s]);
    free(counts_P2);
    return S;
}

static void check_messages(int dtype, int wdtype, int64_t D, int64_t E, int64_t P) {
    int32_t ids_TK[T * K], *send = check_alloc(T * P * 4), *place = check_alloc(T * P * 4);
    draw_ids(ids_TK, E, (uint64_t)(D + P));
    const int64_t     S = check_plan(ids_TK, E, P, send, place), local = E / P;
    const moe_message m = {dtype, wdtype, D, K, 1, 1}, back = {dtype, wdtype, D, K, 0, 1};
    const int64_t     bytes = moe_message_bytes(&m), row = D * moe_size(dtype), w_row = K * moe_size(wdtype);
    CHECK(bytes % 16 == 0 && bytes >= row + 4 * K + w_row, "a message of %d bytes", (int)bytes);
    char    *x = check_floats(dtype, T * D, 1), *weights = check_floats(wdtype, T * K, 2);
    char    *rows = check_alloc(S * bytes), *x_S = check_alloc(S * row), *weights_S = check_alloc(S * w_row);
    int32_t *ids_S = check_alloc(S * K * 4);
    check_threads = 3;
    CHECK_OK(moe_exchange_pack(&m, T, S, E, P, send, x, ids_TK, weights, rows));
    CHECK_OK(moe_exchange_unpack(&m, S, rows, x_S, ids_S, weights_S));
    for (int64_t s = 0; s < S; s++) {
        const int64_t t = send[s] / P, p = send[s] % P;
        CHECK(!memcmp(x_S + s * row, x + t * row, (size_t)row), "values of row %d", (int)s);
        CHECK(!memcmp(weights_S + s * w_row, weights + t * w_row, (size_t)w_row), "weights of row %d", (int)s);
        for (int64_t k = 0; k < K; k++) {
            const int64_t id = ids_TK[t * K + k], want = id >= 0 && id / local == p ? id % local : -1;
            CHECK(ids_S[s * K + k] == want, "row %d slot %d has %d, want %d", (int)s, (int)k, ids_S[s * K + k],
                  (int)want);
        }
    }
    // What came is sent back as it came: each token receives itself once per rank, and each slot its weight.
    char *back_rows = check_alloc(S * moe_message_bytes(&back)), *y = check_alloc(T * row), *dw = check_alloc(T * w_row);
    CHECK_OK(moe_exchange_pack(&back, S, S, E, P, NULL, x_S, NULL, weights_S, back_rows));
    CHECK_OK(moe_exchange_combine(&back, T, S, E, P, place, ids_TK, back_rows, y, dw));
    for (int64_t i = 0; i < T * D; i++) {
        int64_t n = 0;
        for (int64_t p = 0; p < P; p++) n += owns(ids_TK, i / D, p, local);
        const double want = (double)n * check_get(dtype, x, i), got = check_get(dtype, y, i);
        CHECK(check_near(got, want, check_eps[dtype], fabs(want)), "%s y %d: %g, want %g", check_dtype[dtype], (int)i,
              got, want);
    }
    for (int64_t f = 0; f < T * K; f++) {
        const double want = ids_TK[f] >= 0 ? check_get(wdtype, weights, f) : 0;
        CHECK(check_get(wdtype, dw, f) == want, "weight %d is %g, want %g", (int)f, check_get(wdtype, dw, f), want);
    }
    free(send); free(place); free(x); free(weights); free(rows); free(x_S); free(weights_S); free(ids_S);
    free(back_rows); free(y); free(dw);
}

static void test_messages(void) {
    static const int64_t shape[][3] = {{8, 4, 2}, {1, 6, 3}, {33, 64, 64}, {7, 3, 1}, {256, 12, 4}};
    for (int d = 0; d < 4; d++)
        for (int s = 0; s < 5; s++) {
            check_messages(all_dtypes[d], all_dtypes[d], shape[s][0], shape[s][1], shape[s][2]);
            check_messages(all_dtypes[d], MOE_F32, shape[s][0], shape[s][1], shape[s][2]);
        }
}

static void test_bad_exchange(void) {
    int32_t ids[] = {0, 3}, counts[8], send[2], place[8] = {9}, bad_send[] = {-1}, bad_place[] = {0, 1};
    float   x[2] = {1, 2}, y[2] = {9, 9};
    const moe_message m = {MOE_F32, MOE_F32, 1, 0, 0, 0}, ints = {MOE_I32, MOE_F32, 1, 0, 0, 0},
                      half = {MOE_BF16, MOE_F16, 1, 1, 0, 1};
    CHECK_STATUS(moe_exchange_plan(2, 1, 3, 2, ids, NULL, counts, send, place), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_exchange_plan(2, 1, 4, 0, ids, NULL, counts, send, place), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_exchange_plan(INT32_MAX, 1, 4, 4, ids, NULL, counts, send, place), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_exchange_plan(2, 1, 2, 2, ids, NULL, counts, send, place), MOE_BAD_INDEX);
    CHECK_STATUS(moe_exchange_pack(&ints, 2, 2, 2, 1, NULL, x, NULL, NULL, y), MOE_BAD_DTYPE);
    CHECK_STATUS(moe_exchange_pack(&half, 2, 2, 2, 1, NULL, x, NULL, x, y), MOE_BAD_DTYPE);
    CHECK_STATUS(moe_exchange_pack(&m, 2, 1, 2, 1, NULL, x, NULL, NULL, y), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_exchange_pack(&m, 2, 1, 2, 2, bad_send, x, NULL, NULL, y), MOE_BAD_INDEX);
    CHECK_STATUS(moe_exchange_combine(&m, 2, 1, 1, 1, bad_place, NULL, x, y, NULL), MOE_BAD_INDEX);
    CHECK(y[0] == 9 && y[1] == 9 && place[0] == 9, "an output was touched");
}

static void tests(void) {
    test_messages();
    test_bad_exchange();
}
int main(void) { return check_main(tests); }
