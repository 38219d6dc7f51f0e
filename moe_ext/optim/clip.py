"""Clip gradients by their global norm: g *= min(1, max_norm / |g|), |g| = sqrt(sum over all parameters of g^2); and two
numbers for the log, the parameters' norm and how many values of the gradients are zero.

On any mesh: a DTensor counts once, however many ranks hold a copy of it, and parameters may lie on different meshes.
"""
import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from moe_ext import private

private.require("moe_ext.optim")


class NonFiniteGradient(FloatingPointError):
    """A gradient holds NaN or infinity; no gradient and no parameter has been changed."""


def _square(x: torch.Tensor) -> torch.Tensor:
    """|x|^2 in float64, piece by piece: torch widens what it measures, and a piece of 2^15 stays in the cache."""
    pieces = x.flatten().split(2**15) if x.device.type == "cpu" else [x.flatten()]
    norms = torch.stack([torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces])
    return torch.linalg.vector_norm(norms).square()


def _copies(name: str, grad: torch.Tensor, world: int) -> int:
    """How many of the world's ranks hold each value: a dimension that shards makes shards, every other makes copies,
    be it of this parameter's mesh or not."""
    if not isinstance(grad, DTensor):
        return world
    if any(placement.is_partial() for placement in grad.placements):
        raise ValueError(f"gradient of {name}: got placements {grad.placements}, wanted shards and replicas: reduce it "
                         "first, a norm of parts is not the norm of their sum")
    dims = zip(grad.device_mesh.shape, grad.placements, strict=True)
    return world // math.prod(size for size, placement in dims if not placement.is_replicate())


@torch.no_grad()
def clip_grad_norm(named_parameters: Iterable[tuple[str, torch.nn.Parameter]], max_norm: float = 0.0,
                   scale: float = 1.0) -> float:
    """Divide all gradients in place by scale and clip their global norm to max_norm; return the norm between the two.

    named_parameters: as from model.named_parameters(); those without a gradient are skipped. max_norm: 0 only measures
    and divides. scale: what the loss was multiplied by (LossScaler). One pass writes the gradients, or none if nothing
    changes. Squares are summed in float64: a finite float32 gradient of any size neither overflows nor vanishes; a
    float64 gradient beyond 1e154 counts as not finite, one below 1e-162 as zero. One host read.

    Called by all ranks, with the same parameters in the same order; a gradient is a DTensor, sharded and replicated at
    will, or a plain tensor, of which every rank has a copy. One all-reduce, so all ranks return the same number and
    replicas that were bitwise equal stay so.

    NonFiniteGradient, with the same words on all ranks, names the first bad parameter; a driver that would rather skip
    the step catches it and zeroes the gradients. ValueError: a gradient that is still partial.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    named = [(name, p.grad) for name, p in named_parameters if p.grad is not None]
    if not named:
        return 0.0
    copies = [_copies(name, grad, world) for name, grad in named]
    shards = [grad.to_local() if isinstance(grad, DTensor) else grad for _, grad in named]
    squares = torch.stack([_square(shard) for shard in shards])
    if world > 1:
        dist.all_reduce(squares)
    norms = [math.sqrt(square / c) for square, c in zip(squares.tolist(), copies, strict=True)]
    total = math.hypot(*norms)
    if not math.isfinite(total):
        i = next(i for i, norm in enumerate(norms) if not math.isfinite(norm))
        counts = torch.stack([shards[i].isnan().sum(), shards[i].isinf().sum()])
        if world > 1:
            dist.all_reduce(counts)
        nan, inf = (math.ceil(count / copies[i]) for count in counts.tolist())     # up: one replica alone may be bad
        name, grad = named[i]
        raise NonFiniteGradient(f"gradient of {name}: {nan} NaN and {inf} infinite of {grad.numel()} values: lower "
                                "optim.lr, lengthen optim.warmup, or look for a division by zero in the loss")
    total /= scale
    factor = (max_norm / total if 0 < max_norm < total else 1.0) / scale
    if factor != 1:
        torch._foreach_mul_(shards, factor)
    return total


@torch.no_grad()
def parameter_norm(named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> float:
    """|p| = sqrt(sum over all parameters of p^2). All ranks call, and parameters may lie, as in clip_grad_norm."""
    return math.sqrt(_total(named_parameters, _square))


@torch.no_grad()
def count_zeros(named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> int:
    """How many values of all gradients are 0: rows of tokens that did not occur, experts without a token. All ranks
    call, and gradients may lie, as in clip_grad_norm; parameters without one are skipped."""
    gradients = ((name, p.grad) for name, p in named_parameters if p.grad is not None)
    return round(_total(gradients, lambda x: (x.numel() - x.count_nonzero()).double()))


def _total(named: Iterable[tuple[str, torch.Tensor]], measure) -> float:
    """The sum of measure(x) over all values of the whole tensors, each counted once; one all-reduce, one host read."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    parts = [measure(x.to_local() if isinstance(x, DTensor) else x) / _copies(name, x, world) for name, x in named]
    if not parts:
        return 0.0
    total = torch.stack(parts).sum()
    if world > 1:
        dist.all_reduce(total)
    return total.item()
