"""safetensors files, read tensor by tensor (and written so by moe_ext.snapshot, which has the format).

    found = tensors(paths)              # {name: Stored}: dtype and shape; nothing is read yet
    x = found[name].read()              # all of a tensor, in memory of its own

Plain reads do here what the library cannot: what it has read stays mapped. A checkpoint of a mesh has boxes of a tensor
in several files (moe_ext.checkpoint), joined here.
"""
from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from moe_ext.snapshot import BOXES, DTYPES, CheckpointError, memory

INDEX = "model.safetensors.index.json"


class Box(NamedTuple):
    """A part of a tensor, or all of it: where it lies in a file, and from which index on in the tensor."""
    path: Path
    at: int
    first: tuple[int, ...]
    shape: tuple[int, ...]

    def read(self, x: torch.Tensor) -> None:
        """Fill x, of the box's shape and dtype."""
        with open(self.path, "rb") as file:
            file.seek(self.at)
            if file.readinto(memory(x)) != x.nbytes:
                raise CheckpointError(f"{self.path} has been cut short while it was read: start again")


class Stored(NamedTuple):
    """A tensor in files."""
    dtype: str                  # as safetensors says it
    shape: tuple[int, ...]
    boxes: list[Box]

    def read(self) -> torch.Tensor:
        x = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        for box in self.boxes:
            if box.shape == self.shape:
                box.read(x)
            else:
                piece = torch.empty(box.shape, dtype=x.dtype)
                box.read(piece)
                x[tuple(slice(i, i + n) for i, n in zip(box.first, box.shape, strict=True))] = piece
        return x


class MXFP4(NamedTuple):
    """A tensor of gpt-oss as it is published: blocks [E, out, in/32, 16], each byte two numbers of 4 bits, the lower
    ones first, and for each 32 of them a power of two, scales [E, out, in/32]; both uint8. Read as bf16 [E,in,out]."""
    blocks: Stored
    scales: Stored
    dtype = "BF16"

    @property
    def shape(self) -> tuple[int, ...]:
        *E, rows, groups, bytes_ = self.blocks.shape
        return (*E, groups * bytes_ * 2, rows)

    def read(self) -> torch.Tensor:
        blocks, scales, x = self.blocks.read(), self.scales.read(), torch.empty(self.shape, dtype=torch.bfloat16)
        positive = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        values = torch.cat([positive, -positive])
        for e, (block, scale) in enumerate(zip(blocks, scales, strict=True)):       # of one expert
            pairs = torch.stack([block & 15, block >> 4], dim=-1).flatten(-2)       # [out, in/32, 32]
            numbers = torch.ldexp(values[pairs.int()], scale[..., None].int() - 127)
            x[e] = numbers.flatten(1).T
        return x


def unpacked(found: dict[str, Stored]) -> dict[str, Stored | MXFP4]:
    """NAME_blocks and NAME_scales -> NAME."""
    packed, rest = {}, dict(found)
    for name in [name.removesuffix("_blocks") for name in found if name.endswith("_blocks")]:
        if f"{name}_scales" not in found:       # it is not known then, and refused as that
            continue
        packed[name] = MXFP4(rest.pop(f"{name}_blocks"), rest.pop(f"{name}_scales"))
        blocks, scales = packed[name]
        if (blocks.dtype, scales.dtype) != ("U8", "U8") or len(blocks.shape) != 4 or blocks.shape[:3] != scales.shape:
            raise CheckpointError(f"{blocks.boxes[0].path}: {name}: blocks {blocks.dtype} {list(blocks.shape)} and "
                                  f"scales {scales.dtype} {list(scales.shape)} are not MXFP4 as gpt-oss has it")
    return packed | rest


