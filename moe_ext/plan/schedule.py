"""`python -m moe_ext.plan schedule [RECIPE.toml] [--pp 4 --chunks 4 --micros 8 ..]`: a pipeline's step in virtual time.

It runs the schedules' own functions (moe_ext.parallel.schedule) with given times of chunks and links, and prints how
long each schedule takes, how much of it the stages wait, what they hold, and when the gradients of each chunk are
complete. The ranks of a stage go in step, as their collectives make them: a turn begins when its tensor has come to all
of them, and takes as long as the slowest needs. Sending costs a stage no time, and tensors do not hold each other up.
"""
from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

from moe_ext.config import Config, ConfigError, cli, parse, require
from moe_ext.log import trace
from moe_ext.parallel.schedule import SCHEDULES, Action, check, following
from moe_ext.plan.pipeline import Step, simulate

MOST = 5_000_000        # turns of all ranks, steps and schedules that one command simulates: a minute or two


# ---- times -----------------------------------------------------------------------------------------------------------
class Hiccup(NamedTuple):
    """Of what a rank does, or sends, this share takes so much longer. rank -1: of every rank."""
    rank: int
    share: float
    time: float


NONE = Hiccup(0, 0.0, 0.0)


@dataclass(frozen=True)
class Times:
    """Of the turns and tensors of a step, drawn from a seed: the same ones for every schedule."""
    pp: int
    vpp: int
    micros: int
    tp: int = 1                         # ranks of a stage
    forward: tuple[float, ...] = (1.0,)     # of each of the pp * vpp pieces, of each stage, or of all
    backward: float = 2.0               # times a forward
    link: float = 0.0                   # between two stages
    jitter: float = 0.0                 # a tensor takes up to so much longer, evenly
    slow: tuple[int, float] = (0, 1.0)  # (rank, times what others need)
    stall: Hiccup = NONE                # of what a rank computes
    late: Hiccup = NONE                 # of what a rank sends

    def draw(self, seed: int = 0) -> tuple[dict, dict]:
        """-> {(stage, action): time of the turn}, {(stage, action): times until each rank has what it takes}"""
        rng, work, transit = random.Random(seed), {}, {}
        for stage, kind, chunk, micro in ((s, k, c, m) for s in range(self.pp) for k in "FB" for c in range(self.vpp)
                                          for m in range(self.micros)):
            at, piece = (stage, Action(kind, chunk, micro)), chunk * self.pp + stage
            time = self.forward[piece % len(self.forward)] * (self.backward if kind == "B" else 1)
            ranks = range(stage * self.tp, (stage + 1) * self.tp)
            work[at] = time * (self.slow[1] if self.slow[0] in ranks else 1) + max(
                self.hiccup(rng, self.stall, rank) for rank in ranks)
            shift = -self.tp if kind == "F" else self.tp        # to the rank that sends
            transit[at] = [self.link + self.jitter * rng.random()
                           + self.hiccup(rng, self.late, (rank + shift) % (self.pp * self.tp)) for rank in ranks]
        return work, transit

    def hiccup(self, rng: random.Random, hiccup: Hiccup, rank: int) -> float:
        return (rng.random() < hiccup.share) * hiccup.time * (hiccup.rank in (rank, -1))

    @property
    def random(self) -> bool:
        return bool(self.jitter or self.stall.time or self.late.time)

    def run(self, name: str, live: int = 0, seed: int = 0) -> Step:
        work, transit = self.draw(seed)
        return simulate(name, self.pp, self.vpp, self.micros, lambda *at: work[at], lambda *at: max(transit[at]), live)


