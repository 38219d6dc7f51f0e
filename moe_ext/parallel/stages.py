"""A GPT cut into pieces, and those of one stage of a pipeline.

Stage p of pp has the pieces p, p + pp, .. of the pp * chunks, each a GPT of some of the blocks (moe_ext.model) under
the names that they have in the whole: checkpoints do not know of the cut.
"""
from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from moe_ext.config import Config, ModelConfig, require
from moe_ext.model import GPT, Losses
from moe_ext.ops.enums import GATED

TABLE = "embed_tokens.weight"       # if it is tied, the first and the last stage have it

# ---- the cut ---------------------------------------------------------------------------------------------------------
def cut(config: Config) -> list[range]:
    """-> the blocks of each of the mesh.pp * pipeline.chunks pieces, in order: pipeline.layers, or so that the
    costliest piece costs least (`costs`), then the costliest stage.

    ConfigError if there are more pieces than blocks, or if pipeline.layers is no cut of them.
    """
    pp, chunks, layers = config.mesh.pp, config.pipeline.chunks, config.model.layers
    pieces = pp * chunks
    fits = f"set pipeline.chunks to {layers // pp}" if pp <= layers else f"mesh.pp can be {layers} at most"
    require(pieces <= layers, f"mesh.pp {pp} * pipeline.chunks {chunks} cut the model into {pieces} pieces, and each "
            f"needs a block, but model.layers is {layers}: {fits}")
    ends = spread(config.model, pp, chunks)
    if given := config.pipeline.layers:
        counts = [int(n) for n in given.split(",")]
        by_cost = ",".join(str(end - begin) for begin, end in itertools.pairwise((0, *ends)))
        require(len(counts) == pieces and sum(counts) == layers and min(counts) > 0, f"pipeline.layers {given}: got "
                f"{len(counts)} pieces of {sum(counts)} blocks, wanted mesh.pp * pipeline.chunks = {pieces} pieces of "
                f"model.layers = {layers} blocks, none of them empty: as in {by_cost}, which \"\" stands for here")
        ends = tuple(sum(counts[:i + 1]) for i in range(pieces))
    return [range(begin, end) for begin, end in itertools.pairwise((0, *ends))]


def costs(c: ModelConfig) -> list[int]:
    """Of each block, in multiplications per token: its active weights, and attention to the keys that its window has
    (a sixth of what GPT.flops_per_token counts). The first one's with what the embedding does, which reads a row, the
    last one's with the head's."""
    width, matrices = c.heads * c.head_width, 3 if c.act in GATED else 2
    attention = 2 * c.dim * (width + c.kv_groups * c.head_width)
    dense = matrices * c.dim * c.hidden
    moe = matrices * c.dim * (c.moe.top_k * c.moe.hidden + c.moe.shared_hidden)
    moe += c.dim * (c.moe.experts + c.moe.shared_gate)
    result = [attention + 2 * min(c.window_of(layer) or c.seq_len, c.seq_len) * width
              + (moe if layer >= c.layers - c.moe_layers else dense) for layer in range(c.layers)]
    result[0] += c.dim
    result[-1] += c.vocab_size * c.dim
    return result


@functools.lru_cache(maxsize=256)
def spread(model: ModelConfig, pp: int, chunks: int) -> tuple[int, ...]:
    """The cut by cost: where each piece ends. Exact for the pieces; for stages of several, what `settled` finds."""
    pieces, layers = pp * chunks, model.layers
    before = [0]        # what all blocks up to one cost
    for cost in costs(model):
        before.append(before[-1] + cost)

    def best(join, most=math.inf):
        """The pieces' ends for which the costs, joined one after the other, are least; none costs more than `most`."""
        reach = [{0: (0, ())}]      # of so many pieces: {their last end: (joined, ends)}
        for i in range(pieces):
            reach.append({})
            for end in range(i + 1, layers - (pieces - i - 1) + 1):
                ways = []
                for begin in range(end - 1, i - 1, -1):
                    if (cost := before[end] - before[begin]) > most:
                        break
                    if begin in reach[i]:
                        joined, ends = reach[i][begin]
                        ways.append((join(joined, cost), (*ends, end)))
                if ways:
                    reach[-1][end] = min(ways)
        return reach[pieces][layers]

    most, _ = best(max)
    _, ends = best(lambda squares, cost: squares + cost * cost, most)       # as even as can be
    return settled(ends, before, pp, most)


def settled(ends: tuple[int, ...], before: list[int], pp: int, most: int) -> tuple[int, ...]:
    """The cut after handing blocks on, from one piece to another through all between, for as long as the costliest
    stage gets cheaper by that, or the stages more even, and no piece costs more than `most`."""
    n = len(ends)
    if n == pp:         # a piece is a stage: there is nothing left to gain
        return ends
    best, cost = np.array(ends), np.array(before, dtype=np.float64)
    shifts = np.array([[low <= i < high for i in range(n)] for low, high in itertools.combinations(range(n), 2)], int)
    hands = np.concatenate([by * shifts for by in (0, -1, 1, -2, 2)])
    while True:
        tried = (best + hands).clip(0, ends[-1])
        pieces = np.diff(cost[tried], prepend=0)
        tried = tried[((pieces > 0) & (pieces <= most)).all(1)]
        stages = np.diff(cost[tried], prepend=0).reshape(len(tried), -1, pp).sum(1)
        found = tried[np.lexsort(((stages**2).sum(1), stages.max(1)))[0]]
        if (found == best).all():
            return tuple(best.tolist())
        best = found


