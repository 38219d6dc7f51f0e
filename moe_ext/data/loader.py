"""Batches of tokens in an order that depends on (seed, epoch) alone.

In epoch e the documents are shuffled and laid end to end; sample i covers tokens [i*S, i*S + S + 1) of that line, so
documents are packed without padding and each token is predicted once; then the samples are shuffled. The last tokens
of an epoch, fewer than S, wait for another epoch, whose line ends elsewhere. Row r of the endless run is sample
order[r mod n] of epoch r div n, whatever the batch size, the mesh, or how often the run was resumed.
"""
from typing import NamedTuple

import numpy as np
import torch

from moe_ext import _C
from moe_ext.data.indexed import IndexedDataset


class Batch(NamedTuple):
    tokens: torch.Tensor    # int64 [B, S]
    targets: torch.Tensor   # int64 [B, S]: the token after each
    row0: int               # first row's place in the step's global batch (key of the mesh-free random numbers)


class Epoch(NamedTuple):
    docs: np.ndarray        # int64 [D] the documents in their shuffled order
    doc: np.ndarray         # int64 [n] place in `docs` where sample i begins
    offset: np.ndarray      # int64 [n] token of that document where it begins
    order: np.ndarray       # int64 [n] the samples in their shuffled order


class Loader:
    """An endless, resumable stream of global batches.

        loader = Loader(IndexedDataset("data/text/train"), seq_len=256, batch_size=16, seed=1234)
        for step in range(steps):
            micro = loader.batch(0, 8)      # rows 0..7 of this step's 16; a rank or micro-batch takes its slice
            loader.advance()

    seq_len: tokens S per row. batch_size: rows B of a step over all ranks and micro-batches. vocab_size: a token id at
    or above it is a ValueError (0: not checked). shuffle=False keeps the file's order, for evaluation.
    samples: rows of one epoch. Errors: ValueError if the dataset is shorter than seq_len + 1 tokens.
    """

    def __init__(self, dataset: IndexedDataset, *, seq_len: int, batch_size: int, seed: int = 0, vocab_size: int = 0,
                 shuffle: bool = True):
        if len(dataset.tokens) < seq_len + 1:
            raise ValueError(f"{dataset.path}: got {len(dataset.tokens)} tokens, wanted at least seq_len + 1 = "
                             f"{seq_len + 1}: give more text or a shorter seq_len")
        self.dataset, self.seq_len, self.batch_size, self.seed = dataset, seq_len, batch_size, seed
        self.vocab_size, self.shuffle = vocab_size, shuffle
        self.samples = (len(dataset.tokens) - 1) // seq_len
        self.row = 0            # first row of the current global batch
        self.epochs = {}        # the epochs that the current batch touches

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.row / self.samples

    def batch(self, begin: int = 0, end: int | None = None) -> Batch:
        """Rows [begin, end) of the current global batch; end=None: to its last row."""
        end = self.batch_size if end is None else end
        if not 0 <= begin < end <= self.batch_size:
            raise ValueError(f"batch: got rows [{begin}, {end}), wanted a part of [0, {self.batch_size})")
        rows = torch.from_numpy(np.stack([self.sample(self.row + row) for row in range(begin, end)]))
        return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), begin)

    def advance(self) -> None:
        """On to the next global batch."""
        self.row += self.batch_size
        self.epochs = {e: epoch for e, epoch in self.epochs.items() if e >= self.row // self.samples}

    def sample(self, row: int) -> np.ndarray:
        """Row `row` of the endless run: int64 [S+1]."""
        number, index = divmod(row, self.samples)
        if number not in self.epochs:
            self.epochs[number] = self.plan(number)
        epoch = self.epochs[number]
        place, offset = epoch.doc[epoch.order[index]], epoch.offset[epoch.order[index]]
        tokens = np.empty(self.seq_len + 1, dtype=np.int64)
        filled = 0
        while filled < len(tokens):
            piece = self.dataset[epoch.docs[place]][offset:offset + len(tokens) - filled]
            tokens[filled:filled + len(piece)] = piece
            filled += len(piece)
            place, offset = place + 1, 0
        if self.vocab_size and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise ValueError(f"{self.dataset.path}: got token ids from {tokens.min()} to {tokens.max()}, wanted ids "
                             f"below vocab_size {self.vocab_size}: set model.vocab_size to that of the tokenizer that "
                             "made this file, or prepare the data again")
        return tokens

    def plan(self, number: int) -> Epoch:
        docs_n = len(self.dataset)
        if self.shuffle:
            docs = shuffled(self.seed, 2 * number, docs_n)
            order = shuffled(self.seed, 2 * number + 1, self.samples)
        else:
            docs, order = np.arange(docs_n), np.arange(self.samples)
        doc, offset = np.empty(self.samples, np.int64), np.empty(self.samples, np.int64)
        sizes = self.dataset.sizes
        _C.sample_index(docs_n, docs.ctypes.data, docs_n, sizes.ctypes.data, self.seq_len, self.samples,
                        doc.ctypes.data, offset.ctypes.data)
        return Epoch(docs, doc, offset, order)

    def state_dict(self) -> dict:
        """The position, and what it is a position in: plain integers, for JSON."""
        return {"row": self.row, **self.identity()}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a state_dict. ValueError if it belongs to another stream of rows; batch_size may differ."""
        for name, value in self.identity().items():
            if state.get(name) != value:
                raise ValueError(f"loader state: {name}: got {state.get(name)}, wanted {value} ({self.dataset.path}); "
                                 "the position belongs to other data or another order: resume with the same data, "
                                 "seq_len and seed, or start a new run")
        self.row = state["row"]
        self.epochs = {}

    def identity(self) -> dict:
        return {"seed": self.seed, "seq_len": self.seq_len, "shuffle": self.shuffle,
                "documents": len(self.dataset), "tokens": len(self.dataset.tokens)}


def shuffled(seed: int, stream: int, n: int) -> np.ndarray:
    """A permutation of 0..n-1, int64 [n], that is a function of (seed, stream, n)."""
    order = np.empty(n, dtype=np.int64)
    _C.shuffle(seed, stream, n, order.ctypes.data)
    return order
