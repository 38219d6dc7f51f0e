// expert.cu: the twins of csrc/expert.c: the fused expert MLP, forward and backward (equations: csrc/moe.h). N copies
// sorted by expert; of one of them, p is the position, f = order[p] the flat id, r = f / K the row, e the expert,
// s = weights[f].
//
//   forward    1  product [p, F]   [gate | up] = x[r] [Wg | Wu]_e^T + b    h_NU = it    a_NF = act(it)
//              2  product [p, D]   y_ND = a Wd_e^T + bd_e
//              3  row r            y_RD = sum over slots in order of s y_ND[p]
//   backward   1  product [p, F]   dA' = dy[r] Wd_e    A = act(h)    ds = <dA', A> in pieces    sA = s A
//                                  dh = s dA' act'(h)
//              2  product [p, D]   dx_ND = dh [Wg ; Wu]_e
//              3  sums over p      dWd_e = dy[r]^T sA    dW_e = dh^T x[r]    db = sum of dh    dbd = sum of s dy[r]
//              4  row r            dx_RD = sum over slots in order of dx_ND[p]
//                 flat id f        dweights = sum of ds (+ <dy[r], bd_e>)
//              A gradient that is not wanted, and what only it needs, is left out: its place in memory is NULL.
//
// Rows of x and dy are gathered while a product loads them (gemm.cuh); no sorted copy of them exists but in a backward in
// passes. Saved for the backward: h_NU, nothing else. What lies between two launches is in the workspace, in the storage
// type: tensor cores read a, sA and dh in it; y and dx of a copy would take twice the traffic in float, in a step that
// memory bounds, to be more exact than plain torch, which rounds them before it adds them too. All arithmetic, and ds, is
// in float; act sees h before it is rounded.
//
// In passes, on Hopper (sm90.cuh), the backward is another: step 1 is a product that stores dA', rounded, and a pass over
// it that puts sA in its place; the weight gradients read copies of dy and then of x in sorted order. Both lie where dx_ND
// will, which is made after them: with dx wanted no byte more is lent, without it one copy's.
//
// N is the host's word, which the grids need; bins[E-1] that is another: MOE_BAD_BINS. A flat id or a position out of
// range: MOE_BAD_INDEX, and that copy counts as zeros. A forward finds all of these. A backward has the forward's index:
// dx finds all again, other gradients what their products come across, and what nobody finds leads to nothing outside.
#include "dact.cuh"
#include "sm90.cuh"

// ---- the door -------------------------------------------------------------------------------------------------------
static int check(const moe_expert_args &a) {
    if (!is_float(a.dtype)) return MOE_BAD_DTYPE;
    if (a.wdtype != MOE_F32 && a.wdtype != a.dtype) return MOE_BAD_DTYPE;
    if (!known_act(a.act) || (gated_act(a.act) && !a.up_EFD.p && a.E * a.F * a.D != 0)) return MOE_BAD_VALUE;
    // K > E is fine: a rank may own fewer experts than a token chooses, with -1 for the rest
    if (a.R < 0 || a.K < 1 || a.E < 1 || a.D < 0 || a.F < 0 || a.N < 0) return MOE_BAD_SHAPE;
    const int64_t most = INT32_MAX, widest = INT64_MAX / 64 / most;     // flat ids are int32
    if (a.R > most / a.K || a.N > a.R * a.K || a.D > widest || a.F > widest) return MOE_BAD_SHAPE;
    return MOE_OK;
}
static size_t lent_bytes(const moe_expert_args &a, const moe_expert_grads *g) {
    return a.dtype == MOE_F32 ? lent<float>(a, g, nullptr).bytes : lent<bf16>(a, g, nullptr).bytes;
}

// ---- what products read ---------------------------------------------------------------------------------------------
enum axis { ROWS, SUMS };                       // where the copies of a gathered operand are
template <class T>
static gemm_operand<T> gathered(const moe_expert_args &a, const void *rows, axis copies) {
    return {.p = static_cast<const T *>(rows), .se = 0, .si = copies == ROWS ? a.D : 1,
            .sk = copies == ROWS ? 1 : a.D, .index = a.order_RK, .index_div = static_cast<int32_t>(a.K),
            .index_rows = a.R};
}
template <class T>
static gemm_operand<T> sorted(const T *rows, int64_t stride, axis copies) {
    return {.p = rows, .se = 0, .si = copies == ROWS ? stride : 1, .sk = copies == ROWS ? 1 : stride};
}
template <class T>
static gemm_operand<T> weight(moe_mat w) {      // y = x w^T
    return {.p = static_cast<const T *>(w.p), .se = w.se, .si = w.sr, .sk = w.sc};
}
template <class T>
static gemm_operand<T> transposed(moe_mat w) {  // dx = dy w
    return {.p = static_cast<const T *>(w.p), .se = w.se, .si = w.sc, .sk = w.sr};
}

