"""Every recipe has the parameters that its model was published with, and can be dense, capacity or dropless.

Counts of published models were taken once from transformers 5.24 (sum of p.numel() over parameters()) with the model on
the meta device and the configuration as its config.json has it: MixtralForCausalLM, Qwen3MoeForCausalLM,
OlmoeForCausalLM, Glm4MoeForCausalLM (which has no layer for multi-token prediction) and GptOssForCausalLM. Active ones
are that less (E - K) / E of the parameters below `.experts.`; the cards' 12.9 B, 3.3 B, 1.3 B, 12 B and 3.6 B agree
(the last two leave the embedding out). The others were printed by the runs that the recipes repeat, or follow from what
these printed, as the tests below say.
"""
import functools
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from moe_ext import train
from moe_ext.config import (
    TYPES,
    Config,
    ConfigError,
    LogConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    TuneConfig,
    as_type,
    dumps,
    load,
    parse,
)
from moe_ext.model import GPT
from moe_ext.ops.expert import GATED
from moe_ext.optim.groups import choices
from moe_ext.parallel.stages import cut
from moe_ext.parallel.tensor import COLUMNS, ROWS, SLICED
from moe_ext.plan import megatron
from moe_ext.plan.roofline import DEVICES
from moe_ext.plan.search import fits

FOLDER = Path(__file__).parent.parent / "recipes"
COUNTS = {      # total, active per token
    "moe_gpt2_4e": (407_127_600, 237_092_400),
    "moe_gpt2_8e": (1_310_885_984, 404_252_768),
    "gpt_0b9": (913_215_488, 913_215_488),
    "gpt_0b9_pipeline": (913_215_488, 913_215_488),
    "moe_exp_dense": (213_148_160, 213_148_160),
    "moe_exp_capacity": (4_375_732_736, 213_934_592),
    "moe_exp_dropless": (4_375_732_736, 213_934_592),
    "mixtral_8x7b": (46_702_792_704, 12_879_925_248),
    "qwen3_30b_a3b": (30_532_122_624, 3_353_032_704),
    "olmoe_1b_7b": (6_919_161_856, 1_282_017_280),
    "glm_4.5_air": (106_852_245_504, 13_424_123_904),
    "gpt_oss_20b": (20_914_757_184, 4_187_440_704),
    "long_32k": (4_396_416, 2_037_120),
    "finetune_frozen": (9_448_192, 4_729_600),
    "finetune_lora": (9_841_408, 4_877_056),
    "moe_20m": (19_415_040, 12_337_152),
    "moe_60m": (60_422_400, 28_571_904),
    "moe_150m": (142_718_976, 57_784_320),
    "moe_350m": (336_761_088, 124_424_448),
    "moe_1b": (982_027_264, 189_303_808),
}
RECIPES = sorted(path.stem for path in FOLDER.glob("*.toml"))


@functools.cache
def recipe(name):
    return load(FOLDER / f"{name}.toml")


@functools.cache
def meta(model: ModelConfig):
    return GPT(model, device="meta")


def test_there_is_a_count_for_every_recipe():
    assert set(RECIPES) - {"debug", "tiny", "compare"} == set(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name):
    assert meta(recipe(name).model).num_parameters() == COUNTS[name]


@pytest.mark.parametrize("name", COUNTS)
def test_the_comment_says_counts_and_command(name):
    """The recipe's own text: both counts, and a command that starts as many ranks as its mesh has."""
    comment = (FOLDER / f"{name}.toml").read_text().split("\n[")[0]
    comment = re.sub(r"\n# *", " ", comment)
    for count in COUNTS[name]:
        assert f"{count:,}" in comment
    assert f"recipes/{name}.toml" in comment.split("moe_ext.train")[1]
    ranks = re.search(r"torchrun (?:--standalone|--nnodes (\d+)) --nproc-per-node (\d+)", comment)
    assert (int(ranks[1] or 1) * int(ranks[2]) if ranks else 1) == recipe(name).mesh.world


