"""make gpu: proves this tree on one GPU, then times it, in a few minutes and without network.

    python tests/gpu/run.py [part,part ..] [--limit SECONDS] [--before FOLDER] [--dry]

    build        the extension and libmoe_cuda.so; no kernel spills; python -m moe_ext            20 s if it is built
    hopper       each kernel that only Hopper has, before anything else relies on it              40 s
then side by side, as many processes at once as there are CPU cores:                             120 s, and with
    sanitizer    compute-sanitizer's racecheck, memcheck and synccheck, every op on small shapes  180 s
    conformance  instructions and primitives give the hashes of the host harness
    ops          the op tests on the GPU, movement bit for bit like the C core
    older        on Hopper, those of products once more with MOE_SM90=0: as older cards compute them
    layers       drop-in layers, the GPT, torch.compile; real MegaBlocks where it is installed
    graph        every op and the dropless layer in CUDA graphs
    exchange     the token exchange on one card
    train        50 steps of the small GPT beside the CPU's
then alone on the card:
    bench        benchmarks/gpu.py: the shapes that say most, balanced and by Zipf's law          70 s
    driver       benchmarks/train.py: the 1.3 B recipe, on Hopper also as on older cards, and by
                 an earlier commit, built in another folder (--before, or build/before)           120 s
    tuner        benchmarks/policy.py: where the policy of Hopper's products is off                40 s
    more         benchmarks/gpu.py: the other shapes                                              80 s
    bars         what benchmarks/bars.py says of all that was measured

Seconds are estimates for an H200 of 16 cores, starts of 6 to 10 s included; the sum without sanitizer is 490.

A kernel that fails in `hopper` may take everything with it that runs in its process. So what rests on it is left out
of bench and more, its way of the tuner, ours of driver; and layers, graph, exchange and train run with MOE_SM90=0, to
prove the rest. The op tests run as they are, a process for each file.

Needs torch with CUDA, nvcc, setuptools; pytest and hypothesis for the test files. Nothing has to be installed but them:
the extension is built in place, and what was built elsewhere is used if it is newer than its sources. One line per
result: ok, FAILED, or left out with the reason: no time, not installed. What fails does not stop the rest; exit status
1 if anything did; a bar that is missed is no failure. Everything is written as it comes, to build/gpu/: report.json, a
log of each command, and at the end all of it with the benchmark's results as one archive, build/gpu.tar.gz.
--limit ends everything in time. --dry tries the code of every part on the CPU and proves nothing.
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
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build" / "gpu"
OPS = [
    "random", "index", "permute", "gemm", "hopper", "cublas", "expert", "route", "logits", "head", "errors",
    "determinism",
]  # fmt: skip
PRODUCTS = ["gemm", "expert"]       # what MOE_SM90=0 changes
LAYERS = ["layers", "model", "compile"]
KERNELS = [  # the checks of hopper.py
    "rows 128x256", "rows 128x192", "rows 128x128", "sums 128x256", "sums 128x128", "mlp plain", "mlp gated",
    "mlp ds", "mlp db", "mlp dw2", "mlp dw13", "mlp dx", "mlp all",
]  # fmt: skip
FIRST = ["qwen3-30b-32k", "olmoe", "mixtral", "seed"]       # shapes of bench; more has the others
broken = []     # of KERNELS


class Run:
    """What came of one command: ok, or None if it was not begun or not ended within --limit. Its output goes to
    OUT/<name>.log; at the timeout it and its children are killed."""

    deadline, before = math.inf, None
    slots = threading.BoundedSemaphore(max(2, os.cpu_count() or 1))     # a process that waits for a core measures it

    def __init__(self, name, command, timeout, **environment):
        self.seconds, self.output = 0.0, ""
        with self.slots:
            left = self.deadline - time.perf_counter()
            if left <= 0:
                self.ok, self.last = None, "no time left"
                return
            self.run(name, list(map(str, command)), min(timeout, left), environment)
            if not self.ok and timeout > left and self.seconds >= left:
                self.ok = None

    def run(self, name, command, timeout, environment):
        paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1",
                                    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | environment  # fmt: skip
        name = name.replace(" ", "-")
        begin, self.ok, child = time.perf_counter(), False, None
        with (OUT / f"{name}.log").open("w+") as log:
            try:
                child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                                         start_new_session=True)  # fmt: skip
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


def side_by_side(runs):
    """{name: function that makes a Run} -> (name, Run) as they end; begun in the given order."""
    with ThreadPoolExecutor(max(1, len(runs))) as pool:
        begun = {pool.submit(make): name for name, make in runs.items()}
        for done in as_completed(begun):
            yield begun[done], done.result()


def installed(name):
    """As a package of its own: the folder tests/megablocks of this tree is none."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


