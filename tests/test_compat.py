"""compat: the two signatures of grouped_gemm, and the names that install() lends to other people's imports."""

import subprocess
import sys

import pytest
import torch

import moe_ext
from moe_ext import compat

SIZES = torch.tensor([2, 0, 3])


def operands(trans_b=False):
    return torch.randn(5, 4, requires_grad=True), torch.randn(3, *((6, 4) if trans_b else (4, 6)), requires_grad=True)


@pytest.mark.parametrize("trans_b", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_gmm(trans_b, dtype):
    a, b = operands(trans_b)
    want = torch.cat([rows @ (w.T if trans_b else w) for rows, w in zip(a.split(SIZES.tolist()), b, strict=True)])
    got = compat.ops.gmm(a, b, SIZES.to(dtype), trans_b)
    dy = torch.randn(5, 6)
    torch.testing.assert_close((got, *torch.autograd.grad(got, (a, b), dy)),
                               (want, *torch.autograd.grad(want, (a, b), dy)))  # fmt: skip


def test_backend_gmm():
    a, b = operands()
    c = torch.empty(5, 6)
    assert compat.backend.gmm(a, b, SIZES, c=c) is c and not c.requires_grad
    torch.testing.assert_close(c, compat.ops.gmm(a, b, SIZES).detach())
    dw = compat.backend.gmm(a, c, SIZES, trans_a=True)
    torch.testing.assert_close(dw[2], a.detach()[2:].T @ c[2:])
    assert not dw[1].any()


def test_bad_input():
    a, b = operands()
    with pytest.raises(ValueError, match="batch_sizes sum to 4, but a has 5 rows"):
        compat.ops.gmm(a, b, torch.tensor([2, 0, 2]))
    with pytest.raises(ValueError, match="trans_a and trans_b exclude each other"):
        compat.backend.gmm(a, b, SIZES, trans_a=True, trans_b=True)


def python(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", ["layers.moe", "layers.gelu", "layers.fused", "layers", "compat", "optim", "dMoE"])
def test_a_name_works_right_after_the_import(name):
    run = python(f"import moe_ext; moe_ext.{name}")
    assert run.returncode == 0, run.stderr


def test_no_such_name():
    assert not hasattr(moe_ext, "layer") and not hasattr(moe_ext, "__wrapped__")


def test_install():
    run = python("""
from moe_ext import compat, layers, ops
compat.install(); compat.install()
import grouped_gemm, megablocks, megablocks.layers.moe as moe, megablocks.ops as their_ops
from megablocks import Arguments, dMoE, grouped_gemm_util as gg
from megablocks.layers import dmlp_registry, mpu
from megablocks.layers.arguments import from_megatron
assert dMoE is layers.dMoE and moe.MoE is megablocks.MoE and their_ops is ops
assert gg.grouped_gemm_is_available() and gg.ops is grouped_gemm.ops is compat.ops and gg.backend is compat.backend
""")
    assert run.returncode == 0, run.stderr


def test_install_comes_first():
    run = python("""
import sys, types
sys.modules["grouped_gemm"] = types.ModuleType("grouped_gemm")
from moe_ext import compat
compat.install()
""")
    assert "RuntimeError: compat.install: grouped_gemm is already imported" in run.stderr
