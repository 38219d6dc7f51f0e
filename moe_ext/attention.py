"""Attention over whole sequences, without scores or a mask of all tokens with all: what each query sees, and torch's
SDPA over that.

    None        every token sees those up to itself
    a mask      of a window, run by run: S * 2w values; or of the queries behind a cache of keys
    Documents   a token sees its own document alone: each is a call of its own, those of like sizes together

B sequences, S queries, L >= S keys, of which the queries are the last S; H query heads, G key/value heads, d columns.
"""
from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from moe_ext.ops.define import Function, once_differentiable
from moe_ext.ops.dense import HALVES, torch_knows


def runs(x, w):
    """[.., S, n] -> [.., ceil(S/w), w, n]: runs of w tokens, the last filled up with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % w)).unflatten(-2, (-1, w))


def after_the_last(x):
    """Runs [.., r, w, n] -> [.., r, 2w, n]: each behind the one before it, the first behind zeros."""
    return torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[..., :-1, :, :], x], dim=-2)


def visible(S, past=0, window=0, real_BL=None, *, device=None):
    """The keys that each of the last S of past + S tokens sees, True or False, as `attend` takes it: those up to it,
    of its window, in which real ones count, of which only real ones; and in any case itself, for softmax over nothing
    is NaN.

    [B or 1, 1, S, L] over the last L tokens; or, of a window without past and pads, [1, r, 1, w, 2w], run by run:
    S * 2w values instead of S * S.
    """
    tokens = torch.arange(past + S, device=device)
    recent = window and real_BL is None       # pads may stand between a token and the first of its window
    if recent and not past and window < S:
        queries = torch.arange(-(-S // window) * window, device=device).view(-1, window)
        keys = queries[:, :1] + torch.arange(-window, window, device=device)
    else:
        queries, keys = tokens[past:], tokens[max(0, past + 1 - window) if recent else 0:]
    age = (queries[..., :, None] - keys[..., None, :])[None]
    seen = (age >= 0) & (keys >= 0)[..., None, :]
    if recent:
        seen = seen & (age < window)
    elif window:
        place_BL = real_BL.cumsum(1)
        seen = seen & (place_BL[:, past:, None] - place_BL[:, None] < window)
    if real_BL is not None:
        seen = seen & real_BL[:, None]
    return (seen | (age == 0)).unsqueeze(-3)


class Documents:
    """Rows of tokens of which each sees its own document alone, as `attend` takes it. Documents of like sizes are one
    batch, filled up to the longest of them: many small ones cost no call each, and none a mask.

    ids_BS: integers, equal for the tokens of a document, wherever in their row they stand; a window counts the tokens
    of the document. real_BS: bool; the others, pads, see nothing, no one sees them, and their result is 0.
    """
    def __init__(self, ids_BS, real_BS=None):
        self.shape, self.device = ids_BS.shape, ids_BS.device
        self.mask = None            # of a window, as `visible` gives it, of as many tokens as the longest document
        self.part_of = 0, 1         # all tokens are queries; of P parts of the rows, those of part r
        self.made = {}              # batches, by part
        B, S = self.shape
        ids, order = ids_BS.cpu().sort(dim=1, stable=True)
        row, ids = torch.arange(B).repeat_interleave(S), ids.flatten()
        self.order = row * S + order.flatten()      # tokens of all rows, those of a document side by side
        if real_BS is not None:
            kept = real_BS.cpu().flatten()[self.order]
            row, ids, self.order = row[kept], ids[kept], self.order[kept]
        same = (ids[1:] == ids[:-1]) & (row[1:] == row[:-1])
        self.starts = F.pad(~same, (1, 0), value=True)[:len(ids)].nonzero().flatten()
        self.sizes = torch.cat([self.starts[1:], torch.tensor([len(ids)])])[:len(self.starts)] - self.starts

    @classmethod
    def of(cls, ids_BS, real_BS=None):
        """None if each row is one document without pads: then `attend` needs to know nothing."""
        documents = cls(ids_BS, real_BS)
        return None if documents.sizes.tolist() == [ids_BS.shape[1]] * len(ids_BS) else documents

    def but(self, **changes):
        """The same with another mask or part."""
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def batches(self):
        """-> of each batch (documents n, queries s, keys L), the queries being those of the last s of L tokens; the
        Rows that lay this part's tokens out as queries, all batches behind one another, and those that put them
        back; the same two of whole rows as keys."""
        if self.part_of not in self.made:
            (rank, ranks), (B, S) = self.part_of, self.shape
            mine = S // ranks
            place = self.order % S - rank * mine
            before, until = (F.pad((place < end).cumsum(0), (1, 0)) for end in (0, mine))
            before, until = (n[self.starts + self.sizes] - n[self.starts] for n in (before, until))
            starts, past, size = (t[until > before] for t in (self.starts, before, until - before))
            # four batches between two powers of two: a seventh is filling on average, not a third
            step = 2 ** ((size.clamp(min=16) - 1).log2().floor().long() - 2)
            alike = torch.stack([past, -(-size // step) * step], dim=1)
            shapes, queries, keys = [], [], []
            for key in alike.unique(dim=0):
                chosen = (alike == key).all(1)
                L = past[chosen] + size[chosen]
                at = starts[chosen][:, None] + torch.arange(L.max())
                real = at < (starts[chosen] + L)[:, None]
                keys.append(torch.where(real, self.order[at.clamp(max=len(self.order) - 1)], -1))
                queries.append(keys[-1][:, key[0]:])
                shapes.append((*queries[-1].shape, keys[-1].shape[1]))
            queries, keys = (torch.cat([t.flatten() for t in x]) if x else torch.empty(0, dtype=torch.long)
                             for x in (queries, keys))
            queries = torch.where(queries < 0, -1, queries // S * mine + queries % S - rank * mine)
            self.made[self.part_of] = (shapes, *Rows.both(queries, B * mine, self.device),
                                       *Rows.both(keys, B * S, self.device))
        return self.made[self.part_of]


class Rows(NamedTuple):
    """Which rows of a tensor make another, and which of that are zeros."""
    at: torch.Tensor
    empty: torch.Tensor

    @classmethod
    def both(cls, at, size, device):
        """-> Rows that take from `size` rows those of number `at`, nothing for -1; and Rows that put them back."""
        back = torch.full((size,), -1)
        back[at[at >= 0]] = (at >= 0).nonzero().flatten()
        return [cls(x.clamp(min=0).to(device), (x < 0).nonzero().flatten().to(device)) for x in (at, back)]

    def of(self, x):
        if not len(x):
            return x.new_zeros(len(self.at), *x.shape[1:])
        return x.index_select(0, self.at).index_fill_(0, self.empty, 0)


class _Move(Function):
    """Rows to other places, each at most to one: backward as forward, by index, without an addition."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.there, ctx.back = there, back
        return there.of(x)

    @staticmethod
    def backward(ctx, dy):
        return _Move.apply(dy, ctx.back, ctx.there), None, None


