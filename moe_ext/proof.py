"""Every mesh computes what one process computes: `make proof`, or python -m moe_ext.check mesh --all.

A cell trains a small GPT on a mesh for three optimizer steps in fp64 and is compared with one process that takes each
step's sequences in one forward, without recomputation, from values drawn in place. For every tensor

    |got - want| <= 1e-12 * max|want| + 1e-15 * the largest max|want| of its kind in that step

kinds: losses (token; balance and z-loss; balance alone; evaluation; the gradient's norm), gradients (clipped),
parameters (updated; selection biases too). Initial values and the experts' loads must be equal to the last bit. The
floor, 4.5 roundings of the largest number of the kind, is for a tensor that is zero but for what is left of a sum of
larger ones, such as the gradient of a key's bias. A cell in fp32 takes one step and is compared with an fp64 process
that begins at the same values, 1e-5 taking the place of 1e-12; that no token's choice of experts hangs by less than
MARGIN is then asserted. The loss of a mesh has a scale, as for fp16, that of one process has none.

Every mesh is a cell with a MoE model, and with a dense one where the experts have no axis. What else there is to choose
(Case's options) is dealt out to the cells so that any two options, at any of their levels, meet on some mesh with
rep > 1, on one with fsdp > 1, tp > 1, ep > 1 and etp > 1: a covering array, built greedily and always the same. Of
pipelines there is another: any two options meet on some mesh with pp > 1, any two of the pipeline's own (schedule,
chunks, ..) with 2, with 4 and with 8 stages, and every one meets every other axis. Where ranks share a sequence there
is a third: any two options meet beside sp > 1 on every axis, any two of its own (the form of attention, key/value
heads) with 2, with 4 and with 8 such ranks; and every one meets pipelines of such ranks.

The optimizer (RULES) and how its state is kept are options as all others; two of the three steps have new roots. `long`
cells take ten steps of Muon or Shampoo on 1, 2, 4 and 8 shards and on each family of meshes, by the same tolerance.
State rounded to bf16 is rounded in one process too, and alike: between two numbers that differ by 1e-15 of themselves
a border between two bf16 numbers lies once in 1e12 times.

In `shaken` cells ranks and links dawdle at random, and each step is computed many times before it is taken: then too
all ranks of a stage do the same in the same order, and the numbers stay what they are.
"""
from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

import moe_ext
from moe_ext import private
from moe_ext.config import (
    Config,
    ConfigError,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    MuonConfig,
    OptimConfig,
    PipelineConfig,
    ShampooConfig,
    TrainConfig,
    meshes,
    pipelines,
    sequences,
)
from moe_ext.layers.fused import site
from moe_ext.model import GPT, set_recomputation
from moe_ext.optim import build_optimizer, clip_grad_norm
from moe_ext.optim.state import local
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.pipeline import Pipeline
from moe_ext.parallel.ranks import fork, run_ranks
from moe_ext.parallel.schedule import SCHEDULES, Action, check
from moe_ext.parallel.shard import initialize, own, parallelize
from moe_ext.parallel.stages import Stage, cut, moe_rows

private.require("moe_ext.proof")    # and imports it, as FSDP does at its first use: ranks are forked when it is there

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
FLOOR = 1e-3    # of the largest of its kind, times the tolerance
MARGIN = 1e-4   # in fp32, between the logits of the last expert chosen and the next
SEED, STEPS, ROWS, TOKENS, EXPERTS = 7, 3, 16, 16, 8    # ROWS sequences of TOKENS tokens in each step
LONG = 10       # steps of cells about the optimizer alone
AXES = ("pp", "rep", "fsdp", "sp", "tp", "ep", "etp")
SPECIAL = ((), ("pp",), ("sp",), ("pp", "sp"))     # which axes with options of their own a mesh may have
PIECES = 16     # the most that a model is cut into where options are dealt out
SCALE = 64.0    # of a mesh's loss
LIGHT = 100     # a Case's weight: some 10 s of one core
RULES = {       # which optimizer has what
    "adamw": "matrices: adamw, experts: adamw, embeddings: adamw, norms: adamw",
    "muon": "matrices: muon, experts: muon, embeddings: muon, norms: adamw",
    "shampoo": "matrices: shampoo, experts: shampoo, embeddings: shampoo, norms: shampoo",
    "mixed": "matrices: shampoo, experts: muon, embeddings: adamw, norms: adamw"}


# ---- cases -----------------------------------------------------------------------------------------------------------

def option(*levels, moe=False, axis="", shared=()):
    """A choice that the covering array makes; the first level is the plain one. moe: means nothing to a dense model.
    axis: nor without this axis, whose own it is. shared: levels that come in addition where ranks share a sequence."""
    return field(default=levels[0], metadata={"levels": levels, "moe": moe, "axis": axis, "shared": shared})


