"""The expert layer on a machine with more work than cores: python -m benchmarks.load --help.

For each shape and number of threads the wall time of forward + backward beside busy processes, twice as many as this
process may use cores, over that of one thread beside the same processes. Below 1 threads help even then; far above 1 is
a barrier that waits for threads without a core. Rounds are interleaved, ratios are of medians. Prints Markdown.
"""

import os
import statistics
import subprocess
import sys
import time

import torch

from benchmarks.ops import machine, ours
from tests.cases import LAYERS, Shape, random


def layer(shape):
    """A function that runs forward and backward once."""
    T, D, width, E, K = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(T, D), (E, 2 * width, D), (E, D, width), (T, K)]
    leaves = [torch.randn(*size, generator=generator).mul_(size[-1] ** -0.5).requires_grad_() for size in sizes]
    ids_TK, dy_TD = random(T, K, E, generator), torch.randn(T, D, generator=generator)
    return lambda: torch.autograd.grad(ours(*leaves, ids_TK, E), leaves, dy_TD)


def measure(shape, threads, rounds):
    """-> for each number of threads the median of its seconds."""
    run, times, before = layer(shape), {n: [] for n in threads}, torch.get_num_threads()
    for round in range(rounds + 1):  # the first warms up
        for n in threads:
            torch.set_num_threads(n)
            start = time.perf_counter()
            run()
            if round > 0:
                times[n].append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return {n: statistics.median(took) for n, took in times.items()}


def main(
    shapes: tuple[str, ...] = ("tiny", "fine"),
    threads: tuple[int, ...] = (2, 4),
    tokens: int = 512,
    rounds: int = 10,
    load: float = 2.0,
):
    """Time the layer beside busy processes.

    Args:
        shapes: names of layer shapes in tests/cases.py.
        threads: numbers of threads, each timed beside one thread.
        tokens: of a call; few, because it is short regions that a late thread spoils.
        rounds: timed rounds, after one that warms up.
        load: busy processes for each core of this process.
    """
    here = machine()
    print(f"{here['cpu']}, {here['isa']}, torch {here['torch']}, commit {here['commit']}, load {load:g}\n")
    print("| shape | threads | ms | ms of one thread | ratio |\n|---|---|---|---|---|")
    command, many = [sys.executable, "-c", "while True: pass"], round(load * len(os.sched_getaffinity(0)))
    busy = [subprocess.Popen(command) for _ in range(many)]
    lines = []
    try:
        for name in shapes:
            took = measure(Shape(tokens, *LAYERS[name][1:]), (1, *threads), rounds)
            for n in threads:
                lines.append({"shape": name, "threads": n, "ratio": took[n] / took[1]})
                print(f"| {name} | {n} | {1e3 * took[n]:.1f} | {1e3 * took[1]:.1f} | {took[n] / took[1]:.2f} |")
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return lines


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
