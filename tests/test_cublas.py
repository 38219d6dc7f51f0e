"""The benchmark's yardstick, one cuBLAS product per expert, against the reference. On the host cuBLAS is a stand-in."""

import ctypes
import os
import subprocess
from pathlib import Path

import devices
import pytest
import torch

from moe_ext import reference

SIZE, INT64, POINTER = ctypes.c_size_t, ctypes.c_int64, ctypes.c_void_p
DTYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


class Mat(ctypes.Structure):
    _fields_ = [("p", POINTER), ("se", INT64), ("sr", INT64), ("sc", INT64)]


def function(*arguments):
    return ctypes.CFUNCTYPE(ctypes.c_int, *arguments)


class Table(ctypes.Structure):
    """The head of moe_cuda (cuda/api.h)."""

    _fields_ = [
        ("size", SIZE),
        ("ready", function(ctypes.c_int)),
        ("error", ctypes.CFUNCTYPE(ctypes.c_char_p)),
        *((name, POINTER) for name in ("verdict", "nccl_id", "nccl_open", "window_open")),
        ("gemm", function(ctypes.c_int, *[INT64] * 4, POINTER, Mat, *[POINTER] * 4)),
        ("wgrad", function(ctypes.c_int, *[INT64] * 4, *[POINTER] * 4, Mat, POINTER)),
    ]


def table(device):
    path = devices.simt if device == "cpu" else Path(devices.moe_ext.__file__).parent / "libmoe_cuda.so"
    library = ctypes.CDLL(os.path.abspath(path))
    library.moe_cuda_table.restype = ctypes.POINTER(Table)
    found = library.moe_cuda_table().contents
    assert found.ready(0) == 0, found.error()
    return found


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """libcublas.so.13 of this process, for the harness."""
    if not devices.simt:
        return
    library = tmp_path_factory.mktemp("cublas") / "libcublas.so.13"
    source = Path(__file__).parent / "simt" / "cublas_stand_in.c"
    command = "gcc -std=c11 -O1 -Wall -Wextra -Werror -fPIC -shared -Wl,-soname,libcublas.so.13"
    subprocess.run([*command.split(), "-o", library, source], check=True)
    ctypes.CDLL(str(library))


@pytest.fixture
def cublas(device, stand_in):
    if device == "cpu" and not devices.simt:
        pytest.skip("kernels only")
    return table(device)


def matrix(tensor):
    return Mat(tensor.data_ptr(), *tensor.stride())


LAYOUTS = {
    "rows": lambda E, I, O: torch.empty(E, I, O),
    "columns": lambda E, I, O: torch.empty(E, O, I).transpose(1, 2),
    "wider rows": lambda E, I, O: torch.empty(E, I, O + 3)[:, :, :O],
    "wider columns": lambda E, I, O: torch.empty(E, O, I + 2)[:, :, :I].transpose(1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "R, bins, I, O", [(20, [3, 3, 15, 20], 5, 7), (9, [0, 4], 1, 6), (6, [6], 8, 1), (0, [0], 3, 4)]
)
def test_products(cublas, device, layout, R, bins, I, O):
    E, stream = len(bins), torch.cuda.current_stream().cuda_stream if device == "cuda" else None
    bins_E = torch.tensor(bins, dtype=torch.int32, device=device)
    x_RI, dy_RO = torch.randn(R, I, device=device), torch.randn(R, O, device=device)
    w_EIO = LAYOUTS[layout](E, I, O).to(device).copy_(torch.randn(E, I, O))
    y_RO, dw_EIO = torch.full_like(dy_RO, torch.nan), w_EIO.clone().fill_(torch.nan)
    pointers = bins_E.data_ptr(), None
    status = cublas.gemm(1, R, E, I, O, x_RI.data_ptr(), matrix(w_EIO), *pointers, y_RO.data_ptr(), stream)
    assert status == 0, cublas.error()
    torch.testing.assert_close(y_RO, reference.grouped_gemm(x_RI, w_EIO, bins_E))
    status = cublas.wgrad(1, R, E, I, O, x_RI.data_ptr(), dy_RO.data_ptr(), *pointers, matrix(dw_EIO), stream)
    assert status == 0, cublas.error()
    torch.testing.assert_close(dw_EIO, reference.grouped_gemm_wgrad(x_RI, dy_RO, bins_E))


def test_what_it_refuses(cublas, device):
    bins_E = torch.tensor([2, 1], dtype=torch.int32, device=device)
    x, w, y = (torch.zeros(2, 2, 2, device=device) for _ in range(3))
    run = lambda dtype, w: cublas.gemm(dtype, 2, 2, 2, 2, x.data_ptr(), w, bins_E.data_ptr(), None, y.data_ptr(), None)
    BAD_DTYPE, BAD_SHAPE, BAD_BINS = 1, 2, 4
    assert run(0, matrix(w)) == BAD_DTYPE
    assert run(1, Mat(w.data_ptr(), 8, 4, 2)) == BAD_SHAPE
    assert run(1, matrix(w)) == BAD_BINS


def test_a_missing_cublas_is_a_sentence(device):
    if not devices.simt:
        pytest.skip("with kernels on the host only")
    program = """
import test_cublas
t = test_cublas.table(device)
x = torch.zeros(1, 1, 1)
bins = torch.ones(1, dtype=torch.int32)
status = t.gemm(1, 1, 1, 1, 1, x.data_ptr(), test_cublas.matrix(x), bins.data_ptr(), None, x.data_ptr(), None)
print(status, t.error().decode())
"""
    try:
        ctypes.CDLL("libcublas.so.12")
        pytest.skip("this machine has a cuBLAS")
    except OSError:
        said = devices.python(program, device).stdout
    assert said.startswith("7 cuBLAS is not to be had (") and "libcublas.so" in said and "Hint" in said
