"""The debugger on any rank: moe_ext.parallel.pdb's set_trace in the middle of a distributed program."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_ext.check.world import Command, World
from moe_ext.parallel.pdb import set_trace


@dataclass(frozen=True)
class Pdb(Command):
    """Stop in the debugger: on every rank in turn, or on one."""

    rank: int | None = None  # the rank that stops; none given: all, one after the other
    seconds: float = 3600.0  # longest wait for another rank, which may be at its prompt

    def run(self, world: World) -> bool:
        with world.joined():
            x = torch.arange(3, device=world.device) + 10 * world.rank
            set_trace(rank=self.rank)  # try: p x, !x += 1, c
            world.say_each(f"rank {world.rank}: x is {x.tolist()}")
        return True
