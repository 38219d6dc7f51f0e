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

STEPS = 9
SHAPES = {"number": (), "vector": (5,), "tall": (6, 3), "wide": (3, 7), "experts": (3, 4, 5), "gate and up": (2, 2, 4, 3)}


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
