// cuda.h: where the CUDA kernels are found at run time. This binary is linked to nothing of CUDA.
#ifndef MOE_CUDA_H
#define MOE_CUDA_H
#include "moe.h"
#ifdef __cplusplus
extern "C" {
#endif
struct moe_cuda;                    // cuda/api.h
struct CUstream_st;

// The table of libmoe_cuda.so, which lies beside this binary; NULL, and why in a sentence, if it cannot be used.
const struct moe_cuda *moe_cuda_find(const char **why);
extern const size_t moe_cuda_size;      // of the table as this binary knows it; its first field says the same
// torch's current stream of a device. False if this torch is not built with CUDA.
int moe_cuda_stream(int32_t device, struct CUstream_st **stream);
// A table that serves tensors on the CPU in place of the C core: the kernels of cuda/ compiled for the host
// (tests/simt). NULL, as it is from the start, is the C core again. Returns 0 if the table is of another build.
int moe_cpu_serve(const struct moe_cuda *table);
const struct moe_cuda *moe_cpu_served_by(void);
#ifdef __cplusplus
}
#endif
#endif
