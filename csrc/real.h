// real.h: one real (double for MOE_F64, else float) at a time, and rows over experts. For the ops around a softmax,
// whose few scalars per row need no SIMD. Inside the core only.
#ifndef MOE_REAL_H
#define MOE_REAL_H
#include "kernels.h"
#include <string.h>

static inline double real_get(int dtype, const void *real, int64_t i) {
    return dtype == MOE_F64 ? ((const double *)real)[i] : (double)((const float *)real)[i];
}
static inline void real_set(int dtype, void *real, int64_t i, double value) {
    if (dtype == MOE_F64) ((double *)real)[i] = value;
    else ((float *)real)[i] = (float)value;
}

// Element i of storage, exactly.
static inline double moe_get(int dtype, const void *x, int64_t i) {
    float real;
    if (dtype == MOE_F64) return ((const double *)x)[i];
    if (dtype == MOE_F32) return ((const float *)x)[i];
    if (dtype == MOE_BF16) {                                        // the upper half of a float
        const uint32_t bits = (uint32_t)((const uint16_t *)x)[i] << 16;
        memcpy(&real, &bits, sizeof real);
    } else moe_k->load(dtype, 1, (const uint16_t *)x + i, &real);
    return real;
}

// One row over experts, on the stack.
typedef union { float f32[MOE_MAX_EXPERTS]; double f64[MOE_MAX_EXPERTS]; } real_row;

// A matrix [T,E] of a floating dtype.
static inline int check_rows(int dtype, int64_t T, int64_t E) {
    if (!moe_is_float(dtype)) return MOE_BAD_DTYPE;
    return T < 0 || E < 1 || E > MOE_MAX_EXPERTS || T > INT64_MAX / (8 * E) ? MOE_BAD_SHAPE : MOE_OK;
}
#endif
