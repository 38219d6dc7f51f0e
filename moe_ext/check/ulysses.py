"""Attention over one long sequence that all ranks share, then a stack of MLPs on its tokens, forward and backward: what
`python -m moe_ext.plan ulysses` plans, run.

    torchrun --standalone --nproc-per-node 4 -m moe_ext.check ulysses --tokens 16384 --dim 64 --heads 8 --tp 2

(--tokens is --n, which torchrun takes for an option of its own before Python 3.12.)

It prints the plan's lines, and beside each step what was measured: the bytes that tensors held at its end and at most
(moe_ext.check.live), FLOP/s, and bytes/s of each collective. Then it compares results and gradients with those of one
process, in plain torch on rank 0: in fp64 they differ by at most 1e-12 of a tensor's maximum; in fp32 and bf16 the
ranks are at most twice as far from fp64 as one process in that dtype. With more than --alone tokens it leaves that out,
and says so. The exit status is 0 only if all that was compared is equal and the memory is within 5 % of the plan; that
of attention is left out where this CPU computes it in float32 (bf16 without AVX-512).

The program runs twice: once to measure memory, then, warmed up, for time; there the ranks wait for each other between
the steps, so that none is charged with another's delay; the slowest counts. Weights are random, as are the gradients
that come in. Those of the weights are each rank's part of them; they are added up for the comparison only.
"""
from __future__ import annotations

import json
import time
import zlib
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch.distributed.device_mesh import init_device_mesh

from moe_ext.attention import attend, computed_in
from moe_ext.check.live import Live
from moe_ext.check.world import DTYPES, Command, World
from moe_ext.config import Sharing, divisors, nearest, require
from moe_ext.ops.define import Function
from moe_ext.parallel.collectives import gather, gather_rows
from moe_ext.parallel.mlp import Form, mlps
from moe_ext.parallel.sequence import FORMS
from moe_ext.plan.ulysses import Measured, Sizes, Step, lines, steps

ATTENTION = "d input", "d Q", "d K", "d V", "d O"       # its gradients
NEAR = 0.05         # of the planned bytes


