"""Which data sets a run reads: data.train, data.valid and data.split -> token files, blends of them, and parts.

    "data/text/train"                   one data set
    "0.7 data/code 0.3 data/text"       a blend: rows of several, by weights (of any sum). Words are a shell's: quotes
                                        hold blanks together. Row by row the set that is furthest behind its share is
                                        next (Megatron-Core's greedy rule, on weights that sum to 1), and each goes
                                        through as many epochs of its own as that takes
    split = "949,50,1"                  train, valid and test are these shares of each data set of data.train, in the
                                        file's order: Megatron's rule. It cuts between SEQUENCES, the entries of the
                                        .idx, at round(share * sequences), half to even. Our files, and Megatron's of
                                        preprocess_data, have one per document; in a file of several per document (by
                                        --split-sentences) a document can lie across the border, and begins in one part
                                        and ends in the next. A share of 0 or left out is no part.
"""
import hashlib
import math
import shlex
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from moe_ext import _C
from moe_ext.data.indexed import IndexedDataset, sequence_sizes

BLOCK = 2**12       # rows between two places of a blend that are kept


class Blend:
    """Rows of several data sets by weights.

    parts: [(weight, IndexedDataset)], the weights sum to 1. An IndexedDataset has `parts` too: itself.
    digest: which tokens in which mixture.
    """

    def __init__(self, parts: list[tuple[float, IndexedDataset]]):
        total = float(np.sum([weight for weight, _ in parts]))
        self.parts = [(weight / total, dataset) for weight, dataset in parts]
        self.weights = np.array([weight for weight, _ in self.parts])
        self.marks = [np.zeros(len(parts), np.int64)]       # rows of each set before row i*BLOCK

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr([(weight, dataset.digest) for weight, dataset in self.parts]).encode()).hexdigest()

    def rows(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """For rows [begin, end) of the endless run: the set of each, int32, and which row of that set's own it is,
        int64."""
        while len(self.marks) <= begin // BLOCK:
            self.marks.append(self.marks[-1].copy())
            self.walk((len(self.marks) - 2) * BLOCK, BLOCK, self.marks[-1])
        first = begin // BLOCK * BLOCK
        sets, rows = self.walk(first, end - first, self.marks[begin // BLOCK].copy())
        return sets[begin - first:], rows[begin - first:]

    def walk(self, first: int, rows: int, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        set_R, row_R = np.empty(rows, np.int32), np.empty(rows, np.int64)
        _C.blend(len(taken), self.weights.ctypes.data, first, rows, taken.ctypes.data, set_R.ctypes.data,
                 row_R.ctypes.data)
        return set_R, row_R


class Sides(NamedTuple):
    """What a run reads; None: nothing."""
    train: IndexedDataset | Blend
    valid: IndexedDataset | Blend | None
    test: IndexedDataset | Blend | None     # of a split alone; nothing reads it during training


def open_data(train: str, valid: str = "", split: str = "") -> Sides:
    """The token files of data.train, data.valid and data.split. Errors: ValueError, FileNotFoundError."""
    if not split:
        return Sides(blend(open_sets(train)), blend(open_sets(valid)) if valid else None, None)
    borders, sets = read_split(split), open_sets(train)
    return Sides(*(blend([(weight, part(dataset, split, name, *borders[name])) for weight, dataset in sets])
                   if name in borders else None for name in Sides._fields))


def blend(sets: list[tuple[float, IndexedDataset]]) -> IndexedDataset | Blend:
    return sets[0][1] if len(sets) == 1 else Blend(sets)


def open_sets(text: str) -> list[tuple[float, IndexedDataset]]:
    return [(weight, IndexedDataset(prefix)) for weight, prefix in read_blend(text)]


def read_blend(text: str) -> list[tuple[float, str]]:
    """A prefix or "WEIGHT PREFIX WEIGHT PREFIX" -> the weights, as they stand there, and prefixes. ValueError."""
    try:
        words = shlex.split(text)
        float(words[0])
    except (ValueError, IndexError):        # no number comes first: a prefix, whatever is in it
        return [(1.0, text)]
    if len(words) == 1:
        return [(1.0, text)]

    def weight(word: str) -> float:
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise ValueError(f"the blend {text!r}: got the weight {word}, wanted a positive number before each prefix, "
                             "as in \"0.7 data/code/train 0.3 data/text/train\"")
        return value

    if len(words) % 2:
        raise ValueError(f"the blend {text!r}: got {len(words)} words, wanted a weight and a prefix in turns; quote a "
                         "prefix that holds blanks")
    return [(weight(number), prefix) for number, prefix in zip(words[::2], words[1::2], strict=True)]


def write_blend(sets: list[tuple[float, str]]) -> str:
    """What read_blend reads as `sets`."""
    return sets[0][1] if len(sets) == 1 else " ".join(f"{weight!r} {shlex.quote(prefix)}" for weight, prefix in sets)


def read_split(text: str) -> dict[str, list[float]]:
    """"949,50,1" -> the place where each part begins and ends, of 1; a part of share 0 is left out. ValueError."""
    try:
        shares = [float(word) for word in text.split(",")]
    except ValueError:
        shares = []
    if not (1 <= len(shares) <= 3 and all(0 <= share < math.inf for share in shares) and shares[0] > 0):
        raise ValueError(f"data.split: got {text!r}, wanted the shares of train, valid and test, as in 949,50,1")
    shares += [0.0] * (3 - len(shares))
    shares = [share / float(np.sum(shares)) for share in shares]
    ends = list(accumulate(shares))
    return {name: place for name, share, *place in zip(Sides._fields, shares, [0.0, *ends[:-1]], ends, strict=True)
            if share}


def part(dataset: IndexedDataset, split: str, name: str, begin: float, end: float) -> IndexedDataset:
    """The sequences of a dataset from share `begin` to share `end`. ValueError if there are none."""
    sizes = sequence_sizes(dataset)
    first, last = (round(place * float(len(sizes))) for place in (begin, end))
    starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    if starts[first] == starts[last]:
        raise ValueError(f"data.split {split}: {dataset.path} has {len(sizes)} sequences, of which {name} gets none: "
                         "give more text, a larger share, or 0 for no such part")
    return dataset.between(int(starts[first]), int(starts[last]))


def summary(data: IndexedDataset | Blend, seq_len: int, rows: int) -> list[str]:
    """A line on each data set of a run of `rows` rows."""
    return [f"{f'{weight:.3f} of the rows: ' if len(data.parts) > 1 else ''}{dataset.path}: {len(dataset):,} documents,"
            f" {len(dataset.tokens):,} tokens, {(samples := (len(dataset.tokens) - 1) // seq_len):,} samples of "
            f"{seq_len:,} in an epoch; {rows * weight / samples:.2f} epochs" for weight, dataset in data.parts]


def totals(data: IndexedDataset | Blend, seq_len: int, rows: int) -> list[str]:
    """The same in Megatron's words and format: sequences of each file, documents, and samples of all epochs that the
    run begins. Megatron lays these epochs end to end, so that its last figure has up to one sample more for each."""
    lines = []
    for weight, dataset in data.parts:
        samples = (len(dataset.tokens) - 1) // seq_len
        epochs = max(1, math.ceil(rows * weight / samples))
        lines += [f"> total number of sequences: {len(sequence_sizes(dataset))}",
                  f"> total number of documents: {len(dataset)}",
                  f"> total number of samples: {epochs * samples}"]
    return lines
