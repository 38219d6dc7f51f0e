// twins.cpp: the host's twins of the instructions in ptx.cuh, of CUDA's votes, and of the few functions of its runtime.
#include "../../cuda/ptx.cuh"

#include <cuda_runtime.h>
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "internal.h"

// ---- cp.async -------------------------------------------------------------------------------------------------------
// A copy happens at once, when its group is waited for, or at a moment in between that the seed picks. Until then its
// target is NaN: the old bytes may be gone as soon as the copy is under way.
namespace simt {
namespace {
struct copy {
    unsigned char *to;
    const void    *from;
    int            bytes, group;
    bool           done;
};
struct agent {                              // of one thread
    std::vector<copy> copies;               // not waited for
    int               groups = 0;           // committed
};
agent agents[1024];

void finish(copy &c) {
    if (c.done) return;
    memset(c.to, 0, 16);
    if (c.bytes) memcpy(c.to, c.from, static_cast<size_t>(c.bytes));
    c.done = true;
}
}  // namespace

void forget_copies() {
    for (agent &a : agents) a.copies.clear(), a.groups = 0;
}
void cp_async_16(uint32_t to, const void *from, int bytes, [[maybe_unused]] place at) {
    if (bytes < 0 || bytes > 16) fail("cp.async of %d bytes", bytes);
    if (reinterpret_cast<uintptr_t>(from) % 16) fail("cp.async from an address that is not a multiple of 16");
    agent &me = agents[self->linear];
    copy c = {shared_at(to, 16, 16), from, bytes, me.groups, false};
    RACE(async_begin(c.to, 16, LINE(at)));
    if (bytes) RACE(access(race::READ, from, static_cast<size_t>(bytes), LINE(at)));
    memset(c.to, 0xff, 16);
    if (async_timing() == EARLY || (async_timing() == RANDOM && random_number() % 2)) finish(c);
    me.copies.push_back(c);
    if (async_timing() == RANDOM) finish(me.copies[random_number() % me.copies.size()]);
}
void cp_async_commit() { agents[self->linear].groups++; }
void cp_async_wait(int pending) {
    agent &a = agents[self->linear];
    size_t kept = 0;
    for (copy &c : a.copies) {
        if (c.group >= a.groups - pending) { a.copies[kept++] = c; continue; }
        finish(c);
        RACE(async_end(c.to, 16, self->linear));
    }
    a.copies.resize(kept);
}
}  // namespace simt

// ---- matrix instructions --------------------------------------------------------------------------------------------
namespace {
struct ldmatrix_args { uint32_t *r; uint32_t row; bool trans; };
void ldmatrix_meet(void **args, uint32_t) {
    for (int m = 0; m < 4; m++) {
        uint16_t matrix[8][8];
        for (int i = 0; i < 8; i++)
            memcpy(matrix[i], simt::shared_at(static_cast<ldmatrix_args *>(args[8 * m + i])->row, 16, 16), 16);
        for (int l = 0; l < 32; l++) {
            auto *a = static_cast<ldmatrix_args *>(args[l]);
            const int i = l / 4, j = l % 4 * 2;
            const uint16_t low = a->trans ? matrix[j][i] : matrix[i][j], high = a->trans ? matrix[j + 1][i] : matrix[i][j + 1];
            a->r[m] = static_cast<uint32_t>(high) << 16 | low;
        }
    }
}
template <class T> float element(uint32_t word, int half) {
    const uint16_t h = static_cast<uint16_t>(half ? word >> 16 : word);
    if constexpr (std::is_same_v<T, f16>) return float_f16(h);
    uint32_t u = static_cast<uint32_t>(h) << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
}
struct mma_args { float *c; const uint32_t *a, *b; };
template <class T> void mma_meet(void **args, uint32_t) {
    float A[16][16], B[16][8], C[16][8];
    for (int l = 0; l < 32; l++) {
        auto *x = static_cast<mma_args *>(args[l]);
        for (int r = 0; r < 4; r++)
            for (int h = 0; h < 2; h++) A[l / 4 + 8 * (r & 1)][2 * (l % 4) + h + 8 * (r >> 1)] = element<T>(x->a[r], h);
        for (int r = 0; r < 2; r++)
            for (int h = 0; h < 2; h++) B[2 * (l % 4) + h + 8 * r][l / 4] = element<T>(x->b[r], h);
        for (int r = 0; r < 4; r++) C[l / 4 + 8 * (r >> 1)][2 * (l % 4) + (r & 1)] = x->c[r];
    }
    for (int k = 0; k < 16; k++)
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 8; j++) C[i][j] += A[i][k] * B[k][j];
    for (int l = 0; l < 32; l++)
        for (int r = 0; r < 4; r++) static_cast<mma_args *>(args[l])->c[r] = C[l / 4 + 8 * (r >> 1)][2 * (l % 4) + (r & 1)];
}
template <class T> void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::place at) {
    mma_args x = {c, a, b};
    simt::warp_meet("mma", 0xffffffffu, &x, mma_meet<T>, at);
}
}  // namespace
void ldmatrix_x4(uint32_t (&r)[4], uint32_t row, simt::place at) {
    ldmatrix_args a = {r, row, false};
    RACE(access(race::READ, simt::shared_at(row, 16, 16), 16, __builtin_return_address(0)));
    simt::warp_meet("ldmatrix", 0xffffffffu, &a, ldmatrix_meet, at);
}
void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row, simt::place at) {
    ldmatrix_args a = {r, row, true};
    RACE(access(race::READ, simt::shared_at(row, 16, 16), 16, __builtin_return_address(0)));
    simt::warp_meet("ldmatrix.trans", 0xffffffffu, &a, ldmatrix_meet, at);
}
void mma_16816(bf16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::place at) {
    mma<bf16>(c, a, b, at);
}
void mma_16816(f16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::place at) {
    mma<f16>(c, a, b, at);
}

