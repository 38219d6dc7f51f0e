// kernels.h: the inner loops that are compiled once per instruction set, and the table that picks them at run time.
// isa_base.c, isa_avx2.c and isa_avx512.c are the same four .inc files under other compiler flags; isa.c chooses.
// The place of a matrix unit (AMX) is another table with its own gemm entry.
// Inside the core only. "real" is double if f64 / dtype is MOE_F64, else float.
#ifndef MOE_KERNELS_H
#define MOE_KERNELS_H
#include "moe.h"
#include <stdbool.h>

typedef struct {
    const char *isa;
    // rows.inc: rows of storage <-> rows of real. w is exact in real; sums are fma in index order; dot: 16 lanes.
    void   (*load )(int dtype, int64_t n, const void *x, void *real);                     // real[i] = x[i]
    void   (*store)(int dtype, int64_t n, const void *real, void *x);                     // x[i] = round(real[i])
    void   (*scale)(int dtype, int64_t n, double w, const void *x, void *y);              // y[i] = round(w * x[i])
    void   (*axpy )(int dtype, int64_t n, double w, const void *x, void *real);       // real[i] = fma(w, x[i], real[i])
    // y[i] = round(sum over k of w[k] * x[k][i]), in the order of k; w is real. y overlaps no x
    void   (*sum  )(int dtype, int64_t n, int64_t K, const void *w, const void *const *x, void *y);
    double (*dot  )(int dtype, int64_t n, const void *x, const void *y);                  // sum of x[i] * y[i]
    // act.inc: rows of real; up and dup are NULL if act is not gated
    void   (*act )(bool f64, int act, int64_t n, const void *gate, const void *up, void *a);
    void   (*dact)(bool f64, int act, int64_t n, const void *gate, const void *up, const void *da, void *dgate,
                   void *dup);
    // softmax.inc: p may be x. Returns logsumexp; NaN in x gives NaN
    double (*softmax)(bool f64, int64_t n, const void *x, void *p);
    // topk.inc: ids = the K largest keys (reals) in descending order, the lowest id first among equals
    void   (*top_k)(bool f64, int64_t n, int64_t K, const void *key, int32_t *ids);
    // random.inc: u[0 .. n rounded up to 64) = uniform or normal numbers of columns col .. (a multiple of 4) of a row
    void   (*random)(bool normal, const moe_random_key *key, int64_t row, int64_t col, int64_t n, float *u);
    // gemm.inc: C[mr,nr] (+)= A[k,mr]^T B[k,nr] on packed panels; see gemm.c for the contract. [0] float, [1] double
    struct {
        int  mr, nr;
        void (*run)(int64_t k, const void *a_km, const void *b_kn, void *c, int64_t ldc, bool accumulate);
    } gemm[2];
} moe_kernels;

extern const moe_kernels moe_kernels_base, moe_kernels_avx2, moe_kernels_avx512;
extern const moe_kernels *moe_k;            // the chosen table, set by moe_init

// Runs body over [0, n) in pieces of at least `grain`, through the pool.
void moe_parallel(int64_t n, int64_t grain, moe_body body, void *arg);
// How many rows of `width` elements are worth a thread.
static inline int64_t moe_row_grain(int64_t width) { return 16384 / (width > 1 ? width : 1) + 1; }

static inline bool    moe_is_float(int dtype) { return dtype >= MOE_F64 && dtype <= MOE_F16; }
static inline int64_t moe_real_size(int dtype) { return dtype == MOE_F64 ? 8 : 4; }
#endif
