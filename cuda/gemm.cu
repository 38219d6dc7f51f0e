// gemm.cu: the twins of csrc/gemm.c, and the products of the fused expert MLP whose epilogue only stores.
//
//   moe_grouped_gemm         y_RO[bin e] = x_RI[bin e] w_EIO[e]           ragged rows; zeros from bins[E-1] on
//   moe_grouped_gemm_wgrad   dw_EIO[e]   = x_RI[bin e]^T dy_RO[bin e]     ragged sums; zeros for an empty expert
//
// Bins that decrease or leave [0, R]: MOE_BAD_BINS; then y is not written, and dw[e] is zeros for that expert.
//
// On Hopper elements of 16 bits go the way of sm90.cuh wherever TMA can read them.
#include "sm90.cuh"

// ---- epilogues ------------------------------------------------------------------------------------------------------
template <class T>
struct store_rows {
    static constexpr bool sums_rows = false;
    const T *bias;
    int64_t  bias_se;
    T       *y;
    int64_t  stride;
    __device__ float operator()(int64_t e, int64_t p, int64_t j, int n, const float (&c)[1][8]) const {
        if (!bias) {
            store8(y + p * stride + j, n, c[0]);
            return 0;
        }
        float x[8];
        load8(bias + e * bias_se + j, n, x);
        for (int v = 0; v < 8; v++) x[v] += c[0][v];
        store8(y + p * stride + j, n, x);
        return 0;
    }
};
template <class T>
struct store_matrix {
    static constexpr bool sums_rows = false;
    T      *p;
    int64_t se, sr, sc;
    __device__ float operator()(int64_t e, int64_t i, int64_t j, int n, const float (&c)[1][8]) const {
        T *to = p + e * se + i * sr + j * sc;
        if (sc == 1) store8(to, n, c[0]);
        else
            for (int v = 0; v < 8; v++)
                if (v < n) to[v * sc] = from_float<T>(c[0][v]);
        return 0;
    }
};

template <class T>
int gemm_store(const gemm_product<T> &g, const T *bias, int64_t bias_se, T *y, int64_t stride, cudaStream_t stream) {
    if constexpr (sizeof(T) == 2)
        if (sm90_here() && rows_sm90_takes(g, bias, y, stride)) return rows_sm90(g, bias, bias_se, y, stride, stream);
    return gemm_rows<1, true>(g, store_rows<T>{bias, bias_se, y, stride}, stream);
}
template <class T>
int gemm_wgrad(const gemm_product<T> &g, moe_mat dw, cudaStream_t stream) {
    if (dw.sc != 1 && dw.sr == 1) {                     // dw^T = b a^T has its rows in one piece
        gemm_product<T> swapped = g;
        swapped.M = g.N, swapped.N = g.M, swapped.a[0] = g.b[0], swapped.b[0] = g.a[0];
        return gemm_wgrad(swapped, moe_mat{dw.p, dw.se, dw.sc, dw.sr}, stream);
    }
    if constexpr (sizeof(T) == 2)
        if (sm90_here() && sums_sm90_takes(g, dw)) return sums_sm90(g, dw, stream);
    return gemm_sums<true>(g, store_matrix<T>{static_cast<T *>(dw.p), dw.se, dw.sr, dw.sc}, stream);
}
#define INSTANCES(T) \
    template int gemm_store(const gemm_product<T> &, const T *, int64_t, T *, int64_t, cudaStream_t); \
    template int gemm_wgrad(const gemm_product<T> &, moe_mat, cudaStream_t);
INSTANCES(float) INSTANCES(bf16) INSTANCES(f16)
#undef INSTANCES

static int check(int64_t R, int64_t E, int64_t I, int64_t O) {
    const int64_t most = INT64_MAX / 64;
    if (R < 0 || R > INT32_MAX || E < 1 || E > MOE_MAX_EXPERTS || I < 0 || O < 0) return MOE_BAD_SHAPE;
    if ((I && R > most / I) || (O && R > most / O)) return MOE_BAD_SHAPE;
    if (I && O && (I > most / O || E > most / (I * O))) return MOE_BAD_SHAPE;
    return MOE_OK;
}

// ---- y = x w --------------------------------------------------------------------------------------------------------
size_t moe_grouped_gemm_workspace(int, int64_t, int64_t, int64_t, int64_t, cudaStream_t) { return 0; }
int moe_grouped_gemm(int dtype, int64_t R, int64_t E, int64_t I, int64_t O, const void *x_RI, moe_mat w,
                     const int32_t *bins_E, void *, void *y_RO, cudaStream_t stream) {
    TRY(check(R, E, I, O));
    return by_float(dtype, [&]<class T>(T) {
        const gemm_product<T> g = {
            .R = R, .E = E, .N = O, .K = I, .tail = true, .bins_E = bins_E,
            .a = {{.p = static_cast<const T *>(x_RI), .se = 0, .si = I, .sk = 1}},
            .b = {{.p = static_cast<const T *>(w.p), .se = w.se, .si = w.sc, .sk = w.sr}},
            .bad = verdict_of(OP_grouped_gemm),
        };
        return gemm_store<T>(g, nullptr, 0, static_cast<T *>(y_RO), O, stream);
    });
}

// ---- dw = x^T dy ----------------------------------------------------------------------------------------------------
size_t moe_grouped_gemm_wgrad_workspace(int, int64_t, int64_t, int64_t, int64_t, cudaStream_t) { return 0; }
int moe_grouped_gemm_wgrad(int dtype, int64_t R, int64_t E, int64_t I, int64_t O, const void *x_RI, const void *dy_RO,
                           const int32_t *bins_E, void *, moe_mat dw_EIO, cudaStream_t stream) {
    TRY(check(R, E, I, O));
    return by_float(dtype, [&]<class T>(T) {
        const gemm_product<T> g = {
            .R = R, .E = E, .N = O, .M = I, .bins_E = bins_E,
            .a = {{.p = static_cast<const T *>(x_RI), .se = 0, .si = 1, .sk = I}},
            .b = {{.p = static_cast<const T *>(dy_RO), .se = 0, .si = 1, .sk = O}},
            .bad = verdict_of(OP_grouped_gemm_wgrad),
        };
        return gemm_wgrad(g, dw_EIO, stream);
    });
}
