// test_balance.c: capacity, counts, losses and the selection bias against their definitions; gradients against finite
// differences.
#include "check.h"

static const int all_dtypes[] = {MOE_F64, MOE_F32, MOE_BF16, MOE_F16};
static const int64_t shape[][4] = {  // T, S, K, E
    {0, 0, 1, 3}, {0, 16, 2, 4}, {1, 1, 1, 1}, {6, 3, 2, 4}, {6, 1, 2, 5}, {130, 13, 3, 7},
    {3000, 3000, 2, 8}, {40, 20, 5, 300},
};
enum { SHAPES = sizeof shape / sizeof *shape };

static int32_t *make_ids(int64_t T, int64_t K, int64_t E) {
    uint64_t seed = (uint64_t)(T + E);
    int32_t *ids = check_alloc(4 * T * K);
    for (int64_t i = 0; i < T * K; i++)
        ids[i] = (int32_t)(check_below(&seed, E + 1) * check_below(&seed, 3) / 2 % (E + 1)) - 1;
    return ids;
}

// ---- capacity -------------------------------------------------------------------------------------------------------
// In the last scope an expert has one place less, if it has any.
static void check_capacity(int dtype, int64_t T, int64_t S, int64_t K, int64_t E, int64_t capacity, bool by_priority) {
    uint64_t seed = 5;
    int32_t *ids = make_ids(T, K, E), *kept = check_alloc(4 * T * K), *capacity_G = check_alloc(4 * T);
    for (int64_t g = 0; S && g < T / S; g++) capacity_G[g] = (int32_t)(capacity - (capacity && g == T / S - 1));
    void    *priority = by_priority ? check_alloc(T * K * moe_real_size(dtype)) : NULL;
    for (int64_t i = 0; i < T * K && priority; i++) {          // few values: many ties
        double p = (double)check_below(&seed, 7) / 8;
        if (dtype == MOE_F64) ((double *)priority)[i] = p;
        else ((float *)priority)[i] = (float)p;
    }
    void *workspace = check_alloc((int64_t)moe_capacity_workspace(S, K, E));
    check_threads = 3;
    CHECK_OK(moe_capacity(dtype, T, S, K, E, ids, priority, capacity_G, workspace, kept));
    for (int64_t f = 0; f < T * K; f++) {                       // how many of its scope and expert come before it?
        int64_t before = 0, scope = S * K;
        for (int64_t g = f - f % scope; g < f - f % scope + scope; g++) {
            double pf = 0, pg = 0;
            if (priority) {
                pf = dtype == MOE_F64 ? ((double *)priority)[f] : (double)((float *)priority)[f];
                pg = dtype == MOE_F64 ? ((double *)priority)[g] : (double)((float *)priority)[g];
            }
            before += ids[g] == ids[f] && (pg > pf || (pg == pf && g < f));
        }
        const int32_t want = before < capacity_G[f / scope] ? ids[f] : -1;
        CHECK(kept[f] == want, "copy %d of %d x %d, capacity %d, priority %d: %d, want %d", (int)f, (int)T, (int)K,
              (int)capacity, by_priority, kept[f], want);
    }
    free(ids); free(kept); free(capacity_G); free(priority); free(workspace);
}

static void test_capacity(void) {
    for (int s = 0; s < SHAPES; s++)
        for (int64_t capacity = 0; capacity < 40; capacity = 2 * capacity + 1) {
            const int64_t *n = shape[s];
            check_capacity(MOE_BF16, n[0], n[1], n[2], n[3], capacity, false);
            check_capacity(MOE_F16, n[0], n[1], n[2], n[3], capacity, true);
            check_capacity(MOE_F64, n[0], n[1], n[2], n[3], capacity, true);
        }
    check_capacity(MOE_F32, 4000, 4000, 2, 3, 700, true);       // enough copies for several threads
    check_capacity(MOE_F32, 4000, 4000, 2, 3, 700, false);
}

