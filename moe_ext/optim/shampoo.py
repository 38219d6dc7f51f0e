"""Shampoo (Gupta 2018) with grafting and blocking (Anil 2020, Shi 2023), of matrices however they are sharded.

    Shampoo(params, lr=1e-3, precondition_frequency=20, max_preconditioner_dim=2048)    # grafting="adam"|"sgd"|"none"

A parameter [.., M, N], as experts are, is a batch of matrices, each with two preconditioners of its own; one of fewer
dimensions is a vector, with one, or a number, with none. They are cut into blocks of at most max_preconditioner_dim
rows and columns, and each block is gathered whole, computed by one rank and given back (owners.py), so that a mesh does
what one process does. With the gradient G [M, N] of a block at its step t, for each of its sides k (`order` is their
number, G_0 = G, G_1 = G^T, |..| the Frobenius norm):

    G          <- G + weight_decay W                            unless use_decoupled_weight_decay
    factor_k   <- beta2 factor_k + (1 - beta2) G_k G_k^T        if beta2 is 1 their sum, as in Adagrad
    root_k      = (factor_k / (1 - beta2^t) + epsilon I)^(-1 / (2 order))       at t = start_preconditioning_step, and
                                                                later where precondition_frequency divides t
    exp_avg    <- beta1 exp_avg + (1 - beta1) G                 m = exp_avg / (1 - beta1^t)
    exp_avg_sq <- graft_beta2 exp_avg_sq + (1 - graft_beta2) G^2
    D           = m / (sqrt(exp_avg_sq / (1 - graft_beta2^t)) + graft_eps)      with grafting "adam"; else m
    S           = root_0 m root_1                               with grafting of D's length: S |D| / (|S| + 1e-16)
    P           = D if t < start_preconditioning_step else S    + weight_decay W if decoupled
    W          <- W - lr P                                      with momentum P's heavy ball, in momentum_buffer

Names and formulas are those of DistributedShampoo of facebookresearch/optimizers (August 2026): betas[1] of 1, grafting
of each block, when roots are computed, what moves until then, use_bias_correction (exp_avg_sq is always corrected),
inverse_exponent_override (here one number for each order). What is not the same:
- There the dimensions of a parameter are merged and all of them preconditioned, that of the experts too.
- There t is the group's; here a parameter without a gradient takes no step, and t is its own.
- There factors are fp32 and decomposed in fp32; here they have the parameter's dtype, at least fp32, and root_dtype.
- There epsilon is added before the eigendecomposition, where 1e-12 is less than rounding; here to the eigenvalues.
- There training ends where a factor is not finite or has failed four times; here it falls back, as below.
- There grafting is a config with a beta2 of .999; here a word, and graft_beta2 is betas[1] unless it is given.
- Here are no beta3, dampening, Adagrad's or RMSprop's grafting, averages of iterates, other weight decays.

Falling back: an eigendecomposition that fails, or is not finite, as LAPACK's in fp32 of 1000 rows and rank 6 now and
then, is done again in fp64, moved along the diagonal by a rounding error. If that fails too, the last root stays, and
without one grafting alone (D) moves the block. A factor that is not finite starts anew, as if its training began there.
Each time counts in `optimizer.fallbacks`, and the first of each kind is a warning.

State: "step" of each parameter, on every rank; "momentum_buffer", which lies as the parameter does, with momentum; and
for each block, at its owner alone, the tensors of `state_shapes`, named WHAT.KEY by where the block begins (since0.KEY
where factor0 started anew): no name depends on the mesh. state="bf16" rounds the moments alone. A factor's small
eigenvalues would be rounding errors of its large ones; so would a root's, which are those of the large gradients.

Blocks of one shape are computed one after another: to stack them would copy every factor and root at each step, and a
CPU gains nothing: eigh of 64 matrices of 32 rows takes 10 ms in a stack and 7 in a loop, of 64 rows 22 and 24 ms.
"""
from __future__ import annotations

import warnings

import torch

from moe_ext.optim.owners import Matrix, Owners
from moe_ext.optim.state import Kept, gradient, local
from moe_ext.optim.whole import WholeMatrices

