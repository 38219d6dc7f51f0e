// cublas_stand_in.c: a libcublas.so.13 of three functions for the host, column-major as the real one, float only.
#include <stdint.h>
#include <stdlib.h>

struct context { void *stream; };
enum { AS_IS, TRANSPOSED, FLOAT = 0, COMPUTE_32F = 68, INVALID_VALUE = 7, NOT_SUPPORTED = 15 };

int cublasCreate_v2(struct context **handle) {
    *handle = calloc(1, sizeof **handle);
    return 0;
}
int cublasSetStream_v2(struct context *handle, void *stream) {
    handle->stream = stream;
    return 0;
}
// c[m, n] = op_a(a)[m, k] op_b(b)[k, n]; element (i, j) of a stored matrix at p[i + j*ld].
int cublasGemmEx_64(struct context *handle, int op_a, int op_b, int64_t m, int64_t n, int64_t k, const float *alpha,
                    const float *a, int type_a, int64_t lda, const float *b, int type_b, int64_t ldb, const float *beta,
                    float *c, int type_c, int64_t ldc, int compute, int algorithm) {
    (void)algorithm;
    if (!handle || type_a != FLOAT || type_b != FLOAT || type_c != FLOAT || compute != COMPUTE_32F) return NOT_SUPPORTED;
    if (m < 0 || n < 0 || k < 0 || *alpha != 1 || *beta != 0) return INVALID_VALUE;
    if (lda < (op_a == AS_IS ? m : k) || ldb < (op_b == AS_IS ? k : n) || ldc < m || !lda || !ldb || !ldc)
        return INVALID_VALUE;
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            double sum = 0;
            for (int64_t l = 0; l < k; l++)
                sum += (double)(op_a == AS_IS ? a[i + l * lda] : a[l + i * lda]) *
                       (double)(op_b == AS_IS ? b[l + j * ldb] : b[j + l * ldb]);
            c[i + j * ldc] = (float)sum;
        }
    return 0;
}
