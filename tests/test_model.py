"""The GPT and its MoE layer: every variant against the reference ops and against literal loops, in the widest dtype of
the device."""
import dataclasses
import math

import pytest
import torch
from compare import same
from devices import widest

import moe_ext.layers.fused
import moe_ext.model
from moe_ext import ops, reference
from moe_ext.config import Config, ConfigError, ModelConfig, MoEConfig, TrainConfig
from moe_ext.layers.fused import Draws, FusedMoE, site
from moe_ext.model import GPT, KVCache, build, precision, rope_angles

MOE = dict(experts=4, top_k=2, hidden=12, balance_weight=0.1, z_weight=0.01)
SMALL = dict(vocab_size=61, seq_len=12, layers=2, dim=16, heads=4, hidden=24)


def small(moe=None, **model):
    return ModelConfig(**{**SMALL, **model}, moe=MoEConfig(**{**MOE, **moe}) if moe is not None else MoEConfig())


VARIANTS = {
    "dense": small(),
    "gpt2": small(act="gelu", norm="layernorm", bias=True, position="learned", tied=True),
    "qwen3_moe": small(moe={}, qk_norm=True, kv_heads=2, head_dim=8),
    "mixtral": small(moe=dict(score="topk_softmax", norm_p=0), kv_heads=1),
    "deepseek": small(moe=dict(score="sigmoid", select_bias_rate=0.01, scale=2.5, shared_hidden=8, dense_layers=1)),
    "noisy_biased": small(moe=dict(noise=True, score="topk_softmax", norm_p=0, balance_form="mse"), norm="layernorm",
                          bias=True, tied=True),
    "capacity_position": small(moe=dict(capacity_factor=0.5, experts=3)),
    "capacity_probability": small(moe=dict(capacity_factor=0.7, drop_by="probability", scope="micro_batch",
                                           norm_p=2.0)),
    "jitter_dropout": small(moe=dict(jitter=0.1, top_k=1), dropout=0.1),
    "balanced_relu": small(moe=dict(balanced=True, norm_p=math.inf), act="relu"),
    "all_experts": small(moe=dict(top_k=4), act="geglu", bias=True),
    "gpt_oss": small(moe=dict(score="topk_softmax", router_bias=True), act="swiglu_oai", bias=True, kv_heads=2,
                     window=4, window_full_every=2, sinks=True, rope_scale=4.0, rope_context=8),
    "glm4_moe": small(moe=dict(score="sigmoid", select_bias_rate=0.01, scale=1.5, shared_hidden=8, dense_layers=1),
                      attention_bias="qkv", kv_heads=2, head_dim=8, rope_fraction=0.5, qk_norm=True),
    "olmoe": small(moe=dict(norm_p=0.0), kv_heads=2, qk_norm=True, qk_norm_over="width"),
    "groups": small(moe=dict(experts=12, score="sigmoid", select_bias_rate=0.01, groups=4, top_groups=2, top_k=3,
                             shared_hidden=8, shared_gate=True), rope_scale=4.0, rope_context=8,
                    rope_stretch="llama3"),
}
DRAWS = Draws(seed=7, step=5)


def make(config, dtype=torch.float64, seed=3, device="cpu"):
    """A model with no parameter at zero, so that a lost bias or noise scale shows; the selection bias set too."""
    model = GPT(config, seed=seed, dtype=dtype, device=device)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype).to(p))
        for moe in model.moe_layers():
            if moe.select_bias_E is not None:
                moe.select_bias_E.copy_(torch.linspace(-0.3, 0.3, moe.num_experts))
    return model


def text(config, batch=3, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (batch, config.seq_len + 1), generator=generator).to(device)
    return tokens[:, :-1], tokens[:, 1:].clone()


