"""How the ops behave inside torch: opcheck, autocast, torch.compile."""

import functools
import inspect

import pytest
import torch
from cases import CASES, SMALLEST, Case, Shape
from checks import CHECKS
from compare import evaluate, same
from torch.utils._python_dispatch import TorchDispatchMode

from moe_ext import ops

# ---- opcheck ---------------------------------------------------------------------------------------------------------


CONSTANT = {"capacity_drop", "check", "random_normal", "random_uniform"}  # of their floating arguments
NO_GRADIENT = CONSTANT | {
    "activation_backward", "add_norm_backward", "balance_loss_backward", "exchange_combine", "exchange_pack",
    "exchange_unpack",
    "expert_mlp_backward", "linear_cross_entropy_backward", "rms_norm_backward", "router_backward",
    "router_logits_backward",
    "select_bias_update", "square_sum", "xent_", "z_loss_backward",
}  # fmt: skip


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every call of an op of ours, one call per op and pattern of absent arguments."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "moe_ext":
            key = (op.name(), *(a is None for a in args))
            differentiable = op._opname not in NO_GRADIENT
            self.calls.setdefault(key, (op, tuple(_argument(a, differentiable) for a in args), kwargs))
        return op(*args, **(kwargs or {}))


def _argument(x, differentiable):
    """A leaf like x. Floats are drawn anew: some checks pass random bits, and a NaN never equals itself. Whether x
    wants a gradient cannot be told from here, below autograd."""
    if not isinstance(x, torch.Tensor):
        return x
    x = x.detach().clone()
    return x.normal_().requires_grad_(differentiable) if x.is_floating_point() else x


@functools.cache
def record(device):
    torch.manual_seed(0)
    recorder = Recorder()
    with recorder:
        for check in CHECKS.values():
            check(ops, Case("recorded", Shape(8, 6, 4, 3, 2), "random"), torch.float32, device)
        targets_M = torch.tensor([0, 4, -100, 2], device=device)
        torch.ops.moe_ext.xent_(torch.randn(4, 5, device=device), targets_M, -100, 1.0)
        torch.ops.moe_ext.linear(torch.randn(8, 3, device=device), torch.randn(4, 3, device=device))
        x_TD, w_ED, dlogits_TE = (torch.randn(*size, device=device) for size in ((8, 6), (3, 6), (8, 3)))
        torch.ops.moe_ext.router_logits(x_TD.bfloat16(), w_ED)
        torch.ops.moe_ext.router_logits_backward(dlogits_TE, x_TD.bfloat16(), w_ED)
        torch.ops.moe_ext.check(torch.empty(0, device=device))
    return recorder.calls


@pytest.mark.parametrize("key", record("cpu"), ids=lambda key: key[0].removeprefix("moe_ext::"))
def test_opcheck(key, device):
    """Schema, autograd registration, shape function, and AOT dispatch with dynamic shapes."""
    torch.library.opcheck(*record(device)[key])


def test_every_op_is_checked():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("moe_ext::")}
    assert {name for name, *_ in record("cpu")} == registered


# ---- autocast --------------------------------------------------------------------------------------------------------


def expert_arguments(device, dtype=torch.float32):
    case = CASES[1]
    T, D, F, E, K = case.shape
    options = dict(dtype=dtype, device=device)
    weights = [case.randn(E, 2 * F, D, salt=2, **options), None, case.randn(E, D, F, salt=3, **options)]
    weights_TK = case.randn(T, K, salt=4, dtype=torch.float32, device=device)
    return case.randn(T, D, salt=1, **options), *weights, weights_TK, ops.route_index(case.ids(device), E)


AUTOCAST = {  # op -> call, and fp32 arguments that the region casts
    "grouped_gemm": lambda x, gate, up, down, s, index: (
        lambda x, w: ops.grouped_gemm(x, w.transpose(1, 2), index.bins_E.clamp(max=len(x))), [x, gate]
    ),
    "expert_mlp": lambda x, gate, up, down, s, index: (
        lambda x, gate, down: ops.expert_mlp(x, gate, up, down, s, index, act="swiglu"), [x, gate, down]
    ),
    "linear_cross_entropy": lambda x, gate, *_: (
        lambda x, w: ops.linear_cross_entropy(x, w, torch.arange(len(x), device=x.device)), [x, gate[0]]
    ),
}  # fmt: skip


