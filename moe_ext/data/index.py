"""The order of one data set's samples, as index arrays: made by the C core, kept in a cache, mapped into memory.

In epoch e the documents are shuffled and laid end to end; sample i covers tokens [i*S, i*S + S + 1) of that line, so
documents are packed without padding and each token is predicted once; then the samples are shuffled. The last tokens
of an epoch, fewer than S, wait for another epoch, whose line ends elsewhere. Row r of a set's endless run is sample
order[r mod n] of epoch r div n.

Cache: FOLDER/NAME-HASH.order, one file per epoch; FOLDER is data.cache, or `index` beside the tokens. The hash is that
of all that decides the order: the tokens (IndexedDataset.digest), seq_len, seed, epoch. Epochs so small that they are
made as fast as read have none. Little endian:
    HEADER        magic and version of the rule, hash of the inputs, documents, samples, CRC-32 of all that follows
    order, docs, doc, offset of Epoch, each from a multiple of 8 bytes on
A file is written beside its place and renamed when it is whole; the builders of one host take turns, so that one builds
and the others map what it wrote. A file that is damaged or another's is said and replaced. A folder that cannot be
written, or a full disk, is said, and the arrays stay in memory. Any of it may be deleted at any time.
"""
import fcntl
import hashlib
import os
import struct
import tempfile
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_ext import _C
from moe_ext.data.indexed import IndexedDataset

MAGIC = b"MOEORDR\1"
HEADER = struct.Struct("<8s32sqqI4x")
CACHE_FROM = 2**20      # documents + samples of an epoch that is worth a file: below, it is made in 20 ms


class Epoch(NamedTuple):
    """Numbers are int32 where they fit, else int64."""
    order: np.ndarray       # [n] the samples in their shuffled order
    docs: np.ndarray        # [D] the documents in their shuffled order
    doc: np.ndarray         # [n] place in `docs` where sample i begins
    offset: np.ndarray      # int32 [n] token of that document where it begins


def layout(documents: int, samples: int) -> list[tuple[np.dtype, int]]:
    """dtype and length of each array of an Epoch."""
    def numbers(n):
        return np.dtype(np.int32 if n < 2**31 else np.int64)

    return [(numbers(samples), samples), (numbers(documents), documents), (numbers(documents), samples),
            (np.dtype(np.int32), samples)]


