"""Every mesh computes what one process computes: `make proof`, or python -m moe_ext.check mesh --all.

A cell trains a small GPT on a mesh for three optimizer steps in fp64 and is compared with one process that takes each
step's sequences in one forward, without recomputation, from values drawn in place. For every tensor

    |got - want| <= 1e-12 * max|want| + 1e-15 * the largest max|want| of its kind in that step

kinds: losses (token; balance and z-loss; evaluation; the gradient's norm), gradients (clipped), parameters (updated;
selection biases too). Initial values and the experts' loads must be equal to the last bit. The floor, 4.5 roundings of
the largest number of the kind, is for a tensor that is zero but for what is left of a sum of larger ones, such as the
gradient of a key's bias. A cell in fp32 takes one step and is compared with an fp64 process that begins at the same
values, 1e-5 taking the place of 1e-12; that no token's choice of experts hangs by less than MARGIN is then asserted.

Every mesh is a cell with a MoE model, and with a dense one where the experts have no axis. What else there is to choose
(Case's options) is dealt out to the cells so that any two options, at any of their levels, meet on some mesh with
rep > 1, on one with fsdp > 1, tp > 1, ep > 1 and etp > 1: a covering array, built greedily and always the same.
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import moe_ext
from moe_ext import private
from moe_ext.config import MeshConfig, ModelConfig, MoEConfig, OptimConfig, meshes
from moe_ext.layers.fused import site
from moe_ext.model import GPT
from moe_ext.optim import adamw, clip_grad_norm
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.ranks import fork, run_ranks
from moe_ext.parallel.shard import backward, box_of, initialize, parallelize

private.require("moe_ext.proof")    # and imports it, as FSDP does at its first use: ranks are forked when it is there

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
FLOOR = 1e-3    # of the largest of its kind, times the tolerance
MARGIN = 1e-4   # in fp32, between the logits of the last expert chosen and the next
SEED, STEPS, ROWS, TOKENS, EXPERTS = 7, 3, 16, 16, 8    # ROWS sequences of TOKENS tokens in each step
AXES = ("rep", "fsdp", "tp", "ep", "etp")


# ---- cases -----------------------------------------------------------------------------------------------------------

def option(*levels, moe=False):
    """A choice that the covering array makes; the first level is the plain one. moe: means nothing to a dense model."""
    return field(default=levels[0], metadata={"levels": levels, "moe": moe})


@dataclass(frozen=True)
class Case:
    """A mesh, a model and how it is trained."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    dense: bool = False
    dtype: torch.dtype = torch.float64
    # how it is trained: what one process does not do
    start: str = option("meta", "values")
    accumulation: int = option(1, 2)
    recompute: bool = option(False, True)
    evaluate: bool = option(False, True)        # after every step, not only after the last
    # the model and its optimizer
    clip: float = option(0.5, 0.0)
    vocab_size: int = option(64, 50)            # 50: tp and fsdp do not divide it; over 8 ranks one has a single row
    ignored: bool = option(False, True)         # some targets do not count
    tied: bool = option(False, True)
    bias: bool = option(False, True)
    norm: str = option("rmsnorm", "layernorm")
    position: str = option("rope", "learned")
    documents: bool = option(False, True)       # several in a sequence, each with its own attention and positions
    sinks: bool = option(False, True)           # and a window in the first block, q, k and v with biases, YaRN
    kv_heads: int = option(0, 8)                # 8: of 16 heads
    qk_norm: str = option("none", "head", "width")
    act: str = option("swiglu_oai", "gelu")
    dropout: float = option(0.0, 0.2)
    transport: str = option("torch", "windows", moe=True)   # of rows between the experts' ranks: needs ep > 1
    top_k: int = option(2, 1, moe=True)
    score: str = option("softmax_topk", "topk_softmax", "sigmoid", moe=True)
    routing: str = option("plain", "moving", "skewed", "starving", moe=True)    # see `skew`; all but plain with a bias
    norm_p: float | str = option("auto", 0.0, moe=True)
    router_bias: bool = option(False, True, moe=True)
    noise: bool = option(False, True, moe=True)
    jitter: float = option(0.0, 0.1, moe=True)
    scope: str = option("sequence", "micro_batch", moe=True)
    drop_by: str = option("nothing", "position", "probability", moe=True)
    balance_form: str = option("switch", "mse", moe=True)
    z_weight: float = option(0.0, 1e-2, moe=True)
    shared_hidden: int = option(0, 24, moe=True)
    dense_layers: int = option(0, 1, moe=True)

    @property
    def steps(self) -> int:
        return STEPS if self.dtype == torch.float64 else 1

    @property
    def axes(self) -> list[str]:
        return [axis for axis in AXES if getattr(self.mesh, axis) > 1]

    @property
    def options(self) -> dict:
        return {f.name: getattr(self, f.name) for f in options(self.dense)}

    @property
    def model(self) -> ModelConfig:
        moe = MoEConfig() if self.dense else MoEConfig(
            experts=EXPERTS, top_k=self.top_k, hidden=24, dense_layers=self.dense_layers, score=self.score,
            shared_hidden=self.shared_hidden, norm_p=self.norm_p, scale=1.5, noise=self.noise, jitter=self.jitter,
            router_bias=self.router_bias, select_bias_rate=0.0 if self.routing == "plain" else 0.02, scope=self.scope,
            capacity_factor=0.0 if self.drop_by == "nothing" else 1.0,
            drop_by="position" if self.drop_by == "nothing" else self.drop_by,
            balance_form=self.balance_form, balance_weight=0.1, z_weight=self.z_weight)
        more = {}
        if self.sinks:
            more = dict(sinks=True, window=5, window_full_every=2, attention_bias="all" if self.bias else "qkv")
            if self.position == "rope":
                more |= dict(rope_fraction=0.5, rope_scale=4.0, rope_context=TOKENS // 2)
        return ModelConfig(
            vocab_size=self.vocab_size, seq_len=TOKENS, layers=2, dim=32, heads=2 * self.kv_heads or 8,
            kv_heads=self.kv_heads, head_dim=8, hidden=48, act=self.act, norm=self.norm, bias=self.bias,
            position=self.position, qk_norm=self.qk_norm != "none", qk_norm_over=self.qk_norm.replace("none", "head"),
            tied=self.tied, dropout=self.dropout, init_std=0.2, moe=moe, **more)

    @property
    def alone(self) -> Case:
        """What one process does in its stead."""
        return replace(self, mesh=MeshConfig(), accumulation=1, recompute=False, evaluate=True, start="values",
                       transport="torch")


def options(dense: bool) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(Case) if f.metadata and not (dense and f.metadata["moe"])]


