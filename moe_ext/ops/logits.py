"""The router's logits, x w^T + b in float32: on a GPU of bfloat16 x by products of halves, without a float32 copy of x.

A float32 number is the sum of three bfloat16 numbers, 8 + 8 + 8 of its bits, and the product of two such is exact in
float32. So x w^T is x [low; mid; high]^T, one product that reads x once on tensor cores, and the sum of three columns.
What is lost is what a sum in float32 rounds, and what of w lies below 2^-133, bfloat16's least number. (Tensor cores
may round their sums towards zero: by at most 2^-23 for each 16 numbers.) The gradients are made the same way.
"""

import torch
import torch.nn.functional as F

from moe_ext.ops.define import define

HALF = torch.bfloat16
FEW = 1024      # rows from which on the few small kernels that cut w should cost less than what it saves: an estimate


def from_halves(device, x_dtype, w_dtype, rows) -> bool:
    """Whether products of halves make the logits of so many rows; in a graph, which is for any number, of many."""
    if device.type != "cuda" or (x_dtype, w_dtype) != (HALF, torch.float32):
        return False
    return torch.compiler.is_compiling() or rows >= FEW


def _cut(x, low, mid, high):
    """Makes low + mid + high = x, exactly but for what is below 2^-133; NaN of what is not finite. Without the clamp
    what is finite, but beyond bfloat16's largest, would become infinite."""
    limit = torch.finfo(HALF).max
    high.copy_(x.clamp(-limit, limit))
    rest = x - high
    mid.copy_(rest)
    torch.sub(rest, mid, out=low)


def _joined(low, mid, high):
    """Their sum, the smallest first."""
    return (low + mid).add_(high)


def _float_product(a, b):
    """a b of bfloat16, summed in float32 and not rounded to bfloat16. Only CUDA has it; elsewhere the floats are cast,
    whose product is the same but for the order of its sums."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a.float(), b.float())


def _router_logits_kernel(x_TD, w_ED):
    if (x_TD.dim(), w_ED.dim()) != (2, 2) or x_TD.shape[1] != w_ED.shape[1]:
        raise RuntimeError(
            f"moe_ext::router_logits: x has shape {list(x_TD.shape)}, w {list(w_ED.shape)}, wanted [T, D] and [E, D]"
        )
    E, D = w_ED.shape
    w_3ED = w_ED.new_empty(3, E, D, dtype=HALF)
    _cut(w_ED, *w_3ED)
    return _joined(*_float_product(x_TD, w_3ED.view(3 * E, D).T).view(-1, 3, E).unbind(1))


def _router_logits_backward_kernel(dlogits_TE, x_TD, w_ED):
    T, E = dlogits_TE.shape
    d_T4E = dlogits_TE.new_empty(T, 4, E, dtype=HALF)       # low, mid, high and high again
    low, mid, high, again = d_T4E.unbind(1)
    _cut(dlogits_TE, low, mid, high)
    dx_TD, dw_ED = dlogits_TE.new_empty(0, dtype=HALF), dlogits_TE.new_empty(0)
    if w_ED is not None:
        # mid w_high + high w_high + high w_mid in one product. What is left out, mid w_mid and the products of a low,
        # is each below 2^-16 of |dlogits| |w|: nothing beside the rounding of dx, 2^-8 of its terms' sum.
        again.copy_(high)
        _, w_mid, w_high = w_3ED = w_ED.new_empty(3, *w_ED.shape, dtype=HALF)
        _cut(w_ED, *w_3ED)
        dx_TD = torch.mm(d_T4E[:, 1:].flatten(1), torch.cat([w_high, w_high, w_mid]))
    if x_TD is not None:
        dw_ED = _joined(*_float_product(d_T4E[:, :3].flatten(1).T, x_TD).view(3, E, -1))
    return dx_TD, dw_ED


def _save_router_logits(ctx, inputs, output):
    (x, w), (want_dx, want_dw) = inputs, ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if want_dw else None, w if want_dx else None)


def _backward_router_logits(ctx, dlogits):
    x, w = ctx.saved_tensors
    dx, dw = _router_logits_backward(dlogits, x, w)
    return None if w is None else dx, None if x is None else dw


_router_logits = define(
    "router_logits(Tensor x, Tensor w) -> Tensor",
    fake=lambda x, w: w.new_empty(x.shape[0], w.shape[0]),
    save=_save_router_logits,
    backward=_backward_router_logits,
    kernel=_router_logits_kernel,
)
# Without w there is no dx, without x no dw. A region that a backward is called in changes nothing.
_router_logits_backward = define(
    "router_logits_backward(Tensor dlogits, Tensor? x, Tensor? w) -> (Tensor, Tensor)",
    fake=lambda dlogits, x, w: (
        dlogits.new_empty(0 if w is None else (dlogits.shape[0], w.shape[1]), dtype=HALF),
        dlogits.new_empty(0 if x is None else (dlogits.shape[1], x.shape[1])),
    ),
    autocast=(0,),
    autocast_dtype=torch.float32,
    kernel=_router_logits_backward_kernel,
)


def router_logits(x_TD, w_ED, bias_E=None):
    """x w^T + bias in w's dtype, of x in any: torch.nn.functional.linear of x cast to it, and within its rounding where
    x is bfloat16 and w float32 on a GPU. Differentiable in all; follows autocast, which the layer switches off. Of
    DTensors it is torch's, which knows how they are sharded."""
    halves = from_halves(x_TD.device, x_TD.dtype, w_ED.dtype, x_TD.shape[0])
    if not halves or torch.is_autocast_enabled(x_TD.device.type) or any(hasattr(t, "placements") for t in (x_TD, w_ED)):
        return F.linear(x_TD.to(w_ED.dtype), w_ED, bias_E)
    logits_TE = _router_logits(x_TD, w_ED)
    return logits_TE if bias_E is None else logits_TE + bias_E
