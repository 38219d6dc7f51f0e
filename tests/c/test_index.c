// test_index.c: the integer operations against their definitions, one element at a time.
#include "check.h"

typedef enum { RANDOM, ONE_EXPERT, SOME_ABSENT, ALL_ABSENT } routing;

static void check_route_index(int64_t N, int64_t E, routing r) {
    uint64_t seed = (uint64_t)(N + 31 * E + (int)r);
    int32_t *ids = check_alloc(4 * N);
    for (int64_t f = 0; f < N; f++) {
        ids[f] = (int32_t)(E == 0 || r == ALL_ABSENT ? -1 : r == ONE_EXPERT ? E - 1 : check_below(&seed, E));
        if (r == SOME_ABSENT && check_below(&seed, 2)) ids[f] = -1;
    }
    // The order by definition: for each expert a linked list of its copies, in flat order.
    int32_t *head = check_alloc(4 * E), *tail = check_alloc(4 * E), *next = check_alloc(4 * N);
    for (int64_t f = 0; f < N; f++) {
        if (ids[f] < 0) continue;
        if (head[ids[f]] < 0) head[ids[f]] = (int32_t)f;
        else next[tail[ids[f]]] = (int32_t)f;
        tail[ids[f]] = (int32_t)f;
    }
    for (check_threads = 1; check_threads <= 3; check_threads += 2) {
        int32_t *counts = check_alloc(4 * E), *bins = check_alloc(4 * E);
        int32_t *order = check_alloc(4 * N), *inverse = check_alloc(4 * N);
        memset(order, 0x55, (size_t)(4 * N));                           // -1 is an answer here
        memset(inverse, 0x55, (size_t)(4 * N));
        void    *workspace = check_alloc((int64_t)moe_route_index_workspace(N, E));
        CHECK_OK(moe_route_index(N, E, ids, workspace, counts, bins, order, inverse));
        int64_t at = 0;
        for (int64_t e = 0; e < E; e++) {
            int64_t begin = at;
            for (int32_t f = head[e]; f >= 0; f = next[f]) {
                CHECK(order[at] == f, "order[%d] = %d, want %d", (int)at, order[at], f);
                CHECK(inverse[f] == at, "inverse[%d] = %d, want %d", f, inverse[f], (int)at);
                at++;
            }
            CHECK(counts[e] == at - begin && bins[e] == at, "expert %d: count %d, bin %d", (int)e, counts[e], bins[e]);
        }
        for (; at < N; at++) CHECK(order[at] == -1, "order[%d] = %d behind the last bin", (int)at, order[at]);
        for (int64_t f = 0; f < N; f++) CHECK(ids[f] >= 0 || inverse[f] == -1, "inverse[%d] of an absent copy", (int)f);
        free(counts); free(bins); free(order); free(inverse); free(workspace);
    }
    free(ids); free(head); free(tail); free(next);
}

static void test_route_index(void) {
    static const int64_t N[] = {0, 1, 5, 1000, 20000}, E[] = {0, 1, 8, 100, 4096};
    for (int i = 0; i < 5; i++)
        for (int j = 0; j < 5; j++)
            for (routing r = RANDOM; r <= ALL_ABSENT; r++) check_route_index(N[i], E[j], r);
    int32_t bad[2] = {0, 4}, out[4][4];
    void   *workspace = check_alloc((int64_t)moe_route_index_workspace(2, 4));
    CHECK_STATUS(moe_route_index(2, 4, bad, workspace, out[0], out[1], out[2], out[3]), MOE_BAD_INDEX);
    bad[1] = -2;
    CHECK_STATUS(moe_route_index(2, 4, bad, workspace, out[0], out[1], out[2], out[3]), MOE_BAD_INDEX);
    CHECK_STATUS(moe_route_index(-1, 4, bad, workspace, out[0], out[1], out[2], out[3]), MOE_BAD_SHAPE);
    free(workspace);
}

static int64_t get(int dtype, const void *x, int64_t i) {
    if (dtype == MOE_I16) return ((const int16_t *)x)[i];
    return dtype == MOE_I32 ? ((const int32_t *)x)[i] : ((const int64_t *)x)[i];
}
static void put(int dtype, void *x, int64_t i, int64_t value) {
    if (dtype == MOE_I16) ((int16_t *)x)[i] = (int16_t)value;
    else if (dtype == MOE_I32) ((int32_t *)x)[i] = (int32_t)value;
    else ((int64_t *)x)[i] = value;
}
// n integers: any bits of the dtype if range is 0, else in [-1, range].
static void *integers(int dtype, int64_t n, int64_t range, uint64_t seed) {
    void *x = check_alloc(n * moe_size(dtype));
    for (int64_t i = 0; i < n; i++)
        put(dtype, x, i, range ? check_below(&seed, range + 2) - 1 : (int64_t)check_u64(&seed));
    return x;
}

