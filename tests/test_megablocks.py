"""Parity with the real MegaBlocks: each file of tests/megablocks/ in a process of its own (upstream.py says why), on
the CPU in Triton's interpreter, on a GPU against the Triton kernels themselves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["parity_ops", "parity_layers"])
def test_parity(name, device):
    file = Path(__file__).parent / "megablocks" / f"{name}.py"
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
                         env=os.environ | {"MOE_PARITY_DEVICE": device}, capture_output=True, text=True,
                         timeout=600)  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
