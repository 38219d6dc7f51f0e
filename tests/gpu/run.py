"""make gpu: proves this tree on one GPU, then times it, in under ten minutes and without network.

    python tests/gpu/run.py [part,part ..] [--limit SECONDS] [--dry]

    build        the extension and libmoe_cuda.so; no kernel spills; python -m moe_ext
    conformance  instructions and primitives give the hashes of the host harness
    ops          the op tests on the GPU, movement bit for bit like the C core
    layers       drop-in layers, the GPT, torch.compile; real MegaBlocks where it is installed
    graph        every op and the dropless layer in CUDA graphs
    exchange     the token exchange on one card
    sanitizer    compute-sanitizer's memcheck, racecheck and synccheck over every op on small shapes
    train        50 steps of the small GPT beside the CPU's
    bench        benchmarks/gpu.py

Needs torch with CUDA, nvcc, setuptools; pytest and hypothesis for the test files. Nothing has to be installed but them:
the extension is built in place. One line per result; a part that fails does not stop the next; exit status 1 if any
did. Everything is written as it comes: results to build/gpu/report.json, what each command says to build/gpu/*.log.
--limit ends everything in time and says what did not fit. --dry tries the code of every part on the CPU and proves
nothing.
"""

import argparse
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build" / "gpu"
OPS = ["random", "index", "permute", "gemm", "cublas", "expert", "route", "head", "errors", "determinism"]
LAYERS = ["layers", "model", "compile"]


class Run:
    """What came of one command. Its output goes to OUT/<name>.log; at the timeout it and its children are killed."""

    deadline = math.inf

    def __init__(self, name, command, timeout, **environment):
        paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1",
                                    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | environment  # fmt: skip
        begin, self.ok, child = time.perf_counter(), False, None
        timeout = max(0.0, min(timeout, self.deadline - begin))
        with (OUT / f"{name}.log").open("w+") as log:
            try:
                child = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=log,
                                         stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
                self.ok = child.wait(timeout) == 0
            except OSError as error:
                print(error, file=log)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                log.seek(0, os.SEEK_END)
                print(f"\nstopped after {timeout:.0f} s", file=log)
            finally:
                if child and child.poll() is None:      # of an interrupt
                    os.killpg(child.pid, signal.SIGKILL)
            log.seek(0)
            self.output = log.read()
        self.seconds = time.perf_counter() - begin
        lines = [line for line in self.output.splitlines() if line.strip()]
        self.last = lines[-1][:200] if lines else ""
        if not self.ok:
            named = [line[:200] for line in lines if line.startswith(("FAILED", "ERROR", "E  "))]
            self.last = "\n    ".join([self.last, *named[:8]])


def python(name, *arguments, timeout=300, **environment):
    return Run(name, [sys.executable, *arguments], timeout, **environment)


