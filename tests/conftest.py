"""A test of an op takes the fixture `device` and runs on every device there is; every output starts as NaN.

pytest --simt=build/simt/plain/libmoe_simt.so serves tensors on the CPU with the CUDA kernels of cuda/, compiled for the
host by tests/simt/Makefile, in place of the C core. pytest --device=cuda runs on the GPU alone.

The kernels of cuda/ take no float64, so with them every test leaves out the parameter dtype=float64. A test that is
about float64, or about the C core itself, is marked c_core and left out there; one marked kernels runs only there.
"""

import os

# What a kernel finds wrong in memory is raised by the call that met it, not by a later one.
os.environ.setdefault("MOE_CHECK", "1")
os.environ["HF_HUB_OFFLINE"] = "1"      # no test asks anybody: a folder that is not there is an error at once
# Tests fork, and Megatron compiles in the child: it would wait for the parent's compiling threads, which no fork has.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import devices
import pytest
import torch
from cases import CASES

# The shapes are small: a second thread would only wait at barriers. test_determinism.py compares numbers of threads.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def one_thread():
    """For a file that forks in this process: a thread pool does not survive that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_addoption(parser):
    parser.addoption("--simt", metavar="LIBRARY", help="serve the CPU with the CUDA kernels of this library")
    parser.addoption("--device", choices=devices.DEVICES, help="leave out the tests of every other device")


def pytest_configure(config):
    config.addinivalue_line("markers", "c_core: of the C core alone: float64, threads, instruction sets, the checks")
    config.addinivalue_line("markers", "kernels: of the kernels of cuda/ alone, on a GPU or under --simt")
    if path := config.getoption("--simt"):
        devices.serve(path)


def pytest_collection_modifyitems(config, items):
    only, kept, left_out = config.getoption("--device"), [], []
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        device = params.get("device", "cpu")
        kernels = device == "cuda" or devices.simt
        wrong = "c_core" if kernels else "kernels"
        runs = only in (None, device) and not item.get_closest_marker(wrong)
        runs = runs and (params.get("dtype") != torch.float64 or torch.float64 in devices.floats(device))
        (kept if runs else left_out).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def _name(value):
    return str(value).removeprefix("torch.")


@pytest.fixture(params=devices.DEVICES, scope="session")
def device(request):
    return request.param


@pytest.fixture(params=devices.FLOATS, ids=_name)
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
