"""The expert layer and the movement ops, timed beside plain torch: `make bench`, or python -m benchmarks.ops --help.

Layer: route_index + expert_mlp (SwiGLU), forward and forward + backward, on the shapes of tests/cases.py, against
  sorted-mm    tokens sorted by expert, torch.mm on each contiguous segment; experts are separate parameters
  grouped-mm   the same with torch.nn.functional.grouped_mm on stacked weights
  batched-mm   the same with torch.bmm, every expert's tokens padded to those of the largest
  compiled-mm  grouped-mm without its sort, by torch.compile with dynamic sizes, all compiled in rounds that do not
               count. bf16 only: torch's shape function of grouped_mm refuses fp32
  widened-mm   bf16 only: sorted-mm in fp32, the better form on a CPU without bf16 instructions. There the others take
               minutes in bf16 and are left out, which the report says, unless --peers names them
Every round draws a new routing and changes the weights, and each contender runs once on them, in turns, so that all see
the same load of the machine and none gains by what it kept of the weights. A ratio is the median over rounds of (their
time / our time): above 1 we are faster. With one thread the time is the process's CPU time, which a loaded machine
disturbs least; with more it is wall time. What is below the best form of torch is printed bold.

Tuned malloc: the lines again, ours beside sorted-mm and the best form, in a process whose malloc maps nothing and gives
nothing back, so that no allocation meets a page fault twice. Anyone can have that by an environment variable, so it
counts among torch's best; ours has the same malloc there.

Memory: ours and sorted-mm (or widened-mm, where that stands for it), each in a fresh process of one thread, which makes
inputs and weights and runs forward and backward: its peak resident memory, and that less what was resident before. The
growth of both has the gradients of the weights, which are as large as these.

Shares: of the time of router + route_index + expert_mlp, those of the router (from logits), of the index, and of the
passes over rows that expert_mlp has beside its products: the weighted sum of each token's copies, and in the backward
the plain one (as ops.scatter and the backward of ops.gather). It gathers rows while it packs them for a product; what
a gather of its own would take (ops.gather, twice in the backward) stands beside.

Movement: the share of the bandwidth of a copy between buffers of the size of the expert rows (16 MiB). Rows are counted
once for each copy that is read or written.

Prints Markdown, writes benchmarks/results/<cpu>-<instruction set>-<commit>.json.
"""

import ctypes
import json
import operator
import os
import platform
import re
import statistics
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

import moe_ext
from moe_ext import ops
from tests.cases import LAYERS, Shape, random

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARES_OF = "fine"  # where experts are small, so that what is no product shows most


# ---- the contenders: (x_TD, w13, w2, weights_TK, ids_TK, E) -> y_TD --------------------------------------------------


def ours(x_TD, w13_E2FD, w2_EDF, weights_TK, ids_TK, E):
    index = ops.route_index(ids_TK, E)
    return ops.expert_mlp(x_TD, w13_E2FD, None, w2_EDF, weights_TK, index, act="swiglu")


def swiglu(h_NU):
    gate_NF, up_NF = h_NU.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


def sort_copies(ids_TK, E):
    """-> order_N, inverse_N, counts_E."""
    order_N = ids_TK.flatten().argsort(stable=True)
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(len(order_N), device=ids_TK.device)
    return order_N, inverse_N, torch.bincount(ids_TK.flatten(), minlength=E)


def combine(y_ND, inverse_N, weights_TK):
    """The weighted sum of each token's copies, as one small matmul per token."""
    T, K = weights_TK.shape
    return torch.bmm(weights_TK.unsqueeze(1), y_ND[inverse_N].view(T, K, -1)).squeeze(1)


