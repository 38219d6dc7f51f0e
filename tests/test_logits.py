"""The router's logits: torch's product of floats, and on a GPU those of halves that stand for it."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from compare import against_reference, each_set_alone, same
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_ext import FusedMoE, ops
from moe_ext.ops import logits

of_halves = torch.ops.moe_ext.router_logits
HALF, CPU, CUDA = torch.bfloat16, torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("T", [0, 1, 1301])
@pytest.mark.parametrize("bias", [False, True])
def test_router_logits(T, bias, dtype, device):
    """On a GPU both ways."""
    D, E, real = 200, 24, torch.promote_types(dtype, torch.float32)
    inputs = {"x_TD": torch.randn(T, D, dtype=torch.float64).to(device, dtype),
              "w_ED": torch.randn(E, D, dtype=real, device=device) / D**0.5}  # fmt: skip
    if bias:
        inputs["bias_E"] = torch.randn(E, dtype=real, device=device)
    against_reference(ops, lambda ops, **inputs: ops.router_logits(**inputs), inputs)


# ---- which way -------------------------------------------------------------------------------------------------------


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What goes by halves on a GPU does so on every device."""
    on_a_gpu = functools.partial(logits.from_halves, CUDA)
    monkeypatch.setattr(logits, "from_halves", lambda device, *given: on_a_gpu(*given))


def test_only_many_halves_on_a_gpu_go_by_halves():
    assert [logits.from_halves(CUDA, HALF, torch.float32, T) for T in (1023, 1024)] == [False, True]
    assert not logits.from_halves(CPU, HALF, torch.float32, 4096)
    for x, w in ((torch.float16, torch.float32), (torch.float32, torch.float32), (HALF, torch.float64), (HALF, HALF)):
        assert not logits.from_halves(CUDA, x, w, 4096)


class Seen(TorchDispatchMode):
    """Names of ops, and shapes and dtypes of what they make."""

    def __init__(self):
        super().__init__()
        self.ops, self.made = [], []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        self.ops.append(op._opname)
        self.made += [(tuple(x.shape), x.dtype) for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        return result


@pytest.mark.parametrize("options, T, dtype, by_halves", [
    (dict(), 1024, HALF, True),
    (dict(router_bias=True, noise=True, dtype=HALF), 1024, HALF, True),
    (dict(jitter=0.1), 1024, HALF, False),              # on x in float32
    (dict(), 64, HALF, False),
    (dict(), 1024, torch.float16, False),
    (dict(), 1024, torch.float32, False),
])  # fmt: skip
def test_a_layer_on_a_gpu(options, T, dtype, by_halves, as_on_a_gpu):
    """Many tokens of halves are not copied to float32, forth or back."""
    D, E = 40, 6
    layer, x_BSD = FusedMoE(D, 8, E, 2, **options), torch.randn(1, T, D, dtype=dtype, requires_grad=True)
    with Seen() as seen:
        weights_TK, _, _ = layer.route(x_BSD, None, None)
        weights_TK[:, 0].sum().backward()
    assert ("router_logits" in seen.ops) == ("router_logits_backward" in seen.ops) == by_halves
    floats = any(math.prod(shape) == T * D and made == torch.float32 for shape, made in seen.made)
    assert floats != by_halves
    assert x_BSD.grad.dtype == dtype and layer.gate.weight.grad.dtype == options.get("dtype", torch.float32)


def test_a_region_of_autocast_rounds(as_on_a_gpu):
    """Outside a layer, which switches it off: as torch does it."""
    x, w, dtypes = torch.randn(1024, 4, dtype=HALF), torch.randn(3, 4), []
    for region in (False, True):
        with torch.autocast("cpu", HALF, enabled=region):
            dtypes.append(ops.router_logits(x, w).dtype)
    assert dtypes == [torch.float32, HALF]


@pytest.mark.parametrize("region", [HALF, torch.float16], ids=str)
def test_a_backward_in_a_region_is_the_same(region, device):
    x_TD, w_ED, dlogits_TE = drawn(device)
    leaves = x_TD.requires_grad_(), w_ED.requires_grad_()
    y_TE = of_halves(*leaves)
    want = torch.autograd.grad(y_TE, leaves, dlogits_TE, retain_graph=True)
    with torch.autocast(device, region):
        for got, outside in zip(torch.autograd.grad(y_TE, leaves, dlogits_TE), want, strict=True):
            same(got, outside)


def test_one_graph_for_any_number_of_rows(as_on_a_gpu):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ops.router_logits, backend=counter, fullgraph=True, dynamic=True)
    for T in (1024, 1500, 7):
        x, w = torch.randn(T, 8).to(HALF).requires_grad_(), torch.randn(3, 8, requires_grad=True)
        dlogits = torch.randn(T, 3)
        for got, want in zip(results(compiled, x, w, dlogits), results(of_halves, x, w, dlogits), strict=True):
            same(got, want)
    assert counter.frame_count == 1


def test_on_meta_it_has_a_shape():
    x, w = torch.empty(1024, 4, device="meta", dtype=HALF), torch.empty(3, 4, device="meta")
    assert ops.router_logits(x, w).shape == of_halves(x, w).shape == (1024, 3)


# ---- as near as floats -----------------------------------------------------------------------------------------------


def exact(x_TD, w_ED, dlogits_TE):
    """[logits, dx, dw] in float64, and the sums of their terms' magnitudes, which measure errors."""
    x, w, d = (t.double() for t in (x_TD, w_ED, dlogits_TE))
    return [(x @ w.T, d @ w, d.T @ x), (x.abs() @ w.abs().T, d.abs() @ w.abs(), d.abs().T @ x.abs())]


