"""What would end a run hours later is said in a sentence before its first step and by --dry-run; nothing is written."""
import shutil

import numpy as np
import pytest
from ranks import run_ranks
from test_train import data, flags, main  # noqa: F401
from tokenizers import Tokenizer

import moe_ext.train
from moe_ext.config import ConfigError, parse, plain
from moe_ext.data import IndexedDataset, IndexedWriter
from moe_ext.parallel.mesh import Mesh
from moe_ext.preflight import CHUNK, check_tokens, preflight


def write(prefix, tokens, vocab_size=320):
    with IndexedWriter(prefix, vocab_size) as writer:
        writer.add(tokens)
    return prefix


BROKEN = {
    "no training data": (dict(data__train="nowhere"), "no token file nowhere.bin; make one with"),
    "no held-out data": (dict(data__valid="nowhere"), "no token file nowhere.bin; make one with"),
    "short training data": (dict(data__train="short"), "short.bin: got 20 tokens, wanted at least seq_len . 1 = 33"),
    "short held-out data": (dict(data__valid="short"), "short.bin: got 20 tokens, wanted at least seq_len . 1 = 33"),
    "training ids": (dict(data__train="high"), "high.bin: got token ids from 0 to 320, .* model.vocab_size 320"),
    "held-out ids": (dict(data__valid="high"), "high.bin: got token ids from 0 to 320, .* --model.vocab-size"),
    "no tokenizer": (dict(data__tokenizer="nowhere.json"), "no tokenizer nowhere.json: give --data.tokenizer"),
    "bad tokenizer": (dict(data__tokenizer="bad.json"), "bad.json is no tokenizer"),
    "big tokenizer": (dict(data__tokenizer="big.json"), "321 token ids, but model.vocab_size is 320: set --model.voc"),
    "empty prompt": (dict(train__sample_prompt=""), "the prompt has no tokens.* --train.sample-prompt"),
    "long sample": (dict(train__sample_tokens=32), "2 prompt tokens . 32 new ones, .*at most 30 fit; see"),
    "long prompt": (dict(train__sample_prompt="fox " * 40), "prompt has .* tokens, but .* 32: give at most 31; see"),
    "run folder": (dict(log__folder="bad.json/runs"), "bad.json/runs/debug cannot be written: .*Not a directory"),
}


@pytest.fixture
def folder(data, tmp_path, monkeypatch):                                                    # noqa: F811
    """The working directory: files that are not in order."""
    write(tmp_path / "short", [1] * 20)
    write(tmp_path / "high", np.r_[np.zeros(300, int), 320], 400)
    (tmp_path / "bad.json").write_text("{}")
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    tokenizer.add_tokens([f"new_{i}" for i in range(321 - tokenizer.get_vocab_size())])
    tokenizer.save(str(tmp_path / "big.json"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", BROKEN)
def test_a_sentence_before_the_first_step(data, folder, monkeypatch, capsys, name):         # noqa: F811
    options, words = BROKEN[name]
    arguments = flags(data, folder / "runs", **options)
    monkeypatch.setattr(moe_ext.train, "build", None)       # it does not come to that
    for more in ([], ["--dry-run"]):
        with pytest.raises(SystemExit, match=f"error: .*{words}"):
            main(monkeypatch, moe_ext.train, *arguments, *more)
    assert "parameters  51,648 in all" in capsys.readouterr().out
    assert not (folder / "runs" / "debug").exists()


def test_what_is_in_order_leaves_nothing_behind(data, tmp_path):                            # noqa: F811
    train, valid = preflight(plain(parse(flags(data, tmp_path))))
    assert len(train.tokens) > len(valid.tokens) and not list(tmp_path.iterdir())
    assert preflight(plain(parse(flags(data, tmp_path, data__valid="", data__tokenizer=""))))[1] is None


def test_the_best_of_no_evaluation(data, tmp_path):                                         # noqa: F811
    with pytest.raises(ConfigError, match=r"train.keep_best .* data.split 9,0,1 holds nothing out"):
        preflight(plain(parse([*flags(data, tmp_path, data__valid="", data__split="9,0,1"), "--train.keep-best"])))


def test_room_for_the_checkpoints(data, tmp_path, monkeypatch):                             # noqa: F811
    size, usage = 3 * 4 * 51648, shutil.disk_usage(tmp_path)
    options = dict(train__steps=20, train__save_every=5)

    def check(free, *words, **more):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
        preflight(plain(parse([*flags(data, tmp_path, **options | more), *words])))

    check(3 * size)                                         # keep_last is 2, and while one is written it is a third
    check(1 * size, train__save_every=0)
    check(1 * size, train__keep_last=0)                     # all are kept, or moved away
    with pytest.raises(ConfigError, match="4 will be there at a time"):
        check(3 * size, "--train.keep-best")
    with pytest.raises(ConfigError, match=r"has \d.* MiB free, but a checkpoint takes 0.6 MiB and 3 will be there at a "
                       r"time: free some, lower --train.keep-last"):
        check(3 * size - 1)
    for step in (5, 10):
        (tmp_path / "debug" / "ckpt" / f"step-{step:06d}").mkdir(parents=True)
    check(1 * size)                                         # two are there already
    with pytest.raises(ConfigError, match="free"):
        check(size - 1)


def test_a_folder_that_is_read_only(data, tmp_path, monkeypatch):                           # noqa: F811
    def refuse(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ConfigError, match=rf"run folder {tmp_path}/debug cannot be written: {tmp_path}: Read-only file "
                       "system: mend that or choose another --log.folder"):
        preflight(plain(parse(flags(data, tmp_path))))


def test_every_token_is_looked_at_by_one_rank(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_ext.preflight.CHUNK", 7)
    assert CHUNK > 7
    for bad in range(50):
        dataset = IndexedDataset(write(tmp_path / "text", np.where(np.arange(50) == bad, 320, 1), 400))
        found = []
        for part in range(3):
            try:
                check_tokens(dataset, 320, part, 3)
            except ConfigError:
                found.append(part)
        assert found == [next(part for part in range(3) if bad < 50 * (part + 1) // 3)]


def test_what_one_rank_finds_ends_all(data, tmp_path):                                      # noqa: F811
    high = write(tmp_path / "high", np.r_[np.zeros(300, int), 320], 400)                    # in the last rank's share
    config = plain(parse(flags(data, tmp_path, data__train=high, mesh__fsdp=2, train__micro_batch=2)))

    def body(rank):
        with pytest.raises(ConfigError, match=r"high.bin: got token ids from 0 to 320"):
            moe_ext.train.fit(config, Mesh(config.mesh), "")

    run_ranks(2, body, tmp_path)


def test_what_fails_after_the_last_step_is_only_said(data, tmp_path, monkeypatch):          # noqa: F811
    def fail(*args, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(moe_ext.train, "complete", fail)
    monkeypatch.setattr(moe_ext.train, "plot", fail)
    main(monkeypatch, moe_ext.train, *flags(data, tmp_path, train__steps=5))
    said = (tmp_path / "debug" / "run.log").read_text().splitlines()
    assert said[-3].startswith("saved ") and said[-2:] == ["no sample: RuntimeError: out of memory",
                                                           "no plot: RuntimeError: out of memory"]


def test_without_matplotlib_the_plan_says_so(data, tmp_path, monkeypatch, capsys):          # noqa: F811
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    main(monkeypatch, moe_ext.train, *flags(data, tmp_path), "--dry-run")
    assert "plot        none, for that needs matplotlib: pip install matplotlib" in capsys.readouterr().out
