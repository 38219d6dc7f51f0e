// ops.cpp: torch ops -> the C functions of moe.h or their CUDA twins, through torch's stable ABI. With wires.cpp and
// door.hpp, all the C++ of csrc/.
//
// Each op checks its arguments at the door, allocates outputs and workspace, runs one function (RUN: moe_<name>, or its
// twin in cuda/ if the tensors are there) and reports its status. It computes nothing. Schemas, shape functions and
// gradients are in moe_ext/ops/, where an op has the same name and order of arguments; shapes are spelled as in moe.h.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "door.hpp"

namespace {

// ---- index ----------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> sort(In x, int64_t end_bit) {
    Door door{"sort"};
    Dim n{"n"};
    void *x_n = door.in("x", x, INTS, {&n});
    Tensor sorted = empty(x, dtype_of(x), {n}), indices = empty(x, dtype_of(x), {n});
    Workspace work(door, RUN(sort_workspace, n));
    door.done(RUN(sort, dtype_of(x), n, static_cast<int>(end_bit), x_n, work.p, sorted.data_ptr(), indices.data_ptr()),
              "n=", n.n, " indices must fit the dtype of x, and end_bit=", end_bit, " its bits");
    return {sorted, indices};
}

Tensor histogram(In x, int64_t max_val) {
    Door door{"histogram"};
    Dim rows{"B"}, n{"n"}, bins{"max_val", max_val};
    const bool flat = x.dim() == 1;
    void *x_rn = flat ? door.in("x", x, INTS, {&n}) : door.in("x", x, INTS, {&rows, &n});
    if (max_val < 0) door.fail("max_val is ", max_val, ", wanted >= 0");
    Tensor counts = flat ? empty(x, MOE_I32, {bins}) : empty(x, MOE_I32, {rows, bins});
    door.done(RUN(histogram, dtype_of(x), flat ? 1 : rows.n, n, bins, x_rn, i32(counts)),
              "max_val=", max_val);
    return counts;
}

// Sums along the last dimension.
Tensor cumsum(In x, bool exclusive) {
    Door door{"cumsum"};
    Dim rows{"rows", 1}, n{"n"};
    void *x_rn = x.dim() == 1 ? door.in("x", x, INTS, {&n}) : door.in("x", x, INTS, {&(rows.n = -1, rows), &n});
    Tensor y = dense_like(x);
    door.done(RUN(cumsum, dtype_of(x), rows, n, exclusive, x_rn, y.data_ptr()));
    return y;
}

Tensor topology(In padded_bins, int64_t block, int64_t rows, int64_t cols) {
    Door door{"topology"};
    Dim E{"E"};
    auto *bins_E = door.i32("padded_bins", padded_bins, {&E});
    Tensor columns = empty(padded_bins, MOE_I16, {rows * cols});
    door.done(RUN(topology, E, block, rows, cols, bins_E, static_cast<int16_t *>(columns.data_ptr())),
              "padded_bins must be multiples of block=", block, " that end at rows*block, rows=", rows,
              ", and E*cols=", E * cols, " must fit int16");
    return columns;
}

Tensor replicate(In x, In bins, int64_t n) {
    Door door{"replicate"};
    Dim rows{"B"}, nb{"nb"};
    void *x_rb = door.in("x", x, FLOATS | INTS, {&rows, &nb});
    auto *bins_b = door.i32("bins", bins, {&nb});
    Tensor y = empty(x, dtype_of(x), {rows, n});
    door.done(RUN(replicate, dtype_of(x), rows, nb, n, x_rb, bins_b, y.data_ptr()), "bins must end within n=", n);
    return y;
}