# ---- the parts: generators of (name, ok or None if left out, detail) ------------------------------------------------


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


def hopper(dry):
    if dry:
        run = python("hopper", "tests/gpu/hopper.py", "cpu", OMP_NUM_THREADS="2")
        yield "hopper", run.ok, run.last
        return
    runs = {name: lambda name=name: python(f"hopper {name}", "tests/gpu/hopper.py", "cuda", name, timeout=90,
                                           OMP_NUM_THREADS="2") for name in KERNELS}  # fmt: skip
    for name, run in side_by_side(runs):
        if run.ok and run.last.startswith("left out"):
            yield name, None, run.last.removeprefix("left out: ")
            continue
        if run.ok is False:
            broken.append(name)
        yield name, run.ok, f"{run.seconds:.0f} s: {run.last}"


def careful():
    """The environment of what a broken kernel would only end."""
    return {"MOE_SM90": "0"} if broken else {}


def on_hopper():
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def conformance(dry):
    hopper = ["-gencode", "arch=compute_90a,code=sm_90a"]
    both = ["-gencode", "arch=compute_80,code=[compute_80,sm_80]", *hopper]
    got, left_out = {}, ""
    for name, target in ("conformance", both), ("conformance_sm90", hopper):
        program, source = OUT / name, f"tests/gpu/{name}.cu"
        if dry:
            harness = [f"tests/simt/{part}.cpp" for part in ("simt", "twins", "sm90", "ipc")]
            command = ["g++", "-std=c++20", "-O2", "-ffp-contract=off", "-Wno-psabi", "-Itests/simt",
                       "-x", "c++", source, *harness, "-o", program, "-lpthread"]  # fmt: skip
        else:
            nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
            command = [nvcc, "-std=c++20", "-O3", "--fmad=false", *target, source, "-o", program]
        run = Run(f"{name}-build", command, 200)
        if run.ok:
            run = Run(name, [program], 60)
        if not run.ok:
            yield name, run.ok, run.last
            return
        said = run.output[run.output.index("{"):]
        got |= json.loads(said)
        left_out = "" if json.loads(said) else run.output.splitlines()[0]
    want = json.loads((ROOT / "tests" / "gpu" / "conformance.json").read_text())
    for name in want:
        if left_out and name not in got:
            yield name, None, left_out
            continue
        ok = got.get(name) == want[name]
        yield name, ok, "" if ok else f"{got.get(name)}, the host has {want[name]}"


def pytest(files, dry, timeout=400, name="{}", **environment):
    """The test files at once, each in its own process."""
    if missing := [name for name in ("pytest", "hypothesis") if not installed(name)]:
        yield from ((file, None, f"{' and '.join(missing)} not installed") for file in files)
        return
    options = ["--device=cpu", "--collect-only"] if dry else ["--device=cuda"]

    def test(file):
        arguments = ["-m", "pytest", "-p", "no:cacheprovider", *options, file]
        return lambda: python(name.format(Path(file).stem), *arguments, timeout=timeout, OMP_NUM_THREADS="2",
                              **environment)  # fmt: skip

    for file, run in side_by_side({file: test(file) for file in files}):
        yield name.format(file), run.ok and (dry or "passed" in run.last), f"{run.seconds:.0f} s: {run.last}"


def tests_of(names):
    return [f"tests/test_{name}.py" for name in names]


def ops(dry):
    yield from pytest(tests_of(OPS), dry)


def older(dry):
    if dry or on_hopper():
        yield from pytest(tests_of(PRODUCTS), dry, name="{} MOE_SM90=0", MOE_SM90="0")
    else:
        yield "older", None, "ops has run as on older cards"


