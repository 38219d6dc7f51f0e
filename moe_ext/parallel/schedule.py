"""Which chunk of the model a pipeline's stage runs next, with which micro-batch, forward or backward: as data.

The model is cut into pp * vpp chunks; stage p of pp runs the chunks p, p + pp, p + 2 pp, .. of them, its own 0 .. vpp-1
(virtual stages). A step runs M micro-batches through all chunks and back, so a stage has 2 * vpp * M actions.

    order = SCHEDULES["bfc"].order(pp, vpp, micros, stage)      # all actions of a stage
    static:     they are run in exactly this order, each as soon as its tensor is there
    dynamic:    forward and backward take turns, each only if it is ready; of several the first of the order is run

    turns = Turns("bfc", pp, vpp, micros, stage)    # one step of one stage
    while turns.left:
        action = turns.choose(there)                # there(action): its tensor has arrived
        if action:                                  # None: nothing can be done yet
            run(action)
            turns.ran(action)

`choose` changes nothing, so that one rank decides for its stage and all ranks of the stage call `ran`. Runtime
(moe_ext.parallel.pipeline) and simulator (moe_ext.plan.pipeline) run this file's functions; nothing else knows what a
schedule is.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from moe_ext.config import ConfigError, nearest, require


class Action(NamedTuple):
    """One turn of a stage."""
    kind: str       # "F" or "B"
    chunk: int      # of this stage, 0 .. vpp-1: chunk * pp + stage of the model's pp * vpp
    micro: int      # micro-batch, 0 .. M-1


class Schedule(NamedTuple):
    order: Callable[[int, int, int, int], list[Action]]     # (pp, vpp, micros, stage) -> all actions of that stage
    dynamic: bool = False


# ---- orders ----------------------------------------------------------------------------------------------------------
def chunk_major(vpp: int, micros: range) -> list[tuple[int, int]]:
    """Breadth first: a chunk with all micro-batches, then the next."""
    return [(c, m) for c in range(vpp) for m in micros]


def virtual_micros(pp: int, vpp: int, micros: int) -> list[tuple[int, int]]:
    """Megatron's order of (chunk, micro-batch): pp micro-batches go through all chunks, then the next pp."""
    groups = [range(first, min(first + pp, micros)) for first in range(0, micros, pp)]
    return [pair for group in groups for pair in chunk_major(vpp, group)]


def there_and_back(pairs: list[tuple[int, int]], vpp: int, ahead: int) -> list[Action]:
    """Forwards in the order of `pairs`, backwards likewise with the last chunk first; `ahead` forwards, then one of
    each in turn."""
    forward = [Action("F", c, m) for c, m in pairs]
    backward = [Action("B", vpp - 1 - c, m) for c, m in pairs]
    both = [action for turn in zip(forward[ahead:], backward, strict=False) for action in turn]
    return forward[:ahead] + both + backward[len(forward[ahead:]):]


def breadth_first(pp: int, vpp: int, micros: int, stage: int) -> list[Action]:
    """All forwards, then all backwards, chunk by chunk (Lamy-Poirier, 2022); with one chunk GPipe (Huang, 2018)."""
    return there_and_back(chunk_major(vpp, range(micros)), vpp, vpp * micros)


def interleaved(pp: int, vpp: int, micros: int, stage: int) -> list[Action]:
    """1F1B, interleaved with several chunks (Narayanan et al., 2021): as few forwards ahead as keep all stages busy."""
    ahead = pp - stage - 1 if vpp == 1 else 2 * (pp - stage - 1) + (vpp - 1) * min(pp, micros)
    return there_and_back(virtual_micros(pp, vpp, micros), vpp, ahead)


def depth_first(pp: int, vpp: int, micros: int, stage: int) -> list[Action]:
    """pp micro-batches go through all chunks and back, then the next pp: the least memory."""
    return [action._replace(micro=first + action.micro) for first in range(0, micros, pp)
            for action in interleaved(pp, vpp, min(pp, micros - first), stage)]


def dfc(pp: int, vpp: int, micros: int, stage: int) -> list[Action]:
    """Forwards depth first: the next chunk of pp micro-batches comes before further ones. Backwards breadth first, or
    jitter of the links lets the stages before run out of gradients."""
    forwards = vpp * micros
    return (there_and_back(virtual_micros(pp, vpp, micros), vpp, forwards)[:forwards]
            + breadth_first(pp, vpp, micros, stage)[forwards:])


SCHEDULES = {"gpipe": Schedule(breadth_first), "1f1b": Schedule(interleaved), "interleaved": Schedule(interleaved),
             "breadth_first": Schedule(breadth_first), "depth_first": Schedule(depth_first),
             "dfc": Schedule(dfc, dynamic=True), "bfc": Schedule(breadth_first, dynamic=True)}


