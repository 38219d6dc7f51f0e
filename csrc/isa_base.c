// isa_base.c: the table of kernels for one instruction set. isa_avx2.c and isa_avx512.c are this file under another
// name and other compiler flags:
//   base     none                                                          any CPU; fma by libm
//   avx2     -mavx2 -mfma -mf16c
//   avx512   -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c
// Each .inc looks at the compiler's own macros (__AVX2__, __FMA__, __F16C__, __AVX512F__) and defines, all static,
//   rows.inc      rows_load rows_store rows_scale rows_axpy rows_sum rows_dot
//   act.inc       act_fwd act_bwd
//   softmax.inc   softmax_row
//   topk.inc      top_k
//   random.inc    random_row
//   gemm.inc      gemm_f32 gemm_f64 and the panel sizes GEMM_MR_F32 GEMM_NR_F32 GEMM_MR_F64 GEMM_NR_F64
// ISA_VECTOR is the vector width in bytes; a kernel written with it and without intrinsics gives the same bits when a
// narrower machine compiles it, which is how the AVX-512 table is tested where there is no AVX-512.
#include "kernels.h"
#ifndef ISA_TABLE
#define ISA_TABLE  moe_kernels_base
#define ISA_NAME   "base"
#define ISA_VECTOR 16
#endif
#include "rows.inc"
#include "act.inc"
#include "softmax.inc"
#include "topk.inc"
#include "random.inc"
#include "gemm.inc"

const moe_kernels ISA_TABLE = {
    .isa     = ISA_NAME,
    .load    = rows_load,
    .store   = rows_store,
    .scale   = rows_scale,
    .axpy    = rows_axpy,
    .sum     = rows_sum,
    .dot     = rows_dot,
    .act     = act_fwd,
    .dact    = act_bwd,
    .softmax = softmax_row,
    .top_k   = top_k,
    .random  = random_row,
    .gemm    = {{GEMM_MR_F32, GEMM_NR_F32, gemm_f32}, {GEMM_MR_F64, GEMM_NR_F64, gemm_f64}},
};
