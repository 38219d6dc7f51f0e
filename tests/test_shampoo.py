"""Shampoo against its formula written out in float64, its fallbacks, state, errors and cost."""
import copy
import itertools
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

from moe_ext.optim import Shampoo, inverse_root
from moe_ext.optim.shampoo import cost, state_shapes
from moe_ext.optim.together import Together

STEPS = 9
SHAPES = {"number": (), "vector": (5,), "tall": (6, 3), "wide": (3, 7), "experts": (3, 4, 5),
          "gate and up": (2, 2, 4, 3)}  # fmt: skip


def parameters(shapes, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)) for shape in shapes]


def gradients(shapes, steps=STEPS, seed=1):
    """[step][parameter], float64."""
    g = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes] for _ in range(steps)]


def train(optimizer, grads):
    """The parameters after each step."""
    moved, found = [p for group in optimizer.param_groups for p in group["params"]], []
    for step in grads:
        for p, grad in zip(moved, step, strict=True):
            p.grad = None if grad is None else grad.to(p.dtype, copy=True)
        optimizer.step()
        found.append([p.detach().clone() for p in moved])
    return found


# ---- the formula -----------------------------------------------------------------------------------------------------
def literal(w, grads, *, lr=1e-3, betas=(0.9, 0.999), epsilon=1e-12, weight_decay=0.0, momentum=0.0, use_nesterov=False,
            use_decoupled_weight_decay=True, use_bias_correction=True, precondition_frequency=20,
            start_preconditioning_step=-1, inverse_exponent_override=None, grafting="adam", graft_beta2=None,
            graft_eps=1e-8, max_preconditioner_dim=2048):
    """W after each step: every expert's matrix by itself, every block by itself, sums over the whole past."""
    (beta1, beta2), most = betas, max_preconditioner_dim
    graft_beta2 = beta2 if graft_beta2 is None else graft_beta2
    frequency, start = precondition_frequency, start_preconditioning_step
    start = frequency if start < 1 else start

    def mean(values, beta, corrected=True):
        if beta == 1:
            return sum(values)
        total = sum((1 - beta) * beta ** (len(values) - 1 - i) * value for i, value in enumerate(values))
        return total / (1 - beta ** len(values)) if corrected else total

    def power(matrix, exponent):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag((values.clamp(min=0) + epsilon) ** -exponent) @ vectors.T

    def block(w, grads):
        found, seen, roots, velocity = [], [], [], torch.zeros_like(w)
        for t, g in enumerate(grads, start=1):
            seen.append(g if use_decoupled_weight_decay else g + weight_decay * w)
            exponent = (inverse_exponent_override or {}).get(w.ndim, 1 / (2 * w.ndim) if w.ndim else 0)
            if t == start or (t > start and t % frequency == 0):
                if w.ndim == 1:
                    outer = [[torch.outer(x, x) for x in seen]]
                elif w.ndim == 2:
                    outer = [[x @ x.T for x in seen], [x.T @ x for x in seen]]
                else:
                    outer = []
                roots = [power(mean(side, beta2, use_bias_correction), exponent) for side in outer]
            m = mean(seen, beta1, use_bias_correction) if beta1 else seen[-1]
            d = m
            if grafting == "adam":
                d = m / (mean([x**2 for x in seen], graft_beta2).sqrt() + graft_eps)
            p = d
            if t >= start:
                p = m
                if w.ndim == 1:
                    p = roots[0] @ p
                elif w.ndim == 2:
                    p = roots[0] @ p @ roots[1]
                if grafting != "none":
                    p = p * d.norm() / p.norm()
            if use_decoupled_weight_decay:
                p = p + weight_decay * w
            if momentum:
                velocity = momentum * velocity + p
                p = p + momentum * velocity if use_nesterov else velocity
            w = w - lr * p
            found.append(w)
        return found

    whole, result = w.detach(), [torch.empty_like(w) for _ in grads]
    for expert in itertools.product(*map(range, whole.shape[:-2])):
        sides = [range(0, n, most) for n in whole[expert].shape]
        for start_of in itertools.product(*sides):
            at = (*expert, *(slice(a, a + most) for a in start_of))
            for into, value in zip(result, block(whole[at], [g[at] for g in grads]), strict=True):
                into[at] = value
    return result


