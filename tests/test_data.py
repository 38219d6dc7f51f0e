"""Token files byte for byte, the loader's order, and text to data; every damaged input is named."""
import json
import runpy
import struct
import sys

import numpy as np
import pytest
import torch

from moe_ext import _C
from moe_ext.data import IndexedDataset, IndexedWriter, Loader, token_dtype, unigram_entropy
from moe_ext.data import prepare as prepare_file
from moe_ext.data.prepare import END_OF_TEXT, Prepare, prepare, read_meta


def write(prefix, documents, vocab_size=4096):
    with IndexedWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add(document)
    return IndexedDataset(prefix)


@pytest.fixture
def dataset(tmp_path):
    """Forty documents of 0 to 30 tokens; the tokens are 0, 1, 2, ... so that each names its place."""
    sizes = torch.randint(0, 31, (40,)).tolist()
    ends = np.cumsum(sizes)
    return write(tmp_path / "train", [list(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)])


# ---- .bin and .idx ---------------------------------------------------------------------------------------------------
def test_bytes_are_megatrons(tmp_path):
    write(tmp_path / "t", [[7, 8, 9], [], [65000]], vocab_size=65499)
    assert (tmp_path / "t.bin").read_bytes() == struct.pack("<4H", 7, 8, 9, 65000)
    assert (tmp_path / "t.idx").read_bytes() == (
        b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 4) +
        struct.pack("<3i", 3, 0, 1) + struct.pack("<3q", 0, 6, 6) + struct.pack("<4q", 0, 1, 2, 3))


def test_large_vocabulary_is_int32(tmp_path):
    dataset = write(tmp_path / "t", [[128255], [1, 2]], vocab_size=128256)
    assert (tmp_path / "t.idx").read_bytes()[17] == 4 and dataset.tokens.dtype == np.int32
    assert [document.tolist() for document in dataset] == [[128255], [1, 2]]
    assert token_dtype(65499) == np.uint16 and token_dtype(65500) == np.int32


def test_documents_of_several_sequences_and_modes(tmp_path):
    """As Megatron's sentence splitting writes them: three sequences in two documents, a mode byte for each."""
    (tmp_path / "t.bin").write_bytes(struct.pack("<6i", *range(6)))
    (tmp_path / "t.idx").write_bytes(
        b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, 3, 3) + struct.pack("<3i", 1, 2, 3) +
        struct.pack("<3q", 0, 4, 12) + struct.pack("<3q", 0, 2, 3) + bytes(3))
    dataset = IndexedDataset(tmp_path / "t.bin")
    assert [document.tolist() for document in dataset] == [[0, 1, 2], [3, 4, 5]]
    assert dataset[-1].tolist() == [3, 4, 5]
    with pytest.raises(IndexError):
        dataset[2]


