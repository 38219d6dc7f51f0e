// test_expert.c: the fused expert MLP. In fp64 the forward is checked against naive loops and every gradient against
// differences of the forward; the other dtypes against the fp64 answer for the same (rounded) numbers. Every set of
// gradients has the bits of all together.
#include "check.h"

typedef struct { int64_t R, K, E, D, F; int act, ids, biases, layout; } problem;     // layout: of the weights
enum { SPREAD, SOME_ABSENT, ALL_ON_ONE, ALL_ABSENT };                                // ids
enum { SEPARATE, FUSED, TRANSPOSED };
static const problem problems[] = {
    {5, 2, 4, 3, 5, MOE_SWIGLU, SPREAD, 1, SEPARATE},      {7, 3, 3, 4, 2, MOE_GEGLU, SOME_ABSENT, 1, FUSED},
    {6, 1, 5, 5, 3, MOE_GEGLU_TANH, ALL_ON_ONE, 1, TRANSPOSED}, {4, 2, 3, 3, 4, MOE_SILU, SOME_ABSENT, 1, SEPARATE},
    {3, 4, 4, 2, 3, MOE_GELU, SPREAD, 0, TRANSPOSED},      {5, 2, 6, 1, 1, MOE_GELU_TANH, SOME_ABSENT, 1, SEPARATE},
    {0, 2, 4, 3, 5, MOE_SWIGLU, SPREAD, 1, FUSED},         {3, 2, 4, 3, 5, MOE_SWIGLU, ALL_ABSENT, 1, SEPARATE},
    {5, 2, 3, 0, 4, MOE_SWIGLU, SPREAD, 1, SEPARATE},      {5, 2, 3, 4, 0, MOE_SWIGLU, SPREAD, 1, SEPARATE},
    {1, 1, 1, 1, 1, MOE_SWIGLU, SPREAD, 0, FUSED},         {5, 2, 3, 4, 3, MOE_SWIGLU_OAI, SOME_ABSENT, 1, FUSED},
};
static const problem large[] = {
    {150, 2, 3, 67, 140, MOE_SWIGLU, SOME_ABSENT, 1, FUSED}, {37, 3, 5, 300, 29, MOE_GELU, SPREAD, 1, TRANSPOSED},
    {900, 1, 2, 19, 33, MOE_GEGLU, ALL_ON_ONE, 0, SEPARATE},
};

// Everything of one call, in one dtype. The numbers come from fixed seeds, so that two dtypes hold the same ones.
enum { X, WEIGHTS, GATE, UP, DOWN, GATE_BIAS, UP_BIAS, DOWN_BIAS, INPUTS };
static const char *const name[] = {"x", "weights", "gate", "up", "down", "gate_bias", "up_bias", "down_bias"};
typedef struct {
    moe_expert_args a;
    int32_t *ids, *order, *inverse, *counts, *bins;
    void    *in[INPUTS], *grad[INPUTS], *dy, *y, *h;
    int64_t  n[INPUTS];
} run;

static int64_t extent(const problem *p, int input) {
    const int64_t matrix = p->E * p->F * p->D;
    const bool gated = moe_act_gated(p->act), fused = p->layout == FUSED && gated;
    const int64_t n[INPUTS] = {p->R * p->D, p->R * p->K, fused ? 2 * matrix : matrix, fused || !gated ? 0 : matrix,
                               matrix, p->biases * p->E * p->F, p->biases * gated * p->E * p->F,
                               p->biases * p->E * p->D};
    return n[input];
}
static moe_mat matrix(const problem *p, void *w, int64_t out, int64_t in) {
    if (p->layout == TRANSPOSED) return (moe_mat){w, out * in, 1, out};
    return (moe_mat){w, out * in, in, 1};
}
// The numbers of x, stored as dtype.
static void *convert(int dtype, int from, int64_t n, const void *x) {
    char *y = check_alloc(n * moe_size(dtype));
    for (int64_t i = 0; i < n; i++) {
        const double d = check_get(from, x, i);
        const float  f = (float)d;
        moe_k->store(dtype, 1, dtype == MOE_F64 ? (const void *)&d : &f, y + i * moe_size(dtype));
    }
    return y;
}

