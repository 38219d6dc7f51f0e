"""A training step: the micro-batches through the pieces of the model and back, in the order of a schedule.

    pipeline = Pipeline(model, mesh, config.pipeline, micro_batch=4, micros=8)      # model: shard.build
    totals = pipeline.step(feed, 8, tokens=tokens_of_the_step, scale=scaler.scale)
    pipeline.close()

One stage alone is the ordinary case: forward and backward of one micro-batch after the other.
"""
from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch

from moe_ext.config import PipelineConfig
from moe_ext.model import GPT
from moe_ext.parallel.links import open_links
from moe_ext.parallel.schedule import SCHEDULES, Action
from moe_ext.parallel.shard import backward
from moe_ext.parallel.stages import Stage, moe_rows


class Totals(NamedTuple):
    """This rank's parts of a step's numbers, whose sums over all ranks (Mesh.sum) are the step's."""
    loss: torch.Tensor          # per token of the step
    aux: torch.Tensor
    balance: torch.Tensor
    counts_LE: torch.Tensor     # int32, of all MoE layers of the model
    dropped_L: torch.Tensor
    bad_L: torch.Tensor


class Pipeline:
    """micro_batch: sequences of a forward on this rank. micros: the most micro-batches that a step will have."""

    def __init__(self, model: GPT | Stage, mesh, config: PipelineConfig = PipelineConfig(), *, micro_batch: int,
                 micros: int):
        self.model, self.mesh, self.config, self.steps = model, mesh, config, 0
        self.pieces = list(model.pieces) if isinstance(model, Stage) else [model]
        self.schedule = SCHEDULES[config.schedule if mesh.config.pp > 1 else "1f1b"]
        self.links = None
        if mesh.config.pp > 1:
            c = model.config
            self.links = open_links(mesh, config.transport, chunks=len(self.pieces), micros=micros,
                                    shape=(micro_batch, c.seq_len // mesh.config.tp, c.dim),
                                    dtype=next(model.parameters()).dtype)

    def step(self, feed: Callable[[int], tuple], micros: int, *, tokens: int, scale: float = 1.0,
             around: Callable = lambda kind: nullcontext()) -> Totals:
        """feed(m): the arguments of GPT.forward for micro-batch m, as a tuple. tokens, scale: as for `backward`.
        around(kind): a context for each "forward" and "backward"."""
        c, mesh, live, left = self.model.config, self.mesh, {}, [micros] * len(self.pieces)
        device, E, L = mesh.device, c.moe.experts, c.moe_layers
        zero = torch.zeros((), device=device)
        totals = Totals(zero, zero, zero, torch.zeros(L, E, dtype=torch.int32, device=device),
                        *(torch.zeros(L, dtype=torch.int32, device=device) for _ in range(2)))
        self.steps += 1
        if self.links:
            self.links.begin(self.steps)
        for kind, chunk, micro in self.schedule.order(mesh.config.pp, len(self.pieces), micros, mesh.pp_rank):
            piece = self.pieces[chunk]
            if kind == "F":
                x = None if piece.first else self.links.take(Action("F", chunk, micro)).requires_grad_()
                with around("forward"):
                    out = piece(*feed(micro), x_BSD=x)
                live[chunk, micro] = x, out
                if not piece.last:
                    after = chunk + (mesh.pp_rank == mesh.config.pp - 1)
                    self.links.send(Action("F", after, micro), out.x_BSD.detach())
                continue
            x, out = live.pop((chunk, micro))
            dx = None if piece.last else self.links.take(Action("B", chunk, micro))
            left[chunk] -= 1
            with around("backward"):
                loss, aux = backward(piece, out, mesh, tokens=tokens, accumulation=micros, last=left[chunk] == 0,
                                     scale=scale, dx_BSD=dx)
            if not piece.first:
                self.links.send(Action("B", chunk - (mesh.pp_rank == 0), micro), x.grad)
            rows = moe_rows(piece)
            totals = totals._replace(loss=totals.loss + loss, aux=totals.aux + aux,
                                     balance=totals.balance + out.balance / (micros * mesh.config.stage))
            for total, part in zip(totals[3:], (out.counts_LE, out.dropped_L, out.bad_L), strict=True):
                if len(part):
                    total[rows] += part
        if self.links:
            self.links.end()
        return totals

    def close(self) -> None:
        """Frees the links; every rank calls it after its last step."""
        if self.links:
            self.links.close()
