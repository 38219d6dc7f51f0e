"""The MoE layer of the GPT: router -> (exchange) -> fused expert MLP -> (exchange).

    logits_TE = x_TD Wr^T + br             in fp32 (fp64 for fp64); jitter on x before, learned noise after
    weights_TK, ids_TK = router(logits)    of the best groups, if there are any (within_groups); ids become -1 where
                                           capacity drops a copy
    y_t = sum_k weights_tk * down_e(act(gate_e x_t) * up_e x_t) + shared(x_t)        with e = ids_tk
                                           shared(x_t) times sigmoid(x_t ws^T) if it has a gate

Shapes as in reference.py; B sequences of S tokens, T = B*S. Parameters, in the memory order of Hugging Face's fused
layout: gate.weight [E,D], gate.bias [E] (if it has one), noise_E, experts.w13_E2FD [E,2,F,D] = gate, up ([E,1,F,D] if
`act` has no gate), experts.w2_EDF; with biases experts.w13_bias [E,2,F], experts.w2_bias [E,D]; shared.*_proj,
shared_gate.weight [1,D]. Buffer: select_bias_E.

The layer keeps nothing between calls: losses and counts are returned, so a recomputed forward cannot count twice, and
with Draws every random number is a function of (seed, step, name, global token), so it routes as the first did. Without
them torch's generator gives the numbers. Capacity, noise, jitter and forced balance act in training only: evaluation
and generation are dropless.

A layer that is given `ids` (router replay) takes each token's experts from them; weights, losses, capacity and every
gradient are as if its router had chosen them. A token without any, -1 in all places, chooses for itself.

A token that `token_mask` calls unreal, a pad, has no experts: its ids are -1, it fills no place and enters no count and
no mean. Real tokens get what they get without pads, but for random numbers, which go by place.
"""
from __future__ import annotations

import functools
import math
import zlib
from typing import NamedTuple, Protocol

import torch
from torch import nn

from moe_ext import ops
from moe_ext.layers.common import finite
from moe_ext.ops.define import real
from moe_ext.ops.enums import ACTS, BALANCES, GATED, SCORES


def site(name: str) -> int:
    """The random generator's key of a place in the model: 32 bits of its name, the same in every process."""
    return zlib.crc32(name.encode())


def normal_(parameter, std, seed, place):
    """Fills a whole parameter [.., n] with N(0, std), drawn by row and column of its [rows, n] view."""
    rows = parameter.view(-1, parameter.shape[-1])
    rows.copy_(ops.random_normal(*rows.shape, seed=seed, step=0, site=place, std=std, dtype=rows.dtype,
                                 device=rows.device))


class Draws(NamedTuple):
    """Where a forward's random numbers come from: the same on every mesh and in every recomputation."""
    seed: int
    step: int       # optimizer step
    row0: int = 0   # index of the first token among all tokens of the step
    run: int = 0    # sequence parallelism: rows come in runs of so many consecutive tokens, 0: all of them,
    stride: int = 0 # of which each begins so many tokens after the last

    def at(self, name: str) -> dict:
        """Arguments of the random ops for the place `name`."""
        return dict(seed=self.seed, step=self.step, site=site(name), row0=self.row0, run=self.run, stride=self.stride)


def norm_power(norm_p, top_k):
    """What "auto" stands for: 1, but no norm (0) at top-1, where it would make the one weight 1."""
    return float(top_k > 1) if norm_p == "auto" else norm_p


def jitter(x_TD, eps, place: dict | None):
    """x * U[1-eps, 1+eps) at a place of Draws; without one by torch's generator."""
    if place is None:
        return x_TD * torch.empty_like(x_TD).uniform_(1 - eps, 1 + eps)
    return ops.jitter(x_TD, eps, **place)


def noisy(logits_TE, scale_E, place: dict | None):
    """logits + scale * N(0,1) at a place of Draws; without one by torch's generator."""
    if place is None:
        return logits_TE + scale_E * torch.randn_like(logits_TE)
    return ops.noisy(logits_TE, scale_E, **place)