@dataclass(frozen=True)
class Long(Command):
    """Attention over a long sequence and a stack of MLPs, shared by all ranks, beside the plan and one process."""

    n: Annotated[int, tyro.conf.arg(aliases=["--tokens"])] = 4096  # tokens of the sequence
    dim: int = 64  # of the model: heads of dim / heads columns
    heads: int = 8
    kv_heads: int = 0  # of keys and values; 0: as many as heads
    hidden: int = 256  # of an MLP
    layers: int = 3  # MLPs, one after the other
    tp: int = 0  # ranks that share an MLP's weights; 0: all
    attention: Sharing = "ulysses"  # exchange heads for tokens; or gather keys and values
    mlp: Form = "all-reduce"  # of what the ranks of a group add up; or reduce-scatter
    backward: bool = True  # of attention
    mlp_backward: bool = True  # of the MLPs
    dtype: Literal["bf16", "fp32", "fp64"] = "fp32"
    alone: int = 16384  # compare with one process if there are no more tokens than that
    seconds: float = 600.0  # longest wait for another rank

    def sizes(self, ranks: int) -> Sizes:
        """ConfigError for what so many ranks cannot share."""
        tp = self.tp or ranks
        require(tp > 0 and ranks % tp == 0, f"--tp {tp} does not divide the {ranks} ranks: the nearest that does is "
                f"{nearest(tp, divisors(ranks))}")
        own = {f.name: getattr(self, f.name) for f in fields(Sizes) if hasattr(self, f.name)}
        return Sizes(**own | dict(tp=tp, dp=ranks // tp))

    def run(self, world: World) -> bool:
        sizes = self.sizes(world.size)
        planned = steps(sizes)
        with world.joined():
            program, compared = Program(sizes, world.device), self.n <= self.alone
            with Live(world.device) as live:
                memory = Memory(live)
                program.run(memory, keep=False)
            clock = Clock(world.device)
            results = program.run(clock, keep=compared)
            measured = measurements(world, memory, clock)
            world.say("\n".join(lines(sizes, planned, [measured[step.phase, step.name] for step in planned])))
            fine = as_planned(world, program.dtype, planned, measured)
            if compared:
                return equal(world, program, results) and fine
            world.say(f"not compared with one process: {self.n} tokens are more than --alone {self.alone}")
            return fine


# ---- the program -----------------------------------------------------------------------------------------------------
class Program:
    """x [N,D] -> attention -> output -> MLPs -> y, and back: from a gradient of y to x's and W's of the MLPs, from one
    of the output to those of attention. Its weights and gradients are drawn piece by piece, the same wherever one is
    wanted."""

    def __init__(self, sizes: Sizes, device):
        self.sizes, self.device, self.dtype = sizes, device, DTYPES[sizes.dtype]
        self.tp = init_device_mesh(device.type, (sizes.dp, sizes.tp), mesh_dim_names=("dp", "tp")).get_group("tp")
        self.rank, self.tp_rank = dist.get_rank(), dist.get_rank(self.tp)
        self.across = FORMS[sizes.attention]()

    def draw(self, name: str, pieces: range, shape: tuple[int, ...], std=1.0):
        """[len(pieces) * rows, columns]"""
        x = torch.empty(len(pieces), *shape, dtype=self.dtype, device=self.device)
        for piece, x_piece in zip(pieces, x, strict=True):
            seed = zlib.crc32(f"{name} {piece}".encode())
            x_piece.normal_(std=std, generator=torch.Generator(self.device).manual_seed(seed))
        return x.flatten(0, 1)

    def tokens(self, name: str, ranks: range):
        """[n * len(ranks), D], those of some ranks."""
        return self.draw(name, ranks, (self.sizes.n // self.sizes.ranks, self.sizes.dim))

    def attention_weights(self) -> list:
        """Q [D,D], K, V [D,G d], O [D,D]: scores are far enough from equal that it matters who sees whom."""
        s, one = self.sizes, range(1)
        return [self.draw(name, one, (s.dim, columns), std / s.dim ** 0.5) for name, columns, std in
                (("Q", s.dim, 2), ("K", s.kv * s.head, 2), ("V", s.kv * s.head, 1), ("O", s.dim, 1))]

    def mlp_weights(self, pieces: range):
        """W1 L x [D,F/tp], W2 L x [F/tp,D] of some tp rank: no layer changes the scale by much."""
        s = self.sizes
        f = s.hidden // s.tp
        kinds = ("W1", (s.dim, f), s.dim ** -0.5), ("W2", (f, s.dim), 1.5 * s.hidden ** -0.5)
        return [[self.draw(f"{name} {layer}", pieces, shape, std) for layer in range(s.layers)]
                for name, shape, std in kinds]

    def run(self, meter: Meter, keep: bool) -> tuple[dict, dict]:
        """-> results and gradients of attention and of the MLPs, on this rank. If they are not to be kept, those of
        attention are gone when the MLPs begin."""
        output, attention = self.attention(meter, keep)
        return attention, self.mlps(meter, output)

    def attention(self, meter: Meter, keep: bool):
        meter.phase = "attention"
        leaves = [self.tokens("x", range(self.rank, self.rank + 1)), *self.attention_weights()]
        x, Q, K, V, O = (leaf.requires_grad_(self.sizes.backward) for leaf in leaves)
        meter("input")
        q, k, v = meter.mark("qkv", *((x @ W).view(len(x), -1, self.sizes.head).transpose(0, 1)[None]
                                      for W in (Q, K, V)))

        def core(*qkv):
            (q, k, v), seen = meter.mark("exchange", *qkv[:3]), qkv[3:]
            return meter.mark("attend", attend(q, k, v, *seen))

        c = self.across(core, q, k, v)
        del q, k, v
        if self.sizes.attention == "ulysses":
            c = meter.mark("back", c)
        output = meter.mark("output", c.transpose(1, 2).flatten(2).squeeze(0) @ O)
        del c
        told = {"output": output.detach()}
        if self.sizes.backward:
            meter.phase = "backward"
            dy = self.tokens("d output", range(self.rank, self.rank + 1))
            gradients = torch.autograd.grad(output, (x, Q, K, V, O), dy)
            meter("qkv")
            if keep:
                told |= zip(ATTENTION, gradients, strict=True)
        return output.detach(), told

    def mlps(self, meter: Meter, output):
        """Each rank backpropagates its tp-th part of the loss of what all ranks of its group have."""
        meter.phase, backward = "MLP", self.sizes.mlp_backward
        output = output.requires_grad_(backward)
        w1, w2 = self.mlp_weights(range(self.tp_rank, self.tp_rank + 1))
        leaves = [leaf.requires_grad_(backward) for leaf in (output, *w1, *w2)]
        meter.begin()
        x, ranks = output, range(self.rank, self.rank + 1)
        if self.sizes.mlp == "all-reduce":
            first = self.rank - self.tp_rank
            x, ranks = gather(output, 0, self.tp), range(first, first + self.sizes.tp)
        x = meter.mark("input", x)
        y = mlps(x, w1, w2, self.tp, form=self.sizes.mlp, mark=lambda x, name: meter.mark(name, x))
        told = {"y": y.detach()}
        if backward:
            meter.phase = "MLP backward"
            dy = self.tokens("d y", ranks)
            if self.sizes.mlp == "all-reduce":
                dy /= self.sizes.tp
            told["d output"], *gradients = torch.autograd.grad(y, leaves, dy)
            meter("input")
            told |= {"d W1": gradients[:len(w1)], "d W2": gradients[len(w1):]}
        return told

    def whole(self, attention: dict, mlps: dict) -> dict[str, torch.Tensor]:
        """Results and gradients of all ranks, put together: tokens side by side, the parts of gradients added up."""
        s, told = self.sizes, {}
        for name, mine in (attention | mlps).items():
            if name in ("d W1", "d W2"):
                parts = gather_rows(torch.stack(mine).double()[None], 0, None).unflatten(0, (s.dp, s.tp)).sum(0)
                told[name] = torch.cat(list(parts), 2 if name == "d W1" else 1)
            elif name in ATTENTION[1:]:
                told[name] = gather_rows(mine.double()[None], 0, None).sum(0)
            else:
                if name == "y" and s.mlp == "all-reduce":
                    mine = mine.chunk(s.tp)[self.tp_rank]
                told[name] = gather_rows(mine, 0, None)
        return told


# ---- what is measured ------------------------------------------------------------------------------------------------
class Meter:
    """Reads something wherever the program passes from one step to the next, forward and, through `mark`, backward.
    Steps have a phase and a name; those of all layers are read under one."""

    phase = ""

    def __init__(self):
        self.read, self.after = {}, []      # `after`: the name of the step after the last mark, once there is one

    def begin(self) -> None:
        """What was since the last step does not count."""

    def __call__(self, name: str) -> None:
        """The end of a step."""

    def mark(self, name: str, *tensors):
        """The end of a step, from which these go on: -> the same. Once gradients of all of them have come, the backward
        of the step after it is over."""
        self.after.append(name)
        self.after = after = []
        marked = _Mark.apply(self, name, after, *tensors)
        return marked if len(marked) > 1 else marked[0]


class _Mark(Function):
    @staticmethod
    def forward(ctx, meter, name, after, *tensors):
        ctx.meter, ctx.after = meter, after
        meter(name)
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        if ctx.after:
            ctx.meter(*ctx.after)
        else:
            ctx.meter.begin()
        return None, None, None, *gradients


class Memory(Meter):
    """Bytes held at the end of a step and at most in it."""

    def __init__(self, live: Live):
        super().__init__()
        self.live = live

    def begin(self):
        self.live.restart()

    def __call__(self, name):
        _, most = self.read.get((self.phase, name), (0, 0))
        self.read[self.phase, name] = self.live.now, max(most, self.live.most)
        self.begin()


class Clock(Meter):
    """Seconds of a step."""

    def __init__(self, device):
        super().__init__()
        self.device = device
        self.begin()

    def __call__(self, name):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        key = self.phase, name
        self.read[key] = self.read.get(key, 0.0) + time.perf_counter() - self.since
        self.begin()

    def begin(self):
        dist.barrier()
        self.since = time.perf_counter()


def measurements(world: World, memory: Memory, clock: Clock) -> dict[tuple[str, str], Measured]:
    """Of each step what the rank has seen that held most, or took longest."""
    mine = [(*memory.read[key], clock.read[key]) for key in memory.read]
    ranks = [json.loads(text) for text in world.gather(json.dumps(mine))]
    steps = zip(*ranks, strict=True)
    return {key: Measured(*map(max, zip(*step, strict=True))) for key, step in zip(memory.read, steps, strict=True)}


def as_planned(world: World, dtype, planned: list[Step], measured: dict[tuple[str, str], Measured]) -> bool:
    """Says which steps held more or less than 5 % off the plan, which knows no copies of what attention takes."""
    if computed_in(world.device.type, dtype) != dtype:
        planned = [step for step in planned if step.phase.startswith("MLP")]
        world.say("memory: this CPU's attention is computed in float32; the steps of attention are not compared")
    steps = [(step, measured[step.phase, step.name]) for step in planned]
    pairs = [(step, what, got, want) for step, m in steps
             for what, got, want in (("at its end", m.held, step.held), ("at most", m.most, step.most))]
    off = [(step, what, got, want) for step, what, got, want in pairs if abs(got - want) > NEAR * want]
    for step, what, got, want in off:
        world.say(f"memory of {step.phase}, {step.name}, {what}: {got:,} bytes, planned {want:,}: WRONG")
    if not off:
        worst = max(abs(got / want - 1) for *_, got, want in pairs)
        world.say(f"memory: within {worst:.2%} of the plan: ok")
    return not off


# ---- one process -----------------------------------------------------------------------------------------------------
def equal(world: World, program: Program, results: tuple[dict, dict]) -> bool:
    """Says of every result and gradient how far it is from one process's."""
    whole = program.whole(*results)
    fine = True
    if world.rank == 0:
        exact = alone(program, torch.float64)
        narrow = exact if program.dtype == torch.float64 else alone(program, program.dtype)
        for name, want in exact.items():
            scale = want.abs().max() or 1.0     # of one token alone, d Q and d K are nothing
            error, own = (float((got.double() - want).abs().max() / scale) for got in (whole[name], narrow[name]))
            limit = 1e-12 if program.dtype == torch.float64 else 2 * own + torch.finfo(program.dtype).eps
            right = error <= limit
            fine &= right
            world.say(f"{name:8}  differs from one process in fp64 by {error:.1e} of its maximum, at most {limit:.1e} "
                      "is right: " + ("ok" if right else "WRONG"))
    return world.gather(str(fine))[0] == "True"


def alone(program: Program, dtype) -> dict[str, torch.Tensor]:
    """All of it in plain torch."""
    s, every = program.sizes, range(program.sizes.ranks)

    def rows(name):
        return program.tokens(name, every).to(dtype)

    x, weights = rows("x"), [W.to(dtype) for W in program.attention_weights()]
    shards = [program.mlp_weights(range(piece, piece + 1)) for piece in range(s.tp)]
    w1, w2 = ([torch.cat(pieces, dim).to(dtype) for pieces in zip(*(shard[i] for shard in shards), strict=True)]
              for i, dim in ((0, 1), (1, 0)))
    leaves = [t.requires_grad_() for t in (x, *weights)]
    q, k, v = ((x @ W).view(s.n, -1, s.head).transpose(0, 1)[None] for W in weights[:3])
    c = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    output = c[0].transpose(0, 1).flatten(1) @ weights[3]
    told = {"output": output}
    if s.backward:
        told |= zip(ATTENTION, torch.autograd.grad(output, leaves, rows("d output")), strict=True)
    y = output = output.detach().requires_grad_()
    for up, down in zip(w1, w2, strict=True):
        y = F.gelu(y @ up.requires_grad_()) @ down.requires_grad_()
    told["y"] = y
    if s.mlp_backward:
        told["d output"], *gradients = torch.autograd.grad(y, [output, *w1, *w2], rows("d y"))
        told |= {"d W1": torch.stack(gradients[:s.layers]), "d W2": torch.stack(gradients[s.layers:])}
    return {name: value.detach() for name, value in told.items()}
