"""Whole matrices of sharded parameters: each is gathered to one rank, its owner, which computes once and gives every
rank its part of the result.

    owners = Owners(parameters, cost=lambda shape: ..)          # who owns what: the same on all ranks, by shapes alone
    owners.run(source, compute, sink)                           # one trip of all matrices there and back

A parameter [.., M, N] is a batch of matrices; one of fewer dimensions is one vector. A mesh axis that shards a batch
dimension, as ep does the experts, needs no traffic: each of its ranks has matrices of its own. Over all other axes,
be they shards or copies, the ranks that hold a matrix share the work: an owner is the one of them with least to do so
far, the costliest matrices first (LPT, Graham 1969). Copies get the result from the owner too, so they stay equal.

Matrices go in buckets, of which every owner has about as much as every other: while one is computed the next one comes
and the last one's results go.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

Box = tuple[tuple[int, ...], tuple[int, ...]]       # start, size of a part of a parameter


class Matrix(NamedTuple):
    """A matrix, or a block of one, or a vector: the box of a parameter that an owner computes with."""
    index: int                  # of the parameter
    start: tuple[int, ...]
    size: tuple[int, ...]       # 1 in every batch dimension

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size[-2:]

    @property
    def key(self) -> str:
        """Its name within the parameter, on any mesh: where it begins."""
        return ",".join(map(str, self.start))


def matrices(index: int, shape, inside: Box | None = None, most: int = 0) -> Iterator[Matrix]:
    """Those of a parameter, of which a box has whole ones; blocks of at most `most` rows and columns, if that is not 0.
    """
    start, size = inside or ((0,) * len(shape), tuple(shape))
    batch = max(0, len(shape) - 2)
    steps = [1] * batch + [most or max(1, n) for n in shape[batch:]]
    begins = [range(a, a + n, step) for a, n, step in zip(start, size, steps, strict=True)]
    for begin in itertools.product(*begins):
        yield Matrix(index, begin, tuple(min(step, a + n - at) for step, a, n, at in
                                         zip(steps, start, size, begin, strict=True)))


class Place(NamedTuple):
    """A rank among those that hold a parameter."""
    rank: int
    box: Box            # its part of the parameter
    group: tuple        # ranks with the same hold whole matrices between them
    copy: tuple         # of these, ranks with the same hold each box once


def places(shape, ranks, sizes, placements) -> list[Place]:
    """ranks: of the mesh, in row-major order; sizes: of its axes; placements: Shard and Replicate alone."""
    batch, found = max(0, len(shape) - 2), []
    for rank, at in zip(ranks, itertools.product(*map(range, sizes)), strict=True):
        start, size, group, copy = [0] * len(shape), list(shape), [], []
        for place, n, i in zip(placements, sizes, at, strict=True):
            if place.is_replicate():
                copy.append(i)
                continue
            if type(place) is not Shard:
                raise ValueError(f"got placements {tuple(placements)}, wanted Shard and Replicate alone")
            each = -(-size[place.dim] // n)
            first = min(i * each, size[place.dim])
            start[place.dim] += first
            size[place.dim] = min(each, size[place.dim] - first)
            if place.dim < batch:
                group.append(i)
        found.append(Place(rank, (tuple(start), tuple(size)), tuple(group), tuple(copy)))
    return found


def places_of(p: torch.Tensor) -> list[Place]:
    """Of a DTensor, or of a plain tensor, which is this rank's own."""
    if not isinstance(p, DTensor):
        return [Place(dist.get_rank() if dist.is_initialized() else 0, ((0,) * p.ndim, tuple(p.shape)), (), ())]
    return places(p.shape, p.device_mesh.mesh.flatten().tolist(), p.device_mesh.shape, p.placements)


