// test_permute.c: rows of storage (rows.inc), and gather, scatter and dweights in the three layouts.
// Movement and sums must have the very bits that the definition gives: copied bytes; fma in slot order, rounded once.
#include "check.h"

// -- rows.inc ---------------------------------------------------------------------------------------------------------
static uint16_t store16(int dtype, double d) {
    float    f = (float)d;
    uint16_t h;
    moe_k->store(dtype, 1, &f, &h);
    return h;
}

// Every 16-bit pattern widens exactly and comes back; midpoints of two neighbours, and what is beside them, round well.
static void test_half_formats(void) {
    for (int dtype = MOE_BF16; dtype <= MOE_F16; dtype++) {
        static uint16_t all[65536], back[65536];
        static float    wide[65536];
        for (int i = 0; i < 65536; i++) all[i] = (uint16_t)i;
        moe_k->load(dtype, 65536, all, wide);
        moe_k->store(dtype, 65536, wide, back);
        const char *name = check_dtype[dtype];
        for (int i = 0; i < 65536; i++) {
            double   want = check_get(dtype, all, i);
            uint16_t quiet = (uint16_t)(dtype == MOE_BF16 ? i | 0x40 : i | 0x200);
            CHECK(isnan(want) ? isnan(wide[i]) : wide[i] == want, "%s %04x -> %g, want %g", name, i, wide[i], want);
            CHECK(back[i] == (isnan(want) ? quiet : i), "%s %04x -> %04x", name, i, back[i]);
        }
        int infinity = dtype == MOE_BF16 ? 0x7f80 : 0x7c00;
        for (int i = 0; i < infinity; i++) {
            double here = check_get(dtype, all, i), step = here - check_get(dtype, all, i - (i > 0));
            double next = i + 1 < infinity ? check_get(dtype, all, i + 1) : here + step;   // in infinity's place
            double middle = (here + next) / 2;
            int    even = i + (i & 1);
            CHECK(store16(dtype, middle) == even, "%s midpoint %a -> %04x", name, middle, store16(dtype, middle));
            CHECK(store16(dtype, -middle) == (even | 0x8000), "%s midpoint %a", name, -middle);
            CHECK(store16(dtype, nextafterf((float)middle, INFINITY)) == i + 1, "%s above %a", name, middle);
            CHECK(store16(dtype, nextafterf((float)middle, 0)) == i, "%s below %a", name, middle);
        }
        CHECK(store16(dtype, 3.4e38) == infinity, "%s overflow", name);
        CHECK(store16(dtype, -INFINITY) == (infinity | 0x8000), "%s -inf", name);
    }
}

