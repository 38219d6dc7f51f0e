"""Expert parallelism over gloo: P ranks compute what one process computes, in fp64, outputs and every gradient."""

import itertools

import pytest
import torch
from cases import ROUTINGS
from compare import same
from ranks import run_ranks

import moe_ext
from moe_ext import ops
from moe_ext.ops.exchange import message_width
from moe_ext.parallel.experts import ExpertExchange
from moe_ext.parallel.transport import TorchTransport

E, K, D, F = 8, 3, 10, 6


def equal(got, want, what):
    floor = 1e-12 * want.abs().max() + 1e-15 if want.numel() else 0
    assert got.shape == want.shape and (got - want).abs().le(floor).all(), f"{what}: {(got - want).abs().max()}"


def to_one_rank(T, K, E, generator):
    """Every copy goes to the first two experts: the other ranks receive nothing."""
    return ROUTINGS["random"](T, K, 2, generator) if K <= 2 else torch.arange(T * K).view(T, K).remainder(2).int()


def tensors(routing, sizes, dtype=torch.float64):
    """Tokens of all ranks, their routing, the experts, and a gradient of the output."""
    g, T = torch.Generator().manual_seed(3), sum(sizes)
    ids_TK = (ROUTINGS.get(routing) or to_one_rank)(T, K, E, g)
    x, weights, w13, w2, dy = (torch.randn(*size, generator=g, dtype=dtype)
                               for size in [(T, D), (T, K), (E, 2 * F, D), (E, D, F), (T, D)])  # fmt: skip
    return x, weights, ids_TK, w13, w2, dy


def experts(x, weights, ids_TK, w13, w2, num_copies):
    index = ops.route_index(ids_TK, len(w13))
    return ops.expert_mlp(x, w13, None, w2, weights, index, act="swiglu", num_copies=num_copies)


def one_process(x, weights, ids_TK, w13, w2, dy):
    leaves = [t.requires_grad_() for t in (x, weights, w13, w2)]
    y = experts(x, weights, ids_TK, w13, w2, int(ids_TK.ge(0).sum()))
    return y.detach(), torch.autograd.grad(y, leaves, dy)


def on_ranks(rank, sizes, x, weights, ids_TK, w13, w2, dy, transport=None, wanted=range(4)):
    """Outputs and gradients of one rank, those of the wanted of x, weights, w13 and w2; how many rows came to it."""
    exchange = ExpertExchange(E, transport or TorchTransport())
    here = slice(rank * E // len(sizes), (rank + 1) * E // len(sizes))
    x, weights, ids_TK, dy = (t.split(sizes)[rank].clone() for t in (x, weights, ids_TK, dy))
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate((x, weights, w13[here], w2[here]))]
    x_RD, weights_RK, ids_RK, num_copies, trip = exchange.dispatch(*leaves[:2], ids_TK)
    assert [x_RD.requires_grad, weights_RK.requires_grad] == [0 in wanted, 1 in wanted], "the experts make no others"
    y = exchange.combine(experts(x_RD, weights_RK, ids_RK, *leaves[2:], num_copies), trip)
    return y.detach(), torch.autograd.grad(y, [leaves[i] for i in wanted], dy), len(x_RD)


ROUTED = ["random", "skewed", "one_takes_all", "some_absent", "all_absent", "to_one_rank"]


@pytest.mark.c_core
@pytest.mark.parametrize("sizes", [(7, 12), (5, 0), (9, 4, 0, 6)], ids=str)
@pytest.mark.parametrize("routing", ROUTED)
def test_ranks_equal_one_process(routing, sizes, tmp_path):
    given = tensors(routing, sizes)
    want_y, want = one_process(*(t.clone() for t in given))
    got = run_ranks(len(sizes), lambda rank: on_ranks(rank, sizes, *given), tmp_path)
    equal(torch.cat([y for y, *_ in got]), want_y, "y")
    for i, name in enumerate(["dx", "dweights", "dw13", "dw2"]):
        equal(torch.cat([grads[i] for _, grads, _ in got]), want[i], name)
    if routing in ("to_one_rank", "one_takes_all"):
        assert min(rows for *_, rows in got) == 0, "a rank that receives nothing is part of this test"


class Measured(TorchTransport):
    """Knows how wide the rows of its messages were."""

    def __init__(self):
        super().__init__()
        self.widths = []

    def rows(self, sent, rows_PP):
        self.widths.append(sent.shape[1])
        return super().rows(sent, rows_PP)