# ---- command ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Command(Config):
    """Simulate a pipeline's step, with a recipe or without one. Times have any unit, a forward's for example."""
    schedule: Literal[("all", *SCHEDULES)] = "all"
    pp: int = 0             # stages; 0: those of the recipe's mesh
    tp: int = 0             # ranks of a stage, to which tensors come at different times; 0: those of the recipe's mesh
    chunks: int = 0         # on each stage; 0: the recipe's pipeline.chunks
    micros: int = 0         # micro-batches of a step; 0: the recipe's train.accumulation
    live: int = 0           # dfc, bfc: chunks whose activations a stage may hold; 0: the recipe's pipeline.live
    forward: str = "1"      # time of a chunk's forward; or 1,1,1.5,1: of each stage, or of each piece of the model
    backward: float = 2.0   # times a forward
    link: float = 0.0       # time of a tensor from one stage to the next
    jitter: float = 0.0     # up to so much more, evenly
    slow: str = ""          # 2:1.5: all that rank 2 does takes 1.5 times as long
    stall: str = ""         # 2:0.1:8: of all that rank 2 does one in ten takes 8 longer; all:0.1:8: on every rank
    late: str = ""          # 2:0.1:8: of all that rank 2 sends one in ten comes 8 later; all:0.1:8: of every rank
    steps: int = 20         # with chance in it: steps whose mean is shown
    seed: int = 0           # of the first
    out: str = ""           # OUT.png and OUT-SCHEDULE.json: timeline and Chrome trace of the first step

    def times(self) -> Times:
        pp, tp = self.pp or self.mesh.pp, self.tp or self.mesh.stage
        vpp, micros = self.chunks or self.pipeline.chunks, self.micros or self.train.accumulation
        for name, value in (("pp", pp), ("tp", tp), ("chunks", vpp), ("micros", micros), ("steps", self.steps)):
            require(value > 0, f"--{name} is {value}; it must be positive")
        require(pp > 1, "--pp is 1: one stage has nothing to schedule; give --pp 4, or a recipe with mesh.pp")
        steps = self.steps if self.jitter or self.stall or self.late else 1
        turns = 2 * pp * vpp * micros * tp * steps * (len(SCHEDULES) if self.schedule == "all" else 1)
        require(turns <= MOST, f"{pp} stages of {tp} ranks with {vpp} chunks and {micros} micro-batches take {turns:,} "
                f"turns in all steps and schedules, and at most {MOST:,} are simulated: give fewer --steps, a smaller "
                "--micros or one --schedule")
        for name in ("backward", "link", "jitter", "live"):
            value, least = getattr(self, name), "be positive" if name == "backward" else "be 0 or more"
            require(0 <= value < math.inf and (value or name != "backward"), f"--{name} is {value}; it must {least}")
        forward = numbers("forward", self.forward, ",", "1, or 1,1,1.5,1")
        require(len(forward) in (1, pp, pp * vpp) and min(forward) > 0, f"--forward {self.forward}: wanted one positive"
                f" time, {pp} (of each stage) or {pp * vpp} (of each piece, in the model's order)")
        slow = self.ranked("slow", "2:1.5", pp * tp) if self.slow else [0, 1.0]
        require(slow[1] > 0 and slow[0] >= 0, f"--slow {self.slow}: wanted RANK:FACTOR as in 2:1.5")
        return Times(pp, vpp, micros, tp, tuple(forward), self.backward, self.link, self.jitter, tuple(slow),
                     *(Hiccup(*self.ranked(name, "2:0.1:8", pp * tp)) if getattr(self, name) else NONE
                       for name in ("stall", "late")))

    def ranked(self, name: str, example: str, world: int) -> list[float]:
        """The numbers of an option, the first of which is a rank; -1: all."""
        text = getattr(self, name)
        found = numbers(name, text.replace("all:", "-1:", 1), ":", example)
        require(len(found) == len(example.split(":")) and found[0] in range(-1, world) and min(found[1:]) >= 0
                and (len(found) == 2 or found[1] <= 1), f"--{name} {text}: wanted RANK:.. as in {example}, with a rank "
                f"of 0 to {world - 1}")
        return [int(found[0]), *found[1:]]


def numbers(name: str, text: str, between: str, example: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(between)]
    except ValueError:
        found = [math.inf]
    require(all(map(math.isfinite, found)), f"--{name} {text}: wanted numbers as in {example}")
    return found


def table(times: Times, live: int, steps: dict[str, list[Step]], refused: dict[str, str]) -> str:
    """Means over the steps of each schedule; of what is held the most."""
    chunks = range(times.vpp)[::-1]
    count = max(map(len, steps.values()), default=1)
    wide = max((len(held(of)) for of in steps.values()), default=0)
    rows = [f"{times.pp} stages x {times.vpp} chunks, {times.micros} micro-batches"
            + (f", at most {live} live chunks in dfc and bfc" if live else "")
            + (f"; means of {count} steps" if count > 1 else ""),
            f"{'':14}{'step':>10}{'bubble':>9}   {'live chunks':{max(wide, 11)}}   gradients of chunk "
            f"{' '.join(map(str, chunks))} complete after"]
    for name, of in steps.items():
        time = fmean(step.time for step in of)
        complete = (fmean(fmean(step.complete(chunk)) / step.time for step in of) for chunk in chunks)
        rows.append(f"{name:14}{time:>10.5g}{100 * fmean(step.bubble for step in of):>7.1f} %   "
                    f"{held(of):{max(wide, 11)}}   {' '.join(f'{100 * share:.0f}' for share in complete)} %")
    return "\n".join(rows + [f"{name:14}{why}" for name, why in refused.items()])