Tensor replicate_backward(In dy, In bins) {
    Door door{"replicate_backward"};
    Dim rows{"B"}, n{"n"}, nb{"nb"};
    void *dy_rn = door.in("dy", dy, FLOATS | INTS, {&rows, &n});
    auto *bins_b = door.i32("bins", bins, {&nb});
    Tensor dx = empty(dy, dtype_of(dy), {rows, nb});
    door.done(RUN(replicate_backward, dtype_of(dy), rows, nb, n, dy_rn, bins_b, dx.data_ptr()));
    return dx;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> route_index(In ids, int64_t num_experts) {
    Door door{"route_index"};
    Dim T{"T"}, K{"K"};
    auto *ids_N = door.i32("ids", ids, {&T, &K});
    const int64_t N = T * K, E = num_experts;
    if (E < 0) door.fail("num_experts is ", E, ", wanted >= 0");
    Tensor counts = empty(ids, MOE_I32, {E}), bins = empty(ids, MOE_I32, {E});
    Tensor order = empty(ids, MOE_I32, {N}), inverse = empty(ids, MOE_I32, {T, K});
    Workspace work(door, RUN(route_index_workspace, N, E));
    const int status = RUN(route_index, N, E, ids_N, work.p, i32(counts), i32(bins), i32(order), i32(inverse));
    if (status == MOE_BAD_INDEX) door.bad_index("ids", ids_N, N, E, -1);
    door.done(status, "num_experts=", E);
    return {counts, bins, order, inverse};
}

// ---- movement -------------------------------------------------------------------------------------------------------

moe_layout layout(Door &door, Dim &N, Dim &P, In order, In bins, MaybeIn out_bins, int64_t top_k,
                  int64_t capacity) {
    Dim E{"E"};
    const int32_t *order_N = door.i32("indices", order, {&N});
    const int32_t *bins_E = door.i32("bins", bins, {&E});
    const int32_t *out_bins_E = door.i32("padded_bins", out_bins, {&E});
    if (top_k < 1 || N % top_k) door.fail("indices has ", N.n, " entries, wanted a multiple of top_k=", top_k);
    return {N, top_k, E, P, capacity, order_N, bins_E, out_bins_E};
}

const char LAYOUT_RULE[] = "indices must hold flat ids 0 .. N-1, and bins must end within them and the rows of x or y";

Tensor gather(In x, MaybeIn weights, In order, In bins, MaybeIn out_bins,
              int64_t rows, int64_t top_k, int64_t capacity) {
    Door door{"gather"};
    Dim T{"T"}, D{"D"}, N{"N"}, P{"rows", rows};
    void *x_TD = door.in("x", x, FLOATS, {&T, &D});
    N.n = T * top_k;
    void *weights_N = door.in("weights", weights, weight_dtypes(x), {&N});
    const moe_layout l = layout(door, N, P, order, bins, out_bins, top_k, capacity);
    Tensor y = empty(x, dtype_of(x), {P, D});
    const int wdtype = dtype_of_weights(weights);
    door.done(RUN(gather, dtype_of(x), wdtype, D, &l, x_TD, weights_N, y.data_ptr()), LAYOUT_RULE);
    return y;
}

Tensor scatter(In x, MaybeIn weights, In order, In bins, MaybeIn out_bins,
               int64_t top_k, int64_t capacity) {
    Door door{"scatter"};
    Dim D{"D"}, N{"N"}, P{"rows"};
    void *x_PD = door.in("x", x, FLOATS, {&P, &D});
    const moe_layout l = layout(door, N, P, order, bins, out_bins, top_k, capacity);
    void *weights_N = door.in("weights", weights, weight_dtypes(x), {&N});
    Tensor y = empty(x, dtype_of(x), {N / top_k, D});
    Workspace work(door, RUN(scatter_workspace, &l));
    door.done(RUN(scatter, dtype_of(x), dtype_of_weights(weights), D, &l, x_PD, weights_N, work.p, y.data_ptr()),
              LAYOUT_RULE);
    return y;
}

Tensor scatter_dweights(In x, In dy, In order, In bins, MaybeIn out_bins,
                        int64_t top_k, int64_t capacity, ScalarType dtype) {
    Door door{"scatter_dweights"};
    Dim T{"T"}, D{"D"}, N{"N"}, P{"rows"};
    void *x_PD = door.in("x", x, FLOATS, {&P, &D});
    void *dy_TD = door.in("dy", dy, only(dtype_of(x)), {&T, &D});
    N.n = T * top_k;
    const moe_layout l = layout(door, N, P, order, bins, out_bins, top_k, capacity);
    Tensor dweights = empty(x, dtype_of(dtype), {N});
    Workspace work(door, RUN(scatter_dweights_workspace, &l));
    door.done(RUN(scatter_dweights, dtype_of(x), dtype_of(dtype), D, &l, x_PD, dy_TD, work.p, dweights.data_ptr()),
              LAYOUT_RULE);
    return dweights;
}

// ---- experts --------------------------------------------------------------------------------------------------------

Tensor grouped_gemm(In x, In w, In bins) {
    Door door{"grouped_gemm"};
    Dim R{"R"}, E{"E"}, I{"I"}, O{"O"};
    void *x_RI = door.in("x", x, FLOATS, {&R, &I});
    void *w_EIO = door.in("w", w, only(dtype_of(x)), {&E, &I, &O}, ANY);
    auto *bins_E = door.i32("bins", bins, {&E});
    Tensor y = empty(x, dtype_of(x), {R, O});
    Workspace work(door, RUN(grouped_gemm_workspace, dtype_of(x), R, E, I, O));
    door.done(RUN(grouped_gemm, dtype_of(x), R, E, I, O, x_RI, matrix(w_EIO, w), bins_E, work.p, y.data_ptr()),
              "x has R=", R.n, " rows");
    return y;
}

Tensor grouped_gemm_wgrad(In x, In dy, In bins) {
    Door door{"grouped_gemm_wgrad"};
    Dim R{"R"}, E{"E"}, I{"I"}, O{"O"};
    void *x_RI = door.in("x", x, FLOATS, {&R, &I});
    void *dy_RO = door.in("dy", dy, only(dtype_of(x)), {&R, &O});
    auto *bins_E = door.i32("bins", bins, {&E});
    Tensor dw = empty(x, dtype_of(x), {E, I, O});
    Workspace work(door, RUN(grouped_gemm_wgrad_workspace, dtype_of(x), R, E, I, O));
    const moe_mat dw_EIO = matrix(dw.data_ptr(), dw);
    door.done(RUN(grouped_gemm_wgrad, dtype_of(x), R, E, I, O, x_RI, dy_RO, bins_E, work.p, dw_EIO),
              "x and dy have R=", R.n, " rows");
    return dw;
}

// The names of moe_act, for messages.
const char *const ACTS[] = {"swiglu", "geglu", "geglu_tanh", "swiglu_oai", "silu", "gelu", "gelu_tanh", "relu"};

Tensor activation(In h, int64_t act) {
    Door door{"activation"};
    Dim N{"N"}, U{"U"};
    void *h_NU = door.in("h", h, FLOATS, {&N, &U});
    const int a = door.choice("act", act, MOE_RELU);
    if (moe_act_gated(a) && U % 2)
        door.fail("h has ", U.n, " columns, but ", ACTS[a], " wants [gate | up] of equal width");
    const int64_t F = moe_act_gated(a) ? U / 2 : U.n;
    Tensor y = empty(h, dtype_of(h), {N, F});
    door.done(RUN(activation, dtype_of(h), a, N, F, h_NU, y.data_ptr()));
    return y;
}

Tensor activation_backward(In h, In da, int64_t act) {
    Door door{"activation_backward"};
    Dim N{"N"}, U{"U"}, F{"F"};
    void *h_NU = door.in("h", h, FLOATS, {&N, &U});
    const int a = door.choice("act", act, MOE_RELU);
    F.n = moe_act_gated(a) ? U / 2 : U.n;
    void *da_NF = door.in("da", da, only(dtype_of(h)), {&N, &F});
    Tensor dh = empty(h, dtype_of(h), {N, U});
    door.done(RUN(activation_backward, dtype_of(h), a, N, F, h_NU, da_NF, dh.data_ptr()));
    return dh;
}

// Where up begins in one tensor [gate | up]: `offset` elements further, with the strides of gate.
void *after(void *p, int64_t offset, int dtype) {
    return p ? static_cast<char *>(p) + offset * moe_size(dtype) : nullptr;
}

// That of up in w13_E2FD, or in [gate | up] of 2F rows.
moe_mat second(moe_mat gate, In w13, int64_t F, int dtype) {
    if (gate.p) gate.p = after(gate.p, w13.dim() == 4 ? w13.stride(1) : F * w13.stride(1), dtype);
    return gate;
}

moe_expert_args expert_args(Door &door, In x, In gate, MaybeIn up, In down,
                            In weights, In order, In inverse, In bins,
                            MaybeIn gate_bias, MaybeIn up_bias, MaybeIn down_bias, int64_t act,
                            int64_t num_copies) {
    Dim R{"R"}, K{"K"}, N{"R*K"}, E{"E"}, D{"D"}, F{"F"}, G{"gate rows"};
    const unsigned dtype = only(dtype_of(x));
    moe_expert_args a = {};
    a.dtype = dtype_of(x);
    a.act = door.choice("act", act, MOE_RELU);
    a.x_RD = door.in("x", x, FLOATS, {&R, &D});
    void *down_p = door.in("down", down, dtype, {&E, &D, &F}, ANY);
    const bool gated = moe_act_gated(a.act), adjacent = gated && !up;
    if (up && !gated) door.fail("up is given, but act=\"", ACTS[a.act], "\" has no gate. Hint: up=None");
    if (up_bias && !up) door.fail("up_bias is given without up. Hint: gate_bias of both, [E, 2F]");
    G = {adjacent ? "2F" : "F", adjacent ? 2 * F.n : F.n};
    if (gate.dim() == 4 && adjacent) {          // w13_E2FD, of any strides
        Dim two{"2", 2};
        a.gate_EFD = {door.in("gate", gate, dtype, {&E, &two, &F, &D}, ANY), gate.stride(0), gate.stride(2),
                      gate.stride(3)};
    } else a.gate_EFD = matrix(door.in("gate", gate, dtype, {&E, &G, &D}, ANY), gate);
    if (up) a.up_EFD = matrix(door.in("up", *up, dtype, {&E, &F, &D}, ANY), *up);
    if (adjacent) a.up_EFD = second(a.gate_EFD, gate, F, a.dtype);
    a.down_EDF = matrix(down_p, down);
    void *gate_bias_p = door.in("gate_bias", gate_bias, dtype, {&E, &G});
    a.gate_bias_EF = gate_bias_p;
    a.up_bias_EF = adjacent ? after(gate_bias_p, F, a.dtype) : door.in("up_bias", up_bias, dtype, {&E, &F});
    a.down_bias_ED = door.in("down_bias", down_bias, dtype, {&E, &D});
    a.gate_bias_se = G;
    a.up_bias_se = adjacent ? G.n : F.n;
    a.down_bias_se = D;
    a.weights_RK = door.in("weights", weights, weight_dtypes(x), {&R, &K});
    a.wdtype = dtype_of(weights);
    N.n = R * K;
    a.order_RK = door.i32("index.order_N", order, {&N});
    a.inverse_RK = door.i32("index.inverse_TK", inverse, {&R, &K});
    a.bins_E = door.i32("index.bins_E", bins, {&E});
    a.R = R, a.K = K, a.E = E, a.D = D, a.F = F, a.N = num_copies;
    return a;
}
const char EXPERT_RULE[] = "wanted index = route_index of the ids, and num_copies = the number of ids >= 0";

std::tuple<Tensor, Tensor> expert_mlp(In x, In gate, MaybeIn up, In down,
                                      In weights, In order, In inverse, In bins,
                                      MaybeIn gate_bias, MaybeIn up_bias, MaybeIn down_bias,
                                      int64_t act, int64_t num_copies) {
    Door door{"expert_mlp"};
    const moe_expert_args a = expert_args(door, x, gate, up, down, weights, order, inverse, bins, gate_bias, up_bias,
                                          down_bias, act, num_copies);
    Tensor y = empty(x, a.dtype, {a.R, a.D}), h = empty(x, a.dtype, {a.N, moe_act_gated(a.act) ? 2 * a.F : a.F});
    Workspace work(door, RUN(expert_mlp_workspace, &a));
    door.done(RUN(expert_mlp, &a, work.p, y.data_ptr(), h.data_ptr()), EXPERT_RULE);
    return {y, h};
}

// Gradients of x, gate, up, down, weights and the three biases: bit i of `wanted` asks for the i-th. Of the others, and
// of an absent argument, an empty tensor. x may be absent where gate's and up's are not asked for.
using ExpertGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
ExpertGrads expert_mlp_backward(In dy, In h, MaybeIn x, In gate, MaybeIn up,
                                In down, In weights, In order, In inverse,
                                In bins, MaybeIn gate_bias, MaybeIn up_bias, MaybeIn down_bias,
                                int64_t act, int64_t wanted) {
    Door door{"expert_mlp_backward"};
    In like_x = x ? *x : dy;
    moe_expert_args a = expert_args(door, like_x, gate, up, down, weights, order, inverse, bins, gate_bias, up_bias,
                                    down_bias, act, h.size(0));
    Dim R{"R", a.R}, D{"D", a.D}, N{"N", a.N}, U{"U", moe_act_gated(a.act) ? 2 * a.F : a.F};
    moe_expert_grads g = {};
    g.dy_RD = door.in("dy", dy, only(a.dtype), {&R, &D});
    g.h_NU = door.in("h", h, only(a.dtype), {&N, &U});
    if (!x && wanted & 0b110) door.fail("x is absent, but the gradients of gate and up need it");
    if (!x) a.x_RD = nullptr;
    auto grad = [&, i = 0](MaybeIn t) mutable {
        const bool is_wanted = wanted >> i++ & 1;
        return t && is_wanted ? dense_like(*t) : empty(dy, a.dtype, {0});
    };
    auto data = [](In dt) { return dt.numel() ? dt.data_ptr() : nullptr; };
    auto into = [](In dt) {
        const int64_t rows = dt.dim() - 2;
        return dt.numel() ? moe_mat{dt.data_ptr(), dt.stride(0), dt.stride(rows), dt.stride(rows + 1)} : moe_mat{};
    };
    Tensor dx = grad(like_x), dgate = grad(gate), dup = grad(up), ddown = grad(down), dweights = grad(weights);
    Tensor dgate_bias = grad(gate_bias), dup_bias = grad(up_bias), ddown_bias = grad(down_bias);
    const bool adjacent = a.up_EFD.p && !up;
    g.dx_RD = data(dx);
    g.dweights_RK = data(dweights);
    g.dgate_EFD = into(dgate);
    g.dup_EFD = adjacent ? second(g.dgate_EFD, dgate, a.F, a.dtype) : into(dup);
    g.ddown_EDF = into(ddown);
    g.dgate_bias_EF = data(dgate_bias);
    g.dup_bias_EF = adjacent ? after(g.dgate_bias_EF, a.F, a.dtype) : data(dup_bias);
    g.ddown_bias_ED = data(ddown_bias);
    g.dgate_bias_se = a.gate_bias_se, g.dup_bias_se = a.up_bias_se, g.ddown_bias_se = a.down_bias_se;
    Workspace work(door, RUN(expert_mlp_backward_workspace, &a, &g));
    door.done(RUN(expert_mlp_backward, &a, work.p, &g), EXPERT_RULE);
    return {dx, dgate, dup, ddown, dweights, dgate_bias, dup_bias, ddown_bias};
}

// ---- exchange -------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> exchange_plan(In ids, int64_t num_experts, int64_t ranks) {
    Door door{"exchange_plan"};
    Dim T{"T"}, K{"K"};
    auto *ids_TK = door.i32("ids", ids, {&T, &K});
    const int64_t E = num_experts, P = ranks;
    if (P < 1 || E < 0 || E % P) door.fail("num_experts=", E, " do not divide over ranks=", P);
    Tensor counts = empty(ids, MOE_I32, {P, 2}), send = empty(ids, MOE_I32, {T * (P < K ? P : K.n)});
    Tensor place = empty(ids, MOE_I32, {T, P});
    Workspace work(door, RUN(exchange_plan_workspace, T, P));
    const int status = RUN(exchange_plan, T, K, E, P, ids_TK, work.p, i32(counts), i32(send), i32(place));
    if (status == MOE_BAD_INDEX) door.bad_index("ids", ids_TK, T * K, E, -1);
    door.done(status, "T=", T.n, " * ranks=", P, " must fit int32");
    return {counts, send, place};
}