static void point_at(run *r, const problem *p, void *const *from, moe_mat *gate, moe_mat *up, moe_mat *down) {
    const int64_t size = moe_size(r->a.dtype);
    *gate = matrix(p, from[GATE], p->F, p->D);
    *up   = matrix(p, moe_act_gated(p->act) ? from[UP] : NULL, p->F, p->D);
    *down = matrix(p, from[DOWN], p->D, p->F);
    if (p->layout == FUSED && moe_act_gated(p->act)) {              // [gate | up] of one expert side by side
        gate->se *= 2;
        *up = *gate;
        if (from[GATE]) up->p = (char *)from[GATE] + p->F * p->D * size;
    }
}

static run start(const problem *p, int dtype, int wdtype, int rounded_as) {
    run r = {.a = {dtype, wdtype, p->act, p->R, p->K, p->E, p->D, p->F, 0}};
    const int64_t N = p->R * p->K;
    uint64_t seed = 99;
    r.ids = check_alloc(N * 4), r.order = check_alloc(N * 4), r.inverse = check_alloc(N * 4);
    r.counts = check_alloc(p->E * 4), r.bins = check_alloc(p->E * 4);
    for (int64_t t = 0; t < p->R; t++)
        for (int64_t k = 0, e = check_below(&seed, p->E); k < p->K; k++) {
            const bool absent = p->ids == ALL_ABSENT || (p->ids == SOME_ABSENT && check_below(&seed, 3) == 0);
            r.ids[t * p->K + k] = absent ? -1 : p->ids == ALL_ON_ONE ? (int32_t)p->E - 1 : (int32_t)((e + k) % p->E);
        }
    void *work = check_alloc((int64_t)moe_route_index_workspace(N, p->E));
    CHECK_OK(moe_route_index(N, p->E, r.ids, work, r.counts, r.bins, r.order, r.inverse));
    free(work);
    for (int i = 0; i < INPUTS; i++) {
        r.n[i] = extent(p, i);
        const int store = i == WEIGHTS ? wdtype : dtype;
        void *numbers = check_floats(rounded_as, r.n[i], (uint64_t)i + 1);
        r.in[i] = convert(store, rounded_as, r.n[i], numbers);
        r.grad[i] = check_alloc(r.n[i] * moe_size(store));
        free(numbers);
    }
    void *numbers = check_floats(rounded_as, p->R * p->D, 50);
    r.dy = convert(dtype, rounded_as, p->R * p->D, numbers);
    free(numbers);
    r.a.N = r.bins[p->E - 1];
    r.a.order_RK = r.order, r.a.inverse_RK = r.inverse, r.a.bins_E = r.bins;
    r.a.x_RD = r.in[X], r.a.weights_RK = r.in[WEIGHTS];
    if (p->biases) {
        r.a.gate_bias_EF = r.in[GATE_BIAS], r.a.gate_bias_se = p->F;
        r.a.down_bias_ED = r.in[DOWN_BIAS], r.a.down_bias_se = p->D;
        if (moe_act_gated(p->act)) r.a.up_bias_EF = r.in[UP_BIAS], r.a.up_bias_se = p->F;
    }
    point_at(&r, p, r.in, &r.a.gate_EFD, &r.a.up_EFD, &r.a.down_EDF);
    r.y = check_alloc(p->R * p->D * moe_size(dtype));
    r.h = check_alloc(r.a.N * p->F * (moe_act_gated(p->act) ? 2 : 1) * moe_size(dtype));
    return r;
}
static void finish(run *r) {
    for (int i = 0; i < INPUTS; i++) free(r->in[i]), free(r->grad[i]);
    free(r->ids), free(r->order), free(r->inverse), free(r->counts), free(r->bins), free(r->dy), free(r->y), free(r->h);
}
static void forward(run *r) {
    void *work = check_alloc((int64_t)moe_expert_mlp_workspace(&r->a));   // NaN: nothing may be read unwritten
    CHECK_OK(moe_expert_mlp(&r->a, work, r->y, r->h));
    free(work);
}
// Where the gradients go: to[i], or NULL.
static moe_expert_grads grads_of(run *r, const problem *p, void *const *to) {
    moe_expert_grads g = {.dy_RD = r->dy, .h_NU = r->h, .dx_RD = to[X], .dweights_RK = to[WEIGHTS]};
    if (p->biases) {
        g.dgate_bias_EF = to[GATE_BIAS], g.dgate_bias_se = p->F;
        g.ddown_bias_ED = to[DOWN_BIAS], g.ddown_bias_se = p->D;
        if (moe_act_gated(p->act)) g.dup_bias_EF = to[UP_BIAS], g.dup_bias_se = p->F;
    }
    point_at(r, p, to, &g.dgate_EFD, &g.dup_EFD, &g.ddown_EDF);
    return g;
}
// Returns the bytes that it was lent.
static int64_t backward_to(run *r, const problem *p, void *const *to) {
    const moe_expert_grads g = grads_of(r, p, to);
    const int64_t bytes = (int64_t)moe_expert_mlp_backward_workspace(&r->a, &g);
    void *work = check_alloc(bytes);
    CHECK_OK(moe_expert_mlp_backward(&r->a, work, &g));
    free(work);
    return bytes;
}
static int64_t backward(run *r, const problem *p) { return backward_to(r, p, r->grad); }

