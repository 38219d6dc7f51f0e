"""The expert layer and the movement ops, timed beside plain torch: `make bench`, or python -m benchmarks.ops --help.

Layer: route_index + expert_mlp (SwiGLU), forward and forward + backward, on the shapes of tests/cases.py, against
  sorted-mm    tokens sorted by expert, torch.mm on each contiguous segment; experts are separate parameters
  grouped-mm   the same with torch.nn.functional.grouped_mm on stacked weights
  widened-mm   bf16 only: sorted-mm in fp32, the better form on a CPU without bf16 instructions. There the other two
               take minutes in bf16 and are left out, which the report says, unless --peers names them
Every round draws a new routing, and each contender runs once on it, so that all see the same load of the machine. A
ratio is the median over rounds of (their time / our time): above 1 we are faster. With one thread the time is the
process's CPU time, which a loaded machine disturbs least; with more it is wall time.

Movement: the share of the bandwidth of a copy between buffers of the size of the expert rows (16 MiB). Rows are counted
once for each copy that is read or written.

Prints Markdown, writes benchmarks/results/<cpu>-<commit>.json.
"""

import json
import operator
import os
import platform
import re
import statistics
import subprocess
import time
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

import moe_ext
from moe_ext import ops
from tests.cases import LAYERS, random

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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


