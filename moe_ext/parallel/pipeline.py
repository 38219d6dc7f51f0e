"""A training step: the micro-batches through the pieces of the model and back, in the order of a schedule.

    pipeline = Pipeline(model, mesh, config.pipeline, micro_batch=4, micros=8, folder=RUN)      # model: shard.build
    totals = pipeline.step(feed, 8, tokens=tokens_of_the_step, scale=scaler.scale)
    loss, aux, balance, counts_LE, dropped_L, bad_L = pipeline.sum(*totals)         # as Mesh.sum
    pipeline.close()

One loop runs every schedule (moe_ext.parallel.schedule). A static one says the next action, whose tensor is waited for.
For a dynamic one the ranks of a stage agree on one that is ready on all of them (moe_ext.parallel.links), so that their
collectives always pair. One stage alone is the ordinary case: forward and backward of one micro-batch after the other.

When the last backward of a piece is done, its gradients are whole at once: FSDP reduces them in that backward, what tp
replicates is summed after it.
"""
from __future__ import annotations

import functools
import sys
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd.graph import get_gradient_edge

from moe_ext.config import PipelineConfig
from moe_ext.model import GPT
from moe_ext.parallel import stages
from moe_ext.parallel.links import open_links
from moe_ext.parallel.record import KINDS, Recorder
from moe_ext.parallel.schedule import Action, Turns, tensor_id
from moe_ext.parallel.shard import accumulate
from moe_ext.parallel.stages import Stage, moe_rows
from moe_ext.parallel.tensor import sum_replicated


class Totals(NamedTuple):
    """This rank's parts of a step's numbers, whose sums over all ranks (Pipeline.sum) are the step's."""
    loss: torch.Tensor          # per token of the step
    aux: torch.Tensor
    balance: torch.Tensor
    counts_LE: torch.Tensor     # int32, of all MoE layers of the model
    dropped_L: torch.Tensor
    bad_L: torch.Tensor


