"""The driver's tokens per second on a GPU: python -m benchmarks.train, two minutes.

    ours        python -m moe_ext.train, this tree
    mma.sync    the same without the kernels that only Hopper has (MOE_SM90=0), on Hopper
    before      the driver of another tree that is built (--before FOLDER), an earlier commit say

One after the other, each in a process of its own, on the same made-up tokens (by Zipf's law) with the same seed, at
the recipe's size and with two micro-batches a step. Nothing is evaluated or saved. After --steps a driver is ended; its
speed is the median of its step lines but the first, each over ten steps. Losses say whether all went the same way.
Prints a line each, writes train-<device>-<commit>.json. The driver needs tyro.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.ops import commit, lines
from moe_ext.config import load
from moe_ext.data.indexed import IndexedWriter

ROOT = Path(__file__).parent.parent
TOKENS = 4_000_000
EVERY = 10  # steps of a line


def write_tokens(prefix, vocabulary, tokens):
    """Documents of a thousand tokens, drawn by Zipf's law."""
    generator = torch.Generator().manual_seed(0)
    share = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    ids = torch.searchsorted((share / share.sum()).cumsum(0), torch.rand(tokens, generator=generator).double())
    with IndexedWriter(prefix, vocabulary) as writer:
        for document in ids.clamp(max=vocabulary - 1).split(1000):
            writer.add(document.numpy())


def options(folder, arguments):
    """What both trees' drivers understand."""
    wanted = {"data.train": folder / "text", "data.valid": "", "data.tokenizer": "", "log.folder": folder / "runs",
              "train.accumulation": 2, "train.eval_every": 0, "train.save_every": 0,
              "train.sample_tokens": 0, "log.every": min(EVERY, arguments.steps), "train.steps": 1000}  # fmt: skip
    if arguments.dry:
        wanted |= {"train.dtype": "fp32", "train.device": "cpu", "train.micro_batch": 1}
    flags = [word for name, value in wanted.items() for word in (f"--{name}", str(value))]
    return [*flags, "--log.no-tensorboard"]


def drive(name, tree, flags, folder, arguments, **environment):
    """The records of the driver's step lines up to `steps` steps, and its seconds; or why there are none."""
    metrics, begin = folder / "runs" / name / "metrics.jsonl", time.perf_counter()
    command = [sys.executable, "-m", "moe_ext.train", str(arguments.recipe.resolve()), *flags, "--log.name", name]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tree), *paths()])} | environment
    with (arguments.out / f"train-{name}.log").open("w+") as log:
        child = subprocess.Popen(command, cwd=tree, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            records = []
            while not records or records[-1]["step"] < arguments.steps:
                ended = child.poll() is not None
                whole, _, _ = (metrics.read_text() if metrics.exists() else "").rpartition("\n")
                records = [record for record in map(json.loads, whole.splitlines()) if "tokens_per_s" in record]
                if ended or time.perf_counter() - begin > arguments.patience:
                    break
                time.sleep(0.05)
        finally:
            child.kill()        # else it would save a checkpoint
            child.wait()
        log.seek(0)
        said = [line for line in log.read().splitlines() if line.strip()]
    done = records and records[-1]["step"] >= arguments.steps
    return records, time.perf_counter() - begin, None if done else (said[-1] if said else "it said nothing")[:300]


def paths():
    """What PYTHONPATH has beside this tree: packages that were carried here."""
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep)
            if path and not (Path(path).resolve() / "moe_ext").is_dir() and Path(path).resolve() != ROOT / "tests"]


def speed(name, records, seconds, why):
    line = {"tree": name, "seconds": seconds, "failed": why, "losses": {r["step"]: r["loss"] for r in records}}
    if timed := records[1:] if len(records) > 1 else records:
        line["tokens/s"] = statistics.median(r["tokens_per_s"] for r in timed)
        line["ms"] = statistics.median(r["ms"] for r in timed)
    return line


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "moe_gpt2_8e.toml")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="another tree, built in place")
    parser.add_argument("--only", nargs="+", choices=["ours", "mma.sync", "before"], metavar="TREE")
    parser.add_argument("--steps", type=int, default=31)
    parser.add_argument("--patience", type=float, default=120, metavar="SECONDS", help="that one driver may take")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--dry", action="store_true", help="on the CPU: tries the code, measures nothing")
    arguments = parser.parse_args(arguments)
    trees = {"ours": (ROOT, {})}
    if arguments.before:
        trees["before"] = (arguments.before.resolve(), {})
    if not arguments.dry and torch.cuda.get_device_capability() == (9, 0):
        trees["mma.sync"] = (ROOT, {"MOE_SM90": "0"})
    if arguments.only:
        trees = {name: tree for name, tree in trees.items() if name in arguments.only}
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = "dry run" if arguments.dry else torch.cuda.get_device_name()
    report = {"device": device, "commit": commit(), "torch": torch.__version__, "recipe": arguments.recipe.stem}
    report["lines"] = []
    file = arguments.out / f"train-{re.sub(r'[^a-z0-9]+', '-', device.lower())}-{report['commit']}.json"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_tokens(folder / "text", load(arguments.recipe).model.vocab_size, 100_000 if arguments.dry else TOKENS)
        flags = options(folder, arguments)
        for name, (tree, environment) in trees.items():
            line = speed(name, *drive(name, tree, flags, folder, arguments, **environment))
            report["lines"].append(line)
            file.write_text(lines(report) + "\n")
            losses = ", ".join(f"{loss:.3f} at {step}" for step, loss in line["losses"].items())
            print(f"{name}: {line.get('tokens/s', 0):.0f} tokens/s, {line.get('ms', 0):.1f} ms a step; "
                  f"losses {losses}; {line['seconds']:.0f} s in all{'; failed: ' * bool(line['failed'])}"
                  f"{line['failed'] or ''}", flush=True)  # fmt: skip
    print(file)
    if any(line["failed"] for line in report["lines"]):
        sys.exit("error: a driver did not come to its last step")


if __name__ == "__main__":
    main()