// Elements of x's dtype in a row of a message.
int64_t message_width(const moe_message &m) {
    return moe_message_bytes(&m) / (m.dtype == MOE_F64 ? 8 : m.dtype == MOE_F32 ? 4 : 2);
}

// The parts behind the values are read and written as what they are.
void check_message(const Door &door, const moe_message &m, const void *rows) {
    if ((m.ids || m.weights) && reinterpret_cast<uintptr_t>(rows) % 16)
        door.fail("message does not begin at a multiple of 16 bytes. Hint: message.clone()");
}

Tensor exchange_pack(In x, MaybeIn ids, MaybeIn weights, MaybeIn send, int64_t num_experts, int64_t ranks,
                     int64_t rows) {
    Door door{"exchange_pack"};
    Dim T{"T"}, D{"D"}, K{"K"}, M{"M"};
    void *x_TD = door.in("x", x, FLOATS, {&T, &D});
    auto *ids_TK = door.i32("ids", ids, {&T, &K});
    void *weights_TK = door.in("weights", weights, weight_dtypes(x), {&T, &K});
    auto *send_M = door.i32("send", send, {&M});
    const int64_t S = rows, P = ranks;
    if (S < 0 || S > (send ? M.n : T.n)) door.fail("rows is ", S, ", but send names ", send ? M.n : T.n);
    if (ids && !send) door.fail("ids are given without send, which says where each row goes");
    const moe_message m = {dtype_of(x), dtype_of_weights(weights), D, ids || weights ? K.n : 0, ids.has_value(),
                           weights.has_value()};
    Tensor message = empty(x, m.dtype, {S, message_width(m)});
    door.done(RUN(exchange_pack, &m, T, S, num_experts, P, send_M, x_TD, ids_TK, weights_TK, message.data_ptr()),
              "send must hold flat pairs of a token and a rank for each of rows=", S, ", T=", T.n, " and ranks=", P);
    return message;
}

