// api.cu: the one exported symbol of libmoe_cuda.so, the table of its functions; the devices and their error words.
#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "gemm.cuh"
#include "tensor_map.cuh"

// The wires and the yardstick; then the overload with a stream of every function in the table; each is defined in the
// file named like its twin's.
std::remove_pointer_t<decltype(moe_cuda::nccl_id)> moe_nccl_id;
std::remove_pointer_t<decltype(moe_cuda::nccl_open)> moe_nccl_open;
std::remove_pointer_t<decltype(moe_cuda::window_open)> moe_window_open;
std::remove_pointer_t<decltype(moe_cuda::slots_open)> moe_slots_open;
std::remove_pointer_t<decltype(moe_cuda::cublas_gemm)> moe_cublas_gemm;
std::remove_pointer_t<decltype(moe_cuda::cublas_gemm_wgrad)> moe_cublas_gemm_wgrad;
#define X(name) extern std::remove_pointer_t<decltype(moe_cuda::name)> moe_##name;
MOE_CUDA_OPS(X)
MOE_CUDA_WORKSPACES(X)
#undef X

namespace {
enum { MAX_DEVICES = 64 };
thread_local char last_error[1024];
std::mutex making;
// Mapped host memory: a kernel's complaint is read without a copy or a synchronisation. One allocation per device for
// the life of the process.
std::atomic<unsigned long long *> words[MAX_DEVICES];
std::atomic<int> sm_counts[MAX_DEVICES], l2_sizes[MAX_DEVICES];
std::atomic<bool> hopper[MAX_DEVICES];          // and nothing speaks against the kernels of *_sm90.cu

int current_device() {
    int device = 0;
    return cudaGetDevice(&device) == cudaSuccess ? device : 0;
}

int ready(int device) {
    if (device >= 0 && device < MAX_DEVICES && words[device]) return MOE_OK;
    int devices = 0, major = 0, minor = 0, count = 0, l2 = 0;
    const cudaError_t found = cudaGetDeviceCount(&devices);
    if (found == cudaErrorNoDevice || found == cudaErrorInsufficientDriver) {
        (void)cudaGetLastError();
        snprintf(last_error, sizeof last_error, "there is no CUDA device here (%s). Hint: nvidia-smi",
                 cudaGetErrorString(found));
        return MOE_CUDA_FAILED;
    }
    TRY(cuda_status(found, "looking for CUDA devices"));
    if (device < 0 || device >= devices || device >= MAX_DEVICES) {
        snprintf(last_error, sizeof last_error, "there is no CUDA device %d, only %d", device, devices);
        return MOE_CUDA_FAILED;
    }
    TRY(cuda_status(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "reading the device"));
    TRY(cuda_status(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "reading the device"));
    TRY(cuda_status(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "reading the device"));
    TRY(cuda_status(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device), "reading the device"));
    if (major < 8) {
        snprintf(last_error, sizeof last_error,
                 "CUDA device %d is sm_%d%d; these kernels need sm_80 (A100) or newer. Hint: tensor.cpu()", device,
                 major, minor);
        return MOE_CUDA_FAILED;
    }
    const char *const wanted = getenv("MOE_SM90");
    if (wanted && strcmp(wanted, "0") && strcmp(wanted, "1")) {
        snprintf(last_error, sizeof last_error, "MOE_SM90 is \"%.100s\", wanted 0 (no kernels of Hopper's own) or 1",
                 wanted);
        return MOE_CUDA_FAILED;
    }
    std::lock_guard<std::mutex> guard(making);
    if (words[device]) return MOE_OK;
    void *word = nullptr;
    TRY(cuda_status(cudaHostAlloc(&word, sizeof(unsigned long long), cudaHostAllocMapped), "making the error word"));
    *static_cast<unsigned long long *>(word) = 0;
    sm_counts[device] = count;
    l2_sizes[device] = l2;
    hopper[device] = major == 9 && minor == 0 && !(wanted && *wanted == '0') && tensor_maps_here();
    words[device] = static_cast<unsigned long long *>(word);
    return MOE_OK;
}

const char *error() { return last_error; }

int read_verdict(bool wait, const char **op, int64_t *position, cudaStream_t stream) {
    static const char *const names[] = {
#define X(name) #name,
        MOE_CUDA_OPS(X)
#undef X
        "window",
    };
    if (wait) TRY(cuda_status(cudaStreamSynchronize(stream), "waiting for the device"));
    unsigned long long *word = words[current_device()];
    if (!word || !__atomic_load_n(word, __ATOMIC_RELAXED)) return MOE_OK;
    // Cleared when no kernel of this stream can write: the device's atomics and the host's do not exclude each other.
    if (!wait) TRY(cuda_status(cudaStreamSynchronize(stream), "waiting for the device"));
    const unsigned long long said = __atomic_exchange_n(word, 0ull, __ATOMIC_RELAXED);
    *op = names[said >> 48 & 0xff];
    *position = static_cast<int64_t>(said & 0xffffffffffffull);
    return static_cast<int>(said >> 56);
}

std::atomic<int64_t> launched[MOE_WAYS];
std::atomic<int> way_forced{-1}, group_forced{0};

void products(int64_t *counts) { std::copy(std::begin(launched), std::end(launched), counts); }
void force(int way, int group) { way_forced = way, group_forced = group; }

const moe_cuda TABLE = {
    sizeof(moe_cuda), ready, error, read_verdict, moe_nccl_id, moe_nccl_open, moe_window_open,
    moe_slots_open, moe_cublas_gemm, moe_cublas_gemm_wgrad, products, force,
#define X(name) moe_##name,
    MOE_CUDA_OPS(X)
    MOE_CUDA_WORKSPACES(X)
#undef X
};
}  // namespace

extern "C" const moe_cuda *moe_cuda_table(void) { return &TABLE; }

verdict verdict_of(moe_cuda_op op) { return {words[current_device()], static_cast<unsigned long long>(op)}; }
bool sm90_here() { return way_forced != MOE_GEMM && hopper[current_device()]; }
int forced_way() { return way_forced; }
int forced_group() { return group_forced; }
void count_product(moe_way way) { launched[way].fetch_add(1, std::memory_order_relaxed); }
int multiprocessors() { return sm_counts[current_device()]; }
int l2_bytes() { return l2_sizes[current_device()]; }
int cuda_failed(const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(last_error, sizeof last_error, format, values);
    va_end(values);
    return MOE_CUDA_FAILED;
}
int cuda_status(cudaError_t error, const char *what) {
    if (error == cudaSuccess) return MOE_OK;
    (void)cudaGetLastError();       // an error that is not sticky is forgotten: the context stays usable
    snprintf(last_error, sizeof last_error, "%s failed: %s", what, cudaGetErrorString(error));
    return MOE_CUDA_FAILED;
}