// ---- balance losses -------------------------------------------------------------------------------------------------
static double define_loss(int form, const int64_t *n, const double *scores, const int32_t *counts) {
    const int64_t T = n[0], S = n[1], K = n[2], E = n[3];
    double total = 0;
    for (int64_t g = 0; g * S < T; g++)
        for (int64_t e = 0; e < E; e++) {
            double mean = 0;
            for (int64_t t = g * S; t < (g + 1) * S; t++) mean += scores[t * E + e] / (double)S;
            const double off = mean - 1.0 / (double)E;
            total += form == MOE_BALANCE_MSE ? off * off / (double)E
                                             : (double)E / (double)(S * K) * counts[g * E + e] * mean;
        }
    return T ? total / (double)(T / S) : 0;
}

static void check_balance(int dtype, int form, const int64_t *n) {
    const int64_t T = n[0], S = n[1], K = n[2], E = n[3], G = S ? T / S : 1;
    int32_t *ids = make_ids(T, K, E), *counts = check_alloc(4 * G * E), *want_counts = calloc((size_t)(G * E + 1), 4);
    CHECK_OK(moe_balance_counts(T, S, K, E, ids, counts));
    for (int64_t f = 0; f < T * K; f++)
        if (ids[f] >= 0) want_counts[f / K / S * E + ids[f]]++;
    for (int64_t i = 0; i < G * E; i++)
        CHECK(counts[i] == want_counts[i], "count %d: %d, want %d", (int)i, counts[i], want_counts[i]);

    void   *scores = check_floats(dtype, T * E, 9), *d = check_alloc(T * E * moe_size(dtype));
    double *wide = check_alloc(8 * T * E), loss[2] = {NAN, NAN}, upstream;
    void   *one = check_alloc(8);
    for (int64_t i = 0; i < T * E; i++) wide[i] = check_get(dtype, scores, i);
    for (int i = 0; i < 2; i++) {
        check_threads = 1 + 2 * i;
        CHECK_OK(moe_balance_loss(dtype, form, T, S, K, E, scores, counts, NULL, one));
        loss[i] = check_get(dtype == MOE_F64 ? MOE_F64 : MOE_F32, one, 0);
    }
    const double want = define_loss(form, n, wide, counts);
    CHECK(loss[0] == loss[1], "the loss knows the number of threads");
    CHECK(check_near(loss[0], want, dtype == MOE_F64 ? 1e-13 : 1e-7, 1 + fabs(want)), "%s form %d: %g, want %g", check_dtype[dtype], form,
          loss[0], want);

    if (dtype == MOE_F64) upstream = 3;
    else memcpy(&upstream, &(float){3}, 4);
    CHECK_OK(moe_balance_loss_backward(dtype, form, T, S, K, E, scores, counts, &upstream, NULL, d));
    for (int64_t i = 0; i < T * E; i += T * E / 100 + 1) {
        const double h = 16, x = wide[i];     // the loss is at most quadratic: a central difference is exact
        wide[i] = x + h;
        double slope = define_loss(form, n, wide, counts);
        wide[i] = x - h;
        slope = 3 * (slope - define_loss(form, n, wide, counts)) / (2 * h);
        wide[i] = x;
        CHECK(check_near(check_get(dtype, d, i), slope, 1.01 * check_eps[dtype] + 1e-9,
                         fabs(slope) + 1e-3 * (dtype == MOE_F16)),
              "%s form %d: d[%d] = %g, want %g", check_dtype[dtype], form, (int)i, check_get(dtype, d, i), slope);
    }
    free(ids); free(counts); free(want_counts); free(scores); free(d); free(wide); free(one);
}

