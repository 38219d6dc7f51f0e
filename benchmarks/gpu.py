"""The ops on a GPU beside torch's own: `make gpu PART=bench`, or python -m benchmarks.gpu --help.

Grouped GEMM, each of its three forms alone (bf16, the up and the down projection of a layer), against
  bmm          cuBLAS batched on equal shares: the same FLOPs without raggedness; mm: one product of the same FLOPs
  grouped-mm   torch.nn.functional.grouped_mm          loop   one torch.mm per expert, counts already on the host
  cublas       one cublasGemmEx per expert, called from C, which copies the counts to the host first
  mma.sync     ours without the kernels that only Hopper has, on Hopper
Layer: route_index + expert_mlp (SwiGLU), forward and forward + backward, against
  bound        bmm, activation, bmm and a sum over K on equal shares: no routing at all
  grouped-mm, loop    as in benchmarks/ops.py; and mma.sync
Peak: the memory that a layer takes beside its arguments, of ours and of mma.sync.
Kernels: what a layer's forward and backward, with biases and a router, spends its time on, by torch.profiler; of passes
over rows the share of the bandwidth of a copy.
Ran: which way ours went (cuda/policy_sm90.cuh): gemm.cuh is mma.sync, sm90 TMA and wgmma with a tile of that size.
Movement: share of the bandwidth of a copy of the expert rows, rows counted once for each copy read or written.
Other ops: against the same in plain torch.

FLOPs: 2*R*I*O of a product; 6*T*K*D*F of a layer's forward and 12 of its backward. Roofline: the larger of FLOPs over
the card's dense peak and least bytes over the copy bandwidth of this run. Routings: balanced (shuffled), and Zipf's law
with its few large experts; drawn anew every round. Each round, every contender runs once on the same routing, after
2 GB of writes that empty the L2 cache and keep the device busy for half a millisecond, so that the host runs ahead,
through autograd too; times are CUDA events, medians over the rounds.

Prints Markdown, and writes it with the figures to benchmarks/results/<device>-<commit>.{md,json} after every job; says
on stderr what it has done. A shape takes about 6 s for each routing, the default shapes two and a half minutes; --all
adds larger ones, up to 80 GB of memory. --limit SECONDS leaves out, and says, what would begin later: the figures that
say most come first. --without leaves out what rests on these kernels, by the names of tests/gpu/hopper.py.
--dry runs all of it on tiny shapes on the CPU, where times mean nothing.
"""

import argparse
import functools
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import moe_ext
from benchmarks.ops import commit, grouped_mm, ours, sorted_mm, swiglu
from moe_ext import ops
from tests import cublas
from tests.cases import Shape, balanced, skewed