# ---- a stage ---------------------------------------------------------------------------------------------------------
class Stage(nn.Module):
    """This rank's pieces, in order; to optimizer, clipping, checkpoints and evaluation one model with the names of the
    whole. All ranks of the mesh make theirs."""

    def __init__(self, pieces: list[GPT], mesh):
        super().__init__()
        self.config, self.mesh, self.pieces, self.ends = pieces[0].config, mesh, nn.ModuleList(pieces), None
        if self.config.tied:
            self.ends = mesh.pipe.get_group("pp")
            if mesh.config.pp > 2:      # the first and the last stage, without those between
                last = mesh.world - mesh.config.stage
                pairs = [[rank, last + rank] for rank in range(mesh.config.stage)]
                self.ends, _ = dist.new_subgroups_by_enumeration(pairs, timeout=mesh.timeout)

    @torch.no_grad()
    def forward(self, tokens_BS, targets_BS, draws=None, token_mask=None, documents_BS=None,
                positions_BS=None, tape=None) -> Losses:
        """As GPT.forward, without a gradient: this stage's part of each loss, and rows of all MoE layers, 0 in those of
        others, so that the sum over the stages is the model's. All stages call, with the same arguments and in the
        same order; one that calls again, for the next micro-batch, computes while the others still have this one.
        """
        c, mesh, (B, S) = self.config, self.mesh, tokens_BS.shape
        group, pp = mesh.pipe.get_group("pp"), mesh.config.pp
        after, before = (dist.get_global_rank(group, (mesh.pp_rank + step) % pp) for step in (1, -1))
        rows, x_BSD, parts = no_rows(c, tokens_BS.device), None, []
        for piece in self.pieces:
            if not piece.first:
                x_BSD = torch.empty(B, S // mesh.config.sequence, c.dim, dtype=self.dtype, device=tokens_BS.device)
                dist.recv(x_BSD, before, group=group)
            out = piece(tokens_BS, targets_BS, draws, token_mask, documents_BS, positions_BS, tape, x_BSD)
            if not piece.last:
                dist.send(out.x_BSD, after, group=group)
            parts.append((out.token_loss, out.aux_loss, out.balance))
            add_rows(rows, moe_rows(piece), out)
        token_loss, aux_loss, balance = (sum(column) for column in zip(*parts, strict=True))
        return Losses(token_loss, aux_loss, *rows, balance)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, and of what the stages send each other."""
        return next(self.parameters()).dtype

    @property
    def lm_head(self):
        """None if it is another stage's."""
        return self.pieces[-1].lm_head

    @functools.cached_property
    def whole(self) -> GPT:
        """The model that the stages make up, on the meta device: names, shapes, counts."""
        return GPT(self.config, dtype=self.dtype, device="meta")

    @functools.cached_property
    def holders(self) -> dict[str, int]:
        """Of each parameter of the whole model, in its order: how many ranks have it, or a part of it."""
        stages = {TABLE: 2} if self.config.tied else {}
        return {name: self.mesh.config.stage * stages.get(name, 1) for name, _ in self.whole.named_parameters()}

    def num_parameters(self, moving: bool = False) -> tuple[int, int]:
        """Of the whole model."""
        return self.whole.num_parameters(moving)

    def flops_per_token(self) -> int:
        """Of the whole model."""
        return self.whole.flops_per_token()

    def named_parameters(self, *args, **options):
        for piece in self.pieces:
            yield from piece.named_parameters(*args, **options)

    def state_dict(self, **options):
        return {name: tensor for piece in self.pieces for name, tensor in piece.state_dict(**options).items()}

    def joined(self, own: dict) -> dict:
        """The dicts of all stages in one. All ranks call."""
        stages = [None] * self.mesh.config.pp
        dist.all_gather_object(stages, own, group=self.mesh.pipe.get_group("pp"))
        return {key: value for stage in stages for key, value in stage.items()}

    def moe_layers(self):
        """This stage's."""
        return [layer for piece in self.pieces for layer in piece.moe_layers()]

    @torch.no_grad()
    def update_select_bias(self, counts_LE):
        """As GPT.update_select_bias, with counts of all layers of the model."""
        for piece in self.pieces:
            piece.update_select_bias(counts_LE[moe_rows(piece)])


def no_rows(c: ModelConfig, device) -> list[torch.Tensor]:
    """counts_LE, dropped_L, bad_L of all MoE layers of the model, before any piece has added its own."""
    return [torch.zeros(c.moe_layers, *columns, dtype=torch.int32, device=device)
            for columns in ([c.moe.experts], [], [])]


def add_rows(rows, own: slice, out: Losses) -> None:
    """own: moe_rows of the piece that `out` comes from."""
    for row, part in zip(rows, (out.counts_LE, out.dropped_L, out.bad_L), strict=True):
        if len(part):
            row[own] += part


def moe_rows(piece: GPT) -> slice:
    """The place of a piece's MoE layers among those of the whole model."""
    before = min((block.layer for block in piece.layers), default=0) - piece.config.moe.dense_layers
    first = max(0, before)
    return slice(first, first + len(piece.moe_layers()))


def sum_tied(model: GPT | Stage, mesh) -> None:
    """After the last backward of a step: the gradient of a tied table, whose lookups the first stage has and whose
    products the last, is the sum of theirs on both, the same bits. All ranks call; nothing without stages."""
    if isinstance(model, Stage) and model.ends is not None and mesh.pp_rank in (0, mesh.config.pp - 1):
        grad = dict(model.named_parameters())[TABLE].grad
        if grad is None:        # frozen
            return
        dist.all_reduce(grad.to_local() if isinstance(grad, DTensor) else grad, group=model.ends)
