"""Differentiable collectives over gloo: P ranks compute what one process computes, results and gradients in fp64."""

import pytest
import torch
import torch.distributed as dist
from devices import FLOATS
from ranks import run_ranks

from moe_ext.parallel.collectives import gather, gather_rows, reduce_scatter, scope_sum

WORLDS = [2, 4]
DIMS = [0, 1, 2, -1]


def equal(got, want, what):
    assert (got.dtype, got.shape) == (want.dtype, want.shape), what
    assert (got - want).abs().le(1e-13).all(), f"{what}: {(got - want).abs().max()}"


def drawn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def on_ranks(world, call, xs, dys, folder):
    """call(x) on each rank -> the results and the gradients of the sum over ranks of <y, dy>, in rank order."""

    def body(rank):
        x = xs[rank].transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()  # not contiguous
        y = call(x)
        y.backward(dys[rank].transpose(0, 1).contiguous().transpose(0, 1))
        return y.detach(), x.grad

    return zip(*run_ranks(world, body, folder), strict=True)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("world", WORLDS)
def test_gather(world, dim, tmp_path):
    xs = drawn(world, 2, 3, 5)
    full = torch.cat(list(xs), dim)
    dys = drawn(world, *full.shape)
    ys, dxs = on_ranks(world, lambda x: gather(x, dim, None), xs, dys, tmp_path)
    for y, dx, want_dx in zip(ys, dxs, dys.sum(0).chunk(world, dim), strict=True):
        equal(y, full, "y")
        equal(dx, want_dx, "dx")


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("world", WORLDS)
def test_reduce_scatter(world, dim, tmp_path):
    xs = drawn(world, 4, 8, 12)
    pieces = xs.sum(0).chunk(world, dim)
    dys = drawn(world, *pieces[0].shape)
    ys, dxs = on_ranks(world, lambda x: reduce_scatter(x, dim, None), xs, dys, tmp_path)
    for y, dx, want_y in zip(ys, dxs, pieces, strict=True):
        equal(y, want_y, "y")
        equal(dx, torch.cat(list(dys), dim), "dx")


@pytest.mark.parametrize("world", WORLDS)
def test_scope_sum(world, tmp_path):
    """A loss that every rank computes from the same sum: the ranks' losses together count it `world` times."""
    xs = drawn(world, 3, 5).requires_grad_()

    def loss_of(total):
        return (total.sin() * torch.arange(5)).sum()

    def body(rank):
        x = xs[rank].detach().t().contiguous().t().requires_grad_()
        loss = loss_of(scope_sum(x, None))
        loss.backward()
        return loss.detach(), x.grad

    losses, dxs = zip(*run_ranks(world, body, tmp_path), strict=True)
    want = world * loss_of(xs.sum(0))
    want.backward()
    equal(sum(losses), want.detach(), "loss")
    for dx, want_dx in zip(dxs, xs.grad, strict=True):
        equal(dx, want_dx, "dx")


