"""Batches of tokens in an order that depends on the data, seq_len and seed alone.

Row r of the endless run is row r of a data set's own (moe_ext.data.index) or, of a blend, the row of the set whose turn
it is (moe_ext.data.blend): whatever the batch size, the mesh, or how often the run was resumed.

Where a document begins and ends is known from the index of the token file, not from an end-of-document id among the
tokens: so it holds for any file that has an index, and text that holds such an id is not taken apart. In files of ours,
and of Megatron's preprocess_data --append-eod, each document ends in that id, and both rules say the same.
"""
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from moe_ext.data.blend import Blend
from moe_ext.data.index import Samples
from moe_ext.data.indexed import IndexedDataset

IGNORED = -100      # a target that is not learnt: torch's ignore_index


class Batch(NamedTuple):
    tokens: torch.Tensor    # int64 [B, S]
    targets: torch.Tensor   # int64 [B, S]: the token after each; with mask_end -100 after the last of a document
    row0: int               # first row's place in the step's global batch (key of the mesh-free random numbers)
    documents: torch.Tensor | None = None   # int32 [B, S]: number of the token's document in the row, from 0
    positions: torch.Tensor | None = None   # int64 [B, S]: from the beginning of the document, or of the row if later

    def borders(self, device) -> dict[str, torch.Tensor]:
        """What the model is told of documents, as its arguments."""
        return {name: sent(tensor, device) for name, tensor in (("documents_BS", self.documents),
                                                             ("positions_BS", self.positions)) if tensor is not None}


