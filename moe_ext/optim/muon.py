"""Muon (Jordan 2024): momentum, orthogonalised by Newton-Schulz, of matrices however they are sharded.

    Muon(params, lr=.., adjust_lr_fn="match_rms_adamw")         # torch.optim.Muon's names, order and defaults
    newton_schulz(x)                                            # [.., M, N] -> nearly U V^T

A parameter [.., M, N], as experts are, is a batch of matrices. Each is gathered whole, computed by one rank and given
back (owners.py): where fp32 or fp64 is chosen, results on a mesh are those of one process, up to rounding of what the
gradients are sums of. With g the gradient, m the momentum and l the adjusted learning rate:

    buffer <- momentum * buffer + (1 - momentum) * g
    m      =  momentum * buffer + (1 - momentum) * g if nesterov else buffer
    p      <- (1 - lr * weight_decay) * p - l * newton_schulz(m)
"""
from __future__ import annotations

import math

import torch

from moe_ext.optim.state import Kept, gradient, local
from moe_ext.optim.whole import WholeMatrices

COEFFICIENTS = 3.4445, -4.7750, 2.0315      # of the quintic, those of the Muon repository
EPS = 1e-7
STEPS = 5
DTYPES = torch.bfloat16, torch.float32, torch.float64
CACHED = 2**20      # elements of matrices that a CPU multiplies at a time: more would leave its cache between products
ADJUSTED = {        # name -> factor of the learning rate of a matrix [rows, columns]
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),            # Jordan
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),   # Moonlight: as long as AdamW's step
    "spectral": lambda rows, columns: math.sqrt(rows / columns),    # Bernstein: outputs change alike at every width
    "none": lambda rows, columns: 1.0,
}


@torch.no_grad()
def newton_schulz(x: torch.Tensor, steps: int = STEPS, coefficients: tuple[float, float, float] = COEFFICIENTS,
                  eps: float = EPS) -> torch.Tensor:
    """[.., M, N] -> of each matrix U S V^T nearly U V^T: its singular values become about .7 to 1.2, zeros stay zeros.

    With X = x / max(norm of x, eps), in each step: X <- a X + (b G + c G^2) X, G = X X^T of the shorter side. All in
    the dtype of x; what is not finite makes its own matrix NaN, not its neighbours. A CPU multiplies bf16 numbers in
    fp32 and rounds each product to bf16, as a GPU does: few CPUs have bf16 products, and without them these take
    fifty times as long. TypeError, ValueError.
    """
    if not x.is_floating_point():
        raise TypeError(f"newton_schulz: x is {x.dtype}; wanted a real floating dtype")
    if x.ndim < 2:
        raise ValueError(f"newton_schulz: x has shape {list(x.shape)}; wanted [.., M, N]")
    if x.numel() == 0:
        return x.clone()
    flat = x.flatten(0, -3) if x.ndim > 2 else x[None]
    tall = x.shape[-2] > x.shape[-1]
    flat = flat.mT if tall else flat
    flat = flat / torch.linalg.vector_norm(flat, dim=(-2, -1), keepdim=True).clamp(min=eps)
    at_once = max(1, CACHED // flat[0].numel()) if x.is_cpu else len(flat)
    out = torch.empty_like(flat)
    for part, into in zip(flat.split(at_once), out.split(at_once), strict=True):
        into.copy_(_iterate(part.float() if x.is_cpu and x.dtype == torch.bfloat16 else part, steps, coefficients,
                            x.dtype))
    return (out.mT if tall else out).view_as(x)


def _iterate(x: torch.Tensor, steps: int, coefficients, dtype: torch.dtype) -> torch.Tensor:
    """[B, M, N], M <= N, normalised; every product is rounded to dtype, which may be narrower than x's."""
    a, b, c = coefficients

    def rounded(product):
        return product if product.dtype == dtype else product.copy_(product.to(dtype))

    gram, other = x.new_empty(len(x), x.shape[1], x.shape[1]), torch.empty_like(x)
    quintic = torch.empty_like(gram)
    for _ in range(steps):
        rounded(torch.bmm(x, x.mT, out=gram))
        rounded(torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=quintic))
        rounded(torch.baddbmm(x, quintic, x, beta=a, out=other))
        x, other = other, x
    return x


def cost(shape, steps: int = STEPS) -> float:
    """FLOPs of newton_schulz of one matrix [M, N]."""
    small, large = sorted(shape)
    return steps * (4.0 * small * small * large + 2.0 * small**3)


