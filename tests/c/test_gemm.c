// test_gemm.c: grouped products and activations against naive loops in double: dtypes, transpositions, awkward sizes.
#include "check.h"

typedef struct { int64_t E, I, O; int bins[8], R; } shape;
static const shape shapes[] = {
    {1, 1, 1, {1}, 1},            {1, 5, 7, {0}, 0},               {2, 3, 0, {1, 2}, 2},       {2, 0, 5, {3, 4}, 6},
    {4, 13, 17, {0, 5, 5, 8}, 8}, {3, 64, 48, {7, 7, 33}, 40},     {2, 300, 35, {29, 31}, 31},
    {3, 31, 270, {0, 0, 47}, 47},
    {1, 257, 33, {211}, 211},     {8, 19, 23, {1, 2, 3, 5, 8, 13, 21, 34}, 37},
    {2, 9, 40, {800, 801}, 803},  {1, 2100, 260, {5}, 5},
};
enum { ROW_MAJOR, COLUMN_MAJOR, STRIDED, LAYOUTS };

// A matrix per expert of [rows, columns] in one of the layouts; *elements is its extent.
static moe_mat layout(int kind, int64_t E, int64_t rows, int64_t columns, int64_t *elements) {
    *elements = E * rows * columns * (kind == STRIDED ? 3 : 1);
    if (kind == ROW_MAJOR)    return (moe_mat){NULL, rows * columns, columns, 1};
    if (kind == COLUMN_MAJOR) return (moe_mat){NULL, rows * columns, 1, rows};
    return (moe_mat){NULL, 3, 3 * E * columns, 3 * E};              // the expert is the fastest axis, with gaps
}
static double mat_get(int dtype, moe_mat w, int64_t e, int64_t r, int64_t c) {
    return check_get(dtype, w.p, e * w.se + r * w.sr + c * w.sc);
}
static double unit_of_real(int dtype) { return dtype == MOE_F64 ? 0x1p-53 : 0x1p-24; }

static void check_forward(int dtype, const shape *s, const int32_t *bins, moe_mat w, const void *x, const void *y) {
    int64_t e = 0;
    for (int64_t r = 0; r < s->R; r++) {
        while (e < s->E && r >= bins[e]) e++;
        for (int64_t o = 0; o < s->O; o++) {
            double want = 0, scale = 0;
            for (int64_t i = 0; e < s->E && i < s->I; i++) {
                const double term = check_get(dtype, x, r * s->I + i) * mat_get(dtype, w, e, i, o);
                want += term, scale += fabs(term);
            }
            const double got = check_get(dtype, y, r * s->O + o);
            const double bound = (double)(s->I + 1) * unit_of_real(dtype) * scale
                               + check_eps[dtype] * fabs(want) * 1.01;
            CHECK(fabs(got - want) <= bound + 1e-7 * (dtype == MOE_F16), "%s y[%d,%d] = %g, want %g",
                  check_dtype[dtype], (int)r, (int)o, got, want);
        }
    }
}
static void check_wgrad(int dtype, const shape *s, const int32_t *bins, moe_mat dw, const void *x, const void *dy) {
    for (int64_t e = 0; e < s->E; e++)
        for (int64_t i = 0; i < s->I; i++)
            for (int64_t o = 0; o < s->O; o++) {
                double want = 0, scale = 0;
                const int64_t begin = e ? bins[e - 1] : 0;
                for (int64_t r = begin; r < bins[e]; r++) {
                    const double term = check_get(dtype, x, r * s->I + i) * check_get(dtype, dy, r * s->O + o);
                    want += term, scale += fabs(term);
                }
                const double got = mat_get(dtype, dw, e, i, o);
                const double bound = (double)(bins[e] - begin + 1) * unit_of_real(dtype) * scale
                                   + check_eps[dtype] * fabs(want) * 1.01;
                CHECK(fabs(got - want) <= bound + 1e-7 * (dtype == MOE_F16), "%s dw[%d,%d,%d] = %g, want %g",
                      check_dtype[dtype], (int)e, (int)i, (int)o, got, want);
            }
}