// Any bits, any length: load and store agree with the base table, scale, axpy and dot with their definition.
static void test_row_arithmetic(void) {
    static const int lengths[] = {0, 1, 3, 15, 16, 17, 64, 100, 255, 257, 1000};
    for (int dtype = MOE_F64; dtype <= MOE_F16; dtype++)
        for (size_t c = 0; c < sizeof lengths / sizeof *lengths; c++) {
            int64_t  n = lengths[c], size = moe_size(dtype), real = moe_real_size(dtype);
            uint64_t seed = (uint64_t)n + 1;
            double   w = (double)(float)check_unit(&seed), product_sum = 0, size_of_terms = 0;
            const char *name = check_dtype[dtype];
            char *x = check_floats(dtype, n, 1), *y = check_floats(dtype, n, 2), *got = check_alloc(n * size);
            char *acc = check_alloc(n * real), *raw = check_alloc(n * real), *want = check_alloc(n * size);
            for (int64_t i = 0; i < n * real; i++) raw[i] = (char)check_u64(&seed);
            moe_k->store(dtype, n, raw, got);
            moe_kernels_base.store(dtype, n, raw, want);
            CHECK(!memcmp(got, want, (size_t)(n * size)), "store %s, n = %d", check_dtype[dtype], (int)n);

            if (size == 2) {                                            // NaN, infinity and subnormals among them
                moe_k->scale(dtype, n, 1, raw, got);
                moe_kernels_base.load(dtype, n, raw, acc);
                moe_kernels_base.store(dtype, n, acc, want);
                CHECK(!memcmp(got, want, (size_t)(n * size)), "scale any %s, n = %d", check_dtype[dtype], (int)n);
            }
            moe_k->scale(dtype, n, w, x, got);
            moe_k->load(dtype, n, y, acc);
            moe_k->axpy(dtype, n, w, x, acc);
            double lane64[16] = {0};
            float  lane32[16] = {0};
            for (int64_t i = 0; i < n; i++) {
                double a = check_get(dtype, x, i), b = check_get(dtype, y, i), product = w * a;
                float  product32 = (float)w * (float)a;
                moe_k->store(dtype, 1, dtype == MOE_F64 ? (void *)&product : (void *)&product32, want + i * size);
                if (dtype == MOE_F64) CHECK(((double *)acc)[i] == fma(w, a, b), "axpy f64 [%d]", (int)i);
                else CHECK(((float *)acc)[i] == fmaf((float)w, (float)a, (float)b), "axpy %s [%d]", name, (int)i);
                lane64[i % 16] = fma(a, b, lane64[i % 16]);
                lane32[i % 16] = fmaf((float)a, (float)b, lane32[i % 16]);
                product_sum += a * b;
                size_of_terms += fabs(a * b);
            }
            CHECK(!memcmp(got, want, (size_t)(n * size)), "scale %s, n = %d", check_dtype[dtype], (int)n);
            moe_k->scale(dtype, n, w, x, x);
            CHECK(!memcmp(x, want, (size_t)(n * size)), "scale in place %s, n = %d", check_dtype[dtype], (int)n);
            free(x);
            x = check_floats(dtype, n, 1);

            const void *terms[3] = {x, y, x};
            double w64[3] = {0.75, w, -0.3};
            float  w32[3] = {0.75f, (float)w, -0.3f};
            for (int K = 0; K <= 3; K++) {
                moe_k->sum(dtype, n, K, dtype == MOE_F64 ? (void *)w64 : (void *)w32, terms, got);
                for (int64_t i = 0; i < n; i++) {
                    double sum64 = 0;
                    float  sum32 = 0;
                    for (int k = 0; k < K; k++) {
                        sum64 = fma(w64[k], check_get(dtype, terms[k], i), sum64);
                        sum32 = fmaf(w32[k], (float)check_get(dtype, terms[k], i), sum32);
                    }
                    moe_k->store(dtype, 1, dtype == MOE_F64 ? (void *)&sum64 : (void *)&sum32, want + i * size);
                }
                CHECK(!memcmp(got, want, (size_t)(n * size)), "sum of %d, %s, n = %d", K, name, (int)n);
            }

            for (int half = 8; half; half /= 2)
                for (int i = 0; i < half; i++) { lane64[i] += lane64[i + half]; lane32[i] += lane32[i + half]; }
            double dot = moe_k->dot(dtype, n, x, y);
            CHECK(dot == (dtype == MOE_F64 ? lane64[0] : (double)lane32[0]), "dot %s, n = %d", name, (int)n);
            double eps = (dtype == MOE_F64 ? 0x1p-53 : 0x1p-24) * (double)(4 + n / 16);
            CHECK(check_near(dot, product_sum, eps, size_of_terms),
                  "dot %s: %g, want %g", name, dot, product_sum);
            free(x); free(y); free(got); free(want); free(acc); free(raw);
        }
}

// -- gather, scatter, dweights ----------------------------------------------------------------------------------------
typedef enum { RANDOM, ONE_EXPERT, SOME_ABSENT } routing;
typedef struct {
    int64_t    T, K, E, D;
    routing    routing;
    int        form;                            // 0 plain, 1 padded, 2 binned
    int32_t   *counts_E, *bins_E, *out_bins_E, *order_N, *inverse_N;
    int64_t   *row_N;                           // the expert row of each flat id by definition, -1 if none
    int64_t   *flat_P;                          // its inverse
    moe_layout l;
} permute_case;

