// race.h: what the harness tells the race detector (race.cpp). In variants without it every call is nothing.
//
// `pc` is an address in the code that made the access.
#ifndef SIMT_RACE_H
#define SIMT_RACE_H
#include <cstddef>
#include <cstdint>

namespace race {
// Not only threads touch shared memory: so do a warpgroup's wgmma and an mbarrier's TMA loads.
// What such a unit does begins at an instant, and others come after it once they are told so.
enum : int { WGMMA = 0, LOADS = 8, UNITS = 72 };                            // units: + warpgroup, + mbarrier
typedef uint32_t instant;
#ifdef SIMT_RACE
enum kind { READ, WRITE, ATOMIC };
const void *pc_of(const char *file, unsigned line);                       // stands for a pc at that line
instant time();                                                           // of what began last; the next is later
void access(kind what, const void *p, size_t bytes, const void *pc);      // by the running thread, now
void async_begin(const void *p, size_t bytes, const void *pc);            // a copy to p is under way from now on
void async_end(const void *p, size_t bytes, int thread);                  // it has landed
void unit_reads(const void *p, size_t bytes, int unit, const void *pc);   // by wgmma; multiples of 16
void unit_writes(const void *p, size_t bytes, int unit, const void *pc);
void unit_done(int unit, instant upto, int thread);                       // with what began until then, as the thread
                                                                          // is told
void fence_async();                                                       // by the running thread
void arrive(int barrier, int thread);                                     // an mbarrier orders arrivals before waits
void end_phase(int barrier, instant upto);                                // upto: of its loads, which have landed
void told(int barrier);
void meet(const int *threads, int n);                                     // at a named barrier
void begin_launch(const void *stacks, size_t stack_bytes);
void begin_block(int threads, const void *shared, size_t bytes, const void *room, size_t room_bytes);   // room: all its
                                                                                                        // own
void block_barrier();                                                     // all threads of the block have met
void warp_barrier(int warp, uint32_t mask);                               // __syncwarp
void end_launch();
#define RACE(call) race::call
#else
inline instant time() { return 0; }
#define RACE(call) static_cast<void>(0)
#endif
}  // namespace race
#endif
