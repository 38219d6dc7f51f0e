// conformance.cu: does a GPU do what the host harness believes? One small kernel per instruction of ptx.cuh, and per
// primitive that the kernels rely on, writes integers; their hashes must be equal on the host (g++ and tests/simt, in
// tests/test_conformance.py) and on a GPU (nvcc, in `make gpu`). Prints {"name": "hash", ..}.
//
// Arithmetic is on small integers, or on single operations that IEEE 754 rounds one way, so there is one right answer.
// NaNs count as one NaN: sign and payload may differ.
#include "../../csrc/philox.h"
#include "conformance.cuh"

static __device__ inline uint32_t float_bits(float x) { return x != x ? 0x7fffffffu : __float_as_uint(x); }
// Every upper half of a float, with lower halves around the ties of bf16 and f16.
static __device__ inline float some_float(uint32_t i) {
    const uint16_t low[] = {0,      1,      0x0fff, 0x1000, 0x1001, 0x1fff, 0x2000, 0x3000,
                            0x5000, 0x7000, 0x7fff, 0x8000, 0x8001, 0xb000, 0xf000, 0xffff};
    return __uint_as_float(i / 16 << 16 | low[i % 16]);
}
static __device__ inline int thread_of_grid() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }
#define EACH(i, n) (int i = thread_of_grid(); i < (n); i += static_cast<int>(gridDim.x * blockDim.x))

// ---- conversions ----------------------------------------------------------------------------------------------------
static __global__ void bf16_from_float(uint32_t *out, int n) {
    for EACH(i, n) { const float x = some_float(i); out[i] = x != x ? 0x7fff : bits_bf16(x); }
}
static __global__ void f16_from_float(uint32_t *out, int n) {
    for EACH(i, n) { const float x = some_float(i); out[i] = x != x ? 0x7fff : bits_f16(x); }
}
static __global__ void float_from_f16(uint32_t *out, int n) {
    for EACH(i, n) out[i] = float_bits(float_f16(static_cast<uint16_t>(i)));
}
static __global__ void float_from_bf16(uint32_t *out, int n) {
    for EACH(i, n) out[i] = float_bits(to_float(bf16{static_cast<uint16_t>(i)}));
}
static __global__ void integers_and_floats(uint32_t *out, int n) {
    for EACH(i, n) {
        const uint32_t x = bits_of(i);
        const float f = static_cast<float>(static_cast<int32_t>(x));
        out[i] = __float_as_uint(f) ^ __float_as_uint(static_cast<float>(x)) * 3 ^
                 static_cast<uint32_t>(static_cast<int32_t>(f * 0x1p-8f));
    }
}

// ---- arithmetic that IEEE 754 decides -------------------------------------------------------------------------------
static __global__ void sums_and_products(uint32_t *out, int n) {
    for EACH(i, n) {
        const float a = __uint_as_float(bits_of(3 * i)), b = __uint_as_float(bits_of(3 * i + 1));
        out[i] = float_bits(a + b) ^ float_bits(a * b) * 3;
    }
}
static __global__ void fused_multiply_add(uint32_t *out, int n) {
    for EACH(i, n) {
        const float a = __uint_as_float(bits_of(3 * i)), b = __uint_as_float(bits_of(3 * i + 1));
        const float c = i % 2 ? -(a * b) : __uint_as_float(bits_of(3 * i + 2));   // odd: what rounding lost
        out[i] = float_bits(fmaf(a, b, c));
    }
}
static __global__ void quotients_and_roots(uint32_t *out, int n) {
    for EACH(i, n) {
        const float a = __uint_as_float(bits_of(2 * i)), b = __uint_as_float(bits_of(2 * i + 1));
        out[i] = float_bits(a / b) ^ float_bits(sqrtf(fabsf(a))) * 3;
    }
}
static __global__ void philox_numbers(uint32_t *out, int n) {
    for EACH(i, n / 8) {
        const philox_block b = philox_at(bits_of(i) * 0x100000001ull, i, 7, i * INT64_C(0x10000001), i % 5);
        for (int w = 0; w < 4; w++) out[8 * i + w] = b.word[w];
        for (int w = 0; w < 4; w += 2) {
            float z0, z1;
            philox_normal(b.word[w], b.word[w + 1], &z0, &z1);
            out[8 * i + 4 + w] = __float_as_uint(z0), out[8 * i + 5 + w] = __float_as_uint(z1);
        }
    }
}

