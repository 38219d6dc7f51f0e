// permute.cu: the twins of csrc/permute.c: token rows <-> expert rows, in the three layouts of moe_layout.
//
//   gather            y_PD[row(p)] = w[order[p]] * x_TD[order[p] / K]        rows that nobody has are zeros
//   scatter           y_TD[t] = sum over slots of w[t*K+k] * x_PD[row]      a copy without a row adds nothing
//   scatter_dweights  dw[t*K+k] = <x_PD[row], dy_TD[t]>                     0 for a copy without a row
// The backward of gather is scatter without weights; that of scatter is gather of dy with weights, and dweights.
//
// gather and scatter have the bits of the C core: without weights a row is moved as bytes; a sum runs in slot order,
// fused, in float, and is rounded once. A dot product is summed by one warp, in an order that D alone decides. Rows
// move in packs of 16 bytes, or of the largest 8, 4 or 2 that divides the rows and their addresses.
// Bins that decrease, leave the rows or do not hold their copies: MOE_BAD_BINS at the expert. An entry of order_N that
// is no flat id: MOE_BAD_INDEX at its position, and nobody's row (gather does not read those that capacity drops).
// Limits: N fits in int32, K <= MOE_MAX_EXPERTS.
#include <type_traits>

#include "common.cuh"

enum { THREADS = 256, IN_FLIGHT = 4, TILE = THREADS * IN_FLIGHT, SLOTS = 8, ORIGINS = 512 };

// `width` bytes that move at once. They stay words, and are elements only inside arithmetic.
template <int width>
struct alignas(width) pack {
    using word = std::conditional_t<width == 2, uint16_t, uint32_t>;
    word words[width / sizeof(word)];
};
template <class T, int width>
static __device__ float get(const pack<width> &p, int i) {
    if constexpr (sizeof(T) == 4) return bits_float(p.words[i]);
    else if constexpr (width == 2) return to_float(T{p.words[0]});
    else return to_float(T{static_cast<uint16_t>(p.words[i / 2] >> i % 2 * 16)});
}
template <class T, int width>
static __device__ void put(pack<width> &p, int i, float value) {
    const T x = from_float<T>(value);
    if constexpr (sizeof(T) == 4) p.words[i] = __float_as_uint(x);
    else if constexpr (width == 2) p.words[0] = x.bits;
    else {
        const int shift = i % 2 * 16;
        p.words[i / 2] = (p.words[i / 2] & ~(0xffffu << shift)) | static_cast<uint32_t>(x.bits) << shift;
    }
}
static int pack_width(int64_t row_bytes, const void *x, const void *y) {
    const uint64_t all = static_cast<uint64_t>(row_bytes) | reinterpret_cast<uintptr_t>(x) |
                         reinterpret_cast<uintptr_t>(y) | 16;
    return static_cast<int>(all & -all);
}
// f(the width as a constant); a pack holds at least one T.
template <class T, class F>
static int by_width(int width, F f) {
    switch (width) {
    case 16: return f(std::integral_constant<int, 16>{});
    case 8:  return f(std::integral_constant<int, 8>{});
    case 4:  return f(std::integral_constant<int, 4>{});
    default: return f(std::integral_constant<int, sizeof(T)>{});
    }
}

// One weight per flat id, in float or in T.
struct weights {
    const void *p;
    bool        wide;
    template <class T>
    __device__ float at(int64_t f) const {
        return wide ? static_cast<const float *>(p)[f] : to_float(static_cast<const T *>(p)[f]);
    }
};

