// expert.c: the fused expert MLP, forward and backward (equations: moe.h). N copies sorted by expert; of one of them,
// p is the position, f = order[p] the flat id, r = f / K the row, e the expert, s = weights[f].
//
//   forward    1  tile [p, F]:   [gate | up] = x[r] [Wg | Wu]_e^T + b    h_NU = it, rounded    a_NF = act(it)
//              2  tile [p, D]:   y_ND = a Wd_e^T
//              3  row r:         y_RD = sum over slots in order of s (y_ND[p] + bd_e)
//   backward   1  tile [p, F]:   dA' = dy[r] Wd_e    A = act(h)    ds = <dA', A> in parts   sA = s A   dh = s dA' act'
//              2  tiles of       dx_ND = dh [Wg ; Wu]_e    dWd_e = dy[r]^T sA    dW_e = dh^T x[r]    and bias sums
//              3  row r:         dx_RD = sum over slots in order of dx_ND[p]    dweights = sum of ds (+ <dy[r], bd_e>)
//              A gradient that is not wanted, and what only it needs, is left out: its place in the call is NULL.
//
// A pass is one parallel region. Its tasks stand in one queue: tiles of step 1, then of step 2, then sums of rows, in each
// step the costliest experts first. No step waits for the end of the one before: a tile of step 2 awaits the tiles of
// step 1 of its expert, a sum all that it may read, and most of that is long done by then. Rows of x and dy are gathered
// while they are packed; no sorted copy of them exists.
// Where gate and up alternate in one matrix [E,D,2F] (gpt-oss), it is one factor: its columns are parted, and those of dh
// paired, where a tile is handed over, so that every product reads and writes memory in rows.
// Saved for the backward: h_NU in storage type, nothing else. a, y, dh, sA, dx per copy live in the caller's workspace
// in full: a tile of y would need all of F, and with it the weights again for every tile of rows. They are real, but for
// a, sA and dh where products take bf16: those are rounded to it.
#include "gemm.h"
#include "pool.h"
#include "real.h"
#include <string.h>

typedef union { float f32[GEMM_COLUMNS]; double f64[GEMM_COLUMNS]; } tile;      // a piece of a row, on the stack

typedef struct call call;
typedef struct {                // tasks of one kind
    const gemm_grid *grid;
    void           (*tile)(const call *c, const gemm_task *t, void *scratch);
    int64_t          tasks;
} stage;
struct call {                   // the arguments and what is derived from them
    const moe_expert_args  *a;
    const moe_expert_grads *g;
    bool     f64, gated, paired;                        // paired: gate and up alternate in one matrix, and so does dh
    gemm_kind kind;
    int      real_type, factor_type;                    // factor: of a, sA and dh, which are factors of products
    int64_t  size, real, factor, U, pieces;             // pieces: column tiles of F, each with its part of ds
    gemm_grid up, down;                                 // tiles [p, F] and [p, D]
    gemm_grid ddown, dgate, dup;                        // tiles of the weight gradients
    gemm_grid each;                                     // one task for each expert
    moe_mat   dboth;                                    // the gradient of gate and up where they alternate in it
    const void *h_in;
    char    *h, *y;
    char    *act, *out, *dh, *ds, *scratch;             // a or sA [N,F], y or dx [N,D], dh [N,U], ds [N,pieces]
    stage    stages[6];                                 // of the pass, in the order of their tasks; then come the sums
    int      n_stages;
    moe_body sum;                                       // of the slots of rows
    int64_t  sum_rows;                                  // that one task sums
    int32_t *order_E;
    moe_missing *missing;                               // [E] tiles of stages[0] by expert; [1] what the sums await
};

