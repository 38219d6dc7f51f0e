// isa_base.c: the table of kernels for one instruction set. The other isa_*.c are this file under another name and
// other compiler flags:
//   base         none                                                      any CPU; fma by libm
//   avx2         -mavx2 -mfma -mf16c
//   avx512       avx2's, -mavx512f -mavx512bw -mavx512vl -mavx512dq
//   avx512bf16   avx512's, -mavx512bf16
//   amx          avx512bf16's, -mamx-tile -mamx-bf16
// Each .inc looks at the compiler's own macros (__AVX2__, __FMA__, __F16C__, __AVX512F__) and defines, all static,
//   rows.inc      rows_load rows_store rows_scale rows_axpy rows_sum rows_dot
//   act.inc       act_fwd act_bwd
//   softmax.inc   softmax_row
//   norm.inc      norm_row norm_dot norm_row_bwd rotate_row square_sum
//   topk.inc      top_k
//   random.inc    random_row
//   gemm.inc      gemm_f32 gemm_f64 and the panel sizes GEMM_MR_F32 GEMM_NR_F32 GEMM_MR_F64 GEMM_NR_F64
//   pack.inc      pack_a_f32 pack_b_f32 pack_a_f64 pack_b_f64
// and, where ISA_BF16 names the file of a micro-kernel for bf16,
//   ISA_BF16        gemm_bf16, GEMM_BEGIN_BF16 GEMM_END_BF16 and its sizes GEMM_MR_BF16 GEMM_NR_BF16 GEMM_KU_BF16
//   pack_bf16.inc   pack_a_bf16 pack_b_bf16
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
#include "norm.inc"
#include "topk.inc"
#include "random.inc"
#include "gemm.inc"
#include "pack.inc"
#ifdef ISA_BF16
#include ISA_BF16
#include "pack_bf16.inc"
#endif

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
    .norm    = norm_row,
    .norm_dot = norm_dot,
    .dnorm   = norm_row_bwd,
    .rotate  = rotate_row,
    .square_sum = square_sum,
    .top_k   = top_k,
    .random  = random_row,
    .gemm    = {
        [GEMM_F32] = {GEMM_MR_F32, GEMM_NR_F32, 1, pack_a_f32, pack_b_f32, NULL, NULL, gemm_f32},
        [GEMM_F64] = {GEMM_MR_F64, GEMM_NR_F64, 1, pack_a_f64, pack_b_f64, NULL, NULL, gemm_f64},
#ifdef ISA_BF16
        [GEMM_BF16] = {GEMM_MR_BF16, GEMM_NR_BF16, GEMM_KU_BF16, pack_a_bf16, pack_b_bf16, GEMM_BEGIN_BF16, GEMM_END_BF16,
                       gemm_bf16},
#endif
    },
};