GRAFTING = "adam", "sgd", "none"
MOMENTS = "exp_avg", "exp_avg_sq"
EIGH = 25       # FLOPs of an eigendecomposition / n^3 at the speed of a product: 10 to 39 of 64 to 1024 rows on a CPU


def inverse_root(factor: torch.Tensor, root: float, eps: float, dtype: torch.dtype = torch.float64,
                 shifted: bool = False) -> torch.Tensor:
    """(factor + eps I)^(-1/root) of a symmetric positive semidefinite [n,n], of which the lower triangle is read, by
    its eigenvalues, computed in `dtype`; if rounding has made the smallest negative, all are raised by it. In the
    factor's dtype. shifted: the decomposition is of a matrix moved along the diagonal by a rounding error, so it may
    succeed where it has failed. Errors: torch.linalg.LinAlgError."""
    matrix, shift = factor.to(dtype), 0.0
    if shifted:
        shift = torch.finfo(factor.dtype).eps * factor.diagonal().mean().to(dtype)
        matrix = matrix + shift * torch.eye(len(factor), dtype=dtype, device=factor.device)
    values, vectors = torch.linalg.eigh(matrix)
    values = values - shift
    values = values - values.min().clamp(max=0) + eps
    return ((vectors * values.pow(-1 / root)) @ vectors.mT).to(factor.dtype)


def cost(shape, frequency: int = 20) -> float:
    """FLOPs of a block's step: its factors, its products with the roots, a share of the roots."""
    n = torch.Size(shape).numel()
    return n + sum(4 * n * dim + (EIGH + 2) * dim**3 / frequency for dim in shape)


def state_shapes(shape, grafting: str = "adam", beta1: float = 0.9) -> dict[str, tuple[int, ...]]:
    """What the owner of a block keeps of it, once there are roots: {"exp_avg": .., "factor0": .., ..}."""
    shape = tuple(shape)
    moments = [name for name, used in (("exp_avg", beta1 > 0), ("exp_avg_sq", grafting == "adam")) if used]
    return dict.fromkeys(moments, shape) | {f"{what}{dim}": (n, n) for what in ("factor", "root")
                                            for dim, n in enumerate(shape)}


def check(group: dict) -> None:
    """ValueError unless a group's hyperparameters make sense."""
    def need(name: str, right: bool, wanted: str) -> None:
        if not right:
            raise ValueError(f"Shampoo: {name}: got {group[name]!r}, wanted {wanted}")

    for name in ("lr", "weight_decay", "graft_eps"):
        need(name, group[name] >= 0, "0 or more")
    need("epsilon", group["epsilon"] > 0, "a positive number")
    need("betas", len(group["betas"]) == 2 and 0 <= group["betas"][0] < 1 and 0 <= group["betas"][1] <= 1,
         "two numbers, of [0, 1) and [0, 1]")
    need("graft_beta2", group["graft_beta2"] is None or 0 <= group["graft_beta2"] <= 1, "None or a number of [0, 1]")
    need("momentum", 0 <= group["momentum"] < 1, "a number of [0, 1)")
    need("grafting", group["grafting"] in GRAFTING, "one of " + ", ".join(GRAFTING))
    frequency, start = group["precondition_frequency"], group["start_preconditioning_step"]
    need("precondition_frequency", isinstance(frequency, int) and frequency >= 1, "a whole number of 1 or more")
    need("start_preconditioning_step", isinstance(start, int) and (start in (-1, 0) or start >= frequency),
         f"precondition_frequency ({frequency}) or more, or -1 or 0 for that")
    need("inverse_exponent_override", all(order in (1, 2) and 0 < exponent <= 1 for order, exponent in
                                          group["inverse_exponent_override"].items()),
         "{1: of vectors, 2: of matrices}, numbers of (0, 1]")


def graft_decay(group: dict) -> float:
    return group["betas"][1] if group["graft_beta2"] is None else group["graft_beta2"]


def added(decay: float) -> float:
    """The weight of what is new in a mean; 1 in a sum, which does not decay."""
    return 1 - decay if decay < 1 else 1.0


def weight(decay: float, steps: int) -> float:
    """Of all that is in a mean by now, which began with zeros; of a sum it is left as 1."""
    return 1 - decay**steps if decay < 1 else 1.0


