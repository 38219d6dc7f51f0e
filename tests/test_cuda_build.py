"""libmoe_cuda.so as a file: what it holds, what it needs, what it says on a machine without a GPU; no kernel spills."""

import ctypes
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import moe_ext

LIBRARY = Path(moe_ext.__file__).parent / "libmoe_cuda.so"
PTXAS = Path(__file__).parent.parent / "build" / "release" / "cuda" / "ptxas.json"
pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="built without nvcc")


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def kernels():
    if not PTXAS.exists():
        pytest.skip("the library was not built in this folder")
    return json.loads(PTXAS.read_text())


def test_no_kernel_spills(kernels):
    spilled = [f"{k['file']} {k['arch']}: {k['spilled']} bytes in {k['kernel']}" for k in kernels if k["spilled"]]
    assert not spilled, "\n".join(spilled)


def test_every_kernel_file_is_recorded(kernels):
    """On both architectures; files *_sm90.cu on Hopper alone."""
    root = Path(__file__).parent.parent
    archs = {}
    for k in kernels:
        archs.setdefault(k["file"], set()).add(k["arch"])
    for file in root.glob("cuda/*.cu"):
        if "__global__" in file.read_text():
            assert archs.get(file.name) == ({"sm_90a"} if file.stem.endswith("_sm90") else {"sm_80", "sm_90a"}), file


def test_one_symbol_is_exported():
    lines = output("readelf", "--dyn-syms", "--wide", LIBRARY).splitlines()
    rows = [line.split() for line in lines if " GLOBAL " in line or " WEAK " in line or " UNIQUE " in line]
    assert [row[7] for row in rows if row[6] != "UND"] == ["moe_cuda_table"]


def test_nothing_of_cuda_is_linked():
    needed = [line for line in output("readelf", "-d", LIBRARY).splitlines() if "NEEDED" in line]
    assert needed and not [line for line in needed if any(s in line for s in ("cuda", "cublas", "nccl", "torch"))]


def test_a_machine_without_a_gpu_is_told_so():
    """The library loads without a driver, and its first call is a sentence."""
    if moe_ext.has_cuda():
        pytest.skip("needs a machine without a GPU")
    library = ctypes.CDLL(LIBRARY)
    library.moe_cuda_table.restype = ctypes.POINTER(ctypes.c_void_p)
    ready, error = library.moe_cuda_table()[1:3]
    assert ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(ready)(0) != 0
    assert b"there is no CUDA device here" in ctypes.CFUNCTYPE(ctypes.c_char_p)(error)()


def cuobjdump():
    """That of the toolkit, or the one that Triton brings."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=toolkit)
    try:
        import triton
    except ImportError:
        return found
    return found or shutil.which("cuobjdump", path=Path(triton.__file__).parent / "backends" / "nvidia" / "bin")


@pytest.mark.skipif(not cuobjdump(), reason="no cuobjdump")
def test_code_for_ampere_hopper_and_what_comes_after():
    elves, ptx = (output(cuobjdump(), option, LIBRARY) for option in ("--list-elf", "--list-ptx"))
    assert "sm_80" in elves and "sm_90" in elves and "sm_80" in ptx     # sm_90a, to which Triton's tool says sm_90
