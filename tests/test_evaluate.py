"""Held-out loss of a run: on other data, of how much of it, and of which checkpoint."""
import dataclasses
import json
import math
import re

import pytest
import torch
from ranks import run_ranks
from test_choices import MODEL
from test_model import VARIANTS, make
from test_train import data, flags, main, records, straight  # noqa: F401
from tokenizers import Tokenizer

import moe_ext.train
from moe_ext import checkpoint, evaluate
from moe_ext.config import Config, ConfigError, DataConfig, MeshConfig, TrainConfig, load, named_sets, parse
from moe_ext.data import IndexedDataset, IndexedWriter, Loader, unigram_entropy
from moe_ext.data.prepare import Prepare, prepare
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.shard import build


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


# ---- the whole text --------------------------------------------------------------------------------------------------

def write(prefix, tokens, vocab_size=61):
    """Tokens as three documents."""
    with IndexedWriter(prefix, vocab_size) as writer:
        for part in torch.as_tensor(tokens).tensor_split(3):
            writer.add(part.tolist())
    return IndexedDataset(prefix)


def plain_loss(model, tokens, seq_len):
    """Each token but the first once, from those before it in its row, by whole logits."""
    total = 0.0
    for begin in range(0, len(tokens) - 1, seq_len):
        row = tokens[begin:begin + seq_len + 1]
        log_p_SV = model.logits(row[None, :-1])[0].log_softmax(-1)
        total -= log_p_SV[range(len(row) - 1), row[1:]].sum().item()
    return total / (len(tokens) - 1)


@pytest.mark.parametrize("count", [13, 14, 48, 49, 50, 60])     # rows of 12: whole ones alone, and with 1 to 11 more
def test_every_token_is_predicted_once(tmp_path, count):
    tokens = torch.randint(61, (count,))
    dataset, model = write(tmp_path / "text", tokens), make(VARIANTS["qwen3_moe"]).eval()
    with torch.no_grad():
        want = plain_loss(model, tokens, 12)
    for micro_batch in (1, 3, 8):
        config = Config(model=model.config, train=TrainConfig(micro_batch=micro_batch))
        assert evaluate.evaluate(model, config, dataset) == pytest.approx(want, rel=1e-13)
        assert evaluate.evaluate(model, config, dataset, 10**6) == evaluate.evaluate(model, config, dataset)


def test_a_part_is_the_first_rows_of_the_shuffled_text(tmp_path):
    dataset, model = write(tmp_path / "text", torch.randint(61, (12 * 9 + 5,))), make(VARIANTS["qwen3_moe"]).eval()
    config = Config(model=model.config, train=TrainConfig(micro_batch=4))
    want = model(*Loader(dataset, seq_len=12, batch_size=8).batch()[:2]).token_loss.item() / (8 * 12)
    assert evaluate.evaluate(model, config, dataset, 2) == pytest.approx(want, rel=1e-13)
    assert evaluate.evaluate(model, config, dataset, 3) == evaluate.evaluate(model, config, dataset)    # there are 10


@pytest.mark.c_core
@pytest.mark.parametrize("sizes", [dict(fsdp=2, ep=2), dict(rep=2, tp=2, etp=2), dict(pp=2, rep=2),
                                   dict(sp=4, ep=2)], ids=str)
def test_every_mesh_finds_the_same(tmp_path, sizes):
    """Also where the last rows leave a rank without any."""
    dataset, mesh = write(tmp_path / "text", torch.randint(61, (16 * 6 + 4,))), MeshConfig(**sizes)
    config = Config(model=MODEL, mesh=mesh, train=TrainConfig(micro_batch=1, dtype="fp64", device="cpu"))

    def losses(mesh):
        model = build(dataclasses.replace(config, mesh=mesh.config), mesh)
        return [evaluate.evaluate(model, config, dataset, batches, mesh) for batches in (0, 1)]

    want = losses(Mesh(MeshConfig()))
    assert want[0] != want[1]
    for got in run_ranks(mesh.world, lambda rank: losses(Mesh(mesh)), tmp_path):
        assert got == pytest.approx(want, rel=1e-13)