std::tuple<Tensor, Tensor, Tensor> exchange_unpack(In message, int64_t d, int64_t k, ScalarType weights_dtype) {
    Door door{"exchange_unpack"};
    const moe_message m = {dtype_of(message), dtype_of(weights_dtype), d, k, 1, 1};
    Dim R{"R"}, W{"width", m.dtype <= MOE_F16 ? message_width(m) : -1};
    void *rows_RW = door.in("message", message, FLOATS, {&R, &W});
    check_message(door, m, rows_RW);
    Tensor x = empty(message, m.dtype, {R, d}), ids = empty(message, MOE_I32, {R, k});
    Tensor weights = empty(message, m.wdtype, {R, k});
    door.done(RUN(exchange_unpack, &m, R, rows_RW, x.data_ptr(), i32(ids), weights.data_ptr()));
    return {x, ids, weights};
}

// weights [T,K] are those that the message carries, empty if ids is absent: then it carries none.
std::tuple<Tensor, Tensor> exchange_combine(In message, In place, MaybeIn ids, int64_t num_experts, int64_t d,
                                            ScalarType weights_dtype) {
    Door door{"exchange_combine"};
    Dim S{"S"}, T{"T"}, P{"P"}, K{"K"}, W{"width"};
    void *rows_SW = door.in("message", message, FLOATS, {&S, &W});
    auto *place_TP = door.i32("place", place, {&T, &P});
    auto *ids_TK = door.i32("ids", ids, {&T, &K});
    const moe_message m = {dtype_of(message), dtype_of(weights_dtype), d, ids ? K.n : 0, 0, ids.has_value()};
    if (W != message_width(m)) door.fail("message has rows of ", W.n, ", wanted ", message_width(m), " for D=", d);
    check_message(door, m, rows_SW);
    Tensor y = empty(message, m.dtype, {T, d});
    Tensor weights = ids ? empty(message, m.wdtype, {T, K}) : empty(message, m.wdtype, {0});
    door.done(RUN(exchange_combine, &m, T, S, num_experts, P, place_TP, ids_TK, rows_SW, y.data_ptr(),
                  weights.data_ptr()),
              "place must hold rows below S=", S.n, " or -1, and ids lie in [-1, ", num_experts, ")");
    return {y, weights};
}

