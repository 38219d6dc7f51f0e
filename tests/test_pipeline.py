"""The runtime of a pipeline: equal to one process in every schedule, one order on all ranks of a stage, memory freed as
soon as it can be; the trace of a real run, and the command that names what is slow in one."""

import gc
import itertools
import json
import random
import re
import runpy
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch.distributed.tensor import DTensor

from benchmarks.pipeline import MODEL, Sleeper, sleepers
from moe_ext.config import Config, MeshConfig, ModelConfig, MoEConfig, PipelineConfig, TrainConfig
from moe_ext.log import trace
from moe_ext.log.slow import slow
from moe_ext.log.trace import Event
from moe_ext.parallel import record
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.pipeline import Pipeline
from moe_ext.parallel.schedule import SCHEDULES, Action, Turns, tensor_id
from moe_ext.parallel.shard import backward, build
from moe_ext.parallel.stages import Stage
from moe_ext.plan.schedule import Hiccup, Times
from moe_ext.plan.schedule import events as simulated

pytestmark = pytest.mark.c_core

SEQUENCES, S = 8, 16
GPT = ModelConfig(vocab_size=64, seq_len=S, layers=4, dim=32, heads=4, hidden=48, tied=True, dropout=0.2, init_std=0.2,
                  moe=MoEConfig(experts=4, top_k=2, hidden=24, balance_weight=0.1, dense_layers=1))
IDS = torch.randint(64, (SEQUENCES, S + 1), generator=torch.Generator().manual_seed(3))


def config_of(mesh, pipeline=None):
    return Config(model=GPT, mesh=mesh, pipeline=pipeline or PipelineConfig(),
                  train=TrainConfig(dtype="fp64", micro_batch=1, device="cpu"))


def feeder(mesh):
    def feed(micro):
        begin, end = mesh.rows(micro, 1)
        return IDS[begin:end, :-1], IDS[begin:end, 1:], mesh.draws(7, 1, begin, S)

    return feed


