"""Fine-tuning: what rests has no gradient, no state and no work, on any mesh; low-rank adapters from a plain checkpoint
to a plain checkpoint; and a model that transformers has too goes on from its loss and generates its texts."""
import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import run_ranks
from test_train import data, flags, main, records  # noqa: F401

import moe_ext.ops.expert
import moe_ext.plan.__main__
import moe_ext.train
from moe_ext import checkpoint, generate, tune
from moe_ext.config import Config, ConfigError, ModelConfig, MoEConfig, TuneConfig, dumps, parse, plain
from moe_ext.data import Loader, open_data
from moe_ext.evaluate import load_run
from moe_ext.hf.families import differences
from moe_ext.model import GPT
from moe_ext.optim import build_optimizer
from moe_ext.parallel.mesh import Mesh
from moe_ext.plan.memory import memory
from moe_ext.run import carry

SIZES = dict(vocab_size=320, seq_len=32, layers=2, dim=32, heads=4, kv_heads=2, hidden=48, init_std=0.3)
MODELS = {
    "qwen3_moe": ModelConfig(**SIZES, qk_norm=True, moe=MoEConfig(experts=4, hidden=32, norm_p=1.0)),
    "gpt_oss": ModelConfig(**SIZES | dict(hidden=32), act="swiglu_oai", bias=True, sinks=True, window=8,
                           window_full_every=2, rope_scale=4.0, rope_context=8, norm_eps=1e-5,
                           moe=MoEConfig(experts=4, hidden=32, score="topk_softmax", norm_p=0.0, router_bias=True)),
}
PLAIN = dict(data__tokenizer="", data__valid="", train__device="cpu", train__dtype="fp64", train__steps=3,
             train__eval_every=0, train__save_every=0, train__keep_last=0, train__sample_tokens=0, optim__warmup=1,
             log__every=1)
MESHES = {
    "fsdp2": dict(mesh__fsdp=2, train__micro_batch=2),
    "fsdp2-ep2": dict(mesh__fsdp=2, mesh__ep=2, train__micro_batch=2),
    "tp2-etp2": dict(mesh__tp=2, mesh__etp=2),
    "pp2": dict(mesh__pp=2),
}
TUNES = {       # and the meshes on which each is tried
    "all": ({}, ["fsdp2", "fsdp2-ep2", "tp2-etp2", "pp2"]),
    "frozen": (dict(model__tune__freeze=r"embed_tokens, layers\.0, experts\.w13, layers\.1\.mlp\.gate"),
               ["fsdp2-ep2", "pp2"]),
    "last": (dict(model__tune__train="^norm, lm_head", optim__name="muon", optim__muon__ns_dtype="fp64",
                  optim__rule="embeddings: muon, norms: adamw"), ["pp2"]),      # its first stage moves nothing
    "lora": (dict(model__tune__lora_rank=4, model__tune__train="layernorm", train__save_every=2),
             ["fsdp2-ep2", "tp2-etp2", "pp2"]),
}
LORA = TUNES["lora"][0]
COLUMNS = "loss", "aux", "grad_norm", "zeros", "parameter_norm"


def ours(name):
    """A GPT with values of some size everywhere."""
    model = GPT(MODELS[name], seed=5, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel())), alpha=0.1)
    return model.eval()


def theirs(name):
    """The same model in transformers, in fp64 where it computes in fp32 (moe_ext.hf.double)."""
    transformers = pytest.importorskip("transformers")
    from moe_ext.hf.double import double
    from moe_ext.hf.families import FAMILIES
    family, found = FAMILIES[name], checkpoint.named_tensors(ours(name))
    with double():
        model = transformers.AutoModelForCausalLM.from_config(family.write(MODELS[name]), dtype=torch.float64)
    model.load_state_dict({part.name: part.of(found[of].detach()).reshape(part.shape) for of, parts
                           in family.parts(MODELS[name], list(family.layouts)[-1]).items() for part in parts})
    model.set_experts_implementation("eager")       # for fp64
    return model.eval(), double


