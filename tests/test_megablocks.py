"""Parity with the real MegaBlocks: each file of tests/megablocks/ in a process of its own (upstream.py says why)."""

import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.glob("megablocks/parity_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_parity(file):
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
                         capture_output=True, text=True, timeout=300)  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