// ---- the layouts ----------------------------------------------------------------------------------------------------
// Expert e owns a region of the expert rows, filled from its start with as many of its copies as fit.
static __device__ int64_t first_copy(const moe_layout &l, int64_t e) { return e ? l.bins_E[e - 1] : 0; }
static __device__ int64_t region_end(const moe_layout &l, int64_t e) {
    return l.capacity ? (e + 1) * l.capacity : l.out_bins_E ? l.out_bins_E[e] : l.bins_E[e];
}
static __device__ int64_t region_begin(const moe_layout &l, int64_t e) { return e ? region_end(l, e - 1) : 0; }
static __device__ int64_t copies_kept(const moe_layout &l, int64_t e) {
    return min64(l.bins_E[e] - first_copy(l, e), region_end(l, e) - region_begin(l, e));
}
static __device__ bool is_flat_id(const moe_layout &l, int64_t p, verdict bad) {
    const bool is = l.order_N[p] >= 0 && l.order_N[p] < l.N;
    if (!is) bad(MOE_BAD_INDEX, p);
    return is;
}
// The flat id of the copy in an expert row; -1 if the row has none.
static __device__ int copy_at(const moe_layout &l, int64_t row, verdict bad) {
    const int64_t e = expert_at(l.E, row, [&](int64_t e) { return region_end(l, e); });
    if (e == l.E) return -1;
    const int64_t i = row - region_begin(l, e), p = first_copy(l, e) + i;
    if (i < 0 || i >= copies_kept(l, e) || p < 0 || p >= l.N) return -1;
    return is_flat_id(l, p, bad) ? l.order_N[p] : -1;
}
// The expert row of the copy at sorted position p; -1 if it has none.
static __device__ int64_t row_of(const moe_layout &l, int64_t p) {
    const int64_t e = expert_at(l.E, p, [&](int64_t e) { return l.bins_E[e]; });
    if (e == l.E) return -1;
    const int64_t i = p - first_copy(l, e), row = region_begin(l, e) + i;
    return i >= 0 && i < copies_kept(l, e) && row >= 0 && row < l.P ? row : -1;
}
// By one block. Padding never drops.
static __device__ void check_bins(const moe_layout &l, verdict bad) {
    for (int64_t e = threadIdx.x; e < l.E; e += blockDim.x) {
        const int64_t begin = first_copy(l, e), end = l.bins_E[e];
        const bool    fits = begin >= 0 && begin <= end && end <= l.N;
        const bool    in_rows = l.capacity || (region_begin(l, e) <= region_end(l, e) && region_end(l, e) <= l.P);
        if (!fits || !in_rows || (l.out_bins_E && copies_kept(l, e) != end - begin)) bad(MOE_BAD_BINS, e);
    }
}

// The door of all three functions; `weighs` if wdtype counts.
static bool overflows(int64_t rows, int64_t D) { return D > 0 && rows > INT64_MAX / 8 / D; }
static int check(int dtype, int wdtype, bool weighs, int64_t D, const moe_layout *l) {
    if (!is_float(dtype)) return MOE_BAD_DTYPE;
    if (weighs && wdtype != MOE_F32 && wdtype != dtype) return MOE_BAD_DTYPE;
    if (D < 0 || l->N < 0 || l->K < 1 || l->E < 0 || l->P < 0 || l->capacity < 0) return MOE_BAD_SHAPE;
    if (l->K > MOE_MAX_EXPERTS || l->N % l->K || l->N > INT32_MAX) return MOE_BAD_SHAPE;
    if (overflows(l->N, D) || overflows(l->P, D)) return MOE_BAD_SHAPE;
    if (l->capacity && (l->out_bins_E || l->E > l->P / l->capacity || l->E * l->capacity != l->P)) return MOE_BAD_SHAPE;
    return MOE_OK;
}

// ---- tiles ----------------------------------------------------------------------------------------------------------
// A block moves `rows` whole rows, or one piece of a row that is wider than a tile: about TILE packs either way.
struct tiling {
    int64_t packs;                              // of a row
    int     across, chunk, rows;                // pieces of a row, packs of a piece, rows of a block
};
static tiling tiling_of(int64_t packs) {
    const int64_t across = ceil_div(packs, TILE), chunk = ceil_div(packs, across);
    return {packs, static_cast<int>(across), static_cast<int>(chunk),
            static_cast<int>(min64(TILE / chunk, THREADS))};
}
static int64_t tiles(const tiling &g, int64_t rows) { return ceil_div(rows, g.rows) * g.across; }

struct tile {
    int64_t row, at;                            // first row, and first pack of a row
    int     rows, width;
};
static __device__ tile own_tile(const tiling &g, int64_t rows) {
    const int     piece = static_cast<int>(blockIdx.x) % g.across;
    const int64_t row = static_cast<int64_t>(static_cast<int>(blockIdx.x) / g.across) * g.rows;
    const int64_t at = static_cast<int64_t>(piece) * g.chunk;
    return {row, at, static_cast<int>(min64(g.rows, rows - row)), static_cast<int>(min64(g.chunk, g.packs - at))};
}

