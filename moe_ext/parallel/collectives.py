"""Differentiable collectives of activations: plain local tensors in, plain local tensors out.

    gather            the ranks' pieces joined along dim             backward: reduce_scatter
    reduce_scatter    the ranks' sum, this rank's piece along dim    backward: gather
    all_to_all        piece p of x to rank p                        backward: all_to_all
    all_reduce        the ranks' sum, everywhere                     backward: all_reduce
    scope_sum         the ranks' sum, everywhere                     backward: n times the gradient, no communication

Gradients are those of the sum of the losses that the n ranks backpropagate; for the mean, divide each loss by n. The
adjoint of an all-reduce is an all-reduce. scope_sum spares it where the gradients that come in are equal on all ranks,
and that is its precondition: every rank uses the sum in the same way. (Megatron's pair, g that sums forward and f that
sums backward, shifts it by one: here the gradient of what all ranks have is each rank's part of it, and the next
all_reduce, or gather, on the way back adds up the parts.)

`group`: a process group, None for all ranks. Its ranks call in the same order with the same shape, dtype and dim; torch
does not always notice when they do not. A group of one rank gets x itself back.
Dtypes: floating, int32, int64. Sums of bf16 and fp16 are fp32, rounded once. Backends round every addition, so
reduce_scatter moves the pieces in x's dtype, as many bytes as a ring would, and adds them here; all_reduce gathers the
sums after it.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from moe_ext.ops.define import Function, once_differentiable

# Its name since torch 2.13; 2.13 and 2.14 warn at every call of the old one, 2.11 has no other.
_all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


def as_autocast(x):
    """x as autocast hands it to matrix products: so it travels. Itself outside autocast, and in float64."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def gather_rows(x, dim, group):
    """gather without a gradient: for ids, masks and the backward of others."""
    ranks, dim = dist.get_world_size(group), _axis(x, dim)
    if ranks == 1:
        return x
    pieces = x.new_empty(ranks, *x.shape)
    _all_gather(pieces.view(-1), x.detach().contiguous().view(-1), group=group)
    return pieces.movedim(0, dim).flatten(dim, dim + 1).contiguous()    # of pieces of size 1 it would be a view


def _sum_pieces(x, dim, group):
    ranks = dist.get_world_size(group)
    sent = x.unflatten(dim, (ranks, x.shape[dim] // ranks)).movedim(dim, 0).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received.sum(0, dtype=x.dtype)


def _axis(x, dim):
    if not -x.ndim <= dim < x.ndim:
        raise IndexError(f"collectives: dim is {dim}, wanted one of x's {x.ndim} dimensions")
    return dim % x.ndim


class _Gather(Function):
    @staticmethod
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.group = dim, group
        return gather_rows(x, dim, group)

    @staticmethod
    def backward(ctx, dy):
        return _ReduceScatter.apply(dy, ctx.dim, ctx.group), None, None


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.group = dim, group
        return _sum_pieces(x, dim, group)

    @staticmethod
    def backward(ctx, dy):
        return _Gather.apply(dy, ctx.dim, ctx.group), None, None


class _AllToAll(Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        sent = x.contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return received

    @staticmethod
    def backward(ctx, dy):
        return _AllToAll.apply(dy, ctx.group), None


class _AllReduce(Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        flat = x.reshape(-1)
        rest = -len(flat) % dist.get_world_size(group)
        sums = gather_rows(_sum_pieces(F.pad(flat, (0, rest)) if rest else flat, 0, group), 0, group)
        return sums[:len(flat)].view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        return _AllReduce.apply(dy, ctx.group), None


class _ScopeSum(Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.ranks = dist.get_world_size(group)
        wide = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
        total = x.to(wide, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return ctx.ranks * dy, None


def gather(x, dim, group):
    """x [.., n_dim, ..] -> [.., ranks * n_dim, ..]: the ranks' pieces of equal size, joined along dim in rank order."""
    dim = _axis(x, dim)
    return x if dist.get_world_size(group) == 1 else _Gather.apply(x, dim, group)


def reduce_scatter(x, dim, group):
    """x [.., n_dim, ..] -> [.., n_dim / ranks, ..]: the sum over ranks; rank r has its r-th piece along dim."""
    ranks, dim = dist.get_world_size(group), _axis(x, dim)
    if x.shape[dim] % ranks:
        raise ValueError(
            f"reduce_scatter: x has shape {list(x.shape)}, wanted a multiple of the {ranks} ranks in dimension {dim}"
        )
    return x if ranks == 1 else _ReduceScatter.apply(x, dim, group)


def all_to_all(x, group):
    """x [ranks, ..] -> [ranks, ..]: x[p] goes to rank p; what comes from rank p is the result's [p]."""
    return x if dist.get_world_size(group) == 1 else _AllToAll.apply(x, group)


def all_reduce(x, group):
    """x of any shape -> the sum over ranks, on every rank."""
    return x if dist.get_world_size(group) == 1 else _AllReduce.apply(x, group)


def scope_sum(x, group):
    """x of any shape -> the sum over ranks, on every rank. For its gradient every rank must use the sum alike."""
    return x if dist.get_world_size(group) == 1 else _ScopeSum.apply(x, group)
