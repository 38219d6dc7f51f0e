// index.cu: the twins of csrc/index.c, result for result: which copy goes where, in integers.
//
//   route_index   ids_N in [-1,E) -> counts_E, bins_E, order_N, inverse_N           one stable placement, 3 launches
//   sort          x_n by end_bit bits -> sorted_n, indices_n                        one placement per 8 bits
//   histogram, cumsum, topology, replicate, replicate_backward                      one launch each
//
// A stable placement puts n items behind the items of lower buckets and the earlier items of their own:
//     1. count   cut the items into pieces, a warp each; count_pB[p,b] = items of piece p in bucket b
//     2. scan    count_pB[p,b] becomes the sum over earlier pieces; count_B[b] the sum over all
//     3. place   blocks scan count_B, so next_B[b] = where the next item of b goes; a warp walks its piece in order
// No block waits for another and no atomic decides an order, so there is one answer.
// Time: the items are read twice and written once; the counters, at most as many as the items, are written twice and
// read three times. By count of bytes and latencies, not by measurement, route_index takes on an H100 the time of its
// launches, 10 us, up to N = 256 K, and 30 us at N = 4 M, E = 64. sort moves its keys and indices once per 8 bits.
// Limits: N and n fit in int32; E <= 16384 (a warp's row of counters is in shared memory). Sums of integers wrap.
#include <type_traits>

#include "common.cuh"

// ---- stable placement -----------------------------------------------------------------------------------------------
// What is placed is a job: item = load(i); bucket(item) in [0,B), or -1 for none; count calls check(item, i), place
// calls put(item, i, at) for each item and leave(at) for each position that none has.
enum { BATCH = 8, MAX_PIECES = 2048, MAX_BUCKETS = 16384 };
struct cut {
    int64_t n, B, size, pieces;         // piece p: items p*size .. min(n, (p+1)*size) - 1
    int     warps;                      // per block, each with a row of B counters
    int64_t blocks() const { return ceil_div(pieces, warps); }
    size_t  rows() const { return static_cast<size_t>(warps * B) * sizeof(int32_t); }
};
// A piece holds a batch of items or more, and no fewer than its counters; rows of 32 KB leave room for several blocks.
static cut cut_of(int64_t n, int64_t B) {
    const int64_t pieces = max64(1, min64(MAX_PIECES, n / max64(32 * BATCH, B)));
    const int64_t size = max64(1, round_up(ceil_div(n, pieces), 32));
    const int64_t rows = max64(1, min64(8, 32 * 1024 / (4 * max64(1, B))));
    return {n, B, size, max64(1, ceil_div(n, size)), static_cast<int>(rows)};
}

// The warp moves next_B over the items [begin, end) in order. Counting is placing from zero without putting.
template <bool place, class Job>
static __device__ void walk(const Job &job, int64_t begin, int64_t end, int32_t *next_B) {
    const uint32_t all = 0xffffffffu, before_me = (1u << lane_id()) - 1;
    for (int64_t first = begin; first < end; first += 32 * BATCH) {
        typename Job::item item[BATCH];                     // all loads are under way before the first is used
        for (int u = 0; u < BATCH; u++)
            if (const int64_t i = first + 32 * u + lane_id(); i < end) item[u] = job.load(i);
        for (int u = 0; u < BATCH; u++) {
            const int64_t i = first + 32 * u + lane_id();
            const int b = i < end ? job.bucket(item[u]) : -1;
            const uint32_t peers = __match_any_sync(all, static_cast<uint32_t>(b));
            const int rank = __popc(peers & before_me), at = b < 0 ? -1 : next_B[b] + rank;
            __syncwarp();                                   // all have read
            if (b >= 0 && rank == 0) next_B[b] = at + __popc(peers);
            __syncwarp();                                   // the next step sees it
            if (i >= end) continue;
            if (place) job.put(item[u], i, at);
            else job.check(item[u], i);
        }
    }
}