static void test_balance(void) {
    for (int d = 0; d < 4; d++)
        for (int s = 0; s < SHAPES; s++) {
            if (shape[s][0] * shape[s][3] > 20000 && d > 1) continue;
            check_balance(all_dtypes[d], MOE_BALANCE_SWITCH, shape[s]);
            check_balance(all_dtypes[d], MOE_BALANCE_MSE, shape[s]);
        }
    // one expert per token in turn, uniform scores: the switch form is 1, the other 0
    const int32_t counts[4] = {2, 2, 2, 2};
    float scores[8 * 4];
    for (int i = 0; i < 32; i++) scores[i] = 0.25f;
    float loss;
    CHECK_OK(moe_balance_loss(MOE_F32, MOE_BALANCE_SWITCH, 8, 8, 1, 4, scores, counts, NULL, &loss));
    CHECK(loss == 1, "balanced: %g", loss);
    CHECK_OK(moe_balance_loss(MOE_F32, MOE_BALANCE_MSE, 8, 8, 1, 4, scores, NULL, NULL, &loss));
    CHECK(loss == 0, "balanced: %g", loss);
}

// ---- z-loss ---------------------------------------------------------------------------------------------------------
static double define_lse(const double *x, int64_t E) {
    double sum = 0;
    for (int64_t e = 0; e < E; e++) sum += exp(x[e]);
    return log(sum);
}

static void check_z(int dtype, int64_t T, int64_t E) {
    void   *logits = check_floats(dtype, T * E, 2), *d[2], *lse = check_alloc(T * moe_real_size(dtype));
    double *x = check_alloc(8 * T * E), loss = NAN, want = 0, half;
    const double near = dtype == MOE_F64 ? 1e-13 : 1e-6;
    for (int64_t i = 0; i < T * E; i++) x[i] = check_get(dtype, logits, i);
    for (int64_t t = 0; t < T; t++) want += pow(define_lse(x + t * E, E), 2) / (double)T;
    check_threads = 3;
    CHECK_OK(moe_z_loss(dtype, T, E, logits, lse, &half));
    loss = check_get(dtype == MOE_F64 ? MOE_F64 : MOE_F32, &half, 0);
    if (dtype == MOE_F64) half = 0.5;
    else memcpy(&half, &(float){0.5f}, 4);
    CHECK(check_near(loss, want, near, 1 + want), "%s: %g, want %g", check_dtype[dtype], loss, want);
    for (int i = 0; i < 2; i++) {
        check_threads = 1 + 2 * i;
        d[i] = check_alloc(T * E * moe_size(dtype));
        CHECK_OK(moe_z_loss_backward(dtype, T, E, logits, lse, &half, d[i]));
    }
    CHECK(!memcmp(d[0], d[1], (size_t)(T * E * moe_size(dtype))), "gradients know the number of threads");
    for (int64_t i = 0; i < T * E; i++) {
        double *row = x + i / E * E, keep = x[i], h = 1e-5, slope;
        x[i] = keep + h, slope = pow(define_lse(row, E), 2);
        x[i] = keep - h, slope = 0.5 * (slope - pow(define_lse(row, E), 2)) / (2 * h) / (double)T;
        x[i] = keep;
        CHECK(check_near(check_get(dtype, d[0], i), slope, 1.01 * check_eps[dtype] + 4 * near + 1e-7,
                         fabs(slope) + 1e-3 / (double)T),
              "%s d[%d] = %g, want %g", check_dtype[dtype], (int)i, check_get(dtype, d[0], i), slope);
    }
    free(logits); free(d[0]); free(d[1]); free(lse); free(x);
}

static void test_z(void) {
    for (int d = 0; d < 4; d++) {
        check_z(all_dtypes[d], 0, 4);
        check_z(all_dtypes[d], 1, 1);
        check_z(all_dtypes[d], 7, 5);
        if (d != MOE_F16) check_z(all_dtypes[d], 3000, 8);      // threads; in f16 1/T would leave only subnormals
    }
}

