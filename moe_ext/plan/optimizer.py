"""What the optimizers of a run cost a rank: state, working memory, traffic, FLOPs; without ranks or values.

build_optimizer says which optimizer moves which parameter, of the model on the meta device. Who owns which matrix is
decided as in owners.assign, but by numbers alone (`share_out`): of layers and groups of experts that are alike the
matrices are counted, not listed. The one number "step" of each parameter is left out.
"""
from __future__ import annotations

import collections
import functools
import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from torch.distributed.tensor import Replicate, Shard

from moe_ext.config import Config, MeshConfig, ModelConfig, OptimConfig
from moe_ext.model import GPT
from moe_ext.optim import adamw, build_optimizer, muon, shampoo
from moe_ext.optim.groups import choices
from moe_ext.optim.owners import BUCKET, matrices, places
from moe_ext.optim.together import parts_of
from moe_ext.parallel.shard import dense_dim, experts_dim, has_width
from moe_ext.parallel.tensor import COLUMNS, ROWS
from moe_ext.plan.shares import Pieces, ends, first_piece, parts, stages, widths


# ---- which optimizer moves what, and where it lies -------------------------------------------------------------------
@functools.lru_cache(maxsize=8)
def chosen(model: ModelConfig, optim: OptimConfig) -> dict[str, dict[str, str]]:
    """Optimizer -> name -> kind of its parameters, in its order. Errors: ConfigError if optim.rule forgets one."""
    gpt = GPT(model, device="meta")
    choice = choices(gpt, optim)
    return {type(part).__name__: {name: choice[name].kind for group in part.param_groups
                                  for name in group["param_names"]}
            for part in parts_of(build_optimizer(gpt, optim))}


def movers(config: Config) -> dict[str, str]:
    """Optimizer -> what it moves: {"Muon": "matrices, experts", "AdamW": "embeddings, norms"}."""
    return {optimizer: ", ".join(dict.fromkeys(kind.values()))
            for optimizer, kind in reversed(chosen(config.model, config.optim).items())}


def kept(config: Config) -> str:
    """What the optimizers keep between two steps, in a line: "moments" of AdamW alone."""
    what = {"AdamW": "moments", "Muon": "momentum", "Shampoo": "moments, factors and roots"}
    names = list(chosen(config.model, config.optim))
    text = what[names[0]] if names == ["AdamW"] else " and ".join(f"{name}'s {what[name]}" for name in names)
    return text + {"full": "", "bf16": " in bf16", "host": " in the host's memory"}[config.optim.state]


class Sharded(NamedTuple):
    """Parameters of one shape that are sharded alike over the ranks of a stage."""
    shape: tuple[int, ...]
    sizes: tuple[int, ...]          # of the mesh's axes, the last fastest
    placements: tuple
    experts: bool

    @classmethod
    def of(cls, name: str, shape, mesh: MeshConfig) -> Sharded:
        if ".experts." in name:
            dim, etp = experts_dim(name.rpartition(".")[2], mesh.etp), Shard(2) if has_width(name) else Replicate()
            return cls(shape, (mesh.rep, mesh.efsdp, mesh.ep, mesh.etp), (Replicate(), Shard(dim), Shard(0), etp), True)
        tp = Shard(0) if ROWS.search(name) else Shard(1) if COLUMNS.search(name) else Replicate()
        return cls(shape, (mesh.rep, mesh.shards, mesh.tp), (Replicate(), Shard(dense_dim(name, mesh.tp)), tp), False)

    @property
    def batch(self) -> int:
        """The first dimensions count matrices, the last two are those of a matrix."""
        return max(0, len(self.shape) - 2)

    def blocks(self, most: int) -> list[tuple]:
        """(start, size) of the blocks of each of its matrices."""
        shape = self.shape[self.batch:]
        return [(m.start, m.size) for m in matrices(0, shape, ((0,) * len(shape), shape), most)]

    @property
    def part(self) -> int:
        """Elements that the first rank has, which has the largest piece."""
        cuts = {place.dim: n for n, place in zip(self.sizes, self.placements, strict=True)
                if n > 1 and place.is_shard()}
        return math.prod(first_piece(self.shape, cuts))


