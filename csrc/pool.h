// pool.h: waiting inside one parallel region, for what other tasks of it have yet to do. Inside the core only.
#ifndef MOE_POOL_H
#define MOE_POOL_H
#include <stdatomic.h>
#include <stdint.h>

// How much is still missing: set before the region, in memory that outlives it. Each task says when its part is done.
// A task may await only what tasks before it do, in an order in which threads take them one by one (gemm_run): then all
// that is awaited is under way, however few threads there are.
typedef _Atomic uint32_t moe_missing;
void moe_arrive(moe_missing *missing);
void moe_await(moe_missing *missing);
#endif