@dataclass(frozen=True)
class Case:
    """A mesh, a model and how it is trained."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    dense: bool = False
    dtype: torch.dtype = torch.float64
    long: bool = False  # LONG steps
    layers: int = 0     # 0: one for each piece of the pipeline, one more if they are uneven, and at least two
    repeats: int = 1    # forwards and backwards of each step; if several, with random delays
    # the pipeline
    schedule: str = option(*SCHEDULES, axis="pp")
    chunks: int = option(1, 2, 4, axis="pp")
    uneven: bool = option(False, True, axis="pp")           # the last piece has two layers
    links: str = option("torch", "windows", axis="pp")      # the transport between stages
    capped: bool = option(False, True, axis="pp")           # no more live chunks than one micro-batch needs
    # ranks that share a sequence
    attention: str = option("ulysses", "gather", axis="sp")
    # how it is trained: what one process does not do
    start: str = option("meta", "values")
    accumulation: int = option(1, 2, 4, 8)      # micro-batches of a step; more than 2 in pipelines only
    recompute: str = option("nothing", "attention", "blocks")
    evaluate: bool = option(False, True)        # after every step, not only after the last
    # the model and its optimizer
    clip: float = option(0.5, 0.0)
    optimizer: str = option("adamw", "muon", "shampoo")     # see RULES, which has "mixed" too
    kept: str = option("full", "bf16", "host")  # its state
    vocab_size: int = option(64, 50)            # 50: tp and fsdp do not divide it; over 8 ranks one has a single row
    ignored: bool = option(False, True)         # some targets do not count
    tied: bool = option(False, True)
    bias: bool = option(False, True)
    norm: str = option("rmsnorm", "layernorm")
    position: str = option("rope", "learned")
    documents: bool = option(False, True)       # several in a sequence, each with its own attention and positions
    sinks: bool = option(False, True)           # and a window in the first block, biases of q, k and v, RoPE stretched
    kv_heads: int = option(0, 8, shared=(2,))   # 8: of 16 heads; 2: of 8, fewer than most sp * tp
    qk_norm: str = option("none", "head", "width")
    act: str = option("swiglu_oai", "gelu")
    dropout: float = option(0.0, 0.2)
    transport: str = option("torch", "windows", moe=True)   # of rows between the experts' ranks: needs ep > 1
    top_k: int = option(2, 1, moe=True)
    score: str = option("softmax_topk", "topk_softmax", "sigmoid", moe=True)
    routing: str = option("plain", "moving", "skewed", "starving", moe=True)    # see `skew`; all but plain with a bias
    norm_p: float | str = option("auto", 0.0, moe=True)
    router_bias: bool = option(False, True, moe=True)
    groups: int = option(1, 4, moe=True)        # of experts; a token's are of two of them
    noise: bool = option(False, True, moe=True)
    jitter: float = option(0.0, 0.1, moe=True)
    scope: str = option("sequence", "micro_batch", moe=True)
    drop_by: str = option("nothing", "position", "probability", moe=True)
    balance_form: str = option("switch", "mse", moe=True)
    z_weight: float = option(0.0, 1e-2, moe=True)
    shared: str = option("none", "plain", "gated", moe=True)    # the shared expert
    dense_layers: int = option(0, 1, moe=True)

    @property
    def steps(self) -> int:
        return LONG if self.long else STEPS if self.dtype == torch.float64 else 1

    @property
    def kind(self) -> tuple[bool, tuple[str, ...]]:
        """Whether it is dense, and which axes that have options of their own its mesh has."""
        return self.dense, special(self.mesh)

    @property
    def options(self) -> dict:
        return {f.name: getattr(self, f.name) for f in options(*self.kind)}

    @property
    def pairs(self) -> list[tuple]:
        """Of options that meet, each with itself too, in both orders."""
        return list(itertools.product(self.options.items(), repeat=2))

    @property
    def weight(self) -> int:
        """Of its time, about."""
        steps = 3 if self.long else 1
        return 4 * self.mesh.world + steps * self.mesh.stage * self.accumulation * self.model.layers

    @property
    def shaken(self) -> bool:
        return self.repeats > 1

    @property
    def micro_batch(self) -> int:
        return ROWS // (self.accumulation * self.mesh.dp)

    @property
    def pipeline(self) -> PipelineConfig:
        layers = ",".join(["1"] * (self.mesh.pp * self.chunks - 1) + ["2"]) if self.uneven else ""
        return PipelineConfig(schedule=self.schedule, chunks=self.chunks, layers=layers, transport=self.links,
                              live=self.capped * self.chunks)

    @property
    def config(self) -> Config:
        """What the driver would be told, so far as the model's cut depends on it."""
        mesh = replace(self.mesh, transport=self.transport, attention=self.attention)
        return Config(model=self.model, mesh=mesh, pipeline=self.pipeline, train=TrainConfig(
            dtype="fp64", device="cpu", micro_batch=self.micro_batch, accumulation=self.accumulation,
            recompute=self.recompute == "blocks", recompute_attention=self.recompute == "attention"))

    @property
    def model(self) -> ModelConfig:
        moe = MoEConfig() if self.dense else MoEConfig(
            experts=EXPERTS, top_k=self.top_k, hidden=24, dense_layers=self.dense_layers, score=self.score,
            groups=self.groups, top_groups=min(2, self.groups), shared_hidden=24 * (self.shared != "none"),
            shared_gate=self.shared == "gated", norm_p=self.norm_p, scale=1.5, noise=self.noise, jitter=self.jitter,
            router_bias=self.router_bias, select_bias_rate=0.0 if self.routing == "plain" else 0.02, scope=self.scope,
            capacity_factor=0.0 if self.drop_by == "nothing" else 1.0,
            drop_by="position" if self.drop_by == "nothing" else self.drop_by,
            balance_form=self.balance_form, balance_weight=0.1, z_weight=self.z_weight)
        more = {}
        if self.sinks:
            more = dict(sinks=True, window=5, window_full_every=2, attention_bias="all" if self.bias else "qkv")
            if self.position == "rope":
                more |= dict(rope_fraction=0.5, rope_scale=4.0, rope_context=TOKENS // 2,
                             rope_stretch="llama3" if self.tied else "yarn")
        return ModelConfig(
            vocab_size=self.vocab_size, seq_len=TOKENS, dim=32,
            layers=self.layers or max(2, self.mesh.pp * self.chunks + self.uneven), heads=max(8, 2 * self.kv_heads),
            kv_heads=self.kv_heads, head_dim=8, hidden=48, act=self.act, norm=self.norm, bias=self.bias,
            position=self.position, qk_norm=self.qk_norm != "none", qk_norm_over=self.qk_norm.replace("none", "head"),
            tied=self.tied, dropout=self.dropout, init_std=0.2, moe=moe, **more)

    @property
    def optim(self) -> OptimConfig:
        """Epsilons are about the size of what they are added to: roots of a factor, of which most eigenvalues are zero
        but for rounding, and a step's direction where gradients vanish, are then smooth functions of the gradients.
        Blocks end where no rank's part does. Some steps have new roots, the first ones none, and of LONG steps some
        have old ones."""
        return OptimConfig(
            name=self.optimizer.replace("mixed", "muon"), rule=RULES[self.optimizer], state=self.kept,
            lr=1e-2, min_lr=0.0, eps=1e-4, clip=self.clip,
            muon=MuonConfig(ns_dtype="fp64" if self.dtype == torch.float64 else "fp32"),
            shampoo=ShampooConfig(precondition_frequency=3 if self.long else 1,
                                  start_preconditioning_step=4 if self.long else 2, max_preconditioner_dim=40,
                                  epsilon=1e-4))

    @property
    def alone(self) -> Case:
        """What one process does in its stead."""
        plain = {f.name: f.default for f in options(self.dense, ("pp", "sp")) if f.metadata["axis"]}
        return replace(self, mesh=MeshConfig(), layers=self.model.layers, repeats=1, accumulation=1, evaluate=True,
                       recompute="nothing", start="values", transport="torch", kept=self.kept.replace("host", "full"),
                       **plain)


