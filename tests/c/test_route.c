// test_route.c: the router against its definition in double, its gradient against finite differences, and the promises
// that a formula does not show: ties, masks, threads, bad input.
#include "check.h"

static const int all_dtypes[] = {MOE_F64, MOE_F32, MOE_BF16, MOE_F16};

// Below this, 16-bit storage has a fixed step instead of a relative one.
static double smallest_normal(int dtype) { return dtype == MOE_F16 ? 0x1p-14 : 0x1p-100; }

// Scores, choice keys and kept weights of one row by their definitions.
static void define_row(const moe_router_args *a, const double *logit, const float *bias, double *score, double *key) {
    double top = -INFINITY, sum = 0;
    for (int64_t e = 0; e < a->E; e++) top = fmax(top, logit[e]);
    for (int64_t e = 0; e < a->E; e++) sum += exp(logit[e] - top);
    for (int64_t e = 0; e < a->E; e++) {
        score[e] = a->score == MOE_SIGMOID ? 1 / (1 + exp(-logit[e])) : exp(logit[e] - top) / sum;
        key[e] = a->score == MOE_TOPK_SOFTMAX || logit[e] == -INFINITY ? logit[e] : score[e] + (bias ? bias[e] : 0);
    }
}

static void define_weights(const moe_router_args *a, const double *logit, const double *score, const int32_t *ids,
                           double *w) {
    double total = 0, norm = 0;
    for (int64_t k = 0; k < a->K; k++) total += exp(logit[ids[k]] - logit[ids[0]]);
    for (int64_t k = 0; k < a->K; k++) {
        w[k] = a->score == MOE_TOPK_SOFTMAX ? exp(logit[ids[k]] - logit[ids[0]]) / total : score[ids[k]];
        norm = isinf(a->norm_p) ? fmax(norm, w[k]) : norm + pow(w[k], a->norm_p);
    }
    if (a->norm_p > 0 && !isinf(a->norm_p)) norm = pow(norm, 1 / a->norm_p);
    for (int64_t k = 0; k < a->K; k++) w[k] = a->scale * w[k] / (a->norm_p > 0 ? norm : 1);
}

// logits of a row in [-4, 4), every fifth masked where K leaves room.
static void *make_logits(const moe_router_args *a, bool masked) {
    uint64_t seed = (uint64_t)(a->T * 1000 + a->E);
    void *logits = check_alloc(a->T * a->E * moe_size(a->dtype));
    for (int64_t i = 0; i < a->T * a->E; i++) {
        double d = 8 * check_unit(&seed) - 4;
        if (masked && i % 5 == 0) d = -INFINITY;
        float f = (float)d;
        moe_k->store(a->dtype, 1, a->dtype == MOE_F64 ? (void *)&d : (void *)&f,
                     (char *)logits + i * moe_size(a->dtype));
    }
    return logits;
}

