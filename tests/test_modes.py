"""Derivatives beyond plain backward: right, or an error that says what is missing. No term is dropped in silence."""

import functools
import re

import pytest
import torch
from cases import SMALLEST
from compare import same
from ranks import run_ranks
from test_compile import CONSTANT, NO_GRADIENT, record
from torch.autograd import forward_ad

import moe_ext
from moe_ext import ops, reference
from moe_ext.layers.all_to_all import all_to_all
from moe_ext.layers.mlp import scale_gradient
from moe_ext.parallel.collectives import gather, reduce_scatter, scope_sum
from moe_ext.parallel.experts import ExpertExchange
from moe_ext.parallel.transport import TorchTransport
from moe_ext.parallel.vocabulary import vocabulary_parallel_cross_entropy

TWICE = {"dropout", "gather", "grouped_gemm", "grouped_gemm_wgrad", "linear", "replicate", "replicate_backward",
         "rotate", "scatter", "scatter_dweights"}  # fmt: skip
REFUSAL = re.compile(r"has no (second derivative|gradient|forward mode).*Hint: ")


def refused(call, *args):
    """Whether call(*args) raises the sentence."""
    try:
        call(*args)
    except NotImplementedError as error:
        assert REFUSAL.search(str(error)), error
        return True
    return False


# ---- every op, by itself ---------------------------------------------------------------------------------------------


def with_floats(device):
    """The recorded calls of ops that take floating tensors: key -> op, arguments, positions of these."""
    for key in record("cpu"):
        op, args, _ = record(device)[key]
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        floats = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.is_floating_point()]
        if floats:
            yield key, (op, args, floats)


every_op = pytest.mark.parametrize(
    "key", [key for key, _ in with_floats("cpu")], ids=lambda key: key[0].removeprefix("moe_ext::")
)


def run(op, args, new):
    """The floating results of op for args with new values at some positions, copies elsewhere: xent_ writes."""
    results = op(*(new.get(i, a.clone() if isinstance(a, torch.Tensor) else a) for i, a in enumerate(args)))
    results = results if isinstance(results, tuple) else (results,)
    return tuple(y for y in results if y is not None and y.is_floating_point())


@every_op
def test_an_op_meets_a_tangent(key, device):
    """In each floating argument, with and without requires_grad and grad mode, and in torch.func.jvp."""
    op, args, floats = dict(with_floats(device))[key]

    def with_dual(i, requires_grad):
        with forward_ad.dual_level():
            x = forward_ad.make_dual(args[i].clone().requires_grad_(requires_grad), args[i])
            for y in run(op, args, {i: x}):
                assert not y.requires_grad and forward_ad.unpack_dual(y).tangent is None

    def with_func(i):
        torch.func.jvp(lambda x: (x, *run(op, args, {i: x})), (args[i],), (args[i],))

    for i in floats:
        calls = [(with_dual, i, False), (with_dual, i, True), (torch.no_grad()(with_dual), i, True), (with_func, i)]
        assert [refused(*call) for call in calls] == [op._opname not in CONSTANT] * 4


@every_op
def test_an_op_differentiated_twice(key, device):
    """Each gradient by each argument and upstream gradient alone, also where the caller allows for no way there."""
    op, args, floats = dict(with_floats(device))[key]
    leaves = {i: args[i].clone().requires_grad_() for i in floats}
    if op._schema.is_mutable:
        assert refused(run, op, args, leaves)
        return
    results = [y for y in run(op, args, leaves) if y.requires_grad]
    if op._opname == "expert_mlp":
        results = results[:1]       # h is no user's result
    assert bool(results) == (op._opname not in CONSTANT)
    upstream = [torch.randn_like(y, requires_grad=True) for y in results]
    derive = functools.partial(torch.autograd.grad, retain_graph=True, allow_unused=True, create_graph=True)
    for leaf in leaves.values() if results else ():
        if op._opname in NO_GRADIENT:
            assert refused(derive, results, leaf, upstream)
        elif op._opname not in TWICE:
            penalty = derive(results, leaf, upstream)[0].square().sum()
            assert all(refused(derive, penalty, source) for source in (*leaves.values(), *upstream))