class Where(NamedTuple):
    """What the ranks of a stage hold of such a parameter."""
    start: np.ndarray       # [rank, dimension] of its part
    size: np.ndarray        # likewise
    group: np.ndarray       # [rank] number of the group that has whole matrices between its ranks
    copy: np.ndarray        # [rank] number of the ranks that, of a group, hold each value once
    groups: list[np.ndarray]        # the ranks of each group


@functools.lru_cache(maxsize=512)
def where(p: Sharded) -> Where:
    here = places(p.shape, range(math.prod(p.sizes)), p.sizes, p.placements)
    number, copies = {}, {}
    group = np.array([number.setdefault(place.group, len(number)) for place in here])
    copy = np.array([copies.setdefault((place.group, place.copy), len(copies)) for place in here])
    start, size = (np.array([place.box[i] for place in here]) for i in (0, 1))
    return Where(start, size, group, copy, [np.flatnonzero(group == i) for i in range(len(number))])


@functools.lru_cache(maxsize=8)
def listed(model: ModelConfig, optim: OptimConfig) -> dict[str, list[tuple]]:
    """Optimizer -> of its parameters, in its order, (layer, or which end of the model has it, name in it, shape)."""
    layers, begin, end = parts(model)
    found = {name: (where, name, shape) for where, some in (("begin", begin), ("end", end)) for name, shape, _ in some}
    found |= {name: ("both", name, shape) for name, shape, moves in begin if (name, shape, moves) in end}
    found |= {f"layers.{i}.{name}": (i, name, shape) for i, layer in enumerate(layers) for name, shape, _ in layer}
    return {optimizer: [found[name] for name in names] for optimizer, names in chosen(model, optim).items()}


@functools.lru_cache(maxsize=256)
def stored(model: ModelConfig, mesh: MeshConfig, optim: OptimConfig, pieces: Pieces) -> dict[str, list[Sharded]]:
    """Optimizer -> the parameters of a stage that it moves, in its order; those alike are one object."""
    first, last = ends(model, pieces)
    here = {*itertools.chain(*pieces), *["begin"] * first, *["end"] * last, *["both"] * (first or last)}
    of = functools.cache(lambda name, shape: Sharded.of(name, shape, mesh))
    return {optimizer: [of(name, shape) for where, name, shape in parameters if where in here]
            for optimizer, parameters in listed(model, optim).items()}


def values_of(parameters: list[Sharded], part=lambda p: p.part):
    """That the first rank stores, or another part of each."""
    alike = {id(p): p for p in parameters}
    return sum(count * part(alike[i]) for i, count in collections.Counter(map(id, parameters)).items())


def by_rank(parameters: list[Sharded]) -> np.ndarray:
    """[rank] values that it stores."""
    return values_of(parameters, lambda p: where(p).size.prod(1))


# ---- who owns which matrix -------------------------------------------------------------------------------------------
class Owned(NamedTuple):
    """Blocks of equal place and size in matrices of parameters that are sharded alike."""
    p: Sharded
    start: tuple[int, ...]
    size: tuple[int, ...]
    count: np.ndarray       # [rank] how many of them it owns


