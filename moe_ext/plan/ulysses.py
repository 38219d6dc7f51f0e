"""`python -m moe_ext.plan ulysses [--n 60000 --dim 16384 --heads 128 --tp 8 --dp 2 ..]`: attention over a long sequence
shared by ranks, and a stack of MLPs: every shape, FLOP, byte sent and byte held, before anything runs.

Two programs are planned. The first is the one whose log the defaults are those of: forward alone, the scores of all
tokens with all in memory, no softmax. `seed` prints that log again, its memory by CUDA's allocator. The second is ours,
which `moe_ext.check ulysses` runs: `steps` tells what it does, `lines` prints that with the memory that is planned or
was measured.

    P = tp * dp ranks share the N tokens. Each has N/P of them, and all weights of attention; of the MLPs' it has 1/tp,
    and their tokens are those of the tp ranks of its group, whose numbers follow each other.

Bytes are of tensors; GB and MB are decimal. FLOPs are those of matrix products, of all ranks unless it says otherwise.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from moe_ext.config import divisors, nearest, require

WIDTHS = {"bf16": 2, "fp32": 4, "fp64": 8}
NAMES = {"bf16": "torch.bfloat16", "fp32": "torch.float32", "fp64": "torch.float64"}


@dataclass(frozen=True)
class Sizes:
    """What is computed, and on how many ranks. ConfigError for what they cannot share."""
    n: int = 60000              # tokens of the sequence
    dim: int = 16384            # of the model: heads of dim / heads columns
    heads: int = 128
    kv_heads: int = 0           # of keys and values; 0: as many as heads
    hidden: int = 53248         # of an MLP
    layers: int = 126           # MLPs, one after the other
    tp: int = 8                 # ranks that share an MLP's weights
    dp: int = 2                 # groups of tp ranks
    dtype: Literal["bf16", "fp32", "fp64"] = "bf16"
    attention: Literal["ulysses", "gather"] = "ulysses"     # exchange heads for tokens; or gather keys and values
    mlp: Literal["all-reduce", "reduce-scatter"] = "all-reduce"     # of what the ranks of a group add up
    backward: bool = True       # of attention

    @property
    def ranks(self) -> int:
        return self.tp * self.dp

    @property
    def kv(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def head(self) -> int:
        """Columns of a head."""
        return self.dim // self.heads

    @property
    def width(self) -> int:
        """Bytes of a number."""
        return WIDTHS[self.dtype]


class Tensor(NamedTuple):
    name: str
    label: str                  # its dimensions in letters
    shape: tuple[int, ...]
    width: int                  # bytes of an element

    @property
    def bytes(self) -> int: ...


class Collective(NamedTuple):
    kind: str                   # all-to-all, all-gather, reduce-scatter, all-reduce
    ranks: int                  # neighbours
    sent: int                   # bytes that each rank sends to the others


class Step(NamedTuple):
    """A part of the program, and what is alive in it on a rank."""
    phase: str                  # attention, MLP
    title: str
    tensors: tuple[Tensor, ...]     # what it makes
    flops: int                  # of all ranks
    collectives: tuple[Collective, ...]
    held: int                   # bytes alive at its end
    most: int                   # and at most, until then
    alive: tuple[Tensor, ...]   # at that moment


class Measured(NamedTuple):
    """Of a step that was run."""
    held: int
    most: int
    seconds: float


def steps(sizes: Sizes) -> list[Step]:
    """Our program, forward and, of attention, backward."""


def lines(sizes: Sizes, steps: list[Step], measured: list[Measured] | None = None) -> list[str]:
    """The report of the steps."""
