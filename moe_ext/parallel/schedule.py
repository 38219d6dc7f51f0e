"""Which chunk of the model a pipeline's stage runs next, with which micro-batch, forward or backward: as data.

The model is cut into pp * vpp chunks; stage p of pp runs the chunks p, p + pp, p + 2 pp, .. of them, its own 0 .. vpp-1
(virtual stages). A step runs M micro-batches through all chunks and back, so a stage has 2 * vpp * M actions.

    schedule = SCHEDULES["bfc"]
    order = schedule.order(pp, vpp, micros, stage)      # every action of a stage, the first to be preferred first
    static:  the actions in exactly this order, each as soon as its tensor is there
    dynamic: at each turn the first of the order that is ready, forward and backward in turn (`choose`)

Runtime (moe_ext.parallel.pipeline) and simulator (moe_ext.plan.schedule) run this file's functions, nothing else knows
what a schedule is.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple


class Action(NamedTuple):
    """One turn of a stage."""
    kind: str       # "F" or "B"
    chunk: int      # of this stage, 0 .. vpp-1: chunk * pp + stage of the model's pp * vpp
    micro: int      # micro-batch, 0 .. M-1


class Schedule(NamedTuple):
    order: Callable[[int, int, int, int], list[Action]]     # (pp, vpp, micros, stage) -> all actions of that stage
    dynamic: bool = False


def gpipe(pp: int, vpp: int, micros: int, stage: int) -> list[Action]:
    """All forwards, then all backwards (Huang et al., 2019)."""
    forward = [Action("F", c, m) for c in range(vpp) for m in range(micros)]
    return forward + [Action("B", c, m) for c in reversed(range(vpp)) for m in range(micros)]


def one_f_one_b(pp: int, vpp: int, micros: int, stage: int) -> list[Action]:
    """1F1B with one chunk on a stage (Narayanan et al., 2019): as few forwards ahead as keep all stages busy."""
    ahead = min(pp - stage - 1, micros)
    order = [Action("F", 0, m) for m in range(ahead)]
    for m in range(micros - ahead):
        order += [Action("F", 0, ahead + m), Action("B", 0, m)]
    return order + [Action("B", 0, m) for m in range(micros - ahead, micros)]


SCHEDULES = {"gpipe": Schedule(gpipe), "1f1b": Schedule(one_f_one_b)}


def choose(order: Iterable[Action], ready: Callable[[Action], bool], last: str) -> Action | None:
    """The next action of a dynamic schedule, None if there is nothing to do yet. order: what is left, in the order of
    preference. last: kind of the action before; the other kind comes first."""
    able = [action for action in order if ready(action)]
    return min(able, key=lambda action: action.kind == last, default=None)