template <class Job>
__global__ void count_kernel(Job job, cut c, int32_t *count_pB) {
    const int64_t p = static_cast<int64_t>(blockIdx.x) * c.warps + warp_id();
    int32_t *count_B = reinterpret_cast<int32_t *>(shared_memory()) + warp_id() * c.B;
    if (p >= c.pieces) return;
    for (int64_t b = lane_id(); b < c.B; b += 32) count_B[b] = 0;
    __syncwarp();
    walk<false>(job, p * c.size, min64(c.n, (p + 1) * c.size), count_B);
    for (int64_t b = lane_id(); b < c.B; b += 32) count_pB[p * c.B + b] = count_B[b];
}

// A lane owns a bucket, a warp a run of pieces. shared: one int32 per thread.
static __global__ void scan_kernel(cut c, int32_t *count_pB, int32_t *count_B) {
    int32_t *sums = reinterpret_cast<int32_t *>(shared_memory());
    const int warps = static_cast<int>(blockDim.x) / 32;
    const int64_t b = static_cast<int64_t>(blockIdx.x) * 32 + lane_id(), run = ceil_div(c.pieces, warps);
    const int64_t begin = warp_id() * run, end = b < c.B ? min64(c.pieces, begin + run) : begin;
    int32_t sum = 0;
#pragma unroll 8
    for (int64_t p = begin; p < end; p++) sum += count_pB[p * c.B + b];
    sums[threadIdx.x] = sum;
    __syncthreads();
    sum = 0;
    for (int w = 0; w < warp_id(); w++) sum += sums[w * 32 + lane_id()];
    for (int64_t first = begin; first < end; first += BATCH) {
        int32_t count[BATCH];                               // all loads before the first store
        for (int u = 0; u < BATCH; u++) count[u] = first + u < end ? count_pB[(first + u) * c.B + b] : 0;
        for (int u = 0; u < BATCH && first + u < end; u++) {
            count_pB[(first + u) * c.B + b] = sum;
            sum += count[u];
        }
    }
    if (b < c.B && warp_id() == warps - 1) count_B[b] = sum;
}

// bins_B, the inclusive ends of the buckets, may be NULL.
template <class Job>
__global__ void place_kernel(Job job, cut c, const int32_t *before_pB, const int32_t *count_B, int32_t *bins_B) {
    int32_t *scratch = reinterpret_cast<int32_t *>(shared_memory()), *next_wB = scratch + 32;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * c.warps, p = first + warp_id();
    int32_t placed = 0;
    for (int64_t b0 = 0; b0 < c.B; b0 += blockDim.x) {
        const int64_t b = b0 + threadIdx.x;
        const int32_t count = b < c.B ? count_B[b] : 0;
        int32_t total;
        const int32_t begin = placed + block_exclusive_scan(count, scratch, &total);
        placed += total;
        if (b >= c.B) continue;
        for (int w = 0; w < c.warps && first + w < c.pieces; w++)
            next_wB[w * c.B + b] = begin + before_pB[(first + w) * c.B + b];
        if (bins_B && blockIdx.x == 0) bins_B[b] = begin + count;
    }
    __syncthreads();
    if (p < c.pieces) walk<true>(job, p * c.size, min64(c.n, (p + 1) * c.size), next_wB + warp_id() * c.B);
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t at = placed + static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < c.n; at += stride)
        job.leave(at);
}

static size_t placement_workspace(const cut &c) { return static_cast<size_t>(c.pieces * c.B) * sizeof(int32_t); }

template <class Job>
static int place_stably(const Job &job, const cut &c, void *workspace, int32_t *count_B, int32_t *bins_B,
                        cudaStream_t stream) {
    auto *count_pB = static_cast<int32_t *>(workspace);
    const int scanners = 32 * static_cast<int>(min64(32, ceil_div(c.pieces, 16)));
    TRY(launch(count_kernel<Job>, c.blocks(), 32 * c.warps, c.rows(), stream, job, c, count_pB));
    TRY(launch(scan_kernel, ceil_div(c.B, 32), scanners, scanners * sizeof(int32_t), stream, c, count_pB, count_B));
    return launch(place_kernel<Job>, c.blocks(), 32 * c.warps, 32 * sizeof(int32_t) + c.rows(), stream, job, c,
                  count_pB, count_B, bins_B);
}

