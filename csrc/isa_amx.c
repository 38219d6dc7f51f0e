// isa_amx.c: the kernels of isa_avx512.c, and products of bf16 on the matrix unit. Compiled on x86-64 only.
#define ISA_TABLE  moe_kernels_amx
#define ISA_NAME   "amx"
#define ISA_VECTOR 64
#define ISA_BF16   "gemm_amx.inc"
#include "isa_base.c"
