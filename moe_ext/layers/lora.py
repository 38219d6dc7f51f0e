"""LoRA (Hu et al., 2021): low-rank factors on linear layers and on experts, trained in place of the matrices.

    y = W x + b + (alpha/r) B (A x)         A [r,in] from N(0, 1/(3 in)), B [out,r] zero, so that it begins as W x + b

    add_lora(model, rank=8, alpha=16, targets=r"self_attn\\.[qkvo]_proj|experts")      # factors; freezes nothing
    merge_lora(model)                                                               # W += (alpha/r) B A, factors gone

An expert has factors of its own: A [E,r,in], B [E,out,r]. Gate and up, which lie in one parameter, share an A, as in
peft's target_parameters: w13_lora_A [E,r,D], w13_lora_B [E,2,F,r], w2_lora_A [E,r,F], w2_lora_B [E,D,r] beside w13_E2FD
and w2_EDF. A linear layer has lora_A and lora_B beside its weight. So `layers.0.mlp.experts.w13_lora_A` and
`layers.0.self_attn.q_proj.lora_A` are parameters like others to optimizers, checkpoints and meshes. Factors are float32
where the matrix has fewer bits, and computed with in the dtype of x.

A module with factors changes its class to a subclass of its own, which `merge_lora` takes back.
"""
import collections
import functools
import inspect
import math
import re

import torch
import torch.nn.functional as F
from torch import nn

from moe_ext import ops
from moe_ext.layers.fused import Experts, Linear, normal_, site
from moe_ext.ops.define import real
from moe_ext.ops.enums import ACTS, number
from moe_ext.ops.expert import _activation_backward
from moe_ext.ops.permute import _gather, _scatter

# ---- the arithmetic --------------------------------------------------------------------------------------------------


class LowRank:
    """One grouped product y = x w + b + (s x a) c of N rows sorted by expert, forward and backward, below autograd.
    w [E,I,O], a [E,I,r], c [E,r,O], any strides; b [E,O]. b, and a with c, may be None."""

    def __init__(self, w, b, a, c, scale, bins_E):
        self.w, self.b, self.a, self.c, self.scale, self.bins_E = w, b, a, c, scale, bins_E

    def forward(self, x_NI, expert_N):
        """-> y_NO, u_Nr = s x a (None without factors)."""
        y_NO, u_Nr = ops.grouped_gemm(x_NI, self.w, self.bins_E), None
        if self.a is not None:
            u_Nr = ops.grouped_gemm(x_NI, self.a, self.bins_E).mul_(self.scale)
            y_NO += ops.grouped_gemm(u_Nr, self.c, self.bins_E)
        if self.b is not None:
            y_NO += self.b.index_select(0, expert_N)
        return y_NO, u_Nr

    def du(self, dy_NO):
        """-> du_Nr = s dy c^T, None without factors."""
        if self.a is None:
            return None
        return ops.grouped_gemm(dy_NO, self.c.transpose(1, 2), self.bins_E).mul_(self.scale)

    def dx(self, dy_NO, du_Nr):
        """-> dx_NI = dy w^T + du a^T."""
        dx_NI = ops.grouped_gemm(dy_NO, self.w.transpose(1, 2), self.bins_E)
        if du_Nr is not None:
            dx_NI += ops.grouped_gemm(du_Nr, self.a.transpose(1, 2), self.bins_E)
        return dx_NI

    def dparameters(self, x_NI, u_Nr, dy_NO, du_Nr, wanted, ones_N1):
        """-> dw, db, da, dc, those that `wanted` says."""
        dw, db, da, dc = wanted
        return (self.outer(x_NI, dy_NO, self.w) if dw else None,
                ops.grouped_gemm_wgrad(ones_N1, dy_NO, self.bins_E).squeeze(1) if db else None,
                self.outer(x_NI, du_Nr, self.a) if da else None,
                self.outer(u_Nr, dy_NO, self.c) if dc else None)

    def outer(self, x_NI, dy_NO, like):
        """x^T dy by expert, in the memory order of the parameter behind `like`."""
        if like.stride(1) == 1 and like.stride(2) != 1:
            return ops.grouped_gemm_wgrad(dy_NO, x_NI, self.bins_E).transpose(1, 2)
        return ops.grouped_gemm_wgrad(x_NI, dy_NO, self.bins_E)


