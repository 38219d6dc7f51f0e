"""The plan of a pipeline beside what its stages do: bytes held at the worst moment of a step, bytes sent."""

import collections
import functools
import tempfile
import weakref
from dataclasses import replace

import pytest
import torch
from ranks import run_ranks
from test_plan import Meter
from test_plan_memory import DENSE, MOE, TURNS, halved, near
from test_plan_memory import MODEL as WIDE

from moe_ext.config import Config, MeshConfig, ModelConfig, PipelineConfig, TrainConfig
from moe_ext.halves import halves
from moe_ext.model import GPT, precision
from moe_ext.optim import build_optimizer
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.pipeline import Pipeline
from moe_ext.parallel.schedule import SCHEDULES
from moe_ext.parallel.shard import build
from moe_ext.plan import by_stage, describe, memory, traffic
from moe_ext.plan.memory import again, fullest
from moe_ext.plan.pipeline import run, turns
from moe_ext.plan.roofline import DEVICES, estimate
from moe_ext.plan.search import takes
from moe_ext.plan.shares import stages


def case(moe=MOE, *, chunks=1, micros=3, schedule="interleaved", dtype="fp32", mesh=None, layers="", recompute=False,
         recompute_attention=False, **model):
    return Config(model=replace(WIDE, layers=4, moe=moe, **model), mesh=MeshConfig(pp=2, **mesh or {}),
                  pipeline=PipelineConfig(chunks=chunks, schedule=schedule, layers=layers, transport="windows"),
                  train=TrainConfig(micro_batch=2, accumulation=micros, dtype=dtype, recompute=recompute,
                                    recompute_attention=recompute_attention))


CASES = {
    "1f1b, uneven, tied": case(DENSE, layers="1,3", tied=True, position="learned"),
    "interleaved, bf16": case(replace(MOE, dense_layers=1), chunks=2, micros=4, dtype="bf16"),
    "gpipe, fp64": case(DENSE, schedule="gpipe", dtype="fp64", window=32),
    "depth first, recompute": case(chunks=2, micros=4, schedule="depth_first", recompute=True, position="learned"),
    "breadth first, attention again": case(DENSE, chunks=2, schedule="breadth_first", recompute_attention=True),
    "attention again, learned, bf16": case(DENSE, recompute_attention=True, position="learned", dtype="bf16"),
}  # fmt: skip
MESHES = {
    "fsdp, tied": case(DENSE, mesh=dict(fsdp=2), tied=True),
    "tp, chunks": case(mesh=dict(tp=2), chunks=2, micros=2, bias=True),
    "ep, bf16": case(replace(TURNS, scope="micro_batch"), mesh=dict(fsdp=2, ep=2), dtype="bf16"),
    "sp, chunks": case(mesh=dict(sp=2), chunks=2, micros=2, kv_heads=1),
}  # fmt: skip


class Holder:
    """A saved tensor, for as long as autograd keeps it."""

    def __init__(self, t):
        self.t = t


class Peak(torch.autograd.graph.saved_tensors_hooks):
    """The most bytes of storages that autograd keeps at a time; none of `known` tensors."""

    def __init__(self, known):
        super().__init__(self.keep, lambda held: held.t)
        self.known, self.times = {t.untyped_storage()._cdata for t in known}, collections.Counter()
        self.now = self.most = 0

    def __enter__(self):
        super().__enter__()
        return self

    def keep(self, t):
        held, storage = Holder(t), t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.count(key, size, 1)
            weakref.finalize(held, self.count, key, size, -1)
        return held

    def count(self, key, size, by):
        self.times[key] += by
        if self.times[key] == (by == 1):        # the first that holds it, or the last
            self.now += by * size
            self.most = max(self.most, self.now)


@functools.cache
def measured(world):
    """Per case, of each rank: (most bytes saved, bytes of weights cast once, of state, bytes sent by group, the groups
    by axis)."""

    def body(rank):
        result = {}
        for name, config in (CASES | MESHES).items():
            if config.mesh.world != world:
                continue
            c, t, mesh = config.model, config.train, Mesh(config.mesh)
            model = build(config, mesh)
            optimizer = build_optimizer(model, config.optim)
            pipeline = Pipeline(model, mesh, config.pipeline, micro_batch=t.micro_batch, micros=t.accumulation)
            text = torch.randint(c.vocab_size, (config.sequences_per_step, c.seq_len + 1),
                                 generator=torch.Generator().manual_seed(1))
            inputs, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()

            def feed(micro, t=t, c=c, mesh=mesh, inputs=inputs, targets=targets):
                begin, end = mesh.rows(micro, t.micro_batch)
                return inputs[begin:end], targets[begin:end], mesh.draws(t.seed, 1, begin, c.seq_len)

            sent, send = [], pipeline.links.send
            pipeline.links.send = lambda action, x, sent=sent, send=send: (sent.append(x.nbytes), send(action, x))
            with halves(model, config):
                known = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
                with Peak([*known, inputs, targets]) as peak, Meter() as meter:
                    pipeline.step(feed, t.accumulation, tokens=config.tokens_per_step,
                                  around=lambda kind, config=config, mesh=mesh: precision(config, mesh.device))
            optimizer.step()
            held = [t for p in model.parameters() for t in (p, p.grad, *(optimizer.state[p][m] for m in (
                "exp_avg", "exp_avg_sq")))]
            state = sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in held)
            groups = {axis: mesh.dense.get_group(axis) for axis in ("pp", "rep", "fsdp", "tp")}
            groups |= {axis: mesh.sparse.get_group(axis) for axis in ("efsdp", "ep", "etp")}
            groups |= {axis: mesh.data.get_group(axis) for axis in ("dp", "sequence")}
            groups |= {"sp": mesh.tokens.get_group("sp")} if config.mesh.sp > 1 else {}
            groups |= {"world": mesh.pipe.get_group("stage")}
            groups = {axis: tuple(torch.distributed.get_process_group_ranks(g)) for axis, g in groups.items()}
            meter.sent[groups["pp"]] += sum(sent)
            result[name] = peak.most, halved(config, model), state, meter.sent, groups
            pipeline.close()
        return result

    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(world, body, folder)