class Pipeline:
    """micro_batch: sequences of a forward on this rank. micros: the most micro-batches that a step will have. folder:
    where trace.json goes, if config.trace asks for one; None: nowhere. delay: of the links, for tests. order: the
    actions of the last step, as they were run."""

    def __init__(self, model: GPT | Stage, mesh, config: PipelineConfig = PipelineConfig(), *, micro_batch: int,
                 micros: int, folder: Path | None = None, delay: Callable | None = None):
        self.model, self.mesh, self.config, self.folder, self.steps = model, mesh, config, folder, 0
        self.pieces = list(model.pieces) if isinstance(model, Stage) else [model]
        self.rows = [moe_rows(piece) for piece in self.pieces]
        self.pp, self.vpp, self.order = mesh.config.pp, len(self.pieces), []
        self.links = self.recorder = None
        if self.pp > 1:
            c = model.config
            self.links = open_links(mesh, config.transport, chunks=self.vpp, micros=micros,
                                    shape=(micro_batch, c.seq_len // mesh.config.tp, c.dim),
                                    dtype=next(model.parameters()).dtype, delay=delay)
            self.recorder = Recorder(mesh) if config.trace else None

    def step(self, feed: Callable[[int], tuple], micros: int, *, tokens: int, scale: float = 1.0,
             around: Callable = lambda kind: nullcontext()) -> Totals:
        """feed(m): the arguments of GPT.forward for micro-batch m, as a tuple, asked for once. tokens, scale: as for
        `shard.backward`. around(kind): a context for each "forward" and "backward"."""
        c, mesh, links = self.model.config, self.mesh, self.links
        turns = Turns(self.config.schedule if self.pp > 1 else "1f1b", self.pp, self.vpp, micros, mesh.pp_rank,
                      self.config.live)
        zero = torch.zeros((), device=mesh.device)
        totals = Totals(zero, zero, zero, *(torch.zeros(c.moe_layers, *columns, dtype=torch.int32, device=mesh.device)
                                            for columns in ([c.moe.experts], [], [])))
        fed, live, left = {}, {}, [micros] * self.vpp
        self.order, self.steps = [], self.steps + 1
        span = functools.partial(self.recorder.span, self.steps) if self.traced else lambda *_: nullcontext()
        if links:
            links.begin(self.steps)
        while turns.left:
            with span("wait") as wait:
                action = links.agree(turns.choose) if turns.dynamic else turns.choose(lambda action: True)
                x = None if turns.own(action) else links.take(action)
                if wait:
                    wait.action = action
            turns.ran(action)
            self.order.append(action)
            self.say(action, "start")
            kind, chunk, micro = action
            piece, passed, whole = self.pieces[chunk], None, False
            if kind == "F":
                arguments = fed.pop(micro) if chunk else feed(micro)
                if chunk < self.vpp - 1:
                    fed[micro] = arguments
                if x is not None:
                    x.requires_grad_()
                with span("forward", action), around("forward"):
                    out = piece(*arguments, x_BSD=x)
                for total, part in zip(totals[3:], (out.counts_LE, out.dropped_L, out.bad_L), strict=True):
                    if len(part):
                        total[self.rows[chunk]] += part
                totals = totals._replace(balance=totals.balance + out.balance / (micros * mesh.config.stage))
                if not piece.last:      # of what is sent on, only what the backward needs stays here
                    passed, out = out.x_BSD.detach(), out._replace(x_BSD=get_gradient_edge(out.x_BSD))
                live[chunk, micro] = x, out
            else:
                left[chunk] -= 1
                (x, out), dx, whole = live.pop((chunk, micro)), x, left[chunk] == 0
                with span("backward", action), around("backward"):
                    loss, aux = accumulate(piece, out, mesh, tokens=tokens, accumulation=micros, last=whole,
                                           scale=scale, dx_BSD=dx)
                totals = totals._replace(loss=totals.loss + loss, aux=totals.aux + aux)
                passed = None if piece.first else x.grad
            self.say(action, "finished")
            if passed is not None:
                to = self.taker(action)
                with span("send", to):
                    links.send(to, passed)
            if whole:
                with span("sync", action):
                    sum_replicated(piece, mesh)
        if links:
            links.end()
            if c.tied:
                with span("sync"):
                    stages.sum_tied(self.model, mesh)
            if self.traced and self.steps == 1 + self.config.trace and self.folder:
                self.recorder.write(self.folder / "trace.json")
        return totals

    @property
    def traced(self) -> bool:
        """Whether this step goes to the trace."""
        return self.recorder is not None and 1 < self.steps <= 1 + self.config.trace

    def taker(self, action: Action) -> Action:
        """The action of another stage that takes what this one makes."""
        kind, chunk, micro = action
        if kind == "F":
            return Action("F", chunk + (self.mesh.pp_rank == self.pp - 1), micro)
        return Action("B", chunk - (self.mesh.pp_rank == 0), micro)

    def say(self, action: Action, what: str) -> None:
        """A line of config.lines."""
        if self.config.lines and self.links:
            sys.stdout.write(f"rank {self.mesh.rank} {KINDS[action.kind]} {what} tensor "
                             f"{tensor_id(action, self.pp, self.vpp)}\n")      # one write: ranks share the console
            sys.stdout.flush()

    def sum(self, *numbers: torch.Tensor) -> list[torch.Tensor]:
        """Mesh.sum, in which the ranks of each stage compare the order of their last step too. Errors: RuntimeError if
        they ran it in different orders, on all ranks."""
        if self.pp == 1:
            return self.mesh.sum(*numbers)
        digest = zlib.crc32(repr(self.order).encode()) & 0xFFFFF    # so that sums of squares are exact in fp64
        own_P2 = torch.zeros(self.pp, 2, dtype=torch.float64, device=self.mesh.device)
        own_P2[self.mesh.pp_rank] = torch.tensor([digest, digest ** 2])
        *numbers, orders_P2 = self.mesh.sum(*numbers, own_P2)
        ranks = self.mesh.config.stage
        for stage, (total, squares) in enumerate(orders_P2.tolist()):
            if int(total) ** 2 != ranks * int(squares):     # equal only if all digests are
                raise RuntimeError(f"the {ranks} ranks of pipeline stage {stage} (ranks {stage * ranks} to "
                                   f"{(stage + 1) * ranks - 1}) ran step {self.steps} in different orders: their "
                                   "collectives did not pair, so its gradients are wrong")
        return numbers

    def close(self) -> None:
        """Frees the links; every rank calls it after its last step."""
        if self.links:
            if self.folder and 1 < self.steps <= self.config.trace:     # fewer than were asked for
                self.recorder.write(self.folder / "trace.json")
            self.links.close()
