"""Megatron's printed figures, to the digit, and their formulas on other sizes beside models on the meta device."""

from dataclasses import replace

import pytest

from moe_ext.config import Config, ConfigError, MeshConfig, ModelConfig, MoEConfig, PipelineConfig, TrainConfig, load
from moe_ext.model import GPT
from moe_ext.plan import megatron
from moe_ext.plan.roofline import forward_flops


def meta(config):
    return GPT(config.model, device="meta")


def recipe(name, *, micro_batch=None, accumulation=1, **mesh):
    config = load(f"recipes/{name}.toml")
    train = replace(config.train, micro_batch=micro_batch or config.train.micro_batch, accumulation=accumulation)
    return replace(config, train=train, mesh=MeshConfig(**mesh) if mesh else config.mesh)


DENSE, CAPACITY, DROPLESS = (recipe(f"moe_exp_{type}") for type in ("dense", "capacity", "dropless"))
EP8 = recipe("moe_exp_dropless", micro_batch=4, accumulation=2, fsdp=8, ep=8)
STAGES = megatron.staged(recipe("gpt_0b9", accumulation=8, tp=2), 4, 4)


@pytest.mark.parametrize("config", [DENSE, CAPACITY, DROPLESS, EP8])
def test_flops_of_an_iteration(config):
    assert megatron.num_floating_point_operations(config) == 155_546_535_591_936


def test_footprint_of_the_dense_run():
    assert megatron.footprint(DENSE) == """\
Number of parameters in transformer layers in billions:  0.08
Number of parameters in embedding layers in billions: 0.13
Total number of parameters in billions: 0.21
Number of parameters in most loaded shard in billions: 0.2132
Theoretical memory footprints: weight and optimizer=1524.73 MB"""
    assert [round(mb, 2) for mb in megatron.exact_memory(DENSE, meta(DENSE))] == [1524.55, 1524.55]


@pytest.mark.parametrize("config, aware, held", [(DROPLESS, 13153.68, 1_204_838_912), (EP8, 10129.68, 676_356_608)])
def test_footprint_of_the_moe_runs(config, aware, held):
    said = megatron.footprint(config)
    assert said.splitlines()[2:] == ["Total number of parameters in billions: 4.37",
                                     "Number of parameters in most loaded shard in billions: 4.3750",
                                     "Theoretical memory footprints: weight and optimizer=31292.23 MB"]
    assert [round(mb, 2) for mb in megatron.exact_memory(config, meta(config))] == [31297.68, aware]
    assert megatron.parameter_lines(config, meta(config)) == \
        f" > number of parameters on (tensor, pipeline) model parallel rank (0, 0): {held}"


def test_pipeline_of_four_stages():
    assert megatron.footprint(STAGES, part="block") == """\
Number of parameters in transformer block in billions:  0.81
Number of parameters in embedding layers in billions: 0.10
Total number of parameters in billions: 0.91
Number of parameters in most loaded shard in billions: 0.1523
Number of parameters in other shards in billions: 0.1007
Theoretical memory footprints: weight and optimizer=2614.79 MB"""
    held = {0: 156577792, 1: 100741120, 2: 100741120, 3: 152387584}
    assert megatron.parameter_lines(STAGES, meta(STAGES)).splitlines() == [
        f" > number of parameters on (tensor, pipeline) model parallel rank ({t}, {stage}): {n}"
        for stage, n in held.items() for t in (0, 1)]
    assert round(megatron.exact_memory(STAGES, meta(STAGES))[0], 2) == 2687.84
    smaller = replace(STAGES, model=replace(STAGES.model, vocab_size=50257))
    assert megatron.padded_vocabulary(smaller) == 50432
    assert megatron.num_floating_point_operations(smaller) == megatron.num_floating_point_operations(STAGES)


@pytest.mark.parametrize("config, experts", [
    (DENSE, []), (DROPLESS, [44_040_192] * 24), (EP8, [44_040_192] * 12),
    (CAPACITY, [41_287_680] * 25 + [24_772_608]),
], ids=["dense", "EP 4", "EP 8", "capacity"])  # fmt: skip
def test_buckets(config, experts):
    buffers = megatron.buckets(config, meta(config))
    sizes = [[sum(p.size for p in bucket) for bucket in buffer] for buffer in buffers]
    dense = [65_667_072, 82_207_232] if experts else None
    assert sizes == [dense, experts] if experts else sum(sizes[0]) == 213_148_160
    said = megatron.bucket_lines(config, meta(config)).splitlines()
    assert said[0].endswith(f"Number of buckets for gradient all-reduce / reduce-scatter: {len(sizes[0])}")
    assert said[1:3] == ["Params for bucket 1 (65667072 elements):", "        module.output_layer.weight"]


