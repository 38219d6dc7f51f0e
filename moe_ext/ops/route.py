"""The router and its losses: scores, top-k, capacity, balance and z-loss, selection bias. csrc/route.c, csrc/balance.c.

Under autocast all of it runs in float32.
"""

import torch

from moe_ext.ops.define import define, real
from moe_ext.ops.enums import BALANCES, SCORES, number

# ---- router ----------------------------------------------------------------------------------------------------------


def _fake_router(logits, select_bias, ids, k, score, norm_p, scale, balanced):
    weights = logits.new_empty(logits.shape[0], k)
    return weights, torch.empty_like(weights, dtype=torch.int32), torch.empty_like(logits)


def _save_router(ctx, inputs, output):
    logits, _, _, _, *ctx.rule, _ = inputs
    _, ids, scores = output
    ctx.mark_non_differentiable(ids)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, scores, ids)


def _backward_router(ctx, dweights, _, dscores):
    if dweights is None and dscores is None:
        return (None,) * 8
    grads = [None if d is None else d.contiguous() for d in (dweights, dscores)]
    return _router_backward(*ctx.saved_tensors, *grads, *ctx.rule), *(None,) * 7


_router = define(
    "router(Tensor logits, Tensor? select_bias, Tensor? ids, int k, int score, float norm_p, float scale, "
    "bool balanced) -> (Tensor, Tensor, Tensor)",
    fake=_fake_router,
    save=_save_router,
    backward=_backward_router,
    autocast=(0,),
    autocast_dtype=torch.float32,
)
_router_backward = define(
    "router_backward(Tensor logits, Tensor scores, Tensor ids, Tensor? dweights, Tensor? dscores, int score, "
    "float norm_p, float scale) -> Tensor",
    fake=lambda logits, *_: torch.empty_like(logits),
)


def router(logits_TE, k, *, score="softmax_topk", select_bias_E=None, ids_TK=None, norm_p=None, scale=1.0,
           balanced=False):
    """logits_TE -> weights_TK, ids_TK int32, scores_TE; the K largest, descending, and the lowest id wins a tie.

    "softmax_topk"  scores = softmax(logits), chosen by scores + select_bias, weights = scores[ids]  (Switch)
    "sigmoid"       the same with sigmoid                                                            (DeepSeek-V3)
    "topk_softmax"  chosen by logits, weights = softmax(logits[ids])                                 (Mixtral, gpt-oss)
    The weights are then divided by their p-norm (norm_p > 0, math.inf for the largest) and multiplied by scale.
    select_bias_E is float32 [E]. balanced replaces the choice by ids[t,k] = (t*K + k) mod E, for throughput tests.
    ids_TK int32 makes the choice instead: weights, scores and gradients are those of a router that had made it, bit for
    bit if it would have. -1 is absent: its weight is 0, it is in no norm or softmax, and no gradient comes from it. A
    masked expert (a logit of -inf) has weight 0.
    Differentiable in logits. Raises RuntimeError on a NaN logit, unless 1 <= k <= E, and for ids that are neither -1
    nor in [0, E) or that name an expert twice for a token.
    """
    score, norm_p = number("router", "score", score, SCORES), 0.0 if norm_p is None else norm_p
    ids_TK = None if ids_TK is None else ids_TK.contiguous()
    return _router(logits_TE.contiguous(), select_bias_E, ids_TK, k, score, norm_p, scale, balanced)


# ---- capacity and counts ---------------------------------------------------------------------------------------------

_capacity_drop = define(
    "capacity_drop(Tensor ids, Tensor? priority, Tensor capacity, int num_experts, SymInt rows_per_scope) -> Tensor",
    fake=lambda ids, *_: torch.empty_like(ids),
    constant=True,
)


def capacity_drop(ids_TK, num_experts, capacity_G, *, rows_per_scope=None, priority_TK=None):
    """In scope g of `rows_per_scope` rows (None: all) an expert keeps capacity_G[g] copies (int32, >= 0): the first by
    flat id, or those of largest priority_TK (float; the lowest flat id wins a tie). ids_TK int32 -> the same, -1 for
    the others."""
    priority_TK = None if priority_TK is None else priority_TK.detach().to(real(priority_TK.dtype)).contiguous()
    return _capacity_drop(ids_TK.contiguous(), priority_TK, capacity_G, num_experts, _scope(ids_TK, rows_per_scope))


