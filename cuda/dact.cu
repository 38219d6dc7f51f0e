// dact.cu: the pass of dact.cuh over a dA' in memory, at the speed of memory: it moves N x F elements four times for a
// plain activation, six times for a gated one. Where biases have gradients it adds up slabs (expert_sums.cuh) of dh, in
// float, before dh is rounded: to add what is stored would take 16 more conversions for eight columns.
//
// dA' comes rounded to T, where the epilogue has it in float. Against a double-precision reference that leaves dh and
// ds with .64 to .74 of the root mean square error of plain torch, which rounds dA' too, and the epilogue with .42 to
// .52.
#include "sm90.cuh"

// Eight elements that stay words until they are needed, so that four registers hold them.
using words = vec16<uint32_t>;
template <class T>
static __device__ __forceinline__ words load_words(const T *from) {
    return *reinterpret_cast<const words *>(from);
}
template <class T>
static __device__ __forceinline__ void widen(const words &from, float (&x)[8]) {
    for (int v = 0; v < 8; v++) x[v] = to_float(T{static_cast<uint16_t>(from.v[v / 2] >> v % 2 * 16)});
}

// A block has SUM_COLUMNS columns, a lane eight of them, of a slab, or without sums of IN_FLIGHT rows for each warp: so
// many are on their way before the first is needed. ds is summed over lanes as a tree.
template <bool sums, class T>
__global__ void __launch_bounds__(THREADS, 2)
dact_kernel(dact_rows<T> d, slabs cut, const T *da_NF, float *ds_NP, float *parts_SC, int64_t row_C) {
    constexpr int each = IN_FLIGHT * WARPS;
    const int     pieces = static_cast<int>(ceil_div(d.F, SUM_COLUMNS)), piece = static_cast<int>(blockIdx.x) % pieces;
    const int64_t block = static_cast<int>(blockIdx.x) / pieces, j = piece * SUM_COLUMNS + lane_id() * 8;
    const stretch p = sums ? cut.positions(block) : stretch{block * each, min64(cut.N, (block + 1) * each)};
    if (p.begin >= p.end) return;

    const int     n = rows_of_warp(p);
    const int64_t first = p.begin + warp_id();
    const float   weight = lane_id() < n ? d.weight(first + lane_id() * WARPS) : 0;    // lane i: of the i-th row
    float         sum[2][8] = {};
    for (int i = 0; i < n; i += IN_FLIGHT) {
        float s[IN_FLIGHT], ds[IN_FLIGHT] = {};
#pragma unroll
        for (int u = 0; u < IN_FLIGHT; u++) s[u] = __shfl_sync(0xffffffffu, weight, i + u);
        if (j < d.F) {
            words da[IN_FLIGHT], gate[IN_FLIGHT], up[IN_FLIGHT];
#pragma unroll
            for (int u = 0; u < IN_FLIGHT; u++) {
                const int64_t at = first + (i + u) * WARPS;
                if (i + u >= n) continue;
                da[u] = da_NF ? load_words(da_NF + at * d.row_F + j) : words{};
                gate[u] = load_words(d.h(at, j));
                up[u] = d.gated ? load_words(d.h(at, j) + d.F) : words{};
            }
#pragma unroll
            for (int u = 0; u < IN_FLIGHT; u++) {
                if (i + u >= n) continue;
                float x[8], g[8];
                widen<T>(da[u], x);
                widen<T>(gate[u], g);
                ds[u] = d.store(first + (i + u) * WARPS, j, 8, s[u], x, g,
                                [&](float (&of_up)[8]) { widen<T>(up[u], of_up); },
                                [&](int half, const float (&dh)[8]) {
                                    if (sums)
                                        for (int v = 0; v < 8; v++) sum[half][v] += dh[v];
                                });
            }
        }
#pragma unroll
        for (int u = 0; u < IN_FLIGHT; u++) {
            if (!ds_NP) break;
            const float total = warp_sum(ds[u]);
            if (lane_id() == 0 && i + u < n) ds_NP[(first + (i + u) * WARPS) * pieces + piece] = total;
        }
    }
    if (!sums) return;
    auto *const shared = reinterpret_cast<float *>(shared_memory());    // twice THREADS * 8
    const int   column = piece * SUM_COLUMNS + static_cast<int>(threadIdx.x);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (half > d.gated) break;
        const float total = sum_of_warps(sum[half], shared + half * THREADS * 8);
        if (column < d.F) parts_SC[block * row_C + half * d.row_F + column] = total;
    }
}

template <class T>
int dact_pass(const dact_rows<T> &d, const slabs &cut, const T *da_NF, float *ds_NP, float *parts_SC, int64_t row_C,
              cudaStream_t stream) {
    const auto run = [&](auto kernel, int64_t blocks, size_t shared) {
        return launch(kernel, blocks * ceil_div(d.F, SUM_COLUMNS), THREADS, shared, stream, d, cut, da_NF, ds_NP,
                      parts_SC, row_C);
    };
    return parts_SC ? run(dact_kernel<true, T>, cut.most(), 2 * THREADS * 8 * sizeof(float))
                    : run(dact_kernel<false, T>, ceil_div(cut.N, IN_FLIGHT * WARPS), 0);
}
#define INSTANCE(T) \
    template int dact_pass(const dact_rows<T> &, const slabs &, const T *, float *, float *, int64_t, cudaStream_t);
INSTANCE(bf16) INSTANCE(f16)
#undef INSTANCE
