"""The comparison at a tiny size: what is made equal is equal, and the report says what was measured."""
import json
import re
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from test_train import data  # noqa: F401

from benchmarks import compare
from benchmarks.compare import FORMS, KINDS, main, memory, times
from moe_ext.config import TYPES, as_type, load
from moe_ext.data import IndexedDataset, Loader
from moe_ext.model import GPT

RECIPE = "recipes/compare.toml"
TINY = ["--model.vocab-size", "320", "--model.seq-len", "32", "--model.layers", "2", "--model.dim", "32",
        "--model.moe.experts", "4", "--model.moe.hidden", "48", "--train.steps", "12", "--optim.warmup", "2",
        "--train.eval-batches", "2", "--train.sample-tokens", "4", "--fp64-steps", "3", "--fp32-steps", "2",
        "--every", "3", "--warmup", "1"]


@pytest.fixture(scope="module")
def tiny(data):                                                                             # noqa: F811
    config = load(RECIPE)
    return replace(config, model=replace(config.model, vocab_size=320, seq_len=32, layers=2, dim=32,
                                         moe=replace(config.model.moe, experts=4, hidden=48)),
                   data=replace(config.data, train=str(data / "train"), valid=str(data / "valid")))


def options(data, folder):                                                                  # noqa: F811
    places = {"--data.train": data / "train", "--data.valid": data / "valid", "--log.folder": folder / "runs",
              "--data.tokenizer": data / "tokenizer.json", "--out": folder, "--plot": folder / "plot.png",
              "--page": folder / "page.md"}
    return [RECIPE, *TINY, *(str(word) for pair in places.items() for word in pair)]


def test_whole(data, tmp_path, capsys):                                                     # noqa: F811
    pytest.importorskip("matplotlib")
    page = tmp_path / "page.md"
    page.write_text("before\n" + compare.MARKS[0] + "an old table\n" + compare.MARKS[1] + "after\n")
    main(options(data, tmp_path))
    said = capsys.readouterr().out
    (file,) = tmp_path.glob("compare-*.json")
    report = json.loads(file.read_text())
    series, steps = report["series"], 12
    assert file.read_text().count(json.dumps(series["dropless"][3]) + ",\n") == 1       # a line for each step
    assert {name: len(lines) for name, lines in series.items()} == {name: steps if name in TYPES else 4
                                                                    for name in (*TYPES, *FORMS)}
    for type in TYPES:
        assert series[type][-1]["loss"] < series[type][0]["loss"] - 0.1       # it learns
        assert all(step["gradients"] > 0 and step["update"] > 0 for step in series[type])
    for step, dropped in zip(series["capacity"], [sum(max(0, count - 64) for row in step["counts_LE"] for count in row)
                                                  for step in series["capacity"]], strict=True):
        assert step["dropped"] == dropped and sum(map(sum, step["counts_LE"])) == report["copies per step"] == 512
    assert max(step["dropped"] for step in series["capacity"]) > 0
    assert all(step["dropped"] == 0 for step in series["dropless"]) and report["rows per expert"] == 64
    lines = {(line["ranks"], line["dtype"]): line for line in report["mesh"]}
    assert set(lines) == {(n, dtype) for n in (2, 4) for dtype in ("fp64", "fp32")}
    for (_, dtype), line in lines.items():
        assert len(line["errors"]) == len(line["losses"]) == {"fp64": 3, "fp32": 2}[dtype]
        assert max(line["errors"]) <= {"fp64": 1e-12, "fp32": 1e-5}[dtype]
        # what the ranks computed is what the training begins with, and goes on
        assert line["losses"][0][0] == pytest.approx(series["dropless"][0]["loss"], rel=1e-5)
        assert line["losses"][1][0] < line["losses"][0][0]
    assert [line["met"] for line in report["wanted"]] == [line["got"] <= line["most"] for line in report["wanted"]]
    text = page.read_text()
    assert text.startswith("before\n<!--") and text.endswith("-->\nafter\n") and "an old table" not in text
    assert text[len("before\n" + compare.MARKS[0]):-len(compare.MARKS[1] + "after\n")] in said
    assert "| parameters | " + " | ".join(f"{report['parameters'][type][0]:,}" for type in TYPES) + " |" in text
    assert f"| held-out loss | {report['held-out loss']['dense']:.3f} |" in text
    assert (tmp_path / "plot.png").stat().st_size > 10000


def test_what_is_equal(tiny):
    """Active FLOPs but for the router, which is 6 x width x experts x layers; values; tokens of a step."""
    models = {type: GPT(as_type(tiny, type).model, device="meta") for type in TYPES}
    flops = {type: model.flops_per_token() for type, model in models.items()}
    assert flops["capacity"] == flops["dropless"] == flops["dense"] + 6 * 32 * 4 * 2
    assert models["capacity"].num_parameters() == models["dropless"].num_parameters()
    top2 = replace(tiny, model=replace(tiny.model, moe=replace(tiny.model.moe, top_k=2)))
    assert GPT(as_type(top2, "dense").model, device="meta").flops_per_token() == \
        GPT(top2.model, device="meta").flops_per_token() - 6 * 32 * 4 * 2


@pytest.mark.parametrize("name", FORMS)
def test_forms(tiny, name):
    config = as_type(tiny, FORMS[name].type)
    model = GPT(config.model, seed=1)
    batch = Loader(IndexedDataset(config.data.train), seq_len=32, batch_size=4, seed=1).batch()

    def gradients():
        model.zero_grad()
        out = model(batch.tokens, batch.targets)
        (out.token_loss + out.aux_loss).backward()
        assert out.dropped_L.sum() == 0
        return {"loss": out.token_loss.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}

    want = gradients()
    with FORMS[name].of(model):
        got = gradients()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))
    assert all(torch.equal(x, y) for x, y in zip(gradients().values(), want.values(), strict=True))     # back again