// ---- conversions: to nearest even -----------------------------------------------------------------------------------
uint16_t bits_bf16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    if (x != x) return static_cast<uint16_t>(u >> 16 | 0x40);
    return static_cast<uint16_t>((u + (u >> 16 & 1) + 0x7fff) >> 16);
}
uint16_t bits_f16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    const uint32_t size = u & 0x7fffffff, sign = u >> 16 & 0x8000;
    if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (size >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
    if (size >= 0x38800000) return static_cast<uint16_t>(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(std::fabs(x) * 0x1p24f)));
}
float float_f16(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, size = h & 0x7fffu;
    float x;
    if (size < 0x400) x = static_cast<float>(size) * 0x1p-24f;
    else {
        const uint32_t u = size >= 0x7c00 ? size << 13 | 0x7f800000 : (size << 13) + 0x38000000;
        memcpy(&x, &u, 4);
    }
    uint32_t u;
    memcpy(&u, &x, 4);
    u |= sign;
    memcpy(&x, &u, 4);
    return x;
}

// ---- memory between processes ---------------------------------------------------------------------------------------
uint32_t load_acquire_system(const uint32_t *p) {
    RACE(access(race::ATOMIC, p, 4, __builtin_return_address(0)));
    return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
void store_release_system(uint32_t *p, uint32_t v) {
    RACE(access(race::ATOMIC, p, 4, __builtin_return_address(0)));
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
}
void fence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void spin(simt::place at) { simt::yield(at); }
uint64_t nanoseconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<uint64_t>(t.tv_sec) * 1000000000u + static_cast<uint64_t>(t.tv_nsec);
}

// ---- votes ----------------------------------------------------------------------------------------------------------
namespace {
struct vote_args { unsigned in; uint32_t out; };
}
uint32_t __ballot_sync(uint32_t mask, int predicate, simt::place at) {
    vote_args a = {predicate != 0, 0};
    simt::warp_meet("__ballot_sync", mask, &a, [](void **args, uint32_t mask) {
        uint32_t votes = 0;
        for (int l = 0; l < 32; l++) if (mask >> l & 1 && static_cast<vote_args *>(args[l])->in) votes |= 1u << l;
        for (int l = 0; l < 32; l++) if (mask >> l & 1) static_cast<vote_args *>(args[l])->out = votes;
    }, at);
    return a.out;
}
uint32_t __match_any_sync(uint32_t mask, unsigned value, simt::place at) {
    vote_args a = {value, 0};
    simt::warp_meet("__match_any_sync", mask, &a, [](void **args, uint32_t mask) {
        for (int l = 0; l < 32; l++) {
            if (!(mask >> l & 1)) continue;
            auto *me = static_cast<vote_args *>(args[l]);
            for (int o = 0; o < 32; o++)
                if (mask >> o & 1 && static_cast<vote_args *>(args[o])->in == me->in) me->out |= 1u << o;
        }
    }, at);
    return a.out;
}

unsigned __reduce_max_sync(uint32_t mask, unsigned value, simt::place at) {
    vote_args a = {value, 0};
    simt::warp_meet("__reduce_max_sync", mask, &a, [](void **args, uint32_t mask) {
        unsigned largest = 0;
        for (int l = 0; l < 32; l++)
            if (mask >> l & 1) largest = std::max(largest, static_cast<vote_args *>(args[l])->in);
        for (int l = 0; l < 32; l++) if (mask >> l & 1) static_cast<vote_args *>(args[l])->out = largest;
    }, at);
    return a.out;
}

// ---- the runtime ----------------------------------------------------------------------------------------------------
const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : error == cudaErrorLaunchFailure ? simt::why() : "an error of the harness";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int *n) { *n = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    const int sm = getenv("SIMT_SM") ? atoi(getenv("SIMT_SM")) : 80;        // another device, for tests
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = getenv("SIMT_SMS") ? atoi(getenv("SIMT_SMS")) : 2; break;
    case cudaDevAttrComputeCapabilityMajor: *value = sm / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = sm % 10; break;
    case cudaDevAttrL2CacheSize: *value = 60 << 20; break;
    default: *value = 227 * 1024;
    }
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned) {
    *p = calloc(1, bytes);
    return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t) {
    memset(p, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemset2DAsync(void *p, size_t pitch, int value, size_t bytes, size_t rows, cudaStream_t) {
    for (size_t r = 0; r < rows; r++) memset(static_cast<char *>(p) + r * pitch, value, bytes);
    return cudaSuccess;
}