def special(mesh: MeshConfig) -> tuple[str, ...]:
    return tuple(axis for axis in SPECIAL[-1] if getattr(mesh, axis) > 1)


def options(dense: bool, axes: tuple[str, ...]) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(Case)
            if f.metadata and f.metadata["axis"] in ("", *axes) and not (dense and f.metadata["moe"])]


# ---- the covering array ----------------------------------------------------------------------------------------------

def fits(mesh: MeshConfig, chosen: dict) -> bool:
    """Whether such options go together on a mesh; what has not been chosen yet does not stand in the way."""
    pp, biased = mesh.pp, chosen.get("routing", "plain") != "plain"
    accumulation, chunks = chosen.get("accumulation", pp), chosen.get("chunks", 1)
    if pp > 1:
        schedule = chosen.get("schedule", "dfc" if chosen.get("capped") else "gpipe")
        try:
            check(schedule, pp, chunks, accumulation, chosen.get("capped", False) * chunks)
        except ConfigError:
            return False
    return not (
        accumulation * mesh.dp > ROWS or pp * chunks > PIECES
        or (pp == 1 and accumulation > 2)
        or (chosen.get("transport") == "windows" and mesh.ep == 1)
        or chosen.get("kv_heads", 0) % mesh.tp
        or (chosen.get("scope") == "micro_batch" and chosen.get("accumulation", 1) > 1)     # alone it is the whole step
        or (chosen.get("score") == "topk_softmax" and (biased or chosen.get("groups", 1) > 1))  # it chooses by logits
        or (chosen.get("score") == "topk_softmax" and chosen.get("top_k") == 1))    # a weight that no router can change


@functools.cache
def places(mesh: MeshConfig) -> tuple[str, ...]:
    """Where options meet: on every axis > 1, and on a pipeline of so many stages or a sequence of so many ranks."""
    return (*(axis for axis in AXES if getattr(mesh, axis) > 1),
            *(f"{axis}={getattr(mesh, axis)}" for axis in special(mesh)))


def levels(dense: bool, axes: tuple[str, ...]) -> list[list[tuple]]:
    return [[(f.name, level) for level in (*f.metadata["levels"], *f.metadata["shared"] * ("sp" in axes))]
            for f in options(dense, axes)]


@functools.cache
def grids(dense: bool, axes: tuple[str, ...]) -> list[MeshConfig]:
    """The meshes of a kind: all of 1, 2, 4 and 8 ranks, and of 16 one that has every axis; with pp and sp, a choice."""
    if axes == ("pp", "sp"):
        return [MeshConfig(**sizes) for sizes in (SHARED_STAGES[:1] if dense else SHARED_STAGES)]
    every = {(): meshes, ("pp",): pipelines, ("sp",): sequences}[axes]
    found = [mesh for world in (1, 2, 4, 8) for mesh in every(world) if not (dense and mesh.ep * mesh.etp > 1)]
    return found + [MeshConfig(pp=2, rep=2, fsdp=2, tp=2, ep=2, etp=2)] * (axes == ("pp",) and not dense)


