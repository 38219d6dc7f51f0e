"""A model that diverges: the layer counts the tokens whose logits are not finite, on every path through torch; a run
ends with a sentence that names step and layer, and in fp16 all ranks skip the step and halve the loss scale."""
import math

import pytest
import torch
from ranks import run_ranks
from test_train import data, flags, records  # noqa: F401

import moe_ext.train
from moe_ext import checkpoint
from moe_ext.config import ModelConfig, MoEConfig, parse, plain
from moe_ext.layers.fused import FusedMoE
from moe_ext.model import GPT
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.shard import build

# ---- the layer -------------------------------------------------------------------------------------------------------


def bad_tokens(device):
    """Three sequences of four tokens, of which one has a NaN and one an infinity."""
    x_BSD = torch.randn(3, 4, 8, device=device)
    x_BSD[0, 1, 3], x_BSD[2, 0, 5] = math.nan, math.inf
    return x_BSD, torch.tensor([1, 8], device=device)


def make(device, **options):
    layer = FusedMoE(8, 12, 4, 2, device=device, **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    return layer


LAYERS = {
    "sigmoid": dict(score="sigmoid", select_bias=True),
    "topk_softmax": dict(score="topk_softmax", norm_p=0.0),
    "losses": dict(z_weight=0.1, balance_weight=0.1),
    "balanced": dict(balanced=True),
    "capacity": dict(balance_weight=0.1, capacity_factor=2.0, drop_by="probability"),   # reads a size: no full graph
}


@pytest.mark.parametrize("mode, name", [(mode, name) for mode in ("training", "evaluation", "compiled")
                                        for name in LAYERS if (mode, name) != ("compiled", "capacity")])
def test_only_the_bad_tokens_are_nan_and_they_are_counted(mode, name, device):
    layer = make(device, **LAYERS[name]).train(mode != "evaluation")
    forward = torch.compile(layer, fullgraph=True, backend="aot_eager") if mode == "compiled" else layer
    x_BSD, bad = bad_tokens(device)
    y_BSD, routing = forward(x_BSD)
    moe_ext.synchronize(device)                     # no kernel has complained
    y_TD = y_BSD.flatten(0, 1)
    assert routing.bad == 2 and y_TD[bad].isnan().all()
    good = [t for t in range(12) if t not in bad]
    assert not y_TD[good].isnan().any() and routing.loss.isfinite()
    assert routing.counts_E.sum() == 12 * 2
    y_BSD.sum().backward()
    assert layer.gate.weight.grad.isnan().any()


def test_nothing_changes_where_all_is_finite(device):
    x_BSD = torch.randn(3, 4, 8, device=device)
    layer = make(device)
    weights_TK, ids_TK, routing = layer.route(x_BSD, None, None)
    want = moe_ext.ops.router(layer.gate(x_BSD.flatten(0, 1)), 2, norm_p=1.0)
    assert torch.equal(weights_TK, want[0]) and torch.equal(ids_TK, want[1]) and routing.bad == 0


def test_recomputation_counts_once_and_raises_nothing(device):
    model = GPT(ModelConfig(vocab_size=7, seq_len=4, layers=3, dim=8, heads=2, moe=MoEConfig(experts=4, hidden=8)),
                device=device)
    model.recompute = True
    with torch.no_grad():
        model.layers[1].mlp.gate.weight[2, 3] = math.nan
    tokens = torch.arange(4, device=device).expand(2, 4)
    out = model(tokens, tokens)
    assert out.bad_L.tolist() == [0, 8, 8]          # all eight tokens, in that layer and in those behind it
    out.token_loss.backward()
    assert model.embed_tokens.weight.grad.isnan().any()


# ---- the driver ------------------------------------------------------------------------------------------------------


@pytest.fixture
def now(monkeypatch):
    """{"step": the step that the loop is in}."""
    now, schedule = {}, moe_ext.train.learning_rate

    def learning_rate(step, *rest):
        now["step"] = step
        return schedule(step, *rest)

    monkeypatch.setattr(moe_ext.train, "learning_rate", learning_rate)
    return now


def spoil(monkeypatch, layer, when):
    """The gate of this layer gives its first token NaN where when(mesh, model)."""
    def spoiled(config, mesh):
        model = build(config, mesh)

        def hook(gate, args, logits_TE):
            return logits_TE.index_fill(0, torch.tensor([0]), math.nan) if when(mesh, model) else logits_TE

        model.layers[layer].mlp.gate.register_forward_hook(hook)
        return model

    monkeypatch.setattr(moe_ext.train, "build", spoiled)


def fit(data, folder, **options):                                                           # noqa: F811
    options = dict(data__tokenizer="", log__every=1, train__steps=6, train__device="cpu") | options
    config = plain(parse(flags(data, folder, **options)))
    if config.mesh.world == 1:
        moe_ext.train.fit(config, Mesh(config.mesh), "")
    else:
        (folder / "store").mkdir(parents=True)
        run_ranks(config.mesh.world, lambda rank: moe_ext.train.fit(config, Mesh(config.mesh), "")[1], folder / "store")
    return config.run_folder


@pytest.mark.parametrize("words", [[], ["--train.dtype", "bf16"], ["--train.recompute"]], ids=["fp32", "bf16", "again"])
def test_a_router_that_diverges_is_a_sentence(data, tmp_path, monkeypatch, now, words):     # noqa: F811
    spoil(monkeypatch, 1, lambda mesh, model: now["step"] == 6)
    config = plain(parse([*flags(data, tmp_path, data__tokenizer="", train__steps=6), *words]))
    with pytest.raises(FloatingPointError, match=r"^step 6: the logits of the router layers\.1\.mlp are not finite for "
                       r"2 tokens: lower optim\.lr, .*; --resume auto continues from \S+step-000005$"):
        moe_ext.train.fit(config, Mesh(config.mesh), "")


def test_a_router_that_diverges_in_evaluation(data, tmp_path, monkeypatch):                 # noqa: F811
    spoil(monkeypatch, 0, lambda mesh, model: not model.training)
    with pytest.raises(FloatingPointError, match=r"^step 6: the logits of the router layers\.0\.mlp are not finite for "
                       r"4 tokens; --resume auto continues from \S+step-000005$"):
        fit(data, tmp_path)


def test_nan_in_the_balance_loss(data, tmp_path, monkeypatch):                              # noqa: F811
    loss = FusedMoE.balance_loss
    monkeypatch.setattr(FusedMoE, "balance_loss", lambda self, *args: loss(self, *args) * math.inf)
    with pytest.raises(FloatingPointError, match=r"^step 1: the balance loss or the z-loss is inf: .*; no checkpoint"):
        fit(data, tmp_path)


def test_nan_in_a_gradient_without_clipping(data, tmp_path, monkeypatch):                   # noqa: F811
    def spoiled(config, mesh):
        model = build(config, mesh)
        model.norm.weight.register_hook(lambda grad: grad * math.nan)
        return model

    monkeypatch.setattr(moe_ext.train, "build", spoiled)
    with pytest.raises(FloatingPointError, match=r"^step 1: gradient of norm\.weight: 32 NaN .*; no checkpoint has"):
        fit(data, tmp_path, optim__clip=0)


@pytest.mark.parametrize("mesh", [{}, dict(mesh__fsdp=2, mesh__ep=2, train__micro_batch=2)], ids=["one", "fsdp2-ep2"])
def test_fp16_skips_the_step_on_all_ranks(data, tmp_path, monkeypatch, now, mesh):           # noqa: F811
    """The last rank alone meets NaN, in step 2; every rank skips that step, and the run learns on."""
    spoil(monkeypatch, 1, lambda mesh, model: now["step"] == 2 and mesh.rank == mesh.world - 1)
    folder = fit(data, tmp_path, train__dtype="fp16", **mesh)
    said = (folder / "run.log").read_text()
    assert ("step 2: the logits of the router layers.1.mlp are not finite for 2 tokens, so it moves nothing; the loss "
            "scale is 32768") in said
    losses = [r["loss"] for r in records(folder) if "loss" in r]
    assert losses[1] is None and losses[-1] < losses[0]
    state = checkpoint.read_state(checkpoint.latest(folder / "ckpt"))
    assert state.step == 6 and state.extra.pop("seconds") > 0
    assert state.extra == {"scale": 32768.0, "good_steps": 4, "tolerated": 0}


def test_steps_that_overflow_displace_no_checkpoint(data, tmp_path, monkeypatch, now):       # noqa: F811
    """fp16: the scale falls step after step, and what is saved meanwhile may be the parameters that overflow."""
    spoil(monkeypatch, 1, lambda mesh, model: now["step"] >= 4)
    words = flags(data, tmp_path, data__tokenizer="", data__valid="", train__steps=7, train__save_every=1,
                  train__keep_last=2, train__dtype="fp16")
    config = plain(parse(words))
    moe_ext.train.fit(config, Mesh(config.mesh), "")
    kept = sorted(path.name for path in (config.run_folder / "ckpt").iterdir())
    assert kept == ["step-000002", "step-000003", "step-000007"]