def _scope(x_T, rows_per_scope):
    return x_T.shape[0] if rows_per_scope is None else rows_per_scope


_balance_counts = define(
    "balance_counts(Tensor ids, int num_experts, SymInt rows_per_scope) -> Tensor",
    fake=lambda ids, num_experts, rows: ids.new_empty(ids.shape[0] // rows if rows else 1, num_experts),
    constant=True,
)


def balance_counts(ids_TK, num_experts, rows_per_scope=None):
    """Copies per expert in each scope of `rows_per_scope` rows (None: all). ids_TK int32 [T,K] -> int32 [G,E]."""
    return _balance_counts(ids_TK.contiguous(), num_experts, _scope(ids_TK, rows_per_scope))


# ---- losses ----------------------------------------------------------------------------------------------------------


def _save_balance_loss(ctx, inputs, output):
    scores, counts, *ctx.rule = inputs
    ctx.save_for_backward(scores, counts)


_balance_loss = define(
    "balance_loss(Tensor scores, Tensor counts, int top_k, int form) -> Tensor",
    fake=lambda scores, counts, top_k, form: scores.new_empty((), dtype=real(scores.dtype)),
    save=_save_balance_loss,
    backward=lambda ctx, dloss: (_balance_loss_backward(*ctx.saved_tensors, dloss, *ctx.rule), None, None, None),
    autocast=(0,),
    autocast_dtype=torch.float32,
)
_balance_loss_backward = define(
    "balance_loss_backward(Tensor scores, Tensor counts, Tensor dloss, int top_k, int form) -> Tensor",
    fake=lambda scores, *_: torch.empty_like(scores),
)


def balance_loss(scores_TE, counts_GE, top_k, *, form="switch"):
    """The mean over scopes g of S = T/G rows of
    "switch"  E / (S*K) * sum_e counts[g,e] * mean_t scores[t,e]   (Switch Transformer; 1.0 when balanced)
    "mse"     mean_e (mean_t scores[t,e] - 1/E)^2
    counts_GE int32, from balance_counts (a mesh sums them first). -> 0-d float32 (float64 for float64), zero without
    tokens. Differentiable in scores.
    """
    return _balance_loss(scores_TE.contiguous(), counts_GE, top_k, number("balance_loss", "form", form, BALANCES))


def _save_z_loss(ctx, inputs, output):
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*inputs, lse)


_z_loss = define(
    "z_loss(Tensor logits) -> (Tensor, Tensor)",
    fake=lambda logits: (
        logits.new_empty((), dtype=real(logits.dtype)),
        logits.new_empty(logits.shape[0], dtype=real(logits.dtype)),
    ),
    save=_save_z_loss,
    backward=lambda ctx, dloss, _: (_z_loss_backward(*ctx.saved_tensors, dloss),),
    autocast=(0,),
    autocast_dtype=torch.float32,
)
_z_loss_backward = define(
    "z_loss_backward(Tensor logits, Tensor lse, Tensor dloss) -> Tensor",
    fake=lambda logits, lse, dloss: torch.empty_like(logits),
)


def z_loss(logits_TE):
    """mean_t logsumexp(logits[t])^2 (ST-MoE) -> 0-d float32 (float64 for float64), zero without tokens."""
    return _z_loss(logits_TE.contiguous())[0]


# ---- selection bias --------------------------------------------------------------------------------------------------

_select_bias_update = define(
    "select_bias_update(Tensor bias, Tensor counts, float rate) -> Tensor",
    fake=lambda bias, counts, rate: torch.empty_like(bias),
)


def select_bias_update(bias_E, counts_E, rate):
    """bias + rate * sign(mean(counts) - counts) (DeepSeek-V3): once per optimizer step, from global counts.

    bias_E float32 [E], counts_E int64 [E] -> a new float32 [E].
    """
    return _select_bias_update(bias_E, counts_E, rate)