def halves(h_NU):
    """[N, gate and up in turn] -> [N, gate | up]."""
    return h_NU.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1)


def in_turn(h_NU):
    """The inverse of halves."""
    return h_NU.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)


class _LowRankExperts(torch.autograd.Function):     # not define's, whose jvp torch.compile does not trace
    @staticmethod
    def forward(ctx, x_RD, weights_RK, w13, b13, a13, c13, w2, b2, a2, c2, order_M, bins_E, scale, act, turns, copies):
        up, down = LowRank(w13, b13, a13, c13, scale, bins_E), LowRank(w2, b2, a2, c2, scale, bins_E)
        ctx.scale, ctx.act, ctx.turns, K = scale, act, turns, weights_RK.shape[1]
        order_N = order_M[:copies]
        place = torch.arange(copies, dtype=torch.int32, device=x_RD.device)
        expert_N = torch.searchsorted(bins_E, place, right=True, out_int32=True)
        x_ND = _gather(x_RD, None, order_M, bins_E, None, copies, K, 0)
        h_NU, u13 = up.forward(x_ND, expert_N)
        del x_ND
        h_NU = halves(h_NU) if turns else h_NU
        y_ND, u2 = down.forward(ops.activation(h_NU, act), expert_N)
        ctx.save_for_backward(x_RD, weights_RK, w13, b13, a13, c13, w2, b2, a2, c2, order_N, order_M, bins_E, expert_N,
                              h_NU, u13, u2)
        return _scatter(y_ND, weights_RK.view(-1), order_M, bins_E, None, K, 0)

    @staticmethod
    def backward(ctx, dy_RD):
        if torch.is_grad_enabled():     # create_graph: what follows would be constants to the next derivative
            raise NotImplementedError("low_rank_expert_mlp has no second derivative. Hint: create_graph=False")
        (x_RD, weights_RK, w13, b13, a13, c13, w2, b2, a2, c2, order_N, order_M, bins_E, expert_N,
         h_NU, u13, u2) = ctx.saved_tensors
        need, K, copies = ctx.needs_input_grad, weights_RK.shape[1], len(h_NU)
        up, down = LowRank(w13, b13, a13, c13, ctx.scale, bins_E), LowRank(w2, b2, a2, c2, ctx.scale, bins_E)

        # y_r = sum_k s_rk down(a): the gradients of a and of the weights s come from dy before s, the rest from s dy.
        below = need[0] or any(need[2:6])
        dx_RD = dweights_RK = None
        dw13 = dw2 = (None,) * 4
        dy_ND = _gather(dy_RD.contiguous(), None, order_M, bins_E, None, copies, K, 0)
        weights_N1 = weights_RK.view(-1).index_select(0, order_N).unsqueeze(1).to(dy_ND.dtype)
        a_NF, du2 = ops.activation(h_NU, ctx.act), down.du(dy_ND)
        if below or need[1]:
            da_NF = down.dx(dy_ND, du2)
        if need[1]:
            dweights_N = (da_NF * a_NF).sum(1, dtype=real(a_NF.dtype))
            if b2 is not None:
                dweights_N += (dy_ND * b2.index_select(0, expert_N)).sum(1, dtype=dweights_N.dtype)
            dweights_RK = torch.zeros_like(weights_RK)
            dweights_RK.view(-1).index_copy_(0, order_N.long(), dweights_N.to(weights_RK.dtype))
        if any(need[6:10]):     # the weights go to the narrower factor of each product
            if need[6]:
                a_NF = a_NF * weights_N1
            elif need[8]:
                du2 *= weights_N1
            u2 = u2 * weights_N1 if need[9] else u2
            dw2 = down.dparameters(a_NF, u2, dy_ND, du2, need[6:10], weights_N1)
        del dy_ND, a_NF

        if below:               # h = up(x), a = act(h)
            da_NF *= weights_N1
            dh_NU = _activation_backward(h_NU, da_NF, number("low_rank_expert_mlp", "act", ctx.act, ACTS))
            dh_NU = in_turn(dh_NU) if ctx.turns else dh_NU
            du13 = up.du(dh_NU)
            if need[0]:
                dx_RD = _scatter(up.dx(dh_NU, du13), None, order_M, bins_E, None, K, 0)
            if any(need[2:6]):
                x_ND = _gather(x_RD, None, order_M, bins_E, None, copies, K, 0)
                dw13 = up.dparameters(x_ND, u13, dh_NU, du13, need[2:6], torch.ones_like(weights_N1))
        return dx_RD, dweights_RK, *dw13, *dw2, *(None,) * 6


