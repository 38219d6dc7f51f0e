"""The host harness and a GPU must agree on what each instruction does: tests/gpu/conformance.cu on the host gives the
hashes of conformance.json, and `make gpu` compares a GPU's with the same file."""

import json
import os
import platform
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "gpu"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the harness switches fibers on x86-64")
@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_the_host_gives_the_recorded_hashes(level, tmp_path):
    program = tmp_path / "conformance"
    flags = f"-std=c++20 {level} -Wall -Wextra -Wno-unknown-pragmas -ffp-contract=off -Itests/simt -x c++"
    harness = [ROOT / "tests" / "simt" / f"{name}.cpp" for name in ("simt", "twins", "sm90", "ipc")]
    sources = [FOLDER / "conformance.cu", *harness]
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    subprocess.run([*compiler, *flags.split(), *sources, "-o", program, "-lpthread"], cwd=ROOT, check=True)
    got = json.loads(subprocess.run([program], capture_output=True, text=True, check=True, timeout=100).stdout)
    assert got == json.loads((FOLDER / "conformance.json").read_text())
