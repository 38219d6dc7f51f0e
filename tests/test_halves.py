"""The weights that a step casts once: the bits of autocast, which casts them in every forward; and who sees them."""

import contextlib
import functools
import gc
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from test_plan_memory import halved
from test_train import assert_same_checkpoint, data, records, run  # noqa: F401
from test_train_mesh import fit
from torch.utils._python_dispatch import TorchDispatchMode

import moe_ext.halves
from moe_ext.config import Config, MeshConfig, ModelConfig, MoEConfig, TrainConfig, TuneConfig
from moe_ext.halves import cast_once, half_of, halves
from moe_ext.layers.fused import Draws
from moe_ext.model import GPT, half_dtype, precision, set_recomputation
from moe_ext.optim import build_optimizer
from moe_ext.plan import memory

pytestmark = pytest.mark.c_core
SEQUENCES, S = 2, 16
MOE = MoEConfig(experts=4, top_k=2, hidden=24, shared_hidden=16, shared_gate=True, noise=True, router_bias=True)
MODEL = ModelConfig(vocab_size=64, seq_len=S, layers=2, dim=32, heads=4, hidden=48, qk_norm=True, sinks=True, moe=MOE)


def case(*, dtype="bf16", micros=3, recompute=False, recompute_attention=False, **model):
    return Config(model=replace(MODEL, **model), train=TrainConfig(
        dtype=dtype, micro_batch=SEQUENCES, accumulation=micros, recompute=recompute,
        recompute_attention=recompute_attention))  # fmt: skip


LORA = TuneConfig(train="norm", lora_rank=2)
CASES = {
    "moe": case(),
    "fp16": case(dtype="fp16"),
    "dense, biases": case(moe=MoEConfig(), bias=True, norm="layernorm", position="learned"),
    "moe, biases, gelu": case(bias=True, act="gelu"),
    "capacity, dropout": case(moe=replace(MOE, capacity_factor=1.0, jitter=0.1), dropout=0.1),
    "recompute": case(recompute=True),
    "recompute attention": case(recompute_attention=True),
    "frozen experts and head": case(tune=TuneConfig(freeze="experts, lm_head")),
    "lora": case(tune=LORA, bias=True),
    "lora, recompute": case(tune=LORA, recompute=True),
    "tied, frozen": case(tied=True, tune=TuneConfig(freeze="embed_tokens")),
}  # fmt: skip


TIED = case(tied=True, bias=True)


def made(config):
    model = GPT(config.model)
    set_recomputation(model, config.train)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):     # zero at first, of which A would have no gradient
            torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(1))
    return model


def loss_of(model, config, micro=0, step=1):
    text = torch.randint(64, (SEQUENCES, S + 1), generator=torch.Generator().manual_seed(100 * step + micro))
    with precision(config, torch.device("cpu")):
        out = model(text[:, :-1], text[:, 1:].contiguous(), Draws(1, step, row0=SEQUENCES * S * micro))
    return 128 * (out.token_loss / (SEQUENCES * S) + out.aux_loss)      # times a scale, as in fp16


def trained(config, steps, context=halves):
    """Some steps -> losses, gradients of the last step and parameters after it."""
    model, losses = made(config), []
    optimizer = build_optimizer(model, config.optim)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        with context(model, config):
            for micro in range(config.train.accumulation):
                loss = loss_of(model, config, micro, step)
                loss.backward()
                losses.append(loss.detach())
        optimizer.step()
    named = list(model.named_parameters())
    return torch.stack(losses), {name: p.grad for name, p in named}, {name: p.detach() for name, p in named}


def by_autocast(monkeypatch):
    monkeypatch.setattr(moe_ext.halves, "cast_once", lambda config: False)


