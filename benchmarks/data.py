"""The order of samples: the C core's index arrays beside the best that numpy's own vectors do; python -m
benchmarks.data --help.

    documents, samples   a permutation of each: the core's beside Generator.permutation
    sample index         where each sample begins: the core's one pass beside cumsum, repeat and a gather
    cache                the same arrays mapped from their file, which is checked whole
    batch                a batch of the loader, of rows at random

Documents have 1 to 1023 tokens, evenly drawn. A line is one run of each, one after the other, in CPU time of their one
thread; a ratio is numpy's over ours. Memory is the process's peak after all of the core's, and after all of numpy's.

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
    began = time.process_time()  # both sides run on one thread, and on a machine that is not theirs alone
    result = function(*args)
    return time.process_time() - began, result


def peak_gib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def permutation(n, seed=1):
    order = np.empty(n, np.int32 if n < 2**31 else np.int64)
    _C.shuffle(order.itemsize, seed, 0, n, order.ctypes.data)
    return order


def core_index(docs, sizes, length, samples):
    doc, offset = np.empty(samples, docs.dtype), np.empty(samples, np.int32)
    _C.sample_index(docs.itemsize, len(docs), docs.ctypes.data, len(sizes), sizes.ctypes.data, length, samples,
                    doc.ctypes.data, offset.ctypes.data)  # fmt: skip
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


def time_index(samples, length):
    """-> lines of the table, and the peaks of memory."""
    sizes = np.random.default_rng(0).integers(1, 1024, samples * length // 511, dtype=np.int32)
    total = int(sizes.sum(dtype=np.int64))
    samples = min(samples, (total - 1) // length)
    ours = {}
    ours["documents"], docs = clocked(permutation, len(sizes))
    ours["samples"], order = clocked(permutation, samples)
    ours["sample index"], core = clocked(core_index, docs, sizes, length, samples)
    peaks = {"core_gib": peak_gib()}
    with tempfile.TemporaryDirectory() as folder:
        ours["cache"] = time_cache(Path(folder), sizes, length, index.Epoch(order, docs, *core))
    del order
    draw, theirs = np.random.default_rng(1).permutation, {}
    theirs["sample index"], other = clocked(numpy_index, docs, sizes, length, samples)
    assert all(map(np.array_equal, core, other))
    del core, other, docs
    theirs["documents"] = clocked(draw, len(sizes))[0]
    theirs["samples"] = clocked(draw, samples)[0]
    peaks["numpy_gib"] = peak_gib()
    ours["all"], theirs["all"] = (sum(t[name] for name in ("documents", "samples", "sample index"))
                                  for t in (ours, theirs))  # fmt: skip
    lines = [{"what": name, "core_s": ours[name], "numpy_s": theirs.get(name)} for name in ours]
    return lines, {"documents": len(sizes), "samples": samples} | peaks


def time_cache(folder, sizes, length, epoch):
    """Seconds to map and check a cache file of this epoch, just written."""

    class Sizes:  # as much of a data set as the file's header knows
        path = "benchmark"

        def __len__(self):
            return len(sizes)

    reader = object.__new__(index.Samples)
    reader.dataset, reader.count = Sizes(), len(epoch.order)
    index.write(folder / "epoch.order", bytes(32), epoch)
    return clocked(reader.map, folder / "epoch.order", bytes(32))[0]


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
    print("| | core, s | numpy, s | x numpy |\n|---|---|---|---|")
    for line in report["index"]:
        core, theirs = line["core_s"], line["numpy_s"]
        beside = f"{theirs:.2f} | {theirs / core:.2f}" if theirs else " | "
        print(f"| {line['what']} | {core:.2f} | {beside} |")
    report["batch_us"] = {f"{rows} x {length}": time_batch(rows, length)
                          for rows, length in ((2, 128), (8, 1024), (64, 2048))}  # fmt: skip
    for shape, us in report["batch_us"].items():
        print(f"\na batch of {shape} tokens: {us:.0f} us")
    write(report, out, "data-{cpu}.json")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
