"""What a rank holds of each parameter, by the rules of moe_ext.parallel, without any ranks.

It is rank 0 that is described: where something divides unevenly, it has the largest piece.
"""
from __future__ import annotations

import collections
import functools
import math
from typing import NamedTuple

from moe_ext.config import Config, MeshConfig, ModelConfig
from moe_ext.model import GPT
from moe_ext.parallel.shard import dense_dim, experts_dim
from moe_ext.parallel.tensor import COLUMNS, ROWS


class Kind(NamedTuple):
    """Parameters of equal name and shape in layers that are alike."""
    name: str               # in the first of them
    shape: tuple[int, ...]
    count: int              # how many layers have it


@functools.lru_cache(maxsize=8)
def kinds(model: ModelConfig) -> list[Kind]:
    """The parameters of a model, layers that are alike counted together; a tied one counts once."""
    layers, rest = collections.defaultdict(list), []
    for name, p in GPT(model, device="meta").named_parameters():
        if name.startswith("layers."):
            layers[name.split(".")[1]].append((name.split(".", 2)[2], tuple(p.shape)))
        else:
            rest.append(Kind(name, tuple(p.shape), 1))
    alike = collections.defaultdict(list)
    for layer, parts in layers.items():
        alike[tuple(parts)].append(layer)
    return [Kind(f"layers.{same[0]}.{name}", shape, len(same)) for parts, same in alike.items()
            for name, shape in parts] + rest


class Box(NamedTuple):
    """What rank 0 has of a parameter, in elements."""
    name: str
    whole: int              # what tp, ep and etp leave to it: what it computes with
    stored: int             # what FSDP leaves of that
    fsdp: str               # the axis over which FSDP shards it: "fsdp", or "efsdp" for experts
    partial: str            # the axis whose ranks each have a part of its gradient: "tp", "etp" or ""
    count: int              # layers that have such a one

    @property
    def block(self) -> str:
        """The block whose parameters come and go together; "" for the embedding, the last norm and the head."""
        return ".".join(self.name.split(".")[:2]) if self.name.startswith("layers.") else ""


def boxes(config: Config) -> list[Box]:
    """One for each kind of parameter."""
    return _boxes(config.model, config.mesh)


@functools.lru_cache(maxsize=64)
def _boxes(model: ModelConfig, mesh: MeshConfig) -> list[Box]:
    result = []
    for name, shape, count in kinds(model):
        rows, columns, bias = ROWS.search(name), COLUMNS.search(name), "bias" in name
        if ".experts." in name:
            fsdp, dim, partial = "efsdp", experts_dim(name.rpartition(".")[2], mesh.etp), "etp" if bias else ""
            whole = first_piece(shape, {0: mesh.ep} if bias else {0: mesh.ep, 2: mesh.etp})
        else:
            fsdp, dim, partial = "fsdp", dense_dim(name, mesh.tp), "" if rows or columns else "tp"
            whole = first_piece(shape, {0: mesh.tp} if rows else {1: mesh.tp} if columns else {})
        stored = first_piece(whole, {dim: getattr(mesh, fsdp)})
        result.append(Box(name, math.prod(whole), math.prod(stored), fsdp, partial, count))
    return result


def first_piece(shape, cuts: dict[int, int]) -> list[int]:
    """The shape of the first piece, the largest, if each dimension of `cuts` is cut into so many."""
    return [-(-size // cuts.get(dim, 1)) for dim, size in enumerate(shape)]


class Share(NamedTuple):
    """A rank's share of the parameters, in elements."""
    whole: int              # what tp, ep and etp leave to it: what it computes with
    parameters: int         # what FSDP leaves of that: what it stores

    @classmethod
    def of(cls, config: Config) -> Share:
        held = boxes(config)
        return cls(sum(box.count * box.whole for box in held), sum(box.count * box.stored for box in held))


def widths(config: Config) -> tuple[int, int]:
    """Bytes of an element: of parameters, gradients, residual stream and router; of what matrix products read."""
    return {"fp64": (8, 8), "fp32": (4, 4)}.get(config.train.dtype, (4, 2))


def moe_layers(model: ModelConfig) -> int:
    return model.layers - model.moe.dense_layers if model.moe.experts else 0


def rows_per_token(experts: int, top_k: int, ranks: int) -> float:
    """To how many of P ranks a token goes that chooses its experts uniformly: P * (1 - C(E - E/P, K) / C(E, K))."""
    return ranks * (1 - math.comb(experts - experts // ranks, top_k) / math.comb(experts, top_k))


def message(*parts: int) -> int:
    """Bytes of a row of the token exchange with ids or weights beside its values: each part fills 16s (message.h)."""
    return sum(-(-part // 16) * 16 for part in parts)