def test_names_in_a_bucket():
    said = megatron.bucket_lines(EP8, meta(EP8)).splitlines()
    at = said.index("Params for bucket 12 (44040192 elements):")
    assert said[at + 1 : at + 5] == [f"        module.decoder.layers.{layer}.mlp.experts.weight{matrix}"
                                     for layer in (1, 0) for matrix in (2, 1)]
    assert "        module.decoder.layers.3.self_attention.linear_qkv.layer_norm_weight" in said
    said = megatron.bucket_lines(CAPACITY, meta(CAPACITY))
    assert said.endswith("layers.0.mlp.experts.local_experts.0.linear_fc1.weight")


# other sizes: nothing above may be a constant -------------------------------------------------------------------------

MOE = MoEConfig(experts=8, top_k=2, hidden=48)
MODEL = ModelConfig(vocab_size=1024, seq_len=40, layers=4, dim=32, heads=8, hidden=96)


def case(moe=MOE, *, pp=1, vpp=1, mesh=None, micro_batch=3, **model):
    return Config(model=replace(MODEL, moe=moe, **model), mesh=MeshConfig(pp=pp, **mesh or {}),
                  pipeline=PipelineConfig(chunks=vpp), train=TrainConfig(micro_batch=micro_batch, accumulation=2))


CASES = {
    "dense": case(MoEConfig()),
    "dense, GQA, gelu": case(MoEConfig(), kv_heads=2, act="gelu", hidden=112),
    "wide heads": case(MoEConfig(), head_dim=20, layers=3, seq_len=24),
    "layernorm, biases, learned, tied": case(MoEConfig(), norm="layernorm", bias=True, position="learned", tied=True),
    "other width and vocabulary": case(dim=64, vocab_size=1152, micro_batch=5),
    "moe": case(),
    "experts": case(replace(MOE, experts=16, top_k=3, hidden=40)),
    "shared, noise, dense layers": case(replace(MOE, shared_hidden=64, noise=True, dense_layers=1)),
    "shared gate": case(replace(MOE, shared_hidden=64, shared_gate=True), mesh=dict(tp=2)),
    "biases": case(bias=True, norm="layernorm", kv_heads=4),
    "router bias, sinks, attention bias": case(replace(MOE, router_bias=True), sinks=True, attention_bias="qkv"),
    "qk norm": case(qk_norm=True),
    "tp": case(MoEConfig(), mesh=dict(tp=4), bias=True),
    "tp, sinks": case(mesh=dict(tp=2), sinks=True, kv_heads=2),
    "ep": case(mesh=dict(fsdp=4, ep=4), bias=True),
    "sp": case(mesh=dict(sp=2, ep=2), kv_heads=1),
    "fsdp, sp, tp": case(MoEConfig(), mesh=dict(fsdp=2, sp=2, tp=2)),
    "tp, ep, etp": case(replace(MOE, shared_hidden=64), mesh=dict(fsdp=4, tp=2, ep=4, etp=2), bias=True),
    "pipeline": case(pp=2, vpp=2),
    "pipeline, tied, tp": case(MoEConfig(), pp=4, mesh=dict(tp=2), tied=True, position="learned"),
}  # fmt: skip


