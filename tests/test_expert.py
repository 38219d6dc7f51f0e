"""The fused expert MLP: every way to store its weights, every bias and activation, and what it keeps for backward."""

import functools
import itertools

import devices
import pytest
import torch
from cases import CASES, SMALLEST, Case, Shape
from compare import against_reference, each_set_alone, gradcheck, kept, same
from drawn import drawn_case
from hypothesis import given, settings
from test_gemm import ACTIVATIONS, GATED
from test_head import peak_bytes

from moe_ext import ops, reference

# How the owner of the weights stores them. gate_EFD, up_EFD, down_EDF in; the op's arguments out.
STORED = {
    "separate": lambda gate, up, down: (gate, up, down),
    "w13": lambda gate, up, down: (torch.cat([gate, up], 1), None, down),
    "halves of w13": lambda gate, up, down: (*torch.cat([gate, up], 1).chunk(2, 1), down),
    "megablocks": lambda gate, up, down: (gate, up, down.transpose(1, 2).contiguous().transpose(1, 2)),
    "w13 of four": lambda gate, up, down: (torch.stack([gate, up], 1), None, down),
    "alternating": lambda gate, up, down: (
        torch.stack([gate.mT, up.mT], 3).flatten(2).unflatten(2, (-1, 2)).permute(0, 3, 2, 1), None, down),
    "alternating halves": lambda gate, up, down: (*torch.stack([gate.mT, up.mT], 3).permute(3, 0, 2, 1), down),
    "transposed": lambda *weights: tuple(w.transpose(1, 2).contiguous().transpose(1, 2) for w in weights),
}


def mlp_inputs(case, dtype, device, gated, biases, weights_dtype=None):
    """Random tensors of every argument. Weights are scaled so that activations stay near one."""
    T, D, F, E, K = case.shape

    def randn(*size, salt, scale=1.0):
        return (scale * case.randn(*size, salt=salt)).to(dtype).to(device)

    inputs = {"x_RD": randn(T, D, salt=1), "gate": randn(E, F, D, salt=2, scale=D**-0.5)}
    if gated:
        inputs["up"] = randn(E, F, D, salt=3, scale=D**-0.5)
    inputs["down"] = randn(E, D, F, salt=4, scale=F**-0.5)
    inputs["weights_RK"] = case.randn(T, K, salt=5, dtype=weights_dtype or dtype, device=device)
    if "gate" in biases:
        inputs["gate_bias"] = randn(E, F, salt=6)
    if "up" in biases and gated:
        inputs["up_bias"] = randn(E, F, salt=7)
    if "down" in biases:
        inputs["down_bias"] = randn(E, D, salt=8)
    return inputs


def mlp_call(case, act, device, stored="separate"):
    index = reference.route_index(case.ids(device), case.shape.E)
    copies = int(index.bins_E[-1])

    def call(impl, x_RD, gate, down, weights_RK, up=None, gate_bias=None, up_bias=None, down_bias=None):
        if act in GATED:
            gate, up, down = STORED[stored](gate, up, down)
            if up is None and gate_bias is not None:
                gate_bias, up_bias = torch.cat([gate_bias, up_bias], 1), None
        return impl.expert_mlp(x_RD, gate, up, down, weights_RK, index, act=act, gate_bias=gate_bias,
                               up_bias=up_bias, down_bias=down_bias, num_copies=copies)  # fmt: skip

    return call


BIASES = ("gate", "up", "down")


def check_expert_mlp(impl, case, dtype, device, act="swiglu", biases=(), stored="separate", weights_dtype=None):
    inputs = mlp_inputs(case, dtype, device, act in GATED, biases, weights_dtype)
    if act == "swiglu_oai":
        inputs["x_RD"] = 6 * inputs["x_RD"]  # to beyond its clamps
    against_reference(impl, mlp_call(case, act, device, stored), inputs)


@pytest.mark.parametrize("K", [1, 64, 65])
def test_many_copies_of_wide_rows(K, dtype, device):
    """As many as the sum over a row's copies takes in registers, one more, and rows of more than a piece of it."""
    check_expert_mlp(ops, Case("many", Shape(4, 300, 8, 66, K), "some_absent"), dtype, device)


