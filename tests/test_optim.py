"""Parameter groups, the schedules against published learning rates, clipping against float64, and loss scaling."""
import json
import math

import pytest
import torch
from torch import nn

from moe_ext.config import ConfigError, MuonConfig, OptimConfig, ShampooConfig
from moe_ext.optim import (
    LossScaler,
    NonFiniteGradient,
    build_optimizer,
    clip_grad_norm,
    cosine,
    learning_rate,
    param_groups,
    set_learning_rate,
    wsd,
)
from moe_ext.optim.groups import check_rule, choices, choose, kind_of


class Tiny(nn.Module):
    """Every kind of parameter that a model has, under the names of layers/fused.py and model.py."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(7, 4)
        self.norm = nn.RMSNorm(4)
        self.gate = nn.Linear(4, 3)
        self.w13_E2FD, self.b13_E2F = nn.Parameter(torch.randn(3, 8, 4)), nn.Parameter(torch.randn(3, 8))
        self.w2_EDF, self.b2_ED = nn.Parameter(torch.randn(3, 4, 4)), nn.Parameter(torch.randn(3, 4))
        self.noise_E = nn.Parameter(torch.randn(3))
        self.expert_bias = nn.Parameter(torch.randn(3, 4))
        self.frozen = nn.Parameter(torch.randn(4, 4), requires_grad=False)
        self.lm_head = nn.Linear(4, 7, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


# ---- groups ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_only_matrices_decay(decay_embeddings):
    groups = {group["name"]: group for group in param_groups(Tiny(), 0.1, decay_embeddings=decay_embeddings)}
    table = {"embed_tokens.weight"}
    matrices = {"gate.weight", "w13_E2FD", "w2_EDF"}
    rest = {"norm.weight", "gate.bias", "b13_E2F", "b2_ED", "noise_E", "expert_bias"}
    assert set(groups["decay"]["param_names"]) == matrices | (table if decay_embeddings else set())
    assert set(groups["no_decay"]["param_names"]) == rest | (set() if decay_embeddings else table)
    assert groups["decay"]["weight_decay"] == 0.1 and groups["no_decay"]["weight_decay"] == 0.0


def test_each_parameter_is_in_one_group_under_its_name():
    model = Tiny()
    named = dict(model.named_parameters())
    groups = param_groups(model, 0.1)
    members = [(name, p) for group in groups for name, p in zip(group["param_names"], group["params"], strict=True)]
    assert all(named[name] is p for name, p in members)
    assert len({id(p) for _, p in members}) == len(members) == sum(p.requires_grad for p in named.values())


def test_an_empty_group_is_left_out():
    assert [group["name"] for group in param_groups(nn.Linear(2, 2, bias=False), 0.1)] == ["decay"]


def test_adamw_decays_what_it_should():
    """With zero gradients a decaying parameter shrinks by lr * weight_decay and another does not move."""
    model = Tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(lr=0.5, weight_decay=0.1))
    set_learning_rate(optimizer, 0.25)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 0.975 if name in ("embed_tokens.weight", "gate.weight", "w13_E2FD", "w2_EDF") else 1.0
        torch.testing.assert_close(p.detach(), before[name] * factor, rtol=1e-6, atol=0, msg=name)


def test_what_each_kind_is():
    kinds = {name: choice.kind for name, choice in choices(Tiny(), OptimConfig()).items()}
    assert kinds == {"embed_tokens.weight": "embeddings", "gate.weight": "matrices", "w13_E2FD": "experts",
                     "w2_EDF": "experts"} | dict.fromkeys(
        ("norm.weight", "gate.bias", "b13_E2F", "b2_ED", "noise_E", "expert_bias"), "norms")
    assert kind_of("lm_head.weight", 2) == kind_of("embed_positions.weight", 2) == kind_of("x", 2, table=True) == (
        "embeddings")
    assert [kind_of(name, 2) for name in ("layers.0.o_proj.weight", "layers.0.mlp.gate.bias")] == ["matrices", "norms"]


RULE = "matrices: muon 0.5, experts: shampoo, *.weight: adamw, w2_*: muon, embeddings: adamw, norms: adamw 2"


def test_a_rule_sends_each_parameter_to_one_optimizer():
    """Patterns before kinds; factors of the learning rate; decay by kind; all under the names of the rule."""
    model = Tiny()
    assert choose("gate.weight", 2, OptimConfig(rule=RULE)) == ("matrices", "adamw", 1.0, True, "*.weight")
    optimizer = build_optimizer(model, OptimConfig(rule=RULE, weight_decay=0.1, lr=1.0))
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {name: sorted(group["param_names"]) for name, group in groups.items()} == {
        "adamw decay": ["embed_tokens.weight", "gate.weight"], "adamw no_decay": ["norm.weight"],
        "adamw no_decay x2": ["b13_E2F", "b2_ED", "expert_bias", "gate.bias", "noise_E"],
        "muon decay": ["w2_EDF"], "shampoo decay": ["w13_E2FD"]}
    named = dict(model.named_parameters())
    for name, group in groups.items():
        assert all(named[n] is p for n, p in zip(group["param_names"], group["params"], strict=True))
        assert group["weight_decay"] == (0.0 if "no_decay" in name else 0.1)
    set_learning_rate(optimizer, 0.25)
    assert {name: group["lr"] for name, group in groups.items()} == dict.fromkeys(groups, 0.25) | {
        "adamw no_decay x2": 0.5}
    check_rule(model, OptimConfig(rule=RULE))


@pytest.mark.parametrize("rule, words", [
    ("matrices: adamw, embeddings: adamw, norms: adamw", r"sends w13_E2FD \(experts\) nowhere: add \"experts: adamw\""),
    ("*: muon", r"sends b13_E2F \(norms\) to muon, .*: write \"b13_E2F: adamw\" before \*"),
    ("w13_*: muon, b13_*: muon, *: adamw", r"sends b13_E2F \(norms\) to muon"),
])
def test_rules_that_no_optimizer_can_follow(rule, words):
    name = "muon" if "muon" in rule else "adamw"
    for action in (build_optimizer, check_rule):
        with pytest.raises(ConfigError, match=words):
            action(Tiny(), OptimConfig(name, rule))


@pytest.mark.parametrize("rule, words", [
    ("router.*: adamw, *: shampoo", r"router.\* decides nothing: no parameter that moves has such a name"),
    ("*.weight: adamw, gate.weight: adamw, *: shampoo", r"gate.weight decides nothing: gate.weight has an ear"),
])
def test_patterns_that_decide_nothing(rule, words):
    with pytest.raises(ConfigError, match=words):
        check_rule(Tiny(), OptimConfig(rule=rule))


def test_muon_and_shampoo_take_their_settings():
    optim = OptimConfig("muon", "matrices: muon, experts: shampoo, embeddings: adamw, norms: adamw", lr=0.5, beta1=0.8,
                        beta2=0.7, eps=1e-3, state="host",
                        muon=MuonConfig(momentum=0.6, nesterov=False, ns_steps=3, ns_dtype="fp64",
                                        adjust_lr_fn="spectral"),
                        shampoo=ShampooConfig(precondition_frequency=4, start_preconditioning_step=9, grafting="sgd",
                                              max_preconditioner_dim=3, epsilon=1e-5, root_dtype="fp32"))
    adamw, muon, shampoo = build_optimizer(Tiny(), optim).parts
    assert [type(part).__name__ for part in (adamw, muon, shampoo)] == ["AdamW", "Muon", "Shampoo"]
    assert {part.keep.how for part in (adamw, muon, shampoo)} == {"host"}
    wanted = dict(lr=0.5, momentum=0.6, nesterov=False, ns_steps=3, adjust_lr_fn="spectral", weight_decay=0.1)
    assert {name: muon.param_groups[0][name] for name in wanted} == wanted and muon.ns_dtype == torch.float64
    wanted = dict(lr=0.5, betas=(0.8, 0.7), epsilon=1e-5, graft_eps=1e-3, grafting="sgd", precondition_frequency=4,
                  start_preconditioning_step=9, weight_decay=0.1)
    assert {name: shampoo.param_groups[0][name] for name in wanted} == wanted
    assert shampoo.root_dtype == torch.float32 and [m.shape for m in shampoo.owners.mine[:1]] == [(3, 3)]


def test_adamw_takes_its_settings():
    optimizer = build_optimizer(Tiny(), OptimConfig(lr=0.5, beta1=0.8, beta2=0.7, eps=1e-3))
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (0.5, (0.8, 0.7), 1e-3, True)


# ---- schedules -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step, rate", [
    (20, "1.200000E-05"), (80, "4.800000E-05"), (300, "1.800000E-04"), (1040, "5.999984E-04"), (1060, "5.999965E-04"),
    (1100, "5.999903E-04"), (1140, "5.999809E-04"), (39000, "6.000000E-05")])
def test_cosine_gives_megatrons_log(step, rate):
    """Learning rates printed by Megatron-LM: 6e-4 to 6e-5, 1000 steps of warm-up, 38000 to the floor."""
    assert f"{cosine(step, peak=6e-4, floor=6e-5, warmup=1000, steps=38000):.6E}" == rate


def test_wsd_is_three_straight_lines():
    rates = [wsd(step, peak=1.0, floor=0.1, warmup=4, decay=5, steps=20) for step in range(1, 23)]
    wanted = [0.25, 0.5, 0.75, 1.0] + [1.0] * 11 + [0.82, 0.64, 0.46, 0.28, 0.1, 0.1, 0.1]
    assert rates == pytest.approx(wanted, abs=1e-15)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_a_run_rises_to_the_peak_and_falls_to_the_floor(schedule, warmup):
    config = OptimConfig(lr=1.0, min_lr=0.1, schedule=schedule, warmup=warmup)
    rates = [learning_rate(step, config, steps=50) for step in range(1, 51)]
    assert rates[:warmup] == pytest.approx([(i + 1) / warmup for i in range(warmup)])
    after = rates[max(0, warmup - 1):]
    assert max(rates) <= 1.0 and after == sorted(after, reverse=True)
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    half_turn = math.pi * (30 - warmup) / (50 - warmup)
    assert rates[29] == pytest.approx(0.1 + 0.45 * (1 + math.cos(half_turn)) if schedule == "cosine" else 1.0)


def test_wsd_decays_over_a_fifth_unless_told():
    for decay, first in ((0, 41), (25, 26)):
        config = OptimConfig(lr=1.0, min_lr=0.0, schedule="wsd", warmup=5, decay=decay)
        rates = [learning_rate(step, config, steps=50) for step in range(1, 51)]
        assert next(step for step in range(5, 51) if rates[step - 1] < 1.0) == first


# ---- clipping --------------------------------------------------------------------------------------------------------
def parameters(*grads):
    named = []
    for i, grad in enumerate(grads):
        p = nn.Parameter(torch.zeros_like(grad)) if grad is not None else nn.Parameter(torch.zeros(2))
        p.grad = grad
        named.append((f"layer.{i}.weight", p))
    return named


def test_norm_against_float64():
    grads = [torch.randn(1000, 300), None, torch.randn(50, dtype=torch.float64), torch.randn(64).bfloat16()]
    wanted = math.sqrt(math.fsum(float((g.double() ** 2).sum()) for g in grads if g is not None))
    assert clip_grad_norm(parameters(*grads)) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("size", [1e30, 1e-30, 3e38])
def test_norm_neither_overflows_nor_vanishes(size):
    """Squares that float32 cannot hold."""
    grads = [torch.full((100,), size), torch.full((44,), size)]
    assert clip_grad_norm(parameters(*grads)) == pytest.approx(12 * float(torch.tensor(size)), rel=1e-14)


def test_clipping_scales_every_gradient_alike():
    grads = [torch.randn(30, 20, dtype=torch.float64), torch.randn(7, dtype=torch.float64)]
    named = parameters(*[g.clone() for g in grads])
    norm = clip_grad_norm(named, 0.5)
    for (_, p), g in zip(named, grads, strict=True):
        torch.testing.assert_close(p.grad, g * (0.5 / norm), rtol=1e-14, atol=0)
    assert clip_grad_norm(named) == pytest.approx(0.5, rel=1e-14)


@pytest.mark.parametrize("max_norm", [0.0, 1e9])
def test_small_gradients_stay_bitwise(max_norm):
    named = parameters(torch.randn(30, 20))
    before = named[0][1].grad.clone()
    clip_grad_norm(named, max_norm)
    assert torch.equal(named[0][1].grad, before)


def test_no_gradient_at_all():
    assert clip_grad_norm(parameters(None), 1.0) == 0.0


@pytest.mark.parametrize("bad, count", [(math.nan, "2 NaN and 0 infinite"), (-math.inf, "0 NaN and 2 infinite")])
def test_a_bad_gradient_is_named_before_anything_moves(bad, count):
    broken = torch.randn(5, 5)
    broken[1, :2] = bad
    named = parameters(torch.full((4,), 7.0), broken, torch.full((2,), math.nan))
    with pytest.raises(NonFiniteGradient, match=rf"layer.1.weight: {count} of 25 values: lower optim.lr"):
        clip_grad_norm(named, 1.0)
    assert torch.equal(named[0][1].grad, torch.full((4,), 7.0))


@pytest.mark.parametrize("max_norm, factor", [(0.0, 1 / 64), (1e9, 1 / 64), (0.25, 0.25 / 5 / 64)])
def test_scaled_gradients_are_divided_and_clipped_in_one_pass(max_norm, factor, monkeypatch):
    passes, multiply = [], torch._foreach_mul_
    monkeypatch.setattr(torch, "_foreach_mul_", lambda *args: (passes.append(1), multiply(*args)))
    named = parameters(torch.tensor([3.0 * 64], dtype=torch.float64), torch.tensor([-4.0 * 64], dtype=torch.float64))
    assert clip_grad_norm(named, max_norm, scale=64.0) == 5.0
    assert [p.grad.item() for _, p in named] == pytest.approx([192 * factor, -256 * factor], rel=1e-15)
    assert passes == [1]


# ---- loss scaling ----------------------------------------------------------------------------------------------------
def scaled_step(scaler, exponent):
    """One step of a parameter whose float16 gradient is 2^exponent times the scale; what clip returned."""
    p = nn.Parameter(torch.ones(()))
    loss = p.half().float() * 2.0**exponent
    (scaler.scale * loss).backward()
    norm = scaler.clip([("weight", p)])
    assert norm is None or norm == p.grad == 2.0**exponent
    return norm


def steps(scaler, pattern):
    """Good steps (g) and overflows (o): what clip returned and the scale after it."""
    return [(scaler.clip(parameters(torch.tensor([math.inf if step == "o" else 1.0]))), scaler.scale)
            for step in pattern]


@pytest.mark.parametrize("safe", range(9, 32))
def test_skips_as_megatron_does(safe):
    """Megatron-LM from 2^32 with hysteresis 2, where 2^safe is the largest scale that float16 bears: the first
    overflow does not halve, and min(20, 33 - safe) of 20 steps are skipped."""
    scaler, scales, skipped = LossScaler(2.0**32, window=1000, hysteresis=2), [], 0
    for _ in range(20):
        skipped += scaled_step(scaler, 15 - safe) is None
        scales.append(str(scaler.scale))
    assert scales[:3] == ["4294967296.0", "2147483648.0", "1073741824.0" if safe < 31 else "2147483648.0"]
    assert skipped == min(20, 33 - safe)


def test_gradients_that_float16_cannot_hold_survive():
    p = nn.Parameter(torch.ones(()))
    (p.half().float() * 2.0**-30).backward()
    assert p.grad == 0
    assert scaled_step(LossScaler(), -30) == 2.0**-30


@pytest.mark.parametrize("hysteresis, scales", [
    (1, [8, 16, 8, 4, 4, 2, 2, 4]), (3, [8, 16, 16, 16, 16, 8, 8, 16])])
def test_the_scale_halves_and_doubles(hysteresis, scales):
    """Window 2: an overflow starts the window anew, a doubling the hysteresis."""
    scaler = LossScaler(8.0, window=2, hysteresis=hysteresis)
    assert [scale for _, scale in steps(scaler, "ggoogogg")] == scales
    assert steps(scaler, "o")[0][1] == (scales[-1] / 2 if hysteresis == 1 else scales[-1])


def test_overflow_leaves_the_gradients_to_be_dropped():
    named = parameters(torch.tensor([3.0]), torch.tensor([math.inf]))
    assert LossScaler().clip(named, 1.0) is None
    assert named[0][1].grad == 3.0


def test_no_scale_is_left_below_one():
    scaler, named = LossScaler(2.0), parameters(torch.tensor([math.nan]))
    assert scaler.clip(named) is None and scaler.scale == 1.0
    with pytest.raises(FloatingPointError, match=r"even at a loss scale of 1: gradient of layer.0.weight: 1 NaN"):
        scaler.clip(named)
    assert scaler.scale == 1.0


def test_without_float16_it_is_clip_grad_norm():
    scaler, named = LossScaler(enabled=False, window=1), parameters(torch.tensor([3.0, 4.0]))
    assert scaler.clip(named, 1.0) == 5.0 and scaler.scale == 1.0 and scaler.state_dict() == {}
    torch.testing.assert_close(named[0][1].grad, torch.tensor([0.6, 0.8]))
    with pytest.raises(NonFiniteGradient):
        scaler.clip(parameters(torch.tensor([math.nan])))


def test_a_scaler_goes_on_from_its_state():
    scaler, resumed = LossScaler(window=3, hysteresis=2), LossScaler(window=3, hysteresis=2)
    steps(scaler, "gggog")
    resumed.load_state_dict(json.loads(json.dumps(scaler.state_dict())))
    assert steps(resumed, "ggogo") == steps(scaler, "ggogo")


def test_a_foreign_state_is_refused():
    scaler = LossScaler()
    with pytest.raises(ValueError, match=r"got the state \{\}, wanted the keys \['scale', .* another train.dtype"):
        scaler.load_state_dict(LossScaler(enabled=False).state_dict())
    assert scaler.state_dict() == LossScaler().state_dict()


@pytest.mark.parametrize("arguments, sentence", [
    (dict(scale=0.5), "scale: got 0.5, wanted a power of two from 1 on"), (dict(scale=1000.0), "scale: got 1000.0"),
    (dict(scale=math.inf), "scale: got inf"), (dict(scale=math.nan), "scale: got nan"),
    (dict(window=0), "window: got 0, wanted at least 1"), (dict(hysteresis=0), "hysteresis: got 0")])
def test_settings_out_of_range(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        LossScaler(**arguments)
