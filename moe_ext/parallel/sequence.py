"""Sequence parallelism, from outside: P ranks share every sequence; attention alone needs all of it.

Rank r holds the tokens [r n, (r+1) n) of each sequence of S = P n, in everything but attention. There, in one of two
forms:

    Ulysses     an all-to-all gives every rank all tokens of some heads, another gives it back its own tokens of all
                heads (Jacobs et al., 2023):
                q, k, v [B,H|G,n,d] -> all_to_all -> [B,H|G/P,S,d] -> attend -> [B,H/P,S,d] -> all_to_all -> [B,H,n,d]
    AllGather   every rank gets the keys and values of all:
                k, v [B,G,n,d] -> all_gather -> [B,G,S,d]; q [B,H,n,d] stays -> attend -> [B,H,n,d]

Ulysses divides the work evenly and wants heads that P divides. AllGather takes any heads, holds the keys and values of
the whole sequence, and gives the last rank almost twice the mean work, for causal queries see what is before them.

q, k and v (k and v) go in one message. A rank, layer and pass sends B n d (2 H + 2 max(G, P)) (P - 1) / P values, of
which Ulysses' G < P key and value heads count P because several ranks get the same; AllGather sends 2 B n d G (P - 1).
The backward sends as many. RoPE comes before, by a token's place in the whole sequence.
"""
import torch
import torch.distributed as dist
from torch import nn

from moe_ext import private
from moe_ext.attention import Documents
from moe_ext.config import ulysses_ranks
from moe_ext.model import GPT, Attention
from moe_ext.parallel.collectives import all_to_all, as_autocast, gather


def sequence_parallel(model: nn.Module, mesh) -> None:
    """Spread the tokens of a GPT, or a part of it, over mesh.tokens' sp ranks, in the form that mesh.config.attention
    names. In place."""
    across = FORMS[mesh.config.attention](mesh.tokens.get_group("sp"))
    for module in model.modules():
        if isinstance(module, GPT):
            module.mine = across.mine
        elif isinstance(module, Attention):
            module.across = across


