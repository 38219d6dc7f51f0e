// simt.cpp: fibers, the block scheduler, collectives and the small runtime behind simt.h and cuda_runtime.h.
#include "../../cuda/ptx.cuh"

#include <cuda_runtime.h>
#include <sys/mman.h>
#include <time.h>

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <vector>

dim3 blockIdx, blockDim, gridDim;

namespace simt {
thread *self;

namespace {
enum { STACK = 256 * 1024, MAX_THREADS = 1024, MAX_SHARED = 227 * 1024 };

struct fiber : thread {
    void *stack_pointer;
    bool  done, waiting;
    // the meeting this fiber waits for
    const char *what;
    uint32_t    mask;
    void       *args;
};

struct block_state {
    int            n, arrived, left;            // threads, at the barrier, not finished
    fiber          fibers[MAX_THREADS];
    unsigned char *shared;
    size_t         shared_bytes;
    void (*body)(void *);
    void *arg;
} block;
void *scheduler_stack;
unsigned char *stacks;
std::mutex one_launch;

extern "C" void simt_switch(void **save, void *to);
asm(R"(
.text
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

void leave() { simt_switch(&static_cast<fiber *>(self)->stack_pointer, scheduler_stack); }

void fiber_main() {
    block.body(block.arg);
    static_cast<fiber *>(self)->done = true;
    leave();
    abort();
}

void run_block() {
    block.left = block.n;
    block.arrived = 0;
    for (int i = 0; i < block.n; i++) {
        fiber &f = block.fibers[i];
        f.done = f.waiting = false;
        f.what = nullptr;
        void **top = reinterpret_cast<void **>(stacks + static_cast<size_t>(i + 1) * STACK - 64);
        *--top = nullptr;                                       // keeps the stack as a call would leave it
        *--top = reinterpret_cast<void *>(fiber_main);
        for (int r = 0; r < 6; r++) *--top = nullptr;
        f.stack_pointer = top;
    }
    while (block.left) {
        bool moved = false;
        for (int i = 0; i < block.n; i++) {
            fiber &f = block.fibers[i];
            if (f.done || f.waiting) continue;
            moved = true;
            self = &f;
            simt_switch(&scheduler_stack, f.stack_pointer);
            if (f.done) block.left--;
        }
        if (block.arrived && block.arrived == block.n) {
            for (int i = 0; i < block.n; i++) block.fibers[i].waiting = false;
            block.arrived = 0;
            moved = true;
        }
        if (!moved) fail("deadlock: %d of %d threads wait at a barrier, the others ended or wait elsewhere", block.arrived, block.n);
    }
}
}  // namespace

void fail(const char *format, ...) {
    va_list list;
    va_start(list, format);
    fprintf(stderr, "simt: ");
    vfprintf(stderr, format, list);
    fprintf(stderr, "\n");
    va_end(list);
    abort();
}

void launch(dim3 grid, dim3 dim, size_t shared, void (*body)(void *), void *arg) {
    std::lock_guard<std::mutex> guard(one_launch);
    block.n = static_cast<int>(dim.x * dim.y * dim.z);
    if (block.n < 1 || block.n > MAX_THREADS) fail("a block of %d threads", block.n);
    if (shared > MAX_SHARED) fail("%zu bytes of shared memory, a block has %d", shared, MAX_SHARED);
    if (!stacks)
        stacks = static_cast<unsigned char *>(mmap(nullptr, static_cast<size_t>(STACK) * MAX_THREADS, PROT_READ | PROT_WRITE,
                                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    block.shared_bytes = shared;
    block.shared = static_cast<unsigned char *>(aligned_alloc(1024, (shared + 1024) / 1024 * 1024));
    block.body = body;
    block.arg = arg;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                memset(block.shared, 0xff, shared);             // NaN
                blockIdx = {x, y, z}, blockDim = dim, gridDim = grid;
                for (int i = 0; i < block.n; i++) {
                    fiber &f = block.fibers[i];
                    f.index = {static_cast<unsigned>(i) % dim.x, static_cast<unsigned>(i) / dim.x % dim.y,
                               static_cast<unsigned>(i) / dim.x / dim.y};
                    f.linear = i;
                }
                run_block();
            }
    free(block.shared);
}

void barrier() {
    static_cast<fiber *>(self)->waiting = true;
    block.arrived++;
    leave();
}

void yield() { leave(); }

void warp_meet(const char *what, uint32_t mask, void *args, void (*meet)(void **, uint32_t)) {
    fiber *me = static_cast<fiber *>(self);
    const int base = me->linear & ~31;
    if (!(mask >> (me->linear & 31) & 1)) fail("%s: lane %d is not in its own mask %08x", what, me->linear & 31, mask);
    me->what = what, me->mask = mask, me->args = args, me->waiting = true;
    void *args_of_lane[32] = {};
    for (int l = 0; l < 32; l++) {
        if (!(mask >> l & 1)) continue;
        if (base + l >= block.n) fail("%s: mask %08x names lane %d, which the block does not have", what, mask, l);
        fiber &f = block.fibers[base + l];
        if (f.done) fail("%s: lane %d of mask %08x has ended", what, l, mask);
        if (!f.waiting || !f.what) { leave(); return; }
        if (strcmp(f.what, what) || f.mask != mask)
            fail("lanes %d and %d of a warp meet at %s (mask %08x) and %s (mask %08x)", me->linear & 31, l, what, mask,
                 f.what, f.mask);
        args_of_lane[l] = f.args;
    }
    meet(args_of_lane, mask);
    for (int l = 0; l < 32; l++)
        if (mask >> l & 1) block.fibers[base + l].waiting = false, block.fibers[base + l].what = nullptr;
}

unsigned char *shared_memory() { return block.shared; }
uint32_t shared_u32(const void *p) {
    return static_cast<uint32_t>(static_cast<const unsigned char *>(p) - block.shared);
}
unsigned char *shared_at(uint32_t address, int bytes, int align) {
    if (address % static_cast<uint32_t>(align)) fail("shared address %u is not a multiple of %d", address, align);
    if (address + static_cast<size_t>(bytes) > block.shared_bytes)
        fail("shared address %u + %d is past the end, %zu", address, bytes, block.shared_bytes);
    return block.shared + address;
}
void cp_async_16(uint32_t to, const void *from, int bytes) {
    if (bytes < 0 || bytes > 16) fail("cp.async of %d bytes", bytes);
    if (reinterpret_cast<uintptr_t>(from) % 16) fail("cp.async from an address that is not a multiple of 16");
    unsigned char *p = shared_at(to, 16, 16);
    memset(p, 0, 16);
    if (bytes) memcpy(p, from, static_cast<size_t>(bytes));
}
void cp_async_commit() {}
void cp_async_wait(int) {}
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
template <class T> void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_args x = {c, a, b};
    simt::warp_meet("mma", 0xffffffffu, &x, mma_meet<T>);
}
}  // namespace
void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
    ldmatrix_args a = {r, row, false};
    simt::warp_meet("ldmatrix", 0xffffffffu, &a, ldmatrix_meet);
}
void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
    ldmatrix_args a = {r, row, true};
    simt::warp_meet("ldmatrix.trans", 0xffffffffu, &a, ldmatrix_meet);
}
void mma_16816(bf16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma<bf16>(c, a, b); }
void mma_16816(f16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma<f16>(c, a, b); }

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
uint32_t load_acquire_system(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
void store_release_system(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
void fence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void spin() { simt::yield(); }
uint64_t nanoseconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<uint64_t>(t.tv_sec) * 1000000000u + static_cast<uint64_t>(t.tv_nsec);
}

// ---- votes ----------------------------------------------------------------------------------------------------------
namespace {
struct vote_args { unsigned in; uint32_t out; };
}
uint32_t __ballot_sync(uint32_t mask, int predicate) {
    vote_args a = {predicate != 0, 0};
    simt::warp_meet("__ballot_sync", mask, &a, [](void **args, uint32_t mask) {
        uint32_t votes = 0;
        for (int l = 0; l < 32; l++) if (mask >> l & 1 && static_cast<vote_args *>(args[l])->in) votes |= 1u << l;
        for (int l = 0; l < 32; l++) if (mask >> l & 1) static_cast<vote_args *>(args[l])->out = votes;
    });
    return a.out;
}
uint32_t __match_any_sync(uint32_t mask, unsigned value) {
    vote_args a = {value, 0};
    simt::warp_meet("__match_any_sync", mask, &a, [](void **args, uint32_t mask) {
        for (int l = 0; l < 32; l++) {
            if (!(mask >> l & 1)) continue;
            auto *me = static_cast<vote_args *>(args[l]);
            for (int o = 0; o < 32; o++)
                if (mask >> o & 1 && static_cast<vote_args *>(args[o])->in == me->in) me->out |= 1u << o;
        }
    });
    return a.out;
}

// ---- the runtime ----------------------------------------------------------------------------------------------------
const char *cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "an error of the harness"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int *n) { *n = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 2; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 8; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    default: *value = 227 * 1024;
    }
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned) {
    *p = calloc(1, bytes);
    return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t) {
    memset(p, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    memcpy(to, from, bytes);
    return cudaSuccess;
}
