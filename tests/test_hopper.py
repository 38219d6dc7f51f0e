"""Which way grouped products go (docs/hopper.md): on Hopper by TMA and wgmma wherever these can, elsewhere never."""

import functools
import os
from types import SimpleNamespace

import cublas
import devices
import pytest
import torch
from cases import Case, Shape
from compare import each_set_alone, same
from test_expert import BIASES, mlp_call, mlp_inputs
from test_head import peak_bytes

from benchmarks import policy
from moe_ext import ops

pytestmark = pytest.mark.kernels
GEMM, *TILES = cublas.WAYS


@pytest.fixture(scope="module")
def table(device):
    return cublas.load(devices.simt if device == "cpu" else None)


@pytest.fixture(scope="module")
def hopper(device):
    if device == "cpu":
        return os.environ.get("SIMT_SM") == "90" and os.environ.get("MOE_SM90") != "0"
    return torch.cuda.get_device_capability() == (9, 0)


def product(device, dtype=torch.bfloat16, I=72, O=136, offset=0):
    """A grouped product and its weight gradient of these sizes, rows that begin `offset` elements into their memory."""
    bins_E = torch.tensor([70, 70, 200], dtype=torch.int32, device=device)
    x_RI = torch.randn(200 * I + offset).to(device, dtype)[offset:].view(200, I)
    w_EIO, dy_RO = torch.randn(3, I, O).to(device, dtype), torch.randn(200, O).to(device, dtype)
    return lambda: (ops.grouped_gemm(x_RI, w_EIO, bins_E), ops.grouped_gemm_wgrad(x_RI, dy_RO, bins_E))


def count(ran):
    """-> products by gemm.cuh, products of sm90.cuh."""
    return ran.get(GEMM, 0), sum(n for way, n in ran.items() if way != GEMM)


@pytest.mark.parametrize("case, taken", [
    (dict(), True), (dict(dtype=torch.float16), True), (dict(dtype=torch.float32), False),
    (dict(I=70, O=134), False), (dict(offset=1), False), (dict(offset=8), True),
], ids=str)  # fmt: skip
def test_what_tma_takes(case, taken, table, hopper, device):
    _, ran = cublas.ways(table, product(device, **case))
    assert count(ran) == ((0, 2) if hopper and taken else (2, 0))