static void check_router(moe_router_args a, bool with_bias, bool masked) {
    const int64_t T = a.T, E = a.E, K = a.K, size = moe_size(a.dtype);
    uint64_t seed = 11;
    float *bias = with_bias ? check_alloc(4 * E) : NULL;
    for (int64_t e = 0; e < E && bias; e++) bias[e] = (float)check_unit(&seed);
    double *logit = check_alloc(8 * E), *score = check_alloc(8 * E), *key = check_alloc(8 * E),
           *want = check_alloc(8 * K);
    void *logits = make_logits(&a, masked);
    void *weights[2], *scores[2];
    int32_t *ids[2];
    for (int i = 0; i < 2; i++) {
        check_threads = 1 + 2 * i;
        weights[i] = check_alloc(T * K * size), scores[i] = check_alloc(T * E * size), ids[i] = check_alloc(T * K * 4);
        CHECK_OK(moe_router(&a, logits, bias, NULL, weights[i], ids[i], scores[i]));
    }
    CHECK(!memcmp(weights[0], weights[1], (size_t)(T * K * size)) &&
              !memcmp(scores[0], scores[1], (size_t)(T * E * size)) && !memcmp(ids[0], ids[1], (size_t)(T * K * 4)),
          "results know the number of threads");
    const double near = a.dtype == MOE_F64 ? 1e-14 : 1e-6;                     // of real arithmetic
    for (int64_t t = 0; t < T; t++) {
        const int32_t *id = ids[0] + t * K;
        bool kept[512] = {false}, legal = true;
        for (int64_t e = 0; e < E; e++) logit[e] = check_get(a.dtype, logits, t * E + e);
        define_row(&a, logit, bias, score, key);
        for (int64_t e = 0; e < E; e++)
            CHECK(check_near(check_get(a.dtype, scores[0], t * E + e), score[e], near + 1.01 * check_eps[a.dtype],
                             score[e] + smallest_normal(a.dtype)),
                  "%s score[%d,%d] = %g, want %g", check_dtype[a.dtype], (int)t, (int)e,
                  check_get(a.dtype, scores[0], t * E + e), score[e]);
        for (int64_t k = 0; k < K; k++) {
            legal = legal && id[k] >= 0 && id[k] < E && !kept[id[k]];
            if (legal) kept[id[k]] = true;
        }
        CHECK(legal, "ids of token %d", (int)t);
        if (!legal) continue;
        for (int64_t k = 0; k < K && a.balanced; k++) CHECK(id[k] == (t * K + k) % E, "id %d", id[k]);
        for (int64_t e = 0; e < E && !a.balanced; e++)
            CHECK(kept[e] || !(key[e] > key[id[K - 1]] + near), "%g of %d beats %g", key[e], (int)e, key[id[K - 1]]);
        for (int64_t k = 1; k < K && !a.balanced; k++)
            CHECK(!(key[id[k]] > key[id[k - 1]] + near), "order of token %d", (int)t);
        define_weights(&a, logit, score, id, want);
        for (int64_t k = 0; k < K; k++)
            CHECK(check_near(check_get(a.dtype, weights[0], t * K + k), want[k], 8 * near + 1.01 * check_eps[a.dtype],
                             want[k] + smallest_normal(a.dtype)),
                  "%s score %d p %g: weight[%d,%d] = %g, want %g", check_dtype[a.dtype], a.score, a.norm_p, (int)t,
                  (int)k, check_get(a.dtype, weights[0], t * K + k), want[k]);
    }
    for (int i = 0; i < 2; i++) { free(weights[i]); free(scores[i]); free(ids[i]); }
    free(bias); free(logit); free(score); free(key); free(want); free(logits);
}

static void test_router(void) {
    static const int64_t shape[][3] = {{0, 4, 2}, {1, 1, 1}, {7, 2, 2}, {130, 8, 2},
                                       {5000, 8, 3}, {33, 61, 8}, {9, 300, 6}, {5, 16, 16}};
    static const double  norm[] = {0, 1, 2, 0.5, 3, INFINITY};
    for (int d = 0; d < 4; d++)
        for (int s = 0; s < 8; s++)
            for (int score = MOE_SOFTMAX_TOPK; score <= MOE_SIGMOID; score++)
                for (int p = 0; p < 6; p++) {
                    moe_router_args a = {all_dtypes[d], score, 0, shape[s][0], shape[s][1], shape[s][2], norm[p], 2.5};
                    check_router(a, false, false);
                    if (p > 1) continue;
                    check_router(a, true, a.K <= a.E / 2);
                    a.balanced = 1;
                    check_router(a, false, false);
                }
}

// ---- gradient -------------------------------------------------------------------------------------------------------
// L = sum of cw * weights + cs * scores, at fixed ids, in fp64.
static double objective(const moe_router_args *a, const double *logits, const int32_t *ids, const double *cw,
                        const double *cs) {
    double L = 0, score[64], key[64], w[64];
    for (int64_t t = 0; t < a->T; t++) {
        define_row(a, logits + t * a->E, NULL, score, key);
        define_weights(a, logits + t * a->E, score, ids + t * a->K, w);
        for (int64_t k = 0; k < a->K && cw; k++) L += cw[t * a->K + k] * w[k];
        for (int64_t e = 0; e < a->E && cs; e++) L += cs[t * a->E + e] * score[e];
    }
    return L;
}

