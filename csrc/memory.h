// memory.h: where large tensors on the CPU come from: an arena that keeps what it gets back, in huge pages where the
// system has them. Inside the extension only; the core itself is given all its memory.
//
// malloc returns large blocks to the system with every free. The next step then has to fault each page in and clear it
// anew: up to a quarter of a step's time, and never twice the same. From the arena a steady step takes no page fault.
//
//   fit      A block is cut from the smallest free piece that holds it, pieces that become free join: any free memory
//            serves any size, and the arena is little more than what was lent at once at its peak.
//   bound    What has not been in use while 16 times the arena's size was lent goes back to the system, in whole huge
//            pages, wherever it lies: a peak of the past left it. moe_memory_release gives back all that is free.
//   threads  Any thread takes and gives, also while the process ends. A forked child has a copy of its own.
//
// The arena's addresses are reserved once, for as much as the machine has memory; only what is written takes some.
// Where the process's addresses are limited (ulimit -v), and under ASan, which watches the borders of each block of
// malloc, there is no arena. A limit that is set later counts what is reserved: set it before the first large tensor.
#ifndef MOE_MEMORY_H
#define MOE_MEMORY_H
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
// A block at a multiple of 4 KB. NULL if it is less than 128 KB, or cannot be had here: ask malloc.
void *moe_memory_take(int64_t bytes);
// Such a block, once.
void moe_memory_give(void *block);
void moe_memory_release(void);
// The most bytes that were lent at once since the last such call.
int64_t moe_memory_peak(void);
#ifdef __cplusplus
}
#endif
#endif