static bool alternate(moe_mat gate, moe_mat up, int64_t size) {
    return gate.p && (char *)up.p == (char *)gate.p + size && gate.sr == 2 && up.sr == 2 && gate.sc == up.sc &&
           gate.se == up.se;
}
static call call_of(const moe_expert_args *a, const moe_expert_grads *g) {
    call c = {.a = a, .g = g, .f64 = a->dtype == MOE_F64, .gated = moe_act_gated(a->act), .size = moe_size(a->dtype)};
    c.paired = c.gated && alternate(a->gate_EFD, a->up_EFD, c.size);
    c.kind      = moe_gemm_kind(a->dtype);
    c.real_type = c.f64 ? MOE_F64 : MOE_F32;
    c.real      = moe_real_size(a->dtype);
    c.factor_type = c.kind == GEMM_BF16 ? MOE_BF16 : c.real_type;
    c.factor    = moe_size(c.factor_type);
    c.U         = c.gated ? 2 * a->F : a->F;
    c.each   = (gemm_grid){a->E, 1, 1, 1, a->bins_E, NULL, 0};
    const int64_t first_sum = a->D, parts = c.gated && !g ? 2 : 1;
    c.up     = (gemm_grid){a->E, a->F, gemm_columns(c.kind, a->F, first_sum, (int)parts), -1, a->bins_E, NULL, 0};
    c.down   = (gemm_grid){a->E, a->D, gemm_columns(c.kind, a->D, a->F, 1), -1, a->bins_E, NULL, 0};
    c.pieces = (a->F + c.up.columns - 1) / c.up.columns;
    if (g) {
        c.ddown = gemm_wgrad_grid(c.kind, a->E, a->D, a->F, a->bins_E, g->ddown_EDF);
        if (c.paired && alternate(g->dgate_EFD, g->dup_EFD, c.size)) {
            c.dboth = g->dgate_EFD, c.dboth.sr = 1;
            c.dgate = gemm_wgrad_grid(c.kind, a->E, 2 * a->F, a->D, a->bins_E, c.dboth);
        } else {
            c.dgate = gemm_wgrad_grid(c.kind, a->E, a->F, a->D, a->bins_E, g->dgate_EFD);
            if (c.gated) c.dup = gemm_wgrad_grid(c.kind, a->E, a->F, a->D, a->bins_E, g->dup_EFD);
        }
    }
    return c;
}
// The workspace: one list of pieces gives both their places and the size of all. workspace = NULL: only the size.
static char *take(void *workspace, int64_t *used, bool wanted, int64_t bytes) {
    char *piece = workspace && wanted ? (char *)workspace + *used : NULL;
    if (wanted) *used += gemm_align(bytes);
    return piece;
}
static int64_t carve(call *c, void *workspace) {
    const moe_expert_args *a = c->a;
    const moe_expert_grads *g = c->g;
    const bool dh = g && (g->dx_RD || g->dgate_EFD.p || g->dup_EFD.p || g->dgate_bias_EF || g->dup_bias_EF);
    int64_t used = 0;
    c->act = take(workspace, &used, !g || g->ddown_EDF.p, a->N * a->F * c->factor);
    c->out = take(workspace, &used, !g || g->dx_RD, a->N * a->D * c->real);
    c->dh  = take(workspace, &used, dh, a->N * c->U * c->factor);
    c->ds  = take(workspace, &used, g && g->dweights_RK, a->N * c->pieces * c->real);
    c->order_E = (int32_t *)take(workspace, &used, true, a->E * (int64_t)sizeof *c->order_E);
    c->missing = (moe_missing *)take(workspace, &used, true, (a->E + 1) * (int64_t)sizeof *c->missing);
    c->scratch = take(workspace, &used, true, moe_threads() * gemm_scratch_size(c->kind));
    return used;
}

