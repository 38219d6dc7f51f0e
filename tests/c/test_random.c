// test_random.c: the counter-based numbers: the published vectors of Philox, their distribution, and that an element
// does not know the matrix around it.
#include "check.h"
#include "philox.h"

static const int all_dtypes[] = {MOE_F64, MOE_F32, MOE_BF16, MOE_F16};
static const moe_random_key key0 = {.seed = 0x123456789abcdef0, .step = 7, .site = 3, .row0 = 0};

// Random123's kat_vectors for philox4x32-10.
static void test_known_answers(void) {
    static const struct { philox_block counter; uint32_t key[2]; uint32_t want[4]; } known[] = {
        {{{0, 0, 0, 0}}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{{~0u, ~0u, ~0u, ~0u}}, {~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (int i = 0; i < 3; i++) {
        philox_block got = philox(known[i].counter, known[i].key[0], known[i].key[1]);
        for (int w = 0; w < 4; w++)
            CHECK(got.word[w] == known[i].want[w], "vector %d word %d is %08x", i, w, got.word[w]);
    }
}

// The header's functions against libm, on every 255th of their 2^24 arguments; 255 divides 2^24 - 1, the last.
static void test_functions(void) {
    for (uint32_t k = 0; k < 1u << 24; k += 255) {
        const float x = (float)(k + 1) * 0x1p-24f;
        const double angle = 6.283185307179586 * k * 0x1p-24;
        float c, s;
        philox_cos_sin(k, &c, &s);
        CHECK(check_near(philox_log(x), log(x), 9e-8, fabs(log(x))), "log(%g) is %g", x, philox_log(x));
        CHECK(check_near(c, cos(angle), 1.2e-7, 1) && check_near(s, sin(angle), 1.2e-7, 1), "angle %g", angle);
    }
}

// Element (row, col) by its definition, one word at a time.
static double defined(bool normal, moe_random_key key, int64_t row, int64_t col) {
    philox_block b = philox_at(key.seed, key.step, key.site, key.row0 + row, col / 4);
    if (!normal) return (double)(b.word[col % 4] >> 8) / (1 << 24);
    double u = 1 - (double)(b.word[col % 4 & 2] >> 8) / (1 << 24),
           v = 6.283185307179586 * (b.word[(col % 4) | 1] >> 8) / (1 << 24);
    return sqrt(-2 * log(u)) * (col % 2 ? sin(v) : cos(v));
}

static void check_draw(int dtype, int64_t rows, int64_t cols) {
    const int64_t bytes = rows * cols * moe_size(dtype);
    void *u = check_alloc(bytes), *z = check_alloc(bytes), *again = check_alloc(bytes);
    check_threads = 1;
    CHECK_OK(moe_uniform(dtype, key0, rows, cols, -2, 3, u));
    CHECK_OK(moe_normal(dtype, key0, rows, cols, 1, 2, z));
    for (int64_t i = 0; i < rows * cols; i++) {
        const double got_u = check_get(dtype, u, i), want_u = 5 * defined(false, key0, i / cols, i % cols) - 2;
        const double got_z = check_get(dtype, z, i), want_z = 2 * defined(true, key0, i / cols, i % cols) + 1;
        const double eps = dtype == MOE_F64 ? check_eps[MOE_F32] : check_eps[dtype];
        CHECK(check_near(got_u, want_u, 2 * eps, 3), "%s uniform %d: %g, want %g", check_dtype[dtype], (int)i, got_u,
              want_u);
        CHECK(check_near(got_z, want_z, 4 * eps, 1 + fabs(want_z)), "%s normal %d: %g, want %g", check_dtype[dtype],
              (int)i, got_z, want_z);
    }
    check_threads = 3;
    CHECK_OK(moe_normal(dtype, key0, rows, cols, 1, 2, again));
    CHECK(!memcmp(z, again, (size_t)bytes), "%s [%d,%d] differs with threads", check_dtype[dtype], (int)rows,
          (int)cols);
    if (rows > 2) {                                 // the lower rows, drawn alone
        moe_random_key below = key0;
        below.row0 = 2;
        CHECK_OK(moe_normal(dtype, below, rows - 2, cols, 1, 2, again));
        CHECK(!memcmp((char *)z + 2 * cols * moe_size(dtype), again, (size_t)((rows - 2) * cols * moe_size(dtype))),
              "row0");
    }
    free(u); free(z); free(again);
}

static void test_draws(void) {
    static const int64_t shape[][2] = {{0, 5}, {5, 0}, {1, 1}, {3, 2}, {4, 3}, {7, 257}, {100, 513}};
    for (int d = 0; d < 4; d++)
        for (int s = 0; s < 7; s++) check_draw(all_dtypes[d], shape[s][0], shape[s][1]);
}

// A rank that holds rows 2, 3, 4 of every 10 draws those rows of the whole; the last run may be short.
static void test_runs(void) {
    enum { RUNS = 5, COLS = 300 };
    const moe_random_key runs = {.seed = key0.seed, .step = 7, .site = 3, .row0 = 2, .run = 3, .stride = 10};
    float *whole = check_alloc(4 * 10 * RUNS * COLS), *part = check_alloc(4 * 3 * RUNS * COLS);
    check_threads = 3;
    CHECK_OK(moe_normal(MOE_F32, key0, 10 * RUNS, COLS, 0, 1, whole));
    for (int64_t rows = 0; rows <= 3 * RUNS; rows++) {
        CHECK_OK(moe_normal(MOE_F32, runs, rows, COLS, 0, 1, part));
        for (int64_t r = 0; r < rows; r++)
            CHECK(!memcmp(part + r * COLS, whole + (2 + r / 3 * 10 + r % 3) * COLS, 4 * COLS), "row %d of %d", (int)r,
                  (int)rows);
    }
    free(whole); free(part);
}

// MOE_F64 holds the numbers of MOE_F32; another seed half, step, site or row gives others.
static void test_keys(void) {
    enum { N = 64 };
    float  x[N], y[N];
    double wide[N];
    CHECK_OK(moe_normal(MOE_F32, key0, 1, N, 0.1, 0.3, x));
    CHECK_OK(moe_normal(MOE_F64, key0, 1, N, 0.1, 0.3, wide));
    for (int i = 0; i < N; i++) CHECK(wide[i] == x[i], "%d: %.17g against %.17g", i, wide[i], x[i]);
    moe_random_key other[] = {key0, key0, key0, key0, key0, key0};
    other[0].seed ^= 1;
    other[1].seed ^= UINT64_C(1) << 40;
    other[2].step++;
    other[3].site++;
    other[4].row0 = 1;
    other[5].row0 = INT64_C(1) << 32;
    for (int k = 0; k < 6; k++) {
        CHECK_OK(moe_normal(MOE_F32, other[k], 1, N, 0.1, 0.3, y));
        int same = 0;
        for (int i = 0; i < N; i++) same += x[i] == y[i];
        CHECK(same <= 1, "key %d repeats %d of %d numbers", k, same, N);
    }
}

// Every instruction set draws the same bits.
static void test_tables(void) {
    enum { N = 256 };
    float x[N], y[N];
    for (int normal = 0; normal < 2; normal++) {
        moe_k->random(normal, &key0, 5, 12, N, x);
        moe_kernels_base.random(normal, &key0, 5, 12, N, y);
        CHECK(!memcmp(x, y, sizeof x), "normal %d: %g against %g", normal, x[0], y[0]);
    }
}

static void test_moments(void) {
    const int64_t rows = 400, cols = 1000, n = rows * cols;
    float *u = check_alloc(4 * n), *z = check_alloc(4 * n);
    CHECK_OK(moe_uniform(MOE_F32, key0, rows, cols, 0, 1, u));
    CHECK_OK(moe_normal(MOE_F32, key0, rows, cols, 0, 1, z));
    double mean_u = 0, var_u = 0, mean = 0, var = 0, third = 0, fourth = 0, neighbour = 0;
    int    tenth[10] = {0}, range = 0;
    for (int64_t i = 0; i < n; i++) {
        range += u[i] >= 0 && u[i] < 1;
        tenth[(int)(u[i] * 10) % 10]++;
        mean_u += u[i] / (double)n;
        var_u += (u[i] - 0.5) * (u[i] - 0.5) / (double)n;
        mean += z[i] / (double)n;
        var += (double)z[i] * z[i] / (double)n;
        third += (double)z[i] * z[i] * z[i] / (double)n;
        fourth += (double)z[i] * z[i] * z[i] * z[i] / (double)n;
        if (i) neighbour += (double)z[i] * z[i - 1] / (double)n;
    }
    const double sigma = 5 / sqrt((double)n);       // five standard errors of a statistic of unit variance
    CHECK(range == n, "%d of %d in [0, 1)", range, (int)n);
    CHECK(check_near(mean_u, 0.5, sigma, 0.289), "mean %g", mean_u);
    CHECK(check_near(var_u, 1.0 / 12, sigma, 0.0745), "variance %g", var_u);
    for (int b = 0; b < 10; b++)
        CHECK(check_near(tenth[b], (double)n / 10, sigma, 0.3 * (double)n), "bin %d holds %d", b, tenth[b]);
    CHECK(check_near(mean, 0, sigma, 1) && check_near(var, 1, sigma, 1.42), "mean %g variance %g", mean, var);
    CHECK(check_near(third, 0, sigma, 3.88) && check_near(fourth, 3, sigma, 9.8), "third %g fourth %g", third, fourth);
    CHECK(check_near(neighbour, 0, sigma, 1), "neighbours %g", neighbour);
    free(u); free(z);
}

static void check_dropout(int dtype, double p) {
    enum { ROWS = 50, COLS = 301 };
    void *x = check_floats(dtype, ROWS * COLS, 5), *y = check_alloc(ROWS * COLS * moe_size(dtype));
    check_threads = 3;
    CHECK_OK(moe_dropout(dtype, key0, ROWS, COLS, p, x, y));
    for (int64_t i = 0; i < ROWS * COLS; i++) {
        const bool keep = defined(false, key0, i / COLS, i % COLS) >= p;
        const double want = keep ? check_get(dtype, x, i) / (1 - p) : 0, got = check_get(dtype, y, i);
        CHECK(check_near(got, want, 2 * check_eps[dtype], fabs(want)), "%s p %g, %d: %g, want %g", check_dtype[dtype],
              p, (int)i, got, want);
    }
    free(x); free(y);
}

static void test_dropout(void) {
    for (int d = 0; d < 4; d++) {
        check_dropout(all_dtypes[d], 0);
        check_dropout(all_dtypes[d], 0.3);
        check_dropout(all_dtypes[d], 1);
    }
}

static void test_bad_random(void) {
    float y[4] = {9, 9, 9, 9};
    const double bad_p[] = {-0.1, 1.1, NAN};
    moe_random_key bad = key0;
    CHECK_STATUS(moe_uniform(MOE_I32, key0, 2, 2, 0, 1, y), MOE_BAD_DTYPE);
    CHECK_STATUS(moe_normal(MOE_F32, key0, -1, 2, 0, 1, y), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_normal(MOE_F32, key0, INT64_MAX / 2, 3, 0, 1, y), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_uniform(MOE_F32, key0, 2, 2, 1, 1, y), MOE_BAD_VALUE);
    CHECK_STATUS(moe_uniform(MOE_F32, key0, 2, 2, 0, INFINITY, y), MOE_BAD_VALUE);
    CHECK_STATUS(moe_normal(MOE_F32, key0, 2, 2, 0, -1, y), MOE_BAD_VALUE);
    CHECK_STATUS(moe_normal(MOE_F32, key0, 2, 2, NAN, 1, y), MOE_BAD_VALUE);
    for (int i = 0; i < 3; i++) CHECK_STATUS(moe_dropout(MOE_F32, key0, 2, 2, bad_p[i], y, y), MOE_BAD_VALUE);
    bad.step = INT64_C(1) << 32;
    CHECK_STATUS(moe_normal(MOE_F32, bad, 2, 2, 0, 1, y), MOE_BAD_VALUE);
    bad = key0, bad.site = -1;
    CHECK_STATUS(moe_normal(MOE_F32, bad, 2, 2, 0, 1, y), MOE_BAD_VALUE);
    bad = key0, bad.row0 = INT64_MAX;
    CHECK_STATUS(moe_normal(MOE_F32, bad, 2, 2, 0, 1, y), MOE_BAD_VALUE);
    bad = key0, bad.run = -1;
    CHECK_STATUS(moe_normal(MOE_F32, bad, 2, 2, 0, 1, y), MOE_BAD_VALUE);
    bad = key0, bad.run = 2, bad.stride = 1;
    CHECK_STATUS(moe_normal(MOE_F32, bad, 3, 1, 0, 1, y), MOE_BAD_VALUE);
    bad.run = 1, bad.stride = INT64_MAX / 2;
    CHECK_STATUS(moe_normal(MOE_F32, bad, 4, 1, 0, 1, y), MOE_BAD_VALUE);
    for (int i = 0; i < 4; i++) CHECK(y[i] == 9, "an output was touched: %g", y[i]);
}

static void tests(void) {
    test_known_answers();
    test_functions();
    test_draws();
    test_runs();
    test_keys();
    test_tables();
    test_moments();
    test_dropout();
    test_bad_random();
}
int main(void) { return check_main(tests); }