def results(call, x_TD, w_ED, dlogits_TE):
    leaves = [t.detach().clone().requires_grad_() for t in (x_TD, w_ED)]
    y_TE = call(*leaves)
    return y_TE.detach(), *torch.autograd.grad(y_TE, leaves, dlogits_TE)


def plain(x_TD, w_ED):
    return F.linear(x_TD.float(), w_ED)


def drawn(device, scales=0):
    """scales: decades up and down over which the columns of x and w, which cancel, and the rows of w are spread."""
    generator = torch.Generator().manual_seed(0)
    T, D, E = 500, 384, 24

    def spread(*size):
        return 10 ** (scales * (2 * torch.rand(*size, generator=generator, dtype=torch.float64) - 1))

    x_TD, w_ED, dlogits_TE = (torch.randn(*size, generator=generator) for size in ((T, D), (E, D), (T, E)))
    column_D = spread(D)
    return (x_TD / column_D).to(device, HALF), (w_ED * column_D).to(device, torch.float32), dlogits_TE.to(device)


# A GPU's tensor cores may round sums towards zero, after every 16 of the 500 terms and fewer here.
FLOOR = {"cpu": 0, "cuda": 500 / 16 * 2**-23}


@pytest.mark.parametrize("scales", [0, 15, 30])
def test_the_error_is_that_of_floats(scales, device):
    inputs = drawn(device, scales)
    oracles, sizes = exact(*inputs)
    got, want = results(of_halves, *inputs), results(plain, *inputs)
    for i in (0, 2):
        assert (got[i].dtype, got[i].shape) == (want[i].dtype, want[i].shape)
        error, bound = (((y[i].double() - oracles[i]).abs() / sizes[i]).max() for y in (got, want))
        assert error <= 1.5 * bound + FLOOR[device]


@pytest.mark.parametrize("scales", [0, 15, 30])
def test_dx_is_rounded_once(scales, device):
    inputs = drawn(device, scales)
    (_, oracle, _), (_, size, _) = exact(*inputs)
    dx = results(of_halves, *inputs)[1]
    assert dx.dtype == HALF and (dx == oracle.to(HALF)).double().mean() > 0.99
    ulp = 2.0 ** (oracle.abs().log2().floor() - 7)
    assert ((dx.double() - oracle).abs() <= ulp / 2 + 2**-15 * size).all()


def test_every_bit_of_w_counts(device):
    """A row of x with a single 1 finds a column of w: exactly, up to float32's largest."""
    w_ED = torch.randn(16, 64, dtype=torch.float64) * 10 ** (57 * torch.rand(16, 64, dtype=torch.float64) - 25)
    w_ED = w_ED.to(device, torch.float32)
    w_ED[:2, 0] = torch.tensor([torch.finfo(torch.float32).max, -3.4e38])
    x_DD = torch.eye(64, dtype=HALF, device=device)
    same(of_halves(x_DD, w_ED), w_ED.T.contiguous())
    d_DE = torch.eye(64, 16, device=device) / 3
    same(results(of_halves, x_DD, w_ED, d_DE)[2], d_DE.T.contiguous())


def test_what_is_not_finite_stays_so(device):
    """In each place alone, and there alone."""
    given = drawn(device)
    for i, value in ((i, value) for i in range(3) for value in (math.nan, math.inf, -math.inf)):
        inputs = [t.clone() for t in given]
        inputs[i][5, 7] = value
        for got, want in zip(results(of_halves, *inputs), results(plain, *inputs), strict=True):
            assert torch.equal(got.isfinite(), want.isfinite()) and got.isfinite().any()


def test_only_the_gradients_that_are_wanted(device):
    x_TD, w_ED, _ = drawn(device)
    each_set_alone(lambda x, w: of_halves(x, w), {"x": x_TD, "w": w_ED})


def test_other_shapes_and_strides(device):
    for T, D, E in ((0, 8, 3), (1, 1, 1), (7, 33, 5)):
        x_TD, w_ED = torch.randn(D, T, device=device).to(HALF).T, torch.randn(D, E, device=device).T
        d_TE = torch.randn(1, E, device=device).expand(T, E)
        for got, want in zip(results(of_halves, x_TD, w_ED, d_TE), results(plain, x_TD, w_ED, d_TE), strict=True):
            torch.testing.assert_close(got, want, rtol=2**-7 if got.dtype == HALF else 1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [dict(), dict(router_bias=True, noise=True)], ids=["plain", "noisy"])
def test_a_layer_learns_the_same(options, device, monkeypatch):
    """What a layer routes by halves and without, and the gradients."""
    layer = FusedMoE(64, 16, 8, 2, balance_weight=0.1, z_weight=0.1, **options, device=device)
    x_BSD = torch.randn(2, 600, 64, device=device).to(HALF).requires_grad_()

    def run(by_halves):
        monkeypatch.setattr(logits, "from_halves", lambda *_: by_halves)
        torch.manual_seed(3)
        with torch.autocast(device, HALF), Seen() as seen:
            y_BSD, routing = layer(x_BSD)
        assert ("router_logits" in seen.ops) == by_halves
        inputs = x_BSD, *layer.gate.parameters()
        return routing.ids, *torch.autograd.grad(y_BSD.float().square().sum() + routing.loss, inputs)

    (ids, *grads), (want_ids, *want_grads) = run(True), run(False)
    assert (ids != want_ids).double().mean() < 1e-3
    for got, want in zip(grads, want_grads, strict=True):
        assert got.dtype == want.dtype and (got - want).norm() < 1e-2 * want.norm()