// -- a pass ----------------------------------------------------------------------------------------------------------
static void add_stage(call *c, bool wanted, gemm_grid *grid, void (*tile)(const call *, const gemm_task *, void *)) {
    grid->order_E = c->order_E;
    if (wanted) gemm_share(grid);
    c->stages[c->n_stages++] = (stage){grid, tile, wanted ? gemm_grid_tasks(grid) : 0};
}
// Experts by the binary digits of their rows, most first: sorted well enough for the last tasks to be small.
static void order_experts(const moe_expert_args *a, int32_t *order_E) {
    for (int digits = 31; digits >= 0; digits--)
        for (int32_t e = 0; e < a->E; e++) {
            const int32_t rows = a->bins_E[e] - (e ? a->bins_E[e - 1] : 0);
            if (digits ? rows >> (digits - 1) == 1 : rows == 0) *order_E++ = e;
        }
}
// stages[0] is step 1, stages[1] the part of step 2 that the sums read.
static void pass_task(const void *arg, int64_t task, void *scratch) {
    const call *c = arg;
    const moe_expert_args *a = c->a;
    int i = 0;
    while (i < c->n_stages && task >= c->stages[i].tasks) task -= c->stages[i++].tasks;
    if (i == c->n_stages) {
        const int64_t begin = task * c->sum_rows, end = begin + c->sum_rows;
        moe_await(&c->missing[a->E]);
        c->sum(begin, end < a->R ? end : a->R, (void *)c);
        return;
    }
    const gemm_task t = gemm_grid_task(c->stages[i].grid, task);
    if (i > 0) moe_await(&c->missing[t.e]);
    c->stages[i].tile(c, &t, scratch);
    if (i == 0) moe_arrive(&c->missing[t.e]);
    if (i <= 1) moe_arrive(&c->missing[a->E]);
}
static void run_pass(call *c, moe_body sum) {
    const moe_expert_args *a = c->a;
    const stage *first = &c->stages[0], *out = &c->stages[1];
    order_experts(a, c->order_E);
    for (int64_t e = 0; e < a->E; e++) c->missing[e] = first->tasks ? (uint32_t)gemm_grid_tasks_of(first->grid, e) : 0;
    c->missing[a->E] = (uint32_t)(first->tasks + out->tasks);
    c->sum      = sum;
    c->sum_rows = 4 * moe_row_grain(a->K * a->D);
    int64_t tasks = sum ? (a->R + c->sum_rows - 1) / c->sum_rows : 0;
    for (int i = 0; i < c->n_stages; i++) tasks += c->stages[i].tasks;
    gemm_run(tasks, pass_task, c, c->scratch, gemm_scratch_size(c->kind));
}

// -- small things ----------------------------------------------------------------------------------------------------
static const char *bias_of(const call *c, const void *bias, int64_t se, int64_t e, int64_t j) {
    return (const char *)bias + (e * se + j) * c->size;
}
static const char *matrix_at(const call *c, moe_mat w, int64_t e, int64_t row, int64_t column) {
    return (const char *)w.p + (e * w.se + row * w.sr + column * w.sc) * c->size;
}
// Gate and up of n columns, out of a row in which they alternate and back.
static void unpair(const call *c, int64_t n, const void *both, void *gate, void *up) {
    if (c->f64)
        for (int64_t j = 0; j < n; j++)
            ((double *)gate)[j] = ((const double *)both)[2 * j], ((double *)up)[j] = ((const double *)both)[2 * j + 1];
    else
        for (int64_t j = 0; j < n; j++)
            ((float *)gate)[j] = ((const float *)both)[2 * j], ((float *)up)[j] = ((const float *)both)[2 * j + 1];
}
static void pair(const call *c, int64_t n, const void *gate, const void *up, void *both) {
    if (c->f64)
        for (int64_t j = 0; j < n; j++)
            ((double *)both)[2 * j] = ((const double *)gate)[j], ((double *)both)[2 * j + 1] = ((const double *)up)[j];
    else
        for (int64_t j = 0; j < n; j++)
            ((float *)both)[2 * j] = ((const float *)gate)[j], ((float *)both)[2 * j + 1] = ((const float *)up)[j];
}
static int64_t expert_at(const moe_expert_args *a, int64_t p) {         // the first e with p < bins[e]
    int64_t low = 0, high = a->E - 1;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (p < a->bins_E[middle]) high = middle;
        else low = middle + 1;
    }
    return low;
}
// x[r] or dy[r] of the copies from `begin` on; the axis of copies is i for an activation and k for a weight gradient.
static gemm_factor gathered(const call *c, const void *rows, int64_t begin, bool on_k) {
    const moe_expert_args *a = c->a;
    return (gemm_factor){a->dtype, rows, on_k ? 1 : a->D, on_k ? a->D : 1, a->order_RK + begin, a->K, on_k};
}