def layers(dry):
    files, missing = tests_of(LAYERS), [name for name in ("megablocks", "stk", "triton") if not installed(name)]
    if missing:
        yield "megablocks", None, f"parity: {', '.join(missing)} not installed"
    else:
        files.insert(0, "tests/test_megablocks.py")
    yield from pytest(files, dry, **careful())


def graph(dry):
    yield from pytest(tests_of(["cuda_graph"]), dry, **careful())


def exchange(dry):
    yield from pytest(tests_of(["exchange"]), dry, **careful())


def sanitizer(dry):
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not dry and not tool:
        yield "compute-sanitizer", None, "not installed"
        return

    def watch(kind, share):
        command = [] if dry else [tool, "--tool", kind, "--error-exitcode", "9", "--print-limit", "5"]
        small = [sys.executable, "tests/gpu/small.py", *(["cpu", "gather", "route_index"] if dry else ["cuda", share])]
        return lambda: Run(f"{kind}-{share.replace('/', '-of-')}", [*command, *small], 500,
                           PYTORCH_NO_CUDA_MEMORY_CACHING="1", MOE_CHECK="0")  # fmt: skip

    shares = {"memcheck": 1} if dry else {"racecheck": 4, "memcheck": 1, "synccheck": 1}    # racecheck takes longest
    runs = {f"{kind} {i}/{n}": watch(kind, f"{i}/{n}") for kind, n in shares.items() for i in range(1, n + 1)}
    for name, run in side_by_side(runs):
        yield name, run.ok, f"{run.seconds:.0f} s: {run.last}"


def train(dry):
    # Few threads: the CPU's half shares its cores with all that runs beside it.
    run = python("train", "tests/gpu/train.py", *(["cpu", "1"] if dry else ["cuda", "50"]), OMP_NUM_THREADS="4",
                 **careful())  # fmt: skip
    if not run.ok:
        yield "train", run.ok, run.last
        return
    report = json.loads(run.output.splitlines()[-1])
    (OUT / "train.json").write_text(json.dumps(report, indent=1))
    for name in (name for name in report if name.endswith(" ok")):
        off = report[name.removesuffix("ok") + "off"]
        yield name.removesuffix(" ok"), report[name], "off by " + ", ".join(f"{off[at]:.1e} {at}" for at in off)
    first, last = report["cpu fp32"][0], report["cpu fp32"][-1]
    yield "learns", report["learns"], f"{first:.3f} to {last:.3f} nats on the CPU"


def measure(name, module, *options, dry, timeout, limit=True):
    """A benchmark in the time that is left, and what it left out."""
    left = min(timeout, Run.deadline - time.perf_counter() - 20)        # and time to write and say it
    options = [*options, "--dry"] if dry else [*options, *(["--limit", f"{max(0, left):.0f}"] if limit else [])]
    run = python(name, "-m", module, *options, timeout=timeout + 20)
    yield name, run.ok, f"{run.seconds:.0f} s: {run.last}"
    for line in run.output.splitlines():
        if line.startswith("left out: "):
            yield name, None, line.removeprefix("left out: ")


def without():
    return ["--without", *broken] if broken else []


def tables(name, *options, dry):
    """Of benchmarks/gpu.py."""
    yield from measure(name, "benchmarks.gpu", "--out", OUT, *options, *without(), dry=dry, timeout=200)
    for table in () if dry else OUT.glob("*.md"):
        for file in (table, table.with_suffix(".json")):
            shutil.copy(file, ROOT / "benchmarks" / "results")


def bench(dry):
    yield from tables("bench", "--shapes", *FIRST, dry=dry)


def more(dry):
    from benchmarks.gpu import SHAPES

    others = [name for name in SHAPES if name not in FIRST]
    yield from tables("more", "--append", "--sections", "gemm", "layer", "--shapes", *others, dry=dry)