// ---- gather ---------------------------------------------------------------------------------------------------------
// First one thread per row finds where the row comes from, then all of them copy. T is void if there are no weights.
template <class T, int width>
__global__ void __launch_bounds__(THREADS)
gather_kernel(moe_layout l, tiling g, weights w, const pack<width> *__restrict__ x, pack<width> *__restrict__ y,
              verdict bad) {
    constexpr bool weighted = !std::is_void_v<T>;
    const tile mine = own_tile(g, l.P);
    auto *const from = reinterpret_cast<int64_t *>(shared_memory());        // pack of x, -1: a row of zeros
    auto *const weight = reinterpret_cast<float *>(from + g.rows);
    if (blockIdx.x == 0) check_bins(l, bad);
    for (int r = threadIdx.x; r < mine.rows; r += THREADS) {
        const int f = copy_at(l, mine.row + r, bad);
        from[r] = f < 0 ? -1 : f / static_cast<int>(l.K) * g.packs + mine.at;
        if constexpr (weighted) weight[r] = f < 0 ? 0 : w.at<T>(f);
    }
    __syncthreads();
    y += mine.row * g.packs + mine.at;
    const int n = mine.rows * mine.width;
    for (int first = threadIdx.x; first < n; first += TILE) {
        pack<width> v[IN_FLIGHT];
#pragma unroll
        for (int u = 0; u < IN_FLIGHT; u++) {
            const int i = first + u * THREADS;
            v[u] = {};
            if (i < n && from[i / mine.width] >= 0) v[u] = x[from[i / mine.width] + i % mine.width];
        }
#pragma unroll
        for (int u = 0; u < IN_FLIGHT; u++) {
            const int i = first + u * THREADS;
            if (i >= n) break;
            if constexpr (weighted)
                for (int c = 0; c < width / static_cast<int>(sizeof(T)); c++)
                    put<T>(v[u], c, weight[i / mine.width] * get<T>(v[u], c));
            y[i / mine.width * g.packs + i % mine.width] = v[u];
        }
    }
}

template <class T>
static int gather_rows(int64_t row_bytes, const moe_layout &l, weights w, const void *x, void *y,
                       cudaStream_t stream) {
    return by_width<std::conditional_t<std::is_void_v<T>, uint16_t, T>>(
        pack_width(row_bytes, x, y), [&]<int width>(std::integral_constant<int, width>) {
            const tiling g = tiling_of(row_bytes / width);
            return launch(gather_kernel<T, width>, tiles(g, l.P), THREADS,
                          static_cast<size_t>(g.rows) * (sizeof(int64_t) + sizeof(float)), stream, l, g, w,
                          static_cast<const pack<width> *>(x), static_cast<pack<width> *>(y), verdict_of(OP_gather));
        });
}

int moe_gather(int dtype, int wdtype, int64_t D, const moe_layout *layout, const void *x_TD, const void *weights_N,
               void *y_PD, cudaStream_t stream) {
    TRY(check(dtype, wdtype, weights_N, D, layout));
    if (D == 0) return MOE_OK;
    const int64_t row_bytes = D * moe_size(dtype);
    const weights w = {weights_N, wdtype == MOE_F32};
    if (!weights_N) return gather_rows<void>(row_bytes, *layout, w, x_TD, y_PD, stream);
    return by_float(dtype, [&]<class T>(T) { return gather_rows<T>(row_bytes, *layout, w, x_TD, y_PD, stream); });
}

// ---- scatter --------------------------------------------------------------------------------------------------------
// Of one copy: where its row begins, -1 if it has none, and its weight.
struct alignas(16) origin {
    int64_t at;
    float   weight;
};
// origin_N[f] for the copies that have a row, rows being `stride` apart; the caller has filled all with bytes of 255.
template <class W>
__global__ void invert_kernel(moe_layout l, int64_t stride, const W *__restrict__ weights_N, origin *origin_N,
                              verdict bad) {
    if (blockIdx.x == 0) check_bins(l, bad);
    const int64_t p = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (p >= l.N || p >= first_copy(l, l.E) || !is_flat_id(l, p, bad)) return;
    const int64_t row = row_of(l, p), f = l.order_N[p];
    if (row >= 0) origin_N[f] = {row * stride, weights_N ? to_float(weights_N[f]) : 1};
}

