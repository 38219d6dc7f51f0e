"""The MoE layer of the GPT: router -> (exchange) -> fused expert MLP -> (exchange).

    logits_TE = x_TD Wr^T                  in fp32 (fp64 for fp64); jitter on x before, learned noise after
    weights_TK, ids_TK = router(logits)    ids become -1 where capacity drops a copy
    y_t = sum_k weights_tk * down_e(act(gate_e x_t) * up_e x_t) + shared(x_t)        with e = ids_tk

Shapes as in reference.py; B sequences of S tokens, T = B*S. Parameters, in the memory order of Hugging Face's fused
layout: gate.weight [E,D], noise_E, experts.w13_E2FD [E,2,F,D] = gate, up ([E,1,F,D] if `act` has no gate),
experts.w2_EDF; with biases experts.w13_bias [E,2,F], experts.w2_bias [E,D]; shared.*_proj. Buffer: select_bias_E.

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
    run: int = 0    # sequence parallelism: rows come in runs of so many consecutive tokens, 0: all of them,
    stride: int = 0 # of which each begins so many tokens after the last

    def at(self, name: str) -> dict:
        """Arguments of the random ops for the place `name`."""
        return dict(seed=self.seed, step=self.step, site=site(name), row0=self.row0, run=self.run, stride=self.stride)


class Routing(NamedTuple):
    """What a forward in training says beside its output."""
    loss: torch.Tensor      # balance_weight * balance loss + z_weight * z-loss, a scalar of the router's dtype
    counts_E: torch.Tensor  # int32, copies that chose each expert, the dropped ones included
    dropped: torch.Tensor   # int32 scalar, copies that capacity dropped
    bad: torch.Tensor       # int32 scalar, tokens whose logits are not finite: their outputs are NaN


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


class Gate(nn.Linear):
    """x_TD -> logits_TE in x's dtype, whatever that of the weight."""
    def forward(self, x_TD):
        return F.linear(x_TD, self.weight.to(x_TD.dtype))


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

    def forward(self, x_RD, weights_RK, ids_RK, num_copies=None):
        index = ops.route_index(ids_RK, self.w2_EDF.shape[0])
        w13_bias = None if self.w13_bias is None else self.w13_bias.flatten(1, 2)
        return ops.expert_mlp(x_RD, self.w13_E2FD.flatten(1, 2), None, self.w2_EDF, weights_RK, index, act=self.act,
                              gate_bias=w13_bias, down_bias=self.w2_bias, num_copies=num_copies)