# ---- the covering array ----------------------------------------------------------------------------------------------

def meet(a, b) -> bool:
    """Whether two levels, as (option, level), can be chosen together."""
    pair = {a, b}
    biased = {("routing", level) for level in ("moving", "skewed", "starving")}
    halved = pair >= {("scope", "micro_batch"), ("accumulation", 2)}    # one process's micro-batch is the whole step
    unbiased = ("score", "topk_softmax") in pair and pair & biased      # it chooses by logits
    constant = pair == {("score", "topk_softmax"), ("top_k", 1)}        # a weight that no router can change
    return not halved and not unbiased and not constant


def fits(mesh: MeshConfig, level) -> bool:
    return level != ("transport", "windows") or mesh.ep > 1


def possible(meeting, mesh: MeshConfig) -> bool:
    a, b, axis = meeting
    return getattr(mesh, axis) > 1 and fits(mesh, a) and fits(mesh, b)


def levels(dense: bool) -> list[list[tuple]]:
    return [[(f.name, level) for level in f.metadata["levels"]] for f in options(dense)]


def meetings(dense: bool, axes) -> set:
    """All that is to be covered: (level, level, axis), in both orders."""
    return {(a, b, axis) for one, other in itertools.permutations(levels(dense), 2)
            for a, b in itertools.product(one, other) if meet(a, b) for axis in axes}


def covered(case: Case) -> set:
    return {(a, b, axis) for a, b in itertools.permutations(case.options.items(), 2) for axis in case.axes}


