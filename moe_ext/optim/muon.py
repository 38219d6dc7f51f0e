"""Muon (Jordan 2024): momentum, orthogonalised by Newton-Schulz, of matrices however they are sharded."""
from __future__ import annotations

import math

import torch
from torch.distributed.tensor import DTensor

from moe_ext.optim.owners import Owners

COEFFICIENTS = 3.4445, -4.7750, 2.0315      # of the quintic, those of the Muon repository


def newton_schulz(x_BMN: torch.Tensor, steps: int = 5, eps: float = 1e-7) -> torch.Tensor:
    """[.., M, N] -> nearly its orthogonal factor U V^T: singular values of about .7 to 1.2. In the dtype of x."""
    a, b, c = COEFFICIENTS
    tall = x_BMN.shape[-2] > x_BMN.shape[-1]
    x = x_BMN.mT if tall else x_BMN
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def adjusted(lr: float, shape, how: str) -> float:
    """The learning rate of a matrix [rows, columns]."""
    rows, columns = shape
    if how == "original":
        return lr * math.sqrt(max(1, rows / columns))
    if how == "match_rms_adamw":
        return lr * 0.2 * math.sqrt(max(rows, columns))
    if how == "spectral":
        return lr * math.sqrt(rows / columns)
    return lr


def cost(shape, steps: int = 5) -> float:
    """FLOPs of newton_schulz."""
    small, large = sorted(shape)
    return steps * (4 * small * small * large + 2 * small**3)


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.1, *, momentum: float = 0.95,
                 nesterov: bool = True, eps: float = 1e-7, ns_steps: int = 5, ns_dtype: torch.dtype = torch.bfloat16,
                 adjust_lr_fn: str = "match_rms_adamw", timeout=None):
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, eps=eps,
                        ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn)
        super().__init__(params, defaults)
        self.ns_dtype, self.timeout, self.owners = ns_dtype, timeout, None

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.owners is None:
            self.owners = Owners([p for p, _ in moved], cost, timeout=self.timeout)
        local = [(_local(p), _local(p.grad)) for p, _ in moved]
        buffers = []
        for (p, group), (_, grad) in zip(moved, local, strict=True):
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            buffer = _local(state["momentum_buffer"])
            buffer.lerp_(grad, 1 - group["momentum"])
            buffers.append(buffer)

        def source(i, part):
            group, (_, grad) = moved[i][1], local[i]
            return grad[part].lerp(buffers[i][part], group["momentum"]) if group["nesterov"] else buffers[i][part]

        def compute(matrices, wholes):
            results, alike = [None] * len(wholes), {}
            for k, (matrix, whole) in enumerate(zip(matrices, wholes, strict=True)):
                group = moved[matrix.index][1]
                alike.setdefault((whole.shape, group["ns_steps"], group["eps"]), []).append(k)
            for (_, steps, eps), ks in alike.items():
                for k, x in zip(ks, newton_schulz(torch.stack([wholes[k] for k in ks]), steps, eps), strict=True):
                    results[k] = x
            return results

        def sink(i, part, piece):
            (p, group), values = moved[i], local[i][0][part]
            values.mul_(1 - group["lr"] * group["weight_decay"])
            values.add_(piece, alpha=-adjusted(group["lr"], p.shape[-2:], group["adjust_lr_fn"]))

        self.owners.run(source, compute, sink, dtype=self.ns_dtype, device=local[0][0].device)
        return loss


def _local(x: torch.Tensor) -> torch.Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
