// sm90.cuh: the products of gemm.cuh by TMA and wgmma, on Hopper (compute capability 9.0), and the passes beside them.
//
//   rows_sm90     ragged rows   y[p, j] = sum over terms and k of a[t](p, k) b[t](e; j, k) (+ bias)     forward, dgrad
//   act_sm90      ragged rows   h = a b + bias and act(h), or h = [gate | up] and act(gate) u(up)       forward 1
//   sums_sm90     ragged sums   dw[e; i, j] = sum over rows p of e of a(i, p) b(j, p)                   wgrad
//   sort_rows     copies        to_ND[p] = from_RD[order[p] / K]                                        wgrad's operands
//   dact_pass     elementwise   dA', h, s -> dh, sA, ds                                                 backward 1
//
// Who asks takes_*() first: what TMA does not take (an address or a stride that is no multiple of 16 bytes, another
// element than 16 bits, another device) goes the way of gemm.cuh, which has the same arguments. Contracts (bins that are
// wrong, indices out of range, empty experts, tails) are those of gemm.cuh.
#ifndef MOE_SM90_CUH
#define MOE_SM90_CUH
#include "dact.cuh"

// T = bf16, f16. a may be gathered (index); b is along k or along i, by its strides; y and h are rows of `stride` elements.
template <class T> bool rows_sm90_takes(const gemm_product<T> &g, const T *bias, const T *y, int64_t stride);
template <class T>
int rows_sm90(const gemm_product<T> &g, const T *bias, int64_t bias_se, T *y, int64_t stride, cudaStream_t stream);

// parts = 2: with a gate, [gate | up] = a [b[0] | b[1]] + biases; 1: without, h = a b[0] + gate_bias.
template <class T>
struct act_out {
    int      plain;                 // act_plain(act)
    const T *gate_bias, *up_bias;   // may be NULL
    int64_t  gate_bias_se, up_bias_se;
    T       *h_NU, *a_NF;           // rows of `parts` times g.N, and of row_F elements
    int64_t  row_F;
};
template <int parts, class T> bool act_sm90_takes(const gemm_product<T> &g, const act_out<T> &out);
template <int parts, class T> int act_sm90(const gemm_product<T> &g, const act_out<T> &out, cudaStream_t stream);

// Neither a nor b is gathered: sort_rows first. dw in rows (sc = 1) of any multiples of 16 bytes.
template <class T> bool sums_sm90_takes(const gemm_product<T> &g, moe_mat dw);
template <class T> int sums_sm90(const gemm_product<T> &g, moe_mat dw, cudaStream_t stream);

// T = bf16, f16. Rows of D elements to rows of row_D, a multiple of 8, at a multiple of 16 bytes; up to the next
// multiple of 8 they get zeros. Each row of from is read once and stored at its K places inverse[r K + k] (-1: none).
// A place p < N that is not the inverse of order[p] is zeros, if no other row has it, and MOE_BAD_INDEX.
template <class T>
int sort_rows(int64_t R, int64_t K, int64_t D, int64_t N, const T *from_RD, const int32_t *order_N,
              const int32_t *inverse_RK, T *to_ND, int64_t row_D, verdict bad, cudaStream_t stream);

// T = bf16, f16. F is a multiple of 8, and all rows begin at multiples of 16 bytes. sA may take the place of da_NF, which
// is NULL where sA alone is wanted. May be NULL: ds_NP, of each SUM_COLUMNS columns; parts_SC, the sums of dh over slabs,
// rows of row_C.
template <class T>
int dact_pass(const dact_rows<T> &d, const slabs &cut, const T *da_NF, float *ds_NP, float *parts_SC, int64_t row_C,
              cudaStream_t stream);
#endif
