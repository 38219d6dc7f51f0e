"""Bytes that a rank sends over each axis of its mesh."""
from __future__ import annotations

from moe_ext.config import Config
from moe_ext.plan.optimizer import optimizer_traffic
from moe_ext.plan.shares import (
    axes,
    blocks,
    boxes,
    ends,
    makes,
    message,
    rows_per_token,
    sent_columns,
    stages,
    tokens,
    widths,
)


def traffic(config: Config, stage: int | None = None) -> dict[str, int]:
    """Bytes that one rank of a stage, None: of the one that sends most, sends over each axis per optimizer step, in its
    forwards, backwards, sum_replicated and the optimizer's step.

    Of n ranks each sends (n-1) * b in an all-gather of pieces of b bytes, or a reduce-scatter into them, and
    2 (n-1)/n * b in an all-reduce of b bytes, as in a ring. Tokens choose experts uniformly and none is dropped. "fsdp"
    are the fsdp * sp ranks that share the parameters. "sequence", the sp * tp ranks that share one, carries the
    statistics of that scope; "dp" and "world", of a pipeline those of a stage, with it those of the scope micro_batch.
    "optimizer" is what goes to the owners of matrices and back, of the rank that sends most of it. Not counted: the
    step's sums of loss, counts and norm, and the owners' of who has a gradient.
    """
    if stage is None:
        return max((traffic(config, stage) for stage in makes(config)), key=lambda sent: sum(sent.values()))
    c, m, t, mesh, part = config.model, config.model.moe, config.train, config.mesh, stages(config)[stage]
    real, half = widths(config)
    ranks = axes(mesh)
    sent = dict.fromkeys(ranks, 0)

    def pieces(axis, size, times):          # all-gather, reduce-scatter
        sent[axis] += times * (ranks[axis] - 1) * size

    def total(axis, size, times):           # all-reduce
        sent[axis] += times * 2 * (ranks[axis] - 1) * size // ranks[axis]

    micro = t.accumulation
    for box in boxes(config, part):
        size = box.count * box.stored
        gathers = 2 if box.block else 1             # for forward and backward; the root keeps what no block has
        pieces(box.fsdp, size * (half if box.fsdp == "efsdp" else real), micro * gathers)
        if box.moves:
            pieces(box.fsdp, size * real, micro)                                    # gradients
            total("rep", size * real, 1)
            if box.partial:
                total(box.partial, size * real, 1)

    # Recomputation repeats a block's forward up to the last tensor that the backward reads: without its last
    # reduce-scatter, which a shared expert's gate reads, and without combine unless the shared expert comes after it.
    (T, inside), B, again = tokens(config), t.micro_batch, int(t.recompute)
    x, layers, (first, last) = T * c.dim * half, blocks(c, part), ends(c, part)
    sparse = sum(count for (sparse, _), count in layers.items() if sparse)
    sent["pp"] = micro * (2 * len(part) - first - last) * T * c.dim * real          # activations, their gradients
    if c.tied and first != last:                                                    # the sum of the tables' gradients
        sent["pp"] += next(box.stored for box in boxes(config, part) if box.name == "embed_tokens.weight") * real
    pieces("tp", T * c.dim * real, 2 * micro * first)                               # embedding
    pieces("tp", x, micro * layers.total() * (4 + 2 * again))                       # attention: in and out, twice
    if c.qk_norm and c.qk_norm_over == "width":                                     # sums of squares of q and k
        pieces("tp", inside * real, micro * layers.total() * 2 * (2 + again))
    pieces("sp", inside * sum(sent_columns(config)) * half // mesh.sp, micro * layers.total() * (2 + again))
    pieces("tp", x, micro * (layers.total() - sparse) * (4 + again))                # dense MLP
    pieces("tp", 2 * x + 2 * inside * real, micro * last)                           # head; every token's loss, logit
    if sparse:
        backwards, forwards = micro * sparse, micro * sparse * (1 + again)
        combines = forwards if m.shared_hidden else backwards
        ids, weights, values = 4 * m.top_k, real * m.top_k, c.dim * half
        if m.shared_hidden:
            pieces("tp", x, backwards * (4 + again * (1 + m.shared_gate)))
        pieces("etp", x + T * (ids + weights), forwards)                            # dispatch
        pieces("etp", x, combines + backwards)                                      # combine and its backward
        pieces("etp", x + T * weights, backwards)                                   # backward of dispatch
        rows = T * mesh.etp * rows_per_token(m.experts, m.top_k, mesh.ep) * (mesh.ep - 1) / mesh.ep     # to other ranks
        sent["ep"] += round(rows * (message(values, ids, weights) * forwards + values * (combines + backwards)
                                    + message(values, weights) * backwards))
        pieces("ep", mesh.ep * 2 * 4, forwards)                                     # counts of rows and copies, int32

        whole = m.scope == "micro_batch"
        if m.balance_weight:                                                        # scores and counts, int32
            total("world" if whole else "sequence", (1 if whole else B) * m.experts * (real + 4), forwards)
        if m.capacity_factor:                                                       # ids, and scores where they decide
            scores = real * m.top_k if m.drop_by == "probability" else 0
            pieces("sequence", T * (ids + scores), forwards)
            pieces("dp", T * mesh.sequence * (ids + scores), forwards if whole else 0)
    return sent | optimizer_traffic(config, stage)
