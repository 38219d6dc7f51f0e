"""moe_ext.hf: whole checkpoints of transformers in, out and compared; what does not fit is refused, none half made."""
import errno
import json
import shutil
import sys
import weakref
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_train import data  # noqa: F401

import moe_ext.train
from moe_ext import checkpoint, snapshot
from moe_ext.checkpoint import CheckpointError
from moe_ext.config import ConfigError, MeshConfig, TuneConfig, load, parse
from moe_ext.hf import convert, files
from moe_ext.hf.__main__ import main
from moe_ext.hf.compare import compare
from moe_ext.model import GPT
from moe_ext.optim import build_optimizer
from moe_ext.parallel import shard
from moe_ext.parallel.mesh import Mesh
from moe_ext.upcycle import empty

transformers = pytest.importorskip("transformers")

SMALL = dict(vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8, intermediate_size=24, max_position_embeddings=64)
FAMILIES = {
    "qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, norm_topk_prob=True,
                      mlp_only_layers=[0], tie_word_embeddings=True),
    "qwen2_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
                      shared_expert_intermediate_size=12),
    "olmoe": dict(num_experts=4, num_experts_per_tok=2, num_key_value_heads=4, head_dim=4),
    "mixtral": dict(num_local_experts=4, sliding_window=5),
    "glm4_moe": dict(n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=8, n_shared_experts=1,
                     n_group=4, topk_group=2, routed_scaling_factor=2.5, use_qk_norm=True, attention_bias=True,
                     first_k_dense_replace=1, partial_rotary_factor=0.5, num_nextn_predict_layers=1),
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=6,
                    layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "llama": dict(attention_bias=True), "qwen3": dict(tie_word_embeddings=True),
}


def theirs(name, folder, **options):
    """A tiny model with random weights, saved in bf16 but for what theirs keep in fp32. options: of save_pretrained."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **SMALL | FAMILIES[name] | {
        "pad_token_id": None, "bos_token_id": 1, "eos_token_id": [2, 3]})
    model = transformers.AutoModelForCausalLM.from_config(config)
    for tensor in model.state_dict().values():
        tensor.normal_(0.5 if tensor.ndim == 1 else 0, 0.3)
    kept = {key: x.clone() for key, x in model.state_dict().items() if name == "glm4_moe" and ".mlp.gate." in key}
    model.bfloat16()
    for key, value in kept.items():
        model.state_dict(keep_vars=True)[key].data = value
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(NAME) -> the folder of a model of theirs, and a run that it was imported to."""
    made, root = {}, tmp_path_factory.mktemp("theirs")
    transformers.utils.logging.disable_progress_bar()

    def get(name):
        if name not in made:
            folder = theirs(name, root / name, max_shard_size="8KB")
            said = convert.import_(folder, root / f"{name}-run")
            made[name] = SimpleNamespace(folder=folder, run=root / f"{name}-run", said=said)
        return made[name]
    return get


def tensors(folder):
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def same(folder, other):
    """Names, dtypes and every bit."""
    mine, its = tensors(folder), tensors(other)
    return mine.keys() == its.keys() and all(
        x.dtype == its[name].dtype and torch.equal(x, its[name]) for name, x in mine.items())


