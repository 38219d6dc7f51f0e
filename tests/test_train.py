"""The driver: it learns, repeats itself and resumes bit for bit, stops in good order and says what is wrong."""
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import moe_ext.train
from moe_ext import checkpoint, evaluate, generate
from moe_ext.checkpoint import CheckpointError
from moe_ext.config import ConfigError, load, parse
from moe_ext.data import IndexedDataset, IndexedWriter, Loader
from moe_ext.model import GPT, build

RECIPE = str(Path(__file__).parent.parent / "recipes" / "debug.toml")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sentences that mostly repeat a pattern, so that a small model learns in twenty steps; a tokenizer of 320 ids."""
    folder = tmp_path_factory.mktemp("data")
    words = "the quick brown fox jumps over the lazy dog and runs away from def return import".split()
    rng = np.random.default_rng(0)
    texts = [" ".join(words[i * j % 16] if rng.random() < 0.9 else rng.choice(words) for i in range(200))
             for j in range(60)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, part in (("train", texts[:50]), ("valid", texts[50:])):
        with IndexedWriter(folder / name, 320) as writer:
            for text in part:
                writer.add(tokenizer.encode(text).ids)
    return folder


def flags(data, folder, **options):
    """Command-line arguments; options as section__field=value."""
    options = {"data__train": data / "train", "data__valid": data / "valid", "data__tokenizer": data / "tokenizer.json",
               "log__folder": folder} | options
    return [RECIPE] + [word for name, value in options.items() for word in ("--" + name.replace("__", "."), str(value))]


def run(data, folder, resume="", **options):
    return moe_ext.train.train(parse(flags(data, folder, **options)), resume)


def tensors(folder, step):
    """All tensors of a checkpoint: parameters, optimizer state, random state."""
    path = folder / "ckpt" / f"step-{step:06d}"
    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


def assert_same_checkpoint(a, b, step):
    first, second = tensors(a, step), tensors(b, step)
    assert first.keys() == second.keys() and len(first) > 50
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (checkpoint.read_state(a / "ckpt" / f"step-{step:06d}").loader
            == checkpoint.read_state(b / "ckpt" / f"step-{step:06d}").loader)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """Twenty steps without a stop; checkpoints at 7, 14, 20."""
    return run(data, tmp_path_factory.mktemp("straight"), train__save_every=7, train__keep_last=0)


def test_loss_falls_and_the_run_folder_is_whole(straight):
    steps = [r for r in records(straight) if "loss" in r]
    evaluations = [r for r in records(straight) if "valid_loss" in r]
    samples = Loader(IndexedDataset(load(straight / "config.toml").data.train), seq_len=32, batch_size=8).samples
    assert [r["epoch"] for r in steps] == [step * 8 / samples for step in (1, 5, 10, 15, 20)]
    assert [r["step"] for r in steps] == [1, 5, 10, 15, 20] and [r["step"] for r in evaluations] == [10, 20]
    assert abs(steps[0]["loss"] - math.log(320)) < 0.2
    assert evaluations[-1]["valid_loss"] < steps[0]["loss"] - 2.5
    assert sum(steps[-1]["counts_LE"][0]) == 2 * 4 * 32 * 2          # accumulation x rows x tokens x K
    assert {p.name for p in straight.iterdir()} - {"plot.png"} == {"config.toml", "run.log", "metrics.jsonl", "ckpt",
                                                                   "tokenizer.json", "tokenizer.sha256", "progress.txt"}
    said = (straight / "run.log").read_text()
    assert "step 20/20 | loss" in said and "unigram entropy" in said and "sample: def " in said
    assert re.search(rf"tok/s \| adamw \d+% \| epoch {160 / samples:.2f} \| load", said)


def test_the_run_folder_has_a_plot(straight):
    pytest.importorskip("matplotlib", reason="the plot needs the extra moe_ext[plot]")
    assert (straight / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_config_of_the_run_folder_repeats_it_bit_for_bit(straight, tmp_path):
    config = load(straight / "config.toml")
    again = moe_ext.train.train(dataclasses.replace(config, log=dataclasses.replace(config.log, folder=str(tmp_path))))
    assert_same_checkpoint(straight, again, 20)
    losses = [[r["loss"] for r in records(folder) if "loss" in r] for folder in (straight, again)]
    assert losses[0] == losses[1]


def test_resume_continues_bit_for_bit(data, straight, tmp_path):
    folder = tmp_path / "debug"
    shutil.copytree(straight / "ckpt" / "step-000007", folder / "ckpt" / "step-000007")
    with pytest.raises(ConfigError, match="holds step-000007 of an earlier run: continue it with --resume auto"):
        run(data, tmp_path)
    with pytest.raises(CheckpointError, match=r"model.heads: the checkpoint has 4, this run wants 2"):
        run(data, tmp_path, resume="auto", model__heads=2)
    run(data, tmp_path, resume="auto", train__save_every=7, train__keep_last=2)
    assert_same_checkpoint(straight, folder, 20)
    assert sorted(p.name for p in (folder / "ckpt").iterdir()) == ["step-000014", "step-000020"]
    assert "continuing from" in (folder / "run.log").read_text()


def test_sigterm_saves_and_the_rest_is_the_same(data, straight, tmp_path, monkeypatch):
    schedule = moe_ext.train.learning_rate

    def terminate_in_step_3(step, *rest):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return schedule(step, *rest)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(moe_ext.train, "learning_rate", terminate_in_step_3)
    folder = run(data, tmp_path)
    assert [p.name for p in (folder / "ckpt").iterdir()] == ["step-000003"]
    assert "stopped by SIGTERM after step 3" in (folder / "run.log").read_text()
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    run(data, tmp_path, resume="auto")
    assert_same_checkpoint(straight, folder, 20)


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGUSR1"])
def test_other_signals_save_too(data, tmp_path, monkeypatch, name):
    schedule = moe_ext.train.learning_rate
    monkeypatch.setattr(moe_ext.train, "learning_rate",
                        lambda step, *rest: os.kill(os.getpid(), signal.Signals[name]) or schedule(step, *rest))
    before = signal.signal(signal.Signals[name], as_usual := lambda *_: None)      # pytest may run under nohup
    try:
        folder = run(data, tmp_path)
        assert f"stopped by {name} after step 1; continue" in (folder / "run.log").read_text()
        assert [p.name for p in (folder / "ckpt").iterdir()] == ["step-000001"]
        assert signal.getsignal(signal.Signals[name]) == as_usual
    finally:
        signal.signal(signal.Signals[name], before)


def test_a_signal_that_was_ignored_stays_ignored():
    """SIGHUP under nohup, Ctrl-C in the background of a script."""
    for number in (signal.SIGHUP, signal.SIGINT):
        before = signal.signal(number, signal.SIG_IGN)
        try:
            with moe_ext.train.Stop() as stop:
                os.kill(os.getpid(), number)
                assert stop.asked == ""
                os.kill(os.getpid(), signal.SIGTERM)
                assert stop.asked == "SIGTERM"
            assert signal.getsignal(number) == signal.SIG_IGN
        finally:
            signal.signal(number, before)


def test_a_console_that_is_gone_ends_nothing(data, tmp_path):
    """The terminal closes: nobody reads what is printed, and SIGHUP comes."""
    process = subprocess.Popen([sys.executable, "-m", "moe_ext.train", *flags(data, tmp_path, train__steps=100000)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))     # nor is this nohup
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    process.stdout.close()
    log = tmp_path / "debug" / "run.log"
    while "step 15/" not in log.read_text():
        pass
    process.send_signal(signal.SIGHUP)
    try:
        assert process.wait(timeout=60) == 0 and process.stderr.read() == ""
    finally:
        process.kill()
    assert "stopped by SIGHUP after step" in log.read_text()


def test_ctrl_c_while_it_starts_is_one_line(data, tmp_path):
    process = subprocess.Popen([sys.executable, "-m", "moe_ext.train", *flags(data, tmp_path)], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    while "libtorch_cpu" not in Path(f"/proc/{process.pid}/maps").read_text():
        pass
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "\ninterrupted\n")


def test_sigterm_ends_the_process_with_status_0(data, tmp_path):
    process = subprocess.Popen([sys.executable, "-m", "moe_ext.train", *flags(data, tmp_path, train__steps=100000)],
                               stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 0
    step = int(rest.rpartition("after step ")[2].split(";")[0])
    assert checkpoint.latest(tmp_path / "debug" / "ckpt").name == f"step-{step:06d}"


def test_accumulation_changes_nothing_in_fp64(data, tmp_path):
    folders = [run(data, tmp_path / str(n), train__dtype="fp64", train__steps=4, train__accumulation=n, log__every=1,
                   train__micro_batch=8 // n, data__tokenizer="", model__moe__capacity_factor=1.0) for n in (1, 2)]
    one, two = ([(r["loss"], r["aux"], r["grad_norm"]) for r in records(f) if "loss" in r] for f in folders)
    np.testing.assert_allclose(one, two, rtol=1e-12)
    a, b = tensors(folders[0], 4), tensors(folders[1], 4)
    for name in a:
        if a[name].dtype == torch.float64:
            assert (a[name] - b[name]).abs().max() <= 1e-11 * a[name].abs().max() + 1e-13, name


def test_a_batch_ramp_begins_small_and_resumes_bit_for_bit(data, tmp_path):
    ramp = dict(train__batch_ramp="4,4,48", train__accumulation=4, train__steps=9, train__save_every=5,
                train__keep_last=0, log__every=1, data__tokenizer="")
    straight = run(data, tmp_path / "straight", **ramp)
    steps = [r for r in records(straight) if "loss" in r]
    assert [r["sequences"] for r in steps] == [4, 4, 4, 4, 8, 8, 12, 12, 16]
    assert [r["samples"] for r in steps] == [4, 8, 12, 16, 24, 32, 44, 56, 72]
    assert steps[-1]["tokens"] == 72 * 32 == load(straight / "config.toml").tokens_in_all
    assert [sum(r["counts_LE"][0]) for r in steps] == [r["sequences"] * 32 * 2 for r in steps]
    folder = run(data, tmp_path / "small", **ramp | dict(train__batch_ramp="", train__accumulation=1))
    small = [r for r in records(folder) if "loss" in r]
    assert [r["loss"] for r in small][:4] == [r["loss"] for r in steps][:4]        # means over the tokens of their step
    assert small[4]["loss"] != steps[4]["loss"]
    shutil.copytree(straight / "ckpt" / "step-000005", tmp_path / "debug" / "ckpt" / "step-000005")
    again = run(data, tmp_path, "auto", **ramp)
    assert_same_checkpoint(straight, again, 9)
    later = [r for r in records(again) if "loss" in r]
    assert [(r["loss"], r["tokens"]) for r in later] == [(r["loss"], r["tokens"]) for r in steps[5:]]
    state = checkpoint.read_state(straight / "ckpt" / "step-000005")
    assert later[0]["seconds"] > state.extra["seconds"] == steps[4]["seconds"] > 0
    lines = [line.split("\t")[3:5] for line in (again / "progress.txt").read_text().splitlines()]
    assert lines == [["Starting job", "Iteration: 5"], ["Saved checkpoint", "Iteration: 9"]]


def test_a_dry_run_knows_the_ramp(data, tmp_path, monkeypatch, capsys):
    main(monkeypatch, moe_ext.train, *flags(data, tmp_path, train__batch_ramp="4,4,48", train__accumulation=4,
                                            train__steps=9), "--dry-run")
    assert "512 per step = 4 x 4 sequences of 32; 2,304 in 9 steps, from 4 sequences per step on" in (
        capsys.readouterr().out)


def test_selection_bias_moves_once_per_step_from_all_counts(data, tmp_path):
    folder = run(data, tmp_path, model__moe__score="sigmoid", model__moe__select_bias_rate=0.5, train__steps=1,
                 optim__warmup=0, data__tokenizer="")
    counts_LE = torch.tensor(next(r for r in records(folder) if "loss" in r)["counts_LE"]).double()
    for layer, counts_E in enumerate(counts_LE):
        want = 0.5 * (counts_E.mean() - counts_E).sign()
        assert torch.equal(tensors(folder, 1)[f"model.layers.{layer}.mlp.select_bias_E"], want.float())


@pytest.mark.parametrize("options", [
    dict(train__dtype="bf16"),
    dict(model__moe__experts=0, optim__schedule="wsd"),
    dict(train__eval_every=0, data__valid="")], ids=["bf16", "dense_wsd", "no_evaluation"])
def test_other_ways_to_train(data, tmp_path, options):
    folder = run(data, tmp_path, train__steps=10, data__tokenizer="", **options)
    losses = [r["loss"] for r in records(folder) if "loss" in r]
    assert losses[-1] < losses[0] - 1


def test_recomputation_is_bitwise(data, straight, tmp_path):
    arguments = flags(data, tmp_path, train__save_every=7, train__keep_last=0)
    folder = moe_ext.train.train(parse([*arguments, "--train.recompute"]))
    assert_same_checkpoint(straight, folder, 14)


def test_profile(data, tmp_path):
    folder = run(data, tmp_path, train__steps=4, train__profile_steps=1, optim__warmup=0, data__tokenizer="")
    assert json.loads((folder / "profile" / "trace.json").read_text())["traceEvents"]
    assert "expert_mlp" in (folder / "profile" / "ops.txt").read_text()


@pytest.mark.skipif(moe_ext.has_cuda(), reason="needs a machine without CUDA")
def test_memory_snapshot_needs_cuda(data, tmp_path):
    arguments = flags(data, tmp_path, train__profile_steps=1)
    with pytest.raises(ConfigError, match=r"train.memory_snapshot records CUDA allocations, but train.device is cpu"):
        moe_ext.train.train(parse([*arguments, "--train.memory-snapshot"]))


def test_a_loss_that_is_not_finite(data, tmp_path, monkeypatch):
    def broken(config, mesh):
        model = build(config)
        torch.nn.init.constant_(model.lm_head.weight, 1e38)
        return model

    monkeypatch.setattr(moe_ext.train, "build", broken)
    with pytest.raises(FloatingPointError, match=r"step 1: the loss is (inf|nan): lower optim.lr.*no checkpoint has"):
        run(data, tmp_path)


def test_an_update_that_throws_the_weights_away(data, tmp_path):
    """What follows it is not finite; it never reaches a checkpoint."""
    with pytest.raises(FloatingPointError, match=r"lower optim.lr"):
        run(data, tmp_path, model__moe__experts=0, optim__lr=1e30, optim__warmup=0, optim__clip=0, train__save_every=1)
    saved = checkpoint.latest(tmp_path / "debug" / "ckpt")
    assert all(t.isfinite().all() for t in tensors(tmp_path / "debug", int(saved.name[5:])).values())


# ---- weights alone ---------------------------------------------------------------------------------------------------

def test_a_new_run_begins_with_the_weights_of_another(data, straight, tmp_path):
    """On other data, with nothing else of it; afterwards the run is resumed as any other."""
    still = dict(train__steps=1, optim__lr=0, optim__min_lr=0, optim__warmup=0, data__train=data / "valid")
    for name, weights in (("run", straight), ("checkpoint", straight / "ckpt" / "step-000020")):
        folder = moe_ext.train.train(parse(flags(data, tmp_path / name, **still)), weights=str(weights))
        before, after = tensors(straight, 20), tensors(folder, 1)
        for key in before.keys() - {"rng.cpu"}:             # torch's generator is that of a new run
            assert torch.equal(before[key], after[key]) == key.startswith("model."), key
        assert (after["optim.norm.weight.step"], checkpoint.read_state(folder / "ckpt" / "step-000001").loader["row"]) \
            == (1, 8)
        assert f"weights from {straight}/ckpt/step-000020, 20 steps old" in (folder / "run.log").read_text()

    moe_ext.train.train(parse(flags(data, tmp_path / name, **still | dict(train__steps=2))), "auto", "gone/by/now")
    said = (folder / "run.log").read_text().partition("continuing from")[2]
    assert f"the weights are those of {folder}/ckpt/step-000001: --weights gone/by/now was for the start" in said
    assert checkpoint.latest(folder / "ckpt").name == "step-000002"


def test_what_another_model_computes_with_the_weights_is_listed(data, straight, tmp_path):
    options = dict(train__steps=1, optim__warmup=0, model__rope_base=500.0, model__moe__scale=2.0)
    folder = moe_ext.train.train(parse(flags(data, tmp_path, **options)), weights=str(straight))
    lines = (folder / "run.log").read_text().splitlines()
    listed = lines[next(i for i, line in enumerate(lines) if line.startswith("weights from")) + 1:][:2]
    assert ["model.rope_base" in listed[0], "10000.0" in listed[0], "500.0" in listed[0]] == [True] * 3
    assert "model.moe.scale" in listed[1]


@pytest.mark.parametrize("weights, resume, words", [
    ("{straight}", "{straight}/ckpt/step-000020", r"--resume \S+ continues a run and --weights \S+ begins a new one"),
    ("{data}", "", r"--weights \S+: neither a checkpoint .* nor a run folder with one"),
    ("nowhere", "auto", r"--weights nowhere: neither a checkpoint"),
])
def test_weights_that_are_refused(data, straight, tmp_path, monkeypatch, weights, resume, words):
    given = [text.format(data=data, straight=straight) for text in (weights, resume)]
    more = ["--weights", given[0], *(["--resume", given[1]] if resume else [])]
    for dry in ([], ["--dry-run"]):
        with pytest.raises(SystemExit, match=f"^error: {words}"):
            main(monkeypatch, moe_ext.train, *flags(data, tmp_path), *more, *dry)
    assert not list(tmp_path.iterdir())


def test_weights_of_another_shape_and_the_selection_bias(data, straight, tmp_path):
    with pytest.raises(CheckpointError, match=r"model.layers.0.mlp.experts.w13_E2FD: got .*\[4, 2, 32, 32\], wanted "):
        moe_ext.train.train(parse(flags(data, tmp_path / "wide", model__moe__hidden=64)), weights=str(straight))
    biased = dict(model__moe__score="sigmoid", model__moe__select_bias_rate=0.5, train__steps=1, optim__warmup=0)
    first = run(data, tmp_path / "a", **biased)
    second = moe_ext.train.train(parse(flags(data, tmp_path / "b", **biased)), weights=str(first))
    name = "model.layers.0.mlp.select_bias_E"
    a, b = tensors(first, 1)[name], tensors(second, 1)[name]
    assert a.abs().max() == 0.5 and set((b - a).abs().tolist()) <= {0.0, 0.5}


# ---- the command line ------------------------------------------------------------------------------------------------

def main(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def test_a_rule_that_fits_no_run_is_refused_at_once(data, straight, tmp_path, monkeypatch):
    """By a run and by its rehearsal: what goes nowhere, and the state of another optimizer."""
    folder = tmp_path / "debug"
    shutil.copytree(straight / "ckpt" / "step-000007", folder / "ckpt" / "step-000007")
    for options, words in (
            (dict(optim__rule="matrices: adamw, embeddings: adamw, norms: adamw", log__name="new"),
             r"sends layers.0.mlp.experts.w13_E2FD \(experts\) nowhere: add \"experts: adamw\""),
            (dict(optim__name="muon"), r"step-000007: adamw moved layers.0.\S+, and this run's muon can do nothing "
             r"with its state: continue with --optim.name adamw, or .*: --weights .*step-000007")):
        for dry in ([], ["--dry-run"]):
            with pytest.raises(SystemExit, match=words):
                main(monkeypatch, moe_ext.train, *flags(data, tmp_path, resume="auto", **options), *dry)
    assert [path.name for path in tmp_path.iterdir()] == ["debug"]


def test_what_decides_the_state_of_shampoo_stays(data, tmp_path, monkeypatch):
    """Without the second moment a resumed run would die in its first step, or save one that stood still. What decides
    nothing may change."""
    shampoo = dict(optim__name="shampoo", optim__shampoo__precondition_frequency=2, train__eval_every=0)
    run(data, tmp_path, **shampoo, train__steps=1, optim__warmup=0, optim__shampoo__grafting="sgd")
    shampoo |= dict(train__steps=2, optim__warmup=0, resume="auto")
    for options, words in (
            (dict(optim__shampoo__grafting="adam"), r"optim.shampoo.grafting was sgd and is adam, with which Shampoo "
             r"has other state of layers.0\S+: continue with --optim.shampoo.grafting sgd, or .* --weights .*step-0*1"),
            (dict(optim__shampoo__grafting="sgd", optim__beta1=0), r"optim.beta1 was 0.9 and is 0.0, .*beta1 0.9, or"),
            (dict(optim__shampoo__grafting="sgd", optim__shampoo__max_preconditioner_dim=16),
             "dim was 2048 and is 16, .* continue with --optim.shampoo.max-preconditioner-dim 2048")):
        with pytest.raises(SystemExit, match=words):
            main(monkeypatch, moe_ext.train, *flags(data, tmp_path, **shampoo, **options), "--dry-run")
    harmless = dict(optim__shampoo__grafting="none", optim__shampoo__max_preconditioner_dim=4096)
    main(monkeypatch, moe_ext.train, *flags(data, tmp_path, **shampoo, **harmless), "--dry-run")


def test_an_overflow_moves_no_state(data, tmp_path):
    """fp16 with a scale that is far too large at first: Shampoo's and AdamW's steps are those that were not skipped."""
    folder = run(data, tmp_path, train__dtype="fp16", train__loss_scale=2.0**24, train__steps=12, log__every=1,
                 optim__name="shampoo", optim__shampoo__precondition_frequency=2, train__eval_every=0)
    skipped = sum(r["skipped"] for r in records(folder) if "loss" in r)
    steps = {float(t) for name, t in tensors(folder, 12).items() if name.endswith(".step")}
    assert 0 < skipped < 12 and steps == {12 - skipped}


def test_dry_run(data, tmp_path, monkeypatch, capsys):
    main(monkeypatch, moe_ext.train, *flags(data, tmp_path), "--dry-run")
    said = capsys.readouterr().out
    total, active = GPT(load(RECIPE).model, device="meta").num_parameters()
    for words in (f"{total:,} in all, {active:,} active", "256 per step = 2 x 4 sequences of 32; 5,120 in 20", "MiB"):
        assert words in said
    assert not list(tmp_path.iterdir())


def test_several_processes_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match=r"= 1 ranks, but 2 processes run: start 1, or take .* of 2: --mesh.fsdp 2"):
        main(monkeypatch, moe_ext.train, *flags(data, tmp_path))


def test_missing_data_is_a_sentence(data, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"error: .*nowhere.bin"):
        main(monkeypatch, moe_ext.train, *flags(data, tmp_path, data__train=tmp_path / "nowhere"))


def test_evaluate(data, straight, monkeypatch, capsys):
    main(monkeypatch, evaluate, straight)
    said = capsys.readouterr().out
    loaded = evaluate.load_run(straight)
    tokens, total = torch.from_numpy(IndexedDataset(data / "valid").tokens.astype("int64")), 0.0
    for begin in range(0, len(tokens) - 1, 32):
        row = tokens[None, begin:begin + 33]
        total += loaded.model(row[:, :-1], row[:, 1:]).token_loss.item()
    loss = float(said.removeprefix("step 20 | valid loss ").split(" |")[0])
    assert loss == pytest.approx(total / (len(tokens) - 1), abs=1e-4) and "unigram entropy" in said
    few = evaluate.evaluate(loaded.model, loaded.config, IndexedDataset(data / "valid"), 4)
    assert few == [r for r in records(straight) if "valid_loss" in r][-1]["valid_loss"]
    with pytest.raises(ConfigError, match=r"is no run folder: it holds no config.toml"):
        evaluate.load_run(straight / "ckpt")


def test_generate(straight, monkeypatch, capsys):
    texts = []
    for options in ([], ["--no-cache"], ["--seed", "1"], ["--temperature", "0"], ["--temperature", "0", "--no-cache"]):
        main(monkeypatch, generate, straight, "--prompt", "the quick brown", "--max-tokens", "20", *options)
        texts.append(capsys.readouterr().out)
    assert all(text.startswith("the quick brown ") for text in texts)
    assert texts[0] == texts[1] and texts[3] == texts[4] and len(set(texts)) == 3
    with pytest.raises(ValueError, match=r"3 prompt tokens \+ 30 new ones, .* context is 32: at most 29 fit"):
        list(generate.generate(evaluate.load_run(straight).model, [1, 2, 3], 30))


def test_pick_cuts_the_tail():
    logits_V = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    def drawn(**options):
        options = dict(temperature=1.0, top_k=0, top_p=1.0) | options
        generator = torch.Generator().manual_seed(0)
        return [generate.pick(logits_V, generator=generator, **options) for _ in range(400)]
    assert set(drawn()) == {0, 1, 2, 3}
    assert set(drawn(top_k=2)) == {1, 3} == set(drawn(top_p=0.7)) and set(drawn(top_p=0.71)) == {1, 2, 3}
    assert set(drawn(top_p=0.0)) == set(drawn(temperature=0)) == set(drawn(top_k=1)) == {1}
    assert abs(drawn().count(1) / 400 - 0.4) < 0.1
