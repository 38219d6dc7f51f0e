"""Rows between the ranks of one host, over windows of shared memory beside gloo: python -m benchmarks.exchange --help.

One exchange is what the dispatch of an MoE layer does with its transport: counts, which every rank reads, then rows, as
many to each rank, itself included. Ranks are forked processes of one thread each. A round runs the same exchanges over
both transports, one after the other in turns, and takes as long as the slowest rank: its wall time, so that a rank that
waits counts; beside it stands the CPU time of all ranks, which a loaded machine disturbs least. A ratio is the median
over rounds of (gloo's time / windows'): above 1 windows are faster. "counts" is an exchange without rows.

Prints Markdown, writes benchmarks/results/exchange-<cpu>.json.
"""

import json
import re
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.ops import _ratio, machine
from moe_ext.parallel.transport import TorchTransport, WindowTransport
from tests.ranks import run_ranks

WIDTH = 256  # float32 elements of a row
ROW = 4 * WIDTH


def size_of(bytes):
    return f"{bytes >> 20} MiB" if bytes >= 1 << 20 else f"{bytes >> 10} KiB" if bytes else "counts"


def exchange(transport, counts, sent, rows_PP):
    all_PP2 = transport.counts(counts)
    return transport.rows(sent, rows_PP) if len(sent) else all_PP2


def time_sizes(rank, folder, world, sizes, rounds):
    """-> {bytes: {transport: (wall, CPU) seconds per exchange, [rounds]}} of this rank."""
    store = dist.FileStore(f"{folder}/windows", world)
    transports = {"gloo": TorchTransport(), "windows": WindowTransport(store, world, rank, device="cpu")}
    times = {bytes: {name: [] for name in transports} for bytes in sizes}
    for bytes in sizes:
        rows_PP = torch.full((world, world), bytes // ROW // world)
        counts, sent = torch.stack([rows_PP[rank]] * 2, 1).int(), torch.randn(int(rows_PP[rank].sum()), WIDTH)
        repeats = max(1, min(20, (1 << 20) // max(bytes, 1)))
        for round in range(rounds + 1):  # the first warms up and compares
            results = []
            for name in sorted(transports, reverse=round % 2):
                dist.barrier()
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(repeats):
                    result = exchange(transports[name], counts, sent, rows_PP)
                if round:
                    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                    times[bytes][name].append((wall / repeats, cpu / repeats))
                else:
                    results.append(result)
            if round == 0 and not torch.equal(*results):
                raise AssertionError("gloo and windows move different rows")
    transports["windows"].close()
    return times


def time_world(world, sizes, rounds):
    """-> lines of the table."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(world, lambda rank: time_sizes(rank, folder, world, sizes, rounds), folder)
    for bytes in sizes:
        line = {"world": world, "bytes": bytes}
        for clock, of_ranks in (("wall", max), ("cpu", sum)):
            gloo, windows = ([of_ranks(rank[clock == "cpu"] for rank in round)
                              for round in zip(*(rank[bytes][name] for rank in ranks), strict=True)]
                             for name in ("gloo", "windows"))  # fmt: skip
            line[clock] = {"gloo_us": 1e6 * statistics.median(gloo), "windows_us": 1e6 * statistics.median(windows),
                           "ratio": _ratio(gloo, windows)}  # fmt: skip
        yield line


def main(
    worlds: tuple[int, ...] = (2, 4),
    sizes: tuple[int, ...] = (0, 16 << 10, 256 << 10, 4 << 20, 32 << 20),
    rounds: int = 15,
    out: Path = Path("benchmarks/results"),
):
    """Time exchanges over windows of shared memory and over gloo.

    Args:
        worlds: numbers of ranks.
        sizes: bytes that each rank sends, a multiple of 1024 times its world; 0 is counts alone.
        rounds: timed rounds per line, after one that warms up.
        out: folder of the JSON file.
    """
    report = {**machine(), "exchange": []}
    print(f"{report['cpu']}, torch {report['torch']}, commit {report['commit']}\n")
    heads = " | ".join(f"{clock}: gloo us | windows us | x gloo" for clock in ("wall", "CPU"))
    print(f"| ranks | bytes of each | {heads} |\n" + "|---" * 8 + "|")
    for world in worlds:
        for line in time_world(world, sizes, rounds):
            columns = (f"{t['gloo_us']:.0f} | {t['windows_us']:.0f} | {t['ratio']:.2f}"
                       for t in (line["wall"], line["cpu"]))  # fmt: skip
            print(f"| {world} | {size_of(line['bytes'])} | {' | '.join(columns)} |")
            report["exchange"].append(line)
    out.mkdir(parents=True, exist_ok=True)
    cpu = re.sub(r"[^a-z0-9]+", "-", report["cpu"].lower()).strip("-")
    path = out / f"exchange-{cpu}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{path}")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