def computed_in(device: str, dtype):
    """The dtype of the products of queries and keys of `dtype`: float32 for those that this CPU has only as loops."""
    return torch.float32 if device == "cpu" and dtype in HALVES and not torch_knows(dtype) else dtype


def attend(q_BHSd, k_BGLd, v_BGLd, seen=None, sinks_H=None):
    """softmax(q k^T / sqrt(d)) v -> [B,H,S,d], of the keys that are seen by the last S of L tokens; query head h reads
    key head h // (H/G).

    seen: as `visible` gives it, or log of that (0 and -inf) in q's dtype, with a first column for the sinks if there
    are any; or Documents; None: every query sees the keys up to its own. Run by run the queries of a run meet its own
    keys and those of the run before: all that their window reaches. sinks_H: the logit of one more key, of value 0.
    """
    if isinstance(seen, Documents):
        return attend_documents(q_BHSd, k_BGLd, v_BGLd, seen, sinks_H)
    dtype, given = computed_in(q_BHSd.device.type, q_BHSd.dtype), q_BHSd.dtype
    if dtype != given:
        mask = seen if seen is None or seen.dtype == torch.bool else seen.to(dtype)
        with torch.autocast(q_BHSd.device.type, enabled=False):     # which would turn them back
            return attend(q_BHSd.to(dtype), k_BGLd.to(dtype), v_BGLd.to(dtype), mask, sinks_H).to(given)
    (B, _, S, d), past, first = q_BHSd.shape, k_BGLd.shape[2] - q_BHSd.shape[2], 0
    if seen is not None and seen.ndim == 5:
        w = seen.shape[-2]
        if past:        # what the first queries see begins among tokens that ask nothing: they are asked for no result
            past = min(past, w)
            q_BHSd = F.pad(q_BHSd, (0, 0, past, 0))
            k_BGLd, v_BGLd = (t[:, :, -q_BHSd.shape[2]:] for t in (k_BGLd, v_BGLd))
        q_BrHwd = runs(q_BHSd, w).transpose(1, 2)
        k, v = (after_the_last(runs(t, w)).transpose(1, 2).flatten(0, 1) for t in (k_BGLd, v_BGLd))
        seen = seen[:, :q_BrHwd.shape[1]]       # those of a longer text begin with those of this
        seen = seen.expand(B, *seen.shape[1:]).flatten(0, 1)
        y = attend(q_BrHwd.flatten(0, 1), k, v, seen, sinks_H)
        return y.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)[:, :, past:past + S]
    q, k, v = q_BHSd, k_BGLd, v_BGLd
    if seen is not None:
        keys = seen.shape[-1] - (sinks_H is not None)
        k, v = k[:, :, -keys:], v[:, :, -keys:]
    if sinks_H is not None:
        # One more key in front, which has a column to itself: there every query has its head's logit, every other key
        # 0. So any kernel of SDPA computes it, with its memory, and gives the sinks their gradient. (Eight columns,
        # because kernels want multiples of that.) That causal queries see it too, all come one place later.
        first = int(seen is None and not past)
        q, k, v = F.pad(q, (0, 8, first, 0)), F.pad(k, (0, 8, 1, 0)), F.pad(v, (0, 8, 1, 0))
        q[..., d] = sinks_H[:, None] * math.sqrt(d)
        k[:, :, 0, d] = 1
    if seen is None and past:
        y = attend_after(q, k, v, 1 / math.sqrt(d))
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, scale=1 / math.sqrt(d),
                                           enable_gqa=q.shape[1] != k.shape[1])
    return y[:, :, first:, :d]


