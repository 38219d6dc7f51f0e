// vmath.h: exp of one float, the same code in C and in CUDA, written so that gcc vectorises a loop around it: no branch,
// no table, no call.
//
//   e^x = 2^n e^r,   n = round(x / ln 2),   |r| <= ln(2)/2,   e^r by its Taylor polynomial of degree 7 (rest < 2^-27)
//
// Within 1.1 ulp of e^x where the result is normal. Right at the ends: e^-inf = 0, e^inf = inf, NaN stays NaN, overflow
// is inf, results below FLT_MIN are subnormal and then 0. double goes through libm: fp64 is for proofs, not for speed.
#ifndef MOE_VMATH_H
#define MOE_VMATH_H
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define VMATH_FN __device__ static inline
#else
#define VMATH_FN static inline
#endif

#if defined __FMA__ || defined __CUDACC__
VMATH_FN float  vfma_f32(float a, float b, float c)    { return __builtin_fmaf(a, b, c); }
VMATH_FN double vfma_f64(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else       // the portable table: an fma by libm would be a call per element
VMATH_FN float  vfma_f32(float a, float b, float c)    { return a * b + c; }
VMATH_FN double vfma_f64(double a, double b, double c) { return a * b + c; }
#endif

#ifdef __CUDACC__       // within 1 ulp, and 0 past 2^126; an exact division is a dozen instructions and a call
VMATH_FN float vrcp_f32(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
#else
VMATH_FN float vrcp_f32(float x) { return 1.0f / x; }
#endif
VMATH_FN double vrcp_f64(double x) { return 1.0 / x; }

VMATH_FN float vmath_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }

VMATH_FN float vexp_f32(float x) {
    x = x > 89.0f ? 89.0f : x;                              // e^89 overflows, e^-104 rounds to 0; NaN passes both tests
    x = x < -104.0f ? -104.0f : x;
    float shifted = vfma_f32(x, 0x1.715476p+0f, 0x1.8p23f);     // 1.5 * 2^23 + n: the addition rounds to an integer
    float n = shifted - 0x1.8p23f;
    float r = vfma_f32(n, -0x1.62e4p-1f, x);                // ln 2 in two parts; the upper has 15 bits: exact
    r = vfma_f32(n, -0x1.7f7d1cp-20f, r);
    float p = 0x1.a01a02p-13f;
    p = vfma_f32(p, r, 0x1.6c16c2p-10f);
    p = vfma_f32(p, r, 0x1.111112p-7f);
    p = vfma_f32(p, r, 0x1.555556p-5f);
    p = vfma_f32(p, r, 0x1.555556p-3f);
    p = vfma_f32(p, r, 0.5f);
    p = vfma_f32(p, r * r, r) + 1.0f;
    uint32_t bits; memcpy(&bits, &shifted, 4);
    uint32_t m = bits - 0x4b400000u, half = (uint32_t)((int32_t)m >> 1);     // 2^n in two steps: n reaches -150 and 128
    return p * vmath_float((half + 127) << 23) * vmath_float((m - half + 127) << 23);
}
#endif
