"""moe_ext.megatron: what it writes and reads, with the real megatron-core's GPTModel and dist_checkpointing."""
import importlib.util
import multiprocessing
import os
import queue
import shutil
import traceback
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, fields, replace
from enum import Enum
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from ranks import fork, run_ranks

from moe_ext import checkpoint, megatron
from moe_ext.checkpoint import CheckpointError
from moe_ext.config import Config, ConfigError, ModelConfig, MoEConfig, TrainConfig, dumps, load
from moe_ext.model import GPT
from moe_ext.optim import build_optimizer

real = pytest.mark.skipif(importlib.util.find_spec("megatron") is None,
                          reason="pip install --no-deps -r requirements-parity.txt")
SMALL = dict(vocab_size=48, seq_len=12, layers=2, dim=16, heads=4, hidden=24)
MODELS = {
    "gpt2": ModelConfig(**SMALL, bias=True, norm="layernorm", act="gelu", position="learned", tied=True),
    "qwen": ModelConfig(**SMALL, kv_heads=2, head_dim=8, qk_norm=True, rope_fraction=0.5, rope_base=500.0,
                        attention_bias="qkv", act="geglu", norm_eps=1e-5, rope_scale=2.0,
                        rope_stretch="linear"),
    "mixtral": ModelConfig(**SMALL, kv_heads=2, window=3, moe=MoEConfig(experts=4, top_k=2, hidden=12)),
    "switch": ModelConfig(**SMALL, act="relu", moe=MoEConfig(experts=4, top_k=1, hidden=12, norm_p=0, scale=1.5)),
    "deepseek": ModelConfig(**SMALL | dict(layers=3), kv_heads=2, qk_norm=True, moe=MoEConfig(
        experts=8, top_k=2, hidden=12, dense_layers=1, shared_hidden=20, score="sigmoid", select_bias_rate=0.1,
        scale=2.5, groups=4, top_groups=1), rope_scale=4.0, rope_context=8, rope_stretch="yarn_rounded"),
    "qwen2-moe": ModelConfig(**SMALL, rope_scale=4.0, rope_context=8192, rope_stretch="llama3", moe=MoEConfig(
        experts=8, top_k=4, hidden=12, norm_p=0, shared_hidden=20, shared_gate=True, groups=4, top_groups=2)),
    "gpt-oss": ModelConfig(**SMALL, kv_heads=1, bias=True, act="swiglu_oai", sinks=True, window=4, window_full_every=2,
                           rope_scale=4.0, rope_context=8, moe=MoEConfig(experts=4, top_k=2, hidden=12,
                                                                         score="topk_softmax", router_bias=True)),
}
TOKENS = torch.randint(48, (2, 12), generator=torch.Generator().manual_seed(0))
# between its logits and ours: Megatron's sigmoid of the router and YaRN's ramp are fp32 whatever the rest is
TOLERANCE = dict.fromkeys(MODELS, 1e-12) | {"deepseek": 1e-5, "gpt-oss": 1e-5, "qwen2-moe": 1e-5}
WITHOUT_A_FLAG = {"gelu": (False, F.gelu), "geglu": (True, F.gelu), "relu": (False, F.relu)}    # act: gated, function


def config_of(name, dtype="fp64"):
    return replace(Config(), model=MODELS[name], train=TrainConfig(dtype=dtype))


def random_model(c, seed, dtype=torch.float64):
    """A GPT all of whose tensors matter: no norm is 1, no bias 0. All hold fp32 numbers, as Megatron's expert bias."""
    model, generator = GPT(c, seed=seed, dtype=dtype), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in checkpoint.named_tensors(model).values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.2).copy_(tensor.float())
    return model.eval()


def save(folder, config, model, step=12):
    return checkpoint.save(folder / "ckpt", model=model, optimizer=build_optimizer(model, config.optim), step=step,
                           loader=SimpleNamespace(state_dict=dict), config=asdict(config))


