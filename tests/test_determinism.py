"""Same inputs, same bits: for any number of threads, run after run, and for movement on every instruction set and
device."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import devices
import pytest
import torch
from cases import Case, Shape
from checks import CHECKS, Tapped

LARGE = Case("large", Shape(700, 96, 70, 6, 2), "skewed")  # enough rows for every op to be cut into pieces

# Whose bits may differ between instruction sets: sums whose order follows the width of a register.
ARITHMETIC = {"grouped_gemm", "grouped_gemm_wgrad", "activation", "expert_mlp", "router", "balance_loss", "z_loss",
              "linear", "linear_cross_entropy"}  # fmt: skip

# Sums along a row or over the rows, which each device adds in an order of its own: whole ops, and places of others.
SUMS = {"rms_norm", "add_norm", "square_sum"}
OWN_ORDER = {"gradient of weights", "gradient of scale_E"}


def fingerprint(name, dtype, device, counts=lambda place, x: True):
    """One hash of all results and gradients that count of the op's check, which passes on the way."""
    torch.manual_seed(0)
    digest = hashlib.sha256()

    def record(place, x):
        if not place.startswith("argument") and counts(place, x):
            digest.update(place.encode() + x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return x

    CHECKS[name](Tapped(name, record), LARGE, dtype, device)
    return digest.hexdigest()


def fingerprints():
    torch.set_num_threads(1)
    dtypes = (torch.float32, torch.bfloat16)
    return {f"{name} {dtype}": fingerprint(name, dtype, "cpu") for name in CHECKS for dtype in dtypes}


@pytest.mark.parametrize("name", CHECKS)
def test_threads_and_runs(name, dtype, device):
    threads = torch.get_num_threads()
    try:
        seen = set()
        for n in (1, 1) if device == "cuda" or devices.simt else (1, 2, 3, 1):
            torch.set_num_threads(n)
            seen.add(fingerprint(name, dtype, device))
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(set(CHECKS) - ARITHMETIC - SUMS))
def test_the_kernels_give_the_bits_of_the_c_core(name, dtype, device):
    def counts(place, x):
        return place not in OWN_ORDER

    got, simt = fingerprint(name, dtype, device, counts), devices.simt
    devices.serve(None)
    try:
        assert got == fingerprint(name, dtype, "cpu", counts)
    finally:
        devices.serve(simt)


def run_with(isa):
    command = "import json, test_determinism; print(json.dumps(test_determinism.fingerprints()))"
    environment = os.environ | {"MOE_ISA": isa, "PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True)


@pytest.mark.c_core
def test_instruction_sets():
    """Every check passes on every set of kernels that this CPU runs, and movement has the same bits on all of them."""
    from moe_ext import _C

    best = _C.versions()["isa"]
    isas = ["base", "avx2", "avx512", "avx512bf16", "amx"]
    runs = {isa: run_with(isa) for isa in isas[: isas.index(best) + 1]}
    for isa, done in runs.items():
        assert done.returncode == 0, f"{isa}: {done.stderr}"
    prints = {isa: json.loads(done.stdout) for isa, done in runs.items()}
    for key, want in prints["base"].items():
        if key.split()[0] not in ARITHMETIC:
            assert all(got[key] == want for got in prints.values()), key


@pytest.mark.c_core
def test_an_unknown_instruction_set_is_refused():
    done = run_with("avx1024")
    assert done.returncode != 0 and "MOE_ISA" in done.stderr.splitlines()[-1]
