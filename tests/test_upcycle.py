"""moe_ext.upcycle: an MoE that begins as the dense model it was made of, from a checkpoint of any mesh."""

import os
import shutil
import signal
import sys
from dataclasses import replace

import pytest
import torch
from ranks import run_ranks
from test_train import RECIPE, data, flags, records, run  # noqa: F401

import moe_ext.train
from moe_ext import checkpoint, upcycle
from moe_ext.config import ConfigError, ModelConfig, MoEConfig, as_type, load, parse, plain
from moe_ext.data import IndexedDataset
from moe_ext.evaluate import evaluate, load_run
from moe_ext.model import GPT
from moe_ext.parallel.mesh import Mesh

DENSE = ModelConfig(vocab_size=64, seq_len=16, layers=3, dim=16, heads=2, hidden=24, qk_norm=True, tied=True)


def pair(model=DENSE, **moe):
    """A dense GPT with weights (and biases) of some size, and an MoE of the recipe's fields that holds NaN."""
    moe = replace(model, moe=MoEConfig(**dict(experts=8, top_k=2, hidden=24, norm_p=1.0) | moe))
    dense, wanted = (GPT(c, seed=3, dtype=torch.float64) for c in (model, moe))
    with torch.no_grad():
        for p in dense.parameters():
            p.add_(torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(p.numel())), alpha=0.2)
        for tensor in wanted.state_dict().values():
            tensor.fill_(float("nan"))
    return dense, wanted


def losses(*models):
    """The loss per token of each in evaluation, and in training with what balance and z-loss add left out."""
    tokens = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(1))
    return [(model.train(mode)(tokens[:, :-1], tokens[:, 1:]).token_loss / 32).item()
            for model in models for mode in (False, True)]


@pytest.mark.c_core
@pytest.mark.parametrize("model, moe", [
    ({}, {}),                                                               # copies
    ({}, dict(top_k=8)),                                                    # every expert
    (dict(bias=True, norm="layernorm", act="gelu", position="learned"), dict(score="topk_softmax", norm_p=0.0)),
    ({}, dict(score="sigmoid", select_bias_rate=0.1, scale=2.5, dense_layers=1)),
    ({}, dict(hidden=12, top_k=4, noise=True)),                             # two slices, two groups of them a token
    (dict(bias=True), dict(hidden=6, experts=12, top_k=4, scale=0.5)),      # four slices, one group
    (dict(bias=True), dict(hidden=8, shared_hidden=8, router_bias=True, score="topk_softmax")),     # a shared expert
    (dict(act="relu"), dict(hidden=16, shared_hidden=8, score="sigmoid", capacity_factor=8.0)),     # room for all
    (dict(bias=True), dict(hidden=8, shared_hidden=8, shared_gate=True)),   # a gate that begins at a half
    ({}, dict(hidden=12, groups=2, score="sigmoid", select_bias_rate=0.1)), # all slices of one group
    ({}, dict(score="softmax_topk", norm_p=0.0, experts=2)),                # all probabilities sum to one
], ids=str)
def test_the_function_is_preserved(model, moe):
    dense, wanted = pair(replace(DENSE, **model), **moe)
    upcycle.upcycle(dense, wanted)
    assert upcycle.weight_sum(wanted.config.moe)[1]
    before, *after = losses(dense, wanted)
    assert before > 4.0 and after == pytest.approx([before] * 3, rel=0, abs=1e-12)
    wrong = losses(dense, with_mlp_output_scaled(wanted, 1.001))[2]
    assert abs(wrong - before) > 1e-9, "a thousandth too much would be seen"


def with_mlp_output_scaled(model, factor):
    with torch.no_grad():
        model.moe_layers()[0].experts.w2_EDF.mul_(factor)
    return model


@pytest.mark.c_core
@pytest.mark.parametrize("moe", [
    dict(norm_p=0.0), dict(norm_p=2.0), dict(score="sigmoid", norm_p=0.0, hidden=12), dict(top_k=1, norm_p="auto")],
    ids=str)
def test_weights_that_sum_to_about_one_number_preserve_about_the_function(moe):
    dense, wanted = pair(**moe)
    assert not upcycle.weight_sum(wanted.config.moe)[1]
    errors = []
    for router_std in (1e-2, 1e-4):
        upcycle.upcycle(dense, wanted, router_std=router_std)
        before, _, after, _ = losses(dense, wanted)
        errors.append(abs(after - before))
    assert 1e-12 < errors[1] < errors[0] / 30 < 1e-2