# ---- bits per byte ---------------------------------------------------------------------------------------------------

def test_bits_per_byte(tmp_path):
    """The tokens that end documents count as tokens and have no bytes; meta.json and the decoded tokens agree."""
    texts = [f"Zeile {i}: größer als {i * i} €, <|endoftext|> 🦊\n" * 3 for i in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    meta = prepare(Prepare(text=str(tmp_path / "texts.jsonl"), out=tmp_path / "data", vocab_size=300,
                           valid_fraction=0.4))
    dataset, tokenizer = IndexedDataset(tmp_path / "data" / "valid"), tmp_path / "data" / "tokenizer.json"
    decoded = [Tokenizer.from_file(str(tokenizer)).decode(dataset[d].tolist()) for d in range(len(dataset))]
    assert set(decoded) < set(texts) and len(decoded) > 5
    size = sum(len(text.encode()) for text in decoded)
    assert size == meta["valid"]["bytes"]
    text = evaluate.held_out(dataset, "")
    assert text == (dataset, unigram_entropy(dataset), size / len(dataset.tokens))
    nats = 2.5 * len(dataset.tokens)
    assert text.compare(2.5) == pytest.approx({"perplexity": math.exp(2.5), "bits_per_byte": nats / math.log(2) / size})


    ours = evaluate.count_bytes(dataset, tmp_path / "nowhere")
    for other in ("", "[]", "{}", '{"valid": 1}', json.dumps(meta | {"valid": meta["train"]}), None):   # not of these
        (tmp_path / "data" / "meta.json").unlink()
        if other is not None:
            (tmp_path / "data" / "meta.json").write_text(other)
        assert evaluate.count_bytes(dataset, tokenizer) == ours == size
        assert evaluate.held_out(dataset, "").bytes_per_token is None
    assert set(evaluate.held_out(dataset, "").compare(2.5)) == {"perplexity"}
    assert text.compare(1000.0)["perplexity"] == math.inf


# ---- sets of their own -----------------------------------------------------------------------------------------------

def test_sets_during_training_and_as_a_command(data, tmp_path, monkeypatch, capsys):        # noqa: F811
    (tmp_path / "a b").mkdir()
    tokens = torch.tensor(IndexedDataset(data / "train").tokens[:400].astype("int64"))
    write(tmp_path / "a b" / "few", tokens, 320)
    monkeypatch.chdir(tmp_path)
    sets = f"""few='a b/few' train-1={data / 'train'} mix='1 "a b/few" 3 {data / 'train'}'"""
    folder = moe_ext.train.train(parse([*flags(data, tmp_path, data__eval_sets=sets, train__sample_tokens=0),
                                        "--log.tensorboard"]))
    monkeypatch.chdir("/")
    assert named_sets(load(folder / "config.toml").data.eval_sets) == {
        "few": str(tmp_path / "a b" / "few"), "train-1": str(data / "train"),
        "mix": f"1.0 '{tmp_path}/a b/few' 3.0 {data / 'train'}"}
    run, found = evaluate.load_run(folder), [r for r in records(folder) if r["step"] == 20 and "loss" not in r]
    for name, prefix, bound in (("few", tmp_path / "a b" / "few", None), ("train-1", data / "train", 4),
                                ("valid", data / "valid", 4)):
        dataset = IndexedDataset(prefix)
        loss = evaluate.evaluate(run.model, run.config, dataset, 4)
        if bound is None:
            assert loss == pytest.approx(plain_loss(run.model, tokens, 32), rel=1e-5)
        text = evaluate.held_out(dataset, folder / "tokenizer.json")
        entropy = "unigram_entropy" if name == "valid" else f"{name}_unigram_entropy"
        (record,) = (r for r in found if f"{name}_loss" in r)
        assert record == {"step": 20, "tokens": 20 * 256, "seconds": record["seconds"], f"{name}_loss": loss,
                          entropy: text.entropy,
                          **{f"{name}_{key}": value for key, value in text.compare(loss).items()}}
        bits = text.compare(loss)["bits_per_byte"]
        assert (f"eval 20/20 | {name} loss {loss:.4f} | perplexity {math.exp(loss):.2f} | bits per byte {bits:.4f} | "
                "unigram") in (folder / "run.log").read_text()
    losses = {name: r[f"{name}_loss"] for name in ("few", "train-1", "mix") for r in found if f"{name}_loss" in r}
    assert len(found) == 4 and losses["mix"] == pytest.approx(losses["few"] / 4 + losses["train-1"] * 3 / 4)
    capsys.readouterr()
    main(monkeypatch, evaluate, folder, "--batches", 4)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" loss ")[0] for line in said] == [f"step 20 | {name}" for name in ("valid", *losses)]
    assert re.fullmatch(r"step 20 \| few loss \S+ \| perplexity \S+ \| bits per byte \d\.\d{4} \| unigram .*", said[1])
    main(monkeypatch, evaluate, folder, "--batches", 4, "--sets", f"again={data / 'train'}")
    assert capsys.readouterr().out.replace("again", "train-1").splitlines() == said[2:3]

    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tb"))
    events.Reload()
    tags = {"valid_bits_per_byte", "few_loss", "few_perplexity", "train-1_bits_per_byte", "few_unigram_entropy"}
    assert tags < set(events.Tags()["scalars"])