PHASES = dict(lr=0.1, epsilon=1e-3, precondition_frequency=3)
SETTINGS = {
    "adam": dict(weight_decay=0.1),
    "adam of its own": dict(graft_beta2=0.7, graft_eps=1e-3),
    "sgd": dict(grafting="sgd", weight_decay=0.1),
    "none": dict(grafting="none"),
    "blocks": dict(max_preconditioner_dim=2),
    "blocks that divide nothing": dict(max_preconditioner_dim=4, grafting="none"),
    "start between": dict(start_preconditioning_step=5),
    "start at once": dict(precondition_frequency=1, grafting="none"),
    "start as told": dict(start_preconditioning_step=6, precondition_frequency=2),
    "never yet": dict(precondition_frequency=50),
    "no mean": dict(betas=(0.0, 0.9)),
    "sums": dict(betas=(0.9, 1.0), grafting="none"),
    "sums, grafted": dict(betas=(0.5, 1.0)),
    "fast": dict(betas=(0.5, 0.5), graft_beta2=0.999),
    "biased": dict(use_bias_correction=False),
    "biased sgd": dict(use_bias_correction=False, grafting="sgd", betas=(0.9, 0.99)),
    "coupled decay": dict(weight_decay=0.3, use_decoupled_weight_decay=False),
    "momentum": dict(momentum=0.8, weight_decay=0.1),
    "nesterov": dict(momentum=0.8, use_nesterov=True, weight_decay=0.1),
    "exponents": dict(inverse_exponent_override={1: 1.0, 2: 0.5}, grafting="none"),
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_step_is_the_formula_s(settings):
    settings = PHASES | settings
    ps, grads = parameters(SHAPES.values()), gradients(SHAPES.values())
    wanted = [literal(p, [step[i] for step in grads], **settings) for i, p in enumerate(ps)]
    got = train(Shampoo(ps, **settings), grads)
    for step, values in enumerate(got):
        for name, value, of in zip(SHAPES, values, wanted, strict=True):
            torch.testing.assert_close(value, of[step], rtol=1e-9, atol=1e-11, msg=f"{name}, step {step + 1}")


def test_a_root_is_the_power_of_a_known_matrix():
    q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    values = torch.tensor([0.0, 1.0, 16.0, 81.0], dtype=torch.float64)
    got = inverse_root(q @ values.diag() @ q.T, 4, 1e-4)
    torch.testing.assert_close(got, q @ ((values + 1e-4) ** -0.25).diag() @ q.T, rtol=1e-9, atol=1e-9)
    assert inverse_root(torch.eye(3), 2, 1e-12).dtype == torch.float32
    low = -1e-9 * torch.ones(2, 2)      # rounding made it negative: eigenvalues are raised to 0
    assert torch.isfinite(inverse_root(low, 4, 1e-12, torch.float32)).all()


def test_two_experts_never_see_each_other():
    """One with gradients of its own moves as if it were alone, to the bit."""
    grads = gradients([(2, 4, 3)])
    both = train(Shampoo(parameters([(2, 4, 3)]), **PHASES), grads)
    alone = train(Shampoo([nn.Parameter(parameters([(2, 4, 3)])[0][1].detach().clone())], **PHASES),
                  [[g[1]] for g, in grads])
    for (stack,), (one,) in zip(both, alone, strict=True):
        assert torch.equal(stack[1], one)


def test_a_parameter_without_a_gradient_stays_and_counts_no_step():
    ps, grads = parameters([(4, 3), (4, 3)]), gradients([(4, 3), (4, 3)])
    for i in (0, 3, 4):
        grads[i][1] = None
    optimizer = Shampoo(ps, **PHASES)
    got = train(optimizer, grads)
    assert torch.equal(got[3][1], got[2][1])
    assert [float(optimizer.state[p]["step"]) for p in ps] == [STEPS, STEPS - 3]
    wanted = literal(parameters([(4, 3), (4, 3)])[1], [step[1] for step in grads if step[1] is not None], **PHASES)
    torch.testing.assert_close(got[-1][1], wanted[-1], rtol=1e-9, atol=1e-11)


def test_parameters_without_elements_are_no_trouble():
    ps = parameters([(0, 3), (2, 0), (0,), (3, 2)])
    train(Shampoo(ps, **PHASES), [[torch.ones_like(p) for p in ps]] * 4)
    assert torch.isfinite(ps[-1]).all()


def test_groups_have_their_own_settings():
    ps, grads = parameters([(4, 3), (4, 3)]), gradients([(4, 3), (4, 3)])
    own = dict(lr=0.01, grafting="sgd", precondition_frequency=2, betas=(0.5, 0.9))
    got = train(Shampoo([{"params": ps[:1]}, {"params": ps[1:], **own}], **PHASES), grads)
    for i, settings in enumerate((PHASES, PHASES | own)):
        wanted = literal(parameters([(4, 3), (4, 3)])[i], [step[i] for step in grads], **settings)
        torch.testing.assert_close(got[-1][i], wanted[-1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype, root_dtype, bar", [
    (torch.float32, torch.float64, 1e-4), (torch.float32, torch.float32, 1e-4), (torch.bfloat16, torch.float64, 0.03)])
def test_lower_precision_is_near_the_formula(dtype, root_dtype, bar):
    """Of a bf16 parameter everything else is fp32: its preconditioners would stand still."""
    shapes, settings = [(6, 4), (5,)], dict(lr=0.1, epsilon=1e-3, precondition_frequency=3)
    ps = parameters(shapes, dtype)
    grads = [[g.to(dtype).double() for g in step] for step in gradients(shapes)]
    wanted = [literal(p.double(), [step[i] for step in grads], **settings)[-1] for i, p in enumerate(ps)]
    optimizer = Shampoo(ps, root_dtype=root_dtype, **settings)
    for value, of in zip(train(optimizer, grads)[-1], wanted, strict=True):
        assert value.dtype == dtype and (value.double() - of).abs().max() < bar * of.abs().max()
    assert all(t.dtype == torch.float32 for state in optimizer.state.values() for t in state.values())


@pytest.mark.parametrize("dtype, root_dtype", [(torch.float64, torch.float64), (torch.float32, torch.float32)])
def test_it_learns_where_most_eigenvalues_are_rounding_errors(dtype, root_dtype):
    """epsilon 1e-12 and gradients of rank 2 in 24 dimensions, in fp32 too: what roots amplify stays bounded."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 24, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    w = nn.Parameter(torch.zeros(24, 24, dtype=dtype))
    optimizer = Shampoo([w], lr=1e-2, epsilon=1e-12, precondition_frequency=5, root_dtype=root_dtype, weight_decay=1e-5)
    losses = []
    for _ in range(100):
        loss = ((x @ w - y) ** 2).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 2e-3 * losses[0] and max(losses) == losses[0]


# ---- falling back ----------------------------------------------------------------------------------------------------
FALLING = dict(lr=0.1, epsilon=1e-3, precondition_frequency=2)


def named_matrix(dtype=torch.float64):
    p = parameters([(4, 3)], dtype)[0]
    return p, [{"params": [p], "param_names": ["layers.0.w"]}]


def failing(monkeypatch, times, how="raise"):
    """torch.linalg.eigh fails that often; the dtypes that it was called with."""
    real, seen = torch.linalg.eigh, []

    def eigh(matrix):
        seen.append(matrix.dtype)
        if len(seen) > times:
            return real(matrix)
        if how == "raise":
            raise torch.linalg.LinAlgError("The algorithm failed to converge")
        return torch.full_like(matrix[0], math.nan), matrix
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    return seen


@pytest.mark.parametrize("how", ["raise", "nan"])
@pytest.mark.parametrize("root_dtype", [torch.float32, torch.float64])
def test_a_failed_eigendecomposition_is_done_again(monkeypatch, how, root_dtype):
    _, groups = named_matrix()
    seen = failing(monkeypatch, 1, how)
    optimizer, grads = Shampoo(groups, root_dtype=root_dtype, **FALLING), gradients([(4, 3)], 2)
    with pytest.warns(UserWarning, match=r"layers\.0\.w, block 0,0, side 0, step 2: .*failed, done again in fp64"):
        got = train(optimizer, grads)[-1][0]
    assert seen == [root_dtype, torch.float64, root_dtype] and optimizer.fallbacks == 1
    monkeypatch.undo()
    wanted = literal(named_matrix()[0], [g for g, in grads], **FALLING)[-1]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_without_any_root_grafting_moves_the_block(monkeypatch):
    _, groups = named_matrix()
    failing(monkeypatch, 2)             # of side 0; side 1 has a root, and one root alone is not used
    optimizer, grads = Shampoo(groups, **FALLING), gradients([(4, 3)], 4)
    with pytest.warns(UserWarning, match="failed twice, grafting alone moves the block"):
        got = train(optimizer, grads)
    assert optimizer.fallbacks == 1
    monkeypatch.undo()
    alone = literal(named_matrix()[0], [g for g, in grads], **FALLING | dict(precondition_frequency=50))
    torch.testing.assert_close(got[2][0], alone[2], rtol=1e-9, atol=1e-11)
    assert not torch.allclose(got[3][0], alone[3])          # the next refresh succeeds


def test_the_last_root_stays_and_a_warning_comes_once(monkeypatch):
    p, groups = named_matrix()
    optimizer, grads = Shampoo(groups, **FALLING), gradients([(4, 3)], 8)
    train(optimizer, grads[:3])
    before = optimizer.state[p]["root0.0,0"].clone()
    failing(monkeypatch, 8)
    with pytest.warns(UserWarning, match="step 4: .*failed twice, the last root stays") as told:
        train(optimizer, grads[3:7])
    assert len(told) == 1 and optimizer.fallbacks == 4      # two sides at steps 4 and 6
    assert torch.equal(optimizer.state[p]["root0.0,0"], before)
    train(optimizer, grads[7:])
    assert optimizer.fallbacks == 4 and not torch.equal(optimizer.state[p]["root0.0,0"], before)


def test_a_factor_that_is_not_finite_starts_anew():
    p, groups = named_matrix()
    optimizer, grads = Shampoo(groups, **FALLING), gradients([(4, 3)], 8)
    train(optimizer, grads[:3])
    state = optimizer.state[p]
    state["factor1.0,0"][0, 1] = math.inf
    kept = state["root1.0,0"].clone()
    with pytest.warns(UserWarning, match="side 1, step 4: .*not finite, it starts anew, the last root stays"):
        train(optimizer, grads[3:4])
    assert optimizer.fallbacks == 1 and torch.equal(state["root1.0,0"], kept) and state["since1.0,0"] == 4
    train(optimizer, grads[4:6])        # its mean is that of the two gradients since
    weights = torch.tensor([0.999, 1.0], dtype=torch.float64) / 1.999
    factor = sum(w * g[0].T @ g[0] for w, g in zip(weights, grads[4:6], strict=True))
    torch.testing.assert_close(state["root1.0,0"], inverse_root(factor, 4, 1e-3), rtol=1e-9, atol=1e-9)
    assert optimizer.fallbacks == 1 and torch.isfinite(p).all()


def test_a_factor_that_is_never_finite_leaves_grafting():
    """Squares that overflow: of a gradient of 1e160 in float64."""
    p, groups = named_matrix()
    optimizer = Shampoo(groups, grafting="sgd", **FALLING)
    with pytest.warns(UserWarning, match="starts anew, grafting alone moves the block"):
        train(optimizer, [[torch.full((4, 3), 1e160, dtype=torch.float64)]] * 4)
    assert optimizer.fallbacks == 4 and torch.isfinite(p).all() and p.abs().max() > 1e158


def test_a_healthy_run_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = Shampoo(parameters(SHAPES.values()), **FALLING)
        train(optimizer, gradients(SHAPES.values()))
    assert optimizer.fallbacks == 0


# ---- state -----------------------------------------------------------------------------------------------------------
def halfway(settings, dtype=torch.float64):
    """An optimizer after four steps, its gradients of all."""
    shapes = [(6, 3), (2, 2, 3, 4), (5,), ()]
    optimizer, grads = Shampoo(parameters(shapes, dtype), **settings), gradients(shapes)
    train(optimizer, grads[:4])
    return optimizer, grads


def continued(optimizer, state_dict, settings):
    """A fresh optimizer of copies of the parameters, with the state."""
    copies = [nn.Parameter(p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    fresh = Shampoo(copies, **settings)
    fresh.load_state_dict(state_dict)
    return fresh


@pytest.mark.parametrize("settings", [
    PHASES, PHASES | dict(grafting="sgd", momentum=0.9), PHASES | dict(max_preconditioner_dim=2, betas=(0.0, 0.9)),
    PHASES | dict(state="bf16", betas=(0.9, 0.95), momentum=0.5), PHASES | dict(state="host")])
def test_state_dicts_copies_and_pickles_continue_to_the_bit(settings, tmp_path):
    optimizer, grads = halfway(settings, torch.float32)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    loaded = continued(optimizer, torch.load(tmp_path / "state.pt"), settings)
    others = [loaded, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    for state, of in zip(loaded.state.values(), optimizer.state.values(), strict=True):
        assert {key: t.dtype for key, t in state.items()} == {key: t.dtype for key, t in of.items()}
    wanted = train(optimizer, grads[4:])
    for other in others:
        for step, of in zip(train(other, grads[4:]), wanted, strict=True):
            assert all(map(torch.equal, step, of))


def test_state_of_another_kind_is_converted():
    settings = PHASES | dict(betas=(0.9, 0.95))
    optimizer, grads = halfway(settings, torch.float32)
    rounded = continued(optimizer, optimizer.state_dict(), settings | dict(state="bf16"))
    state = next(iter(rounded.state.values()))
    assert {key.split(".")[0] for key, t in state.items() if t.dtype == torch.bfloat16} == {"exp_avg", "exp_avg_sq"}
    for value, of in zip(train(rounded, grads[4:])[-1], train(optimizer, grads[4:])[-1], strict=True):
        assert (value - of).abs().max() < 0.02 * of.abs().max() + 0.02


@pytest.mark.parametrize("grafting", ["adam", "sgd", "none"])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_state_is_what_the_plan_counts(grafting, beta1):
    shape = (3, 5, 4)
    optimizer = Shampoo(parameters([shape]), betas=(beta1, 0.9), max_preconditioner_dim=3,
                        **FALLING | dict(grafting=grafting))
    train(optimizer, gradients([shape], 1))
    state = next(iter(optimizer.state.values()))
    assert not any(key.startswith("root") for key in state)         # none before there is one
    train(optimizer, gradients([shape], 1))
    wanted = {"step": ()}
    for e, (row, rows), (column, columns) in itertools.product(range(3), ((0, 3), (3, 2)), ((0, 3), (3, 1))):
        wanted |= {f"{what}.{e},{row},{column}": of for what, of in
                   state_shapes((rows, columns), grafting, beta1).items()}
    assert {key: tuple(t.shape) for key, t in state.items()} == wanted


def test_places_are_those_of_the_state():
    optimizer, _ = halfway(PHASES | dict(max_preconditioner_dim=4, momentum=0.5))
    for p, state in optimizer.state.items():
        for key, t in state.items():
            room = optimizer.place(p, key, list(t.shape), t.dtype)
            assert (room.shape, room.dtype, room.device) == (t.shape, t.dtype, t.device)
    p = optimizer.param_groups[0]["params"][0]
    assert optimizer.place(p, "since1.0,0", [], torch.float32).shape == ()


def adamw_state(optimizer):
    adamw = torch.optim.AdamW([nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]])
    train(adamw, gradients([p.shape for p in optimizer.param_groups[0]["params"]], 1))
    return adamw.state_dict()


def changed(key, tensor):
    def state(optimizer):
        found = copy.deepcopy(optimizer.state_dict())
        found["state"][0] = {"step": torch.ones(()), key: tensor}
        return found
    return state


@pytest.mark.parametrize("state, sentence", [
    (adamw_state, "groups lack .*epsilon.*another optimizer"),
    (changed("exp_avg", torch.zeros(6, 3)), "exp_avg .*max_preconditioner_dim 2048 Shampoo has blocks at 0,0"),
    (changed("factor0.0,2", torch.zeros(6, 6)), "factor0.0,2 .*blocks at 0,0.*max_preconditioner_dim that it is of"),
    (changed("factor0.0,0", torch.zeros(5, 5)), r"factor0.0,0 \[5, 5\].*factor0 \[6, 6\]"),
    (changed("factor2.0,0", torch.zeros(6, 6)), "factor2.0,0 .*has exp_avg"),
    (changed("step", torch.zeros(3)), "step"),
    (lambda optimizer: Shampoo(parameters([(6, 3)])).state_dict(), "parameter group"),
], ids=["AdamW", "AdamW's key", "other blocks", "shape", "third side", "step", "fewer"])
def test_a_state_that_does_not_fit_is_refused_whole(state, sentence):
    optimizer, _ = halfway(PHASES)
    state, before = state(optimizer), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=sentence):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(t, before["state"][i][key]) for i, of in after["state"].items() for key, t in of.items())


def test_state_that_is_missing_is_said():
    optimizer, grads = halfway(PHASES)
    del next(iter(optimizer.state.values()))["exp_avg_sq.0,0"]
    with pytest.raises(RuntimeError, match=r"parameter 0 of shape \[6, 3\].* no exp_avg_sq.0,0, needed at step 5"):
        train(optimizer, grads[4:5])


def test_roots_that_a_state_lacks_are_counted():
    optimizer, grads = halfway(PHASES)
    again = Shampoo([nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]], **PHASES)
    again.load_state_dict(optimizer.state_dict())
    assert again.fallbacks == 0
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][0]["root1.0,0"], state["state"][2]["root0.0"]
    with pytest.warns(UserWarning, match=r"no roots of 2 blocks, as of parameter 0 of .*, block 0,0: grafting"):
        Together([again]).load_state_dict(state)
    assert again.fallbacks == 2
    train(again, grads[4:])


# ---- bad input, cost -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("settings, sentence", [
    (dict(lr=-1.0), "lr: got -1.0"), (dict(lr=math.nan), "lr: got nan"), (dict(betas=(1.0, 0.9)), "betas"),
    (dict(betas=(0.9, 1.1)), "betas"), (dict(epsilon=0.0), "epsilon: got 0.0, wanted a positive"),
    (dict(weight_decay=-0.1), "weight_decay"), (dict(graft_eps=-1.0), "graft_eps"),
    (dict(graft_beta2=2.0), "graft_beta2"),
    (dict(momentum=1.0), "momentum"), (dict(grafting="adagrad"), "got 'adagrad', wanted one of adam, sgd, none"),
    (dict(max_preconditioner_dim=0), "max_preconditioner_dim: got 0"),
    (dict(max_preconditioner_dim=1.5), "max_preconditioner_dim: got 1.5"),
    (dict(precondition_frequency=0), "precondition_frequency"),
    (dict(precondition_frequency=20, start_preconditioning_step=5), r"start_preconditioning_step: got 5, .*\(20\)"),
    (dict(inverse_exponent_override={3: 0.5}), "inverse_exponent_override"),
    (dict(root_dtype=torch.bfloat16), "root_dtype: got torch.bfloat16"), (dict(state="disk"), "state: got 'disk'"),
    (dict(state="bf16", betas=(0.9, 0.999)), "graft_beta2: got 0.999, wanted at most"),
])  # fmt: skip
def test_bad_settings_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Shampoo(parameters([(2, 2)]), **settings)


def test_bad_parameters_and_gradients_are_refused():
    p, groups = named_matrix()
    with pytest.raises(ValueError, match=r"parameter 1 .*float32 on cpu beside torch.float64"):
        Shampoo([p, nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="complex64, wanted a real"):
        Shampoo([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    optimizer = Shampoo(groups)
    p.grad = torch.zeros_like(p).to_sparse()
    with pytest.raises(RuntimeError, match=r"layers\.0\.w: got a sparse gradient"):
        optimizer.step()
    assert not optimizer.state[p]


def test_a_group_may_be_added_later():
    optimizer, grads = halfway(PHASES)
    late = parameters([(3, 3)], seed=5)[0]
    optimizer.add_param_group({"params": [late]})
    g = gradients([(3, 3)], 4, seed=6)
    train(optimizer, [[*a, b] for a, (b,) in zip(grads[4:8], g, strict=True)])
    wanted = literal(parameters([(3, 3)], seed=5)[0], [b for b, in g], **PHASES)[-1]
    torch.testing.assert_close(late.detach(), wanted, rtol=1e-9, atol=1e-11)


def test_closures_are_called_with_gradients_on():
    p = parameters([(2, 2)])[0]

    def closure():
        p.grad = None
        loss = (p**2).sum()
        loss.backward()
        return loss
    assert Shampoo([p]).step(closure) == (parameters([(2, 2)])[0] ** 2).sum()


def test_cost_counts_products_and_a_share_of_roots():
    assert cost((8, 4), 10) == 32 + 4 * 32 * 12 + 27 * (8**3 + 4**3) / 10
    assert cost((512, 256), 1) > 10 * cost((512, 256), 1000)
    assert cost(()) == 1 and cost((5,), 5) == 5 + 100 + 27 * 25
