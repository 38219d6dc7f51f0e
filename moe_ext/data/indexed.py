"""Token files: Megatron's PREFIX.bin + PREFIX.idx, read through a memory map; nanoGPT's flat uint16 .bin too.

PREFIX.bin   the tokens of all sequences, end to end, uint16 or int32
PREFIX.idx   little endian, no padding:
    9 bytes       MMIDIDX\\0\\0
    uint64        version, 1
    uint8         dtype code: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 6 float64, 7 float32, 8 uint16
    uint64        S sequences
    uint64        D + 1 entries of the document index
    int32 [S]     tokens of each sequence
    int64 [S]     byte where each sequence begins in the .bin
    int64 [D+1]   first sequence of each document; the last entry is S
    int8  [S]     optional modes (multimodal data), accepted and not read

A wrong or truncated file is a ValueError that names the file, what it holds, what was wanted and what to do.
"""
import copy
import hashlib
import mmap
import os
import shutil
import struct
from array import array
from functools import cached_property
from pathlib import Path

import numpy as np

from moe_ext.data.target import claim, sync

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}    # token dtypes only
SAMPLED, BLOCK = 128, 2**15     # IndexedDataset.digest reads so many blocks of so many tokens
CHUNK = 2**20           # entries of an index handled at a time
FLAT_DOCUMENT = 2**20   # a flat file knows no documents: it is cut into pieces of this many tokens


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 below 65,500 ids (Megatron's rule), else int32. ValueError if that does not hold them."""
    if not 0 < vocab_size <= 2**31:
        raise ValueError(f"vocab_size: got {vocab_size}, wanted 1 to 2^31 ids: token files hold at most int32")
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedDataset:
    """Documents of tokens on disk.

    path: PREFIX of PREFIX.bin and PREFIX.idx, or a .bin file; a .bin without .idx beside it is flat uint16.
    tokens  memory map [tokens]: all documents end to end
    starts  int64 [D+1]: document d is tokens[starts[d]:starts[d+1]]
    sizes   int32 [D]: tokens of each document
    flat    whether there is no .idx, so that documents are mere pieces
    """

    def __init__(self, path: str | os.PathLike):
        bin_path, idx_path = token_paths(path)
        if not bin_path.is_file():
            raise FileNotFoundError(f"no token file {bin_path}; make one with "
                                    f"`python -m moe_ext.data prepare --out {bin_path.parent}`")
        if idx_path.is_file():
            dtype, self.starts = read_index(idx_path)
            wanted = int(self.starts[-1]) * dtype.itemsize
        elif Path(path).suffix == ".bin":
            dtype = np.dtype(np.uint16)
            tokens = bin_path.stat().st_size // 2
            self.starts = np.append(np.arange(0, tokens, FLAT_DOCUMENT, dtype=np.int64), tokens)
            wanted = 2 * tokens
        else:
            raise FileNotFoundError(f"{bin_path} has no index {idx_path}; prepare the data again, or name {bin_path} "
                                    "itself if it is a flat file of uint16 tokens")
        if bin_path.stat().st_size != wanted:
            raise ValueError(f"{bin_path}: got {bin_path.stat().st_size} bytes, wanted {wanted} "
                             f"({self.starts[-1]} tokens of {dtype}); truncated or of another index: prepare it again")
        if wanted == 0:
            raise ValueError(f"{bin_path}: got no tokens, wanted at least one; prepare it again")
        self.path, self.flat = bin_path, not idx_path.is_file()
        self.tokens = np.memmap(bin_path, dtype=dtype, mode="r")
        self.sizes = np.diff(self.starts).astype(np.int32)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, document: int) -> np.ndarray:
        """The tokens of one document: a view [sizes[document]] of the file's dtype."""
        document = range(len(self))[document]
        return self.tokens[self.starts[document]:self.starts[document + 1]]

    @property
    def parts(self) -> list[tuple[float, "IndexedDataset"]]:
        """Weights and data sets, as those of a Blend: itself."""
        return [(1.0, self)]

    @cached_property
    def digest(self) -> str:
        """Which tokens these are: SHA-256 of their dtype, the documents' borders, and blocks spread evenly over the
        tokens, first and last among them: all of up to SAMPLED * BLOCK = 4 Mi tokens, a sample of more."""
        digest = hashlib.sha256(f"{self.tokens.dtype.str} {len(self.tokens)}\n".encode())
        digest.update(self.starts.astype("<i8", copy=False))
        for at in np.unique(np.linspace(0, max(0, len(self.tokens) - BLOCK), SAMPLED, dtype=np.int64)):
            digest.update(self.tokens[at:at + BLOCK])
        return digest.hexdigest()

    def between(self, begin: int, end: int) -> "IndexedDataset":
        """Tokens [begin, end) as a data set of their own. A document across a border is cut there."""
        part = copy.copy(self)
        part.__dict__.pop("digest", None)
        inside = self.starts[(self.starts > begin) & (self.starts < end)]
        part.starts = np.concatenate([[begin], inside, [end]]) - begin
        part.sizes = np.diff(part.starts).astype(np.int32)
        part.tokens = self.tokens[begin:end]
        return part


