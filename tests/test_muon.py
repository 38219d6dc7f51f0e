"""Muon against torch.optim.Muon, against its formula matrix by matrix, and cut into pieces; Newton-Schulz by itself."""
import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.utils.flop_counter import FlopCounterMode

from moe_ext.optim import Muon, muon, newton_schulz
from moe_ext.optim.muon import COEFFICIENTS, cost
from moe_ext.parallel.ranks import run_ranks

SHAPES = (48, 16), (16, 48), (24, 24), (1, 8), (8, 1)
ULP = 2**-8     # of bf16 below 1, where the elements of an update are


def parameters(shapes, dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def gradients(parameters, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    for p in parameters:
        p.grad = scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def moved(optimizer, parameters, steps=4, scale=1.0):
    for step in range(steps):
        gradients(parameters, step, scale)
        optimizer.step()
    return [p.detach() for p in parameters]


# ---- torch.optim.Muon ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("scale", [1.0, 1e-9])      # of the gradients: eps is the larger one in the second
def test_is_that_of_torch(adjust_lr_fn, nesterov, dtype, scale):
    """In bf16: the momentum bit for bit, each step but for an ulp or two of what Newton-Schulz gives, because sums run
    in another order. It would see a decay by the adjusted rate, and any other factor of it."""
    ours, theirs = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
    how = dict(lr=0.05, weight_decay=0.2, momentum=0.9, nesterov=nesterov, adjust_lr_fn=adjust_lr_fn)
    mine, other = Muon(ours, **how), torch.optim.Muon(theirs, **how)
    assert mine.param_groups[0].keys() == other.param_groups[0].keys()
    for got, want, p, q in zip(moved(mine, ours, 4, scale), moved(other, theirs, 4, scale), ours, theirs, strict=True):
        rows, columns = p.shape
        factor = 0.2 * math.sqrt(max(rows, columns)) if adjust_lr_fn == "match_rms_adamw" else math.sqrt(
            max(1, rows / columns))
        assert (got - want).abs().max() <= 4 * 0.05 * factor * 2 * ULP
        assert torch.equal(mine.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"])


def test_takes_the_same_arguments_as_torch():
    theirs, ours = (cls(parameters([(2, 3)])).defaults for cls in (torch.optim.Muon, Muon))
    assert ours == theirs
    positional = 0.1, 0.2, 0.3, False, (3.0, -4.0, 2.0), 1e-6, 4, "match_rms_adamw"
    theirs, ours = (cls(parameters([(2, 3)]), *positional).defaults for cls in (torch.optim.Muon, Muon))
    assert ours == theirs


def test_a_state_dict_of_torch_goes_on():
    ours, theirs = parameters(SHAPES), parameters(SHAPES)
    mine, other = Muon(ours), torch.optim.Muon(theirs)
    moved(other, theirs, 1)
    mine.load_state_dict(other.state_dict())
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(mine.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"])


# ---- the formula -----------------------------------------------------------------------------------------------------
def formula(values, grads, *, lr, weight_decay, momentum, nesterov, coefficients, steps, factor):
    """The steps of one matrix, word for word."""
    a, b, c = coefficients
    buffer = torch.zeros_like(values)
    for g in grads:
        buffer = momentum * buffer + (1 - momentum) * g
        m = momentum * buffer + (1 - momentum) * g if nesterov else buffer
        x = m / max(float(m.norm()), 1e-7)
        for _ in range(steps):
            gram = x @ x.T
            x = a * x + b * gram @ x + c * gram @ gram @ x
        values = values - lr * weight_decay * values - lr * factor * x
    return values


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("adjust_lr_fn", "factor"), [
    ("original", lambda m, n: max(1, m / n) ** 0.5), ("match_rms_adamw", lambda m, n: 0.2 * max(m, n) ** 0.5),
    ("spectral", lambda m, n: (m / n) ** 0.5), ("none", lambda m, n: 1.0)])
def test_is_its_formula(adjust_lr_fn, factor, dtype, limit):
    """Stacks too: each of their matrices by itself."""
    shapes = (12, 5), (5, 12), (3, 8, 6), (2, 2, 4, 9)
    ps = parameters(shapes, dtype)
    before = [p.detach().clone().double() for p in ps]
    grads = []
    for step in range(3):
        gradients(ps, step)
        grads.append([p.grad.clone().double() for p in ps])
    how = dict(lr=0.1, weight_decay=0.3, momentum=0.8, nesterov=True)
    got = moved(Muon(ps, **how, ns_coefficients=(3.0, -3.2, 1.2), ns_steps=4, adjust_lr_fn=adjust_lr_fn,
                     ns_dtype=dtype), ps, 3)
    for i, (shape, values) in enumerate(zip(shapes, got, strict=True)):
        matrices = [x.reshape(-1, *shape[-2:]) for x in (before[i], *(g[i] for g in grads))]
        want = torch.stack([formula(one[0], one[1:], **how, coefficients=(3.0, -3.2, 1.2), steps=4,
                                    factor=factor(*shape[-2:])) for one in zip(*matrices, strict=True)]).view(shape)
        assert (values - want).abs().max() <= limit * want.abs().max()


@pytest.mark.parametrize(("adjust_lr_fn", "wide", "tall"), [("original", 0.865, 1.73), ("match_rms_adamw", 3.91, 3.91)])
def test_length_of_a_step(adjust_lr_fn, wide, tall):
    """Over the root of the number of singular values, as measured of torch's."""
    for shape, want in (((128, 512), wide), ((512, 128), tall)):
        (p,) = ps = [nn.Parameter(torch.zeros(shape))]
        moved(Muon(ps, lr=0.5, adjust_lr_fn=adjust_lr_fn), ps, 1)
        assert float(p.detach().norm()) / 128**0.5 / 0.5 == pytest.approx(want, rel=0.02)


def test_groups_have_hyper_parameters_of_their_own():
    """Also where matrices of one shape lie in both."""
    ps, alone = parameters([(6, 4)] * 2, torch.float64), parameters([(6, 4)] * 2, torch.float64)
    groups = [dict(lr=0.1, ns_steps=3), dict(weight_decay=0.0, momentum=0.5, nesterov=False, adjust_lr_fn="spectral")]
    both = moved(Muon([dict(params=[p], **group) for p, group in zip(ps, groups, strict=True)],
                      ns_dtype=torch.float64), ps)
    each = [Muon([p], ns_dtype=torch.float64, **group) for p, group in zip(alone, groups, strict=True)]
    for step in range(4):
        gradients(alone, step)
        for optimizer in each:
            optimizer.step()
    for got, want in zip(both, alone, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-13, atol=1e-13)


# ---- Newton-Schulz ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_newton_schulz_evens_out_singular_values(dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 20, 50, dtype=dtype)
    before = x.clone()
    y = newton_schulz(x)
    assert y.shape == x.shape and y.dtype == dtype and torch.equal(x, before)
    sizes = torch.linalg.svdvals(y.double())
    assert sizes.min() > 0.65 and sizes.max() < 1.25
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    assert ((u @ v - y.double()).norm() / (u @ v).norm()) < 0.3             # and directions stay
    assert (newton_schulz(x.mT).mT.double() - y.double()).abs().max() <= 4 * torch.finfo(dtype).eps


def test_newton_schulz_takes_a_batch_in_parts(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(7, 5, 9, dtype=torch.float64)
    whole = newton_schulz(x, 3, (2.0, -1.5, 0.5), 1e-3)
    monkeypatch.setattr(muon, "CACHED", 2 * 5 * 9)
    torch.testing.assert_close(newton_schulz(x, 3, (2.0, -1.5, 0.5), 1e-3), whole, rtol=1e-14, atol=1e-14)
    for one, want in zip(x, whole, strict=True):
        torch.testing.assert_close(newton_schulz(one, 3, (2.0, -1.5, 0.5), 1e-3), want, rtol=1e-14, atol=1e-14)


def test_bf16_products_are_rounded_one_by_one():
    """What a CPU multiplies in fp32 is what bf16 products give: sums in fp32, each result rounded once."""
    torch.manual_seed(0)
    x = torch.randn(16, 24).bfloat16()
    a, b, c = COEFFICIENTS
    y = x / x.norm()
    for _ in range(5):
        gram = y @ y.T
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    got = newton_schulz(x)
    assert (got - y).abs().max() <= ULP
    assert (newton_schulz(x.float()).bfloat16() - y).abs().max() > ULP      # which fp32 throughout is not


def test_newton_schulz_at_the_edges():
    for shape in ((0, 4, 3), (2, 0, 3), (3, 0), (0, 0)):
        assert newton_schulz(torch.zeros(shape)).shape == shape
    x = torch.randn(4, 6, 3)
    x[1], x[2, 0, 0], x[3, 1, 1] = 0, math.inf, math.nan
    y = newton_schulz(x)
    assert torch.equal(y[1], torch.zeros(6, 3)) and y[2].isnan().any() and y[3].isnan().all()
    assert torch.equal(y[0], newton_schulz(x)[0]) and y[0].isfinite().all()
    with pytest.raises(TypeError, match=r"x is torch\.int64; wanted a real floating dtype"):
        newton_schulz(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x has shape \[3\]; wanted \[.., M, N\]"):
        newton_schulz(torch.ones(3))


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (6, 6)])
def test_cost_counts_the_products(shape):
    with FlopCounterMode(display=False) as counter:
        newton_schulz(torch.randn(3, *shape), 4)
    assert counter.get_total_flops() == 3 * cost(shape, 4)


# ---- cut into pieces -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ns_dtype", [torch.bfloat16, torch.float64])
def test_matrices_that_ranks_share(ns_dtype):
    """Uneven shards of rows, of columns, of whole experts: bit for bit what one process gives, since what travels is
    what Newton-Schulz would round anyway, and every element decays and moves once."""
    shapes, dims = ((5, 6), (6, 5), (3, 7, 4), (3, 4, 4), (1, 6)), (0, 1, 1, 0, 0)
    how = dict(lr=0.1, weight_decay=0.5, ns_dtype=ns_dtype)

    def body(rank):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        ps = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(dim)]))
              for p, dim in zip(parameters(shapes, torch.float64), dims, strict=True)]
        optimizer = Muon(ps, **how)
        for step in range(3):
            whole = parameters(shapes, torch.float64)
            gradients(whole, step)
            for p, q, dim in zip(ps, whole, dims, strict=True):
                p.grad = distribute_tensor(q.grad, mesh, [Shard(dim)])
            ps[4].grad = ps[4].grad if step else None       # moved later than the others
            optimizer.step()
        assert all(isinstance(optimizer.state[p]["momentum_buffer"], DTensor) for p in ps)
        return [p.full_tensor().detach() for p in ps]

    one = run_ranks(1, body)[0]
    for rank in run_ranks(2, body):
        assert all(torch.equal(got, want) for got, want in zip(rank, one, strict=True))