// ---- router ---------------------------------------------------------------------------------------------------------

// After MOE_BAD_INDEX: says which forced id is out of range or the second of its token.
[[noreturn]] void bad_choice(const Door &door, const int32_t *ids_TK, int64_t T, int64_t K, int64_t E) {
    for (int64_t t = 0; t < T; t++)
        for (int64_t k = 0; k < K; k++)
            for (int64_t j = 0; j < k; j++)
                if (const int32_t id = ids_TK[t * K + k]; id >= 0 && id < E && id == ids_TK[t * K + j])
                    door.fail("ids has expert ", id, " twice for token ", t, ", wanted distinct experts, or -1");
    door.bad_index("ids", ids_TK, T * K, E, -1);
}

std::tuple<Tensor, Tensor, Tensor> router(In logits, MaybeIn select_bias, MaybeIn forced, int64_t k, int64_t score,
                                          double norm_p, double scale, bool balanced) {
    Door door{"router"};
    Dim T{"T"}, E{"E"};
    void *logits_TE = door.in("logits", logits, FLOATS, {&T, &E});
    auto *bias_E = static_cast<float *>(door.in("select_bias", select_bias, only(MOE_F32), {&E}));
    if (k < 1 || k > E) door.fail("k is ", k, ", wanted 1 .. E=", E.n);
    Dim K{"k", k};
    auto *forced_TK = door.i32("ids", forced, {&T, &K});
    if (forced && balanced) door.fail("ids and balanced each make the choice. Hint: balanced=False");
    const int dtype = dtype_of(logits);
    const moe_router_args a = {dtype, door.choice("score", score, MOE_SIGMOID), balanced, T, E, k, norm_p, scale};
    Tensor weights = empty(logits, dtype, {T, k}), ids = empty(logits, MOE_I32, {T, k});
    Tensor scores = empty(logits, dtype, {T, E});
    const int status = RUN(router, &a, logits_TE, bias_E, forced_TK, weights.data_ptr(), i32(ids), scores.data_ptr());
    if (status == MOE_BAD_INDEX) bad_choice(door, forced_TK, T, k, E);
    door.done(status, "wanted no NaN in logits and norm_p=", norm_p, " >= 0. Hint: torch.isnan(logits).any(dim=1)");
    return {weights, ids, scores};
}

Tensor router_backward(In logits, In scores, In ids, MaybeIn dweights,
                       MaybeIn dscores, int64_t score, double norm_p, double scale) {
    Door door{"router_backward"};
    Dim T{"T"}, E{"E"}, K{"K"};
    const int dtype = dtype_of(logits);
    void *logits_TE = door.in("logits", logits, FLOATS, {&T, &E});
    void *scores_TE = door.in("scores", scores, only(dtype), {&T, &E});
    auto *ids_TK = door.i32("ids", ids, {&T, &K});
    void *dweights_TK = door.in("dweights", dweights, only(dtype), {&T, &K});
    void *dscores_TE = door.in("dscores", dscores, only(dtype), {&T, &E});
    const moe_router_args a = {dtype, door.choice("score", score, MOE_SIGMOID), 0, T, E, K, norm_p, scale};
    Tensor dlogits = empty(logits, dtype, {T, E});
    door.done(RUN(router_backward, &a, logits_TE, scores_TE, ids_TK, dweights_TK, dscores_TE, dlogits.data_ptr()));
    return dlogits;
}

// Rows [0, T) in scopes of S: how many there are. No tokens in scopes of no rows are one empty scope.
int64_t scopes_of(const Door &door, int64_t T, int64_t S) {
    if (S < 0 || (S == 0 ? T != 0 : T % S)) door.fail("T=", T, " is not a multiple of rows_per_scope=", S);
    return S ? T / S : 1;
}