def driver(dry):
    if not installed("tyro"):
        yield "driver", None, "tyro not installed"
        return
    before = Run.before if (Run.before / "moe_ext").is_dir() and not dry else None
    trees = [["--before", before]] if before else []
    if broken:
        trees.append(["--only", "mma.sync", *(["before"] if before else [])])
    if dry:
        trees = [["--recipe", "recipes/debug.toml", "--steps", 3]]
    options = [word for words in trees for word in words]
    yield from measure("driver", "benchmarks.train", "--out", OUT, *options, dry=dry, timeout=400, limit=False)
    for file in () if dry else OUT.glob("train-*-*.json"):
        shutil.copy(file, ROOT / "benchmarks" / "results")
    if not before:
        yield "driver", None, "another tree: give --before, or build an earlier commit in build/before"


def tuner(dry):
    if not dry and not on_hopper():
        yield "tuner", None, "there is no choice on this card"
        return
    shapes = ["--shapes", *FIRST, "sonic-7b-256", "qwen3-30b-8k"]
    yield from measure("tuner", "benchmarks.policy", *shapes, *without(), dry=dry, timeout=90)


def bars(dry):
    from benchmarks import bars as judge

    files = [] if dry else sorted(OUT.glob("*-*-*.json"))
    for name, met, text in judge.bars([json.loads(file.read_text()) for file in files]):
        yield name, True, f"{'met' if met else 'missed'}: {text}"
    yield "bars", True, f"of {len(files)} reports"


STAGES = [[build], [hopper], [sanitizer, conformance, ops, older, layers, graph, exchange, train],
          [bench], [driver], [tuner], [more], [bars]]  # fmt: skip
PARTS = {part.__name__: part for stage in STAGES for part in stage}
WORDS = {True: "ok", False: "FAILED", None: "left out"}


class Report:
    """Every result, printed and written as it comes, from any thread."""

    def __init__(self):
        self.results, self.begin, self.lock = [], time.perf_counter(), threading.Lock()

    def tell(self, part, name, ok, detail):
        with self.lock:
            word, at = WORDS[ok if ok is None else bool(ok)], round(time.perf_counter() - self.begin)
            self.results.append(dict(part=part, name=name, result=word, detail=detail, at=at))
            (OUT / "report.json").write_text(json.dumps(self.results, indent=1) + "\n")
            print(f"{part:<12}{name:<32}{word:<10}{detail}", flush=True)

    def run(self, part, dry):
        try:
            for result in part(dry):
                self.tell(part.__name__, *result)
        except Exception as error:      # of the part itself: the others still run
            self.tell(part.__name__, part.__name__, False, f"{type(error).__name__}: {error}")

    def named(self, word):
        return [f"{r['part']} {r['name']}" for r in self.results if r["result"] == word]


def pack():
    """All that the parts wrote, as one file."""
    archive = OUT.with_suffix(".tar.gz")
    with tarfile.open(archive, "w:gz") as tar:
        for file in sorted(OUT.glob("*.*")):
            tar.add(file, Path("gpu", file.name))
    return archive


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="?", default=",".join(PARTS))
    parser.add_argument("--limit", type=float, default=math.inf, metavar="SECONDS", help="of all parts together")
    parser.add_argument("--before", type=Path, default=ROOT / "build" / "before", metavar="FOLDER", help="for driver")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    wanted = options.parts.split(",")
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    OUT.mkdir(parents=True, exist_ok=True)
    for old in OUT.glob("*.*"):
        old.unlink()
    report = Report()
    Run.deadline, Run.before = report.begin + options.limit, options.before.resolve()
    sys.path.insert(0, str(ROOT))
    for stage in STAGES:
        parts = [part for part in stage if part.__name__ in wanted]
        with ThreadPoolExecutor(max(1, len(parts))) as pool:
            list(pool.map(lambda part: report.run(part, options.dry), parts))
    archive, seconds = pack(), time.perf_counter() - report.begin
    passed, failed, left_out = (report.named(word) for word in WORDS.values())
    print(f"\n{len(passed)} of {len(report.results)} ok in {seconds:.0f} s; {archive}")
    if unasked := [name for name in PARTS if name not in wanted]:
        left_out += [f"{name} (not asked for)" for name in unasked]
    if left_out:
        print("left out: " + ", ".join(left_out))
    sys.exit("FAILED: " + ", ".join(failed) if failed else 0)


if __name__ == "__main__":
    main()