def sent(x: torch.Tensor, device) -> torch.Tensor:
    """x on a device. To CUDA from pinned memory: the copy is one more piece of work of the stream, for which the host
    does not wait, so that it can be queued while the device is busy with what came before."""
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class Loader:
    """An endless, resumable stream of global batches.

        loader = Loader(IndexedDataset("data/text/train"), seq_len=256, batch_size=16, seed=1234)
        for step in range(steps):
            micro = loader.batch(0, 8)      # rows 0..7 of this step's 16; a rank or micro-batch takes its slice
            loader.advance()

    data: an IndexedDataset or a Blend. seq_len: tokens S per row. batch_size: rows B of a step over all ranks and
    micro-batches; it may be set to another between two steps. vocab_size: a token id at or above it is a ValueError
    (0: not checked). shuffle=False keeps the file's order, for evaluation. reset_attention, reset_positions: batches
    have `documents`, `positions`. mask_end: the target of a document's last token, which is of another text, is -100:
    Megatron's eod_mask_loss. cache: folder of the index caches; "": beside the tokens. prefetch: batches that a thread
    reads ahead, taking it that each step asks for the rows of the one before; another request is read when it comes.
    samples: rows of one epoch; of a blend, of one epoch of each set.
    Errors: ValueError if a data set is shorter than seq_len + 1 tokens, or knows no documents and an option needs them.
    """

    def __init__(self, data: IndexedDataset | Blend, *, seq_len: int, batch_size: int, seed: int = 0,
                 vocab_size: int = 0, shuffle: bool = True, reset_attention: bool = False,
                 reset_positions: bool = False, mask_end: bool = False, cache: str = "", prefetch: int = 0):
        for _, dataset in data.parts:
            if dataset.flat and (reset_attention or reset_positions or mask_end):
                raise ValueError(f"{dataset.path} has no index, so that its documents are not known: leave "
                                 "data.reset_attention, data.reset_positions and data.mask_end off, or make .bin and "
                                 ".idx of it")
        self.data, self.seq_len, self.batch_size, self.seed = data, seq_len, batch_size, seed
        self.vocab_size, self.shuffle, self.prefetch = vocab_size, shuffle, prefetch
        self.reset_attention, self.reset_positions, self.mask_end = reset_attention, reset_positions, mask_end
        self.sets = [Samples(dataset, seq_len=seq_len, seed=seed, shuffle=shuffle, cache=cache)
                     for _, dataset in data.parts]
        self.samples = sum(of.count for of in self.sets)
        self.row = 0            # first row of the current global batch
        self.asked, self.asked_before = [], []      # (begin, end) of the batches of this step and of the one before
        self.pid = None
        self.start_thread()

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.row / self.samples

    @property
    def targets(self) -> int:
        """Targets of the current global batch that are learnt."""
        if not self.mask_end:
            return self.batch_size * self.seq_len
        self.start_thread()
        with self.lock:
            documents = self.rows(self.row, self.row + self.batch_size, tokens=False)[1]
        if not (learnt := int((documents[:, 1:] == documents[:, :-1]).sum())):
            raise ValueError(f"data.mask_end leaves nothing to learn of rows {self.row} to "
                             f"{self.row + self.batch_size}: each of their documents is one token; leave it off")
        return learnt

    def batch(self, begin: int = 0, end: int | None = None) -> Batch:
        """Rows [begin, end) of the current global batch; end=None: to its last row."""
        end = self.batch_size if end is None else end
        if not 0 <= begin < end <= self.batch_size:
            raise ValueError(f"batch: got rows [{begin}, {end}), wanted a part of [0, {self.batch_size})")
        self.start_thread()
        ahead = self.ahead.pop((self.row + begin, self.row + end), None)
        batch = ahead.result() if ahead else self.read(self.row + begin, self.row + end)
        self.asked.append((begin, end))
        self.read_ahead()
        return batch._replace(row0=begin)

    def advance(self) -> None:
        """On to the next global batch."""
        self.row += self.batch_size
        self.asked, self.asked_before = [], self.asked

    def sample(self, row: int) -> np.ndarray:
        """Row `row` of the endless run: int64 [S+1]."""
        self.start_thread()
        with self.lock:
            return self.rows(row, row + 1)[0][0]

    def start_thread(self) -> None:
        """A thread and a lock of this process; a forked one inherits neither in working order."""
        if self.pid != os.getpid():
            self.pid, self.lock, self.ahead = os.getpid(), threading.Lock(), {}
            self.reader = ThreadPoolExecutor(1, "moe-data") if self.prefetch else None

    def read_ahead(self) -> None:
        """Have the next batches read that this step and the following ones will ask for."""
        if not self.prefetch:
            return
        left = self.asked_before[len(self.asked):]
        steps = [(self.row, left)] + [(self.row + i * self.batch_size, self.asked_before or self.asked)
                                      for i in range(1, self.prefetch + 1)]
        wanted = [(row + begin, row + end) for row, asked in steps for begin, end in asked][:self.prefetch]
        for rows in self.ahead.keys() - wanted:
            self.ahead.pop(rows).cancel()
        for rows in wanted:
            if rows not in self.ahead:
                self.ahead[rows] = self.reader.submit(self.read, *rows)

    def read(self, begin: int, end: int) -> Batch:
        """Rows [begin, end) of the endless run."""
        with self.lock:
            tokens, documents = self.rows(begin, end)
        targets = tokens[:, 1:].copy()
        if self.mask_end:
            targets[np.diff(documents) > 0] = IGNORED
        batch = Batch(torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets), 0)
        if self.reset_attention:
            batch = batch._replace(documents=torch.from_numpy(documents[:, :-1].copy()))
        if self.reset_positions:
            places = np.arange(self.seq_len)
            begins = np.where(np.diff(documents[:, :-1], prepend=0) > 0, places, 0)
            batch = batch._replace(positions=torch.from_numpy(places - np.maximum.accumulate(begins, axis=1)))
        return batch

    def rows(self, begin: int, end: int, tokens: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 [R, S+1] of rows [begin, end) of the endless run, and their documents as Samples.read gives
        them."""
        numbers, shape = np.arange(begin, end), (end - begin, self.seq_len + 1)
        sets, numbers = self.data.rows(begin, end) if len(self.sets) > 1 else (np.zeros_like(numbers), numbers)
        read, documents = np.empty(shape if tokens else 0, np.int64), np.empty(shape, np.int32)
        for i in np.unique(sets).tolist():
            mine = sets == i
            found, documents[mine] = self.sets[i].read(numbers[mine], tokens)
            if not tokens:
                continue
            if self.vocab_size and not 0 <= found.min() <= found.max() < self.vocab_size:
                raise ValueError(f"{self.sets[i].dataset.path}: got token ids from {found.min()} to {found.max()}, "
                                 f"wanted ids below vocab_size {self.vocab_size}: set model.vocab_size to that of the "
                                 "tokenizer that made this file, or prepare the data again")
            read[mine] = found
        return read, documents

    def state_dict(self) -> dict:
        """The position, and what it is a position in: plain numbers and strings, for JSON."""
        return {"row": self.row, **self.identity()}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a state_dict. ValueError if it belongs to another stream of rows; batch_size may differ."""
        if differing := self.differing(state):
            raise ValueError(f"loader state: {'; '.join(differing)}: the position belongs to other data or another "
                             "order: resume with the same data, seq_len and seed, or start a new run")
        self.row = state["row"]
        self.asked, self.asked_before = [], []

    def differing(self, state: dict) -> list[str]:
        """What of a state_dict is not as here. One of an earlier version knows documents and tokens by number alone."""
        return [f"{name} {state.get(name)} there, {value} here" for name, value in self.identity().items()
                if state.get(name, value if name == "data" else None) != value]

    def identity(self) -> dict:
        sets = [dataset for _, dataset in self.data.parts]
        return {"seed": self.seed, "seq_len": self.seq_len, "shuffle": self.shuffle,
                "documents": sum(len(dataset) for dataset in sets),
                "tokens": sum(len(dataset.tokens) for dataset in sets), "data": self.data.digest}
