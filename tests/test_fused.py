"""FusedMoE as a module of somebody's own: its options, random numbers, dtypes, losses and shapes."""
import copy
import math
import pickle

import pytest
import torch
from devices import widest
from torch.utils.checkpoint import checkpoint

import moe_ext
from moe_ext import FusedMoE
from moe_ext.config import Config, ConfigError, ModelConfig, MoEConfig, dumps, load
from moe_ext.model import GPT

D, F, E = 8, 6, 4
SCORES = ["softmax_topk", "topk_softmax", "sigmoid"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def make(top_k=2, **options):
    return FusedMoE(D, F, E, top_k, **options)


def tokens(*shape, **options):
    return torch.randn(*(shape or (2, 9)), D, **options)


def gradients(layer, loss):
    layer.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in layer.parameters()]


# ---- what the router learns from -------------------------------------------------------------------------------------

@pytest.mark.parametrize("norm_p", ["auto", None, 0, 0.0, 1, 2.0, math.inf], ids=str)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_router_has_a_gradient_or_the_option_is_refused(top_k, score, norm_p, device):
    dtype = widest(device)
    options = dict(top_k=top_k, score=score, norm_p=norm_p)
    if top_k == 1 and (norm_p not in ("auto", None, 0) or score == "topk_softmax"):
        with pytest.raises(ValueError, match=r"with top_k 1, .* makes every weight 1, so the router gets no gradient"):
            make(**options)
        with pytest.raises(ConfigError, match=r"model\.moe\.top_k 1 the constant 1, so the router gets no gradient"):
            MoEConfig(experts=E, **options | {"norm_p": norm_p or 0})
        return
    MoEConfig(experts=E, **options | {"norm_p": norm_p or 0})
    for balanced in (False, True):
        layer = make(**options, balanced=balanced, dtype=dtype, device=device)
        (layer(tokens(dtype=dtype, device=device))[0] ** 2).sum().backward()
        assert layer.gate.weight.grad.norm() > 1e-6 * layer.experts.w2_EDF.grad.norm() > 0


@pytest.mark.parametrize("top_k, weights_sum_to", [(1, False), (2, True)])
def test_the_norm_is_automatic(top_k, weights_sum_to, device):
    """1, but none at K = 1, where a weight is then the probability of the expert."""
    layer, x = make(top_k, device=device), tokens(1, 5, device=device)
    weights_TK, _, _ = layer.route(x, None, None)
    assert torch.allclose(weights_TK.sum(1), torch.ones(5, device=device)) == weights_sum_to
    if not weights_sum_to:
        torch.testing.assert_close(weights_TK[:, 0], layer.gate(x[0]).softmax(-1).amax(-1))


def test_a_scale_of_nothing_is_refused():
    with pytest.raises(ValueError, match="scale is 0"):
        make(scale=0.0)
    with pytest.raises(ConfigError, match=r"model\.moe\.scale is 0\.0"):
        MoEConfig(experts=E, scale=0.0)


def test_an_automatic_norm_is_written_as_such(tmp_path):
    """So that a run folder's config.toml takes --model.moe.top-k 1 as its recipe does; a number stays a number."""
    for norm_p in ("auto", 0.0, 1.0, math.inf):
        config = Config(model=ModelConfig(moe=MoEConfig(experts=4, norm_p=norm_p)))
        (tmp_path / "run.toml").write_text(dumps(config))
        assert load(tmp_path / "run.toml").model.moe == config.model.moe


# ---- random numbers without Draws ------------------------------------------------------------------------------------

RANDOM = dict(noise=True, jitter=0.2, score="sigmoid")


def noisy_layer(device):
    layer = make(**RANDOM, balance_weight=0.1, device=device)
    torch.nn.init.ones_(layer.noise_E)
    return layer


def test_without_draws_the_generator_of_torch_gives_them(device):
    layer, x = noisy_layer(device), tokens(device=device)
    torch.manual_seed(1)
    first, second = layer(x)[0], layer(x)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(layer(x)[0], first)
    grads = dict(zip(dict(layer.named_parameters()), gradients(layer, first.square().sum()), strict=True))
    assert grads["noise_E"].abs().min() > 0
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize("option", ["noise", "jitter"])
def test_each_acts_without_draws(option, device):
    layer, x = make(**{option: RANDOM[option]}, device=device), tokens(device=device)
    if option == "noise":
        torch.nn.init.ones_(layer.noise_E)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    draws = moe_ext.Draws(seed=1, step=2)
    assert torch.equal(layer(x, draws)[0], layer(x, draws)[0])


