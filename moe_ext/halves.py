"""The weights of a step in 16 bits, cast once, and gradients that go from there to the parameters' .grad in one pass.

    with halves(model, config):
        for micro in range(accumulation):       # forwards under `precision`, backwards, recomputation in any order
            ...
    clip, optimizer.step()

Autocast alone casts each weight in every forward, which moves 6 bytes a value, widens its gradient in every backward
(6) and adds that to .grad (12). Here a step casts once, and a backward adds the gradient as it comes (10, the first
time 6). Halves are what autocast makes, and each .grad gets the same terms in the same order, so that all bits are the
same; but a tied table gets from each backward the head's part, then that of the lookups, where autograd adds their sum.

Between enter and exit the modules have the halves as parameters. All others see the parameters alone: optimizer,
clipping, checkpoints, evaluation. Halves live for as long, 2 bytes a value, and so are gone while the optimizer steps.
"""
from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from moe_ext.config import Config
from moe_ext.layers.fused import Experts, Linear
from moe_ext.model import half_dtype


def cast_once(config: Config) -> bool:
    """Whether a run has halves: in 16 bits, with several micro-batches, for one has nothing to save and casts weights
    shortly before their use; and where no ranks share weights, for those cast and sum in ways of their own."""
    return half_dtype(config) is not None and config.train.accumulation > 1 and config.mesh.stage == 1


@contextmanager
def halves(model: nn.Module, config: Config) -> Iterator[None]:
    """In a run that has halves the parameters that autocast would cast are halves meanwhile: those of Linear and
    Experts. A table that the head shares with the embedding remains the embedding's. No halves: nothing."""
    places = [(module, name, p) for module in model.modules() if isinstance(module, (Linear, Experts))
              for name, p in module.named_parameters(recurse=False)] if cast_once(config) else []
    try:
        for module, name, p in places:
            setattr(module, name, half_of(p, half_dtype(config)))
        yield
    finally:
        for module, name, p in places:
            setattr(module, name, p)


def half_of(p: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """p in fewer bits; if p is trained, a leaf whose gradient goes to p."""
    half = nn.Parameter(p.detach().to(dtype), requires_grad=p.requires_grad)
    if p.requires_grad:
        half.register_post_accumulate_grad_hook(functools.partial(hand_over, p))
    return half


def hand_over(p: nn.Parameter, half: nn.Parameter) -> None:
    """Adds the half's gradient to the parameter's."""
    if p.grad is None:
        p.grad = half.grad.to(p.dtype)
    else:
        p.grad.add_(half.grad)
    half.grad = None