def header(path: Path) -> tuple[dict, dict, int]:
    """-> {name: {dtype, shape, data_offsets}}, metadata, where the data begin. CheckpointError for a damaged file."""
    what_now = "copy or download it again"
    with open(path, "rb") as file:
        size, first = os.fstat(file.fileno()).st_size, file.read(8)
        length = int.from_bytes(first, "little")
        if first == b"version ":
            raise CheckpointError(f"{path} is a pointer of Git LFS, not the file: git lfs pull")
        if len(first) < 8 or 8 + length > size:
            raise CheckpointError(f"{path}: {size} bytes, no safetensors file or one cut off in its header: {what_now}")
        try:
            table = json.loads(file.read(length))
            metadata = table.pop("__metadata__", {})
            end = max((entry["data_offsets"][1] for entry in table.values()), default=0)
            whole = all(entry["dtype"] not in DTYPES or entry["data_offsets"][1] - entry["data_offsets"][0]
                        == math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize for entry in table.values())
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: its header is damaged ({type(error).__name__}: {error}): {what_now}"
                                  ) from None
    if 8 + length + end != size or not whole:
        raise CheckpointError(f"{path}: got {size} bytes, where its header tells of {8 + length + end}: truncated or "
                              f"damaged: {what_now}")
    return table, metadata, 8 + length


def tensors(paths: Iterable[Path], section: str = "") -> dict[str, Stored]:
    """The tensors of some files, of names that begin with `section`. CheckpointError for one whose boxes are not all of
    it, each once."""
    boxes: dict[str, list[Box]] = {}
    dtypes: dict[str, str] = {}
    for path in paths:
        table, metadata, begin = header(path)
        firsts = json.loads(metadata.get(BOXES, "{}"))
        for name, entry in table.items():
            if not name.startswith(section):
                continue
            shape = tuple(entry["shape"])
            first = tuple(firsts[name]["saved_offsets"]) if firsts else (0,) * len(shape)
            boxes.setdefault(name, []).append(Box(path, begin + entry["data_offsets"][0], first, shape))
            dtypes[name] = entry["dtype"]
    found = {}
    for name, its in boxes.items():
        shape = tuple(max(ends) for ends in zip(*(map(sum, zip(box.first, box.shape, strict=True)) for box in its),
                                                strict=True))
        values = sum(math.prod(box.shape) for box in its)
        if values != math.prod(shape):
            files = ", ".join(sorted({box.path.name for box in its}))
            raise CheckpointError(f"{its[0].path.parent}: {name} {list(shape)}: {values} values in {files}, wanted "
                                  f"{math.prod(shape)}: a file too many or too few")
        found[name] = Stored(dtypes[name], shape, its)
    return found


def weights(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder of transformers: of model.safetensors, or of the shards that the index names.
    CheckpointError for what is missing."""
    whole, index = folder / "model.safetensors", folder / INDEX
    if whole.is_file():
        return tensors([whole])
    if not index.is_file():
        shards, others = sorted(folder.glob("model-*.safetensors")), sorted(folder.glob("*.bin"))
        if shards:
            raise CheckpointError(f"{folder} has {shards[0].name}, but no {INDEX}, which says what belongs together: "
                                  "copy that too")
        raise CheckpointError(f"{folder} has neither model.safetensors nor {INDEX}" + (
            f", but {others[0].name}: load it with transformers and save_pretrained it" if others else
            ": give a folder of save_pretrained or of a download from the hub"))
    try:
        where = json.loads(index.read_text())["weight_map"]
        names = sorted(set(where.values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: {type(error).__name__}: {error}; damaged, or no index: copy it again"
                              ) from None
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(f"{index} names {listed(missing)}, not there: copy all shards")
    found = tensors(folder / name for name in names)
    if lacking := [f"{name} in {file}" for name, file in where.items()
                   if name not in found or found[name].boxes[0].path.name != file]:
        raise CheckpointError(f"{index} names {listed(lacking)}, not there: index and shards are of two checkpoints: "
                              "copy both again")
    return found


def listed(names: list[str]) -> str:
    return ", ".join([*names[:4], f".. ({len(names)} in all)"] if len(names) > 4 else names)