def check(name: str, pp: int, vpp: int, micros: int, live: int = 0) -> None:
    """Errors: ConfigError for what a schedule cannot take, with the nearest setting that it can."""
    require(name != "1f1b" or vpp == 1, f"pipeline.schedule is 1f1b and pipeline.chunks {vpp}: 1f1b has one chunk on a "
            "stage: set pipeline.chunks = 1, or pipeline.schedule = \"interleaved\", which is 1f1b with several")
    if name == "interleaved" and vpp > 1 and micros > pp and micros % pp:
        near = nearest(micros, [micros // pp * pp, -(-micros // pp) * pp])
        raise ConfigError(f"pipeline.schedule is interleaved, with {vpp} chunks on each of {pp} stages, and a step has "
                          f"{micros} micro-batches (train.accumulation): it takes multiples of {pp}, the nearest is "
                          f"{near}; other schedules take any number")
    require(not live or SCHEDULES[name].dynamic, f"pipeline.live is {live} and pipeline.schedule {name}, which has a "
            "fixed order: set pipeline.live = 0, or pipeline.schedule = \"dfc\" or \"bfc\"")
    require(not live or live >= vpp, f"pipeline.live is {live}, but a micro-batch keeps activations of {vpp} chunks "
            f"on a stage (pipeline.chunks): set it to {vpp} or more, or to 0 for no limit")


def tensor_id(action: Action, pp: int, vpp: int) -> int:
    """Megatron's number of an action among those of its kind on its stage, from 0: pp micro-batches go through all
    chunks, then the next pp; for backwards the last chunk is the first. Numbers of micro-batches that the last pp lack
    are left out."""
    group, place = divmod(action.micro, pp)
    chunk = action.chunk if action.kind == "F" else vpp - 1 - action.chunk
    return (group * vpp + chunk) * pp + place


def following(action: Action, stage: int, pp: int, vpp: int) -> tuple[int, Action] | None:
    """(stage, action) that takes what an action has made; None behind the last piece and before the first."""
    piece = action.chunk * pp + stage + (1 if action.kind == "F" else -1)
    return (piece % pp, action._replace(chunk=piece // pp)) if 0 <= piece < pp * vpp else None


# ---- a step ----------------------------------------------------------------------------------------------------------
class Turns:
    """What a stage has done of a step, and what it does next. Errors: those of `check`.

    A micro-batch goes through all chunks of a stage and then back: it has one next action, and a choice is one of M.

    live: chunks whose activations a dynamic schedule may hold at a time; 0: no limit. A forward leaves room for what
    the first pp unfinished micro-batches before its own have still to forward here. So of a micro-batch and all later
    ones a stage never holds so much that the rest of that micro-batch would not fit beside it: the first one that is
    not through the whole pipeline never waits for memory, and nothing can deadlock.
    """

    def __init__(self, name: str, pp: int, vpp: int, micros: int, stage: int, live: int = 0):
        check(name, pp, vpp, micros, live)
        self.order, self.dynamic = SCHEDULES[name].order(pp, vpp, micros, stage), SCHEDULES[name].dynamic
        self.pp, self.vpp, self.most, self.live, self.left = pp, vpp, live, 0, len(self.order)
        self.place = {action: place for place, action in enumerate(self.order)}
        self.next = {micro: Action("F", 0, micro) for micro in range(micros)}
        self.last = "B"
        # the chunk that takes no tensor: it begins with tokens, or with the loss
        self.own = {"F": 0 if stage == 0 else None, "B": vpp - 1 if stage == pp - 1 else None}

    def takes(self, action: Action) -> bool:
        """Whether an action takes a tensor of another stage: it does not begin with tokens or with the loss."""
        return action.chunk != self.own[action.kind]

    def choose(self, there: Callable[[Action], bool]) -> Action | None:
        """The next action, None if there is nothing to do yet. there: whether the tensor that an action takes from the
        stage before (F) or after (B) is here; it is asked only of actions that take one."""
        if not self.dynamic:
            action = self.order[-self.left]
            return action if not self.takes(action) or there(action) else None
        chosen, first = None, 2 * len(self.order)
        room, ahead = self.most - self.live, 0
        for action in self.next.values():       # by micro-batch
            kind, chunk, _ = action
            if kind == "F":
                full = self.most and room <= 0
                if ahead < self.pp:
                    ahead, room = ahead + 1, room - (self.vpp - chunk)
                if full:
                    continue
            place = self.place[action] + (kind == self.last) * len(self.order)
            if place < first and (not self.takes(action) or there(action)):
                chosen, first = action, place
        return chosen

    def ran(self, action: Action) -> None:
        """`action` has been run, or is about to be."""
        kind, chunk, micro = action
        if kind == "F":
            self.next[micro] = Action("F", chunk + 1, micro) if chunk + 1 < self.vpp else Action("B", chunk, micro)
        elif chunk:
            self.next[micro] = Action("B", chunk - 1, micro)
        else:
            del self.next[micro]
        self.last, self.live, self.left = kind, self.live + (1 if kind == "F" else -1), self.left - 1
