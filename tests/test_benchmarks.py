"""The GPU benchmark and `make gpu`, tried on the CPU, so that no typo meets the first card; and the layer, alone and on
a busy machine, a training step, ranks that share a sequence, and optimizers, with few tokens."""

import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_halves import case
from test_plan_memory import halved
from test_train import data  # noqa: F401

from benchmarks import bars, gpu, ledger, ops, optimizers, sequence, step
from benchmarks import load as busy
from moe_ext.config import MeshConfig, dumps, load
from moe_ext.model import GPT
from tests import cublas
from tests.cases import Shape

ROOT = Path(__file__).parent.parent


def make_gpu(*arguments):
    done = subprocess.run([sys.executable, "tests/gpu/run.py", *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)  # fmt: skip
    with tarfile.open(ROOT / "build" / "gpu.tar.gz") as archive:
        return done, json.load(archive.extractfile("gpu/report.json")), archive.getnames()


def test_make_gpu():
    """The parts that take no other test's time; and what is not done is said, in the report too."""
    done, report, names = make_gpu("hopper,graph,sanitizer,train,driver,tuner,bars", "--dry")
    assert done.returncode == 0 and "8 of 9 ok" in done.stdout, done.stdout + done.stderr
    assert sorted(line["result"] for line in report) == ["left out"] + ["ok"] * 8       # no earlier commit to drive
    assert {"gpu/train.log", "gpu/train.json", "gpu/memcheck-1-of-1.log", "gpu/train-ours.log"} <= set(names)
    assert "left out: driver driver, build (not asked for), conformance (not asked for)" in done.stdout

    done, report, _ = make_gpu("train", "--dry", "--limit", "0.5")
    assert done.returncode == 0 and "left out: train train, " in done.stdout, done.stdout + done.stderr
    assert [line["result"] for line in report] == ["left out"]


def test_first_contact_is_with_every_kernel():
    sys.path.insert(0, str(ROOT / "tests" / "gpu"))
    import hopper
    import run

    assert run.KERNELS == list(hopper.CHECKS)
    named = {way.replace("sm90", kind) for kind in ("rows", "sums") for way in cublas.WAYS[1:]}
    assert named - {"sums 128x192"} == {name for name in run.KERNELS if name[:4] in ("rows", "sums")}
    assert all(name.startswith(gpu.NEEDS["F+B"]) for name in run.KERNELS)


def test_shares_of_the_sanitizers_are_all_ops():
    sys.path.insert(0, str(ROOT / "tests" / "gpu"))
    import small

    shares = [small.share(f"{i}/4") for i in range(1, 5)]
    assert sorted(name for names in shares for name in names) == sorted(small.CHECKS) and all(shares)


def test_dry_run(tmp_path):
    program = "import sys; sys.modules['tyro'] = None; from benchmarks import gpu; gpu.main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", program, "--dry", "--out", tmp_path], cwd=ROOT, capture_output=True,
                          text=True, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.json")
    report = json.loads(file.read_text())
    kernels = report["kernels"]
    assert sum(line["share"] for line in kernels) == pytest.approx(1) and "expert_mlp" in kernels[0]["kernel"]
    for section, lines in (("gemm", 12), ("layer", 4), ("movement", 5), ("other", 4), ("kernels", len(kernels))):
        assert len(report[section]) == lines
        for line in report[section]:
            assert not line["failed"] and line["ms"]["ours"] > 0 and f"| {line['ms']['ours']:.3f} |" in done.stdout
    assert file.with_suffix(".md").read_text() in done.stdout and report["left out"] == []