SHARED_STAGES = (
    dict(pp=2, sp=2), dict(pp=2, sp=2, ep=2), dict(pp=4, sp=2), dict(pp=2, sp=4, ep=2), dict(pp=2, rep=2, sp=2, ep=2),
    dict(pp=2, fsdp=2, sp=2, ep=4), dict(pp=2, sp=2, tp=2, ep=2, etp=2), dict(pp=2, fsdp=2, sp=2, tp=2, ep=2, etp=2))


@functools.cache
def meetings(dense: bool, axes: tuple[str, ...]) -> frozenset:
    """All that is to be covered, (level, level, place), in both orders; of a level alone (level, level, place)."""
    own = {f.name for f in options(dense, axes) if f.metadata["axis"] or ("sp" in axes and f.metadata["shared"])}
    columns, found = levels(dense, axes), set()
    alone = [(level, level) for column in columns for level in column]
    pairs = [pair for one, other in itertools.permutations(columns, 2) for pair in itertools.product(one, other)]
    inner = [(a, b) for a, b in pairs if a[0] in own and b[0] in own]
    for place in dict.fromkeys(itertools.chain(*map(places, grids(dense, axes)))):
        wanted = alone if axes else pairs
        if axes == ("pp", "sp"):
            wanted = alone if place == "sp" and not dense else []
        elif axes and not dense:
            wanted = inner if "=" in place else pairs if place == "pp" or axes == ("sp",) else alone
        there = [mesh for mesh in grids(dense, axes) if place in places(mesh)]
        found |= {(a, b, place) for a, b in wanted if any(fits(mesh, dict((a, b))) for mesh in there)}
    return frozenset(found)


def covered(case: Case) -> set:
    return {(a, b, place) for a, b in case.pairs for place in places(case.mesh)}


def deal(mesh: MeshConfig, dense: bool, missing: dict[tuple, set], tries: int = 4) -> Case:
    """The case of a mesh whose options meet most of what is missing, the best of a few greedy ones. missing: the places
    where two options have yet to meet."""
    at = set(places(mesh))
    gains = {pair: n for pair, left in missing.items() if (n := len(left & at))}
    here = [pair for pair, n in gains.items() if fits(mesh, dict(pair)) for _ in range(n)]
    cases = []
    for attempt in range(tries):
        shuffled = random.Random(attempt)
        chosen = dict(shuffled.choice(here)) if here else {}
        columns = [column for column in levels(dense, special(mesh)) if column[0][0] not in chosen]
        shuffled.shuffle(columns)
        for column in columns:
            free = [level for level in column if fits(mesh, chosen | dict([level]))]
            shuffled.shuffle(free)
            chosen |= [max(free, key=lambda level: sum(gains.get((level, other), 0)
                                                          for other in [level, *chosen.items()]))]
        cases.append(Case(mesh, dense, **chosen))
    return max(cases, key=lambda case: sum(gains.get(pair, 0) for pair in case.pairs))


@functools.cache
def table() -> list[Case]:
    """The proof's cells: every mesh, some again, on few ranks, until all has met; fp32; and the shaken ones."""
    cases = []
    for axes, dense in itertools.product(SPECIAL, (False, True)):
        missing = {}
        for a, b, place in sorted(meetings(dense, axes), key=repr):     # an order that is always the same
            missing.setdefault((a, b), set()).add(place)

        def add(mesh, dense=dense, missing=missing):
            cases.append(deal(mesh, dense, missing))
            for pair in missing.keys() & cases[-1].pairs:
                missing[pair].difference_update(places(mesh))
                if not missing[pair]:
                    del missing[pair]

        for mesh in grids(dense, axes):
            add(mesh)
        while missing:
            pair, left = next(iter(missing.items()))
            add(next(mesh for mesh in grids(dense, axes) if min(left) in places(mesh) and fits(mesh, dict(pair))))
    optimizers, states = itertools.cycle(RULES), itertools.cycle(("full", "bf16", "host"))
    cases += [Case(MeshConfig(**sizes), dtype=torch.float32, bias=True, optimizer=next(optimizers))
              for sizes in FAMILIES]
    cases += [Case(MeshConfig(**sizes), long=True, optimizer=optimizer, kept=next(states))
              for sizes in SHARDS + FAMILIES for optimizer in ("muon", "shampoo")]
    cases += [Case(MeshConfig(pp=8), chunks=4, accumulation=8, schedule=schedule, links=links)     # 32 pieces
              for schedule, links in (("interleaved", "torch"), ("bfc", "windows"))]
    return sorted([*cases, *shaken(67)], key=lambda case: case.mesh.world)


FAMILIES = (dict(rep=2), dict(fsdp=2), dict(tp=2), dict(fsdp=2, ep=2), dict(tp=2, ep=2), dict(tp=2, etp=2),
            dict(rep=2, fsdp=2), dict(fsdp=2, tp=2, ep=2, etp=2), dict(pp=2), dict(pp=2, fsdp=2, ep=2),
            dict(sp=2), dict(sp=2, tp=2), dict(fsdp=2, sp=2, ep=4))