def losses_and_grads(model, tokens, targets, draws=DRAWS):
    model.zero_grad()
    out = model(tokens, targets, draws)
    (out.token_loss + out.aux_loss).backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(got, want, tolerance=1e-11):
    """Of each tensor's maximum, plus a floor for a gradient that is nothing but rounding (a key's bias has none)."""
    for name in want:
        scale = want[name].abs().max().item() + 1e-3
        assert (got[name] - want[name]).abs().max().item() <= tolerance * scale, name


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_equals_reference_ops(name, device, monkeypatch):
    config, dtype = VARIANTS[name], widest(device)
    model, (tokens, targets) = make(config, dtype, device=device), text(config, device=device)
    targets[0, :3] = -100
    got, got_grads = losses_and_grads(model, tokens, targets)
    assert all(grad.abs().max() > 0 for grad in got_grads.values()), "a parameter that nothing reaches"
    monkeypatch.setattr(moe_ext.model, "ops", reference)
    monkeypatch.setattr(moe_ext.layers.fused, "ops", reference)
    want, want_grads = losses_and_grads(model, tokens, targets)
    assert torch.equal(got.counts_LE, want.counts_LE) and torch.equal(got.dropped_L, want.dropped_L)
    # the generator's own arithmetic is fp32 at heart, whatever the dtype of its numbers
    tolerance = 4e-7 if config.moe.noise or config.moe.jitter or config.dropout else 1e-11
    if dtype == torch.float32:
        tolerance = 1e-4
    assert_close({"token": got.token_loss, "aux": got.aux_loss}, {"token": want.token_loss, "aux": want.aux_loss},
                 tolerance)
    assert_close(got_grads, want_grads, tolerance)
    if config.moe.experts:
        assert got.counts_LE.sum(1).tolist() == [tokens.numel() * config.moe.top_k] * len(model.moe_layers())
    assert (got.dropped_L.sum() > 0) == (config.moe.capacity_factor > 0)


# ---- the MoE layer against a literal loop over tokens ----------------------------------------------------------------

def literal_moe(layer, x_SD, capacity):
    """One sequence, token by token, K largest by sort: what the layer says in its first lines."""
    taken, y, probabilities, choices = [0] * layer.num_experts, [], [], []
    for x in x_SD:
        p = (layer.gate.weight @ x).softmax(0)
        chosen = sorted(range(layer.num_experts), key=lambda e: (-p[e].item(), e))[:layer.top_k]
        total, out = sum(p[e] for e in chosen), torch.zeros_like(x)
        for e in chosen:
            taken[e] += 1
            if taken[e] <= capacity:
                w = layer.experts
                gate, up = w.w13_E2FD[e] @ x + w.w13_bias[e]
                out = out + p[e] / total * (w.w2_EDF[e] @ (gate * gate.sigmoid() * up) + w.w2_bias[e])
        y.append(out)
        probabilities.append(p)
        choices.append(chosen)
    mean_E = torch.stack(probabilities).mean(0)
    balance = layer.num_experts * sum(mean_E[e] * sum(e in c for c in choices) / (len(x_SD) * layer.top_k)
                                      for e in range(layer.num_experts))
    return torch.stack(y), balance, sum(max(0, n - capacity) for n in taken)


@pytest.mark.c_core
def test_layer_equals_literal_loop():
    torch.manual_seed(1)
    layer = FusedMoE(8, 6, 4, 2, bias=True, balance_weight=0.5, capacity_factor=0.8, dtype=torch.float64)
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    x_BSD = torch.randn(2, 9, 8, dtype=torch.float64)
    y_BSD, routing = layer(x_BSD)
    want = [literal_moe(layer, x_SD, capacity=math.ceil(0.8 * 2 * 9 / 4)) for x_SD in x_BSD]
    torch.testing.assert_close(y_BSD, torch.stack([y for y, _, _ in want]), rtol=0, atol=1e-12)
    torch.testing.assert_close(routing.loss, 0.5 * (want[0][1] + want[1][1]) / 2, rtol=0, atol=1e-13)
    assert routing.dropped == sum(dropped for _, _, dropped in want) > 0
    layer.eval()    # dropless, no losses
    y_BSD, routing = layer(x_BSD)
    torch.testing.assert_close(y_BSD[1], literal_moe(layer, x_BSD[1], capacity=99)[0], rtol=0, atol=1e-12)
    assert routing.dropped == 0 and routing.loss == 0


