// race.h: what the harness tells the race detector (race.cpp). In variants without it every call is nothing.
//
// `pc` is an address in the code that made the access.
#ifndef SIMT_RACE_H
#define SIMT_RACE_H
#include <cstddef>
#include <cstdint>

namespace race {
#ifdef SIMT_RACE
enum kind { READ, WRITE, ATOMIC };
void access(kind what, const void *p, size_t bytes, const void *pc);      // by the running thread, now
void async_begin(const void *p, size_t bytes, const void *pc);            // a copy to p is under way from now on
void async_end(const void *p, size_t bytes, int thread, const void *pc);              // the running thread has waited for it
void begin_launch(const void *stacks, size_t stack_bytes);
void begin_block(const void *shared, size_t bytes, const void *room, size_t room_bytes);    // room: nothing else is there
void block_barrier();                                                     // all threads of the block have met
void warp_barrier(int warp, uint32_t mask);                               // __syncwarp
void end_launch();
#define RACE(call) race::call
#else
#define RACE(call) static_cast<void>(0)
#endif
}  // namespace race
#endif