def assert_same(got, want):
    for name, tensor in want.items():
        assert tensor is got[name] is None or torch.equal(got[name], tensor), f"{name} has other bits"


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_autocast_to_the_bit(name, monkeypatch):
    losses, gradients, parameters = trained(CASES[name], steps=3)
    by_autocast(monkeypatch)
    want_losses, want_gradients, want_parameters = trained(CASES[name], steps=3)
    assert torch.equal(losses, want_losses)
    assert_same(gradients, want_gradients)
    assert_same(parameters, want_parameters)
    assert all(grad.dtype == torch.float32 for grad in gradients.values() if grad is not None)
    assert sum(bool(grad.any()) for grad in gradients.values() if grad is not None) > 10


def test_a_half_that_is_not_renewed_is_found(monkeypatch):
    """Planted: of each parameter the first half serves in all steps."""
    want = trained(CASES["moe"], steps=2)
    monkeypatch.setattr(moe_ext.halves, "half_of", functools.cache(half_of))
    got = trained(CASES["moe"], steps=2)
    micros = CASES["moe"].train.accumulation
    assert torch.equal(got[0][:micros], want[0][:micros])
    with pytest.raises(AssertionError, match="has other bits"):
        assert_same(got[1], want[1])


def test_a_tied_table_sums_its_two_parts_in_another_order(monkeypatch):
    """Of M micro-batches 2 M parts are added in either order, each sum rounded to 2^-24 of the largest at worst."""
    losses, gradients, _ = trained(TIED, steps=1)
    by_autocast(monkeypatch)
    want_losses, want, _ = trained(TIED, steps=1)
    assert torch.equal(losses, want_losses)
    got, table = gradients.pop("embed_tokens.weight"), want.pop("embed_tokens.weight")
    assert_same(gradients, want)
    assert 0 < (got - table).abs().max() <= 4 * 3 * 2**-24 * table.abs().max()


class Casts(TorchDispatchMode):
    """The names of the parameters that are cast to 16 bits."""

    def __init__(self, model):
        super().__init__()
        self.of = {p.untyped_storage()._cdata: name for name, p in model.named_parameters()}
        self.names = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op._schema.name == "aten::_to_copy" and kwargs.get("dtype") in (torch.bfloat16, torch.float16):
            self.names.add(self.of.get(args[0].untyped_storage()._cdata))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [TIED, *(CASES[name] for name in (
    "moe", "fp16", "dense, biases", "moe, biases, gelu", "lora", "recompute"))])  # fmt: skip
def test_halves_are_of_what_autocast_would_cast(config):
    model = made(config)
    with Casts(model) as autocast:
        loss_of(model, config).backward()
    at_once, later = Casts(model), Casts(model)
    with contextlib.ExitStack() as step:
        with at_once:
            step.enter_context(halves(model, config))
        with later:
            loss_of(model, config).backward()
    assert at_once.names == autocast.names - {None} and len(at_once.names) > 10
    assert later.names <= {None}        # activations alone


@pytest.mark.parametrize("config", [TIED, *CASES.values()])
def test_the_plan_counts_them(config):
    assert memory(config).cast == halved(config, made(config)) > 0


def test_outside_everybody_sees_the_parameters(monkeypatch):
    config, model = TIED, made(TIED)
    named, state = dict(model.named_parameters(remove_duplicate=False)), model.state_dict()
    optimizer = build_optimizer(model, config.optim)
    with halves(model, config):
        inside = dict(model.named_parameters(remove_duplicate=False))
        assert list(inside) == list(named)
        kept = {name for name, p in inside.items() if p is named[name]}
        assert all(any(part in name for part in ("norm", "mlp.gate.", "noise_E", "sinks", "embed_tokens"))
                   for name in kept)  # fmt: skip
        assert {"embed_tokens.weight", "layers.0.mlp.gate.weight", "layers.0.mlp.noise_E"} <= kept
        assert inside["lm_head.weight"].dtype == torch.bfloat16     # the table is the embedding's as it was
        loss_of(model, config).backward()
        assert all(p.grad is None for name, p in inside.items() if name not in kept)
    outside = dict(model.named_parameters(remove_duplicate=False))
    assert list(outside) == list(named) and all(p is named[name] for name, p in outside.items())
    assert model.lm_head.weight is model.embed_tokens.weight
    assert all(tensor.dtype == torch.float32 and tensor.data_ptr() == state[name].data_ptr()
               for name, tensor in model.state_dict().items())  # fmt: skip
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(model.parameters())
    assert all(p.grad is not None for p in model.parameters())