static void test_products(void) {
    for (size_t c = 0; c < sizeof shapes / sizeof *shapes; c++)
        for (int dtype = MOE_F64; dtype <= MOE_F16; dtype++)
            for (int kind = 0; kind < LAYOUTS; kind++) {
                const shape *s = &shapes[c];
                const int64_t size = moe_size(dtype);
                int64_t extent;
                moe_mat w = layout(kind, s->E, s->I, s->O, &extent), dw = w;
                void *x = check_floats(dtype, s->R * s->I, 1), *dy = check_floats(dtype, s->R * s->O, 3);
                w.p = check_floats(dtype, extent, 2);
                char *y[2], *grad[2];
                for (int run = 0; run < 2; run++) {     // one thread, then three and a larger cache: the same bits
                    check_threads = run ? 3 : 1;
                    moe_l2 = run ? 4 << 20 : 128 << 10;
                    void *work = check_alloc((int64_t)moe_grouped_gemm_workspace(dtype, s->R, s->E, s->I, s->O));
                    y[run] = check_alloc(s->R * s->O * size);
                    dw.p = grad[run] = check_alloc(extent * size);
                    CHECK_OK(moe_grouped_gemm(dtype, s->R, s->E, s->I, s->O, x, w, s->bins, work, y[run]));
                    CHECK_OK(moe_grouped_gemm_wgrad(dtype, s->R, s->E, s->I, s->O, x, dy, s->bins, work, dw));
                    free(work);
                }
                check_forward(dtype, s, s->bins, w, x, y[0]);
                check_wgrad(dtype, s, s->bins, dw, x, dy);
                CHECK(!memcmp(y[0], y[1], (size_t)(s->R * s->O * size)), "%s y differs", check_dtype[dtype]);
                CHECK(!memcmp(grad[0], grad[1], (size_t)(extent * size)), "%s dw differs", check_dtype[dtype]);
                for (int run = 0; run < 2; run++) free(y[run]), free(grad[run]);
                free(x), free(dy), free(w.p);
            }
    check_threads = 1;
}

// What a product of bf16 may lose beside its roundings: instructions for bf16 take an element or a sum below 2^-126 in
// size for zero; where bf16 is widened to float, such numbers count.
static void test_tiny_numbers(void) {
    static const double factors[][2] = {{0x1p-130, 0x1p100}, {0x1p100, -0x1p-130}, {0x1p-65, 0x1p-65}};
    static const double normal[2] = {0x1p-63, -0x1p-63};            // whose product, 2^-126, is kept
    enum { I = 2, TINY = 3 };
    const bool flushed = moe_gemm_kind(MOE_BF16) == GEMM_BF16;
    for (int c = 0; c <= TINY; c++)
        for (int at = 0; at < I; at++) {                            // the first or the second step of a pair
            const double *const f = c < TINY ? factors[c] : normal;
            float wide[2][I] = {{0}};
            uint16_t x[I], w[I], y;
            wide[0][at] = (float)f[0], wide[1][at] = (float)f[1];
            moe_k->store(MOE_BF16, I, wide[0], x);
            moe_k->store(MOE_BF16, I, wide[1], w);
            const int32_t bins[] = {1};
            void *work = check_alloc((int64_t)moe_grouped_gemm_workspace(MOE_BF16, 1, 1, I, 1));
            CHECK_OK(moe_grouped_gemm(MOE_BF16, 1, 1, I, 1, x, (moe_mat){w, I, 1, 1}, bins, work, &y));
            free(work);
            const double got = check_get(MOE_BF16, &y, 0), want = flushed && c < TINY ? 0 : f[0] * f[1];
            CHECK(got == want, "%g * %g = %g, want %g", f[0], f[1], got, want);
        }
}

static void test_refusals(void) {
    float x[4] = {0}, y[4];
    const moe_mat w = {x, 1, 1, 1};
    const int32_t falling[] = {2, 1}, past[] = {1, 5}, negative[] = {-1, 1};
    CHECK_STATUS(moe_grouped_gemm(MOE_I32, 2, 2, 1, 1, x, w, falling, NULL, y), MOE_BAD_DTYPE);
    CHECK_STATUS(moe_grouped_gemm(MOE_F32, -1, 2, 1, 1, x, w, falling, NULL, y), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_grouped_gemm(MOE_F32, 2, 2, INT64_MAX / 2, 2, x, w, falling, NULL, y), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_grouped_gemm(MOE_F32, 2, 2, 1, 1, x, w, falling, NULL, y), MOE_BAD_BINS);
    CHECK_STATUS(moe_grouped_gemm(MOE_F32, 2, 2, 1, 1, x, w, past, NULL, y), MOE_BAD_BINS);
    CHECK_STATUS(moe_grouped_gemm_wgrad(MOE_F32, 2, 2, 1, 1, x, x, negative, NULL, w), MOE_BAD_BINS);
    CHECK_STATUS(moe_activation(MOE_F32, MOE_RELU + 1, 1, 1, x, y), MOE_BAD_VALUE);
    CHECK_STATUS(moe_activation(MOE_F32, MOE_RELU, -1, 1, x, y), MOE_BAD_SHAPE);
}

// -- activations -----------------------------------------------------------------------------------------------------
static double unclamped(int act, double x) {
    const double c = 0.79788456080286535588;
    switch (act) {
    case MOE_SWIGLU_OAI:                     return x / (1 + exp(-1.702 * x));
    case MOE_SWIGLU: case MOE_SILU:          return x / (1 + exp(-x));
    case MOE_GEGLU: case MOE_GELU:           return 0.5 * x * erfc(-x * M_SQRT1_2);
    case MOE_GEGLU_TANH: case MOE_GELU_TANH: return x / (1 + exp(-2 * c * (x + 0.044715 * x * x * x)));
    default:                                 return x > 0 ? x : 0;
    }
}
static double exact(int act, double x) { return unclamped(act, act == MOE_SWIGLU_OAI && x > 7 ? 7 : x); }
static double slope(int act, double x) {                            // fourth-order difference
    const double h = 1e-3;
    if (act == MOE_RELU) return x > 0;
    if (act == MOE_SWIGLU_OAI && x > 7) return 0;
    return (8 * (unclamped(act, x + h) - unclamped(act, x - h)) -
            (unclamped(act, x + 2 * h) - unclamped(act, x - 2 * h))) / (12 * h);
}

