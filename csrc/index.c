// index.c: which copy goes where, in integers: the routing index, sort, histogram, cumsum, topology, replicate.
//
//   route_index   ids_N in [-1,E) -> counts_E, bins_E, order_N, inverse_N      counting sort, O(N + pieces*E)
//     1. cut the ids into pieces; each counts its ids per expert             (parallel)
//     2. scan over (expert, piece): where in the order each piece's copies of each expert begin
//     3. each piece places its copies, in flat order                         (parallel)
// A stable sort has one answer, so it depends neither on the pieces nor on the threads.
// Limits: N and the bins fit in int32. Sums of integers wrap.
#include "kernels.h"
#include <stdatomic.h>
#include <string.h>

static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

int moe_check_bins(int64_t E, int64_t rows, const int32_t *bins_E) {
    int64_t end = 0;
    for (int64_t e = 0; e < E; e++) {
        if (bins_E[e] < end) return MOE_BAD_BINS;
        end = bins_E[e];
    }
    return end <= rows ? MOE_OK : MOE_BAD_BINS;
}

// -- the routing index ------------------------------------------------------------------------------------------------
typedef struct {
    int64_t        N, E, pieces;
    const int32_t *ids_N;
    int32_t       *place_pE;                    // step 1: copies of e in piece p; then: where the next of them goes
    int32_t       *order_N, *inverse_N;
    atomic_bool    bad;
} route_job;

// At most 16 pieces, each of 4096 ids or more and no smaller than its row of counters.
static int64_t route_pieces(int64_t N, int64_t E) { return max64(1, min64(16, N / max64(4096, E))); }

static void count_pieces(int64_t begin, int64_t end, void *arg) {
    route_job *j = arg;
    for (int64_t p = begin; p < end; p++) {
        int32_t *count_E = j->place_pE + p * j->E;
        for (int64_t e = 0; e < j->E; e++) count_E[e] = 0;
        for (int64_t f = j->N * p / j->pieces; f < j->N * (p + 1) / j->pieces; f++) {
            int32_t e = j->ids_N[f];
            if (e < -1 || e >= j->E) { atomic_store(&j->bad, true); return; }
            if (e >= 0) count_E[e]++;
        }
    }
}

static void place_pieces(int64_t begin, int64_t end, void *arg) {
    route_job *j = arg;
    for (int64_t p = begin; p < end; p++) {
        int32_t *next_E = j->place_pE + p * j->E;
        for (int64_t f = j->N * p / j->pieces; f < j->N * (p + 1) / j->pieces; f++) {
            int32_t e = j->ids_N[f], at = e < 0 ? -1 : next_E[e]++;
            if (e >= 0) j->order_N[at] = (int32_t)f;
            j->inverse_N[f] = at;
        }
    }
}

size_t moe_route_index_workspace(int64_t N, int64_t E) { return (size_t)(route_pieces(N, E) * E) * sizeof(int32_t); }

int moe_route_index(int64_t N, int64_t E, const int32_t *ids_N, void *workspace,
                    int32_t *counts_E, int32_t *bins_E, int32_t *order_N, int32_t *inverse_N) {
    if (N < 0 || E < 0 || N > INT32_MAX || E > INT32_MAX) return MOE_BAD_SHAPE;
    route_job j = {N, E, route_pieces(N, E), ids_N, workspace, order_N, inverse_N, false};
    moe_parallel(j.pieces, 1, count_pieces, &j);
    if (j.bad) return MOE_BAD_INDEX;
    int32_t at = 0;
    for (int64_t e = 0; e < E; e++) {
        int32_t begin = at;
        for (int64_t p = 0; p < j.pieces; p++) {
            int32_t *place = &j.place_pE[p * E + e], count = *place;
            *place = at;
            at += count;
        }
        counts_E[e] = at - begin;
        bins_E[e]   = at;
    }
    for (int64_t i = at; i < N; i++) order_N[i] = -1;
    moe_parallel(j.pieces, 1, place_pieces, &j);
    return MOE_OK;
}

// -- integers of three widths -----------------------------------------------------------------------------------------
static bool is_int(int dtype) { return dtype >= MOE_I16 && dtype <= MOE_I64; }

static inline int64_t get(int dtype, const void *x, int64_t i) {
    if (dtype == MOE_I16) return ((const int16_t *)x)[i];
    return dtype == MOE_I32 ? ((const int32_t *)x)[i] : ((const int64_t *)x)[i];
}
static inline void put(int dtype, void *y, int64_t i, uint64_t value) {
    if (dtype == MOE_I16) ((int16_t *)y)[i] = (int16_t)value;
    else if (dtype == MOE_I32) ((int32_t *)y)[i] = (int32_t)value;
    else ((int64_t *)y)[i] = (int64_t)value;
}