static int invert(const moe_layout &l, int64_t stride, int wdtype, const void *weights_N, origin *origin_N,
                  verdict bad, cudaStream_t stream) {
    const size_t bytes = static_cast<size_t>(l.N) * sizeof *origin_N;
    TRY(cuda_status(cudaMemsetAsync(origin_N, 0xff, bytes, stream), "clearing rows"));
    return by_float(wdtype, [&]<class W>(W) {
        return launch(invert_kernel<W>, ceil_div(l.N, THREADS), THREADS, 0, stream, l, stride,
                      static_cast<const W *>(weights_N), origin_N, bad);
    });
}

// First the origins of the tile's tokens, then a pack of a token per thread: `slots` loads are under way before the
// first is added. Blocks that a multiprocessor has registers for: 80 a thread for eight packs of 16 bytes, else 48.
template <class T, int width, int slots>
__global__ void __launch_bounds__(THREADS, slots == SLOTS ? 3 : 5)
scatter_kernel(int64_t tokens, int K, tiling g, bool weighted, const origin *__restrict__ origin_N,
               const pack<width> *__restrict__ x, pack<width> *__restrict__ y) {
    constexpr int elements = width / static_cast<int>(sizeof(T));
    const tile mine = own_tile(g, tokens);
    auto *const origins = reinterpret_cast<origin *>(shared_memory());
    for (int i = threadIdx.x; i < mine.rows * K; i += THREADS) origins[i] = origin_N[mine.row * K + i];
    __syncthreads();
    y += mine.row * g.packs + mine.at;
    for (int i = threadIdx.x; i < mine.rows * mine.width; i += THREADS) {
        const int r = i / mine.width, j = i % mine.width;
        const origin *const from = origins + r * K;
        const pack<width> *const x_j = x + mine.at + j;
        pack<width> y_t = {};
        float       sum[elements] = {};
        int         present = 0, k = 0;
        do {
            int64_t     at[slots];
            pack<width> v[slots];
#pragma unroll
            for (int u = 0; u < slots; u++) at[u] = k + u < K ? from[k + u].at : -1;
#pragma unroll
            for (int u = 0; u < slots; u++)
                if (at[u] >= 0) v[u] = x_j[at[u]];
#pragma unroll
            for (int u = 0; u < slots; u++)
                if (at[u] >= 0) {
                    const float weight = from[k + u].weight;
                    for (int c = 0; c < elements; c++) sum[c] = fmaf(weight, get<T>(v[u], c), sum[c]);
                    y_t = v[u];
                    present++;
                }
        } while ((k += slots) < K);
        if (present != 1 || weighted)           // else bytes
            for (int c = 0; c < elements; c++) put<T>(y_t, c, sum[c]);
        y[r * g.packs + j] = y_t;
    }
}

size_t moe_scatter_workspace(const moe_layout *layout, cudaStream_t) {
    return static_cast<size_t>(layout->N) * sizeof(origin);
}

int moe_scatter(int dtype, int wdtype, int64_t D, const moe_layout *layout, const void *x_PD, const void *weights_N,
                void *workspace, void *y_TD, cudaStream_t stream) {
    TRY(check(dtype, wdtype, weights_N, D, layout));
    const int64_t tokens = layout->N / layout->K, row_bytes = D * moe_size(dtype);
    if (tokens == 0 || D == 0) return MOE_OK;
    auto *const origin_N = static_cast<origin *>(workspace);
    return by_float(dtype, [&]<class T>(T) {
        return by_width<T>(pack_width(row_bytes, x_PD, y_TD), [&]<int width>(std::integral_constant<int, width>) {
            tiling g = tiling_of(row_bytes / width);
            g.rows = static_cast<int>(min64(g.rows, max64(1, ORIGINS / layout->K)));     // at hand for a block
            const size_t shared = static_cast<size_t>(g.rows) * layout->K * sizeof(origin);
            TRY(invert(*layout, g.packs, weights_N ? wdtype : MOE_F32, weights_N, origin_N, verdict_of(OP_scatter),
                       stream));
            // One or two copies leave eight slots empty: with two of them there are registers for more threads.
            auto kernel = scatter_kernel<T, width, width == 16 ? SLOTS : IN_FLIGHT>;
            if constexpr (width == 16)
                if (layout->K <= 2) kernel = scatter_kernel<T, width, 2>;
            return launch(kernel, tiles(g, tokens), THREADS, shared, stream, tokens, layout->K, g, weights_N != nullptr,
                          origin_N, static_cast<const pack<width> *>(x_PD), static_cast<pack<width> *>(y_TD));
        });
    });
}