def test_one_weight_for_all_experts(table, hopper, device):
    """A stride of 0, which TMA does not promise to take."""
    bins_E = torch.tensor([70, 70, 200], dtype=torch.int32, device=device)
    x_RI, w_IO = torch.randn(200, 72).bfloat16().to(device), torch.randn(72, 136).bfloat16().to(device)
    y_RO, ran = cublas.ways(table, lambda: ops.grouped_gemm(x_RI, w_IO.expand(3, -1, -1), bins_E))
    assert count(ran) == (1, 0)
    torch.testing.assert_close(y_RO.double(), x_RI.double() @ w_IO.double(), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("act, stored, products", [("swiglu", "w13", 6), ("swiglu", "separate", 7), ("gelu", "", 6)])
def test_the_layer(act, stored, products, table, hopper, device):
    """Every product of forward and backward; with rows that are no whole 16 bytes, none of the steps that need them."""
    for D, F, taken in ((16, 40, hopper), (20, 20, False)):
        case = Case("layer", Shape(33, D, F, 4, 2), "some_absent")
        inputs = mlp_inputs(case, torch.bfloat16, device, act == "swiglu", BIASES)
        inputs = {name: x.requires_grad_() for name, x in inputs.items()}
        call = mlp_call(case, act, device, stored or "separate")
        _, ran = cublas.ways(table, lambda call=call, inputs=inputs: call(ops, **inputs).sum().backward())
        apart = F == 20 and stored == "w13"     # rows of h that are longer than F: gate and up are no one matrix
        assert count(ran) == ((0, products) if taken else (products + apart, 0))


def test_the_gradient_of_down_alone_takes_no_da(table, hopper, device):
    """In passes it is a product of dy and of what h and the weights give; elsewhere one of no depth comes before it."""
    case = Case("down", Shape(33, 16, 40, 4, 2), "some_absent")
    inputs = mlp_inputs(case, torch.bfloat16, device, True, BIASES)
    down, call = inputs["down"].requires_grad_(), mlp_call(case, "swiglu", device)
    _, ran = cublas.ways(table, lambda: torch.autograd.grad(call(ops, **inputs).sum(), down))
    assert count(ran) == ((0, 3) if hopper else (4, 0))


@pytest.mark.parametrize("act, stored", [("swiglu", "separate"), ("swiglu", "w13"), ("gelu", "separate")])
def test_each_set_of_gradients_alone(act, stored, device):
    """In passes too: of rows that are whole 16 bytes."""
    case = Case("whole", Shape(7, 8, 16, 3, 2), "some_absent")
    inputs = mlp_inputs(case, torch.bfloat16, device, act == "swiglu", BIASES)
    each_set_alone(functools.partial(mlp_call(case, act, device, stored), ops), inputs)


def test_every_tile_gives_the_same_bits(table, hopper, device):
    """Tiles and their order change no result; and force, which tuning uses, is heard."""
    if not hopper:
        pytest.skip("needs Hopper")
    call = product(device, I=200, O=264)
    want = call()
    for number, way in enumerate(TILES, 1):
        table.force(number, number)
        try:
            got, ran = cublas.ways(table, call)
        finally:
            table.force(-1, 0)
        assert way in ran
        same(got[0], want[0])
        same(got[1], want[1])


@pytest.mark.parametrize("name, tiles", [("down", TILES), ("dW2", [TILES[0], TILES[2]])])
def test_what_the_tuner_tries(name, tiles, table, hopper, device):
    """Every way, and in the policy's way every group."""
    def randn(*size, scale=1):
        return scale * torch.randn(size, dtype=torch.bfloat16, device=device)

    bench = SimpleNamespace(cublas=table, without=[], randn=randn)
    *_, call = policy.products(bench, Shape(40, 16, 24, 3, 2))[name]
    bins_E = torch.tensor([30, 30, 80], dtype=torch.int32, device=device)
    found, chosen = policy.candidates(bench, name, call, SimpleNamespace(bins_E=bins_E))
    ways = [GEMM, *tiles, *policy.GROUPS] if hopper else [GEMM]
    assert list(found) == ["ours", *ways] and chosen in ways


def test_no_byte_more_is_lent(table, hopper, device, tmp_path):
    """The sorted copies of a backward lie where the gradients of x's copies will."""
    if not hopper or device != "cpu":
        pytest.skip("needs Hopper in the host harness, which sees allocations")
    case = Case("peak", Shape(64, 32, 40, 4, 2), "balanced")
    inputs = {name: x.requires_grad_() for name, x in mlp_inputs(case, torch.bfloat16, "cpu", True, BIASES).items()}

    def peak(way, wanted):
        table.force(way, 0)
        try:
            y_RD = mlp_call(case, "swiglu", "cpu")(ops, **inputs)
            leaves, dy_RD = [inputs[name] for name in wanted], torch.ones_like(y_RD)
            return peak_bytes(lambda: torch.autograd.grad(y_RD, leaves, dy_RD), tmp_path / f"{way}.json")
        finally:
            table.force(-1, 0)

    copy = 2 * 64 * 2 * 32                      # bytes of N rows of D
    weights = [name for name in inputs if name != "x_RD"]
    assert peak(-1, inputs) <= peak(0, inputs)
    assert peak(-1, weights) <= peak(0, weights) + copy
    assert peak(-1, ["x_RD"]) <= peak(0, ["x_RD"]) + 2 * 64 * 2 * 40       # dA'


PROGRAM = """
import cublas
from test_hopper import product
table = cublas.load(devices.simt if device == "cpu" else None)
print(list(cublas.ways(table, product(device))[1]))
"""


def test_the_environment_switches_it_off(device):
    assert devices.python(PROGRAM, device, MOE_SM90="0").stdout == f"[{GEMM!r}]\n"


def test_a_wrong_switch_is_a_sentence(device):
    said = devices.python(PROGRAM, device, MOE_SM90="off").stderr
    assert 'MOE_SM90 is "off", wanted 0' in said