class Across:
    """What both forms are: a call that stands where attention stood, on n of S tokens.

        across = Ulysses(group)                     # or AllGather(group)
        x_BnD, positions_n = across.mine(x_BS..)    # this rank's tokens of whole rows of ids, positions, masks
        y_BHnd = across(moe_ext.attention.attend, q_BHnd, k_BGnd, v_BGnd)       # after RoPE by these positions

    group: a process group, None for all ranks. As with any collective, its ranks call in the same order with the same
    shapes and dtype. Parameters that all ranks have get on each rank the part of their gradient that its tokens give:
    add the parts up, as FSDP does over these ranks.
    """

    def __init__(self, group=None):
        self.group, self.ranks, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def mine(self, x):
        """Of whole sequences [.., S] this rank's tokens [.., n]; None of None. ValueError if P does not divide S."""
        if x is None:
            return None
        S, P = x.shape[-1], self.ranks
        if S % P:
            raise ValueError(f"{type(self).__name__}: got sequences of {S} tokens, which the {P} ranks that share them "
                             f"do not divide: cut them to {S // P * P}, or fill them up to {-(-S // P) * P} with pads "
                             "(token_mask)")
        return x.unflatten(-1, (P, -1))[..., self.rank, :].contiguous()     # a column of single tokens is not

    def check(self, q, k, v, seen, sinks):
        """ValueError for what `__call__` does not take: by shapes, which are the same on all ranks."""
        name, P = type(self).__name__, self.ranks
        if (any(t.ndim != 4 for t in (q, k, v)) or k.shape != v.shape or q.shape[1] % k.shape[1]
                or (len(q), *q.shape[2:]) != (len(k), *k.shape[2:]) or not q.dtype == k.dtype == v.dtype):
            got = ", ".join(f"{letter} {list(t.shape)} {t.dtype}" for letter, t in zip("qkv", (q, k, v), strict=True))
            raise ValueError(f"{name}: got {got}; wanted q [B,H,n,d], k and v [B,G,n,d] of one dtype, H a multiple of "
                             "G, of this rank's n tokens of each sequence")
        (B, H, n, _), S = q.shape, P * q.shape[2]
        if sinks is not None and sinks.shape != (H,):
            raise ValueError(f"{name}: got sinks {list(sinks.shape)}, wanted [{H}], those of all heads")
        if isinstance(seen, Documents):
            got, wanted = seen.shape, (B, S)
        elif seen is not None and seen.ndim == 5:       # run by run of a window
            got, wanted = seen.shape[1:2], (-(-S // seen.shape[3]),)
        elif seen is not None:
            got, wanted = seen.shape[1:], (1, S, S + (sinks is not None))
        if seen is not None and got != wanted:
            raise ValueError(f"{name}: `seen` is {type(seen).__name__} over {list(got)}, wanted {list(wanted)}: what "
                             f"the whole sequences see, of {S} tokens, {n} on each of {P} ranks")


class Ulysses(Across):
    """Heads exchanged for tokens. Errors: ValueError, on all ranks, unless P divides H, and G divides P or P divides
    G, and for shapes that do not match."""

    def __call__(self, attend, q_BHnd, k_BGnd, v_BGnd, seen=None, sinks_H=None):
        """-> y_BHnd: what attend(q, k, v, seen, sinks) -> y gives of all S tokens, for this rank's n.

        q, k, v: floating, of one dtype; in autocast any, for they travel as it hands them to attention. attend gets
        them, and sinks, of H/P and G/P (at least 1) heads. seen: handed on as it is; None, Documents or a mask, of the
        whole sequences.
        """
        q_BHnd, k_BGnd, v_BGnd = map(as_autocast, (q_BHnd, k_BGnd, v_BGnd))
        self.check(q_BHnd, k_BGnd, v_BGnd, seen, sinks_H)
        P, H, G = self.ranks, q_BHnd.shape[1], k_BGnd.shape[1]
        if P not in (fits := ulysses_ranks(H, G)):
            choice = ", ".join(map(str, fits))
            raise ValueError(f"Ulysses: {P} ranks cannot share {H} query and {G} key/value heads: it wants ranks that "
                             "divide the query heads, and divide the key/value heads or are a multiple of them: take "
                             f"{choice}, or AllGather (mesh.attention gather), which divides no heads")
        c = max(1, P // G)      # ranks get the same heads of k and v: of an axis of its own, so that none is copied
        parts = [t.unflatten(1, (P // c, -1, each)).expand(-1, -1, c, -1, -1, -1).permute(1, 2, 4, 0, 3, 5)
                 for t, each in ((q_BHnd, H // P), (k_BGnd, c * G // P), (v_BGnd, c * G // P))]
        whole_SBhd = all_to_all(torch.cat(parts, dim=4).flatten(0, 1), self.group).flatten(0, 1)
        q, k, v = (t.permute(1, 2, 0, 3) for t in whole_SBhd.split([t.shape[4] for t in parts], dim=2))
        y_BhSd = attend(q, k, v, seen, None if sinks_H is None else sinks_H.chunk(P)[self.rank])
        y_PnBhd = all_to_all(y_BhSd.permute(2, 0, 1, 3).unflatten(0, (P, -1)), self.group)
        return y_PnBhd.permute(2, 1, 0, 3, 4).flatten(2, 3).transpose(1, 2)


class AllGather(Across):
    """Keys and values of all ranks, queries of its own. Errors: ValueError, on all ranks, for shapes that do not match;
    ImportError if torch has no attention that gives the logarithm of its sums."""

    def __init__(self, group=None):
        private.require("mesh.attention gather")
        super().__init__(group)

    def __call__(self, attend, q_BHnd, k_BGnd, v_BGnd, seen=None, sinks_H=None):
        """-> y_BHnd: what attend(q, k, v, seen, sinks) -> y gives of all S tokens, for this rank's n.

        q, k, v: as in Ulysses. seen: None, Documents or a mask, of the whole sequences. attend gets keys and values of
        L >= n tokens, and takes the queries as those of the last n, as moe_ext.attention.attend does; or, of Documents,
        all S, and the part of them that is this rank's.
        """
        q_BHnd, k_BGnd, v_BGnd = map(as_autocast, (q_BHnd, k_BGnd, v_BGnd))
        self.check(q_BHnd, k_BGnd, v_BGnd, seen, sinks_H)
        n, end = q_BHnd.shape[2], (self.rank + 1) * q_BHnd.shape[2]
        k, v = gather(torch.stack([k_BGnd, v_BGnd]), 3, self.group)
        if isinstance(seen, Documents):
            return attend(q_BHnd, k, v, seen.but(part_of=(self.rank, self.ranks)), sinks_H)
        if seen is not None and seen.ndim == 4:
            seen = seen[:, :, end - n:end, :end + (sinks_H is not None)]
        return attend(q_BHnd, k[:, :, :end], v[:, :, :end], seen, sinks_H)


FORMS = {"ulysses": Ulysses, "gather": AllGather}     # mesh.attention