def attend_documents(q_BHSd, k_BGLd, v_BGLd, documents: Documents, sinks_H=None):
    """`attend`, batch by batch of documents."""
    shapes, to_queries, from_queries, to_keys, from_keys = documents.batches()
    q_NHd, k_MGd, v_MGd = (
        _Move.apply(t.transpose(1, 2).flatten(0, 1), there, back)
        for t, there, back in ((q_BHSd, to_queries, from_queries), (k_BGLd, to_keys, from_keys),
                               (v_BGLd, to_keys, from_keys)))
    window = documents.mask.shape[-2] if documents.mask is not None else math.inf
    q_sizes, k_sizes = [n * s for n, s, _ in shapes], [n * L for n, _, L in shapes]
    results = []
    for (n, _, L), *qkv in zip(shapes, q_NHd.split(q_sizes), k_MGd.split(k_sizes), v_MGd.split(k_sizes), strict=True):
        q, k, v = (t.unflatten(0, (n, -1)).transpose(1, 2) for t in qkv)
        results.append(attend(q, k, v, documents.mask if L > window else None, sinks_H).transpose(1, 2).flatten(0, 1))
    # of pads alone too, all have a gradient: other ranks wait for that of keys and values (AllGather) and sinks (FSDP)
    y_NHd = torch.cat(results) if results else q_NHd + sum(t.sum() for t in (k_MGd, v_MGd, sinks_H) if t is not None)
    return _Move.apply(y_NHd, from_queries, to_queries).unflatten(0, (len(q_BHSd), -1)).transpose(1, 2)


def attend_after(q_BHSd, k_BGLd, v_BGLd, scale):
    """Causal attention of the last S of L > S tokens, without a mask."""
    if q_BHSd.device.type == "cpu":
        return _After.apply(q_BHSd, k_BGLd, v_BGLd, scale)
    if q_BHSd.dtype == torch.float32:       # for which CUDA has a kernel, but none that knows groups
        k_BGLd, v_BGLd = (t.repeat_interleave(q_BHSd.shape[1] // t.shape[1], dim=1) for t in (k_BGLd, v_BGLd))
    seen = causal_lower_right(q_BHSd.shape[2], k_BGLd.shape[2])
    return F.scaled_dot_product_attention(q_BHSd, k_BGLd, v_BGLd, attn_mask=seen, scale=scale,
                                          enable_gqa=q_BHSd.shape[1] != k_BGLd.shape[1])


class _After(Function):
    """With p = L - S: attention to the p keys before all queries, which all see, and to their own, causal, joined by
    the logarithms l of their sums. Softmax is exp(score - l) whatever keys it is over, so that the gradients of both
    are those that the kernel gives for the joint result and the joint l (as in ring attention, Liu et al., 2023)."""

    @staticmethod
    def forward(ctx, q_BHSd, k_BGLd, v_BGLd, scale):
        ctx.scale, ctx.past = scale, k_BGLd.shape[2] - q_BHSd.shape[2]
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        y1, l1 = attention(q_BHSd, k_BGLd[:, :, :ctx.past], v_BGLd[:, :, :ctx.past], 0.0, False, scale=scale)
        y2, l2 = attention(q_BHSd, k_BGLd[:, :, ctx.past:], v_BGLd[:, :, ctx.past:], 0.0, True, scale=scale)
        l_BHS = torch.logaddexp(l1, l2)
        y_BHSd = torch.lerp(y1.to(l1.dtype), y2.to(l1.dtype), (l2 - l_BHS).exp()[..., None]).to(y1.dtype)
        ctx.save_for_backward(q_BHSd, k_BGLd, v_BGLd, y_BHSd, l_BHS)
        return y_BHSd

    @staticmethod
    def backward(ctx, dy_BHSd):
        return *_After.gradients(ctx, dy_BHSd, *ctx.saved_tensors), None

    @staticmethod
    @once_differentiable    # by q, k and v too, of which they are made
    def gradients(ctx, dy_BHSd, q_BHSd, k_BGLd, v_BGLd, y_BHSd, l_BHS):
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        (dq1, dk1, dv1), (dq2, dk2, dv2) = (
            gradients(dy_BHSd, q_BHSd, k_BGLd[:, :, part], v_BGLd[:, :, part], y_BHSd, l_BHS, 0.0, causal,
                      scale=ctx.scale)
            for part, causal in ((slice(0, ctx.past), False), (slice(ctx.past, None), True)))
        return dq1 + dq2, torch.cat([dk1, dk2], dim=2), torch.cat([dv1, dv2], dim=2)