def compute_dtype(p: torch.Tensor) -> torch.dtype:
    """Of what travels and of all state but step and momentum_buffer: the parameter's, at least fp32."""
    return torch.promote_types(p.dtype, torch.float32)


class Shampoo(WholeMatrices):
    """All parameters have one dtype and one device. A group may have its own of what stands before
    max_preconditioner_dim. step() is collective over the parameters' meshes.

    start_preconditioning_step: -1 or 0 is precondition_frequency. inverse_exponent_override: {order: exponent} in place
    of 1 / (2 order). graft_beta2: None is betas[1]. root_dtype: of the eigendecompositions, fp64 or fp32. state:
    "full", "bf16" or "host", see state.py. timeout: of process groups that have to be made, a timedelta. fallbacks: how
    often this rank fell back. Errors: ValueError; RuntimeError for sparse gradients and for state that is missing.
    """

    def __init__(self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), epsilon: float = 1e-12,
                 weight_decay: float = 0.0, *, momentum: float = 0.0, use_nesterov: bool = False,
                 use_decoupled_weight_decay: bool = True, use_bias_correction: bool = True,
                 precondition_frequency: int = 20, start_preconditioning_step: int = -1,
                 inverse_exponent_override: dict[int, float] | None = None, grafting: str = "adam",
                 graft_beta2: float | None = None, graft_eps: float = 1e-8, max_preconditioner_dim: int = 2048,
                 root_dtype: torch.dtype = torch.float64, state: str = "full", timeout=None):
        if not (isinstance(max_preconditioner_dim, int) and max_preconditioner_dim >= 1):
            raise ValueError(f"Shampoo: max_preconditioner_dim: got {max_preconditioner_dim!r}, wanted a whole number "
                             "of 1 or more")
        if root_dtype not in (torch.float64, torch.float32):
            raise ValueError(f"Shampoo: root_dtype: got {root_dtype}, wanted torch.float64 or torch.float32")
        self.keep, self.exact = Kept(state), Kept("full" if state == "bf16" else state)
        self.max_preconditioner_dim, self.root_dtype, self.timeout = max_preconditioner_dim, root_dtype, timeout
        self.fallbacks, self.told = 0, set()
        super().__init__(params, dict(
            lr=lr, betas=betas, epsilon=epsilon, weight_decay=weight_decay, momentum=momentum,
            use_nesterov=use_nesterov, use_decoupled_weight_decay=use_decoupled_weight_decay,
            use_bias_correction=use_bias_correction, precondition_frequency=precondition_frequency,
            start_preconditioning_step=start_preconditioning_step,
            inverse_exponent_override=inverse_exponent_override or {}, grafting=grafting, graft_beta2=graft_beta2,
            graft_eps=graft_eps))

    def add_param_group(self, param_group: dict) -> None:
        """As torch's. Errors: ValueError; RuntimeError once matrices have owners on several ranks."""
        if self._owners is not None and self._owners.teams:
            raise RuntimeError("Shampoo: a group added after the first step would give matrices other owners: make the "
                               "optimizer with all its groups, and load the state from a checkpoint")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["start_preconditioning_step"] <= 0:
            group["start_preconditioning_step"] = group["precondition_frequency"]

    def check(self, group: dict) -> None:
        super().check(group)
        check(group)
        first = next((p for own in self.param_groups for p in own["params"]), None)
        for p in group["params"]:
            if not p.is_floating_point():
                raise ValueError(f"Shampoo: {self.name_of(p)}: got {p.dtype}, wanted a real floating dtype")
            if (p.dtype, p.device) != (first.dtype, first.device):
                raise ValueError(f"Shampoo: {self.name_of(p)}: got {p.dtype} on {p.device} beside {first.dtype} on "
                                 f"{first.device}, wanted one of each: give the others an optimizer of their own")
        if group["grafting"] == "adam":
            self.keep.check_decay("graft_beta2", graft_decay(group))
        self.keep.check_decay("betas[0]", group["betas"][0])

    @property
    def owners(self) -> Owners:
        known, owners = self._owners is not None, super().owners
        if not known:
            parameters = [p for group in self.param_groups for p in group["params"]]
            self._blocks = {p: {} for p in parameters}
            for matrix, owner in owners.owned:
                self._blocks[parameters[matrix.index]][matrix.key] = matrix, owner
        return owners

    def _cost(self, shape) -> float:
        return cost(shape, self.defaults["precondition_frequency"])

    def __getstate__(self) -> dict:
        own = ("exact", "max_preconditioner_dim", "root_dtype", "fallbacks", "told")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def loaded(self) -> None:
        """Collective. Missing roots are a warning and count as fallbacks: torch.distributed.checkpoint leaves them out
        where the optimizer that it loads into has none yet."""
        members = [(p, group) for group in self.param_groups for p in group["params"]]
        missing = []
        for matrix in self.owners.mine if self.state else ():
            p, group = members[matrix.index]
            state, roots = self.state.get(p, {}), {f"root{side}.{matrix.key}" for side in range(len(matrix.shape))}
            if state.get("step", 0) >= group["start_preconditioning_step"] and not roots <= state.keys():
                missing.append(f"{self.name_of(p)}, block {matrix.key}")
        if missing:
            self.fallbacks += len(missing)
            warnings.warn(f"Shampoo: the state that was loaded has no roots of {len(missing)} blocks, as of "
                          f"{missing[0]}: grafting alone moves them until the next are computed", stacklevel=4)

    def place(self, p: torch.Tensor, key: str, shape, dtype: torch.dtype) -> torch.Tensor | None:
        """As Keeping's: for the owner of its block alone. The first use is collective, as of owners."""
        shape, (what, _, start) = tuple(shape), key.partition(".")
        if key == "step" and shape == ():
            return torch.zeros(())
        if key == "momentum_buffer" and shape == tuple(p.shape):
            return self.keep.zeros(p)
        rank, blocks = self.owners.rank, self._blocks[p]
        matrix, owner = blocks.get(start, (None, None))
        known = {}
        if matrix is not None:
            known = state_shapes(matrix.shape) | {f"since{side}": () for side in range(len(matrix.shape))}
        if known.get(what) != shape:
            has = ", ".join(f"{name} {list(of)}" for name, of in known.items()) or "blocks at " + "; ".join(blocks)
            raise ValueError(f"{self.name_of(p)}: got a state {key} {list(shape)}, but with max_preconditioner_dim "
                             f"{self.max_preconditioner_dim} Shampoo has {has}: load it with the optimizer and the "
                             "max_preconditioner_dim that it is of")
        if owner != rank:
            return None
        if what.startswith("since"):
            return torch.zeros(())
        like = torch.empty((), dtype=compute_dtype(p), device=p.device)
        return (self.keep if what in MOMENTS else self.exact).zeros(like, shape)

    def _move(self, members, moved, device) -> None:
        for i in moved:
            if members[i][0].grad.layout != torch.strided:
                raise RuntimeError(f"Shampoo: {self.name_of(members[i][0])}: got a sparse gradient, wanted a dense one")
        grads = {}
        for i in moved:
            (p, group), state = members[i], self.state[members[i][0]]
            grads[i] = local(gradient(p))
            state.setdefault("step", torch.zeros(())).add_(1)
            if group["momentum"] and state["step"] == 1:
                state["momentum_buffer"] = self.keep.zeros(p)

        def source(i, part):
            (p, group), grad = members[i], grads[i][part]
            if group["use_decoupled_weight_decay"] or not group["weight_decay"]:
                return grad
            return grad.add(local(p)[part], alpha=group["weight_decay"])

        def compute(matrices, wholes):
            return [self._direction(*members[matrix.index], matrix, grad)
                    for matrix, grad in zip(matrices, wholes, strict=True)]

        def sink(i, part, piece):
            (p, group), values = members[i], local(members[i][0])[part]
            decay = group["weight_decay"] if group["use_decoupled_weight_decay"] else 0.0
            if not group["momentum"]:
                values.mul_(1 - group["lr"] * decay).add_(piece, alpha=-group["lr"])
                return
            stored = local(self.state[p]["momentum_buffer"])[part]
            buffer, piece = self.keep.get(stored, values), piece.add(values, alpha=decay)
            self.keep.put(buffer.mul_(group["momentum"]).add_(piece), stored)
            values.add_(piece.add_(buffer, alpha=group["momentum"]) if group["use_nesterov"] else buffer,
                        alpha=-group["lr"])

        self.owners.run(source, compute, sink, dtype=compute_dtype(members[0][0]), device=device, moved=moved)

    def _direction(self, p, group: dict, matrix: Matrix, grad: torch.Tensor) -> torch.Tensor:
        """P of a block, without weight decay, from its whole gradient."""
        state, (beta1, beta2) = self.state[p], group["betas"]
        step, start, order = int(state["step"]), group["start_preconditioning_step"], grad.ndim

        def updated(what, keep, update, shape=grad.shape):
            """A tensor of the state, after update(tensor)."""
            key = f"{what}.{matrix.key}"
            if key not in state:
                if step > 1:
                    raise RuntimeError(f"Shampoo: {self.name_of(p)}: the state that was loaded has no {key}, needed at "
                                       f"step {step}: set betas and grafting as they were; for another mesh load a "
                                       "checkpoint")
                state[key] = keep.zeros(grad, shape)
            value = keep.get(state[key], grad)
            update(value)
            keep.put(value, state[key])
            return value

        mean = grad
        if beta1:
            mean = updated("exp_avg", self.keep, lambda m: m.lerp_(grad, 1 - beta1))
            if group["use_bias_correction"]:
                mean = mean / (1 - beta1**step)
        graft = mean
        if group["grafting"] == "adam":
            decay = graft_decay(group)
            square = updated("exp_avg_sq", self.keep,
                             lambda v: v.mul_(decay).addcmul_(grad, grad, value=added(decay)))
            graft = (square / weight(decay, step)).sqrt_().add_(group["graft_eps"])
            graft = torch.div(mean, graft, out=graft)
        roots = []
        for side, n in enumerate(grad.shape):
            rows = grad.mT if side else grad.view(n, -1)
            factor = updated(f"factor{side}", self.exact,
                             lambda f, rows=rows: f.addmm_(rows, rows.mT, beta=beta2, alpha=added(beta2)), (n, n))
            root = f"root{side}.{matrix.key}"
            if step == start or (step > start and step % group["precondition_frequency"] == 0):
                if (value := self._root(p, group, matrix, side, factor)) is not None:
                    if root not in state:
                        state[root] = self.exact.zeros(grad, (n, n))
                    self.exact.put(value, state[root])
            if root in state:
                roots.append(self.exact.get(state[root], grad))
        if step < start or len(roots) < max(1, order):
            return graft
        x = mean
        for side, root in enumerate(roots):
            x = x @ root if side else root @ x
        return x if group["grafting"] == "none" else x.mul_(graft.norm() / (x.norm() + 1e-16))

    def _root(self, p, group: dict, matrix: Matrix, side: int, factor: torch.Tensor) -> torch.Tensor | None:
        """A new root of a factor; None if there is none to be had. A factor that is not finite starts anew."""
        state, beta2, order = self.state[p], group["betas"][1], len(matrix.shape)
        step, since = int(state["step"]), f"since{side}.{matrix.key}"
        kept = "the last root stays" if f"root{side}.{matrix.key}" in state else "grafting alone moves the block"

        def fall_back(kind: str, then: str) -> None:
            self.fallbacks += 1
            if kind not in self.told:
                self.told.add(kind)
                warnings.warn(f"Shampoo: {self.name_of(p)}, block {matrix.key}, side {side}, step {step}: {kind}, "
                              f"{then}; the next ones are only counted, in optimizer.fallbacks", stacklevel=2)

        if not torch.isfinite(factor).all():
            self.exact.put(factor.zero_(), state[f"factor{side}.{matrix.key}"])
            state[since] = state["step"].clone()
            return fall_back("a preconditioner that is not finite", f"it starts anew, {kept}")
        total = weight(beta2, step - int(state.get(since, 0))) if group["use_bias_correction"] else 1.0
        exponent = group["inverse_exponent_override"].get(order, 1 / (2 * order))
        for again, dtype in enumerate((self.root_dtype, torch.float64)):
            try:
                root = inverse_root(factor, 1 / exponent, group["epsilon"] * total, dtype, shifted=bool(again))
            except torch.linalg.LinAlgError:
                continue
            if torch.isfinite(root).all():
                if again:
                    fall_back("an eigendecomposition that failed", "done again in fp64")
                return root.mul_(total**exponent)
        return fall_back("an eigendecomposition that failed twice", kept)