static void check_gradient(moe_router_args a, bool use_weights, bool use_scores) {
    const int64_t n = a.T * a.E, m = a.T * a.K;
    double *logits = make_logits(&a, false), *w = check_alloc(8 * m), *scores = check_alloc(8 * n),
           *d = check_alloc(8 * n);
    double *cw = use_weights ? check_floats(MOE_F64, m, 3) : NULL,
           *cs = use_scores ? check_floats(MOE_F64, n, 4) : NULL;
    int32_t *ids = check_alloc(4 * m);
    check_threads = 3;
    CHECK_OK(moe_router(&a, logits, NULL, NULL, w, ids, scores));
    CHECK_OK(moe_router_backward(&a, logits, scores, ids, cw, cs, d));
    for (int64_t i = 0; i < n; i++) {
        const double h = 1e-5, x = logits[i];
        logits[i] = x + h;
        double up = objective(&a, logits, ids, cw, cs);
        logits[i] = x - h;
        double down = objective(&a, logits, ids, cw, cs);
        logits[i] = x;
        CHECK(check_near(d[i], (up - down) / (2 * h), 1e-7, 1),
              "score %d p %g K %d balanced %d: dlogits[%d] = %g, want %g", a.score, a.norm_p, (int)a.K, a.balanced,
              (int)i, d[i], (up - down) / (2 * h));
    }
    // the other dtypes: the fp64 gradient of the rounded numbers, to the precision of storage
    for (int dt = 1; dt < 4; dt++) {
        const int dtype = all_dtypes[dt];
        const int64_t size = moe_size(dtype);
        moe_router_args b = a;
        b.dtype = dtype;
        void *low_logits = make_logits(&b, false), *low_scores = check_alloc(n * size), *low_w = check_alloc(m * size);
        void *low_d = check_alloc(n * size), *low_cw = use_weights ? check_floats(dtype, m, 3) : NULL;
        void *low_cs = use_scores ? check_floats(dtype, n, 4) : NULL;
        CHECK_OK(moe_router(&b, low_logits, NULL, NULL, low_w, ids, low_scores));
        CHECK_OK(moe_router_backward(&b, low_logits, low_scores, ids, low_cw, low_cs, low_d));
        for (int64_t i = 0; i < n; i++)
            logits[i] = check_get(dtype, low_logits, i), scores[i] = check_get(dtype, low_scores, i);
        for (int64_t i = 0; i < m && cw; i++) cw[i] = check_get(dtype, low_cw, i);
        for (int64_t i = 0; i < n && cs; i++) cs[i] = check_get(dtype, low_cs, i);
        CHECK_OK(moe_router_backward(&a, logits, scores, ids, cw, cs, d));
        for (int64_t i = 0; i < n; i++)
            CHECK(check_near(check_get(dtype, low_d, i), d[i], 1.01 * check_eps[dtype], fabs(d[i]) + 1e-4),
                  "%s dlogits[%d] = %g, want %g", check_dtype[dtype], (int)i, check_get(dtype, low_d, i), d[i]);
        free(low_logits); free(low_scores); free(low_w); free(low_d); free(low_cw); free(low_cs);
    }
    free(logits); free(w); free(scores); free(d); free(cw); free(cs); free(ids);
}

static void test_gradient(void) {
    static const int64_t K[] = {1, 3, 7};
    static const double  norm[] = {0, 1, 2, 0.5, 3, INFINITY};
    for (int score = MOE_SOFTMAX_TOPK; score <= MOE_SIGMOID; score++)
        for (int p = 0; p < 6; p++)
            for (int k = 0; k < 3; k++)
                for (int balanced = 0; balanced < 2; balanced++) {
                    moe_router_args a = {MOE_F64, score, balanced, 5, 7, K[k], norm[p], 1.5};
                    check_gradient(a, true, true);
                    check_gradient(a, true, false);
                    check_gradient(a, false, true);
                }
}