// -- sort: radix, least significant digit first; one pass if end_bit <= 11 --------------------------------------------
// Keys are the low end_bit bits of x with its sign bit flipped: ascending by value at full width, unsigned below it.
enum { DIGIT = 11, RADIX = 1 << DIGIT };

static inline uint64_t digit_of(int dtype, const void *x_n, int64_t i, int shift, uint64_t mask) {
    uint64_t sign = (uint64_t)1 << (8 * moe_size(dtype) - 1);
    return ((uint64_t)get(dtype, x_n, i) ^ sign) >> shift & mask;
}

size_t moe_sort_workspace(int64_t n) { return 2 * (size_t)n * sizeof(int64_t); }

int moe_sort(int dtype, int64_t n, int end_bit, const void *x_n, void *workspace, void *sorted_n, void *indices_n) {
    if (!is_int(dtype)) return MOE_BAD_DTYPE;
    int bits = (int)(8 * moe_size(dtype));
    if (n < 0 || (bits < 64 && n > (int64_t)1 << (bits - 1))) return MOE_BAD_SHAPE;     // indices_n holds up to n-1
    if (end_bit < 0 || end_bit > bits) return MOE_BAD_VALUE;
    int64_t *order = workspace, *next = order + n;
    for (int64_t i = 0; i < n; i++) order[i] = i;
    for (int shift = 0; shift < end_bit; shift += DIGIT) {
        uint64_t mask = ((uint64_t)1 << min64(DIGIT, end_bit - shift)) - 1;
        int64_t  place[RADIX] = {0}, at = 0;
        for (int64_t i = 0; i < n; i++) place[digit_of(dtype, x_n, i, shift, mask)]++;
        for (uint64_t d = 0; d <= mask; d++) {
            int64_t count = place[d];
            place[d] = at;
            at += count;
        }
        for (int64_t i = 0; i < n; i++) next[place[digit_of(dtype, x_n, order[i], shift, mask)]++] = order[i];
        int64_t *swap = order; order = next; next = swap;
    }
    for (int64_t i = 0; i < n; i++) {
        put(dtype, sorted_n, i, (uint64_t)get(dtype, x_n, order[i]));
        put(dtype, indices_n, i, (uint64_t)order[i]);
    }
    return MOE_OK;
}

// -- histogram and cumsum: one task per row ---------------------------------------------------------------------------
typedef struct {
    int         dtype, exclusive;
    int64_t     n, bins;
    const void *x;
    void       *y;
} rows_job;

static void histogram_rows(int64_t begin, int64_t end, void *arg) {
    const rows_job *j = arg;
    for (int64_t r = begin; r < end; r++) {
        int32_t *count_b = (int32_t *)j->y + r * j->bins;
        for (int64_t b = 0; b < j->bins; b++) count_b[b] = 0;
        for (int64_t i = 0; i < j->n; i++) {
            int64_t value = get(j->dtype, j->x, r * j->n + i);
            if (value >= 0 && value < j->bins) count_b[value]++;
        }
    }
}

static void cumsum_rows(int64_t begin, int64_t end, void *arg) {
    const rows_job *j = arg;
    for (int64_t r = begin; r < end; r++) {
        uint64_t sum = 0;
        for (int64_t i = r * j->n; i < (r + 1) * j->n; i++) {
            uint64_t before = sum;
            sum += (uint64_t)get(j->dtype, j->x, i);
            put(j->dtype, j->y, i, j->exclusive ? before : sum);
        }
    }
}


int moe_histogram(int dtype, int64_t rows, int64_t n, int64_t bins, const void *x_rn, int32_t *counts_rb) {
    if (!is_int(dtype)) return MOE_BAD_DTYPE;
    if (rows < 0 || n < 0 || bins < 0 || n > INT32_MAX) return MOE_BAD_SHAPE;
    rows_job j = {.dtype = dtype, .n = n, .bins = bins, .x = x_rn, .y = counts_rb};
    moe_parallel(rows, moe_row_grain(n + bins), histogram_rows, &j);
    return MOE_OK;
}

int moe_cumsum(int dtype, int64_t rows, int64_t n, int exclusive, const void *x_rn, void *y_rn) {
    if (!is_int(dtype)) return MOE_BAD_DTYPE;
    if (rows < 0 || n < 0) return MOE_BAD_SHAPE;
    rows_job j = {.dtype = dtype, .exclusive = exclusive, .n = n, .x = x_rn, .y = y_rn};
    moe_parallel(rows, moe_row_grain(n), cumsum_rows, &j);
    return MOE_OK;
}

