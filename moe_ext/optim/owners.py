"""Whole matrices of sharded parameters: each is gathered to one rank, its owner, which computes once and gives every
rank its part of the result.

    owners = Owners(parameters, cost=lambda shape: ..)          # who owns what: the same on all ranks, by shapes alone
    owners.run(source, compute, sink, dtype=.., device=..)      # one trip of all matrices there and back

A parameter [.., M, N] is a batch of matrices; one of fewer dimensions is one vector, or a number. A mesh axis that
shards a batch dimension, as ep does the experts, needs no traffic: each of its ranks has matrices of its own. Over all
other axes, be they shards or copies, the ranks that hold a matrix, its team, share the work: an owner is the one of
them with least to do so far, the costliest matrices first (LPT, Graham 1969). Of copies one alone sends its shards to
the owner; all get the result from it, so they stay equal.

Matrices go in buckets, in the order in which they were assigned, so that in each the owners have about the same to do:
while one is computed the next one comes and the last one's results go. So a rank holds, in wholes, results and
messages, at most seven times `bucket` elements; more only where one matrix of each owner is more.
"""
from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

Box = tuple[tuple[int, ...], tuple[int, ...]]       # start, size of a part of a parameter
Slices = tuple[slice, ...]
BUCKET = 2**24      # elements that an owner has of a bucket, at most, or one matrix


# ---- who owns what: pure functions, which the plan uses too ----------------------------------------------------------
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


def matrices(index: int, shape, inside: Box, most: int = 0) -> Iterator[Matrix]:
    """Those of a parameter that a box has whole; blocks of at most `most` rows and columns, if that is not 0."""
    (start, size), batch = inside, max(0, len(shape) - 2)
    steps = [1] * batch + [most or max(1, n) for n in shape[batch:]]
    begins = [range(a, a + n, step) for a, n, step in zip(start, size, steps, strict=True)]
    for begin in itertools.product(*begins):
        yield Matrix(index, begin, tuple(min(step, a + n - at) for step, a, n, at in
                                         zip(steps, start, size, begin, strict=True)))


class Place(NamedTuple):
    """A rank among those that hold a parameter."""
    rank: int
    box: Box            # its part of the parameter
    group: tuple        # ranks with the same hold whole matrices between them: a team
    copy: tuple         # of these, ranks with the same hold each box once