static void make_case(permute_case *c, uint64_t seed) {
    int64_t  N = c->T * c->K;
    int32_t *ids_N = check_alloc(4 * N);
    for (int64_t f = 0; f < N; f++) {
        ids_N[f] = (int32_t)(c->routing == ONE_EXPERT ? c->E / 2 : check_below(&seed, c->E));
        if (c->routing == SOME_ABSENT && check_below(&seed, 3) == 0) ids_N[f] = -1;
    }
    c->counts_E = check_alloc(4 * c->E);
    c->bins_E = check_alloc(4 * c->E);
    c->out_bins_E = check_alloc(4 * c->E);
    c->order_N = check_alloc(4 * N);
    c->inverse_N = check_alloc(4 * N);
    void *workspace = check_alloc((int64_t)moe_route_index_workspace(N, c->E));
    CHECK_OK(moe_route_index(N, c->E, ids_N, workspace, c->counts_E, c->bins_E, c->order_N, c->inverse_N));
    int32_t end = 0;
    for (int64_t e = 0; e < c->E; e++) c->out_bins_E[e] = end += (c->counts_E[e] + 3) / 4 * 4;
    int64_t capacity = 1 + N / (2 * c->E);
    c->l = (moe_layout){.N = N, .K = c->K, .E = c->E, .order_N = c->order_N, .bins_E = c->bins_E,
                        .P = c->form == 0 ? N : c->form == 1 ? end + 2 : c->E * capacity,
                        .out_bins_E = c->form == 1 ? c->out_bins_E : NULL, .capacity = c->form == 2 ? capacity : 0};
    c->row_N = check_alloc(8 * N);
    c->flat_P = check_alloc(8 * c->l.P);
    for (int64_t f = 0; f < N; f++) {
        int32_t e = ids_N[f];
        if (e < 0) continue;
        int64_t before = e ? c->bins_E[e - 1] : 0, place = c->inverse_N[f] - before;
        if (c->form == 2 && place >= capacity) continue;
        c->row_N[f] = place + (c->form == 0 ? before : c->form == 1 ? (e ? c->out_bins_E[e - 1] : 0) : e * capacity);
        c->flat_P[c->row_N[f]] = f;
    }
    free(ids_N); free(workspace);
}

static void free_case(permute_case *c) {
    free(c->counts_E); free(c->bins_E); free(c->out_bins_E); free(c->order_N); free(c->inverse_N);
    free(c->row_N); free(c->flat_P);
}

static void want_gather(const permute_case *c, int dtype, int wdtype, const char *x, const void *w, char *y) {
    int64_t bytes = c->D * moe_size(dtype);
    for (int64_t p = 0; p < c->l.P; p++) {
        int64_t f = c->flat_P[p];
        if (f < 0) memset(y + p * bytes, 0, (size_t)bytes);
        else if (!w) memcpy(y + p * bytes, x + f / c->K * bytes, (size_t)bytes);
        else
            for (int64_t d = 0; d < c->D; d++) {
                double a = check_get(wdtype, w, f) * check_get(dtype, x, f / c->K * c->D + d);
                float  b = (float)check_get(wdtype, w, f) * (float)check_get(dtype, x, f / c->K * c->D + d);
                moe_k->store(dtype, 1, dtype == MOE_F64 ? (void *)&a : (void *)&b, y + p * bytes + d * moe_size(dtype));
            }
    }
}

static void want_scatter(const permute_case *c, int dtype, int wdtype, const char *x, const void *w, char *y) {
    for (int64_t t = 0; t < c->T; t++)
        for (int64_t d = 0; d < c->D; d++) {
            double a = 0;
            float  b = 0;
            for (int64_t k = 0; k < c->K; k++) {
                int64_t f = t * c->K + k;
                if (c->row_N[f] < 0) continue;
                double s = w ? check_get(wdtype, w, f) : 1, value = check_get(dtype, x, c->row_N[f] * c->D + d);
                a = fma(s, value, a);
                b = fmaf((float)s, (float)value, b);
            }
            moe_k->store(dtype, 1, dtype == MOE_F64 ? (void *)&a : (void *)&b, y + (t * c->D + d) * moe_size(dtype));
        }
}