Tensor capacity_drop(In ids, MaybeIn priority, In capacity, int64_t num_experts, int64_t rows_per_scope) {
    Door door{"capacity_drop"};
    Dim T{"T"}, K{"K"}, G{"G"};
    auto *ids_TK = door.i32("ids", ids, {&T, &K});
    void *priority_TK = door.in("priority", priority, only(MOE_F64) | only(MOE_F32), {&T, &K});
    const int64_t S = rows_per_scope, E = num_experts;
    G.n = scopes_of(door, T, S);
    auto *capacity_G = door.i32("capacity", capacity, {&G});
    const int dtype = priority ? dtype_of(*priority) : MOE_F32;
    Tensor kept = empty(ids, MOE_I32, {T, K});
    Workspace work(door, RUN(capacity_workspace, S, K, E));
    const int status = RUN(capacity, dtype, T, S, K, E, ids_TK, priority_TK, capacity_G, work.p, i32(kept));
    if (status == MOE_BAD_INDEX) door.bad_index("ids", ids_TK, T * K, E, -1);
    door.done(status, "wanted capacity >= 0 and no NaN in priority, num_experts=", E);
    return kept;
}

Tensor balance_counts(In ids, int64_t num_experts, int64_t rows_per_scope) {
    Door door{"balance_counts"};
    Dim T{"T"}, K{"K"};
    auto *ids_TK = door.i32("ids", ids, {&T, &K});
    const int64_t S = rows_per_scope;
    Tensor counts = empty(ids, MOE_I32, {scopes_of(door, T, S), num_experts});
    const int status = RUN(balance_counts, T, S, K, num_experts, ids_TK, i32(counts));
    if (status == MOE_BAD_INDEX) door.bad_index("ids", ids_TK, T * K, num_experts, -1);
    door.done(status, "num_experts=", num_experts);
    return counts;
}

// Number of rows in each of the scopes that counts_GE describes.
int64_t rows_of_scope(const Door &door, int64_t T, int64_t G) {
    if (T == 0) return 0;
    if (G < 1 || T % G) door.fail("counts has G=", G, " scopes, which do not divide T=", T, " rows of scores");
    return T / G;
}

Tensor balance_loss(In scores, In counts, int64_t top_k, int64_t form) {
    Door door{"balance_loss"};
    Dim T{"T"}, E{"E"}, G{"G"};
    void *scores_TE = door.in("scores", scores, FLOATS, {&T, &E});
    auto *counts_GE = door.i32("counts", counts, {&G, &E});
    const int64_t S = rows_of_scope(door, T, G);
    const int f = door.choice("form", form, MOE_BALANCE_MSE);
    Tensor loss = empty(scores, real_of(dtype_of(scores)), {});
    Workspace work(door, RUN(balance_loss_workspace, T, S, E));
    door.done(RUN(balance_loss, dtype_of(scores), f, T, S, top_k, E, scores_TE, counts_GE, work.p, loss.data_ptr()),
              "wanted top_k=", top_k, " >= 1");
    return loss;
}

Tensor balance_loss_backward(In scores, In counts, In dloss, int64_t top_k,
                             int64_t form) {
    Door door{"balance_loss_backward"};
    Dim T{"T"}, E{"E"}, G{"G"};
    void *scores_TE = door.in("scores", scores, FLOATS, {&T, &E});
    auto *counts_GE = door.i32("counts", counts, {&G, &E});
    void *dloss_p = door.in("dloss", dloss, only(real_of(dtype_of(scores))), {});
    Tensor dscores = empty(scores, dtype_of(scores), {T, E});
    const int f = door.choice("form", form, MOE_BALANCE_MSE);
    const int64_t S = rows_of_scope(door, T, G);
    Workspace work(door, RUN(balance_loss_workspace, T, S, E));
    door.done(RUN(balance_loss_backward, dtype_of(scores), f, T, S, top_k, E, scores_TE, counts_GE, dloss_p, work.p,
                  dscores.data_ptr()));
    return dscores;
}

std::tuple<Tensor, Tensor> z_loss(In logits) {
    Door door{"z_loss"};
    Dim T{"T"}, E{"E"};
    void *logits_TE = door.in("logits", logits, FLOATS, {&T, &E});
    Tensor lse = empty(logits, real_of(dtype_of(logits)), {T});
    Tensor loss = empty(logits, real_of(dtype_of(logits)), {});
    door.done(RUN(z_loss, dtype_of(logits), T, E, logits_TE, lse.data_ptr(), loss.data_ptr()));
    return {loss, lse};
}

Tensor z_loss_backward(In logits, In lse, In dloss) {
    Door door{"z_loss_backward"};
    Dim T{"T"}, E{"E"};
    void *logits_TE = door.in("logits", logits, FLOATS, {&T, &E});
    void *lse_T = door.in("lse", lse, only(real_of(dtype_of(logits))), {&T});
    Tensor dlogits = empty(logits, dtype_of(logits), {T, E});
    void *dloss_p = door.in("dloss", dloss, only(real_of(dtype_of(logits))), {});
    door.done(RUN(z_loss_backward, dtype_of(logits), T, E, logits_TE, lse_T, dloss_p, dlogits.data_ptr()));
    return dlogits;
}

Tensor select_bias_update(In bias, In counts, double rate) {
    Door door{"select_bias_update"};
    Dim E{"E"};
    door.in("bias", bias, only(MOE_F32), {&E});
    auto *counts_E = static_cast<int64_t *>(door.in("counts", counts, only(MOE_I64), {&E}));
    Tensor moved = torch::stable::clone(bias);
    door.done(RUN(select_bias_update, E, rate, counts_E, static_cast<float *>(moved.data_ptr())));
    return moved;
}

// ---- head -----------------------------------------------------------------------------------------------------------