static int check(const moe_expert_args *a) {
    if (!moe_is_float(a->dtype) || (a->wdtype != MOE_F32 && a->wdtype != a->dtype)) return MOE_BAD_DTYPE;
    if (a->act < MOE_SWIGLU || a->act > MOE_RELU) return MOE_BAD_VALUE;
    if (moe_act_gated(a->act) && !a->up_EFD.p && a->E * a->F * a->D != 0) return MOE_BAD_VALUE;
    // K > E is fine: a rank may own fewer experts than a token chooses, with -1 for the rest
    if (a->R < 0 || a->K < 1 || a->E < 1 || a->D < 0 || a->F < 0 || a->N < 0) return MOE_BAD_SHAPE;
    const int64_t most = INT32_MAX, widest = INT64_MAX / 64 / most;      // flat ids are int32
    if (a->R > most / a->K || a->N > a->R * a->K || a->D > widest || a->F > widest) return MOE_BAD_SHAPE;
    const int status = moe_check_bins(a->E, a->N, a->bins_E);
    if (status != MOE_OK) return status;
    if (a->bins_E[a->E - 1] != a->N) return MOE_BAD_BINS;
    for (int64_t p = 0; p < a->N; p++)
        if (a->order_RK[p] < 0 || a->order_RK[p] >= a->R * a->K) return MOE_BAD_INDEX;
    for (int64_t f = 0; f < a->R * a->K; f++)
        if (a->inverse_RK[f] < -1 || a->inverse_RK[f] >= a->N) return MOE_BAD_INDEX;
    return MOE_OK;
}

// -- forward 1: h = x [Wg | Wu]^T + b, a = act(h) --------------------------------------------------------------------
static void emit_up(const gemm_product *g, int64_t i0, int64_t rows, void *tile_c, int64_t ldc, int64_t part) {
    const call *c = g->job;
    const moe_expert_args *a = c->a;
    const gemm_task *t = g->task;
    for (int64_t i = 0; i < rows; i++) {
        const int64_t p = t->begin + t->i + i0 + i;
        char *gate = (char *)tile_c + i * ldc * c->real, *up = c->gated ? gate + part * c->real : NULL;
        tile apart[2];
        if (c->paired) {
            unpair(c, t->n, gate, &apart[0], &apart[1]);
            gate = (char *)&apart[0], up = (char *)&apart[1];
        }
        char *h = c->h + (p * c->U + t->j) * c->size;
        if (a->gate_bias_EF)
            moe_k->axpy(a->dtype, t->n, 1.0, bias_of(c, a->gate_bias_EF, a->gate_bias_se, t->e, t->j), gate);
        moe_k->store(a->dtype, t->n, gate, h);
        if (up) {
            if (a->up_bias_EF)
                moe_k->axpy(a->dtype, t->n, 1.0, bias_of(c, a->up_bias_EF, a->up_bias_se, t->e, t->j), up);
            moe_k->store(a->dtype, t->n, up, h + a->F * c->size);
        }
        tile act;
        moe_k->act(c->f64, a->act, t->n, gate, up, &act);
        moe_k->store(c->factor_type, t->n, &act, c->act + (p * a->F + t->j) * c->factor);
    }
}
static void up_tile(const call *c, const gemm_task *task, void *scratch) {
    const moe_expert_args *a = c->a;
    const gemm_task t = *task;
    gemm_product g = {
        .kind = c->kind, .m = t.m, .n = t.n, .k = a->D, .parts = c->gated ? 2 : 1,
        .a = gathered(c, a->x_RD, t.begin + t.i, false),
        .b = {{a->dtype, matrix_at(c, a->gate_EFD, t.e, t.j, 0), .si = a->gate_EFD.sr, .sk = a->gate_EFD.sc},
              {a->dtype, matrix_at(c, a->up_EFD, t.e, t.j, 0), .si = a->up_EFD.sr, .sk = a->up_EFD.sc}},
        .emit = emit_up, .job = c, .task = &t,
    };
    if (c->paired) g.n = 2 * t.n, g.parts = 1, g.b[0].si = 1;
    gemm_multiply(&g, scratch);
}