// The maximum of the max norm is shared: u = (1/2, 1/2), du = dw/n - <dw,u>/n^2 (1/2, 1/2), sigmoid' = 1/4.
static void test_shared_maximum(void) {
    const double logits[2] = {0, 0}, dw[2] = {1, 0};
    double  w[2], scores[2], d[2];
    int32_t ids[2];
    const moe_router_args a = {MOE_F64, MOE_SIGMOID, 0, 1, 2, 2, INFINITY, 1};
    CHECK_OK(moe_router(&a, logits, NULL, NULL, w, ids, scores));
    CHECK_OK(moe_router_backward(&a, logits, scores, ids, dw, NULL, d));
    CHECK(d[0] == 0.25 && d[1] == -0.25, "%g %g", d[0], d[1]);
}

// ---- ties, masks, bad input -----------------------------------------------------------------------------------------
static void test_ties(void) {
    for (int d = 0; d < 4; d++)
        for (int score = MOE_SOFTMAX_TOPK; score <= MOE_SIGMOID; score++) {
            enum { T = 3, E = 9, K = 4 };
            static const double row[E] = {0, 1, 0, 1, 0, 1, 2, 0, 0};
            static const int32_t want[K] = {6, 1, 3, 5};
            char   logits[T * E * 8], weights[T * K * 8], scores[T * E * 8];
            int32_t ids[T * K];
            for (int i = 0; i < T * E; i++) {
                double v = i < E ? 0 : row[i % E];
                float  f = (float)v;
                moe_k->store(all_dtypes[d], 1, d == 0 ? (void *)&v : (void *)&f, logits + i * moe_size(all_dtypes[d]));
            }
            moe_router_args a = {all_dtypes[d], score, 0, T, E, K, 1, 1};
            CHECK_OK(moe_router(&a, logits, NULL, NULL, weights, ids, scores));
            for (int k = 0; k < K; k++) {
                CHECK(ids[k] == k, "all equal: slot %d holds %d", k, ids[k]);
                CHECK(ids[K + k] == want[k] && ids[2 * K + k] == want[k], "slot %d holds %d, want %d", k, ids[K + k],
                      want[k]);
            }
        }
}

// Few different keys, of both signs and with both zeros: the order is by (-key, id).
static void test_top_k(void) {
    static const int64_t lengths[] = {1, 2, 15, 16, 17, 64, 100, 1000, MOE_MAX_EXPERTS};
    static float  f32[MOE_MAX_EXPERTS];
    static double f64[MOE_MAX_EXPERTS];
    int32_t ids[2][40];
    uint64_t seed = 5;
    for (int c = 0; c < 9; c++)
        for (int different = 1; different <= 1000; different *= 10) {
            const int64_t n = lengths[c], K = n < 40 ? n : 40;
            for (int64_t i = 0; i < n; i++) {
                const int64_t value = check_below(&seed, different) - different / 2;
                f64[i] = value == 4 ? -INFINITY : value || i % 2 ? (double)value * 0x1p-3 : -0.0;
                f32[i] = (float)f64[i];
            }
            moe_k->top_k(false, n, K, f32, ids[0]);
            moe_k->top_k(true, n, K, f64, ids[1]);
            for (int64_t k = 0; k < K; k++) {
                int64_t ahead = 0, id = ids[0][k];
                for (int64_t i = 0; i < n; i++) ahead += f64[i] > f64[id] || (f64[i] == f64[id] && i < id);
                CHECK(ahead == k && ids[1][k] == id, "%d keys: %d and %d in place %d", (int)n, (int)id, ids[1][k],
                      (int)k);
            }
        }
}