// Overwrites logits by their gradient.
Tensor xent_(In logits, In targets, int64_t ignore_index, double grad_scale) {
    Door door{"xent_"};
    Dim M{"M"}, V{"V"};
    void *logits_MV = door.in("logits", logits, FLOATS, {&M, &V});
    auto *targets_M = static_cast<int64_t *>(door.in("targets", targets, only(MOE_I64), {&M}));
    const int real = real_of(dtype_of(logits));
    Tensor loss = empty(logits, real, {M});
    Workspace lse(door, static_cast<size_t>(M * 8));
    const int status = RUN(xent, dtype_of(logits), M, V, ignore_index, grad_scale, targets_M, logits_MV,
                                loss.data_ptr(), lse.p);
    if (status == MOE_BAD_INDEX) door.bad_index("targets", targets_M, M, V, ignore_index);
    door.done(status, "wanted no NaN in logits");
    return loss;
}

// ---- norms and RoPE -------------------------------------------------------------------------------------------------

// Of w beside x.
unsigned norm_dtypes(In x) { return only(dtype_of(x)) | only(real_of(dtype_of(x))); }

std::tuple<Tensor, Tensor> rms_norm(In x, In w, double eps) {
    Door door{"rms_norm"};
    Dim R{"R"}, n{"n"};
    void *x_Rn = door.in("x", x, FLOATS, {&R, &n}), *w_n = door.in("w", w, norm_dtypes(x), {&n});
    Tensor y = empty(x, dtype_of(x), {R, n}), r = empty(x, real_of(dtype_of(x)), {R});
    Workspace work(door, RUN(rms_norm_workspace, n));
    door.done(RUN(rms_norm, dtype_of(x), dtype_of(w), R, n, eps, x_Rn, w_n, work.p, y.data_ptr(), r.data_ptr()),
              "x has n=", n.n, " columns");
    return {y, r};
}

std::tuple<Tensor, Tensor> rms_norm_backward(In x, In w, In r, In dy) {
    Door door{"rms_norm_backward"};
    Dim R{"R"}, n{"n"};
    void *x_Rn = door.in("x", x, FLOATS, {&R, &n}), *w_n = door.in("w", w, norm_dtypes(x), {&n});
    void *r_R = door.in("r", r, only(real_of(dtype_of(x))), {&R});
    void *dy_Rn = door.in("dy", dy, only(dtype_of(x)), {&R, &n});
    Tensor dx = empty(x, dtype_of(x), {R, n}), dw = empty(x, dtype_of(w), {n});
    Workspace work(door, RUN(rms_norm_backward_workspace, R, n));
    door.done(RUN(rms_norm_backward, dtype_of(x), dtype_of(w), R, n, x_Rn, w_n, r_R, dy_Rn, work.p, dx.data_ptr(),
                  dw.data_ptr()), "x has n=", n.n, " columns");
    return {dx, dw};
}