@pytest.mark.parametrize("world", WORLDS)
def test_a_sequence_parallel_layer(world, tmp_path):
    """x -> norm on a piece of the sequence -> gather -> each rank's columns and rows -> reduce_scatter, and a
    statistic of the scope in the loss: all gradients are those of one process."""
    B, S, D, F = 2, 3 * world, 4, 2 * world
    x, w1, w2, c = drawn(B, S, D), drawn(F, D), drawn(D, F), drawn(B, S, D)

    def norm(x):
        return x / x.square().mean(-1, keepdim=True).sqrt()

    def balance(total):
        return total.square().sum() / S

    def body(rank):
        mine, up, down = (t.chunk(world, dim)[rank].clone().requires_grad_() for t, dim in ((x, 1), (w1, 0), (w2, 1)))
        y = reduce_scatter((gather(norm(mine), 1, None) @ up.T).tanh() @ down.T, 1, None)
        loss = (y * c.chunk(world, 1)[rank]).sum() + balance(scope_sum(y.sum((0, 1)), None)) / world
        loss.backward()
        return loss.detach(), mine.grad, up.grad, down.grad

    losses, dxs, dw1s, dw2s = zip(*run_ranks(world, body, tmp_path), strict=True)
    x, w1, w2 = (t.requires_grad_() for t in (x, w1, w2))
    y = (norm(x) @ w1.T).tanh() @ w2.T
    loss = (y * c).sum() + balance(y.sum((0, 1)))
    loss.backward()
    for got, want, what in ((sum(losses), loss.detach(), "loss"), (torch.cat(dxs, 1), x.grad, "dx"),
                            (torch.cat(dw1s, 0), w1.grad, "dw1"), (torch.cat(dw2s, 1), w2.grad, "dw2")):  # fmt: skip
        assert (got - want).abs().max() <= 1e-13 * want.abs().max(), what


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32, torch.int64], ids=str)
def test_dtypes(dtype, tmp_path):
    """Sums of bf16 and fp16 are rounded once: 1 and three times 3/8 of its distance to the next number."""
    world = 4
    small = 0.375 * torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 3
    xs = [torch.full((world, 2), 1 if rank == 0 else small, dtype=dtype) for rank in range(world)]
    want = torch.stack(xs).double().sum(0).to(dtype)

    def body(rank):
        return gather(xs[rank], 1, None), reduce_scatter(xs[rank], 0, None), scope_sum(xs[rank], None)

    for gathered, scattered, total in run_ranks(world, body, tmp_path):
        for got, want_one in ((gathered, torch.cat(xs, 1)), (scattered, want[:1]), (total, want)):
            assert got.dtype == dtype and torch.equal(got, want_one)


def test_no_elements(tmp_path):
    def body(rank):
        x = torch.empty(0, 4, 3, requires_grad=True)
        y = reduce_scatter(gather(scope_sum(x, None), 1, None), 1, None)
        y.sum().backward()
        return y.detach(), x.grad

    for y, dx in run_ranks(2, body, tmp_path):
        assert y.shape == dx.shape == (0, 4, 3)


def test_subgroups(tmp_path):
    """Groups of neighbours, as tensor parallelism has them."""

    def body(rank):
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        group, x = groups[rank // 2], torch.full((2,), 10.0**rank)
        return gather(x, 0, group), reduce_scatter(x, 0, group), scope_sum(x, group)

    for rank, (gathered, scattered, total) in enumerate(run_ranks(4, body, tmp_path)):
        low, high = 10.0 ** (rank // 2 * 2), 10.0 ** (rank // 2 * 2 + 1)
        assert gathered.tolist() == [low, low, high, high]
        assert scattered.tolist() == [low + high] and total.tolist() == [low + high] * 2


def test_one_rank_gets_its_tensor_back(tmp_path):
    def body(rank):
        x = torch.ones(3, 2, requires_grad=True)
        return all(y is x for y in (gather(x, 0, None), gather_rows(x, 1, None), reduce_scatter(x, -1, None),
                                    scope_sum(x, None)))  # fmt: skip

    assert run_ranks(1, body, tmp_path) == [True]


def test_errors(tmp_path):
    def body(rank):
        with pytest.raises(ValueError, match=r"reduce_scatter: x has shape \[4, 3\], wanted .* 2 ranks in dimension 1"):
            reduce_scatter(torch.ones(4, 3), -1, None)
        for collective in (gather, gather_rows, reduce_scatter):
            for dim in (2, -3):
                with pytest.raises(IndexError, match=f"dim is {dim}, wanted one of x's 2 dimensions"):
                    collective(torch.ones(4, 4), dim, None)

    run_ranks(2, body, tmp_path)


def test_gather_rows_has_no_gradient(tmp_path):
    def body(rank):
        ids = gather_rows(torch.tensor([[rank, 7]]), 0, None)
        return ids, gather_rows(torch.ones(2, requires_grad=True), 0, None).requires_grad

    for ids, requires_grad in run_ranks(2, body, tmp_path):
        assert ids.tolist() == [[0, 7], [1, 7]] and not requires_grad