def places(shape, ranks, sizes, placements) -> list[Place]:
    """ranks: of the mesh, in row-major order; sizes: of its axes; placements: Shard and Replicate, and what fully_shard
    makes of a dimension that tensor parallelism has cut (_StridedShard)."""
    batch, found, order = max(0, len(shape) - 2), [], nested(sizes, placements)
    for rank, at in zip(ranks, itertools.product(*map(range, sizes)), strict=True):
        start, size, group, copy = [0] * len(shape), list(shape), [], []
        for place, n, i in ((placements[axis], sizes[axis], at[axis]) for axis in order):
            if place.is_replicate():
                copy.append(i)
                continue
            each = -(-size[place.dim] // n)
            first = min(i * each, size[place.dim])
            start[place.dim] += first
            size[place.dim] = min(each, size[place.dim] - first)
            if place.dim < batch:
                group.append(i)
        found.append(Place(rank, (tuple(start), tuple(size)), tuple(group), tuple(copy)))
    return found


def nested(sizes, placements) -> list[int]:
    """The axes, that which cuts first in front: from left to right, but a _StridedShard after those on its right that
    cut its dimension. ValueError for other placements."""
    late = []
    for axis, place in enumerate(placements, start=1):
        if hasattr(place, "split_factor"):      # a _StridedShard: in how many pieces it finds its dimension
            late.insert(0, axis - 1)
            right = zip(sizes[axis:], placements[axis:], strict=True)
            if place.split_factor == math.prod(n for n, other in right if getattr(other, "dim", None) == place.dim):
                continue
        elif place.is_replicate() or type(place) is Shard:
            continue
        raise ValueError(
            f"got placements {tuple(placements)}, wanted Shard and Replicate alone: shard each dimension over one axis "
            "(fully_shard's shard_placement_fn says which), and redistribute what is Partial")
    return [axis for axis in range(len(placements)) if axis not in late] + late


def teams(here: list[Place]) -> dict[tuple, list[Place]]:
    """group -> its places, by rank."""
    found = {}
    for place in sorted(here):
        found.setdefault(place.group, []).append(place)
    return found


def assign(held: list[list[Place]], shapes, cost: Callable[[tuple[int, ...]], float],
           most: int = 0) -> list[tuple[Matrix, int]]:
    """(matrix, rank of its owner), of all matrices of all teams, large teams first, in each the costliest first.

    held: of each parameter its places (the same list, not only an equal one, of parameters that lie alike: faster).
    A rank counts what it has to do of parameters on the same ranks, which all of these know, and of no others.
    """
    cost, layouts, shared = functools.cache(cost), {}, {}
    for index, (here, shape) in enumerate(zip(held, shapes, strict=True)):
        if id(here) not in layouts:
            layouts[id(here)] = (tuple(sorted(place.rank for place in here)),
                                 [(tuple(place.rank for place in team), team[0].box) for team in teams(here).values()])
        everyone, theirs = layouts[id(here)]
        batch = max(0, len(shape) - 2)
        for ranks, (start, size) in theirs:
            inside = (*start[:batch], *[0] * (len(shape) - batch)), (*size[:batch], *shape[batch:])
            shared.setdefault((everyone, ranks), []).extend(matrices(index, shape, inside, most))
    owned, loads = [], {}
    for (everyone, ranks), theirs in sorted(shared.items(), key=lambda item: -len(item[0][1])):
        load = loads.setdefault(everyone, np.zeros(len(everyone)))
        at = np.searchsorted(everyone, ranks)
        own = load[at]
        for matrix in sorted(theirs, key=lambda m: (-cost(m.shape), m)):
            least = int(own.argmin())
            own[least] += cost(matrix.shape)
            owned.append((matrix, ranks[least]))
        load[at] = own
    return owned


def parts(matrix: Matrix, team: Iterable[Place]) -> Iterator[tuple[Place, Box]]:
    """What of the matrix these ranks hold: it comes from the owner's copy and goes to all."""
    box = matrix.start, matrix.size
    for place in team:
        if (part := meet(box, place.box)) is not None:
            yield place, part


def meet(a: Box, b: Box) -> Box | None:
    """What two boxes have in common; None: nothing."""
    start = tuple(map(max, a[0], b[0]))
    end = tuple(min(i + n, j + m) for i, n, j, m in zip(a[0], a[1], b[0], b[1], strict=True))
    if any(e <= s for s, e in zip(start, end, strict=True)):
        return None
    return start, tuple(e - s for s, e in zip(start, end, strict=True))


def within(box: Box, outer: Box) -> Slices:
    """The slices of a box in a tensor that is another box."""
    return tuple(slice(a - o, a - o + n) for a, n, o in zip(box[0], box[1], outer[0], strict=True))


# ---- the trip --------------------------------------------------------------------------------------------------------
class Piece(NamedTuple):
    """A part of a matrix on its way to or from this rank."""
    peer: int           # place of the other rank in the process group
    matrix: Matrix
    size: tuple[int, ...]
    at: Slices          # where it lies: at its owner in the matrix, elsewhere in this rank's part of the parameter


class Bucket(NamedTuple):
    """Matrices that travel together; each list of pieces is ordered by peers, then matrices, as theirs are."""
    group: object               # process group; None: nothing travels
    ranks: list[int]            # of the group
    owned: list[Matrix]         # here
    sent: list[Piece]           # gather: from here to their owners
    received: list[Piece]       # gather: of the owned ones, from those that hold them
    returned: list[Piece]       # give: of the owned ones, to all that hold them, copies too
    taken: list[Piece]          # give: to here

    def only(self, moved: Collection[int]) -> Bucket:
        """What there is of some parameters."""
        def of(pieces):
            return [piece for piece in pieces if piece.matrix.index in moved]
        return self._replace(owned=[matrix for matrix in self.owned if matrix.index in moved], sent=of(self.sent),
                             received=of(self.received), returned=of(self.returned), taken=of(self.taken))


class Owners:
    """Who owns which matrix of the parameters, and the way there and back. All ranks of the parameters' meshes make it,
    from parameters in the same order.

    cost: of a matrix, by its shape. most: of a block's rows and columns; 0: matrices are whole. bucket: elements that
    an owner has of a bucket, about. timeout: of process groups that have to be made, a timedelta. names: of the
    parameters, for errors.
    owned: (matrix, its owner's rank), of all. mine: the matrices owned here. sent: bytes that this rank sent to others
    in the last run. Errors: ValueError for a parameter that is not in boxes.
    """

    def __init__(self, parameters: list[torch.Tensor], cost: Callable[[tuple[int, ...]], float], *, most: int = 0,
                 bucket: int = BUCKET, timeout=None, names: list[str] | None = None):
        self.rank, self.sent = dist.get_rank() if dist.is_initialized() else 0, 0
        self.names = names or [f"parameter {i} of shape {list(p.shape)}" for i, p in enumerate(parameters)]
        held = self._held(parameters)
        self.owned = assign(held, [p.shape for p in parameters], cost, most)
        self.mine = [matrix for matrix, owner in self.owned if owner == self.rank]

        own = {}        # rank -> place, of this rank's team
        for here in {id(here): here for here in held}.values():
            group = next(place.group for place in here if place.rank == self.rank)
            own[id(here)] = {place.rank: place for place in teams(here)[group]}
        own = [own[id(here)] for here in held]
        self.boxes = [team[self.rank].box for team in own]
        shared = {}     # ranks of a team -> (matrix, owner)
        tasks = [shared.setdefault(tuple(team), []) for team in own]
        for matrix, owner in self.owned:
            if owner in own[matrix.index]:
                tasks[matrix.index].append((matrix, owner))
        self.teams, self.buckets = [], []
        for ranks, theirs in shared.items():     # in the order of parameters, so on all ranks in the same
            if not theirs:
                continue
            first = theirs[0][0].index
            group = process_group(parameters[first], list(ranks), timeout)
            if group is not None:
                self.teams.append((group, sorted({matrix.index for matrix, _ in theirs})))
            copies = len({place.copy for place in own[first].values()})
            self.buckets += [self._bucket(group, some, own) for some in filled(theirs, max(1, bucket // copies))]

    def _held(self, parameters) -> list[list[Place]]:
        """The places of each; one list of those that lie alike."""
        held, known = [], {}
        for p, name in zip(parameters, self.names, strict=True):
            layout = (p.shape, p.device_mesh, p.placements) if isinstance(p, DTensor) else (p.shape,)
            if layout not in known:
                mesh, sizes, placements = [self.rank], (), ()       # of a plain tensor, which is this rank's own
                if isinstance(p, DTensor):
                    mesh, sizes, placements = p.device_mesh.mesh.flatten().tolist(), p.device_mesh.shape, p.placements
                try:
                    known[layout] = places(p.shape, mesh, sizes, placements)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
            held.append(known[layout])
        return held

    def _bucket(self, group, tasks: list[tuple[Matrix, int]], own: list[dict[int, Place]]) -> Bucket:
        ranks = dist.get_process_group_ranks(group) if group else [self.rank]
        peers = {rank: peer for peer, rank in enumerate(ranks)}
        bucket = Bucket(group, ranks, [], [], [], [], [])
        for matrix, owner in tasks:
            team, here = own[matrix.index], self.boxes[matrix.index]
            copy, whole = team[owner].copy, (matrix.start, matrix.size)
            for place, part in parts(matrix, [team[self.rank]]):
                piece = Piece(peers[owner], matrix, part[1], within(part, here))
                bucket.taken.append(piece)
                if place.copy == copy:
                    bucket.sent.append(piece)
            if owner == self.rank:
                bucket.owned.append(matrix)
                for place, part in parts(matrix, team.values()):
                    piece = Piece(peers[place.rank], matrix, part[1], within(part, whole))
                    bucket.returned.append(piece)
                    if place.copy == copy:
                        bucket.received.append(piece)
        for pieces in bucket[3:]:
            pieces.sort(key=lambda piece: piece[:2])
        return bucket

    def run(self, source: Callable, compute: Callable, sink: Callable, *, dtype: torch.dtype, device,
            moved: Collection[int] | None = None) -> None:
        """One trip. All ranks of the parameters' meshes call it.

        source(i, slices) -> those values of this rank's part of the tensor of parameter i. compute(matrices, wholes) ->
        a result of its shape for each whole. sink(i, slices, piece) takes a part of a result; of other matrices than
        those still to be asked for. dtype: of all wholes and pieces. moved: the parameters that take part, None: all;
        one without a gradient is left alone, as in torch; then the ranks `agree` first. What compute raises ends the
        trip here, and the others when their collectives do (moe_ext.parallel.failure names this rank).
        """
        everything = range(len(self.names))
        moved = everything if moved is None else set(moved)
        buckets = self.buckets if len(moved) == len(everything) else [bucket.only(moved) for bucket in self.buckets]
        travel, self.sent = functools.partial(self._exchange, dtype=dtype, device=device), 0

        def gather(bucket):
            """Starts; the result waits -> the matrices owned here."""
            arrived = travel(bucket, bucket.sent, bucket.received, lambda piece: source(piece.matrix.index, piece.at))

            def finish():
                wholes = [torch.empty(matrix.shape, dtype=dtype, device=device) for matrix in bucket.owned]
                boxes = {matrix: whole.view(matrix.size) for matrix, whole in zip(bucket.owned, wholes, strict=True)}
                for piece, values in arrived():
                    boxes[piece.matrix][piece.at] = values
                return wholes
            return finish

        def give(bucket, results):
            """Starts; the result waits and hands on what came."""
            boxes = {matrix: result.view(matrix.size) for matrix, result in zip(bucket.owned, results, strict=True)}
            arrived = travel(bucket, bucket.returned, bucket.taken, lambda piece: boxes[piece.matrix][piece.at])

            def finish():
                for piece, values in arrived():
                    sink(piece.matrix.index, piece.at, values)
            return finish

        coming, going = None, lambda: None
        for bucket, following in itertools.zip_longest(buckets, buckets[1:]):
            wholes = (coming or gather(bucket))()
            coming = gather(following) if following else None
            results = compute(bucket.owned, wholes) if bucket.owned else []
            going()
            going = give(bucket, results)
            del wholes, results
        going()

    def agree(self, moved: Collection[int], device) -> None:
        """Before a step changes anything. ValueError on all ranks of a team, if one moves a parameter that another one
        does not."""
        if not self.teams:
            return
        flags = [torch.tensor([i in moved for i in indexes], dtype=torch.int32, device=device)
                 for _, indexes in self.teams]
        for (group, _), flag in zip(self.teams, flags, strict=True):
            dist.all_reduce(flag, group=group)
        counts = iter(torch.cat(flags).tolist())        # the only read of a step
        for group, indexes in self.teams:
            ranks = dist.get_world_size(group)
            for i in indexes:
                if (count := next(counts)) not in (0, ranks):
                    raise ValueError(f"{self.names[i]}: {count} of the {ranks} ranks that share it move it, wanted all "
                                     "or none: set .grad = torch.zeros_like(p) where a rank has computed none")

    def _exchange(self, bucket: Bucket, out: list[Piece], into: list[Piece], values: Callable, *, dtype, device):
        """Starts an all-to-all of pieces; the result waits for it -> (piece, its values) of those that came."""
        if bucket.group is None:
            return lambda: [(piece, values(there).to(dtype)) for piece, there in zip(into, out, strict=True)]

        def counts(pieces):
            sizes = [0] * len(bucket.ranks)
            for piece in pieces:
                sizes[piece.peer] += math.prod(piece.size)
            return sizes

        def split(message, pieces):
            return zip(pieces, message.split([math.prod(piece.size) for piece in pieces]), strict=True)

        here, there = counts(into), counts(out)
        message = torch.empty(sum(there), dtype=dtype, device=device)
        for piece, room in split(message, out):
            room.view(piece.size).copy_(values(piece))
        self.sent += dtype.itemsize * (sum(there) - there[bucket.ranks.index(self.rank)])
        got = torch.empty(sum(here), dtype=dtype, device=device)
        work = dist.all_to_all_single(got, message, here, there, group=bucket.group, async_op=True)

        def arrived():
            work.wait()         # on CUDA the stream does; until then torch keeps the message
            return [(piece, part.view(piece.size)) for piece, part in split(got, into)]
        return arrived


def filled(tasks: list[tuple[Matrix, int]], most: int) -> Iterator[list[tuple[Matrix, int]]]:
    """Runs of (matrix, owner) in which no owner has more than `most` elements, or one matrix."""
    run, elements = [], Counter()
    for matrix, owner in tasks:
        size = math.prod(matrix.size)
        if elements[owner] and elements[owner] + size > most:
            yield run
            run, elements = [], Counter()
        run.append((matrix, owner))
        elements[owner] += size
    yield run


def process_group(p: torch.Tensor, ranks: list[int], timeout):
    """Of these ranks of the mesh of p: that of all ranks or of a mesh axis, if it is theirs, or a new one; of one rank
    None."""
    if len(ranks) == 1:
        return None
    for group in (dist.group.WORLD, *p.device_mesh.get_all_groups()):
        if sorted(dist.get_process_group_ranks(group)) == ranks:
            return group
    return dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