@pytest.mark.c_core
def test_slices_are_dealt_out_in_virtual_groups():
    dense, wanted = pair(hidden=8, shared_hidden=8)
    upcycle.upcycle(dense, wanted)
    old, new = dense.layers[1].mlp, wanted.layers[1].mlp
    for e in range(8):
        units = slice(8 + e % 2 * 8, 16 + e % 2 * 8)
        torch.testing.assert_close(new.experts.w13_E2FD[e], torch.stack([old.gate_proj.weight[units],
                                                                         old.up_proj.weight[units]]), rtol=0, atol=0)
        torch.testing.assert_close(new.experts.w2_EDF[e], 2 * old.down_proj.weight[:, units], rtol=0, atol=0)
    rows = new.gate.weight
    assert torch.equal(rows[::2], rows[1::2]) and len({tuple(row) for row in rows[::2].tolist()}) == 4
    assert 0.0008 < rows.std() < 0.0012
    assert not torch.equal(rows, wanted.layers[2].mlp.gate.weight)
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))
    counts_LE = wanted(tokens, tokens).counts_LE
    assert torch.equal(counts_LE[:, ::2], counts_LE[:, 1::2]), "a token has both slices"
    assert (counts_LE > 0).sum() > 12, "and tokens have different groups"


@pytest.mark.c_core
def test_noise_and_drop_make_experts_differ():
    dense, wanted = pair()
    copies = pair()[1]
    upcycle.upcycle(dense, copies)
    before = copies.layers[0].mlp.experts
    upcycle.upcycle(dense, wanted, noise=0.1)
    for name, p in wanted.layers[0].mlp.experts.named_parameters():
        change = p - before.get_parameter(name)
        assert 0.09 < change.std() / before.get_parameter(name).std() < 0.11
        assert (p[0] - p[1]).abs().max() > 0.01
    upcycle.upcycle(dense, wanted, drop=0.25)
    experts = wanted.layers[0].mlp.experts
    changed_E2F = (experts.w13_E2FD != before.w13_E2FD).all(-1)
    assert (changed_E2F.sum(-1) == 6).all(), "a quarter of 24 units"
    assert torch.equal(changed_E2F[:, 0], (experts.w2_EDF != before.w2_EDF).all(1)), "the same in all three matrices"
    assert len({tuple(units) for units in changed_E2F[:, 0].tolist()}) > 4, "of each expert others"
    again = pair()[1]
    upcycle.upcycle(dense, again, drop=0.25)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), wanted.parameters(), strict=True))


@pytest.fixture(scope="module")
def dense_runs(data, tmp_path_factory):                                                     # noqa: F811
    """Six steps of recipes/debug.toml as a dense model, in one process and on two ranks, in fp64."""
    folder = tmp_path_factory.mktemp("dense")
    common = dict(train__dtype="fp64", train__steps=6, train__eval_every=0, train__save_every=0, train__device="cpu")
    alone = plain(parse([*flags(data, folder, **common), "--type", "dense"], moe_ext.train.Command))
    two = parse(flags(data, folder, **common, log__name="two", mesh__fsdp=2, train__micro_batch=2))
    two = replace(as_type(two, "dense"), log=two.log)
    moe_ext.train.train(alone)
    run_ranks(2, lambda rank: moe_ext.train.fit(two, Mesh(two.mesh), "")[1], folder)
    return alone.run_folder, two.run_folder


def command(monkeypatch, capsys, *args):
    """What `python -m moe_ext.upcycle ARGS` prints; its error, if it ends with one."""
    monkeypatch.setattr(sys, "argv", ["upcycle", *map(str, args)])
    try:
        upcycle.main()
    except SystemExit as end:
        return str(end.code)
    return capsys.readouterr().out


@pytest.mark.c_core
def test_from_a_run_of_any_mesh_to_a_run(data, dense_runs, tmp_path, monkeypatch, capsys):  # noqa: F811
    """A dense run becomes an MoE of the recipe it was the dense form of; that evaluates as it did, and trains on."""
    options = flags(data, tmp_path, train__dtype="fp64", train__steps=6, train__device="cpu")
    valid = IndexedDataset(data / "valid")
    for number, source in enumerate((*dense_runs, dense_runs[0] / "ckpt" / "step-000006")):
        out = tmp_path / f"moe{number}"
        said = command(monkeypatch, capsys, source, *options, "--out", out)
        assert f"2 layers of 4 experts, each one of 2 slices of the dense MLP of {source}" in said
        assert "computes exactly what that does" in said and f"--weights {out}" in said
        assert sorted(path.name for path in out.iterdir()) == ["ckpt", "config.toml", "tokenizer.json",
                                                                "tokenizer.sha256"]
        was, now = load_run(dense_runs[number % 2]), load_run(out)
        assert now.step == 0 and now.config.log.name == out.name
        loss = evaluate(was.model, was.config, valid)
        assert evaluate(now.model, now.config, valid) == pytest.approx(loss, rel=0, abs=1e-12) and loss < 5.5
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []

    folder = moe_ext.train.train(parse(options), weights=str(tmp_path / "moe0"))
    steps = [r["loss"] for r in records(folder) if "loss" in r]
    first = [r["loss"] for r in records(dense_runs[0]) if "loss" in r]
    assert steps[-1] < steps[0] < first[0] - 0.3, "it goes on where the dense run stopped"
    with pytest.raises(ConfigError, match="holds step-000000 of an earlier run"):
        moe_ext.train.train(load(tmp_path / "moe0" / "config.toml"))
    with pytest.raises(checkpoint.CheckpointError, match="start a new run with these weights: --weights"):
        moe_ext.train.train(load(tmp_path / "moe0" / "config.toml"), resume="auto")