// -- forward 2: y = a Wd^T -------------------------------------------------------------------------------------------
static void down_tile(const call *c, const gemm_task *task, void *scratch) {
    const moe_expert_args *a = c->a;
    const gemm_task t = *task;
    const int64_t p = t.begin + t.i;
    const gemm_product g = {
        .kind = c->kind, .m = t.m, .n = t.n, .k = a->F, .parts = 1,
        .a = {c->factor_type, c->act + p * a->F * c->factor, .si = a->F, .sk = 1},
        .b = {{a->dtype, matrix_at(c, a->down_EDF, t.e, t.j, 0), .si = a->down_EDF.sr, .sk = a->down_EDF.sc}},
        .c = c->out + (p * a->D + t.j) * c->real, .ldc = a->D,
    };
    gemm_multiply(&g, scratch);
}

// -- forward 3: y[r] = sum_k s (y[p] + bd) ---------------------------------------------------------------------------
enum { SLOTS = 64, SUM_COLUMNS = 256 };
typedef struct {                // the rows of c->out that belong to one row r, and their weights
    int64_t     n;
    const char *row[SLOTS];
    union { double f64[SLOTS]; float f32[SLOTS]; } s;
} slots;
static void find_slots(const call *c, int64_t r, slots *found) {
    const moe_expert_args *a = c->a;
    found->n = 0;
    for (int64_t f = r * a->K; r < a->R && f < (r + 1) * a->K; f++) {
        const int64_t p = a->inverse_RK[f];
        if (p < 0) continue;
        real_set(a->dtype, &found->s, found->n, c->g ? 1.0 : moe_get(a->wdtype, a->weights_RK, f));   // in dh already
        found->row[found->n++] = c->out + p * a->D * c->real;
    }
}
// The rows are far apart: those of the next sum are asked for while this one is under way.
static void sum_row(const call *c, const slots *now, const slots *next, char *y) {
    const int64_t D = c->a->D;
    const void *row[SLOTS];
    for (int64_t j = 0; j < D; j += SUM_COLUMNS) {
        const int64_t n = D - j < SUM_COLUMNS ? D - j : SUM_COLUMNS;
        tile sum;
        for (int64_t k = 0; k < next->n; k++)
            for (int64_t i = j * c->real; i < (j + n) * c->real; i += 64) __builtin_prefetch(next->row[k] + i);
        for (int64_t k = 0; k < now->n; k++) row[k] = now->row[k] + j * c->real;
        void *sum_n = c->real_type == c->a->dtype ? (void *)(y + j * c->size) : &sum;
        moe_k->sum(c->real_type, n, now->n, &now->s, row, sum_n);
        if (sum_n == &sum) moe_k->store(c->a->dtype, n, &sum, y + j * c->size);
    }
}
// Any number of slots, with the biases.
static void sum_biased_row(const call *c, int64_t r, char *y) {
    const moe_expert_args *a = c->a;
    for (int64_t j = 0; j < a->D; j += GEMM_COLUMNS) {
        const int64_t n = a->D - j < GEMM_COLUMNS ? a->D - j : GEMM_COLUMNS;
        tile sum;
        memset(&sum, 0, (size_t)(n * c->real));
        for (int64_t f = r * a->K; f < (r + 1) * a->K; f++) {
            const int64_t p = a->inverse_RK[f];
            if (p < 0) continue;
            const double s = c->g ? 1.0 : moe_get(a->wdtype, a->weights_RK, f);
            moe_k->axpy(c->real_type, n, s, c->out + (p * a->D + j) * c->real, &sum);
            if (a->down_bias_ED && !c->g)
                moe_k->axpy(a->dtype, n, s, bias_of(c, a->down_bias_ED, a->down_bias_se, expert_at(a, p), j), &sum);
        }
        moe_k->store(a->dtype, n, &sum, y + j * c->size);
    }
}
static void sum_slots(int64_t begin, int64_t end, void *arg) {
    const call *c = arg;
    const moe_expert_args *a = c->a;
    const bool plain = a->K <= SLOTS && (!a->down_bias_ED || c->g);
    slots of[2];
    if (plain) find_slots(c, begin, &of[begin % 2]);
    for (int64_t r = begin; r < end; r++) {
        char *y = c->y + r * a->D * c->size;
        if (plain) {
            find_slots(c, r + 1, &of[(r + 1) % 2]);
            sum_row(c, &of[r % 2], &of[(r + 1) % 2], y);
        } else sum_biased_row(c, r, y);
    }
}