def test_an_exception_leaves_the_parameters():
    config = case()
    model = made(config)
    named = dict(model.named_parameters())

    def fails(*_):
        raise FloatingPointError("a loss")

    model.layers[1].mlp.register_forward_pre_hook(fails)
    with pytest.raises(FloatingPointError, match="a loss"), halves(model, config):
        loss_of(model, config)
    assert all(p is named[name] for name, p in model.named_parameters()) and len(named) > 20


def test_halves_are_gone_at_the_exit():
    """So that they are not there while the optimizer steps: nothing but the modules and the graph hold them."""
    config = case()
    model = made(config)
    gc.disable()
    try:
        with halves(model, config):
            halved = [weakref.ref(p) for p in model.parameters() if p.dtype == half_dtype(config)]
            loss_of(model, config).backward()
            assert len(halved) > 20 and all(half() is not None for half in halved)
        assert all(half() is None for half in halved)
    finally:
        gc.enable()


def test_a_graph_may_be_walked_twice():
    config = case(moe=MoEConfig())
    once, twice = made(config), made(config)
    with halves(once, config):
        loss_of(once, config).backward()
    with halves(twice, config):
        loss = loss_of(twice, config)
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same({name: p.grad for name, p in twice.named_parameters()},
                {name: 2 * p.grad for name, p in once.named_parameters()})  # fmt: skip


def test_other_runs_have_none():
    """Nothing is cast in 32 and 64 bits; one micro-batch casts once anyway; ranks that share weights by themselves."""
    config = case()
    assert cast_once(config) and cast_once(replace(config, mesh=MeshConfig(pp=2)))
    others = [case(dtype="fp32"), case(dtype="fp64"), case(micros=1)]
    others += [replace(config, mesh=MeshConfig(**{axis: 2})) for axis in ("fsdp", "rep", "tp", "sp")]
    model = made(config)
    for other in others:
        named = dict(model.named_parameters())
        with halves(model, other):
            assert all(p is named[name] for name, p in model.named_parameters())


# ---- the driver ------------------------------------------------------------------------------------------------------
RUN = dict(train__steps=6, train__save_every=4, train__keep_last=0, train__eval_every=2, train__eval_batches=1,
           train__sample_tokens=0, log__every=1, data__tokenizer="")  # fmt: skip


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_run_and_what_continues_it_are_those_of_autocast(data, tmp_path, monkeypatch, dtype):    # noqa: F811
    """Evaluations on the way; in fp16 with a scale that overflows at first."""
    options = RUN | dict(train__dtype=dtype, train__loss_scale=2.0**20)
    once = run(data, tmp_path / "once", **options)
    shutil.copytree(once / "ckpt" / "step-000004", tmp_path / "later" / "debug" / "ckpt" / "step-000004")
    later = run(data, tmp_path / "later", "auto", **options)
    by_autocast(monkeypatch)
    want = run(data, tmp_path / "autocast", **options)
    assert_same_checkpoint(once, want, 6)
    assert_same_checkpoint(later, want, 6)
    assert [r.get("valid_loss") for r in records(once)] == [r.get("valid_loss") for r in records(want)]
    assert 0 < sum(r["skipped"] for r in records(once) if "skipped" in r) < 4 or dtype == "bf16"


def test_stages_cast_theirs_once(data, tmp_path, monkeypatch):                                    # noqa: F811
    options = RUN | dict(train__dtype="bf16", mesh__pp=2, model__layers=4, pipeline__chunks=2)
    once = fit(data, tmp_path / "once", tmp_path / "store", **options)
    by_autocast(monkeypatch)
    assert_same_checkpoint(once, fit(data, tmp_path / "autocast", tmp_path / "store2", **options), 6)