def loaded(folder, config):
    model = GPT(config.model, seed=9, dtype=torch.float64 if config.train.dtype == "fp64" else torch.float32)
    checkpoint.load(checkpoint.latest(folder / "ckpt"), model=model, config=asdict(config))
    return model.eval()


def equal(a, b):
    a, b = checkpoint.named_tensors(a), checkpoint.named_tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- megatron-core on a CPU ------------------------------------------------------------------------------------------
def stub_what_is_missing():
    """megatron-core asks for CUDA and TransformerEngine where there are none; its router's softmax becomes fp64."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as writer
    import megatron.core.transformer.dot_product_attention as attention
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils

    ones = torch.ones
    torch.ones = lambda *args, device=None, **options: ones(*args, device=None if device == "cuda" else device,
                                                            **options)
    softmax = torch.softmax
    torch.softmax = lambda x, dim, dtype=None: softmax(x, dim)
    torch.cuda.current_device, torch.cuda.synchronize = (lambda: torch.device("cpu")), lambda *_: None
    moe_utils.te_general_gemm = None        # a NameError where TransformerEngine is absent
    random.get_cuda_rng_tracker = attention.tensor_parallel.get_cuda_rng_tracker = lambda *_, **__: SimpleNamespace(
        fork=lambda *_: nullcontext())
    results = queue.Queue()
    writer._get_write_results_queue = lambda *_: results
    multiprocessing.set_start_method("fork", force=True)


def gpt_model(args, act, pre_process=True, post_process=True, **parallel):
    """GPTModel of Megatron-LM's arguments, as its core_transformer_config_from_args makes it."""
    from megatron.core.activations import quick_gelu
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    gated, function = WITHOUT_A_FLAG.get(act, (True, quick_gelu if args.quick_geglu else F.silu))
    known = {field.name for field in fields(TransformerConfig)}
    values = {name: value for name, value in vars(args).items() if name in known}
    if args.num_experts:
        values |= dict(num_moe_experts=args.num_experts, moe_token_dispatcher_type="allgather",
                       moe_router_load_balancing_type="none", moe_grouped_gemm=False)
    if not args.group_query_attention:
        values["num_query_groups"] = None
    c = TransformerConfig(**values | dict(
        layernorm_epsilon=args.norm_epsilon, gated_linear_unit=gated, activation_func=function,
        bias_activation_fusion=False, masked_softmax_fusion=False, hidden_dropout=0.0, attention_dropout=0.0,
        use_cpu_initialization=True, params_dtype=torch.float64) | parallel)
    for name, value in vars(args).items():
        if name.startswith("yarn_"):
            setattr(c, name, value)
    if isinstance(c.moe_layer_freq, list):
        spec = get_gpt_decoder_block_spec(c, use_transformer_engine=False, normalization=args.normalization)
    else:
        spec = get_gpt_layer_local_spec(args.num_experts, False, args.qk_layernorm, normalization=args.normalization)
    rope = {} if args.position_embedding_type == "learned_absolute" else dict(
        rotary_base=args.rotary_base, rotary_percent=args.rotary_percent, rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=getattr(args, "rope_scaling_factor", 8.0),
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor)
    model = GPTModel(c, spec, args.padded_vocab_size, args.max_position_embeddings,
                     share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
                     position_embedding_type=args.position_embedding_type, pre_process=pre_process,
                     post_process=post_process, **rope)
    if args.position_embedding_type == "rope" and not args.use_rope_scaling:      # in fp64 what it has in fp32
        columns = int(args.kv_channels * args.rotary_percent)
        model.rotary_pos_emb.inv_freq = args.rotary_base ** (-torch.arange(0, columns, 2).double() / columns)
    return model.double().eval()


def theirs(model):
    S = TOKENS.shape[1]
    with torch.no_grad():
        return model(TOKENS, torch.arange(S).expand(2, S), torch.ones(1, 1, S, S).triu(1).bool())