// ---- forward 1: h = x W^T + b, a = act(h); or h = [gate | up], a = act(gate) * u(up) --------------------------------
template <class T, int parts>
struct act_epilogue {
    static constexpr bool sums_rows = false;
    int64_t    F;
    act_out<T> out;
    __device__ float operator()(int64_t e, int64_t p, int64_t j, int n, const float (&c)[parts][8]) const {
        T    *h = out.h_NU + p * parts * F + j;
        float x[8], a[8], slope[8], unused;
        bias<T>{out.gate_bias, out.gate_bias_se}.add(e, j, n, c[0], x);
        store8(h, n, x);
        act8(out.plain, x, a, slope);
        if constexpr (parts == 2) {
            bias<T>{out.up_bias, out.up_bias_se}.add(e, j, n, c[1], x);
            store8(h + F, n, x);
            for (int v = 0; v < 8; v++) a[v] *= up_value_f32(out.plain, x[v], &unused);
        }
        store8(piece_at<true>(out.a_NF + p * out.row_F + j), 8, a);
        return 0;
    }
};

// ---- forward --------------------------------------------------------------------------------------------------------
template <int parts, class T>
static int act_product(const gemm_product<T> &up, const act_out<T> &out, cudaStream_t stream) {
    if constexpr (sizeof(T) == 2)
        if (sm90_here() && act_sm90_takes<parts>(up, out)) return act_sm90<parts>(up, out, stream);
    return gemm_rows<parts>(up, act_epilogue<T, parts>{up.N, out}, stream);
}
template <class T>
static int forward(const moe_expert_args &a, void *workspace, T *y_RD, T *h_NU, cudaStream_t stream) {
    const verdict bad = verdict_of(OP_expert_mlp);
    const lent<T> w(a, nullptr, workspace);
    const act_out<T> out = {act_plain(a.act), static_cast<const T *>(a.gate_bias_EF),
                            static_cast<const T *>(a.up_bias_EF), a.gate_bias_se, a.up_bias_se, h_NU, w.a_NF, w.row_F};
    const gemm_product<T> up = {
        .R = a.N, .E = a.E, .N = a.F, .K = a.D, .bins_E = a.bins_E, .a = {gathered<T>(a, a.x_RD, ROWS)},
        .b = {weight<T>(a.gate_EFD), weight<T>(a.up_EFD)}, .bad = bad,
    };
    TRY(gated_act(a.act) ? act_product<2>(up, out, stream) : act_product<1>(up, out, stream));

    const gemm_product<T> down = {
        .R = a.N, .E = a.E, .N = a.D, .K = a.F, .bins_E = a.bins_E, .a = {sorted<T>(w.a_NF, w.row_F, ROWS)},
        .b = {weight<T>(a.down_EDF)}, .bad = bad,
    };
    TRY(gemm_store(down, static_cast<const T *>(a.down_bias_ED), a.down_bias_se, w.y_ND, w.row_D, stream));
    return sum_slots<T>(a, {a.weights_RK, a.wdtype == MOE_F32}, w, y_RD, bad, stream);
}

size_t moe_expert_mlp_workspace(const moe_expert_args *a, cudaStream_t) { return lent_bytes(*a, nullptr); }
int moe_expert_mlp(const moe_expert_args *a, void *workspace, void *y_RD, void *h_NU, cudaStream_t stream) {
    TRY(check(*a));
    return by_float(a->dtype, [&]<class T>(T) {
        return forward(*a, workspace, static_cast<T *>(y_RD), static_cast<T *>(h_NU), stream);
    });
}

// ---- backward 1: dA' = dy Wd, then all that its tile gives ----------------------------------------------------------
template <class T>
struct dact_epilogue {
    static constexpr bool sums_rows = true;
    dact_rows<T> of;
    int64_t      pieces;
    float       *ds_NP;
    __device__ float operator()(int64_t, int64_t p, int64_t j, int n, const float (&c)[1][8]) const {
        const float s = of.weight(p);
        float       gate[8];
        load8(of.h(p, j), n, gate);
        return of.store(p, j, n, s, c[0], gate, [&](float (&up)[8]) { load8(of.h(p, j) + of.F, n, up); },
                        [](int, const float (&)[8]) {});
    }
    __device__ void row(int64_t p, int64_t piece, float sum) const {
        if (ds_NP) ds_NP[p * pieces + piece] = sum;
    }
};

// ---- backward -------------------------------------------------------------------------------------------------------
// Whether [gate | up] is one matrix of 2F rows, and their columns of h, in rows of 2 row_F, one piece of 2F.
static bool adjacent(const moe_mat &gate, const moe_mat &up, size_t element, int64_t F, int64_t row_F) {
    return gate.p && up.p == static_cast<char *>(gate.p) + F * gate.sr * static_cast<int64_t>(element) &&
           up.se == gate.se && up.sr == gate.sr && up.sc == gate.sc && row_F == F;
}

