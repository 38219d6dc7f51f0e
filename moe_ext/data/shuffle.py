"""Documents in a random order that is a function of (their texts, seed), however many: memory holds one bucket's index.

A document's SHA-256 decides everything: its first 8 bytes are its place in the order (with a seed other than 0 those of
the SHA-256 of seed and digest), the next 8 its side (held out if below a border). So neither the order nor the split
depends on file names, on the order of reading or on other documents, and equal documents stand together.

    Buckets   deals documents to files by the first bits of their place:
              NNN.text, the documents end to end in UTF-8, and NNN.records, place, side and bytes of each
    Bucket    one of them, sorted; the buckets one after the other are the whole order
    plan      which documents are used, and on which side
"""
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_ext.data.target import sync

RECORD = np.dtype([("place", "<u8"), ("side", "<u8"), ("size", "<u8")])
HELD_OUT, LEARNT = 0, 2**64 - 1             # sides of documents whose side is given
BUCKET = 8 * 10**6                          # bytes of text for which a bucket is worth while
MOST = 256                                  # buckets
BUFFER = 2**26                              # bytes written at a time


class Buckets:
    """Where documents are put. text_bytes: about how much is to come."""

    def __init__(self, folder: Path, text_bytes: int, seed: int = 0):
        folder.mkdir()
        self.folder, self.seed = folder, seed
        self.bits = min(MOST, max(1, text_bytes // BUCKET)).bit_length() - 1
        names = [f"{number:03d}" for number in range(2**self.bits)]
        self.paths = [folder / f"{name}.{part}" for name in names for part in ("records", "text")]
        self.written = [0] * len(self.paths)
        self.held = [bytearray() for _ in self.paths]
        self.filled = 0
        for path in self.paths:
            path.touch()

    def add(self, text: str, side: int | None = None) -> int:
        """Put one document; its bytes. side: HELD_OUT or LEARNT; None: its SHA-256 decides."""
        content = text.encode()
        digest = hashlib.sha256(content).digest()
        order = hashlib.sha256(self.seed.to_bytes(8, "little") + digest).digest() if self.seed else digest
        number = int.from_bytes(order[:8], "big") >> (64 - self.bits)
        self.held[2 * number] += (order[:8][::-1] + (digest[15:7:-1] if side is None else side.to_bytes(8, "little"))
                                  + len(content).to_bytes(8, "little"))
        self.held[2 * number + 1] += content
        self.filled += len(content)
        if self.filled > BUFFER:
            self.flush()
        return len(content)

    def mark(self) -> list[int]:
        """What `rollback` returns to."""
        return [written + len(held) for written, held in zip(self.written, self.held, strict=True)]

    def rollback(self, mark: list[int]) -> None:
        """Forget the documents added since `mark`."""
        self.flush()
        for path, size in zip(self.paths, mark, strict=True):
            os.truncate(path, size)
        self.written = mark

    def flush(self) -> None:
        for i, held in enumerate(self.held):
            if held:
                with open(self.paths[i], "ab") as file:
                    file.write(held)
                self.written[i] += len(held)
                held.clear()
        self.filled = 0

    def finish(self) -> None:
        """All is on the disk."""
        self.flush()
        for path in self.paths:
            with open(path, "ab") as file:
                sync(file)


class Bucket:
    """The documents of one bucket in their order.

    records  RECORD [n]; equal ones are equal documents. A learnt document that is also given as held out is left away:
    repeated and repeated_bytes count those
    """

    def __init__(self, folder: Path, number: int):
        records = np.fromfile(folder / f"{number:03d}.records", RECORD)
        self.text = folder / f"{number:03d}.text"
        begins = np.cumsum(records["size"]) - records["size"]
        rank = np.lexsort((records["side"], records["place"]))
        records, begins = records[rank], begins[rank]
        given = records["place"][records["side"] == HELD_OUT]
        repeated = (records["side"] == LEARNT) & np.isin(records["place"], given)
        self.repeated, self.repeated_bytes = int(repeated.sum()), int(records["size"][repeated].sum())
        self.records, self.begins = records[~repeated], begins[~repeated]

    def texts(self, which: np.ndarray) -> Iterator[str]:
        """The documents of these places in the order, int [m], one after the other."""
        with open(self.text, "rb") as file:
            for i in which:
                yield os.pread(file.fileno(), int(self.records["size"][i]), int(self.begins[i])).decode()


def buckets(folder: Path) -> Iterator[Bucket]:
    """All buckets in order, one in memory at a time."""
    return (Bucket(folder, number) for number in range(len(list(folder.glob("*.text")))))


class Plan(NamedTuple):
    kept: list[int]         # of each bucket the first so many documents are used
    border: int             # a document is held out if its side is below
    train: tuple[int, int]  # documents and bytes of each side
    valid: tuple[int, int]
    cap: tuple[int, int]    # beyond the limit
    repeated: tuple[int, int]   # learnt ones that are held out too

    def side(self, number: int, bucket: Bucket, side: str) -> np.ndarray:
        """Places in the bucket of the side's documents."""
        held_out = bucket.records["side"][:self.kept[number]] < np.uint64(self.border)
        return np.flatnonzero(held_out if side == "valid" else ~held_out)


def plan(folder: Path, limit: float, fraction: float) -> Plan:
    """Use the longest beginning of the order within `limit` bytes, one document at least; hold out a share of about
    `fraction`, but at least the one of the smallest side, and not all."""
    kept, total, cap, repeated = [], 0, np.zeros(2, int), np.zeros(2, int)
    lowest, highest = 2**64, -1
    for bucket in buckets(folder):
        ends = total + np.cumsum(bucket.records["size"], dtype=np.int64)
        within = int(np.searchsorted(ends, limit, side="right")) if not cap[0] else 0
        count = max(within, int(total == 0 and len(ends) > 0))
        kept.append(count)
        cap += (len(ends) - count, int(bucket.records["size"][count:].sum()))
        repeated += (bucket.repeated, bucket.repeated_bytes)
        if count:
            total = int(ends[count - 1])
            sides = bucket.records["side"][:count]
            lowest, highest = min(lowest, int(sides.min())), max(highest, int(sides.max()))
    border = min(max(int(fraction * 2**64), lowest + 1), max(highest, 1))
    train, valid = np.zeros(2, int), np.zeros(2, int)
    for count, bucket in zip(kept, buckets(folder), strict=True):
        sizes, held_out = bucket.records["size"][:count], bucket.records["side"][:count] < np.uint64(border)
        valid += (int(held_out.sum()), int(sizes[held_out].sum()))
        train += (int((~held_out).sum()), int(sizes[~held_out].sum()))
    return Plan(kept, border, *(tuple(map(int, pair)) for pair in (train, valid, cap, repeated)))