def load_and_save(folder, rank):
    """Of each model: the logits of what we exported, and which names only one side has; then the logits of other
    weights, which Megatron saves."""
    from megatron.core import dist_checkpointing, parallel_state
    parallel_state.initialize_model_parallel()
    found = {}
    for name, c in MODELS.items():
        path = str(folder / name / "out" / "iter_0000012")
        common = dist_checkpointing.load_common_state_dict(path)
        model = gpt_model(common["args"], c.act)
        state, surplus, missing = dist_checkpointing.load(model.sharded_state_dict(), path, strict="return_all")
        model.load_state_dict({key: value for key, value in state.items() if key not in common})
        ours = theirs(model)
        torch.manual_seed(1)
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.add_(torch.randn(tensor.shape), alpha=0.2)
        path = folder / name / "megatron" / "iter_0000007"
        path.mkdir(parents=True)
        dist_checkpointing.save(dict(args=common["args"], iteration=7, **model.sharded_state_dict()), str(path))
        (path.parent / "latest_checkpointed_iteration.txt").write_text("7\n")
        found[name] = ours, surplus, missing, theirs(model)
    return found


def padded(folder, rank):
    """A model whose vocabulary is padded to 64 ids, as make_vocab_size_divisible_by does: its logits."""
    from megatron.core import dist_checkpointing, parallel_state
    parallel_state.initialize_model_parallel()
    path = str(folder / "mixtral" / "out" / "iter_0000012")
    common = dist_checkpointing.load_common_state_dict(path)
    common["args"].padded_vocab_size = 64
    model = gpt_model(common["args"], "swiglu")
    state = dist_checkpointing.load(model.sharded_state_dict(), path)
    model.load_state_dict({key: value for key, value in state.items() if key not in common})
    return theirs(model)


SHARED = {"deepseek": dict(tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1),
          "mixtral": dict(pipeline_model_parallel_size=2)}


def reshard(folder, rank):
    """Two ranks, each with half of every matrix and of the experts, or with half of the layers, load what we exported
    and save what they have. -> how many values each has."""
    from megatron.core import dist_checkpointing, parallel_state
    held = {}
    for name, parallel in SHARED.items():
        parallel_state.initialize_model_parallel(**parallel)
        path = str(folder / name / "out" / "iter_0000012")
        common = dist_checkpointing.load_common_state_dict(path)
        stages = parallel.get("pipeline_model_parallel_size", 1)
        model = gpt_model(common["args"], "swiglu", pipeline_dtype=torch.float64, **parallel,
                          pre_process=rank == 0 or stages == 1, post_process=rank == 1 or stages == 1)
        state = dist_checkpointing.load(model.sharded_state_dict(), path)
        model.load_state_dict({key: value for key, value in state.items() if key not in common})
        path = folder / name / "two_ranks"
        path.mkdir(exist_ok=True)
        dist_checkpointing.save(dict(args=common["args"], **model.sharded_state_dict()), str(path))
        held[name] = sum(parameter.numel() for parameter in model.parameters())
        parallel_state.destroy_model_parallel()
    return held


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """folder, {name: results of load_and_save}, {name: our models}. A child imports Megatron, and its children it."""
    folder, models = tmp_path_factory.mktemp("megatron"), {}
    for name, c in MODELS.items():
        models[name] = random_model(c, 3)
        save(folder / name, config_of(name), models[name])
        megatron.export(folder / name, folder / name / "out")
    child = fork()
    if child == 0:
        try:
            stub_what_is_missing()
            torch.save([*run_ranks(1, partial(load_and_save, folder)), *run_ranks(1, partial(padded, folder)),
                        *run_ranks(2, partial(reshard, folder))], folder / "found.pt")
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return folder, torch.load(folder / "found.pt"), models


@real
@pytest.mark.parametrize("name", MODELS)
def test_megatron_loads_what_we_write(both, name):
    _, (found, *_), models = both
    logits, surplus, missing, _ = found[name]
    wanted = models[name].logits(TOKENS)
    assert not missing
    assert all(key.endswith(("_extra_state", "pre_mlp_layernorm.weight")) for key in surplus)   # TransformerEngine's
    assert (logits - wanted).abs().max() < TOLERANCE[name] and wanted.std() > 0.1