def taken_gradients(model):
    """{name: the whole gradient}; the model has none left."""
    found = {name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()
             for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    return found


def dawdling(rank):
    """A delay of links, drawn anew for each tensor."""
    draw = random.Random(rank)
    return lambda action: draw.choice([0, 0, 0.002, 0.005])


# ---- equal to one process --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def alone():
    """Totals and gradients of the plain loop, in one process."""
    mesh = Mesh(MeshConfig())
    model = build(config_of(mesh.config), mesh)
    totals, feed = [0.0] * 6, feeder(mesh)
    for micro in range(SEQUENCES):
        out = model(*feed(micro))
        parts = backward(model, out, mesh, tokens=SEQUENCES * S, accumulation=SEQUENCES, last=micro == SEQUENCES - 1)
        parts = *parts, out.balance / SEQUENCES, out.counts_LE, out.dropped_L, out.bad_L
        totals = [total + number for total, number in zip(totals, parts, strict=True)]
    return mesh.sum(*totals), taken_gradients(model)


def test_one_stage_is_the_plain_loop(alone):
    mesh = Mesh(MeshConfig())
    model, kinds = build(config_of(mesh.config), mesh), []

    def around(kind):
        kinds.append(kind)
        return torch.enable_grad()

    pipeline = Pipeline(model, mesh, micro_batch=1, micros=SEQUENCES)
    totals = pipeline.sum(*pipeline.step(feeder(mesh), SEQUENCES, tokens=SEQUENCES * S, around=around))
    pipeline.close()
    assert kinds == ["forward", "backward"] * SEQUENCES
    assert all(map(torch.equal, totals, alone[0]))
    found = taken_gradients(model)
    assert found.keys() == alone[1].keys() and all(torch.equal(found[name], alone[1][name]) for name in found)


MESHES = [(MeshConfig(pp=2, tp=2), 2, "windows"), (MeshConfig(pp=2, fsdp=2, ep=2), 2, "torch"),
          (MeshConfig(pp=2, rep=2), 1, "windows"), (MeshConfig(pp=4), 1, "torch")]


@pytest.mark.parametrize(("sizes", "chunks", "transport"), MESHES, ids=["pp2_tp2", "pp2_fsdp2_ep2", "pp2_rep2", "pp4"])
def test_every_schedule_equals_one_process(alone, tmp_path, sizes, chunks, transport):
    names = SCHEDULES if chunks == 1 else ("interleaved", "dfc", "bfc")      # the rest with chunks: test_proof
    micros = SEQUENCES // sizes.dp

    def body(rank):
        mesh = Mesh(sizes)
        model = build(config_of(sizes, PipelineConfig(chunks=chunks)), mesh)
        wrong, orders = [], {}
        for name in names:
            config = PipelineConfig(chunks=chunks, schedule=name, transport=transport,
                                    live=chunks * 3 if name == "bfc" else 0)
            pipeline = Pipeline(model, mesh, config, micro_batch=1, micros=micros, delay=dawdling(rank))
            totals = pipeline.sum(*pipeline.step(feeder(mesh), micros, tokens=SEQUENCES * S))
            pipeline.close()
            wrong += [f"{name}: totals[{i}]" for i, (a, b) in enumerate(zip(totals, alone[0], strict=True))
                      if not torch.allclose(a, b.double(), rtol=1e-12, atol=1e-15)]
            # what is gathered must be sharded: no group of FSDP may be left with whole parameters
            wrong += [f"{name}: {place} is left whole" for place, p in model.named_parameters()
                      if sizes.stage > 1 and not isinstance(p, DTensor)]
            wrong += [f"{name}: gradient of {place}" for place, grad in taken_gradients(model).items()
                      if not float((grad - alone[1][place]).abs().max()) <= 1e-12 * float(alone[1][place].abs().max())]
            orders[name] = [tuple(action) for action in pipeline.order]
        return wrong, orders

    results = run_ranks(sizes.world, body, tmp_path)
    assert not any(wrong for wrong, _ in results), [wrong for wrong, _ in results]
    for stage in range(sizes.pp):
        orders = [orders for _, orders in results[stage * sizes.stage:(stage + 1) * sizes.stage]]
        assert all(other == orders[0] for other in orders)
        for name in names:
            planned = Turns(name, sizes.pp, chunks, micros, stage).order
            assert sorted(orders[0][name]) == sorted(planned)
            assert SCHEDULES[name].dynamic or orders[0][name] == planned


# ---- the order -------------------------------------------------------------------------------------------------------
def test_dynamic_order_follows_what_arrives_and_is_one_for_a_stage(tmp_path):
    """Rank 1's sends come late, each step others, so that orders differ from step to step, never inside a stage."""
    sizes, steps = MeshConfig(pp=2, fsdp=2), 6

    def body(rank):
        mesh = Mesh(sizes)
        pipeline = Pipeline(sleepers(mesh, 2, lambda action: 0.0), mesh, PipelineConfig(
            chunks=2, schedule="bfc", transport="windows"), micro_batch=1, micros=4, delay=dawdling(rank))
        orders = []
        for _ in range(steps):
            pipeline.sum(*pipeline.step(lambda micro: (micro,), 4, tokens=1))
            orders.append([tuple(action) for action in pipeline.order])
        pipeline.close()
        return orders

    first, second, third, fourth = run_ranks(sizes.world, body, tmp_path)
    assert first == second and third == fourth
    assert len({str(order) for order in [*first, *third]}) > 2


def test_ranks_that_decide_alone_are_found(tmp_path):
    """No collective of theirs meets: the orders themselves are compared."""
    def body(rank):
        mesh = Mesh(MeshConfig(pp=2, fsdp=2))
        pipeline = Pipeline(sleepers(mesh, 1, lambda action: 0.0), mesh, PipelineConfig(
            schedule="bfc", transport="windows"), micro_batch=1, micros=4)
        if rank in (2, 3):
            turns = itertools.permutations(range(4))
            micros = next(itertools.islice(turns, rank, None))
            order = iter([Action(kind, 0, micro) for micro in micros for kind in "FB"])
            pipeline.links.agree = lambda choose: next(order)
        totals = pipeline.step(lambda micro: (micro,), 4, tokens=1)
        with pytest.raises(RuntimeError) as error:
            pipeline.sum(*totals)
        pipeline.close()
        return str(error.value)

    sentences = run_ranks(4, body, tmp_path)
    assert len(set(sentences)) == 1
    assert "the 2 ranks of pipeline stage 1 (ranks 2 to 3) ran step 1 in different orders" in sentences[0]


def test_lines_are_those_of_the_seed(tmp_path, capfd):
    def body(rank):
        mesh = Mesh(MeshConfig(pp=2))
        pipeline = Pipeline(sleepers(mesh, 2, lambda action: 0.0), mesh, PipelineConfig(
            chunks=2, schedule="dfc", transport="windows", lines=True), micro_batch=1, micros=4)
        pipeline.step(lambda micro: (micro,), 4, tokens=1)
        pipeline.close()
        return [(action.kind, tensor_id(action, 2, 2)) for action in pipeline.order]

    orders = run_ranks(2, body, tmp_path)
    lines = capfd.readouterr().out.splitlines()
    for rank, order in enumerate(orders):
        assert [line for line in lines if line.startswith(f"rank {rank} ")] == [
            f"rank {rank} {'forward' if kind == 'F' else 'backward'} {what} tensor {number}"
            for kind, number in order for what in ("start", "finished")]


# ---- memory and synchronisation --------------------------------------------------------------------------------------
def test_what_was_sent_is_freed(tmp_path):
    """Between forward and backward a stage has only what autograd has: Sleeper's backward needs no output."""
    class Watched(Sleeper):
        outputs = []        # noqa: RUF012

        def forward(self, micro, x_BSD=None):
            out = super().forward(micro, x_BSD)
            if out.x_BSD is not None:
                self.outputs.append(weakref.ref(out.x_BSD))
            return out

    def body(rank):
        mesh = Mesh(MeshConfig(pp=2))
        pieces = [Watched(MODEL, c * 2 + rank, c, 4, lambda action: 0.0) for c in range(2)]
        pipeline = Pipeline(Stage(pieces, mesh), mesh, PipelineConfig(chunks=2, schedule="gpipe", transport="windows"),
                            micro_batch=1, micros=4)
        most = []

        def around(kind):
            most.append(sum(output() is not None for output in Watched.outputs))
            return torch.enable_grad()

        gc.disable()        # no cycles may hold them
        pipeline.step(lambda micro: (micro,), 4, tokens=1, around=around)
        pipeline.close()
        return max(most), len(Watched.outputs)

    assert run_ranks(2, body, tmp_path) == [(0, 8), (0, 4)]


def spans_of(pipeline):
    return [(span.kind, None if span.action is None else tuple(span.action)) for span in pipeline.recorder.spans]


def test_gradients_are_summed_as_soon_as_a_chunk_is_done(tmp_path):
    def body(rank):
        mesh, found = Mesh(MeshConfig(pp=2, fsdp=2)), {}
        for name in ("breadth_first", "depth_first"):
            pipeline = Pipeline(sleepers(mesh, 2, lambda action: 0.0), mesh, PipelineConfig(
                chunks=2, schedule=name, transport="windows", trace=1), micro_batch=1, micros=4)
            for _ in range(2):
                pipeline.step(lambda micro: (micro,), 4, tokens=1)
            found[name] = spans_of(pipeline)
            pipeline.close()
        return found

    results = run_ranks(4, body, tmp_path)
    for found in results:
        for spans in found.values():
            syncs = [at for at, (kind, action) in enumerate(spans) if kind == "sync" and action]
            assert [spans[at][1] for at in syncs] == [("B", 1, 3), ("B", 0, 3)]
            for at in syncs:        # right after the last of its chunk, but for what others wait for
                assert ("backward", spans[at][1]) in spans[at - 2:at]
    first = {name: [kind for kind, _ in found[name] if kind in ("backward", "sync")].index("sync")
             for name, found in [(name, results[0]) for name in results[0]]}
    assert first == {"breadth_first": 4, "depth_first": 6}


# ---- the trace -------------------------------------------------------------------------------------------------------
def traced(folder, *, seconds=lambda rank, action: 0.004, delay=None, trace_steps=2, steps=3, pp=4):
    """A real run of sleepers -> its folder, with trace.json."""
    def body(rank):
        mesh = Mesh(MeshConfig(pp=pp))
        pipeline = Pipeline(sleepers(mesh, 2, lambda action: seconds(rank, action)), mesh, PipelineConfig(
            chunks=2, schedule="interleaved", transport="windows", trace=trace_steps), micro_batch=1, micros=4,
            folder=folder, delay=delay and (lambda action: delay(rank, action)))
        for _ in range(steps):
            pipeline.step(lambda micro: (micro,), 4, tokens=1)
        pipeline.close()
        return pipeline.recorder.offset, len(pipeline.recorder.spans)

    assert run_ranks(pp, body, folder) == [(0.0, 0)] * pp
    return folder


def test_a_real_run_writes_a_trace(tmp_path):
    events, names = trace.read(traced(tmp_path, seconds=lambda *_: 0.0, pp=2) / "trace.json")
    assert names == ["rank 0, stage 0", "rank 1, stage 1"]
    assert {e.step for e in events} == {2, 3}
    for lane, step in itertools.product(range(2), (2, 3)):
        own = [e for e in events if (e.lane, e.step) == (lane, step)]
        count = {kind: sum(e.kind == kind for e in own) for kind in trace.COLOURS}
        # the first stage takes no activation for its first chunk, the last no gradient for its last
        assert count == {"forward": 8, "backward": 8, "wait": 16, "send": 12, "sync": 3}
        work = sorted((e for e in own if e.kind != "send"), key=lambda e: e.begin)
        assert all(a.end <= b.begin + 1e-9 for a, b in itertools.pairwise(work))
        for send in (e for e in own if e.kind == "send"):
            users = [e for e in work if e.kind in ("forward", "backward") and e[2:4] == send[2:4]]
            assert any(send.begin <= send.end <= user.begin + 1e-9 for user in users)


def test_a_run_shorter_than_its_trace_writes_what_there_is(tmp_path):
    events, _ = trace.read(traced(tmp_path, seconds=lambda *_: 0.0, pp=2, trace_steps=9, steps=2) / "trace.json")
    assert {e.step for e in events} == {2}


def test_a_slow_rank_of_a_real_run_is_named(tmp_path):
    found = slow(traced(tmp_path, seconds=lambda rank, action: 0.02 if rank == 2 else 0.003))
    assert re.search(r"^rank 2 is slow: its forwards take \d\.\dx and its backwards take \d\.\dx", found, re.M)


def test_a_slow_link_of_a_real_run_is_named(tmp_path):
    found = slow(traced(tmp_path, delay=lambda rank, action: 0.04 * (rank == 1 and action.kind == "F")))
    assert re.search(r"^the link from rank 1 to rank 2 is slow: rank 2 waits \d\d % of the time", found, re.M)


def made(folder, *, tp=1, pp=4, vpp=4, micros=8, work=lambda rank, kind, chunk, micro: 1.0, way=lambda *_: 0.0):
    """The trace of a run of gpipe in virtual milliseconds."""
    events, clock, sent = [], [0.0] * (pp * tp), {}

    def act(rank, kind, chunk, micro, piece):
        word, begin = "forward" if kind == "F" else "backward", clock[rank]
        if (rank, kind, chunk, micro) in sent:
            left = sent[rank, kind, chunk, micro]
            come = left + way(rank, kind, chunk, micro)
            events.append(Event(rank, "send", chunk, micro, left, come))
            begin = max(begin, come)
        events.append(Event(rank, "wait", chunk, micro, clock[rank], begin))
        end = clock[rank] = begin + work(rank, kind, chunk, micro)
        events.append(Event(rank, word, chunk, micro, begin, end))
        after = piece + (1 if kind == "F" else -1)
        if 0 <= after < pp * vpp:
            sent[after % pp * tp + rank % tp, kind, after // pp, micro] = end

    for kind in "FB":
        for piece in range(pp * vpp) if kind == "F" else reversed(range(pp * vpp)):
            for micro in range(micros):
                for rank in range(piece % pp * tp, (piece % pp + 1) * tp):
                    act(rank, kind, piece // pp, micro, piece)
    events = [e._replace(begin=e.begin / 1e3, end=e.end / 1e3) for e in events]
    trace.write(folder / "trace.json", events, [f"rank {rank}, stage {rank // tp}" for rank in range(pp * tp)])
    return folder


def test_what_is_slow_in_a_trace(tmp_path):
    noise = random.Random(0)

    def usual(rank, kind, chunk, micro):
        head = 1.8 if rank // 2 == 3 and chunk == 3 else 1.0        # longer for good reason
        return head * (1 if kind == "F" else 2) * noise.uniform(0.95, 1.05)

    assert slow(made(tmp_path, tp=2, work=usual)) == "nothing stands out"
    assert slow(made(tmp_path, tp=2, work=lambda rank, kind, *more: usual(rank, kind, *more) * (
        1.8 if rank == 5 and kind == "F" else 1))).startswith("rank 5 is slow: its forwards take 1.8x the median")
    # collectives make a stage's ranks slow together
    assert slow(made(tmp_path, tp=2, work=lambda rank, *more: usual(rank, *more) * (1.5 if rank in (2, 3) else 1))
                ).startswith("ranks 2 and 3 are slow: their forwards take 1.5x and their backwards take 1.5x")
    assert slow(made(tmp_path, tp=2, work=lambda rank, kind, chunk, micro: usual(rank, kind, chunk, micro) + 20 * (
        rank == 4 and micro % 4 == 3))).startswith("rank 4 is stalling: 16 of 64 actions take over 2x their usual time")
    late = made(tmp_path, tp=2, work=usual, way=lambda rank, kind, *_: 9.0 if (rank, kind) == (4, "F") else 0.2)
    assert re.fullmatch(r"the link from rank 2 to rank 4 is slow: rank 4 waits \d+ % of the time for what is under way "
                        r"on it, 9\.0 ms each; on other links [01] %", slow(late))


def test_what_is_slow_in_a_simulated_trace(tmp_path):
    def found(**what):
        times = Times(4, 4, 8, tp=2, **what)
        events = simulated(times.run("interleaved"), times, times.draw(0)[1])
        trace.write(tmp_path / "trace.json", events, [f"stage {lane // 2}" for lane in range(8)])
        return slow(tmp_path / "trace.json")

    assert found() == "nothing stands out"
    assert found(slow=(5, 1.5)).startswith("ranks 4 and 5 are slow: their forwards take 1.5x")
    assert "the link from rank 3 to rank 5 is slow" in found(late=Hiccup(3, 1.0, 3.0))


def test_the_command_and_what_it_refuses(tmp_path, monkeypatch, capsys):
    def run(path):
        monkeypatch.setattr(sys, "argv", ["log", "slow", str(path)])
        runpy.run_module("moe_ext.log", run_name="__main__", alter_sys=True)

    run(made(tmp_path))
    run(tmp_path / "trace.json")
    assert capsys.readouterr().out == 2 * "nothing stands out\n"
    whole = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    work = [line for line in whole if line["ph"] == "X" and line["cat"] == "forward"]
    names = [line for line in whole if line["ph"] == "M"]
    for lines in [{"ph": "X"}], [], names, work, [*names, work[0] | {"dur": 0}]:
        (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": lines}))
        with pytest.raises(SystemExit, match=r"error: .*trace.json is no trace of a pipeline"):
            run(tmp_path)
    with pytest.raises(SystemExit, match=r"error: no .*none.json: a run writes it with --pipeline\.trace STEPS"):
        run(tmp_path / "none.json")


def test_clocks_of_two_hosts(tmp_path, monkeypatch):
    def body(rank):
        read, monotonic = Path.read_text, time.monotonic
        if rank == 1:
            monkeypatch.setattr(Path, "read_text", lambda path, *_: "another" if path.name == "boot_id" else read(path))
            monkeypatch.setattr(record.time, "monotonic", lambda: monotonic() - 5000)
        return record.clock_offset(Mesh(MeshConfig(pp=2)))

    assert run_ranks(2, body, tmp_path) == [0.0, pytest.approx(5000, abs=0.5)]
