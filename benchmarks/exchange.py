"""The token exchange between the ranks of one host, over windows of shared memory beside gloo: python -m
benchmarks.exchange --help.

    counts   what every rank has for every other, which all read
    rows     counts, then rows of float32, as many to each rank, itself included
    trip     what an MoE layer does with its exchange: dispatch and combine, forward and backward, of tokens that go to
             two ranks each. The plan, counts, packing, four messages of that many rows each, sums; no experts, whose
             results are the rows that they get
"Bytes" are those of the values that one rank sends in a message.

Ranks are forked processes of one thread each. A round runs the same exchanges over both transports, one after the other
in turns, and takes as long as the slowest rank: its wall time, so that a rank that waits counts; beside it stands the
CPU time of all ranks, which a loaded machine disturbs least. A ratio is the median over rounds of (gloo's time /
windows'): above 1 windows are faster.

Prints Markdown, writes benchmarks/results/exchange-<cpu>.json.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.ops import _ratio, machine, write
from moe_ext.parallel.experts import ExpertExchange
from moe_ext.parallel.ranks import run_ranks
from moe_ext.parallel.transport import TorchTransport, WindowTransport

WIDTH = 256  # float32 elements of a row
ROW = 4 * WIDTH


def size_of(bytes):
    return f"{bytes >> 20} MiB" if bytes >= 1 << 20 else f"{bytes >> 10} KiB"


def counts_of(world, rank, bytes):
    mine = torch.full((world, 2), bytes // ROW // world, dtype=torch.int32)
    return lambda transport: [transport.counts(mine)]


def rows_of(world, rank, bytes):
    rows_PP = torch.full((world, world), bytes // ROW // world)
    sent, counts = torch.randn(int(rows_PP[rank].sum()), WIDTH), counts_of(world, rank, bytes)
    return lambda transport: [*counts(transport), transport.rows(sent, rows_PP)]


def trip_of(world, rank, bytes):
    T = bytes // ROW // 2
    x_TD, dy_TD = torch.randn(T, WIDTH, requires_grad=True), torch.randn(T, WIDTH)
    weights_TK = torch.rand(T, 2, requires_grad=True)
    ids_TK = (torch.arange(T)[:, None] + torch.arange(2)).remainder(world).int()  # an expert per rank

    def trip(transport):
        exchange = ExpertExchange(world, transport)
        x_RD, weights_RK, _, _, way = exchange.dispatch(x_TD, weights_TK, ids_TK)
        y_TD = exchange.combine(x_RD, way)
        return y_TD, *torch.autograd.grad([y_TD, weights_RK], [x_TD, weights_TK], [dy_TD, weights_RK.detach()])

    return trip


def time_lines(rank, folder, world, lines, rounds):
    """-> {line: {transport: (wall, CPU) seconds per exchange, [rounds]}} of this rank."""
    store = dist.FileStore(f"{folder}/windows", world)
    transports = {"gloo": TorchTransport(), "windows": WindowTransport(store, world, rank, device="cpu")}
    times = {line: {name: [] for name in transports} for line in lines}
    for line, (what, bytes) in lines.items():
        exchange = what(world, rank, bytes)
        repeats = max(1, min(20, (1 << 20) // max(bytes, 1)))
        for round in range(rounds + 1):  # the first warms up and compares
            results = []
            for name in sorted(transports, reverse=round % 2):
                dist.barrier()
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(repeats):
                    result = exchange(transports[name])
                if round:
                    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                    times[line][name].append((wall / repeats, cpu / repeats))
                else:
                    results.append(result)
            if round == 0 and not all(map(torch.equal, *results)):
                raise AssertionError("gloo and windows move different rows")
    transports["windows"].close()
    return times


def time_world(world, sizes, rounds):
    """-> lines of the table."""
    lines = {"counts": (counts_of, 0)}
    for name, what in (("rows", rows_of), ("trip", trip_of)):
        lines |= {f"{name}, {size_of(bytes)}": (what, bytes) for bytes in sizes}
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(world, lambda rank: time_lines(rank, folder, world, lines, rounds), folder)
    for name, (_, bytes) in lines.items():
        line = {"world": world, "what": name.partition(",")[0], "bytes": bytes}
        for clock, of_ranks in (("wall", max), ("cpu", sum)):
            gloo, windows = ([of_ranks(rank[clock == "cpu"] for rank in round)
                              for round in zip(*(rank[name][transport] for rank in ranks), strict=True)]
                             for transport in ("gloo", "windows"))  # fmt: skip
            line[clock] = {"gloo_us": 1e6 * statistics.median(gloo), "windows_us": 1e6 * statistics.median(windows),
                           "ratio": _ratio(gloo, windows)}  # fmt: skip
        yield name, line


def main(
    worlds: tuple[int, ...] = (2, 4),
    sizes: tuple[int, ...] = (16 << 10, 256 << 10, 4 << 20, 32 << 20),
    rounds: int = 15,
    out: Path = Path("benchmarks/results"),
):
    """Time exchanges over windows of shared memory and over gloo.

    Args:
        worlds: numbers of ranks.
        sizes: bytes that each rank sends in a message, a multiple of 2048 times its world.
        rounds: timed rounds per line, after one that warms up.
        out: folder of the JSON file.
    """
    report = {**machine(), "exchange": []}
    print(f"{report['cpu']}, torch {report['torch']}, commit {report['commit']}\n")
    heads = " | ".join(f"{clock}: gloo us | windows us | x gloo" for clock in ("wall", "CPU"))
    print(f"| ranks | exchange | {heads} |\n" + "|---" * 8 + "|")
    for world in worlds:
        for name, line in time_world(world, sizes, rounds):
            columns = (f"{t['gloo_us']:.0f} | {t['windows_us']:.0f} | {t['ratio']:.2f}"
                       for t in (line["wall"], line["cpu"]))  # fmt: skip
            print(f"| {world} | {name} | {' | '.join(columns)} |")
            report["exchange"].append(line)
    write(report, out, "exchange-{cpu}.json")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
