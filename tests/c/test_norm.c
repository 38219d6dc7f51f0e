// test_norm.c: RMSNorm, addition and norm, their backwards, the sum of squares and RoPE's rotation against their
// definitions in double.
#include "check.h"

static const int all_dtypes[] = {MOE_F64, MOE_F32, MOE_BF16, MOE_F16};
static const double near_of[] = {1e-14, 2e-6, 2e-6, 2e-6};
static int real_of(int dtype) { return dtype == MOE_F64 ? MOE_F64 : MOE_F32; }

static void check_norm(int dtype, int wdtype, int64_t R, int64_t n) {
    const int64_t size = moe_size(dtype), real = moe_real_size(dtype);
    const double  eps = 1e-5, near = near_of[dtype];
    void *x = check_floats(dtype, R * n, 1), *w = check_floats(wdtype, n, 2), *dy = check_floats(dtype, R * n, 3);
    void *y[2], *r[2], *dx[2], *dw[2];
    for (int i = 0; i < 2; i++) {
        check_threads = 1 + 2 * i;
        y[i] = check_alloc(R * n * size), r[i] = check_alloc(R * real), dx[i] = check_alloc(R * n * size);
        dw[i] = check_alloc(n * moe_size(wdtype));
        void *work = check_alloc((int64_t)moe_rms_norm_workspace(n));
        CHECK_OK(moe_rms_norm(dtype, wdtype, R, n, eps, x, w, work, y[i], r[i]));
        free(work);
        work = check_alloc((int64_t)moe_rms_norm_backward_workspace(R, n));
        CHECK_OK(moe_rms_norm_backward(dtype, wdtype, R, n, x, w, r[i], dy, work, dx[i], dw[i]));
        free(work);
    }
    CHECK(!memcmp(y[0], y[1], (size_t)(R * n * size)) && !memcmp(dx[0], dx[1], (size_t)(R * n * size)) &&
          !memcmp(dw[0], dw[1], (size_t)(n * moe_size(wdtype))), "results know the threads");
    double *want_dw = calloc((size_t)n, 8), *size_dw = calloc((size_t)n, 8);
    for (int64_t m = 0; m < R; m++) {
        double squares = 0, sum = 0, terms = 0;
        for (int64_t i = 0; i < n; i++) {
            const double v = check_get(dtype, x, m * n + i);
            squares += v * v;
        }
        const double want_r = 1 / sqrt(squares / (double)n + eps);
        CHECK(check_near(check_get(real_of(dtype), r[0], m), want_r, near, want_r), "r[%d]", (int)m);
        for (int64_t i = 0; i < n; i++) {
            const double v = check_get(dtype, x, m * n + i) * check_get(wdtype, w, i) * check_get(dtype, dy, m * n + i);
            sum += v, terms += fabs(v);
        }
        for (int64_t i = 0; i < n; i++) {
            const double xi = check_get(dtype, x, m * n + i), wi = check_get(wdtype, w, i);
            const double dyi = check_get(dtype, dy, m * n + i), c = want_r * want_r * want_r / (double)n;
            const double want_y = want_r * xi * wi, want_dx = want_r * wi * dyi - c * sum * xi;
            CHECK(check_near(check_get(dtype, y[0], m * n + i), want_y, near + 1.01 * check_eps[dtype],
                             fabs(want_y) + (dtype == MOE_F16 ? 0x1p-14 : 0)), "%s y[%d,%d]", check_dtype[dtype],
                  (int)m, (int)i);
            CHECK(check_near(check_get(dtype, dx[0], m * n + i), want_dx, near + 1.01 * check_eps[dtype],
                             fabs(want_r * wi * dyi) + c * terms * fabs(xi) + (dtype == MOE_F16 ? 0x1p-14 : 0)),
                  "%s dx[%d,%d]", check_dtype[dtype], (int)m, (int)i);
            want_dw[i] += want_r * xi * dyi, size_dw[i] += fabs(want_r * xi * dyi);
        }
    }
    for (int64_t i = 0; i < n; i++)
        CHECK(check_near(check_get(wdtype, dw[0], i), want_dw[i], near + 1.01 * check_eps[wdtype],
                         size_dw[i] + (wdtype == MOE_F16 ? 0x1p-14 : 0)), "%s dw[%d] = %g, want %g",
              check_dtype[dtype], (int)i, check_get(wdtype, dw[0], i), want_dw[i]);
    free(x); free(w); free(dy); free(want_dw); free(size_dw);
    for (int i = 0; i < 2; i++) { free(y[i]); free(r[i]); free(dx[i]); free(dw[i]); }
}

