"""The planner's counts, its roofline, its search beside brute force, and its command."""

import itertools
import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import moe_ext.plan.__main__
import moe_ext.plan.search as search_module
from moe_ext.config import (
    Config,
    ConfigError,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    PipelineConfig,
    TrainConfig,
    divisors,
    load,
    meshes,
    parse,
)
from moe_ext.model import GPT
from moe_ext.plan import Share, memory, traffic
from moe_ext.plan.roofline import DEVICES, estimate, forward_flops, keys_seen, wires
from moe_ext.plan.search import accepted, fits, flags, micro_batches, on, room, search, smallest
from moe_ext.plan.shares import kinds

RECIPES = sorted(map(str, Path("recipes").glob("*.toml")))
MOE = MoEConfig(experts=8, top_k=2, hidden=64)
MODEL = ModelConfig(vocab_size=512, seq_len=128, layers=2, dim=64, heads=4, hidden=96)
TINY = replace(DEVICES["h100"], memory=0.02)       # 20 MB, of which 18


def case(moe=MOE, *, mesh=None, micro_batch=8, accumulation=2, **model):
    return Config(model=replace(MODEL, moe=moe, **model), mesh=MeshConfig(**mesh or {}),
                  train=TrainConfig(micro_batch=micro_batch, accumulation=accumulation, dtype="bf16"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_parameters_of_every_recipe(recipe):
    config = load(recipe)
    model = GPT(config.model, device="meta")
    counted = sum(p.numel() for p in model.parameters())
    assert sum(kind.count * math.prod(kind.shape) for kind in kinds(config.model)) == counted
    one = replace(config, mesh=MeshConfig(), pipeline=PipelineConfig(),
                  train=replace(config.train, batch_ramp=""))       # of larger batches
    assert Share.of(one) == (counted, counted, model.num_parameters(moving=True)[0])
    assert Share.of(config).parameters >= counted / config.mesh.world / 1.01


# torch counts aten's products; these are the others
PRODUCTS = {
    torch.ops.moe_ext.linear: lambda x, w, *a, out_shape, **k: 2 * x[0] * math.prod(w),
    torch.ops.moe_ext.grouped_gemm_wgrad: lambda x, dy, *a, out_shape, **k: 2 * math.prod(x) * dy[1],
    torch.ops.moe_ext.expert_mlp: lambda x, w13, _, w2, weights, *a, out_shape, **k:
        2 * math.prod(weights) * math.prod(x[1:]) * (w13[1] + w2[2]),
    torch.ops.moe_ext.expert_mlp_backward: lambda dy, h, x, w13, _, w2, weights, *a, out_shape, **k:
        4 * math.prod(weights) * math.prod(dy[1:]) * (w13[1] + w2[2]),
    torch.ops.moe_ext.linear_cross_entropy: lambda x, w, *a, out_shape, **k: 6 * x[0] * math.prod(w),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *a, out_shape, **kw:
        4 * math.prod(q) * k[2],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda dy, q, k, *a, out_shape, **kw:
        8 * math.prod(q) * k[2],
}  # fmt: skip


@pytest.mark.c_core
@pytest.mark.parametrize("slow", [(), (torch.float32,)], ids=["torch's", "ours"])      # whose products, on any CPU
@pytest.mark.parametrize("config", [
    case(MoEConfig(), kv_heads=2), case(MoEConfig(), head_dim=20, act="gelu", tied=True, layers=3, seq_len=72),
    case(replace(MOE, shared_hidden=48, shared_gate=True, dense_layers=1)),
    case(replace(MOE, experts=6, top_k=3), dim=48, vocab_size=300),
], ids=["dense", "wide heads", "shared", "top-3"])  # fmt: skip
def test_flops_are_what_torch_counts(config, slow, monkeypatch):
    monkeypatch.setattr("moe_ext.ops.dense.SLOW", slow)
    c = config.model
    model, tokens = GPT(c), torch.zeros(2, c.seq_len, dtype=torch.int64)
    with FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter:
        model(tokens, tokens).token_loss.backward()
    assert counter.get_total_flops() == 3 * tokens.numel() * sum(forward_flops(c, causal=False))
    assert abs(model.flops_per_token() * tokens.numel() / counter.get_total_flops() - 1) < 0.005


@pytest.mark.parametrize("window, every", [(0, 0), (16, 0), (16, 2), (500, 0)])
def test_keys_that_are_seen(window, every):
    c = replace(MODEL, window=window, window_full_every=every)
    seen = 0
    for layer in range(c.layers):
        w = c.window_of(layer) or c.seq_len
        seen += sum(min(w, i + 1) for i in range(c.seq_len)) / c.seq_len
    rest = 4 * c.heads * c.head_width
    full = sum(forward_flops(c, causal=False)) - rest * sum(
        min(c.window_of(i) or c.seq_len, c.seq_len) for i in range(c.layers))
    assert sum(forward_flops(c)) == pytest.approx(full + rest * seen)


def test_time_is_that_of_a_measured_run():
    """805 ms for 65,536 tokens on one H200, from which the shares come; and what must follow from the peaks."""
    config = load("recipes/moe_gpt2_8e.toml")
    config = replace(config, train=replace(config.train, accumulation=2))
    time, peak = estimate(config, DEVICES["h200"]), DEVICES["h200"].tflops * 1e12
    assert abs(time.likely / 0.805 - 1) < 0.05 and time.at_least < time.likely
    assert time.compute == pytest.approx(3 * config.tokens_per_step * sum(forward_flops(config.model)) / peak)
    faster = estimate(config, replace(DEVICES["h200"], tflops=2 * DEVICES["h200"].tflops))
    assert faster.compute == time.compute / 2 and faster.memory == time.memory
    again = estimate(replace(config, train=replace(config.train, recompute=True)), DEVICES["h200"])
    assert all(new > old for new, old in zip(again[:1] + again[4:], time[:1] + time[4:], strict=True))
    assert again.memory == time.memory          # recomputed values are moved as well
    with pytest.raises(ConfigError, match="fp64, which has no CUDA kernels"):
        estimate(replace(config, train=replace(config.train, dtype="fp64")), DEVICES["h200"])


def test_time_of_ranks_that_share_a_sequence():
    """As many FLOPs on each, but with gather the last one's; the exchange leaves the host where the ranks do."""
    def timed(per_host=8, seq_len=4096, **mesh):
        config = case(MoEConfig(), mesh=mesh, seq_len=seq_len, heads=8, micro_batch=1, accumulation=1)
        return config, estimate(config, DEVICES["h100"], per_host)

    (one, alone), (_, shared), (_, gathered) = timed(), timed(sp=8), timed(sp=8, attention="gather")
    assert shared.compute == pytest.approx(alone.compute / 8)
    S, n, peak = 4096, 4096 // 8, DEVICES["h100"].tflops * 1e12
    seen = sum(range(S - n + 1, S + 1)) / n - (S + 1) / 2       # of the last part, more than of all on average
    more = 3 * n * 4 * one.model.heads * one.model.head_width * one.model.layers * seen / peak
    assert gathered.compute == pytest.approx(shared.compute + more)
    for per_host, mesh, there, share in ((4, dict(sp=8), 4 / 7, 1 / 4), (2, dict(sp=2, tp=2), 1, 1)):
        config, time = timed(per_host, **mesh)      # of tp ranks, neighbours share matrices, the next the sequence
        away = traffic(config)["sp"] * there + traffic(config)["fsdp"] * share
        assert time.network == pytest.approx(away / DEVICES["h100"].network / 1e9)


@pytest.mark.parametrize("model, window, parts", [(4096, 0, 1), (96, 0, 4), (96, 40, 4), (96, 20, 4), (96, 80, 3)])
def test_keys_of_the_last_part(model, window, parts):
    config = replace(MODEL, seq_len=model, window=window, layers=1)
    last = range(model - model // parts + 1, model + 1)
    assert keys_seen(config, parts=parts) == sum(min(i, window or model) for i in last) / len(last)


@pytest.mark.parametrize("ranks, stride, exchange, want", [
    (8, 1, False, (100, 0)), (1, 16, False, (100, 0)), (4, 2, True, (100, 0)),
    (2, 8, False, (0, 100)), (16, 1, False, (100, 12.5)), (8, 2, False, (100, 25)), (4, 16, False, (0, 100)),
    (16, 1, True, (100 * 7 / 15, 100 * 8 / 15)), (2, 8, True, (0, 100)),
])  # fmt: skip
def test_wires(ranks, stride, exchange, want):
    """Of 100 bytes, on hosts of eight: over the link, and over the rank's own share of its host's network."""
    assert wires(100, ranks, stride, 8, exchange) == pytest.approx(want)


def shared(config, devices):
    """Every mesh, with every form of attention, of which a rank has 32 tokens of a sequence at least."""
    for sp in divisors(devices):
        for mesh in meshes(devices, sp):
            if sp == 1 or config.model.seq_len >= 32 * mesh.sequence:
                yield from (replace(mesh, attention=way) for way in ("ulysses", "gather")[:1 + (sp > 1)])


@pytest.mark.parametrize("config", [
    case(), case(MoEConfig()), case(replace(MOE, scope="micro_batch")), case(replace(MOE, shared_hidden=48), heads=8),
    case(MoEConfig(), layers=5), case(MoEConfig(), kv_heads=1, micro_batch=1, accumulation=1, seq_len=192, heads=6,
                                      head_dim=12),
], ids=["moe", "dense", "micro-batch", "shared", "five blocks", "one sequence"])  # fmt: skip
@pytest.mark.parametrize("devices", [1, 2, 4, 6, 8])
def test_search_is_brute_force(config, devices, monkeypatch):
    """Every mesh, pipeline, micro-batch and both recomputations, one after the other."""
    monkeypatch.setattr(search_module, "LEAST", 32)
    possible, best = set(), {}
    ways = [(1, 1)] + [(pp, chunks) for pp in (2, 4) if devices % pp == 0 for chunks in (1, 2, 3, 4)
                       if chunks in (1, min(4, config.model.layers // pp)) and pp * chunks <= config.model.layers]
    for (pp, chunks), micro_batch, recompute in itertools.product(ways, range(1, 17), (False, True)):
        for mesh in shared(config, devices // pp):
            mesh, pipeline = replace(mesh, pp=pp), PipelineConfig(chunks=chunks)
            if micro_batch not in micro_batches(config, mesh, pipeline):
                continue
            try:
                way = on(config, mesh, micro_batch, recompute, pipeline)
            except ConfigError:
                continue
            assert way.sequences_per_step == config.sequences_per_step
            possible.add((mesh, chunks))
            if memory(way).total <= room(TINY):
                time = estimate(way, TINY).likely
                best[mesh, chunks] = min(best.get((mesh, chunks), math.inf), time)
    assert {(way.mesh, way.pipeline.chunks) for way in accepted(config, devices)} == possible
    if not possible:
        with pytest.raises(ConfigError, match=f"no mesh of {devices} devices divides"):
            search(config, devices, TINY)
        return
    found = search(config, devices, TINY)
    assert {(way.config.mesh, way.config.pipeline.chunks): way.time.likely for way in found} == best
    assert [way.time.likely for way in found] == sorted(best.values())
    assert all(fits(way.config, TINY) and way.memory == memory(way.config) for way in found)


def test_ten_thousand_devices():
    config = load("recipes/qwen3_30b_a3b.toml")
    config = replace(config, model=replace(config.model, moe=replace(config.model.moe, scope="sequence")),
                     train=replace(config.train, micro_batch=1, accumulation=2500))
    found = search(replace(config, mesh=MeshConfig(fsdp=8, ep=8)), 10_000, DEVICES["h100"])
    assert found and all(way.config.mesh.world == 10_000 for way in found)
    assert {way.config.sequences_per_step for way in found} == {20_000}


def test_least_memory_when_nothing_fits():
    config = load("recipes/glm_4.5_air.toml")
    least, held = smallest(config, 8)
    assert not search(config, 8, DEVICES["h100"]) and held == memory(least)
    assert held.total <= min(memory(way).total for way in accepted(config, 8))


def main(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["plan", *args])
    monkeypatch.setattr(torch.distributed, "init_process_group", None)
    moe_ext.plan.__main__.main()
    return capsys.readouterr().out


def test_flags_make_the_plan(monkeypatch, capsys):
    """The command of the best mesh, parsed again, is the plan that was ranked first."""
    options = "--search 16 --type capacity --device a100 --top 1 --model.dropout 0.1"
    said = main(monkeypatch, capsys, "recipes/moe_exp_dropless.toml", *options.split())
    command = next(line for line in said.splitlines() if "-m moe_ext.train" in line)
    config = parse(shlex.split(command.partition("moe_ext.train ")[2]))
    best = search(config, 16, DEVICES["a100"])[0]
    assert (best.config.mesh, best.config.train) == (config.mesh, config.train)
    assert config.model.dropout == 0.1 and config.model.moe.capacity_factor == 1.0
    assert flags(config, config) == []


def test_what_would_fit_does(monkeypatch, capsys):
    recipe = "recipes/moe_gpt2_8e.toml", "--model.moe.scope", "sequence"
    said = main(monkeypatch, capsys, *recipe, "--device", "a100-40gb")
    assert "it does not fit" in said
    ways = said.partition("what would fit\n")[2].partition("\n\n")[0].splitlines()
    assert len(ways) == 3
    for way in ways:
        options = shlex.split(way.partition(": ")[2].partition(" (")[0])
        config = parse([*recipe, *options])
        assert fits(config, DEVICES["a100-40gb"]) and config.sequences_per_step == 256
    options = "--mesh.fsdp 4 --train.batch-ramp= --memory-gb 70"
    said = main(monkeypatch, capsys, "recipes/glm_4.5_air.toml", *options.split())
    assert "nothing on 8 x h100: the least is" in said and "--device h100 --memory-gb 70.0 --search 32" in said


def test_a_plan_says_all(monkeypatch, capsys):
    said = main(monkeypatch, capsys, "recipes/moe_exp_dropless.toml", "--device", "a100")
    for words in ("4,375,732,736 in all, 213,934,592 active per token, 2,752,512 per expert; 1,204,838,912 local",
                  "FLOPs per iteration: 155,546,535,591,936", "weight and optimizer=31292.23 MB", "31297.68 MB",
                  "13153.68 MB", "in elements: 65,667,072 + 82,207,232", "in elements: 24 x 44,040,192",
                  "messages of the token exchange", "each rank sends per step", "at least", "likely"):
        assert words in said
    options = "--mesh.fsdp 1 --mesh.sp 4 --mesh.tp 2 --mesh.attention gather"
    said = main(monkeypatch, capsys, "recipes/tiny.toml", *options.split())
    for words in ("8 ranks: sp 4 (gather) x tp 2 x ep 2; 1 host of 8", "memory of rank 6 on a GPU", "MiB  sp",
                  "MiB  sequence", "MiB  messages between the ranks of a sequence",
                  "(tensor 2, pipeline 1, context 4, data 1;"):
        assert words in said
    said = main(monkeypatch, capsys, "recipes/gpt_0b9.toml", *"--mesh.fsdp 1 --train.accumulation 8 --pp 4".split())
    assert "weight and optimizer=2614.79 MB" in said and "2687.84 MB" in said and "(1, 3): 152387584" in said


@pytest.mark.parametrize("args, sentence", [
    ("--device foo", r"--device: got 'foo', wanted one of a100, .*--peak-tflops"),
    ("--search -1", r"--search is -1; it must be a number of devices, 1 to 10,000"),
    ("--search 10001", r"--search is 10001"),
    ("--search 7", r"no mesh of 7 devices divides .* the nearest number that has one is 8"),
    ("--per-host 0", r"--per-host is 0; it must be positive"),
    ("--memory-gb -3", r"--memory-gb is -3.0"),
    ("--efficiency 1.5", r"--efficiency is 1.5; it must lie in \[0, 1\]"),
    ("--pp 3", r"--pp 3 x --vpp 1 does not divide model.layers 4"),
    ("--train.dtype fp64", r"fp64, which has no CUDA kernels"),
    ("--mesh.sp 256 --mesh.attention gather", r"mesh.sp 256 .*the nearest .* 128"),
    ("--mesh.sp 16", r"mesh.sp 16 .*the nearest .* 4"),
])  # fmt: skip
def test_wrong_options_are_sentences(args, sentence, monkeypatch, capsys):
    with pytest.raises(SystemExit, match=f"error: .*{sentence}"):
        main(monkeypatch, capsys, "recipes/tiny.toml", *args.split())
