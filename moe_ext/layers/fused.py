"""The MoE layer of the GPT: router -> (exchange) -> fused expert MLP -> (exchange).

    logits_TE = x_TD Wr^T                  in fp32 (fp64 for fp64); jitter on x before, learned noise after
    weights_TK, ids_TK = router(logits)    ids become -1 where capacity drops a copy
    y_t = sum_k weights_tk * down_e(act(gate_e x_t) * up_e x_t) + shared(x_t)        with e = ids_tk

Shapes as in reference.py; B sequences of S tokens, T = B*S. Parameters, in Hugging Face's fused layout: gate.weight
[E,D], w13_E2FD = [gate | up] ([E,F,D] if `act` has no gate), w2_EDF; with biases w13_bias [E,2F], w2_bias [E,D];
noise_E; shared.*_proj. Buffer: select_bias_E.

The layer keeps nothing between calls: losses and counts are returned, so a recomputed forward cannot count twice, and
every random number is a function of (seed, step, name, global token), so it routes as the first did. Capacity, noise,
jitter and forced balance act in training only: evaluation and generation are dropless.
"""
from __future__ import annotations

import math
import zlib
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from moe_ext import ops
from moe_ext.ops.expert import GATED


def site(name: str) -> int:
    """The random generator's key of a place in the model: 32 bits of its name, the same in every process."""
    return zlib.crc32(name.encode())


class Draws(NamedTuple):
    """Where a forward's random numbers come from: the same on every mesh and in every recomputation."""
    seed: int
    step: int       # optimizer step
    row0: int = 0   # index of the first token among all tokens of the step

    def at(self, name: str) -> dict:
        """Arguments of the random ops for the place `name`."""
        return dict(seed=self.seed, step=self.step, site=site(name), row0=self.row0)


class Routing(NamedTuple):
    """What a forward in training says beside its output."""
    loss: torch.Tensor      # balance_weight * balance loss + z_weight * z-loss, a scalar of the router's dtype
    counts_E: torch.Tensor  # int32, copies that chose each expert, the dropped ones included
    dropped: torch.Tensor   # int32 scalar, copies that capacity dropped


class Exchange(Protocol):
    """Moves tokens to the ranks that own their experts and back; see the layer's `exchange`."""
    def dispatch(self, x_TD, weights_TK, ids_TK):
        """-> x_RD, weights_RK, ids_RK (local, -1 where the expert lives elsewhere), number of ids_RK >= 0, plan."""
    def combine(self, y_RD, plan):
        """-> y_TD, the sum of each token's rows."""


class MLP(nn.Module):
    """The dense MLP act(gate x) * up x -> down, or act(up x) -> down without a gate. x [..., D] -> [..., D]."""
    def __init__(self, dim, hidden, *, act="swiglu", bias=False, dtype=None, device=None):
        super().__init__()
        options = dict(bias=bias, dtype=dtype, device=device)
        self.act = act
        self.gate_proj = nn.Linear(dim, hidden, **options) if act in GATED else None
        self.up_proj = nn.Linear(dim, hidden, **options)
        self.down_proj = nn.Linear(hidden, dim, **options)

    def forward(self, x):
        h = self.up_proj(x) if self.gate_proj is None else torch.cat([self.gate_proj(x), self.up_proj(x)], dim=-1)
        return self.down_proj(ops.activation(h.flatten(0, -2), self.act).view(*h.shape[:-1], -1))