def deal(mesh: MeshConfig, dense: bool, missing: set, tries: int = 4) -> Case:
    """The case of a mesh whose options meet most of what is missing: the best of a few greedy ones."""
    axes = Case(mesh).axes
    here = sorted((meeting for meeting in missing if possible(meeting, mesh)), key=repr)
    cases = []
    for attempt in range(tries):
        shuffled = random.Random(attempt)
        chosen = list(shuffled.choice(here)[:2]) if here else []
        columns = [column for column in levels(dense) if not set(column) & set(chosen)]
        shuffled.shuffle(columns)
        for column in columns:
            free = [level for level in column if fits(mesh, level) and all(meet(level, other) for other in chosen)]
            shuffled.shuffle(free)
            gain = {level: sum((level, other, axis) in missing for other in chosen for axis in axes) for level in free}
            chosen.append(max(free, key=gain.get))
        cases.append(Case(mesh, dense, **dict(chosen)))
    return max(cases, key=lambda case: len(covered(case) & missing))


@functools.cache
def table() -> list[Case]:
    """The proof's cells: every mesh of 1, 2, 4 and 8 ranks, some again, on few ranks, until all has met, and fp32."""
    cases = []
    every = [mesh for world in (1, 2, 4, 8) for mesh in meshes(world)]
    for dense in (False, True):
        mine = [mesh for mesh in every if not dense or mesh.ep == mesh.etp == 1]
        missing = meetings(dense, {axis for mesh in mine for axis in Case(mesh).axes})
        for mesh in mine:
            cases.append(deal(mesh, dense, missing))
            missing -= covered(cases[-1])
        while missing:
            first = min(missing, key=repr)
            cases.append(deal(next(mesh for mesh in mine if possible(first, mesh)), dense, missing))
            missing -= covered(cases[-1])
    cases += [Case(MeshConfig(**sizes), dtype=torch.float32, bias=True) for sizes in FAMILIES]
    return sorted(cases, key=lambda case: case.mesh.world)


FAMILIES = (dict(rep=2), dict(fsdp=2), dict(tp=2), dict(fsdp=2, ep=2), dict(tp=2, ep=2), dict(tp=2, etp=2),
            dict(rep=2, fsdp=2), dict(fsdp=2, tp=2, ep=2, etp=2))


@functools.cache
def part() -> list[Case]:
    """A part of the table in which every two options still meet on some mesh, and every option each axis; all of two
    ranks, all of fp32, the mesh that has every axis, and of the rest whatever adds most for its time."""
    met = {}
    for case in table():
        pairs = {meeting[:2] for meeting in covered(case)} | {(a, axis) for a, _, axis in covered(case)}
        met[case] = {(case.dense, *pair) for pair in pairs}
    chosen = [case for case in table() if case.mesh.world <= 2 or case.dtype == torch.float32
              or len(case.axes) == len(AXES)]
    missing = set().union(*met.values()) - set().union(*(met[case] for case in chosen))
    while missing:
        chosen.append(max(table(), key=lambda case: len(met[case] & missing) / case.mesh.world))
        missing -= met[chosen[-1]]
    return chosen


# ---- a cell's training -----------------------------------------------------------------------------------------------

class Record(NamedTuple):
    """What a training leaves behind, on a rank its own part; kind and step in the key."""
    exact: dict[str, torch.Tensor]                      # equal to the last bit
    close: dict[tuple[str, int], dict[str, torch.Tensor]]       # (kind, step) -> name -> tensor
    like: dict[str, torch.Tensor]                       # the tensor whose box on this rank a name is
    rows: list[int]                                     # that came to the experts here, forward by forward
    margin: float                                       # the smallest between the last logit chosen and the next


