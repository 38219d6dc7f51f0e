"""Grouped GEMM in its three forms, and the activations."""

import pytest
import torch
from cases import CASES, SMALLEST
from compare import against_reference, close, each_set_alone, gradcheck, kept, same
from devices import widest
from drawn import drawn_case
from hypothesis import given, settings

from moe_ext import ops, reference

ACTIVATIONS = ["swiglu", "geglu", "geglu_tanh", "swiglu_oai", "silu", "gelu", "gelu_tanh", "relu"]
GATED = ACTIVATIONS[:4]

# How the [E,I,O] weight of the op lies in the memory that its owner keeps.
STRIDES = {
    "contiguous": lambda w_EIO: w_EIO.contiguous(),
    "transposed": lambda w_EIO: w_EIO.transpose(1, 2).contiguous().transpose(1, 2),
    "half of a fused weight": lambda w_EIO: torch.cat([w_EIO, w_EIO], 2)[:, :, : w_EIO.shape[2]],
    "no unit stride": lambda w_EIO: torch.stack([w_EIO, w_EIO], 3)[..., 0],
}


def gemm_inputs(case, dtype, device):
    bins_E = reference.route_index(case.ids(device), case.shape.E).bins_E
    R, (_, D, F, E, _) = case.shape.T * case.shape.k, case.shape
    x_RI = case.randn(R, D, salt=1, dtype=dtype, device=device)
    x_RI[int(bins_E[-1]) :] = torch.nan  # rows of nobody are never read
    return bins_E, {"x_RI": x_RI, "w_EIO": case.randn(E, D, F, salt=2, dtype=dtype, device=device) / D**0.5}


def check_grouped_gemm(impl, case, dtype, device, strides="contiguous"):
    bins_E, inputs = gemm_inputs(case, dtype, device)
    against_reference(impl, lambda ops, x_RI, w_EIO: ops.grouped_gemm(x_RI, STRIDES[strides](w_EIO), bins_E), inputs)


def check_grouped_gemm_wgrad(impl, case, dtype, device):
    bins_E, inputs = gemm_inputs(case, dtype, device)
    x_RI, dy_RO = inputs["x_RI"], case.randn(len(inputs["x_RI"]), case.shape.h, salt=3, dtype=dtype, device=device)
    got, plain = impl.grouped_gemm_wgrad(x_RI, dy_RO, bins_E), reference.grouped_gemm_wgrad(x_RI, dy_RO, bins_E)
    close(got, plain, reference.grouped_gemm_wgrad(x_RI.double(), dy_RO.double(), bins_E))


def check_activation(impl, act, dtype, device, shape=(37, 23)):
    rows, F = shape
    h_NU = 3 * torch.randn(rows, F * (1 + (act in GATED)), dtype=torch.float64)
    ends = torch.tensor([0.0, -0.0, 20.0, -20.0, 90.0, -90.0, 7.0, -7.0])  # the flat ends, and where clamps bend
    h_NU[:1, :8], h_NU[-1:, -8:] = ends[: h_NU.shape[1]], ends[: h_NU.shape[1]]  # of gates, and of ups
    against_reference(impl, lambda ops, h_NU: ops.activation(h_NU, act), {"h_NU": h_NU.to(dtype).to(device)})


@pytest.mark.parametrize("strides", STRIDES)
def test_grouped_gemm(case, dtype, device, strides):
    check_grouped_gemm(ops, case, dtype, device, strides)


def test_grouped_gemm_wgrad(case, dtype, device):
    check_grouped_gemm_wgrad(ops, case, dtype, device)


def test_each_set_of_gradients_alone(device):
    """And what a product keeps is the other factor of each gradient."""
    bins_E, inputs = gemm_inputs(CASES[1], torch.float32, device)
    dy_RO = CASES[1].randn(len(inputs["x_RI"]), CASES[1].shape.h, salt=3, dtype=torch.float32, device=device)
    for op, y in ((ops.grouped_gemm, inputs["w_EIO"]), (ops.grouped_gemm_wgrad, dy_RO)):
        call, factors = lambda x, y, op=op: op(x, y, bins_E), {"x": inputs["x_RI"], "y": y}
        each_set_alone(call, factors)
        for wanted, names in (("x", {"y"}), ("y", {"x"}), ("xy", {"x", "y"})):
            assert kept(call, factors, wanted) == (names, bins_E.nbytes)