def installed(name):
    """As a package of its own: the folder tests/megablocks of this tree is none."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


# ---- the parts: generators of (name, ok, detail) ---------------------------------------------------------------------


def build(dry):
    cuda, warnings = ("0", "1") if dry else ("1", "0")
    run = python("build", "setup.py", "-q", "build_ext", "--inplace", timeout=540, MOE_CUDA=cuda, MOE_WERROR=warnings)
    yield "build", run.ok, f"{run.seconds:.0f} s" if run.ok else run.last
    run = python("self-check", "-m", "moe_ext")
    yield "python -m moe_ext", run.ok, "; ".join(line for line in run.output.splitlines() if line[:5] in "CUDA  check")
    if not dry:
        kernels = json.loads((ROOT / "build" / "release" / "cuda" / "ptxas.json").read_text())
        spilled = [k["kernel"] for k in kernels if k["spilled"]]
        most = max(kernels, key=lambda k: k["registers"])
        detail = f"{len(kernels)} kernels, at most {most['registers']} registers ({most['kernel'][:60]})"
        yield "no spills", not spilled, f"spilled: {', '.join(spilled)[:300]}" if spilled else detail


def conformance(dry):
    program, source = OUT / "conformance", "tests/gpu/conformance.cu"
    if dry:
        command = ["g++", "-std=c++20", "-O2", "-ffp-contract=off", "-Itests/simt", "-x", "c++", source,
                   "tests/simt/simt.cpp", "tests/simt/twins.cpp", "-o", program, "-lpthread"]  # fmt: skip
    else:
        nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        command = [nvcc, "-std=c++20", "-O3", "--fmad=false", "-gencode", "arch=compute_80,code=[compute_80,sm_80]",
                   "-gencode", "arch=compute_90a,code=sm_90a", source, "-o", program]  # fmt: skip
    run = Run("conformance-build", command, 200)
    if run.ok:
        run = Run("conformance", [program], 60)
    if not run.ok:
        yield "conformance", False, run.last
        return
    got, want = json.loads(run.output), json.loads((ROOT / "tests" / "gpu" / "conformance.json").read_text())
    for name in want:
        ok = got.get(name) == want[name]
        yield name, ok, "" if ok else f"{got.get(name)}, the host has {want[name]}"


def pytest(files, dry, timeout=400):
    """The test files at once, each in its own process."""
    if not installed("pytest") or not installed("hypothesis"):
        for file in files:
            yield file, False, "not run: this Python has no pytest or no hypothesis"
        return
    options = ["--device=cpu", "--collect-only"] if dry else ["--device=cuda"]

    def test(file):
        arguments = ["-m", "pytest", "-p", "no:cacheprovider", *options, file]
        return python(Path(file).stem, *arguments, timeout=timeout, OMP_NUM_THREADS="2")

    with ThreadPoolExecutor(min(6, os.cpu_count() or 1)) as pool:
        runs = {pool.submit(test, file): file for file in files}
        for done in as_completed(runs):
            run = done.result()
            yield runs[done], run.ok and (dry or "passed" in run.last), f"{run.seconds:.0f} s: {run.last}"


def tests_of(names):
    return [f"tests/test_{name}.py" for name in names]


def ops(dry):
    yield from pytest(tests_of(OPS), dry)


def layers(dry):
    yield from pytest(tests_of(LAYERS), dry)
    if missing := [name for name in ("megablocks", "stk", "triton") if not installed(name)]:
        yield "megablocks", True, f"parity left out: {', '.join(missing)} not installed"
    else:
        yield from pytest(["tests/test_megablocks.py"], dry)


def graph(dry):
    yield from pytest(tests_of(["cuda_graph"]), dry)


def exchange(dry):
    yield from pytest(tests_of(["exchange"]), dry)


def sanitizer(dry):
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not dry and not tool:
        yield "compute-sanitizer", False, "not run: it is not installed"
        return
    small = [sys.executable, "tests/gpu/small.py", "cpu" if dry else "cuda"]

    def watch(kind):
        command = [] if dry else [tool, "--tool", kind, "--error-exitcode", "9", "--print-limit", "5"]
        names = ["gather", "route_index"] if dry else []
        return Run(kind, [*command, *small, *names], 240, PYTORCH_NO_CUDA_MEMORY_CACHING="1", MOE_CHECK="0")

    kinds = ["memcheck"] if dry else ["memcheck", "racecheck", "synccheck"]
    with ThreadPoolExecutor(3) as pool:
        runs = {pool.submit(watch, kind): kind for kind in kinds}
        for done in as_completed(runs):
            run = done.result()
            yield runs[done], run.ok, f"{run.seconds:.0f} s: {run.last}"


def train(dry):
    run = python("train", "tests/gpu/train.py", *(["cpu", "1"] if dry else ["cuda", "50"]))
    if not run.ok:
        yield "train", False, run.last
        return
    report = json.loads(run.output.splitlines()[-1])
    (OUT / "train.json").write_text(json.dumps(report, indent=1))
    for name in (name for name in report if name.endswith(" ok")):
        off = report[name.removesuffix("ok") + "off"]
        yield name.removesuffix(" ok"), report[name], f"off by {off['first']:.1e} at first, {off['worst']:.1e} at worst"
    first, last = report["cpu fp32"][0], report["cpu fp32"][-1]
    yield "learns", report["learns"], f"{first:.3f} to {last:.3f} nats on the CPU"


def bench(dry):
    options = ["--dry", "--out", OUT] if dry else []
    run = python("bench", "-m", "benchmarks.gpu", *options, timeout=400)
    yield "bench", run.ok, f"{run.seconds:.0f} s: {run.last}"


PARTS = [build, conformance, ops, layers, graph, exchange, sanitizer, train, bench]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="?", default=",".join(part.__name__ for part in PARTS))
    parser.add_argument("--limit", type=float, default=math.inf, metavar="SECONDS", help="of all parts together")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    known = {part.__name__: part for part in PARTS}
    if unknown := [name for name in options.parts.split(",") if name not in known]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(known)}")
    OUT.mkdir(parents=True, exist_ok=True)
    results, begin = [], time.perf_counter()
    Run.deadline = begin + options.limit

    def tell(part, name, ok, detail):
        results.append(dict(part=part, name=name, ok=bool(ok), detail=detail, at=round(time.perf_counter() - begin)))
        (OUT / "report.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"{part:<12}{name:<32}{'ok    ' if ok else 'FAILED'}  {detail}", flush=True)

    for name in options.parts.split(","):
        try:
            for result in known[name](options.dry):
                tell(name, *result)
        except Exception as error:      # of the part itself: the next ones still run
            tell(name, name, False, f"{type(error).__name__}: {error}")
    failed = [f"{r['part']} {r['name']}" for r in results if not r["ok"]]
    passed, seconds = len(results) - len(failed), time.perf_counter() - begin
    print(f"\n{passed} of {len(results)} ok in {seconds:.0f} s; {OUT}/report.json")
    sys.exit("FAILED: " + ", ".join(failed) if failed else 0)


if __name__ == "__main__":
    main()