static void check_dweights(const permute_case *c, int dtype, int wdtype, const char *x, const char *dy,
                           const char *dw) {
    for (int64_t f = 0; f < c->l.N; f++) {
        double want = 0, terms = 0, got = check_get(wdtype, dw, f);
        for (int64_t d = 0; d < c->D && c->row_N[f] >= 0; d++) {
            double term = check_get(dtype, x, c->row_N[f] * c->D + d) * check_get(dtype, dy, f / c->K * c->D + d);
            want += term;
            terms += fabs(term);
        }
        double eps = (dtype == MOE_F64 ? 0x1p-53 : 0x1p-24) * (double)(4 + c->D / 16);
        CHECK(fabs(got - want) <= eps * terms + check_eps[wdtype] * fabs(want),
              "dweights %s form %d [%d]: %g, want %g", check_dtype[dtype], c->form, (int)f, got, want);
    }
}

static void run_case(permute_case *c, int dtype) {
    make_case(c, (uint64_t)(c->T + 7 * c->D));
    int64_t size = moe_size(dtype), N = c->l.N, P = c->l.P, D = c->D, T = c->T;
    char *x_TD = check_floats(dtype, T * D, 3), *x_PD = check_floats(dtype, P * D, 4);
    char *want_PD = check_alloc(P * D * size), *want_TD = check_alloc(T * D * size);
    void *workspace = check_alloc((int64_t)moe_scatter_workspace(&c->l));
    for (int64_t p = 0; p < P; p++)                              // rows that nobody has must not be read
        if (c->flat_P[p] < 0) memset(x_PD + p * D * size, 0xff, (size_t)(D * size));
    for (int weights = 0; weights < 3; weights++) {              // none, float, as the rows
        int   wdtype = weights == 1 ? MOE_F32 : dtype;
        void *w_N = weights ? check_floats(wdtype, N, 5) : NULL, *one_thread_N = NULL;
        want_gather(c, dtype, wdtype, x_TD, w_N, want_PD);
        want_scatter(c, dtype, wdtype, x_PD, w_N, want_TD);
        for (check_threads = 1; check_threads <= 3; check_threads += 2) {
            char *y_PD = check_alloc(P * D * size), *y_TD = check_alloc(T * D * size);
            char *dw_N = check_alloc(N * moe_size(wdtype));
            CHECK_OK(moe_gather(dtype, wdtype, D, &c->l, x_TD, w_N, y_PD));
            CHECK(!memcmp(y_PD, want_PD, (size_t)(P * D * size)), "gather %s form %d weights %d T %d K %d E %d D %d",
                  check_dtype[dtype], c->form, weights, (int)T, (int)c->K, (int)c->E, (int)D);
            CHECK_OK(moe_scatter(dtype, wdtype, D, &c->l, x_PD, w_N, workspace, y_TD));
            CHECK(!memcmp(y_TD, want_TD, (size_t)(T * D * size)), "scatter %s form %d weights %d T %d K %d E %d D %d",
                  check_dtype[dtype], c->form, weights, (int)T, (int)c->K, (int)c->E, (int)D);
            CHECK_OK(moe_scatter_dweights(dtype, wdtype, D, &c->l, x_PD, x_TD, workspace, dw_N));
            check_dweights(c, dtype, wdtype, x_PD, x_TD, dw_N);
            CHECK(!one_thread_N || !memcmp(dw_N, one_thread_N, (size_t)(N * moe_size(wdtype))), "threads show");
            free(y_PD); free(y_TD); free(one_thread_N);
            one_thread_N = dw_N;
        }
        free(one_thread_N); free(w_N);
    }
    free(x_TD); free(x_PD); free(want_PD); free(want_TD); free(workspace);
    free_case(c);
}