@pytest.mark.parametrize("biases", [(), BIASES], ids=["plain", "biased"])
def test_expert_mlp(case, dtype, device, biases):
    check_expert_mlp(ops, case, dtype, device, biases=biases)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", ["divides_nothing", "some_absent"])
def test_stored_weights(stored, name, dtype, device):
    case = next(c for c in CASES if c.name == name)
    for biases in ((), BIASES):
        check_expert_mlp(ops, case, dtype, device, biases=biases, stored=stored)


@pytest.mark.parametrize("stored", ["alternating", "alternating halves"])
def test_alternating_weights_of_more_than_a_tile(stored, dtype, device):
    check_expert_mlp(ops, Case("wide", Shape(3, 8, 530, 2, 2), "random"), dtype, device, biases=BIASES, stored=stored)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act, dtype, device):
    check_expert_mlp(ops, CASES[1], dtype, device, act, BIASES)


@pytest.mark.parametrize("act", ["swiglu", "gelu"])
def test_biases_of_more_than_a_slab(act, dtype, device):
    """Of more than a block has warps (cuda/expert_sums.cuh), and of a few, of rows wider than a block's columns."""
    for routing, shape in (("one_takes_all", Shape(T=1300, d=16, h=8, E=3, k=1)),
                           ("skewed", Shape(T=150, d=264, h=264, E=5, k=2))):  # fmt: skip
        check_expert_mlp(ops, Case("slabs", shape, routing), dtype, device, act, BIASES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", ["swiglu", "gelu"])
def test_every_subset_of_biases(act, dtype, device):
    """Of rows that Hopper takes, and of others."""
    for case in CASES[:2]:
        for n in range(4):
            for biases in itertools.combinations(BIASES, n):
                check_expert_mlp(ops, case, dtype, device, act, biases)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_routing_weights(case, dtype, device):
    check_expert_mlp(ops, case, dtype, device, biases=BIASES, weights_dtype=torch.float32)


@pytest.mark.c_core
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("biases", [(), BIASES], ids=["plain", "biased"])
def test_gradcheck(act, biases):
    inputs = mlp_inputs(SMALLEST, torch.float64, "cpu", act in GATED, biases)
    call = mlp_call(SMALLEST, act, "cpu")
    gradcheck(lambda **x: call(ops, **x), inputs)


def test_absent_copies_have_zero_gradients(device):
    case = next(c for c in CASES if c.name == "some_absent")
    inputs = mlp_inputs(case, torch.float32, device, True, BIASES)
    weights_RK = inputs["weights_RK"].requires_grad_()
    mlp_call(case, "swiglu", device)(ops, **inputs).sum().backward()
    assert weights_RK.grad[case.ids(device) < 0].eq(0).all()


def test_num_copies_defaults_to_all(device):
    case = CASES[0]
    index = reference.route_index(case.ids(device), case.shape.E)
    x = mlp_inputs(case, torch.float32, device, True, ())
    arguments = (x["x_RD"], x["gate"], x["up"], x["down"], x["weights_RK"], index)
    same(ops.expert_mlp(*arguments, act="swiglu"),
         ops.expert_mlp(*arguments, act="swiglu", num_copies=x["weights_RK"].numel()))  # fmt: skip


@pytest.mark.parametrize("act, stored", [("swiglu", "separate"), ("swiglu", "w13"), ("gelu", "separate")])
def test_each_set_of_gradients_alone(act, stored, device):
    dtype = torch.bfloat16 if stored == "separate" else torch.float32
    inputs = mlp_inputs(SMALLEST, dtype, device, act in GATED, BIASES)
    each_set_alone(functools.partial(mlp_call(SMALLEST, act, device, stored), ops), inputs)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(case=drawn_case())
def test_drawn_routings(case, device):
    check_expert_mlp(ops, case, torch.float32, device, biases=BIASES)


# ---- what it keeps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["swiglu", "gelu"])
@pytest.mark.parametrize("stored", ["separate", "w13", "halves of w13", "megablocks"])
def test_saved_bytes(act, stored, dtype, device):
    """Besides parameters, routing weights and the int32 index: exactly the R rows of x and the N rows of h."""
    case = Case("saved", Shape(33, 16, 24, 4, 2), "some_absent")
    T, D, F, _, _ = case.shape
    inputs = mlp_inputs(case, dtype, device, act in GATED, BIASES)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    weights = STORED[stored](inputs["gate"], inputs["up"], inputs["down"]) if act in GATED else ()
    index = reference.route_index(case.ids(device), case.shape.E)
    owned = {x.untyped_storage().data_ptr() for x in (*inputs.values(), *weights, *index) if x is not None}
    owned.discard(inputs["x_RD"].untyped_storage().data_ptr())
    kept = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in owned:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    gate, up, down = weights or (inputs["gate"], None, inputs["down"])
    gate_bias, up_bias = inputs["gate_bias"], inputs.get("up_bias")
    if act in GATED and up is None:
        gate_bias, up_bias = torch.cat([gate_bias, up_bias], 1), None
        owned.add(gate_bias.untyped_storage().data_ptr())
    N, U = int(index.bins_E[-1]), F * (1 + (act in GATED))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ops.expert_mlp(inputs["x_RD"], gate, up, down, inputs["weights_RK"], index, act=act, gate_bias=gate_bias,
                       up_bias=up_bias, down_bias=inputs["down_bias"], num_copies=N)  # fmt: skip
    assert sum(kept.values()) == dtype.itemsize * (T * D + N * U)


FROZEN = ("x_RD", "weights_RK")  # what wants gradients where the experts are frozen


@pytest.mark.parametrize("wanted", [FROZEN, FROZEN[1:], ("gate",), ("up", "x_RD"), ("down", "x_RD"), ("down_bias",)])
def test_x_is_kept_for_the_gradients_of_gate_and_up_alone(wanted, device):
    case = Case("saved", Shape(33, 16, 24, 4, 2), "some_absent")
    inputs = mlp_inputs(case, torch.float32, device, True, BIASES)
    names, rest = kept(functools.partial(mlp_call(case, "swiglu", device), ops), inputs, wanted)
    (T, _, F, E, K), N = case.shape, int(case.ids().ge(0).sum())
    assert ("x_RD" in names) == ("gate" in wanted or "up" in wanted)
    assert rest == 4 * N * 2 * F + 4 * (2 * T * K + E), "h and the index"


@pytest.mark.parametrize("device", ["cpu"])
def test_frozen_experts_cost_no_memory(device, tmp_path):
    """Neither their gradients nor, where torch lends it, the workspace of these. The C core's is in c/test_expert.c."""
    case = Case("frozen", Shape(33, 16, 24, 4, 2), "some_absent")
    call = mlp_call(case, "swiglu", device)

    def peak(wanted):
        inputs = mlp_inputs(case, torch.float32, device, True, BIASES)
        leaves = [x.requires_grad_() for name, x in inputs.items() if name in wanted]
        y_RD, dy_RD = call(ops, **inputs), torch.ones(33, 16)
        return peak_bytes(lambda: torch.autograd.grad(y_RD, leaves, dy_RD), tmp_path / "trace.json"), inputs

    (frozen, _), (everything, inputs) = peak(FROZEN), peak(mlp_inputs(case, torch.float32, device, True, BIASES))
    weights = sum(x.nbytes for name, x in inputs.items() if name not in FROZEN)
    workspace = 4 * int(case.ids().ge(0).sum()) * case.shape.h if devices.simt else 0
    assert frozen <= everything - weights - workspace


@pytest.mark.parametrize("act, stored", [("swiglu", "w13"), ("swiglu", "transposed"), ("gelu", "separate")])
def test_big_tiles(act, stored, dtype, device):
    """Wide and long enough for the largest tile of cuda/gemm.cu in the products with an epilogue of their own."""
    more = 8 if device == "cuda" else 1
    case = Case("big_tiles", Shape(T=210 * more, d=24, h=200 * more, E=2, k=2), "balanced")
    check_expert_mlp(ops, case, dtype, device, act=act, biases=BIASES, stored=stored)
