"""Text to a data folder: every document once, whole, on one side, in the same bytes whatever happened on the way."""
import json
import os
import resource
import runpy
import shutil
import signal
import sys

import numpy as np
import pytest
from ranks import fork

from moe_ext.data import IndexedDataset, IndexedWriter, shuffle, tokenise, unigram_entropy
from moe_ext.data.identity import data_meta, tokenizer_hash
from moe_ext.data.prepare import Prepare, prepare, read_meta
from moe_ext.data.shards import Shards, shards
from moe_ext.data.target import claim
from moe_ext.data.tokenise import END_OF_TEXT, Tokeniser

FILES = ("train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer.json")


def text_folder(folder, count=60):
    folder.mkdir()
    for i in range(count):
        words = " ".join(f"word{(i * j) % 17} héllo" for j in range(30))
        (folder / f"doc{i:02d}.txt").write_text(f"document {i}\n{words}\n")
    (folder / "blank.txt").write_text(" \n")
    (folder / "image.png").write_bytes(b"no text")
    return folder


def texts(out, side):
    """The documents of a prepared folder as text, and a check that each ends in the end-of-text id."""
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    end = read_meta(out)["end_of_text"]
    documents = [document.tolist() for document in IndexedDataset(out / side)]
    assert all(document[-1] == end and end not in document[:-1] for document in documents)
    return [tokenizer.decode(document[:-1], skip_special_tokens=False) for document in documents]


def both(out):
    return sorted(texts(out, "train") + texts(out, "valid"))


def content(out):
    return [(out / name).read_bytes() for name in FILES]


def options(out, source, **changes):
    return Prepare(**{"out": out, "text": (str(source),), "vocab_size": 320, "valid_fraction": 0.2, "workers": 1,
                      **changes})