static void test_layouts(void) {
    static const int64_t shapes[][4] = {        // T K E D
        {0, 2, 4, 17},  {1, 1, 1, 1},    {5, 3, 3, 3},     {5, 2, 50, 64},
        {7, 2, 4, 100}, {3, 2, 2, 1030}, {300, 2, 5, 100}, {120, 8, 8, 17},
    };
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
        for (int dtype = MOE_F64; dtype <= MOE_F16; dtype++)
            for (int form = 0; form < 3; form++)
                for (routing r = RANDOM; r <= SOME_ABSENT; r++) {
                    const int64_t *n = shapes[s];
                    permute_case   c = {.T = n[0], .K = n[1], .E = n[2], .D = n[3], .routing = r, .form = form};
                    run_case(&c, dtype);
                }
}

// A bad call says why and leaves the output as it was.
static void test_bad_input(void) {
    int32_t    order[4] = {0, 3, 1, 2}, outside[4] = {0, 4, 1, 2};
    int32_t    bins[2] = {2, 4}, wide[2] = {4, 8}, decreasing[2] = {5, 4};
    float      x[4] = {1, 2, 3, 4}, w[4] = {1, 1, 1, 1}, y[8];
    int64_t    workspace[4];
    moe_layout good = {.N = 4, .K = 2, .E = 2, .P = 4, .order_N = order, .bins_E = bins}, l = good;
    memset(y, 0xff, sizeof y);
    CHECK_STATUS(moe_gather(MOE_I32, MOE_F32, 1, &l, x, NULL, y), MOE_BAD_DTYPE);
    CHECK_STATUS(moe_gather(MOE_F32, MOE_F16, 1, &l, x, w, y), MOE_BAD_DTYPE);
    CHECK_STATUS(moe_gather(MOE_F32, MOE_F32, -1, &l, x, NULL, y), MOE_BAD_SHAPE);
    CHECK_STATUS(moe_gather(MOE_F32, MOE_F32, INT64_MAX / 4, &l, x, NULL, y), MOE_BAD_SHAPE);
    l.K = 3;
    CHECK_STATUS(moe_scatter(MOE_F32, MOE_F32, 1, &l, x, NULL, workspace, y), MOE_BAD_SHAPE);
    l = good; l.capacity = 3;
    CHECK_STATUS(moe_gather(MOE_F32, MOE_F32, 1, &l, x, NULL, y), MOE_BAD_SHAPE);
    l = good; l.P = 3;
    CHECK_STATUS(moe_gather(MOE_F32, MOE_F32, 1, &l, x, NULL, y), MOE_BAD_BINS);
    l = good; l.bins_E = decreasing;
    CHECK_STATUS(moe_scatter(MOE_F32, MOE_F32, 1, &l, x, NULL, workspace, y), MOE_BAD_BINS);
    l = good; l.out_bins_E = wide;
    CHECK_STATUS(moe_gather(MOE_F32, MOE_F32, 1, &l, x, NULL, y), MOE_BAD_BINS);
    l = good; l.bins_E = (int32_t[]){3, 4}; l.out_bins_E = bins;
    CHECK_STATUS(moe_gather(MOE_F32, MOE_F32, 1, &l, x, NULL, y), MOE_BAD_BINS);
    l = good; l.order_N = outside;
    CHECK_STATUS(moe_gather(MOE_F32, MOE_F32, 1, &l, x, NULL, y), MOE_BAD_INDEX);
    CHECK_STATUS(moe_scatter(MOE_F32, MOE_F32, 1, &l, x, w, workspace, y), MOE_BAD_INDEX);
    CHECK_STATUS(moe_scatter_dweights(MOE_F32, MOE_F32, 1, &l, x, x, workspace, y), MOE_BAD_INDEX);
    for (int i = 0; i < 8; i++) CHECK(isnan(y[i]), "a refused call wrote y[%d]", i);
}

static void tests(void) {
    test_half_formats();
    test_row_arithmetic();
    test_layouts();
    test_bad_input();
}
int main(void) { return check_main(tests); }
