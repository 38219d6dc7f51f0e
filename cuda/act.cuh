// act.cuh: activations of a piece of eight columns; the formulas are those of the C core (csrc/acts.h).
#ifndef MOE_ACT_CUH
#define MOE_ACT_CUH
#include "../csrc/acts.h"
#include "common.cuh"

static inline bool known_act(int act) { return act >= MOE_SWIGLU && act <= MOE_RELU; }
static inline bool gated_act(int act) { return act <= MOE_SWIGLU_OAI; }

// Where a piece of eight columns begins; `whole`: it can be moved by 16 bytes, and load8 and store8 have no other path.
template <bool whole, class T>
static __device__ inline T *piece_at(T *p) {
    return whole ? static_cast<T *>(__builtin_assume_aligned(p, 16)) : p;
}

template <int plain>
static __device__ inline void act8_of(const float (&x)[8], float (&value)[8], float (&slope)[8]) {
#pragma unroll
    for (int v = 0; v < 8; v++) value[v] = act_value_f32(plain, x[v], &slope[v]);
}
// value = act(x), slope = act'(x); plain is act_plain() of a moe_act, the same in all threads.
static __device__ inline void act8(int plain, const float (&x)[8], float (&value)[8], float (&slope)[8]) {
    switch (plain) {
    case SILU:      act8_of<SILU>(x, value, slope); break;
    case GELU:      act8_of<GELU>(x, value, slope); break;
    case GELU_TANH: act8_of<GELU_TANH>(x, value, slope); break;
    case SILU_OAI:  act8_of<SILU_OAI>(x, value, slope); break;
    default:        act8_of<RELU>(x, value, slope);
    }
}
#endif