@pytest.mark.parametrize("name", CASES)
def test_memory_of_each_stage(name):
    """State to the byte; activations of all chunks that live at the worst moment, but for those made again."""
    config = CASES[name]
    for stage, rank in enumerate(measured(2)):
        held, (saved, cast, state, _, _) = memory(config, "cpu", stage), rank[name]
        assert held.state == state and held.cast == cast
        assert near(held.activations - again(config, "cpu", stages(config)[stage]).activations, saved)
    assert memory(config, "cpu") == memory(config, "cpu", fullest(config, "cpu"))


@pytest.mark.parametrize("name", MESHES)
def test_traffic_and_state_of_each_stage(name):
    config = MESHES[name]
    for rank in (0, 2):
        _, _, state, sent, groups = measured(4)[rank][name]
        want = collections.Counter()
        for axis, size in traffic(config, rank // 2).items():
            if size:
                want[groups[axis]] += size
        assert {g: size for g, size in sent.items() if size} == {g: size for g, size in want.items() if size}
        assert memory(config, "cpu", rank // 2).state == state


LONG = [(name, pp, chunks, micros, live) for name in SCHEDULES for pp, chunks, micros, live in (
    (4, 1, 29, 0), (2, 3, 24, 0), (4, 2, 3, 0), (3, 1, 50, 2), (2, 2, 50, 10), (4, 4, 64, 20))
    if takes(PipelineConfig(schedule=name, chunks=chunks, live=live), pp, micros)]


@pytest.mark.parametrize("name, pp, chunks, micros, live", LONG)
def test_long_steps_go_on_as_short_ones(name, pp, chunks, micros, live):
    """Bubble and live chunks of many micro-batches, from few, beside the whole step in virtual time."""
    config = seed(pp=pp, chunks=chunks, micros=micros, schedule=name)
    config = replace(config, pipeline=replace(config.pipeline, live=live))
    whole = run(name, pp, chunks, micros, live)
    share, live = turns(config)
    assert share == pytest.approx(1 - 3 * chunks * micros / whole.time) and live == whole.live


def test_static_bubbles_are_the_textbooks():
    """(pp - 1) / (chunks * micros + pp - 1), and as many live chunks."""
    for chunks, micros, name, live in ((1, 8, "1f1b", [4, 3, 2, 1]), (1, 8, "gpipe", [8] * 4),
                                       (4, 8, "interleaved", [19, 17, 15, 13])):
        share, held = turns(seed(schedule=name, chunks=chunks, micros=micros))
        assert share == pytest.approx(3 / (chunks * micros + 3)) and held == live


def seed(*, pp=4, schedule="interleaved", chunks=4, micros=8, **options):
    """Seed 001's model: TP 2 x PP 4 with four chunks, micro-batches of two sequences."""
    return Config(
        model=ModelConfig(vocab_size=50432, seq_len=2048, layers=16, dim=2048, heads=32, hidden=8192, act="gelu_tanh",
                          norm="layernorm", bias=True, position="learned", tied=True),
        mesh=MeshConfig(pp=pp, tp=2), pipeline=PipelineConfig(chunks=chunks, schedule=schedule),
        train=TrainConfig(micro_batch=2, accumulation=micros, dtype="fp16", **options))


def test_a_plan_says_what_the_pipeline_does():
    config = seed()
    said = describe(config, GPT(config.model, device="meta"))
    for words in ("8 ranks: pp 4 x tp 2", "interleaved; blocks 1 + 1 + 1 + 1; bubble 8.6%, at most 19 (stage 0), 17 (1)"
                  ", 15 (2), 13 (3) live chunks of 32", "(1 to 2)", "activations per rank of stage 0, which has most",
                  "tensors between the stages", "each rank sends per step: pp 1,093 MiB, tp"):
        assert words in said
    assert by_stage([3, 3]) == "3" and by_stage([1, 2, 2, 1000]) == "1 (stage 0), 2 (1 to 2), 1,000 (3)"


def test_time_has_the_bubble():
    """A pipeline that takes a micro-batch at a time takes as long as its stages one after the other."""
    device = DEVICES["h100"]
    many, one = (estimate(seed(chunks=1, schedule="gpipe", micros=micros), device) for micros in (64, 1))
    assert many.compute == pytest.approx(64 * one.compute * (67 / 64) / 4)
    busiest = max(memory(seed(), stage=stage).activations for stage in range(4))
    assert memory(seed()).activations == busiest
