// cublas.cu: the grouped products as one cublasGemmEx per expert: what benchmarks measure our kernels against, in the
// same run. No op ever falls back to it.
//
//   y_RO[bin e] = x_RI[bin e] w_EIO[e]      dw_EIO[e] = x_RI[bin e]^T dy_RO[bin e]
//
// cuBLAS wants sizes on the host, so a call copies bins there and waits for the stream: it cannot be captured in a CUDA
// graph. It wants a unit stride too: a matrix without one is MOE_BAD_SHAPE. Accumulation is in float, TF32 is off.
// cuBLAS counts columns first. A row-major matrix is there its own transpose, so c = a b is asked for as c^T = b^T a^T,
// and a matrix whose rows, not columns, have stride 1 is passed as "transposed".
//
// libcublas.so is opened at run time, the copy that torch has loaded if there is one; nothing is linked.
#include <dlfcn.h>

#include <mutex>
#include <string>
#include <vector>

#include "common.cuh"

namespace {
// ---- the part of cublas_v2.h that is used ---------------------------------------------------------------------------
struct context;
constexpr int AS_IS = 0, TRANSPOSED = 1, COMPUTE_32F = 68, DEFAULT_ALGORITHM = -1;
constexpr int type_of(int dtype) { return dtype == MOE_F32 ? 0 : dtype == MOE_F16 ? 2 : 14; }       // cudaDataType

struct library {
    int (*Create)(context **);
    int (*SetStream)(context *, cudaStream_t);
    int (*GemmEx)(context *, int op_a, int op_b, int64_t m, int64_t n, int64_t k, const void *alpha, const void *a,
                  int type_a, int64_t lda, const void *b, int type_b, int64_t ldb, const void *beta, void *c,
                  int type_c, int64_t ldc, int compute, int algorithm);
};

// NULL, and why as the error, where it is missing.
const library *cublas() {
    static library found;
    static std::string why;
    static std::once_flag once;
    std::call_once(once, [] {
        void *so = nullptr;
        for (const int mode : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW})
            for (const char *name : {"libcublas.so.13", "libcublas.so.12"})
                if (!so) so = dlopen(name, mode);
        if (!so) why = dlerror();
        const auto find = [&](auto &function, const char *name) {
            if (so) *reinterpret_cast<void **>(&function) = dlsym(so, name);
            if (why.empty() && !function) why = std::string("it has no ") + name;
        };
        find(found.Create, "cublasCreate_v2");
        find(found.SetStream, "cublasSetStream_v2");
        find(found.GemmEx, "cublasGemmEx_64");
    });
    if (why.empty()) return &found;
    cuda_failed("cuBLAS is not to be had (%s). Hint: a torch built for CUDA brings it", why.c_str());
    return nullptr;
}
int cublas_status(int status, const char *what) {
    return status == 0 ? MOE_OK : cuda_failed("%s failed: cuBLAS status %d", what, status);
}

// ---- products of one call -------------------------------------------------------------------------------------------
struct matrix {
    const void *p;
    int64_t     stride;                     // of rows, or of columns, which themselves lie in one piece
    bool        by_rows;
    matrix t() const { return {p, stride, !by_rows}; }
};
bool rows_fit(moe_mat w, int64_t columns) { return w.sc == 1 && w.sr >= columns; }
bool columns_fit(moe_mat w, int64_t rows) { return w.sr == 1 && w.sc >= rows; }

class products {
    const library &blas;
    context       *handle;
    const int      dtype;
    cudaStream_t   stream;

    products(const library &blas, context *handle, int dtype, cudaStream_t stream)
        : blas(blas), handle(handle), dtype(dtype), stream(stream) {}

    const void *at(const void *p, int64_t offset) const {
        return static_cast<const char *>(p) + offset * moe_size(dtype);
    }
    // c[m, n] = a[m, k] b[k, n], c by rows.
    int by_rows(int64_t m, int64_t n, int64_t k, matrix a, matrix b, matrix c) const {
        const float one = 1, zero = 0;
        const int type = type_of(dtype);
        return cublas_status(
            blas.GemmEx(handle, b.by_rows ? AS_IS : TRANSPOSED, a.by_rows ? AS_IS : TRANSPOSED, n, m, k, &one,
                        b.p, type, max64(1, b.stride), a.p, type, max64(1, a.stride), &zero,
                        const_cast<void *>(c.p), type, max64(1, c.stride), COMPUTE_32F, DEFAULT_ALGORITHM),
            "a product");
    }

