"""Uneven rows between ranks: torch.distributed's all_to_all, then every transport of moe_ext beside it.

Rank r has the numbers 10 r, 10 r + 1, .. (4 to 8 of them) and cuts them into one piece for each rank. Cuts are drawn
with Python's random from one seed, the same on every rank: each piece is 1 to n / P long and the last takes the rest.
With more ranks than numbers that rule would leave less than nothing: a piece is then no longer than what is left, and
ranks get empty pieces.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moe_ext.check.world import Command, World
from moe_ext.parallel.transport import NcclTransport, TorchTransport, WindowTransport


def draw_splits(num_ranks: int, seed: int = 777) -> list[list[int]]:
    """splits[p][q]: how many numbers p has for q."""
    draw = random.Random(seed).randint
    splits = []
    for _ in range(num_ranks):
        left = draw(4, 8)
        pieces, longest = [], max(1, left // num_ranks)
        for _ in range(num_ranks):
            pieces.append(min(draw(1, longest), left))
            left -= pieces[-1]
        pieces[-1] += left
        splits.append(pieces)
    return splits


def transports(world: World) -> Iterator:
    """Every transport that these ranks can use, one after the other."""
    yield TorchTransport()
    for kind, usable in (
        (NcclTransport, world.device.type == "cuda"),
        (WindowTransport, world.hosts == 1),
    ):
        if usable:
            transport = kind(world.store, world.size, world.rank, device=world.device, seconds=world.seconds,
                             name=kind.__name__)
            yield transport
            transport.close()


def moves(transport, input, splits_PP, want) -> bool:
    """Whether a transport tells every rank the counts, brings the rows, and takes them back."""
    counts_PP = transport.counts(splits_PP[transport.rank].int()[:, None].to(input.device))[..., 0]
    there = transport.rows(input[:, None], splits_PP)
    back = transport.rows(there, splits_PP.T)
    return counts_PP.long().equal(splits_PP) and there[:, 0].equal(want) and back[:, 0].equal(input)


@dataclass(frozen=True)
class AllToAll(Command):
    """Exchange uneven rows by torch.distributed and by moe_ext's transports."""

    def run(self, world: World) -> bool:
        world.say_each(f"rank: {world.rank}, world size: {world.size}")
        splits, me = draw_splits(world.size), world.rank
        inputs = [torch.arange(10 * rank, 10 * rank + sum(pieces), device=world.device)
                  for rank, pieces in enumerate(splits)]
        input, send, receive = inputs[me], splits[me], [pieces[me] for pieces in splits]
        output = input.new_zeros(sum(receive))
        if any(sum(pieces) < world.size for pieces in splits):
            world.say("some ranks have fewer numbers than there are ranks: their last pieces are empty")
        world.say_each(f"""
    (input) (rank {me}): {inputs}
    (input_splits) (rank {me}): {splits}
    (input_splitted) (rank {me}): {list(input.split(send))}
    (output before all_to_all) (rank {me}): {list(output.split(receive))}""")
        with world.joined():
            dist.all_to_all_single(output, input, receive, send)
            world.say()
            world.say_each(f"    (output after all_to_all) (rank {me}): {list(output.split(receive))}")
            world.say()
            right = output.equal(torch.cat([numbers.split(pieces)[me]
                                            for numbers, pieces in zip(inputs, splits, strict=True)]))
            fine = [world.agree("torch.distributed", right)]
            for transport in transports(world):
                right = moves(transport, input, torch.tensor(splits), output)
                fine.append(world.agree(f"moe_ext {type(transport).__name__}", right))
            return all(fine)
