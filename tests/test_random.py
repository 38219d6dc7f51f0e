"""Random numbers that do not know the mesh: the generator, its distributions, and the ops made of them."""

import pytest
import torch
from compare import against_reference, evaluate, gradcheck, same
from devices import widest

from moe_ext import ops, reference
from moe_ext.layers.fused import Draws

KEY = dict(seed=1234567890123, step=17, site=5)


def check_uniform(impl, rows, cols, dtype, device, **options):
    got = impl.random_uniform(rows, cols, dtype=dtype, device=device, **KEY, **options)
    same(got, reference.random_uniform(rows, cols, dtype=dtype, device=device, **KEY, **options))


def check_normal(impl, rows, cols, dtype, device, mean=0.0, std=1.0):
    options = dict(KEY, mean=mean, std=std, device=device)
    want = reference.random_normal(rows, cols, dtype=torch.float64, **options)
    got = ops.random_normal(rows, cols, dtype=widest(device), **options)
    assert ((got - want).abs() <= 1e-6 * ((want - mean).abs().clamp(min=std) + abs(mean))).all()
    same(impl.random_normal(rows, cols, dtype=dtype, **options), got.to(dtype))


def check_dropout(impl, x, p):
    assert torch.equal(impl.dropout(x, p, **KEY) == 0, reference.dropout(x, p, **KEY) == 0)
    against_reference(impl, lambda ops, x: ops.dropout(x, p, **KEY), {"x": x})


def check_jitter(impl, x):
    against_reference(impl, lambda ops, x: ops.jitter(x, 0.1, **KEY), {"x": x})


def check_noisy(impl, x, scale_E):
    """With the noise of random_normal itself, whose numbers have the accuracy of float32."""
    noise = ops.random_normal(*x.shape, dtype=x.dtype, device=x.device, **KEY)
    got = evaluate(lambda x, scale_E: impl.noisy(x, scale_E, **KEY), {"x": x, "scale_E": scale_E})
    want = evaluate(lambda x, scale_E: x + scale_E * noise, {"x": x, "scale_E": scale_E})
    for name in want:
        same(got[name], want[name], name)


def test_known_answer(device):
    """Random123's published answer of Philox4x32-10 to counter and key zero."""
    u = ops.random_uniform(1, 4, seed=0, step=0, site=0, dtype=torch.float32, device=device)
    assert [int(x * 2**24) for x in u[0].tolist()] == [0x6627E8, 0xE169C5, 0xBC57AC, 0x9B00DB]


@pytest.mark.parametrize("size", [(0, 4), (1, 1), (3, 0), (7, 13), (33, 300)], ids=str)
def test_uniform(size, dtype, device):
    check_uniform(ops, *size, dtype, device)
    check_uniform(ops, *size, dtype, device, low=-0.3, high=2.7, row0=1 << 33)


@pytest.mark.parametrize("size", [(0, 4), (1, 1), (7, 13), (100, 300)], ids=str)
def test_normal(size, dtype, device):
    check_normal(ops, *size, dtype, device)
    check_normal(ops, *size, dtype, device, mean=-2.0, std=0.02)


def test_distributions(device):
    n = 512
    u = ops.random_uniform(n, n, **KEY, dtype=torch.float32, device=device).double()
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * (1 / 12) ** 0.5 / n and abs(u.var() - 1 / 12) < 1e-3
    assert torch.histc(u, 16).sub(n * n / 16).abs().max() < 5 * n / 4
    z = ops.random_normal(n, n, **KEY, dtype=torch.float32, device=device).double()
    assert abs(z.mean()) < 5 / n and abs(z.var() - 1) < 5 * 2**0.5 / n and abs((z**4).mean() - 3) < 0.15
    assert abs((z[:, 0::2] * z[:, 1::2]).mean()) < 10 / n, "the two numbers of a pair are independent"


