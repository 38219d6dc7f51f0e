"""The host harness and a GPU must agree on what each instruction does: tests/gpu/conformance*.cu on the host give the
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


def hashes(program, sm):
    environment = os.environ | {"SIMT_SM": sm}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, check=True, timeout=100)
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the harness switches fibers on x86-64")
@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_the_host_gives_the_recorded_hashes(level, tmp_path):
    flags = f"-std=c++20 {level} -Wall -Wextra -Wno-unknown-pragmas -Wno-psabi -ffp-contract=off -Itests/simt -x c++"
    compiler = [*shlex.split(os.environ.get("CXX", "g++")), *flags.split()]
    harness = [tmp_path / f"{name}.o" for name in ("simt", "twins", "sm90", "ipc")]
    for path in harness:
        subprocess.run([*compiler, "-c", f"tests/simt/{path.stem}.cpp", "-o", path], cwd=ROOT, check=True)
    got = {}
    for name in ("conformance", "conformance_sm90"):
        program = tmp_path / name
        link = ["-x", "none", *harness, "-o", program, "-lpthread"]
        subprocess.run([*compiler, FOLDER / f"{name}.cu", *link], cwd=ROOT, check=True)
        got |= hashes(program, "90")
        assert name == "conformance" or hashes(program, "80") == {}  # it is for Hopper alone
    assert got == json.loads((FOLDER / "conformance.json").read_text())