def share_out(parameters: list[Sharded], cost, most: int = 0) -> tuple[np.ndarray, list[Owned]]:
    """([rank] the cost of what it owns, all blocks). Whom owners.assign gives each: in large groups first, in each the
    costliest first, to the rank that has least to do."""
    alike = {id(p): [(len(where(p).groups), -cost(size), p, start, size) for start, size in p.blocks(most)]
             for p in {id(p): p for p in parameters}.values()}
    tasks = [(groups, weight, index, *block) for index, p in enumerate(parameters)
             for groups, weight, *block in alike[id(p)]]
    tasks.sort(key=lambda task: task[:3])
    ranks = math.prod(parameters[0].sizes)
    loads, owned = np.zeros(ranks), {}
    for (_, weight), run in itertools.groupby(tasks, key=lambda task: task[:2]):
        classes, order = {}, []
        for _, same in itertools.groupby(run, key=lambda task: task[2]):      # matrix by matrix of a parameter
            same = list(same)
            p = same[0][3]
            each = math.prod(where(p).size[0, :p.batch])
            order += [classes.setdefault(task[3:], len(classes)) for task in same] * each
        counts, done = np.zeros((len(classes), ranks), dtype=int), {}
        for members in where(p).groups:         # many of which have the same to do
            load = loads[members]
            if load.tobytes() not in done:
                found = np.zeros((len(classes), len(members)), dtype=int)
                np.add.at(found, (order, in_turn(load.tolist(), -weight, len(order))), 1)
                done[load.tobytes()] = found
            counts[:, members] = done[load.tobytes()]
            loads[members] -= weight * done[load.tobytes()].sum(0)
        for key, count in zip(classes, counts, strict=True):
            owned[key] = owned.get(key, 0) + count
    return loads, [Owned(*key, count) for key, count in owned.items()]