def test_flat_uint16(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_ext.data.indexed.FLAT_DOCUMENT", 4)
    np.arange(10, dtype=np.uint16).tofile(tmp_path / "flat.bin")
    dataset = IndexedDataset(tmp_path / "flat.bin")
    assert [document.tolist() for document in dataset] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    with pytest.raises(FileNotFoundError, match="no index"):
        IndexedDataset(tmp_path / "flat")       # a prefix promises an index
    (tmp_path / "flat.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="got 3 bytes, wanted 2"):
        IndexedDataset(tmp_path / "flat.bin")


def patch(at, form, value):
    def damage(data):
        data[at:at + struct.calcsize(form)] = struct.pack(form, value)
    return damage


def cut(count):
    def damage(data):
        del data[-count:]
    return damage


# Three sequences of 2 tokens: header 34 bytes, lengths at 34, pointers at 46, documents at 70, 102 bytes in all.
@pytest.mark.parametrize("file, damage, message", [
    ("idx", patch(0, "<B", 0), "first bytes"),
    ("idx", patch(9, "<Q", 2), "version: got 2, wanted 1"),
    ("idx", patch(17, "<B", 7), "dtype code: got 7"),
    ("idx", patch(17, "<B", 99), "dtype code: got 99"),
    ("idx", patch(17, "<B", 4), "byte pointers"),
    ("idx", patch(18, "<Q", 2**62), "length: got 102 bytes"),
    ("idx", patch(26, "<Q", 0), "document index: got 0, wanted at least 1"),
    ("idx", patch(34, "<i", -1), "shortest sequence: got -1"),
    ("idx", patch(46, "<q", 2), "byte pointers"),
    ("idx", patch(78, "<q", 3), "document index"),
    ("idx", patch(94, "<q", 2), "document index"),
    ("idx", cut(1), "length: got 101 bytes"),
    ("idx", cut(90), "header: got 12 bytes"),
    ("bin", cut(1), "got 11 bytes, wanted 12"),
    ("bin", lambda data: data.extend(b"\0\0"), "got 14 bytes, wanted 12"),
])
def test_damaged_files_are_named(tmp_path, file, damage, message):
    write(tmp_path / "t", [[1, 2], [3, 4], [5, 6]])
    path = tmp_path / f"t.{file}"
    data = bytearray(path.read_bytes())
    damage(data)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        IndexedDataset(tmp_path / "t")
    assert str(path) in str(error.value) and "prepare" in str(error.value)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"moe_ext.data prepare"):
        IndexedDataset(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no tokens"):
        write(tmp_path / "t", [[], []])


def test_a_failed_writer_leaves_no_index(tmp_path):
    with pytest.raises(ValueError), IndexedWriter(tmp_path / "t", 4096) as writer:
        writer.add([70000])
    assert not (tmp_path / "t.idx").exists()


def test_unigram_entropy(tmp_path):
    assert unigram_entropy(write(tmp_path / "t", [[5, 5], [9, 9]])) == pytest.approx(np.log(2), abs=1e-15)
    assert unigram_entropy(write(tmp_path / "u", [[5, 5, 5]])) == 0


# ---- loader ----------------------------------------------------------------------------------------------------------
def test_sample_index_against_numpy():
    sizes = torch.randint(0, 9, (50,), dtype=torch.int32).numpy()
    docs = torch.randperm(50).numpy()
    starts = np.concatenate([[0], np.cumsum(sizes[docs])])
    for length in (1, 3, 8, 20):
        samples = (int(starts[-1]) - 1) // length
        doc, offset = np.full(samples, -1), np.full(samples, -1)
        _C.sample_index(50, docs.ctypes.data, 50, sizes.ctypes.data, length, samples, doc.ctypes.data,
                        offset.ctypes.data)
        at = np.arange(samples) * length
        assert np.array_equal(doc, np.searchsorted(starts, at, side="right") - 1)
        assert np.array_equal(offset, at - starts[doc])


def epoch_rows(loader, epoch):
    return [loader.sample(epoch * loader.samples + i).tolist() for i in range(loader.samples)]


def test_an_epoch_is_its_documents_end_to_end(dataset):
    """Every row is a stretch of the shuffled documents, and together the rows are the whole line."""
    loader = Loader(dataset, seq_len=7, batch_size=4, seed=3)
    for epoch in (0, 1, 5):
        line = np.concatenate([dataset[d] for d in loader.plan(epoch).docs])
        wanted = [line[7 * i:7 * i + 8].tolist() for i in range((len(line) - 1) // 7)]
        rows = epoch_rows(loader, epoch)
        assert rows != wanted and sorted(rows) == sorted(wanted)


def test_order_depends_on_seed_and_epoch(dataset):
    rows = [epoch_rows(Loader(dataset, seq_len=7, batch_size=4, seed=seed), epoch)
            for seed, epoch in ((3, 0), (3, 1), (4, 0), (2**63, 0))]
    assert all(a != b for i, a in enumerate(rows) for b in rows[:i])
    assert rows[1] == epoch_rows(Loader(dataset, seq_len=7, batch_size=9, seed=3), 1)


def test_documents_and_samples_are_shuffled_apart(tmp_path):
    """Two permutations of the same length, both of them new in each epoch."""
    loader = Loader(write(tmp_path / "t", [[1] * 5] * 29 + [[1] * 6]), seq_len=5, batch_size=1, seed=3)
    orders = [order for epoch in (0, 1) for order in (loader.plan(epoch).docs, loader.plan(epoch).order)]
    assert all(sorted(order) == list(range(30)) for order in orders)
    assert len({tuple(order) for order in orders} | {tuple(range(30))}) == 5


def test_targets_follow_tokens(dataset):
    batch = Loader(dataset, seq_len=7, batch_size=4, seed=3).batch(1, 3)
    assert batch.tokens.shape == batch.targets.shape == (2, 7) and batch.row0 == 1
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.tokens.is_contiguous() and batch.targets.is_contiguous()
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_rows_do_not_know_the_mesh(dataset, ranks):
    """Any division of the global batch, over three epochs, gives the rows of one process in the same places."""
    loader = Loader(dataset, seq_len=7, batch_size=6, seed=3)
    part = 6 // ranks
    for step in range(3 * loader.samples // 6):
        tokens = torch.cat([loader.batch(r * part, (r + 1) * part).tokens for r in range(ranks)])
        assert tokens.tolist() == [loader.sample(6 * step + row)[:-1].tolist() for row in range(6)]
        loader.advance()
    assert loader.epoch == pytest.approx(3, abs=6 / loader.samples) and len(loader.epochs) <= 2


def test_resume_continues_exactly(dataset):
    loader = Loader(dataset, seq_len=7, batch_size=4, seed=3)
    wanted = []
    for step in range(3 * loader.samples // 4):
        if step % 10 == 5:
            state = json.loads(json.dumps(loader.state_dict()))
            loader = Loader(dataset, seq_len=7, batch_size=4, seed=3)
            loader.load_state_dict(state)
        wanted.append(loader.batch().tokens)
        loader.advance()
    straight = Loader(dataset, seq_len=7, batch_size=4, seed=3)
    for tokens in wanted:
        assert torch.equal(straight.batch().tokens, tokens)
        straight.advance()


def test_unshuffled_is_the_files_order(dataset):
    loader = Loader(dataset, seq_len=7, batch_size=2, shuffle=False)
    assert loader.batch().tokens.tolist() == [list(range(7)), list(range(7, 14))]


@pytest.mark.parametrize("change, name", [({"seq_len": 8}, "seq_len"), ({"seed": 4}, "seed"),
                                          ({"shuffle": False}, "shuffle")])
def test_a_position_in_another_order_is_refused(dataset, change, name):
    options = {"seq_len": 7, "batch_size": 4, "seed": 3}
    state = Loader(dataset, **options).state_dict()
    with pytest.raises(ValueError, match=f"loader state: {name}: got"):
        Loader(dataset, **{**options, **change}).load_state_dict(state)


def test_bad_requests(dataset, tmp_path):
    with pytest.raises(ValueError, match="got 3 tokens, wanted at least seq_len"):
        Loader(write(tmp_path / "short", [[1, 2, 3]]), seq_len=3, batch_size=1)
    loader = Loader(dataset, seq_len=7, batch_size=4, vocab_size=10)
    with pytest.raises(ValueError, match=r"model.vocab_size"):
        loader.batch()
    for begin, end in ((0, 5), (2, 2), (-1, 3)):
        with pytest.raises(ValueError, match=r"wanted a part of \[0, 4\)"):
            loader.batch(begin, end)


# ---- prepare ---------------------------------------------------------------------------------------------------------
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


@pytest.fixture
def prepared(tmp_path):
    source = text_folder(tmp_path / "source")
    out = tmp_path / "out"
    meta = prepare(Prepare(out=out, text=str(source), vocab_size=320, valid_fraction=0.2), say=str)
    return source, out, meta


def test_every_document_is_on_one_side_and_whole(prepared):
    source, out, meta = prepared
    train, valid = texts(out, "train"), texts(out, "valid")
    originals = [path.read_text() for path in sorted(source.glob("doc*.txt"))]
    assert sorted(train + valid) == sorted(originals) and train and valid
    assert [text for text in originals if text in train] != train      # shuffled
    assert meta["vocab_size"] == 320 and meta["end_of_text"] == 0
    assert meta["valid"]["documents"] == len(valid)
    assert meta["valid"]["bytes"] == sum(len(text.encode()) for text in valid)
    assert meta["valid"]["unigram_entropy_nats"] == unigram_entropy(IndexedDataset(out / "valid"))


def test_sides_depend_on_the_text_alone(prepared, tmp_path):
    _, out, _ = prepared
    other = text_folder(tmp_path / "elsewhere", count=80)
    for path in list(other.glob("doc*.txt")):
        path.rename(path.with_name("z" + path.name))
    prepare(Prepare(out=tmp_path / "more", text=str(other), vocab_size=320, valid_fraction=0.2), say=str)
    assert set(texts(out, "valid")) < set(texts(tmp_path / "more", "valid"))
    assert set(texts(out, "train")) < set(texts(tmp_path / "more", "train"))


def test_the_same_input_gives_the_same_bytes(prepared, tmp_path):
    source, out, _ = prepared
    prepare(Prepare(out=tmp_path / "again", text=str(source), vocab_size=320, valid_fraction=0.2), say=str)
    for name in ("train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer.json"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_second_run_does_nothing_until_something_changes(prepared):
    source, out, meta = prepared
    options = Prepare(out=out, text=str(source), vocab_size=320, valid_fraction=0.2)
    before = (out / "meta.json").stat().st_ino
    said = []
    assert prepare(options, say=said.append) == meta and said == [f"{out} is up to date"]
    assert (out / "meta.json").stat().st_ino == before
    (source / "doc99.txt").write_text("a new document\n")
    assert prepare(options, say=str)["inputs"] != meta["inputs"]
    assert any("a new document" in text for side in ("train", "valid") for text in texts(out, side))
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "source"]


def test_a_failure_leaves_the_previous_data(prepared, monkeypatch):
    source, out, meta = prepared

    def fail(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(prepare_file, "tokenise", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(Prepare(out=out, text=str(source), vocab_size=300), say=str)
    assert read_meta(out) == meta and sorted(path.name for path in out.parent.iterdir()) == ["out", "source"]


def test_a_single_file_is_cut_at_line_ends(tmp_path):
    lines = [f"line {i} {'x' * (i % 50)}\n" for i in range(6000)]
    (tmp_path / "book.txt").write_text("".join(lines))
    meta = prepare(Prepare(out=tmp_path / "out", text=str(tmp_path / "book.txt"), vocab_size=300, valid_fraction=0.3),
                   say=str)
    pieces = texts(tmp_path / "out", "train") + texts(tmp_path / "out", "valid")
    assert meta["valid"]["documents"] >= 1 and len(pieces) >= 10
    assert sorted("".join(pieces).splitlines(keepends=True)) == sorted(lines)


def test_jsonl(tmp_path):
    wanted = [f"record {i}\nwith {END_OF_TEXT} inside, \U0001f600 and more" for i in range(40)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in wanted) + "\n")
    prepare(Prepare(out=tmp_path / "out", text=str(path), vocab_size=300, valid_fraction=0.3), say=str)
    assert sorted(texts(tmp_path / "out", "train") + texts(tmp_path / "out", "valid")) == sorted(wanted)
    for bad in ('{"text": 3}', '["text"]', "{", '{"content": "x"}'):
        path.write_text(json.dumps({"text": "good"}) + "\n" + bad + "\n")
        with pytest.raises(ValueError, match=r"data.jsonl: byte 17: got .* wanted one JSON object"):
            prepare(Prepare(out=tmp_path / "out", text=str(path), vocab_size=300), say=str)


def test_limits_take_an_even_part(tmp_path):
    source = text_folder(tmp_path / "source")
    meta = prepare(Prepare(out=tmp_path / "out", text=str(source), vocab_size=300, valid_fraction=0.3, max_mb=0.008),
                   say=str)
    used = meta["train"]["bytes"] + meta["valid"]["bytes"]
    assert 7000 < used <= 8000
    names = sorted(int(text.split()[1]) for side in ("train", "valid") for text in texts(tmp_path / "out", side))
    assert names != list(range(len(names)))


def test_bad_input_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a path or `stdlib`"):
        prepare(Prepare(out=tmp_path / "out", text=str(tmp_path / "nowhere")))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("irreplaceable")
    with pytest.raises(FileNotFoundError, match=r"no .txt, .md, .py, .jsonl file"):
        prepare(Prepare(out=tmp_path / "out", text=str(tmp_path / "mine")))
    (tmp_path / "one.txt").write_text("one short text\n")
    with pytest.raises(ValueError, match="exists and was not made by this program"):
        prepare(Prepare(out=tmp_path / "mine", text=str(tmp_path / "one.txt")))
    assert (tmp_path / "mine" / "thesis.doc").exists()
    with pytest.raises(ValueError, match="none of them for"):
        prepare(Prepare(out=tmp_path / "out", text=str(tmp_path / "one.txt")), say=str)
    with pytest.raises(ValueError, match="vocab_size: got 256"):
        Prepare(out=tmp_path, vocab_size=256)
    with pytest.raises(ValueError, match="valid_fraction: got 0"):
        Prepare(out=tmp_path, valid_fraction=0)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "meta.json").write_text("{")
    with pytest.raises(ValueError, match="damaged file"):
        read_meta(tmp_path / "damaged")


def command(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["moe_ext.data", *map(str, args)])
    runpy.run_module("moe_ext.data", run_name="__main__")


def test_the_commands(tmp_path, monkeypatch, capsys):
    source = text_folder(tmp_path / "source")
    command(monkeypatch, "prepare", "--text", source, "--out", tmp_path / "out", "--vocab-size", 300,
            "--valid-fraction", 0.2)
    command(monkeypatch, "show", tmp_path / "out")
    shown = capsys.readouterr().out
    assert "60 documents" in shown and "unigram entropy" in shown and "begins 'document" in shown
    with pytest.raises(SystemExit, match=r"error: no .*meta.json; make it with"):
        command(monkeypatch, "show", tmp_path / "nowhere")
    (tmp_path / "out" / "train.bin").write_bytes(b"12")
    with pytest.raises(SystemExit, match=r"error: .*train.bin: got 2 bytes"):
        command(monkeypatch, "show", tmp_path / "out")
