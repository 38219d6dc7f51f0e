// permute.c: token rows <-> expert rows, in one of three layouts (moe_layout): plain, padded, binned.
//
//   gather            y_PD[row(p)] = w[order[p]] * x_TD[order[p] / K]        rows that nobody has are zeros
//   scatter           y_TD[t] = sum over slots of w[t*K+k] * x_PD[row]      a copy without a row adds nothing
//   scatter_dweights  dw[t*K+k] = <x_PD[row], dy_TD[t]>                     0 for a copy without a row
// The backward of gather is scatter without weights; that of scatter is gather of dy with weights, and dweights.
//
// Each task owns whole output rows, so there are no atomics and the threads do not show. Without weights a row is moved
// as bytes; a sum runs in slot order, fused, in real, and is rounded once. The three layouts are one here: expert e
// owns a region of the expert rows, filled from its start with as many of its copies as fit.
// Limits: N fits in int32, K <= MOE_MAX_EXPERTS.
#include "real.h"
#include <string.h>

typedef struct {
    int               dtype, wdtype;
    int64_t           D;
    const moe_layout *l;
    const char       *x, *weights, *dy;
    int64_t          *row_N;                    // flat id -> expert row, -1 if it has none
    char             *y;
} move_job;

static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t first_copy(const moe_layout *l, int64_t e) { return e ? l->bins_E[e - 1] : 0; }
static int64_t region_end(const moe_layout *l, int64_t e) {
    return l->capacity ? (e + 1) * l->capacity : l->out_bins_E ? l->out_bins_E[e] : l->bins_E[e];
}
static int64_t region_begin(const moe_layout *l, int64_t e) { return e ? region_end(l, e - 1) : 0; }
static int64_t copies_kept(const moe_layout *l, int64_t e) {
    return min64(l->bins_E[e] - first_copy(l, e), region_end(l, e) - region_begin(l, e));
}

// The first expert whose region ends behind `row`; E if there is none.
static int64_t expert_at(const moe_layout *l, int64_t row) {
    int64_t low = 0, high = l->E;
    while (low < high) {
        int64_t e = (low + high) / 2;
        if (region_end(l, e) > row) high = e;
        else low = e + 1;
    }
    return low;
}

// -- checks at the door -----------------------------------------------------------------------------------------------
static bool overflows(int64_t rows, int64_t D, int dtype) {
    int64_t bytes;
    return __builtin_mul_overflow(rows, D, &bytes) || __builtin_mul_overflow(bytes, moe_size(dtype), &bytes);
}

static int check(const move_job *j) {
    const moe_layout *l = j->l;
    if (!moe_is_float(j->dtype)) return MOE_BAD_DTYPE;
    if ((j->weights || j->dy) && j->wdtype != MOE_F32 && j->wdtype != j->dtype) return MOE_BAD_DTYPE;
    if (j->D < 0 || l->N < 0 || l->K < 1 || l->E < 0 || l->P < 0 || l->capacity < 0) return MOE_BAD_SHAPE;
    if (l->K > MOE_MAX_EXPERTS || l->N % l->K || l->N > INT32_MAX) return MOE_BAD_SHAPE;
    if (overflows(l->N, j->D, j->dtype) || overflows(l->P, j->D, j->dtype)) return MOE_BAD_SHAPE;
    if (l->capacity && (l->out_bins_E || l->E > l->P / l->capacity || l->E * l->capacity != l->P)) return MOE_BAD_SHAPE;
    const int32_t *ends_E = l->out_bins_E ? l->out_bins_E : l->bins_E;
    if (moe_check_bins(l->E, l->N, l->bins_E) != MOE_OK) return MOE_BAD_BINS;
    if (!l->capacity && moe_check_bins(l->E, l->P, ends_E) != MOE_OK) return MOE_BAD_BINS;
    for (int64_t e = 0; l->out_bins_E && e < l->E; e++)
        if (copies_kept(l, e) != l->bins_E[e] - first_copy(l, e)) return MOE_BAD_BINS;     // padding never drops
    bool bad = false;
    for (int64_t p = 0; p < first_copy(l, l->E); p++) bad |= l->order_N[p] < 0 || l->order_N[p] >= l->N;
    return bad ? MOE_BAD_INDEX : MOE_OK;
}

// At least 64 KB of output for a task.
static int64_t row_grain(const move_job *j) { return 1 + 65536 / max64(1, j->D * moe_size(j->dtype)); }

// The next row is known long before it is read. Its first 2 KB are asked for where the work on this row would hide the
// wait; behind them the hardware has understood.
static void prefetch_row(const char *x, int64_t bytes) {
    for (int64_t i = 0; i < min64(bytes, 2048); i += 64) __builtin_prefetch(x + i);
}