def in_turn(loads: list[float], cost: float, tasks: int) -> np.ndarray:
    """To whom so many tasks of equal cost go, one after the other: to the one with least, of equals the first."""
    heap, top, order = [(load, i) for i, load in enumerate(loads)], max(loads), []
    heapq.heapify(heap)
    while len(order) < tasks and heap[0][0] + cost <= top:
        load, i = heap[0]
        heapq.heapreplace(heap, (load + cost, i))
        order.append(i)
    around = [i for _, i in sorted(heap)]       # for from here on all come round
    return np.array((order + around * (-(-(tasks - len(order)) // len(around))))[:tasks])


def sent(owned: list[Owned]) -> np.ndarray:
    """[rank] elements that it sends: of each matrix its part to the owner, if it is of his copy; of those that it owns
    its part to every other rank that has one."""
    total = 0
    for p, start, size, count in owned:
        here = where(p)
        low, high = here.start[:, p.batch:], here.start[:, p.batch:] + here.size[:, p.batch:]
        part = (np.minimum(high, np.add(start, size)) - np.maximum(low, start)).clip(0).prod(1)
        everyone = np.bincount(here.group, part)[here.group]
        owners = np.bincount(here.copy, count)[here.copy]
        total = total + count * (everyone - part) + (owners - count) * part
    return total


# ---- what it costs ---------------------------------------------------------------------------------------------------
class Cost(NamedTuple):
    """Of the ranks of a stage, each figure that of the one with most."""
    state: int = 0          # bytes between two steps, on the device
    host: int = 0           # and in the host's memory
    work: int = 0           # bytes beside them during a step, on the device, about
    dense: int = 0          # bytes that a rank sends in a step, to owners and back, of what all ranks share
    experts: int = 0        # and of what the ranks of an expert share
    moved: int = 0          # bytes read and written on the device in a step, about
    carried: int = 0        # bytes that come from the host's memory in a step and go back to it
    bf16: float = 0.0       # FLOPs in products of matrices of this dtype, on average over the steps
    fp32: float = 0.0
    fp64: float = 0.0
    eigen: float = 0.0      # FLOPs in eigendecompositions, likewise
    in_all: float = 0.0     # FLOPs of all ranks of the stage

    @property
    def flops(self) -> float:
        return self.bf16 + self.fp32 + self.fp64 + self.eigen


def cost(config: Config, stage: int = 0, only: str = "") -> Cost:
    """Of the ranks of one stage. only: of one of its optimizers, as "Muon"."""
    mesh = config.mesh
    alike = MeshConfig(rep=mesh.rep, fsdp=mesh.shards, tp=mesh.tp, ep=mesh.ep, etp=mesh.etp)
    return _cost(config.model, alike, config.optim, widths(config)[0], stages(config)[stage], only)


def optimizer_state(config: Config, stage: int = 0) -> int:
    """Bytes between two steps, wherever they are kept."""
    return cost(config, stage).state + cost(config, stage).host


def optimizer_traffic(config: Config, stage: int = 0) -> dict[str, int]:
    """Bytes that a rank sends in a step: {"optimizer": to owners of matrices and back}."""
    return {"optimizer": cost(config, stage).dense + cost(config, stage).experts}


def optimizer_flops(config: Config, stage: int = 0) -> float:
    """Of a step of the busiest rank, in products of matrices and eigendecompositions."""
    return cost(config, stage).flops


@functools.lru_cache(maxsize=4096)
def _cost(model: ModelConfig, mesh: MeshConfig, optim: OptimConfig, real: int, pieces: Pieces,
          only: str = "") -> Cost:
    count = {"AdamW": of_adamw, "Muon": of_muon, "Shampoo": of_shampoo}
    here = {name: parameters for name, parameters in stored(model, mesh, optim, pieces).items()
            if parameters and only in ("", name)}
    if not here:
        return Cost()
    each = [count[name](parameters, optim, real) for name, parameters in here.items()]
    added = {name: sum(getattr(one, name) for one, _, _ in each) for name in Cost._fields}
    if "Shampoo" in here:       # of the others the first rank has most, but it may be another that owns most
        added["state"] = int(max(sum(by_rank() for _, _, by_rank in each)))
    trips = sum(trip for _, trip, _ in each)    # [dense, experts] x ranks
    most = np.argmax(np.sum(trips, axis=0))
    added |= dict(work=max(one.work for one, _, _ in each), dense=int(trips[0, most]), experts=int(trips[1, most]))
    if optim.state == "host":
        added |= dict(state=0, host=added["state"])
    return Cost(**added)


def width(optim: OptimConfig, real: int) -> int:
    """Bytes of a value as it is kept; of the moments, not of Shampoo's factors and roots."""
    return 2 if optim.state == "bf16" else real


def touched(optim: OptimConfig, real: int) -> int:
    """Bytes read and written to change such a value: as it is kept, and where it is widened or fetched to."""
    return {"full": 2 * real, "bf16": 2 * 2 + 4 * real, "host": 4 * real}[optim.state]


# of one optimizer: (cost, [dense, experts] x ranks of bytes sent, a function for the bytes of state by rank)
Counted = tuple[Cost, np.ndarray, Callable[[], np.ndarray]]


def of_adamw(parameters: list[Sharded], optim: OptimConfig, real: int) -> Counted:
    """Two moments, changed where they lie; what is widened or fetched comes bucket by bucket, the next before the last
    is let go."""
    values = values_of(parameters)
    away, nothing = optim.state == "host", np.zeros((2, math.prod(parameters[0].sizes)))
    return (Cost(state=2 * values * width(optim, real), moved=values * (3 * real + 2 * touched(optim, real)),
                 work=0 if optim.state == "full" else 2 * min(2 * values * real, adamw.BUCKET),
                 carried=4 * values * real * away), nothing, lambda: 2 * by_rank(parameters) * width(optim, real))


def of_muon(parameters: list[Sharded], optim: OptimConfig, real: int) -> Counted:
    """The momentum, sharded as the parameters are; matrices travel and are computed with in ns_dtype."""
    m, values, item = optim.muon, values_of(parameters), ITEMS[optim.muon.ns_dtype]
    loads, owned = share_out(parameters, muon.cost)
    flops, busiest = loads * m.ns_steps / muon.STEPS, loads.argmax()
    # a product reads x twice and writes the gram matrix, the next one reads that twice, the last one reads all
    products = sum(int(one.count[busiest]) * (5 * math.prod(one.size) + 4 * min(one.size)**2) for one in owned)
    return (Cost(state=values * width(optim, real), carried=2 * values * real * (optim.state == "host"),
                 moved=values * (7 * real + touched(optim, real) + 8 * item) + m.ns_steps * item * products,
                 work=trip_memory(parameters, owned, item, NEWTON_SCHULZ) + widened(parameters, optim, real),
                 in_all=float(flops.sum()), **{m.ns_dtype: float(flops.max())}),
            trip(owned, item), lambda: by_rank(parameters) * width(optim, real))


def of_shampoo(parameters: list[Sharded], optim: OptimConfig, real: int) -> Counted:
    """Moments, factors and roots at the owners of the blocks; gradients travel in the parameters' dtype."""
    s, values = optim.shampoo, values_of(parameters)
    frequency, root = s.precondition_frequency, ITEMS[s.root_dtype]
    loads, owned = share_out(parameters, lambda shape: shampoo.cost(shape, frequency), s.max_preconditioner_dim)
    busiest, state, carried, moved, eigen = loads.argmax(), 0, 0, 0, 0.0
    for one in owned:
        shapes = shampoo.state_shapes(one.size, s.grafting, optim.beta1)
        moments, factors, roots = (sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(what))
                                   for what in ("exp_avg", "factor", "root"))
        state = state + one.count * (moments * width(optim, real) + (factors + roots) * real)
        carried = carried + one.count * (2 * moments + 2 * factors + roots) * real
        moved = moved + one.count * (10 * real * math.prod(one.size) + moments * touched(optim, real)
                                     + (2 * factors + roots) * real)
        eigen = eigen + one.count * sum(shampoo.EIGH * side**3 / frequency for side in one.size)
    side = max(max(one.size) for one in owned)
    products = {"fp64" if real == 8 else "fp32": float(loads[busiest] - eigen[busiest])}
    return (Cost(state=int(state.max()), carried=int(carried.max()) * (optim.state == "host"),
                 moved=values * 13 * real + int(moved[busiest]),
                 work=trip_memory(parameters, owned, real, DIRECTION) + side * side * (EIGH * root + 2 * real),
                 eigen=float(eigen[busiest]), in_all=float(loads.sum()), **products),
            trip(owned, real), lambda: state)


def trip(owned: list[Owned], item: int) -> np.ndarray:
    """[2, rank] bytes sent: of dense parameters, of experts."""
    return item * np.stack([sum((sent([one]) for one in owned if one.p.experts == experts), start=0 * owned[0].count)
                            for experts in (False, True)])


NEWTON_SCHULZ = 8       # as large as a bucket: wholes, stack, x twice, two gram matrices, results, the last ones
DIRECTION = 4           # wholes, results, the last ones, and a block's moments and step
EIGH = 6                # as large as a factor: it, its eigenvectors, two products, two of workspace
ITEMS = {"bf16": 2, "fp32": 4, "fp64": 8}


def trip_memory(parameters: list[Sharded], owned: list[Owned], item: int, alive: int) -> int:
    """Bytes while matrices travel: `alive` tensors of a bucket, the next one's two messages, the last one's two, which
    go to all copies."""
    copies = max((max(where(p).copy) + 1) // len(where(p).groups) for p in parameters)
    largest = max(math.prod(one.size) for one in owned)
    most = max(sum(one.count * math.prod(one.size) for one in owned))
    bucket = min(max(BUCKET // copies, largest), most)
    messages = 2 + 2 * copies if math.prod(parameters[0].sizes) > 1 else 0
    return int(item * bucket * (alive + messages))


def widened(parameters: list[Sharded], optim: OptimConfig, real: int) -> int:
    """Bytes of the largest parameter's part of state that is rounded or elsewhere."""
    return 0 if optim.state == "full" else real * max(p.part for p in parameters)


def saved(model: ModelConfig, optim: OptimConfig, real: int) -> int:
    """Bytes of the state of the whole model, as a checkpoint has it."""
    return _cost(model, MeshConfig(), replace(optim, state="full" if optim.state == "host" else optim.state), real,
                 (range(model.layers),)).state