static void test_masks(void) {
    // A masked expert is never chosen, not for its bias and not where every other score has underflowed to the same 0.
    enum { E = 5, K = 4 };
    float   logits[E] = {-INFINITY, 0, -300, -300, -300}, bias[E] = {9, 0, 0, 0, 0}, weights[K], scores[E], d[E];
    float   one[K] = {1, 1, 1, 1};
    int32_t ids[K];
    for (int score = MOE_SOFTMAX_TOPK; score <= MOE_SIGMOID; score++) {
        moe_router_args a = {MOE_F32, score, 0, 1, E, K, 0, 1};
        CHECK_OK(moe_router(&a, logits, score == MOE_SOFTMAX_TOPK ? NULL : bias, NULL, weights, ids, scores));
        for (int k = 0; k < K; k++) CHECK(ids[k] == k + 1, "score %d: slot %d holds %d", score, k, ids[k]);
        CHECK(scores[0] == 0, "a masked score is %g", scores[0]);
        CHECK_OK(moe_router_backward(&a, logits, scores, ids, one, NULL, d));
        CHECK(d[0] == 0, "a masked gradient is %g", d[0]);
    }
    // Kept scores that are all zero keep zero weights and send no gradient.
    float far[2] = {0, -300}, w1[1];
    const float bias2[2] = {0, 9};
    moe_router_args a = {MOE_F32, MOE_SOFTMAX_TOPK, 0, 1, 2, 1, 1, 1};
    CHECK_OK(moe_router(&a, far, bias2, NULL, w1, ids, scores));
    CHECK(ids[0] == 1 && w1[0] == 0, "id %d weight %g", ids[0], w1[0]);
    CHECK_OK(moe_router_backward(&a, far, scores, ids, one, NULL, d));
    CHECK(d[0] == 0 && d[1] == 0, "gradient %g %g", d[0], d[1]);
}

// What was chosen, given back: the same bits. Then -1 in places: weights of the others alone, and no gradient from it.
static void test_forced(void) {
    enum { T = 3, E = 6, K = 3 };
    double  logits[T * E], w[T * K], scores[T * E], again[T * K], d[T * E];
    int32_t ids[T * K], forced[T * K] = {5, -1, 0, -1, -1, -1, 1, 2, 3}, same[T * K];
    uint64_t seed = 3;
    for (int i = 0; i < T * E; i++) logits[i] = 4 * check_unit(&seed);
    for (int score = MOE_SOFTMAX_TOPK; score <= MOE_SIGMOID; score++) {
        const moe_router_args a = {MOE_F64, score, 0, T, E, K, 1, 1.5};
        CHECK_OK(moe_router(&a, logits, NULL, NULL, w, ids, scores));
        CHECK_OK(moe_router(&a, logits, NULL, ids, again, same, scores));
        CHECK(!memcmp(w, again, sizeof w) && !memcmp(ids, same, sizeof ids), "score %d: own ids, other weights", score);
        CHECK_OK(moe_router(&a, logits, NULL, forced, w, ids, scores));
        CHECK(!memcmp(ids, forced, sizeof ids), "other ids than the forced ones");
        const double up = w[0] / (w[0] + w[2]), five = logits[5], none = logits[0];
        const double want = score == MOE_SIGMOID ? (1 + exp(-none)) / (2 + exp(-none) + exp(-five))
                                                 : 1 / (1 + exp(none - five));
        CHECK(check_near(up, want, 1e-14, 1), "score %d: share %g, want %g", score, up, want);
        CHECK(w[1] == 0 && w[3] == 0 && w[4] == 0 && w[5] == 0, "an absent one has a weight");
        CHECK(check_near(w[0] + w[2], 1.5, 1e-14, 1) && check_near(w[6] + w[7] + w[8], 1.5, 1e-14, 1), "norm");
        const double dw[T * K] = {1, NAN, 2, NAN, 3, 4, 5, 6, 7};
        CHECK_OK(moe_router_backward(&a, logits, scores, ids, dw, NULL, d));
        for (int e = 0; e < E; e++) CHECK(isfinite(d[e]) && d[E + e] == 0, "gradient %g %g", d[e], d[E + e]);
    }
}