// -- topology of a block-sparse [rows, E*cols] matrix -----------------------------------------------------------------
// Block row r of expert e holds columns e*cols .. e*cols + cols-1.
int moe_topology(int64_t E, int64_t block, int64_t rows, int64_t cols, const int32_t *padded_bins_E,
                 int16_t *columns_rc) {
    if (E < 0 || block < 1 || rows < 0 || cols < 0 || rows > INT32_MAX / block) return MOE_BAD_SHAPE;
    if (cols > 0 && E > (INT16_MAX + 1) / cols) return MOE_BAD_SHAPE;                 // columns are int16
    int status = moe_check_bins(E, rows * block, padded_bins_E);
    if (status != MOE_OK) return status;
    int64_t r = 0;
    for (int64_t e = 0; e < E; e++) {
        if (padded_bins_E[e] % block) return MOE_BAD_BINS;
        for (; r < padded_bins_E[e] / block; r++)
            for (int64_t c = 0; c < cols; c++) columns_rc[r * cols + c] = (int16_t)(e * cols + c);
    }
    return r == rows ? MOE_OK : MOE_BAD_BINS;                                         // every row has an expert
}

// -- replicate: y[r, bins[i-1]..bins[i]) = x[r,i] ---------------------------------------------------------------------
typedef struct {
    int            dtype;
    int64_t        nb, n;
    const int32_t *bins_b;
    const char    *in;
    char          *out;
} replicate_job;

static void replicate_rows(int64_t begin, int64_t end, void *arg) {
    const replicate_job *j = arg;
    int64_t size = moe_size(j->dtype), tail = j->nb ? j->bins_b[j->nb - 1] : 0;
    for (int64_t r = begin; r < end; r++) {
        const char *x_b = j->in + r * j->nb * size;
        char       *y_n = j->out + r * j->n * size;
        for (int64_t b = 0, i = 0; b < j->nb; b++)
            for (; i < j->bins_b[b]; i++) memcpy(y_n + i * size, x_b + b * size, (size_t)size);
        for (int64_t i = tail * size; i < j->n * size; i++) y_n[i] = 0;
    }
}

// dx[r,i] = sum of dy[r, bins[i-1]..bins[i]), in real and in order (integers: wrapping)
static void sum_segment(int dtype, int64_t n, const char *dy, char *dx) {
    int64_t size = moe_size(dtype);
    if (is_int(dtype)) {
        uint64_t sum = 0;
        for (int64_t i = 0; i < n; i++) sum += (uint64_t)get(dtype, dy, i);
        put(dtype, dx, 0, sum);
    } else if (dtype == MOE_F64) {
        double sum = 0;
        for (int64_t i = 0; i < n; i++) sum += ((const double *)dy)[i];
        moe_k->store(dtype, 1, &sum, dx);
    } else {
        enum { TILE = 256 };
        float sum = 0, tile[TILE];
        for (int64_t i = 0; i < n; i += TILE) {
            int64_t m = min64(TILE, n - i);
            moe_k->load(dtype, m, dy + i * size, tile);
            for (int64_t t = 0; t < m; t++) sum += tile[t];
        }
        moe_k->store(dtype, 1, &sum, dx);
    }
}

static void replicate_backward_rows(int64_t begin, int64_t end, void *arg) {
    const replicate_job *j = arg;
    int64_t size = moe_size(j->dtype);
    for (int64_t r = begin; r < end; r++)
        for (int64_t b = 0, i = 0; b < j->nb; i = j->bins_b[b++])
            sum_segment(j->dtype, j->bins_b[b] - i, j->in + (r * j->n + i) * size, j->out + (r * j->nb + b) * size);
}

static int replicate(int dtype, int64_t rows, int64_t nb, int64_t n, const void *in, const int32_t *bins_b, void *out,
                     moe_body body) {
    if (dtype < MOE_F64 || dtype > MOE_I64) return MOE_BAD_DTYPE;
    if (rows < 0 || nb < 0 || n < 0) return MOE_BAD_SHAPE;
    int status = moe_check_bins(nb, n, bins_b);
    if (status != MOE_OK) return status;
    replicate_job j = {dtype, nb, n, bins_b, in, out};
    moe_parallel(rows, moe_row_grain(n), body, &j);
    return MOE_OK;
}

int moe_replicate(int dtype, int64_t rows, int64_t nb, int64_t n, const void *x_rb, const int32_t *bins_b, void *y_rn) {
    return replicate(dtype, rows, nb, n, x_rb, bins_b, y_rn, replicate_rows);
}

int moe_replicate_backward(int dtype, int64_t rows, int64_t nb, int64_t n, const void *dy_rn, const int32_t *bins_b,
                           void *dx_rb) {
    return replicate(dtype, rows, nb, n, dy_rn, bins_b, dx_rb, replicate_backward_rows);
}