def configured(data, folder, **options):                                                    # noqa: F811
    config = plain(parse(flags(data, folder, **PLAIN | options)))
    return dataclasses.replace(config, model=dataclasses.replace(MODELS["qwen3_moe"], tune=config.model.tune))


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):                                                           # noqa: F811
    """The run folder of an imported model."""
    folder, model = tmp_path_factory.mktemp("base") / "imported", ours("qwen3_moe")
    config = configured(data, folder.parent, log__name="imported", data__tokenizer=folder / "tokenizer.json")
    checkpoint.save(folder / "ckpt", model=model, optimizer=build_optimizer(model, config.optim), step=0,
                    loader=SimpleNamespace(state_dict=dict), config=dataclasses.asdict(config))
    (folder / "config.toml").write_text(dumps(config))
    shutil.copy(data / "tokenizer.json", folder)
    (folder / "hf").mkdir()
    (folder / "hf" / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    return folder


def fit(config, weights="", resume=""):
    moe_ext.train.fit(config, Mesh(config.mesh), resume, str(weights))


@pytest.fixture(scope="module")
def runs(data, base, tmp_path_factory):                                                     # noqa: F811
    """name of TUNES -> the run folders that it leads to from the imported model: of one process and on each mesh."""
    store = tmp_path_factory.mktemp("runs")
    configs = {name: {mesh: configured(data, store / mesh, log__name=name, **options | MESHES.get(mesh, {}))
                      for mesh in ("one", *meshes)} for name, (options, meshes) in TUNES.items()}
    for each in configs.values():
        fit(each["one"], base)
    run_ranks(2, lambda rank: [fit(config, base) for each in configs.values() for mesh, config in each.items()
                               if mesh != "one"], store)
    return {name: {mesh: config.run_folder for mesh, config in each.items()} for name, each in configs.items()}


def numbers(folder, *names):
    return [[r[name] for name in names] for r in records(folder) if names[0] in r]


# ---- on any mesh -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TUNES)
def test_it_goes_on_alike_on_any_mesh(runs, name):
    want, *others = (numbers(folder, *COLUMNS) for folder in runs[name].values())
    assert len(want) == 3 and want[2][0] < want[0][0]
    for mesh, got in zip(TUNES[name][1], others, strict=True):
        np.testing.assert_allclose([row[0] for row in got], [row[0] for row in want], rtol=1e-12, err_msg=mesh)
        np.testing.assert_allclose(got, want, rtol=1e-10, err_msg=mesh)


def test_all_begin_with_the_loss_of_transformers(data, runs):                               # noqa: F811
    model, double = theirs("qwen3_moe")
    rows = Loader(open_data(str(data / "train")).train, seq_len=32, seed=1234, batch_size=8, vocab_size=320).batch(0, 8)
    ids = torch.cat([rows.tokens, rows.targets[:, -1:]], dim=1)
    with torch.no_grad(), double():
        want = model(input_ids=ids, labels=ids).loss.item()
    for name in TUNES:
        assert numbers(runs[name]["one"], "loss")[0][0] == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("name", TUNES)
def test_what_rests_keeps_its_bits(base, runs, name):
    """And all that moves has moved; state is kept of that alone."""
    before = checkpoint.named_tensors(load_run(base).model)
    run = load_run(runs[name]["pp2"])
    for key, after in checkpoint.named_tensors(run.model).items():
        same = key in before and torch.equal(before[key], after)
        assert same != run.config.model.tune.moves(key, key.endswith(("lora_A", "lora_B"))), key
    moved = checkpoint.read_state(checkpoint.latest(runs[name]["one"] / "ckpt")).optimizer["states"]
    assert moved.keys() == {key for key, p in run.model.named_parameters() if p.requires_grad}
    assert {"all": 25, "frozen": 11, "last": 2, "lora": 28}[name] == len(moved)


def test_what_an_imported_model_brought_along_stays_beside_it(runs):
    tokenizer = SimpleNamespace(get_added_tokens_decoder=dict)
    assert generate.end_ids(runs["lora"]["pp2"], tokenizer) == [7, 9]


# ---- what rests costs nothing ----------------------------------------------------------------------------------------

def test_it_takes_the_place_of_what_another_brought(tmp_path):
    for file in ("one/hf/config.json", "two/hf/config.json", "two/hf/generation_config.json"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(file)
    for _ in range(2):
        carry(tmp_path / "one" / "ckpt" / "step-000001", tmp_path / "two")
        carry(tmp_path / "two" / "ckpt" / "step-000001", tmp_path / "two")
    assert [(p.name, p.read_text()) for p in (tmp_path / "two" / "hf").iterdir()] == [
        ("config.json", "one/hf/config.json")]


def test_what_rests_has_no_gradient_no_state_and_no_work(monkeypatch):
    """To the byte of the plan; of the experts' gradients none is computed that nobody wants."""
    wanted, backward = [], moe_ext.ops.expert._expert_mlp_backward
    monkeypatch.setattr(moe_ext.ops.expert, "_expert_mlp_backward",
                        lambda *args: wanted.append(args[-1]) or backward(*args))
    c = dataclasses.replace(MODELS["qwen3_moe"], tune=TuneConfig(freeze=r"embed_tokens, layers\.0\.mlp, w13, lm_head"))
    config = Config(model=c)
    model = GPT(c, seed=1)
    optimizer = build_optimizer(model, config.optim)
    tokens = torch.randint(320, (2, 32))
    out = model(tokens, tokens)
    (out.token_loss + out.aux_loss).backward()
    optimizer.step()
    moving = {name: p for name, p in model.named_parameters()
              if not re.search(r"embed|layers\.0\.mlp|w13|lm_head", name)}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == moving.keys()
    bits = {part: 1 << i for i, part in enumerate(("x", "w13", "", "w2", "weights"))}
    assert wanted == [bits["x"] + bits["w2"] + bits["weights"], bits["x"] + bits["weights"]]        # of layers 1, 0
    held = memory(config, "cpu")
    assert held.gradients == sum(p.nbytes for p in moving.values())
    assert held.optimizer == sum(state[key].nbytes for state in optimizer.state.values()
                                 for key in ("exp_avg", "exp_avg_sq"))
    assert model.num_parameters(moving=True) == (sum(p.numel() for p in moving.values()),
                                                 sum(p.numel() for p in moving.values()) - 2 * 32 * 32)
    plain_one = GPT(dataclasses.replace(c, tune=TuneConfig()), device="meta")
    frozen = plain_one.num_parameters()[1] - model.num_parameters(moving=True)[1] - 320 * 32    # a table multiplies not
    assert model.flops_per_token() == plain_one.flops_per_token() - 2 * frozen


def test_the_selection_bias_of_a_frozen_router_rests():
    moe = MoEConfig(experts=4, hidden=32, score="sigmoid", select_bias_rate=0.1)
    model = GPT(dataclasses.replace(MODELS["qwen3_moe"], moe=moe, tune=TuneConfig(freeze=r"layers\.0\.mlp\.gate")))
    model.update_select_bias(torch.tensor([[4, 0, 0, 0]] * 2))
    assert [layer.select_bias_E.any().item() for layer in model.moe_layers()] == [False, True]


def test_a_dry_run_says_what_moves_and_what_that_saves(data, tmp_path, monkeypatch, capsys):            # noqa: F811
    main(monkeypatch, moe_ext.train, *flags(data, tmp_path, model__tune__train="lm_head"), "--dry-run")
    rest = GPT(plain(parse(flags(data, tmp_path))).model, device="meta").num_parameters()[0] - 320 * 32
    assert (f"moving      10,240 parameters, 10,240 active per token; that the others rest saves "
            f"{3 * 4 * rest / 2**20:.1f} MiB of gradients and moments\n") in capsys.readouterr().out


# ---- adapters --------------------------------------------------------------------------------------------------------

def test_a_run_with_adapters_resumes_elsewhere(data, runs, tmp_path):                       # noqa: F811
    config = configured(data, tmp_path, log__name="lora", **LORA)
    shutil.copytree(runs["lora"]["tp2-etp2"] / "ckpt" / "step-000002", config.run_folder / "ckpt" / "step-000002")
    fit(config, resume="auto")
    np.testing.assert_allclose(numbers(config.run_folder, *COLUMNS), numbers(runs["lora"]["one"], *COLUMNS)[2:],
                               rtol=1e-10)


def test_merged_it_is_a_plain_run_that_computes_the_same(data, base, runs, tmp_path, monkeypatch, capsys):  # noqa: F811
    out = tmp_path / "merged"
    (runs["lora"]["fsdp2-ep2"] / "tokenizer.sha256").write_text("0123  tokenizer.json\n")
    main(monkeypatch, tune, "merge", runs["lora"]["fsdp2-ep2"], "--out", out)
    assert "without adapters, which computes the same" in capsys.readouterr().out
    merged, adapted = load_run(out), load_run(runs["lora"]["one"])
    assert merged.config.model == MODELS["qwen3_moe"]
    tokens = torch.randint(320, (2, 32))
    want, got, before = (run.model.logits(tokens) for run in (adapted, merged, load_run(base)))
    assert (got - want).abs().max() < 1e-12 * want.abs().max() < 1e-4 * (before - want).abs().max()
    assert (out / "hf" / "generation_config.json").is_file()
    assert (out / "tokenizer.sha256").read_text() == "0123  tokenizer.json\n"
    with pytest.raises(SystemExit, match=r"has no adapters \(model.tune.lora_rank is 0\): nothing is to be merged"):
        main(monkeypatch, tune, "merge", out, "--out", tmp_path / "again")
    with pytest.raises(SystemExit, match="merged exists: choose another folder"):
        main(monkeypatch, tune, "merge", runs["lora"]["one"], "--out", out)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_adapters_are_another_model_than_transformers_has():
    """What rests is not: that model is exported as it is."""
    model = MODELS["qwen3_moe"]
    frozen, adapted = (dataclasses.replace(model, tune=TuneConfig(**tune)) for tune in (
        dict(freeze="experts"), dict(lora_rank=4)))
    assert differences(frozen, model) == [] and differences(adapted, model) == [("model.tune.lora_rank", 4, 0)]


def test_weights_that_do_not_fit(data, runs, tmp_path):                                     # noqa: F811
    """Adapters have no place in a plain model, nor others in these; and what is narrower would be rounded."""
    for options, words in ((dict(), "step-000003 has adapters .*: add them to their matrices, .* merge .*step-000003"),
                           (LORA | dict(model__tune__lora_rank=2), "lora_A: got .* wanted"),
                           (LORA | dict(train__dtype="fp32"), "got torch.float64 .*, wanted torch.float32")):
        with pytest.raises(checkpoint.CheckpointError, match=words):
            fit(configured(data, tmp_path, **options), runs["lora"]["one"])


# ---- what is refused -------------------------------------------------------------------------------------------------

def test_a_run_goes_on_with_the_same_parameters_moving(data, runs, tmp_path, monkeypatch, capsys):         # noqa: F811
    """A dry run says so too; patterns that find the same are the same."""
    frozen = runs["frozen"]["one"] / "config.toml"
    words = r"embed_tokens.weight rested in its run, .* --model.tune.freeze 'embed_tokens, .*gate', or start a new run"
    go_on = "--resume", "auto", "--train.steps", "4", "--dry-run", "--model.tune.freeze"
    with pytest.raises(SystemExit, match=words):
        main(monkeypatch, moe_ext.train, frozen, *go_on, "layers")
    main(monkeypatch, moe_ext.train, frozen, *go_on, r"embed, layers\.0, layers\.1\.mlp\.(gate|experts.w13)")
    with pytest.raises(SystemExit, match="'expertz' is found in the name of no parameter"):
        main(monkeypatch, moe_ext.plan.__main__, frozen, "--model.tune.freeze", "expertz")


@pytest.mark.parametrize("fields, words", [
    (dict(freeze="norm, mlp.expert.w"), "tune.freeze: 'mlp.expert.w' is found in the name of no parameter; the nearest "
                                        "are .*layers.0.mlp.experts.w2_EDF"),
    (dict(train="lm_haed"), "'lm_haed' is found in the name of no parameter; the nearest are lm_head.weight"),
    (dict(lora_rank=2, lora_targets="attn, gate_porj"), "'gate_porj' is found in the name of no matrix that can have"),
    (dict(freeze="."), "leave nothing that moves"),
    (dict(lora_rank=2, freeze="lora"), "leave nothing that moves"),
    (dict(freeze="(norm"), r"model.tune.freeze: '\(norm' is no regular expression: missing \)"),
    (dict(lora_rank=-1), "model.tune.lora_rank is -1; it cannot be negative"),
    (dict(lora_rank=2, lora_alpha=0.0), "model.tune.lora_alpha is 0.0; it must be positive"),
    (dict(lora_targets="experts"), "model.tune.lora_targets is 'experts', but model.tune.lora_rank is 0"),
])
def test_patterns_that_make_no_sense(fields, words):
    with pytest.raises(ConfigError, match=words):
        tune.check(GPT(dataclasses.replace(MODELS["qwen3_moe"], tune=TuneConfig(**fields)), device="meta"))


def test_ranks_that_cannot_share_an_adapter(data, tmp_path):                                # noqa: F811
    with pytest.raises(ConfigError, match=r"mesh.fsdp \* mesh.sp 2 does not divide model.tune.lora_rank 3"):
        configured(data, tmp_path, mesh__fsdp=2, mesh__tp=2, model__tune__lora_rank=3)


# ---- texts -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MODELS)
def test_greedy_texts_are_those_of_transformers(name):
    """Up to the whole context; with several tokens that end a text, at each of them."""
    model, (other, double) = ours(name), theirs(name)
    prompts = [torch.randint(320, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 12, 1, 8)]

    def greedy(prompt, ends):
        with double():
            ids = other.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20, eos_token_id=ends or None,
                                 pad_token_id=0)[0, len(prompt):].tolist()
        return ids[:-1] if ids[-1] in ends else ids

    whole = [greedy(prompt, []) for prompt in prompts]
    ends = [whole[0][4], whole[1][7], 999]
    for stop in ([], ends):
        steps = list(generate.generate_all(model, prompts, 20, temperature=0, ends=stop))
        got = [[token for token in text if token is not None] for text in zip(*steps, strict=True)]
        assert got == [greedy(prompt, stop) for prompt in prompts]
    assert len(got[0]) <= 4 and len(got[1]) <= 7 and len(set(map(len, whole))) == 1


@pytest.mark.parametrize("files, ends", [
    ({}, [300]),
    ({"generation_config": {"eos_token_id": [3, 5]}, "config": {"eos_token_id": 4}}, [3, 5]),
    ({"generation_config": {"do_sample": True}, "config": {"eos_token_id": 4}}, [4]),
    ({"config": {"eos_token_id": None}}, [300]),
    ({"generation_config": {"eos_token_id": "</s>"}}, "eos_token_id is .*</s>.*, wanted a token id or a list"),
    ({"generation_config": []}, "holds no fields in JSON"),
])
def test_where_a_text_ends(tmp_path, files, ends):
    tokenizer = SimpleNamespace(get_added_tokens_decoder=lambda: {300: SimpleNamespace(content="</s>")})
    (tmp_path / "hf").mkdir()
    for file, fields in files.items():
        (tmp_path / "hf" / f"{file}.json").write_text(json.dumps(fields))
    if isinstance(ends, list):
        assert generate.end_ids(tmp_path, tokenizer) == ends
    else:
        with pytest.raises(ConfigError, match=ends):
            generate.end_ids(tmp_path, tokenizer)


def test_a_run_ends_its_texts_there(data, base, tmp_path):                                  # noqa: F811
    """complete() of the folder of an imported model: before the first of its two end tokens."""
    run, tokenizer = load_run(base), generate.load_tokenizer(base / "tokenizer.json")
    prompt = tokenizer.encode("the quick").ids
    whole = list(generate.generate(run.model, prompt, 20, temperature=0))
    shutil.copytree(base, tmp_path / "run")
    (tmp_path / "run" / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": [999, whole[6]]}))
    text = generate.complete(load_run(tmp_path / "run"), "the quick", 20, temperature=0)
    assert text == tokenizer.decode(prompt + whole[:whole.index(whole[6])])