// ---- within a warp and a block --------------------------------------------------------------------------------------
enum { SHUFFLES = 10 };
static __global__ void shuffles_and_votes(uint32_t *out, int n) {
    for EACH(i, n / SHUFFLES) {
        const uint32_t x = bits_of(i), all = 0xffffffffu;
        uint32_t *y = out + SHUFFLES * i;
        const uint32_t half = lane_id() < 16 ? 0x0000ffffu : 0xffff0000u;
        y[0] = __shfl_sync(all, x, static_cast<int>(x & 31));
        y[1] = __shfl_xor_sync(all, x, 21);
        y[2] = __shfl_up_sync(all, x, 5);
        y[3] = __shfl_down_sync(all, x, 9);
        y[4] = __ballot_sync(half, (x & 3) == 0);
        y[5] = __match_any_sync(all, x & 7);
        y[6] = static_cast<uint32_t>(__any_sync(all, (x & 63) == 0) != 0) | (__all_sync(half, x & 15) != 0) << 1;
        y[7] = static_cast<uint32_t>(__popc(x) | __clz(static_cast<int>(x >> x % 31)) << 8 | __ffs(x << x % 31) << 16);
        y[8] = static_cast<uint32_t>(warp_sum(static_cast<int>(x >> 8)));
        y[9] = __float_as_uint(warp_max(static_cast<float>(static_cast<int>(x >> 8) - (1 << 23))));
    }
}
static __global__ void scans_of_a_block(uint32_t *out, int) {
    auto *shared = reinterpret_cast<uint32_t *>(shared_memory());
    const int t = threadIdx.x;
    uint32_t total, before = block_exclusive_scan(bits_of(t) >> 8, shared, &total);
    out[3 * t] = before, out[3 * t + 1] = total, out[3 * t + 2] = block_sum(bits_of(t + 500), shared);
}
static __global__ void atomics(uint32_t *out, int) {
    for (int i = 0; i < 64; i++) {
        const uint32_t x = bits_of(thread_of_grid() * 64 + i);
        atomicAdd(out, x);
        atomicMax(out + 1, x);
        atomicAdd(reinterpret_cast<int *>(out) + 3 + x % 13, -1);
        atomicOr(out + 16, 1u << x % 32);
        atomicCAS(out + 17 + x % 15, 0u, x % 15 + 1);
    }
}