size_t moe_expert_mlp_workspace(const moe_expert_args *a) {
    call c = call_of(a, NULL);
    return (size_t)carve(&c, NULL);
}
int moe_expert_mlp(const moe_expert_args *a, void *workspace, void *y_RD, void *h_NU) {
    const int status = check(a);
    if (status != MOE_OK) return status;
    call c = call_of(a, NULL);
    carve(&c, workspace);
    c.y = y_RD, c.h = h_NU;
    add_stage(&c, true, &c.up, up_tile);
    add_stage(&c, true, &c.down, down_tile);
    run_pass(&c, sum_slots);
    return MOE_OK;
}

// -- backward 1: dA' = dy Wd, then all that its tile gives -----------------------------------------------------------
static void emit_dact(const gemm_product *g, int64_t i0, int64_t rows, void *tile_c, int64_t ldc, int64_t part) {
    (void)part;
    const call *c = g->job;
    const moe_expert_args *a = c->a;
    const gemm_task *t = g->task;
    for (int64_t i = 0; i < rows; i++) {
        const int64_t p = t->begin + t->i + i0 + i;
        const double s = moe_get(a->wdtype, a->weights_RK, a->order_RK[p]);
        const char *h = (const char *)c->h_in + (p * c->U + t->j) * c->size;
        char *da = (char *)tile_c + i * ldc * c->real;
        tile gate, up, act;
        moe_k->load(a->dtype, t->n, h, &gate);
        if (c->gated) moe_k->load(a->dtype, t->n, h + a->F * c->size, &up);
        if (c->ds || c->act)
            moe_k->act(c->f64, a->act, t->n, &gate, c->gated ? &up : NULL, &act);       // A = act(h)
        if (c->ds) {
            const double ds = moe_k->dot(c->real_type, t->n, da, &act);                 // ds = <dA', A>
            real_set(a->dtype, c->ds, p * c->pieces + t->j / c->up.columns, ds);
        }
        if (c->act) {
            moe_k->scale(c->real_type, t->n, s, &act, &act);
            moe_k->store(c->factor_type, t->n, &act, c->act + (p * a->F + t->j) * c->factor);
        }
        if (c->dh) {
            char *dh = c->dh + (p * c->U + (c->paired ? 2 : 1) * t->j) * c->factor;
            tile dgate, dup, both[2];
            moe_k->scale(c->real_type, t->n, s, da, da);
            moe_k->dact(c->f64, a->act, t->n, &gate, c->gated ? &up : NULL, da, &dgate, c->gated ? &dup : NULL);
            if (c->paired) {
                pair(c, t->n, &dgate, &dup, both);
                moe_k->store(c->factor_type, 2 * t->n, both, dh);
            } else {
                moe_k->store(c->factor_type, t->n, &dgate, dh);
                if (c->gated) moe_k->store(c->factor_type, t->n, &dup, dh + a->F * c->factor);
            }
        }
    }
}
// For sA alone dA' is a sum of nothing.
static void dact_tile(const call *c, const gemm_task *task, void *scratch) {
    const moe_expert_args *a = c->a;
    const gemm_task t = *task;
    const gemm_product g = {
        .kind = c->kind, .m = t.m, .n = t.n, .k = c->ds || c->dh ? a->D : 0, .parts = 1,
        .a = gathered(c, c->g->dy_RD, t.begin + t.i, false),
        .b = {{a->dtype, matrix_at(c, a->down_EDF, t.e, 0, t.j), .si = a->down_EDF.sc, .sk = a->down_EDF.sr}},
        .emit = emit_dact, .job = c, .task = &t,
    };
    gemm_multiply(&g, scratch);
}

