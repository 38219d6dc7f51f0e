// cuda_runtime.h of the host harness: the words of CUDA C and the few functions of its runtime that cuda/ uses.
#ifndef SIMT_CUDA_RUNTIME_H
#define SIMT_CUDA_RUNTIME_H
#include <cmath>
#include <cstdint>
#include <cstring>

struct bf16;
struct f16;
#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (simt::self->index)
extern dim3 blockIdx, blockDim, gridDim;          // of the running block

// ---- collectives: each knows the line that calls it ---------------------------------------------------------------
#define AT simt::place at = simt::place::current()
inline void __syncthreads(AT) { simt::barrier(at); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, AT) { simt::warp_barrier(mask, at); }
template <class T> T __shfl_sync(uint32_t mask, T x, int from, AT) {
    return simt::shuffle("__shfl_sync", mask, x, from & 31, at);
}
template <class T> T __shfl_xor_sync(uint32_t mask, T x, int with, AT) {
    return simt::shuffle("__shfl_xor_sync", mask, x, simt::lane() ^ with, at);
}
template <class T> T __shfl_up_sync(uint32_t mask, T x, unsigned by, AT) {
    return simt::shuffle("__shfl_up_sync", mask, x, simt::lane() - static_cast<int>(by), at);
}
template <class T> T __shfl_down_sync(uint32_t mask, T x, unsigned by, AT) {
    return simt::shuffle("__shfl_down_sync", mask, x, simt::lane() + static_cast<int>(by), at);
}
uint32_t __ballot_sync(uint32_t mask, int predicate, AT);
uint32_t __match_any_sync(uint32_t mask, unsigned value, AT);
unsigned __reduce_max_sync(uint32_t mask, unsigned value, AT);
inline int __any_sync(uint32_t mask, int predicate, AT) { return __ballot_sync(mask, predicate, at) != 0; }
inline int __all_sync(uint32_t mask, int predicate, AT) { return __ballot_sync(mask, !predicate, at) == 0; }
#undef AT

// ---- atomics: one fiber runs at a time, but the shuffled schedule lets others go first; relaxed, as on a GPU ---------
#define RMW template <class T> __attribute__((noinline, no_sanitize("thread"))) T
#define BEFORE(p) (simt::maybe_yield(), RACE(access(race::ATOMIC, p, sizeof *p, __builtin_return_address(0))))
RMW atomicAdd(T *p, T x) { BEFORE(p); const T old = *p; *p = static_cast<T>(old + x); return old; }
RMW atomicMax(T *p, T x) { BEFORE(p); const T old = *p; if (x > old) *p = x; return old; }
RMW atomicOr(T *p, T x) { BEFORE(p); const T old = *p; *p = old | x; return old; }
RMW atomicCAS(T *p, T expected, T x) { BEFORE(p); const T old = *p; if (old == expected) *p = x; return old; }
RMW atomicCAS_system(T *p, T expected, T x) {
    BEFORE(p);
    __atomic_compare_exchange_n(p, &expected, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return expected;
}
#undef RMW
#undef BEFORE
inline void __threadfence_system() { fence_system(); }

// ---- arithmetic -----------------------------------------------------------------------------------------------------
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline uint32_t __float_as_uint(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
inline int __float_as_int(float x) { int u; memcpy(&u, &x, 4); return u; }
inline float __int_as_float(int u) { float x; memcpy(&x, &u, 4); return x; }

// ---- the runtime ----------------------------------------------------------------------------------------------------
typedef struct CUstream_st *cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2,
                   cudaErrorInsufficientDriver = 35, cudaErrorNoDevice = 100, cudaErrorNotReady = 600,
                   cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor,
                      cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrL2CacheSize };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum { cudaHostAllocMapped = 2 };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3, cudaMemcpyDefault = 4 };
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};
const char *cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDeviceCount(int *n);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned flags);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaMemset2DAsync(void *p, size_t pitch, int value, size_t bytes, size_t rows, cudaStream_t stream);
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1,
                                       cudaDriverEntryPointVersionNotSufficent = 2 };
enum { cudaEnableDefault = 0 };
// Finds cuTensorMapEncodeTiled (cuda.h), on a device of compute capability 9.0 as on any other.
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, cudaDriverEntryPointQueryResult *found);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);

#include "ipc.h"

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Params...), Args &&...args) {
    auto body = [&] { kernel(static_cast<Params>(args)...); };
    const bool ran = simt::launch(reinterpret_cast<const void *>(kernel), config->gridDim, config->blockDim,
                                  config->dynamicSmemBytes, [](void *f) { (*static_cast<decltype(body) *>(f))(); },
                                  &body);
    return ran ? cudaSuccess : cudaErrorLaunchFailure;
}
#endif