@pytest.mark.parametrize("name", [name for name in COUNTS if re.fullmatch(r"moe_\d+[mb]", name)])
def test_small_ones_train_compute_optimally(name):
    config = recipe(name)
    tokens = config.train.steps * config.tokens_per_step
    assert tokens == pytest.approx(20 * COUNTS[name][1], rel=0.02)
    assert config.mesh.world == 1


PUBLISHED = {   # what counts do not show, as config.json, the paper or the run's log has it
    "moe_gpt2_8e": dict(seq_len=2048, heads=16, moe=dict(noise=True, balance_form="mse", balance_weight=0.01)),
    "gpt_0b9": dict(seq_len=2048, heads=32, norm_eps=1e-5, dropout=0.1, init_std=0.006, position="learned"),
    "moe_exp_dropless": dict(rope_base=1e5, heads=4, kv_heads=1, moe=dict(top_k=1, score="softmax_topk")),
    "mixtral_8x7b": dict(rope_base=1e6, norm_eps=1e-5, heads=32, kv_heads=8, seq_len=32768,
                         moe=dict(score="topk_softmax", norm_p=0.0, balance_weight=0.02)),
    "qwen3_30b_a3b": dict(rope_base=1e6, norm_eps=1e-6, heads=32, kv_heads=4, qk_norm_over="head",
                          moe=dict(score="softmax_topk", norm_p=1.0, balance_weight=0.001)),
    "olmoe_1b_7b": dict(rope_base=1e4, norm_eps=1e-5, heads=16, qk_norm_over="width",
                        moe=dict(score="softmax_topk", norm_p=0.0, balance_weight=0.01, z_weight=0.001)),
    "glm_4.5_air": dict(rope_base=1e6, rope_fraction=0.5, norm_eps=1e-5, heads=96, kv_heads=8, qk_norm=False,
                        moe=dict(score="sigmoid", norm_p=1.0, scale=1.0, select_bias_rate=0.001, balance_weight=1e-4)),
    "gpt_oss_20b": dict(rope_base=150000.0, rope_scale=32.0, rope_context=4096, norm_eps=1e-5, heads=64, kv_heads=8,
                        window=128, window_full_every=2, act="swiglu_oai",
                        moe=dict(score="topk_softmax", norm_p=0.0, balance_weight=0.9)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_choices(name):
    model = asdict(recipe(name).model)
    wanted = dict(PUBLISHED[name])
    moe = wanted.pop("moe", {})
    assert {field: model[field] for field in wanted} == wanted
    assert {field: model["moe"][field] for field in moe} == moe


@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_has_the_optimizer_of_its_kind(name):
    model = meta(recipe(name).model)
    kinds = {"embeddings": r"embed_(tokens|positions)\.weight|lm_head\.weight",
             "experts": r".*\.(w13_E2FD|w2_EDF|w\d+_lora_[AB])", "matrices": r".*(_proj|mlp\.gate)\.(weight|lora_[AB])",
             "norms": r".*(norm\.weight|bias|sinks|noise_E|b13_E2F|b2_ED)"}
    for optimizer in ("muon", "shampoo"):
        chosen = choices(model, OptimConfig(optimizer))
        assert chosen.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
        for parameter, choice in chosen.items():
            assert re.fullmatch(kinds[choice.kind], parameter), (parameter, choice)
            assert choice.optimizer == (optimizer if choice.kind in ("matrices", "experts") else "adamw")


def test_megatrons_counts_follow():
    """moe_exp: the printed totals have no router and each norm twice. gpt_0b9: what TP 2 x PP 4 printed per rank."""
    for name, printed in (("moe_exp_dense", 213_173_248), ("moe_exp_dropless", 4_374_971_392)):
        parameters = dict(meta(recipe(name).model).named_parameters())
        router = sum(p.numel() for name, p in parameters.items() if ".gate." in name)
        norms = sum(p.numel() for name, p in parameters.items() if "norm" in name)
        assert COUNTS[name][0] - router + norms == printed

    whole = re.compile(r"norm|embed_positions|(o|down)_proj\.bias")     # on both TP ranks
    ranks = [0, 0, 0, 0]
    for name, p in meta(recipe("gpt_0b9").model).named_parameters():
        share = p.numel() if whole.search(name) else p.numel() // 2
        block = re.match(r"layers\.(\d+)", name)
        stages = [int(block[1]) // 4] if block else [3] if name.startswith("norm") else \
            [0] if "positions" in name else [0, 3]      # the tied table
        for stage in stages:
            ranks[stage] += share
    assert ranks == [156_577_792, 100_741_120, 100_741_120, 152_387_584]


def test_the_pieces_of_the_published_pipeline():
    """gpt_0b9_pipeline on the meta device: what a rank of each stage computes with, to the parameter; and its estimate
    of weights and optimizer, beside the exact one."""
    config = recipe("gpt_0b9_pipeline")
    assert replace(config.model, dropout=0.1) == recipe("gpt_0b9").model and config.sequences_per_step == 16
    split = re.compile("|".join(f"(?:{names.pattern})" for names in (ROWS, COLUMNS, SLICED)))
    held = [0] * 4
    for number, blocks in enumerate(cut(config)):
        piece = GPT(config.model, device="meta", blocks=blocks)
        held[number % 4] += sum(p.numel() // (2 if split.search(name) else 1) for name, p in piece.named_parameters())
    assert len(cut(config)) == 16 and held == [156_577_792, 100_741_120, 100_741_120, 152_387_584]
    lines = megatron.parameter_lines(config, meta(config.model)).splitlines()
    assert lines == [f" > number of parameters on (tensor, pipeline) model parallel rank ({t}, {p}): {held[p]}"
                     for p in range(4) for t in range(2)]
    assert f"{megatron.weight_and_optimizer_memory(config):.2f}" == "2614.79"
    assert f"{megatron.exact_memory(config, meta(config.model))[0]:.2f}" == "2687.84"


def test_tokens_per_step():
    for name, tokens in (("moe_gpt2_8e", 524_288), ("gpt_0b9", 16 * 2048), ("moe_exp_dense", 64 * 2048),
                         ("moe_exp_capacity", 64 * 2048), ("moe_exp_dropless", 64 * 2048), ("olmoe_1b_7b", 1024 * 4096),
                         ("glm_4.5_air", 16384 * 4096)):
        assert recipe(name).tokens_per_step == tokens, name
    assert recipe("moe_exp_dropless").mesh.ep == recipe("moe_exp_capacity").mesh.ep == 4


def test_recipes_fit_the_gpus_that_docs_name():
    """In the last column of the table, "8 of 80 GB", and by the planner's rule: nine tenths of it."""
    rows = re.findall(r"^\| `(\w[\w.]*)` .*\| (\d+) of (\d+) GB \|$", (FOLDER.parent / "docs/recipes.md").read_text(),
                      re.M)
    assert len(rows) >= 13
    for name, ranks, gigabytes in rows:
        device = replace(DEVICES["h100"], memory=int(gigabytes))
        assert recipe(name).mesh.world == int(ranks) and fits(recipe(name), device), name


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_in_three_types(name):
    """Each builds, and differs from the dense one by what its router multiplies with, to the FLOP; all of it moving."""
    config = recipe(name)
    config = replace(config, model=replace(config.model, tune=TuneConfig()))
    dense = as_type(config, "dense")
    assert dense.model.moe.experts == 0 and dense.mesh.ep == dense.mesh.etp == 1
    assert (dense.mesh.world, dense.tokens_per_step) == (config.mesh.world, config.tokens_per_step)
    kinds = {kind: as_type(config, kind) for kind in ("capacity", "dropless")}
    assert kinds["dropless"].model.moe.capacity_factor == 0
    assert kinds["capacity"].model.moe.capacity_factor == 1 and kinds["capacity"].model.moe.drop_by == "probability"
    for typed in kinds.values():
        moe, c = typed.model.moe, typed.model
        assert moe.experts > moe.top_k
        if config.model.moe.experts:
            assert replace(typed.model, moe=config.model.moe) == config.model and typed.mesh == config.mesh
        model = meta(typed.model)
        router = sum(p.numel() for name, p in model.named_parameters() if ".gate." in name or "noise_E" in name)
        down_biases = (moe.top_k - 1 + bool(moe.shared_hidden)) * c.dim * len(model.moe_layers()) if c.bias else 0
        matrices = 3 if c.act in GATED else 2
        first = moe.dense_layers * matrices * c.dim * (c.hidden - dense.model.hidden)   # these become as wide as others
        assert model.flops_per_token() - meta(dense.model).flops_per_token() == 6 * (router + down_biases + first)


def test_a_type_keeps_what_the_recipe_says():
    moe = MoEConfig(experts=6, top_k=3, hidden=40, shared_hidden=20, capacity_factor=1.5, drop_by="position")
    config = Config(ModelConfig(hidden=77, moe=moe), log=LogConfig(name="x"))
    capacity, dropless, dense = (as_type(config, kind) for kind in ("capacity", "dropless", "dense"))
    assert capacity.model == config.model
    assert dropless.model == replace(config.model, moe=replace(moe, capacity_factor=0.0))
    assert dense.model == replace(config.model, hidden=140, moe=replace(moe, experts=0))
    assert [typed.log.name for typed in (capacity, dropless, dense)] == ["x-capacity", "x-dropless", "x-dense"]
    assert as_type(dense, "dense") == dense
    again = as_type(dense, "dropless")
    assert again.model == replace(dropless.model, hidden=140, moe=replace(dropless.model.moe, experts=12))
    assert again.log.name == "x-dropless" and as_type(Config(), "dense").log.name == ""


def test_the_switch_comes_between_recipe_and_options(tmp_path):
    path = tmp_path / "moe.toml"
    path.write_text("[model]\ndim = 64\n[model.moe]\nexperts = 4\nhidden = 96\n[mesh]\nfsdp = 2\nep = 2\n")
    typed = parse([str(path), "--type", "dense", "--train.micro-batch", "3"], train.Command)
    assert (typed.model.hidden, typed.model.moe.experts, typed.mesh.ep, typed.log.name) == (192, 0, 1, "moe-dense")
    assert typed.train.micro_batch == 3 and typed.type == "dense"
    wins = parse([str(path), "--model.hidden", "80", "--log.name", "mine", "--type=dense"], train.Command)
    assert (wins.model.hidden, wins.log.name) == (80, "mine")
    wins = parse([str(path), "--type", "capacity", "--model.moe.capacity-factor", "2"], train.Command)
    assert (wins.model.moe.capacity_factor, wins.model.moe.drop_by) == (2.0, "probability")

    (tmp_path / "config.toml").write_text(dumps(train.plain(typed)))
    assert load(tmp_path / "config.toml") == train.plain(typed), "a resume needs no switch"
    assert parse([str(path)], train.Command).model.moe.experts == 4


@pytest.mark.parametrize("text, type, words", [
    ("", "denes", ["--type: got 'denes'", "wanted one of dense, capacity, dropless", "did you mean dense?"]),
    ("", "7", ["--type: got '7'", "wanted one of"]),
    ("[model]\nhidden = 101\n", "dropless", ["the recipe is dense", "the 101", "top_k 2 experts"]),
    ("[model]\nhidden = 64\nmoe.shared_hidden = 64\n", "capacity", ["the 0 of its model.hidden", "shared_hidden"]),
    ("[model]\nhidden = 6\n[mesh]\nfsdp = 2\n", "dropless", ["mesh.efsdp 2 does not divide model.moe.hidden 3"]),
    ("[model.moe]\nexperts = 4\nhidden = 31\ntop_k = 1\n[mesh]\ntp = 2\nep = 2\n", "dense",
     ["mesh.tp 2 does not divide model.hidden 31"]),
])
def test_types_that_cannot_be(tmp_path, text, type, words):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(ConfigError) as error:
        parse([str(tmp_path / "r.toml"), "--type", type], train.Command)
    for word in words:
        assert word in str(error.value)


def test_help_tells_of_the_types(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", "--help"])
    with pytest.raises(SystemExit):
        train.main()
    said = capsys.readouterr().out
    assert "--type STR" in said and all(kind in said for kind in TYPES)