@real
@pytest.mark.parametrize("name", MODELS)
def test_we_load_what_megatron_writes(both, name):
    folder, (found, *_), models = both
    said = megatron.convert(folder / name / "megatron", config_of(name), folder / name / "back")
    model = loaded(folder / name / "back", config_of(name))
    assert (model.logits(TOKENS) - found[name][3]).abs().max() < TOLERANCE[name]
    assert not equal(model, models[name]) and "iter_0000007" in said


@real
def test_a_padded_vocabulary(both):
    """Rows beyond ours are zero, and so are their logits."""
    _, (_, logits, *_), models = both
    assert (logits[..., :48] - models["mixtral"].logits(TOKENS)).abs().max() < 1e-12
    assert logits.shape[-1] == 64 and not logits[..., 48:].any()


@real
@pytest.mark.parametrize("name", SHARED)
def test_ranks_of_megatron_share_what_we_write(both, name):
    """Bit for bit, and so we read what two ranks wrote."""
    folder, (_, _, *held), models = both
    assert all(values[name] < 0.7 * models[name].num_parameters()[0] for values in held)
    megatron.convert(folder / name / "two_ranks", config_of(name), folder / name / "of_two")
    assert equal(loaded(folder / name / "of_two", config_of(name)), models[name])


# ---- without megatron-core -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """folder/NAME/ckpt of fp32 models, folder/NAME/out what export makes of it; and the models."""
    folder, models = tmp_path_factory.mktemp("made"), {}
    for name in ("gpt2", "deepseek", "gpt-oss"):
        models[name] = random_model(MODELS[name], 4, torch.float32)
        save(folder / name, config_of(name, "fp32"), models[name])
        megatron.export(folder / name, folder / name / "out")
    return folder, models


@pytest.mark.parametrize("name", ["gpt2", "deepseek", "gpt-oss"])
def test_there_and_back_is_bitwise_and_a_block_at_a_time(made, tmp_path, name):
    folder, models = made
    config = config_of(name, "fp32")
    megatron.convert(folder / name / "out", config, tmp_path / "back")
    assert equal(loaded(tmp_path / "back", config), models[name])
    layers, last = config.model.layers, tmp_path / "back" / "ckpt" / "step-000000"
    assert len(list((folder / name / "out" / "iter_0000012").glob("__*.distcp"))) == 1 + layers
    assert len(list(last.glob("*.safetensors"))) == 1 + layers
    config_read = replace(load(tmp_path / "back" / "config.toml"), log=config.log)
    assert config_read.model == config.model
    assert checkpoint.read_state(last).config["model"] == asdict(config)["model"]


class Setting(Enum):
    """A class that a reader of common.pt does not have."""
    ON = 1


def test_a_checkpoint_of_a_bf16_run(made, tmp_path):
    """Weights in bf16 are taken exactly; its optimizer and random numbers, and classes of Megatron-LM's, are left."""
    folder, models = made
    source = folder / "gpt2" / "out" / "iter_0000012"
    stored = megatron.open_stored(source)
    tensors = {name: stored.read(name, [0] * len(md.size), torch.empty(md.size)).bfloat16()
               for name, md in stored.tensors.items() if "_extra_state" not in name}
    beside = {"optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.ones(3), "rng_state": torch.ones(2),
              "chained_0.optimizer.state.fp32_param.output_layer.weight": torch.ones(2)}
    iteration = tmp_path / "iter_0000003"
    with checkpoint.dcp_errors("not saved"):        # and no warning
        dcp.save(tensors | beside, storage_writer=dcp.FileSystemWriter(iteration), no_dist=True)
    shutil.copy(source / "metadata.json", iteration)
    common = torch.load(source / "common.pt", weights_only=False)
    common["args"].attention_backend = Setting.ON
    torch.save(common, iteration / "common.pt")
    said = megatron.convert(iteration, config_of("gpt2", "fp32"), tmp_path / "back")
    assert "3 of its optimizer" in said
    assert equal(loaded(tmp_path / "back", config_of("gpt2", "fp32")), deepcopy(models["gpt2"]).bfloat16().float())


