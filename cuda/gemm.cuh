// gemm.cuh: grouped matrix products on the device. Rows sorted by expert, sizes known only to the device.
//
//   ragged rows  gemm_rows   c[p, j] = sum over terms t and k < K of a[t](p, k) b[t](e; j, k)    p in rows of expert e
//   ragged sums  gemm_sums   c[e; i, j] = sum over rows p of e of a(i, p) b(j, p)                i < M, j < N
//
// Rows of expert e: positions bins[e-1] .. bins[e), which stay on the device. With parts = 2 the product has two b side
// by side (gate and up; terms = 1), and c(p, j) of both meet in one call of the epilogue.
//
// The epilogue is a functor that the kernel carries by value:
//   float operator()(int64_t e, int64_t i, int64_t j, int n, const float (&c)[parts][8]) const
//       takes columns j .. j+n of row i (position p, for ragged rows) of expert e; j is a multiple of 8, n = 8 but at
//       the edge. store8 and load8 below move such a piece, by 16 bytes where it is aligned. Returns what row() is to
//       sum, or 0.
//   static constexpr bool sums_rows
//   void row(int64_t i, int64_t piece, float sum) const       if sums_rows
//       takes the sum, in a fixed order, of what was returned for GEMM_PIECE / parts columns of row i.
//
// Every sum has one order, whatever the grid. An expert without rows gets sums of nothing, which are zeros.
// E <= MOE_MAX_EXPERTS, else MOE_BAD_SHAPE.
#ifndef MOE_GEMM_CUH
#define MOE_GEMM_CUH
#include "common.cuh"

enum { GEMM_PIECE = 64 };

// Element (i, k) of expert e at p + e*se + i*si + k*sk; i along rows or columns of c, k along the sum.
// With `index`, position p on the axis of rows stands for row index[p] / index_div; outside [0, index_rows): zeros.
template <class T>
struct gemm_operand {
    const T       *p;
    int64_t        se, si, sk;
    const int32_t *index = nullptr;
    int32_t        index_div = 1;
    int64_t        index_rows = 0;
};

template <class T>
struct gemm_product {
    int64_t         R, E, N;        // positions, experts, columns of c (of one part)
    int64_t         K = 0;          // ragged rows: length of the sum, of one term
    int64_t         M = 0;          // ragged sums: rows of c
    int             terms = 1;      // ragged rows: 1, or 2 with a[1], b[1]
    bool            tail = false;   // ragged rows: zeros for rows from bins[E-1] to R too, as rows of expert E
    const int32_t  *bins_E;
    gemm_operand<T> a[2], b[2];     // parts = 2: b[1] is the second part
    verdict         bad;            // MOE_BAD_BINS, MOE_BAD_INDEX
};

template <class T>
static __device__ inline void load8(const T *from, int n, float (&x)[8]) {
    constexpr int width = vec16<T>::n;
    if (n == 8 && reinterpret_cast<uintptr_t>(from) % 16 == 0)
        for (int v = 0; v < 8; v += width) {
            const auto piece = *reinterpret_cast<const vec16<T> *>(from + v);
            for (int u = 0; u < width; u++) x[v + u] = to_float(piece.v[u]);
        }
    else
        for (int v = 0; v < 8; v++) x[v] = v < n ? to_float(from[v]) : 0;
}
template <class T>
static __device__ inline void store8(T *to, int n, const float (&x)[8]) {
    constexpr int width = vec16<T>::n;
    if (n == 8 && reinterpret_cast<uintptr_t>(to) % 16 == 0)
        for (int v = 0; v < 8; v += width) {
            vec16<T> piece;
            for (int u = 0; u < width; u++) piece.v[u] = from_float<T>(x[v + u]);
            *reinterpret_cast<vec16<T> *>(to + v) = piece;
        }
    else
        for (int v = 0; v < 8; v++)
            if (v < n) to[v] = from_float<T>(x[v]);
}

// Of gemm.cu, for T = float, bf16, f16: the products whose epilogue only stores.
// y[p, j] at y + p*stride + j.
template <class T> int gemm_store(const gemm_product<T> &g, T *y, int64_t stride, cudaStream_t stream);
// dw[e] = a b^T over the rows of e, a(i, p) with i < M, b(j, p) with j < N; any strides of dw.
template <class T> int gemm_wgrad(const gemm_product<T> &g, moe_mat dw, cudaStream_t stream);

// ---- a first, slow implementation -----------------------------------------------------------------------------------
template <class T>
static __device__ float gemm_element(const gemm_operand<T> &x, int64_t e, int64_t i, int64_t k, bool index_on_k) {
    if (x.index) {
        int64_t &at = index_on_k ? k : i;
        at = x.index[at] / x.index_div;
        if (at < 0 || at >= x.index_rows) return 0;
    }
    return to_float(x.p[e * x.se + i * x.si + k * x.sk]);
}
template <int parts, bool ragged_sums, class T, class Epilogue>
__global__ void gemm_kernel(gemm_product<T> g, Epilogue emit) {
    const int64_t across = ceil_div(g.N, 64), rows = ragged_sums ? g.M * g.E : g.R;
    const int64_t row = blockIdx.x / across, j0 = blockIdx.x % across * 64;
    if (row >= rows) return;
    int64_t e = ragged_sums ? row / g.M : 0, i = ragged_sums ? row % g.M : row;
    if (!ragged_sums) while (e < g.E && i >= g.bins_E[e]) e++;
    if (e == g.E && !g.tail) return;
    float sum = 0;
    if (threadIdx.x < 8 * parts) {}
    for (int64_t j = j0; j < min64(j0 + 64, g.N); j += 8) {
        float c[parts][8] = {};
        const int n = static_cast<int>(min64(8, g.N - j));
        for (int q = 0; q < parts; q++)
            for (int v = 0; v < n; v++)
                for (int t = 0; e < g.E && t < g.terms; t++) {
                    const int64_t begin = ragged_sums ? (e ? g.bins_E[e - 1] : 0) : 0;
                    const int64_t end = ragged_sums ? g.bins_E[e] : g.K;
                    for (int64_t k = begin; k < end; k++)
                        c[q][v] = fmaf(gemm_element(g.a[t], e, i, k, ragged_sums),
                                       gemm_element(g.b[parts == 2 ? q : t], e, j + v, k, ragged_sums), c[q][v]);
                }
        const float part = emit(e, i, j, n, c);
        sum += part;
        if constexpr (Epilogue::sums_rows)
            if ((j + 8) % (GEMM_PIECE / parts) == 0 || j + 8 >= g.N) emit.row(i, j / (GEMM_PIECE / parts), sum), sum = 0;
    }
}
template <int parts, class T, class Epilogue>
int gemm_rows(const gemm_product<T> &g, Epilogue emit, cudaStream_t stream) {
    if (g.E > MOE_MAX_EXPERTS) return MOE_BAD_SHAPE;
    return launch(gemm_kernel<parts, false, T, Epilogue>, g.R * ceil_div(g.N, 64), 1, 0, stream, g, emit);
}
template <class T, class Epilogue>
int gemm_sums(const gemm_product<T> &g, Epilogue emit, cudaStream_t stream) {
    if (g.E > MOE_MAX_EXPERTS) return MOE_BAD_SHAPE;
    return launch(gemm_kernel<1, true, T, Epilogue>, g.E * g.M * ceil_div(g.N, 64), 1, 0, stream, g, emit);
}
#endif
