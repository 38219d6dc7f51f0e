// cuda.c: finds libmoe_cuda.so and torch's current CUDA stream, both by dlopen, so that one binary runs with CUDA and
// without. Looked for once: the text of a failure lives as long as the process.
#include "cuda.h"
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

static struct {
    const struct moe_cuda *table;
    char                   why[1024];
} library;

static void find_once(void) {
    Dl_info here;
    char    path[sizeof library.why / 2] = "";
    if (dladdr((void *)&library, &here) && here.dli_fname && strlen(here.dli_fname) < sizeof path - 32) {
        strcpy(path, here.dli_fname);
        char *slash = strrchr(path, '/');
        strcpy(slash ? slash + 1 : path, "libmoe_cuda.so");
    }
    void *so = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    const struct moe_cuda *(*table)(void) = NULL;
    if (so) *(void **)&table = dlsym(so, "moe_cuda_table");
    if (table && *(const size_t *)table() == moe_cuda_size) library.table = table();
    else if (table) {
        snprintf(library.why, sizeof library.why,
                 "%.400s is of another build. Hint: pip install --no-build-isolation -e .", path);
    }
    else {
        const char *error = dlerror();
        snprintf(library.why, sizeof library.why,
                 "moe_ext has no CUDA kernels here (%.400s). Hint: with nvcc on PATH, MOE_CUDA=1 pip install "
                 "--no-build-isolation -e .", error ? error : "libmoe_cuda.so has no table");
    }
}

const struct moe_cuda *moe_cuda_find(const char **why) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, find_once);
    *why = library.why;
    return library.table;
}

int moe_cuda_stream(int32_t device, struct CUstream_st **stream) {
    // Only libtorch_cuda.so defines it, and a torch for the CPU has none. Not kept if missing: it may be loaded later.
    static int32_t (*_Atomic current)(int32_t, void **);
    int32_t (*ask)(int32_t, void **) = atomic_load(&current);
    if (!ask) {
        void *torch = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        if (torch) *(void **)&ask = dlsym(torch, "aoti_torch_get_current_cuda_stream");
        if (!ask) return 0;
        atomic_store(&current, ask);
    }
    return ask(device, (void **)stream) == 0;
}

static const struct moe_cuda *_Atomic stand_in;
__attribute__((visibility("default"))) int moe_cpu_serve(const struct moe_cuda *table) {
    if (table && *(const size_t *)table != moe_cuda_size) return 0;
    atomic_store(&stand_in, table);
    return 1;
}
const struct moe_cuda *moe_cpu_served_by(void) { return atomic_load(&stand_in); }