def test_the_commands(made, tmp_path, monkeypatch, capsys):
    folder, models = made

    def run(*args):
        monkeypatch.setattr("sys.argv", ["moe_ext.megatron", *map(str, args)])
        megatron.main()
        return capsys.readouterr().out

    run("export", folder / "deepseek" / "ckpt" / "step-000012", "--out", tmp_path / "out")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dumps(config_of("deepseek", "fp32")))
    said = run("import", tmp_path / "out", recipe, "--out", tmp_path / "run", "--optim.lr", "0.5")
    assert f"--weights {tmp_path / 'run'}" in said and load(tmp_path / "run" / "config.toml").optim.lr == 0.5
    assert equal(loaded(tmp_path / "run", config_of("deepseek", "fp32")), models["deepseek"])
    for args in ((), ("export",), ("import", tmp_path / "out"), ("import", tmp_path / "out", recipe), ("move", "a")):
        with pytest.raises(SystemExit, match=r"usage|--out RUN"):
            run(*args)
    assert "import FOLDER RECIPE.toml" in run("--help")


# ---- bad input -------------------------------------------------------------------------------------------------------
def refused(action, tmp_path, *says, error=(ConfigError, CheckpointError, FileNotFoundError)):
    """Says what is wrong, and leaves nothing behind."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error) as raised:
        action()
    for words in says:
        assert words in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("model, says", [
    (dict(norm="layernorm"), "model.norm layernorm without model.bias"),
    (dict(norm="layernorm", bias=True, qk_norm=True), "model.qk_norm with model.norm layernorm"),
    (dict(qk_norm=True, qk_norm_over="width"), "model.qk_norm_over 'width'"),
    (dict(attention_bias="all"), "model.attention_bias all with model.bias False"),
    (dict(bias=True, attention_bias="none"), "model.attention_bias none with model.bias True"),
    (dict(moe=MoEConfig(experts=4, noise=True)), "model.moe.noise True"),
    (dict(moe=MoEConfig(experts=4, router_bias=True)), "model.moe.router_bias True with model.bias False"),
    (dict(bias=True, moe=MoEConfig(experts=4, router_bias=True, shared_hidden=8)), "model.moe.shared_hidden with"),
    (dict(moe=MoEConfig(experts=4, select_bias_rate=0.1)), "model.moe.select_bias_rate with model.moe.score softmax"),
    (dict(moe=MoEConfig(experts=4, norm_p=2.0)), "model.moe.norm_p 2.0 with model.moe.score softmax_topk"),
    (dict(moe=MoEConfig(experts=4, score="sigmoid", norm_p=0.0)), "model.moe.norm_p 0.0 with model.moe.score sigmoid"),
], ids=str)
def test_what_megatron_lacks_is_named(tmp_path, model, says):
    config = replace(Config(), model=ModelConfig(**SMALL | model))
    save(tmp_path, config, GPT(config.model))
    refused(lambda: megatron.export(tmp_path, tmp_path / "out"), tmp_path, "lacks what this model has", says)


def cut(file):
    file.write_bytes(file.read_bytes()[:-60])


@pytest.mark.parametrize("damage, says", [
    (lambda at: (at / "metadata.json").unlink(), ["holds no metadata.json", "torch_dist"]),
    (lambda at: (at / "common.pt").unlink(), ["holds no common.pt"]),
    (lambda at: (at / ".metadata").unlink(), ["holds no .metadata"]),
    (lambda at: (at / "metadata.json").write_text('{"sharded_backend": "zarr"}'), ["format zarr, wanted torch_dist"]),
    (lambda at: (at / "metadata.json").write_text('{"shard'), ["metadata.json", "damaged"]),
    (lambda at: cut(at / "common.pt"), ["common.pt", "damaged"]),
    (lambda at: cut(at / ".metadata"), [".metadata", "damaged"]),
    (lambda at: (at / "__2_0.distcp").unlink(), ["__2_0.distcp: missing"]),
    (lambda at: cut(at / "__2_0.distcp"), ["__2_0.distcp: truncated at"]),
    (lambda at: (at / "__2_0.distcp").write_bytes(bytes((at / "__2_0.distcp").stat().st_size)), ["damaged file"]),
    (lambda at: (at.parent / "latest_checkpointed_iteration.txt").write_text("13"), ["iter_0000013 is no checkpoint"]),
], ids=lambda value: value[0] if isinstance(value, list) else "")
def test_a_damaged_folder(made, tmp_path, damage, says):
    shutil.copytree(made[0] / "deepseek" / "out", tmp_path / "theirs")
    damage(tmp_path / "theirs" / "iter_0000012")
    refused(lambda: megatron.convert(tmp_path / "theirs", config_of("deepseek", "fp32"), tmp_path / "run"), tmp_path,
            *says)


@pytest.mark.parametrize("model, says", [
    (dict(layers=4), ["num_layers: the checkpoint has 3, this recipe wants 4"]),
    (dict(rope_base=500.0), ["rotary_base: the checkpoint has 10000.0, this recipe wants 500.0"]),
    (dict(window=4), ["window_size: the checkpoint has None, this recipe wants (3, 0)"]),
    (dict(hidden=32), ["decoder.layers.0.mlp.linear_fc1.weight: got torch.float32 [48, 16]", "[64, 16]"]),
    (dict(vocab_size=40), ["embedding.word_embeddings.weight", "[48, 16]", "--model.vocab-size 48"]),
    (dict(kv_heads=4), ["self_attention.linear_qkv.weight", "[32, 16]", "[48, 16]"]),
    (dict(attention_bias="qkv"), ["3 tensors missing from the checkpoint: decoder.layers.0.self_attention."]),
    (dict(moe=dict(scale=1.0)), ["moe_router_topk_scaling_factor: the checkpoint has 2.5"]),
    (dict(moe=dict(shared_hidden=0)), ["4 tensors without a place", "decoder.layers.1.mlp.shared_experts.linear_fc1"]),
    (dict(moe=dict(experts=16)), ["num_experts: the checkpoint has 8"]),
], ids=str)
def test_a_checkpoint_of_another_model(made, tmp_path, model, says):
    config = config_of("deepseek", "fp32")
    model = {**model, "moe": replace(config.model.moe, **model.get("moe", {}))}
    config = replace(config, model=replace(config.model, **model))
    refused(lambda: megatron.convert(made[0] / "deepseek" / "out", config, tmp_path / "run"), tmp_path, *says)


def test_other_bad_input(made, tmp_path):
    out, config = made[0] / "deepseek" / "out", config_of("deepseek", "fp32")
    (tmp_path / "there").mkdir()
    refused(lambda: megatron.convert(out, config, tmp_path / "there"), tmp_path, "there exists")
    refused(lambda: megatron.export(made[0] / "deepseek", tmp_path / "there"), tmp_path, "there exists")
    refused(lambda: megatron.export(tmp_path, tmp_path / "out"), tmp_path, "neither a checkpoint")
    refused(lambda: megatron.convert(tmp_path, config, tmp_path / "run"), tmp_path, "holds no metadata.json")
    shutil.copytree(made[0] / "deepseek" / "ckpt", tmp_path / "run" / "ckpt")
    (shard,) = (tmp_path / "run").rglob("*.safetensors")
    cut(shard)
    refused(lambda: megatron.export(tmp_path / "run", tmp_path / "out"), tmp_path, "truncated or damaged .safetensors")
    save(tmp_path / "fp64", config_of("gpt2"), GPT(MODELS["gpt2"], dtype=torch.float64))
    megatron.export(tmp_path / "fp64", tmp_path / "wide")
    refused(lambda: megatron.convert(tmp_path / "wide", config_of("gpt2", "fp32"), tmp_path / "narrow"), tmp_path,
            "got torch.float64 [48, 16], wanted torch.float32 or what converts to it exactly")
