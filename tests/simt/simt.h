// simt.h: the CUDA kernels of cuda/ as a program for the host. One fiber per CUDA thread, one block at a time.
//
// cuda/*.cu compile with g++ against this folder: cuda_runtime.h here stands for CUDA's, and ptx.cuh finds the twin of
// every instruction below. Collectives (barriers, shuffles, mma) block a fiber until its partners have arrived; which
// fiber runs meanwhile, in which order blocks come and when asynchronous copies arrive is the schedule's choice:
//     SIMT_SCHEDULE=inorder|reverse|shuffled|warps  SIMT_ASYNC=early|late|random  SIMT_SEED=number
// in the environment, or simt_configure(schedule, async, seed). Threads that only spin give up after SIMT_PATIENCE (20)
// seconds. What a kernel does wrong (a collective that not all
// lanes reach, a wait without end, an address outside shared memory, a race in the race variant) ends the launch, which
// then returns an error with the whole story as its text.
#ifndef SIMT_H
#define SIMT_H
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>

#include "race.h"

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {
typedef std::source_location place;         // of a collective in a kernel: lanes meet at one place

struct thread {
    dim3 index;                             // threadIdx
    int  linear;                            // within the block
};
extern thread *self;                        // the running fiber; NULL outside a kernel
inline int lane() { return self->linear & 31; }

// False if the launch failed: `why()` says how.
bool launch(const void *kernel, dim3 grid, dim3 block, size_t shared, void (*body)(void *), void *arg);
const char *why();
// Ends the launch that calls it.
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

void barrier(place at);                     // __syncthreads
// All lanes of `mask` meet; the last to arrive runs meet(lane's args, mask). `what` must be one for all.
typedef void (*meeting)(void **args_of_lane, uint32_t mask);
void warp_meet(const char *what, uint32_t mask, void *args, meeting meet, place at);
void warp_barrier(uint32_t mask, place at); // __syncwarp
void yield(place at);                       // another thread's turn: in waits for memory
void maybe_yield();                         // the same at random, under the shuffled schedule
uint32_t random_number();                   // of the schedule's seed

unsigned char *shared_memory();
uint32_t shared_u32(const void *p);
unsigned char *shared_at(uint32_t address, int bytes, int align);   // checks bounds and alignment
void cp_async_16(uint32_t to, const void *from, int bytes, place at);
void cp_async_commit();
void cp_async_wait(int pending);
enum { EARLY, LATE, RANDOM };
int async_timing();

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
T shuffle(const char *what, uint32_t mask, T in, int source, place at) {
    shuffle_args<T> a = {in, source, in};
    warp_meet(what, mask, &a, shuffle_meet<T>, at);
    return a.out;
}
}  // namespace simt

// Schedule and timing by name, NULL to leave as they are; 0, or -1 for a name that there is not.
extern "C" __attribute__((visibility("default"))) int simt_configure(const char *schedule, const char *async,
                                                                     uint64_t seed);

// ---- the twins of ptx.cuh -------------------------------------------------------------------------------------------
inline unsigned char *shared_memory() { return simt::shared_memory(); }
inline uint32_t shared_u32(const void *p) { return simt::shared_u32(p); }
inline void cp_async_16(uint32_t to, const void *from, int bytes, simt::place at = simt::place::current()) {
    simt::cp_async_16(to, from, bytes, at);
}
inline void cp_async_commit() { simt::cp_async_commit(); }
void ldmatrix_x4(uint32_t (&r)[4], uint32_t row, simt::place at = simt::place::current());
void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row, simt::place at = simt::place::current());
void mma_16816(bf16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
               simt::place at = simt::place::current());
void mma_16816(f16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
               simt::place at = simt::place::current());
uint16_t bits_bf16(float x);
uint16_t bits_f16(float x);
float    float_f16(uint16_t h);
uint32_t load_acquire_system(const uint32_t *p);
void     store_release_system(uint32_t *p, uint32_t v);
void     fence_system();
void     spin(simt::place at = simt::place::current());
uint64_t nanoseconds();
#endif
