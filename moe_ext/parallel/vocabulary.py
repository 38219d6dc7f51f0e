"""The model's two tables with their rows spread over a group: the embedding, and linear + cross-entropy.

Of V rows rank r has those of torch.chunk: ceil(V/n) from row r * ceil(V/n) on; the last ranks have fewer or none (v).

The cross-entropy is ops.linear_cross_entropy on each rank's rows, joined by one small all-gather per chunk of tokens.
Against a token a_r of its own, the target or the row next to it, rank r has loss_r = logsumexp_r - logit[a_r]. Then

    d_r  = logsumexp_r - logit[target] = loss_r + (logit[a_r] - logit[target])
    loss = logsumexp over r of d_r             share_r = exp(d_r - loss), of rank r's softmax in the whole one

with the same bits on every rank. The loss is made of differences alone, so large logits cost it no digits.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from moe_ext import ops
from moe_ext.ops.define import Function, real
from moe_ext.ops.dense import ours, outer, product
from moe_ext.ops.head import chunk_on
from moe_ext.parallel.collectives import as_autocast, gather_rows

_xent_ = torch.ops.moe_ext.xent_.default
_backward = torch.ops.moe_ext.linear_cross_entropy_backward.default


def _rows(vocab_size, group):
    """-> the rows of a rank that is full, this rank's first row, and how many it has."""
    most = -(-vocab_size // dist.get_world_size(group))
    first = min(dist.get_rank(group) * most, vocab_size)
    return most, first, min(most, vocab_size - first)


def vocabulary_parallel_embedding(tokens, w_vD, *, vocab_size, group):
    """This rank's part of w_VD[tokens], zeros for the tokens of others: the sum over ranks is the lookup.

    tokens int64 of any shape, in [0,V), equal on all ranks; others end as in nn.Embedding. -> [.., D], differentiable
    in w_vD, densely.
    """
    _, first, v = _rows(vocab_size, group)
    if w_vD.shape[0] != v:
        raise RuntimeError(
            f"vocabulary_parallel_embedding: w has shape {list(w_vD.shape)}, wanted [v={v}, D], "
            f"this rank's rows of {vocab_size}"
        )
    here = (tokens >= first) & (tokens < first + v)
    known = (tokens >= 0) & (tokens < vocab_size)
    ids = torch.where(here, tokens - first, known.long() - 1)  # -1: F.embedding refuses it
    # A rank without rows stays in the graph by an empty gradient: in the backward the others wait for it.
    table = w_vD if v else F.pad(w_vD, (0, 0, 0, 1))
    return F.embedding(ids, table).masked_fill(~here[..., None], 0)


def vocabulary_parallel_cross_entropy(x_TD, w_vD, targets_T, *, vocab_size, group, ignore_index=-100, chunk=None):
    """ops.linear_cross_entropy over the rows of all ranks, without ever holding more than [chunk,v] logits;
    None: as many tokens as there.

    x_TD [T,D] and targets_T int64 [T], in [0,V) or ignore_index: equal on all ranks. w_vD [v,D]: this rank's rows, of
    x's dtype. -> 0-d float32 (float64 for float64), the same bits on every rank. Follows autocast.
    Differentiable in x and w. The loss counts once, not once per rank: dw is whole, dx this rank's share, to be summed
    over ranks. Targets are checked before the first all-gather, so that all ranks raise; a GPU's host waits for that.
    """
    chunk = chunk_on(x_TD.device.type) if chunk is None else chunk
    x_TD, w_vD = as_autocast(x_TD), as_autocast(w_vD)
    _check(x_TD, w_vD, targets_T, vocab_size, group, ignore_index, chunk)
    if dist.get_world_size(group) == 1:
        return ops.linear_cross_entropy(x_TD, w_vD, targets_T, ignore_index=ignore_index, chunk=chunk)
    grad = torch.is_grad_enabled()
    need_dx, need_dw = grad and x_TD.requires_grad, grad and w_vD.requires_grad
    return _CrossEntropy.apply(x_TD, w_vD, targets_T, vocab_size, group, ignore_index, chunk, need_dx, need_dw)


def _check(x_TD, w_vD, targets_T, vocab_size, group, ignore_index, chunk):
    (T, D), v = x_TD.shape, _rows(vocab_size, group)[2]
    for holds, wrong in (
        (w_vD.dtype == x_TD.dtype,
         f"w has dtype {w_vD.dtype}, wanted that of x ({x_TD.dtype}). Hint: w.to(x.dtype), or torch.autocast"),
        (w_vD.shape == (v, D),
         f"w has shape {list(w_vD.shape)}, wanted [v={v}, D={D}], this rank's rows of {vocab_size}"),
        (targets_T.shape == (T,), f"targets has shape {list(targets_T.shape)}, wanted [T={T}]"),
        (targets_T.dtype == torch.int64, f"targets has dtype {targets_T.dtype}, wanted torch.int64"),
        (chunk >= 1, f"chunk is {chunk}, wanted >= 1 token"),
    ):  # fmt: skip
        if not holds:
            raise RuntimeError(f"vocabulary_parallel_cross_entropy: {wrong}")
    wrong_T = (targets_T != ignore_index) & ((targets_T < 0) | (targets_T >= vocab_size))
    if wrong_T.any():
        t = int(wrong_T.nonzero()[0])
        raise RuntimeError(
            f"vocabulary_parallel_cross_entropy: targets has {int(targets_T[t])} at position {t}, "
            f"wanted 0 <= id < {vocab_size} or {ignore_index}"
        )


def _join(own_C, at_C, owner_C, group):
    """own_C: loss_r; at_C: logit[a_r]; owner_C: the rank of the target's row. -> loss_C, share_C of this rank."""
    own_nC, at_nC = gather_rows(torch.stack([own_C, at_C])[:, None], 1, group)
    d_nC = own_nC + (at_nC - at_nC.gather(0, owner_C[None]))
    loss_C = d_nC.logsumexp(0)
    return loss_C, (d_nC[dist.get_rank(group)] - loss_C).exp()


class _CrossEntropy(Function):
    @staticmethod
    def forward(ctx, x_TD, w_vD, targets_T, vocab_size, group, ignore_index, chunk, need_dx, need_dw):
        most, first, v = _rows(vocab_size, group)
        counts_T = targets_T != ignore_index
        owner_T = targets_T.where(counts_T, 0) // most
        here_T = (owner_T == dist.get_rank(group)).int()
        near_T = (targets_T - first).clamp(0, max(v - 1, 0))  # a_r, among this rank's rows
        loss = x_TD.new_zeros((), dtype=real(x_TD.dtype))
        dx_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format) if need_dx else None
        dw_vD = torch.zeros_like(w_vD, dtype=loss.dtype) if need_dw else None
        rows = min(chunk, len(x_TD))
        buffer = x_TD.new_empty(0 if ours(x_TD.device, x_TD.dtype, rows) else rows, v)
        for begin in range(0, len(x_TD), chunk):
            x_CD, counts_C, owner_C, here_C, near_C = (
                t[begin : begin + chunk] for t in (x_TD, counts_T, owner_T, here_T, near_T)
            )
            logits_Cv = product(x_CD, w_vD.T, buffer[: len(x_CD)])
            own_C, at_C = loss.new_zeros(len(x_CD)), loss.new_full((len(x_CD),), -torch.inf)
            if v:
                at_C = logits_Cv.gather(1, near_C[:, None])[:, 0].to(loss.dtype).where(counts_C, 0)
                own_C = _xent_(logits_Cv, near_C.where(counts_C, -1), -1, 1.0)
            loss_C, share_C = _join(own_C, at_C, owner_C, group)
            loss += loss_C.where(counts_C, 0).sum()
            dlogits_Cv = logits_Cv.mul_(share_C[:, None])  # a CPU multiplies bf16 by float32 in a float32 copy
            if v:  # xent_ subtracted 1 from element a_r on every rank, and rounded
                exact_C = ((-own_C).exp() * share_C - here_C).where(counts_C, 0)
                dlogits_Cv.scatter_(1, near_C[:, None], exact_C[:, None].to(dlogits_Cv.dtype))
            if need_dx:
                dx_CD = dx_TD[begin : begin + chunk]
                dx_CD.copy_(product(dlogits_Cv, w_vD, dx_CD))
            if need_dw:
                dw_vD += outer(dlogits_Cv, x_CD)
            del logits_Cv, dlogits_Cv  # before the next are made
        ctx.save_for_backward(dx_TD, dw_vD.to(w_vD.dtype) if need_dw else None, loss)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        *saved, loss = ctx.saved_tensors
        dx_TD, dw_vD = (None if d is None else _backward(d, dloss, loss) for d in saved)
        return dx_TD, dw_vD, *[None] * 7
