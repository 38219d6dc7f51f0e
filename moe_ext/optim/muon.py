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
from torch.distributed.tensor import DTensor

from moe_ext.optim.owners import Owners

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


class Muon(torch.optim.Optimizer):
    """Parameters of two and more dimensions, plain or DTensors of any mesh; on a mesh all its ranks step together.

    Arguments, defaults and results are torch.optim.Muon's, and each may differ between groups but the last three:

    params: tensors [.., M, N], groups, or (name, tensor) pairs. lr: a float. weight_decay: decoupled, a share lr *
    weight_decay, not of the adjusted lr. momentum, nesterov: above. ns_coefficients, ns_steps, eps: of newton_schulz.
    adjust_lr_fn: of ADJUSTED; None is "original", as in torch. ns_dtype: in which Newton-Schulz computes and matrices
    travel, whatever the parameters have; fp32 and fp64 give the same on every mesh, up to rounding of the gradients.
    timeout: of the process groups it makes, a timedelta.

    The state of a parameter is "momentum_buffer", sharded as it is. A parameter without a gradient is left alone.
    Errors: ValueError, TypeError for what it cannot move and for hyper-parameters out of range.
    """

    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95,
                 nesterov: bool = True, ns_coefficients: tuple[float, float, float] = COEFFICIENTS, eps: float = EPS,
                 ns_steps: int = STEPS, adjust_lr_fn: str | None = None, *, ns_dtype: torch.dtype = torch.bfloat16,
                 timeout=None):
        if ns_dtype not in DTYPES:
            raise ValueError(f"Muon: ns_dtype is {ns_dtype}; it must be one of {', '.join(map(str, DTYPES))}")
        self.ns_dtype, self.timeout, self._owners = ns_dtype, timeout, None
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov,
                                      ns_coefficients=ns_coefficients, eps=eps, ns_steps=ns_steps,
                                      adjust_lr_fn=adjust_lr_fn))

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._owners = None

    @property
    def owners(self) -> Owners:
        """Who computes which matrix. Made at its first use, where all ranks have to be."""
        if self._owners is None:
            self._owners = Owners([p for group in self.param_groups for p in group["params"]], cost,
                                  timeout=self.timeout)
        return self._owners

    @torch.no_grad()
    def step(self, closure=None):
        """Move the parameters; the closure's result, if there is one. TypeError for sparse and complex gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group_of = [group for group in self.param_groups for _ in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        grads, buffers = {}, {}
        for i, (p, group) in enumerate(zip(parameters, group_of, strict=True)):
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise TypeError(f"Muon: {_name(p, group)} has a sparse gradient; wanted a dense one")
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            grads[i], buffers[i] = _local(p.grad), _local(state["momentum_buffer"])
            buffers[i].lerp_(grads[i], 1 - group["momentum"])

        def source(i, part):
            group = group_of[i]
            return grads[i][part].lerp(buffers[i][part], group["momentum"]) if group["nesterov"] else buffers[i][part]

        def compute(matrices, wholes):
            results, alike = [None] * len(wholes), {}
            for k, (matrix, whole) in enumerate(zip(matrices, wholes, strict=True)):
                group = group_of[matrix.index]
                how = group["ns_steps"], tuple(group["ns_coefficients"]), group["eps"]
                alike.setdefault((whole.shape, how), []).append(k)
            for (_, how), ks in alike.items():
                for k, result in zip(ks, newton_schulz(torch.stack([wholes[k] for k in ks]), *how), strict=True):
                    results[k] = result
            return results

        def sink(i, part, piece):
            group, values = group_of[i], _local(parameters[i])[part]
            factor = ADJUSTED[group["adjust_lr_fn"] or "original"](*parameters[i].shape[-2:])
            values.mul_(1 - group["lr"] * group["weight_decay"])
            values.add_(piece, alpha=-group["lr"] * factor)

        self.owners.run(source, compute, sink, dtype=self.ns_dtype, device=_local(parameters[0]).device)
        return loss


def _local(x: torch.Tensor) -> torch.Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _name(p: torch.Tensor, group: dict) -> str:
    names = [name for name, q in zip(group.get("param_names", ()), group["params"], strict=False) if q is p]
    return f"the parameter {names[0] if names else 'without a name'} {list(p.shape)}"


def _check(group: dict) -> None:
    """TypeError or ValueError for a group that Muon cannot move."""
    def require(good, name, wanted):
        if not good:
            raise ValueError(f"Muon: {name} is {group[name]!r}; it must be {wanted}")

    if not isinstance(group["lr"], int | float):
        raise TypeError(f"Muon: lr is a {type(group['lr']).__name__}; wanted a float: a schedule sets group[\"lr\"]")
    for name in ("lr", "weight_decay"):
        require(0 <= group[name] < math.inf, name, "finite and not negative")
    require(0 <= group["momentum"] < 1, "momentum", "in [0, 1): the share of the mean that stays")
    require(0 < group["eps"] < math.inf, "eps", "positive: zeros are divided by it")
    require(isinstance(group["ns_steps"], int) and 1 <= group["ns_steps"] < 100, "ns_steps", "a whole number in 1 .. 99")
    require(len(group["ns_coefficients"]) == 3 and all(map(math.isfinite, group["ns_coefficients"])),
            "ns_coefficients", "three finite numbers")
    require(group["adjust_lr_fn"] in (None, *ADJUSTED), "adjust_lr_fn", f"None or one of {', '.join(ADJUSTED)}")
    for p in group["params"]:
        if p.ndim < 2:
            raise ValueError(f"Muon moves matrices [.., M, N], but got {_name(p, group)}: give it to AdamW, with the "
                             "rule \"norms: adamw\" in optim.rule")
        if not p.is_floating_point():
            raise TypeError(f"Muon moves real numbers, but got {_name(p, group)} of {p.dtype}: give it to AdamW")
