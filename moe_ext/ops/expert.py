"""The experts' arithmetic: grouped GEMM, activations, and the fused expert MLP. csrc/gemm.c, act.c, expert.c."""

import torch

from moe_ext.ops.define import define

# ---- grouped GEMM: y = x w, dx = dy w^T, dw = x^T dy: the two ops are each other's gradients -------------------------


def _save_grouped_gemm(ctx, inputs, output):
    x, w, bins = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w, bins)


def _backward_grouped_gemm(ctx, dy):
    x, w, bins = ctx.saved_tensors
    dy = dy.contiguous()
    dx = _grouped_gemm(dy, w.transpose(1, 2), bins) if ctx.needs_input_grad[0] else None
    dw = None
    if ctx.needs_input_grad[1]:
        # A transposed weight gets its gradient in the memory order of the parameter behind it.
        swapped = w.stride(1) == 1 and w.stride(2) != 1
        dw = _grouped_gemm_wgrad(dy, x, bins).transpose(1, 2) if swapped else _grouped_gemm_wgrad(x, dy, bins)
    return dx, dw, None


_grouped_gemm = define(
    "grouped_gemm(Tensor x, Tensor w, Tensor bins) -> Tensor",
    fake=lambda x, w, bins: x.new_empty(x.shape[0], w.shape[2]),
    save=_save_grouped_gemm,
    backward=_backward_grouped_gemm,
    autocast=(0, 1),
)