SHARDS = ({}, dict(fsdp=4), dict(fsdp=8), dict(fsdp=4, ep=4), dict(rep=2, fsdp=2, tp=2, ep=2), dict(rep=2, sp=2, tp=2))


def shaken(repeats: int) -> list[Case]:
    """Cells of STEPS * repeats steps under random delays: pipelines whose stages decide by what has arrived."""
    more = dict(repeats=repeats, chunks=2, accumulation=4, dropout=0.2)
    return [Case(MeshConfig(pp=4), schedule="dfc", links="torch", capped=True, **more),
            Case(MeshConfig(pp=2, tp=2), dense=True, schedule="bfc", links="windows", **more),
            Case(MeshConfig(pp=2, tp=2), dense=True, schedule="dfc", links="torch", **more),
            Case(MeshConfig(pp=2, fsdp=2, ep=2), schedule="bfc", links="windows", **more)]


@functools.cache
def part() -> list[Case]:
    """A part of the table in which every two options that one stage has still meet on some mesh, and each of them every
    axis, every option a pipeline, and every schedule every axis that a LIGHT cell has; both forms of attention every
    option, every axis, 2, 4 and 8 ranks that share a sequence, and more of them than key/value heads; all of fp32, long
    ones of 4 ranks with copies or with every matrix cut both ways, and of the rest whatever adds most for its time; and
    some shaken ones."""
    cells, wanted = [], set()
    for case in filter(lambda case: not case.shaken, table()):
        (dense, axes), chosen, at = case.kind, case.options.items(), places(case.mesh)
        met = {(dense, a, b) for a in chosen for b in (*chosen, *at) if at}     # one process is no mesh
        more = {(axis, level) for axis in axes for level in chosen}
        if "pp" in axes:
            more |= {(case.schedule, place) for place in set(AXES).intersection(at)}
        if "sp" in axes:
            replicated = 0 < case.kv_heads < case.mesh.sequence
            more |= {(case.attention, it) for it in (*at, *chosen, replicated)}
        if not axes or case.weight <= LIGHT:
            wanted |= more if axes else met
        cells.append((case, met | more, case.weight))
    taken = [case for case, _, _ in cells if case.dtype == torch.float32
             or (case.long and case.mesh.world == 4 and case.mesh.rep * case.mesh.etp > 1)]
    missing = wanted.difference(*(met for case, met, _ in cells if case in taken))
    while missing:
        for _, met, _ in cells:
            met &= missing
        case, met, _ = max(cells, key=lambda cell: len(cell[1]) / cell[2])
        taken.append(case)
        missing -= met
    return taken + shaken(7)[:2]


# ---- a cell's training -----------------------------------------------------------------------------------------------

class Record(NamedTuple):
    """What a training leaves behind, on a rank its own part; kind and step in the key."""
    exact: dict[str, torch.Tensor]                      # equal to the last bit
    close: dict[tuple[str, int], dict[str, torch.Tensor]]       # (kind, step) -> name -> tensor
    like: dict[str, torch.Tensor]                       # the tensor whose box on this rank a name is
    rows: list[int]                                     # that came to the experts here, forward by forward
    margin: float                                       # the smallest between the last logit chosen and the next
    orders: list[list[Action]]                          # what this stage has done, as it did it, time by time


def state(model: GPT | Stage) -> dict[str, torch.Tensor]:
    return {name: local(tensor.detach()).clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def skew(model: GPT | Stage, case: Case) -> None:
    """Values that do not begin at zero or one, so that none can be forgotten or counted twice; and the routing:

    moving      a selection bias that begins at zero
    skewed      one that gives the first experts several times their share
    starving    one that gives every token to the first K experts, in every second MoE layer to the last K
    """
    for name, p in model.named_parameters():
        if p.ndim == 1 or "bias" in name:
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(site(name)), dtype=torch.float32)
            local(p).add_(own(0.2 * noise, p))
    numbers = [i for piece in pieces(model) for i in range(case.model.moe_layers)[moe_rows(piece)]]
    for i, layer in zip(numbers, model.moe_layers(), strict=True):
        if case.routing == "skewed":
            layer.select_bias_E.copy_(1.0 / (1 + torch.arange(EXPERTS)))
        elif case.routing == "starving":
            first = 0 if i % 2 == 0 else EXPERTS - case.top_k
            layer.select_bias_E[first:first + case.top_k] = 4.0


