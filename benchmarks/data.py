"""The order of samples: the C core's index arrays beside the best that numpy's own vectors do; python -m
benchmarks.data --help.

    documents, samples   a permutation of each: the core's beside Generator.permutation
    sample index         where each sample begins: the core's one pass beside cumsum, repeat and a gather
    epoch                all three: as the loader builds them, on two threads, beside the sum of numpy's
    cache                the same arrays mapped from their file, which is checked whole
    batch                a batch of the loader, of rows at random

Documents have 1 to 1023 tokens, evenly drawn. A line is one run of each, one after the other; a ratio is numpy's time
over ours. CPU time is that of all threads, which a busy machine disturbs less.
Memory is the process's peak after all of the core's, and after all of numpy's.

Prints Markdown, writes benchmarks/results/data-<cpu>.json.
"""

import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.ops import machine, write
from moe_ext import _C
from moe_ext.data import IndexedDataset, IndexedWriter, Loader, index


def clocked(function, *args):
    """-> (wall, CPU) seconds, result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*args)
    return (time.perf_counter() - wall, time.process_time() - cpu), result


def peak_gib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def permutation(n):
    order = np.empty(n, np.int32)
    _C.shuffle(4, 1, 0, n, order.ctypes.data)
    return order


def core_index(docs, sizes, length, samples):
    doc, offset = np.empty(samples, np.int32), np.empty(samples, np.int32)
    _C.sample_index(4, len(docs), docs.ctypes.data, len(sizes), sizes.ctypes.data, length, samples, doc.ctypes.data,
                    offset.ctypes.data)  # fmt: skip
    return doc, offset


def numpy_index(docs, sizes, length, samples):
    sizes = sizes[docs]
    ends = np.cumsum(sizes, dtype=np.int64)
    begun = np.minimum((ends + length - 1) // length, samples)  # samples that begin before a document's end
    doc = np.repeat(np.arange(len(docs), dtype=np.int32), np.diff(begun, prepend=0))
    ends -= sizes
    offset = np.arange(0, samples * length, length)
    offset -= ends[doc]
    return doc, offset.astype(np.int32)


class Documents:
    """As much of a data set as the index of its samples reads."""

    path = "benchmark"

    def __init__(self, sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)


def time_index(samples, length):
    """-> lines of the table; documents, samples, and the peaks of memory."""
    sizes = np.random.default_rng(0).integers(1, 1024, samples * length // 511, dtype=np.int32)
    reader = object.__new__(index.Samples)
    reader.dataset, reader.seq_len, reader.seed, reader.shuffle = Documents(sizes), length, 1, True
    reader.count = samples = min(samples, (int(sizes.sum(dtype=np.int64)) - 1) // length)
    ours, theirs = {}, {}
    ours["epoch"], epoch = clocked(reader.build, 0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "epoch.order"
        index.write(path, bytes(32), epoch)
        ours["cache"] = clocked(reader.map, path, bytes(32))[0]
    del epoch
    ours["documents"], docs = clocked(permutation, len(sizes))
    ours["sample index"], core = clocked(core_index, docs, sizes, length, samples)
    ours["samples"] = clocked(permutation, samples)[0]
    peaks = {"core_gib": peak_gib()}
    draw = np.random.default_rng(1).permutation
    theirs["sample index"], other = clocked(numpy_index, docs, sizes, length, samples)
    assert all(map(np.array_equal, core, other))
    del core, other, docs
    theirs["documents"] = clocked(draw, len(sizes))[0]
    theirs["samples"] = clocked(draw, samples)[0]
    theirs["epoch"] = tuple(map(sum, zip(*theirs.values(), strict=True)))
    peaks["numpy_gib"] = peak_gib()
    lines = []
    parts = "documents", "samples", "sample index"
    for name, clock in (*((part, 1) for part in parts), ("epoch", 1), ("epoch", 0), ("cache", 0)):
        lines.append({"what": name, "clock": ("wall", "CPU")[clock], "core_s": ours[name][clock],
                      "numpy_s": theirs[name][clock] if name in theirs else None})  # fmt: skip
    return lines, {"documents": len(sizes), "samples": samples} | peaks


def time_batch(rows, length, batches=50):
    """Microseconds of a batch, read when asked for."""
    with tempfile.TemporaryDirectory() as folder:
        generator = np.random.default_rng(0)
        with IndexedWriter(f"{folder}/t", 4096) as writer:
            for size in generator.integers(1, 1024, 20000):
                writer.add(generator.integers(0, 4096, size))
        loader = Loader(IndexedDataset(f"{folder}/t"), seq_len=length, batch_size=rows, vocab_size=4096)
        loader.batch()
        began = time.perf_counter()
        for _ in range(batches):
            loader.batch()
            loader.advance()
        return 1e6 * (time.perf_counter() - began) / batches


def main(samples: int = 10**8, seq_len: int = 256, out: Path = Path("benchmarks/results")):
    """Time the index arrays of an epoch, and the loader.

    Args:
        samples: of the epoch; 10^8 of 256 tokens take 6 GiB.
        seq_len: tokens of a sample.
        out: folder of the JSON file.
    """
    report = {**machine(), "numpy": np.__version__}
    report["index"], facts = time_index(samples, seq_len)
    report |= facts | {"seq_len": seq_len}
    print(f"{report['cpu']}, numpy {np.__version__}, commit {report['commit']}\n")
    print(f"{facts['samples']:,} samples of {seq_len} tokens from {facts['documents']:,} documents; at most "
          f"{facts['core_gib']:.1f} GiB with the core's, {facts['numpy_gib']:.1f} GiB with numpy's\n")  # fmt: skip
    print("| | clock | core, s | numpy, s | x numpy |\n|---|---|---|---|---|")
    for line in report["index"]:
        core, theirs = line["core_s"], line["numpy_s"]
        beside = f"{theirs:.2f} | {theirs / core:.2f}" if theirs else " | "
        print(f"| {line['what']} | {line['clock']} | {core:.2f} | {beside} |")
    report["batch_us"] = {f"{rows} x {length}": time_batch(rows, length)
                          for rows, length in ((2, 128), (8, 1024), (64, 2048))}  # fmt: skip
    for shape, us in report["batch_us"].items():
        print(f"\na batch of {shape} tokens: {us:.0f} us")
    write(report, out, "data-{cpu}.json")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