def low_rank_expert_mlp(x_RD, w13, w2, weights_RK, index, *, a13=None, c13=None, a2=None, c2=None, b13=None, b2=None,
                        scale, act, in_turns=False, num_copies=None):
    """ops.expert_mlp with low-rank factors: y_r = sum_k s_rk W2'_e act(W13'_e x_r + b13_e) + b2_e, e = ids[r,k],
    with W' = W + scale * c a of each expert, which is never formed.

    x_RD        [R,D]
    w13, w2     [E,U,D] and [E,D,F], any strides; U = 2F, [gate | up], or with in_turns gate and up row by row; or F
    factors     a13 [E,r,D] with c13 [E,U,r], a2 [E,r,F] with c2 [E,D,r], or None; in x's dtype, as w13, w2
    biases      [E,U], [E,D] or None
    weights_RK, index, act, num_copies      as ops.expert_mlp
    -> [R,D]. Differentiable once, in x, weights_RK, factors, matrices and biases; work and memory are for the gradients
    that are wanted. Keeps x, the N*U values before the activation and N*r values for each pair of factors.
    """
    copies = weights_RK.numel() if num_copies is None else num_copies
    turned = [None if t is None else t.transpose(1, 2) for t in (w13, a13, c13, w2, a2, c2)]
    w13, a13, c13, w2, a2, c2 = turned
    return _LowRankExperts.apply(x_RD.contiguous(), weights_RK.contiguous(), w13, b13, a13, c13, w2, b2, a2, c2,
                                 index.order_N, index.bins_E, scale, act, in_turns, copies)


# ---- modules with factors --------------------------------------------------------------------------------------------

def is_factor(name: str) -> bool:
    """Whether a parameter of this name is a low-rank factor."""
    return name.endswith(("lora_A", "lora_B"))


