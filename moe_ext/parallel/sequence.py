"""Sequence parallelism, from outside: sp ranks share every sequence; attention alone needs all of it.

Rank r of P holds the tokens [r S/P, (r+1) S/P) of each sequence, in everything but attention. There (Ulysses: Jacobs et
al., 2023) an all-to-all gives every rank all tokens of some heads, another gives it back its own tokens of all heads:

    q, k, v [B,h,S/P,d] -> all_to_all -> [B,h/P,S,d] -> attend -> y [B,H/P,S,d] -> all_to_all -> [B,H,S/P,d]

q, k and v go in one message. Fewer key and value heads than ranks are sent to several: P/G of them get the same.
"""
import torch
import torch.distributed as dist
from torch import nn

from moe_ext.model import GPT, Attention
from moe_ext.parallel.collectives import all_to_all


def sequence_parallel(model: nn.Module, mesh) -> None:
    """Spread the tokens of a GPT, or a part of it, over mesh.tokens' sp ranks. In place."""
    group = mesh.tokens.get_group("sp")
    for module in model.modules():
        if isinstance(module, GPT):
            module.mine = lambda x: x if x is None else x.chunk(mesh.config.sp, dim=-1)[mesh.sp_rank]
        elif isinstance(module, Attention):
            module.across = Ulysses(group)


class Ulysses:
    """The `across` of an Attention: heads exchanged for tokens between the ranks of a group, which share sequences."""

    def __init__(self, group):
        self.group, self.ranks, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def __call__(self, attend, q_BHnd, k_BGnd, v_BGnd, seen=None, sinks_H=None):
        """n = S/P tokens in, n tokens out; attend and seen as for whole sequences."""
        P, G = self.ranks, k_BGnd.shape[1]
        copies = max(1, P // G)
        parts = q_BHnd, k_BGnd.repeat_interleave(copies, dim=1), v_BGnd.repeat_interleave(copies, dim=1)
        sent_PnBhd = torch.cat([t.unflatten(1, (P, -1)).permute(1, 3, 0, 2, 4) for t in parts], dim=3)
        whole_BhSd = all_to_all(sent_PnBhd, self.group).flatten(0, 1).permute(1, 2, 0, 3)
        q, k, v = whole_BhSd.split([t.shape[1] // P for t in parts], dim=1)
        y_BhSd = attend(q, k, v, seen, None if sinks_H is None else sinks_H.chunk(P)[self.rank])
        y_PnBhd = all_to_all(y_BhSd.permute(2, 0, 1, 3).unflatten(0, (P, -1)), self.group)
        return y_PnBhd.permute(2, 0, 3, 1, 4).flatten(1, 2)
