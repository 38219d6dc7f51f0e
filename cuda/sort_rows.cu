// sort_rows.cu: rows of tokens -> rows of copies sorted by expert, for products that read them by TMA.
//
//   to_ND[inverse[r K + k]] = from_RD[r]        for all k whose place is not -1
//
// Each row is read once and stored at its K places, which moves (1 + 1/K) / 2 of the bytes of a gather.
#include "sm90.cuh"

enum { PLACES = 8 };

struct sorting {
    int64_t        R, K, D, N, row_D;
    const int32_t *order_N, *inverse_RK;
    verdict        bad;
};
// A thread moves 16 bytes of a row to PLACES places at a time, and looks whether a position has a row.
template <bool whole, class T>
__global__ void __launch_bounds__(THREADS)
sort_rows_kernel(sorting g, const T *__restrict__ from_RD, T *__restrict__ to_ND) {
    constexpr int width = vec16<T>::n;
    const int64_t pieces = ceil_div(g.D, width), stride = static_cast<int64_t>(gridDim.x) * THREADS;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    for (int64_t i = first; i < g.R * pieces; i += stride) {
        const int64_t r = i / pieces, j = (i - r * pieces) * width;
        const T      *from = from_RD + r * g.D + j;
        vec16<T>      x;
        if (whole) x = *reinterpret_cast<const vec16<T> *>(from);
        else
            for (int v = 0; v < width; v++) x.v[v] = j + v < g.D ? from[v] : T{};
        for (int64_t k = 0; k < g.K; k += PLACES) {
            int32_t p[PLACES];
#pragma unroll
            for (int u = 0; u < PLACES; u++) p[u] = k + u < g.K ? g.inverse_RK[r * g.K + k + u] : -1;
#pragma unroll
            for (int u = 0; u < PLACES; u++)
                if (p[u] >= 0 && p[u] < g.N) *reinterpret_cast<vec16<T> *>(to_ND + p[u] * g.row_D + j) = x;
                else if (p[u] != -1 && j == 0) g.bad(MOE_BAD_INDEX, r * g.K + k + u);
        }
    }
    for (int64_t p = first; p < g.N; p += stride) {
        const int32_t f = g.order_N[p];
        if (f >= 0 && f < g.R * g.K && g.inverse_RK[f] == p) continue;
        g.bad(MOE_BAD_INDEX, p);
        for (int64_t j = 0; j < g.D; j++) to_ND[p * g.row_D + j] = T{};
    }
}

template <class T>
int sort_rows(int64_t R, int64_t K, int64_t D, int64_t N, const T *from_RD, const int32_t *order_N,
              const int32_t *inverse_RK, T *to_ND, int64_t row_D, verdict bad, cudaStream_t stream) {
    constexpr int width = vec16<T>::n;
    const sorting g = {R, K, D, N, row_D, order_N, inverse_RK, bad};
    const bool    whole = D % width == 0 && aligned16(from_RD);
    return launch(whole ? sort_rows_kernel<true, T> : sort_rows_kernel<false, T>,
                  strided_grid(max64(R * ceil_div(D, width), N), THREADS), THREADS, 0, stream, g, from_RD, to_ND);
}
#define INSTANCE(T) \
    template int sort_rows(int64_t, int64_t, int64_t, int64_t, const T *, const int32_t *, const int32_t *, T *, \
                           int64_t, verdict, cudaStream_t);
INSTANCE(bf16) INSTANCE(f16)
#undef INSTANCE