@pytest.mark.c_core
@every_op
def test_an_op_that_may_be_differentiated_twice(key):
    op, args, floats = dict(with_floats("cpu"))[key]
    if op._opname in TWICE:
        args = [a.double() if i in floats else torch.float64 if a == torch.float32 else a for i, a in enumerate(args)]
        leaves = [args[i].requires_grad_() for i in floats]
        assert torch.autograd.gradgradcheck(lambda *xs: run(op, args, dict(zip(floats, xs, strict=True))), leaves)


# ---- every function, beside plain torch ------------------------------------------------------------------------------

INDEX = reference.route_index(SMALLEST.ids(), SMALLEST.shape.E)
PRESENT = int(INDEX.bins_E[-1])
PADDED = reference.inclusive_cumsum(reference.round_up(INDEX.counts_E, 4), 0)
COUNTS = reference.balance_counts(SMALLEST.ids(), SMALLEST.shape.E)
TARGETS = torch.tensor([0, 2, 1, -100, 1])
ANGLES = [f(torch.arange(6.0).view(3, 1, 2)) for f in (torch.cos, torch.sin)]
KEY = dict(seed=1, step=2, site=3)
FORCED = torch.tensor([[2, 0], [0, 1], [-1, 1], [1, 2], [-1, -1]], dtype=torch.int32)
N = INDEX.order_N
FUNCTIONS = {  # name -> call of ops or reference, and the shapes of its floating arguments
    "gather": (lambda o, x: o.gather(x, N, None, INDEX.bins_E, 2), (5, 4)),
    "scatter": (lambda o, x, w: o.scatter(x, N, None, w, INDEX.bins_E, 2), (10, 4), (10,)),
    "padded_gather": (lambda o, x: o.padded_gather(x, N, None, INDEX.bins_E, PADDED, 2), (5, 4)),
    "padded_scatter": (lambda o, x, w: o.padded_scatter(x, N, None, w, INDEX.bins_E, PADDED, 2),
                       (int(PADDED[-1]), 4), (10,)),
    "binned_gather": (lambda o, x: o.binned_gather(x, N, INDEX.bins_E, 2, 2), (5, 4)),
    "binned_scatter": (lambda o, x, w: o.binned_scatter(x, N, w, INDEX.bins_E, 2), (3, 2, 4), (10,)),
    "replicate": (lambda o, x: o.replicate(x, INDEX.bins_E, 11), (2, 3)),
    "grouped_gemm": (lambda o, x, w: o.grouped_gemm(x, w, INDEX.bins_E), (10, 4), (3, 4, 3)),
    "grouped_gemm_wgrad": (lambda o, x, dy: o.grouped_gemm_wgrad(x, dy, INDEX.bins_E), (10, 4), (10, 3)),
    "activation": (lambda o, h: o.activation(h, "swiglu"), (5, 6)),
    "expert_mlp": (lambda o, x, w13, w2, s, b13, b2: o.expert_mlp(
        x, w13, None, w2, s, INDEX, act="swiglu", gate_bias=b13, down_bias=b2, num_copies=PRESENT
    ), (5, 4), (3, 6, 4), (3, 4, 3), (5, 2), (3, 6), (3, 4)),
    "router": (lambda o, logits: o.router(logits, 2, norm_p=2.0)[::2], (5, 3)),
    "router at ids": (lambda o, logits: o.router(logits, 2, norm_p=2.0, ids_TK=FORCED)[::2], (5, 3)),
    "balance_loss": (lambda o, scores: o.balance_loss(scores, COUNTS, 2, form="mse"), (5, 3)),
    "z_loss": (lambda o, logits: o.z_loss(logits), (5, 3)),
    "linear_cross_entropy": (lambda o, x, w: o.linear_cross_entropy(x, w, TARGETS, chunk=2), (5, 4), (3, 4)),
    "linear": (lambda o, x, w, b: o.linear(x, w, b), (5, 4), (3, 4), (3,)),
    "router_logits": (lambda o, x, w, b: o.router_logits(x, w, b), (5, 4), (3, 4), (3,)),
    "rms_norm": (lambda o, x, w: o.rms_norm(x, w, 1e-3), (5, 4), (4,)),
    "rotate": (lambda o, x: o.rotate(x, *ANGLES), (2, 3, 2, 5)),
    "dropout": (lambda o, x: o.dropout(x, 0.3, **KEY), (5, 4)),
    "jitter": (lambda o, x: o.jitter(x, 0.3, **KEY), (5, 4)),
    "noisy": (lambda o, x, scale: o.noisy(x, scale, **KEY), (5, 3), (3,)),
}  # fmt: skip
WIRED = {"exchange_pack", "exchange_unpack", "exchange_combine", "select_bias_update", "capacity_drop",
         "square_sum", "add_norm"}  # above, as ops
