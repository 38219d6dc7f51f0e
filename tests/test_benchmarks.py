"""The GPU benchmark and `make gpu`, tried on the CPU, so that no typo meets the first card; and ranks that share a
sequence, optimizers, and the layer on a busy machine, with few tokens."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from test_train import data  # noqa: F401

from benchmarks import load, optimizers, sequence

ROOT = Path(__file__).parent.parent


def make_gpu(*arguments):
    done = subprocess.run([sys.executable, "tests/gpu/run.py", *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)  # fmt: skip
    with tarfile.open(ROOT / "build" / "gpu.tar.gz") as archive:
        return done, json.load(archive.extractfile("gpu/report.json")), archive.getnames()


def test_make_gpu():
    """The parts that take no other test's time; and what is not done is said, in the report too."""
    done, report, names = make_gpu("graph,sanitizer,train", "--dry")
    assert done.returncode == 0 and "4 of 4 ok" in done.stdout, done.stdout + done.stderr
    assert [line["result"] for line in report] == ["ok"] * 4
    assert {"gpu/train.log", "gpu/train.json", "gpu/memcheck-1-of-1.log"} <= set(names)
    assert "left out: build (not asked for), conformance (not asked for)" in done.stdout

    done, report, _ = make_gpu("train", "--dry", "--limit", "0.5")
    assert done.returncode == 0 and "left out: train train, " in done.stdout, done.stdout + done.stderr
    assert [line["result"] for line in report] == ["left out"]


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
    for section, lines in (("gemm", 12), ("layer", 4), ("movement", 5), ("other", 3)):
        assert len(report[section]) == lines
        for line in report[section]:
            assert not line["failed"] and line["ms"]["ours"] > 0 and f"| {line['ms']['ours']:.3f} |" in done.stdout
    assert file.with_suffix(".md").read_text() in done.stdout and report["left out"] == []


def test_a_limit_leaves_out_and_says_what(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--limit", "0", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert not report["gemm"] and len(report["left out"]) == 8
    assert "left out: movement, other, gemm dry balanced, layer dry balanced" in done.stdout


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
    lines = load.main(("tiny",), (2,), tokens=8, rounds=1)
    assert [(line["shape"], line["threads"]) for line in lines] == [("tiny", 2)] and lines[0]["ratio"] > 0
    assert "| tiny | 2 | " in capsys.readouterr().out
