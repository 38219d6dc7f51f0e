// simt.h: the CUDA kernels of cuda/ as a program for the host. One fiber per CUDA thread, one block at a time.
//
// cuda/*.cu compile with g++ against this folder: cuda_runtime.h here stands for CUDA's, and ptx.cuh finds the twin of
// every instruction below. Collectives (barriers, shuffles, mma) block a fiber until its partners have arrived.
#ifndef SIMT_H
#define SIMT_H
#include <cstddef>
#include <cstdint>
#include <cstring>

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {
struct thread {
    dim3 index;                             // threadIdx
    int  linear;                            // within the block
};
extern thread *self;                        // the running fiber

void launch(dim3 grid, dim3 block, size_t shared, void (*body)(void *), void *arg);
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

void barrier();                                                     // __syncthreads
// All lanes of `mask` meet; the last to arrive runs meet(lane's args, mask). `what` must be one for all.
void warp_meet(const char *what, uint32_t mask, void *args, void (*meet)(void **args_of_lane, uint32_t mask));
void yield();                                                       // another thread's turn: in waits for memory

unsigned char *shared_memory();
uint32_t shared_u32(const void *p);
unsigned char *shared_at(uint32_t address, int bytes, int align);   // checks bounds and alignment
void cp_async_16(uint32_t to, const void *from, int bytes);
void cp_async_commit();
void cp_async_wait(int pending);

template <class T> struct shuffle_args { T in; int source; T out; };
template <class T>
void shuffle_meet(void **args, uint32_t mask) {
    for (int l = 0; l < 32; l++) {
        if (!(mask >> l & 1)) continue;
        auto *a = static_cast<shuffle_args<T> *>(args[l]);
        const int from = a->source < 0 || a->source > 31 ? l : a->source;
        if (!(mask >> from & 1)) fail("shuffle: lane %d reads lane %d, which is not in mask %08x", l, from, mask);
        a->out = static_cast<shuffle_args<T> *>(args[from])->in;
    }
}
template <class T>
T shuffle(const char *what, uint32_t mask, T in, int source) {
    shuffle_args<T> a = {in, source, in};
    warp_meet(what, mask, &a, shuffle_meet<T>);
    return a.out;
}
inline int lane() { return self->linear & 31; }
}  // namespace simt

// ---- the twins of ptx.cuh -------------------------------------------------------------------------------------------
inline unsigned char *shared_memory() { return simt::shared_memory(); }
inline uint32_t shared_u32(const void *p) { return simt::shared_u32(p); }
inline void cp_async_16(uint32_t to, const void *from, int bytes) { simt::cp_async_16(to, from, bytes); }
inline void cp_async_commit() { simt::cp_async_commit(); }
void ldmatrix_x4(uint32_t (&r)[4], uint32_t row);
void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row);
void mma_16816(bf16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_16816(f16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
uint16_t bits_bf16(float x);
uint16_t bits_f16(float x);
float    float_f16(uint16_t h);
uint32_t load_acquire_system(const uint32_t *p);
void     store_release_system(uint32_t *p, uint32_t v);
void     fence_system();
void     spin();
uint64_t nanoseconds();
#endif
