// tensor_map.cuh: what TMA knows of a tensor: its address, sizes, strides and the box that one instruction moves.
#ifndef MOE_TENSOR_MAP_CUH
#define MOE_TENSOR_MAP_CUH
#include "common.cuh"
#include "ptx_sm90.cuh"

// Whether this driver encodes tensor maps: those from CUDA 12 on do.
bool tensor_maps_here();

// Elements of 16 bits of `dtype` (MOE_BF16, MOE_F16), innermost dimension first and in one piece; stride[i] in bytes, of
// dimension i + 1; boxes box[0] = 64 elements wide, in 128-byte swizzle. Sizes up to 2^32, boxes up to 256.
// MOE_CUDA_FAILED with a sentence if the driver refuses.
int encode_tensor_map(tensor_map *map, int dtype, const void *base, int rank, const int64_t *size, const int64_t *stride,
                      const int *box);
#endif
