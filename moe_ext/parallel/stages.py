"""A GPT cut into pieces, and those of one stage of a pipeline.

Stage p of pp has the pieces p, p + pp, .. of the pp * vpp, each a GPT of some of the blocks (moe_ext.model) under the
names that they have in the whole, so that nothing but `Stage` knows of the cut: checkpoints of any pipeline are the same.
"""
from __future__ import annotations

import torch
from torch import nn

from moe_ext.config import Config
from moe_ext.model import GPT


def cut(config: Config) -> list[range]:
    """-> the blocks of each of the mesh.pp * pipeline.chunks pieces, in order."""
    pieces, layers = config.mesh.pp * config.pipeline.chunks, config.model.layers
    counts = [int(n) for n in config.pipeline.layers.split(",")] if config.pipeline.layers else [
        layers // pieces + (i < layers % pieces) for i in range(pieces)]
    ends = [sum(counts[:i + 1]) for i in range(pieces)]
    return [range(end - n, end) for n, end in zip(counts, ends, strict=True)]


class Stage(nn.Module):
    """This rank's pieces, in order; to optimizer, clipping and checkpoints one model with the names of the whole."""

    def __init__(self, pieces: list[GPT], mesh):
        super().__init__()
        self.config, self.mesh, self.pieces = pieces[0].config, mesh, nn.ModuleList(pieces)

    def named_parameters(self, *args, **options):
        for piece in self.pieces:
            yield from piece.named_parameters(*args, **options)

    def state_dict(self, **options):
        return {name: tensor for piece in self.pieces for name, tensor in piece.state_dict(**options).items()}

    def moe_layers(self):
        return [layer for piece in self.pieces for layer in piece.moe_layers()]

    @torch.no_grad()
    def update_select_bias(self, counts_LE):
        """As GPT.update_select_bias, with counts of all layers of the model."""
        for piece in self.pieces:
            piece.update_select_bias(counts_LE[moe_rows(piece)])


def moe_rows(piece: GPT) -> slice:
    """The place of a piece's MoE layers among those of the whole model."""
    before = min((block.layer for block in piece.layers), default=0) - piece.config.moe.dense_layers
    first = max(0, before)
    return slice(first, first + len(piece.moe_layers()))
