// isa_avx2.c: the kernels of isa_base.c with avx2 compiler flags. Compiled on x86-64 only.
#define ISA_TABLE  moe_kernels_avx2
#define ISA_NAME   "avx2"
#define ISA_VECTOR 32
#include "isa_base.c"