static void test_sort(void) {
    static const int64_t lengths[] = {0, 1, 2, 33, 3000};
    for (int dtype = MOE_I16; dtype <= MOE_I64; dtype++)
        for (int c = 0; c < 5; c++)
            for (int64_t range = 0; range <= 10; range += 10)
                for (int bits = 0; bits <= (int)(8 * moe_size(dtype)); bits += bits < 16 ? 4 : 16) {
                    int64_t n = lengths[c], size = moe_size(dtype);
                    void *x = integers(dtype, n, range, 7);
                    void *sorted = check_alloc(n * size), *indices = check_alloc(n * size);
                    void *workspace = check_alloc((int64_t)moe_sort_workspace(n));
                    char *seen = calloc((size_t)n + 1, 1);
                    CHECK_OK(moe_sort(dtype, n, bits, x, workspace, sorted, indices));
                    uint64_t mask = bits == 64 ? ~(uint64_t)0 : ((uint64_t)1 << bits) - 1;
                    for (int64_t i = 0; i < n; i++) {
                        int64_t at = get(dtype, indices, i), v = get(dtype, sorted, i);
                        CHECK(at >= 0 && at < n && !seen[at]++ && get(dtype, x, at) == v,
                              "sorted[%d] is x[%d]", (int)i, (int)at);
                        if (i == 0) continue;
                        int64_t u = get(dtype, sorted, i - 1), before = get(dtype, indices, i - 1);
                        bool whole = bits == 8 * size, equal = ((uint64_t)u & mask) == ((uint64_t)v & mask);
                        bool less = whole ? u < v : ((uint64_t)u & mask) < ((uint64_t)v & mask);
                        CHECK(less || (equal && before < at), "%s, %d bits: %lld before %lld", check_dtype[dtype], bits,
                              (long long)u, (long long)v);
                    }
                    free(x); free(sorted); free(indices); free(workspace); free(seen);
                }
    CHECK_STATUS(moe_sort(MOE_F32, 0, 0, NULL, NULL, NULL, NULL), MOE_BAD_DTYPE);
    CHECK_STATUS(moe_sort(MOE_I16, 0, 17, NULL, NULL, NULL, NULL), MOE_BAD_VALUE);
    CHECK_STATUS(moe_sort(MOE_I16, 32769, 16, NULL, NULL, NULL, NULL), MOE_BAD_SHAPE);   // index 32768 is not an int16
}

static void test_histogram_and_cumsum(void) {
    static const int64_t shapes[][2] = {{0, 5}, {1, 0}, {1, 1}, {3, 17}, {7, 5000}};      // rows, n
    for (int dtype = MOE_I16; dtype <= MOE_I64; dtype++)
        for (int c = 0; c < 5; c++)
            for (check_threads = 1; check_threads <= 3; check_threads += 2) {
                int64_t  rows = shapes[c][0], n = shapes[c][1], bins = 20, bytes = rows * n * moe_size(dtype);
                void    *x = integers(dtype, rows * n, 24, 9), *big = integers(dtype, rows * n, 0, 10);
                void    *inclusive = check_alloc(bytes), *exclusive = check_alloc(bytes);
                int32_t *counts = check_alloc(4 * rows * bins);
                CHECK_OK(moe_histogram(dtype, rows, n, bins, x, counts));
                CHECK_OK(moe_cumsum(dtype, rows, n, 0, big, inclusive));
                CHECK_OK(moe_cumsum(dtype, rows, n, 1, big, exclusive));
                for (int64_t r = 0; r < rows; r++) {
                    int32_t want[20] = {0};
                    int64_t sum = 0, wrapped = 0;
                    for (int64_t i = r * n; i < (r + 1) * n; i++) {
                        int64_t v = get(dtype, x, i);
                        if (v >= 0 && v < bins) want[v]++;
                        CHECK(get(dtype, exclusive, i) == wrapped, "exclusive %s [%d]", check_dtype[dtype], (int)i);
                        sum = (int64_t)((uint64_t)sum + (uint64_t)get(dtype, big, i));
                        put(dtype, &wrapped, 0, sum);
                        wrapped = get(dtype, &wrapped, 0);
                        CHECK(get(dtype, inclusive, i) == wrapped, "inclusive %s [%d]", check_dtype[dtype], (int)i);
                    }
                    CHECK(!memcmp(want, counts + r * bins, sizeof want), "%s row %d", check_dtype[dtype], (int)r);
                }
                free(x); free(big); free(inclusive); free(exclusive); free(counts);
            }
    CHECK_STATUS(moe_histogram(MOE_BF16, 1, 0, 0, NULL, NULL), MOE_BAD_DTYPE);
    CHECK_STATUS(moe_cumsum(MOE_I32, -1, 0, 0, NULL, NULL), MOE_BAD_SHAPE);
}