def test_a_form_that_computes_something_else_is_found():
    right, wrong, dropped = {"loss": 2.0, "dropped": 0}, {"loss": 2.01, "dropped": 0}, {"loss": 2.0, "dropped": 1}
    series = {name: [right] * (4 if name in TYPES else 2) for name in (*TYPES, *FORMS)}
    compare.check_forms(series, 2)
    for name in FORMS:
        for bad in (wrong, dropped):
            with pytest.raises(AssertionError, match=f"{name}: the loss is {bad['loss']} and {bad['dropped']} copies"):
                compare.check_forms({**series, name: [right, bad]}, 2)


def test_random_numbers_do_not_know_the_ranks(tiny):
    model = replace(tiny.model, dropout=0.2, moe=replace(tiny.model.moe, jitter=0.1))
    (line,) = compare.beside_one(replace(tiny, model=model), IndexedDataset(tiny.data.train), (2,), "fp64", 2)
    assert max(line["errors"]) <= 1e-12
    (still,) = compare.beside_one(tiny, IndexedDataset(tiny.data.train), (2,), "fp64", 1)
    assert abs(still["losses"][0][0] - line["losses"][0][0]) > 1e-6


def test_memory(tiny):
    """Bytes of what there is to count: 4 per parameter, as many per gradient, two moments; what is kept grows by the
    experts' rows before the activation, [T, 2F] per layer."""
    data_ = IndexedDataset(tiny.data.train)
    config, wide = as_type(tiny, "dropless"), replace(
        tiny, model=replace(tiny.model, moe=replace(tiny.model.moe, hidden=64)))
    found, wider = memory(config, data_), memory(wide, data_)
    parameters = GPT(config.model, device="meta").num_parameters()[0]
    assert found["parameters"] == found["gradients"] == 4 * parameters and found["moments"] == 8 * parameters
    assert wider["kept"] - found["kept"] == 2 * (8 * 32) * 2 * 16 * 4
    assert found["peak RSS"] > found["kept"]


def test_times():
    """Rounds are every second step, the first round is not counted; the base is the fastest form of dense."""
    def steps(gradients, update=0.0):
        return [{"gradients": 9.0, "update": update}, {"gradients": gradients, "update": update}]

    series = {"dense": steps(9.0) + steps(4.0, 1.0) + steps(6.0, 1.0) + steps(5.0, 1.0),
              "capacity": steps(9.0) + steps(6.0, 2.0) + steps(3.0, 2.0) + steps(5.0, 2.0),
              "dropless": steps(9.0) + steps(8.0, 2.0) + steps(6.0, 2.0) + steps(5.0, 2.0),
              "dense, plain torch": [{"gradients": t} for t in (1.0, 4.0, 3.0, 5.0)],
              "dense, experts' kernel": [{"gradients": t} for t in (1.0, 9.0, 9.0, 9.0)],
              "capacity, room for all": [{"gradients": t} for t in (1.0, 4.0, 3.0, 2.5)]}
    base, found = times(series, every=2, warmup=1)
    assert base == "dense, plain torch"
    assert found["dense"][KINDS[0]]["ms"] == [4500, 5000, 5500]
    dropless = found["dropless"][KINDS[0]]["over dense"]
    assert dropless["ratios"] == [1.5, 2.0, 2.0] and dropless["of medians"] == 6 / 4
    assert found["capacity"][KINDS[0]]["over dropless"]["ratios"] == [0.625, 0.75, 0.875]
    assert found["capacity, room for all"][KINDS[0]]["over dropless"]["ratios"] == [0.5] * 3
    assert found["dropless"][KINDS[1]]["over dense"]["ratios"][1] == pytest.approx(8 / 4)   # 10/5, 8/4, 7/6


BAD = {
    "no marks": ([], "page.md lacks the lines <!-- written by make compare --> and"),
    "steps": (["--train.steps", "8"], "train.steps 8 makes 2 rounds of 3 steps, .* give at least 9"),
    "ranks": (["--ranks", "3"], "3 ranks do not divide train.micro_batch 8"),
    "dense": (["--model.moe.experts", "0"], "the recipe of a comparison is the dropless type, .* set model.moe.exp"),
    "another MLP": (["--model.act", "geglu"], "forms for swiglu without biases: set model.act to swiglu"),
    "device": (["--train.dtype", "fp16"], "train.device is cpu and train.dtype fp16, .* set train.device to cpu"),
    "mesh": (["--train.accumulation", "2"], "runs in one process without accumulation"),
    "data": (["--data.train", "nowhere"], "no token file nowhere.bin"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(data, tmp_path, name, monkeypatch, capsys):                              # noqa: F811
    monkeypatch.setattr(compare, "memory", lambda *_: {})
    more, words = BAD[name]
    (tmp_path / "page.md").write_text("" if name == "no marks" else "".join(compare.MARKS))
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        main([*options(data, tmp_path), *more])
    said = re.sub(r"[\s│]+", " ", capsys.readouterr().err) + str(error.value)    # the command line's own are boxed
    assert re.search(words, said), said
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


def test_without_matplotlib(data, tmp_path, monkeypatch):                                   # noqa: F811
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name != "matplotlib" and find_spec(name))
    with pytest.raises(ValueError, match="pip install matplotlib"):
        main(options(data, tmp_path))
