// toy.cu: the harness's own test: small kernels, each right and with one mistake that the harness must find.
//
// Every kernel is right as kernel<false> and leaves out[i] = i + 1; kernel<true> has the mistake that its comment names.
// One warp or two per block, two blocks.
#include "../../cuda/ptx.cuh"

#include <cuda_runtime.h>

namespace {
enum { THREADS = 64, BLOCKS = 2, N = THREADS * BLOCKS };

__device__ int global_id() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }
__device__ float *floats() { return reinterpret_cast<float *>(shared_memory()); }

// A barrier is missing between a store and another thread's load.
template <bool bad> __global__ void no_barrier(const float *, float *out) {
    const int t = threadIdx.x;
    floats()[t] = static_cast<float>(global_id() + 1);
    if (!bad) __syncthreads();
    out[global_id() ^ 33] = floats()[t ^ 33];
}
// The same within a warp.
template <bool bad> __global__ void no_warp_barrier(const float *, float *out) {
    const int t = threadIdx.x;
    floats()[t] = static_cast<float>(global_id() + 1);
    if (!bad) __syncwarp();
    const float next = floats()[t ^ 1];
    out[global_id() ^ 1] = next;
}
// Lanes 0-15 and 16-31 meet apart, and then read across.
template <bool bad> __global__ void half_barriers(const float *, float *out) {
    const int t = threadIdx.x, with = bad ? 16 : 8;
    floats()[t] = static_cast<float>(global_id() + 1);
    __syncwarp(t & 16 ? 0xffff0000u : 0x0000ffffu);
    out[global_id() ^ with] = floats()[t ^ with];
}
// cp.async without its wait.
template <bool bad> __global__ void no_wait(const float *in, float *out) {
    const int t = threadIdx.x;
    cp_async_16(shared_u32(floats() + 4 * t), in + 4 * (global_id() / 4), 16);
    cp_async_commit();
    if (!bad) cp_async_wait<0>();
    out[global_id()] = floats()[4 * t + t % 4];
}
// Waits for all but one group, where the newest is needed.
template <bool bad> __global__ void short_wait(const float *in, float *out) {
    const int t = threadIdx.x;
    for (int stage = 0; stage < 2; stage++) {
        cp_async_16(shared_u32(floats() + 4 * (t + 64 * stage)), in + 4 * (global_id() / 4), 16);
        cp_async_commit();
    }
    cp_async_wait<bad ? 1 : 0>();
    __syncthreads();
    const int other = t ^ 32;
    out[global_id() ^ 32] = floats()[4 * (other + 64) + t % 4];
}
// A stage is filled again while another thread still reads it.
template <bool bad> __global__ void early_refill(const float *in, float *out) {
    const int t = threadIdx.x;
    float sum = 0;
    for (int round = 0; round < 3; round++) {
        cp_async_16(shared_u32(floats() + 4 * t), in + 4 * (global_id() / 4), round == 1 ? 16 : 0);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        sum += floats()[4 * (t ^ 32) + t % 4];
        if (!bad) __syncthreads();
    }
    out[global_id() ^ 32] = sum;
}
// Half of the block is at one barrier, half at another.
template <bool bad> __global__ void two_barriers(const float *, float *out) {
    if (bad && threadIdx.x < 32) __syncthreads();
    else __syncthreads();
    out[global_id()] = static_cast<float>(global_id() + 1);
}
// Half of the block has ended when the rest wait.
template <bool bad> __global__ void early_end(const float *, float *out) {
    out[global_id()] = static_cast<float>(global_id() + 1);
    if (bad && threadIdx.x >= 32) return;
    __syncthreads();
}
// One lane waits for the block while its warp waits for it.
template <bool bad> __global__ void crossed_waits(const float *, float *out) {
    if (bad && threadIdx.x == 7) __syncthreads();
    const int votes = __popc(__ballot_sync(0xffffffffu, 1));
    if (!bad || threadIdx.x != 7) __syncthreads();
    out[global_id()] = static_cast<float>(global_id() + 1 + votes - 32);
}
// Lanes of one warp are at different shuffles.
template <bool bad> __global__ void two_shuffles(const float *, float *out) {
    float x = static_cast<float>(global_id() + 1);
    if (bad && threadIdx.x % 2) x = __shfl_sync(0xffffffffu, x, threadIdx.x);
    else x = __shfl_sync(0xffffffffu, x, threadIdx.x);
    out[global_id()] = x;
}
// A shuffle reads a lane that does not take part.
template <bool bad> __global__ void absent_lane(const float *, float *out) {
    float x = static_cast<float>(global_id() + 1);
    if (threadIdx.x % 32 < 16) x = __shfl_sync(0x0000ffffu, x, bad ? 20 : static_cast<int>(threadIdx.x));
    out[global_id()] = x;
}
// A lane that is not in its own mask.
template <bool bad> __global__ void not_in_mask(const float *, float *out) {
    __syncwarp(bad ? 0x0000ffffu : 0xffffffffu);
    out[global_id()] = static_cast<float>(global_id() + 1);
}
// Past the end of shared memory, by a plain store.
template <bool bad> __global__ void beyond_shared(const float *, float *out) {
    const int t = threadIdx.x, at = bad && t == 63 ? 2064 / 4 : t;
    floats()[at] = static_cast<float>(global_id() + 1);
    out[global_id()] = floats()[at];
}
// The same by cp.async.
template <bool bad> __global__ void copy_beyond_shared(const float *in, float *out) {
    const int t = threadIdx.x;
    cp_async_16(shared_u32(floats()) + 16u * static_cast<unsigned>(t + (bad ? 66 : 0)), in + 4 * (global_id() / 4), 16);
    cp_async_commit();
    cp_async_wait<0>();
    out[global_id()] = floats()[4 * t + t % 4];
}
// A row of ldmatrix that is not 16-byte aligned.
template <bool bad> __global__ void crooked_row(const float *, float *out) {
    const int t = threadIdx.x;
    for (int i = 0; i < 8; i++) floats()[8 * t + i] = 0;
    __syncthreads();
    uint32_t r[4];
    ldmatrix_x4(r, shared_u32(floats() + 8 * t) + (bad ? 8 : 16));
    out[global_id()] = static_cast<float>(global_id() + 1) + static_cast<float>(r[0]);
}
// Shared memory is read that nobody has written.
template <bool bad> __global__ void never_written(const float *, float *out) {
    const int t = threadIdx.x;
    floats()[t] = 0;
    out[global_id()] = static_cast<float>(global_id() + 1) + floats()[bad ? THREADS + t : t];
}
// Two blocks store to one place.
template <bool bad> __global__ void same_place(const float *, float *out) {
    if (bad && threadIdx.x == 0) out[N - 1] = static_cast<float>(blockIdx.x);
    if (!bad || global_id() < N - 1) out[global_id()] = static_cast<float>(global_id() + 1);
}
// A block reads what another wrote in the same launch.
template <bool bad> __global__ void across_blocks(const float *, float *out) {
    const int i = global_id();
    out[i] = static_cast<float>(i + 1);
    if (bad) out[i] = out[(i + THREADS) % N] * 0 + static_cast<float>(i + 1);
}
// A plain store beside atomics.
template <bool bad> __global__ void half_atomic(const float *, float *out) {
    auto *count = reinterpret_cast<unsigned *>(shared_memory());
    if (threadIdx.x == 0) *count = 0;
    if (!bad) __syncthreads();
    atomicAdd(count, 1u);
    __syncthreads();
    out[global_id()] = static_cast<float>(global_id() + 1) + static_cast<float>(static_cast<int>(*count) - THREADS);
}
// Each thread takes the place that a counter hands it: the result hangs on who came first.
template <bool bad> __global__ void first_come(const float *, float *out) {
    auto *count = reinterpret_cast<int *>(shared_memory());
    if (threadIdx.x == 0) *count = 0;
    __syncthreads();
    const int place = bad ? atomicAdd(count, 1) : static_cast<int>(threadIdx.x);
    out[blockIdx.x * THREADS + static_cast<unsigned>(place)] = static_cast<float>(global_id() + 1);
}
// A flag that nobody raises.
template <bool bad> __global__ void no_flag(const float *, float *out) {
    auto *flag = reinterpret_cast<uint32_t *>(shared_memory());
    if (threadIdx.x == 0) store_release_system(flag, bad ? 0 : 1);
    __syncthreads();
    while (!load_acquire_system(flag)) spin();
    out[global_id()] = static_cast<float>(global_id() + 1);
}
// Past the end of an array, at a load and at a store.
template <bool bad> __global__ void read_beyond(const float *in, float *out) {
    out[global_id()] = in[bad && global_id() == N - 1 ? N : global_id()];
}
template <bool bad> __global__ void write_beyond(const float *in, float *out) {
    out[bad && global_id() == N - 1 ? N : global_id()] = in[global_id()];
}

