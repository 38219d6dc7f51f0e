"""Shampoo (Gupta 2018, with grafting and blocking as in Shi 2023) of matrices however they are sharded."""
from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from moe_ext.optim.owners import Matrix, Owners


def inverse_root(factor: torch.Tensor, root: int, eps: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """(factor + eps I)^(-1/root) of a symmetric positive semidefinite [n,n], by its eigenvalues; rounding may have made
    the smallest negative, and then all are raised by it. In the factor's dtype."""
    values, vectors = torch.linalg.eigh(factor.to(dtype))
    values = values - values.min().clamp(max=0) + eps
    return ((vectors * values.pow(-1 / root)) @ vectors.mT).to(factor.dtype)


def cost(shape, frequency: int = 20) -> float:
    """FLOPs of a step: the statistics, the products, a share of the eigendecompositions."""
    n = max(1, torch.Size(shape).numel())
    return sum(4 * n * dim + 25 * dim**3 / frequency for dim in shape)


class Shampoo(torch.optim.Optimizer):
    def __init__(self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), epsilon: float = 1e-12,
                 weight_decay: float = 0.0, *, precondition_frequency: int = 20, start_preconditioning_step: int = 0,
                 max_preconditioner_dim: int = 2048, grafting: str = "adam", graft_eps: float = 1e-8,
                 root_dtype: torch.dtype = torch.float64, timeout=None):
        defaults = dict(lr=lr, betas=betas, epsilon=epsilon, weight_decay=weight_decay)
        super().__init__(params, defaults)
        self.frequency, self.start = precondition_frequency, start_preconditioning_step or precondition_frequency
        self.most, self.grafting, self.graft_eps = max_preconditioner_dim, grafting, graft_eps
        self.root_dtype, self.timeout, self.owners = root_dtype, timeout, None
        self.fallbacks = 0

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.owners is None:
            self.owners = Owners([p for p, _ in moved], lambda shape: cost(shape, self.frequency), most=self.most,
                                 timeout=self.timeout)
        local = [(_local(p), _local(p.grad)) for p, _ in moved]
        for p, _ in moved:
            self.state[p].setdefault("step", torch.zeros(()))
            self.state[p]["step"] += 1

        def compute(matrices, wholes):
            return [self.direction(*moved[m.index], m, grad) for m, grad in zip(matrices, wholes, strict=True)]

        def sink(i, part, piece):
            (_, group), values = moved[i], local[i][0][part]
            values.mul_(1 - group["lr"] * group["weight_decay"])
            values.add_(piece, alpha=-group["lr"])

        self.owners.run(lambda i, part: local[i][1][part], compute, sink, dtype=local[0][0].dtype,
                        device=local[0][0].device)
        return loss

    def direction(self, p, group: dict, matrix: Matrix, grad: torch.Tensor) -> torch.Tensor:
        """The step of a matrix, to be multiplied by -lr, from its whole gradient."""
        state, (beta1, beta2) = self.state[p], group["betas"]
        step = int(state["step"])

        def kept(name, make):
            return state.setdefault(f"{name}.{matrix.key}", make())

        mean = kept("exp_avg", lambda: torch.zeros_like(grad)).lerp_(grad, 1 - beta1) / (1 - beta1**step)
        square = kept("exp_avg_sq", lambda: torch.zeros_like(grad)).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        factors, roots = [], []
        for dim, n in enumerate(grad.shape):
            rows = grad.movedim(dim, 0).reshape(n, -1)
            factor = kept(f"factor{dim}", lambda n=n: grad.new_zeros(n, n))
            factors.append(factor.mul_(beta2).addmm_(rows, rows.mT, alpha=1 - beta2))
            roots.append(kept(f"root{dim}", lambda n=n: torch.eye(n, dtype=grad.dtype, device=grad.device)))
        if step >= self.start and (step - self.start) % self.frequency == 0:
            for factor, root in zip(factors, roots, strict=True):
                root.copy_(inverse_root(factor / (1 - beta2**step), 2 * grad.ndim, group["epsilon"], self.root_dtype))
        graft = mean
        if self.grafting == "adam":
            graft = mean / ((square / (1 - beta2**step)).sqrt() + self.graft_eps)
        if step < self.start:
            return graft
        x = roots[0] @ mean
        if grad.ndim == 2:
            x = x @ roots[1]
        return x if self.grafting == "none" else x * (graft.norm() / (x.norm() + 1e-16))


def _local(x: torch.Tensor) -> torch.Tensor:
    return x.to_local() if isinstance(x, DTensor) else x