# ---- state -----------------------------------------------------------------------------------------------------------
def test_state_on_the_host_and_in_bf16():
    runs = {}
    for state in ("full", "host", "bf16"):
        ps = parameters(SHAPES)
        optimizer = Muon(ps, lr=0.1, state=state, ns_dtype=torch.float32)
        runs[state] = moved(optimizer, ps)
        assert optimizer.state[ps[0]].keys() == {"momentum_buffer"}
        dtype = torch.bfloat16 if state == "bf16" else torch.float32
        assert optimizer.state[ps[0]]["momentum_buffer"].dtype == dtype
    for full, host, bf16 in zip(*runs.values(), strict=True):
        assert torch.equal(full, host)
        assert 0 < (full - bf16).abs().max() < 0.02


@pytest.mark.parametrize("state", ["full", "host", "bf16"])
def test_goes_on_from_a_copy_and_from_a_state_dict(state):
    ps, ns = parameters(SHAPES), dict(ns_dtype=torch.float32, state=state)
    optimizer = Muon(ps, **ns)
    moved(optimizer, ps, 2)
    again, copied = [nn.Parameter(p.detach().clone()) for p in ps], copy.deepcopy(optimizer)
    loaded = Muon(again, 0.9, **ns)
    loaded.load_state_dict(optimizer.state_dict())
    want = moved(optimizer, ps)
    for other, theirs in ((loaded, again), (copied, copied.param_groups[0]["params"])):
        assert all(torch.equal(x, y) for x, y in zip(moved(other, theirs), want, strict=True))


