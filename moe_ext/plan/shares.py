"""What a rank holds of each parameter, by the rules of moe_ext.parallel, without any ranks.

It is rank 0 that is described: where something divides unevenly, it has the largest piece. Of a pipeline it is the
first rank of a stage. `pieces`: the blocks of the pieces of the model that are meant; None: of the whole.
"""
from __future__ import annotations

import collections
import functools
import itertools
import math
from typing import NamedTuple

from moe_ext.config import Config, MeshConfig, ModelConfig, PipelineConfig, TuneConfig
from moe_ext.model import GPT
from moe_ext.parallel.shard import dense_dim, experts_dim, has_width
from moe_ext.parallel.stages import cut
from moe_ext.parallel.tensor import COLUMNS, ROWS

Pieces = tuple[range, ...]


def stages(config: Config) -> list[Pieces]:
    """The pieces of each stage of the pipeline; one stage has the whole model."""
    return _stages(config.model, config.mesh.pp, config.pipeline)


@functools.lru_cache(maxsize=256)
def _stages(model: ModelConfig, pp: int, pipeline: PipelineConfig) -> list[Pieces]:
    if pp == 1:
        return [(range(model.layers),)]
    pieces = cut(Config(model=model, mesh=MeshConfig(pp=pp), pipeline=pipeline))
    return [tuple(pieces[stage::pp]) for stage in range(pp)]


def makes(config: Config) -> list[int]:
    """The stages whose pieces differ; of those alike the first, which has the most micro-batches at a time."""
    return _makes(config.model, config.mesh.pp, config.pipeline)


@functools.lru_cache(maxsize=256)
def _makes(model: ModelConfig, pp: int, pipeline: PipelineConfig) -> list[int]:
    first = {}
    for stage, pieces in enumerate(_stages(model, pp, pipeline)):
        first.setdefault(tuple((frozenset(blocks(model, (piece,)).items()), ends(model, (piece,)), moved(model, piece))
                               for piece in pieces), stage)
    return list(first.values())


def moved(model: ModelConfig, piece: range) -> frozenset:
    """Which parameters of how many blocks move; without a difference if all do."""
    if model.tune == TuneConfig():
        return frozenset()
    return frozenset(collections.Counter(tuple(parts(model)[0][layer]) for layer in piece).items())


def ends(model: ModelConfig, pieces: Pieces | None) -> tuple[bool, bool]:
    """Whether they have (the embeddings, the last norm and the head)."""
    if pieces is None:
        return True, True
    return any(piece.start == 0 for piece in pieces), any(piece.stop == model.layers for piece in pieces)


def axes(mesh: MeshConfig) -> dict[str, int]:
    """How many ranks share something over each axis. sp's are FSDP ranks too, and those of a sequence, like all of a
    stage, share the statistics of a scope."""
    return {"pp": mesh.pp, "rep": mesh.rep, "fsdp": mesh.shards, "efsdp": mesh.efsdp, "sp": mesh.sp, "tp": mesh.tp,
            "ep": mesh.ep, "etp": mesh.etp, "sequence": mesh.sequence, "dp": mesh.dp, "world": mesh.stage}


def sent_columns(config: Config) -> tuple[int, int]:
    """Of each token that a rank has of the sequences that sp ranks share, what attention sends between them: (of
    queries, keys and values; of outputs). Their gradients come back likewise."""
    c, mesh = config.model, config.mesh
    H, G = c.heads // mesh.tp, c.kv_groups // mesh.tp
    if mesh.attention == "gather":      # to each rank all keys and values
        return 2 * G * mesh.sp * c.head_width, 0
    return (H + 2 * max(G, mesh.sp)) * c.head_width, H * c.head_width       # to each a head of keys and values at least


def tokens(config: Config) -> tuple[int, int]:
    """A rank's tokens of a micro-batch: (between the modules, inside those whose matrices tp shares)."""
    inside = config.train.micro_batch * config.model.seq_len // config.mesh.sp
    return inside // config.mesh.tp, inside


class Kind(NamedTuple):
    """Parameters of equal name and shape in layers that are alike."""
    name: str               # in the first of them
    shape: tuple[int, ...]
    moves: bool             # whether it is trained
    count: int              # how many layers have it


@functools.lru_cache(maxsize=8)
def parts(model: ModelConfig) -> tuple[list, list, list]:
    """(name, shape, whether it moves) of the parameters (of each block, without its prefix; that begin the model; that
    end it)."""
    def named(piece):
        return [(name, tuple(p.shape), p.requires_grad)
                for name, p in GPT(model, device="meta", blocks=piece).named_parameters()]

    layers = [[] for _ in range(model.layers)]
    for name, *rest in named(range(model.layers)):
        if name.startswith("layers."):
            _, layer, name = name.split(".", 2)
            layers[int(layer)].append((name, *rest))
    return layers, named(range(0)), named(range(model.layers, model.layers))