def test_a_limit_leaves_out_and_says_what(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--limit", "0", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert not report["gemm"] and len(report["left out"]) == 9
    assert "left out: movement, layer dry balanced, gemm dry balanced, layer dry zipf" in done.stdout


def test_what_rests_on_a_broken_kernel_is_left_out(tmp_path, capsys):
    gpu.main(["--dry", "--without", "sums 128x128", "--out", str(tmp_path)])
    report = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert {line["form"] for line in report["gemm"]} == {"forward", "dgrad"} and not report["kernels"]
    assert [line["pass"] for line in report["layer"]] == ["F", "F"]
    assert "gemm dry balanced up wgrad (without sums 128x128)" in report["left out"]


@pytest.mark.parametrize("micros", [1, 3])
def test_the_ledger_counts_a_step_s_casts_and_sums_of_halves(micros):
    """Each weight is read in 4 bytes and written in 2, once; each later gradient of 2 is added to one of 4."""
    config, casts, sums = case(micros=micros), 0, 0
    for (part, name, tensors), (_, moved) in ledger.step(config).items():
        casts += moved * (part == "casts")
        sums += moved * (name == "add_" and "bfloat16" in tensors)
    weights = halved(case(), GPT(config.model)) // 2
    assert (casts, sums) == (6 * weights * (micros > 1), 10 * weights * (micros - 1))


REPORT = {  # of benchmarks.gpu, what bars read
    "commit": "abc",
    "gemm": [
        dict(shape=shape, projection="up", form="wgrad", routing="balanced", rows=rows, E=8, ms={"ours": 1.0},
             tflops=700.0, ratio={"bmm": bmm, "grouped-mm": 1.06})
        for shape, rows, bmm in (("one", 8192, 0.99), ("two", 16384, 0.96), ("few", 4096, 0.5))
    ],
    "layer": [dict(shape="qwen3-30b-32k", routing="balanced", T=10, d=8, k=2, ms={"ours": 1.0}, tflops=560.4,
                   ratio={"bound": 1.31}, peak={"ours": 640, "mma.sync": 320}) | {"pass": "F"}],
    "kernels": [
        dict(shape="qwen3-30b-32k", kernel=f"void (anonymous namespace)::{kernel}<bf16>(int)", share=share,
             roofline=of_copy)
        for kernel, share, of_copy in (
            ("rows_kernel", 0.6, None), ("sums_kernel", 0.3, None), ("bias_parts_kernel", 0.008, None),
            ("bias_totals_kernel", 0.002, None),
            ("sort_rows_kernel", 0.05, 1.4), ("dact_kernel", 0.04, 0.96),
        )
    ],
    "other": [dict(op="router", T=32768, D=2048, K=8, E=128, ms={"ours": 0.0804, "torch": 0.2})],
}  # fmt: skip
DRIVER = {"recipe": "r", "commit": "abc",
          "lines": [{"tree": "ours", "tokens/s": 180.0}, {"tree": "before", "tokens/s": 90.0}]}  # fmt: skip
LOG = """| version | what | why | predicted | outcome |
|---|---|---|---|---|
| never ran | two up wgrad balanced, x bmm | arithmetic | 0.9 | |
| never ran | one up wgrad balanced, x bmm | arithmetic | 0.9 | |
| abc | two up wgrad balanced, x bmm | arithmetic | 1.0 | |
| abc | one up wgrad balanced, x bmm | arithmetic | 1.0 | 0.5 (before) |
| abc | another | arithmetic | 1.0 | |
| abc | qwen3-30b-32k router, ms | arithmetic | 0.1 | |
"""


def test_bars():
    found = {name: (met, text) for name, met, text in bars.bars([REPORT, DRIVER])}
    assert found == {
        "wgrad balanced, x bmm": (False, "0.96 vs 0.97 at worst, two up wgrad; 1 of 2 below"),
        "wgrad balanced, x grouped-mm": (True, "1.06 vs 1.05 at worst, one up wgrad; 0 of 3 below"),
        "layer F, x bound": (True, "1.31 vs 1.3 at worst, qwen3-30b-32k F balanced; 0 of 1 below"),
        "qwen3-30b-32k F balanced, TFLOP/s": (True, "560 vs 550"),
        "qwen3-30b-32k F balanced, x bound": (True, "1.31 vs 1.3"),
        "qwen3-30b-32k F balanced, sorted copies more memory than mma.sync": (True, "1.00 vs at most 1"),
        "qwen3-30b-32k outside products, of layer": (True, "10.0% vs at most 12%"),
        "qwen3-30b-32k bias sums, of layer": (True, "1.0% vs at most 2%"),
        "qwen3-30b-32k sort_rows, of copy": (False, "1.40 vs 1.5"),
        "qwen3-30b-32k dact, of copy": (True, "0.96 vs 0.95"),
        "r, x before": (True, "2.00 vs 1.8"),
    }
    filled = bars.fill(LOG, bars.figures([REPORT]), "abc").splitlines()
    assert filled[4] == "| abc | two up wgrad balanced, x bmm | arithmetic | 1.0 | 0.96 (abc) |"
    assert filled[7] == "| abc | qwen3-30b-32k router, ms | arithmetic | 0.1 | 0.080 (abc) |"
    assert filled[:4] + filled[5:7] == LOG.splitlines()[:4] + LOG.splitlines()[5:7]


def test_every_prediction_is_of_something_measured():
    """And none is without its arithmetic."""
    rows = [row.strip("|").split("|") for row in bars.LOG.read_text().split("The steps of")[0].splitlines()
            if row.startswith("| ")]  # fmt: skip
    names = {f"{shape} {line} {routing}" for shape in gpu.SHAPES for routing in gpu.ROUTINGS for line in (
        "F", "F+B", *(f"{side} {form}" for side in ("up", "down") for form in ("forward", "dgrad", "wgrad")))}
    assert len(rows) > 10
    for _, what, why, predicted, _ in rows[1:]:
        subject = what.strip().split(",")[0]
        assert subject in names or subject.split()[0] in (*gpu.SHAPES, "moe_gpt2_8e"), subject
        assert why.strip() and predicted.strip()


def test_the_layer_beside_torch(tmp_path, monkeypatch, capsys):
    """Every table; of torch's forms all but the one that takes half a minute to compile."""
    monkeypatch.setattr(ops, "LAYERS", {"small": Shape(40, 16, 24, 4, 2)})
    monkeypatch.setattr(ops, "SHARES_OF", "small")
    ops.main(shapes=("small",), dtypes=("fp32",), threads=(1,), rounds=1, out=tmp_path)
    said = capsys.readouterr().out
    report = json.loads(next(tmp_path.glob("*.json")).read_text())
    for line, again in zip(report["layers"], report["tuned"], strict=True):
        assert set(line["ratio"]) == {"sorted-mm", "grouped-mm", "batched-mm"}
        assert set(again["ratio"]) == {"sorted-mm", ops.best(line)} and again["malloc"] == "tuned"
        assert [line[key] == again[key] for key in ("pass", "shape", "dtype", *Shape._fields)] == 8 * [True]
        assert line["ratio_of_best"] == line["ratio"][ops.best(line)] == min(line["ratio"].values())
        assert f"| {ops.bold_below(line['ratio_of_best'], 1)} |" in said
    (line,) = report["memory"]
    assert all(0 < line[of]["growth"] < line[of]["peak"] < 2**30 for of in ("ours", "torch"))
    assert line["peer"] == "sorted-mm"
    assert [line["pass"] for line in report["shares"]] == ["F", "F+B"]
    assert all(line["share"] >= line["router"] + line["index"] > 0 for line in report["shares"])
    assert ops.bold_below(0.994, 1) == "**0.99**" and ops.bold_below(1.0, 1) == "1.00"


def test_a_form_of_the_layer_that_is_wrong_is_found(monkeypatch):
    monkeypatch.setitem(ops.PEERS, "batched-mm", lambda *args: 1.1 * ops.batched_mm(*args))
    with pytest.raises(AssertionError, match="batched-mm and ours compute different things on small"):
        ops.time_layer("small", Shape(40, 16, 24, 4, 2), torch.float32, True, 1, ["batched-mm"])


def test_which_forms_of_the_layer(monkeypatch):
    assert ops.peers_of(torch.float32, None) == ["sorted-mm", "grouped-mm", "batched-mm"]
    for instructions, forms in ((True, list(ops.PEERS)), (False, ["widened-mm"])):
        monkeypatch.setattr(ops, "BF16_INSTRUCTIONS", instructions)
        assert ops.peers_of(torch.bfloat16, None) == forms


@pytest.fixture
def small_recipe(tmp_path):
    config = load(ROOT / "recipes" / "tiny.toml")
    model = replace(config.model, vocab_size=96, seq_len=16, layers=2, dim=32, kv_heads=2,
                    moe=replace(config.model.moe, experts=4, hidden=24))  # fmt: skip
    path = tmp_path / "small.toml"
    path.write_text(dumps(replace(config, model=model)))
    return path


def test_a_step_beside_plain_torch(small_recipe, tmp_path, capsys):
    """In fp64, so that it is seen to be the same model, its optimizer too."""
    step.main(small_recipe, dtypes=("fp64",), threads=(1,), steps=2, profile=True, out=tmp_path)
    said = capsys.readouterr().out
    report = json.loads((next(tmp_path.glob("step-*.json"))).read_text())
    (line,), (profiled,) = report["steps"], report["shares"]
    assert f"| {ops.bold_below(line['ratio'], 1.0)} | 1.0 |" in said and line["bound"] > 0
    parts = {line["part"]: line for line in profiled["of"]}
    assert set(parts) == set(step.PARTS.values()), said
    places = {line["place"]: line for line in profiled["of"]}
    for op in ("mlp.experts expert_mlp", "self_attn scaled_dot_product_attention", "self_attn.q_proj linear"):
        assert places[op]["forward"] > 0 and places[op]["backward"] > 0


@pytest.mark.parametrize("changes, what", [({"score": "sigmoid"}, "loss"), ({"balance_form": "mse"}, "balance")])
def test_a_plain_model_that_is_another_is_found(small_recipe, changes, what):
    config = load(small_recipe)
    moe = replace(config.model.moe, **changes)
    one = replace(config, model=replace(config.model, moe=moe), mesh=MeshConfig(),
                  train=replace(config.train, dtype="fp64", micro_batch=4))  # fmt: skip
    with pytest.raises(AssertionError, match=f"the plain model is another: its {what} is"):
        step.race(one, 1)


def test_transformers_experts(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    from transformers.integrations.moe import ExpertsInterface

    from benchmarks import transformers
    from moe_ext.transformers.experts import experts_forward

    small = dict(intermediate_size=8, num_local_experts=4, num_experts_per_tok=2, hidden_size=16)
    monkeypatch.setattr(transformers, "MODELS", {"mixtral": small})
    transformers.main(models=("mixtral",), dtypes=("fp32",), tokens=8, rounds=1, out=tmp_path)
    said, report = capsys.readouterr().out, json.loads(next(tmp_path.glob("transformers-*.json")).read_text())
    assert [(line["part"], line["pass"]) for line in report["lines"]] == [
        ("experts", "F"), ("model", "F"), ("experts", "F+B"), ("model", "F+B"), ("decode", "F")]  # fmt: skip
    for line in report["lines"]:
        assert line["best"] in line["ratio"] and f"{line['ratio'][line['best']]:.2f}" in said
    monkeypatch.setitem(ExpertsInterface._global_mapping, "grouped_mm",
                        lambda *args: 1.1 * experts_forward(*args))  # fmt: skip
    with pytest.raises(AssertionError, match="grouped_mm and moe_ext compute different things"):
        list(transformers.lines("mixtral", small, "fp32", 8, 1))


def test_ranks_that_share_a_sequence(tmp_path, monkeypatch, capsys):
    """Every section, small; and of what it reports that which no clock changes."""
    monkeypatch.setattr(sequence, "CORES", 1)  # no threads, which a fork from here would lose
    sequence.main(quick=True, out=tmp_path)
    said = capsys.readouterr().out
    (file,) = tmp_path.glob("sequence-*.json")
    report = json.loads(file.read_text())
    met = {line["what"]: line["met"] for line in report["wanted"]}
    assert all(met[what] for what in met if what.startswith("memory, ") and "documents" not in what), said
    assert [line["bytes"] > line["all scores"] for line in report["memory"] if line["of"] == "scores"] == [True]
    assert {line["what"] for line in report["layers"]} == {"attention", "block"}
    assert {line["form"] for line in report["layers"]} == {"ulysses", "gather", "tp", "one"}
    assert [line["bytes"] for line in report["exchanges"]] == [2 * 4 * 32 * 64 * (2 * 8 + 2 * 8) * 3 // 4]
    assert [line["mesh"] for line in report["training"]] == 2 * ["one process"] + 2 * ["sp 2"]
    assert all(line["tokens/s"] > 0 and line["bytes"] > 0 for line in report["training"])


def test_optimizers_beside_each_other(tmp_path, capsys, data):  # noqa: F811
    pytest.importorskip("matplotlib")
    optimizers.main(threads=1, quick=True, data=data, out=tmp_path, plot=tmp_path / "plot.png")
    said = capsys.readouterr().out
    (file,) = tmp_path.glob("optimizers-*.json")
    report = json.loads(file.read_text())
    assert (tmp_path / "plot.png").stat().st_size > 10000
    assert [(line["form"], line["dtype"]) for line in report["experts"]] == [
        ("batch", "bf16"), ("batch", "fp32"), ("loop", "fp32"), ("torch.optim.Muon", "bf16")]  # fmt: skip
    assert [line["optimizer"] for line in report["rates"]] == 2 * ["adamw"] + 2 * ["muon"] + 2 * ["shampoo"]
    start = {of["loss"][0] for of in report["training"].values()}
    assert len(start) == 1  # the same values and tokens
    assert len({of["loss"][-1] for of in report["training"].values()}) == 3
    for name, of in report["training"].items():
        assert [line[0] for line in of["held out"]] == [3, 6] and of["held out"][0][1] < of["held out"][1][1]
        assert len(of["gradients"]) == len(of["update"]) == 6
        assert f"| {optimizers.LABELS[name]} | {optimizers.best(report['rates'], name):g} |" in said
    assert [line["frequency"] for line in report["shares"]] == [0, 0, 1, 3]
    assert len(report["wanted"]) == 4 and said.count("| yes |") == sum(line["met"] for line in report["wanted"])


def test_a_batch_that_is_no_loop_is_found(monkeypatch):
    monkeypatch.setattr(optimizers, "COEFFICIENTS", (3.4, -4.7, 2.0))
    with pytest.raises(AssertionError, match="away from the loop"):
        optimizers.expert_lines(2, 6, 4, 1)


def test_a_diverging_rate_is_none_to_choose(monkeypatch):
    class Diverging:
        def __init__(self, config):
            self.config, self.model = config, None

        def gradients(self, batch, step):
            return {"loss": torch.tensor(3.0)}

        def update(self, step):
            if self.config.optim.lr > 1:
                raise FloatingPointError

    monkeypatch.setattr(optimizers, "Trainee", Diverging)
    monkeypatch.setattr(optimizers, "evaluate", lambda *_: 2.5)
    monkeypatch.setattr(optimizers, "loader_of", lambda *_: NoText())
    lines = optimizers.sweep(optimizers.Config(), None, None, (0.5, 2.0), 3)
    assert [line["held out"] for line in lines] == 3 * [2.5, float("inf")]
    assert optimizers.best(lines, "muon") == 0.5


class NoText:
    def batch(self):
        return None

    def advance(self):
        pass


def test_optimizers_without_text(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no text: python -m moe_ext\.data prepare"):
        optimizers.main(data=tmp_path)


def test_load(capsys):
    lines = busy.main(("tiny",), (2,), tokens=8, rounds=1)
    assert [(line["shape"], line["threads"]) for line in lines] == [("tiny", 2)] and lines[0]["ratio"] > 0
    assert "| tiny | 2 | " in capsys.readouterr().out
