// test_xent.c: the softmax of a row, and the cross-entropy pass over rows of any length, against libm in double.
#include "check.h"

static const int all_dtypes[] = {MOE_F64, MOE_F32, MOE_BF16, MOE_F16};

static void define_softmax(int64_t n, const double *x, double *p, double *lse) {
    double top = -INFINITY, sum = 0;
    for (int64_t i = 0; i < n; i++) top = fmax(top, x[i]);
    for (int64_t i = 0; i < n; i++) sum += exp(x[i] - top);
    for (int64_t i = 0; i < n; i++) p[i] = exp(x[i] - top) / sum;
    *lse = top + log(sum);
}

static void test_softmax(void) {
    for (int64_t n = 1; n < 2000; n += n < 70 ? 1 : 611) {
        double *x = check_alloc(8 * n), *p = check_alloc(8 * n), *want = check_alloc(8 * n), lse;
        float  *xf = check_alloc(4 * n), *pf = check_alloc(4 * n);
        uint64_t seed = (uint64_t)n;
        for (int64_t i = 0; i < n; i++)
            x[i] = xf[i] = n > 1 && i % 7 == 1 ? -INFINITY : (float)(60 * check_unit(&seed) - 30);
        define_softmax(n, x, want, &lse);
        double got = moe_k->softmax(false, n, xf, pf);
        CHECK(check_near(got, lse, 3e-7, 1 + fabs(lse)), "f32 n %d: logsumexp %g, want %g", (int)n, got, lse);
        for (int64_t i = 0; i < n; i++)         // x - max is rounded, so the error grows with it: up to 60 * 2^-24
            CHECK(check_near(pf[i], want[i], 5e-6, want[i]), "f32 n %d: p[%d] = %g, want %g", (int)n, (int)i, pf[i],
                  want[i]);
        got = moe_k->softmax(true, n, x, p);
        CHECK(check_near(got, lse, 1e-15, 1 + fabs(lse)), "f64 n %d: logsumexp %g, want %g", (int)n, got, lse);
        for (int64_t i = 0; i < n; i++)
            CHECK(check_near(p[i], want[i], 1e-14, want[i]), "f64 p[%d] = %g", (int)i, p[i]);
        moe_k->softmax(false, n, xf, xf);
        CHECK(!memcmp(xf, pf, (size_t)(4 * n)), "f32 n %d: in place differs", (int)n);
        moe_k->softmax(true, n, x, x);
        CHECK(!memcmp(x, p, (size_t)(8 * n)), "f64 n %d: in place differs", (int)n);
        free(x); free(p); free(want); free(xf); free(pf);
    }
}

// NaN or +inf anywhere makes the row NaN; nothing but -inf is a row of zeros and -inf.
static void test_softmax_ends(void) {
    for (int f64 = 0; f64 < 2; f64++)
        for (int64_t n = 1; n < 40; n++)
            for (int64_t where = 0; where < n; where++)
                for (int kind = 0; kind < 4; kind++) {
                    double x[40];
                    float  xf[40];
                    const double special = kind == 1 ? INFINITY : kind == 3 ? -INFINITY : NAN;
                    for (int64_t i = 0; i < n; i++) x[i] = kind < 2 ? 1 : -INFINITY;
                    x[where] = special;
                    for (int64_t i = 0; i < n; i++) xf[i] = (float)x[i];
                    void *row = f64 ? (void *)x : (void *)xf;
                    const double lse = moe_k->softmax(f64, n, row, row);
                    CHECK(kind == 3 ? lse == -INFINITY : isnan(lse), "kind %d n %d at %d: %g", kind, (int)n, (int)where,
                          lse);
                    for (int64_t i = 0; i < n; i++) {
                        const double p = f64 ? x[i] : (double)xf[i];
                        CHECK(kind == 3 ? p == 0 : isnan(p), "kind %d n %d at %d: p[%d] = %g", kind, (int)n, (int)where,
                              (int)i, p);
                    }
                }
}

