// conformance.cuh: what conformance.cu and conformance_sm90.cu share.
#ifndef MOE_CONFORMANCE_CUH
#define MOE_CONFORMANCE_CUH
#include <cstdio>

#include "../../cuda/common.cuh"

verdict verdict_of(moe_cuda_op) { return {}; }
int multiprocessors() { return 1; }
int cuda_status(cudaError_t error, const char *what) {
    if (error == cudaSuccess) return MOE_OK;
    fprintf(stderr, "%s failed: %s\n", what, cudaGetErrorString(error));
    return MOE_CUDA_FAILED;
}

// A number of any bits for each i.
static __host__ __device__ inline uint32_t bits_of(uint32_t i) {
    uint32_t x = i * 0x9E3779B9u + 0x7F4A7C15u;
    x = (x ^ x >> 16) * 0x85EBCA6Bu;
    x = (x ^ x >> 13) * 0xC2B2AE35u;
    return x ^ x >> 16;
}

struct test {
    const char *name;
    int words, grid, block, shared;
};
// Runs it on `words` zeros and prints their hash behind; false if that failed.
template <class... Params, class... Args>
static bool print_hash(const test &t, void (*kernel)(Params...), Args... args) {
    void *memory;
    if (cuda_status(cudaHostAlloc(&memory, t.words * 4, cudaHostAllocMapped), "cudaHostAlloc")) return false;
    auto *out = static_cast<uint32_t *>(memory);
    memset(out, 0, t.words * 4);
    if (launch(kernel, t.grid, t.block, t.shared, nullptr, args..., out, t.words)) return false;
    if (cuda_status(cudaStreamSynchronize(nullptr), t.name)) return false;
    uint64_t hash = 0xcbf29ce484222325u;                    // FNV-1a
    for (int i = 0; i < t.words; i++) hash = (hash ^ out[i]) * 0x100000001b3u;
    static const char *before = "{\n";
    printf("%s  \"%s\": \"%016llx\"", before, t.name, static_cast<unsigned long long>(hash));
    before = ",\n";
    return true;
}
#endif