static void test_norm(void) {
    static const int64_t shape[][2] = {{0, 3}, {1, 1}, {5, 15}, {200, 33}, {64, 64}, {65, 1024}, {3, 2500}};
    for (int d = 0; d < 4; d++)
        for (int s = 0; s < 7; s++) {
            check_norm(all_dtypes[d], all_dtypes[d], shape[s][0], shape[s][1]);
            check_norm(all_dtypes[d], real_of(all_dtypes[d]), shape[s][0], shape[s][1]);
        }
}

// adds, centred, biased: with y, of LayerNorm, with b.
static void check_add_norm(int half, int64_t R, int64_t n, int adds, int centred, int biased) {
    const double eps = 1e-5, near = 1e-5, half_eps = 1.01 * check_eps[half], tiny = half == MOE_F16 ? 0x1p-14 : 0;
    float *x = check_floats(MOE_F32, R * n, 1), *w = check_floats(MOE_F32, n, 2), *b = check_floats(MOE_F32, n, 3);
    float *ds = check_floats(MOE_F32, R * n, 4), *s[2], *stats[2], *dx[2], *dw[2], *db[2];
    void  *y = check_floats(half, R * n, 5), *dz = check_floats(half, R * n, 6), *z[2], *dy[2];
    for (int i = 0; i < 2; i++) {
        check_threads = 1 + 2 * i;
        s[i] = check_alloc(4 * R * n), z[i] = check_alloc(2 * R * n), stats[i] = check_alloc(8 * R);
        dx[i] = check_alloc(4 * R * n), dy[i] = check_alloc(2 * R * n), dw[i] = check_alloc(4 * n);
        db[i] = check_alloc(4 * n);
        CHECK_OK(moe_add_norm(half, centred, R, n, eps, x, adds ? y : NULL, w, biased ? b : NULL, s[i], z[i],
                              stats[i]));
        void *work = check_alloc((int64_t)moe_add_norm_backward_workspace(R, n));
        CHECK_OK(moe_add_norm_backward(half, centred, R, n, adds ? ds : NULL, dz, adds ? s[i] : x, w, stats[i], work,
                                       dx[i], adds ? dy[i] : NULL, dw[i], biased ? db[i] : NULL));
        free(work);
    }
    CHECK(!memcmp(z[0], z[1], (size_t)(2 * R * n)) && !memcmp(dx[0], dx[1], (size_t)(4 * R * n)) &&
          !memcmp(dw[0], dw[1], (size_t)(4 * n)), "results know the threads");
    double *u = calloc((size_t)n, 8), *want_dw = calloc((size_t)(4 * n), 8), *size_dw = want_dw + n;
    double *want_db = size_dw + n, *size_db = want_db + n;
    for (int64_t m = 0; m < R; m++) {
        double mean = 0, square = 0, mean_h = 0, mean_hu = 0, terms = 0;
        for (int64_t i = 0; i < n; i++) {
            const float sum = adds ? x[m * n + i] + (float)check_get(half, y, m * n + i) : x[m * n + i];
            if (adds) CHECK(s[0][m * n + i] == sum, "s[%d,%d]", (int)m, (int)i);
            u[i] = sum, mean += centred ? u[i] / (double)n : 0;
        }
        for (int64_t i = 0; i < n; i++) u[i] -= mean, square += u[i] * u[i] / (double)n;
        const double r = 1 / sqrt(square + eps);
        for (int64_t i = 0; i < n; i++) {
            const double g = check_get(half, dz, m * n + i), h = g * w[i];
            u[i] *= r;
            mean_h += centred ? h / (double)n : 0, mean_hu += h * u[i] / (double)n, terms += fabs(h) / (double)n;
            want_dw[i] += g * u[i], size_dw[i] += fabs(g) * (fabs(u[i]) + 1), want_db[i] += g, size_db[i] += fabs(g);
        }
        for (int64_t i = 0; i < n; i++) {
            const double want = u[i] * w[i] + (biased ? b[i] : 0), sizes = (fabs(u[i]) + 1) * fabs(w[i]) + fabs(b[i]);
            CHECK(check_near(check_get(half, z[0], m * n + i), want, half_eps + near, sizes + tiny),
                  "z[%d,%d] = %g, not %g", (int)m, (int)i, check_get(half, z[0], m * n + i), want);
            const double h = check_get(half, dz, m * n + i) * w[i], from = adds ? ds[m * n + i] : 0;
            const double want_dx = from + r * (h - mean_h - u[i] * mean_hu);
            const double size_dx = fabs(from) + r * (fabs(h) + terms * (1 + u[i] * u[i]) + 1);
            CHECK(check_near(dx[0][m * n + i], want_dx, near, size_dx), "dx[%d,%d]", (int)m, (int)i);
            if (adds)
                CHECK(check_near(check_get(half, dy[0], m * n + i), dx[0][m * n + i], half_eps,
                                 fabs(dx[0][m * n + i]) + tiny), "dy[%d,%d]", (int)m, (int)i);
        }
    }
    for (int64_t i = 0; i < n; i++) {
        CHECK(check_near(dw[0][i], want_dw[i], near, size_dw[i]), "dw[%d] = %g, not %g", (int)i, dw[0][i], want_dw[i]);
        if (biased) CHECK(check_near(db[0][i], want_db[i], near, size_db[i]), "db[%d]", (int)i);
    }
    for (int i = 0; i < 2; i++) {
        free(s[i]); free(z[i]); free(stats[i]); free(dx[i]); free(dy[i]); free(dw[i]); free(db[i]);
    }
    free(x); free(w); free(b); free(ds); free(y); free(dz); free(u); free(want_dw);
}

