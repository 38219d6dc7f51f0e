"""RMSNorm, the residual addition with a norm, RoPE's rotation, the sum of squares."""

import math

import pytest
import torch
from cases import SMALLEST, Case, Shape
from compare import against_reference, each_set_alone, gradcheck, same

from moe_ext import ops, reference

WIDE = Case("wide", Shape(70, 1500, 1, 1, 1), "balanced")  # rows of two tiles, blocks of rows that are not full


def norm_inputs(case, dtype, device, wdtype=None):
    T, D, *_ = case.shape
    return {"x": case.randn(T, D, salt=1, dtype=dtype, device=device),
            "w_n": case.randn(D, salt=2, dtype=wdtype or dtype, device=device)}  # fmt: skip


def check_rms_norm(impl, case, dtype, device, wdtype=None):
    against_reference(impl, lambda ops, x, w_n: ops.rms_norm(x, w_n, 1e-5),
                      norm_inputs(case, dtype, device, wdtype))  # fmt: skip


def check_add_norm(impl, case, dtype, device, adds=True, centred=True, biased=True):
    """x + y is plain torch's in every bit, the rest obeys the rule. The op knows no dtype but float32 and halves."""
    T, D, *_ = case.shape
    half = dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    inputs = {"x": case.randn(T, D, salt=1, dtype=torch.float32, device=device) + 2,
              "w_n": case.randn(D, salt=2, dtype=torch.float32, device=device)}  # fmt: skip
    if adds:
        inputs["y"] = case.randn(T, D, salt=3, dtype=half, device=device)
    if biased:
        inputs["b_n"] = case.randn(D, salt=4, dtype=torch.float32, device=device)

    def call(ops, x, w_n, y=None, b_n=None):
        s, z = ops.add_norm(x, y, w_n, b_n, 1e-5, centred=centred, dtype=half)
        assert (s is None) == (y is None)
        return z if s is None else (s, z)

    against_reference(impl, call, inputs)
    if adds:
        same(call(impl, **inputs)[0], inputs["x"] + inputs["y"])


def check_rotate(impl, case, dtype, device, heads=3, columns=None):
    """The positions of T tokens in each of two sequences turn `columns` of d columns."""
    T, d, *_ = case.shape
    n = d // 2 if columns is None else columns // 2
    angle = case.randn(T, 1, n, salt=5, device=device)
    x_BSHd = case.randn(2, T, heads, d, salt=6, dtype=dtype, device=device)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    against_reference(impl, lambda ops, **inputs: ops.rotate(**inputs),
                      {"x_BSHd": x_BSHd, "cos": angle.cos().to(real), "sin": angle.sin().to(real)})  # fmt: skip


def check_square_sum(impl, case, dtype, device):
    T, d, *_ = case.shape
    x = case.randn(T, d, salt=7, dtype=dtype, device=device)
    got, want = impl.square_sum(x=x), reference.square_sum(x)
    assert got.dtype == torch.float64 and got.shape == ()
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


def test_rms_norm(case, dtype, device):
    check_rms_norm(ops, case, dtype, device)


@pytest.mark.kernels
@pytest.mark.parametrize("shape", [(2500, 24), (5, 9001), (1100, 520)], ids=str)
def test_rows_of_many_blocks(shape, device):
    """Blocks of several rows, rows too wide for shared memory, groups of several warps."""
    check_rms_norm(ops, Case("many", Shape(*shape, 1, 1, 1), "balanced"), torch.float32, device)


