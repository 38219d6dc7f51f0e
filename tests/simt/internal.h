// internal.h: what the files of the harness share and kernels do not see.
#ifndef SIMT_INTERNAL_H
#define SIMT_INTERNAL_H
#include <string>

#include "simt.h"

#define LINE(at) race::pc_of(at.file_name(), at.line())         // for the race detector

namespace simt {
// ---- simt.cpp -------------------------------------------------------------------------------------------------------
std::string line_of(const void *pc);        // file:line of a return address in this library
std::string line_of(place at);
void wait(const char *what, place at);      // until another thread, or async_step, wakes the running one
void wake(int thread);

// ---- twins.cpp: cp.async --------------------------------------------------------------------------------------------
void forget_copies();                       // a new block: none is under way

// ---- sm90.cpp: what simt.cpp tells it -------------------------------------------------------------------------------
void block_begins(int threads);
void block_meets();                         // at a __syncthreads, which orders inits of mbarriers
void block_ends();
void thread_ends();
bool async_step(bool anything);             // no thread is ready: something asynchronous that one waits for, if there
                                            // is any
std::string waits_for(int thread);          // more of where it waits
bool in_flight(const void *p, size_t bytes);        // an accumulator of the running thread
}  // namespace simt
#endif