static void test_add_norm(void) {
    static const int64_t shape[][2] = {{0, 3}, {1, 2}, {5, 15}, {200, 33}, {65, 1024}, {3, 2500}};
    for (int half = MOE_BF16; half <= MOE_F16; half++)
        for (int s = 0; s < 6; s++)
            for (int how = 0; how < 8; how++)
                check_add_norm(half, shape[s][0], shape[s][1], how & 1, how >> 1 & 1, how >> 2);
}

static void test_square_sum(void) {
    for (int d = 0; d < 4; d++)
        for (int64_t n = 0; n < 200000; n = 3 * n + 1) {
            void *x = check_floats(all_dtypes[d], n, 4);
            double want = 0, got[2];
            for (int64_t i = 0; i < n; i++) want += check_get(all_dtypes[d], x, i) * check_get(all_dtypes[d], x, i);
            for (int i = 0; i < 2; i++) {
                void *work = check_alloc((int64_t)moe_square_sum_workspace(n));
                check_threads = 1 + 2 * i;
                CHECK_OK(moe_square_sum(all_dtypes[d], n, x, work, &got[i]));
                free(work);
            }
            CHECK(got[0] == got[1], "the sum knows the threads");
            CHECK(check_near(got[0], want, 1e-13, want), "%d: %g, want %g", (int)n, got[0], want);
            free(x);
        }
}