def token_paths(path: str | os.PathLike) -> tuple[Path, Path]:
    """PREFIX, PREFIX.bin or PREFIX.idx -> (PREFIX.bin, PREFIX.idx)."""
    text = os.fspath(path)
    prefix = text[:-4] if text.endswith((".bin", ".idx")) else text
    return Path(prefix + ".bin"), Path(prefix + ".idx")


def read_index(path: Path) -> tuple[np.dtype, np.ndarray]:
    """An .idx file -> (token dtype, first token of each document int64 [D+1], whose last entry is all tokens)."""
    with open(path, "rb") as file:      # mapped: an index of 10^8 documents takes 2 GB
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""

    def check(ok: bool, what: str, got, wanted) -> None:
        if not ok:
            raise ValueError(f"{path}: {what}: got {got}, wanted {wanted}; not a Megatron index or a damaged one: "
                             "prepare the data again")

    check(len(data) >= HEADER.size, "header", f"{len(data)} bytes", f"at least {HEADER.size}")
    magic, version, code, sequences, documents = HEADER.unpack_from(data)
    check(magic == MAGIC, "first bytes", magic, MAGIC)
    check(version == 1, "version", version, 1)
    check(code in DTYPES, "dtype code", code, f"an integer dtype, one of {sorted(DTYPES)}")
    check(documents >= 1, "entries of the document index", documents, "at least 1")
    wanted = HEADER.size + 12 * sequences + 8 * documents
    check(len(data) in (wanted, wanted + sequences), "length", f"{len(data)} bytes",
          f"{wanted} for {sequences} sequences and {documents - 1} documents")

    # np.array copies: the file's arrays begin at byte 34 and are not aligned.
    at = HEADER.size
    sizes = np.array(np.frombuffer(data, "<i4", sequences, at))
    pointers = np.array(np.frombuffer(data, "<i8", sequences, at + 4 * sequences))
    documents = np.array(np.frombuffer(data, "<i8", documents, at + 12 * sequences))
    check(sequences == 0 or sizes.min() >= 0, "shortest sequence", sizes.min(initial=0), "0 or more tokens")
    dtype = np.dtype(DTYPES[code])
    ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    check(np.array_equal(pointers, ends[:-1] * dtype.itemsize), "byte pointers", "gaps or overlaps",
          "the running sum of the lengths")
    rising = documents[0] == 0 and documents[-1] == sequences and (documents[1:] >= documents[:-1]).all()
    check(rising, "document index", f"{documents[0]} to {documents[-1]}", f"a rising list from 0 to {sequences}")
    starts = ends[documents]
    check(np.diff(starts).max(initial=0) < 2**31, "longest document", f"{np.diff(starts).max(initial=0)} tokens",
          "less than 2^31")
    return dtype, starts


