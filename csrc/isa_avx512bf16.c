// isa_avx512bf16.c: the kernels of isa_avx512.c, and products of bf16 by its own instruction. Compiled on x86-64 only.
#define ISA_TABLE  moe_kernels_avx512bf16
#define ISA_NAME   "avx512bf16"
#define ISA_VECTOR 64
#define ISA_BF16   "gemm_bf16.inc"
#include "isa_base.c"