def _save_grouped_gemm_wgrad(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward_grouped_gemm_wgrad(ctx, g):
    x, dy, bins = ctx.saved_tensors
    dx = _grouped_gemm(dy, g.transpose(1, 2), bins) if ctx.needs_input_grad[0] else None
    ddy = _grouped_gemm(x, g, bins) if ctx.needs_input_grad[1] else None
    return dx, ddy, None


_grouped_gemm_wgrad = define(
    "grouped_gemm_wgrad(Tensor x, Tensor dy, Tensor bins) -> Tensor",
    fake=lambda x, dy, bins: x.new_empty(bins.shape[0], x.shape[1], dy.shape[1]),
    save=_save_grouped_gemm_wgrad,
    backward=_backward_grouped_gemm_wgrad,
    autocast=(0, 1),
)


def grouped_gemm(x_RI, w_EIO, bins_E):
    """y[rows of e] = x[rows of e] @ w[e] for rows sorted by expert; rows from bins[-1] on are zeros.

    x_RI [R,I]; w_EIO [E,I,O] of x's dtype and any strides (w.transpose(1, 2) costs nothing); bins_E int32
    inclusive ends. -> [R,O]. Differentiable in x and w; follows autocast.
    """
    return _grouped_gemm(x_RI.contiguous(), w_EIO, bins_E)


def grouped_gemm_wgrad(x_RI, dy_RO, bins_E):
    """dw[e] = x[rows of e]^T @ dy[rows of e] -> [E,I,O]; zeros for an empty expert. Differentiable in x and dy."""
    return _grouped_gemm_wgrad(x_RI.contiguous(), dy_RO.contiguous(), bins_E)


# ---- activations -----------------------------------------------------------------------------------------------------

GATED = ("swiglu", "geglu", "geglu_tanh")  # act(gate) * up of [gate | up]


def _save_activation(ctx, inputs, output):
    h, ctx.act = inputs
    ctx.save_for_backward(h)


_activation = define(
    "activation(Tensor h, str act) -> Tensor",
    fake=lambda h, act: h.new_empty(h.shape[0], h.shape[1] // (2 if act in GATED else 1)),
    save=_save_activation,
    backward=lambda ctx, da: (_activation_backward(*ctx.saved_tensors, da.contiguous(), ctx.act), None),
)
_activation_backward = define(
    "activation_backward(Tensor h, Tensor da, str act) -> Tensor",
    fake=lambda h, da, act: torch.empty_like(h),
)


def activation(h_NU, act):
    """a [N,F] = act(gate) * up of h = [gate | up] for "swiglu" (silu), "geglu" (erf) and "geglu_tanh", U = 2F;
    act(h) for "silu", "gelu", "gelu_tanh" and "relu", U = F. Computed in float32 (float64 for float64)."""
    return _activation(h_NU.contiguous(), act)


# ---- the fused expert MLP --------------------------------------------------------------------------------------------


def _fake_expert_mlp(x, gate, up, down, weights, order, inverse, bins, gate_bias, up_bias, down_bias, act, num_copies):
    return torch.empty_like(x), x.new_empty(num_copies, gate.shape[1] + (0 if up is None else up.shape[1]))


def _save_expert_mlp(ctx, inputs, output):
    # x and h are all that is kept of the activations: bytes * (R*D + N*U).
    *tensors, ctx.act, _ = inputs
    _, h = output
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, *tensors)


def _backward_expert_mlp(ctx, dy, _):
    if dy is None:
        return (None,) * 13
    h, *tensors = ctx.saved_tensors
    dx, dgate, dup, ddown, dweights, *dbiases = _expert_mlp_backward(dy.contiguous(), h, *tensors, ctx.act)
    up, biases = tensors[2], tensors[8:11]
    dbiases = (db if b is not None else None for b, db in zip(biases, dbiases, strict=True))
    return dx, dgate, dup if up is not None else None, ddown, dweights, None, None, None, *dbiases, None, None


def _fake_expert_mlp_backward(
    dy, h, x, gate, up, down, weights, order, inverse, bins, gate_bias, up_bias, down_bias, act
):
    like = (x, gate, up, down, weights, gate_bias, up_bias, down_bias)
    return tuple(x.new_empty(0) if t is None else torch.empty_like(t) for t in like)


_expert_mlp_args = (
    "Tensor x, Tensor gate, Tensor? up, Tensor down, Tensor weights, Tensor order, Tensor inverse, Tensor bins, "
    "Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, str act"
)
_expert_mlp = define(
    f"expert_mlp({_expert_mlp_args}, SymInt num_copies) -> (Tensor, Tensor)",
    fake=_fake_expert_mlp,
    save=_save_expert_mlp,
    backward=_backward_expert_mlp,
    autocast=(0, 1, 2, 3, 8, 9, 10),  # not the weights, which may stay float32
)
_expert_mlp_backward = define(
    f"expert_mlp_backward(Tensor dy, Tensor h, {_expert_mlp_args}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_expert_mlp_backward,
)


def expert_mlp(x_RD, gate, up, down_EDF, weights_RK, index, *, act,
               gate_bias=None, up_bias=None, down_bias=None, num_copies=None):  # fmt: skip
    """y_r = sum_k s_rk (act([x_r Wg_e^T + bg_e | x_r Wu_e^T + bu_e]) Wd_e^T + bd_e),
    e = ids[r,k]; an id of -1 is skipped.

    x_RD        [R,D]
    gate, up    [E,F,D] each, or gate = w13 [E,2F,D] = [gate | up] and up = None; without a gate only gate [E,F,D]
    down_EDF    [E,D,F]; the three weights have x's dtype and any strides
    weights_RK  [R,K] in float32 or x's dtype
    index       RouteIndex of the ids [R,K]
    act         see `activation`
    biases      [E,F], [E,F] (or gate_bias [E,2F] with up = None) and [E,D], in x's dtype, contiguous
    num_copies  number of ids >= 0, if some are -1; None means all R*K
    -> [R,D]. Differentiable in x, weights_RK, all weights and biases; follows autocast. Keeps x and the N*U values
    before the activation for the backward, nothing else.
    """
    copies = weights_RK.numel() if num_copies is None else num_copies
    y_RD, _ = _expert_mlp(x_RD.contiguous(), gate, up, down_EDF, weights_RK.contiguous(),
                          index.order_N, index.inverse_TK, index.bins_E,
                          gate_bias, up_bias, down_bias, act, copies)  # fmt: skip
    return y_RD
