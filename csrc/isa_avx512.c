// isa_avx512.c: the kernels of isa_base.c with avx512 compiler flags. Compiled on x86-64 only.
#define ISA_TABLE  moe_kernels_avx512
#define ISA_NAME   "avx512"
#define ISA_VECTOR 64
#include "isa_base.c"
