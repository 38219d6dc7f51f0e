"""Clip gradients by their global norm: g *= min(1, max_norm / |g|), |g| = sqrt(sum over all parameters of g^2); and two
numbers for the log, the parameters' norm and how many values of the gradients are zero.

On any mesh: a DTensor counts once, however many ranks hold a copy of it, and parameters may lie on different meshes.
All ranks call, with the same parameters in the same order; in a pipeline each with its own, and with `holders`: of each
parameter of the whole model, in the model's order, how many ranks have it or a part of it (Stage.holders).
"""
import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from moe_ext import private
from moe_ext.ops import square_sum
from moe_ext.optim.state import local

private.require("moe_ext.optim")


class NonFiniteGradient(FloatingPointError):
    """A gradient holds NaN or infinity; no gradient and no parameter has been changed."""


def _copies(name: str, x: torch.Tensor, ranks: int) -> int:
    """How many of the ranks that have x hold each value: a dimension that shards makes shards, every other makes
    copies, be it of this parameter's mesh or not."""
    if not isinstance(x, DTensor):
        return ranks
    if any(placement.is_partial() for placement in x.placements):
        raise ValueError(f"gradient of {name}: got placements {x.placements}, wanted shards and replicas: reduce it "
                         "first, a norm of parts is not the norm of their sum")
    dims = zip(x.device_mesh.shape, x.placements, strict=True)
    return ranks // math.prod(size for size, placement in dims if not placement.is_replicate())


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@torch.no_grad()
def clip_grad_norm(named_parameters: Iterable[tuple[str, torch.nn.Parameter]], max_norm: float = 0.0,
                   scale: float = 1.0, holders: Mapping[str, int] | None = None) -> float:
    """Divide all gradients in place by scale and clip their global norm to max_norm; return the norm between the two.

    named_parameters: as from model.named_parameters(); those without a gradient are skipped. max_norm: 0 only measures
    and divides. scale: what the loss was multiplied by (LossScaler). One pass writes the gradients, or none if nothing
    changes. Squares are summed in float64: a finite float32 gradient of any size neither overflows nor vanishes; a
    float64 gradient beyond 1e154 counts as not finite, one below 1e-162 as zero. One host read.

    A gradient is a DTensor, sharded and replicated at will, or a plain tensor, of which every rank has a copy. One
    all-reduce, so all ranks return the same number and replicas that were bitwise equal stay so.

    NonFiniteGradient, with the same words on all ranks, names the first bad parameter; a driver that would rather skip
    the step catches it and zeroes the gradients. ValueError: a gradient that is still partial.
    """
    named, world = list(named_parameters), _world()
    grads = {name: p.grad for name, p in named if p.grad is not None}
    holders = dict.fromkeys(grads, world) if holders is None else holders
    if not holders:
        return 0.0
    copies = {name: _copies(name, grad, holders[name]) for name, grad in grads.items()}
    shards = {name: local(grad) for name, grad in grads.items()}
    none = torch.zeros((), dtype=torch.float64, device=named[0][1].device)
    squares = torch.stack([square_sum(shards[name]) / copies[name] if name in shards else none for name in holders])
    if world > 1:
        dist.all_reduce(squares)
    norms = {name: math.sqrt(square) for name, square in zip(holders, squares.tolist(), strict=True)}
    total = math.hypot(*norms.values())
    if not math.isfinite(total):
        name = next(name for name, norm in norms.items() if not math.isfinite(norm))
        counts, known = none.new_zeros(2), none.new_zeros(2)
        if name in shards:
            counts = torch.stack([shards[name].isnan().sum(), shards[name].isinf().sum()]).double()
            known = none.new_tensor([grads[name].numel(), copies[name]])
        if world > 1:
            dist.all_reduce(counts)
            dist.all_reduce(known, op=dist.ReduceOp.MAX)        # to the ranks that do not have it
        size, copied = known.tolist()
        nan, inf = (math.ceil(count / copied) for count in counts.tolist())     # up: one replica alone may be bad
        raise NonFiniteGradient(f"gradient of {name}: {nan} NaN and {inf} infinite of {size:.0f} values: lower "
                                "optim.lr, lengthen optim.warmup, or look for a division by zero in the loss")
    total /= scale
    factor = (max_norm / total if 0 < max_norm < total else 1.0) / scale
    if factor != 1 and shards:
        torch._foreach_mul_(list(shards.values()), factor)
    return total


@torch.no_grad()
def parameter_norm(named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
                   holders: Mapping[str, int] | None = None) -> float:
    """|p| = sqrt(sum over all parameters of p^2). All ranks call, and parameters may lie, as in clip_grad_norm."""
    return math.sqrt(_total(named_parameters, holders, lambda p: p, square_sum))


@torch.no_grad()
def count_zeros(named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
                holders: Mapping[str, int] | None = None) -> int:
    """How many values of all gradients are 0: rows of tokens that did not occur, experts without a token. All ranks
    call, and gradients may lie, as in clip_grad_norm; parameters without one are skipped."""
    return round(_total(named_parameters, holders, lambda p: p.grad,
                        lambda x: (x.numel() - x.count_nonzero()).double()))


def _total(named_parameters, holders, tensor, measure) -> float:
    """The sum of measure(x) over all values of the whole tensors x = tensor(parameter), each counted once; one
    all-reduce, one host read."""
    named, world = list(named_parameters), _world()
    if not named:
        return 0.0
    total = torch.zeros((), dtype=torch.float64, device=named[0][1].device)
    parts = [measure(local(x)) / _copies(name, x, holders[name] if holders else world)
             for name, p in named if (x := tensor(p)) is not None]
    if parts:
        total = torch.stack(parts).sum()
    if world > 1:
        dist.all_reduce(total)
    return total.item()