class Half:
    """An exchange that keeps the tokens with a choice among the experts from `first` on: one of two ranks."""
    def __init__(self, first, experts):
        self.first, self.experts = first, experts

    def dispatch(self, x_TD, weights_TK, ids_TK):
        local = (ids_TK >= self.first) & (ids_TK < self.first + self.experts)
        rows = local.any(1).nonzero().squeeze(1)
        ids_RK = torch.where(local, ids_TK - self.first, -1)[rows]
        return x_TD[rows], weights_TK[rows], ids_RK, int(local.sum()), (rows, len(x_TD))

    def combine(self, y_RD, plan):
        rows, tokens = plan
        return y_RD.new_zeros(tokens, y_RD.shape[1]).index_add(0, rows, y_RD)


@pytest.mark.c_core
def test_exchange_sees_a_part_of_the_experts():
    torch.manual_seed(2)
    x_BSD = torch.randn(2, 7, 8, dtype=torch.float64)
    whole = FusedMoE(8, 6, 4, 2, dtype=torch.float64)
    parts = []
    for first in (0, 3):
        count = 3 if first == 0 else 1
        part = FusedMoE(8, 6, 4, 2, exchange=Half(first, count), dtype=torch.float64)
        part.gate.weight = whole.gate.weight
        for name, p in whole.experts.named_parameters():
            setattr(part.experts, name, torch.nn.Parameter(p[first:first + count].detach()))
        parts.append(part(x_BSD)[0])
    torch.testing.assert_close(parts[0] + parts[1], whole(x_BSD)[0], rtol=0, atol=1e-14)
    assert parts[0].abs().sum() > 0 and parts[1].abs().sum() > 0


def test_top_k_above_the_number_of_experts():
    with pytest.raises(ValueError, match="top_k is 5, wanted 1 to num_experts = 4"):
        FusedMoE(8, 6, 4, 5)


@pytest.mark.c_core
def test_selection_bias_moves_towards_balance():
    model = make(VARIANTS["deepseek"])
    before = [moe.select_bias_E.clone() for moe in model.moe_layers()]
    model.update_select_bias(torch.tensor([[10, 0, 5, 5]]))
    step = torch.tensor([-0.01, 0.01, 0, 0])
    for moe, bias_E in zip(model.moe_layers(), before, strict=True):
        torch.testing.assert_close(moe.select_bias_E, bias_E + step)
        assert moe.select_bias_E.dtype == torch.float64


# ---- the whole model -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", VARIANTS)
def test_recomputation_changes_nothing(name, device):
    config = VARIANTS[name]
    model, (tokens, targets) = make(config, torch.float32, device=device), text(config, device=device)
    kept, kept_grads = losses_and_grads(model, tokens, targets)
    model.recompute = True
    again, again_grads = losses_and_grads(model, tokens, targets)
    assert all(torch.equal(a, b) for a, b in zip(kept[:-1], again[:-1], strict=True))
    assert all(torch.equal(kept_grads[n], again_grads[n]) for n in kept_grads)


@pytest.mark.c_core
@pytest.mark.parametrize("name", [n for n in VARIANTS if VARIANTS[n].moe.scope == "sequence" and n != "balanced_relu"])
def test_two_halves_of_a_batch_equal_the_whole(name):
    """Random numbers know the global token and statistics the sequence, so gradient accumulation changes nothing."""
    config = VARIANTS[name]
    model, (tokens, targets) = make(config), text(config, batch=4)
    whole, whole_grads = losses_and_grads(model, tokens, targets, DRAWS)
    model.zero_grad()
    halves = []
    for row in (0, 2):
        out = model(tokens[row:row + 2], targets[row:row + 2], Draws(7, 5, row0=row * config.seq_len))
        (out.token_loss + out.aux_loss / 2).backward()
        halves.append(out)
    assert torch.equal(sum(out.counts_LE for out in halves), whole.counts_LE)
    assert_close({"loss": sum(out.token_loss for out in halves)}, {"loss": whole.token_loss})
    assert_close({name: p.grad for name, p in model.named_parameters()}, whole_grads)