// ---- the routing index ----------------------------------------------------------------------------------------------
struct route_job {
    int64_t        E;
    const int32_t *ids_N;
    int32_t       *order_N, *inverse_N;
    verdict        bad;

    using item = int32_t;
    __device__ item load(int64_t f) const { return ids_N[f]; }
    __device__ int bucket(item e) const { return e >= 0 && e < E ? e : -1; }
    __device__ void check(item e, int64_t f) const {
        if (e < -1 || e >= E) bad(MOE_BAD_INDEX, f);
    }
    __device__ void put(item, int64_t f, int32_t at) const {
        if (at >= 0) order_N[at] = static_cast<int32_t>(f);
        inverse_N[f] = at;
    }
    __device__ void leave(int64_t at) const { order_N[at] = -1; }
};

static bool route_fits(int64_t N, int64_t E) { return N >= 0 && E >= 0 && N <= INT32_MAX && E <= MAX_BUCKETS; }

size_t moe_route_index_workspace(int64_t N, int64_t E, cudaStream_t) {
    return route_fits(N, E) ? placement_workspace(cut_of(N, E)) : 0;
}

int moe_route_index(int64_t N, int64_t E, const int32_t *ids_N, void *workspace, int32_t *counts_E, int32_t *bins_E,
                    int32_t *order_N, int32_t *inverse_N, cudaStream_t stream) {
    if (!route_fits(N, E)) return MOE_BAD_SHAPE;
    const route_job job = {E, ids_N, order_N, inverse_N, verdict_of(OP_route_index)};
    return place_stably(job, cut_of(N, E), workspace, counts_E, bins_E, stream);
}

// ---- sort: radix, least significant digit first ---------------------------------------------------------------------
// Keys are the low end_bit bits of x with its sign bit flipped: ascending by value at full width, unsigned below it.
enum { DIGIT = 8, RADIX = 1 << DIGIT };

template <class T>
struct digit_job {
    int      shift;
    uint32_t mask;
    const T *keys_n, *indices_n;        // no indices: those of the input itself
    T       *sorted_n, *sorted_indices_n;

    struct item { T key, index; };
    __device__ item load(int64_t i) const { return {keys_n[i], indices_n ? indices_n[i] : static_cast<T>(i)}; }
    __device__ int bucket(item x) const {
        using U = std::make_unsigned_t<T>;
        const U sign = static_cast<U>(U{1} << (8 * sizeof(T) - 1));
        return static_cast<int>(static_cast<uint32_t>(static_cast<U>(static_cast<U>(x.key) ^ sign) >> shift) & mask);
    }
    __device__ void check(item, int64_t) const {}
    __device__ void put(item x, int64_t, int32_t at) const {
        sorted_n[at] = x.key;
        sorted_indices_n[at] = x.index;
    }
    __device__ void leave(int64_t) const {}
};

// The passes go to and fro between the outputs and the workspace; the last writes the outputs.
struct sort_space {
    void    *keys_n, *indices_n, *counters;
    int32_t *count_B;
    size_t   bytes;
    sort_space(int64_t n, void *workspace) {
        const size_t each = static_cast<size_t>(round_up(n * 8, 16));
        char *p = static_cast<char *>(workspace);
        keys_n = p, indices_n = p + each;
        count_B = reinterpret_cast<int32_t *>(p + 2 * each), counters = count_B + RADIX;
        bytes = 2 * each + RADIX * sizeof(int32_t) + placement_workspace(cut_of(n, RADIX));
    }
};

template <class T>
static int sort(int64_t n, int end_bit, const T *x_n, const sort_space &space, T *sorted_n, T *indices_n,
                cudaStream_t stream) {
    T *const keys[] = {sorted_n, static_cast<T *>(space.keys_n)};
    T *const indices[] = {indices_n, static_cast<T *>(space.indices_n)};
    int left = static_cast<int>(max64(1, ceil_div(end_bit, DIGIT)));        // no bits: one pass that moves nothing
    const T *from = x_n, *from_indices = nullptr;
    for (int shift = 0; left--; shift += DIGIT) {
        const int64_t B = INT64_C(1) << min64(DIGIT, end_bit - shift);
        const digit_job<T> job = {shift, static_cast<uint32_t>(B - 1), from, from_indices, keys[left & 1],
                                  indices[left & 1]};
        TRY(place_stably(job, cut_of(n, B), space.counters, space.count_B, nullptr, stream));
        from = job.sorted_n, from_indices = job.sorted_indices_n;
    }
    return MOE_OK;
}