std::tuple<Tensor, Tensor, Tensor> add_norm(In x, MaybeIn y, In w, MaybeIn b, double eps, bool centred, int64_t half) {
    Door door{"add_norm"};
    Dim R{"R"}, n{"n"};
    const auto f32 = [&](const char *name, In t, Shape shape) {
        return static_cast<float *>(door.in(name, t, only(MOE_F32), shape));
    };
    float *x_Rn = f32("x", x, {&R, &n});
    const int dtype = door.choice("half", half, MOE_F16);
    void *y_Rn = door.in("y", y, only(dtype), {&R, &n});
    float *w_n = f32("w", w, {&n}), *b_n = b ? f32("b", *b, {&n}) : nullptr;
    Tensor s = empty(x, MOE_F32, {y ? R.n : 0, n}), z = empty(x, dtype, {R, n}), stats = empty(x, MOE_F32, {R, 2});
    door.done(RUN(add_norm, dtype, centred, R, n, eps, x_Rn, y_Rn, w_n, b_n, static_cast<float *>(s.data_ptr()),
                  z.data_ptr(), static_cast<float *>(stats.data_ptr())), "x has n=", n.n, " columns");
    return {s, z, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_backward(MaybeIn ds, In dz, In s, In w, In stats, bool centred,
                                                             bool want_dy, bool want_db) {
    Door door{"add_norm_backward"};
    Dim R{"R"}, n{"n"}, two{"2", 2};
    const auto f32 = [&](const char *name, In t, Shape shape) {
        return static_cast<float *>(door.in(name, t, only(MOE_F32), shape));
    };
    const int half = dtype_of(dz);
    void *dz_Rn = door.in("dz", dz, only(MOE_BF16) | only(MOE_F16), {&R, &n});
    float *ds_Rn = ds ? f32("ds", *ds, {&R, &n}) : nullptr, *s_Rn = f32("s", s, {&R, &n}), *w_n = f32("w", w, {&n});
    float *stats_R2 = f32("stats", stats, {&R, &two});
    Tensor dx = empty(s, MOE_F32, {R, n}), dy = empty(s, half, {want_dy ? R.n : 0, n});
    Tensor dw = empty(s, MOE_F32, {n}), db = empty(s, MOE_F32, {want_db ? n.n : 0});
    Workspace work(door, RUN(add_norm_backward_workspace, R, n));
    door.done(RUN(add_norm_backward, half, centred, R, n, ds_Rn, dz_Rn, s_Rn, w_n, stats_R2, work.p,
                  static_cast<float *>(dx.data_ptr()), want_dy ? dy.data_ptr() : nullptr,
                  static_cast<float *>(dw.data_ptr()), want_db ? static_cast<float *>(db.data_ptr()) : nullptr),
              "s has n=", n.n, " columns");
    return {dx, dy, dw, db};
}

Tensor square_sum(In x) {
    Door door{"square_sum"};
    Dim n{"n"};
    void *x_n = door.in("x", x, FLOATS, {&n});
    Tensor sum = empty(x, MOE_F64, {});
    Workspace work(door, RUN(square_sum_workspace, n));
    door.done(RUN(square_sum, dtype_of(x), n, x_n, work.p, static_cast<double *>(sum.data_ptr())));
    return sum;
}

Tensor rotate(In x, In cos, In sin, bool inverse) {
    Door door{"rotate"};
    Dim R{"R"}, H{"H"}, d{"d"}, P{"P"}, n{"n"};
    void *x_RHd = door.in("x", x, FLOATS, {&R, &H, &d});
    void *cos_Pn = door.in("cos", cos, only(real_of(dtype_of(x))), {&P, &n});
    void *sin_Pn = door.in("sin", sin, only(real_of(dtype_of(x))), {&P, &n});
    Tensor y = empty(x, dtype_of(x), {R, H, d});
    door.done(RUN(rotate, dtype_of(x), R, P, H, d, n, inverse, x_RHd, cos_Pn, sin_Pn, y.data_ptr()),
              "wanted rows of cos, P=", P.n, ", that divide R=", R.n, ", and pairs n=", n.n, " <= d/2, d=", d.n);
    return y;
}

// ---- random numbers -------------------------------------------------------------------------------------------------

struct Key : moe_random_key {
    Key(int64_t seed, int64_t step, int64_t site, int64_t row0, int64_t run, int64_t stride)
        : moe_random_key{static_cast<uint64_t>(seed), step, site, row0, run, stride} {}

    // What it must obey, and what it is.
    friend std::ostream &operator<<(std::ostream &s, const Key &k) {
        return s << "step and site must lie in [0, 2^32), row0 and run must not be negative, stride must be at least "
                    "run if rows > run > 0, and row numbers must fit int64, got step=" << k.step << ", site=" << k.site
                 << ", row0=" << k.row0 << ", run=" << k.run << " and stride=" << k.stride;
    }
};

// Random numbers have the shape, dtype and device of `like`, whose values are not read.
Tensor random_uniform(In like, double low, double high, int64_t seed, int64_t step, int64_t site, int64_t row0,
                      int64_t run, int64_t stride) {
    Door door{"random_uniform"};
    Dim rows{"rows"}, cols{"cols"};
    door.in("like", like, FLOATS, {&rows, &cols}, ANY);
    Tensor y = empty(like, dtype_of(like), {rows, cols});
    const Key key{seed, step, site, row0, run, stride};
    door.done(RUN(uniform, dtype_of(like), key, rows, cols, low, high, y.data_ptr()),
              "got ", low, " and ", high, ", wanted low < high; ", key);
    return y;
}

Tensor random_normal(In like, double mean, double std, int64_t seed, int64_t step, int64_t site, int64_t row0,
                     int64_t run, int64_t stride) {
    Door door{"random_normal"};
    Dim rows{"rows"}, cols{"cols"};
    door.in("like", like, FLOATS, {&rows, &cols}, ANY);
    Tensor y = empty(like, dtype_of(like), {rows, cols});
    const Key key{seed, step, site, row0, run, stride};
    door.done(RUN(normal, dtype_of(like), key, rows, cols, mean, std, y.data_ptr()),
              "got ", mean, " and ", std, ", wanted finite mean and std >= 0; ", key);
    return y;
}

Tensor dropout(In x, double p, int64_t seed, int64_t step, int64_t site, int64_t row0, int64_t run,
               int64_t stride) {
    Door door{"dropout"};
    Dim rows{"rows"}, cols{"cols"};
    void *x_rc = door.in("x", x, FLOATS, {&rows, &cols});
    if (!(p >= 0 && p < 1)) door.fail("p is ", p, ", wanted 0 <= p < 1");
    Tensor y = empty(x, dtype_of(x), {rows, cols});
    const Key key{seed, step, site, row0, run, stride};
    door.done(RUN(dropout, dtype_of(x), key, rows, cols, p, x_rc, y.data_ptr()), key);
    return y;
}

// ---- the device -----------------------------------------------------------------------------------------------------

// Waits for like's device and raises what its kernels complained of.
void check(In like) {
    Door door{"check"};
    door.enter(like);
    if (door.cuda) door.read_verdict(true);
}

// ---- the table ------------------------------------------------------------------------------------------------------

#define OP(name) {#name, TORCH_BOX(&name)}
struct Op { const char *name; void (*boxed)(StableIValue *, uint64_t, uint64_t); };
const Op OPS[] = {
    OP(sort), OP(histogram), OP(cumsum), OP(topology), OP(replicate), OP(replicate_backward), OP(route_index),
    OP(gather), OP(scatter), OP(scatter_dweights),
    OP(grouped_gemm), OP(grouped_gemm_wgrad), OP(activation), OP(activation_backward),
    OP(expert_mlp), OP(expert_mlp_backward),
    OP(exchange_plan), OP(exchange_pack), OP(exchange_unpack), OP(exchange_combine),
    OP(router), OP(router_backward), OP(capacity_drop), OP(balance_counts), OP(balance_loss), OP(balance_loss_backward),
    OP(z_loss), OP(z_loss_backward), OP(select_bias_update),
    OP(xent_), OP(random_uniform), OP(random_normal), OP(dropout), OP(check),
    OP(rms_norm), OP(rms_norm_backward), OP(add_norm), OP(add_norm_backward), OP(square_sum), OP(rotate),
};

}  // namespace
extern "C" const size_t moe_cuda_size = sizeof(moe_cuda);
namespace {

int threads() {
    uint32_t n = 1;
    torch_get_num_threads(&n);
    return static_cast<int>(n);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
    moe_set_pool(torch_parallel_for, threads);
    for (const auto &op : OPS) m.impl(op.name, op.boxed);
}

STABLE_TORCH_LIBRARY_IMPL(moe_ext, CUDA, m) {
    for (const auto &op : OPS) m.impl(op.name, op.boxed);
}