def test_an_element_is_a_function_of_its_place(device):
    """Any part of the rows and any width give the numbers of the whole; every key gives others."""
    whole = ops.random_normal(20, 31, **KEY, dtype=torch.float32, device=device)
    same(ops.random_normal(7, 31, **KEY, row0=5, dtype=torch.float32, device=device), whole[5:12])
    same(ops.random_normal(20, 9, **KEY, dtype=torch.float32, device=device), whole[:, :9])
    for other in (dict(seed=2), dict(step=18), dict(site=6), dict(seed=KEY["seed"] + (1 << 40)), dict(row0=20)):
        different = ops.random_normal(20, 31, **{**KEY, **other}, dtype=torch.float32, device=device)
        assert (different == whole).float().mean() < 0.01, other


RUNS = dict(row0=2, run=3, stride=10)  # rows 2, 3, 4, 12, 13, 14, 22, ..
ROWS = [2, 3, 4, 12, 13, 14, 22, 23, 24, 32]  # the last run is short


def test_a_rank_of_runs_draws_its_rows(device):
    """A rank that holds a part of each sequence draws what it would cut from the whole, one run or an empty one too."""
    for draw in (ops.random_uniform, ops.random_normal):
        whole = draw(40, 31, **KEY, device=device)
        same(draw(len(ROWS), 31, **KEY, **RUNS, device=device), whole[ROWS])
        same(draw(3, 31, **KEY, row0=2, run=3, device=device), whole[2:5])
        same(draw(0, 31, **KEY, **RUNS, device=device), whole[:0])
    same(reference.random_uniform(len(ROWS), 31, **KEY, **RUNS, device=device),
         ops.random_uniform(len(ROWS), 31, **KEY, **RUNS, device=device))  # fmt: skip
    far = dict(row0=1 << 33, run=1, stride=1 << 40)  # beyond 32 bits
    second = ops.random_uniform(2, 5, **KEY, **far, device=device)[1:]
    same(second, ops.random_uniform(1, 5, **KEY, row0=(1 << 33) + (1 << 40), device=device))


def test_runs_in_forward_and_backward(device):
    """Every op on x, keyed as a model does it, and its gradient: a rank gets its rows of what one process gets."""
    x, scale_E, upstream = (torch.randn(n, 31, device=device).squeeze(0) for n in (40, 1, 40))
    for call in (
        lambda x, s, **key: ops.dropout(x, 0.4, **key),
        lambda x, s, **key: ops.jitter(x, 0.1, **key),
        lambda x, s, **key: ops.noisy(x, s, **key),
    ):

        def results(rows, call=call, **runs):
            part = x[rows].requires_grad_()
            y = call(part, scale_E, **Draws(7, 5, **runs).at("place"))
            return y.detach(), *torch.autograd.grad(y, part, upstream[rows])

        for whole, part in zip(results(slice(None)), results(ROWS, **RUNS), strict=True):
            same(part, whole[ROWS])


@pytest.mark.parametrize("run, stride", [(-1, 0), (3, 0), (3, 2), (1, 1 << 62)])
def test_bad_runs(run, stride, device):
    with pytest.raises(RuntimeError, match=f"dropout: .*at least run if rows > run.*run={run} and stride={stride}$"):
        ops.dropout(torch.ones(4, 2, device=device), 0.5, **KEY, run=run, stride=stride)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.99])
def test_dropout(p, dtype, device):
    x = torch.randn(64, 129).to(dtype).to(device)
    check_dropout(ops, x, p)
    kept = (ops.dropout(torch.ones(200, 200, device=device), p, **KEY) > 0).float().mean()
    assert abs(kept - (1 - p)) < 0.02


@pytest.mark.c_core
def test_gradients():
    x = torch.randn(4, 6, dtype=torch.float64) + 3
    gradcheck(lambda x: ops.dropout(x, 0.4, **KEY, run=1, stride=2), {"x": x})
    gradcheck(lambda x: ops.jitter(x, 0.1, **KEY), {"x": x})
    gradcheck(lambda x, s: ops.noisy(x, s, **KEY), {"x": x, "s": torch.rand(6, dtype=torch.float64)})


def test_jitter_and_noise(dtype, device):
    x = torch.randn(33, 20).to(dtype).to(device)
    check_jitter(ops, x)
    check_noisy(ops, x, torch.rand(20).to(dtype).to(device))