@pytest.mark.c_core
def test_gradients_that_are_not_wanted_do_not_travel(tmp_path):
    """Frozen experts, a frozen router, a first layer: the others keep their bits, and the way back is narrower."""
    sizes = (7, 5)
    given = tensors("random", sizes)

    def body(rank):
        transport, dtype = Measured(), given[0].dtype
        _, together, _ = on_ranks(rank, sizes, *given, transport)
        for n in range(1, 4):
            for wanted in itertools.combinations(range(4), n):
                transport.widths.clear()
                _, grads, _ = on_ranks(rank, sizes, *given, transport, wanted)
                for i, grad in zip(wanted, grads, strict=True):
                    same(grad, together[i], f"gradient {i} of {wanted}")
                back = message_width(dtype, D * (0 in wanted), K, False, dtype if 1 in wanted else None)
                ways = [message_width(dtype, D, K, True, dtype), D, D] + [back] * (0 in wanted or 1 in wanted)
                assert transport.widths == ways, wanted

    run_ranks(2, body, tmp_path)


def layer_of(seed=0, **more):
    torch.manual_seed(seed)
    layer = moe_ext.FusedMoE(D, F, E, 2, balance_weight=0.01, bias=True, dtype=torch.float64, **more)
    for bias in (layer.experts.w13_bias, layer.experts.w2_bias):
        torch.nn.init.normal_(bias)
    return layer


@pytest.mark.c_core
@pytest.mark.parametrize("world", [2, 4])
def test_the_layer_on_ranks(world, tmp_path):
    """The whole layer, a sequence per rank: router, losses, experts and biases, twice through the same exchange."""
    x = torch.randn(world, 11, D, dtype=torch.float64)

    def loss_of(y, routing):
        return (y * torch.arange(y[0].numel(), dtype=y.dtype).view(y.shape[1:]).sin()).sum() + routing.loss

    def body(rank):
        layer = layer_of(exchange=ExpertExchange(E, TorchTransport()))
        for name, full in list(layer.experts.named_parameters()):
            setattr(layer.experts, name, torch.nn.Parameter(full.detach().chunk(world)[rank].clone()))
        mine = x[rank : rank + 1].clone().requires_grad_()
        loss = sum(loss_of(*layer(scale * mine)) for scale in (1, 2))
        loss.backward()
        return loss.detach(), mine.grad, {name: p.grad for name, p in layer.named_parameters()}

    got = run_ranks(world, body, tmp_path)
    layer, leaf = layer_of(), x.clone().requires_grad_()
    loss = sum(loss_of(*layer(scale * leaf[rank : rank + 1])) for scale in (1, 2) for rank in range(world))
    loss.backward()
    equal(sum(loss for loss, *_ in got), loss.detach(), "loss")
    equal(torch.cat([dx for _, dx, _ in got]), leaf.grad, "dx")
    for name, p in layer.named_parameters():
        grads = [grads[name] for *_, grads in got]
        equal(torch.cat(grads) if name.startswith("experts.") else sum(grads), p.grad, name)


def test_autocast_sends_what_the_experts_read(tmp_path):
    """bf16 rows with fp32 weights, equal to one process under the same autocast but for the order of two sums."""
    sizes = (6, 7)
    given = tensors("random", sizes, torch.float32)

    def body(rank):
        with torch.autocast("cpu", torch.bfloat16):
            return on_ranks(rank, sizes, *given[:-1], given[-1].bfloat16())

    got = run_ranks(2, body, tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        want_y, want = one_process(*(t.clone() for t in given[:-1]), given[-1].bfloat16())
    assert all(y.dtype == torch.bfloat16 for y, *_ in got)
    for got_part, want_part in zip([torch.cat([y for y, *_ in got])] + [
        torch.cat([grads[i] for _, grads, _ in got]) for i in range(4)
    ], [want_y, *want], strict=True):  # fmt: skip
        assert got_part.dtype == want_part.dtype
        assert (got_part - want_part).abs().max() <= 0.02 * want_part.abs().max()


def test_experts_that_do_not_divide_are_refused(tmp_path):
    def body(rank):
        with pytest.raises(ValueError, match="num_experts is 9, wanted a multiple of the 2 ranks"):
            ExpertExchange(9, TorchTransport())

    run_ranks(2, body, tmp_path)
