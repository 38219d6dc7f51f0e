"""The learned router and its z-loss.

scores_TE = softmax(x W^T), the K largest are chosen (the lowest expert id wins a tie), weights_TK = their scores,
divided by their p-norm if asked. The functions of the z-loss are MegaBlocks': routers save their logits in training
with gradients on (saved.py), and a step ends with clear_router_zloss().
"""

import math
import warnings

import torch

from moe_ext import ops
from moe_ext.layers import common, saved
from moe_ext.layers.arguments import Arguments


def clear_router_zloss():
    """Forget the logits; call it once per step."""
    saved.clear("z-loss")


def batched_router_zloss(args: Arguments):
    """moe_zloss_weight * mean_t logsumexp(logits[t])^2 for each router call since the last clear: a vector in at least
    fp32. ValueError if no router saved its logits."""
    if args.moe_zloss_weight == 0:
        warnings.warn("batched_router_zloss is 0 because moe_zloss_weight is 0", stacklevel=2)
        return 0
    losses = [ops.z_loss(logits_TE) for logits_TE in saved.read("z-loss", "clear_router_zloss")]
    if not losses:
        raise ValueError(
            "batched_router_zloss: no router saved its logits since the last clear_router_zloss(). Routers save in "
            "training mode with gradients on only (under activation checkpointing with use_reentrant=False only)."
        )
    return args.moe_zloss_weight * torch.stack(losses)


class LearnedRouter(torch.nn.Module):
    """x [..., hidden_size] -> scores [T,E], weights [T,K], expert ids [T,K] int64. Every rank holds all of it.

    ValueError if the weights are to be normalised and moe_top_k is 1: w/|w| is 1, and the router would learn nothing.
    """

    def __init__(self, args: Arguments):
        super().__init__()
        if args.moe_normalize_expert_weights and args.moe_top_k == 1 < args.moe_num_experts:
            raise ValueError(
                f"moe_normalize_expert_weights={args.moe_normalize_expert_weights} with moe_top_k=1 makes every expert "
                "weight the constant 1, which gives the router no gradient: set moe_normalize_expert_weights=None"
            )
        self.args = args
        self.saved = saved.Slot("z-loss")
        self.layer = torch.nn.Linear(
            args.hidden_size, args.moe_num_experts, bias=False, dtype=common.dtype(args), device=args.device
        )
        args.init_method(self.layer.weight)

    def jitter(self, x):
        """Uniform numbers of [1-eps, 1+eps), from torch's generator."""
        low, high = 1.0 - self.args.moe_jitter_eps, 1.0 + self.args.moe_jitter_eps
        return low + torch.rand(x.size(), dtype=x.dtype, device=x.device) * (high - low)

    def forward(self, x):
        args = self.args
        if self.training and args.moe_jitter_eps is not None:
            x = x * self.jitter(x)
        logits_TE = self.layer(x.reshape(-1, x.shape[-1]))
        if self.training and args.moe_zloss_weight != 0:
            self.saved.add(logits_TE)
        norm_p = args.moe_normalize_expert_weights or None  # 0 means no normalisation
        logits_TE, bad_T1 = common.finite(logits_TE)
        weights_TK, ids_TK, scores_TE = ops.router(logits_TE, args.moe_top_k, norm_p=norm_p)
        weights_TK, scores_TE = (t.masked_fill(bad_T1, math.nan) for t in (weights_TK, scores_TE))
        if args.uniform_expert_assignment:
            ids_TK = torch.arange(ids_TK.numel(), device=x.device).view_as(ids_TK) % args.moe_num_experts
        return scores_TE, weights_TK, ids_TK.long()
