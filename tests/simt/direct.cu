// direct.cu: functions of cuda/ that no op of the API shows by themselves, for test_direct.py. *word: the verdict.
#include "../../cuda/sm90.cuh"

#define DIRECT extern "C" __attribute__((visibility("default"))) int

namespace {
template <class F>
int by_half(int64_t dtype, F f) { return dtype == MOE_BF16 ? f(bf16{}) : f(f16{}); }
verdict verdict_in(uint64_t *word) {
    static_assert(sizeof *word == sizeof(unsigned long long));
    return {reinterpret_cast<unsigned long long *>(word), OP_grouped_gemm_wgrad};
}
}  // namespace

// The way of products from now on, a moe_way, and their group of row tiles; -1 and 0: as the policy says.
DIRECT direct_force(int way, int group) {
    moe_cuda_table()->force(way, group);
    return MOE_OK;
}
// dw[e] = a^T b of rows of `stride_a` and `stride_b` elements. -1: it does not take them.
DIRECT direct_sums(int64_t dtype, int64_t R, int64_t E, int64_t M, int64_t N,
                   const void *a_RM, int64_t stride_a, const void *b_RN, int64_t stride_b, const int32_t *bins_E,
                   void *dw, int64_t se, int64_t sr, uint64_t *word) {
    TRY(moe_cuda_table()->ready(0));
    return by_half(dtype, [&]<class T>(T) {
        const gemm_product<T> g = {
            .R = R, .E = E, .N = N, .M = M, .bins_E = bins_E,
            .a = {{.p = static_cast<const T *>(a_RM), .se = 0, .si = 1, .sk = stride_a}},
            .b = {{.p = static_cast<const T *>(b_RN), .se = 0, .si = 1, .sk = stride_b}}, .bad = verdict_in(word),
        };
        const moe_mat to = {dw, se, sr, 1};
        return sums_sm90_takes(g, to) ? sums_sm90(g, to, nullptr) : -1;
    });
}
// y = a b (+ bias) over ragged rows, of rows of `stride` elements; of `terms` a and b, which lie behind one another. b:
// E matrices of `lines` lines of stride_b elements, along k N lines, else K. index: of a's rows, index_rows of them.
DIRECT direct_rows(int64_t dtype, int64_t R, int64_t E, int64_t N, int64_t K, int64_t terms, int64_t along_k,
                   int64_t tail, const void *a, int64_t stride_a, const int32_t *index, int64_t index_div,
                   int64_t index_rows, const void *b, int64_t stride_b, const int32_t *bins_E, const void *bias,
                   int64_t bias_se, void *y, int64_t stride, uint64_t *word) {
    TRY(moe_cuda_table()->ready(0));
    return by_half(dtype, [&]<class T>(T) {
        const int64_t se = stride_b * (along_k ? N : K);
        gemm_product<T> g = {.R = R, .E = E, .N = N, .K = K, .terms = static_cast<int>(terms), .tail = tail != 0,
                             .bins_E = bins_E, .a = {}, .b = {}, .bad = verdict_in(word)};
        for (int64_t t = 0; t < terms; t++) {
            g.a[t] = {.p = static_cast<const T *>(a) + t * R * stride_a, .se = 0, .si = stride_a, .sk = 1,
                      .index = index, .index_div = static_cast<int32_t>(index_div), .index_rows = index_rows};
            g.b[t] = {.p = static_cast<const T *>(b) + t * E * se, .se = se, .si = along_k ? stride_b : 1,
                      .sk = along_k ? 1 : stride_b};
        }
        const T *const added = static_cast<const T *>(bias);
        T *const to = static_cast<T *>(y);
        return rows_sm90_takes(g, added, to, stride) ? rows_sm90(g, added, bias_se, to, stride, nullptr) : -1;
    });
}
// The first product of the expert MLP, of gathered rows of K elements: w and bias of the gate, then of up, if it has one.
DIRECT direct_act(int64_t dtype, int64_t act_, int64_t N, int64_t E, int64_t F, int64_t K, const void *x_RK,
                  const int32_t *index_N, int64_t index_div, int64_t index_rows, const void *w_2EFK,
                  const int32_t *bins_E, const void *bias_2EF, void *h_NU, void *a_NF, int64_t row_F, uint64_t *word) {
    const int act = static_cast<int>(act_);
    TRY(moe_cuda_table()->ready(0));
    return by_half(dtype, [&]<class T>(T) {
        const T *const w = static_cast<const T *>(w_2EFK), *const bias = static_cast<const T *>(bias_2EF);
        const gemm_product<T> g = {
            .R = N, .E = E, .N = F, .K = K, .bins_E = bins_E,
            .a = {{.p = static_cast<const T *>(x_RK), .se = 0, .si = K, .sk = 1, .index = index_N,
                   .index_div = static_cast<int32_t>(index_div), .index_rows = index_rows}},
            .b = {{.p = w, .se = F * K, .si = K, .sk = 1}, {.p = w + E * F * K, .se = F * K, .si = K, .sk = 1}},
            .bad = verdict_in(word),
        };
        const act_out<T> out = {act_plain(act), bias, bias + E * F, F, F, static_cast<T *>(h_NU),
                                static_cast<T *>(a_NF), row_F};
        const auto run = [&]<int parts>() {
            return act_sm90_takes<parts>(g, out) ? act_sm90<parts>(g, out, nullptr) : -1;
        };
        return gated_act(act) ? run.template operator()<2>() : run.template operator()<1>();
    });
}
DIRECT direct_sort_rows(int64_t dtype, int64_t R, int64_t K, int64_t D, int64_t N, const void *from_RD,
                        const int32_t *order_N, const int32_t *inverse_RK, void *to_ND, int64_t row_D, uint64_t *word) {
    TRY(moe_cuda_table()->ready(0));
    return by_half(dtype, [&]<class T>(T) {
        return sort_rows(R, K, D, N, static_cast<const T *>(from_RD), order_N, inverse_RK, static_cast<T *>(to_ND),
                         row_D, verdict_in(word), nullptr);
    });
}
// wide: weights are floats. parts_SC: [N / SLAB + E, F, or 2F where h is gated].
DIRECT direct_dact(int64_t dtype, int64_t act_, int64_t N, int64_t F, int64_t E, const int32_t *bins_E,
                   int64_t flat_ids, const int32_t *order_N, const void *weights, int64_t wide, const void *h_NU,
                   const void *da_NF, void *sa_NF, void *dh_NU, float *ds_NP, float *parts_SC, uint64_t *) {
    const int act = static_cast<int>(act_);
    TRY(moe_cuda_table()->ready(0));
    return by_half(dtype, [&]<class T>(T) {
        const dact_rows<T> d = {
            gated_act(act), act_plain(act), F, F, flat_ids, order_N, {weights, wide != 0},
            static_cast<const T *>(h_NU), static_cast<T *>(sa_NF), static_cast<T *>(dh_NU),
        };
        return dact_pass(d, {E, N, bins_E}, static_cast<const T *>(da_NF), ds_NP, parts_SC, d.gated ? 2 * F : F,
                         nullptr);
    });
}