def sorted_mm(x_TD, w13, w2, weights_TK, ids_TK, E):
    order_N, inverse_N, counts_E = sort_copies(ids_TK, E)
    parts = x_TD[order_N // ids_TK.shape[1]].split(counts_E.tolist())
    y_ND = torch.cat([swiglu(x @ a.T) @ b.T for x, a, b in zip(parts, w13, w2, strict=True)])
    return combine(y_ND, inverse_N, weights_TK)


def grouped(x_TD, w13_E2FD, w2_EDF, weights_TK, order_N, inverse_N, ends_E):
    h_NU = F.grouped_mm(x_TD[order_N // weights_TK.shape[1]], w13_E2FD.transpose(1, 2), offs=ends_E)
    return combine(F.grouped_mm(swiglu(h_NU), w2_EDF.transpose(1, 2), offs=ends_E), inverse_N, weights_TK)


def grouped_mm(x_TD, w13_E2FD, w2_EDF, weights_TK, ids_TK, E, form=grouped):
    order_N, inverse_N, counts_E = sort_copies(ids_TK, E)
    return form(x_TD, w13_E2FD, w2_EDF, weights_TK, order_N, inverse_N, counts_E.cumsum(0, dtype=torch.int32))


@cache
def compiled():
    return torch.compile(grouped, dynamic=True, fullgraph=True)


def compiled_mm(*args):
    return grouped_mm(*args, form=compiled())


def batched_mm(x_TD, w13_E2FD, w2_EDF, weights_TK, ids_TK, E):
    order_N, inverse_N, counts_E = sort_copies(ids_TK, E)
    rows, starts_E = counts_E.max().item(), counts_E.cumsum(0) - counts_E
    e_N = ids_TK.flatten()[order_N]
    place_N = e_N * rows + torch.arange(len(order_N)) - starts_E[e_N]
    x_ND = x_TD[order_N // ids_TK.shape[1]]
    x_ERD = x_TD.new_zeros(E * rows, x_TD.shape[1]).index_copy(0, place_N, x_ND).view(E, rows, -1)
    h_ERU = torch.bmm(x_ERD, w13_E2FD.transpose(1, 2))
    y_ERD = torch.bmm(swiglu(h_ERU), w2_EDF.transpose(1, 2))
    return combine(y_ERD.flatten(0, 1), place_N[inverse_N], weights_TK)


def widened_mm(x_TD, w13, w2, weights_TK, ids_TK, E):
    wide = [[w_e.float() for w_e in w] for w in (w13, w2)]
    return sorted_mm(x_TD.float(), *wide, weights_TK.float(), ids_TK, E).to(x_TD.dtype)


Peer = Literal["sorted-mm", "grouped-mm", "batched-mm", "compiled-mm", "widened-mm"]
PEERS = {"sorted-mm": sorted_mm, "grouped-mm": grouped_mm, "batched-mm": batched_mm, "compiled-mm": compiled_mm,
         "widened-mm": widened_mm}  # fmt: skip
BF16_INSTRUCTIONS = any(moe_ext._C.cpu_features()[name] for name in ("avx512bf16", "amx-bf16"))
BF16_ONLY = ("compiled-mm", "widened-mm")
APART = ("sorted-mm", "widened-mm")  # a tensor of weights for each expert; the others have one for all


def peers_of(dtype, named):
    """The peers to time; named: those that the caller asked for, or None."""
    if dtype != torch.bfloat16:
        return [peer for peer in named or PEERS if peer not in BF16_ONLY]
    return list(named or (PEERS if BF16_INSTRUCTIONS else ["widened-mm"]))


# ---- timing ----------------------------------------------------------------------------------------------------------


def clock():
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(function, *args, **options):
    start = clock()
    result = function(*args, **options)
    return clock() - start, result


class Layer:
    """A shape's inputs and weights, with gradients if backward. No other memory is ever taken for them."""

    def __init__(self, shape, dtype, backward, generator):
        T, D, width, E, K = shape
        self.E, self.backward, self.generator, self.leaves = E, backward, generator, []
        self.dy_TD = torch.randn(T, D, generator=generator, dtype=dtype)
        self.x_TD, self.weights_TK = self.leaf(T, D), self.leaf(T, K)
        self.stacked = self.leaf(E, 2 * width, D, scale=D**-0.5), self.leaf(E, D, width, scale=width**-0.5)

    def leaf(self, *size, scale=1.0):
        x = torch.randn(*size, generator=self.generator, dtype=self.dy_TD.dtype).mul_(scale)
        self.leaves.append(x.requires_grad_(self.backward))
        return x

    @cached_property
    def apart(self):
        """The weights as a tensor for each expert."""
        w13, w2 = ([w_e.detach().requires_grad_(self.backward) for w_e in w] for w in self.stacked)
        self.leaves += w13 + w2
        return w13, w2

    @torch.no_grad()
    def update(self):
        """Other weights, as after an optimizer's step: what is made of them is made anew."""
        for w in self.stacked:
            w.neg_()

    def clear(self):
        for leaf in self.leaves:
            leaf.grad = None

    def run(self, contender, ids_TK):
        """-> seconds, y_TD, gradient of x_TD."""
        function, ids_TK = (ours, ids_TK) if contender == "ours" else (PEERS[contender], ids_TK.long())
        weights = self.apart if contender in APART else self.stacked
        self.clear()

        def step():
            y_TD = function(self.x_TD, *weights, self.weights_TK, ids_TK, self.E)
            if self.backward:
                y_TD.backward(self.dy_TD)
            return y_TD

        took, y_TD = seconds(step)
        return took, y_TD.detach(), self.x_TD.grad


def time_layer(name, shape, dtype, backward, rounds, peers):
    """-> one line of the table."""
    generator = torch.Generator().manual_seed(0)
    T, D, width, E, K = shape
    layer = Layer(shape, dtype, backward, generator)
    contenders = ["ours", *peers]
    times = {contender: [] for contender in contenders}
    for round in range(rounds + 1):  # the first warms up and compares
        ids_TK = random(T, K, E, generator)
        layer.update()
        turn = round % len(contenders)
        results = {contender: layer.run(contender, ids_TK) for contender in contenders[turn:] + contenders[:turn]}
        for contender, (took, *tensors) in results.items():
            if round > 0:
                times[contender].append(took)
            elif not all(map(_close, tensors, results["ours"][1:])):
                raise AssertionError(f"{contender} and ours compute different things on {name}")

    line = {"shape": name, **shape._asdict(), "dtype": str(dtype)[6:], "threads": torch.get_num_threads()}
    line |= {"pass": "F+B" if backward else "F", "malloc": "as it is"}
    line["ms"] = {contender: 1e3 * statistics.median(took) for contender, took in times.items()}
    line["gflops"] = 6 * T * K * D * width * (3 if backward else 1) / line["ms"]["ours"] / 1e6
    line["ratio"] = {peer: _ratio(times[peer], times["ours"]) for peer in peers}
    line["ratio_of_best"] = min(line["ratio"].values())
    return line


def _ratio(a, b):
    return statistics.median(map(operator.truediv, a, b))


def _close(got, want):
    return got is None or (got - want).norm() <= 0.03 * want.norm()


# ---- tuned malloc ----------------------------------------------------------------------------------------------------


def in_process(function, *args):
    """function(*args), in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def time_tuned(lines, rounds):
    """Lines of the table again, with a tuned malloc. It stays so: for a process of its own."""
    trim_threshold, mmap_max = -1, -4  # malloc.h
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, 2**31 - 1)):
        raise OSError("mallopt refuses: there is no tuned malloc")
    found = []
    for line in lines:
        torch.set_num_threads(line["threads"])
        peers = [peer for peer in line["ratio"] if peer in ("sorted-mm", best(line))]
        shape, dtype = Shape(*(line[size] for size in Shape._fields)), getattr(torch, line["dtype"])
        timed = time_layer(line["shape"], shape, dtype, line["pass"] == "F+B", rounds, peers)
        found.append(timed | {"malloc": "tuned"})
    return found


# ---- memory ----------------------------------------------------------------------------------------------------------


def resident(which):
    """Bytes of this process: now ("VmRSS") or at most so far ("VmHWM"; ru_maxrss begins with its parent's)."""
    return 1024 * int(re.search(which + r":\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def peak_memory(shape, dtype, contender):
    """-> bytes: the peak of this process after forward and backward, and what was resident before."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    layer = Layer(shape, dtype, True, generator)
    ids_TK, before = random(shape.T, shape.k, shape.E, generator), resident("VmRSS")
    layer.run(contender, ids_TK)
    return resident("VmHWM"), before


def measure_memory(name, shape, dtype, peers):
    """-> one line of the table."""
    peer = next(peer for peer in ("sorted-mm", "widened-mm", *peers) if peer in peers)
    line = {"shape": name, "dtype": str(dtype)[6:], "peer": peer}
    line["weights"] = 3 * shape.E * shape.h * shape.d * dtype.itemsize
    for whose, contender in (("ours", "ours"), ("torch", peer)):
        peak, before = in_process(peak_memory, shape, dtype, contender)
        line[whose] = {"peak": peak, "growth": peak - before}
    line["ratio"] = {of: line["ours"][of] / line["torch"][of] for of in ("peak", "growth")}
    return line


# ---- what is no product ----------------------------------------------------------------------------------------------


def time_shares(name, dtype, rounds):
    """-> two lines of the table, of the forward and of forward and backward."""
    shape, generator = LAYERS[name], torch.Generator().manual_seed(0)
    T, D, _, E, K = shape
    layer = Layer(shape, dtype, True, generator)
    dy_ND = torch.randn(T * K, D, generator=generator).to(dtype)
    times = {"F": [], "F+B": []}
    for _ in range(rounds + 1):
        layer.clear()
        layer.update()
        logits_TE = torch.randn(T, E, generator=generator).requires_grad_()
        router, (weights_TK, ids_TK, _) = seconds(ops.router, logits_TE, K)
        route_index, index = seconds(ops.route_index, ids_TK, E)
        w13, w2 = layer.stacked
        experts, y_TD = seconds(ops.expert_mlp, layer.x_TD, w13, None, w2, weights_TK, index, act="swiglu")
        places = index.order_N, None, index.bins_E
        gather, x_ND = seconds(ops.gather, layer.x_TD, *places, K)
        weighted_sum, _ = seconds(ops.scatter, dy_ND, *places[:2], weights_TK.detach().flatten(), index.bins_E, K)
        forward = {"router": router, "index": route_index, "sums": weighted_sum, "gather": gather,
                   "layer": router + route_index + experts}  # fmt: skip
        backward, _ = seconds(y_TD.backward, layer.dy_TD)
        plain_sum, _ = seconds(x_ND.backward, dy_ND)
        of_router, _ = seconds(ops.router(logits_TE, K)[0].backward, layer.weights_TK)
        both = {"router": of_router, "index": 0.0, "sums": plain_sum, "gather": 2 * gather, "layer": backward}
        times["F"].append(forward)
        times["F+B"].append({part: took + both[part] for part, took in forward.items()})
    found = []
    for of, (_, *rounds) in times.items():  # the first warms up
        line = {"shape": name, "dtype": str(dtype)[6:], "threads": torch.get_num_threads(), "pass": of}
        line["ms"] = 1e3 * statistics.median(took["layer"] for took in rounds)
        for part in ("router", "index", "sums", "gather"):
            line[part] = statistics.median(took[part] / took["layer"] for took in rounds)
        line["share"] = statistics.median((took["router"] + took["index"] + took["sums"]) / took["layer"]
                                          for took in rounds)  # fmt: skip
        found.append(line)
    return found


# ---- movement --------------------------------------------------------------------------------------------------------


def time_movement(dtype, rounds, D=512, K=2, E=16):
    """-> lines of the table: each op's bandwidth over that of a copy."""
    N = 2**24 // (D * dtype.itemsize)
    T = N // K
    x_TD = torch.randn(T, D).to(dtype).requires_grad_()
    x_ND = torch.randn(N, D).to(dtype).requires_grad_()
    weights_N = torch.rand(N).to(dtype).requires_grad_()
    dy_TD, dy_ND, spare_ND = torch.randn(T, D).to(dtype), torch.randn(N, D).to(dtype), torch.empty(N, D, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    times = {}

    def measure(name, rows, function, *args):
        took, result = seconds(function, *args)
        times.setdefault(name, []).append(took / (rows * D * dtype.itemsize))
        return result

    for _ in range(rounds + 1):
        x_TD.grad = x_ND.grad = weights_N.grad = None
        index = ops.route_index(random(T, K, E, generator), E)
        measure("copy", 2 * N, spare_ND.copy_, dy_ND)
        measure("copy to new memory", 2 * N, dy_ND.clone)
        y_ND = measure("gather", 2 * N, ops.gather, x_TD, index.order_N, None, index.bins_E, K)
        measure("gather backward", N + T, y_ND.backward, dy_ND)
        y_TD = measure("scatter", N + T, ops.scatter, x_ND, index.order_N, None, weights_N, index.bins_E, K)
        measure("scatter backward", 2 * N + (N + T), y_TD.backward, dy_TD)  # dx and dweights

    case = {"T": T, "D": D, "K": K, "E": E, "dtype": str(dtype)[6:], "threads": torch.get_num_threads()}
    copy = times["copy"][1:]
    return [
        {"op": op, **case, "gb_per_s": 1e-9 / statistics.median(took), "of_copy": _ratio(copy, took)}
        for op, (_, *took) in times.items()  # the first warms up
    ]


# ---- the report ------------------------------------------------------------------------------------------------------


def best(line):
    """The form of torch that a line's ratio of the best is of."""
    return min(line["ratio"], key=line["ratio"].get)


def bold_below(value, bar, text="{:.2f}"):
    """The value, bold if it is below the bar."""
    return ("{}" if value >= bar else "**{}**").format(text.format(value))


def print_layers(lines):
    heads = " | ".join(f"x {peer}" for peer in PEERS)
    print(f"\n| shape | dtype | threads | malloc | pass | ours ms | GFLOP/s | {heads} | x best | its ms |\n"
          + "|---" * 14 + "|")  # fmt: skip
    for l in lines:
        case = f"{l['shape']} | {l['dtype']} | {l['threads']} | {l['malloc']} | {l['pass']}"
        peers = " | ".join(f"{l['ratio'][p]:.2f}" if p in l["ratio"] else "-" for p in PEERS)
        first = f"{bold_below(l['ratio_of_best'], 1)} | {l['ms'][best(l)]:.1f}"
        print(f"| {case} | {l['ms']['ours']:.1f} | {l['gflops']:.0f} | {peers} | {first} |")
    below = sum(l["ratio_of_best"] < 1 for l in lines)
    print(f"\nBelow the best form of torch: {below} of {len(lines)} lines.", flush=True)


def print_memory(lines):
    print("\n| memory | dtype | weights MB | beside | peak MB, ours | torch | x | growth MB, ours | torch | x |\n"
          + "|---" * 10 + "|")  # fmt: skip
    for l in lines:
        both = (f"{l['ours'][of] / 1e6:.0f} | {l['torch'][of] / 1e6:.0f} | {l['ratio'][of]:.2f}"
                for of in ("peak", "growth"))  # fmt: skip
        print(f"| {l['shape']} | {l['dtype']} | {l['weights'] / 1e6:.0f} | {l['peer']} | {' | '.join(both)} |")


def print_shares(lines):
    print("\n| of the layer | dtype | threads | pass | ms | router | index | sums | together | a gather of its own |\n"
          + "|---" * 10 + "|")  # fmt: skip
    for l in lines:
        parts = " | ".join(f"{l[part]:.1%}" for part in ("router", "index", "sums", "share", "gather"))
        print(f"| {l['shape']} | {l['dtype']} | {l['threads']} | {l['pass']} | {l['ms']:.1f} | {parts} |")


def print_movement(lines):
    print("\n| op | dtype | threads | GB/s | of copy |\n|---|---|---|---|---|")
    for l in lines:
        print(f"| {l['op']} | {l['dtype']} | {l['threads']} | {l['gb_per_s']:.1f} | {l['of_copy']:.2f} |")


def commit():
    """Of the working tree, or what COMMIT says where that has no git; "unknown" without either."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return git.stdout.strip() or os.environ.get("COMMIT") or "unknown"


def machine():
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        **moe_ext._C.versions(),
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main(
    shapes: tuple[str, ...] = tuple(LAYERS),
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16"),
    threads: tuple[int, ...] = (1, 2),
    peers: tuple[Peer, ...] | None = None,
    rounds: int = 5,
    tuned: bool = True,
    memory: bool = True,
    out: Path = Path("benchmarks/results"),
):
    """Time the layer and the movement ops, and measure the layer's memory.

    Args:
        shapes: names of layer shapes in tests/cases.py.
        dtypes: of activations and weights.
        threads: numbers of threads, each timed.
        peers: the forms of plain torch to compare with; at least one that takes fp32, if fp32 is timed. By default
            all, but in bf16 only widened-mm where the CPU has no bf16 instructions.
        rounds: timed rounds per line, after one that warms up.
        tuned: all lines of the layer again under a tuned malloc.
        memory: measure it.
        out: folder of the JSON file.
    """
    report = {**machine(), "layers": [], "tuned": [], "memory": [], "shares": [], "movement": []}
    print(f"{report['cpu']}, {report['isa']}, torch {report['torch']}, commit {report['commit']}", flush=True)
    if "bf16" in dtypes and not peers and not BF16_INSTRUCTIONS:
        print("\nThis CPU has no bf16 instructions: torch's own bf16 products are left out.")
    kinds = [DTYPES[name] for name in dtypes]
    for n in threads:
        torch.set_num_threads(n)
        for dtype in kinds:
            report["movement"] += time_movement(dtype, 2 * rounds)
            report["shares"] += time_shares(SHARES_OF, dtype, 2 * rounds)
            for name in shapes:
                report["layers"] += [time_layer(name, LAYERS[name], dtype, backward, rounds, peers_of(dtype, peers))
                                     for backward in (False, True)]  # fmt: skip
    print_layers(report["layers"])
    if tuned:
        report["tuned"] = in_process(time_tuned, report["layers"], rounds)
        print_layers(report["tuned"])
    if memory:
        report["memory"] = [measure_memory(name, LAYERS[name], dtype, peers_of(dtype, peers))
                            for dtype in kinds for name in shapes]  # fmt: skip
        print_memory(report["memory"])
    print_shares(report["shares"])
    print_movement(report["movement"])
    write(report, out, f"{{cpu}}-{report['commit']}.json")


def write(report, out, name):
    """The report into the folder `out`. {cpu} in `name` becomes that of the report and its instruction set: a cloud may
    name nothing of a CPU but its maker.
    """
    out.mkdir(parents=True, exist_ok=True)
    cpu = re.sub(r"[^a-z0-9]+", "-", f"{report['cpu']} {report['isa']}".lower()).strip("-")
    path = out / name.format(cpu=cpu)
    path.write_text(lines(report) + "\n")
    print(f"\n{path}")


def lines(value, indent="\n"):
    """JSON, a line for each entry of a table and each item of a list; numbers and what else holds none on one."""
    if isinstance(value, dict) and value:
        items = [f"{json.dumps(key)}: {lines(of, indent + ' ')}" for key, of in value.items()]
    elif isinstance(value, (list, tuple)) and any(isinstance(item, (dict, list, tuple)) for item in value):
        items = [json.dumps(item) for item in value]
    else:
        return json.dumps(value)
    begin, end = "{}" if isinstance(value, dict) else "[]"
    return f"{begin}{indent} " + f",{indent} ".join(items) + f"{indent}{end}"


if __name__ == "__main__":
    import tyro  # not above: benchmarks.gpu, which imports this file, runs without it

    tyro.cli(main)
