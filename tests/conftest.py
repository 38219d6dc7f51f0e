"""Every test runs on the CPU, and on the GPU when there is one; every output starts as NaN.

pytest --simt=build/simt/plain/libmoe_simt.so serves tensors on the CPU with the CUDA kernels of cuda/, compiled for the
host by tests/simt/Makefile, in place of the C core.
"""

import ctypes

import compare
import pytest
import torch
from cases import CASES

import moe_ext

# The shapes are small: a second thread would only wait at barriers. test_determinism.py compares numbers of threads.
torch.set_num_threads(1)



def pytest_addoption(parser):
    parser.addoption("--simt", metavar="LIBRARY", help="serve the CPU with the CUDA kernels of this library")


def pytest_configure(config):
    if path := config.getoption("--simt"):
        library = ctypes.CDLL(path)
        library.moe_cuda_table.restype = ctypes.c_void_p
        ctypes.CDLL(moe_ext._C.__file__).moe_cpu_serve(ctypes.c_void_p(library.moe_cuda_table()))
        compare.FLOATS.remove(torch.float64)  # the kernels of cuda/ have none


DEVICES = ["cpu"] + ["cuda"] * moe_ext.has_cuda()


def _name(value):
    return str(value).removeprefix("torch.")


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=compare.FLOATS, ids=_name)
def dtype(request):
    return request.param


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


@pytest.fixture(autouse=True, scope="session")
def poison():
    """Memory that an op leaves unwritten is NaN (or the largest integer), never a lucky zero."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
