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
from moe_ext.parallel.links import open_links
from moe_ext.parallel.record import Recorder
from moe_ext.parallel.schedule import Action, Turns, following, tensor_id
from moe_ext.parallel.shard import accumulate
from moe_ext.parallel.stages import Stage, add_rows, moe_rows, no_rows, sum_tied
from moe_ext.parallel.tensor import sum_replicated

WORDS = {"F": "forward", "B": "backward"}


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

    def __init__(self, model: GPT | Stage, mesh, config: PipelineConfig | None = None, *, micro_batch: int,
                 micros: int, folder: Path | None = None, delay: Callable | None = None):
        self.model, self.mesh, self.config, self.folder = model, mesh, config or PipelineConfig(), folder
        self.pieces = list(model.pieces) if isinstance(model, Stage) else [model]
        self.rows = [moe_rows(piece) for piece in self.pieces]
        self.pp, self.vpp, self.steps, self.order = mesh.config.pp, len(self.pieces), 0, []
        self.links = self.recorder = None
        if self.pp > 1:
            c = model.config
            self.links = open_links(mesh, self.config.transport, chunks=self.vpp, micros=micros,
                                    shape=(micro_batch, c.seq_len // mesh.config.sequence, c.dim),
                                    dtype=next(model.parameters()).dtype, delay=delay)
            self.recorder = Recorder(mesh) if self.config.trace else None

    def step(self, feed: Callable[[int], tuple], micros: int, *, tokens: int, scale: float = 1.0,
             around: Callable = lambda kind: nullcontext()) -> Totals:
        """feed(m): the arguments of GPT.forward for micro-batch m, as a tuple, asked for once. tokens, scale: as for
        `shard.accumulate`. around(kind): a context for each "forward" and "backward". No parameter has a gradient yet:
        what is summed over ranks when the step ends would be summed again."""
        name, live = (self.config.schedule, self.config.live) if self.pp > 1 else ("1f1b", 0)
        turns = Turns(name, self.pp, self.vpp, micros, self.mesh.pp_rank, live)
        step, links = Step(self, feed, micros, tokens, scale), self.links
        self.order, self.steps = [], self.steps + 1
        span = functools.partial(self.recorder.span, self.steps) if self.traced else lambda *_: nullcontext()
        if links:
            links.begin(self.steps)
        while turns.left:
            with span("wait") as wait:
                action = links.agree(turns.choose) if turns.dynamic else turns.choose(lambda action: True)
                received = links.take(action) if turns.takes(action) else None
                if wait:
                    wait.action = action
            turns.ran(action)
            self.order.append(action)
            step.prepare(action)
            self.say(action, "start")
            word = WORDS[action.kind]
            with span(word, action), around(word):
                passed = step.forward(action, received) if action.kind == "F" else step.backward(action, received)
            self.say(action, "finished")
            if passed is not None:
                _, to = following(action, self.mesh.pp_rank, self.pp, self.vpp)
                with span("send", to):
                    links.send(to, passed)
                del passed
            if step.whole(action):
                with span("sync", action):
                    sum_replicated(self.pieces[action.chunk], self.mesh)
        if links:
            links.end()
            with span("sync"):
                sum_tied(self.model, self.mesh)
            if self.folder and self.traced and self.steps == 1 + self.config.trace:
                self.recorder.write(self.folder / "trace.json")
        return step.totals

    @property
    def traced(self) -> bool:
        """Whether this step goes to the trace."""
        return self.recorder is not None and 1 < self.steps <= 1 + self.config.trace

    def say(self, action: Action, what: str) -> None:
        """A line of config.lines."""
        if self.config.lines and self.links:
            sys.stdout.write(f"rank {self.mesh.rank} {WORDS[action.kind]} {what} tensor "
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
            if self.folder and 1 < self.steps <= self.config.trace and not self.links.inside:
                self.recorder.write(self.folder / "trace.json")     # of fewer steps than were asked for
            self.links.close()


class Step:
    """What a stage holds during a step: inputs of micro-batches that have chunks before them, and of each (chunk,
    micro-batch) between forward and backward what it received and the losses. What was sent on is here no longer, but
    where autograd has it."""

    def __init__(self, pipeline: Pipeline, feed, micros: int, tokens: int, scale: float):
        self.pieces, self.rows, self.mesh = pipeline.pieces, pipeline.rows, pipeline.mesh
        self.feed, self.micros, self.tokens, self.scale = feed, micros, tokens, scale
        self.fed, self.live, self.left = {}, {}, [micros] * len(self.pieces)
        c, device = pipeline.model.config, self.mesh.device
        zero = torch.zeros((), device=device)
        self.totals = Totals(zero, zero, zero, *no_rows(c, device))

    def prepare(self, action: Action) -> None:
        """Before an action: reads the micro-batch, if it is new here."""
        if action.kind == "F" and action.chunk == 0:
            self.fed[action.micro] = self.feed(action.micro)

    def forward(self, action: Action, x_BSD):
        """-> what the next piece begins with, None after the last."""
        _, chunk, micro = action
        piece, last_here = self.pieces[chunk], chunk == len(self.pieces) - 1
        arguments = self.fed.pop(micro) if last_here else self.fed[micro]
        out = piece(*arguments, x_BSD=None if x_BSD is None else x_BSD.requires_grad_())
        add_rows(self.totals[3:], self.rows[chunk], out)
        self.add(balance=out.balance / (self.micros * self.mesh.config.stage))
        passed = None
        if not piece.last:
            edge = get_gradient_edge(out.x_BSD) if out.x_BSD.requires_grad else None    # of frozen beginnings: none
            passed, out = out.x_BSD.detach(), out._replace(x_BSD=edge)
        self.live[chunk, micro] = x_BSD, out
        return passed

    def backward(self, action: Action, dx_BSD):
        """dx_BSD: None in the last piece -> that of the piece before, None in the first."""
        _, chunk, micro = action
        x_BSD, out = self.live.pop((chunk, micro))
        self.left[chunk] -= 1
        loss, aux = accumulate(self.pieces[chunk], out, self.mesh, tokens=self.tokens, accumulation=self.micros,
                               last=self.whole(action), scale=self.scale, dx_BSD=dx_BSD)
        self.add(loss=loss, aux=aux)
        return None if x_BSD is None else x_BSD.grad

    def whole(self, action: Action) -> bool:
        """Whether `action` was the last backward of its piece."""
        return action.kind == "B" and self.left[action.chunk] == 0

    def add(self, **parts) -> None:
        self.totals = self.totals._replace(**{name: getattr(self.totals, name) + part for name, part in parts.items()})
