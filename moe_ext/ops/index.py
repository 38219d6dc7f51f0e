"""Index ops: which copy goes where. Integers in, integers out; only `replicate` has a gradient. csrc/index.c.

Flat id f = token*K + slot. order_N holds the flat ids sorted by expert, stable; bins_E the inclusive ends of the
experts' segments in it. An expert id of -1 means "not here": such copies have no place, and order_N ends in as many -1.
The functions with MegaBlocks' names raise ValueError on a wrong shape.
"""

from typing import NamedTuple

import torch

from moe_ext.ops.define import define
from moe_ext.ops.shapes import check_shapes

_sort = define(
    "sort(Tensor x, int end_bit) -> (Tensor, Tensor)",
    fake=lambda x, end_bit: (torch.empty_like(x), torch.empty_like(x)),
    constant=True,
)


def sort(x_n, end_bit=None):
    """Stable ascending sort of x_n [n] int16, int32 or int64 by its low `end_bit` bits (default: all, signed).

    -> (sorted_n, indices_n), both in the dtype of x; n must fit it.
    """
    check_shapes("sort", x=(x_n, "n"))
    return _sort(x_n.contiguous(), 8 * x_n.element_size() if end_bit is None else end_bit)


_histogram = define(
    "histogram(Tensor x, SymInt max_val) -> Tensor",
    fake=lambda x, max_val: x.new_empty((*x.shape[:-1], max_val), dtype=torch.int32),
    constant=True,
)


def histogram(x, max_val):
    """x [n] or [B,n] integers -> int32 [max_val] or [B,max_val]. Values outside [0, max_val) are ignored."""
    check_shapes("histogram", x=(x, "B n" if x.dim() > 1 else "n"))
    return _histogram(x.contiguous(), max_val)


_cumsum = define(
    "cumsum(Tensor x, bool exclusive) -> Tensor", fake=lambda x, exclusive: torch.empty_like(x), constant=True
)


def _cumsum_along(x, dim, exclusive):
    check_shapes("cumsum", x=(x, "B n" if x.dim() > 1 else "n"))
    return _cumsum(x.movedim(dim, -1).contiguous(), exclusive).movedim(-1, dim).contiguous()


def inclusive_cumsum(x, dim):
    """y[i] = x[0] + .. + x[i] along `dim` of x [n] or [B,n] integers; in the dtype of x."""
    return _cumsum_along(x, dim, False)


def exclusive_cumsum(x, dim):
    """y[i] = x[0] + .. + x[i-1] along `dim` of x [n] or [B,n] integers; in the dtype of x."""
    return _cumsum_along(x, dim, True)


_topology = define(
    "topology(Tensor padded_bins, int block, SymInt rows, SymInt cols) -> Tensor",
    fake=lambda padded_bins, block, rows, cols: padded_bins.new_empty(rows * cols, dtype=torch.int16),
    constant=True,
)


def topology(padded_bins, block, rows, cols):
    """Column indices of the block-sparse matrix of [rows, E*cols] blocks: a block row of expert e holds the columns
    e*cols .. e*cols + cols-1. padded_bins int32 [E] are multiples of `block`. -> int16 [rows*cols]; E*cols must fit."""
    check_shapes("topology", padded_bins=(padded_bins, "E"))
    return _topology(padded_bins, block, rows, cols)


def _save_replicate(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _save_replicate_backward(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.n = inputs[0].shape[1]


_replicate = define(
    "replicate(Tensor x, Tensor bins, SymInt n) -> Tensor",
    fake=lambda x, bins, n: x.new_empty(x.shape[0], n),
    save=_save_replicate,
    backward=lambda ctx, dy: (_replicate_backward(dy.contiguous(), *ctx.saved_tensors), None, None),
)
_replicate_backward = define(
    "replicate_backward(Tensor dy, Tensor bins) -> Tensor",
    fake=lambda dy, bins: dy.new_empty(dy.shape[0], bins.shape[0]),
    save=_save_replicate_backward,
    backward=lambda ctx, ddx: (_replicate(ddx.contiguous(), *ctx.saved_tensors, ctx.n), None),
)


def replicate(x, bins, n):
    """x [B,nb] of any dtype -> y [B,n]: y[:, bins[i-1]:bins[i]] = x[:, i], zeros from bins[-1] on. bins int32 [nb]."""
    check_shapes("replicate", x=(x, "B nb"), bins=(bins, "nb"))
    return _replicate(x.contiguous(), bins, n)


class RouteIndex(NamedTuple):
    """Where each copy goes. All int32."""

    counts_E: torch.Tensor  # copies per expert
    bins_E: torch.Tensor  # their inclusive sum
    order_N: torch.Tensor  # flat ids sorted by expert, stable, then -1
    inverse_TK: torch.Tensor  # sorted position of each flat id, -1 where the id is -1


def _fake_route_index(ids, num_experts):
    counts, order = ids.new_empty(num_experts), ids.new_empty(ids.numel())
    return counts, torch.empty_like(counts), order, torch.empty_like(ids)


_route_index = define(
    "route_index(Tensor ids, int num_experts) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_route_index,
    constant=True,
)


def route_index(ids_TK, num_experts):
    """The whole index of a routing in one pass. ids_TK [T,K] int32 or int64 in [-1, num_experts) -> RouteIndex.

    Raises RuntimeError if an id is outside that range.
    """
    if ids_TK.dtype == torch.int64:  # an id out of range must not wrap into it
        ids_TK = ids_TK.clamp(-2, num_experts).int()
    return RouteIndex(*_route_index(ids_TK.contiguous(), num_experts))


def round_up(x, value):
    """The least multiple of value >= x, for x >= 0."""
    return torch.div(x + value - 1, value, rounding_mode="trunc") * value


def repeat(x, tiling):
    """x.repeat(tiling), or x itself if all of tiling is 1."""
    return x if all(n == 1 for n in tiling) else x.repeat(tiling)


def sum(x, dim=0):
    """x.sum(dim), or a view of x without that dimension if its size is 1."""
    return x.squeeze(dim) if x.shape[dim] == 1 else x.sum(dim=dim)