@pytest.fixture
def prepared(tmp_path):
    source = text_folder(tmp_path / "source")
    meta = prepare(options(tmp_path / "out", source), say=str)
    return source, tmp_path / "out", meta


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer.json with several special tokens, which asks for truncation, padding and a first token."""
    from tokenizers import Tokenizer, processors
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenise.train(["some words, and more words"] * 3, 300, path)
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 300 - 1)])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(path))
    return path


# ---- documents and sides ---------------------------------------------------------------------------------------------
def test_every_document_is_on_one_side_and_whole(prepared):
    source, out, meta = prepared
    train, valid = texts(out, "train"), texts(out, "valid")
    originals = [path.read_text() for path in sorted(source.glob("doc*.txt"))]
    assert sorted(train + valid) == sorted(originals) and train and valid
    assert [text for text in originals if text in train] != train      # shuffled
    assert meta == read_meta(out) == data_meta(out / "train") == data_meta(out / "valid.bin")
    assert meta["vocab_size"] == 320 and meta["end_of_text"] == 0
    assert meta["tokenizer_sha256"] == tokenizer_hash(out / "tokenizer.json")
    assert meta["valid"] == {"documents": len(valid), "bytes": sum(len(text.encode()) for text in valid),
                             "tokens": len(IndexedDataset(out / "valid").tokens),
                             "unigram_entropy_nats": unigram_entropy(IndexedDataset(out / "valid"))}


def test_sides_depend_on_the_text_alone(prepared, tmp_path):
    _, out, _ = prepared
    other = text_folder(tmp_path / "elsewhere", count=80)
    for path in list(other.glob("doc*.txt")):
        path.rename(path.with_name("z" + path.name))
    prepare(options(tmp_path / "more", other), say=str)
    assert set(texts(out, "valid")) < set(texts(tmp_path / "more", "valid"))
    assert set(texts(out, "train")) < set(texts(tmp_path / "more", "train"))


def test_the_same_bytes_whatever_the_files_buckets_and_workers(prepared, tmp_path, monkeypatch):
    """One .jsonl with the documents in another order, eight buckets, three processes."""
    source, out, _ = prepared
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps({"text": file.read_text()}) + "\n"
                            for file in sorted(source.glob("doc*.txt"), reverse=True)))
    monkeypatch.setattr(shuffle, "BUCKET", 2000)
    monkeypatch.setattr(shuffle, "BUFFER", 500)
    prepare(options(tmp_path / "again", path, workers=3), say=str)
    assert content(out) == content(tmp_path / "again")
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_seeds_change_the_order_and_not_the_sides(prepared, tmp_path):
    source, _, _ = prepared
    for name, seed in (("a", 42), ("b", 42), ("c", 43)):
        prepare(options(tmp_path / name, source, seed=seed), say=str)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    orders = [texts(tmp_path / name, "train") for name in ("out", "a", "c")]
    assert len({tuple(order) for order in orders}) == 3 and len({tuple(sorted(order)) for order in orders}) == 1


def test_what_is_left_out_is_said_and_kept(prepared, monkeypatch, capsys):
    source, out, meta = prepared
    assert {reason: entry["count"] for reason, entry in meta["left_out"].items()} == {"empty document": 1,
                                                                                    "other suffix": 1}
    (source / "binary.txt").write_bytes(bytes(range(256)))
    (source / "latin.txt").write_bytes(b"\xe9" * 50)
    (source / "late.md").write_bytes(b"first lines\n" * 3000 + b"\xff" * 2000)    # its first pieces were taken already
    (source / "nearly.txt").write_bytes(b"x" * 999 + b"\xff")
    said = []
    meta = prepare(options(out, source, overwrite=True, cut_kb=20, max_mb=0.012), say=said.append)
    found = {reason: entry["count"] for reason, entry in meta["left_out"].items()}
    kept = meta["train"]["documents"] + meta["valid"]["documents"]
    assert found == {"empty document": 1, "other suffix": 1, "binary (has NUL characters)": 1,
                     "not utf-8 (more than 1 % of its bytes)": 2, "beyond --max-mb": 61 - kept}
    assert meta["undecodable_bytes"] == 1 and not any("first lines" in text for text in both(out))
    assert meta["train"]["bytes"] + meta["valid"]["bytes"] <= 12000
    said = "\n".join(said)
    assert f"beyond --max-mb: {61 - kept}" in said and "1 bytes that are not of their file's encoding" in said
    command(monkeypatch, "show", out)
    assert f"left out: beyond --max-mb: {61 - kept}" in capsys.readouterr().out


def test_bars_on_a_terminal_alone(tmp_path, monkeypatch, capsys):
    source = text_folder(tmp_path / "source")
    prepare(options(tmp_path / "out", source), say=str)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    prepare(options(tmp_path / "bars", source), say=str)
    assert "tokenise" in capsys.readouterr().err and content(tmp_path / "bars") == content(tmp_path / "out")


def test_everything_is_used_by_default():
    assert Prepare().max_mb == 0


def test_limits_take_an_even_part(tmp_path):
    meta = prepare(options(tmp_path / "out", text_folder(tmp_path / "source"), max_mb=0.008), say=str)
    assert 7000 < meta["train"]["bytes"] + meta["valid"]["bytes"] <= 8000
    names = sorted(int(text.split()[1]) for text in both(tmp_path / "out"))
    assert names != list(range(len(names)))


def test_small_sets_hold_something_out(tmp_path):
    """Three texts of half a megabyte in a folder; then two short documents."""
    (tmp_path / "books").mkdir()
    for name in "abc":
        lines = [f"{name} line {i} of a long book with its own words\n" for i in range(12_000)]
        (tmp_path / "books" / f"{name}.txt").write_text("".join(lines))
    meta = prepare(options(tmp_path / "out", tmp_path / "books", valid_fraction=0.05), say=str)
    assert meta["valid"]["documents"] >= 1 and meta["valid"]["bytes"] < 0.1 * 1.6e6
    (tmp_path / "two.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    for fraction in (1e-9, 1 - 1e-9):
        prepare(options(tmp_path / "small", tmp_path / "two.jsonl", valid_fraction=fraction, overwrite=True), say=str)
        assert len(texts(tmp_path / "small", "train")) == len(texts(tmp_path / "small", "valid")) == 1
    (tmp_path / "two.jsonl").write_text('{"text": "one"}\n{"text": "one"}\n')
    with pytest.raises(ValueError, match=r"got 2 documents in .*two.jsonl, none of them for valid"):
        prepare(options(tmp_path / "same", tmp_path / "two.jsonl"), say=str)


def test_equal_documents_stay_together(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i % 20}"}) + "\n" for i in range(60)))
    prepare(options(tmp_path / "out", path), say=str)
    train, valid = texts(tmp_path / "out", "train"), texts(tmp_path / "out", "valid")
    assert len(train) + len(valid) == 60 and valid and not set(train) & set(valid)


def test_held_out_text_of_its_own(tmp_path):
    for name, numbers in (("train", range(40)), ("valid", range(35, 45))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in numbers))
    meta = prepare(options(tmp_path / "out", tmp_path / "train.jsonl", valid_text=(str(tmp_path / "valid.jsonl"),)),
                   say=str)
    assert sorted(texts(tmp_path / "out", "valid")) == sorted(f"text {i}" for i in range(35, 45))
    assert sorted(texts(tmp_path / "out", "train")) == sorted(f"text {i}" for i in range(35))
    assert meta["left_out"]["held out too"]["count"] == 5


# ---- tokenizers ------------------------------------------------------------------------------------------------------
QUOTES = [f"document {i} quotes {END_OF_TEXT} and <s>, </s>{END_OF_TEXT}" for i in range(40)]


def test_a_quoted_end_of_text_cuts_nothing(tmp_path, tokenizer, monkeypatch):
    """By a new and by a given tokenizer, in this process and in workers."""
    monkeypatch.setattr(shuffle, "BUCKET", 500)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in QUOTES))
    for i, changes in enumerate(({"workers": 1}, {"workers": 3}, {"workers": 3, "tokenizer": str(tokenizer)})):
        prepare(options(tmp_path / f"out{i}", tmp_path / "a.jsonl", **changes), say=str)
        assert both(tmp_path / f"out{i}") == sorted(QUOTES)


def test_a_given_tokenizer_is_used_as_it_is(tmp_path, tokenizer):
    """Its file unchanged, no truncation, no padding, no first token; the end is found or named."""
    source = text_folder(tmp_path / "source")
    meta = prepare(options(tmp_path / "out", source, tokenizer=str(tokenizer)), say=str)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    assert meta["tokenizer_sha256"] == tokenizer_hash(tokenizer) and meta["end_of_text"] == 0
    assert both(tmp_path / "out") == sorted(path.read_text() for path in source.glob("doc*.txt"))
    named = prepare(options(tmp_path / "named", source, tokenizer=str(tokenizer), end_of_text="</s>"), say=str)
    assert named["end_of_text"] == named["vocab_size"] - 1 > 0 and len(both(tmp_path / "named")) == 60
    with pytest.raises(ValueError, match="without <eod>, wanted a token that ends documents"):
        prepare(options(tmp_path / "none", source, tokenizer=str(tokenizer), end_of_text="<eod>"), say=str)


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("gpt2-vocab.json", "gpt2-merges.txt")])
def test_gpt2_files(prepared, tmp_path, names):
    """vocab.json and merges.txt of a tokenizer give its tokens."""
    source, out, _ = prepared
    from tokenizers import Tokenizer
    Tokenizer.from_file(str(out / "tokenizer.json")).model.save(str(tmp_path))
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").rename(tmp_path / names[0])
    (tmp_path / "merges.txt").rename(tmp_path / names[1])
    assert vocab[END_OF_TEXT] == 0
    prepare(options(tmp_path / "gpt2", source, tokenizer=str(tmp_path / names[0])), say=str)
    assert content(out)[:4] == content(tmp_path / "gpt2")[:4]
    (tmp_path / names[1]).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no merges.txt"):
        prepare(options(tmp_path / "none", source, tokenizer=str(tmp_path / names[0])), say=str)


def test_tokenizers_that_cannot_be_used(tmp_path, tokenizer):
    from tokenizers import AddedToken, Tokenizer, models
    source = text_folder(tmp_path / "source", 3)
    wrong = tmp_path / "wrong.json"
    for text in ("{", '{"model": {}}', "[]"):
        wrong.write_text(text)
        with pytest.raises(ValueError, match=r"wrong.json: .*; wanted a tokenizer.json"):
            prepare(options(tmp_path / "out", source, tokenizer=str(wrong)), say=str)
    with pytest.raises(FileNotFoundError, match=r"tokenizer: no file .*nowhere"):
        prepare(options(tmp_path / "out", source, tokenizer=str(tmp_path / "nowhere")), say=str)
    data = json.loads(tokenizer.read_text())
    data["model"]["vocab"]["huge"] = 2**31
    wrong.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="token files hold at most int32"):
        prepare(options(tmp_path / "out", source, tokenizer=str(wrong)), say=str)
    assert not (tmp_path / "out").exists()
    plain = Tokenizer(models.WordLevel({"word": 0, "</s>": 1, "?": 2}, unk_token="?"))     # of whole texts
    plain.save(str(wrong))
    with pytest.raises(ValueError, match="it makes token 1 of the characters '</s>' in a text"):
        Tokeniser(wrong)
    soft = Tokenizer.from_file(str(tokenizer))
    soft.add_tokens([AddedToken("<end>", special=False)])   # an ordinary added token
    soft.save(str(wrong))
    ready = Tokeniser(wrong, "<end>")
    assert ready.end not in ready.encode(["a <end> b"])[0]


# ---- again, instead, and what is refused -----------------------------------------------------------------------------
def test_a_second_run_does_nothing_and_replaces_nothing_unasked(prepared):
    source, out, meta = prepared
    before, said = (out / "meta.json").stat().st_ino, []
    assert prepare(options(out, source, workers=2), say=said.append) == meta and said == [f"{out} is up to date"]
    with pytest.raises(ValueError, match=r"vocab_size 320 there, 300 here\): replace it with --overwrite"):
        prepare(options(out, source, vocab_size=300), say=str)
    (source / "doc99.txt").write_text("a new document\n")
    with pytest.raises(ValueError, match="files changed"):
        prepare(options(out, source), say=str)
    assert (out / "meta.json").stat().st_ino == before
    assert prepare(options(out, source, overwrite=True), say=str)["inputs"] != meta["inputs"]
    assert "a new document\n" in both(out)
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "source"]


def test_data_of_another_version_is_replaced_only_when_asked(prepared):
    source, out, meta = prepared
    (out / "meta.json").write_text(json.dumps({**meta, "format": 1}))
    with pytest.raises(ValueError, match=r"format: got 1, wanted 2.*--overwrite"):
        prepare(options(out, source), say=str)
    assert prepare(options(out, source, overwrite=True), say=str)["inputs"] == meta["inputs"]


def test_bad_input_says_what_to_do(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("irreplaceable")
    with pytest.raises(FileNotFoundError, match=r"no .txt, .* file in .*other suffix: 1"):
        prepare(options(tmp_path / "out", tmp_path / "mine"))
    (tmp_path / "one.txt").write_text("one short text\n")
    with pytest.raises(ValueError, match="exists and was not made by this program"):
        prepare(options(tmp_path / "mine", tmp_path / "one.txt"))
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "thesis.doc").write_text("irreplaceable")
    with pytest.raises(ValueError, match=r"new.partial, where .*new would be made, exists and was not made"):
        prepare(options(tmp_path / "new", tmp_path / "one.txt"))
    assert (tmp_path / "mine" / "thesis.doc").exists() and (tmp_path / "new.partial" / "thesis.doc").exists()
    with pytest.raises(ValueError, match="none of them for"):
        prepare(options(tmp_path / "out", tmp_path / "one.txt"), say=str)
    for parent in ("one.txt", "/proc"):
        with pytest.raises(ValueError, match=r"out: cannot make .*; choose another place"):
            prepare(options(tmp_path / parent / "out", tmp_path / "one.txt"))
    (tmp_path / "binary.txt").write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(ValueError, match=r"text: .*binary.txt: binary"):
        prepare(options(tmp_path / "out", tmp_path / "binary.txt"), say=str)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "meta.json").write_text("{")
    with pytest.raises(ValueError, match="damaged file"):
        read_meta(tmp_path / "damaged")
    with pytest.raises(ValueError, match="damaged file"):
        data_meta(tmp_path / "damaged" / "train")


@pytest.mark.parametrize("wrong, message", [
    ({"vocab_size": 256}, "vocab_size: got 256"), ({"valid_fraction": 0}, "valid_fraction: got 0"),
    ({"max_mb": -1}, "max_mb: got -1"), ({"seed": -1}, "seed: got -1"), ({"workers": -1}, "workers: got -1"),
    ({"cut_kb": -1}, "cut_kb: got -1"), ({"cut_kb": float("nan")}, "cut_kb: got nan"),
    ({"bpe_mb": float("nan")}, "bpe_mb: got nan")])
def test_options_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        Prepare(**wrong)


# ---- interruptions ---------------------------------------------------------------------------------------------------
def child(body):
    """Run body in a forked process; how it ended."""
    pid = fork()
    if pid == 0:
        try:
            body()
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


WRITES = ("os.rename", "os.remove", "os.truncate", "shutil.rmtree", "os.mkdir", "os.rmdir")


def killed_at(count, folder, body):
    """body in a process that is killed when it is about to write, rename or remove for the count-th time in `folder`.
    Whether it came to that."""
    def run():
        seen = 0

        def hook(event, args):
            nonlocal seen
            if (event == "open" and args[1] and args[1][0] != "r" and str(args[0]).startswith(str(folder))) or (
                    event in WRITES and str(args[0]).startswith(str(folder))):
                seen += 1
                if seen == count:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        body()
        os._exit(0)
    status = child(run)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def test_killed_anywhere_it_continues_or_starts_clean(tmp_path, tokenizer, monkeypatch):
    """While it replaces an older folder: at every third step in the file system there is the old one, or the new one,
    whole; and the next run, of the same options or of others, gives what an undisturbed one gives."""
    source = text_folder(tmp_path / "source", 12)
    monkeypatch.setattr(shuffle, "BUCKET", 3000)
    work = tmp_path / "work"
    work.mkdir()
    of_seed = {seed: options(work / "out", source, tokenizer=str(tokenizer), seed=seed, overwrite=True)
               for seed in (1, 2)}
    wanted = {}
    for seed in (2, 1):
        prepare(of_seed[seed], say=str)
        wanted[seed] = content(work / "out")
    for count in range(1, 1000, 3):
        if not killed_at(count, work, lambda: prepare(of_seed[2], say=str)):
            break
        if (work / "out").exists():
            assert content(work / "out") == wanted[read_meta(work / "out")["options"]["seed"]]
        else:
            assert (work / "out.partial" / "replaced").is_dir()
        for seed in (2, 1)[count % 2:]:
            prepare(of_seed[seed], say=str)
            assert content(work / "out") == wanted[seed]
        prepare(of_seed[1], say=str)
    assert count > 40 and content(work / "out") == wanted[2]


def test_finished_buckets_are_not_tokenised_again(tmp_path, monkeypatch):
    source = text_folder(tmp_path / "source")
    monkeypatch.setattr(shuffle, "BUCKET", 3000)
    prepare(options(tmp_path / "straight", source), say=str)
    real, calls = tokenise.tokenise_bucket, []

    def stop(tokeniser, folder, parts, plan, number):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(number)
        return real(tokeniser, folder, parts, plan, number)
    monkeypatch.setattr(tokenise, "tokenise_bucket", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(options(tmp_path / "out", source), say=str)
    assert not (tmp_path / "out").exists()
    written = []
    monkeypatch.setattr(tokenise, "tokenise_bucket", real)
    add = IndexedWriter.add
    monkeypatch.setattr(IndexedWriter, "add", lambda self, tokens: written.append(1) or add(self, tokens))
    said = []
    prepare(options(tmp_path / "out", source), say=said.append)
    assert "continuing" in said[0] and 0 < len(written) < 60
    assert content(tmp_path / "out") == content(tmp_path / "straight")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "straight"]


def test_a_killed_worker_is_an_error_and_a_killed_run_leaves_no_workers(tmp_path, monkeypatch):
    source = text_folder(tmp_path / "source")
    monkeypatch.setattr(shuffle, "BUCKET", 3000)
    real = tokenise.tokenise_bucket

    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)
    monkeypatch.setattr(tokenise, "tokenise_bucket", die)
    with pytest.raises(ValueError, match="a worker process was killed"):
        prepare(options(tmp_path / "out", source, workers=2), say=str)

    def hang(*args):
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()
    monkeypatch.setattr(tokenise, "tokenise_bucket", hang)
    assert os.WIFSIGNALED(child(lambda: prepare(options(tmp_path / "out", source, workers=2), say=str)))
    monkeypatch.setattr(tokenise, "tokenise_bucket", real)
    while True:         # its workers, which have the lock too, end with it
        try:
            prepare(options(tmp_path / "out", source), say=str)
            break
        except ValueError as error:
            assert "another process is writing it" in str(error)
    assert len(both(tmp_path / "out")) == 60


def test_two_builders_of_one_folder(tmp_path):
    source = text_folder(tmp_path / "source")
    (tmp_path / "out.partial").mkdir()
    with claim(tmp_path / "out.partial" / "lock"), pytest.raises(ValueError, match="another process is writing it"):
        prepare(options(tmp_path / "out", source), say=str)
    prepare(options(tmp_path / "out", source), say=str)


@pytest.mark.parametrize("limit", [2000, 12_000, 30_000])
def test_a_full_disk(tmp_path, tokenizer, limit):
    """Files may grow to so many bytes: it stops in the buckets, in the tokens, in their merging."""
    source = text_folder(tmp_path / "source", 100)
    wanted = options(tmp_path / "out", source, tokenizer=str(tokenizer), vocab_size=300)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "lock").touch()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        with pytest.raises(ValueError, match=r"File too large; .*out is as it was. Make room and give the same"):
            prepare(wanted, say=str)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out").exists()
    prepare(wanted, say=str)
    assert len(both(tmp_path / "out")) == 100


# ---- shards and commands ---------------------------------------------------------------------------------------------
def lines(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_shards(tmp_path, monkeypatch):
    """Shuffled, dealt in turn, the first lines of each held out; the same for the same seed, with any buckets."""
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": f"text {i}\n<é>"}) + "\n" for i in range(100)))
    wanted = Shards(out=tmp_path / "a", text=(str(source),), shards=4, valid_lines=3, seed=42)
    meta = shards(wanted, say=str)
    parts = [lines(tmp_path / "a" / f"shard-{i:02d}.jsonl") for i in range(4)]
    valid = lines(tmp_path / "a" / "valid.jsonl")
    assert [len(part) for part in parts] == [22] * 4 and len(valid) == 12
    assert sorted(sum(parts, valid)) == sorted(f"text {i}\n<é>" for i in range(100))
    order = valid + [text for row in zip(*parts, strict=True) for text in row]
    assert meta["train"]["documents"] == 88 and meta["valid"]["bytes"] == sum(len(text.encode()) for text in valid)
    monkeypatch.setattr(shuffle, "BUCKET", 200)
    shards(Shards(out=tmp_path / "b", text=(str(source),), shards=2, valid_lines=6, seed=42), say=str)
    again = [lines(tmp_path / "b" / f"shard-{i:02d}.jsonl") for i in range(2)]
    assert lines(tmp_path / "b" / "valid.jsonl") + [text for row in zip(*again, strict=True) for text in row] == order
    shards(Shards(out=tmp_path / "c", text=(str(source),), shards=4, valid_lines=3, seed=43), say=str)
    assert lines(tmp_path / "c" / "valid.jsonl") != valid
    said = []
    shards(wanted, say=said.append)
    assert said == [f"{tmp_path / 'a'} is up to date"]
    with pytest.raises(ValueError, match="got 100 documents, wanted more than 4 shards of 25 held-out ones"):
        shards(Shards(out=tmp_path / "d", text=(str(source),), shards=4, valid_lines=25), say=str)
    prepare(options(tmp_path / "out", tmp_path / "a" / "shard-00.jsonl",
                    text=tuple(str(tmp_path / "a" / f"shard-{i:02d}.jsonl") for i in range(4)),
                    valid_text=(str(tmp_path / "a" / "valid.jsonl"),)), say=str)
    assert sorted(texts(tmp_path / "out", "valid")) == sorted(valid)


def test_equal_documents_do_not_stand_in_shards_and_validation(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": f"text {i % 10}"}) + "\n" for i in range(40)))
    meta = shards(Shards(out=tmp_path / "a", text=(str(source),), shards=2, valid_lines=3), say=str)
    train = lines(tmp_path / "a" / "shard-00.jsonl") + lines(tmp_path / "a" / "shard-01.jsonl")
    assert not set(train) & set(lines(tmp_path / "a" / "valid.jsonl"))
    assert len(train) == 32 and meta["left_out"]["held out too"]["count"] == 2


def command(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["moe_ext.data", *map(str, args)])
    runpy.run_module("moe_ext.data", run_name="__main__")


def test_the_commands(tmp_path, monkeypatch, capsys):
    source = text_folder(tmp_path / "source")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.jsonl").write_text('{"body": "x"}\n{"body": "y"}\n{"text": "z"}\n')
    out = tmp_path / "out"
    command(monkeypatch, "prepare", "--text", source, "--out", out, "--vocab-size", 300, "--valid-fraction", 0.2)
    command(monkeypatch, "prepare", "--text", tmp_path / "other", "--out", tmp_path / "two", "--tokenizer",
            out / "tokenizer.json", "--text-key", "body", "--broken", "skip")
    command(monkeypatch, "show", out)
    shown = capsys.readouterr().out
    assert "60 documents" in shown and "unigram entropy" in shown and "begins 'document" in shown
    assert "left out: broken line: 1 (first: " in shown and "a.jsonl: line 3" in shown

    command(monkeypatch, "merge", out / "train", tmp_path / "two" / "train", "--out", tmp_path / "merged")
    command(monkeypatch, "show", tmp_path / "merged")
    both_sides = len(IndexedDataset(out / "train")) + 1
    assert f"merged: {both_sides} documents of {both_sides} sequences" in capsys.readouterr().out
    meta = data_meta(tmp_path / "merged")
    assert meta["tokenizer_sha256"] == read_meta(out)["tokenizer_sha256"]
    assert meta["merged"]["bytes"] == read_meta(out)["train"]["bytes"] + 1
    older = {name: value for name, value in read_meta(out).items() if name != "tokenizer_sha256"} | {"format": 1}
    shutil.copytree(out, tmp_path / "older")
    (tmp_path / "older" / "meta.json").write_text(json.dumps(older))
    command(monkeypatch, "merge", out / "train", tmp_path / "older" / "train", "--out", tmp_path / "unknown")
    assert data_meta(tmp_path / "unknown")["tokenizer_sha256"] is None
    (tmp_path / "foreign.json").write_text("{}")
    for suffix in (".bin", ".idx"):
        shutil.copyfile(out / f"train{suffix}", tmp_path / f"alone{suffix}")
    for prefix, path, words in ((out / "train", "foreign.json", "is not that of .*out/train"),
                                (out / "train", "nowhere.json", r"No such file .*nowhere\.json"),
                                (tmp_path / "alone", "foreign.json", r"foreign\.json: .* wanted a tokenizer\.json")):
        with pytest.raises(SystemExit, match=f"^error: .*{words}"):
            command(monkeypatch, "show", prefix, "--tokenizer", tmp_path / path)
    with pytest.raises(SystemExit, match="got --text twice"):
        command(monkeypatch, "prepare", "--text", source, "--text=" + str(tmp_path / "other"), "--out", tmp_path / "no")
    with pytest.raises(SystemExit, match=r"is a folder, wanted the PREFIX of files to write"):
        command(monkeypatch, "merge", out / "train", "--out", tmp_path)
    with pytest.raises(SystemExit, match=r"merged.bin exists: delete it"):
        command(monkeypatch, "merge", out / "train", "--out", tmp_path / "merged")
    prepare(options(tmp_path / "third", source), say=str)
    with pytest.raises(SystemExit, match="got tokens of 2 tokenizers"):
        command(monkeypatch, "merge", out / "train", tmp_path / "third" / "train", "--out", tmp_path / "no")

    command(monkeypatch, "shards", "--text", source, "--out", tmp_path / "shards", "--shards", 3, "--valid-lines", 2)
    command(monkeypatch, "show", tmp_path / "shards")
    assert "54 documents in 3 shards, 6 in valid.jsonl" in capsys.readouterr().out

    with IndexedWriter(tmp_path / "foreign", 4096) as writer:
        writer.add([5, 6, 7])
    command(monkeypatch, "show", tmp_path / "foreign")
    assert "1 documents of 1 sequences, 3 tokens of uint16, the longest document 3\n    begins 5 6 7" in (
        capsys.readouterr().out)
    with pytest.raises(SystemExit, match=r"error: no .*meta.json; make it with"):
        command(monkeypatch, "show", tmp_path / "nowhere")
    (out / "train.bin").write_bytes(b"12")
    with pytest.raises(SystemExit, match=r"error: .*train.bin: got 2 bytes"):
        command(monkeypatch, "show", out)