static void check_rotate(int dtype, int64_t R, int64_t P, int64_t H, int64_t d, int64_t n) {
    const int64_t size = moe_size(dtype), all = R * H * d;
    void *x = check_floats(dtype, all, 5), *cos = check_floats(real_of(dtype), P * n, 6);
    void *sin = check_floats(real_of(dtype), P * n, 7);
    for (int inverse = 0; inverse < 2; inverse++) {
        void *y[2];
        for (int i = 0; i < 2; i++) {
            check_threads = 1 + 2 * i, y[i] = check_alloc(all * size);
            CHECK_OK(moe_rotate(dtype, R, P, H, d, n, inverse, x, cos, sin, y[i]));
        }
        CHECK(!memcmp(y[0], y[1], (size_t)(all * size)), "results know the threads");
        for (int64_t j = 0; j < all; j++) {
            const int64_t i = j % d, pair = i < n ? i : i - n, at = j / d / H % (P ? P : 1) * n + pair;
            double want = check_get(dtype, x, j), terms = fabs(want);
            if (i < 2 * n) {
                const double other = check_get(dtype, x, i < n ? j + n : j - n);
                const double c = check_get(real_of(dtype), cos, at), s = check_get(real_of(dtype), sin, at);
                terms = fabs(want * c) + fabs(other * s);
                want = want * c + ((i < n) ^ inverse ? -other : other) * s;
            }
            CHECK(check_near(check_get(dtype, y[0], j), want, near_of[dtype] + 1.01 * check_eps[dtype],
                             terms + (dtype == MOE_F16 ? 0x1p-14 : 0)), "%s y[%d]", check_dtype[dtype], (int)j);
        }
        free(y[0]); free(y[1]);
    }
    free(x); free(cos); free(sin);
}

static void test_rotate(void) {
    for (int d = 0; d < 4; d++) {
        check_rotate(all_dtypes[d], 0, 0, 2, 8, 4);
        check_rotate(all_dtypes[d], 6, 3, 2, 9, 4);
        check_rotate(all_dtypes[d], 7, 7, 1, 20, 3);
        check_rotate(all_dtypes[d], 512, 128, 4, 64, 32);
        check_rotate(all_dtypes[d], 2, 1, 1, 2100, 1050);
        check_rotate(all_dtypes[d], 2, 1, 3, 5, 0);
    }
}

static void test_bad_input(void) {
    float x[8] = {9, 9, 9, 9, 9, 9, 9, 9}, y[8] = {9, 9, 9, 9, 9, 9, 9, 9};
    double sum = 9, work[64];
    CHECK_STATUS(moe_rms_norm(MOE_I32, MOE_F32, 2, 4, 0, x, x, work, y, y), MOE_BAD_DTYPE);
    CHECK_STATUS(moe_rms_norm(MOE_F32, MOE_BF16, 2, 4, 0, x, x, work, y, y), MOE_BAD_DTYPE);
    CHECK_STATUS(moe_rms_norm(MOE_F64, MOE_F32, 2, 4, 0, x, x, work, y, y), MOE_BAD_DTYPE);
    CHECK_STATUS(moe_rms_norm(MOE_F32, MOE_F32, -1, 4, 0, x, x, work, y, y), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_rms_norm(MOE_F32, MOE_F32, 2, 0, 0, x, x, work, y, y), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_rms_norm_backward(MOE_F32, MOE_F32, INT64_MAX / 2, 4, x, x, x, x, work, y, y), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_add_norm(MOE_F32, 1, 2, 4, 0, x, x, x, x, y, y, y), MOE_BAD_DTYPE);
    CHECK_STATUS(moe_add_norm(MOE_BF16, 1, 2, 0, 0, x, x, x, x, y, y, y), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_add_norm_backward(MOE_F16, 1, -1, 4, x, x, x, x, x, work, y, y, y, y), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_square_sum(MOE_I64, 2, x, work, &sum), MOE_BAD_DTYPE);
    CHECK_STATUS(moe_square_sum(MOE_F32, -2, x, work, &sum), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_rotate(MOE_I16, 1, 1, 1, 4, 2, 0, x, x, x, y), MOE_BAD_DTYPE);
    CHECK_STATUS(moe_rotate(MOE_F32, 2, 1, 1, 4, 3, 0, x, x, x, y), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_rotate(MOE_F32, 3, 2, 1, 2, 1, 0, x, x, x, y), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_rotate(MOE_F32, INT64_MAX / 4, 1, 4, 4, 2, 0, x, x, x, y), MOE_BAD_SHAPE);
    for (int i = 0; i < 8; i++) CHECK(y[i] == 9 && sum == 9, "an output was touched");
}

static void tests(void) {
    test_norm();
    test_add_norm();
    test_square_sum();
    test_rotate();
    test_bad_input();
}
int main(void) { return check_main(tests); }