@functools.lru_cache(maxsize=256)
def kinds(model: ModelConfig, pieces: Pieces | None = None) -> list[Kind]:
    """The parameters of a model, layers that are alike counted together; a tied one counts once, and on the first and
    the last stage of a pipeline."""
    (layers, begin, end), (first, last) = parts(model), ends(model, pieces)
    alike = collections.defaultdict(list)
    for layer in itertools.chain(*(pieces or [range(model.layers)])):
        alike[tuple(layers[layer])].append(layer)
    return [Kind(f"layers.{same[0]}.{name}", *rest, len(same)) for parameters, same in alike.items()
            for name, *rest in parameters] + [
                Kind(*parameter, 1) for parameter in dict.fromkeys(begin * first + end * last)]


class Box(NamedTuple):
    """What rank 0 has of a parameter, in elements."""
    name: str
    whole: int              # what tp, ep and etp leave to it: what it computes with
    stored: int             # what FSDP leaves of that
    fsdp: str               # the axis over which FSDP shards it: "fsdp" with sp, or "efsdp" for experts
    partial: str            # the axis whose ranks each have a part of its gradient: "tp", "etp" or ""
    moves: bool             # whether it is trained
    count: int              # layers that have such a one
    block: str              # whose parameters come and go together; "" for the embedding, the last norm and the head


def boxes(config: Config, pieces: Pieces | None = None) -> list[Box]:
    """One for each kind of parameter."""
    return boxes_of(config.model, config.mesh, pieces)


@functools.lru_cache(maxsize=256)
def boxes_of(model: ModelConfig, mesh: MeshConfig, pieces: Pieces | None) -> list[Box]:
    result, ranks = [], axes(mesh)
    for name, shape, moves, count in kinds(model, pieces):
        block = ".".join(name.split(".")[:2]) if name.startswith("layers.") else ""
        rows, columns = ROWS.search(name), COLUMNS.search(name)
        if ".experts." in name:
            fsdp, dim, wide = "efsdp", experts_dim(name.rpartition(".")[2], mesh.etp), has_width(name)
            partial, whole = "" if wide else "etp", first_piece(shape, {0: mesh.ep} | ({2: mesh.etp} if wide else {}))
        else:
            fsdp, dim, partial = "fsdp", dense_dim(name, mesh.tp), "" if rows or columns else "tp"
            whole = first_piece(shape, {0: mesh.tp} if rows else {1: mesh.tp} if columns else {})
        stored = first_piece(whole, {dim: ranks[fsdp]})
        result.append(Box(name, math.prod(whole), math.prod(stored), fsdp, partial, moves, count, block))
    return result


def first_piece(shape, cuts: dict[int, int]) -> list[int]:
    """The shape of the first piece, the largest, if each dimension of `cuts` is cut into so many."""
    return [-(-size // cuts.get(dim, 1)) for dim, size in enumerate(shape)]


class Share(NamedTuple):
    """A rank's share of the parameters, in elements."""
    whole: int              # what tp, ep and etp leave to it: what it computes with
    parameters: int         # what FSDP leaves of that: what it stores
    trained: int            # those of them that move, which have gradients

    @classmethod
    def of(cls, config: Config, stage: int = 0) -> Share:
        return cls.sum(config.model, config.mesh, stages(config)[stage])

    @classmethod
    @functools.lru_cache(maxsize=256)
    def sum(cls, model: ModelConfig, mesh: MeshConfig, pieces: Pieces) -> Share:
        held = boxes_of(model, mesh, pieces)
        return cls(sum(box.count * box.whole for box in held), sum(box.count * box.stored for box in held),
                   sum(box.count * box.stored for box in held if box.moves))


def widths(config: Config) -> tuple[int, int]:
    """Bytes of an element: of parameters, gradients, residual stream and router; of what matrix products read."""
    return {"fp64": (8, 8), "fp32": (4, 4)}.get(config.train.dtype, (4, 2))


@functools.lru_cache(maxsize=256)
def blocks(model: ModelConfig, pieces: Pieces | None = None) -> collections.Counter:
    """(whether it is MoE, its window or 0 for the whole sequence) -> how many blocks are such."""
    def window(layer):
        return model.window_of(layer) if model.window_of(layer) < model.seq_len else 0
    return collections.Counter((layer >= model.layers - model.moe_layers, window(layer))
                               for layer in itertools.chain(*(pieces or [range(model.layers)])))


def rows_per_token(experts: int, top_k: int, ranks: int) -> float:
    """To how many of P ranks a token goes that chooses its experts uniformly: P * (1 - C(E - E/P, K) / C(E, K))."""
    return ranks * (1 - math.comb(experts - experts // ranks, top_k) / math.comb(experts, top_k))


def message(*parts: int) -> int:
    """Bytes of a row of the token exchange with ids or weights beside its values: each part fills 16s (message.h)."""
    return sum(-(-part // 16) * 16 for part in parts)