def grouped_mm(x_TD, w13_E2FD, w2_EDF, weights_TK, ids_TK, E):
    order_N, inverse_N, counts_E = sort_copies(ids_TK, E)
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    h_NU = F.grouped_mm(x_TD[order_N // ids_TK.shape[1]], w13_E2FD.transpose(1, 2), offs=ends_E)
    return combine(F.grouped_mm(swiglu(h_NU), w2_EDF.transpose(1, 2), offs=ends_E), inverse_N, weights_TK)


def widened_mm(x_TD, w13, w2, weights_TK, ids_TK, E):
    wide = [[w_e.float() for w_e in w] for w in (w13, w2)]
    return sorted_mm(x_TD.float(), *wide, weights_TK.float(), ids_TK, E).to(x_TD.dtype)


PEERS = {"sorted-mm": sorted_mm, "grouped-mm": grouped_mm, "widened-mm": widened_mm}
BF16_INSTRUCTIONS = any(moe_ext._C.cpu_features()[name] for name in ("avx512bf16", "amx-bf16"))
STACKED = ("ours", "grouped-mm")  # one tensor of weights for all experts; the others have one for each


def peers_of(dtype, named):
    """The peers to time; named: those that the caller asked for, or None."""
    if dtype != torch.bfloat16:
        return [peer for peer in named or PEERS if peer != "widened-mm"]
    return list(named or (PEERS if BF16_INSTRUCTIONS else ["widened-mm"]))


# ---- timing ----------------------------------------------------------------------------------------------------------


def clock():
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(function, *args):
    start = clock()
    result = function(*args)
    return clock() - start, result


def time_layer(name, dtype, backward, rounds, named):
    """-> one line of the table."""
    shape = LAYERS[name]
    T, D, width, E, K = shape
    generator = torch.Generator().manual_seed(0)

    def randn(*size, scale=1.0):
        return (torch.randn(*size, generator=generator) * scale).to(dtype).requires_grad_(backward)

    x_TD, weights_TK = randn(T, D), randn(T, K)
    w13, w2 = randn(E, 2 * width, D, scale=D**-0.5), randn(E, D, width, scale=width**-0.5)
    dy_TD = torch.randn(T, D, generator=generator).to(dtype)
    stacked = (w13, w2)
    apart = tuple([w_e.detach().clone().requires_grad_(backward) for w_e in w] for w in stacked)
    peers = peers_of(dtype, named)
    contenders = {"ours": ours, **{peer: PEERS[peer] for peer in peers}}

    def run(contender, ids_TK):
        weights = stacked if contender in STACKED else apart
        for leaf in (x_TD, weights_TK, *stacked, *apart[0], *apart[1]):
            leaf.grad = None

        def step():
            y_TD = contenders[contender](x_TD, *weights, weights_TK, ids_TK, E)
            if backward:
                y_TD.backward(dy_TD)
            return y_TD

        took, y_TD = seconds(step)
        return took, y_TD.detach(), x_TD.grad

    times = {contender: [] for contender in contenders}
    for round in range(rounds + 1):  # the first warms up and compares
        ids_TK = random(T, K, E, generator)
        ids = {"ours": ids_TK, **dict.fromkeys(peers, ids_TK.long())}
        results = {contender: run(contender, ids[contender]) for contender in contenders}
        for contender, (took, *tensors) in results.items():
            if round > 0:
                times[contender].append(took)
            elif not all(map(_close, tensors, results["ours"][1:])):
                raise AssertionError(f"{contender} and ours compute different things on {name}")

    line = {"shape": name, **shape._asdict(), "dtype": str(dtype)[6:], "threads": torch.get_num_threads()}
    line["pass"] = "F+B" if backward else "F"
    line["ms"] = {contender: 1e3 * statistics.median(took) for contender, took in times.items()}
    line["gflops"] = 6 * T * K * D * width * (3 if backward else 1) / line["ms"]["ours"] / 1e6
    line["ratio"] = {peer: _ratio(times[peer], times["ours"]) for peer in peers}
    line["ratio_of_best"] = min(line["ratio"].values())
    return line


def _ratio(a, b):
    return statistics.median(map(operator.truediv, a, b))


def _close(got, want):
    return got is None or (got - want).norm() <= 0.03 * want.norm()


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


def print_layers(lines):
    heads = " | ".join(f"{peer} ms | x" for peer in PEERS)
    print(f"| shape | dtype | threads | pass | ours ms | GFLOP/s | {heads} | x best |\n" + "|---" * 13 + "|")
    for l in lines:
        case = f"{l['shape']} | {l['dtype']} | {l['threads']} | {l['pass']}"
        ours = f"{l['ms']['ours']:.1f} | {l['gflops']:.0f}"
        peers = " | ".join(f"{l['ms'][p]:.1f} | {l['ratio'][p]:.2f}" if p in l["ratio"] else "- | -" for p in PEERS)
        print(f"| {case} | {ours} | {peers} | {l['ratio_of_best']:.2f} |")


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
    peers: tuple[Literal["sorted-mm", "grouped-mm", "widened-mm"], ...] | None = None,
    rounds: int = 5,
    out: Path = Path("benchmarks/results"),
):
    """Time the layer and the movement ops.

    Args:
        shapes: names of layer shapes in tests/cases.py.
        dtypes: of activations and weights.
        threads: numbers of threads, each timed.
        peers: the forms of plain torch to compare with; at least one that takes fp32, if fp32 is timed. By default
            all, but in bf16 only widened-mm where the CPU has no bf16 instructions.
        rounds: timed rounds per line, after one that warms up.
        out: folder of the JSON file.
    """
    report = {**machine(), "layers": [], "movement": []}
    for n in threads:
        torch.set_num_threads(n)
        for dtype in (DTYPES[name] for name in dtypes):
            report["movement"] += time_movement(dtype, 2 * rounds)
            for name in shapes:
                report["layers"] += [time_layer(name, dtype, backward, rounds, peers) for backward in (False, True)]
    print(f"{report['cpu']}, {report['isa']}, torch {report['torch']}, commit {report['commit']}\n")
    if "bf16" in dtypes and not peers and not BF16_INSTRUCTIONS:
        print("This CPU has no bf16 instructions: torch's own bf16 products are left out.\n")
    print_layers(report["layers"])
    print_movement(report["movement"])
    write(report, out, f"{{cpu}}-{report['commit']}.json")


def write(report, out, name):
    """The report into the folder `out`; {cpu} in `name` becomes that of the report."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / name.format(cpu=re.sub(r"[^a-z0-9]+", "-", report["cpu"].lower()).strip("-"))
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