def held(steps: list[Step]) -> str:
    """The most live chunks, stage by stage; of many stages the ends."""
    most = [max(stage) for stage in zip(*(step.live for step in steps), strict=True)]
    return " ".join(map(str, most if len(most) <= 8 else [*most[:4], "..", *most[-3:]]))


def write(steps: dict[str, Step], out: str, times: Times, transits: dict) -> list[Path]:
    """Timelines to OUT.png, Chrome traces to OUT-SCHEDULE.json. Errors: RuntimeError without matplotlib."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError("the timeline needs matplotlib: pip install matplotlib") from None
    picture = Path(f"{out}.png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(14, len(steps) * (1.1 + 0.22 * times.pp)), dpi=110, layout="constrained")
    longest = max(step.time for step in steps.values())
    for axes, (name, step) in zip(figure.subplots(len(steps), squeeze=False)[:, 0], steps.items(), strict=True):
        for stage, turns in enumerate(step.turns):
            shades = [colormaps["Blues" if kind == "F" else "Oranges"](0.3 + 0.6 * (chunk + 1) / times.vpp)
                      for (kind, chunk, _), *_ in turns]
            axes.broken_barh([(turn.begin, turn.end - turn.begin) for turn in turns], (stage - 0.45, 0.9),
                             facecolors=shades, edgecolor="white", linewidth=0.3)
        for chunk in range(times.vpp):
            axes.plot(step.complete(chunk), range(times.pp), "k|", markersize=12)
        axes.set(title=f"{name}: {step.time:.5g}, bubble {100 * step.bubble:.1f} %", xlim=(0, longest),
                 ylim=(times.pp - 0.5, -0.5), ylabel="stage")
        axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("time; blue: forward, orange: backward, darker: later chunks; |: a chunk's gradients are complete")
    figure.savefig(picture)
    written = [picture]
    for name, step in steps.items():
        written.append(Path(f"{out}-{name}.json"))
        trace.write(written[-1], events(step, times, transits),
                    [f"rank {rank}, stage {rank // times.tp}" for rank in range(times.pp * times.tp)])
    return written


def events(step: Step, times: Times, transits: dict) -> list[trace.Event]:
    """What each rank does and what is sent to it. transits: of Times.draw."""
    found, ranks = [], range(times.tp)
    complete = [step.complete(chunk) for chunk in range(times.vpp)]
    for stage, turns in enumerate(step.turns):
        before = 0.0
        for action, begin, end in turns:
            kind, chunk, micro = action
            own = [trace.Event(0, "wait", chunk, micro, before, begin)] if begin > before else []
            own.append(trace.Event(0, "forward" if kind == "F" else "backward", chunk, micro, begin, end))
            if kind == "B" and end == complete[chunk][stage]:
                own.append(trace.Event(0, "sync", chunk, -1, end, end))
            found += [event._replace(lane=stage * times.tp + rank) for event in own for rank in ranks]
            if receiver := following(action, stage, times.pp, times.vpp):
                to, taken = receiver
                found += [trace.Event(to * times.tp + rank, "send", taken.chunk, taken.micro, end, end + transit)
                          for rank, transit in enumerate(transits[receiver])]
            before = end
    return found


def main(args: list[str]) -> None:
    """Errors: ConfigError, OSError; RuntimeError for a picture without matplotlib."""
    prog = "moe_ext.plan schedule"
    command = (parse(args, Command, prog) if args and not args[0].startswith("-")
               else cli(Command, args, Command(), f"{prog} [RECIPE.toml]"))
    times, live = command.times(), command.live or command.pipeline.live
    names = list(SCHEDULES) if command.schedule == "all" else [command.schedule]
    steps, refused = {}, {}
    for name in names:
        cap = live if SCHEDULES[name].dynamic or command.schedule == name else 0
        try:
            check(name, times.pp, times.vpp, times.micros, cap)
        except ConfigError as error:
            if command.schedule == name:
                raise
            refused[name] = str(error)
            continue
        seeds = range(command.seed, command.seed + (command.steps if times.random else 1))
        steps[name] = [times.run(name, cap, seed) for seed in seeds]
    print(table(times, live, steps, refused))
    if command.out:
        firsts = {name: of[0] for name, of in steps.items()}
        print("wrote", *write(firsts, command.out.removesuffix(".png"), times, times.draw(command.seed)[1]))