SHAPES = {  # T, d, h, E, k; those that say most first
    "qwen3-30b-32k": Shape(32768, 2048, 768, 128, 8),
    "olmoe": Shape(32768, 2048, 1024, 64, 8),
    "mixtral": Shape(8192, 4096, 14336, 8, 2),
    "seed": Shape(2048, 768, 3072, 4, 2),
    "sonic-7b-1024": Shape(24576, 1536, 1024, 32, 2),
    "sonic-7b-512": Shape(24576, 1536, 512, 64, 4),
    "sonic-7b-256": Shape(24576, 1536, 256, 128, 8),
    "qwen3-30b-8k": Shape(8192, 2048, 768, 128, 8),
    "sonic-30b-256": Shape(32768, 4096, 256, 256, 16),
    "sonic-30b-512": Shape(32768, 4096, 512, 128, 8),
    "sonic-30b-1024": Shape(32768, 4096, 1024, 64, 4),
}
NEEDS = {  # line -> beginnings of the names in tests/gpu/hopper.py
    "forward": ("rows",), "dgrad": ("rows",), "wgrad": ("sums",), "F": ("rows", "mlp gated"),
    "F+B": ("rows", "sums", "mlp"),
}  # fmt: skip
MORE_SHAPES = {  # with --all
    "sonic-1.4b-256": Shape(40960, 768, 256, 128, 8),
    "sonic-1.4b-512": Shape(40960, 768, 512, 64, 4),
    "sonic-1.4b-1024": Shape(40960, 768, 1024, 32, 2),
    "sonic-120b-512": Shape(32768, 4096, 512, 256, 16),
    "sonic-120b-1024": Shape(32768, 4096, 1024, 128, 8),
    "sonic-120b-2048": Shape(32768, 4096, 2048, 64, 4),
    "deepseek-v3": Shape(8192, 7168, 2048, 256, 8),
}
DRY_SHAPES = {"dry": Shape(64, 32, 48, 4, 2)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PEAKS = {  # dense FLOP/s by a part of the card's name: of two-byte floats, of fp32
    "H100 PCIe": (756e12, 51e12), "H100": (989e12, 67e12), "H200": (989e12, 67e12), "A100": (312e12, 19.5e12),
}  # fmt: skip


def shuffled(T, K, E, generator):
    """Equal shares, in another order every time."""
    order_T = torch.randperm(T, generator=generator, device=generator.device)
    return balanced(T, K, E, generator).to(generator.device)[order_T]


ROUTINGS = {"balanced": shuffled, "zipf": skewed}


# ---- timing ----------------------------------------------------------------------------------------------------------


class Bench:
    """What every section needs: the device, its clock and random numbers, and the report that they fill."""

    def __init__(self, options):
        self.device = torch.device("cpu" if options.dry else "cuda")
        self.dtype, self.seconds = DTYPES[options.dtype], options.seconds
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.scratch = torch.empty(1 if options.dry else 256 << 20, dtype=torch.uint8, device=self.device)
        self.name = "dry run" if options.dry else torch.cuda.get_device_name()
        two, four = next((peaks for part, peaks in PEAKS.items() if part in self.name), (None, None))
        self.peak_flops = four if self.dtype == torch.float32 else two
        self.without = tuple(options.without)
        self.report = {
            "device": self.name, "commit": commit(), "torch": torch.__version__, "python": platform.python_version(),
            "dtype": options.dtype, "gpu": gpu_state(), **{section: [] for section in COLUMNS},
            "left out": [],
        }  # fmt: skip
        self.copy_bandwidth = self.state = self.ran = None
        self.peak = {}
        self.cublas = None if options.dry else cublas.load()
        self.hopper = self.cublas is not None and torch.cuda.get_device_capability() == (9, 0)

    def warm_up(self):
        """Two seconds of dense products: the clocks of sustained load."""
        if self.device.type == "cuda":
            a, begin = self.randn(4096, 4096), time.perf_counter()
            while time.perf_counter() - begin < 2:
                for _ in range(20):
                    a @ a
                self.wait()

    def randn(self, *size, scale=1.0, grad=False):
        x = torch.randn(*size, generator=self.generator, device=self.device, dtype=self.dtype)
        return (x * scale).requires_grad_(grad)

    def stamp(self):
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed(self, start, end):
        """Seconds; all work is done."""
        return end - start if self.device.type == "cpu" else start.elapsed_time(end) / 1e3

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def rests_on_broken(self, what, *names):
        """Whether a line needs a kernel that is to be left out; the report says so."""
        broken = [name for name in self.without if name.startswith(NEEDS[what])]
        if broken:
            self.report["left out"].append(f"{' '.join([*names, what])} (without {', '.join(broken)})")
        return bool(broken)

    def and_mma_sync(self, contenders):
        """On Hopper ours again, the way of older cards."""
        if self.hopper:
            contenders["mma.sync"] = cublas.forced(self.cublas, "gemm.cuh", contenders["ours"])
        return contenders

    def race(self, contenders, draw, alike, least=3):
        """Median seconds of each contender, and of those that fail, why.

        contenders: {name: function of what draw() returns}, "ours" first; a round calls draw once. alike: names whose
        result must be that of "ours"; the first round, which warms up, compares them.
        """
        failed, times, want = {}, {name: [] for name in contenders}, None
        begin, rounds, self.peak = time.perf_counter(), 0, {}
        while rounds < least or (time.perf_counter() - begin < self.seconds and rounds < 200):
            drawn, stamps = draw(), {}
            self.wait()
            for name, function in contenders.items():
                if name in failed:
                    continue
                try:
                    for _ in range(8):
                        self.scratch.zero_()
                    held = self.held(reset=True)
                    start = self.stamp()
                    if rounds == 0 and name == "ours" and self.cublas:
                        result, self.ran = cublas.ways(self.cublas, functools.partial(function, drawn))
                    else:
                        result = function(drawn)
                    stamps[name] = start, self.stamp()
                    if rounds == 0:
                        self.peak[name] = self.held() - held
                    if rounds == 0 and name == "ours":
                        want = result
                    elif rounds == 0 and name in alike and not alike_enough(result, want):
                        failed[name] = "its result is another than ours"
                except (RuntimeError, ValueError, TypeError) as error:      # out of memory, or not taken by torch
                    failed[name] = str(error).splitlines()[0][:200]
                result = None
            self.wait()
            for name, (start, end) in stamps.items():
                times[name].append(self.elapsed(start, end))
            want, rounds = None, rounds + 1
        return {name: statistics.median(took[1:]) for name, took in times.items() if name not in failed}, failed

    def held(self, reset=False):
        """Bytes of tensors at most since the last reset; at a reset those of now."""
        if self.device.type == "cpu":
            return 0
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()

    def line(self, section, head, seconds, failed, work, **more):
        """Adds one line to a section. work: FLOPs and least bytes of one call."""
        flops, size = work
        line = {**head, "ms": {name: 1e3 * s for name, s in seconds.items()}, "failed": failed, **more}
        line["gpu"], line["ran"] = self.state, self.ran
        if "ours" in seconds:
            least = [size / self.copy_bandwidth] if self.copy_bandwidth else []
            least += [flops / self.peak_flops] if self.peak_flops else []
            line["tflops"], line["gbps"] = flops / seconds["ours"] / 1e12, size / seconds["ours"] / 1e9
            line["roofline"] = max(least) / seconds["ours"] if least else None
            line["ratio"] = {name: s / seconds["ours"] for name, s in seconds.items() if name != "ours"}
        self.report[section].append(line)


def alike_enough(got, want):
    got, want = (r if isinstance(r, tuple) else (r,) for r in (got, want))
    return all((g - w).float().norm() <= 0.03 * w.float().norm() for g, w in zip(got, want, strict=True))


def gpu_state():
    """Clocks, watts, heat and driver, as nvidia-smi has them; None without it."""
    fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu,driver_version"
    try:
        done = subprocess.run(["nvidia-smi", "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader"],
                              capture_output=True, text=True, timeout=20)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


# ---- grouped GEMM ----------------------------------------------------------------------------------------------------


def loop_forward(x_RI, w_EIO, counts):
    y_RO = torch.empty(len(x_RI), w_EIO.shape[2], dtype=x_RI.dtype, device=x_RI.device)
    for x, w, y in zip(x_RI.split(counts), w_EIO, y_RO.split(counts), strict=True):
        torch.mm(x, w, out=y)
    return y_RO


def loop_wgrad(x_RI, dy_RO, counts):
    dw_EIO = torch.empty(len(counts), x_RI.shape[1], dy_RO.shape[1], dtype=x_RI.dtype, device=x_RI.device)
    for x, dy, dw in zip(x_RI.split(counts), dy_RO.split(counts), dw_EIO, strict=True):
        torch.mm(x.T, dy, out=dw)
    return dw_EIO


def cublas_forward(table, x_RI, w_EIO, bins_E):
    return cublas.grouped_gemm(table, x_RI, w_EIO, bins_E, x_RI.new_empty(len(x_RI), w_EIO.shape[2]))


def cublas_wgrad(table, x_RI, dy_RO, bins_E):
    dw_EIO = x_RI.new_empty(len(bins_E), x_RI.shape[1], dy_RO.shape[1])
    return cublas.grouped_gemm_wgrad(table, x_RI, dy_RO, bins_E, dw_EIO)


def bench_gemm(bench, name, shape, routing):
    T, D, width, E, K = shape
    for projection, I, O in (("up", D, 2 * width), ("down", width, D)):
        R = T * K
        x_RI, dy_RO = bench.randn(R, I), bench.randn(R, O)
        w_EOI = bench.randn(E, O, I, scale=I**-0.5)     # as a layer keeps it
        w_EIO = w_EOI.transpose(1, 2)
        share = R // E * E
        x_ECI, dy_ECO = (t[:share].view(E, R // E, -1) for t in (x_RI, dy_RO))
        forms = {
            "forward": {
                "ours": lambda r, x=x_RI, w=w_EIO: ops.grouped_gemm(x, w, r.bins_E),
                "bmm": lambda r, x=x_ECI, w=w_EIO: torch.bmm(x, w),
                "mm": lambda r, x=x_RI, w=w_EIO: x @ w[0],
                "grouped-mm": lambda r, x=x_RI, w=w_EIO: F.grouped_mm(x, w, offs=r.bins_E),
                "loop": lambda r, x=x_RI, w=w_EIO: loop_forward(x, w, r.counts),
                "cublas": lambda r, x=x_RI, w=w_EIO: cublas_forward(bench.cublas, x, w, r.bins_E),
            },
            "dgrad": {
                "ours": lambda r, dy=dy_RO, w=w_EOI: ops.grouped_gemm(dy, w, r.bins_E),
                "bmm": lambda r, dy=dy_ECO, w=w_EOI: torch.bmm(dy, w),
                "mm": lambda r, dy=dy_RO, w=w_EOI: dy @ w[0],
                "grouped-mm": lambda r, dy=dy_RO, w=w_EOI: F.grouped_mm(dy, w, offs=r.bins_E),
                "loop": lambda r, dy=dy_RO, w=w_EOI: loop_forward(dy, w, r.counts),
                "cublas": lambda r, dy=dy_RO, w=w_EOI: cublas_forward(bench.cublas, dy, w, r.bins_E),
            },
            "wgrad": {
                "ours": lambda r, x=x_RI, dy=dy_RO: ops.grouped_gemm_wgrad(x, dy, r.bins_E),
                "bmm": lambda r, x=x_ECI, dy=dy_ECO: torch.bmm(x.transpose(1, 2), dy),
                "mm": lambda r, x=x_RI, dy=dy_RO: x.T @ dy,
                "grouped-mm": lambda r, x=x_RI, dy=dy_RO: F.grouped_mm(x.T, dy, offs=r.bins_E),
                "loop": lambda r, x=x_RI, dy=dy_RO: loop_wgrad(x, dy, r.counts),
                "cublas": lambda r, x=x_RI, dy=dy_RO: cublas_wgrad(bench.cublas, x, dy, r.bins_E),
            },
        }
        work = 2 * R * I * O, (R * I + E * I * O + R * O) * bench.dtype.itemsize
        for form, contenders in forms.items():
            if bench.rests_on_broken(form, "gemm", name, routing, projection):
                continue
            if not bench.cublas:        # a dry run, which has no GPU
                del contenders["cublas"]
            seconds, failed = bench.race(bench.and_mma_sync(contenders), Routed(bench, shape, routing),
                                         {"grouped-mm", "loop", "cublas", "mma.sync"})  # fmt: skip
            head = dict(shape=name, **shape._asdict(), projection=projection, form=form, routing=routing, rows=R)
            bench.line("gemm", head, seconds, failed, work)


class Routed:
    """Draws a routing: ids_TK, index, inclusive bins_E and their counts on the host."""

    def __init__(self, bench, shape, routing):
        self.bench, self.shape, self.routing = bench, shape, ROUTINGS[routing]

    def __call__(self):
        T, _, _, E, K = self.shape
        self.ids_TK = self.routing(T, K, E, self.bench.generator)
        self.index = ops.route_index(self.ids_TK, E)
        self.bins_E, self.counts = self.index.bins_E, self.index.counts_E.tolist()
        return self


# ---- the layer -------------------------------------------------------------------------------------------------------


def bound(x_ECD, w13_E2FD, w2_EDF, weights_TK):
    """The layer's arithmetic on equal shares: what no routing can beat with these products."""
    E, C, D = x_ECD.shape
    K = weights_TK.shape[1]
    a_NF = swiglu(torch.bmm(x_ECD, w13_E2FD.transpose(1, 2)).flatten(0, 1))
    y_ECD = torch.bmm(a_NF.view(E, C, -1), w2_EDF.transpose(1, 2))
    return (y_ECD.view(-1, K, D) * weights_TK[: E * C // K, :, None]).sum(1)


def bench_layer(bench, name, shape, routing, backward):
    T, D, width, E, K = shape
    if bench.rests_on_broken("F+B" if backward else "F", "layer", name, routing):
        return
    x_TD, weights_TK = bench.randn(T, D, grad=backward), bench.randn(T, K, grad=backward)
    w13, w2 = bench.randn(E, 2 * width, D, scale=D**-0.5), bench.randn(E, D, width, scale=width**-0.5)
    C = T * K // E // K * K
    x_ECD = bench.randn(E, C, D, grad=backward)
    leaves = [x_TD, weights_TK, w13.requires_grad_(backward), w2.requires_grad_(backward), x_ECD]
    dy_TD = bench.randn(T, D)

    def step(forward):
        for leaf in leaves:
            leaf.grad = None
        y_TD = forward()
        if not backward:
            return y_TD
        y_TD.backward(dy_TD[: len(y_TD)])
        return y_TD.detach(), x_TD.grad

    def routed(layer):
        return lambda r: step(lambda: layer(x_TD, w13, w2, weights_TK, r.ids_TK, E))

    contenders = {"ours": routed(ours), "bound": lambda r: step(lambda: bound(x_ECD, w13, w2, weights_TK)),
                  "grouped-mm": routed(on_long_ids(grouped_mm)), "loop": routed(on_long_ids(sorted_mm))}  # fmt: skip
    seconds, failed = bench.race(bench.and_mma_sync(contenders), Routed(bench, shape, routing),
                                 {"grouped-mm", "loop", "mma.sync"}, least=6)  # fmt: skip
    peak = {contender: bench.peak[contender] for contender in seconds if contender in ("ours", "mma.sync")}
    N, size = T * K, bench.dtype.itemsize
    work = 6 * N * D * width * (3 if backward else 1), size * (2 * T * D + 3 * E * D * width + 2 * N * width)
    head = dict(shape=name, **shape._asdict(), routing=routing)
    bench.line("layer", head | {"pass": "F+B" if backward else "F"}, seconds, failed, work, peak=peak)


def on_long_ids(layer):
    return lambda x, w13, w2, weights, ids_TK, E: layer(x, w13, w2, weights, ids_TK.long(), E)


def bench_kernels(bench, name, shape, rounds=5):
    """A layer with all that it may have, by kernel: milliseconds of one forward and backward."""
    T, D, width, E, K = shape
    if bench.rests_on_broken("F+B", "kernels", name):
        return
    x_TD, logits_TE = bench.randn(T, D, grad=True), bench.randn(T, E, grad=True)
    w13, w2 = bench.randn(E, 2 * width, D, scale=D**-0.5, grad=False), bench.randn(E, D, width, scale=width**-0.5)
    biases = bench.randn(E, 2 * width), bench.randn(E, D)
    leaves, dy_TD = [x_TD, logits_TE, w13, w2, *biases], bench.randn(T, D)
    for leaf in leaves:
        leaf.requires_grad_()

    def step():
        for leaf in leaves:
            leaf.grad = None
        weights_TK, ids_TK, _ = ops.router(logits_TE, K, norm_p=1.0)
        index = ops.route_index(ids_TK, E)
        y_TD = ops.expert_mlp(x_TD, w13, None, w2, weights_TK, index, act="swiglu", gate_bias=biases[0],
                              down_bias=biases[1])  # fmt: skip
        y_TD.backward(dy_TD)

    for _ in range(2):
        step()
    bench.wait()
    cpu, activity = bench.device.type == "cpu", torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU if cpu else activity.CUDA]) as profile:
        for _ in range(rounds):
            step()
        bench.wait()
    took = {of.key: (of.count, of.self_cpu_time_total if cpu else of.self_device_time_total)
            for of in profile.key_averages() if cpu or of.device_type == torch.autograd.DeviceType.CUDA}  # fmt: skip
    every, N, size = sum(microseconds for _, microseconds in took.values()), T * K, bench.dtype.itemsize
    moved = {"sort_rows_kernel": 2 * N * D, "dact_kernel": 6 * N * width, "sum_slots_kernel": (N + T) * D}
    for kernel, (calls, microseconds) in sorted(took.items(), key=lambda item: -item[1][1]):
        elements = next((n for part, n in moved.items() if part in kernel), 0)
        gbps = elements * size * calls / microseconds / 1e3 if microseconds else 0
        of_copy = gbps * 1e9 / bench.copy_bandwidth if elements and bench.copy_bandwidth else None
        line = dict(shape=name, kernel=kernel[:160], calls=calls / rounds, ms={"ours": microseconds / rounds / 1e3})
        line |= dict(share=microseconds / every, gbps=gbps, roofline=of_copy, failed={}, ran=None, gpu=bench.state)
        bench.report["kernels"].append(line | {"of layer": f"{microseconds / every:.1%}"})


# ---- movement and the rest -------------------------------------------------------------------------------------------


def bench_movement(bench, shape):
    T, D, _, E, K = shape
    N = T * K
    x_TD, x_ND = bench.randn(T, D, grad=True), bench.randn(N, D, grad=True)
    weights_N, dy_ND, dy_TD = bench.randn(N, grad=True), bench.randn(N, D), bench.randn(T, D)
    spare_ND = torch.empty_like(dy_ND)

    def gather(r):
        return ops.gather(x_TD, r.index.order_N, None, r.bins_E, K)

    def scatter(r):
        return ops.scatter(x_ND, r.index.order_N, None, weights_N, r.bins_E, K)

    draw = Routed(bench, shape, "balanced")

    def drawn_with(forward):
        def call():
            r = draw()
            r.y = forward(r)
            return r

        return call

    runs = {  # rows that are read and written, the call, what is drawn before
        "copy": (2 * N, lambda r: spare_ND.copy_(dy_ND), draw),
        "gather": (2 * N, gather, draw),
        "gather backward": (N + T, lambda r: torch.autograd.grad(r.y, x_TD, dy_ND), drawn_with(gather)),
        "scatter": (N + T, scatter, draw),
        "scatter backward": (
            2 * N + (N + T), lambda r: torch.autograd.grad(r.y, (x_ND, weights_N), dy_TD), drawn_with(scatter)
        ),
    }  # fmt: skip
    for name, (rows, call, drawn) in runs.items():
        seconds, failed = bench.race({"ours": call}, drawn, set())
        size = rows * D * bench.dtype.itemsize
        if name == "copy" and seconds:
            bench.copy_bandwidth = size / seconds["ours"]
        bench.line("movement", dict(op=name, T=T, D=D, K=K, E=E), seconds, failed, (0, size))


def torch_router(logits_TE, K):
    weights_TK, ids_TK = logits_TE.softmax(1).topk(K)
    return weights_TK / weights_TK.sum(1, keepdim=True), ids_TK


def bench_other(bench, shape, vocabulary):
    T, D, _, E, K = shape
    logits_TE = torch.randn(T, E, generator=bench.generator, device=bench.device)
    rows = min(T, 8192)
    x_TD, w_VD = bench.randn(rows, D, grad=True), bench.randn(vocabulary, D, scale=D**-0.5, grad=True)
    targets_T = torch.randint(vocabulary, (rows,), generator=bench.generator, device=bench.device)

    def head(loss):
        return torch.autograd.grad(loss, (x_TD, w_VD))

    gate_x_TD, gate_w_ED = bench.randn(T, D, grad=True), bench.randn(E, D, scale=D**-0.5).float().requires_grad_()

    def gate(product):
        y_TE = product(gate_x_TD, gate_w_ED)
        return y_TE.detach(), *torch.autograd.grad(y_TE, (gate_x_TD, gate_w_ED), logits_TE)

    runs = {
        "router": (
            lambda r: ops.router(logits_TE, K, norm_p=1.0)[0], lambda r: torch_router(logits_TE, K)[0],
            (0, 2 * logits_TE.numel() * 4),
        ),
        "router's logits, F+B": (
            lambda r: gate(ops.router_logits), lambda r: gate(lambda x, w: F.linear(x.float(), w)),
            (6 * T * D * E, 3 * (bench.dtype.itemsize * T * D + 4 * T * E)),
        ),
        "route_index": (
            lambda r: ops.route_index(r.ids_TK, E).order_N.long(),
            lambda r: r.ids_TK.flatten().argsort(stable=True), (0, 4 * T * K * 4),
        ),
        "linear + cross-entropy, F+B": (
            lambda r: head(ops.linear_cross_entropy(x_TD, w_VD, targets_T)),
            lambda r: head(F.cross_entropy((x_TD @ w_VD.T).float(), targets_T, reduction="sum")),
            (6 * rows * D * vocabulary, 3 * bench.dtype.itemsize * (rows * D + vocabulary * D)),
        ),
    }  # fmt: skip
    for name, (ours_, torch_, work) in runs.items():
        seconds, failed = bench.race({"ours": ours_, "torch": torch_}, Routed(bench, shape, "balanced"), {"torch"})
        bench.line("other", dict(op=name, T=T, D=D, K=K, E=E), seconds, failed, work)


# ---- the report ------------------------------------------------------------------------------------------------------

COLUMNS = {  # section -> columns of its head, and peers
    "gemm": (["shape", "projection", "form", "routing"], ["bmm", "mm", "grouped-mm", "loop", "cublas", "mma.sync"]),
    "layer": (["shape", "pass", "routing"], ["bound", "grouped-mm", "loop", "mma.sync"]),
    "kernels": (["shape", "kernel", "calls", "of layer"], []),
    "movement": (["op", "T", "D", "K"], []),
    "other": (["op", "T", "E", "K"], ["torch"]),
}


def cell(line, key, name, digits):
    return f"{line[key][name]:.{digits}f}" if name in line.get(key, {}) else "-"


def share(line):
    return "-" if line.get("roofline") is None else f"{line['roofline']:.2f}"


def markdown(report):
    """One table per section. A ratio is their time over ours: above 1 we are faster."""
    text = f"# {report['device']}, commit {report['commit']}\n\ntorch {report['torch']}, {report['dtype']}; "
    text += f"clocks, power, heat and driver before: {report['gpu']}\n"
    if report["left out"]:
        text += f"\nleft out: {', '.join(dict.fromkeys(report['left out']))}\n"
    for section, (head, peers) in COLUMNS.items():
        ran = ["ran"] if section in ("gemm", "layer") else []
        titles = [*head, *ran, "ms", "TFLOP/s", "GB/s", "of roofline", *(f"x {peer}" for peer in peers)]
        text += f"\n## {section}\n\n| {' | '.join(titles)} |\n" + "|---" * len(titles) + "|\n"
        for line in report[section]:
            ways = ", ".join(way + f" ({n})" * (n > 1) for way, n in (line["ran"] or {}).items()) or "-"
            cells = [*(str(line[key]) for key in head), *(ways for _ in ran), cell(line, "ms", "ours", 3)]
            cells += [f"{line.get(key, 0):.0f}" for key in ("tflops", "gbps")] + [share(line)]
            text += f"| {' | '.join([*cells, *(cell(line, 'ratio', peer, 2) for peer in peers)])} |\n"
        peaks = [f"{line['shape']} {line['pass']} {line['routing']} " + ", ".join(f"{name} {size / 2**30:.2f} GiB" for
                 name, size in line["peak"].items()) for line in report[section] if line.get("peak")]  # fmt: skip
        text += f"\nPeak: {'; '.join(peaks)}.\n" if peaks else ""
        for line in report[section]:
            for name, why in line["failed"].items():
                text += f"\n{' '.join(str(line[key]) for key in head)}: {name} did not run ({why})\n"
    return text


def place(report, out):
    device = re.sub(r"[^a-z0-9]+", "-", report["device"].lower()).strip("-")
    return out / f"{device}-{report['commit']}.json"


def write(report, out):
    out.mkdir(parents=True, exist_ok=True)
    place(report, out).write_text(json.dumps(report, indent=1) + "\n")
    place(report, out).with_suffix(".md").write_text(markdown(report))
    return place(report, out)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--sections", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES | MORE_SHAPES, default=list(SHAPES))
    parser.add_argument("--all", action="store_true", help="the default shapes and the larger ones")
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seconds", type=float, default=0.4, help="of rounds per line")
    parser.add_argument("--without", nargs="*", default=[], metavar="KERNEL", help="leave out what rests on these")
    parser.add_argument("--limit", type=float, default=math.inf, metavar="SECONDS", help="begin no line later")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--append", action="store_true", help="to the report of this device and commit")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU: tries the code, measures nothing")
    options = parser.parse_args(arguments)
    if options.dry:
        options.seconds = 0
    elif not moe_ext.has_cuda():
        sys.exit(f"error: no GPU to measure: {moe_ext._C.cuda() or 'torch sees no CUDA device'}. Hint: --dry")
    bench = Bench(options)
    if options.append and place(bench.report, options.out).exists():
        before = json.loads(place(bench.report, options.out).read_text())
        bench.report |= {section: before[section] for section in COLUMNS if section != "movement"}
    every = SHAPES | MORE_SHAPES
    shapes = DRY_SHAPES if options.dry else every if options.all else {name: every[name] for name in options.shapes}
    widest = max(shapes.values(), key=lambda shape: shape.T * shape.d)
    jobs = [("movement", bench_movement, widest)]       # first: it measures the bandwidth
    for name, shape in shapes.items():
        for routing in options.routings:
            jobs += [("layer", bench_layer, name, shape, routing, backward) for backward in (False, True)]
            jobs += [("gemm", bench_gemm, name, shape, routing)]
        if shape is next(iter(shapes.values())):
            jobs += [("kernels", bench_kernels, name, shape)]
            jobs += [("other", bench_other, widest, 96 if options.dry else 128256)]
    torch.set_num_threads(1)        # OpenMP's spin after each draw, and could hold up the thread of autograd
    errors, deadline = [], time.perf_counter() + options.limit
    bench.warm_up()
    for section, job, *arguments in jobs:
        if section in options.sections or section == "movement":
            bench.state, begin = gpu_state(), time.perf_counter()
            if begin >= deadline:
                bench.report["left out"].append(" ".join([section, *(a for a in arguments if isinstance(a, str))]))
                continue
            try:
                job(bench, *arguments)
            except Exception as error:      # out of memory before the race, say: the other jobs still run
                errors.append(f"{section} {arguments}: {type(error).__name__}: {error}")
            print(f"{section} {arguments}: {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
            write(bench.report, options.out)
    print(markdown(bench.report))
    print(write(bench.report, options.out))
    lines = [line for section in COLUMNS for line in bench.report[section]]
    errors += [f"{line}" for line in lines if "ours" in line["failed"]]
    errors += [f"{line}" for line in lines if "its result is another than ours" in line["failed"].values()]
    if errors:
        sys.exit("error: " + "\nerror: ".join(errors))


if __name__ == "__main__":
    main()
