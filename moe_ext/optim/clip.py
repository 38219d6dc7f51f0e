"""Clip gradients by their global norm: g *= min(1, max_norm / |g|), |g| = sqrt(sum over all parameters of g^2)."""
import math
from collections.abc import Iterable

import torch


class NonFiniteGradient(FloatingPointError):
    """A gradient holds NaN or infinity; no gradient and no parameter has been changed."""


def _norm(x: torch.Tensor) -> torch.Tensor:
    """The norm in float64, piece by piece: torch widens what it measures, and a piece of 2^15 stays in the cache."""
    pieces = x.flatten().split(2**15)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p, dtype=torch.float64) for p in pieces]))


def clip_grad_norm(named_parameters: Iterable[tuple[str, torch.nn.Parameter]], max_norm: float = 0.0) -> float:
    """Scale all gradients in place so that their global norm is at most max_norm; return the norm before.

    named_parameters: as from model.named_parameters(); those without a gradient are skipped. max_norm: 0 measures only.
    Squares are summed in float64: a finite float32 gradient of any size neither overflows nor vanishes. One host read.
    NonFiniteGradient names the first bad parameter; a driver that would rather skip the step catches it and zeroes the
    gradients.
    """
    named = [(name, p.grad) for name, p in named_parameters if p.grad is not None]
    if not named:
        return 0.0
    grads = [grad for _, grad in named]
    norms = torch.stack([_norm(grad) for grad in grads]).tolist()
    total = math.hypot(*norms)
    if not math.isfinite(total):
        bad, grad = next(pair for pair, norm in zip(named, norms, strict=True) if not math.isfinite(norm))
        raise NonFiniteGradient(f"gradient of {bad}: {int(grad.isnan().sum())} NaN and {int(grad.isinf().sum())} "
                                f"infinite of {grad.numel()} values: lower optim.lr, lengthen optim.warmup, or look "
                                "for a division by zero in the loss")
    if 0 < max_norm < total:
        torch._foreach_mul_(grads, max_norm / total)
    return total
