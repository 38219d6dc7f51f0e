// acts.h: the value and the derivative of one activation of one number, the same code in C and in CUDA.
//
//   silu       x s                    s + x s (1 - s)                  s = 1 / (1 + e^-x)
//   silu_oai   t s(1.702 t)           s + 1.702 t s (1 - s), or 0      t = min(x, 7); 0 where x is above 7
//   gelu       x P                    P + x p                          P, p: normal distribution and density
//   gelu_tanh  x s(2u)                s + 2 x s (1 - s) u'             u = sqrt(2/pi) (x + 0.044715 x^3)
//   relu       max(x, 0)              x > 0                            (1 + tanh u) / 2 = s(2u)
//
// A gate's value is multiplied by up; that of silu_oai by clamp(up, -7, 7) + 1, of derivative 1 from -7 to 7 and 0
// beyond. (gpt-oss; at a clamp's ends and for NaN the derivatives are torch.clamp's.)
//
// Float uses vexp_f32, so that gcc vectorises a loop around it; double uses libm. This file includes itself for both.
#ifndef REAL
#ifndef MOE_ACTS_H
#define MOE_ACTS_H
#include "vmath.h"
#include <math.h>

VMATH_FN double vexp_f64(double x) { return exp(x); }

// P(-|x|) = e^(-x^2/2) u Q(u), u = 1 / (1 + 0.3 |x|): a fit of erfcx over all |x|, relative error 3e-8, tails included.
VMATH_FN void normal_f32(float x, float *cdf, float *pdf) {
    float e = vexp_f32(-0.5f * x * x), u = vrcp_f32(vfma_f32(0.3f, fabsf(x), 1.0f));
    float p = -0x1.1b000ep-6f;
    p = vfma_f32(p, u, 0x1.87eb14p-4f);
    p = vfma_f32(p, u, -0x1.89ed6cp-3f);
    p = vfma_f32(p, u, 0x1.30be8ap-3f);
    p = vfma_f32(p, u, -0x1.8770ecp-5f);
    p = vfma_f32(p, u, 0x1.4d5fd0p-4f);
    p = vfma_f32(p, u, 0x1.52e5ecp-4f);
    p = vfma_f32(p, u, 0x1.c05860p-4f);
    p = vfma_f32(p, u, 0x1.ea13bap-4f);
    p = vfma_f32(p, u, 0x1.ea3958p-4f);
    p = p * u * e;
    *cdf = x > 0.0f ? 1.0f - p : p;
    *pdf = 0x1.988454p-2f * e;                                  // 1 / sqrt(2 pi)
}
VMATH_FN void normal_f64(double x, double *cdf, double *pdf) {
    *cdf = 0.5 * erfc(-x * M_SQRT1_2);
    *pdf = 0.5 * M_2_SQRTPI * M_SQRT1_2 * exp(-0.5 * x * x);
}

// What is applied to the gate (gated) or to all of h (plain).
enum { SILU, GELU, GELU_TANH, SILU_OAI, RELU };
static inline int act_plain(int act) {
    static const int8_t plain[] = {SILU, GELU, GELU_TANH, SILU_OAI, SILU, GELU, GELU_TANH, RELU};   // as in moe_act
    return plain[act];
}

#define REAL      float
#define NAME(x)   x##_f32
#include "acts.h"
#undef REAL
#undef NAME
#define REAL      double
#define NAME(x)   x##_f64
#include "acts.h"
#undef REAL
#undef NAME
#endif

#else       // -- once for float, once for double ----------------------------------------------------------------------
// The value and the derivative of one activation. `plain` is a constant wherever this is inlined.
VMATH_FN __attribute__((always_inline)) REAL NAME(act_value)(int plain, REAL x, REAL *derivative) {
    if (plain == RELU) {
        *derivative = x <= 0 ? 0 : 1;                           // NaN passes, as in torch
        return x < 0 ? 0 : x;
    }
    if (plain == GELU) {
        REAL cdf, pdf;
        NAME(normal)(x, &cdf, &pdf);
        *derivative = NAME(vfma)(x, pdf, cdf);
        return x * cdf;
    }
    if (plain == GELU_TANH) {
        const REAL c = (REAL)(2 * 0.79788456080286535588);      // 2 sqrt(2/pi)
        REAL t = x < -20 ? -20 : x > 20 ? 20 : x;               // s is 0 or 1 from here on: keeps x^3 finite
        REAL s = NAME(vrcp)(1 + NAME(vexp)(-c * t * NAME(vfma)((REAL)0.044715 * t, t, 1)));
        *derivative = NAME(vfma)(t * s * (1 - s) * c, NAME(vfma)((REAL)0.134145 * t, t, 1), s);
        return x * s;
    }
    if (plain == SILU_OAI) {
        const REAL k = (REAL)1.702;
        REAL t = x > 7 ? 7 : x, s = NAME(vrcp)(1 + NAME(vexp)(-k * t));
        *derivative = x <= 7 ? s * NAME(vfma)(k * t, 1 - s, 1) : 0;
        return t * s;
    }
    REAL s = NAME(vrcp)(1 + NAME(vexp)(-x));
    *derivative = s * NAME(vfma)(x, 1 - s, 1);
    return x * s;
}

// What a gate's value is multiplied by.
VMATH_FN __attribute__((always_inline)) REAL NAME(up_value)(int plain, REAL x, REAL *derivative) {
    *derivative = plain != SILU_OAI || (x >= -7 && x <= 7);
    return plain != SILU_OAI ? x : 1 + (x < -7 ? -7 : x > 7 ? 7 : x);
}
#endif