@pytest.mark.c_core
def test_draws_key_dropout_noise_and_jitter():
    config = small(moe=dict(jitter=0.3, noise=True), dropout=0.2)
    model, (tokens, targets) = make(config), text(config)
    first = model(tokens, targets, DRAWS).token_loss
    assert first == model(tokens, targets, DRAWS).token_loss
    others = [model(tokens, targets, draws).token_loss
              for draws in (Draws(8, 5), Draws(7, 6), Draws(7, 5, row0=100))]
    assert len({loss.item() for loss in [first, *others]}) == 4
    model.eval()
    assert model(tokens, targets, DRAWS).token_loss == model(tokens, targets).token_loss != first


@pytest.mark.c_core
@pytest.mark.parametrize("name", VARIANTS)
def test_cache_equals_no_cache(name):
    config = VARIANTS[name]
    model, (tokens, _) = make(config).eval(), text(config)
    with torch.no_grad():
        want = model.logits(tokens)
        cache, got = KVCache(config), []
        for begin, end in [(0, 5), (5, 6), (6, 7), (7, 11), (11, 12)]:
            got.append(model.logits(tokens[:, begin:end], cache))
            assert cache.length == end
        torch.testing.assert_close(torch.cat(got, dim=1), want, rtol=0, atol=1e-12)
        with pytest.raises(ValueError, match=r"13 tokens, but model.seq_len is 12"):
            model.logits(tokens[:, :1], cache)


@pytest.mark.c_core
def test_causal_and_rope_is_relative():
    config = small(moe={})
    model, (tokens, _) = make(config).eval(), text(config)
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % config.vocab_size
    a, b = model.logits(tokens), model.logits(changed)
    torch.testing.assert_close(a[:, :6], b[:, :6], rtol=0, atol=1e-13)
    assert (a[:, 6:] - b[:, 6:]).abs().amax(-1).min() > 1e-4
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(i, j):
        a, b = (ops.rotate(x, *rope_angles(torch.tensor([[n]]), 8, 100.0)) for x, n in ((q, i), (k, j)))
        return (a * b).sum()

    torch.testing.assert_close(score(3, 1), score(9, 7))
    assert not torch.allclose(score(3, 1), score(9, 6))


def test_initial_values_know_name_and_index_only():
    model = GPT(VARIANTS["noisy_biased"], seed=11)
    for name, p in model.named_parameters():
        if name.endswith(("bias", "noise_E")):
            assert p.abs().max() == 0, name
        elif p.ndim == 1:
            assert (p == 1).all(), name
    w2_EDF = model.layers[1].mlp.experts.w2_EDF
    std = 0.02 / math.sqrt(2 * model.config.layers)
    place = site("layers.1.mlp.experts.w2_EDF")
    rows = reference.random_normal(16, 12, seed=11, step=0, site=place, row0=2 * 16, std=std)
    torch.testing.assert_close(w2_EDF[2].detach(), rows, rtol=1e-5, atol=1e-7)     # expert 2 as its rank draws it
    assert 0.8 * std < w2_EDF.std() < 1.2 * std
    assert not torch.equal(w2_EDF, model.layers[0].mlp.experts.w2_EDF)
    assert not torch.equal(w2_EDF, GPT(VARIANTS["noisy_biased"], seed=12).layers[1].mlp.experts.w2_EDF)