# Rows, the ends of the experts, inner and outer width. On the two multiprocessors of the host harness they take every
# tile of cuda/gemm.cuh in each of the three products, several of them per block, and edges in all directions.
TILES = {
    "big": (300, [2, 300], 72, 264),
    "medium": (710, [130, 690], 40, 520),
    "small": (200, [1, 1, 70, 71, 199], 136, 136),
    "big sums": (310, [300], 264, 136),
    "medium sums": (320, [5, 100, 200, 310], 128, 120),
}


@pytest.mark.parametrize("strides", ["contiguous", "transposed"])
@pytest.mark.parametrize("tiles", TILES)
def test_tiles(tiles, strides, dtype, device):
    R, ends, I, O = TILES[tiles]
    times = 8 if device == "cuda" else 1  # a GPU needs more tiles before it prefers large ones
    R, ends, O = R * times, [end * times for end in ends], O * times
    bins_E = torch.tensor(ends, dtype=torch.int32, device=device)
    x_RI, w_EIO = torch.randn(R, I), torch.randn(len(ends), I, O) / I**0.5
    inputs = {"x_RI": x_RI.to(device, dtype), "w_EIO": w_EIO.to(device, dtype)}
    against_reference(ops, lambda ops, x_RI, w_EIO: ops.grouped_gemm(x_RI, STRIDES[strides](w_EIO), bins_E), inputs)


@pytest.mark.parametrize("strides", ["contiguous", "transposed"])
def test_long_sums(strides, device):
    """Of thousands of positive products in float32: one chain of roundings errs many times as much as plain torch."""
    x_RI, w_EIO = torch.rand(16, 8192).to(device), torch.rand(1, 8192, 16).to(device)
    few, many = (torch.tensor([n], dtype=torch.int32, device=device) for n in (16, 8192))

    def both(ops, dtype):
        x, w = x_RI.to(dtype), w_EIO.to(dtype)
        y_RO = ops.grouped_gemm(x, STRIDES[strides](w), few)
        return y_RO, ops.grouped_gemm_wgrad(x.T.contiguous(), w[0].contiguous(), many)

    results = zip(both(ops, torch.float32), both(reference, torch.float32), both(reference, torch.float64), strict=True)
    for name, (got, plain, oracle) in zip(["y", "dw"], results, strict=True):
        close(got, plain, oracle, name)


def test_rows_do_not_know_their_batch(dtype, device):
    """A row has the same bits in any tile, wherever it stands and whatever else is there."""
    x_RI, w_IO = torch.randn(300, 72).to(device, dtype), torch.randn(72, 264).to(device, dtype)

    def product(*ends):
        bins_E = torch.tensor(ends, dtype=torch.int32, device=device)
        return ops.grouped_gemm(x_RI[: ends[-1]].contiguous(), w_IO.expand(len(ends), 72, 264).contiguous(), bins_E)

    y_RO = product(300)
    same(product(40), y_RO[:40])
    same(product(0, 7, 150, 150, 300), y_RO)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (37, 23), (5, 300)], ids=str)
def test_activation(act, shape, dtype, device):
    check_activation(ops, act, dtype, device, shape)


@pytest.mark.c_core
def test_gradcheck():
    bins_E, inputs = gemm_inputs(SMALLEST, torch.float64, "cpu")
    inputs["x_RI"] = inputs["x_RI"].nan_to_num()
    gradcheck(lambda x, w: ops.grouped_gemm(x, w, bins_E), {"x": inputs["x_RI"], "w": inputs["w_EIO"]})
    for act in ACTIVATIONS:
        h_NU = SMALLEST.randn(4, 6, salt=5) * (6 if act == "swiglu_oai" else 1)  # to beyond its clamps
        gradcheck(lambda h, act=act: ops.activation(h, act), {"h": h_NU})


@settings(derandomize=True, max_examples=30, deadline=None)
@given(case=drawn_case())
def test_drawn_routings(case, device):
    check_grouped_gemm(ops, case, torch.float32, device)
    check_grouped_gemm_wgrad(ops, case, torch.float32, device)


def test_each_expert_is_a_plain_product(case, device):
    """Without the reference: the rows of an expert times its matrix."""
    bins_E, inputs = gemm_inputs(case, widest(device), device)
    y_RO = ops.grouped_gemm(**inputs, bins_E=bins_E)
    begin = 0
    for e, end in enumerate(bins_E.tolist()):
        torch.testing.assert_close(y_RO[begin:end], inputs["x_RI"][begin:end] @ inputs["w_EIO"][e])
        begin = end
    assert y_RO[begin:].eq(0).all()