// ---- selection bias, bad input --------------------------------------------------------------------------------------
static void test_select_bias(void) {
    float bias[4] = {0, 1, 2, 3};
    const int64_t counts[4] = {3, 5, 4, 4}, negative[4] = {1, -1, 0, 0};
    CHECK_OK(moe_select_bias_update(4, 0.25, counts, bias));
    CHECK(bias[0] == 0.25f && bias[1] == 0.75f && bias[2] == 2 && bias[3] == 3, "%g %g %g %g", bias[0], bias[1],
          bias[2], bias[3]);
    CHECK_STATUS(moe_select_bias_update(4, 0.25, negative, bias), MOE_BAD_VALUE);
    CHECK_STATUS(moe_select_bias_update(4, NAN, counts, bias), MOE_BAD_VALUE);
    CHECK_STATUS(moe_select_bias_update(-1, 0.25, counts, bias), MOE_BAD_SHAPE);
    CHECK(bias[0] == 0.25f && bias[1] == 0.75f, "an output was touched");
}

static void test_bad_input(void) {
    const int32_t ids[4] = {0, 1, -1, 2}, past[4] = {0, 1, -1, 3}, below[4] = {0, -2, 1, 1};
    const float   p[4] = {1, 2, NAN, 4};
    const int32_t one[2] = {1, 1}, negative[2] = {1, -1};
    int32_t       out[8] = {9, 9, 9, 9, 9, 9, 9, 9}, space[16];
    CHECK_STATUS(moe_capacity(MOE_I32, 2, 2, 2, 3, ids, NULL, one, space, out), MOE_BAD_DTYPE);
    CHECK_STATUS(moe_capacity(MOE_F32, 2, 3, 2, 3, ids, NULL, one, space, out), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_capacity(MOE_F32, 2, 0, 2, 3, ids, NULL, one, space, out), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_capacity(MOE_F32, 2, 2, 4, 3, ids, NULL, one, space, out), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_capacity(MOE_F32, 2, 1, 2, 3, ids, NULL, negative, space, out), MOE_BAD_VALUE);
    CHECK_STATUS(moe_capacity(MOE_F32, 2, 2, 2, 3, past, NULL, one, space, out), MOE_BAD_INDEX);
    CHECK_STATUS(moe_capacity(MOE_F32, 2, 2, 2, 3, ids, p, one, space, out), MOE_BAD_VALUE);
    CHECK_STATUS(moe_balance_counts(2, 2, 2, 3, past, out), MOE_BAD_INDEX);
    CHECK_STATUS(moe_balance_counts(2, 2, 2, 3, below, out), MOE_BAD_INDEX);
    CHECK_STATUS(moe_balance_counts(2, 2, 2, MOE_MAX_EXPERTS + 1, ids, out), MOE_BAD_SHAPE);
    for (int i = 0; i < 8; i++) CHECK(out[i] == 9, "out[%d] was touched", i);

    float  x[6] = {0}, y[6] = {9, 9, 9, 9, 9, 9};
    float loss = 9;
    CHECK_STATUS(moe_balance_loss(MOE_I64, MOE_BALANCE_MSE, 2, 2, 1, 3, x, NULL, NULL, &loss), MOE_BAD_DTYPE);
    CHECK_STATUS(moe_balance_loss(MOE_F32, 7, 2, 2, 1, 3, x, ids, NULL, &loss), MOE_BAD_VALUE);
    CHECK_STATUS(moe_balance_loss_backward(MOE_F32, MOE_BALANCE_MSE, -2, 2, 1, 3, x, NULL, x, NULL, y), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_z_loss(MOE_I16, 2, 3, x, y, &loss), MOE_BAD_DTYPE);
    CHECK_STATUS(moe_z_loss(MOE_F32, 2, 0, x, y, &loss), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_z_loss_backward(MOE_F32, -1, 3, x, x, x, y), MOE_BAD_SHAPE);
    CHECK(loss == 9, "the loss was touched");
    for (int i = 0; i < 6; i++) CHECK(y[i] == 9, "y[%d] was touched", i);
}

static void tests(void) {
    test_capacity();
    test_balance();
    test_z();
    test_select_bias();
    test_bad_input();
}
int main(void) { return check_main(tests); }
