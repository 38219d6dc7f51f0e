"""A stack of MLPs whose matrices tp ranks share: W1 by columns, W2 by rows, so that each needs one sum over the ranks.

    x = act(x W1[i]) W2[i]        i = 0, 1, .., L-1

    all-reduce          all ranks have all T tokens between the layers:
                        x [T,D] -> act(x W1) [T,F/tp] -> W2 -> all_reduce -> [T,D]
    reduce-scatter      each has T/tp of them, the rank-th part:
                        x [T/tp,D] -> gather -> act(x W1) [T,F/tp] -> W2 -> reduce_scatter -> [T/tp,D]

Both send the same bytes, forward and backward; the second keeps 1/tp of each layer's input and output. In the first the
gradient of what all ranks have is each rank's part of it (moe_ext.parallel.collectives): that of the stack's input is
to be added up, as the backward of a gather does.
"""
from collections.abc import Callable
from typing import Literal, get_args

import torch.distributed as dist

from moe_ext import ops
from moe_ext.ops.enums import GATED
from moe_ext.parallel.collectives import all_reduce, gather, reduce_scatter

Form = Literal["all-reduce", "reduce-scatter"]


def shard(w1_LDF, w2_LFD, group=None, *, act="gelu"):
    """Whole matrices -> this rank's: w1 [L,D,F/tp] and w2 [L,F/tp,D]. With a gated act w1 is [gate | up] [L,D,2F], and
    the rank has columns of both. Errors: ValueError if the ranks do not divide F."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if w2_LFD.shape[1] % ranks:
        raise ValueError(f"mlp: {ranks} ranks share the {w2_LFD.shape[1]} rows of w2, which they do not divide: take "
                         "another tp or hidden width")
    halves = w1_LDF.unflatten(2, (2 if act in GATED else 1, ranks, -1))
    return halves[..., rank, :].flatten(2).contiguous(), w2_LFD.chunk(ranks, dim=1)[rank].contiguous()


def mlps(x_TD, w1_LDf, w2_LfD, group=None, *, act="gelu", form: Form = "all-reduce",
         mark: Callable = lambda x, title: x):
    """x [T,D] (reduce-scatter: [T/tp,D]) -> the last MLP's result, shaped like x. w1, w2: as `shard` gives them, or a
    list of layers. mark(x, title) -> x sees the parts of each layer: "gather", "inter", "activation", "output", "sum".
    Errors: ValueError for another form."""
    if form not in get_args(Form):
        raise ValueError(f"mlp: form is {form!r}, wanted one of {', '.join(get_args(Form))}")
    x, between = x_TD, form == "reduce-scatter"
    for w1_Df, w2_fD in zip(w1_LDf, w2_LfD, strict=True):       # under one name, so that nothing outlives its use
        if between:
            x = mark(gather(x, 0, group), "gather")
        x = mark(x @ w1_Df, "inter")
        x = mark(ops.activation(x, act), "activation")
        x = mark(x @ w2_fD, "output")
        x = mark(reduce_scatter(x, 0, group) if between else all_reduce(x, group), "sum")
    return x