def assign(held: list[list[Place]], shapes, cost: Callable[[tuple[int, ...]], float],
           most: int = 0) -> list[tuple[Matrix, int]]:
    """(matrix, rank of its owner), of all matrices of all groups, costliest first."""
    tasks = []
    for index, (here, shape) in enumerate(zip(held, shapes, strict=True)):
        for group in sorted({place.group for place in here}):
            members = [place for place in here if place.group == group]
            batch = max(0, len(shape) - 2)
            start, size = members[0].box
            inside = (*start[:batch], *[0] * (len(shape) - batch)), (*size[:batch], *shape[batch:])
            ranks = [place.rank for place in members]
            tasks += [(cost(m.shape), m, ranks, frozenset(place.rank for place in here))
                      for m in matrices(index, shape, inside, most)]
    tasks.sort(key=lambda task: (-task[0], task[1]))
    loads, owned = {}, []
    for weight, matrix, ranks, everyone in tasks:
        load = loads.setdefault(everyone, dict.fromkeys(everyone, 0.0))     # of ranks that know the same of each other
        owner = min(ranks, key=lambda rank: (load[rank], rank))
        load[owner] += weight
        owned.append((matrix, owner))
    return owned


def meet(a: Box, b: Box) -> Box | None:
    """What two boxes have in common; None: nothing."""
    start = tuple(map(max, a[0], b[0]))
    end = tuple(min(i + n, j + m) for i, n, j, m in zip(a[0], a[1], b[0], b[1], strict=True))
    if any(e <= s for s, e in zip(start, end, strict=True)):
        return None
    return start, tuple(e - s for s, e in zip(start, end, strict=True))


def within(box: Box, outer: Box) -> tuple[slice, ...]:
    """The slices of a box in a tensor that is another box."""
    return tuple(slice(a - o, a - o + n) for a, n, o in zip(box[0], box[1], outer[0], strict=True))


class Piece(NamedTuple):
    """A part of a matrix that a rank holds, on its way to the owner or back."""
    matrix: Matrix
    peer: int           # place of the other rank in the group
    box: Box


class Bucket(NamedTuple):
    """Matrices that travel together; each list is ordered as the peers are."""
    group: object       # process group; None: nothing travels
    ranks: int
    owned: list[Matrix]         # here
    sent: list[Piece]           # gather: from here to their owners
    received: list[Piece]       # gather: of the owned ones, from those that hold them
    returned: list[Piece]       # give: of the owned ones, to all that hold them, copies too
    taken: list[Piece]          # give: to here