// -- backward 2: dx per copy, the weight gradients, the bias sums ----------------------------------------------------
static void dx_tile(const call *c, const gemm_task *task, void *scratch) {
    const moe_expert_args *a = c->a;
    const gemm_task t = *task;
    const int64_t p = t.begin + t.i;
    gemm_product g = {
        .kind = c->kind, .m = t.m, .n = t.n, .k = a->F, .parts = 1,
        .a = {c->factor_type, c->dh + p * c->U * c->factor, .si = c->U, .sk = 1},
        .b = {{a->dtype, matrix_at(c, a->gate_EFD, t.e, 0, t.j), .si = a->gate_EFD.sc, .sk = a->gate_EFD.sr}},
        .c = c->out + (p * a->D + t.j) * c->real, .ldc = a->D,
    };
    if (c->paired) g.k = 2 * a->F, g.b[0].sk = 1;
    gemm_multiply(&g, scratch);
    if (!c->gated || c->paired) return;
    g.a.p += a->F * c->factor;
    g.b[0] = (gemm_factor){a->dtype, matrix_at(c, a->up_EFD, t.e, 0, t.j), .si = a->up_EFD.sc, .sk = a->up_EFD.sr};
    g.accumulate = true;
    gemm_multiply(&g, scratch);
}
static void ddown_tile(const call *c, const gemm_task *task, void *scratch) {
    const moe_expert_args *a = c->a;
    const gemm_task t = *task;
    const gemm_factor sa = {c->factor_type, c->act + t.begin * a->F * c->factor, .si = 1, .sk = a->F};
    gemm_wgrad(a->dtype, t, gathered(c, c->g->dy_RD, t.begin, true), sa, c->g->ddown_EDF, scratch);
}
static void dh_wgrad(const call *c, const gemm_task *t, moe_mat dw, int64_t column, void *scratch) {
    const moe_expert_args *a = c->a;
    const int64_t si = c->paired && !c->dboth.p ? 2 : 1;
    const gemm_factor dh = {c->factor_type, c->dh + (t->begin * c->U + column) * c->factor, .si = si, .sk = c->U};
    gemm_wgrad(a->dtype, *t, dh, gathered(c, a->x_RD, t->begin, true), dw, scratch);
}
static void dgate_tile(const call *c, const gemm_task *t, void *scratch) {
    dh_wgrad(c, t, c->dboth.p ? c->dboth : c->g->dgate_EFD, 0, scratch);
}
static void dup_tile(const call *c, const gemm_task *t, void *scratch) {
    dh_wgrad(c, t, c->g->dup_EFD, c->paired ? 1 : c->a->F, scratch);
}
// sum[j] = sum over the copies of e, in order, of weight * row[j], j < n <= GEMM_COLUMNS.
static void sum_copies(const call *c, int64_t e, int64_t n, int dtype, const char *rows, int64_t stride, bool of_dy,
                       tile *sum) {
    const moe_expert_args *a = c->a;
    memset(sum, 0, (size_t)(n * c->real));
    for (int64_t p = e ? a->bins_E[e - 1] : 0; p < a->bins_E[e]; p++) {
        const int64_t f = a->order_RK[p], row = of_dy ? f / a->K : p;
        const double s = of_dy ? moe_get(a->wdtype, a->weights_RK, f) : 1.0;
        moe_k->axpy(dtype, n, s, rows + row * stride * moe_size(dtype), sum);
    }
}
static void bias_sum(const call *c, int64_t e, int64_t n, int dtype, const char *rows, int64_t stride, bool of_dy,
                     char *out) {
    for (int64_t j = 0; j < n; j += GEMM_COLUMNS) {
        const int64_t some = min64(n - j, GEMM_COLUMNS);
        tile sum;
        sum_copies(c, e, some, dtype, rows + j * moe_size(dtype), stride, of_dy, &sum);
        moe_k->store(c->a->dtype, some, &sum, out + j * c->size);
    }
}
static void paired_bias_sum(const call *c, int64_t e, char *gate_out, char *up_out) {
    for (int64_t j = 0; j < c->a->F; j += GEMM_COLUMNS / 2) {
        const int64_t some = min64(c->a->F - j, GEMM_COLUMNS / 2);
        tile sum, gate, up;
        sum_copies(c, e, 2 * some, c->factor_type, c->dh + 2 * j * c->factor, c->U, false, &sum);
        unpair(c, some, &sum, &gate, &up);
        if (gate_out) moe_k->store(c->a->dtype, some, &gate, gate_out + j * c->size);
        if (up_out)   moe_k->store(c->a->dtype, some, &up, up_out + j * c->size);
    }
}
static void dbias(const call *c, const gemm_task *t, void *scratch) {
    (void)scratch;
    const moe_expert_args *a = c->a;
    const moe_expert_grads *g = c->g;
    const int64_t e = t->e;
    char *dgate = g->dgate_bias_EF, *dup = g->dup_bias_EF;
    if (dgate) dgate += e * g->dgate_bias_se * c->size;
    if (dup)   dup += e * g->dup_bias_se * c->size;
    if (c->paired && (dgate || dup)) paired_bias_sum(c, e, dgate, dup);
    else {
        if (dgate) bias_sum(c, e, a->F, c->factor_type, c->dh, c->U, false, dgate);
        if (dup)   bias_sum(c, e, a->F, c->factor_type, c->dh + a->F * c->factor, c->U, false, dup);
    }
    if (g->ddown_bias_ED)
        bias_sum(c, e, a->D, a->dtype, g->dy_RD, a->D, true, (char *)g->ddown_bias_ED + e * g->ddown_bias_se * c->size);
}