def test_state_of_another_is_refused():
    ps = parameters([(4, 3)])
    other = torch.optim.AdamW(ps)
    moved(other, ps, 1)
    with pytest.raises(ValueError, match=r"Muon: got a state whose groups lack adjust_lr_fn, .*another optimizer's"):
        Muon(ps).load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"got momentum_buffer \[3, 4\], wanted .* \[4, 3\]"):
        Muon(ps).place(ps[0], "momentum_buffer", [3, 4], torch.float32)


# ---- what is left alone, and what is refused -------------------------------------------------------------------------
def test_without_a_gradient_nothing_moves():
    ps = parameters([(4, 3), (5, 2)])
    optimizer = Muon(ps, weight_decay=0.5)
    before = [p.detach().clone() for p in ps]
    optimizer.step()
    assert not optimizer.state and all(torch.equal(p.detach(), was) for p, was in zip(ps, before, strict=True))
    ps[1].grad = torch.ones(5, 2)
    optimizer.step()
    assert list(optimizer.state) == [ps[1]]
    assert torch.equal(ps[0].detach(), before[0]) and not torch.equal(ps[1].detach(), before[1])


def test_a_gradient_of_zero_decays_alone():
    (p,) = ps = parameters([(4, 3)], torch.float64)
    before, p.grad = p.detach().clone(), torch.zeros(4, 3, dtype=torch.float64)
    Muon(ps, lr=0.5, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
    assert torch.equal(p.detach(), before * (1 - 0.5 * 0.1))


def test_closure():
    (p,) = ps = parameters([(4, 3)])
    optimizer = Muon(ps)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss
    assert optimizer.step(closure).requires_grad and optimizer.state[p]


def test_an_added_group_moves_too():
    ps = parameters([(4, 3), (4, 3)])
    optimizer = Muon(ps[:1])
    moved(optimizer, ps, 1)
    before = ps[1].detach().clone()
    optimizer.add_param_group({"params": ps[1:]})
    moved(optimizer, ps, 1)
    assert not torch.equal(ps[1].detach(), before)
    with pytest.raises(ValueError, match="lr is -1"):
        optimizer.add_param_group({"params": parameters([(2, 2)]), "lr": -1})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize(("how", "error", "said"), [
    (dict(lr=-1.0), ValueError, "lr is -1.0; it must be finite and not negative"),
    (dict(lr=math.nan), ValueError, "lr is nan"),
    (dict(lr=torch.tensor(0.1)), TypeError, "lr is a Tensor; it must be a float"),
    (dict(weight_decay=-0.1), ValueError, "weight_decay is -0.1"),
    (dict(momentum=1.0), ValueError, r"momentum is 1.0; it must be in \[0, 1\)"),
    (dict(eps=0.0), ValueError, "eps is 0.0; it must be positive"),
    (dict(ns_steps=0), ValueError, r"ns_steps is 0; it must be an integer in 1 .. 99"),
    (dict(ns_steps=100), ValueError, "ns_steps is 100"),
    (dict(ns_steps=2.5), ValueError, "ns_steps is 2.5"),
    (dict(ns_coefficients=(1.0, 2.0)), ValueError, "ns_coefficients is .*three finite numbers"),
    (dict(adjust_lr_fn="rms"), ValueError, "'rms'; it must be None or one of original, match_rms_adamw, "),
    (dict(ns_dtype=torch.float16), ValueError, "ns_dtype is torch.float16; it must be one of torch.bfloat16, "),
    (dict(state="disk"), ValueError, "got 'disk'"),
])
def test_hyper_parameters_out_of_range(how, error, said):
    with pytest.raises(error, match=said):
        Muon(parameters([(2, 3)]), **how)


def test_what_is_no_matrix():
    vector, matrix = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r'but got norm.weight, \[4\]: give it to AdamW, as "norms: adamw"'):
        Muon([("proj.weight", matrix), ("norm.weight", vector)])
    with pytest.raises(ValueError, match=r"but got parameter 0 of shape \[\]"):
        Muon([nn.Parameter(torch.tensor(1.0))])
    with pytest.raises(TypeError, match=r"parameter 0 of shape .*, torch.complex64"):
        Muon([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match="empty parameter list"):
        Muon([])


def test_a_sparse_gradient():
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    optimizer = Muon(table.named_parameters())
    before = table.weight.detach().clone()
    with pytest.raises(TypeError, match=r"Muon: weight has a sparse gradient; wanted a dense one"):
        optimizer.step()
    assert torch.equal(table.weight.detach(), before) and not optimizer.state