static void test_activations(void) {
    enum { N = 3, F = 601 };                                        // more than a tile, and a remainder
    for (int dtype = MOE_F64; dtype <= MOE_F16; dtype++)
        for (int act = MOE_SWIGLU; act <= MOE_RELU; act++) {
            const bool gated = moe_act_gated(act);
            const int64_t U = gated ? 2 * F : F, size = moe_size(dtype);
            char *h = check_floats(dtype, N * U, 5), *da = check_floats(dtype, N * F, 6);
            char *a = check_alloc(N * F * size), *dh = check_alloc(N * U * size);
            for (int64_t i = 0; i < N * U; i++) {                   // [-12, 12): both tails
                double d = 12 * check_get(dtype, h, i);
                float f = (float)d;
                moe_k->store(dtype, 1, dtype == MOE_F64 ? (void *)&d : (void *)&f, h + i * size);
            }
            CHECK_OK(moe_activation(dtype, act, N, F, h, a));
            CHECK_OK(moe_activation_backward(dtype, act, N, F, h, da, dh));
            const double floor = dtype == MOE_F16 ? 0x1p-25 : 1e-12;        // half of f16's smallest step
            for (int64_t i = 0; i < N * F; i++) {
                const int64_t at = i / F * U + i % F;
                const double gate = check_get(dtype, h, at), plain_up = gated ? check_get(dtype, h, at + F) : 1;
                const bool clamped = act == MOE_SWIGLU_OAI, inside = !clamped || fabs(plain_up) <= 7;
                const double up = clamped ? fmax(-7, fmin(plain_up, 7)) + 1 : plain_up;
                const double g = check_get(dtype, da, i), f = exact(act, gate);
                // e^u multiplies the rounding of u, which grows like gate^2, or for gelu_tanh like |gate|^3
                const double tolerance = dtype == MOE_F64 ? 1e-9 : 1.01 * check_eps[dtype]
                                       + 0x1p-24 * (8 + gate * gate + 0.1 * fabs(gate * gate * gate));
                CHECK(check_near(check_get(dtype, a, i), f * up, tolerance, fabs(f * up) + floor / tolerance),
                      "%s act %d(%g) = %g", check_dtype[dtype], act, gate, check_get(dtype, a, i));
                const double want = g * up * slope(act, gate);
                CHECK(check_near(check_get(dtype, dh, at), want, tolerance,
                                 fabs(want) + fabs(g * up) + floor / tolerance),
                      "%s act %d'(%g) = %g, want %g", check_dtype[dtype], act, gate, check_get(dtype, dh, at), want);
                if (gated)
                    CHECK(check_near(check_get(dtype, dh, at + F), inside * g * f, tolerance,
                                     fabs(g * f) + floor / tolerance),
                          "%s act %d dup", check_dtype[dtype], act);
            }
            free(h), free(da), free(a), free(dh);
        }
}

// float exp and normal tails over the whole line: a few ulp, and the ends.
static void test_float_line(void) {
    for (int act = MOE_SILU; act <= MOE_RELU; act++)
        for (double d = -80; d < 80; d += 0.0371) {
            const float x = (float)d;
            float y;
            moe_k->act(false, act, 1, &x, NULL, &y);
            const double want = exact(act, x), ulp = 0x1p-23 * fabs(want);
            const double allowed = 4 * ulp + fabs(want) * 0x1p-24 * (d * d + 0.1 * fabs(d * d * d)) + 1e-37;
            CHECK(fabs(y - want) <= allowed, "act %d(%g) = %.9g, want %.9g", act, x, y, want);
        }
    static const float ends[] = {INFINITY, 3e38f, -3e38f, 1e20f, -1e20f};
    for (int act = MOE_SILU; act <= MOE_RELU; act++)
        for (int i = 0; i < 5; i++) {
            const float one = 1;
            float y, d;
            moe_k->act(false, act, 1, &ends[i], NULL, &y);
            CHECK(ends[i] > 0 ? y == ends[i] : y == 0, "act %d(%g) = %g", act, ends[i], y);
            if (isinf(ends[i])) continue;
            moe_k->dact(false, act, 1, &ends[i], NULL, &one, &d, NULL);
            CHECK(d == (ends[i] > 0), "act %d'(%g) = %g", act, ends[i], d);
        }
    const float nan = NAN;
    for (int act = MOE_SILU; act <= MOE_RELU; act++) {
        float y;
        moe_k->act(false, act, 1, &nan, NULL, &y);
        CHECK(isnan(y), "act %d(NaN) = %g", act, y);
    }
}

static void tests(void) {
    test_products();
    test_tiny_numbers();
    test_refusals();
    test_activations();
    test_float_line();
}
int main(void) { return check_main(tests); }