// ---- shared memory and tensor cores ---------------------------------------------------------------------------------
// A warp: 64 rows of 16 bytes, each lane naming a row of its own.
static __global__ void ldmatrix(uint32_t *out, int) {
    auto *rows = reinterpret_cast<uint16_t *>(shared_memory());
    const int l = lane_id();
    for (int i = l; i < 64 * 8; i += 32) rows[i] = static_cast<uint16_t>(i);
    __syncthreads();
    uint32_t r[4], t[4];
    const uint32_t row = shared_u32(rows) + (l * 37 + 11) % 64 * 16;
    ldmatrix_x4(r, row);
    ldmatrix_x4_trans(t, row);
    for (int m = 0; m < 4; m++) out[8 * l + m] = r[m], out[8 * l + 4 + m] = t[m];
}
// A warp: three products of integers in [-8, 8) into one sum, exact in any order of adding.
template <class T>
static __global__ void mma(uint32_t *out, int) {
    const int l = lane_id();
    float c[4];
    for (int i = 0; i < 4; i++) c[i] = static_cast<float>(l * 4 + i);
    for (int k = 0; k < 3; k++) {
        uint32_t a[4], b[2];
        const auto pair = [&](int i) {
            const uint32_t x = bits_of((k * 32 + l) * 6 + i);
            const T low = from_float<T>(static_cast<float>(x % 16) - 8);
            const T high = from_float<T>(static_cast<float>(x / 16 % 16) - 8);
            return static_cast<uint32_t>(high.bits) << 16 | low.bits;
        };
        for (int i = 0; i < 4; i++) a[i] = pair(i);
        for (int i = 0; i < 2; i++) b[i] = pair(4 + i);
        mma_16816(T{}, c, a, b);
    }
    for (int i = 0; i < 4; i++) out[4 * l + i] = static_cast<uint32_t>(static_cast<int32_t>(c[i]));
}
// A block of 64: three stages of copies of 0..16 bytes, read as their groups complete.
static __global__ void cp_async(uint32_t *out, int) {
    auto *to = reinterpret_cast<uint32_t *>(shared_memory());
    uint32_t *from = out + 64 * 12;                         // what is copied lies behind the results
    const int t = threadIdx.x;
    for (int i = t; i < 64 * 12; i += 64) from[i] = bits_of(i), to[i] = 0xdeadbeefu;
    fence_system();
    __syncthreads();
    for (int stage = 0; stage < 3; stage++) {
        const int at = (stage * 64 + (t * 5 + stage) % 64) * 4;
        cp_async_16(shared_u32(to + at), from + at, (t + stage) % 17);
        cp_async_commit();
    }
    const auto read = [&](int stage) {
        __syncthreads();
        for (int w = 0; w < 4; w++) out[(stage * 64 + t) * 4 + w] = to[(stage * 64 + t) * 4 + w];
    };
    cp_async_wait<2>();
    read(0);
    cp_async_wait<1>();
    read(1);
    cp_async_wait<0>();
    read(2);
}
static __global__ void flags(uint32_t *out, int) {
    const int t = threadIdx.x;
    store_release_system(out + t, bits_of(t));
    fence_system();
    out[32 + t] = load_acquire_system(out + t);
    if (t == 0) atomicCAS(reinterpret_cast<unsigned long long *>(out + 64), 0ull, 0x123456789abcdefull);
}

// ---- the list -------------------------------------------------------------------------------------------------------
static const struct { test t; void (*kernel)(uint32_t *, int); } TESTS[] = {
    {{"bf16 from float", 1 << 20, 16, 256, 0}, bf16_from_float},
    {{"f16 from float", 1 << 20, 16, 256, 0}, f16_from_float},
    {{"float from f16", 1 << 16, 16, 256, 0}, float_from_f16},
    {{"float from bf16", 1 << 16, 16, 256, 0}, float_from_bf16},
    {{"integers and floats", 1 << 16, 16, 256, 0}, integers_and_floats},
    {{"sums and products", 1 << 18, 16, 256, 0}, sums_and_products},
    {{"fused multiply-add", 1 << 18, 16, 256, 0}, fused_multiply_add},
    {{"quotients and roots", 1 << 18, 16, 256, 0}, quotients_and_roots},
    {{"philox", 1 << 18, 16, 256, 0}, philox_numbers},
    {{"shuffles and votes", 512 * SHUFFLES, 2, 256, 0}, shuffles_and_votes},
    {{"scans of a block", 3 * 512, 1, 512, 32 * 4}, scans_of_a_block},
    {{"atomics", 32, 4, 96, 0}, atomics},
    {{"ldmatrix", 32 * 8, 1, 32, 64 * 16}, ldmatrix},
    {{"mma bf16", 32 * 4, 1, 32, 0}, mma<bf16>},
    {{"mma f16", 32 * 4, 1, 32, 0}, mma<f16>},
    {{"cp.async", 2 * 64 * 12, 1, 64, 64 * 12 * 4}, cp_async},
    {{"flags", 66, 1, 32, 0}, flags},
};

int main() {
    for (const auto &[t, kernel] : TESTS)
        if (!print_hash(t, kernel)) return 1;
    printf("\n}\n");
    return 0;
}
