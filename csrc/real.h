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

// A piece of a row as reals, in L1, and what passes through it: rows of f64 and f32 are reals where they are; those of
// halves are loaded into the tile, or made in it and then stored.
enum { REAL_TILE = 1024 };
typedef union { float f32[REAL_TILE]; double f64[REAL_TILE]; } real_tile;
static inline bool real_in_place(int dtype) { return dtype == MOE_F64 || dtype == MOE_F32; }
static inline const void *real_load(int dtype, int64_t n, const void *x, real_tile *tile) {
    if (real_in_place(dtype)) return x;
    moe_k->load(dtype, n, x, tile);
    return tile;
}
static inline void *real_making(int dtype, void *y, real_tile *tile) { return real_in_place(dtype) ? y : tile; }
static inline void real_made(int dtype, int64_t n, const real_tile *tile, void *y) {
    if (!real_in_place(dtype)) moe_k->store(dtype, n, tile, y);
}

// One row over experts, on the stack.
typedef union { float f32[MOE_MAX_EXPERTS]; double f64[MOE_MAX_EXPERTS]; } real_row;

// A matrix [T,E] of a floating dtype.
static inline int check_rows(int dtype, int64_t T, int64_t E) {
    if (!moe_is_float(dtype)) return MOE_BAD_DTYPE;
    return T < 0 || E < 1 || E > MOE_MAX_EXPERTS || T > INT64_MAX / (8 * E) ? MOE_BAD_SHAPE : MOE_OK;
}
#endif