class Muon(WholeMatrices):
    """Parameters of two and more dimensions, plain or DTensors of any mesh; on a mesh all its ranks step together.

    Arguments, defaults and results are torch.optim.Muon's; all but the last three may differ between groups.

    params: tensors [.., M, N], groups, or (name, tensor) pairs. lr: a float. weight_decay: decoupled, lr * weight_decay
    of a parameter goes, whatever the adjusted lr. momentum, nesterov: above. ns_coefficients, ns_steps, eps: of
    newton_schulz. adjust_lr_fn: of ADJUSTED; None is "original", as in torch. ns_dtype: in which Newton-Schulz computes
    and matrices travel, whatever the parameters have. state: how "momentum_buffer", the state of a parameter, is kept,
    sharded as it is (optim.state). timeout: of process groups that have to be made, a timedelta.

    A parameter without a gradient is left alone. Errors: ValueError, TypeError for what it cannot move and for
    hyper-parameters out of range, before anything is moved.
    """

    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95,
                 nesterov: bool = True, ns_coefficients: tuple[float, float, float] = COEFFICIENTS, eps: float = EPS,
                 ns_steps: int = STEPS, adjust_lr_fn: str | None = None, *, ns_dtype: torch.dtype = torch.bfloat16,
                 state: str = "full", timeout=None):
        if ns_dtype not in DTYPES:
            raise ValueError(f"Muon: ns_dtype is {ns_dtype}; it must be one of {', '.join(map(str, DTYPES))}")
        self.keep, self.ns_dtype, self.timeout = Kept(state), ns_dtype, timeout
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov,
                                      ns_coefficients=ns_coefficients, eps=eps, ns_steps=ns_steps,
                                      adjust_lr_fn=adjust_lr_fn))

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "ns_dtype": self.ns_dtype}

    def check(self, group: dict) -> None:
        super().check(group)
        check(group)
        self.keep.check_decay("momentum", group["momentum"])
        for p in group["params"]:
            if p.ndim < 2:
                raise ValueError(f"Muon moves matrices [.., M, N], but got {self.name_of(p)}, {list(p.shape)}: give it "
                                 "to AdamW, as \"norms: adamw\" in optim.rule does")
            if not p.is_floating_point():
                raise TypeError(f"Muon moves real matrices, but got {self.name_of(p)}, {p.dtype}: give it to AdamW")

    def _cost(self, shape) -> float:
        return cost(shape)

    def place(self, p: torch.Tensor, key: str, shape, dtype: torch.dtype) -> torch.Tensor:
        if key != "momentum_buffer" or list(shape) != list(p.shape):
            raise ValueError(f"got {key} {list(shape)}, wanted the state of Muon: momentum_buffer {list(p.shape)}")
        return self.keep.zeros(p)

    def _move(self, members, moved, device) -> None:
        for i in moved:
            if members[i][0].grad.layout != torch.strided:
                raise TypeError(f"Muon: {self.name_of(members[i][0])} has a sparse gradient; wanted a dense one")
        grads, buffers = {}, {}
        for i in moved:
            p, group = members[i]
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = self.keep.zeros(p)
            grads[i], buffers[i] = local(gradient(p)), local(self.state[p]["momentum_buffer"])
            buffer = self.keep.get(buffers[i], grads[i])
            self.keep.put(buffer.lerp_(grads[i], 1 - group["momentum"]), buffers[i])

        def source(i, part):
            group, grad = members[i][1], grads[i]
            buffer = self.keep.get(buffers[i][part], grad)
            return grad[part].lerp(buffer, group["momentum"]) if group["nesterov"] else buffer

        def compute(matrices, wholes):
            alike, results = {}, {}
            for matrix, whole in zip(matrices, wholes, strict=True):
                group = members[matrix.index][1]
                how = group["ns_steps"], tuple(group["ns_coefficients"]), group["eps"]
                alike.setdefault((matrix.shape, how), {})[matrix] = whole
            for (_, how), several in alike.items():
                results |= zip(several, newton_schulz(torch.stack(list(several.values())), *how), strict=True)
            return [results[matrix] for matrix in matrices]

        def sink(i, part, piece):
            p, group = members[i]
            lr, values = group["lr"], local(p)[part]
            values.mul_(1 - lr * group["weight_decay"])
            values.add_(piece, alpha=-lr * ADJUSTED[group["adjust_lr_fn"] or "original"](*p.shape[-2:]))

        self.owners.run(source, compute, sink, dtype=self.ns_dtype, device=device, moved=moved)


def check(group: dict) -> None:
    """ValueError or TypeError unless a group's hyperparameters make sense."""
    def require(good, name, wanted):
        if not good:
            raise ValueError(f"Muon: {name} is {group[name]!r}; it must be {wanted}")

    if not isinstance(group["lr"], int | float):
        raise TypeError(f"Muon: lr is a {type(group['lr']).__name__}; it must be a float, which schedules may set")
    for name in ("lr", "weight_decay"):
        require(0 <= group[name] < math.inf, name, "finite and not negative")
    require(0 <= group["momentum"] < 1, "momentum", "in [0, 1): the share of the mean that stays")
    require(0 < group["eps"] < math.inf, "eps", "positive: a matrix of zeros is divided by it")
    require(isinstance(group["ns_steps"], int) and 1 <= group["ns_steps"] < 100, "ns_steps", "an integer in 1 .. 99")
    require(len(group["ns_coefficients"]) == 3 and all(map(math.isfinite, group["ns_coefficients"])),
            "ns_coefficients", "three finite numbers")
    require(group["adjust_lr_fn"] in (None, *ADJUSTED), "adjust_lr_fn", f"None or one of {', '.join(ADJUSTED)}")