def changed(folder, to, change):
    """A copy in one file, whose tensors `change` has changed."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("model*"))
    held = tensors(folder)
    change(held)
    save_file({name: x.contiguous() for name, x in held.items()}, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_is_bitwise_and_the_same_model(saved, tmp_path, name):
    there = saved(name)
    said = convert.export(there.run, tmp_path / "back", max_shard_size="8KB")
    assert same(there.folder, tmp_path / "back")
    for file in ("config.json", "generation_config.json"):
        mine, its = (json.loads((folder / file).read_text()) for folder in (tmp_path / "back", there.folder))
        assert mine == its | ({"num_nextn_predict_layers": 0} if name == "glm4_moe" and file[0] == "c" else {})
    mine, its = (json.loads((folder / files.INDEX).read_text()) for folder in (tmp_path / "back", there.folder))
    assert mine["metadata"] == its["metadata"] and mine["weight_map"].keys() == its["weight_map"].keys()
    assert f"{mine['metadata']['total_parameters']:,} parameters in bf16" in said and "parameters in bf16" in there.said

    said, agree = compare(there.run, tmp_path / "back", tokens=24)
    assert agree, said
    assert f"{len(tensors(there.folder))} equal\n" in said


def run_of(there, to, **model):
    """A run with other values in every tensor, in fp32: of a training of the imported one."""
    config = load(there.run / "config.toml")
    config = replace(config, model=replace(config.model, **model))
    gpt = empty(config)
    checkpoint.load(checkpoint.latest(there.run / "ckpt"), model=gpt)
    with torch.no_grad():
        for tensor in gpt.state_dict().values():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)), alpha=1e-3)
    optimizer = build_optimizer(gpt, config.optim)
    checkpoint.save(to / "ckpt", model=gpt, optimizer=optimizer, step=7, loader=SimpleNamespace(state_dict=dict),
                    config=asdict(config))
    return to


def test_a_run_of_our_own_goes_out_in_fp32_and_comes_back_bitwise(saved, tmp_path):
    run = run_of(saved("glm4_moe"), tmp_path / "run", seq_len=32, tune=TuneConfig(freeze="experts"))
    said = convert.export(run, tmp_path / "out", layout="fused")
    assert "glm4_moe of" in said and "in fp32, layout fused" in said and "no tokenizer" in said
    assert tensors(tmp_path / "out")["model.layers.1.mlp.experts.gate_up_proj"].dtype == torch.float32
    convert.import_(tmp_path / "out", tmp_path / "again")
    before, after = (tensors(checkpoint.latest(folder / "ckpt")) for folder in (run, tmp_path / "again"))
    assert len(before) > 30
    assert all(torch.equal(x, after[name]) for name, x in before.items() if name.startswith("model."))
    assert load(tmp_path / "again" / "config.toml").model.seq_len == 32
    assert compare(run, tmp_path / "out", tokens=24)[1]


def test_bf16_leaves_the_selection_bias_and_its_router_in_fp32(saved, tmp_path):
    """As theirs do; and as imported is bf16 only as long as that holds the bias."""
    there = saved("glm4_moe")
    run = run_of(there, tmp_path / "run")
    convert.export(run, tmp_path / "out", dtype="bf16")
    ours, out = tensors(checkpoint.latest(run / "ckpt")), tensors(tmp_path / "out")
    for layer in (1, 2):
        gate = f"layers.{layer}.mlp.gate"
        assert torch.equal(out[f"model.{gate}.weight"], ours[f"model.{gate}.weight"])
        bias = out[f"model.{gate}.e_score_correction_bias"]
        assert bias.dtype == torch.float32 and torch.equal(bias, ours[f"model.layers.{layer}.mlp.select_bias_E"])
    assert {x.dtype for name, x in out.items() if ".gate." not in name} == {torch.bfloat16}

    def round_bias(held):
        for name, x in held.items():
            held[name] = x.bfloat16()
    rounded = changed(there.folder, tmp_path / "rounded", round_bias)
    convert.import_(rounded, tmp_path / "second")
    convert.export(tmp_path / "second", tmp_path / "third")
    assert same(rounded, tmp_path / "third")
    trained = run_of(SimpleNamespace(run=tmp_path / "second"), tmp_path / "trained")
    convert.export(trained, tmp_path / "fourth", like=rounded)
    assert {name for name, x in tensors(tmp_path / "fourth").items() if x.dtype == torch.float32} == {
        f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)}


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=2, ep=2), MeshConfig(pp=2, tp=2, fsdp=1)], ids=["fsdp-ep", "pp-tp"])
def test_a_checkpoint_of_any_mesh_goes_out_as_one_process_has_it(saved, tmp_path, mesh):
    """An imported run starts on the mesh, saves, and what that gives is the imported folder."""
    there = saved("qwen3_moe")
    config = replace(load(there.run / "config.toml"), mesh=mesh)

    def rank_of(rank):
        model = shard.build(config, Mesh(config.mesh))
        checkpoint.load(there.run / "ckpt" / "step-000000", model=model)
        checkpoint.save(tmp_path / "run" / "ckpt", model=model, optimizer=build_optimizer(model, config.optim), step=3,
                        loader=SimpleNamespace(state_dict=dict), config=asdict(config))
    run_ranks(mesh.world, rank_of, tmp_path)
    assert len(list((tmp_path / "run" / "ckpt" / "step-000003").glob("*.safetensors"))) == mesh.world
    convert.export(there.run, tmp_path / "one")
    convert.export(tmp_path / "run", tmp_path / "mesh", like=there.run)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "mesh" / file).read_bytes()
    assert same(there.folder, tmp_path / "mesh")


def test_a_run_begins_with_the_imported_weights_and_its_tokenizer_goes_along(saved, data, tmp_path):    # noqa: F811
    folder = tmp_path / "theirs"
    shutil.copytree(theirs("qwen3_moe", folder), tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    grown = transformers.AutoModelForCausalLM.from_pretrained(folder)
    grown.resize_token_embeddings(320)
    grown.save_pretrained(folder)
    shutil.copyfile(data / "tokenizer.json", folder / "tokenizer.json")
    for name, text in {"tokenizer_config.json": '{"eos_token": "def", "tokenizer_class": "PreTrainedTokenizerFast"}',
                       "chat_template.jinja": "{{ messages }}", "LICENSE": "free", "README.md": "a card",
                       "additional_chat_templates/tool.jinja": "{{ tools }}", "spm.model": "pieces"}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    said = convert.import_(folder, tmp_path / "run", seq_len=16)
    assert f"model.seq_len is 16 of max_position_embeddings {config['max_position_embeddings']}" in said
    recipe = [str(tmp_path / "run" / "config.toml"), "--log.name", "new", "--data.train", str(data / "train"),
              "--train.steps", "1", "--optim.warmup", "0", "--train.sample-tokens", "2", "--train.dtype", "fp32"]
    run = moe_ext.train.train(parse(recipe), weights=str(tmp_path / "run"))
    log = (run / "run.log").read_text()
    assert "weights from" in log and "sample: def " in log
    convert.export(run, tmp_path / "out")
    out = tmp_path / "out"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "generation_config.json",
                 "additional_chat_templates/tool.jinja", "spm.model"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert not (out / "README.md").exists()
    written = json.loads((out / "config.json").read_text())
    assert written == json.loads((folder / "config.json").read_text())
    assert all(x.dtype == torch.bfloat16 for x in tensors(out).values()) and not same(folder, out)


def test_the_tokenizer_of_our_own_run_is_one_for_transformers(saved, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    run = run_of(saved("llama"), tmp_path / "run")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:39]
    ours = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    ours.pre_tokenizer, ours.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ours.add_special_tokens(["<|endoftext|>"])
    ours.save(str(run / "tokenizer.json"))
    convert.export(run, tmp_path / "out")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "(1 + 2) * 3 / 4"
    assert loaded(text)["input_ids"] == ours.encode(text).ids and loaded.eos_token_id == 39
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 39
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == 39
    convert.export(run, tmp_path / "other", like=saved("llama").run)
    assert (tmp_path / "other" / "tokenizer_config.json").is_file()


# ---- faults, which must be seen --------------------------------------------------------------------------------------
def swap(held):
    gate, up = (f"model.layers.1.mlp.experts.2.{which}_proj.weight" for which in ("gate", "up"))
    held[gate], held[up] = held[up], held[gate]


def round_one(held):
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    held[name] = held[name].bfloat16().float()


@pytest.mark.parametrize("name, fault, words", [
    ("qwen3_moe", swap, "2 differ: model.layers.1.mlp.experts.2.gate_proj.weight"),
    ("glm4_moe", round_one, "1 differ: model.layers.2.mlp.gate.e_score_correction_bias"),
], ids=["gate and up swapped", "a rounded bias"])
def test_compare_sees(saved, tmp_path, name, fault, words):
    there = saved(name)
    said, agree = compare(there.run, changed(there.folder, tmp_path / "wrong", fault), tokens=24)
    assert words in said and not agree and "NOT the same" in said


def drop(name):
    return lambda held: held.pop(name)


def other_shape(held):
    held["model.norm.weight"] = torch.zeros(7)


def of_integers(held):
    held["model.norm.weight"] = held["model.norm.weight"].to(torch.int8)


def more(held):
    held["model.layers.1.mlp.experts.4.up_proj.weight"] = torch.zeros(8, 16)


EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.mark.parametrize("fault, words", [
    (drop(EXPERT), f"missing: {EXPERT}"),
    (other_shape, r"model.norm.weight F32 \[7\] instead of \[16\]"),
    (of_integers, r"model.norm.weight I8 \[16\] instead of \[16\] in fp64, fp32, fp16, bf16"),
    (more, "not known: model.layers.1.mlp.experts.4.up_proj.weight"),
    (lambda held: held.update({"lm_head.weight": torch.zeros(40, 16)}), "not known: lm_head.weight"),
], ids=["an expert less", "shape", "dtype", "an expert more", "another head than the embeddings"])
def test_every_tensor_is_accounted_for_by_name(saved, tmp_path, fault, words):
    folder = changed(saved("qwen3_moe").folder, tmp_path / "wrong", fault)
    with pytest.raises(CheckpointError, match=words):
        convert.import_(folder, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["wrong"]


def test_what_may_be_left_out_is_said(saved, tmp_path):
    def add(held):
        held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        held["model.layers.3.eh_proj.weight"] = torch.zeros(16, 32)     # behind the three: of num_nextn_predict_layers
    there = saved("glm4_moe")
    said = convert.import_(changed(there.folder, tmp_path / "more", add), tmp_path / "run")
    assert "RoPE's frequencies, which the GPT computes (1 tensors)" in said and "multi-token prediction" in said
    convert.export(tmp_path / "run", tmp_path / "back")
    assert same(there.folder, tmp_path / "back")

    def tie(held):
        held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    said = convert.import_(changed(saved("qwen3").folder, tmp_path / "tied", tie), tmp_path / "tied-run")
    assert "the head, which is the embeddings" in said

    def tie_in_eight_bits(held):
        held["lm_head.weight"] = held["model.embed_tokens.weight"].to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=r"not known: lm_head\.weight"):
        convert.import_(changed(saved("qwen3").folder, tmp_path / "eight", tie_in_eight_bits), tmp_path / "none")


FOLDERS = {     # what is done to a folder of four shards -> what is said
    "no index": (lambda f: (f / files.INDEX).unlink(), "model-00001-of-.*, but no model.safetensors.index.json"),
    "no shard": (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), "names model-00002.*not there: copy all"),
    "nothing": (lambda f: [path.unlink() for path in f.glob("model*")], "neither model.safetensors nor"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "truncated": (lambda f: cut(f / "model-00002-of-00003.safetensors", -9), "truncated or damaged"),
    "cut in its header": (lambda f: cut(f / "model-00002-of-00003.safetensors", 99), "cut off in its header"),
    "a pointer": (lambda f: (f / "model-00002-of-00003.safetensors").write_text("version https://git-lfs.github.com"),
                  "git lfs pull"),
    "an index of another": (lambda f: (f / files.INDEX).write_text((f / files.INDEX).read_text().replace(
        "layers.1.", "layers.9.")), r"names model.layers.9.*not there: index and shards are of two checkpoints"),
    "no index but text": (lambda f: (f / files.INDEX).write_text("{"), "damaged, or no index"),
    "another config": (lambda f: setting(f, num_hidden_layers=4), r"(?s)missing: model.layers.3"),
    "an option": (lambda f: setting(f, hidden_act="relu"), "hidden_act"),
    "another architecture": (lambda f: setting(f, model_type="gpt2"), "model_type is gpt2, wanted one of"),
    "quantised": (lambda f: setting(f, quantization_config={"quant_method": "fp8"}), "fp8, wanted mxfp4 or none"),
    "refused by theirs": (lambda f: setting(f, hidden_size="wide"), "config.json: transformers refuses it"),
    "no fields": (lambda f: (f / "config.json").write_text("[]"), r"config.json is damaged \(list, wanted fields\)"),
    "no name": (lambda f: setting(f, model_type=None), "model_type is None, wanted one of"),
    "a tokenizer of LFS": (lambda f: (f / "tokenizer.json").write_text("version https://git-lfs.github.com"),
                           "tokenizer.json is no tokenizer"),
    "adapters": (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "only adapters of peft: merge_"),
    "a cache": (lambda f: (f / "config.json").rename(made(f / "snapshots" / "0a1b") / "config.json"),
                "holds no config.json: give .*snapshots/0a1b"),
}


def made(folder):
    folder.mkdir(parents=True)
    return folder


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def setting(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("fault", FOLDERS)
def test_a_folder_that_is_damaged_or_of_another_model_is_refused(saved, tmp_path, fault):
    change, words = FOLDERS[fault]
    folder = shutil.copytree(saved("qwen3_moe").folder, tmp_path / "wrong")
    change(folder)
    with pytest.raises((ConfigError, CheckpointError), match=words):
        convert.import_(folder, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["wrong"]


@pytest.mark.parametrize("options, words", [
    (dict(dtype="int8"), "--dtype is int8, wanted as-imported, fp64"),
    (dict(max_shard_size="5 apples"), "--max-shard-size is '5 apples', wanted a number and KB"),
    (dict(family="mixtral"), "mixtral does not have .*qk_norm"),
    (dict(family="qwen3-moe"), "--family is qwen3-moe, .*did you mean qwen3_moe"),
    (dict(layout="fuse"), "did you mean fused"),
    (dict(dtype="as-imported"), "--dtype as-imported, but .* was not imported"),
    (dict(dtype="fp16"), "model.norm.weight has values up to 1e.06, beyond what fp16 holds: give --dtype bf16"),
    (dict(model=dict(tune=TuneConfig(lora_rank=2))), "has adapters .* python -m moe_ext.tune merge"),
    (dict(model=dict(norm="layernorm")), "(?s)no architecture .*qwen3_moe does not have .*model.norm 'layernorm'"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")
def test_an_export_that_cannot_be_is_refused(saved, tmp_path, options, words):
    config = load(saved("qwen3_moe").run / "config.toml")
    config = replace(config, model=replace(config.model, **options.pop("model", {})))
    gpt = GPT(config.model)
    gpt.norm.weight.data.fill_(1e6)
    checkpoint.save(tmp_path / "run" / "ckpt", model=gpt, optimizer=build_optimizer(gpt, config.optim), step=0,
                    loader=SimpleNamespace(state_dict=dict), config=asdict(config))
    with pytest.raises((ConfigError, CheckpointError), match=words):
        convert.export(tmp_path / "run", tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_is_there_stays_and_an_interruption_leaves_nothing(saved, tmp_path, monkeypatch):
    there, out = saved("qwen3_moe"), tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("")
    for action in (lambda to: convert.export(there.run, to), lambda to: convert.import_(there.folder, to)):
        with pytest.raises(ConfigError, match="out exists: choose another folder"):
            action(out)
        reads = iter(range(9))

        def read(stored, read=files.Stored.read, reads=reads):
            if next(reads) == 8:
                raise KeyboardInterrupt
            return read(stored)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(files.Stored, "read", read)
            action(tmp_path / "new")
        assert [path.name for path in tmp_path.iterdir()] == ["out"] and [p.name for p in out.iterdir()] == ["mine"]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")      # as a write does, without a name
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left on device: .*new"):
        patch.setattr(snapshot, "write", full)
        convert.export(there.run, tmp_path / "new")
    with pytest.raises(ConfigError, match="hf is where a run keeps what an import brought"):
        convert.export(run_of(there, tmp_path / "run"), tmp_path / "run" / "hf")


def test_versions_of_transformers(monkeypatch, recwarn):
    convert.check_transformers()
    assert not recwarn.list
    monkeypatch.setattr("transformers.__version__", "6.1.0rc1")
    with pytest.warns(UserWarning, match=r"transformers is 6\.1\.0rc1; 5.24.0 is what this was tried with"):
        convert.check_transformers()
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    with pytest.raises(ConfigError, match=r"is 4\.57\.1, whose configs are of another form .* pip install"):
        convert.check_transformers()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r'cannot be imported .*: pip install "moe_ext\[hf\]"'):
        convert.check_transformers()


# ---- gpt-oss as it is published --------------------------------------------------------------------------------------
def test_mxfp4_is_read_as_transformers_dequantises_it(saved, tmp_path):
    """All pairs of numbers with all scales, bit for bit; then a whole model."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(1, 256, 16).contiguous()
    save_file({"x_blocks": blocks, "x_scales": scales}, tmp_path / "all.safetensors")
    found = files.unpacked(files.tensors([tmp_path / "all.safetensors"]))
    x, wanted = found["x"].read(), convert_moe_packed_tensors(blocks, scales)
    assert found["x"].dtype == "BF16" and found["x"].shape == tuple(x.shape) == wanted.shape == (1, 512, 256)
    assert torch.equal(x.view(torch.int16), wanted.view(torch.int16))

    wide = dict(hidden_size=32, intermediate_size=32)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("gpt_oss", **SMALL | FAMILIES["gpt_oss"] | wide)
    model = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
    for tensor in model.state_dict().values():
        tensor.normal_(0, 0.3)
    packed, plain = {}, {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            blocks = torch.randint(256, (4, tensor.shape[2], 1, 16), dtype=torch.uint8)
            scales = torch.randint(120, 126, (4, tensor.shape[2], 1), dtype=torch.uint8)
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            plain[name] = convert_moe_packed_tensors(blocks, scales)
        else:
            packed[name] = plain[name] = tensor.clone()
    for name, held in (("packed", packed), ("plain", plain)):
        config.save_pretrained(tmp_path / name)
        save_file({key: x.contiguous() for key, x in held.items()}, tmp_path / name / "model.safetensors",
                  {"format": "pt"})
    setting(tmp_path / "packed", quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    said = convert.import_(tmp_path / "packed", tmp_path / "run")
    assert "6 tensors were MXFP4 and are bf16 now" in said
    convert.export(tmp_path / "run", tmp_path / "back")
    assert same(tmp_path / "plain", tmp_path / "back")
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    said, agree = compare(tmp_path / "run", tmp_path / "packed", tokens=24)
    assert agree, said


# ---- memory, and the command -----------------------------------------------------------------------------------------
def test_one_tensor_at_a_time(saved, tmp_path, monkeypatch):
    """What is in memory at once is the largest tensor of ours and one of theirs, not the model."""
    held, most = {}, 0

    def watched(x):
        nonlocal most
        held[id(x)] = weakref.ref(x)
        alive = [y for ref in held.values() if (y := ref()) is not None]
        most = max(most, sum({y.data_ptr(): y.nbytes for y in alive}.values()))     # a detached one is the same memory
        return x
    monkeypatch.setattr(files.Stored, "read", lambda stored, read=files.Stored.read: watched(read(stored)))
    monkeypatch.setattr(snapshot, "memory", lambda x, memory=snapshot.memory: memory(watched(x)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, make=torch.empty_like, **more: watched(make(*args, **more)))
    there = saved("glm4_moe")
    ours = [x.nbytes for x in tensors(there.run / "ckpt" / "step-000000").values() if x.dtype == torch.float32]
    largest, total = max(ours), sum(ours)
    for folder, action in ((there.folder, lambda: convert.import_(there.folder, tmp_path / "run")),
                           (tmp_path / "back", lambda: convert.export(tmp_path / "run", tmp_path / "back"))):
        most = 0
        action()
        assert largest <= most <= largest + max(x.nbytes for x in tensors(folder).values()) < total / 2


def test_the_command_says_what_is_wrong_in_a_sentence(saved, tmp_path, monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["moe_ext.hf", *map(str, args)])
        main()
    there = saved("qwen3_moe")
    with pytest.raises(SystemExit, match=r"error: .*nowhere"):
        run("import", tmp_path / "nowhere", "--out", tmp_path / "run")
    with pytest.raises(SystemExit, match=r"error: .*neither a checkpoint"):
        run("export", tmp_path, "--out", tmp_path / "out")
    with pytest.raises(SystemExit, match=r"error: .*is another model than"):
        run("compare", there.run, saved("llama").folder)
    run("compare", there.run, there.folder, "--tokens", 16)
    assert "the same qwen3_moe to 1e-12" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        run("compare", there.run, changed(there.folder, tmp_path / "wrong", swap), "--tokens", 16)
    assert end.value.code == 1 and "NOT the same" in capsys.readouterr().out