NO_FLOATS = {"ExchangePlan", "RouteIndex", "balance_counts", "exchange_plan", "exclusive_cumsum", "histogram",
             "inclusive_cumsum", "random_normal", "random_uniform", "repeat", "round_up", "route_index", "sort", "sum",
             "topology"}  # fmt: skip
EVERY_MODE = {"jitter", "linear", "noisy", "router_logits"}     # the products: of few rows, which are torch's
# The linear ones' gradients are made of ops with gradients.
TWO_MODES = EVERY_MODE | {name for name in FUNCTIONS if name.endswith(("gather", "scatter"))} | TWICE & set(FUNCTIONS)


def test_every_function_is_in_the_table():
    assert {name.partition(" ")[0] for name in FUNCTIONS} | WIRED | NO_FLOATS == set(ops.__all__)


def scalar(impl, name):
    """A function of one vector, all floating arguments of `name` in a row, and that vector."""
    call, *shapes = FUNCTIONS[name]

    def f(theta):
        sizes = [torch.Size(shape).numel() for shape in shapes]
        results = call(impl, *(part.view(shape) for part, shape in zip(theta.split(sizes), shapes, strict=True)))
        results = results if isinstance(results, tuple) else (results,)
        return sum((y.square() + y).sum() for y in results)

    count = sum(torch.Size(shape).numel() for shape in shapes)
    return f, SMALLEST.randn(count, salt=1), SMALLEST.randn(count, salt=2)


def gradient_penalty(f, x, v):
    x.requires_grad_()
    loss = f(x)
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + dx.square().sum()).backward()
    return x.grad


def gradient_of_gradient(f, x, v):
    return torch.func.grad(lambda x: torch.func.grad(f)(x) @ v)(x)


def penalty_around_func(f, x, v):
    x.requires_grad_()
    (torch.func.vjp(f, x)[1](torch.ones_like(f(x)))[0] @ v).backward()
    return x.grad


def dual(f, x, v, requires_grad=False):
    with forward_ad.dual_level():
        y = f(forward_ad.make_dual(x.requires_grad_(requires_grad), v))
        return forward_ad.unpack_dual(y).tangent


def dual_upstream(f, x, v):
    """Forward over reverse, where only the gradient that comes in has a tangent."""
    x.requires_grad_()
    y = f(x)
    with forward_ad.dual_level():
        (dx,) = torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))
        return forward_ad.unpack_dual(dx).tangent