struct toy {
    const char *name;
    void (*right)(const float *, float *), (*wrong)(const float *, float *);
};
#define TOY(name) {#name, name<false>, name<true>}
const toy TOYS[] = {
    TOY(no_barrier), TOY(no_warp_barrier), TOY(half_barriers), TOY(no_wait), TOY(short_wait), TOY(early_refill),
    TOY(two_barriers), TOY(early_end), TOY(crossed_waits), TOY(two_shuffles), TOY(absent_lane), TOY(not_in_mask),
    TOY(beyond_shared), TOY(copy_beyond_shared), TOY(crooked_row), TOY(never_written), TOY(same_place),
    TOY(across_blocks), TOY(half_atomic), TOY(first_come), TOY(no_flag), TOY(read_beyond), TOY(write_beyond),
};
}  // namespace

// Runs a toy on in[N], out[N]; NULL, or what the harness found.
extern "C" __attribute__((visibility("default"))) const char *run_toy(const char *name, int wrong, const float *in,
                                                                      float *out) {
    for (const toy &t : TOYS) {
        if (strcmp(t.name, name)) continue;
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(BLOCKS), config.blockDim = dim3(THREADS), config.dynamicSmemBytes = 2048 + 16;
        const cudaError_t error = cudaLaunchKernelEx(&config, wrong ? t.wrong : t.right, in, out);
        return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
    }
    return "no such toy";
}
