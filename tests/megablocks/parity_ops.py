"""Every op of megablocks.ops: ours against the real one, forward and every gradient, bitwise where rows are copied."""

import pytest
import torch
from upstream import DEVICE, megablocks

from moe_ext import compat, ops

upstream = megablocks.ops


def routing(T, K, E, seed=0, among=None):
    """(indices, bin_ids, bins, padded_bins) of random ids; `among` limits them to some experts."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    ids = torch.randint(among or E, (T * K,), generator=generator, dtype=torch.int32)
    bin_ids, indices = upstream.sort(ids, 8)
    counts = upstream.histogram(ids, E)
    return indices, bin_ids, counts.cumsum(0).int(), (-(-counts // 4) * 4).cumsum(0).int()


def run(op, *args):
    """[y, the gradient of each floating argument] for a fixed dy."""
    args = [a.clone().requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    leaves = [a for a in args if torch.is_tensor(a) and a.is_floating_point()]
    y = op(*args)
    dy = torch.randn(y.shape, generator=torch.Generator(DEVICE).manual_seed(9)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_parity(name, *args, exact):
    got, want = run(getattr(ops, name), *args), run(getattr(upstream, name), *args)
    assert [g.shape for g in got] == [w.shape for w in want]
    assert [g.dtype for g in got] == [w.dtype for w in want]
    if exact:
        assert torch.equal(got[0], want[0])
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[got[0].dtype]
    for g, w in zip(got, want, strict=True):
        error = (g.double() - w.double()).abs().max().item() if w.numel() else 0.0
        assert error <= tolerance * max(1.0, w.abs().max().item() if w.numel() else 0.0)


# T, K, E, D, experts in use. D = 70 takes two steps of a 64-wide Triton program.
CASES = [(5, 1, 3, 70, None), (4, 2, 3, 8, None), (3, 3, 4, 5, 2), (4, 2, 2, 4, 1), (6, 1, 1, 3, None)]
cases = pytest.mark.parametrize("T, K, E, D, among", CASES)
copied = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


@cases
@copied
def test_gather(T, K, E, D, among, dtype):
    indices, bin_ids, bins, padded_bins = routing(T, K, E, among=among)
    x = torch.randn(T, D).to(dtype)
    assert_parity("gather", x, indices, bin_ids, bins, K, exact=True)
    assert_parity("padded_gather", x, indices, bin_ids, bins, padded_bins, K, exact=True)
    for capacity in (1, 2, T):
        assert_parity("binned_gather", x, indices, bins, capacity, K, exact=True)


@cases
def test_scatter(T, K, E, D, among):
    indices, bin_ids, bins, padded_bins = routing(T, K, E, among=among)
    for weights in (torch.rand(T * K), None):
        exact = weights is None and K < 3  # two summands have one order
        x = torch.randn(T * K, D)
        assert_parity("scatter", x, indices, bin_ids, weights, bins, K, exact=exact)
        x = torch.randn(int(padded_bins[-1]), D)
        assert_parity("padded_scatter", x, indices, bin_ids, weights, bins, padded_bins, K, exact=exact)
        for capacity in (1, 2, T):
            x = torch.randn(E, capacity, D)
            assert_parity("binned_scatter", x, indices, weights, bins, K, exact=exact)


@copied
def test_scatter_of_copies(dtype):
    indices, bin_ids, bins, padded_bins = routing(5, 1, 3)
    assert_parity("scatter", torch.randn(5, 6).to(dtype), indices, bin_ids, None, bins, 1, exact=True)
    x = torch.randn(int(padded_bins[-1]), 6).to(dtype)
    assert_parity("padded_scatter", x, indices, bin_ids, None, bins, padded_bins, 1, exact=True)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("end_bit", [None, 3])
def test_sort(dtype, end_bit):
    x = torch.randint(0, 8, (50,), dtype=dtype)
    for got, want in zip(ops.sort(x, end_bit), upstream.sort(x, end_bit), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(40,), (3, 20)])
def test_histogram_and_cumsum(dtype, shape):
    x = torch.randint(-2, 9, shape, dtype=dtype)
    dim = len(shape) - 1
    for got, want in [(ops.histogram(x, 6), upstream.histogram(x, 6)),
                      (ops.inclusive_cumsum(x, dim), upstream.inclusive_cumsum(x, dim)),
                      (ops.exclusive_cumsum(x, dim), upstream.exclusive_cumsum(x, dim))]:  # fmt: skip
        assert got.dtype == want.dtype and torch.equal(got, want)


def test_topology():
    padded_bins = torch.tensor([256, 256, 384, 1024], dtype=torch.int32)
    got, want = ops.topology(padded_bins, 128, 8, 3), upstream.topology(padded_bins, 128, 8, 3)
    assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int16, torch.int32])
def test_replicate(dtype):
    x, bins = torch.randint(-9, 9, (2, 4)).to(dtype), torch.tensor([3, 3, 7, 11], dtype=torch.int32)
    assert torch.equal(ops.replicate(x, bins, 11), upstream.replicate(x, bins, 11))
    if dtype.is_floating_point:
        assert_parity("replicate", x, bins, 11, exact=True)


def test_round_up_repeat_sum():
    x = torch.tensor([0, 1, 128, 129], dtype=torch.int32)
    assert torch.equal(ops.round_up(x, 128), upstream.round_up(x, 128))
    y = torch.randn(3, 2)
    for tiling in ((1, 1), (2, 3)):
        assert torch.equal(ops.repeat(y, tiling), upstream.repeat(y, tiling))
    for y in (torch.randn(1, 4), torch.randn(3, 4)):
        assert torch.equal(ops.sum(y, dim=0), upstream.sum(y, dim=0))


@pytest.mark.parametrize("trans_b", [False, True])
def test_grouped_gemm(trans_b):
    """Against the stand-in, which is the loop over experts that grouped_gemm runs."""
    import grouped_gemm

    sizes = torch.tensor([3, 0, 4], device="cpu")  # where grouped_gemm wants them
    a, b = torch.randn(7, 5), torch.randn(3, 6, 5) if trans_b else torch.randn(3, 5, 6)
    for got, want in zip(
        run(compat.ops.gmm, a, b, sizes, trans_b), run(grouped_gemm.ops.gmm, a, b, sizes, trans_b), strict=True
    ):
        torch.testing.assert_close(got, want)
    want = grouped_gemm.backend.gmm(a, b, sizes, False, trans_b)
    torch.testing.assert_close(compat.backend.gmm(a, b, sizes, False, trans_b), want)
    c, dy = torch.empty(3, 5, 6), torch.randn(7, 6)
    assert compat.backend.gmm(a, dy, sizes, trans_a=True, c=c) is c
    torch.testing.assert_close(c, grouped_gemm.backend.gmm(a, dy, sizes, trans_a=True))


WRONG = {
    "gather": lambda ops, i, x, w, b, p: ops.gather(x[None], i, i, b, 2),
    "gather, copies": lambda ops, i, x, w, b, p: ops.gather(x, i[1:], i[1:], b, 2),
    "gather, bin ids": lambda ops, i, x, w, b, p: ops.gather(x, i, i[1:], b, 2),
    "scatter": lambda ops, i, x, w, b, p: ops.scatter(x.repeat(2, 1), i, i, w[1:], b, 2),
    "padded_gather": lambda ops, i, x, w, b, p: ops.padded_gather(x, i, i, b, p[1:], 2),
    "padded_scatter": lambda ops, i, x, w, b, p: ops.padded_scatter(x.repeat(2, 1), i, i[1:], w, b, p, 2),
    "binned_gather": lambda ops, i, x, w, b, p: ops.binned_gather(x, i[1:], b, 2, 2),
    "binned_scatter": lambda ops, i, x, w, b, p: ops.binned_scatter(x[None], i, w, b, 2),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_shapes(case):
    indices, _, bins, padded_bins = routing(4, 2, 3)
    for package in (ops, upstream):
        with pytest.raises(ValueError):
            WRONG[case](package, indices, torch.randn(4, 6), torch.rand(8), bins, padded_bins)


def test_names():
    assert [name for name in upstream.__all__ if not hasattr(ops, name)] == []
