// common.cuh: what every kernel file shares: launch, verdicts, dtypes, 16-byte vectors, reductions.
//
// Style of a kernel file: the contract; then per op the kernel, the pure functions that choose its launch, and the host
// function with the name and arguments of its twin in csrc/, stream last. Sizes are int64_t. No float atomics, no
// static shared memory, no waiting for another block. Fused multiply-adds are spelled fmaf: nothing is contracted.
#ifndef MOE_COMMON_CUH
#define MOE_COMMON_CUH
#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "api.h"
#include "ptx.cuh"

// ---- sizes ----------------------------------------------------------------------------------------------------------
static __host__ __device__ inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static __host__ __device__ inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static __host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static __host__ __device__ inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// ---- dtypes ---------------------------------------------------------------------------------------------------------
static __host__ __device__ inline float bits_float(uint32_t u) {
    union { uint32_t u; float f; } x = {u};
    return x.f;
}
static __device__ inline float to_float(float x) { return x; }
static __device__ inline float to_float(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
static __device__ inline float to_float(f16 x) { return float_f16(x.bits); }
template <class T> static __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline bf16 from_float<bf16>(float x) { return {bits_bf16(x)}; }
template <> __device__ inline f16 from_float<f16>(float x) { return {bits_f16(x)}; }

static inline bool is_float(int dtype) { return dtype == MOE_F32 || dtype == MOE_BF16 || dtype == MOE_F16; }

// f(T{}) for the type of a dtype; MOE_BAD_DTYPE for another.
template <class F>
static int by_float(int dtype, F f) {
    switch (dtype) {
    case MOE_F32:  return f(float{});
    case MOE_BF16: return f(bf16{});
    case MOE_F16:  return f(f16{});
    default:       return MOE_BAD_DTYPE;
    }
}
template <class F>
static int by_int(int dtype, F f) {
    switch (dtype) {
    case MOE_I16: return f(int16_t{});
    case MOE_I32: return f(int32_t{});
    case MOE_I64: return f(int64_t{});
    default:      return MOE_BAD_DTYPE;
    }
}

// 16 bytes at once, where the address is a multiple of 16.
template <class T>
struct alignas(16) vec16 {
    static constexpr int n = 16 / sizeof(T);
    T v[n];
};
static inline bool aligned16(const void *p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// A piece of eight columns, or of the n that a row has left; by 16 bytes where they are aligned.
template <class T>
static __device__ inline void load8(const T *from, int n, float (&x)[8]) {
    constexpr int width = vec16<T>::n;
    if (n == 8 && reinterpret_cast<uintptr_t>(from) % 16 == 0)
        for (int v = 0; v < 8; v += width) {
            const auto piece = *reinterpret_cast<const vec16<T> *>(from + v);
            for (int u = 0; u < width; u++) x[v + u] = to_float(piece.v[u]);
        }
    else
        for (int v = 0; v < 8; v++) x[v] = v < n ? to_float(from[v]) : 0;
}
template <class T>
static __device__ inline void store8(T *to, int n, const float (&x)[8]) {
    constexpr int width = vec16<T>::n;
    if (n == 8 && reinterpret_cast<uintptr_t>(to) % 16 == 0)
        for (int v = 0; v < 8; v += width) {
            vec16<T> piece;
            for (int u = 0; u < width; u++) piece.v[u] = from_float<T>(x[v + u]);
            *reinterpret_cast<vec16<T> *>(to + v) = piece;
        }
    else
        for (int v = 0; v < 8; v++)
            if (v < n) to[v] = from_float<T>(x[v]);
}

// ---- verdicts -------------------------------------------------------------------------------------------------------
// The first complaint of any kernel wins: status in bits 56.., op in bits 48.., position below. The word is mapped host
// memory, where an atomic is one among the kernels of its device, but not against the host.
struct verdict {
    unsigned long long *word;
    unsigned long long  op;
    __device__ void operator()(int status, int64_t position) const {
        const auto p = static_cast<unsigned long long>(position) & 0xffffffffffffull;
        atomicCAS(word, 0ull, static_cast<unsigned long long>(status) << 56 | op << 48 | p);
    }
};
verdict verdict_of(moe_cuda_op op);             // of the current device; `ready` has made its word

// ---- launch ---------------------------------------------------------------------------------------------------------
int cuda_status(cudaError_t error, const char *what);   // MOE_OK, or MOE_CUDA_FAILED with the text for `error`
int cuda_failed(const char *format, ...) __attribute__((format(printf, 1, 2)));    // MOE_CUDA_FAILED with this text
int multiprocessors();                                  // of the current device
int l2_bytes();                                         // of its second-level cache

// kernel<<<grid, block, shared, stream>>>(args...); a grid of no blocks is no launch.
template <class... Params, class... Args>
static int launch(void (*kernel)(Params...), int64_t grid, int block, size_t shared, cudaStream_t stream,
                  Args... args) {
    if (grid == 0) return MOE_OK;
    if (grid > INT32_MAX) return MOE_BAD_SHAPE;
    cudaError_t error = cudaSuccess;
    if (shared > 48 * 1024)
        error = cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(grid));
    config.blockDim = dim3(static_cast<unsigned>(block));
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
    return cuda_status(error, "a kernel launch");
}
// Blocks for n items, `each` per block and pass, when the kernel strides over its grid: as many as the device holds.
static inline int64_t strided_grid(int64_t n, int64_t each) {
    return min64(ceil_div(n, each), static_cast<int64_t>(multiprocessors()) * 16);
}
#define TRY(call) do { const int status_ = (call); if (status_ != MOE_OK) return status_; } while (0)

// The first of n experts whose end is behind `at`; n if there is none. Ends do not decrease.
template <class End>
static __device__ inline int expert_at(int64_t n, int64_t at, End end) {
    int low = 0, high = static_cast<int>(n);
    while (low < high) {
        const int e = (low + high) / 2;
        if (end(e) > at) high = e;
        else low = e + 1;
    }
    return low;
}

// ---- inside a block -------------------------------------------------------------------------------------------------
static __device__ inline int lane_id() { return threadIdx.x & 31; }
static __device__ inline int warp_id() { return threadIdx.x >> 5; }
template <class T>
static __device__ inline T warp_sum(T x) {               // the same tree in every lane
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}
static __device__ inline float warp_max(float x) {
    for (int step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}
// The sum over the block in every thread; shared: 32 T. Starts and ends with a barrier.
template <class T>
static __device__ inline T block_sum(T x, T *shared) {
    x = warp_sum(x);
    __syncthreads();
    if (lane_id() == 0) shared[warp_id()] = x;
    __syncthreads();
    T sum = 0;
    for (int w = 0; w < static_cast<int>(blockDim.x + 31) / 32; w++) sum += shared[w];
    return sum;
}
// The maximum over the block in every thread; NaN counts as nothing. shared: 32 floats. Starts and ends with a barrier.
static __device__ inline float block_max(float x, float *shared) {
    x = warp_max(x);
    __syncthreads();
    if (lane_id() == 0) shared[warp_id()] = x;
    __syncthreads();
    float top = -INFINITY;
    for (int w = 0; w < static_cast<int>(blockDim.x + 31) / 32; w++) top = fmaxf(top, shared[w]);
    return top;
}
// The sum of x over the threads before this one; *total: over all. shared: 32 T. Starts and ends with a barrier.
template <class T>
static __device__ inline T block_exclusive_scan(T x, T *shared, T *total) {
    T inclusive = x;
    for (int step = 1; step < 32; step *= 2) {
        const T before = __shfl_up_sync(0xffffffffu, inclusive, step);
        if (lane_id() >= step) inclusive += before;
    }
    __syncthreads();
    if (lane_id() == 31) shared[warp_id()] = inclusive;
    __syncthreads();
    T base = 0, all = 0;
    for (int w = 0; w < static_cast<int>(blockDim.x) / 32; w++) {
        if (w < warp_id()) base += shared[w];
        all += shared[w];
    }
    *total = all;
    return base + inclusive - x;
}
#endif