@pytest.mark.parametrize("region", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", AUTOCAST)
def test_products_follow_autocast(name, region, device):
    """fp32 arguments count as their rounded selves, gradients come back in fp32."""
    call, arguments = AUTOCAST[name](*expert_arguments(device))
    with torch.autocast(device, region):
        leaves = [a.clone().requires_grad_() for a in arguments]
        got = call(*leaves)
    got.float().sum().backward()
    rounded = [a.to(region).requires_grad_() for a in arguments]
    want = call(*rounded)
    want.float().sum().backward()
    same(got, want)
    for leaf, twin in zip(leaves, rounded, strict=True):
        same(leaf.grad, twin.grad.float())


@pytest.mark.c_core
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_leaves_fp64_alone(name):
    call, arguments = AUTOCAST[name](*expert_arguments("cpu", torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        inside = call(*arguments)
    same(inside, call(*arguments))


def test_routing_stays_in_fp32_under_autocast(device):
    logits_TE = torch.randn(9, 5).bfloat16().to(device)
    want = ops.router(logits_TE.float(), 2)
    counts_GE = ops.balance_counts(want[1], 5)
    with torch.autocast(device, torch.bfloat16):
        for g, w in zip(ops.router(logits_TE, 2), want, strict=True):
            same(g, w)
        same(ops.z_loss(logits_TE), ops.z_loss(logits_TE.float()))
        same(ops.balance_loss(logits_TE, counts_GE, 2), ops.balance_loss(logits_TE.float(), counts_GE, 2))


# ---- torch.compile ---------------------------------------------------------------------------------------------------


def layer(x_TD, router_ED, w13_E2FD, w2_EDF, k):
    """The dropless layer with its losses."""
    logits_TE = x_TD @ router_ED.T
    weights_TK, ids_TK, scores_TE = ops.router(logits_TE, k, norm_p=1.0)
    index = ops.route_index(ids_TK, len(router_ED))
    y_TD = ops.expert_mlp(x_TD, w13_E2FD, None, w2_EDF, weights_TK, index, act="swiglu")
    loss = ops.balance_loss(scores_TE, ops.balance_counts(ids_TK, len(router_ED)), k) + ops.z_loss(logits_TE)
    return y_TD, loss


def layer_inputs(T, device):
    case, sizes = Case("compiled", Shape(T, 16, 8, 4, 2), "random"), [(T, 16), (4, 16), (4, 16, 16), (4, 16, 8)]
    return [case.randn(*size, salt=salt, dtype=torch.float32, device=device) for salt, size in enumerate(sizes)]


def run(f, T, device):
    leaves = [x.requires_grad_() for x in layer_inputs(T, device)]
    y_TD, loss = f(*leaves, 2)
    (y_TD.square().sum() + loss).backward()
    return [y_TD, loss, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_dropless_layer_compiles_whole(backend, device):
    """One graph, equal to eager, also for a number of tokens that it has not seen."""
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for T in (32, 45):
        for got, want in zip(run(compiled, T, device), run(layer, T, device), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


PRESENT = int(SMALLEST.ids().ge(0).sum())
COMPILED = {  # op -> call of an index with absent ids, x [5,4] and w [5,2]
    "gather": lambda i, x: ops.gather(x, i.order_N, None, i.bins_E, 2),
    "scatter": lambda i, x, w: ops.scatter(x.repeat(2, 1), i.order_N, None, w.flatten(), i.bins_E, 2),
    "binned": lambda i, x, w: ops.binned_scatter(
        ops.binned_gather(x, i.order_N, i.bins_E, 3, 2), i.order_N, w.flatten(), i.bins_E, 2
    ),
    "expert_mlp": lambda i, x, w: ops.expert_mlp(
        x, *x.expand(2, 3, 5, 4), x.T.expand(3, 4, 5), w, i, act="swiglu", num_copies=PRESENT
    ),
    "router": lambda i, x: ops.router(x, 2, score="sigmoid", norm_p=2.0),
    "router at ids": lambda i, x: ops.router(x, 2, ids_TK=(i.order_N[:5, None] + i.order_N.new_tensor([0, 1])) % 4 - 1),
    "linear_cross_entropy": lambda i, x, w: ops.linear_cross_entropy(x, w.T @ x, i.order_N[:5].long() % 2, chunk=2),
}


@pytest.mark.parametrize("name", COMPILED)
def test_an_op_compiles_whole(name, device):
    """One graph, bit for bit like eager in results and gradients."""
    torch._dynamo.reset()
    call = COMPILED[name]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    index = ops.route_index(SMALLEST.ids(device), SMALLEST.shape.E)
    inputs = {"x": torch.randn(5, 4, device=device), "w": torch.randn(5, 2, device=device)}
    inputs = {key: inputs[key] for key in inspect.signature(call).parameters if key in inputs}
    got, want = (evaluate(functools.partial(f, index), inputs) for f in (compiled, call))
    for what in want:
        same(got[what], want[what], what)
