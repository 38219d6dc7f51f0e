"""Held-out loss of a run: on other data, of how much of it, and of which checkpoint."""
import json
import math
import re

import pytest
import torch
from test_train import data, flags, main, straight  # noqa: F401

import moe_ext.train
from moe_ext import checkpoint, evaluate
from moe_ext.config import ConfigError, parse
from moe_ext.data import IndexedDataset, IndexedWriter


def test_other_data(data, straight, tmp_path, monkeypatch, capsys):                         # noqa: F811
    main(monkeypatch, evaluate, straight, "--data", data / "train", "--batches", 3)
    run = evaluate.load_run(straight)
    want = evaluate.evaluate(run.model, run.config, IndexedDataset(data / "train"), 3)
    assert f"step 20 | valid loss {want:.4f} | perplexity {math.exp(want):.2f}" in capsys.readouterr().out
    with IndexedWriter(tmp_path / "high", 400) as writer:
        writer.add([320] * 40)
    for name, words in {"high": "got token ids from 320 to 320", "nowhere": "no token file"}.items():
        with pytest.raises(SystemExit, match=f"^error: .*{words}"):
            main(monkeypatch, evaluate, straight, "--data", tmp_path / name)


def test_how_many_batches(data, straight, monkeypatch, capsys):                             # noqa: F811
    said = []
    for batches in (0, 10**6, 1):
        main(monkeypatch, evaluate, straight, "--batches", batches)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]                    # 0, and more than there are, are all of them
    with pytest.raises(SystemExit, match=r"^error: evaluate: batches is -1, wanted 0 \(all of the held-out text\)"):
        main(monkeypatch, evaluate, straight, "--batches", -1)


def test_a_loss_without_bounds(data, straight, monkeypatch, capsys):                        # noqa: F811
    """Too large for exp, and not finite."""
    run = evaluate.load_run(straight)
    with torch.no_grad():
        run.model.lm_head.weight.mul_(1e5)
    monkeypatch.setattr(evaluate, "load_run", lambda *_: run)
    main(monkeypatch, evaluate, straight)
    assert "perplexity inf" in capsys.readouterr().out
    torch.nn.init.constant_(run.model.layers[1].mlp.gate.weight, math.inf)
    with pytest.raises(SystemExit, match=r"^error: the logits of the router layers\.1\.mlp are not finite for "):
        main(monkeypatch, evaluate, straight)


# ---- train.keep_best -------------------------------------------------------------------------------------------------

LOSSES = {2: 5.0, 4: 3.0, 6: 4.0, 8: 4.0, 10: 2.0, 12: 3.0}


def run(data, folder, monkeypatch, steps, *words, resume="", **options):                    # noqa: F811
    """A run whose evaluations give LOSSES."""
    now, schedule = [], moe_ext.train.learning_rate
    monkeypatch.setattr(moe_ext.train, "learning_rate", lambda step, *rest: now.append(step) or schedule(step, *rest))
    monkeypatch.setattr(moe_ext.train, "evaluate", lambda *_: LOSSES[now[-1]])
    options = dict(train__eval_every=2, train__save_every=4, data__tokenizer="", optim__schedule="constant") | options
    moe_ext.train.train(parse([*flags(data, folder, train__steps=steps, **options), *words]), resume)
    monkeypatch.undo()
    return folder / "debug"


def kept(folder):
    return [checkpoint.step_of(path) for path in checkpoint.whole(folder / "ckpt")]


def test_the_best_checkpoint_is_kept(data, tmp_path, monkeypatch, capsys):                  # noqa: F811
    folder = run(data, tmp_path, monkeypatch, 8, "--train.keep-best", train__keep_last=1)
    assert kept(folder) == [4, 8]
    best = folder / "ckpt" / "step-000004"
    best.rename(best.with_name("step-000004.old"))          # a save of the same step was killed
    assert evaluate.load_run(folder, "best").step == 4
    run(data, tmp_path, monkeypatch, 10, "--train.keep-best", train__keep_last=1, resume="auto")
    assert kept(folder) == [10]
    run(data, tmp_path, monkeypatch, 12, "--train.keep-best", train__keep_last=1, resume="auto")
    assert kept(folder) == [10, 12]
    assert [evaluate.load_run(folder, path).step for path in (None, "best")] == [12, 10]
    main(monkeypatch, evaluate, folder, "--checkpoint", "best")
    assert capsys.readouterr().out.startswith("step 10 | valid loss")


def test_each_checkpoint_has_its_best_to_go_back_to(data, tmp_path, monkeypatch):           # noqa: F811
    folder = run(data, tmp_path, monkeypatch, 10, "--train.keep-best", train__keep_last=2)
    assert kept(folder) == [4, 8, 10]
    assert [checkpoint.read_state(path).best_step for path in checkpoint.whole(folder / "ckpt")] == [4, 4, 10]
    run(data, tmp_path, monkeypatch, 12, train__keep_last=2, resume="auto")                 # no longer asked for
    assert kept(folder) == [10, 12]


def test_no_best_checkpoint(straight):                                                      # noqa: F811
    with pytest.raises(ConfigError, match=re.escape("knows no best checkpoint: train with --train.keep-best")):
        evaluate.load_run(straight, "best")


def test_checkpoints_of_earlier_versions(straight, tmp_path):                               # noqa: F811
    path = straight / "ckpt" / "step-000020"
    state = json.loads((path / "state.json").read_text())
    del state["best_step"]
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert checkpoint.read_state(tmp_path).best_step is None
