"""safetensors files written piece by piece, from tensors or from a copy of them in the host's memory.

    write(path, entries, values, metadata)      # entries: [(name, dtype, shape)]; values: their tensors, one by one
    file = File(path, pieces)                   # what a rank writes of a checkpoint
    file.write()                                # from the tensors as they are now
    image.take(file)                            # or: copy them, and write while they change; the bytes are the same
    file.write(image.data())

A file is 8 bytes, the length of its header (little-endian); the header, {name: {dtype, shape, data_offsets}} as JSON;
and the data. The library writes what is all in memory, once more serialized, and holds the GIL meanwhile.
"""
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BOXES = "DCP_SHARDING_INFO"     # in the metadata of a mesh's files: {name: {"saved_offsets": first index of the box}}


class CheckpointError(ValueError):
    """A checkpoint that does not fit or is damaged; the message names the tensor, field or file and what to do."""


class Piece(NamedTuple):
    """What a rank writes of a tensor: all of it, or a box."""
    name: str
    first: tuple[int, ...]      # index of its first value in the tensor
    values: torch.Tensor        # the memory itself, of any strides; none, on the meta device, if the file has a source


class File(NamedTuple):
    """A file of a checkpoint. source: gives the values of a piece that has no memory, by its name."""
    path: Path
    pieces: list[Piece]
    source: Callable[[str], torch.Tensor] | None = None

    @classmethod
    def of(cls, path: Path, pieces: Iterable[Piece], source=None) -> "File":
        """With the pieces in order, those of wide dtypes first. CheckpointError for a dtype that no file holds."""
        for name, _, values in (pieces := sorted(pieces, key=lambda piece: (-piece.values.itemsize, piece.name))):
            if values.dtype not in NAMES:
                raise CheckpointError(f"{name}: got {values.dtype}, wanted one of {', '.join(map(str, NAMES))}: a "
                                      "checkpoint holds no other")
        return cls(path, pieces, source)

    @property
    def size(self) -> int:
        """Bytes of the data."""
        return sum(piece.values.nbytes for piece in self.pieces)

    def write(self, data: Iterable[torch.Tensor] | None = None) -> None:
        """Write and sync it; data: what follows the header, in any tensors; None: the pieces' values."""
        entries = [(name, NAMES[values.dtype], tuple(values.shape)) for name, _, values in self.pieces]
        first = {name: {"saved_offsets": list(first)} for name, first, _ in self.pieces}
        metadata = {BOXES: json.dumps(first), "DCP_VERSION": "1.0", "format": "pt"}
        if data is None:
            write(self.path, entries, (self.source(name) if values.is_meta else values.cpu()
                                       for name, _, values in self.pieces), metadata)
        else:
            write_data(self.path, entries, data, metadata)


class Image:
    """A copy of a file's data in the host's memory, pinned for tensors on CUDA, in blocks that the next copy reuses."""
    BLOCK = 2**26       # bytes; a power of 2, to which torch rounds pinned memory up

    def __init__(self, device: torch.device):
        self.pinned, self.blocks, self.size = device.type == "cuda", [], 0

    def reserve(self, size: int) -> None:
        """Room for `size` bytes. CheckpointError if the host has none."""
        while (had := len(self.blocks) * self.BLOCK) < size:
            try:
                block = torch.empty(self.BLOCK, dtype=torch.uint8, pin_memory=self.pinned)
                self.blocks.append(block.zero_())       # pages that nothing has written the host does not have yet
            except RuntimeError as error:
                raise CheckpointError(
                    "no room in the host's memory for a copy of what this rank writes of a checkpoint: it takes "
                    f"{size / 2**20:,.0f} MiB, and {had / 2**20:,.0f} MiB could be had: spread the parameters over "
                    "more hosts (mesh.fsdp), set optim.state \"bf16\", or save at the end alone, without a copy "
                    f"(--train.save-every 0): {str(error).splitlines()[0]}") from None

    def take(self, file: File) -> None:
        """Copy the values of the pieces; they may change as soon as this returns. Errors: as of reserve."""
        self.reserve(file.size)
        self.size = 0
        for piece in file.pieces:
            values = flat(piece.values)
            while len(values):
                block, at = divmod(self.size, self.BLOCK)
                part, values = values[:self.BLOCK - at], values[self.BLOCK - at:]
                self.blocks[block][at:at + len(part)].copy_(part, non_blocking=True)
                self.size += len(part)
        if self.pinned:
            torch.cuda.synchronize()

    def data(self) -> Iterator[torch.Tensor]:
        """The copy, for File.write."""
        for i, block in enumerate(self.blocks):
            yield block[:max(0, self.size - i * self.BLOCK)]


def flat(x: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in row-major order; a copy only if they do not lie so."""
    return x.detach().contiguous().reshape(-1).view(torch.uint8)


def memory(x: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    return memoryview(x.reshape(-1).view(torch.uint8).numpy())


def write(path: Path, entries: list[tuple[str, str, tuple[int, ...]]], values: Iterable[torch.Tensor],
          metadata: dict[str, str]) -> None:
    """A file with all of `entries`, synced to disk. Where dtypes differ in size, give the wide ones first: then each
    tensor begins at a multiple of its own."""
    def checked():
        its = iter(values)
        for _, dtype, shape in entries:
            value = next(its)
            assert (NAMES[value.dtype], tuple(value.shape)) == (dtype, shape)
            yield value.detach().contiguous()
            del value       # before the next one is made

    write_data(path, entries, checked(), metadata)


def write_data(path: Path, entries: list[tuple[str, str, tuple[int, ...]]], data: Iterable[torch.Tensor],
               metadata: dict[str, str]) -> None:
    """As write; data: what follows the header, cut into contiguous tensors in any way."""
    table, at = {"__metadata__": metadata}, 0
    for name, dtype, shape in entries:
        size = math.prod(shape) * DTYPES[dtype].itemsize
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at := at + size]}
    head = json.dumps(table, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for part in data:
            file.write(memory(part))        # without the GIL
            del part
        file.flush()
        os.fsync(file.fileno())
