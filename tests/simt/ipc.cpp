// ipc.cpp: memory between processes for the host harness. A device allocation is a memory file; its handle names the
// process and the file, so that nothing is left behind by a process that was killed.
#include <cuda_runtime.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <climits>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <mutex>

#define FOR_TESTS extern "C" __attribute__((visibility("default")))
FOR_TESTS int simt_stuck, simt_held;
int simt_stuck = 0, simt_held = 0;

namespace {
struct allocation { int file; size_t bytes; };
struct handle { int process, file; size_t bytes; };
std::mutex lock;
std::map<void *, allocation> &allocations() {
    static std::map<void *, allocation> all;
    return all;
}

cudaError_t map_file(void **p, int file, size_t bytes, int keep) {
    *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (*p == MAP_FAILED) return cudaErrorMemoryAllocation;
    std::lock_guard<std::mutex> guard(lock);
    allocations()[*p] = {keep, bytes};
    return cudaSuccess;
}
cudaError_t release(void *p) {
    if (!p) return cudaSuccess;
    std::lock_guard<std::mutex> guard(lock);
    auto found = allocations().find(p);
    if (found == allocations().end()) return cudaErrorInvalidValue;
    munmap(p, found->second.bytes);
    if (found->second.file >= 0) close(found->second.file);
    allocations().erase(found);
    return cudaSuccess;
}
}  // namespace

cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaMalloc(void **p, size_t bytes) {
    bytes = bytes ? bytes : 1;
    const int file = memfd_create("simt", 0);
    if (file < 0 || ftruncate(file, static_cast<off_t>(bytes))) return cudaErrorMemoryAllocation;
    const cudaError_t error = map_file(p, file, bytes, file);
    if (error == cudaSuccess) memset(*p, 0xff, bytes);
    return error;
}
cudaError_t cudaFree(void *p) { return release(p); }
cudaError_t cudaFreeHost(void *p) { free(p); return cudaSuccess; }
cudaError_t cudaMemset(void *p, int value, size_t bytes) { memset(p, value, bytes); return cudaSuccess; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    *event = static_cast<cudaEvent_t>(malloc(1));
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t) {
    return __atomic_load_n(&simt_stuck, __ATOMIC_RELAXED) ? cudaErrorNotReady : cudaSuccess;
}

static std::deque<std::function<void()>> held;
static cudaError_t queue(std::function<void()> work) {
    if (simt_held) held.push_back(work);
    else work();
    return cudaSuccess;
}
FOR_TESTS void simt_run(int n) {
    for (; n > 0 && !held.empty(); n--, held.pop_front()) held.front()();
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    return queue([=] { memcpy(to, from, bytes); });
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, void (*function)(void *), void *arg) {
    return queue([=] { function(arg); });
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
    simt_run(INT_MAX);
    return cudaSuccess;
}

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *out, void *p) {
    std::lock_guard<std::mutex> guard(lock);
    auto found = allocations().find(p);
    if (found == allocations().end() || found->second.file < 0) return cudaErrorInvalidValue;
    const handle h = {getpid(), found->second.file, found->second.bytes};
    memset(out, 0, sizeof *out);
    memcpy(out, &h, sizeof h);
    return cudaSuccess;
}
cudaError_t cudaIpcOpenMemHandle(void **p, cudaIpcMemHandle_t in, unsigned) {
    handle h;
    memcpy(&h, &in, sizeof h);
    if (h.process == getpid()) return cudaErrorInvalidValue;        // as CUDA: a process does not open its own
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", h.process, h.file);
    const int file = open(path, O_RDWR);
    if (file < 0) return cudaErrorInvalidValue;
    const cudaError_t error = map_file(p, file, h.bytes, -1);
    close(file);
    return error;
}
cudaError_t cudaIpcCloseMemHandle(void *p) { return release(p); }