class IndexedWriter:
    """Writes PREFIX.bin document by document and PREFIX.idx at close; one sequence per document.

        with IndexedWriter("out/train", vocab_size=4096) as writer:
            writer.add([1, 2, 3])

    Until the `with` ends well there is only PREFIX.bin.partial, which an exception removes, so half a file never looks
    whole; what stood there before stays. Memory: 4 bytes per sequence, 8 per document. dtype: instead of the one that
    vocab_size needs. Errors: ValueError if another process is writing PREFIX.
    """

    def __init__(self, prefix: str | os.PathLike, vocab_size: int = 2**31, dtype: np.dtype | None = None):
        self.bin_path, self.idx_path = token_paths(prefix)
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size) if dtype is None else np.dtype(dtype)
        self.sizes, self.documents = array("i"), array("q", [0])
        self.partial = self.bin_path.with_name(self.bin_path.name + ".partial")
        self.file = claim(self.partial)

    def add(self, tokens) -> None:
        """One document. tokens: integers [n] in [0, vocab_size); ValueError for others, and nothing is written."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or (tokens.dtype.kind not in "iu" and tokens.size):
            raise ValueError(f"{self.bin_path}: got tokens of shape {list(tokens.shape)} and dtype {tokens.dtype}, "
                             "wanted a list of integers")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise ValueError(f"{self.bin_path}: got token ids from {tokens.min()} to {tokens.max()}, wanted ids from 0 "
                             f"to {self.vocab_size - 1}: vocab_size must be that of the tokenizer")
        self.file.write(tokens.astype(self.dtype).tobytes())
        self.sizes.append(len(tokens))
        self.documents.append(len(self.sizes))

    def extend(self, prefix: str | os.PathLike) -> None:
        """Append all documents of another token file as they are, of however many sequences. ValueError if its dtype is
        another or it has modes."""
        dataset = IndexedDataset(prefix)
        if dataset.tokens.dtype != self.dtype:
            raise ValueError(f"{dataset.path}: got tokens of {dataset.tokens.dtype}, wanted {self.dtype} as in "
                             f"{self.bin_path}: token files of different dtypes cannot be merged; prepare one again")
        sizes, documents = dataset.sizes, np.arange(len(dataset) + 1)
        if (idx_path := token_paths(prefix)[1]).is_file():
            *_, sequences, entries = HEADER.unpack(idx_path.open("rb").read(HEADER.size))
            at = HEADER.size + 12 * sequences
            if idx_path.stat().st_size > at + 8 * entries:
                raise ValueError(f"{idx_path}: got modes of multimodal data, which a merge would lose; wanted text")
            sizes = np.memmap(idx_path, "<i4", "r", HEADER.size, (sequences,))
            documents = np.memmap(idx_path, "<i8", "r", at, (entries,))
        before = len(self.sizes)
        for begin in range(0, len(sizes), CHUNK):
            self.sizes.frombytes(sizes[begin:begin + CHUNK].tobytes())
        for begin in range(1, len(documents), CHUNK):
            self.documents.frombytes((documents[begin:begin + CHUNK] + before).tobytes())
        with open(dataset.path, "rb") as source:
            shutil.copyfileobj(source, self.file, 2**24)

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace) -> None:
        index = self.idx_path.with_name(self.idx_path.name + ".partial")
        try:
            if kind is None:
                self.write_index(index)
                sync(self.file)
                self.bin_path.unlink(missing_ok=True)   # a kill from here on leaves an .idx without its .bin, which is
                index.replace(self.idx_path)            # refused; a .bin alone could be taken for a flat file
                self.partial.rename(self.bin_path)
        finally:
            index.unlink(missing_ok=True)
            if kind is not None or not self.bin_path.exists():
                self.partial.unlink(missing_ok=True)
            self.file.close()

    def write_index(self, path: Path) -> None:
        sizes = np.frombuffer(self.sizes, "<i4") if self.sizes else np.zeros(0, "<i4")
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
        with open(path, "wb") as file:
            file.write(HEADER.pack(MAGIC, 1, code, len(sizes), len(self.documents)))
            file.write(sizes)
            end = 0
            for begin in range(0, len(sizes), CHUNK):
                ends = end + np.cumsum(sizes[begin:begin + CHUNK], dtype="<i8")
                file.write(((ends - sizes[begin:begin + CHUNK]) * self.dtype.itemsize).tobytes())
                end = int(ends[-1])
            file.write(self.documents)
            sync(file)


def merge(prefixes: list[str | os.PathLike], out: str | os.PathLike) -> None:
    """Token files end to end in PREFIX `out`; only the index is in memory. ValueError as in IndexedWriter.extend."""
    with IndexedWriter(out, dtype=IndexedDataset(prefixes[0]).tokens.dtype) as writer:
        for prefix in prefixes:
            writer.extend(prefix)


def sequence_sizes(dataset: IndexedDataset) -> np.ndarray:
    """int32 [S]: tokens of each sequence in a data set's .idx, mapped; those of its documents if it has none."""
    if dataset.flat:
        return dataset.sizes
    path = token_paths(dataset.path)[1]
    with open(path, "rb") as file:
        sequences = HEADER.unpack(file.read(HEADER.size))[3]
    return np.memmap(path, "<i4", "r", HEADER.size, (sequences,))


def unigram_entropy(data) -> float:
    """Entropy of the tokens' frequencies in nats: the loss of the best model that sees no context. data: an
    IndexedDataset or a Blend."""
    shares = np.zeros(max(int(dataset.tokens.max()) for _, dataset in data.parts) + 1)
    for weight, dataset in data.parts:
        counts = np.zeros(len(shares), dtype=np.int64)
        for begin in range(0, len(dataset.tokens), 2**24):  # bincount works on an int64 copy: not of the whole file
            counts += np.bincount(dataset.tokens[begin:begin + 2**24], minlength=len(counts))
        shares += weight * (counts / counts.sum())
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())