   public:
    // c[m, n] = a[m, k] b[k, n]; zeros if k = 0, which not every cuBLAS writes.
    int multiply(int64_t m, int64_t n, int64_t k, matrix a, matrix b, matrix c) const {
        if (m == 0 || n == 0) return MOE_OK;
        if (!c.by_rows) return multiply(n, m, k, b.t(), a.t(), c.t());
        if (k) return by_rows(m, n, k, a, b, c);
        const auto size = static_cast<size_t>(moe_size(dtype));
        return cuda_status(cudaMemset2DAsync(const_cast<void *>(c.p), c.stride * size, 0, n * size, m, stream),
                           "writing zeros");
    }
    // Rows of x, `width` wide and dense; expert e of w.
    matrix rows(const void *x, int64_t begin, int64_t width) const { return {at(x, begin * width), width, true}; }
    matrix expert(moe_mat w, int64_t e, int64_t columns) const {
        const bool by_rows = rows_fit(w, columns);
        return {at(w.p, e * w.se), by_rows ? w.sr : w.sc, by_rows};
    }

    // Calls each(products, e, begin, end) for every expert. One handle for the process and each device, one call at a
    // time.
    template <class Each>
    static int for_experts(int dtype, int64_t R, int64_t E, const int32_t *bins_E, cudaStream_t stream, Each each) {
        static std::mutex lock;
        static std::vector<context *> handles;
        if (!cublas()) return MOE_CUDA_FAILED;
        const std::lock_guard<std::mutex> guard(lock);
        int device = 0;
        TRY(cuda_status(cudaGetDevice(&device), "finding the device"));
        if (handles.size() <= static_cast<size_t>(device)) handles.resize(device + 1);
        if (!handles[device]) TRY(cublas_status(cublas()->Create(&handles[device]), "opening cuBLAS"));
        TRY(cublas_status(cublas()->SetStream(handles[device], stream), "choosing the stream"));

        std::vector<int32_t> bins(E);
        TRY(cuda_status(cudaMemcpyAsync(bins.data(), bins_E, E * sizeof(int32_t), cudaMemcpyDefault, stream),
                        "copying bins"));
        TRY(cuda_status(cudaStreamSynchronize(stream), "copying bins"));
        const products run(*cublas(), handles[device], dtype, stream);
        for (int64_t e = 0, begin = 0; e < E; begin = bins[e++])
            if (bins[e] < begin || bins[e] > R) return MOE_BAD_BINS;
        for (int64_t e = 0, begin = 0; e < E; begin = bins[e++]) TRY(each(run, e, begin, bins[e]));
        return each(run, E, bins[E - 1], R);
    }
};

int check(int dtype, int64_t R, int64_t E, int64_t I, int64_t O, moe_mat w) {
    if (!is_float(dtype)) return MOE_BAD_DTYPE;
    if (R < 0 || E < 1 || I < 0 || O < 0) return MOE_BAD_SHAPE;
    return rows_fit(w, O) || columns_fit(w, I) ? MOE_OK : MOE_BAD_SHAPE;
}
}  // namespace

int moe_cublas_gemm(int dtype, int64_t R, int64_t E, int64_t I, int64_t O, const void *x_RI, moe_mat w_EIO,
                    const int32_t *bins_E, void *, void *y_RO, cudaStream_t stream) {
    TRY(check(dtype, R, E, I, O, w_EIO));
    return products::for_experts(dtype, R, E, bins_E, stream, [&](const products &run, int64_t e, int64_t begin,
                                                                  int64_t end) {
        const bool nobody = e == E;         // rows from bins[E-1] on: sums of nothing
        return run.multiply(end - begin, O, nobody ? 0 : I, run.rows(x_RI, begin, I),
                            run.expert(w_EIO, nobody ? 0 : e, O), run.rows(y_RO, begin, O));
    });
}

int moe_cublas_gemm_wgrad(int dtype, int64_t R, int64_t E, int64_t I, int64_t O, const void *x_RI, const void *dy_RO,
                          const int32_t *bins_E, void *, moe_mat dw_EIO, cudaStream_t stream) {
    TRY(check(dtype, R, E, I, O, dw_EIO));
    return products::for_experts(dtype, R, E, bins_E, stream, [&](const products &run, int64_t e, int64_t begin,
                                                                  int64_t end) {
        if (e == E) return static_cast<int>(MOE_OK);
        return run.multiply(I, O, end - begin, run.rows(x_RI, begin, I).t(), run.rows(dy_RO, begin, O),
                            run.expert(dw_EIO, e, O));
    });
}
