"""A pipeline's step in virtual time; and how long stages have nothing to do, and which chunks live at a time.

The plan counts with backwards as long as two forwards and links that take no time. Micro-batches go through in groups
of pp, and soon each group does as the one before it. So of a step with many groups two short ones are run, one of them
a group longer, and what that group adds is added for each of the others.
"""
from __future__ import annotations

import functools
import heapq
from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

from moe_ext.config import Config
from moe_ext.parallel.schedule import Action, Turns, following

GROUPS = 3      # of pp micro-batches, after which they repeat
CAPPED = 12     # under pipeline.live one group is not as the last, but so many together are as so many before


# ---- one step --------------------------------------------------------------------------------------------------------
class Turn(NamedTuple):
    action: Action
    begin: float
    end: float


class Step(NamedTuple):
    """What happened. Times have the unit of the given ones and count from the first turn's beginning."""
    time: float                         # when the last turn ended
    turns: list[list[Turn]]             # of each stage, in order
    live: list[int]                     # of each stage: the most chunks whose activations it held at a time

    @property
    def bubble(self) -> float:
        """The share of their time in which the stages do nothing."""
        return 1 - fmean(sum(turn.end - turn.begin for turn in turns) for turns in self.turns) / self.time

    def complete(self, chunk: int) -> list[float]:
        """When each stage has all gradients of a chunk."""
        return [max(end for action, _, end in turns if action[:2] == ("B", chunk)) for turns in self.turns]


def simulate(name: str, pp: int, vpp: int, micros: int, work: Callable[[int, Action], float],
             transit: Callable[[int, Action], float] = lambda stage, action: 0.0, live: int = 0) -> Step:
    """work(stage, action): how long a turn takes. transit(stage, action): how long the tensor that it takes is on its
    way to that stage. Errors: ConfigError for what a schedule cannot take."""
    stages = [Turns(name, pp, vpp, micros, stage, live) for stage in range(pp)]
    here, busy, done, peak = [set() for _ in stages], [False] * pp, [[] for _ in stages], [0] * pp
    events, now, changed = [], 0.0, range(pp)       # events: (when, number, stage, action, whether its tensor has come)
    numbers = iter(range(4 * pp * vpp * micros))    # what is simultaneous comes in order
    while True:
        for stage in changed:
            turns = stages[stage]
            if not busy[stage] and turns.left and (action := turns.choose(here[stage].__contains__)):
                turns.ran(action)
                busy[stage], peak[stage] = True, max(peak[stage], turns.live)
                done[stage].append(Turn(action, now, now + work(stage, action)))
                heapq.heappush(events, (done[stage][-1].end, next(numbers), stage, action, False))
        if not events:
            assert not any(turns.left for turns in stages), f"{name} has no turn that can begin"
            return Step(now, done, peak)
        now, changed = events[0][0], set()
        while events and events[0][0] <= now * (1 + 1e-12):     # simultaneous but for rounding
            _, _, stage, action, come = heapq.heappop(events)
            changed.add(stage)
            if come:
                here[stage].add(action)
                continue
            busy[stage] = False
            if receiver := following(action, stage, pp, vpp):
                heapq.heappush(events, (now + transit(*receiver), next(numbers), *receiver, True))


# ---- what the plan asks ----------------------------------------------------------------------------------------------
class Run(NamedTuple):
    """A step of a pipeline."""
    time: float                             # in forwards of a chunk
    live: list[int]                         # of each stage, the most chunks at a time
    summits: list[set[tuple[int, ...]]]     # of each stage, how many of each chunk live whenever it turns back


@functools.lru_cache(maxsize=512)
def run(name: str, pp: int, chunks: int, micros: int, live: int) -> Run:
    step = simulate(name, pp, chunks, micros, lambda stage, action: 1.0 if action.kind == "F" else 2.0, live=live)
    summits = [set() for _ in range(pp)]
    for seen, turns in zip(summits, step.turns, strict=True):
        now, last = [0] * chunks, ""
        for (kind, chunk, _), _, _ in turns:
            if last == "F" and kind == "B":
                seen.add(tuple(now))
            now[chunk] += 1 if kind == "F" else -1
            last = kind
    return Run(step.time, step.live, summits)


def runs(config: Config) -> tuple[Run, Run, int]:
    """(a short step, one that is so many groups longer, how often longer the whole one is than the first)."""
    p, pp, micros = config.pipeline, config.mesh.pp, config.train.accumulation
    again = pp * (CAPPED if p.live else 1)
    more = max(0, micros - GROUPS * pp) // again
    few = micros - more * again
    short = run(p.schedule, pp, p.chunks, few, p.live)
    return short, run(p.schedule, pp, p.chunks, few + again, p.live) if more else short, more


def turns(config: Config) -> tuple[float, list[int]]:
    """(the share of a step in which the stages do nothing, of each the most chunks that live at a time)."""
    if config.mesh.pp == 1:
        return 0.0, [1]
    short, longer, more = runs(config)
    time = short.time + more * (longer.time - short.time)
    work = 3 * config.pipeline.chunks * config.train.accumulation
    return 1 - work / time, [n + rest(config, more) * (n - few) for few, n in zip(short.live, longer.live, strict=True)]


def rest(config: Config, more: int) -> int:
    """How often what lives at a time grows on beyond the longer step: under pipeline.live it does not."""
    return 0 if config.pipeline.live else more - 1


def alive(config: Config, stage: int, sizes: list[int]) -> list[int]:
    """Of each chunk of a stage, the micro-batches between forward and backward when these hold most together: `sizes`
    is what one of each holds."""
    if config.mesh.pp == 1:
        return [1]
    short, longer, more = runs(config)
    few, many = (max(step.summits[stage], key=lambda live: sum(map(int.__mul__, live, sizes)))
                 for step in (short, longer))
    return [m + rest(config, more) * (m - n) for n, m in zip(few, many, strict=True)]
