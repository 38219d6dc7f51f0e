// dact.cu: the pass of dact.cuh over a dA' in memory, at the speed of memory: it moves N x F elements four times for a
// plain activation, six times for a gated one.
//
// dA' comes rounded to T, where the epilogue has it in float. Against a double-precision reference that leaves dh and
// ds with .64 to .74 of the root mean square error of plain torch, which rounds dA' too, and the epilogue with .42 to
// .52.
#include "sm90.cuh"

// Eight elements that stay words until they are needed, so that four registers hold them.
using words = vec16<uint32_t>;
template <bool whole, class T>
static __device__ __forceinline__ words load_words(const T *from, int64_t n) {
    if constexpr (whole) return *reinterpret_cast<const words *>(from);
    words x = {};
    for (int v = 0; v < 8; v++)
        if (v < n) x.v[v / 2] |= static_cast<uint32_t>(from[v].bits) << v % 2 * 16;
    return x;
}
template <class T>
static __device__ __forceinline__ void widen(const words &from, float (&x)[8]) {
    for (int v = 0; v < 8; v++) x[v] = to_float(T{static_cast<uint16_t>(from.v[v / 2] >> v % 2 * 16)});
}

// A row is read by `lanes` threads of a block, a thread `ahead` pieces of eight columns at a time, all of them on their
// way before the first is needed. ds is summed by each lane in order of columns, then over lanes as a tree.
template <int lanes_, int ahead_>
struct dact_shape {
    static constexpr int lanes = lanes_, ahead = ahead_, rows = THREADS / lanes;
};
using narrow_rows = dact_shape<32, 4>;
using wide_rows   = dact_shape<THREADS, 4>;

template <class Shape, bool whole, class T>
__global__ void __launch_bounds__(THREADS, 2) dact_kernel(dact_rows<T> d, int64_t N, const T *da_NF, float *ds_N) {
    constexpr int step = Shape::lanes * 8;
    const int64_t p = static_cast<int64_t>(blockIdx.x) * Shape::rows + threadIdx.x / Shape::lanes;
    float         ds = 0;
    if (p < N) {
        const float s = d.weight(p);
        for (int64_t first = threadIdx.x % Shape::lanes * 8; first < d.F; first += Shape::ahead * step) {
            words da[Shape::ahead], gate[Shape::ahead], up[Shape::ahead];
#pragma unroll
            for (int i = 0; i < Shape::ahead; i++) {
                const int64_t j = first + i * step;
                if (j >= d.F) continue;
                da[i] = load_words<true>(da_NF + p * d.row_F + j, 8);
                gate[i] = load_words<whole>(d.h(p, j), d.F - j);
                up[i] = d.gated ? load_words<whole>(d.h(p, j) + d.F, d.F - j) : words{};
            }
#pragma unroll
            for (int i = 0; i < Shape::ahead; i++) {
                const int64_t j = first + i * step;
                if (j >= d.F) continue;
                float x[8], g[8];
                widen<T>(da[i], x);
                widen<T>(gate[i], g);
                ds += d.store(p, j, whole ? 8 : static_cast<int>(min64(8, d.F - j)), s, x, g,
                              [&](float (&u)[8]) { widen<T>(up[i], u); });
            }
        }
    }
    if (Shape::lanes == THREADS) ds = block_sum(ds, reinterpret_cast<float *>(shared_memory()));
    else                         ds = warp_sum(ds);
    if (ds_N && p < N && threadIdx.x % Shape::lanes == 0) ds_N[p] = ds;
}

template <class Shape, bool whole, class T>
static int run(const dact_rows<T> &d, int64_t N, const T *da_NF, float *ds_N, cudaStream_t stream) {
    return launch(dact_kernel<Shape, whole, T>, ceil_div(N, Shape::rows), THREADS, 32 * sizeof(float), stream, d, N,
                  da_NF, ds_N);
}
template <class T>
int dact_pass(const dact_rows<T> &d, int64_t N, const T *da_NF, float *ds_N, cudaStream_t stream) {
    const bool whole = d.F % 8 == 0 && aligned16(d.h_NU), wide = d.F > narrow_rows::lanes * narrow_rows::ahead * 8;
    if (!whole) return run<narrow_rows, false>(d, N, da_NF, ds_N, stream);
    return wide ? run<wide_rows, true>(d, N, da_NF, ds_N, stream) : run<narrow_rows, true>(d, N, da_NF, ds_N, stream);
}
template int dact_pass(const dact_rows<bf16> &, int64_t, const bf16 *, float *, cudaStream_t);
template int dact_pass(const dact_rows<f16> &, int64_t, const f16 *, float *, cudaStream_t);