size_t moe_sort_workspace(int64_t n, cudaStream_t) {
    return n >= 0 && n <= INT32_MAX ? sort_space(n, nullptr).bytes : 0;
}

int moe_sort(int dtype, int64_t n, int end_bit, const void *x_n, void *workspace, void *sorted_n, void *indices_n,
             cudaStream_t stream) {
    return by_int(dtype, [&]<class T>(T) -> int {
        const int bits = 8 * sizeof(T);
        if (n < 0 || n > INT32_MAX || (bits < 32 && n > INT64_C(1) << (bits - 1))) return MOE_BAD_SHAPE;
        if (end_bit < 0 || end_bit > bits) return MOE_BAD_VALUE;
        return sort(n, end_bit, static_cast<const T *>(x_n), sort_space(n, workspace), static_cast<T *>(sorted_n),
                    static_cast<T *>(indices_n), stream);
    });
}

// ---- histogram ------------------------------------------------------------------------------------------------------
// A block counts one chunk of a row in shared memory and adds its counts to the row's; too many bins for that are
// counted in place.
enum { CHUNK = 8192, MAX_SHARED_BINS = 8192 };

template <class T>
__global__ void histogram_kernel(int64_t rows, int64_t n, int64_t bins, const T *x_rn, int32_t *counts_rb) {
    const bool in_shared = bins <= MAX_SHARED_BINS;
    const int64_t chunks = ceil_div(n, CHUNK);
    for (int64_t i = blockIdx.x; i < rows * chunks; i += gridDim.x) {
        const int64_t r = i / chunks, begin = i % chunks * CHUNK, end = min64(n, begin + CHUNK);
        int32_t *row_b = counts_rb + r * bins;
        int32_t *count_b = in_shared ? reinterpret_cast<int32_t *>(shared_memory()) : row_b;
        if (in_shared)
            for (int64_t b = threadIdx.x; b < bins; b += blockDim.x) count_b[b] = 0;
        __syncthreads();
        for (int64_t j = begin + threadIdx.x; j < end; j += blockDim.x) {
            const int64_t value = x_rn[r * n + j];
            if (value >= 0 && value < bins) atomicAdd(count_b + value, 1);
        }
        __syncthreads();
        if (in_shared)
            for (int64_t b = threadIdx.x; b < bins; b += blockDim.x)
                if (count_b[b]) atomicAdd(row_b + b, count_b[b]);
    }
}

int moe_histogram(int dtype, int64_t rows, int64_t n, int64_t bins, const void *x_rn, int32_t *counts_rb,
                  cudaStream_t stream) {
    return by_int(dtype, [&]<class T>(T) -> int {
        if (rows < 0 || n < 0 || bins < 0 || n > INT32_MAX) return MOE_BAD_SHAPE;
        if (rows == 0 || bins == 0) return MOE_OK;
        TRY(cuda_status(cudaMemsetAsync(counts_rb, 0, static_cast<size_t>(rows * bins) * sizeof(int32_t), stream),
                        "clearing the counts"));
        const size_t shared = bins <= MAX_SHARED_BINS ? static_cast<size_t>(bins) * sizeof(int32_t) : 0;
        return launch(histogram_kernel<T>, strided_grid(rows * ceil_div(n, CHUNK), 1), 256, shared, stream, rows, n,
                      bins, static_cast<const T *>(x_rn), counts_rb);
    });
}

// ---- cumsum ---------------------------------------------------------------------------------------------------------
// Integers are summed in a type that wraps and that shuffles take.
template <class T>
using wrapping = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