// -- backward 3: dx as the forward's sum, and dweights ---------------------------------------------------------------
static void sum_dslots(int64_t begin, int64_t end, void *arg) {
    const call *c = arg;
    const moe_expert_args *a = c->a;
    if (c->out) sum_slots(begin, end, arg);
    for (int64_t f = begin * a->K; c->ds && f < end * a->K; f++) {
        const int64_t p = a->inverse_RK[f];
        double ds = 0;
        for (int64_t piece = 0; p >= 0 && piece < c->pieces; piece++)
            ds += moe_get(c->real_type, c->ds, p * c->pieces + piece);
        if (p >= 0 && a->down_bias_ED)
            ds += moe_k->dot(a->dtype, a->D, (const char *)c->g->dy_RD + f / a->K * a->D * c->size,
                             bias_of(c, a->down_bias_ED, a->down_bias_se, expert_at(a, p), 0));
        const float narrow = (float)ds;
        moe_k->store(a->wdtype, 1, a->wdtype == MOE_F64 ? (const void *)&ds : &narrow,
                     (char *)c->g->dweights_RK + f * moe_size(a->wdtype));
    }
}

size_t moe_expert_mlp_backward_workspace(const moe_expert_args *a, const moe_expert_grads *g) {
    call c = call_of(a, g);
    return (size_t)carve(&c, NULL);
}
int moe_expert_mlp_backward(const moe_expert_args *a, void *workspace, const moe_expert_grads *g) {
    const int status = check(a);
    if (status != MOE_OK) return status;
    call c = call_of(a, g);
    carve(&c, workspace);
    c.h_in = g->h_NU, c.y = g->dx_RD;
    add_stage(&c, c.act || c.dh || c.ds, &c.up, dact_tile);
    add_stage(&c, g->dx_RD, &c.down, dx_tile);
    add_stage(&c, g->ddown_EDF.p, &c.ddown, ddown_tile);
    add_stage(&c, g->dgate_EFD.p, &c.dgate, dgate_tile);
    add_stage(&c, c.gated && g->dup_EFD.p && !c.dboth.p, &c.dup, dup_tile);
    add_stage(&c, g->dgate_bias_EF || g->dup_bias_EF || g->ddown_bias_ED, &c.each, dbias);
    run_pass(&c, c.out || c.ds ? sum_dslots : NULL);
    return MOE_OK;
}