// -- gather -----------------------------------------------------------------------------------------------------------
static void gather_rows(int64_t begin, int64_t end, void *arg) {
    const move_job   *j = arg;
    const moe_layout *l = j->l;
    int64_t           bytes = j->D * moe_size(j->dtype);
    for (int64_t e = expert_at(l, begin), row = begin; row < end; e++) {
        int64_t start  = e < l->E ? region_begin(l, e) : row;           // behind the last region all rows are free
        int64_t filled = e < l->E ? start + copies_kept(l, e) : row;
        int64_t stop   = e < l->E ? min64(end, region_end(l, e)) : end;
        for (; row < stop; row++) {
            char          *y_D   = j->y + row * bytes;
            const int32_t *order = l->order_N + first_copy(l, e) + row - start;
            if (row >= filled) memset(y_D, 0, (size_t)bytes);
            else if (!j->weights) memcpy(y_D, j->x + order[0] / l->K * bytes, (size_t)bytes);
            else {
                if (row + 1 < filled) prefetch_row(j->x + order[1] / l->K * bytes, bytes);
                const double w = moe_get(j->wdtype, j->weights, order[0]);
                moe_k->scale(j->dtype, j->D, w, j->x + order[0] / l->K * bytes, y_D);
            }
        }
    }
}

int moe_gather(int dtype, int wdtype, int64_t D, const moe_layout *layout, const void *x_TD, const void *weights_N,
               void *y_PD) {
    move_job j = {.dtype = dtype, .wdtype = wdtype, .D = D, .l = layout, .x = x_TD, .weights = weights_N, .y = y_PD};
    int status = check(&j);
    if (status != MOE_OK || D == 0) return status;
    moe_parallel(layout->P, row_grain(&j), gather_rows, &j);
    return MOE_OK;
}

// -- scatter ----------------------------------------------------------------------------------------------------------
static void invert_experts(int64_t begin, int64_t end, void *arg) {
    const move_job   *j = arg;
    const moe_layout *l = j->l;
    for (int64_t e = begin; e < end; e++) {
        const int32_t *order = l->order_N + first_copy(l, e);
        for (int64_t i = 0, n = copies_kept(l, e), row = region_begin(l, e); i < n; i++) j->row_N[order[i]] = row + i;
    }
}

static void invert(move_job *j) {
    for (int64_t f = 0; f < j->l->N; f++) j->row_N[f] = -1;
    moe_parallel(j->l->E, 1 + j->l->E / 16, invert_experts, j);
}

static void scatter_rows(int64_t begin, int64_t end, void *arg) {
    const move_job *j = arg;
    int64_t         bytes = j->D * moe_size(j->dtype), K = j->l->K;
    const void     *x_K[MOE_MAX_EXPERTS];
    real_row        w_K;
    for (int64_t t = begin; t < end; t++) {
        for (int64_t f = (t + 1) * K; f < (t + 2) * K && t + 1 < end; f++)
            if (j->row_N[f] >= 0) prefetch_row(j->x + j->row_N[f] * bytes, bytes);
        int64_t present = 0;
        for (int64_t f = t * K; f < (t + 1) * K; f++) {
            if (j->row_N[f] < 0) continue;
            real_set(j->dtype, &w_K, present, j->weights ? moe_get(j->wdtype, j->weights, f) : 1);
            x_K[present++] = j->x + j->row_N[f] * bytes;
        }
        char *y_D = j->y + t * bytes;
        if (present == 1 && !j->weights) memcpy(y_D, x_K[0], (size_t)bytes);
        else moe_k->sum(j->dtype, j->D, present, &w_K, x_K, y_D);
    }
}

size_t moe_scatter_workspace(const moe_layout *layout) { return (size_t)layout->N * sizeof(int64_t); }

int moe_scatter(int dtype, int wdtype, int64_t D, const moe_layout *layout, const void *x_PD, const void *weights_N,
                void *workspace, void *y_TD) {
    move_job j = {.dtype = dtype, .wdtype = wdtype, .D = D, .l = layout, .x = x_PD, .weights = weights_N,
                  .row_N = workspace, .y = y_TD};
    int status = check(&j);
    if (status != MOE_OK) return status;
    invert(&j);
    moe_parallel(layout->N / layout->K, row_grain(&j), scatter_rows, &j);
    return MOE_OK;
}

// y[t] += w[f] * x[row(f)]  gives  dw[f] = <x[row(f)], dy[t]>
static void dweights_rows(int64_t begin, int64_t end, void *arg) {
    const move_job *j = arg;
    int64_t         bytes = j->D * moe_size(j->dtype), K = j->l->K;
    real_row        dw_K;
    for (int64_t t = begin; t < end; t++) {
        for (int64_t k = 0, f = t * K; k < K; k++, f++) {
            if (f + 1 < end * K && j->row_N[f + 1] >= 0) prefetch_row(j->x + j->row_N[f + 1] * bytes, bytes);
            bool here = j->row_N[f] >= 0;
            real_set(j->wdtype, &dw_K, k,
                     here ? moe_k->dot(j->dtype, j->D, j->x + j->row_N[f] * bytes, j->dy + t * bytes) : 0);
        }
        moe_k->store(j->wdtype, K, &dw_K, j->y + t * K * moe_size(j->wdtype));
    }
}

size_t moe_scatter_dweights_workspace(const moe_layout *layout) { return moe_scatter_workspace(layout); }

int moe_scatter_dweights(int dtype, int wdtype, int64_t D, const moe_layout *layout, const void *x_PD,
                         const void *dy_TD, void *workspace, void *dweights_N) {
    move_job j = {.dtype = dtype, .wdtype = wdtype, .D = D, .l = layout, .x = x_PD, .dy = dy_TD,
                  .row_N = workspace, .y = dweights_N};
    int status = check(&j);
    if (status != MOE_OK) return status;
    invert(&j);
    moe_parallel(layout->N / layout->K, row_grain(&j), dweights_rows, &j);
    return MOE_OK;
}
