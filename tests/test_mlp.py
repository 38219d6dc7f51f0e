"""A stack of MLPs whose matrices ranks share computes what one process computes, in both forms; and the all-reduce that
is its own backward."""
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks

from moe_ext import ops
from moe_ext.ops.enums import ACTS, GATED
from moe_ext.parallel.collectives import all_reduce
from moe_ext.parallel.mlp import mlps, shard

T, D, WIDTH, L = 16, 6, 24, 3
FORMS = "all-reduce", "reduce-scatter"


def drawn(act):
    """x, dy [T,D], w1 [L,D,F or 2F], w2 [L,F,D]."""
    generator = torch.Generator().manual_seed(ACTS[act])
    shapes = (T, D), (T, D), (L, D, WIDTH * (2 if act in GATED else 1)), (L, WIDTH, D)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def alone(act):
    """-> y, dx, dw1, dw2 of one process."""
    x, dy, w1, w2 = drawn(act)
    leaves = [t.requires_grad_() for t in (x, w1, w2)]
    for up, down in zip(w1, w2, strict=True):
        x = ops.activation(x @ up, act) @ down
    return x.detach(), *torch.autograd.grad(x, leaves, dy)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_equals_one_process(tp, tmp_path):
    """Each rank backpropagates the loss of its own tokens. Where all have all tokens, the gradients that arrive at the
    stack's input add up to the input's."""

    def body(rank):
        told = {}
        for act in ACTS:
            x, dy, *weights = drawn(act)
            mine = x.chunk(tp)[rank]
            for form in FORMS:
                leaves = [(mine if form == "reduce-scatter" else x).clone().requires_grad_(),
                          *(t.requires_grad_() for t in shard(*weights, act=act))]
                y = mlps(*leaves, act=act, form=form)
                if form == "all-reduce":
                    y = y.chunk(tp)[rank]
                told[act, form] = y.detach(), *torch.autograd.grad(y, leaves, dy.chunk(tp)[rank])
        return told

    ranks = run_ranks(tp, body, tmp_path)
    for act in ACTS:
        want = alone(act)
        for form in FORMS:
            y, dx, dw1, dw2 = zip(*(told[act, form] for told in ranks), strict=True)
            if act in GATED:
                dw1 = [torch.stack([dw.unflatten(-1, (2, -1)) for dw in dw1], -2).flatten(-3)]
            got = (torch.cat(y), torch.cat(dx) if form == "reduce-scatter" else sum(dx), torch.cat(dw1, -1),
                   torch.cat(dw2, -2))
            for name, g, w in zip(("y", "dx", "dw1", "dw2"), got, want, strict=True):
                assert (g - w).abs().max() <= 1e-12 * w.abs().max(), (act, form, name)


def test_gelu_is_torchs():
    x, _, w1, w2 = drawn("gelu")
    want = F.gelu(F.gelu(F.gelu(x @ w1[0]) @ w2[0] @ w1[1]) @ w2[1] @ w1[2]) @ w2[2]
    x = alone("gelu")[0]
    assert (x - want).abs().max() <= 1e-12 * want.abs().max()


@pytest.mark.parametrize("world", [2, 4])
def test_all_reduce(world, tmp_path):
    """Of sizes that the ranks divide and do not, with gradients that differ; bf16 is rounded once."""
    xs, dys = (torch.randn(world, 3, 5, dtype=torch.float64) for _ in range(2))
    small = 0.375 * torch.finfo(torch.bfloat16).eps

    def body(rank):
        told = []
        for columns in (5, 4, 0):
            x = xs[rank, :, :columns].clone().requires_grad_()
            y = all_reduce(x, None)
            told.append((y.detach(), *torch.autograd.grad(y, x, dys[rank, :, :columns])))
        return told, all_reduce(torch.full((3,), small if rank else 1, dtype=torch.bfloat16), None)

    for told, narrow in run_ranks(world, body, tmp_path):
        for columns, (y, dx) in zip((5, 4, 0), told, strict=True):
            for got, want in ((y, xs), (dx, dys)):
                assert got.shape == (3, columns)
                assert (got - want.sum(0)[:, :columns]).abs().le(1e-13).all()
        assert torch.equal(narrow, torch.full((3,), 1 + (world - 1) * small, dtype=torch.float64).bfloat16())


def test_refuses(tmp_path):
    def body(rank):
        with pytest.raises(ValueError, match="2 ranks share the 3 rows of w2, which they do not divide: take another"):
            shard(torch.ones(1, 2, 3), torch.ones(1, 3, 2))
        with pytest.raises(ValueError, match="form is 'ring', wanted one of all-reduce, reduce-scatter"):
            mlps(torch.ones(2, 2), [], [], form="ring")

    run_ranks(2, body, tmp_path)
