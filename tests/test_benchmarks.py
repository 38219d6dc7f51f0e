"""The GPU benchmark and `make gpu`, tried on the CPU, so that no typo meets the first card."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_make_gpu():
    """The parts that take no other test's time."""
    command = [sys.executable, "tests/gpu/run.py", "graph,sanitizer,train", "--dry"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "4 of 4 ok" in done.stdout, done.stdout + done.stderr


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
    assert file.with_suffix(".md").read_text() in done.stdout