def test_names_are_those_of_qwen3_moe():
    names = {name for name, _ in GPT(dataclasses.replace(VARIANTS["qwen3_moe"], layers=1)).named_parameters()}
    attention = {f"layers.0.self_attn.{n}.weight" for n in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
    assert names == attention | {
        "embed_tokens.weight", "norm.weight", "lm_head.weight",
        "layers.0.input_layernorm.weight", "layers.0.post_attention_layernorm.weight",
        "layers.0.mlp.gate.weight", "layers.0.mlp.experts.w13_E2FD", "layers.0.mlp.experts.w2_EDF"}
    more = {name.removeprefix("layers.0.") for name, _ in GPT(VARIANTS["gpt_oss"], device="meta").named_parameters()}
    assert more >= {"self_attn.sinks", "self_attn.q_proj.bias", "self_attn.o_proj.bias", "mlp.gate.bias"}


@pytest.mark.parametrize("model, total, active", [
    # 12 layers, d 768, four biased SwiGLU experts with noise, tied: the published 237,092,400 counts two of the four
    (dict(vocab_size=50304, seq_len=1024, layers=12, dim=768, heads=12, norm="layernorm", bias=True, tied=True,
          moe=MoEConfig(experts=4, top_k=2, hidden=3072, noise=True)), 407_127_600, 237_092_400),
    # 24 layers, h 512, GQA with one group, V 128256: dense, and 64 experts top-1
    (dict(vocab_size=128256, seq_len=2048, layers=24, dim=512, heads=4, kv_heads=1, hidden=1792),
     213_148_160, 213_148_160),
    (dict(vocab_size=128256, seq_len=2048, layers=24, dim=512, heads=4, kv_heads=1,
          moe=MoEConfig(experts=64, top_k=1, hidden=1792)), 4_375_732_736, 213_934_592),
    # gpt-oss-20b, with its table and its head counted as active
    (dict(vocab_size=201088, seq_len=4096, layers=24, dim=2880, heads=64, kv_heads=8, head_dim=64, bias=True,
          sinks=True, window=128, window_full_every=2, act="swiglu_oai",
          moe=MoEConfig(experts=32, top_k=4, hidden=2880, score="topk_softmax", router_bias=True)),
     20_914_757_184, 4_187_440_704),
    # OLMoE-1B-7B
    (dict(vocab_size=50304, seq_len=4096, layers=16, dim=2048, heads=16, qk_norm=True, qk_norm_over="width",
          moe=MoEConfig(experts=64, top_k=8, hidden=1024)), 6_919_161_856, 1_282_017_280),
])
def test_published_parameter_counts(model, total, active):
    assert GPT(ModelConfig(**model), device="meta").num_parameters() == (total, active)


def test_flops_of_a_published_model():
    """64 experts top-1, h 512, 24 layers, S 2048: 1.18673e9 per token without the router's 6*h*E*L."""
    config = ModelConfig(vocab_size=128256, seq_len=2048, layers=24, dim=512, heads=4, kv_heads=1, head_dim=128,
                         moe=MoEConfig(experts=64, top_k=1, hidden=1792))
    norms, router = 6 * 49 * 512, 6 * 512 * 64 * 24
    flops = GPT(config, device="meta").flops_per_token()
    assert flops - norms - router == 155_546_535_591_936 // (64 * 2048)
    # 128 of 2048 keys in 12 of the 24 layers, which have 4 heads of 128
    windowed = GPT(dataclasses.replace(config, window=128, window_full_every=2), device="meta").flops_per_token()
    assert flops - windowed == 12 * 12 * (2048 - 128) * 4 * 128
    assert GPT(dataclasses.replace(config, window=4096), device="meta").flops_per_token() == flops


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_bf16_routes_in_fp32(name, device):
    config = Config(model=VARIANTS[name], train=TrainConfig(dtype="bf16", device=device))
    model, (tokens, targets) = build(config), text(config.model, device=device)
    want = model(tokens, targets)
    with precision(config, torch.device(device)):
        got = model(tokens, targets)
        logits = model.logits(tokens)
    assert logits.dtype == torch.bfloat16 and got.aux_loss.dtype == torch.float32
    torch.testing.assert_close(got.token_loss, want.token_loss, rtol=1e-3, atol=0)
    got.token_loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["qwen3_moe", "noisy_biased"])
def test_autocast_gives_a_router_what_it_gives_the_experts(name, half, device):
    """Their norm is rounded once, as it would be in a model of halves, and the router computes from that in fp32."""
    model, (tokens, _) = make(VARIANTS[name], torch.float32, device=device), text(VARIANTS[name])
    read, given = [], []
    for moe in model.moe_layers():
        moe.register_forward_pre_hook(lambda _, args: read.append(args[0]))
        moe.gate.register_forward_pre_hook(lambda _, args: read.append(args[0]))
        moe.gate.register_forward_hook(lambda gate, args, logits: given.append((gate, logits)))
    with torch.autocast(device, half):
        model.logits(tokens.to(device))
    assert len(read) == 2 * len(model.moe_layers())
    for layer_x, gate_x, (gate, logits_TE) in zip(read[::2], read[1::2], given, strict=True):
        assert layer_x.dtype == half and logits_TE.dtype == torch.float32
        same(gate_x, layer_x.flatten(0, -2))
        same(logits_TE, torch.nn.functional.linear(gate_x.float(), gate.weight, gate.bias))


