// kernels.h: the inner loops that are compiled once per instruction set, and the table that picks them at run time.
// The isa_*.c are the same .inc files under other compiler flags; isa.c chooses.
// Inside the core only. "real" is double if f64 / dtype is MOE_F64, else float.
#ifndef MOE_KERNELS_H
#define MOE_KERNELS_H
#include "moe.h"
#include <stdbool.h>

// One factor of a product as the packer sees it: element (i, k) at p + (i*si + k*sk) * size, i along the panel, k along
// the sum. With `index`, coordinate x of one axis (k if index_on_k, else i) stands for index[x] / index_div.
typedef struct {
    int            dtype;
    const char    *p;
    int64_t        si, sk;
    const int32_t *index;
    int64_t        index_div;
    bool           index_on_k;
} gemm_factor;

// A product by what its panels hold: float (16-bit storage is widened), double, or bf16, whose sums are float. gemm.c has
// the contract of panels and tiles.
typedef enum { GEMM_F32, GEMM_F64, GEMM_BF16, GEMM_KINDS } gemm_kind;
typedef struct {
    int   mr, nr;               // a tile of C; 0: not on this instruction set
    int   ku;                   // a panel is filled up with zeros to a multiple of ku steps of the sum
    void (*pack_a)(const gemm_factor *f, int64_t i0, int64_t m, int64_t k0, int64_t n, void *stage, void *a_panels);
    void (*pack_b)(const gemm_factor *f, int64_t i0, int64_t m, int64_t k0, int64_t n, void *stage, void *b_panels);
    void (*begin)(void);        // before and after this thread's runs; NULL: nothing to do
    void (*end)(void);
    // rows <= mr of C[mr,nr] (+)= A[mr,k] B[k,nr] on packed panels; k is a multiple of ku
    void (*run)(int64_t rows, int64_t k, const void *a, const void *b, void *c, int64_t ldc, bool accumulate);
} moe_gemm;
enum { GEMM_MAX_MR = 32, GEMM_MAX_NR = 64, GEMM_STAGE = 16 };       // stage: GEMM_STAGE rows of what is packed, in real

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
    // norm.inc: rows of real. y = x r w; the sum of x w dy; its backward dx = r w dy - c x, dw += r x dy; a turn of the
    // pairs (a[i], b[i]), backwards for sign -1; the sum of x^2
    void   (*norm    )(bool f64, int64_t n, double r, const void *x, const void *w, void *y);
    double (*norm_dot)(bool f64, int64_t n, const void *x, const void *w, const void *dy);
    void   (*dnorm   )(bool f64, int64_t n, double r, double c, const void *x, const void *w, const void *dy, void *dx,
                       void *dw);
    void   (*rotate  )(bool f64, int64_t n, int sign, const void *cos, const void *sin, const void *a, const void *b,
                       void *ya, void *yb);
    double (*square_sum)(bool f64, int64_t n, const void *x);
    // topk.inc: ids = the K largest keys (reals) in descending order, the lowest id first among equals
    void   (*top_k)(bool f64, int64_t n, int64_t K, const void *key, int32_t *ids);
    // random.inc: u[0 .. n rounded up to 64) = uniform or normal numbers of columns col .. (a multiple of 4) of a row
    void   (*random)(bool normal, const moe_random_key *key, int64_t row, int64_t col, int64_t n, float *u);
    // pack.inc, gemm.inc
    moe_gemm gemm[GEMM_KINDS];
} moe_kernels;

extern const moe_kernels moe_kernels_base, moe_kernels_avx2, moe_kernels_avx512, moe_kernels_avx512bf16,
                         moe_kernels_amx;
extern const moe_kernels *moe_k;            // the chosen table, set by moe_init
extern int64_t moe_l2;                      // bytes of a core's second-level cache, set by moe_init; decides no bits

// Runs body over [0, n) in pieces of at least `grain`, through the pool.
void moe_parallel(int64_t n, int64_t grain, moe_body body, void *arg);
// How many rows of `width` elements are worth a thread.
static inline int64_t moe_row_grain(int64_t width) { return 16384 / (width > 1 ? width : 1) + 1; }

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline bool    moe_is_float(int dtype) { return dtype >= MOE_F64 && dtype <= MOE_F16; }
static inline gemm_kind moe_gemm_kind(int dtype) {
    return dtype == MOE_F64 ? GEMM_F64 : dtype == MOE_BF16 && moe_k->gemm[GEMM_BF16].mr ? GEMM_BF16 : GEMM_F32;
}
static inline int64_t moe_real_size(int dtype) { return dtype == MOE_F64 ? 8 : 4; }
#endif