// A block goes along a row, four neighbours a thread, and carries the sum.
template <class T>
__global__ void cumsum_kernel(int64_t rows, int64_t n, bool exclusive, const T *x_rn, T *y_rn) {
    using U = wrapping<T>;
    U *scratch = reinterpret_cast<U *>(shared_memory());
    for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
        const T *x_n = x_rn + r * n;
        U carry = 0;
        for (int64_t first = 0; first < n; first += 4 * static_cast<int64_t>(blockDim.x)) {
            const int64_t i = first + 4 * static_cast<int64_t>(threadIdx.x);
            U x[4], sum = 0, total;
            for (int u = 0; u < 4; u++) sum += x[u] = i + u < n ? static_cast<U>(x_n[i + u]) : 0;
            U before = carry + block_exclusive_scan(sum, scratch, &total);
            for (int u = 0; u < 4 && i + u < n; u++) {
                const U after = before + x[u];
                y_rn[r * n + i + u] = static_cast<T>(exclusive ? before : after);
                before = after;
            }
            carry += total;
        }
    }
}

int moe_cumsum(int dtype, int64_t rows, int64_t n, int exclusive, const void *x_rn, void *y_rn, cudaStream_t stream) {
    return by_int(dtype, [&]<class T>(T) -> int {
        if (rows < 0 || n < 0) return MOE_BAD_SHAPE;
        if (n == 0) return MOE_OK;
        const int threads = static_cast<int>(min64(1024, round_up(ceil_div(n, 4), 32)));
        return launch(cumsum_kernel<T>, strided_grid(rows, 1), threads, 32 * sizeof(wrapping<T>), stream, rows, n,
                      exclusive != 0, static_cast<const T *>(x_rn), static_cast<T *>(y_rn));
    });
}

// ---- bins -----------------------------------------------------------------------------------------------------------
// The first b with at < bins_b[b], or nb; bins that decrease give some b in [0, nb].
static __device__ int64_t bin_of(int64_t nb, const int32_t *bins_b, int64_t at) {
    int64_t low = 0, high = nb;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (at < bins_b[middle]) high = middle;
        else low = middle + 1;
    }
    return low;
}

// The grid looks at every bin: non-decreasing multiples of `block` from 0 to at most `limit`.
static __device__ void check_bins(int64_t nb, int64_t block, int64_t limit, const int32_t *bins_b, verdict bad) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t b = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; b < nb; b += stride) {
        const int32_t end = bins_b[b];
        if (end < (b ? bins_b[b - 1] : 0) || end > limit || end % block) bad(MOE_BAD_BINS, b);
    }
}

// ---- topology of a block-sparse [rows, E*cols] matrix ---------------------------------------------------------------
// Block row r of expert e holds columns e*cols .. e*cols + cols-1. A warp writes a row.
static __global__ void topology_kernel(int64_t E, int64_t block, int64_t rows, int64_t cols, const int32_t *bins_E,
                                       int16_t *columns_rc, verdict bad) {
    check_bins(E, block, rows * block, bins_E, bad);
    const int64_t warps = blockDim.x / 32, stride = gridDim.x * warps;
    for (int64_t r = blockIdx.x * warps + warp_id(); r < rows; r += stride) {
        const int64_t e = bin_of(E, bins_E, r * block);
        if (e == E) {
            if (lane_id() == 0) bad(MOE_BAD_BINS, E);                               // every row has an expert
            continue;
        }
        for (int64_t c = lane_id(); c < cols; c += 32) columns_rc[r * cols + c] = static_cast<int16_t>(e * cols + c);
    }
}

int moe_topology(int64_t E, int64_t block, int64_t rows, int64_t cols, const int32_t *padded_bins_E,
                 int16_t *columns_rc, cudaStream_t stream) {
    if (E < 0 || block < 1 || rows < 0 || cols < 0 || rows > INT32_MAX / block) return MOE_BAD_SHAPE;
    if (cols > 0 && E > (INT16_MAX + 1) / cols) return MOE_BAD_SHAPE;               // columns are int16
    return launch(topology_kernel, strided_grid(max64(1, rows), 8), 256, 0, stream, E, block, rows, cols,
                  padded_bins_E, columns_rc, verdict_of(OP_topology));
}

