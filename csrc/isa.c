// isa.c: what is decided once per process: which kernel table runs (moe_k), and for which cache.
//
// The choice is the best table that this CPU can run, or the one that the environment's MOE_ISA names. A name that
// nobody knows, or that this CPU cannot run, is MOE_NO_ISA: nothing is silently replaced. Only x86-64 has more than the
// base table.
#include "kernels.h"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#ifdef __x86_64__
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#endif
#endif

const moe_kernels *moe_k;
int64_t            moe_l2;

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
    case MOE_NO_ISA:    return "MOE_ISA must be base, avx2, avx512, avx512bf16 or amx, and one that this CPU has";
    }
    return "unknown status";
}

// Linux gives AMX's 8 KB of registers only to a process that asks, once for all its threads and children. From then on
// they take part in every signal frame: nobody asks who wants another table.
static bool may_use_tiles(void) {
#if defined __linux__ && defined __x86_64__
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}
// Best first. __builtin_cpu_supports asks the CPU and, for the wide registers, the operating system.
static bool can_run(const moe_kernels *k) {
#ifdef __x86_64__
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#ifdef MOE_LOWERED                      // a build for tests, whose wider tables are compiled for AVX2 (setup.py)
    if (k != &moe_kernels_base) return avx2;
#endif
    if (k == &moe_kernels_avx2) return avx2;
    if (k == &moe_kernels_avx512) return avx512;
    if (k == &moe_kernels_avx512bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
    if (k == &moe_kernels_amx)
        return avx512 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && may_use_tiles();
#endif
    return k == &moe_kernels_base;
}

// sysconf says nothing with some C libraries and in some containers; the CPU does: leaf 0x80000006, KiB in ecx.
static int64_t find_l2(void) {
    int64_t bytes = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
    bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
#ifdef __x86_64__
    unsigned a, b, c = 0, d;
    if (bytes <= 0 && __get_cpuid(0x80000006, &a, &b, &c, &d)) bytes = (int64_t)(c >> 16) << 10;
#endif
    return bytes > 0 ? bytes : 512 << 10;
}

static void choose(void) {
    moe_l2 = find_l2();
    static const moe_kernels *const tables[] = {
#ifdef __x86_64__
        &moe_kernels_amx, &moe_kernels_avx512bf16, &moe_kernels_avx512, &moe_kernels_avx2,
#endif
        &moe_kernels_base,
    };
    const char *wanted = getenv("MOE_ISA");
    for (size_t i = 0; i < sizeof tables / sizeof *tables && !moe_k; i++)
        if ((!wanted || !strcmp(wanted, tables[i]->isa)) && can_run(tables[i])) moe_k = tables[i];
}

int moe_init(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, choose);
    return moe_k ? MOE_OK : MOE_NO_ISA;
}

const char *moe_isa(void) { return moe_k ? moe_k->isa : NULL; }