@pytest.mark.parametrize("name", ["qwen3_moe", "noisy_biased"])
def test_what_is_added_may_have_any_dtype_under_autocast(name, device):
    """The norm has the region's, so that a router reads the same from whatever stands for attention."""
    norm = make(VARIANTS[name], torch.float32, device=device).layers[0].post_attention_layernorm
    x, y = torch.randn(2, 5, 16, device=device), torch.randn(2, 5, 16, device=device, dtype=torch.bfloat16)
    with torch.autocast(device, torch.bfloat16):
        for got, want in zip(norm(x, y.float()), norm(x, y), strict=True):
            same(got, want)


@pytest.mark.parametrize("dtype", ["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("name", ["gpt2", "noisy_biased", "jitter_dropout"])
def test_the_next_norm_makes_the_sum_that_a_block_leaves(name, dtype, device):
    """Not a bit of losses, gradients and logits differs from those of blocks that make it themselves."""
    config = Config(model=VARIANTS[name], train=TrainConfig(dtype=dtype, device=device))
    if dtype == "fp64" and device == "cuda":
        pytest.skip("train.dtype fp64 has no CUDA kernels")
    tokens = [t.to(device) for t in text(config.model)]

    def run(*, sums):
        model, handed_on = build(config), []
        for block in model.layers:
            if sums:
                block.register_forward_hook(lambda _, args, out: (out[0] + out[1], None, out[2]))
            block.register_forward_pre_hook(lambda _, args: handed_on.append(args[1]))
        with precision(config, torch.device(device)):
            out, grads = losses_and_grads(model, *tokens)
            logits = model.eval().logits(tokens[0])
        assert [y is not None for y in handed_on] == 2 * [False, not sums]
        return out.token_loss, out.aux_loss, logits, *grads.values()

    for got, want in zip(run(sums=False), run(sums=True), strict=True):
        same(got, want)


def test_recomputation_keeps_sums(device):
    """One tensor of each block, not the two that it would be handed."""
    model, (tokens, targets), handed_on = make(VARIANTS["dense"], device=device), text(VARIANTS["dense"]), []
    model.recompute = True
    for block in model.layers:
        block.register_forward_pre_hook(lambda _, args: handed_on.append(args[1]))
    model.float()(tokens.to(device), targets.to(device))
    assert handed_on == [None, None]


@pytest.mark.parametrize("name", ["qwen3_moe", "noisy_biased"])
def test_autocast_to_fp32_changes_nothing(name, device):
    """A region of CUDA's may have that dtype, or a region be left inside another."""
    model, (tokens, _) = make(VARIANTS[name], torch.float32, device=device), text(VARIANTS[name], device=device)
    want = model.eval().logits(tokens)
    with torch.autocast(device, torch.bfloat16):
        with torch.autocast(device, enabled=False):
            same(model.logits(tokens), want)
        torch.set_autocast_dtype(device, torch.float32)     # torch.autocast would, on a CPU, rather disable itself
        same(model.logits(tokens), want)


@pytest.mark.parametrize("name", ["dense", "gpt2"])
def test_shapes_alone(name):
    """A dense model runs on the meta device, forward and backward."""
    model, (tokens, targets) = GPT(VARIANTS[name], device="meta"), text(VARIANTS[name], device="meta")
    model(tokens, targets).token_loss.backward()
    assert model.logits(tokens).shape == (*tokens.shape, SMALL["vocab_size"])
    assert all(p.grad.is_meta and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.skipif(moe_ext.has_cuda(), reason="needs a machine without CUDA")
def test_absent_device():
    with pytest.raises(ConfigError, match=r"train.device is cuda, but torch sees no CUDA device"):
        build(Config(train=TrainConfig(device="cuda")))