// ---- cross-entropy --------------------------------------------------------------------------------------------------
static void check_xent(int dtype, int64_t M, int64_t V, bool masked) {
    const int64_t size = moe_size(dtype), real = moe_real_size(dtype), ignore = -100;
    const double  near = dtype == MOE_F64 ? 1e-13 : 2e-6, scale = 0.75;
    uint64_t seed = (uint64_t)V;
    int64_t *targets = check_alloc(8 * M);
    void    *logits = check_floats(dtype, M * V, 7), *d[2], *loss[2], *lse[2];
    double  *x = check_alloc(8 * V), *p = check_alloc(8 * V), want_lse;
    for (int64_t m = 0; m < M; m++) targets[m] = m % 5 == 3 ? ignore : check_below(&seed, V);
    if (M > 1 && V > 1024) targets[0] = 1023, targets[1] = 1024;        // the borders of a tile
    if (masked)                                 // a tail, as padding of a vocabulary is, or a head of whole tiles of -inf
        for (int64_t m = 0; m < M; m++) {
            const double wide = -INFINITY;
            const float  narrow = -INFINITY;
            const int64_t left = V / 3, head = m % 2 ? V - left : 0;
            if (targets[m] != ignore) targets[m] = head + targets[m] % left;
            for (int64_t v = left - left * (m % 2); v < (m % 2 ? head : V); v++)
                moe_k->store(dtype, 1, dtype == MOE_F64 ? (const void *)&wide : &narrow,
                             (char *)logits + (m * V + v) * size);
        }
    for (int i = 0; i < 2; i++) {
        check_threads = 1 + 2 * i;
        d[i] = check_alloc(M * V * size), loss[i] = check_alloc(M * real), lse[i] = check_alloc(M * real);
        memcpy(d[i], logits, (size_t)(M * V * size));
        CHECK_OK(moe_xent(dtype, M, V, ignore, scale, targets, d[i], loss[i], lse[i]));
    }
    CHECK(!memcmp(d[0], d[1], (size_t)(M * V * size)) && !memcmp(loss[0], loss[1], (size_t)(M * real)),
          "results know the threads");
    for (int64_t m = 0; m < M; m++) {
        const bool   ignored = targets[m] == ignore;
        const double got_loss = check_get(dtype == MOE_F64 ? MOE_F64 : MOE_F32, loss[0], m);
        const double got_lse = check_get(dtype == MOE_F64 ? MOE_F64 : MOE_F32, lse[0], m);
        for (int64_t v = 0; v < V; v++) x[v] = check_get(dtype, logits, m * V + v);
        define_softmax(V, x, p, &want_lse);
        const double want_loss = ignored ? 0 : want_lse - x[targets[m]];
        CHECK(check_near(got_loss, want_loss, near, 1 + fabs(want_lse)), "%s loss[%d] = %g, want %g",
              check_dtype[dtype], (int)m, got_loss, want_loss);
        CHECK(check_near(got_lse, ignored ? 0 : want_lse, near, 1 + fabs(want_lse)), "lse[%d] = %g", (int)m, got_lse);
        for (int64_t v = 0; v < V; v++) {
            const double want = ignored ? 0 : scale * (p[v] - (v == targets[m])),
                         got = check_get(dtype, d[0], m * V + v);
            CHECK(check_near(got, want, near + 1.01 * check_eps[dtype],
                             fabs(want) + (dtype == MOE_F16 ? 0x1p-14 : 1e-3 * p[v])),
                  "%s [%d,%d]: d[%d,%d] = %g, want %g", check_dtype[dtype], (int)M, (int)V, (int)m, (int)v, got, want);
        }
    }
    free(targets); free(logits); free(x); free(p);
    for (int i = 0; i < 2; i++) { free(d[i]); free(loss[i]); free(lse[i]); }
}

static void test_xent(void) {
    static const int64_t shape[][2] = {{0, 5}, {4, 1}, {7, 2}, {300, 97}, {9, 1023}, {9, 1024}, {9, 1025}, {40, 5000}};
    for (int d = 0; d < 4; d++) {
        for (int s = 0; s < 8; s++) check_xent(all_dtypes[d], shape[s][0], shape[s][1], false);
        check_xent(all_dtypes[d], 6, 5000, true);
    }
}

// The gradient is that of the loss: finite differences in fp64.
static void test_gradient(void) {
    enum { V = 2053 };
    double *x = check_floats(MOE_F64, V, 1), *d = check_alloc(8 * V), loss, lse;
    const int64_t target = 1100;           // one of the differences below, in the second tile
    memcpy(d, x, 8 * V);
    CHECK_OK(moe_xent(MOE_F64, 1, V, -1, 2, &target, d, &loss, &lse));
    for (int64_t v = 0; v < V; v += 100) {
        double *y = check_alloc(8 * V), up, down;
        memcpy(y, x, 8 * V), y[v] += 1e-4;
        CHECK_OK(moe_xent(MOE_F64, 1, V, -1, 1, &target, y, &up, &lse));
        memcpy(y, x, 8 * V), y[v] -= 1e-4;
        CHECK_OK(moe_xent(MOE_F64, 1, V, -1, 1, &target, y, &down, &lse));
        CHECK(check_near(d[v], 2 * (up - down) / 2e-4, 1e-9, 1), "d[%d] = %g, want %g", (int)v, d[v],
              2 * (up - down) / 2e-4);
        free(y);
    }
    free(x); free(d);
}

static void test_bad_input(void) {
    float logits[6] = {9, 9, 9, 9, 9, 9}, loss[2] = {9, 9}, lse[2] = {9, 9};
    const int64_t fine[2] = {0, 2}, past[2] = {0, 3}, below[2] = {-1, 0};
    CHECK_STATUS(moe_xent(MOE_I32, 2, 3, -100, 1, fine, logits, loss, lse), MOE_BAD_DTYPE);
    CHECK_STATUS(moe_xent(MOE_F32, -1, 3, -100, 1, fine, logits, loss, lse), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_xent(MOE_F32, 2, 0, -100, 1, fine, logits, loss, lse), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_xent(MOE_F32, INT64_MAX / 2, 3, -100, 1, fine, logits, loss, lse), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_xent(MOE_F32, 2, 3, -100, 1, past, logits, loss, lse), MOE_BAD_INDEX);
    CHECK_STATUS(moe_xent(MOE_F32, 2, 3, -100, 1, below, logits, loss, lse), MOE_BAD_INDEX);
    for (int i = 0; i < 6; i++)
        CHECK(logits[i] == 9 && loss[i % 2] == 9 && lse[i % 2] == 9, "output %d was touched", i);
    float nan_row[3] = {1, NAN, 2};
    CHECK_OK(moe_xent(MOE_F32, 1, 3, -100, 1, fine, nan_row, loss, lse));
    CHECK(isnan(loss[0]) && isnan(lse[0]) && isnan(nan_row[0]), "NaN was hidden: %g %g %g", loss[0], lse[0],
          nan_row[0]);
}

static void tests(void) {
    test_softmax();
    test_softmax_ends();
    test_xent();
    test_gradient();
    test_bad_input();
}
int main(void) { return check_main(tests); }
