"""The experts' arithmetic: grouped GEMM, activations, and the fused expert MLP. csrc/gemm.c, act.c, expert.c."""

import torch

from moe_ext.ops.define import define
from moe_ext.ops.enums import ACTS, GATED, number

# ---- grouped GEMM: y = x w, dx = dy w^T, dw = x^T dy: the two ops are each other's gradients -------------------------


def _save_grouped_gemm(ctx, inputs, output):
    x, w, bins = inputs
    need_dx, need_dw, _ = ctx.needs_input_grad[:3]
    # A transposed weight gets its gradient in the memory order of the parameter behind it.
    ctx.swapped = w.stride(1) == 1 and w.stride(2) != 1
    ctx.save_for_backward(x if need_dw else None, w if need_dx else None, bins)


def _backward_grouped_gemm(ctx, dy):
    x, w, bins = ctx.saved_tensors
    dy, (need_dx, need_dw, _) = dy.contiguous(), ctx.needs_input_grad[:3]
    dx = _grouped_gemm(dy, w.transpose(1, 2), bins) if need_dx else None
    dw = None
    if need_dw:
        dw = _grouped_gemm_wgrad(dy, x, bins).transpose(1, 2) if ctx.swapped else _grouped_gemm_wgrad(x, dy, bins)
    return dx, dw, None


_grouped_gemm = define(
    "grouped_gemm(Tensor x, Tensor w, Tensor bins) -> Tensor",
    fake=lambda x, w, bins: x.new_empty(x.shape[0], w.shape[2]),
    save=_save_grouped_gemm,
    backward=_backward_grouped_gemm,
    autocast=(0, 1),
)


def _save_grouped_gemm_wgrad(ctx, inputs, output):
    x, dy, bins = inputs
    need_dx, need_ddy, _ = ctx.needs_input_grad[:3]
    ctx.save_for_backward(x if need_ddy else None, dy if need_dx else None, bins)


def _backward_grouped_gemm_wgrad(ctx, g):
    x, dy, bins = ctx.saved_tensors
    need_dx, need_ddy, _ = ctx.needs_input_grad[:3]
    dx = _grouped_gemm(dy, g.transpose(1, 2), bins) if need_dx else None
    ddy = _grouped_gemm(x, g, bins) if need_ddy else None
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

def _save_activation(ctx, inputs, output):
    h, ctx.act = inputs
    ctx.save_for_backward(h)