def test_recomputation_repeats_the_generator(device):
    layer, x = noisy_layer(device), tokens(device=device, requires_grad=True)
    results = []
    for again in (False, True):
        torch.manual_seed(5)
        y, routing = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        results.append([y, routing.loss, *gradients(layer, y.square().sum() + routing.loss)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("moe", [dict(), dict(experts=E, noise=True, jitter=0.2)], ids=["dense", "moe"])
def test_dropout_of_a_gpt_without_draws(moe, device):
    config = ModelConfig(vocab_size=31, seq_len=8, layers=2, dim=16, hidden=24, dropout=0.3, moe=MoEConfig(**moe))
    model, text = GPT(config, device=device), torch.randint(31, (2, 8), device=device)
    results = []
    for model.recompute in (False, True):
        torch.manual_seed(5)
        out = model(text, text)
        results.append([out.token_loss, *gradients(model, out.token_loss + out.aux_loss)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert model(text, text).token_loss != model(text, text).token_loss
    model.eval()
    assert model(text, text).token_loss == model(text, text).token_loss


@pytest.mark.parametrize("grad", [True, False])
def test_all_of_it_compiles_whole(grad, device):
    torch._dynamo.reset()
    layer, x = noisy_layer(device), tokens(device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        torch.manual_seed(3)
        y, routing = compiled(x)
        torch.manual_seed(3)
        want_y, want = layer(x)
    torch.testing.assert_close(y, want_y)
    torch.testing.assert_close(routing.loss, want.loss, check_stride=False)


# ---- the selection bias in any dtype ---------------------------------------------------------------------------------

BIAS = torch.tensor([0.1, -0.3, 1 / 3, 1e-3])     # of which bf16 has none


def biased(dtype=torch.float32):
    layer = make(score="sigmoid", select_bias=True, dtype=dtype)
    layer.select_bias_E.copy_(BIAS)
    return layer


def real(dtype):
    return torch.promote_types(dtype, torch.float32)


def assert_bias(layer, dtype, bias_E=BIAS):
    assert layer.select_bias_E.dtype == real(dtype)
    assert torch.equal(layer.select_bias_E, bias_E.to(real(dtype)))


@pytest.mark.c_core
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bias_is_not_rounded_with_the_module(dtype):
    for layer in (biased().to(dtype), torch.nn.Sequential(biased()).to("cpu", dtype)[0]):
        assert layer.gate.weight.dtype == dtype
        assert_bias(layer, dtype)
        for kept in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.half(), layer.bfloat16().float()):
            assert_bias(kept, kept.gate.weight.dtype)
    layer = biased().to(dtype)
    _, routing = layer(tokens(dtype=dtype))
    before_E = layer.select_bias_E.clone()
    layer.update_select_bias(routing.counts_E, 1e-3)
    step_E = 1e-3 * (routing.counts_E.double().mean() - routing.counts_E).sign().to(real(dtype))
    torch.testing.assert_close(layer.select_bias_E - before_E, step_E, rtol=0, atol=1e-7)
    assert step_E.abs().max() > 0


@pytest.mark.c_core
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bias_of_a_default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        layer = make(select_bias=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.gate.weight.dtype == dtype and layer.select_bias_E.dtype == real(dtype)
    layer(tokens(dtype=dtype))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("here", DTYPES, ids=str)
@pytest.mark.parametrize("there", DTYPES, ids=str)
def test_the_bias_travels_unrounded(here, there, assign):
    state = biased(there).state_dict()
    assert state["select_bias_E"].dtype == real(there)
    layer = make(score="sigmoid", select_bias=True, dtype=here)
    layer.load_state_dict(state, assign=assign)
    assert_bias(layer, there if assign else here)
    rounded = {name: t.bfloat16() for name, t in state.items()}      # by whoever cast a whole state dict
    layer.load_state_dict(rounded, assign=assign)
    assert_bias(layer, torch.bfloat16 if assign else here, BIAS.bfloat16())


def test_reset_parameters_after_the_meta_device():
    """Memory of to_empty is NaN here: nothing of it may stay, neither in gate nor shared expert."""
    layer = make(select_bias=True, noise=True, bias=True, shared_hidden=5, device="meta").to_empty(device="cpu")
    assert layer.select_bias_E.isnan().any()
    layer.reset_parameters()
    assert layer.select_bias_E.eq(0).all() and layer.noise_E.eq(0).all() and layer.experts.w2_bias.eq(0).all()
    assert all(t.isfinite().all() for t in layer.state_dict().values())
    assert layer.gate.weight.std() > 0.1 and layer.shared.up_proj.weight.std() > 0.1
    assert layer(tokens())[0].isfinite().all()


# ---- losses under checkpointing --------------------------------------------------------------------------------------

AUX = dict(balance_weight=0.3, z_weight=0.2)


def test_a_loss_without_its_gradient_says_so():
    layer, x = make(**AUX, name="layers.3.mlp"), tokens(requires_grad=True)
    y, routing = checkpoint(layer, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"loss of layers\.3\.mlp .*use_reentrant=False"):
        (y.sum() + routing.loss).backward()
    config = ModelConfig(vocab_size=31, seq_len=8, layers=1, dim=16, moe=MoEConfig(experts=E))
    model, text = GPT(config), torch.randint(31, (2, 8))
    block = model.layers[0]
    block.forward, plain = lambda *args: checkpoint(plain, *args, use_reentrant=True), block.forward
    out = model(text, text)
    with pytest.raises(RuntimeError, match=r"loss of layers\.0\.mlp .*use_reentrant=False"):
        (out.token_loss + out.aux_loss).backward()


@pytest.mark.parametrize("form", ["not reentrant", "reentrant, the loss itself returned"])
def test_a_loss_keeps_its_gradient(form, device):
    layer, x = make(**AUX, device=device), tokens(device=device)

    def run(x, draws=None):
        y, routing = layer(x, draws)
        return y, routing.loss

    y, loss = run(x)
    want = gradients(layer, y.square().sum() + loss)
    x.requires_grad_()
    if form == "not reentrant":
        y, routing = checkpoint(layer, x, use_reentrant=False)
        loss = routing.loss
    else:
        y, loss = checkpoint(run, x, use_reentrant=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients(layer, y.square().sum() + loss), want, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_loss_is_a_number_like_any(mode, device):
    layer, x = make(**AUX, device=device), tokens(device=device)
    want = layer(x)[1].loss
    total = torch.zeros((), device=device, requires_grad=True)
    with mode():
        loss = layer(x)[1].loss
        assert loss == want and loss.item() == want.item() and not (2 * loss).requires_grad
        layer.eval()
        assert not layer(x)[1].loss.requires_grad
        layer.train()
    (total + loss.detach()).backward()


# ---- shapes ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
def test_any_number_of_batch_dimensions(scope, device):
    layer = make(scope=scope, capacity_factor=0.8, bias=True, shared_hidden=5, shared_gate=True, groups=2, top_groups=2,
                 **AUX, device=device)
    x_BSD = tokens(6, 7, device=device)
    want_y, want = layer(x_BSD)
    y, routing = layer(x_BSD.view(2, 3, 7, D))
    assert torch.equal(y, want_y.view(2, 3, 7, D)) and routing.loss == want.loss and routing.dropped == want.dropped > 0
    y, routing = layer(x_BSD[4])
    want_y, want = layer(x_BSD[4:5])
    assert torch.equal(y, want_y[0]) and routing.loss == want.loss
    for empty in ((0, D), (3, 0, D), (0, 5, D)):
        assert layer(torch.empty(empty, device=device))[0].shape == empty


class Wrapped(torch.nn.Module):
    """A linear layer as those who adapt it wrap it."""
    def __init__(self, base):
        super().__init__()
        self.base, self.in_features, self.weight, self.bias = base, base.in_features, base.weight, base.bias

    def forward(self, x):
        return self.base(x)


def test_a_gate_may_be_wrapped(device):
    layer, x_BSD = make(jitter=0.1, noise=True, select_bias=True, device=device), tokens(device=device)
    torch.manual_seed(1)
    want = layer(x_BSD)[0]
    layer.gate = Wrapped(layer.gate)
    torch.manual_seed(1)
    assert torch.equal(layer(x_BSD)[0], want)


def test_what_stands_for_a_gate_gets_x_in_the_routers_dtype(device):
    layer, x_BSD = make(device=device), tokens(device=device).bfloat16()
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        want = layer(x_BSD)[0]
        gate, layer.gate = layer.gate, torch.nn.Linear(*reversed(layer.gate.weight.shape), bias=False, device=device)
        layer.gate.weight = gate.weight
        assert torch.equal(layer(x_BSD)[0], want)


def test_what_is_no_input_is_named():
    layer = make()
    for x, words in [
        (torch.randn(D), r"x is torch.float32 \[8\], wanted floating point, \[S, 8\] or \[.., S, 8\]"),
        (torch.randn(2, 3, D + 1), r"x is torch.float32 \[2, 3, 9\]"),
        (torch.ones(3, D, dtype=torch.long), r"x is torch.int64 \[3, 8\]"),
        (tokens(dtype=torch.bfloat16), r"x has dtype torch.bfloat16, the experts torch.float32. Hint: x.to\(torch.fl"),
        (tokens(dtype=torch.float64), r"x has dtype torch.float64, the experts torch.float32"),
    ]:
        with pytest.raises(ValueError, match="FusedMoE: " + words):
            layer(x)
    with pytest.raises(ValueError, match=r"FusedMoE: x is on meta, the parameters on cpu. Hint: x.to\(\"cpu\"\)"):
        layer.gate(tokens(device="meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(tokens(dtype=torch.bfloat16))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(2, 5), (7,), (2, 3, 5)], ids=str)
def test_export_leaves_every_size_open(shape):
    layer = make(**AUX, noise=True, shared_hidden=5, shared_gate=True, groups=2, top_groups=2)
    sizes = {dim: torch.export.Dim.DYNAMIC for dim in range(len(shape))}
    program = torch.export.export(layer, (tokens(*shape),), dynamic_shapes=(sizes,)).module()
    x = tokens(*(n + 2 for n in shape))
    torch.testing.assert_close(program(x)[0], layer(x)[0])
    torch.testing.assert_close(program(x)[1].loss, layer(x)[1].loss)


@pytest.mark.parametrize("options, words", [
    (dict(drop_by="prob"), "drop_by is 'prob', wanted one of position, probability"),
    (dict(scope="batch"), "scope is 'batch', wanted one of sequence, micro_batch"),
    (dict(score="softmax"), "score is 'softmax', wanted one of softmax_topk"),
    (dict(act="swish"), "act is 'swish', wanted one of swiglu"),
    (dict(balance_form="mean"), "balance_form is 'mean', wanted one of switch, mse"),
    (dict(score="topk_softmax", select_bias=True), "select_bias would change nothing with topk_softmax"),
    (dict(balanced=True, select_bias=True), "select_bias would change nothing with balanced"),
    (dict(groups=3), "groups is 3, wanted 1, or a divisor of num_experts = 4"),
    (dict(groups=4, top_groups=4), "groups is 4, .* leaves each at least 2"),
    (dict(groups=2, top_groups=3), "top_groups is 3, wanted 1 to groups = 2"),
    (dict(groups=2, top_k=3), "top_groups is 1, .* enough of their 2 experts for top_k = 3"),
    (dict(groups=2, score="topk_softmax"), "groups are chosen by scores, not with topk_softmax"),
    (dict(groups=2, balanced=True), "groups are chosen by scores, not with balanced"),
    (dict(shared_gate=True), "shared_gate is the gate of a shared expert, but shared_hidden is 0"),
    (dict(capacity_factor=-1.0), "capacity_factor -1.0"),
    (dict(jitter=1.0), "jitter 1.0"),
])  # fmt: skip
def test_an_option_that_is_none_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make(**options)


def test_there_is_no_bias_to_move():
    layer = make()
    with pytest.raises(ValueError, match="select_bias=True"):
        layer.update_select_bias(torch.ones(4, dtype=torch.int32), 0.1)


def test_affinities_that_underflow_leave_the_balance_loss_finite(device):
    layer = make(score="sigmoid", balance_weight=1.0, device=device)
    with torch.no_grad():
        layer.gate.weight.fill_(-40.0)
    x_BSD = torch.randn(1, 4, 8, device=device)
    x_BSD[0, 1] = 1.0       # its logits are -320: the sigmoid of fp32 is 0
    y_BSD, routing = layer(x_BSD)
    (y_BSD.sum() + routing.loss).backward()
    assert routing.bad == 0 and routing.loss.isfinite() and layer.gate.weight.grad.isfinite().all()


@pytest.mark.c_core
@pytest.mark.parametrize("draws", [None, moe_ext.Draws(0, 1)], ids=["generator", "evaluation"])
def test_blocks_of_a_gpt_compile_twice(draws):
    """Their names differ, and would be a guard each: torch stops at the eighth. The first block, which gets no
    sum to make, has a graph of its own."""
    config = ModelConfig(vocab_size=7, seq_len=4, layers=10, dim=8, heads=2, dropout=0.1,
                         moe=MoEConfig(experts=4, hidden=8, noise=True, jitter=0.1))
    model = GPT(config).train(draws is None)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in model.layers:
        block.compile(backend="eager", fullgraph=True)
    tokens = torch.arange(4).expand(2, 4)
    model(tokens, tokens, draws)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("training", [False, True])
def test_export_with_a_mask_and_a_capacity(training):
    layer = make(**AUX, capacity_factor=1.0).train(training)
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    x, mask = tokens(2, 5), torch.arange(5).expand(2, 5) < 4
    program = torch.export.export(layer, (x,), dict(token_mask=mask), dynamic_shapes=dict(
        x=sizes, token_mask=sizes)).module()
    x, mask = tokens(3, 7), torch.arange(7).expand(3, 7) < 6
    torch.testing.assert_close(program(x, token_mask=mask)[0], layer(x, token_mask=mask)[0])
