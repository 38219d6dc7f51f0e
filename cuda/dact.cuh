// dact.cuh: the middle of the expert MLP's backward (step 1 of expert.cu): what the dA' of a copy gives.
//
//   ds = <dA', A>    sA = s A    dh = s dA' act'(h)                A = act(h), of the h that the forward saved
//
// Eight columns of a copy at a time, in the epilogue of the product that makes dA' (expert.cu) or in a pass over a dA'
// in memory (dact.cu).
#ifndef MOE_DACT_CUH
#define MOE_DACT_CUH
#include "expert_sums.cuh"

template <class T>
struct dact_rows {
    bool               gated;
    int                plain;                   // act_plain(act)
    int64_t            F, row_F, flat_ids;
    const int32_t     *order_N;
    routing_weights<T> weights;
    const T           *h_NU;                    // rows of F elements, or of [gate | up]
    T                 *sa_NF, *dh_NU;           // rows of row_F, and of row_F or [row_F | row_F]; NULL: not wanted

    __device__ float weight(int64_t p) const {
        const int32_t f = order_N[p];
        return f >= 0 && f < flat_ids ? weights[f] : 0;
    }
    // h of columns j .. j + 8 of the copy at position p; those of up stand F elements further.
    __device__ const T *h(int64_t p, int64_t j) const { return h_NU + p * (gated ? 2 * F : F) + j; }
    // Stores sA and dh of columns j .. j+n, n <= 8, for this da and h = [gate | up]; returns their part of ds. load_up
    // fills up where h is gated, when it is needed: it is in no register before. stored(half, x) sees what was stored of
    // dh, before it was rounded: half 0, or of gate 0 and of up 1.
    template <class Up, class Stored>
    __device__ __forceinline__ float store(int64_t p, int64_t j, int n, float s, const float (&da)[8],
                                           const float (&gate)[8], const Up &load_up, const Stored &stored) const {
        float value[8], slope[8], up[8], x[8], du, ds = 0;
        act8(plain, gate, value, slope);
        if (gated) load_up(up);
        for (int v = 0; v < 8; v++) {
            up[v] = gated ? up_value_f32(plain, up[v], &du) : du = 1;
            const float a = value[v] * up[v];   // a = f(gate) * u(up)
            if (v < n) ds = fmaf(da[v], a, ds);
            x[v] = s * a;
            value[v] *= du;
        }
        if (sa_NF) store8(piece_at<true>(sa_NF + p * row_F + j), 8, x);
        if (!dh_NU) return ds;
        T *dh = dh_NU + p * (gated ? 2 * row_F : row_F) + j;
        for (int v = 0; v < 8; v++) x[v] = s * da[v] * up[v] * slope[v];
        store8(piece_at<true>(dh), 8, x);
        stored(0, x);
        if (!gated) return ds;
        for (int v = 0; v < 8; v++) x[v] = s * da[v] * value[v];
        store8(piece_at<true>(dh + row_F), 8, x);
        stored(1, x);
        return ds;
    }
};
#endif