def computed_dtype(x):
    """That of products with x: autocast's, or x's own."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype


class LowRankLinear:
    """What a linear layer becomes: weight [out,in], lora_A [r,in], lora_B [out,r]."""
    @staticmethod
    def pairs_of(_):
        """{matrix: what the names of its factors begin with}."""
        return {"weight": "lora"}

    def forward(self, x):
        u = self.dropped(x) if self.training and self.lora_dropout else x
        u = ops.linear(u, self.lora_A.to(x.dtype)) * self.lora_scale
        return super().forward(x) + ops.linear(u, self.lora_B.to(u.dtype))

    def dropped(self, x):
        if self.lora_draws is None:
            return F.dropout(x, self.lora_dropout)
        place = self.lora_draws.at(self.lora_name + ".lora")
        return ops.dropout(x.flatten(0, -2), self.lora_dropout, **place).view_as(x)

    def factor_shapes(self, _, rank):
        return (rank, self.in_features), (self.out_features, rank)

    def delta(self, _, A, B):
        """B A in the shape of the matrix."""
        return B @ A


class LowRankExperts:
    """What Experts become."""
    @staticmethod
    def pairs_of(_):
        return {"w13_E2FD": "w13_lora", "w2_EDF": "w2_lora"}

    def compute(self, x_RD, weights_RK, index, num_copies):
        dtype = computed_dtype(x_RD)

        def given(name, flat=False):
            p = getattr(self, name, None)
            return None if p is None else (p.flatten(1, 2) if flat else p).to(dtype)

        return low_rank_expert_mlp(
            x_RD.to(dtype), given("w13_E2FD", True), given("w2_EDF"), weights_RK, index,
            a13=given("w13_lora_A"), c13=given("w13_lora_B", True), a2=given("w2_lora_A"), c2=given("w2_lora_B"),
            b13=given("w13_bias", True), b2=given("w2_bias"), scale=self.lora_scale, act=self.act,
            num_copies=num_copies)

    def factor_shapes(self, name, rank):
        E, *out, columns = getattr(self, name).shape
        return (E, rank, columns), (E, *out, rank)

    def delta(self, name, A, B):
        return (B.flatten(1, -2) @ A).view_as(getattr(self, name))


@functools.cache
def with_factors(mixin: type, plain: type) -> type:
    """The class of a module of class `plain` that has factors."""
    return type(f"LoRA{plain.__name__}", (mixin, plain), {
        "mixin": mixin, "plain": plain, "__reduce__": reduced, "__module__": __name__})


def reduced(module):
    """For pickle and copy, which cannot look up a class that was made here."""
    return empty, (module.mixin, module.plain), vars(module)


def empty(mixin: type, plain: type) -> nn.Module:
    """A module with factors of which nothing is set yet."""
    found = with_factors(mixin, plain)
    return found.__new__(found)


def kind(module: nn.Module) -> type | None:
    """How a module can have factors; None if it cannot."""
    return {nn.Linear: LowRankLinear, Linear: LowRankLinear, Experts: LowRankExperts}.get(type(module))


def has_lora(module: nn.Module) -> bool:
    return hasattr(module, "lora_scale")


def candidates(model: nn.Module, kind=kind):
    """-> {name that a target can match: (module's name, module, matrix)}; a linear layer goes by its module's name, a
    matrix of experts by the parameter's."""
    found = {}
    for name, module in model.named_modules():
        mixin = module if has_lora(module) else kind(module)
        for matrix in () if mixin is None else mixin.pairs_of(module):
            found[name if matrix == "weight" else f"{name}.{matrix}".lstrip(".")] = name, module, matrix
    return found


def add_lora(model: nn.Module, rank: int, alpha: float, targets: str, dropout: float = 0.0, *, seed: int = 0,
             kind=kind) -> list[str]:
    """Give low-rank factors to what `targets`, a regular expression, finds (re.search) among the names of linear layers
    (layers.0.self_attn.q_proj) and of the experts' matrices (layers.0.mlp.experts.w13_E2FD). In place; before
    parallelize. -> the factors' names. Freezes nothing.

    dropout: of x before A, in training, for linear layers alone; its random numbers are those of the Draws that the
    module around takes, or torch's. seed: of A, drawn as GPT.init_weights does: a function of seed, name and index; on
    the meta device nothing is drawn.
    Errors: ValueError for a rank or scale that makes no sense, for targets that find nothing, or what has factors or a
    forward of its own already, for dropout on experts.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"add_lora: rank is {rank!r}, wanted an integer from 1 up. Hint: 8")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"add_lora: alpha is {alpha!r}, wanted a number above 0. Hint: 2 * rank")
    if not 0 <= dropout < 1:
        raise ValueError(f"add_lora: dropout is {dropout!r}, wanted 0 <= dropout < 1")
    try:
        pattern = re.compile(targets)
    except (re.error, TypeError) as error:
        raise ValueError(f"add_lora: targets is {targets!r}, wanted a regular expression: {error}") from None
    known = candidates(model, kind)
    chosen = {full: place for full, place in known.items() if pattern.search(full)}
    if not chosen:
        names = sorted({re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", full) for full in known})
        raise ValueError(f"add_lora: targets {targets!r} finds nothing that can have factors. Here these can: "
                         f"{', '.join(names) or 'none'}. A target is searched for in such names (re.search)")
    holders = collections.Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for full, (_, module, matrix) in chosen.items():
        if holders[id(module.get_parameter(matrix))] > 1:
            raise ValueError(f"add_lora: {full} is tied to another layer, whose matrix merge_lora would change too. "
                             "Hint: other targets")
        if has_lora(module):
            raise ValueError(f"add_lora: {full} has LoRA already. Hint: merge_lora(model) first, or other targets")
        if "forward" in vars(module):
            raise ValueError(f"add_lora: {full} is of a module whose forward something has replaced (accelerate's "
                             "device_map, for one), past which its factors would go. Hint: add_lora before that")
        if dropout and matrix != "weight":
            raise ValueError(f"add_lora: dropout is {dropout}, but experts have none, and targets {targets!r} finds "
                             f"{full}. Hint: dropout 0, or targets without experts")
    made = []
    for name, module, matrix in chosen.values():
        if not has_lora(module):
            module.__class__ = with_factors(kind(module), type(module))
            module.lora_scale, module.lora_dropout = alpha / rank, dropout
            module.lora_name, module.lora_draws = name, None
        weight = module.get_parameter(matrix)
        for suffix, shape in zip("AB", module.factor_shapes(matrix, rank), strict=True):
            factor = f"{module.pairs_of(module)[matrix]}_{suffix}"
            module.register_parameter(factor, nn.Parameter(torch.empty(
                shape, dtype=real(weight.dtype), device=weight.device)))
            made.append(f"{name}.{factor}".lstrip("."))
    if dropout:
        for module in model.modules():
            if "draws" in inspect.signature(module.forward).parameters:
                module.register_forward_pre_hook(hand_on_draws, with_kwargs=True)
    if not any(p.is_meta for p in lora_parameters(model).values()):
        init_lora(model, seed, only=made)
    return made


def hand_on_draws(module, args, kwargs):
    """A module that takes Draws says to those inside where this forward's random numbers come from; so does the
    recomputed forward."""
    draws = inspect.signature(module.forward).bind(*args, **kwargs).arguments.get("draws")
    for part in module.modules():
        if has_lora(part):
            part.lora_draws = draws


@torch.no_grad()
def init_lora(model: nn.Module, seed: int, normal_=normal_, only=None) -> None:
    """The factors' initial values: A from N(0, 1/(3 in)), nn.Linear's variance, B zero; of all, or of `only` these."""
    for name, p in lora_parameters(model).items():
        if only is None or name in only:
            if name.endswith("lora_B"):
                p.zero_()
            else:
                normal_(p, (3 * p.shape[-1]) ** -0.5, seed, site(name))


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The factors of a model by name."""
    return {name: p for name, p in model.named_parameters() if is_factor(name)}


def lora_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The factors alone, for a file or for load_state_dict(.., strict=False)."""
    return {name: p.detach() for name, p in lora_parameters(model).items()}


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """W += (alpha/r) B A, added in float32 (float64 for float64) and rounded once; the factors are gone, the model and
    its state dict are plain. Errors: ValueError for a model without factors, or one whose parameters are sharded."""
    modules = [module for module in model.modules() if has_lora(module)]
    if not modules:
        raise ValueError("merge_lora: the model has no LoRA. Hint: add_lora(model, rank, alpha, targets)")
    sharded = [name for name, p in model.named_parameters() if hasattr(p, "placements")]
    if sharded:
        raise ValueError(f"merge_lora: {sharded[0]} is sharded over ranks. Hint: load the checkpoint in one process, "
                         "into a model with the same add_lora, and merge there")
    for module in modules:
        for matrix, pair in module.pairs_of(module).items():
            if hasattr(module, f"{pair}_A"):
                A, B = (module.get_parameter(f"{pair}_{suffix}") for suffix in "AB")
                weight = module.get_parameter(matrix)
                weight.copy_(weight + module.delta(matrix, A, B).mul_(module.lora_scale))
                delattr(module, f"{pair}_A")
                delattr(module, f"{pair}_B")
        del module.lora_scale, module.lora_dropout, module.lora_name, module.lora_draws
        module.__class__ = module.plain