// ---- replicate: y[r, bins[i-1]..bins[i]) = x[r,i] -------------------------------------------------------------------
// Bits: unsigned integers of x's size.
template <class Bits>
__global__ void replicate_kernel(int64_t rows, int64_t nb, int64_t n, const Bits *x_rb, const int32_t *bins_b,
                                 Bits *y_rn, verdict bad) {
    check_bins(nb, 1, n, bins_b, bad);
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * n; i += stride) {
        const int64_t r = i / n, b = bin_of(nb, bins_b, i % n);
        y_rn[i] = b < nb ? x_rb[r * nb + b] : Bits{0};
    }
}

int moe_replicate(int dtype, int64_t rows, int64_t nb, int64_t n, const void *x_rb, const int32_t *bins_b, void *y_rn,
                  cudaStream_t stream) {
    if (dtype <= MOE_F64 || dtype > MOE_I64) return MOE_BAD_DTYPE;
    if (rows < 0 || nb < 0 || n < 0) return MOE_BAD_SHAPE;
    const auto run = [&]<class Bits>(Bits) {
        return launch(replicate_kernel<Bits>, strided_grid(max64(1, rows * n), 256), 256, 0, stream, rows, nb, n,
                      static_cast<const Bits *>(x_rb), bins_b, static_cast<Bits *>(y_rn), verdict_of(OP_replicate));
    };
    switch (moe_size(dtype)) {
    case 2:  return run(uint16_t{});
    case 4:  return run(uint32_t{});
    default: return run(uint64_t{});
    }
}

// dx[r,i] = sum of dy[r, bins[i-1]..bins[i]). A block sums a segment: each thread its stride in order, then one tree.
template <class T>
static __device__ inline auto widen(T x) {
    if constexpr (std::is_integral_v<T>) return static_cast<wrapping<T>>(x);
    else return to_float(x);
}
template <class T, class Sum>
static __device__ inline T narrow(Sum sum) {
    if constexpr (std::is_integral_v<T>) return static_cast<T>(sum);
    else return from_float<T>(sum);
}

template <class T>
__global__ void replicate_backward_kernel(int64_t rows, int64_t nb, int64_t n, const T *dy_rn, const int32_t *bins_b,
                                          T *dx_rb, verdict bad) {
    using Sum = decltype(widen(T{}));
    Sum *scratch = reinterpret_cast<Sum *>(shared_memory());
    check_bins(nb, 1, n, bins_b, bad);
    for (int64_t i = blockIdx.x; i < rows * nb; i += gridDim.x) {
        const int64_t r = i / nb, b = i % nb;
        const int64_t begin = b ? max64(0, bins_b[b - 1]) : 0, end = min64(n, bins_b[b]);
        Sum sum = 0;
        for (int64_t j = begin + threadIdx.x; j < end; j += blockDim.x) sum += widen(dy_rn[r * n + j]);
        sum = block_sum(sum, scratch);
        if (threadIdx.x == 0) dx_rb[i] = narrow<T>(sum);
    }
}

// A thread per element of the average segment, whole warps.
static int segment_threads(int64_t nb, int64_t n) {
    return static_cast<int>(min64(256, round_up(max64(1, n / max64(1, nb)), 32)));
}

int moe_replicate_backward(int dtype, int64_t rows, int64_t nb, int64_t n, const void *dy_rn, const int32_t *bins_b,
                           void *dx_rb, cudaStream_t stream) {
    const auto run = [&]<class T>(T) -> int {
        if (rows < 0 || nb < 0 || n < 0) return MOE_BAD_SHAPE;
        return launch(replicate_backward_kernel<T>, strided_grid(max64(1, rows * nb), 1), segment_threads(nb, n),
                      32 * sizeof(uint64_t), stream, rows, nb, n, static_cast<const T *>(dy_rn), bins_b,
                      static_cast<T *>(dx_rb), verdict_of(OP_replicate_backward));
    };
    const int status = by_int(dtype, run);
    return status == MOE_BAD_DTYPE ? by_float(dtype, run) : status;
}