class FusedMoE(nn.Module):
    """x_BSD -> y_BSD, Routing.

    `name` is the layer's place in the model: it keys its random numbers. `bias` gives the experts biases,
    `select_bias` a selection bias that `update_select_bias` moves; the rest is as in config.MoEConfig. `exchange`
    stands between router and experts when these live on several ranks: then `experts` holds this rank's. `peers` are
    the ranks that share this one's scopes (balance loss, capacity) when those reach beyond it.
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
        self.exchange, self.peers = exchange, None

        options = dict(dtype=dtype, device=device)
        self.gate = Gate(dim, num_experts, bias=False, **options)
        self.noise_E = nn.Parameter(torch.empty(num_experts, **options)) if noise else None
        self.experts = Experts(num_experts, dim, hidden, act=act, bias=bias, **options)
        self.shared = MLP(dim, shared_hidden, act=act, bias=bias, **options) if shared_hidden else None
        self.register_buffer("select_bias_E", torch.zeros(num_experts, device=device) if select_bias else None)
        self.reset_parameters()

    def reset_parameters(self):
        """Matrices from U(-1/sqrt(in), 1/sqrt(in)) as in nn.Linear, biases and noise zero. The GPT draws its own."""
        experts = self.experts
        for p in (experts.w13_E2FD, experts.w2_EDF):
            nn.init.uniform_(p, -p.shape[-1] ** -0.5, p.shape[-1] ** -0.5)
        for p in (experts.w13_bias, experts.w2_bias, self.noise_E):
            if p is not None:
                nn.init.zeros_(p)

    def forward(self, x_BSD, draws: Draws | None = None):
        with torch.autocast(x_BSD.device.type, enabled=False):
            weights_TK, ids_TK, routing = self.route(x_BSD, draws)
        x_TD = x_BSD.flatten(0, 1)
        num_copies = int((ids_TK >= 0).sum()) if self.training and self.capacity_factor else None
        if self.exchange is None:
            y_TD = self.experts(x_TD, weights_TK, ids_TK, num_copies)
        else:
            x_RD, weights_RK, ids_RK, num_copies, plan = self.exchange.dispatch(x_TD, weights_TK, ids_TK)
            y_TD = self.exchange.combine(self.experts(x_RD, weights_RK, ids_RK, num_copies), plan)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD.view(x_BSD.shape), routing

    def route(self, x_BSD, draws):
        """-> weights_TK, ids_TK (-1 where dropped), Routing."""
        B, S, _ = x_BSD.shape
        real = torch.promote_types(self.gate.weight.dtype, torch.float32)
        x_TD = x_BSD.flatten(0, 1).to(real)
        random = self.training and draws is not None
        if self.jitter and random:
            x_TD = ops.jitter(x_TD, self.jitter, **draws.at(self.name + ".jitter"))
        logits_TE = self.gate(x_TD)
        if self.noise_E is not None and random:
            logits_TE = ops.noisy(logits_TE, self.noise_E.to(real), **draws.at(self.name + ".noise"))
        # A token whose logits are not finite gets NaN for its weights, as torch does: the op would raise, on one rank
        # of a mesh, on CUDA at some later call, and where fp16 skips a step.
        poison_T1 = logits_TE.detach().sum(-1, keepdim=True) * 0    # NaN for such a token, else 0
        bad_T1 = poison_T1.isnan()
        logits_TE = logits_TE.masked_fill(bad_T1, 0)
        weights_TK, ids_TK, scores_TE = ops.router(
            logits_TE, self.top_k, score=self.score, select_bias_E=self.select_bias_E,
            norm_p=self.norm_p, scale=self.scale, balanced=self.balanced and self.training)
        weights_TK = weights_TK + poison_T1
        counts_GE = ops.balance_counts(ids_TK, self.num_experts, S if self.scope == "sequence" else None)
        loss, kept_TK, dropped = logits_TE.new_zeros(()), ids_TK, ids_TK.new_zeros(())
        if self.training:
            if self.balance_weight:
                loss = loss + self.balance_weight * self.balance_loss(scores_TE, counts_GE)
            if self.z_weight:
                loss = loss + self.z_weight * ops.z_loss(logits_TE)
            if self.capacity_factor:
                kept_TK = self.drop(ids_TK, scores_TE.detach(), B)
                dropped = (kept_TK < 0).sum(dtype=torch.int32)
        return weights_TK, kept_TK, Routing(loss, counts_GE.sum(0, dtype=torch.int32), dropped,
                                            bad_T1.sum(dtype=torch.int32))

    def balance_loss(self, scores_TE, counts_GE):
        if self.score == "sigmoid":     # affinities become a distribution first (DeepSeek-V3, eq. 19)
            scores_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
        if self.peers is None:
            return ops.balance_loss(scores_TE, counts_GE, self.top_k, form=self.balance_form)
        # The mean over all of a scope's tokens stands for them: one row per scope, so "switch" divides by 1, not by S.
        G, E = counts_GE.shape
        tokens = len(scores_TE) // G * self.peers.ranks
        mean_GE = self.peers.sum(scores_TE.view(G, -1, E).sum(1)) / tokens
        loss = ops.balance_loss(mean_GE, self.peers.sum(counts_GE), self.top_k, form=self.balance_form)
        return loss / tokens if self.balance_form == "switch" else loss

    def drop(self, ids_TK, scores_TE, B):
        """In each scope an expert keeps ceil(factor * K * tokens / E) copies: the first, or those of largest score."""
        ids_BSK = ids_TK.view(B, -1, self.top_k)
        priority_BSK = scores_TE.gather(1, ids_TK.long()).view_as(ids_BSK) if self.drop_by == "probability" else None
        if self.peers is not None:
            ids_BSK = self.peers.gather(ids_BSK)
            priority_BSK = None if priority_BSK is None else self.peers.gather(priority_BSK)
        B, S, K = ids_BSK.shape
        tokens = S if self.scope == "sequence" else B * S
        kept_TK = ops.capacity_drop(
            ids_BSK.view(-1, K), self.num_experts, math.ceil(self.capacity_factor * K * tokens / self.num_experts),
            rows_per_scope=tokens, priority_TK=None if priority_BSK is None else priority_BSK.view(-1, K))
        return kept_TK if self.peers is None else self.peers.own(kept_TK.view(B, S, K)).reshape(ids_TK.shape)

    @torch.no_grad()
    def update_select_bias(self, counts_E, rate):
        """One step towards balance. counts_E: int64 [E], copies per expert over the whole optimizer step, all ranks."""
        self.select_bias_E.copy_(ops.select_bias_update(self.select_bias_E, counts_E, rate))