class Samples:
    """The endless run of one data set's samples.

    count: samples of an epoch. Errors: ValueError if the dataset is shorter than seq_len + 1 tokens.
    """

    def __init__(self, dataset: IndexedDataset, *, seq_len: int, seed: int, shuffle: bool, cache: str):
        if len(dataset.tokens) < seq_len + 1:
            raise ValueError(f"{dataset.path}: got {len(dataset.tokens)} tokens, wanted at least seq_len + 1 = "
                             f"{seq_len + 1}: give more text or a shorter seq_len")
        self.dataset, self.seq_len, self.seed, self.shuffle, self.cache = dataset, seq_len, seed, shuffle, cache
        self.count = (len(dataset.tokens) - 1) // seq_len
        self.epochs = {}        # the last two that were read from

    def read(self, rows: np.ndarray, tokens: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Rows (int64 [R], rising) of the run -> their tokens [R, S+1] in the file's dtype, and the number of each
        token's document within its row, from 0, int32 [R, S+1]. tokens=False: only the latter."""
        shape = len(rows), self.seq_len + 1
        read, documents = np.empty(shape if tokens else 0, self.dataset.tokens.dtype), np.empty(shape, np.int32)
        numbers = rows // self.count
        for number in np.unique(numbers).tolist():
            epoch, (begin, end) = self.epoch(number), np.searchsorted(numbers, [number, number + 1]).tolist()
            chosen = epoch.order[rows[begin:end] - number * self.count]
            doc, offset = epoch.doc[chosen].astype(np.int64), epoch.offset[chosen].astype(np.int64)
            _C.samples(epoch.docs.itemsize, read.itemsize, self.dataset.tokens.ctypes.data, len(self.dataset.starts),
                       self.dataset.starts.ctypes.data, len(epoch.docs), epoch.docs.ctypes.data, end - begin,
                       doc.ctypes.data, offset.ctypes.data, shape[1], read[begin:].ctypes.data if tokens else 0,
                       documents[begin:].ctypes.data)
        return read, documents

    def epoch(self, number: int) -> Epoch:
        found = self.epochs.pop(number, None) or self.load(number)
        self.epochs = dict(list(self.epochs.items())[-1:]) | {number: found}
        return found

    def load(self, number: int) -> Epoch:
        """The arrays of an epoch: mapped from their cache, where there is one or can be."""
        if len(self.dataset) + self.count < CACHE_FROM:
            return self.build(number)
        inputs = hashlib.sha256(repr((self.dataset.digest, self.seq_len, self.seed, self.shuffle, number)).encode())
        folder = Path(self.cache) if self.cache else self.dataset.path.parent / "index"
        path = folder / f"{self.dataset.path.stem}-{inputs.hexdigest()[:32]}.order"
        with turn(folder):
            try:
                return self.map(path, inputs.digest())
            except (FileNotFoundError, NotADirectoryError):
                pass
            except (OSError, ValueError) as error:
                warnings.warn(f"{error}; it is built anew", stacklevel=2)
            epoch = self.build(number)
            try:
                write(path, inputs.digest(), epoch)
                return self.map(path, inputs.digest())
            except OSError as error:
                warnings.warn(f"the order of the samples is not kept in {path}: {error.strerror}; it stays in memory, "
                              "and is built again at each start: free some room or choose another --data.cache",
                              stacklevel=2)
                return epoch

    def build(self, number: int) -> Epoch:
        """The samples' order on one thread, all about the documents on another."""
        dataset, sizes = self.dataset, self.dataset.sizes
        epoch = Epoch(*(np.empty(n, dtype) for dtype, n in layout(len(dataset), self.count)))

        def fill(array, stream):
            if self.shuffle:
                _C.shuffle(array.itemsize, self.seed, stream, len(array), array.ctypes.data)
            else:
                array[:] = np.arange(len(array), dtype=array.dtype)

        with ThreadPoolExecutor(1) as other:
            ordered = other.submit(fill, epoch.order, 2 * number + 1)
            fill(epoch.docs, 2 * number)
            _C.sample_index(epoch.docs.itemsize, len(dataset), epoch.docs.ctypes.data, len(dataset), sizes.ctypes.data,
                            self.seq_len, self.count, epoch.doc.ctypes.data, epoch.offset.ctypes.data)
        ordered.result()
        return epoch

    def map(self, path: Path, inputs: bytes) -> Epoch:
        """The arrays of a cache file. ValueError if it is damaged or of other inputs."""
        arrays, end = [], HEADER.size
        for dtype, n in layout(len(self.dataset), self.count):
            arrays.append((end, dtype, n))
            end += -(-n * dtype.itemsize // 8) * 8

        def check(ok: bool, what: str) -> None:
            if not ok:
                raise ValueError(f"{path} is no index of {self.dataset.path} as it is asked for: {what}")

        size = path.stat().st_size
        check(size == end, f"got {size} bytes, wanted {end}")
        data = np.memmap(path, np.uint8, mode="r")
        magic, of, documents, samples, crc = HEADER.unpack(data[:HEADER.size].tobytes())
        check((magic, of) == (MAGIC, inputs), "made of other inputs, or by another version")
        check((documents, samples) == (len(self.dataset), self.count), f"{documents} documents, {samples} samples")
        check(crc == zlib.crc32(data[HEADER.size:]), "its checksum is wrong, so it is damaged")
        return Epoch(*(data[at:at + n * dtype.itemsize].view(dtype) for at, dtype, n in arrays))


def write(path: Path, inputs: bytes, epoch: Epoch) -> None:
    """A cache file, whole or not at all. OSError if it cannot be written."""
    for stale in path.parent.glob(path.name + ".tmp-*"):        # of a builder that was killed
        stale.unlink(missing_ok=True)
    pieces = [piece for array in epoch for piece in (array, bytes(-array.nbytes % 8))]
    crc = 0
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
    handle, name = tempfile.mkstemp(prefix=path.name + ".tmp-", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            os.fchmod(handle, 0o644)
            file.write(HEADER.pack(MAGIC, inputs, len(epoch.docs), len(epoch.order), crc))
            for piece in pieces:
                file.write(piece)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


@contextmanager
def turn(folder: Path):
    """Inside, no other process of this host builds in `folder`, which is made. Where that cannot be had two may build
    the same, and the file of the later one stays."""
    with ExitStack() as stack:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
            stack.callback(fcntl.flock, handle, fcntl.LOCK_UN)
        yield
