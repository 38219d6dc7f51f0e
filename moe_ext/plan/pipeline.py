"""A pipeline's turns as the plan counts with them: how long stages have nothing to do, and which chunks live at a time.

Both come from the simulator, with backwards as long as two forwards and links that take no time. Micro-batches go
through in groups of pp, and soon each group does as the one before it. So of a step with many groups two short ones are
run, one of them a group longer, and what that group adds is added for each of the others.
"""
from __future__ import annotations

import functools
from typing import NamedTuple

from moe_ext.config import Config

GROUPS = 3      # of pp micro-batches, after which they repeat


class Run(NamedTuple):
    """A step of a pipeline."""
    time: float                             # in forwards of a chunk
    live: list[int]                         # of each stage, the most chunks at a time
    summits: list[set[tuple[int, ...]]]     # of each stage, how many of each chunk live whenever it turns back


@functools.lru_cache(maxsize=512)
def run(name: str, pp: int, chunks: int, micros: int, live: int) -> Run:
    from moe_ext.plan.schedule import simulate  # imports moe_ext.log, which imports moe_ext.plan
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
    """(a short step, one that is a group longer, how many groups longer the whole one is than the first)."""
    p, pp, micros = config.pipeline, config.mesh.pp, config.train.accumulation
    few = min(micros, GROUPS * pp + micros % pp)
    short, more = run(p.schedule, pp, p.chunks, few, p.live), (micros - few) // pp
    return short, run(p.schedule, pp, p.chunks, few + pp, p.live) if more else short, more


def turns(config: Config) -> tuple[float, list[int]]:
    """(the share of a step in which the stages do nothing, of each the most chunks that live at a time)."""
    if config.mesh.pp == 1:
        return 0.0, [1]
    short, longer, more = runs(config)
    time = short.time + more * (longer.time - short.time)
    work = 3 * config.pipeline.chunks * config.train.accumulation
    return 1 - work / time, [few + more * (n - few) for few, n in zip(short.live, longer.live, strict=True)]


def alive(config: Config, stage: int, sizes: list[int]) -> list[int]:
    """Of each chunk of a stage, the micro-batches between forward and backward when these hold most together: `sizes`
    is what one of each holds."""
    if config.mesh.pp == 1:
        return [1]
    short, longer, more = runs(config)
    few, many = (max(step.summits[stage], key=lambda live: sum(map(int.__mul__, live, sizes)))
                 for step in (short, longer))
    return [n + more * (m - n) for n, m in zip(few, many, strict=True)]
