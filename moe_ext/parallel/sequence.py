"""Sequence parallelism, from outside: P ranks share every sequence; attention alone needs all of it.

Rank r holds the tokens [r n, (r+1) n) of each sequence of S = P n, in everything but attention. There, in two forms:

    Ulysses     an all-to-all gives every rank all tokens of some heads, another gives it back its own tokens of all
                heads (Jacobs et al., 2023):
                q, k, v [B,h,n,d] -> all_to_all -> [B,h/P,S,d] -> attend -> [B,H/P,S,d] -> all_to_all -> y [B,H,n,d]
    AllGather   every rank gets the keys and values of all: k, v [B,G,n,d] -> all_gather -> [B,G,S,d]; its queries stay,
                so that no number of heads must be divisible, but the last rank does most of the work

q, k and v (k and v) go in one message. RoPE comes before it, so that positions are global.
"""
import torch
import torch.distributed as dist
from torch import nn

from moe_ext import private
from moe_ext.model import GPT, Attention, Documents
from moe_ext.parallel.collectives import all_to_all, gather


def sequence_parallel(model: nn.Module, mesh) -> None:
    """Spread the tokens of a GPT, or a part of it, over mesh.tokens' sp ranks, in the form that mesh.config.attention
    names. In place."""
    across = {"ulysses": Ulysses, "gather": AllGather}[mesh.config.attention](mesh.tokens.get_group("sp"))
    for module in model.modules():
        if isinstance(module, GPT):
            module.mine = across.mine
        elif isinstance(module, Attention):
            module.across = across


class Shared:
    """What both forms are: the `across` of an Attention, over the ranks of a group that share its sequences."""

    def __init__(self, group=None):
        self.group, self.ranks, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def mine(self, x):
        """Of whole sequences [.., S] this rank's tokens [.., n]; None of None. Errors: ValueError if P does not divide
        S."""
        if x is None:
            return None
        S, P = x.shape[-1], self.ranks
        if S % P:
            raise ValueError(f"{P} ranks share sequences of {S} tokens, which {P} does not divide: cut them to "
                             f"{S // P * P}, or fill them up to {-(-S // P) * P} with pads (token_mask)")
        return x.unflatten(-1, (P, -1))[..., self.rank, :]


class Ulysses(Shared):
    def __call__(self, attend, q_BHnd, k_BGnd, v_BGnd, seen=None, sinks_H=None):
        P, G = self.ranks, k_BGnd.shape[1]
        # c ranks get the same key and value heads: that is an axis of its own, along which k and v are expanded
        c = max(1, P // G)
        parts = [t.unflatten(1, (P // c, -1, t.shape[1] * c // P)).expand(-1, -1, c, -1, -1, -1).permute(1, 2, 4, 0, 3, 5)
                 for t in (k_BGnd, v_BGnd)]
        parts = [q_BHnd.unflatten(1, (P // c, c, -1)).permute(1, 2, 4, 0, 3, 5), *parts]
        whole_SBhd = all_to_all(torch.cat(parts, dim=4).flatten(0, 1), self.group).flatten(0, 1)
        q, k, v = (t.permute(1, 2, 0, 3) for t in whole_SBhd.split([t.shape[4] for t in parts], dim=2))
        y_BhSd = attend(q, k, v, seen, None if sinks_H is None else sinks_H.chunk(P)[self.rank])
        y_PnBhd = all_to_all(y_BhSd.permute(2, 0, 1, 3).unflatten(0, (P, -1)), self.group)
        return y_PnBhd.permute(2, 1, 0, 3, 4).flatten(2, 3).transpose(1, 2)


class AllGather(Shared):
    def __call__(self, attend, q_BHnd, k_BGnd, v_BGnd, seen=None, sinks_H=None):
        raise NotImplementedError
