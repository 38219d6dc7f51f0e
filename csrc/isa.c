// isa.c: what is decided once per process: which kernel table runs (moe_k).
//
// The choice is the best table that this CPU can run, or the one that the environment's MOE_ISA names. A name that
// nobody knows, or that this CPU cannot run, is MOE_NO_ISA: nothing is silently replaced. Only x86-64 has more than the
// base table.
#include "kernels.h"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

const moe_kernels *moe_k;

const char *moe_status_text(int status) {
    switch (status) {
    case MOE_OK:        return "ok";
    case MOE_BAD_DTYPE: return "this function does not take that dtype";
    case MOE_BAD_SHAPE: return "a size is negative, does not fit the others, or a product of sizes overflows";
    case MOE_BAD_INDEX: return "an id is out of range";
    case MOE_BAD_BINS:  return "bins must be non-decreasing, start at 0 or above and end within the rows";
    case MOE_BAD_VALUE: return "a value is NaN or not one of the known choices";
    case MOE_CUDA_FAILED: return "work on the CUDA device failed";
    case MOE_PEER_SILENT: return "a rank did not answer in time";
    case MOE_WIRE_FAILED: return "ranks could not exchange rows through shared memory";
    case MOE_NO_ISA:    return "MOE_ISA must be base, avx2 or avx512, and one that this CPU has";
    }
    return "unknown status";
}

// Best first. __builtin_cpu_supports asks the CPU and, for the wide registers, the operating system.
static bool can_run(const moe_kernels *k) {
#ifdef __x86_64__
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (k == &moe_kernels_avx2) return avx2;
    if (k == &moe_kernels_avx512)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
    return k == &moe_kernels_base;
}

static void choose(void) {
    static const moe_kernels *const tables[] = {
#ifdef __x86_64__
        &moe_kernels_avx512, &moe_kernels_avx2,
#endif
        &moe_kernels_base,
    };
    const char *wanted = getenv("MOE_ISA");
    for (size_t i = 0; i < sizeof tables / sizeof *tables && !moe_k; i++)
        if (can_run(tables[i]) && (!wanted || !strcmp(wanted, tables[i]->isa))) moe_k = tables[i];
}

int moe_init(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, choose);
    return moe_k ? MOE_OK : MOE_NO_ISA;
}

const char *moe_isa(void) { return moe_k ? moe_k->isa : NULL; }
