// philox.h: the counter-based random numbers, one at a time: the same code, and so the same bits, in C and in CUDA.
//
//   Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): 4 words = f(counter, key)
//   element  (row, col): counter {low row, high row, col / 4, step}, key {low seed, high seed ^ site}, word col % 4
//   uniform  the upper 24 bits of a word, in [0, 1)
//   normal   Box-Muller on the words (0,1) and (2,3): sqrt(-2 log(1-u0)) * {cos, sin}(2 pi u1)
//
// log, sin and cos are written here with nothing but +, *, fma and integers, and no a*b+c is left for a compiler to
// contract; sqrt is correctly rounded everywhere (not under nvcc's --use_fast_math).
// Errors over all 2^24 arguments: log 8.3e-8 relative, sin and cos 1.1e-7 absolute.
#ifndef MOE_PHILOX_H
#define MOE_PHILOX_H
#include "moe.h"
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#ifdef __CUDACC__
#define PHILOX_FN __host__ __device__ static inline
#else
#define PHILOX_FN static inline
#endif

typedef struct { uint32_t word[4]; } philox_block;

PHILOX_FN philox_block philox(philox_block c, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)c.word[0] * 0xD2511F53u, b = (uint64_t)c.word[2] * 0xCD9E8D57u;
        philox_block next = {{(uint32_t)(b >> 32) ^ c.word[1] ^ key0, (uint32_t)b,
                              (uint32_t)(a >> 32) ^ c.word[3] ^ key1, (uint32_t)a}};
        c = next;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c;
}

// The global number of a matrix's row.
PHILOX_FN int64_t philox_row(const moe_random_key *key, int64_t row) {
    return key->row0 + (key->run ? row / key->run * key->stride + row % key->run : row);
}

// Whether the key is one for so many rows: within its limits, and all row numbers within int64.
PHILOX_FN bool philox_key_ok(const moe_random_key *key, int64_t rows) {
    if (key->step < 0 || key->step > UINT32_MAX || key->site < 0 || key->site > UINT32_MAX) return false;
    if (key->run < 0 || key->row0 < 0 || key->row0 > INT64_MAX - rows) return false;
    const int64_t strides = key->run && rows ? (rows - 1) / key->run : 0;
    return !strides || (key->stride >= key->run && key->stride <= (INT64_MAX - rows - key->row0) / strides);
}

// The words of columns 4*block .. 4*block+3.
PHILOX_FN philox_block philox_at(uint64_t seed, int64_t step, int64_t site, int64_t row, int64_t block) {
    philox_block counter = {{(uint32_t)row, (uint32_t)((uint64_t)row >> 32), (uint32_t)block, (uint32_t)step}};
    return philox(counter, (uint32_t)seed, (uint32_t)(seed >> 32) ^ (uint32_t)site);
}

PHILOX_FN float philox_uniform(uint32_t word) { return (float)(word >> 8) * 0x1p-24f; }

// log(x), 0 < x <= 1 and normal: x = m * 2^e with m in [sqrt(1/2), sqrt(2)), log(m) by the polynomial of Cephes' logf.
PHILOX_FN float philox_log(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    const int32_t e = (bits - 0x3f3504f3) >> 23;                // 0x3f3504f3 is sqrt(1/2)
    bits -= e * (1 << 23);
    float m;
    memcpy(&m, &bits, 4);
    const float f = m - 1.0f, z = f * f;
    float p = 7.0376836292e-2f;
    p = fmaf(p, f, -1.1514610310e-1f);
    p = fmaf(p, f, 1.1676998740e-1f);
    p = fmaf(p, f, -1.2420140846e-1f);
    p = fmaf(p, f, 1.4249322787e-1f);
    p = fmaf(p, f, -1.6668057665e-1f);
    p = fmaf(p, f, 2.0000714765e-1f);
    p = fmaf(p, f, -2.4999993993e-1f);
    p = fmaf(p, f, 3.3333331174e-1f);
    p = fmaf(p * f, z, fmaf((float)e, -2.12194440e-4f, -0.5f * z));     // log 2 = 0.693359375 - 2.12194440e-4
    return fmaf((float)e, 0.693359375f, f + p);
}

// cos and sin of 2 pi k / 2^24: the nearest quarter turn exactly, the rest (|x| <= pi/4) by Cephes' polynomials.
PHILOX_FN void philox_cos_sin(uint32_t k, float *c, float *s) {
    const uint32_t shifted = k + (1u << 21);
    const float x = (float)((int32_t)(shifted & 0x3fffff) - (1 << 21)) * 3.74507039e-7f;       // 2 pi / 2^24
    const float z = x * x;
    const float sine   = fmaf(x * z, fmaf(fmaf(-1.9515295891e-4f, z, 8.3321608736e-3f), z, -1.6666654611e-1f), x);
    const float tail   = fmaf(fmaf(2.443315711809948e-5f, z, -1.388731625493765e-3f), z, 4.166664568298827e-2f);
    const float cosine = fmaf(z * z, tail, fmaf(-0.5f, z, 1.0f));
    const uint32_t quarter = shifted >> 22 & 3;
    const float a = quarter & 1 ? sine : cosine, b = quarter & 1 ? cosine : sine;
    *c = quarter == 1 || quarter == 2 ? -a : a;
    *s = quarter >= 2 ? -b : b;
}

// Two standard normal numbers from two words.
PHILOX_FN void philox_normal(uint32_t word0, uint32_t word1, float *z0, float *z1) {
    const float radius = sqrtf(-2.0f * philox_log(1.0f - philox_uniform(word0)));      // 1-u is exact, in (0, 1]
    float c, s;
    philox_cos_sin(word1 >> 8, &c, &s);
    *z0 = radius * c;
    *z1 = radius * s;
}
#endif