def check_mask(owner, token_mask, like):
    """ValueError unless token_mask is bool, with the shape and on the device of `like`."""
    if (token_mask.dtype, token_mask.shape, token_mask.device) != (torch.bool, like.shape, like.device):
        raise ValueError(f"{owner}: token_mask is {token_mask.dtype} {list(token_mask.shape)} on {token_mask.device}, "
                         f"wanted torch.bool {list(like.shape)} on {like.device}, True for a real token. Hint: "
                         "attention_mask.bool()")


def within_groups(logits_TE, k, groups, top_groups, *, score, select_bias_E=None):
    """-> ids_TK, int32: the K best experts of the `top_groups` best groups, by scores + select_bias, of a group the sum
    of its two largest (DeepSeek-V3). The lowest id wins a tie."""
    def largest(x, k):
        return ops.router(x, k, score="topk_softmax")[1]

    scores_TE = logits_TE.sigmoid() if score == "sigmoid" else logits_TE.softmax(-1)
    scores_TE = scores_TE if select_bias_E is None else scores_TE + select_bias_E
    scores_TGe = scores_TE.unflatten(1, (groups, -1))
    first_TG1, at_TG1 = scores_TGe.max(-1, keepdim=True)        # and the second: torch's topk takes four times as long
    best_TG = first_TG1[..., 0] + scores_TGe.scatter(-1, at_TG1, -math.inf).amax(-1)
    mask_TG = torch.full_like(best_TG, -math.inf).scatter(1, largest(best_TG, top_groups).long(), 0)
    return largest((scores_TGe + mask_TG[..., None]).flatten(1), k)


class Routing(NamedTuple):
    """What a forward in training says beside its output. Made while gradients are off, as in the first forward of
    torch.utils.checkpoint(use_reentrant=True), `loss` cannot be differentiated, and its backward says so: read it there
    by .item() or .detach(). What was computed from it while gradients are off, or compiled code gave, cannot say so."""
    loss: torch.Tensor      # balance_weight * balance loss + z_weight * z-loss, a scalar of the router's dtype
    counts_E: torch.Tensor  # int32, copies that chose each expert, the dropped ones included
    dropped: torch.Tensor   # int32 scalar, copies that capacity dropped
    bad: torch.Tensor       # int32 scalar, tokens whose logits are not finite: their outputs are NaN
    balance: torch.Tensor   # the balance loss without its weight and without a gradient; 0 if the weight is 0
    ids: torch.Tensor       # int32, x's shape with K for D: the experts of each token before capacity, -1 for a pad


class _Gradless(torch.autograd.Function):
    """The identity for a loss made while gradients were off, of which a backward would silently leave nothing."""
    @staticmethod
    def forward(ctx, loss, leaf, name):
        ctx.name = name
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, dloss):
        raise RuntimeError(
            f"FusedMoE: Routing.loss of {ctx.name} was made while gradients were off, so this backward would not reach "
            "the router. Under torch.utils.checkpoint set use_reentrant=False, or return y and routing.loss, not the "
            "Routing; elsewhere call the layer without torch.no_grad(), or detach the loss")


def gradless(loss, name):
    """The loss, made while gradients are off. Compiled code and inference mode have no backward to speak up in."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return loss
    with torch.enable_grad():
        return _Gradless.apply(loss, torch.empty(0, requires_grad=True), name)


class Exchange(Protocol):
    """Moves tokens to the ranks that own their experts and back; see the layer's `exchange`."""
    def dispatch(self, x_TD, weights_TK, ids_TK):
        """-> x_RD, weights_RK, ids_RK (local, -1 where the expert lives elsewhere), number of ids_RK >= 0, plan."""
    def combine(self, y_RD, plan):
        """-> y_TD, the sum of each token's rows."""


class Peers(Protocol):
    """The ranks that hold the other tokens of a scope, as many each; see the layer's `peers`."""
    ranks: int
    def sum(self, x):
        """The sum of all ranks' x, on each of them."""
    def gather(self, x_BSn):
        """-> the tokens of all ranks, in the order in which one process would hold them."""
    def own(self, x_BSn):
        """The part of gather's result that this rank gave."""


