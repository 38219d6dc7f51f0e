"""Learning rates as pure functions of the step: 1 for the first update, `steps` for the last.

    warm-up    peak * step / warmup                         up to step = warmup, where it is the peak
    cosine     floor + (peak - floor) * (1 + cos(pi x)) / 2     x from 0 at the end of the warm-up to 1 at the last step
    wsd        the peak until `decay` steps are left (warmup, stable, decay), then linear to the floor
Past the last step the rate stays at the floor.
"""
import math

import torch

from moe_ext.config import OptimConfig


def cosine(step: int, *, peak: float, floor: float, warmup: int, steps: int) -> float:
    if step <= warmup:
        return peak * step / warmup
    if step >= steps:
        return floor
    return floor + (peak - floor) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def wsd(step: int, *, peak: float, floor: float, warmup: int, decay: int, steps: int) -> float:
    if step <= warmup:
        return peak * step / warmup
    if step >= steps:
        return floor
    return floor + (peak - floor) * min(1.0, (steps - step) / decay)


def learning_rate(step: int, optim: OptimConfig, steps: int) -> float:
    """Learning rate of update `step` (from 1) in a run of `steps` updates."""
    if optim.schedule == "constant":
        return optim.lr * min(1.0, step / max(1, optim.warmup))
    line = dict(peak=optim.lr, floor=optim.min_lr, warmup=optim.warmup, steps=steps)
    if optim.schedule == "cosine":
        return cosine(step, **line)
    return wsd(step, **line, decay=optim.decay or max(1, steps // 5))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)