class FusedMoE(nn.Module):
    """x_BSD -> y_BSD, Routing.

    `name` is the layer's place in the model: it keys its random numbers. `bias` gives the experts biases,
    `select_bias` a selection bias that `update_select_bias` moves; the rest is as in config.MoEConfig. `exchange`
    stands between router and experts when these live on several ranks: then w13 and w2 hold this rank's experts.
    dtype: of the parameters; the router computes in fp32 (fp64 for fp64), whatever autocast says.
    """
    def __init__(self, dim, hidden, num_experts, top_k, *, name="moe", act="swiglu", bias=False,
                 score="softmax_topk", norm_p=1.0, scale=1.0, select_bias=False, noise=False, jitter=0.0,
                 balanced=False, shared_hidden=0, capacity_factor=0.0, drop_by="position", scope="sequence",
                 balance_form="switch", balance_weight=0.0, z_weight=0.0, exchange=None, dtype=None, device=None):
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"FusedMoE: top_k is {top_k}, wanted 1 to num_experts = {num_experts}")
        self.num_experts, self.top_k, self.name, self.act = num_experts, top_k, name, act
        self.score, self.norm_p, self.scale, self.balanced = score, norm_p or None, scale, balanced
        self.jitter, self.capacity_factor, self.drop_by, self.scope = jitter, capacity_factor, drop_by, scope
        self.balance_form, self.balance_weight, self.z_weight = balance_form, balance_weight, z_weight
        self.exchange = exchange

        def parameter(*shape):
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

        E, D, U = num_experts, dim, hidden * (2 if act in GATED else 1)
        self.gate = nn.Linear(D, E, bias=False, dtype=dtype, device=device)
        self.w13_E2FD = parameter(E, U, D)
        self.w2_EDF = parameter(E, D, hidden)
        self.w13_bias = parameter(E, U) if bias else None
        self.w2_bias = parameter(E, D) if bias else None
        self.noise_E = parameter(E) if noise else None
        self.shared = MLP(D, shared_hidden, act=act, bias=bias, dtype=dtype, device=device) if shared_hidden else None
        self.register_buffer("select_bias_E", torch.zeros(E, device=device) if select_bias else None)
        self.reset_parameters()

    def reset_parameters(self):
        """Matrices from U(-1/sqrt(in), 1/sqrt(in)) as in nn.Linear, biases and noise zero. The GPT draws its own."""
        for p in (self.w13_E2FD, self.w2_EDF):
            nn.init.uniform_(p, -p.shape[2] ** -0.5, p.shape[2] ** -0.5)
        for p in (self.w13_bias, self.w2_bias, self.noise_E):
            if p is not None:
                nn.init.zeros_(p)

    def forward(self, x_BSD, draws: Draws | None = None):
        B, S, D = x_BSD.shape
        x_TD = x_BSD.reshape(B * S, D)
        rows_per_scope = S if self.scope == "sequence" else None
        with torch.autocast(x_TD.device.type, enabled=False):
            weights_TK, ids_TK, routing = self.route(x_TD, rows_per_scope, draws)
        y_TD = self.experts(x_TD, weights_TK, ids_TK)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.view(B, S, D), routing

    def route(self, x_TD, rows_per_scope, draws):
        """-> weights_TK, ids_TK (-1 where dropped), Routing. rows_per_scope: tokens of one scope, None: all."""
        real = torch.promote_types(self.gate.weight.dtype, torch.float32)
        x_TD = x_TD.to(real)
        random = self.training and draws is not None
        if self.jitter and random:
            x_TD = ops.jitter(x_TD, self.jitter, **draws.at(self.name + ".jitter"))
        logits_TE = F.linear(x_TD, self.gate.weight.to(real))
        if self.noise_E is not None and random:
            logits_TE = ops.noisy(logits_TE, self.noise_E.to(real), **draws.at(self.name + ".noise"))
        weights_TK, ids_TK, scores_TE = ops.router(
            logits_TE, self.top_k, score=self.score, select_bias_E=self.select_bias_E,
            norm_p=self.norm_p, scale=self.scale, balanced=self.balanced and self.training)
        counts_GE = ops.balance_counts(ids_TK, self.num_experts, rows_per_scope)
        loss, kept_TK, dropped = logits_TE.new_zeros(()), ids_TK, ids_TK.new_zeros(())
        if self.training:
            if self.balance_weight:
                if self.score == "sigmoid":     # affinities become a distribution first (DeepSeek-V3, eq. 19)
                    scores_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
                balance = ops.balance_loss(scores_TE, counts_GE, self.top_k, form=self.balance_form)
                loss = loss + self.balance_weight * balance
            if self.z_weight:
                loss = loss + self.z_weight * ops.z_loss(logits_TE)
            if self.capacity_factor:
                kept_TK = self.drop(ids_TK, scores_TE.detach(), rows_per_scope)
                dropped = (kept_TK < 0).sum(dtype=torch.int32)
        return weights_TK, kept_TK, Routing(loss, counts_GE.sum(0, dtype=torch.int32), dropped)

    def drop(self, ids_TK, scores_TE, rows_per_scope):
        """In each scope an expert keeps ceil(factor * K * tokens / E) copies: the first, or those of largest score."""
        tokens = rows_per_scope or len(ids_TK)
        capacity = math.ceil(self.capacity_factor * self.top_k * tokens / self.num_experts)
        priority_TK = scores_TE.gather(1, ids_TK.long()) if self.drop_by == "probability" else None
        return ops.capacity_drop(ids_TK, self.num_experts, capacity, rows_per_scope=rows_per_scope,
                                 priority_TK=priority_TK)

    def experts(self, x_TD, weights_TK, ids_TK):
        """The weighted sum of each token's experts, here or wherever the exchange finds them."""
        num_copies = None
        if self.exchange is not None:
            x_TD, weights_TK, ids_TK, num_copies, plan = self.exchange.dispatch(x_TD, weights_TK, ids_TK)
        index = ops.route_index(ids_TK, self.w13_E2FD.shape[0])
        if num_copies is None and self.training and self.capacity_factor:
            num_copies = int(index.bins_E[-1])
        y_TD = ops.expert_mlp(x_TD, self.w13_E2FD, None, self.w2_EDF, weights_TK, index, act=self.act,
                              gate_bias=self.w13_bias, down_bias=self.w2_bias, num_copies=num_copies)
        return y_TD if self.exchange is None else self.exchange.combine(y_TD, plan)

    @torch.no_grad()
    def update_select_bias(self, counts_E, rate):
        """One step towards balance. counts_E: int64 [E], copies per expert over the whole optimizer step, all ranks."""
        self.select_bias_E.copy_(ops.select_bias_update(self.select_bias_E, counts_E, rate))