// y[t] += w[f] * x[row(f)]  gives  dw[f] = <x[row(f)], dy[t]>
// A warp per copy. Lane l takes the groups l, l + 32, .. of 16 bytes, whether they can be loaded at once or not.
template <class T, bool whole>
static __device__ pack<16> group_at(const T *row_D, int64_t group, int64_t D) {
    constexpr int n = 16 / sizeof(T);
    if constexpr (whole) return reinterpret_cast<const pack<16> *>(row_D)[group];
    pack<16> v = {};
    for (int c = 0; c < n && group * n + c < D; c++) put<T>(v, c, to_float(row_D[group * n + c]));
    return v;
}

template <class T, bool whole>
__global__ void __launch_bounds__(THREADS)
dweights_kernel(int64_t N, int K, int64_t D, const origin *__restrict__ origin_N, const T *__restrict__ x_PD,
                const T *__restrict__ dy_TD, bool wide, void *__restrict__ dweights_N) {
    constexpr int n = 16 / sizeof(T);
    const int64_t f = static_cast<int64_t>(blockIdx.x) * (THREADS / 32) + warp_id();
    if (f >= N) return;
    const int64_t at = origin_N[f].at, groups = at < 0 ? 0 : ceil_div(D, n);
    const T *const x_D = x_PD + at, *const dy_D = dy_TD + static_cast<int>(f) / K * D;
    float dot = 0;
    for (int64_t first = lane_id(); first < groups; first += 32 * IN_FLIGHT) {
        pack<16> x[IN_FLIGHT] = {}, dy[IN_FLIGHT] = {};
#pragma unroll
        for (int u = 0; u < IN_FLIGHT; u++)
            if (first + 32 * u < groups) {
                x[u] = group_at<T, whole>(x_D, first + 32 * u, D);
                dy[u] = group_at<T, whole>(dy_D, first + 32 * u, D);
            }
#pragma unroll
        for (int u = 0; u < IN_FLIGHT; u++)
            for (int c = 0; c < n; c++) dot = fmaf(get<T>(x[u], c), get<T>(dy[u], c), dot);
    }
    dot = warp_sum(dot);
    if (lane_id() != 0) return;
    if (wide) static_cast<float *>(dweights_N)[f] = dot;
    else static_cast<T *>(dweights_N)[f] = from_float<T>(dot);
}

size_t moe_scatter_dweights_workspace(const moe_layout *layout, cudaStream_t stream) {
    return moe_scatter_workspace(layout, stream);
}

int moe_scatter_dweights(int dtype, int wdtype, int64_t D, const moe_layout *layout, const void *x_PD,
                         const void *dy_TD, void *workspace, void *dweights_N, cudaStream_t stream) {
    TRY(check(dtype, wdtype, true, D, layout));
    const int64_t N = layout->N;
    if (N == 0) return MOE_OK;
    auto *const origin_N = static_cast<origin *>(workspace);
    TRY(invert(*layout, D, MOE_F32, nullptr, origin_N, verdict_of(OP_scatter_dweights), stream));
    return by_float(dtype, [&]<class T>(T) {
        const bool whole = pack_width(D * moe_size(dtype), x_PD, dy_TD) == 16;
        return launch(whole ? dweights_kernel<T, true> : dweights_kernel<T, false>, ceil_div(N, THREADS / 32), THREADS,
                      0, stream, N, layout->K, D, origin_N, static_cast<const T *>(x_PD),
                      static_cast<const T *>(dy_TD), wdtype == MOE_F32, dweights_N);
    });
}