static void expect_bad(int want, moe_router_args a, const float *logits, const float *bias,
                       const int32_t *forced) {
    float   weights[8], scores[8];
    int32_t ids[8];
    memset(weights, 0xff, sizeof weights);
    memset(scores, 0xff, sizeof scores);
    memset(ids, 0xff, sizeof ids);
    CHECK_STATUS(moe_router(&a, logits, bias, forced, weights, ids, scores), want);
    for (int i = 0; i < 8; i++)
        CHECK(isnan(weights[i]) && isnan(scores[i]) && ids[i] == -1, "output %d was touched", i);
}

static void test_bad_input(void) {
    const moe_router_args good = {MOE_F32, MOE_SIGMOID, 0, 2, 4, 2, 1, 1};
    const float fine[8] = {1, 2, 3, 4, 5, 6, 7, 8}, nan_bias[4] = {0, 0, NAN, 0};
    float x[8];
    moe_router_args a;
    a = good, a.dtype = MOE_I32, expect_bad(MOE_BAD_DTYPE, a, fine, NULL, NULL);
    a = good, a.T = -1, expect_bad(MOE_BAD_SHAPE, a, fine, NULL, NULL);
    a = good, a.K = 5, expect_bad(MOE_BAD_SHAPE, a, fine, NULL, NULL);
    a = good, a.K = 0, expect_bad(MOE_BAD_SHAPE, a, fine, NULL, NULL);
    a = good, a.E = 0, expect_bad(MOE_BAD_SHAPE, a, fine, NULL, NULL);
    a = good, a.E = MOE_MAX_EXPERTS + 1, expect_bad(MOE_BAD_SHAPE, a, fine, NULL, NULL);
    a = good, a.T = INT64_MAX / 4, expect_bad(MOE_BAD_SHAPE, a, fine, NULL, NULL);
    a = good, a.score = 3, expect_bad(MOE_BAD_VALUE, a, fine, NULL, NULL);
    a = good, a.norm_p = -1, expect_bad(MOE_BAD_VALUE, a, fine, NULL, NULL);
    a = good, a.norm_p = NAN, expect_bad(MOE_BAD_VALUE, a, fine, NULL, NULL);
    a = good, a.scale = NAN, expect_bad(MOE_BAD_VALUE, a, fine, NULL, NULL);
    expect_bad(MOE_BAD_VALUE, good, fine, nan_bias, NULL);
    memcpy(x, fine, sizeof x), x[7] = NAN, expect_bad(MOE_BAD_VALUE, good, x, NULL, NULL);
    memcpy(x, fine, sizeof x), x[7] = INFINITY, expect_bad(MOE_BAD_VALUE, good, x, NULL, NULL);
    memcpy(x, fine, sizeof x), x[0] = x[1] = x[2] = -INFINITY, expect_bad(MOE_BAD_VALUE, good, x, NULL, NULL);
    memcpy(x, fine, sizeof x), x[0] = -INFINITY, a = good, a.balanced = 1, expect_bad(MOE_BAD_VALUE, a, x, NULL, NULL);

    float d[8] = {9, 9, 9, 9, 9, 9, 9, 9};
    const int32_t past[4] = {0, 1, 2, 4}, below[4] = {0, -2, 2, 3}, twice[4] = {0, 1, 3, 3};
    CHECK_STATUS(moe_router_backward(&good, fine, fine, past, fine, NULL, d), MOE_BAD_INDEX);
    CHECK_STATUS(moe_router_backward(&good, fine, fine, below, fine, NULL, d), MOE_BAD_INDEX);
    for (int i = 0; i < 8; i++) CHECK(d[i] == 9, "dlogits[%d] was touched", i);
    expect_bad(MOE_BAD_INDEX, good, fine, NULL, past);
    expect_bad(MOE_BAD_INDEX, good, fine, NULL, below);
    expect_bad(MOE_BAD_INDEX, good, fine, NULL, twice);
}

static void tests(void) {
    test_router();
    test_gradient();
    test_shared_maximum();
    test_ties();
    test_top_k();
    test_masks();
    test_forced();
    test_bad_input();
}
int main(void) { return check_main(tests); }
