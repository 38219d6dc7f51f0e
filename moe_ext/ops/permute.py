"""Movement: tokens to the rows of their experts and back. csrc/permute.c.

Three ops carry it all, and their gradients are each other:
    gather            y_PD[row(f)] = w_f x_TD[f // K]              copies to rows; rows that nobody has are zeros
    scatter           y_TD[t]      = sum_{f of t} w_f x_PD[row(f)]  rows to copies, summed in slot order
    scatter_dweights  w_f          = <x_PD[row(f)], y_TD[f // K]>   zero where a copy has no row
`row` is one of three layouts: plain (row = sorted position), padded (expert e begins at padded_bins[e-1]), binned
(expert e begins at e*capacity; copies beyond capacity are dropped). Weights are float32 or of x's dtype; None counts as
ones and copies bitwise. The public functions have MegaBlocks' names and arguments: `bin_ids` is accepted and not read.
They raise ValueError on a wrong shape.
"""

from moe_ext.ops.define import define
from moe_ext.ops.shapes import check_shapes

# All three take order (flat ids sorted by expert), bins, out_bins (padded layout), top_k and capacity (binned layout).
# Their schemas have the public functions' names, indices and padded_bins, for errors say what the caller typed.


def _save_gather(ctx, inputs, output):
    x, weights, order, bins, out_bins, _, *ctx.layout = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weights, order, bins, out_bins)


def _backward_gather(ctx, dy):
    x, weights, *index = ctx.saved_tensors
    dy = dy.contiguous()
    dx = _scatter(dy, weights, *index, *ctx.layout) if ctx.needs_input_grad[0] else None
    dweights = _scatter_dweights(dy, x, *index, *ctx.layout, weights.dtype) if ctx.needs_input_grad[1] else None
    return dx, dweights, None, None, None, None, None, None


_gather = define(
    "gather(Tensor x, Tensor? weights, Tensor indices, Tensor bins, Tensor? padded_bins, SymInt rows, int top_k, "
    "SymInt capacity) -> Tensor",
    fake=lambda x, weights, order, bins, out_bins, rows, top_k, capacity: x.new_empty(rows, x.shape[1]),
    save=_save_gather,
    backward=_backward_gather,
)


def _save_scatter(ctx, inputs, output):
    x, weights, order, bins, out_bins, *ctx.layout = inputs
    ctx.rows = x.shape[0]
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weights, order, bins, out_bins)


def _backward_scatter(ctx, dy):
    x, weights, *index = ctx.saved_tensors
    dy = dy.contiguous()
    dx = _gather(dy, weights, *index, ctx.rows, *ctx.layout) if ctx.needs_input_grad[0] else None
    dweights = _scatter_dweights(x, dy, *index, *ctx.layout, weights.dtype) if ctx.needs_input_grad[1] else None
    return dx, dweights, None, None, None, None, None


_scatter = define(
    "scatter(Tensor x, Tensor? weights, Tensor indices, Tensor bins, Tensor? padded_bins, int top_k, "
    "SymInt capacity) -> Tensor",
    fake=lambda x, weights, order, bins, out_bins, top_k, capacity: x.new_empty(order.shape[0] // top_k, x.shape[1]),
    save=_save_scatter,
    backward=_backward_scatter,
)


def _save_scatter_dweights(ctx, inputs, output):
    x, dy, *index, top_k, capacity, _ = inputs
    need_dx, need_ddy = ctx.needs_input_grad[:2]
    ctx.layout, ctx.rows = (top_k, capacity), x.shape[0]
    ctx.save_for_backward(x if need_ddy else None, dy if need_dx else None, *index)


def _backward_scatter_dweights(ctx, g):
    x, dy, *index = ctx.saved_tensors
    g = g.contiguous()
    dx = _gather(dy, g, *index, ctx.rows, *ctx.layout) if ctx.needs_input_grad[0] else None
    ddy = _scatter(x, g, *index, *ctx.layout) if ctx.needs_input_grad[1] else None
    return dx, ddy, None, None, None, None, None, None


_scatter_dweights = define(
    "scatter_dweights(Tensor x, Tensor dy, Tensor indices, Tensor bins, Tensor? padded_bins, int top_k, "
    "SymInt capacity, ScalarType dtype) -> Tensor",
    fake=lambda x, dy, order, bins, out_bins, top_k, capacity, dtype: x.new_empty(order.shape[0], dtype=dtype),
    save=_save_scatter_dweights,
    backward=_backward_scatter_dweights,
)


def gather(x, indices, bin_ids, bins, top_k):
    """x [T,D], indices int32 [N=T*top_k], bins int32 [E] -> [N,D], rows sorted by expert; zeros from bins[-1] on."""
    check_shapes("gather", top_k, x=(x, "T D"), indices=(indices, "N"), bin_ids=(bin_ids, "N"), bins=(bins, "E"))
    return _gather(x.contiguous(), None, indices, bins, None, indices.shape[0], top_k, 0)


def scatter(x, indices, bin_ids, weights, bins, top_k):
    """x [N,D], weights [N] (float32 or x's dtype) or None -> [T,D], the weighted sum of each token's copies.

    Differentiable in x and weights.
    """
    check_shapes("scatter", x=(x, "rows D"), indices=(indices, "N"), bin_ids=(bin_ids, "N"), weights=(weights, "N"),
                 bins=(bins, "E"))  # fmt: skip
    return _scatter(x.contiguous(), weights, indices, bins, None, top_k, 0)


def padded_gather(x, indices, bin_ids, bins, padded_bins, top_k):
    """x [T,D] -> [padded_bins[-1],D]; expert e begins at row padded_bins[e-1], pad rows are zeros.

    Reads padded_bins[-1] on the host.
    """
    check_shapes("padded_gather", top_k, x=(x, "T D"), indices=(indices, "N"), bin_ids=(bin_ids, "N"),
                 bins=(bins, "E"), padded_bins=(padded_bins, "E"))  # fmt: skip
    rows = padded_bins[-1].item() if padded_bins.numel() else 0
    return _gather(x.contiguous(), None, indices, bins, padded_bins, rows, top_k, 0)


def padded_scatter(x, indices, bin_ids, weights, bins, padded_bins, top_k):
    """The inverse of padded_gather: x [padded_bins[-1],D] -> [T,D]. Differentiable in x and weights."""
    check_shapes("padded_scatter", x=(x, "rows D"), indices=(indices, "N"), bin_ids=(bin_ids, "N"),
                 weights=(weights, "N"), bins=(bins, "E"), padded_bins=(padded_bins, "E"))  # fmt: skip
    return _scatter(x.contiguous(), weights, indices, bins, padded_bins, top_k, 0)


def binned_gather(x, indices, bins, bin_size, top_k):
    """x [T,D] -> [E,bin_size,D]; an expert's copies beyond bin_size are dropped in flat order, free rows are zeros."""
    check_shapes("binned_gather", top_k, x=(x, "T D"), indices=(indices, "N"), bins=(bins, "E"))
    E, C = bins.shape[0], bin_size
    return _gather(x.contiguous(), None, indices, bins, None, E * C, top_k, C).view(E, C, x.shape[1])


def binned_scatter(x, indices, weights, bins, top_k):
    """x [E,C,D] -> [T,D]; a dropped copy counts as zeros. Differentiable in x and weights."""
    check_shapes("binned_scatter", x=(x, "E C D"), indices=(indices, "N"), weights=(weights, "N"), bins=(bins, "E"))
    return _scatter(x.flatten(0, 1).contiguous(), weights, indices, bins, None, top_k, x.shape[1])