BACKWARD_TWICE = {
    "gradient penalty": gradient_penalty,
    "torch.func.grad of grad": gradient_of_gradient,
    "penalty around torch.func.vjp": penalty_around_func,
    "functional.hvp": lambda *given: torch.autograd.functional.hvp(*given)[1],
    "functional.vhp": lambda *given: torch.autograd.functional.vhp(*given)[1],
    "functional.jvp": lambda *given: torch.autograd.functional.jvp(*given)[1],
    "functional.hessian": lambda f, x, v: torch.autograd.functional.hessian(f, x),
    "torch.func.jacrev of jacrev": lambda f, x, v: torch.func.jacrev(torch.func.jacrev(f))(x),
}
FORWARD = {
    "forward_ad": dual,
    "forward_ad with requires_grad": functools.partial(dual, requires_grad=True),
    "forward_ad under no_grad": torch.no_grad()(functools.partial(dual, requires_grad=True)),
    "forward over reverse": dual_upstream,
    "torch.func.jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1],
    "torch.func.jvp under no_grad": torch.no_grad()(lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1]),
    "torch.func.jvp of grad": lambda f, x, v: torch.func.jvp(torch.func.grad(f), (x,), (v,))[1],
    "torch.func.grad of jvp": lambda f, x, v: torch.func.grad(lambda x: torch.func.jvp(f, (x,), (v,))[1])(x),
    "torch.func.jacfwd": lambda f, x, v: torch.func.jacfwd(f)(x),
    "torch.func.hessian": lambda f, x, v: torch.func.hessian(f)(x),
}
ONCE = {
    "torch.func.grad": lambda f, x, v: torch.func.grad(f)(x),
    "torch.func.vjp": lambda f, x, v: torch.func.vjp(f, x)[1](torch.tensor(2.0, dtype=x.dtype))[0],
    "torch.func.jacrev": lambda f, x, v: torch.func.jacrev(f)(x),
    "torch.func.vmap": lambda f, x, v: torch.func.vmap(f)(torch.stack([x, v])),
    "torch.func.vmap of grad": lambda f, x, v: torch.func.vmap(torch.func.grad(f))(torch.stack([x, v])),
    "create_graph alone": lambda f, x, v: torch.autograd.grad(f(x.requires_grad_()), x, create_graph=True)[0].detach(),
}


TOLERANCE = {"noisy": 1e-6}  # its normal numbers are those of fp32


def check_mode(mode, name, right):
    """The mode gives what plain torch gives, in fp64, or is refused; `right`: it may not be refused."""
    if not right and refused(mode, *scalar(ops, name)):
        return
    got, want = (mode(*scalar(impl, name)) for impl in (ops, reference))
    assert (got - want).abs().max() <= TOLERANCE.get(name, 1e-12) * want.abs().max()


@pytest.mark.c_core
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("mode", BACKWARD_TWICE)
def test_double_backward(mode, name):
    check_mode(BACKWARD_TWICE[mode], name, right=name in TWO_MODES)


@pytest.mark.c_core
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("mode", FORWARD)
def test_forward_mode(mode, name):
    check_mode(FORWARD[mode], name, right=name in EVERY_MODE)


@pytest.mark.c_core
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("mode", ONCE)
def test_one_derivative(mode, name):
    check_mode(ONCE[mode], name, right=True)


@pytest.mark.c_core
def test_functional_call():
    """The GPT's layer by torch.func, as by backward()."""
    layer = moe_ext.FusedMoE(4, 3, 3, 2, balance_weight=0.1, z_weight=0.1, dtype=torch.float64)
    x, parameters = torch.randn(1, 5, 4, dtype=torch.float64), dict(layer.named_parameters())

    def loss_of(parameters):
        y, routing = torch.func.functional_call(layer, parameters, (x,))
        return y.square().sum() + routing.loss

    loss_of(parameters).backward()
    for name, gradient in torch.func.grad(loss_of)({name: p.detach() for name, p in parameters.items()}).items():
        same(gradient, parameters[name].grad, name)


# ---- what autograd sees of moe_ext.parallel and moe_ext.layers -------------------------------------------------------


def exchanged(x, weights):
    """A trip to the experts and back, with a plain expert."""
    exchange = ExpertExchange(4, TorchTransport())
    x_RD, weights_RK, ids_RK, _, trip = exchange.dispatch(x, weights, torch.tensor([[0, 3], [2, 1], [1, -1]]))
    return exchange.combine(x_RD * weights_RK.where(ids_RK >= 0, 0).sum(1, keepdim=True), trip)


def head(x, w):
    return vocabulary_parallel_cross_entropy(x, w, torch.tensor([0, 3, 2]), vocab_size=4, group=None)