def test_without_held_out_text_of_the_run(data, tmp_path, monkeypatch, capsys):             # noqa: F811
    folder = moe_ext.train.train(parse(flags(data, tmp_path, data__valid="", data__eval_sets=f"x={data / 'valid'}",
                                             train__steps=4)))
    assert [r["x_loss"] for r in records(folder) if "loss" not in r] and (folder / "plot.png").is_file()
    assert checkpoint.read_state(checkpoint.latest(folder / "ckpt")).best_loss is None
    main(monkeypatch, evaluate, folder)
    assert "step 4 | x loss" in capsys.readouterr().out


@pytest.mark.parametrize("sets, words", {
    "code": "got 'code', wanted NAME=PREFIX", "code=": "got 'code=', wanted NAME=PREFIX",
    "=x": "got the name '', wanted letters", "a/b=x": "got the name 'a/b', wanted letters, digits",
    "é=x": "got the name 'é'", "valid=x": "valid is the name of data.valid: choose another",
    "mean=x": "mean_loss is that of the training steps: choose another name",
    "a=x b=y a=z": "have a twice: give each a name of its own", "a='x": "No closing quotation"}.items())
def test_sets_that_are_none(straight, monkeypatch, sets, words):                            # noqa: F811
    with pytest.raises(ConfigError, match=re.escape(words)):
        DataConfig(eval_sets=sets)
    with pytest.raises(SystemExit, match="^error: .*" + re.escape(words)):
        main(monkeypatch, evaluate, straight, "--sets", sets)


def test_sets_that_cannot_be_scored(data, straight, tmp_path, monkeypatch):                 # noqa: F811
    write(tmp_path / "short", [1] * 20, 320)
    write(tmp_path / "high", [1] * 40 + [320], 400)
    for name, words in {"short": r"short\.bin: got 20 tokens, wanted at least", "nowhere": "no token file .*nowhere",
                        "high": r"high\.bin: got token ids from 1 to 320, wanted ids below"}.items():
        for more in ([], ["--dry-run"]):
            with pytest.raises(SystemExit, match=f"^error: .*{words}"):
                main(monkeypatch, moe_ext.train, *flags(data, tmp_path, data__eval_sets=f"x={tmp_path / name}"), *more)
        with pytest.raises(SystemExit, match=f"^error: .*{words}"):
            main(monkeypatch, evaluate, straight, "--sets", f"x={tmp_path / name}")
    with pytest.raises(SystemExit, match=r"^error: --data and --sets both name tokens: put all into --sets"):
        main(monkeypatch, evaluate, straight, "--data", data / "valid", "--sets", f"x={data / 'valid'}")


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