@pytest.mark.parametrize("fields, words", [
    (["--model.moe.hidden", "48"], ["model.moe.hidden 48 does not divide the 64", "64 hidden units"]),
    (["--model.moe.shared-hidden", "64"], ["the 0 that model.moe.shared_hidden 64 leaves"]),
    (["--model.moe.hidden", "16"], ["into 4 slices", "--model.moe.top-k 2 must be a multiple of 4"]),
    (["--model.moe.hidden", "16", "--model.moe.top-k", "4", "--model.moe.experts", "8", "--model.moe.groups", "4",
      "--model.moe.top-groups", "2"], ["which must lie in one group", "--model.moe.groups 4 leaves 2 experts"]),
    (["--model.moe.experts", "3"], ["--model.moe.experts 3 must be a multiple of 2"]),
    (["--model.moe.dense-layers", "1"], ["stay dense", "--model.hidden 64", "not 1024"]),
    (["--model.moe.experts", "0"], ["the recipe is dense"]),
    (["--model.heads", "2", "--model.layers", "3", "--train.steps", "9"],
     ["model.layers: the checkpoint has 2, the recipe 3", "model.heads: the checkpoint has 4, the recipe 2"]),
    (["--model.rope-base", "5"], ["model.rope_base: the checkpoint has 10000.0, the recipe 5.0"]),
    (["--model.tune.lora-rank", "2"], ["model.tune.lora_rank is 2", "give it with --weights"]),
    (["--model.tune.freeze", "expertz"], ["'expertz' is found in the name of no parameter"]),
    (["--noise", "-1"], ["--noise is -1.0"]),
    (["--drop", "2"], ["--drop is 2.0"]),
    (["--router-std", "0"], ["--router-std is 0.0"]),
    (["--out", ""], ["--out FOLDER"]),
    (["--out", "."], ["--out . exists"]),
])
def test_what_does_not_fit_is_refused(data, dense_runs, tmp_path, monkeypatch, capsys, fields, words):   # noqa: F811
    monkeypatch.chdir(tmp_path)
    said = command(monkeypatch, capsys, dense_runs[0], *flags(data, tmp_path, train__dtype="fp64"), "--out", "new",
                   *fields)
    said += capsys.readouterr().err
    for word in words:
        assert word in said
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_wrong_sources(data, dense_runs, tmp_path, monkeypatch, capsys):                    # noqa: F811
    def refused(source, *more):
        return command(monkeypatch, capsys, source, RECIPE, "--out", tmp_path / "new", *more)

    assert "neither a checkpoint" in refused(tmp_path / "nowhere")
    shutil.copytree(dense_runs[0] / "ckpt" / "step-000006", broken := tmp_path / "broken")
    (file,) = broken.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    assert "use an earlier checkpoint" in refused(broken, "--train.dtype", "fp64")
    (tmp_path / "file").write_text("")
    moe = run(data, tmp_path, train__steps=4, train__save_every=0, train__sample_tokens=0)
    assert "the source is an MoE of 4 experts: give a dense model" in refused(moe)
    with monkeypatch.context() as patch:
        state = checkpoint.read_state(dense_runs[0] / "ckpt" / "step-000006")
        state.config["model"]["tune"]["lora_rank"] = 2
        patch.setattr(checkpoint, "read_state", lambda _: state)
        assert "has adapters (model.tune.lora_rank), which belong into the matrices first" in refused(
            dense_runs[0], "--model.tune.lora-rank", "2")
    assert "usage: python -m moe_ext.upcycle DENSE" in command(monkeypatch, capsys, RECIPE)
    assert not (tmp_path / "new").exists()
    said = command(monkeypatch, capsys, dense_runs[0], RECIPE, "--out", tmp_path / "file" / "new")
    assert "cannot be written" in said


def test_a_save_that_fails_leaves_nothing(dense_runs, tmp_path, monkeypatch):
    def fails(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(upcycle, "write", fails)
    with pytest.raises(OSError, match="No space"):
        upcycle.convert(dense_runs[0], load(RECIPE), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing_half_made(tmp_path, monkeypatch, number, status):
    """As in a command, whose Ctrl-C moe_ext ends without an exception."""
    def interrupted(number, frame):
        os._exit(130)
    before = signal.getsignal(signal.SIGINT)
    if (pid := os.fork()) == 0:
        try:
            monkeypatch.setattr(moe_ext, "interrupted", interrupted, raising=False)
            signal.signal(signal.SIGINT, interrupted)
            with upcycle.whole(tmp_path / "out") as work:
                (work / "half").write_text("")
                signal.raise_signal(number)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(signal.SIGINT) is before
    with upcycle.whole(tmp_path / "out"):
        pass
    assert signal.getsignal(signal.SIGINT) is before and (tmp_path / "out").is_dir()
