"""The benchmark's yardstick, one cuBLAS product per expert, against the reference. On the host cuBLAS is a stand-in."""

import ctypes
import subprocess
from pathlib import Path

import cublas
import devices
import pytest
import torch
from cublas import Mat, matrix

from moe_ext import reference


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
def table(device, stand_in):
    if device == "cpu" and not devices.simt:
        pytest.skip("kernels only")
    return cublas.load(devices.simt if device == "cpu" else None)


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
def test_products(table, device, layout, R, bins, I, O):
    E = len(bins)
    bins_E = torch.tensor(bins, dtype=torch.int32, device=device)
    x_RI, dy_RO = torch.randn(R, I, device=device), torch.randn(R, O, device=device)
    w_EIO = LAYOUTS[layout](E, I, O).to(device).copy_(torch.randn(E, I, O))
    y_RO, dw_EIO = torch.full_like(dy_RO, torch.nan), w_EIO.clone().fill_(torch.nan)
    cublas.grouped_gemm(table, x_RI, w_EIO, bins_E, y_RO)
    torch.testing.assert_close(y_RO, reference.grouped_gemm(x_RI, w_EIO, bins_E))
    cublas.grouped_gemm_wgrad(table, x_RI, dy_RO, bins_E, dw_EIO)
    torch.testing.assert_close(dw_EIO, reference.grouped_gemm_wgrad(x_RI, dy_RO, bins_E))


def test_what_it_refuses(table, device):
    bins_E = torch.tensor([2, 1], dtype=torch.int32, device=device)
    x, w, y = (torch.zeros(2, 2, 2, device=device) for _ in range(3))

    def run(dtype, w):
        return table.gemm(dtype, 2, 2, 2, 2, x.data_ptr(), w, bins_E.data_ptr(), None, y.data_ptr(), None)

    BAD_DTYPE, BAD_SHAPE, BAD_BINS = 1, 2, 4
    assert run(0, matrix(w)) == BAD_DTYPE
    assert run(1, Mat(w.data_ptr(), 8, 4, 2)) == BAD_SHAPE
    assert run(1, matrix(w)) == BAD_BINS


def test_a_missing_cublas_is_a_sentence(device):
    if not devices.simt:
        pytest.skip("with kernels on the host only")
    program = """
import cublas
x = torch.zeros(1, 1, 1)
bins = torch.ones(1, dtype=torch.int32)
try:
    cublas.grouped_gemm(cublas.load(devices.simt), x[0], x, bins, x[0])
except RuntimeError as error:
    print(error)
"""
    try:
        ctypes.CDLL("libcublas.so.12")
        pytest.skip("this machine has a cuBLAS")
    except OSError:
        said = devices.python(program, device).stdout
    assert said.startswith("status 7: cuBLAS is not to be had (") and "libcublas.so" in said and "Hint" in said