@pytest.mark.parametrize("wdtype", [None, torch.float32], ids=["same", "float32"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_wide_rows(half, wdtype, device):
    check_rms_norm(ops, WIDE, half, device, wdtype)
    check_rms_norm(ops, WIDE, torch.float32, device)


def test_rms_norm_of_any_shape_and_strides(device):
    x, w_n = torch.randn(3, 8, 5, device=device).transpose(1, 2), torch.randn(8, device=device)
    want = ops.rms_norm(x.contiguous().view(15, 8), w_n, 1e-6).view(3, 5, 8)
    same(ops.rms_norm(x, w_n, 1e-6), want)
    same(ops.rms_norm(x, w_n.repeat_interleave(2)[::2], 1e-6), want)


def test_rms_norm_keeps_nan_and_infinity_to_their_rows(device):
    x = torch.ones(4, 6, device=device)
    x[1, 2], x[2, 3] = math.nan, math.inf
    bad = ops.rms_norm(x, torch.ones(6, device=device), 0.0).isnan().any(1)
    assert bad.tolist() == [False, True, True, False]
    assert ops.rms_norm(x[:1] * 0, torch.ones(6, device=device), 1e-6).eq(0).all()


@pytest.mark.parametrize("case", [SMALLEST, WIDE, Case("widest", Shape(3, 9001, 1, 1, 1), "balanced"),
                                  Case("many", Shape(2500, 24, 1, 1, 1), "balanced")], ids=lambda case: case.name)
@pytest.mark.parametrize("adds", [True, False], ids=["adds", "alone"])
@pytest.mark.parametrize("centred", [True, False], ids=["layernorm", "rmsnorm"])
def test_add_norm(case, adds, centred, device):
    for half in (torch.bfloat16, torch.float16):
        check_add_norm(ops, case, half, device, adds, centred, biased=centred)


def test_add_norm_without_one_of_its_results(device):
    """What nobody reads gives no gradient, and costs none: the sum alone, the norm alone."""
    x, w_n = torch.randn(5, 24, device=device, requires_grad=True), torch.rand(24, device=device, requires_grad=True)
    y = torch.randn(5, 24, device=device, dtype=torch.bfloat16, requires_grad=True)
    s, z = ops.add_norm(x, y, w_n, None, 1e-5, centred=False, dtype=torch.bfloat16)
    ds, dz = torch.randn_like(s), torch.randn_like(z)
    dx, dy, dw = torch.autograd.grad(s, (x, y, w_n), ds, retain_graph=True, allow_unused=True)
    same(dx, ds), same(dy, ds.bfloat16())
    assert dw is None
    of_z = torch.autograd.grad(z, (x, y, w_n), dz, retain_graph=True)
    both = torch.autograd.grad((s, z), (x, y, w_n), (ds, dz))
    same(both[0], of_z[0] + ds), same(of_z[1], of_z[0].bfloat16()), same(both[2], of_z[2])


@pytest.mark.parametrize("shape", [(0, 8), (5, 1), (3, 257), (66, 511)], ids=str)
def test_add_norm_of_rows_that_are_not_aligned(shape, device):
    """Rows that begin anywhere, in memory too; no rows, whose weights get zeros; one column, which has no variance."""
    R, n = shape

    def placed(t):
        return torch.cat([t.new_zeros(1), t.flatten()]).to(device)[1:].view(t.shape)

    x, y, w_n, b_n = (placed(torch.randn(size)) for size in (shape, shape, n, n))
    inputs = {"x": x, "w_n": w_n, "y": placed(y.bfloat16()), "b_n": b_n}

    def call(ops, x, w_n, y, b_n):
        return ops.add_norm(x, y, w_n, b_n, 1e-2, centred=True, dtype=torch.bfloat16)

    if R:
        against_reference(ops, call, inputs)
        return
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    s, z = call(ops, **leaves)
    dx, dy, *sums = torch.autograd.grad((s, z), [leaves[name] for name in ("x", "y", "w_n", "b_n")], (s, z))
    assert dx.shape == dy.shape == shape and all(d.eq(0).all() for d in sums)


@pytest.mark.parametrize("centred", [True, False], ids=["layernorm", "rmsnorm"])
def test_a_row_of_add_norm_knows_no_other(centred, device):
    """Its bits are those that it has alone; NaN and infinity stay in theirs, forward and backward."""
    x, y, w_n = torch.randn(70, 33, device=device), torch.randn(70, 33, device=device), torch.ones(33, device=device)
    y = y.bfloat16()
    x[1, 2], x[2, 3], y[66, 0] = math.nan, math.inf, math.nan
    x[4], y[4] = 0, 0

    def call(x, y):
        x.requires_grad_()
        s, z = ops.add_norm(x, y, w_n, None, 1e-6, centred=centred, dtype=torch.bfloat16)
        return s, z, *torch.autograd.grad((s, z), x, (torch.ones_like(s), z.detach() * 2 + 1))

    whole = call(x.clone(), y)
    for result in whole[1:]:
        assert result.isnan().any(1).nonzero().flatten().tolist() == [1, 2, 66]
    assert whole[1][4].eq(0).all()
    for m in (0, 4, 69):
        for result, alone in zip(whole, call(x[m:][:1].clone(), y[m:][:1]), strict=True):
            same(alone[0], result[m])


def test_add_norm_keeps_what_is_far_from_zero(device):
    """The variance of values that share a large part is theirs, not the rounding's."""
    x = torch.randn(4, 300, device=device) + 1000
    _, z = ops.add_norm(x, None, torch.ones(300, device=device), None, 0.0, centred=True, dtype=torch.float16)
    want = torch.nn.functional.layer_norm(x.double(), (300,), eps=0.0)
    torch.testing.assert_close(z.double(), want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("columns", [0, 2, 6, 8])
def test_rotate(columns, dtype, device):
    check_rotate(ops, Case("rope", Shape(13, 8, 1, 1, 1), "balanced"), dtype, device, columns=columns)


def test_rotate_by_tables_of_each_sequence(device):
    x = torch.randn(2, 5, 3, 8, device=device)
    angle = torch.randn(2, 5, 1, 4, dtype=torch.float64, device=device)
    whole = ops.rotate(x, angle.cos(), angle.sin())
    for b in range(2):
        same(whole[b:][:1], ops.rotate(x[b:][:1], angle[b].cos(), angle[b].sin()))


@pytest.mark.c_core
def test_long_heads():
    check_rotate(ops, Case("long", Shape(2, 4200, 1, 1, 1), "balanced"), torch.bfloat16, "cpu", heads=1)


@pytest.mark.c_core
def test_gradcheck():
    inputs = norm_inputs(SMALLEST, torch.float64, "cpu")
    gradcheck(lambda x, w_n: ops.rms_norm(x, w_n, 1e-3), inputs)
    each_set_alone(lambda x, w_n: ops.rms_norm(x, w_n, 1e-3), inputs)
    angle = torch.arange(10.0, dtype=torch.float64).view(5, 1, 2)
    gradcheck(lambda x: ops.rotate(x, angle.cos(), angle.sin()), {"x": SMALLEST.randn(2, 5, 3, 5, salt=1)})
    tables = {"cos": angle[:, 0].cos(), "sin": angle[:, 0].sin()}
    gradcheck(lambda **inputs: torch.ops.moe_ext.rotate(**inputs, inverse=True),
              {"x": SMALLEST.randn(5, 3, 5, salt=1), **tables})  # fmt: skip


@pytest.mark.parametrize("n", [0, 1, 17, 2**15, 2**15 + 1, 100_003, 2_200_017])
def test_square_sum(n, dtype, device):
    x = torch.randn(n, dtype=torch.float64).to(dtype).to(device)
    torch.testing.assert_close(ops.square_sum(x), reference.square_sum(x), rtol=1e-14, atol=0)


@pytest.mark.parametrize("scale", [1e-44, 1e38])
def test_squares_neither_overflow_nor_vanish(scale, device):
    x = torch.full((1000,), scale, device=device)
    torch.testing.assert_close(ops.square_sum(x), 1000 * x[0].double().square(), rtol=1e-14, atol=0)
