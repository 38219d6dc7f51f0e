"""Dynamic and static schedules of a pipeline beside each other: python -m benchmarks.pipeline --help.

STAGES stages of CHUNKS chunks. Their pieces compute nothing: a forward sleeps F, a backward 2 F, so that times are
known and the ranks, forked processes of one thread, hardly need a processor. Everything else is real: runtime,
agreement and links. What disturbs them is drawn from the round's number:

    even        nothing (1f1b has one chunk on a stage, which takes four times as long)
    jitter      a tensor takes up to 2 F longer to its receiver, evenly drawn
    late sends  rank 1 stalls in sending: one of its tensors in ten comes 10 F later
    stalls      all ranks stall in computing: one action in ten takes 10 F longer
    one stalls  rank 1 does alone; whatever the order, no step is shorter than what that rank has to do
    slow rank   rank 2 takes 1.5 times as long for everything
A round is a step of each schedule, one after the other in turns, with the same draws. A step takes from the first
rank's start to the last one's end. The ratio is the median over the rounds of (interleaved's time / another's): above 1
it beats the static schedule. Beside it: the same from the simulator (moe_ext.plan schedule), the median of real over
simulated time, and when the gradients of a chunk are whole, as a share of the step (mean over chunks and stages).

Overhead: what lies between two actions of the last stage, which takes twice as long as the others and so hardly ever
waits: runtime and links, median and lowest decile, for which nobody else wanted the core. Two stages whose work spins,
on two cores, find their caches warm, as a rank that computes does; those that sleep wake up to cold ones. With two
ranks in each stage these agree on every action.

Prints Markdown and what was wanted of it; writes benchmarks/results/pipeline-<cpu>.json.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.ops import machine, write
from moe_ext.config import MeshConfig, ModelConfig, PipelineConfig
from moe_ext.model import Losses
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.pipeline import Pipeline
from moe_ext.parallel.ranks import run_ranks
from moe_ext.parallel.schedule import SCHEDULES, Action
from moe_ext.parallel.stages import Stage
from moe_ext.plan.schedule import Hiccup, Times

STAGES, CHUNKS = 4, 4
MODEL = ModelConfig(layers=STAGES * CHUNKS, dim=16, seq_len=16, heads=2, tied=False)


# ---- pieces that only take time --------------------------------------------------------------------------------------
def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


class Work(torch.autograd.Function):
    """x as it is, after `forth` seconds; its gradient after `back` seconds, which are spent by `spend`."""

    @staticmethod
    def forward(ctx, x, weight, forth, back, spend):
        ctx.back, ctx.spend = back, spend
        spend(forth)
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        ctx.spend(ctx.back)
        return dx, dx.new_zeros(1), None, None, None


class Sleeper(nn.Module):
    """In the place of piece number `piece` of a GPT. seconds(action): how long one takes. It is fed its micro-batch."""

    def __init__(self, config: ModelConfig, piece: int, chunk: int, pieces: int, seconds: Callable[[Action], float],
                 spend: Callable[[float], None] = time.sleep):  # fmt: skip
        super().__init__()
        self.config, self.chunk, self.seconds, self.spend = config, chunk, seconds, spend
        self.first, self.last, self.layers = piece == 0, piece == pieces - 1, []
        self.weight = nn.Parameter(torch.zeros(1))

    def moe_layers(self):
        return []

    def forward(self, micro, x_BSD=None):
        if self.first:
            x_BSD = torch.zeros(1, self.config.seq_len, self.config.dim)
        forth, back = (self.seconds(Action(kind, self.chunk, micro)) for kind in "FB")
        x_BSD = Work.apply(x_BSD, self.weight, forth, back, self.spend)
        none, zero = torch.zeros(0, dtype=torch.int32), torch.zeros(())
        return Losses(x_BSD.sum() if self.last else zero, zero, none.view(0, 0), none, none, zero,
                      None if self.last else x_BSD)  # fmt: skip


def sleepers(mesh: Mesh, chunks: int, seconds: Callable[[Action], float], spend=time.sleep) -> Stage:
    """A stage whose pieces only take time."""
    pp = mesh.config.pp
    return Stage([Sleeper(MODEL, c * pp + mesh.pp_rank, c, pp * chunks, seconds, spend) for c in range(chunks)], mesh)


# ---- races -----------------------------------------------------------------------------------------------------------
class Scene(NamedTuple):
    """times: in units of F."""

    times: Times
    schedules: tuple[str, ...] = ("interleaved", "dfc", "bfc")
    wanted: float = 0.0  # of the best dynamic schedule over interleaved; 0: nothing


def times_of(micros, **more):
    return Times(STAGES, CHUNKS, micros, **more)


SCENES = {
    "even": Scene(times_of(8), ("interleaved", *(name for name in SCHEDULES if name != "interleaved")), 1 / 1.02),
    "jitter": Scene(times_of(8, jitter=2.0), wanted=1.15),
    "late sends": Scene(times_of(8, late=Hiccup(1, 0.1, 10.0)), wanted=1.1),
    "stalls": Scene(times_of(16, stall=Hiccup(-1, 0.1, 10.0))),
    "one stalls": Scene(times_of(8, stall=Hiccup(1, 0.1, 10.0))),
    "slow rank": Scene(times_of(8, slow=(2, 1.5)), wanted=1 / 1.02),
}


def as_run(name: str, times: Times) -> Times:
    """The times of a schedule that has one chunk on a stage."""
    if name != "1f1b":
        return times
    return dataclasses.replace(times, vpp=1, forward=tuple(times.vpp * forward for forward in times.forward))


class Racer:
    """A pipeline of sleepers on one rank; all ranks make it. F: seconds of a forward."""

    def __init__(self, mesh: Mesh, name: str, times: Times, F: float, transport: str, trace=10**9, spend=time.sleep):
        self.mesh, self.times, self.F = mesh, as_run(name, times), F
        config = PipelineConfig(chunks=self.times.vpp, schedule=name, transport=transport, trace=trace)
        self.pipeline = Pipeline(sleepers(mesh, self.times.vpp, self.seconds, spend), mesh, config, micro_batch=1,
                                 micros=times.micros, delay=self.delay)  # fmt: skip

    def seconds(self, action):
        return self.F * self.work[self.mesh.pp_rank, action]

    def delay(self, action):
        receiver = (self.mesh.pp_rank + (1 if action.kind == "F" else -1)) % self.mesh.config.pp
        return self.F * self.transit[receiver, action][self.mesh.stage_rank]

    def step(self, round: int, around=lambda kind: nullcontext()) -> tuple[float, float]:
        """-> its beginning and end."""
        self.work, self.transit = self.times.draw(round)
        dist.barrier()
        begin = time.monotonic()
        self.pipeline.step(lambda micro: (micro,), self.times.micros, tokens=1, around=around)
        return begin, time.monotonic()


def race(mesh: Mesh, scene: Scene, F: float, rounds: int, transport: str):
    """-> {schedule: seconds of each round's step, [rounds]}, and on rank 0 {schedule: events of these steps}"""
    racers = {name: Racer(mesh, name, scene.times, F, transport) for name in scene.schedules}
    steps = {name: [] for name in racers}
    for round in range(rounds + 1):  # the first warms up
        for name in list(racers)[:: 1 if round % 2 else -1]:
            steps[name].append(racers[name].step(round))
    every, events = [None] * mesh.world, {}
    dist.all_gather_object(every, steps)
    for name, racer in racers.items():
        events[name] = racer.pipeline.recorder.gather()
        racer.pipeline.close()
    return {name: [max(end for _, end in step) - min(begin for begin, _ in step)
                   for step in zip(*(rank[name][1:] for rank in every), strict=True)]
            for name in racers}, events  # fmt: skip


def whole(events) -> float:
    """When the gradients of a chunk are whole, as a share of its rank's step: mean over chunks, ranks and steps."""
    shares = []
    for step, lane in {(e.step, e.lane) for e in events}:
        own = [e for e in events if e.step == step and e.lane == lane and e.kind != "send"]
        begin, end = min(e.begin for e in own), max(e.end for e in own if e.kind == "backward")
        shares += [(e.begin - begin) / (end - begin) for e in own if e.kind == "sync" and e.chunk >= 0]
    return statistics.mean(shares)


def run(rank: int, scenes: dict[str, Scene], F: float, rounds: int, transport: str) -> list[dict]:
    """The lines of the table, on rank 0."""
    mesh, lines = Mesh(MeshConfig(pp=STAGES)), []
    for what, scene in scenes.items():
        times, events = race(mesh, scene, F, rounds, transport)
        if rank:
            continue
        ideal = {name: [F * as_run(name, scene.times).run(name, seed=round + 1).time for round in range(rounds)]
                 for name in times}  # fmt: skip
        for name, seconds in times.items():
            lines.append({
                "scene": what, "schedule": name, "micros": scene.times.micros, "ms": 1e3 * statistics.median(seconds),
                "ratio": ratio(times["interleaved"], seconds), "simulated": ratio(ideal["interleaved"], ideal[name]),
                "real / simulated": ratio(seconds, ideal[name]), "whole": whole(events[name]),
            })  # fmt: skip
    return lines


def ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def overhead(rank: int, stages: int, ranks: int, F: float, transport: str, spend) -> list[dict]:
    """ranks: of a stage. The lines, on rank 0, of the last rank."""
    mesh = Mesh(MeshConfig(pp=stages, fsdp=ranks))
    times, lines = Times(stages, CHUNKS, 8, tp=ranks, forward=(1.0,) * (stages - 1) + (2.0,)), []
    for name in ("interleaved", "dfc", "bfc"):
        racer, gaps = Racer(mesh, name, times, F, transport, trace=0, spend=spend), []
        for round in range(4):
            marks = []

            @contextmanager
            def around(kind, marks=marks):
                marks.append(time.perf_counter())
                yield
                marks.append(time.perf_counter())

            racer.step(round, around)
            gaps += [begin - end for end, begin in zip(marks[1:-1:2], marks[2::2], strict=True)] if round else []
        racer.pipeline.close()
        decile, median = mesh.each([statistics.quantiles(gaps, n=10)[0], statistics.median(gaps)])[-1]
        lines.append({"schedule": name, "stages": stages, "ranks of a stage": ranks, "work": spend.__name__,
                      "transport": transport, "us": 1e6 * median, "least_us": 1e6 * decile})  # fmt: skip
    return [] if rank else lines


def wanted(report: dict) -> list[dict]:
    """The bars, and whether they are met."""
    def line(what, value, bar, met):
        return {"what": what, "value": value, "bar": bar, "met": met}

    rows = report["races"]
    best = {what: max(row["ratio"] for row in rows if row["scene"] == what and row["schedule"] in ("dfc", "bfc"))
            for what in dict.fromkeys(row["scene"] for row in rows)}  # fmt: skip
    lines = [line(f"{what}: times faster than interleaved", best[what], scene.wanted, best[what] >= scene.wanted)
             for what, scene in SCENES.items() if scene.wanted]  # fmt: skip
    far = max(abs(row["real / simulated"] - 1) for row in rows)
    lines.append(line("real beside simulated time, the farthest", far, 0.1, far <= 0.1))
    most = max(row["us"] for row in report["overhead"] if (row["transport"], row["work"]) == ("windows", "spin"))
    lines.append(line("between two actions of warm ranks over windows, us, the most", most, 100, most <= 100))
    first = {row["schedule"]: row["whole"] for row in rows if row["scene"] == "even"}
    lines.append(line("gradients of a chunk whole, bfc / interleaved", first["bfc"] / first["interleaved"], 1,
                      first["bfc"] < first["interleaved"]))  # fmt: skip
    return lines


def main(F: float = 0.012, rounds: int = 3, transport: str = "windows", out: Path = Path("benchmarks/results")):
    """Race the schedules of a pipeline.

    Args:
        F: seconds that a forward sleeps.
        rounds: timed rounds of each race, after one that warms up.
        transport: of the races: windows, or torch.
        out: folder of the JSON file.
    """
    report = {**machine(), "F": F}
    report["races"] = run_ranks(STAGES, lambda rank: run(rank, SCENES, F, rounds, transport))[0]
    print(f"{report['cpu']}, torch {report['torch']}, commit {report['commit']}, F {1e3 * F:g} ms\n")
    print("| scene | schedule | micro-batches | ms | x interleaved | simulated | real / simulated | whole at |\n"
          + "|---" * 8 + "|")  # fmt: skip
    for row in report["races"]:
        print(f"| {row['scene']} | {row['schedule']} | {row['micros']} | {row['ms']:.0f} | {row['ratio']:.3f} | "
              f"{row['simulated']:.3f} | {row['real / simulated']:.3f} | {row['whole']:.2f} |")  # fmt: skip
    report["overhead"] = [
        line for stages, ranks, spend in ((2, 1, spin), (STAGES, 1, time.sleep), (STAGES, 2, time.sleep))
        for kind in ("windows", "torch")
        for line in run_ranks(stages * ranks, partial(overhead, stages=stages, ranks=ranks, F=F / 4, transport=kind,
                                                      spend=spend))[0]
    ]  # fmt: skip
    print("\n| schedule | stages, ranks of each | work | transport | us | lowest decile |\n" + "|---" * 6 + "|")
    for row in report["overhead"]:
        print(f"| {row['schedule']} | {row['stages']}, {row['ranks of a stage']} | {row['work']} | "
              f"{row['transport']} | {row['us']:.0f} | {row['least_us']:.0f} |")
    report["wanted"] = wanted(report)
    print("\n| wanted | value | bar | met |\n" + "|---" * 4 + "|")
    for row in report["wanted"]:
        print(f"| {row['what']} | {row['value']:.3f} | {row['bar']:.3f} | {'yes' if row['met'] else 'NO'} |")
    write(report, out, "pipeline-{cpu}.json")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