def part(model, layers, *, tp, ep, etp):
    """Elements of a GPT as small as the part of one rank: heads, widths and experts divided. A router is whole."""
    moe = replace(model.moe, experts=model.moe.experts // ep, top_k=1, hidden=model.moe.hidden // etp,
                  shared_hidden=model.moe.shared_hidden // tp, dense_layers=min(model.moe.dense_layers, layers),
                  router_bias=False, noise=False) if model.moe.experts else model.moe
    small = replace(model, layers=layers, vocab_size=model.vocab_size // tp, heads=model.heads // tp, moe=moe,
                    head_dim=model.head_width, kv_heads=model.kv_groups // tp, hidden=model.hidden // tp)
    routers = 0
    if model.moe.experts:
        missing = model.moe.experts - moe.experts
        each = missing * model.dim + model.moe.experts * (model.moe.router_bias + model.moe.noise)
        routers = (layers - moe.dense_layers) * each
    return sum(p.numel() for p in GPT(small, device="meta").parameters()) + routers


@pytest.mark.parametrize("name", CASES)
def test_parameters_of_a_rank(name):
    """Beside a model of the size of the rank's part."""
    config = CASES[name]
    c, mesh, pp = config.model, config.mesh, config.mesh.pp
    held = megatron.parameters(config, meta(config))
    stages = [sum(p.size for p in held if p.stage == stage) for stage in range(pp)]
    whole = part(c, c.layers, tp=mesh.tp, ep=mesh.ep, etp=mesh.etp)
    table = c.vocab_size // mesh.tp * c.dim
    assert sum(stages) == whole + (table if c.tied and pp > 1 else 0)
    if pp > 1:
        final = c.dim
        positions = c.seq_len * c.dim if c.position == "learned" else 0
        block = (whole - table * (1 if c.tied else 2) - final - positions) // pp
        assert stages == [block + table + positions, *[block] * (pp - 2), block + table + final]


@pytest.mark.parametrize("name", CASES)
def test_counted_parameters(name):
    """The formula's approximations, made on a counted model: all matrices but routers, norms twice."""
    config = CASES[name]
    layers = tables = 0
    for full, p in meta(config).named_parameters():
        if full in ("embed_tokens.weight", "lm_head.weight"):
            tables += p.numel()
        elif full.endswith(("norm.weight", "layernorm.weight")) and "self_attn" not in full:
            layers += 2 * p.numel()
        elif (p.ndim > 1 and "bias" not in full and "gate.weight" not in full and "embed_positions" not in full):
            layers += p.numel()
    assert megatron.counted_parameters(config) == (layers, tables)
    pp = config.mesh.pp
    most = (layers / pp + (tables if pp == 1 else meta(config).embed_tokens.weight.numel())) / config.mesh.tp
    state = 6 + 12 / config.mesh.dp if config.mesh.shards > 1 else 18
    assert megatron.weight_and_optimizer_memory(config) == pytest.approx(most * state / 2**20, rel=1e-12)


def test_ranks_of_the_context_share_the_optimizer():
    """As data-parallel ones do, and have the same parameters; but release 0.9 prints the latter's share alone."""
    context = replace(EP8, mesh=MeshConfig(fsdp=2, sp=4, ep=8))
    assert megatron.exact_memory(context, meta(context)) == megatron.exact_memory(EP8, meta(EP8))
    assert megatron.parameter_lines(context, meta(context)) == megatron.parameter_lines(EP8, meta(EP8))
    most, _ = megatron.shards(context)
    assert megatron.weight_and_optimizer_memory(context) == most * (6 + 12 / 2) / 2**20


@pytest.mark.parametrize("name", CASES)
def test_flops_formula(name):
    """Three forwards of all matrices but routers and gates; roofline's own count is checked against torch's."""
    config = CASES[name]
    c = config.model
    routers = 2 * (c.moe.experts + c.moe.shared_gate) * c.dim * (c.layers - c.moe.dense_layers) if c.moe.experts else 0
    want = 3 * config.tokens_per_step * (sum(forward_flops(c, causal=False)) - routers)
    assert megatron.num_floating_point_operations(config) == want


@pytest.mark.parametrize("name", [name for name, config in CASES.items() if config.mesh.pp == 1])
@pytest.mark.parametrize("enough", [1, 5_000, 30_000])
def test_bucket_rule(name, enough, monkeypatch):
    config = CASES[name]
    monkeypatch.setattr(megatron, "BUCKET", enough)
    monkeypatch.setattr(megatron, "PER_RANK", 0)
    held, buffers = megatron.parameters(config, meta(config)), megatron.buckets(config, meta(config))
    for expert, buffer in zip((False, True), buffers, strict=False):
        assert [p for bucket in buffer for p in bucket] == [p for p in held if p.expert == expert][::-1]
        for bucket in buffer[:-1]:
            assert sum(p.size for p in bucket) >= enough > sum(p.size for p in bucket[:-1])
    assert sum(len(buffer) for buffer in buffers) <= len(held)


def test_many_ranks_have_larger_buckets():
    many = replace(DENSE, mesh=MeshConfig(rep=2, fsdp=64), train=replace(DENSE.train, micro_batch=1))
    first = [p.size for p in megatron.buckets(many, meta(many))[0][0]]
    assert sum(first) >= 128_000_000 > sum(first[:-1])


@pytest.mark.parametrize("pp, vpp, sentence", [
    (3, 1, r"--pp 3 x --vpp 1 does not divide model.layers 4"), (1, 2, r"--vpp 2 .* needs --pp above 1"),
])  # fmt: skip
def test_pipelines_that_are_none(pp, vpp, sentence):
    with pytest.raises(ConfigError, match=sentence):
        megatron.staged(CASES["dense"], pp, vpp)
    with pytest.raises(ConfigError, match=r"for recipes without stages, but mesh.pp is 4"):
        megatron.staged(STAGES, pp, vpp)