def own(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The box of a whole tensor that this rank holds of `like`."""
    if isinstance(like, DTensor):
        for dim, (first, n) in enumerate(zip(*box_of(like), strict=True)):
            whole = whole.narrow(dim, first, n)
    return whole


def local(x: torch.Tensor) -> torch.Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def state(model: GPT) -> dict[str, torch.Tensor]:
    return {name: local(tensor.detach()).clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def skew(model: GPT, case: Case) -> None:
    """Values that do not begin at zero or one, so that none can be forgotten or counted twice; and the routing:

    moving      a selection bias that begins at zero
    skewed      one that gives the first experts several times their share
    starving    one that gives every token to the first K experts, in the second MoE layer to the last K
    """
    for name, p in model.named_parameters():
        if p.ndim == 1 or "bias" in name:
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(site(name)), dtype=torch.float32)
            local(p).add_(own(0.2 * noise, p))
    for i, layer in enumerate(model.moe_layers()):
        if case.routing == "skewed":
            layer.select_bias_E.copy_(0.6 / (1 + torch.arange(EXPERTS)))
        elif case.routing == "starving":
            first = 0 if i == 0 else EXPERTS - case.top_k
            layer.select_bias_E[first:first + case.top_k] = 4.0


def text(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """-> tokens, targets, both [step, row, position]."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(case.vocab_size, (STEPS, ROWS, TOKENS + 1), generator=generator)
    targets = ids[..., 1:].clone()
    if case.ignored:
        targets[torch.rand(targets.shape, generator=generator) < 0.2] = -100
    return ids[..., :-1], targets


def documents(case: Case) -> tuple:
    """-> documents, positions, both [step, row, position]; or None, None."""
    if not case.documents:
        return None, None
    begins = torch.rand(STEPS, ROWS, TOKENS, generator=torch.Generator().manual_seed(SEED)) < 0.2
    place = torch.arange(TOKENS)
    return begins.cumsum(-1), place - torch.where(begins, place, 0).cummax(-1).values


def build(case: Case, mesh: Mesh) -> GPT:
    if case.start == "meta" and mesh.world > 1:
        model = GPT(case.model, dtype=case.dtype, device="meta")
        parallelize(model, mesh)
        initialize(model, SEED, "cpu")
    else:
        model = GPT(case.model, seed=SEED, dtype=case.dtype)
        parallelize(model, mesh)
    model.recompute = case.recompute
    return model


def train(case: Case, mesh: Mesh) -> Record:
    model = build(case, mesh)
    like = dict(model.state_dict())
    exact, close, rows, margins = {f"initial {name}": x for name, x in state(model).items()}, {}, [], [math.inf]
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
    optim = OptimConfig(lr=1e-2, min_lr=0.0, eps=1e-4, clip=case.clip)
    optimizer = adamw(model, optim)
    step_text = (*text(case), *documents(case))
    micro_batch = ROWS // (case.accumulation * mesh.config.dp)

    def run(step, begin, end, draws=None):
        tokens, targets, *rows = (x if x is None else x[step, begin:end] for x in step_text)
        return model(tokens, targets, draws, None, *rows)

    def evaluate():
        model.eval()
        with torch.no_grad():
            loss = run(-1, *mesh.rows(0, ROWS // mesh.config.dp)).token_loss
        model.train()
        return mesh.sum(loss / mesh.config.tp)[0]

    for step in range(case.steps):
        loss, aux, loads, dropped = 0.0, 0.0, 0, 0
        for micro in range(case.accumulation):
            begin, _ = mesh.rows(micro, micro_batch)
            out = run(step, begin, begin + micro_batch, mesh.draws(SEED, step, begin, TOKENS))
            parts = backward(model, out, mesh, tokens=ROWS * TOKENS, accumulation=case.accumulation,
                             last=micro == case.accumulation - 1)
            loss, aux = loss + parts[0], aux + parts[1]
            loads, dropped = loads + out.counts_LE, dropped + out.dropped_L
        norm = clip_grad_norm(model.named_parameters(), optim.clip)
        losses = dict(zip(("token", "aux"), mesh.sum(loss, aux), strict=True), norm=torch.tensor(norm).double())
        exact |= dict(zip((f"loads {step}", f"dropped {step}"), mesh.sum(loads, dropped), strict=True))
        close["gradients", step] = {name: local(p.grad).clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        model.update_select_bias(exact[f"loads {step}"].long())
        close["parameters", step] = state(model)
        if case.evaluate or step == case.steps - 1:
            losses["evaluation"] = evaluate()
        close["losses", step] = losses
    like |= {f"initial {name}": x for name, x in like.items()}
    return Record(exact, close, like, rows, min(margins))


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
            assert got.close[kind, step].keys() | {"evaluation"} >= wanted.keys()
            largest = max(float(w.abs().max()) for w in wanted.values())
            for name, x in got.close[kind, step].items():
                if x.numel():
                    w = own(wanted[name], got.like.get(name, x))
                    error = float((x - w).abs().max() / (wanted[name].abs().max() + FLOOR * largest))
                    errors.append((math.inf if math.isnan(error) else error, f"{name}, step {step + 1}"))
        worst[kind] = max(errors)
    return worst


def rank_of(case: Case, folder: str, bug: Callable[[], None] | None) -> dict:
    """What a rank has to say of its part, to be merged in `verdict`."""
    if bug is not None:
        bug()
    mesh = Mesh(replace(case.mesh, transport=case.transport), seconds=60.0,
                store=dist.FileStore(f"{folder}/windows", case.mesh.world))
    record = train(case, mesh)
    mesh.close()
    return compare(record, reference(case.alone)) | {"rows": record.rows}


def verdict(case: Case, ranks: list[dict]) -> dict:
    """-> errors by kind, and a sentence on what is wrong, "" if nothing is."""
    errors = {kind: max(rank[kind] for rank in ranks) for kind in KINDS}
    wrong = [f"{kind} {error:.1e} ({name})" for kind, (error, name) in errors.items()
             if not error <= TOLERANCE[case.dtype]]
    exact = sorted({name for rank in ranks for name in rank["exact"]})
    wrong += [f"not equal to the last bit: {', '.join(exact)}"] if exact else []
    wrong += routed(case, ranks)
    return {"errors": {kind: error for kind, (error, _) in errors.items()}, "wrong": "; ".join(wrong)}


def routed(case: Case, ranks: list[dict]) -> list[str]:
    """Whether the routing was as the case says, by the reference's loads and the rows that came to each rank."""
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
        kind = ("dense" if c.dense else "MoE") + (" fp32" if c.dtype == torch.float32 else "")
        sizes = " ".join(f"{getattr(m, axis):>5}" for axis in AXES)
        errors = " ".join(f"{self.errors.get(kind, math.nan):>10.1e}" for kind in KINDS)
        return f"{sizes}  {kind:<10} {errors} {self.seconds:>6.1f}  {'WRONG' if self.wrong else 'ok'}"


HEADER = f"{' '.join(f'{axis:>5}' for axis in AXES)}  {'model':<10} {' '.join(f'{kind:>10}' for kind in KINDS)}      s"


# ---- running them ----------------------------------------------------------------------------------------------------

def run_cell(case: Case, folder: str, bug) -> None:
    """The ranks and their verdict; what they print goes to a file."""
    sys.stdout = sys.stderr = log = open(f"{folder}/log", "w", buffering=1)
    for fd in (1, 2):
        os.dup2(log.fileno(), fd)
    ranks = run_ranks(case.mesh.world, lambda rank: rank_of(case, folder, bug), folder)
    torch.save(verdict(case, ranks), f"{folder}/verdict.pt")


def prove(cases: list[Case], *, jobs: int = 2, seconds: float = 180.0, bug=None) -> Iterator[Result]:
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


def prove_all(worlds: tuple[int, ...] = (1, 2, 4, 8), *, cases: list[Case] | None = None, jobs: int = 2,
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
    for dense in (False, True):
        met = set().union(*(covered(result.case) for result in results if result.case.dense == dense))
        wanted = meetings(dense, AXES[:3] if dense else AXES)
        pairs, wanted_pairs = ({(a, b) for a, b, _ in meeting} for meeting in (met & wanted, wanted))
        lines.append(f"{'dense' if dense else 'MoE'}: {len(pairs) // 2} of {len(wanted_pairs) // 2} pairs of options "
                     f"met; {len(met & wanted) // 2} of {len(wanted) // 2} pairs and axes > 1")
    return lines


def report(results: list[Result], seconds: float) -> dict:
    """For JSON: what ran where, and each cell."""
    return {
        "torch": torch.__version__, **moe_ext._C.versions(), "seconds": round(seconds), "summary": summary(results),
        "cells": [{"mesh": {axis: getattr(r.case.mesh, axis) for axis in AXES}, "dense": r.case.dense,
                   "dtype": str(r.case.dtype).removeprefix("torch."), "options": r.case.options, "errors": r.errors,
                   "seconds": round(r.seconds, 1), "wrong": r.wrong} for r in results],
    }


def main(worlds: tuple[int, ...] = (1, 2, 4, 8), jobs: int = 2, path: Path | None = None) -> None:
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