class Linear(nn.Linear):
    """x W^T + b by the better product of x's device."""
    def forward(self, x):
        return ops.linear(x, self.weight, self.bias)


class MLP(nn.Module):
    """The dense MLP act(gate x) * up x -> down, or act(up x) -> down without a gate. x [..., D] -> [..., D]."""
    def __init__(self, dim, hidden, *, act="swiglu", bias=False, dtype=None, device=None):
        super().__init__()
        options = dict(bias=bias, dtype=dtype, device=device)
        self.act = act
        self.gate_proj = Linear(dim, hidden, **options) if act in GATED else None
        self.up_proj = Linear(dim, hidden, **options)
        self.down_proj = Linear(hidden, dim, **options)

    def forward(self, x):
        h = self.up_proj(x) if self.gate_proj is None else torch.cat([self.gate_proj(x), self.up_proj(x)], dim=-1)
        return self.down_proj(ops.activation(h.flatten(0, -2), self.act).unflatten(0, h.shape[:-1]))


class Gate(nn.Linear):
    """x_TD -> logits_TE in fp32, fp64 for fp64 parameters, whatever the dtype of x."""
    def forward(self, x_TD):
        if x_TD.device != self.weight.device:
            raise ValueError(f"FusedMoE: x is on {x_TD.device}, the parameters on {self.weight.device}. Hint: "
                             f"x.to(\"{self.weight.device}\")")
        dtype = real(self.weight.dtype)
        return ops.router_logits(x_TD, self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


class Experts(nn.Module):
    """The experts that live in this process: rows x_RD with the ids and weights of their K choices (-1: elsewhere) ->
    y_RD, each row's experts weighted and summed. num_copies: how many ids are >= 0; None: all of them."""
    def __init__(self, num_experts, dim, hidden, *, act, bias, dtype=None, device=None):
        super().__init__()

        def parameter(*shape):
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

        E, D, F, halves = num_experts, dim, hidden, 2 if act in GATED else 1
        self.act = act
        self.w13_E2FD = parameter(E, halves, F, D)
        self.w2_EDF = parameter(E, D, F)
        self.w13_bias = parameter(E, halves, F) if bias else None
        self.w2_bias = parameter(E, D) if bias else None

    def reset_parameters(self):
        """Matrices from U(-1/sqrt(in), 1/sqrt(in)) as in nn.Linear, biases zero."""
        for p in (self.w13_E2FD, self.w2_EDF):
            nn.init.uniform_(p, -p.shape[-1] ** -0.5, p.shape[-1] ** -0.5)
        for p in (self.w13_bias, self.w2_bias):
            if p is not None:
                nn.init.zeros_(p)

    def forward(self, x_RD, weights_RK, ids_RK, num_copies=None):
        if x_RD.dtype != self.w2_EDF.dtype and not torch.is_autocast_enabled(x_RD.device.type):
            raise ValueError(f"FusedMoE: x has dtype {x_RD.dtype}, the experts {self.w2_EDF.dtype}. Hint: "
                             f"x.to({self.w2_EDF.dtype}), layer.to({x_RD.dtype}) or torch.autocast")
        return self.compute(x_RD, weights_RK, ops.route_index(ids_RK, self.w2_EDF.shape[0]), num_copies)

    def compute(self, x_RD, weights_RK, index, num_copies):
        w13_bias = None if self.w13_bias is None else self.w13_bias.flatten(1, 2)
        return ops.expert_mlp(x_RD, self.w13_E2FD.flatten(1, 2), None, self.w2_EDF, weights_RK, index, act=self.act,
                              gate_bias=w13_bias, down_bias=self.w2_bias, num_copies=num_copies)


def keep_select_bias(layer: FusedMoE, _):
    """After load_state_dict(assign=True), which takes dtypes over."""
    layer.keep(layer.select_bias_E)


class FusedMoE(nn.Module):
    """x_BSD -> y_BSD, Routing: x is [B,S,D], [S,D] (one sequence) or [..,S,D], y has its shape.

    `name` is the layer's place in the model: it keys its random numbers. `bias` gives the experts biases,
    `router_bias` the logits one, `select_bias` a selection bias that `update_select_bias` moves; the rest is as in
    config.MoEConfig. `exchange` stands between router and experts when these live on several ranks: then `experts`
    holds this rank's. `peers` are the ranks that share this one's scopes (balance loss, capacity) when those reach
    beyond it: all of them give a token_mask, or none does.
    dtype: of the parameters, which follow .to() like any; the router computes in fp32 (fp64 for fp64), whatever they
    and autocast say, from x as it is given. The selection bias, which moves by steps below bf16's rounding, stays in
    that dtype whatever the module becomes (an op reads it in fp32).
    ValueError for options that leave the router without a gradient from the layer's output: with top_k 1 a norm or
    "topk_softmax" makes every weight 1.
    """
    def __init__(self, dim, hidden, num_experts, top_k, *, name="moe", act="swiglu", bias=False,
                 score="softmax_topk", norm_p="auto", scale=1.0, select_bias=False, groups=1, top_groups=1,
                 router_bias=False, noise=False, jitter=0.0, balanced=False, shared_hidden=0, shared_gate=False,
                 capacity_factor=0.0, drop_by="position", scope="sequence", balance_form="switch", balance_weight=0.0,
                 z_weight=0.0, exchange=None, dtype=None, device=None):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"FusedMoE: top_k is {top_k}, wanted 1 to num_experts = {num_experts}")
        size = num_experts // max(1, groups)
        if groups < 1 or num_experts % groups or (groups > 1 and size < 2):
            raise ValueError(f"FusedMoE: groups is {groups}, wanted 1, or a divisor of num_experts = {num_experts} "
                             "that leaves each at least 2")
        if not 1 <= top_groups <= groups or top_k > top_groups * size:
            raise ValueError(f"FusedMoE: top_groups is {top_groups}, wanted 1 to groups = {groups}, and enough of "
                             f"their {size} experts for top_k = {top_k}")
        if groups > 1 and (score == "topk_softmax" or balanced):
            raise ValueError(f"FusedMoE: groups are chosen by scores, not with {'balanced' if balanced else score}: "
                             "leave one of them out")
        if shared_gate and not shared_hidden:
            raise ValueError("FusedMoE: shared_gate is the gate of a shared expert, but shared_hidden is 0")
        norm_p = norm_power(norm_p, top_k)
        if top_k == 1 and (norm_p or score == "topk_softmax"):
            asked = 'score "topk_softmax"' if score == "topk_softmax" else f"norm_p {norm_p}"
            raise ValueError(f"FusedMoE: with top_k 1, {asked} makes every weight 1, so the router gets no gradient. "
                             'Hint: score "softmax_topk" or "sigmoid" with norm_p 0')
        if scale == 0:
            raise ValueError("FusedMoE: scale is 0, so router and experts get no gradient. Hint: scale 1")
        choices = dict(act=(act, ACTS), score=(score, SCORES), drop_by=(drop_by, ("position", "probability")),
                       scope=(scope, ("sequence", "micro_batch")), balance_form=(balance_form, BALANCES))
        for option, (got, known) in choices.items():
            if got not in known:
                raise ValueError(f"FusedMoE: {option} is {got!r}, wanted one of {', '.join(known)}")
        if select_bias and (score == "topk_softmax" or balanced):
            raise ValueError(f"FusedMoE: select_bias would change nothing with {'balanced' if balanced else score}: "
                             "leave one of them out")
        if capacity_factor < 0 or not 0 <= jitter < 1:
            raise ValueError(f"FusedMoE: got capacity_factor {capacity_factor} and jitter {jitter}, wanted >= 0 (0: "
                             "dropless) and [0, 1)")
        self.num_experts, self.top_k, self.name, self.act = num_experts, top_k, name, act
        self.groups, self.top_groups = groups, top_groups
        self.score, self.norm_p, self.scale, self.balanced = score, norm_p or None, scale, balanced
        self.jitter, self.capacity_factor, self.drop_by, self.scope = jitter, capacity_factor, drop_by, scope
        self.balance_form, self.balance_weight, self.z_weight = balance_form, balance_weight, z_weight
        self.exchange, self.peers = exchange, None

        options = dict(dtype=dtype, device=device)
        self.gate = Gate(dim, num_experts, bias=router_bias, **options)
        self.noise_E = nn.Parameter(torch.empty(num_experts, **options)) if noise else None
        self.experts = Experts(num_experts, dim, hidden, act=act, bias=bias, **options)
        self.shared = MLP(dim, shared_hidden, act=act, bias=bias, **options) if shared_hidden else None
        self.shared_gate = Linear(dim, 1, bias=False, **options) if shared_gate else None
        self.register_buffer("select_bias_E", torch.zeros(num_experts, dtype=self.real, device=device)
                             if select_bias else None)
        self.register_load_state_dict_post_hook(keep_select_bias)
        self.reset_parameters()

    @property
    def real(self):
        """The dtype of the router: fp64 for fp64, else fp32."""
        return real(self.gate.weight.dtype)

    def reset_parameters(self):
        """All anew: matrices as in nn.Linear; biases, noise and selection bias zero. The GPT draws its own."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for zero in (self.gate.bias, self.noise_E, self.select_bias_E):
            if zero is not None:
                nn.init.zeros_(zero)

    def keep(self, bias_E):
        """The selection bias, with these values, in the router's dtype."""
        if bias_E is not None and self.select_bias_E.dtype != self.real:
            self.select_bias_E = bias_E.to(self.select_bias_E.device, self.real)

    def _apply(self, fn, recurse=True):
        bias_E = self.select_bias_E
        super()._apply(fn, recurse)
        self.keep(bias_E)       # from before fn, which may have rounded it
        return self

    def forward(self, x, draws: Draws | None = None, token_mask=None, ids=None):
        """draws: of noise and jitter, None: torch's generator. token_mask: bool, x's shape without D, True for a real
        token. The losses are then means over the scopes that have one, among those of this rank. A mask costs a host
        read, as capacity does: of the number of copies. ids: int32, as Routing.ids; in [0, E), a token's distinct."""
        D = self.gate.in_features
        if x.ndim < 2 or x.shape[-1] != D or not x.is_floating_point():
            raise ValueError(f"FusedMoE: x is {x.dtype} {list(x.shape)}, wanted floating point, [S, {D}] or "
                             f"[.., S, {D}]")
        x_BSD, mask_BS = x.flatten(0, -3) if x.ndim > 2 else x[None], None
        if token_mask is not None:
            check_mask("FusedMoE", token_mask, x[..., 0])
            mask_BS = token_mask.contiguous().view(x_BSD.shape[:2])
            x_BSD = x_BSD.masked_fill(~mask_BS[..., None], 0)       # NaN in a pad would reach the gradients
            if self.balanced and self.training:
                raise ValueError("FusedMoE: balanced deals experts out by place and would count pads: leave out "
                                 "token_mask or balanced")
        if ids is not None and (ids.dtype, ids.shape) != (torch.int32, (*x.shape[:-1], self.top_k)):
            raise ValueError(f"FusedMoE: ids are {ids.dtype} {list(ids.shape)}, wanted torch.int32 "
                             f"{[*x.shape[:-1], self.top_k]}, as Routing.ids are")
        with torch.autocast(x.device.type, enabled=False):
            weights_TK, ids_TK, routing = self.route(x_BSD, draws, mask_BS, ids)
        # not by _replace, which torch.compile of 2.11 does not know
        routing = Routing(*routing[:-1], routing.ids.view(*x.shape[:-1], self.top_k))
        x_TD = x_BSD.flatten(0, 1)
        if self.exchange is None:
            absent = mask_BS is not None or ids is not None or (self.training and self.capacity_factor)
            num_copies = (ids_TK >= 0).sum().item() if absent else None
            y_TD = self.experts(x_TD, weights_TK, ids_TK, num_copies)
        else:
            x_RD, weights_RK, ids_RK, num_copies, plan = self.exchange.dispatch(x_TD, weights_TK, ids_TK)
            y_TD = self.exchange.combine(self.experts(x_RD, weights_RK, ids_RK, num_copies), plan)
        if self.shared is not None:
            shared_TD = self.shared(x_TD)
            if self.shared_gate is not None:
                shared_TD = self.shared_gate(x_TD).sigmoid() * shared_TD
            y_TD = y_TD + shared_TD
        return y_TD.view(x.shape), routing

    def route(self, x_BSD, draws, mask_BS, forced=None):
        """-> weights_TK, ids_TK (-1 where dropped or not real), Routing."""
        B, S, _ = x_BSD.shape
        x_TD = x_BSD.flatten(0, 1)
        if (self.jitter and self.training) or not isinstance(self.gate, Gate):      # or what stands for one
            x_TD = x_TD.to(self.real)
        if self.jitter and self.training:
            x_TD = jitter(x_TD, self.jitter, draws and draws.at(self.name + ".jitter"))
        logits_TE = self.gate(x_TD)
        if self.noise_E is not None and self.training:
            logits_TE = noisy(logits_TE, self.noise_E.to(self.real), draws and draws.at(self.name + ".noise"))
        logits_TE, bad_T1 = finite(logits_TE)
        select_bias_E = None if self.select_bias_E is None else self.select_bias_E.float()
        chosen_TK = None if self.groups == 1 else within_groups(
            logits_TE.detach(), self.top_k, self.groups, self.top_groups, score=self.score, select_bias_E=select_bias_E)
        router = functools.partial(ops.router, logits_TE, self.top_k, score=self.score, select_bias_E=select_bias_E,
                                   norm_p=self.norm_p, scale=self.scale)
        weights_TK, ids_TK, scores_TE = router(ids_TK=chosen_TK, balanced=self.balanced and self.training)
        if forced is not None:
            forced_TK = forced.reshape(-1, self.top_k)
            ids_TK = torch.where((forced_TK == -1).all(1, keepdim=True), ids_TK, forced_TK)
            weights_TK, ids_TK, scores_TE = router(ids_TK=ids_TK)
        weights_TK = weights_TK.masked_fill(bad_T1, math.nan)
        if mask_BS is not None:
            ids_TK = ids_TK.masked_fill(~mask_BS.view(-1, 1), -1)
        counts_GE = ops.balance_counts(ids_TK, self.num_experts, S if self.scope == "sequence" else None)
        loss, kept_TK, dropped = logits_TE.new_zeros(()), ids_TK, ids_TK.new_zeros(())
        balance = loss
        if self.training:
            plain = mask_BS is None and self.peers is None and not self.capacity_factor
            tokens_G = None if plain else self.tokens(x_BSD, mask_BS, counts_GE.shape[0])
            if self.balance_weight:
                balance = self.balance_loss(scores_TE, counts_GE, mask_BS, tokens_G)
                loss = loss + self.balance_weight * balance
            if self.z_weight:
                loss = loss + self.z_weight * self.z_loss(logits_TE, mask_BS, tokens_G)
            if self.capacity_factor:
                kept_TK = self.drop(ids_TK.view(B, S, self.top_k), scores_TE.detach(), tokens_G)
                dropped = (kept_TK != ids_TK).sum(dtype=torch.int32)
            if (self.balance_weight or self.z_weight) and not torch.is_grad_enabled():
                loss = gradless(loss, self.name)
        return weights_TK, kept_TK, Routing(loss, counts_GE.sum(0, dtype=torch.int32), dropped,
                                            bad_T1.sum(dtype=torch.int32), balance.detach(), ids_TK)

    def tokens(self, x_BSD, mask_BS, scopes):
        """int64 [G]: the real tokens of each scope, on all ranks."""
        B, S, _ = x_BSD.shape
        rows = S if self.scope == "sequence" else B * S
        if mask_BS is None:
            return torch.full((scopes,), rows * (1 if self.peers is None else self.peers.ranks), device=x_BSD.device)
        tokens_G = mask_BS.view(scopes, rows).sum(1)
        return tokens_G if self.peers is None else self.peers.sum(tokens_G)

    def mean(self, x_Tn, mask_BS, tokens_G):
        """-> [G,n], the mean over each scope's real tokens on all ranks, 0 if it has none; and how many scopes do have
        some."""
        G = tokens_G.shape[0]
        if mask_BS is not None:
            x_Tn = x_Tn * mask_BS.view(-1, 1)
        sum_Gn = x_Tn.view(G, x_Tn.shape[0] // max(G, 1), x_Tn.shape[1]).sum(1)
        sum_Gn = sum_Gn if self.peers is None else self.peers.sum(sum_Gn)
        return sum_Gn / tokens_G[:, None].clamp(min=1), (tokens_G > 0).sum().clamp(min=1)

    def balance_loss(self, scores_TE, counts_GE, mask_BS, tokens_G):
        if self.score == "sigmoid":     # affinities become a distribution first (DeepSeek-V3, eq. 19)
            scores_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=torch.finfo(scores_TE.dtype).tiny)
        if mask_BS is None and self.peers is None:
            return ops.balance_loss(scores_TE, counts_GE, self.top_k, form=self.balance_form)
        # The mean over all of a scope's tokens stands for them: one row per scope, so "switch" divides by 1, not by S.
        (mean_GE, scopes), (G, E) = self.mean(scores_TE, mask_BS, tokens_G), counts_GE.shape
        if self.balance_form == "switch":
            mean_GE = mean_GE / tokens_G[:, None].clamp(min=1)
        else:
            mean_GE = torch.where(tokens_G[:, None] > 0, mean_GE, 1 / E)       # no tokens are balanced
        counts_GE = counts_GE if self.peers is None else self.peers.sum(counts_GE)
        return ops.balance_loss(mean_GE, counts_GE, self.top_k, form=self.balance_form) * G / scopes

    def z_loss(self, logits_TE, mask_BS, tokens_G):
        if mask_BS is None:
            return ops.z_loss(logits_TE)
        mean_G1, scopes = self.mean(logits_TE.logsumexp(-1, keepdim=True).square(), mask_BS, tokens_G)
        return mean_G1.sum() / scopes

    def drop(self, ids_BSK, scores_TE, tokens_G):
        """-> kept_TK: in each scope an expert keeps ceil(factor * K * tokens / E) copies, the first or those of largest
        score."""
        priority_BSK = None
        if self.drop_by == "probability":
            priority_BSK = scores_TE.gather(1, ids_BSK.flatten(0, 1).clamp(min=0).long()).view_as(ids_BSK)
        if self.peers is not None:
            ids_BSK = self.peers.gather(ids_BSK)
            priority_BSK = None if priority_BSK is None else self.peers.gather(priority_BSK)
        B, S, K = ids_BSK.shape
        capacity_G = (self.capacity_factor * K * tokens_G.double() / self.num_experts).ceil().clamp(max=2**31 - 1)
        kept_TK = ops.capacity_drop(
            ids_BSK.view(-1, K), self.num_experts, capacity_G.int(),
            rows_per_scope=S if self.scope == "sequence" else B * S,
            priority_TK=None if priority_BSK is None else priority_BSK.view(-1, K))
        return kept_TK if self.peers is None else self.peers.own(kept_TK.view(B, S, K)).flatten(0, 1)

    @torch.no_grad()
    def update_select_bias(self, counts_E, rate):
        """One step towards balance. counts_E: int32 or int64 [E], copies per expert over the whole optimizer step, on
        all ranks."""
        if self.select_bias_E is None:
            raise ValueError("FusedMoE: there is no selection bias to move. Hint: select_bias=True")
        self.keep(self.select_bias_E)       # a wrapper may have set its data
        sign_E = ops.select_bias_update(torch.zeros_like(self.select_bias_E, dtype=torch.float32), counts_E.long(), 1.0)
        self.select_bias_E.add_(sign_E, alpha=rate)