def text(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """-> tokens, targets, both [step, row, position]."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(case.vocab_size, (case.steps, ROWS, TOKENS + 1), generator=generator)
    targets = ids[..., 1:].clone()
    if case.ignored:
        targets[torch.rand(targets.shape, generator=generator) < 0.2] = -100
    return ids[..., :-1], targets


def documents(case: Case) -> tuple:
    """-> documents, positions, both [step, row, position]; or None, None."""
    if not case.documents:
        return None, None
    begins = torch.rand(case.steps, ROWS, TOKENS, generator=torch.Generator().manual_seed(SEED)) < 0.2
    place = torch.arange(TOKENS)
    return begins.cumsum(-1), place - torch.where(begins, place, 0).cummax(-1).values


def pieces(model: GPT | Stage) -> list[GPT]:
    return list(model.pieces) if isinstance(model, Stage) else [model]


def build(case: Case, mesh: Mesh) -> GPT | Stage:
    """What this rank has of the model."""
    def piece(blocks):
        if case.start == "meta" and mesh.world > 1:
            model = GPT(case.model, dtype=case.dtype, device="meta", blocks=blocks)
            parallelize(model, mesh)
            initialize(model, SEED, "cpu")
        else:
            model = GPT(case.model, seed=SEED, dtype=case.dtype, blocks=blocks)
            parallelize(model, mesh)
        set_recomputation(model, case.config.train)
        return model

    cuts = cut(case.config)[mesh.pp_rank::mesh.config.pp]
    return piece(None) if mesh.config.pp == 1 else Stage([piece(blocks) for blocks in cuts], mesh)


def train(case: Case, mesh: Mesh) -> Record:
    model = build(case, mesh)
    like = dict(model.state_dict())
    exact, close = {f"initial {name}": x for name, x in state(model).items()}, {}
    rows, margins, orders = [], [math.inf], []
    skew(model, case)
    if mesh.world == 1 and case.dtype == torch.float32:
        model.double()      # the reference

    def note_margin(_, args, logits_TE):
        best = logits_TE.detach().topk(case.top_k + 1).values
        margins.append(float((best[:, -2] - best[:, -1]).min()))

    def note_rows(experts, args):
        if experts.training:
            rows.append(len(args[0]))

    for layer in model.moe_layers():
        layer.experts.register_forward_pre_hook(note_rows)
        layer.gate.register_forward_hook(note_margin)
    optimizer = build_optimizer(model, case.optim)
    step_text = (*text(case), *documents(case))
    dice, scale = random.Random(mesh.rank), SCALE if mesh.world > 1 else 1.0
    pipeline = Pipeline(model, mesh, case.pipeline, micro_batch=case.micro_batch, micros=case.accumulation,
                        delay=(lambda action: dice.uniform(0, 2e-3)) if case.shaken else None)

    def feed(step, micro, draws=True):
        """GPT.forward's arguments for this rank's part of a micro-batch."""
        begin, end = mesh.rows(micro, case.micro_batch)
        tokens, targets, *rows = (x if x is None else x[step, begin:end] for x in step_text)
        return tokens, targets, mesh.draws(SEED, step, begin, TOKENS) if draws else None, None, *rows

    def dawdle(kind):
        time.sleep(dice.uniform(0, 1e-3))
        return nullcontext()

    def evaluate():
        model.eval()
        with torch.no_grad():
            loss = sum(model(*feed(-1, micro, draws=False)).token_loss for micro in range(case.accumulation))
        model.train()
        return mesh.sum(loss / mesh.config.tp)[0]

    for step in range(case.steps):
        losses = {"token": [], "aux": [], "balance": []}
        for _ in range(case.repeats):
            optimizer.zero_grad()
            totals = pipeline.step(functools.partial(feed, step), case.accumulation, tokens=ROWS * TOKENS,
                                   scale=scale, around=dawdle if case.shaken else nullcontext)
            orders.append(pipeline.order)
            loss, aux, balance, loads, dropped, _ = pipeline.sum(*totals)
            for name, number in zip(losses, (loss, aux, balance), strict=True):
                losses[name].append(number)
        norm = clip_grad_norm(model.named_parameters(), case.clip, scale, model.holders)
        losses = {name: torch.stack(each) for name, each in losses.items()} | {"norm": torch.tensor(norm).double()}
        exact |= {f"loads {step}": loads, f"dropped {step}": dropped}
        close["gradients", step] = {name: local(p.grad).clone() for name, p in model.named_parameters()}
        optimizer.step()
        model.update_select_bias(exact[f"loads {step}"].long())
        close["parameters", step] = state(model)
        if case.evaluate or step == case.steps - 1:
            losses["evaluation"] = evaluate()
        close["losses", step] = losses
    pipeline.close()
    like |= {f"initial {name}": x for name, x in like.items()}
    return Record(exact, close, like, rows, min(margins), orders)


# ---- a cell ----------------------------------------------------------------------------------------------------------

KINDS = ("losses", "gradients", "parameters")


@functools.cache
def reference(case: Case) -> Record:
    """One process; case is some case's `alone`."""
    record = train(case, Mesh(case.mesh))
    if case.dtype == torch.float32:
        assert record.margin > MARGIN, f"a token's choice of experts hangs by {record.margin:.1e}"
    for name, gradient in record.close["gradients", 0].items():
        assert gradient.abs().max() > 0, f"{name} has no gradient: nothing would be proven"
    return record


def compare(got: Record, want: Record) -> dict:
    """-> kind -> (the worst relative error, "name, step"); "exact": what is not equal to the last bit."""
    worst = {"exact": sorted(name for name, x in got.exact.items()
                             if not torch.equal(x.double(), own(want.exact[name], got.like.get(name, x)).double()))}
    for kind in KINDS:
        errors = [(0.0, "")]
        for step in range(len(got.close) // len(KINDS)):
            wanted = want.close[kind, step]
            largest = max(float(w.abs().max()) for w in wanted.values())
            for name, x in got.close[kind, step].items():
                if x.numel():
                    w = own(wanted[name], got.like.get(name, x))
                    error = float((x - w).abs().max() / (wanted[name].abs().max() + FLOOR * largest))
                    errors.append((math.inf if math.isnan(error) else error, f"{name}, step {step + 1}"))
        worst[kind] = max(errors)
    return worst


def held(record: Record) -> list[str]:
    """The names of all that is compared."""
    close = [f"{kind} {name} {step}" for (kind, step), tensors in record.close.items() for name in tensors]
    return [*record.exact, *(name for name in close if "evaluation" not in name)]


def rank_of(case: Case, folder: str, bug: Callable[[], None] | None) -> dict:
    """What a rank has to say of its part, to be merged in `verdict`."""
    mesh = Mesh(case.config.mesh, seconds=60.0, timeout=timedelta(seconds=60),
                store=dist.FileStore(f"{folder}/windows", case.mesh.world))
    if bug is not None:     # when all have met: a rank that fails earlier leaves the others waiting for it
        bug()
    record = train(case, mesh)
    mesh.close()
    return compare(record, reference(case.alone)) | {"rows": record.rows, "held": held(record),
                                                     "orders": repr(record.orders)}


def verdict(case: Case, ranks: list[dict]) -> dict:
    """-> errors by kind, and a sentence on what is wrong, "" if nothing is."""
    errors = {kind: max(rank[kind] for rank in ranks) for kind in KINDS}
    wrong = [f"{kind} {error:.1e} ({name})" for kind, (error, name) in errors.items()
             if not error <= TOLERANCE[case.dtype]]
    exact = sorted({name for rank in ranks for name in rank["exact"]})
    wrong += [f"not equal to the last bit: {', '.join(exact)}"] if exact else []
    lost = set(held(reference(case.alone))).difference(*(rank["held"] for rank in ranks))
    wrong += [f"on no rank: {', '.join(sorted(lost))}"] if lost else []
    for stage in stages(case, ranks):
        if len({rank["orders"] for rank in stage}) > 1:
            wrong.append("the ranks of a stage did not do the same: " + " | ".join(rank["orders"] for rank in stage))
        wrong += routed(case, stage)
    return {"errors": {kind: error for kind, (error, _) in errors.items()}, "wrong": "; ".join(wrong)}


def stages(case: Case, ranks: list[dict]) -> list[list[dict]]:
    """The ranks, stage by stage."""
    return [ranks[first:first + case.mesh.stage] for first in range(0, len(ranks), case.mesh.stage)]


def routed(case: Case, ranks: list[dict]) -> list[str]:
    """Whether the routing was as the case says, by the reference's loads and the rows that came to a stage's ranks."""
    m, wrong = case.mesh, []
    loads = {name: load for name, load in reference(case.alone).exact.items() if name.startswith("loads")}
    if case.routing == "skewed" and not case.dense:
        wrong += [f"{name} are not skewed" for name, load in loads.items() if load.max() < 2 * load.mean()]
    if case.routing == "starving" and not case.dense and m.ep > 1:
        tokens = ROWS * TOKENS // (m.rep * m.efsdp * case.accumulation)     # of the ranks among whom experts are spread
        for rows in zip(*(rank["rows"] for rank in ranks), strict=True):    # of one layer at one time, by rank
            if min(rows) != 0 or (case.drop_by == "nothing" and max(rows) != tokens):
                wrong.append(f"rows received by the ranks: {rows}, wanted none by some and {tokens} by some")
    return wrong[:1]


class Result(NamedTuple):
    """wrong: a sentence, "" if the mesh computes what one process does. errors: the worst by kind, {} if it crashed."""
    case: Case
    errors: dict[str, float]
    wrong: str
    seconds: float

    def line(self) -> str:
        m, c = self.case.mesh, self.case
        kind = ("dense" if c.dense else "MoE") + " fp32" * (c.dtype == torch.float32) + " shaken" * c.shaken
        sizes = " ".join(f"{size:>5}" for size in [m.pp, c.chunks, *(getattr(m, axis) for axis in AXES[1:])])
        errors = " ".join(f"{self.errors.get(kind, math.nan):>10.1e}" for kind in KINDS)
        return f"{sizes}  {kind:<10} {errors} {self.seconds:>6.1f}  {'WRONG' if self.wrong else 'ok'}"


HEADER = " ".join([*(f"{axis:>5}" for axis in ("pp", "vpp", *AXES[1:])), f" {'model':<10}",
                   *(f"{kind:>10}" for kind in KINDS), "     s"])


# ---- running them ----------------------------------------------------------------------------------------------------

def run_cell(case: Case, folder: str, bug) -> None:
    """The ranks and their verdict; what they print goes to a file."""
    sys.stdout = sys.stderr = log = open(f"{folder}/log", "w", buffering=1)
    for fd in (1, 2):
        os.dup2(log.fileno(), fd)
    ranks = run_ranks(case.mesh.world, lambda rank: rank_of(case, folder, bug), folder)
    torch.save(verdict(case, ranks), f"{folder}/verdict.pt")


def prove(cases: list[Case], *, jobs: int = 2, seconds: float = 300.0, bug=None) -> Iterator[Result]:
    """Runs the cells, `jobs` at a time, and yields what came of each as it ends. A cell that fails, crashes or takes
    longer than `seconds` is a Result that says so. bug: called by every rank before it builds its model."""
    torch.set_num_threads(1)
    waiting, running = list(reversed(cases)), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                case, folder = waiting.pop(), tempfile.mkdtemp()
                reference(case.alone)
                sys.stdout.flush()
                pid = fork()
                os.setpgid(pid, pid)    # the cell and its ranks, which end together; by both, whoever comes first
                if pid == 0:
                    status = 1
                    try:
                        run_cell(case, folder, bug)
                        status = 0
                    except BaseException:
                        traceback.print_exc()
                    finally:
                        os._exit(status)
                running[pid] = case, folder, time.perf_counter()
            for pid, (case, folder, began) in list(running.items()):
                took = time.perf_counter() - began
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended or took > seconds:
                    del running[pid]
                    yield Result(case, *outcome(pid, folder, status if ended else None, seconds), took)
            time.sleep(0.01)
    finally:
        for pid, (_, folder, _) in running.items():
            outcome(pid, folder, None, seconds)


def outcome(pid: int, folder: str, status: int | None, seconds: float) -> tuple[dict, str]:
    """-> errors, wrong of a cell that ended with `status`, or (None) that is to be ended now."""
    if status is None:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    try:
        if status == 0:
            return tuple(torch.load(f"{folder}/verdict.pt").values())
        words = Path(folder, "log").read_text().strip()
        raised = [line for line in words.splitlines() if re.match(r"[\w.]*Error\b", line)]
        end = f"no answer within {seconds:g} s" if status is None else f"ended with status {status}"
        return {}, min(raised, key=lambda line: "gloo" in line, default=f"{end}. {words[-300:]}")   # gloo: left behind
    finally:
        shutil.rmtree(folder)


def prove_all(worlds: tuple[int, ...] = (1, 2, 4, 8, 16), *, cases: list[Case] | None = None, jobs: int = 2,
              path: Path | str | None = None, out: Callable[[str], None] = print) -> bool:
    """The table's cells of these worlds, a line each, and what they amount to; True if all agree.

    cases: others. jobs: cells at a time. path: of a JSON file with every cell, its options and errors.
    """
    if cases is None:
        cases = [case for case in table() if case.mesh.world in worlds]
    out(HEADER)
    began, results = time.perf_counter(), []
    for result in prove(cases, jobs=jobs):
        results.append(result)
        out(result.line())
        if result.wrong:
            out(f"      {result.wrong}\n      {result.case}")
    seconds = time.perf_counter() - began
    wrong = sum(bool(result.wrong) for result in results)
    for line in summary(results):
        out(line)
    out(f"{len(results)} cells in {seconds:.0f} s, {wrong} of them wrong")
    if path:
        Path(path).write_text(json.dumps(report(results, seconds), indent=1) + "\n")
    return not wrong


def summary(results: list[Result]) -> list[str]:
    lines = []
    for dtype, tolerance in TOLERANCE.items():
        errors = [result.errors for result in results if result.case.dtype == dtype and result.errors]
        if errors:
            worst = ", ".join(f"{kind} {max(e[kind] for e in errors):.1e}" for kind in KINDS)
            lines.append(f"{str(dtype).removeprefix('torch.')}: worst relative errors {worst}; allowed {tolerance:.0e}")
    for axes, dense in itertools.product(SPECIAL, (False, True)):
        wanted, cases = meetings(dense, axes), [r.case for r in results if r.case.kind == (dense, axes)]
        met = wanted.intersection(*[set().union(*map(covered, cases))])
        pairs, wanted_pairs = ({frozenset((a, b)) for a, b, _ in some if a != b} for some in (met, wanted))
        names = "".join(f", {name}" for axis, name in (("pp", "pipelines"), ("sp", "shared sequences")) if axis in axes)
        lines.append(f"{'dense' if dense else 'MoE'}{names}: {len(cases)} cells, {len(pairs)} of "
                     f"{len(wanted_pairs)} pairs of options met, {len(met)} of {len(wanted)} of them by axis")
    return lines


def report(results: list[Result], seconds: float) -> dict:
    """For JSON: what ran where, and each cell."""
    return {
        "torch": torch.__version__, **moe_ext._C.versions(), "seconds": round(seconds), "summary": summary(results),
        "cells": [{"mesh": {axis: getattr(r.case.mesh, axis) for axis in AXES}, "dense": r.case.dense,
                   "dtype": str(r.case.dtype).removeprefix("torch."), "options": r.case.options, "errors": r.errors,
                   "seconds": round(r.seconds, 1), "wrong": r.wrong} for r in results],
    }


def main(worlds: tuple[int, ...] = (1, 2, 4, 8, 16), jobs: int = 2, path: Path | None = None) -> None:
    """The proof table.

    Args:
        worlds: numbers of ranks.
        jobs: cells that run at a time.
        path: of a JSON file with every cell, its options and errors.
    """
    sys.exit(not prove_all(worlds, jobs=jobs, path=path, out=lambda line: print(line, flush=True)))


if __name__ == "__main__":
    import tyro
    tyro.cli(main)