// -- fp64 forward against the definition -----------------------------------------------------------------------------
static double plain(int act, double x) {
    switch (act) {
    case MOE_SWIGLU: case MOE_SILU: return x / (1 + exp(-x));
    case MOE_GEGLU: case MOE_GELU:  return 0.5 * x * (1 + erf(x / sqrt(2)));
    case MOE_SWIGLU_OAI:            return fmin(x, 7) / (1 + exp(-1.702 * fmin(x, 7)));
    case MOE_RELU:                  return x > 0 ? x : 0;
    }
    return 0.5 * x * (1 + tanh(sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
}
static double at(moe_mat w, int64_t e, int64_t o, int64_t i) { return ((double *)w.p)[e * w.se + o * w.sr + i * w.sc]; }
static double bias(const void *b, int64_t i) { return b ? ((const double *)b)[i] : 0; }

static void check_forward(const run *r, const problem *p) {
    const moe_expert_args *a = &r->a;
    const double *x = r->in[X], *s = r->in[WEIGHTS];
    double *copy = check_alloc(p->F * 8), *y = check_alloc(p->D * 8);
    for (int64_t t = 0; t < p->R; t++) {
        for (int64_t d = 0; d < p->D; d++) y[d] = 0;
        for (int64_t k = 0; k < p->K; k++) {
            const int64_t e = r->ids[t * p->K + k];
            if (e < 0) continue;
            for (int64_t f = 0; f < p->F; f++) {
                double gate = bias(a->gate_bias_EF, e * p->F + f), up = bias(a->up_bias_EF, e * p->F + f);
                for (int64_t d = 0; d < p->D; d++) gate += x[t * p->D + d] * at(a->gate_EFD, e, f, d);
                for (int64_t d = 0; moe_act_gated(p->act) && d < p->D; d++)
                    up += x[t * p->D + d] * at(a->up_EFD, e, f, d);
                if (p->act == MOE_SWIGLU_OAI) up = 1 + fmax(-7, fmin(up, 7));
                copy[f] = plain(p->act, gate) * (moe_act_gated(p->act) ? up : 1);
            }
            for (int64_t d = 0; d < p->D; d++) {
                double sum = bias(a->down_bias_ED, e * p->D + d);
                for (int64_t f = 0; f < p->F; f++) sum += copy[f] * at(a->down_EDF, e, d, f);
                y[d] += s[t * p->K + k] * sum;
            }
        }
        for (int64_t d = 0; d < p->D; d++) {
            const double got = ((double *)r->y)[t * p->D + d];
            CHECK(check_near(got, y[d], 1e-12, 100 + fabs(y[d])), "act %d y[%d,%d] = %g, want %g", p->act, (int)t,
                  (int)d, got, y[d]);
        }
    }
    free(copy), free(y);
}

// d<y, dy>/d(every input number), by a central difference.
static double objective(run *r, const problem *p) {
    double sum = 0;
    forward(r);
    for (int64_t i = 0; i < p->R * p->D; i++) sum += ((double *)r->y)[i] * ((double *)r->dy)[i];
    return sum;
}
static void check_gradients(run *r, const problem *p) {
    const double step = 1e-5;
    for (int i = 0; i < INPUTS; i++)
        for (int64_t j = 0; j < r->n[i]; j++) {
            double *x = (double *)r->in[i] + j, was = *x, got = ((double *)r->grad[i])[j];
            *x = was + step;
            const double above = objective(r, p);
            *x = was - step;
            const double below = objective(r, p);
            *x = was;
            CHECK(check_near(got, (above - below) / (2 * step), 1e-7, 1 + fabs(got)),
                  "act %d d%s[%d] = %g, difference %g", p->act, name[i], (int)j, got, (above - below) / (2 * step));
        }
}
static void test_fp64(void) {
    for (size_t c = 0; c < sizeof problems / sizeof *problems; c++) {
        const problem *p = &problems[c];
        run r = start(p, MOE_F64, MOE_F64, MOE_F64);
        forward(&r);
        backward(&r, p);
        check_forward(&r, p);
        check_gradients(&r, p);
        finish(&r);
    }
    for (size_t c = 0; c < sizeof large / sizeof *large; c++) {
        run r = start(&large[c], MOE_F64, MOE_F64, MOE_F64);
        forward(&r);
        check_forward(&r, &large[c]);
        finish(&r);
    }
}

// -- the other dtypes against fp64, one thread and three -------------------------------------------------------------
static void check_like(const char *what, const run *r, int dtype, int64_t n, const void *got, const void *want) {
    double top = 0;
    for (int64_t i = 0; i < n; i++) top = fmax(top, fabs(((const double *)want)[i]));
    const double tolerance = r->a.dtype == MOE_F32 ? 2e-6 : 6 * check_eps[r->a.dtype];  // h was rounded once
    for (int64_t i = 0; i < n; i++)
        CHECK(check_near(check_get(dtype, got, i), ((const double *)want)[i], tolerance, top + 1e-4),
              "%s %s act %d: %s[%d] = %g, want %g",
              check_dtype[r->a.dtype], check_dtype[r->a.wdtype], r->a.act, what, (int)i, check_get(dtype, got, i),
              ((const double *)want)[i]);
}
static void test_other_dtypes(const problem *p, int dtype, int wdtype) {
    run exact = start(p, MOE_F64, MOE_F64, dtype);
    forward(&exact);
    backward(&exact, p);
    run r[2];
    for (int i = 0; i < 2; i++) {
        check_threads = i ? 3 : 1;
        moe_l2 = i ? 4 << 20 : 128 << 10;
        r[i] = start(p, dtype, wdtype, dtype);
        forward(&r[i]);
        backward(&r[i], p);
    }
    check_threads = 1;
    check_like("y", &r[0], dtype, p->R * p->D, r[0].y, exact.y);
    CHECK(!memcmp(r[0].y, r[1].y, (size_t)(p->R * p->D * moe_size(dtype))), "%s y differs", check_dtype[dtype]);
    for (int i = 0; i < INPUTS; i++) {
        const int store = i == WEIGHTS ? wdtype : dtype;
        check_like(name[i], &r[0], store, r[0].n[i], r[0].grad[i], exact.grad[i]);
        CHECK(!memcmp(r[0].grad[i], r[1].grad[i], (size_t)(r[0].n[i] * moe_size(store))),
              "%s d%s differs", check_dtype[dtype], name[i]);
    }
    finish(&exact), finish(&r[0]), finish(&r[1]);
}
static void test_dtypes(void) {
    for (int dtype = MOE_F32; dtype <= MOE_F16; dtype++)
        for (int wide = 0; wide < (dtype == MOE_F32 ? 1 : 2); wide++) {
            for (size_t c = 0; c < sizeof problems / sizeof *problems; c++)
                test_other_dtypes(&problems[c], dtype, wide ? MOE_F32 : dtype);
            for (size_t c = 0; c < sizeof large / sizeof *large; c++)
                test_other_dtypes(&large[c], dtype, wide ? MOE_F32 : dtype);
        }
}

// -- every set of wanted gradients: the bits of all together, less memory lent, x unread where it is not needed ------
static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }
static void test_wanted(const problem *p, int dtype) {
    run r = start(p, dtype, dtype, dtype);
    const int64_t real = dtype == MOE_F64 ? 8 : 4, N = r.a.N, U = moe_act_gated(p->act) ? 2 * p->F : p->F;
    const int64_t factor = moe_gemm_kind(dtype) == GEMM_BF16 ? 2 : real;            // of sA and dh
    forward(&r);
    const int64_t all = backward(&r, p);
    const int sets = 1 << INPUTS;
    for (int wanted = 0; wanted < sets; wanted++) {
        void *to[INPUTS];
        for (int i = 0; i < INPUTS; i++) to[i] = wanted >> i & 1 ? check_alloc(r.n[i] * moe_size(dtype)) : NULL;
        r.a.x_RD = to[GATE] || to[UP] ? r.in[X] : NULL;
        const int64_t lent = backward_to(&r, p, to);
        for (int i = 0; i < INPUTS; i++) {
            CHECK(!to[i] || !memcmp(to[i], r.grad[i], (size_t)(r.n[i] * moe_size(dtype))),
                  "%s act %d: d%s differs among gradients %d", check_dtype[dtype], p->act, name[i], wanted);
            free(to[i]);
        }
        const int dh = 1 << X | 1 << GATE | 1 << UP | (p->biases ? 1 << GATE_BIAS | 1 << UP_BIAS : 0);
        int64_t most = all;
        if (!(wanted & 1 << DOWN)) most -= aligned(N * p->F * factor);
        if (!(wanted & 1 << X)) most -= aligned(N * p->D * real);
        if (!(wanted & dh)) most -= aligned(N * U * factor);
        CHECK(lent <= most, "gradients %d were lent %d bytes of %d", wanted, (int)lent, (int)all);
    }
    finish(&r);
}
static void test_every_set_of_gradients(void) {
    for (size_t c = 0; c < sizeof problems / sizeof *problems; c++)
        test_wanted(&problems[c], c % 2 ? MOE_F64 : MOE_BF16);
    test_wanted(&large[0], MOE_F32);
}

static void test_refusals(void) {
    const problem *p = &problems[0];
    run r = start(p, MOE_F32, MOE_F32, MOE_F32);
    const moe_expert_args good = r.a;
#define REFUSED(change, status)                                                                                        \
    do {                                                                                                               \
        r.a = good, r.a.change;                                                                                        \
        CHECK_STATUS(moe_expert_mlp(&r.a, NULL, r.y, r.h), status);                                                    \
    } while (0)
    REFUSED(dtype = MOE_I32, MOE_BAD_DTYPE);
    REFUSED(wdtype = MOE_BF16, MOE_BAD_DTYPE);
    REFUSED(act = 9, MOE_BAD_VALUE);
    REFUSED(up_EFD.p = NULL, MOE_BAD_VALUE);
    REFUSED(K = 0, MOE_BAD_SHAPE);
    REFUSED(R = -1, MOE_BAD_SHAPE);
    REFUSED(N = good.N + 1, MOE_BAD_SHAPE);
    REFUSED(N = good.N - 1, MOE_BAD_BINS);
    const int32_t last = r.order[1], first = r.inverse[0];
    r.order[1] = (int32_t)(p->R * p->K);
    REFUSED(K = good.K, MOE_BAD_INDEX);
    r.order[1] = last, r.inverse[0] = (int32_t)good.N;
    REFUSED(K = good.K, MOE_BAD_INDEX);
    r.inverse[0] = first;
    finish(&r);
}

static void tests(void) {
    test_fp64();
    test_dtypes();
    test_every_set_of_gradients();
    test_refusals();
}
int main(void) { return check_main(tests); }