static void test_topology(void) {
    int32_t bins[4] = {256, 256, 384, 768};                             // in blocks of 128: 2 0 1 3
    int16_t got[6 * 3];
    static const int owner[6] = {0, 0, 2, 3, 3, 3};
    memset(got, 0x55, sizeof got);
    CHECK_OK(moe_topology(4, 128, 6, 3, bins, got));
    for (int i = 0; i < 18; i++) CHECK(got[i] == owner[i / 3] * 3 + i % 3, "column %d is %d", i, got[i]);
    CHECK_OK(moe_topology(0, 128, 0, 3, NULL, NULL));
    CHECK_STATUS(moe_topology(4, 128, 7, 3, bins, got), MOE_BAD_BINS);         // the last row has no expert
    CHECK_STATUS(moe_topology(4, 128, 5, 3, bins, got), MOE_BAD_BINS);
    CHECK_STATUS(moe_topology(4, 100, 6, 3, bins, got), MOE_BAD_BINS);         // 256 is no multiple of 100
    CHECK_STATUS(moe_topology(4, 128, 6, 8193, bins, got), MOE_BAD_SHAPE);     // column 4*8193-1 does not fit in int16
}

static void test_replicate(void) {
    static const int32_t bins[5] = {0, 3, 3, 700, 701};
    for (int dtype = MOE_F64; dtype <= MOE_I64; dtype++)
        for (check_threads = 1; check_threads <= 3; check_threads += 2) {
            int64_t rows = 60, nb = 5, n = 705, size = moe_size(dtype);
            bool    is_float = moe_is_float(dtype);
            char   *x = is_float ? check_floats(dtype, rows * nb, 1) : integers(dtype, rows * nb, 0, 1);
            char   *dy = is_float ? check_floats(dtype, rows * n, 2) : integers(dtype, rows * n, 0, 2);
            char   *y = check_alloc(rows * n * size), *dx = check_alloc(rows * nb * size), zero[8] = {0};
            CHECK_OK(moe_replicate(dtype, rows, nb, n, x, bins, y));
            CHECK_OK(moe_replicate_backward(dtype, rows, nb, n, dy, bins, dx));
            for (int64_t r = 0; r < rows; r++)
                for (int64_t b = 0, i = 0; b <= nb; b++) {
                    int64_t  end = b < nb ? bins[b] : n, wrapped = 0;
                    uint64_t sum = 0;
                    double   want = 0, terms = 0;
                    for (int64_t c = i; c < end; c++) {
                        const char *source = b < nb ? x + (r * nb + b) * size : zero;
                        CHECK(!memcmp(y + (r * n + c) * size, source, (size_t)size),
                              "%s y[%d,%d]", check_dtype[dtype], (int)r, (int)c);
                        if (is_float) {
                            want += check_get(dtype, dy, r * n + c);
                            terms += fabs(check_get(dtype, dy, r * n + c));
                        } else sum += (uint64_t)get(dtype, dy, r * n + c);
                    }
                    if (b == nb) break;
                    put(is_float ? MOE_I64 : dtype, &wrapped, 0, (int64_t)sum);
                    const char *name = check_dtype[dtype], *sum_of_b = dx + (r * nb + b) * size;
                    if (is_float) {
                        double eps = (dtype == MOE_F64 ? 0x1p-53 : 0x1p-24) * (double)(end - i);
                        double got = check_get(dtype, sum_of_b, 0);
                        CHECK(fabs(got - want) <= eps * terms + check_eps[dtype] * fabs(want),
                              "%s dx[%d,%d] = %g, want %g", name, (int)r, (int)b, got, want);
                    } else CHECK(!memcmp(sum_of_b, &wrapped, (size_t)size), "%s dx[%d,%d]", name, (int)r, (int)b);
                    i = end;
                }
            free(x); free(dy); free(y); free(dx);
        }
    CHECK_STATUS(moe_replicate(MOE_I32, 1, 5, 700, NULL, bins, NULL), MOE_BAD_BINS);
    CHECK_STATUS(moe_replicate(9, 1, 0, 0, NULL, NULL, NULL), MOE_BAD_DTYPE);
}

static void test_check_bins(void) {
    CHECK_OK(moe_check_bins(3, 5, (int32_t[]){0, 5, 5}));
    CHECK_OK(moe_check_bins(0, 0, NULL));
    CHECK_STATUS(moe_check_bins(3, 4, (int32_t[]){0, 5, 5}), MOE_BAD_BINS);
    CHECK_STATUS(moe_check_bins(3, 9, (int32_t[]){0, 5, 4}), MOE_BAD_BINS);
    CHECK_STATUS(moe_check_bins(1, 9, (int32_t[]){-1}), MOE_BAD_BINS);
}

static void tests(void) {
    test_route_index();
    test_sort();
    test_histogram_and_cumsum();
    test_topology();
    test_replicate();
    test_check_bins();
}
int main(void) { return check_main(tests); }