class Owners:
    """Who owns which matrix of the parameters, and the way there and back. All ranks of the parameters' meshes make it.

    cost: of a matrix, by its shape. most: of a block's rows and columns; 0: matrices are whole. bucket: elements that
    an owner has of a bucket, about. timeout: of process groups that have to be made, a timedelta.
    """

    def __init__(self, parameters: list[torch.Tensor], cost: Callable[[tuple[int, ...]], float], *, most: int = 0,
                 bucket: int = 2**24, timeout=None):
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        held = [places_of(p) for p in parameters]
        self.boxes = [next(place.box for place in here if place.rank == self.rank) for here in held]
        self.owned = assign(held, [p.shape for p in parameters], cost, most)
        self.buckets, by_group = [], {}
        for matrix, owner in self.owned:
            here = held[matrix.index]
            mine = next(place for place in here if place.rank == self.rank)
            members = [place for place in here if place.group == mine.group]
            if owner in {place.rank for place in members} and meet_batch(matrix, mine):
                key = tuple(place.rank for place in members)
                by_group.setdefault(key, []).append((matrix, owner, members))
        def first(item):        # so that all ranks make and use their groups in the same order
            return min(matrix.index for matrix, _, _ in item[1])

        for ranks, tasks in sorted(by_group.items(), key=first):
            group = None
            if len(ranks) > 1:
                group = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
            filled, numbered = {}, {}
            for task in sorted(tasks, key=lambda task: task[0]):
                owner = task[1]
                number = filled.get(owner, 0) // bucket
                filled[owner] = filled.get(owner, 0) + math.prod(task[0].size)
                numbered.setdefault(number, []).append(task)
            self.buckets += [self._bucket(group, list(ranks), numbered[number]) for number in sorted(numbered)]

    def _bucket(self, group, ranks: list[int], tasks) -> Bucket:
        owned, sent, received, returned, taken = [], [], [], [], []
        for matrix, owner, members in tasks:
            by_rank = {place.rank: place for place in members}
            copy, box = by_rank[owner].copy, (matrix.start, matrix.size)
            if owner == self.rank:
                owned.append(matrix)
            for place in members:
                part = meet(box, place.box)
                if part is None:
                    continue
                if place.rank == self.rank:
                    taken.append(Piece(matrix, ranks.index(owner), part))
                    if place.copy == copy:
                        sent.append(Piece(matrix, ranks.index(owner), part))
                if owner == self.rank:
                    returned.append(Piece(matrix, ranks.index(place.rank), part))
                    if place.copy == copy:
                        received.append(Piece(matrix, ranks.index(place.rank), part))
        for pieces in (sent, received, returned, taken):
            pieces.sort(key=lambda piece: (piece.peer, piece.matrix, piece.box))
        return Bucket(group, len(ranks), owned, sent, received, returned, taken)

    def run(self, source: Callable, compute: Callable, sink: Callable, *, dtype: torch.dtype, device) -> None:
        """source(i, slices) -> that part of this rank's part of the tensor of parameter i. compute(matrices, wholes) ->
        a result of the same shape for each. sink(i, slices, piece) takes a part of a result. dtype: of what travels."""
        coming = going = None
        for bucket, following in itertools.zip_longest(self.buckets, self.buckets[1:]):
            wholes = (coming or self._gather(bucket, source, dtype, device))()
            coming = self._gather(following, source, dtype, device) if following else None
            results = compute(bucket.owned, wholes) if bucket.owned else []
            if going:
                going()
            going = self._give(bucket, results, sink, dtype, device)
        if going:
            going()

    def _gather(self, bucket: Bucket, source, dtype, device) -> Callable[[], list[torch.Tensor]]:
        def piece(p):
            return source(p.matrix.index, within(p.box, self.boxes[p.matrix.index]))

        arrived = exchange(bucket, bucket.sent, bucket.received, piece, dtype, device)

        def finish():
            wholes = {m: torch.empty(m.shape, dtype=dtype, device=device) for m in bucket.owned}
            for p, values in arrived():
                whole = wholes[p.matrix].view(p.matrix.size)
                whole[within(p.box, (p.matrix.start, p.matrix.size))] = values
            return list(wholes.values())
        return finish

    def _give(self, bucket: Bucket, results, sink, dtype, device) -> Callable[[], None]:
        whole = dict(zip(bucket.owned, results, strict=True))

        def piece(p):
            return whole[p.matrix].view(p.matrix.size)[within(p.box, (p.matrix.start, p.matrix.size))]

        arrived = exchange(bucket, bucket.returned, bucket.taken, piece, dtype, device)

        def finish():
            for p, values in arrived():
                sink(p.matrix.index, within(p.box, self.boxes[p.matrix.index]), values)
        return finish


def meet_batch(matrix: Matrix, place: Place) -> bool:
    """Whether the matrix is one of the place's group."""
    batch = max(0, len(matrix.start) - 2)
    return all(a <= at < a + n for at, a, n in zip(matrix.start[:batch], *(part[:batch] for part in place.box),
                                                   strict=True))


def exchange(bucket: Bucket, out: list[Piece], into: list[Piece], values: Callable, dtype, device) -> Callable:
    """Starts an all-to-all of pieces; the result waits for it and gives (piece, its values) of those that came."""
    if bucket.group is None:
        return lambda: [(p, values(p)) for p in out]

    def counts(pieces):
        sizes = [0] * bucket.ranks
        for p in pieces:
            sizes[p.peer] += math.prod(p.box[1])
        return sizes

    sent = torch.empty(sum(counts(out)), dtype=dtype, device=device)
    for p, place in zip(out, sent.split([math.prod(p.box[1]) for p in out]), strict=True):
        place.view(p.box[1]).copy_(values(p))
    got = torch.empty(sum(counts(into)), dtype=dtype, device=device)
    work = dist.all_to_all_single(got, sent, counts(into), counts(out), group=bucket.group, async_op=True)

    def arrived():
        work.wait()
        parts = got.split([math.prod(p.box[1]) for p in into])
        return [(p, part.view(p.box[1])) for p, part in zip(into, parts, strict=True)]
    return arrived