_activation = define(
    "activation(Tensor h, int act) -> Tensor",
    fake=lambda h, act: h.new_empty(h.shape[0], h.shape[1] // (2 if act < len(GATED) else 1)),
    save=_save_activation,
    backward=lambda ctx, da: (_activation_backward(*ctx.saved_tensors, da.contiguous(), ctx.act), None),
)
_activation_backward = define(
    "activation_backward(Tensor h, Tensor da, int act) -> Tensor",
    fake=lambda h, da, act: torch.empty_like(h),
)


def activation(h_NU, act):
    """a [N,F] = act(gate) * up of h = [gate | up] for "swiglu" (silu), "geglu" (erf) and "geglu_tanh", U = 2F, and for
    "swiglu_oai" (gpt-oss) (clamp(up, -7, 7) + 1) * t * sigmoid(1.702 t), t = min(gate, 7);
    act(h) for "silu", "gelu", "gelu_tanh" and "relu", U = F. Computed in float32 (float64 for float64)."""
    return _activation(h_NU.contiguous(), number("activation", "act", act, ACTS))


# ---- the fused expert MLP --------------------------------------------------------------------------------------------


def _fake_expert_mlp(x, gate, up, down, weights, order, inverse, bins, gate_bias, up_bias, down_bias, act, num_copies):
    width = sum(w.shape[1:-1].numel() for w in (gate, up) if w is not None)
    return torch.empty_like(x), x.new_empty(num_copies, width)


_MLP_GRADS = (0, 1, 2, 3, 4, 8, 9, 10)  # where x, gate, up, down, weights and the biases stand among the arguments


def _save_expert_mlp(ctx, inputs, output):
    # x and h are all that is kept of the activations: bytes * (R*D + N*U). x is for the gradients of gate and up.
    x, *tensors, ctx.act, _ = inputs
    _, h = output
    ctx.set_materialize_grads(False)    # h is no user's result, but stands for x where someone differentiates twice
    ctx.save_for_backward(h, x if ctx.needs_input_grad[1] or ctx.needs_input_grad[2] else None, *tensors)


def _backward_expert_mlp(ctx, dy, _):
    grads = [None] * 13
    if dy is None:
        return tuple(grads)
    wanted = [ctx.needs_input_grad[i] for i in _MLP_GRADS]
    bits = sum(1 << i for i, want in enumerate(wanted) if want)
    made = _expert_mlp_backward(dy.contiguous(), *ctx.saved_tensors, ctx.act, bits)
    for i, want, grad in zip(_MLP_GRADS, wanted, made, strict=True):
        grads[i] = grad if want else None
    return tuple(grads)


def _fake_expert_mlp_backward(
    dy, h, x, gate, up, down, weights, order, inverse, bins, gate_bias, up_bias, down_bias, act, wanted
):
    like = (dy, gate, up, down, weights, gate_bias, up_bias, down_bias)
    return tuple(
        dy.new_empty(0) if t is None or not wanted >> i & 1 else torch.empty_like(t) for i, t in enumerate(like)
    )


_expert_mlp_args = (
    "Tensor gate, Tensor? up, Tensor down, Tensor weights, Tensor order, Tensor inverse, Tensor bins, "
    "Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, int act"
)
_expert_mlp = define(
    f"expert_mlp(Tensor x, {_expert_mlp_args}, SymInt num_copies) -> (Tensor, Tensor)",
    fake=_fake_expert_mlp,
    save=_save_expert_mlp,
    backward=_backward_expert_mlp,
    autocast=(0, 1, 2, 3, 8, 9, 10),  # not the weights, which may stay float32
)
# Bit i of `wanted` asks for the i-th gradient, in the order of _MLP_GRADS; the others are empty and cost nothing. x may
# be absent where those of gate and up are not wanted.
_expert_mlp_backward = define(
    f"expert_mlp_backward(Tensor dy, Tensor h, Tensor? x, {_expert_mlp_args}, int wanted) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_expert_mlp_backward,
)


def expert_mlp(x_RD, gate, up, down_EDF, weights_RK, index, *, act,
               gate_bias=None, up_bias=None, down_bias=None, num_copies=None):  # fmt: skip
    """y_r = sum_k s_rk (act([x_r Wg_e^T + bg_e | x_r Wu_e^T + bu_e]) Wd_e^T + bd_e),
    e = ids[r,k]; an id of -1 is skipped.

    x_RD        [R,D]
    gate, up    [E,F,D] each, or gate = w13 [E,2F,D] = [gate | up] or [E,2,F,D] and up = None; without a gate only
                gate [E,F,D]
    down_EDF    [E,D,F]; the three weights have x's dtype and any strides, also those of gate and up that alternate
                in [E,D,2F]: w.unflatten(2, (-1, 2)).permute(0, 3, 2, 1)
    weights_RK  [R,K] in float32 or x's dtype
    index       RouteIndex of the ids [R,K]
    act         see `activation`
    biases      [E,F], [E,F] (or gate_bias [E,2F] with up = None) and [E,D], in x's dtype, contiguous
    num_copies  number of ids >= 0, if some are -1; None means all R*K
    -> [R,D]. Differentiable in x, weights_RK, all weights and biases; follows autocast. Keeps x and the N*U values
    before the activation for the backward, nothing else, and x only if gate or up are trained. The backward does the
    work of the gradients that are wanted alone.
    """
    act = number("expert_mlp", "act", act, ACTS)
    copies = weights_RK.numel() if num_copies is None else num_copies
    y_RD, _ = _expert_mlp(x_RD.contiguous(), gate, up, down_EDF, weights_RK.contiguous(),
                          index.order_N, index.inverse_TK, index.bins_E,
                          gate_bias, up_bias, down_bias, act, copies)  # fmt: skip
    return y_RD