# On two ranks, of x [2,2]: on each of them, and what one process makes of the x of both.
RIGHT_ON_RANKS = {
    "gather": (lambda x, rank: gather(x, 1, None), lambda xs: [torch.cat(xs, 1)] * 2),
    "reduce_scatter": (lambda x, rank: reduce_scatter(x, 1, None), lambda xs: sum(xs).chunk(2, 1)),
    "all_to_all": (
        lambda x, rank: all_to_all(x, [1, 2 - 2 * rank], [1 + rank, 1 - rank], None)[0],
        lambda xs: [torch.cat([xs[0][:1], xs[1]]), xs[0][1:]],
    ),
}
REFUSED_ON_RANKS = {  # of x [3,2] and weights [3,2] or w [2,2]
    "scope_sum": lambda x, _: scope_sum(x, None),
    "ExpertExchange": exchanged,
    "vocabulary_parallel_cross_entropy": lambda x, w: head(x, w[:2]),
}


def penalty(leaves, losses):
    """The gradients of the squared gradients."""
    dxs = torch.autograd.grad(sum(losses), leaves, create_graph=True)
    sum(dx.square().sum() for dx in dxs).backward()
    return [x.grad for x in leaves]


@pytest.mark.parametrize("name", RIGHT_ON_RANKS)
def test_double_backward_on_ranks(name, tmp_path):
    on_rank, in_one = RIGHT_ON_RANKS[name]
    xs = [torch.randn(2, 2, dtype=torch.float64).requires_grad_() for _ in range(2)]

    def body(rank):
        x = xs[rank].detach().requires_grad_()
        with forward_ad.dual_level():
            assert refused(on_rank, forward_ad.make_dual(x.detach(), x.detach()), rank)
        return penalty([x], [((1 + rank) * on_rank(x, rank) ** 3).sum()])[0]

    want = penalty(xs, [((1 + rank) * y**3).sum() for rank, y in enumerate(in_one(xs))])
    for got, wanted in zip(run_ranks(2, body, tmp_path), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", REFUSED_ON_RANKS)
def test_refused_on_ranks(name, tmp_path):
    """Each gradient by each argument. Both ranks meet the refusal before a collective of the other."""

    def body(rank):
        torch.manual_seed(0)
        x, w = (t.requires_grad_() for t in torch.randn(2, 3, 2, dtype=torch.float64))
        leaves = [x, w][: 1 if name == "scope_sum" else 2]
        with forward_ad.dual_level():
            assert refused(REFUSED_ON_RANKS[name], forward_ad.make_dual(x.detach(), x.detach()), w.detach())
        dxs = torch.autograd.grad((REFUSED_ON_RANKS[name](x, w) ** 3).sum(), leaves, create_graph=True)
        again = functools.partial(torch.autograd.grad, retain_graph=True, allow_unused=True)
        assert all(refused(again, dx.sum(), leaf) for dx in dxs for leaf in leaves)

    run_ranks(2, body, tmp_path)


def test_scaled_gradient():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad((scale_gradient(x, 0.5) ** 3).sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x)
    torch.testing.assert_close(ddx, 0.25 * 6 * x.detach())
    with forward_ad.dual_level():
        assert refused(scale_gradient, forward_ad.make_dual(x.detach(), x.detach()), 0.5)


def test_a_second_derivative_by_x_alone_is_refused():
    """Nothing but h ties the experts' gradient to x where all else is frozen."""
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    gate, up, down = (torch.randn(3, *shape, dtype=torch.float64) for shape in ((6, 4), (6, 4), (4, 6)))
    index = moe_ext.ops.route_index(torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [1, 0]], dtype=torch.int32), 3)
    weights = torch.ones(5, 2, dtype=torch.float64)
    loss = moe_ext.ops.expert_mlp(x, gate, up, down, weights, index, act="swiglu").sum() + x.pow(3).sum()
    dx, = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="expert_mlp has no second derivative"):
        dx.square().sum().backward()
