"""Every test runs on the CPU, and on the GPU when there is one; every output starts as NaN."""

import pytest
import torch
from cases import CASES
from compare import FLOATS

import moe_ext

# The shapes are small: a second thread would only wait at barriers. test_determinism.py compares numbers of threads.
torch.set_num_threads(1)

DEVICES = ["cpu"] + ["cuda"] * moe_ext.has_cuda()


def _name(value):
    return str(value).removeprefix("torch.")


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=FLOATS, ids=_name)
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
