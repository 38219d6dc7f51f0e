"""The model's head: linear + cross-entropy in chunks of tokens, so that the logits never exist in full. csrc/xent.c.

dlogits = softmax - onehot needs only the logits, so each chunk turns its logits into their gradient in place and into
its parts of dx and dw at once; the backward only multiplies these by the incoming scalar.
"""

import torch

from moe_ext.ops.define import define, real
from moe_ext.ops.dense import ours, outer, product

_xent_ = define(
    "xent_(Tensor(a!) logits, Tensor targets, int ignore_index, float grad_scale) -> Tensor",
    fake=lambda logits, *_: logits.new_empty(logits.shape[0], dtype=real(logits.dtype)),
)


def _linear_cross_entropy_kernel(x_TD, w_VD, targets_T, ignore_index, chunk, need_dx, need_dw):
    if x_TD.dtype != w_VD.dtype:
        raise RuntimeError(
            f"moe_ext::linear_cross_entropy: w has dtype {w_VD.dtype}, wanted that of x ({x_TD.dtype}). "
            f"Hint: w.to(x.dtype), or torch.autocast"
        )
    if x_TD.shape[1] != w_VD.shape[1]:
        raise RuntimeError(
            f"moe_ext::linear_cross_entropy: w has shape {list(w_VD.shape)}, wanted [V, D={x_TD.shape[1]}]"
        )
    if chunk < 1:
        raise RuntimeError(f"moe_ext::linear_cross_entropy: chunk is {chunk}, wanted >= 1 token")
    if x_TD.shape[0] != targets_T.shape[0]:
        raise RuntimeError(
            f"moe_ext::linear_cross_entropy: targets has shape {list(targets_T.shape)}, wanted [T={x_TD.shape[0]}]"
        )
    loss = x_TD.new_zeros((), dtype=real(x_TD.dtype))
    dx_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format) if need_dx else x_TD.new_empty(0)
    dw_VD = None
    rows = min(chunk, x_TD.shape[0])
    buffer = x_TD.new_empty(0 if ours(x_TD.device, x_TD.dtype, rows) else rows, w_VD.shape[0])
    for begin in range(0, x_TD.shape[0], chunk):
        x_CD, targets_C = x_TD[begin : begin + chunk], targets_T[begin : begin + chunk]
        logits_CV = product(x_CD, w_VD.T, buffer[: x_CD.shape[0]])
        loss += _xent_(logits_CV, targets_C, ignore_index, 1.0).sum()
        dlogits_CV = logits_CV
        if need_dx:
            dx_CD = dx_TD[begin : begin + chunk]
            dx_CD.copy_(product(dlogits_CV, w_VD, dx_CD))
        if need_dw:
            part_VD = outer(dlogits_CV, x_CD)
            dw_VD = part_VD if dw_VD is None else dw_VD.to(loss.dtype).add_(part_VD)
        del logits_CV, dlogits_CV  # before the next are made
    if need_dw and dw_VD is None:
        dw_VD = w_VD.new_zeros(w_VD.shape)
    return loss, dx_TD, dw_VD.to(w_VD.dtype) if need_dw else w_VD.new_empty(0)


def _fake_linear_cross_entropy(x, w, targets, ignore_index, chunk, need_dx, need_dw):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_dx else x.new_empty(0)
    return x.new_empty((), dtype=real(x.dtype)), dx, w.new_empty(w.shape) if need_dw else w.new_empty(0)


def _save_linear_cross_entropy(ctx, inputs, output):
    loss, dx, dw = output
    ctx.mark_non_differentiable(dx, dw)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dx, dw, loss)


def _backward_linear_cross_entropy(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 7
    *saved, loss = ctx.saved_tensors
    needed = zip(saved, ctx.needs_input_grad[:2], strict=True)
    grads = (_linear_cross_entropy_backward(d, dloss, loss) if need else None for d, need in needed)
    return *grads, None, None, None, None, None


_linear_cross_entropy = define(
    "linear_cross_entropy(Tensor x, Tensor w, Tensor targets, int ignore_index, SymInt chunk, bool need_dx, "
    "bool need_dw) -> (Tensor, Tensor, Tensor)",
    fake=_fake_linear_cross_entropy,
    save=_save_linear_cross_entropy,
    backward=_backward_linear_cross_entropy,
    autocast=(0, 1),
    kernel=_linear_cross_entropy_kernel,
)
# The loss is not read: it stands for x and w, on which d depends too, where someone differentiates twice.
_linear_cross_entropy_backward = define(
    "linear_cross_entropy_backward(Tensor d, Tensor dloss, Tensor loss) -> Tensor",
    fake=lambda d, dloss, loss: torch.empty_like(d),
    kernel=lambda d, dloss, loss: d * dloss,
)


def chunk_on(device):
    """Tokens of which a device of this type, "cpu" or "cuda", has logits at a time. The sum of dw over chunks moves 12
    bytes per value and chunk beside 6 FLOPs per value and token: at an H200's 4.2 TB/s and 700 TFLOP/s a third of the
    products' time for 1024 tokens, a twelfth for 4096."""
    return 1024 if device == "cpu" else 4096


def linear_cross_entropy(x_TD, w_VD, targets_T, *, ignore_index=-100, chunk=None):
    """The sum over tokens of logsumexp(x w^T) - (x w^T)[target], without ever holding more than [chunk,V] logits; None:
    as many tokens as suit the device.

    x_TD [T,D] and w_VD [V,D] of one dtype, targets_T int64 [T] in [0,V) or ignore_index (counts as nothing).
    -> 0-d float32 (float64 for float64). Differentiable in x and w; follows autocast.
    """
    chunk = chunk_on(x_TD.device.type) if chunk is None else chunk
    grad = torch.is_grad_enabled()
    need_dx, need_dw = grad and x_TD.requires_grad, grad and w_VD.requires_grad
    return _linear_cross_entropy(x_TD, w_VD, targets_T, ignore_index, chunk, need_dx, need_dw)[0]
