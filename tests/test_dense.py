"""The product of a linear layer by the C core, where torch's leaves instructions unused."""

import sys

import pytest
import torch
from cases import Case, Shape
from compare import against_reference, each_set_alone, gradcheck, same
from ranks import run_ranks
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from moe_ext import attention, ops
from moe_ext.layers.fused import MLP, Linear
from moe_ext.model import RMSNorm

dense = sys.modules["moe_ext.ops.dense"]
CASE = Case("dense", Shape(301, 37, 23, 1, 1), "balanced")


@pytest.fixture
def slow_torch(monkeypatch):
    """A CPU on which torch has a fast product of no dtype."""
    for module in (dense, attention):
        monkeypatch.setattr(module, "torch_knows", lambda dtype: False)


def linear_inputs(case, dtype, device):
    T, D, F, *_ = case.shape
    return {"x": case.randn(T, D, salt=1, dtype=dtype, device=device),
            "w_OI": case.randn(F, D, salt=2, dtype=dtype, device=device),
            "bias_O": case.randn(F, salt=3, dtype=dtype, device=device)}  # fmt: skip


def check_linear(impl, case, dtype, device):
    against_reference(impl, lambda ops, **inputs: ops.linear(**inputs), linear_inputs(case, dtype, device))


@pytest.mark.parametrize("T", [0, 1, 127, 128, 301])
def test_linear(T, dtype, device, slow_torch):
    check_linear(ops, CASE._replace(shape=CASE.shape._replace(T=T)), dtype, device)


def test_it_is_ours_of_many_rows_alone(slow_torch, monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [dense.ours(cpu, torch.float32, T) for T in (127, 128)] == [False, True]
    assert [dense.ours(cpu, torch.bfloat16, T) for T in (7, 8)] == [False, True]
    assert not dense.ours(cuda, torch.bfloat16, 1000)
    monkeypatch.setattr(dense, "torch_knows", lambda dtype: True)
    assert not dense.ours(cpu, torch.bfloat16, 1000)


def test_what_torch_is_slow_at(monkeypatch):
    halves, floats = (torch.bfloat16, torch.float16), (torch.float32, torch.float64)
    for capability, slow in (("AVX2", halves), ("AVX512", (torch.float16,))):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        for isa, vendor, more in (("avx2", "AuthenticAMD", ()), ("avx512", "AuthenticAMD", floats),
                                  ("avx512", "GenuineIntel", ())):
            monkeypatch.setattr(dense._C, "versions", lambda isa=isa: {"isa": isa})
            monkeypatch.setattr(dense, "_vendor", lambda vendor=vendor: f"vendor_id : {vendor}\n")
            assert dense.slow_dtypes() == slow + more


@pytest.fixture
def slow_at_all(monkeypatch):
    """The same in a way that torch.compile sees too."""
    monkeypatch.setattr(dense, "SLOW", (torch.float32, torch.float64, torch.bfloat16, torch.float16))


@pytest.mark.c_core
def test_one_graph_for_any_number_of_rows(slow_at_all):
    """Compiled and exported, be it ours or torch's."""
    torch._dynamo.reset()
    mlp, counter = MLP(8, 6), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mlp, backend=counter, fullgraph=True, dynamic=True)
    exported = torch.export.export(mlp, (torch.randn(20, 8),), dynamic_shapes=({0: torch.export.Dim("T")},)).module()
    for T in (2, 7, 8, 127, 128, 300):
        x = CASE.randn(T, 8, salt=T, dtype=torch.float32)
        torch.testing.assert_close(compiled(x), mlp(x))
        torch.testing.assert_close(exported(x), mlp(x))
    assert counter.frame_count == 1
    assert "moe_ext.linear" in counter.graphs[0].code


def test_on_meta_it_has_a_shape():
    x, w = (torch.empty(*size, device="meta", dtype=torch.bfloat16) for size in ((300, 4), (3, 4)))
    assert ops.linear(x, w).shape == (300, 3)


@pytest.mark.c_core
def test_only_the_gradients_that_are_wanted(slow_torch):
    each_set_alone(lambda **inputs: ops.linear(**inputs), linear_inputs(CASE, torch.float64, "cpu"))


@pytest.mark.c_core
def test_a_gradient_of_any_strides(slow_torch):
    x, w, _ = (t.requires_grad_() for t in linear_inputs(CASE, torch.float64, "cpu").values())
    ops.linear(x, w).sum().backward()
    torch.testing.assert_close(w.grad, x.detach().sum(0).expand_as(w))
    torch.testing.assert_close(x.grad, w.detach().sum(0).expand_as(x))


@pytest.mark.c_core
def test_a_bias_follows_autocast(slow_torch):
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(**linear_inputs(CASE, torch.float32, "cpu")).dtype == torch.bfloat16


@pytest.mark.c_core
def test_gradcheck():
    x, w = (CASE.randn(*size, salt=1) for size in ((5, 3), (4, 3)))
    gradcheck(torch.ops.moe_ext.linear, {"x": x, "w": w})


@pytest.mark.c_core
def test_the_head_by_our_product(slow_torch):
    x, w = CASE.randn(300, 37, salt=1), CASE.randn(50, 37, salt=2)
    targets_T = torch.arange(300) % 50
    against_reference(ops, lambda o, x, w: o.linear_cross_entropy(x, w, targets_T, chunk=140), {"x": x, "w": w})


@pytest.mark.c_core
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_halves(masked, slow_torch):
    """In float32, rounded once: as near to the truth as can be."""
    q, k, v = (CASE.randn(2, 4, 9, 8, salt=s, dtype=torch.bfloat16).requires_grad_() for s in range(3))
    seen = torch.zeros(9, 9, dtype=torch.bfloat16).masked_fill_(attention.visible(9)[0, 0].logical_not(), -torch.inf)
    with torch.autocast("cpu", torch.bfloat16):
        y = attention.attend(q, k, v, seen[None, None] if masked else None)
    exact = attention.attend(q.float(), k.float(), v.float())
    same(y, exact.bfloat16())
    dy = torch.ones_like(y)
    for got, want in zip(torch.autograd.grad(y, (q, k, v), dy), torch.autograd.grad(exact, (q, k, v), dy.float()),
                         strict=True):  # fmt: skip
        same(got, want)


def test_torch_shards_linear_layers_and_norms(tmp_path):
    """torch's own tensor parallelism, on a mesh of one rank, of layers whose product or norm is ours without it."""
    def body(rank):
        import torch.distributed.tensor.parallel as tp

        torch.manual_seed(0)
        model = nn.Sequential(RMSNorm(32, eps=1e-6), Linear(32, 64), Linear(64, 32)).bfloat16()
        x = torch.randn(2, 16, 32).bfloat16()
        want = model(x)
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        plan = {"0": tp.SequenceParallel(), "1": tp.ColwiseParallel(), "2": tp.RowwiseParallel()}
        model = tp.parallelize_module(model, mesh, plan)
        model[0].register_forward_hook(lambda module, inputs, y: y.full_tensor())
        got = model(x)
        got.float().sum().backward()
        return (got - want).abs().max().item(), all(p.grad is not None for p in model.parameters())

    (difference, trained), = run_ranks(1, body, tmp_path)
    assert difference < 0.05 and trained