template <class T>
static int backward(const moe_expert_args &a, void *workspace, const moe_expert_grads &g, cudaStream_t stream) {
    const verdict bad = verdict_of(OP_expert_mlp_backward);
    const bool gated = gated_act(a.act);
    const lent<T> w(a, &g, workspace);
    const auto copy = [&](const void *rows_RD) {        // in passes: sorted, where a weight gradient reads them
        if constexpr (sizeof(T) == 2)
            if (w.passes)
                return sort_rows(a.R, a.K, a.D, a.N, static_cast<const T *>(rows_RD), a.order_RK, a.inverse_RK, w.y_ND,
                                 w.row_D, bad, stream);
        return static_cast<int>(MOE_OK);
    };
    const auto copies = [&](const void *rows_RD, axis where) {
        return w.passes ? sorted<T>(w.y_ND, w.row_D, where) : gathered<T>(a, rows_RD, where);
    };

    // 1
    if (g.ddown_EDF.p) TRY(copy(g.dy_RD));
    const bool da = w.dh_NU || w.ds_NP;                 // else only sA is wanted, and dA' is a sum of nothing
    const gemm_product<T> dact = {
        .R = a.N, .E = a.E, .N = a.F, .K = da ? a.D : 0, .bins_E = a.bins_E,
        .a = {g.ddown_EDF.p ? copies(g.dy_RD, ROWS) : gathered<T>(a, g.dy_RD, ROWS)},
        .b = {transposed<T>(a.down_EDF)}, .bad = bad,
    };
    const dact_rows<T> of = {gated, act_plain(a.act), a.F, w.row_F, a.R * a.K, a.order_RK,
                             {a.weights_RK, a.wdtype == MOE_F32}, static_cast<const T *>(g.h_NU),
                             g.ddown_EDF.p ? w.a_NF : nullptr, w.dh_NU};
    if (w.passes) {
        if constexpr (sizeof(T) == 2)
            if (w.a_NF) {
                if (da) TRY(gemm_store<T>(dact, nullptr, 0, w.a_NF, w.row_F, stream));
                TRY(dact_pass(of, {a.E, a.N, a.bins_E}, da ? w.a_NF : nullptr, w.ds_NP,
                              w.sums_dh(&g) ? w.parts_SC : nullptr, w.row_C, stream));
            }
    } else if (w.a_NF || w.dh_NU || w.ds_NP)
        TRY(gemm_rows<1>(dact, dact_epilogue<T>{of, w.pieces, w.ds_NP}, stream));

    // 3
    const gemm_product<T> ddown = {
        .R = a.N, .E = a.E, .N = a.F, .M = a.D, .bins_E = a.bins_E, .a = {copies(g.dy_RD, SUMS)},
        .b = {sorted<T>(w.a_NF, w.row_F, SUMS)}, .bad = bad,
    };
    if (g.ddown_EDF.p) TRY(gemm_wgrad(ddown, g.ddown_EDF, stream));
    const bool one = gated && adjacent(g.dgate_EFD, g.dup_EFD, sizeof(T), a.F, w.row_F);
    gemm_product<T> dup = {                             // dW = dh^T x
        .R = a.N, .E = a.E, .N = a.D, .M = one ? 2 * a.F : a.F, .bins_E = a.bins_E,
        .a = {sorted<T>(w.dh_NU, w.row_U, SUMS)}, .b = {copies(a.x_RD, SUMS)}, .bad = bad,
    };
    if (g.dgate_EFD.p || g.dup_EFD.p) TRY(copy(a.x_RD));
    if (g.dgate_EFD.p) TRY(gemm_wgrad(dup, g.dgate_EFD, stream));
    dup.a[0].p += w.row_F;
    if (g.dup_EFD.p && !one) TRY(gemm_wgrad(dup, g.dup_EFD, stream));
    TRY(sum_biases(a, g, w, stream));

    // 2, 4
    if (g.dx_RD) {
        const bool both = gated && adjacent(a.gate_EFD, a.up_EFD, sizeof(T), a.F, w.row_F);
        const gemm_product<T> dx = {
            .R = a.N, .E = a.E, .N = a.D, .K = both ? 2 * a.F : a.F, .terms = gated && !both ? 2 : 1,
            .bins_E = a.bins_E,
            .a = {sorted<T>(w.dh_NU, w.row_U, ROWS), sorted<T>(w.dh_NU + w.row_F, w.row_U, ROWS)},
            .b = {transposed<T>(a.gate_EFD), transposed<T>(a.up_EFD)}, .bad = bad,
        };
        TRY(gemm_store<T>(dx, nullptr, 0, w.y_ND, w.row_D, stream));
        TRY(sum_slots<T>(a, {}, w, g.dx_RD, bad, stream));
    }
    return g.dweights_RK ? sum_dweights(a, g, w, stream) : MOE_OK;
}

size_t moe_expert_mlp_backward_workspace(const moe_expert_args *a, const moe_expert_grads *g, cudaStream_t) {
    return lent_bytes(*a, g);
}
int moe_expert_mlp_backward(const moe_expert_args *a, void *workspace, const moe_expert_grads *g,
                            cudaStream_t stream) {
    TRY(check(*a));
    return by_float(a->dtype, [&]<class T>(T) { return backward<T>(*a, workspace, *g, stream); });
}
