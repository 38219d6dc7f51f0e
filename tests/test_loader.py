"""Tokens to batches: documents, blends, splits, the index cache, reading ahead, and which tokenizer tokens are of."""
import errno
import gc
import json
import os
import shutil
import threading

import numpy as np
import pytest
import torch
from ranks import run_ranks
from test_data import write
from test_train import data, flags, main, straight  # noqa: F401

import moe_ext.train
from moe_ext import checkpoint, evaluate, generate, preflight, run
from moe_ext.checkpoint import CheckpointError
from moe_ext.config import ConfigError, DataConfig, parse, plain
from moe_ext.data import Blend, IndexedDataset, Loader, index, open_data, totals, unigram_entropy
from moe_ext.data.blend import read_blend, write_blend
from moe_ext.data.identity import tokenizer_hash
from moe_ext.model import build


def documents(count, seed=0, longest=12):
    """Documents of 0 to `longest` tokens, each token naming its place in the file."""
    ends = np.cumsum(np.random.default_rng(seed).integers(0, longest + 1, count))
    return [list(range(begin, end)) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def batches(loader, steps, micro=None):
    """The tokens of some steps, micro-batch by micro-batch."""
    read = []
    for _ in range(steps):
        micro_now = micro or loader.batch_size
        read += [loader.batch(begin, begin + micro_now) for begin in range(0, loader.batch_size, micro_now)]
        loader.advance()
    return read


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
                                    for left, right in zip(a, b, strict=True)
                                    for x, y in zip(left, right, strict=True))


# ---- the order of samples --------------------------------------------------------------------------------------------
def test_the_order_is_that_of_earlier_versions(tmp_path):
    """Runs that began with an earlier version go on; the numbers were read from commit 9528e35."""
    dataset = write(tmp_path / "t", documents(300, longest=39), 60000)
    rows = [[loader.sample(row)[0].item() for row in (0, 1, 2, loader.samples, 2 * loader.samples + 7)]
            for loader in (Loader(dataset, seq_len=17, batch_size=9, seed=seed) for seed in (1234, 2**63 + 5))]
    assert rows == [[5959, 1063, 2617, 1984, 3522], [4099, 834, 3735, 5528, 1846]]


# ---- documents -------------------------------------------------------------------------------------------------------
def test_documents_positions_and_mask_against_plain_python(tmp_path):
    """Borders of documents at every place of a row, empty documents, and a document longer than a row."""
    dataset = write(tmp_path / "t", [*documents(80), list(range(1000, 1040))], 60000)
    loader = Loader(dataset, seq_len=7, batch_size=5, seed=3, reset_attention=True, reset_positions=True, mask_end=True)
    of, place = {}, {}
    for d, document in enumerate(dataset):
        for i, token in enumerate(document.tolist()):
            of[token], place[token] = d, i
    seen = set()
    for _ in range(3 * loader.samples // 5):
        batch, learnt = loader.batch(), 0
        for r in range(5):
            *row, last = loader.sample(loader.row + r).tolist()
            numbers, positions, targets = [], [], []
            for s, token in enumerate(row):
                new = s > 0 and place[token] == 0
                numbers.append((numbers[-1] if s else 0) + new)
                positions.append(0 if new or s == 0 else positions[-1] + 1)
                ends = place[token] + 1 == len(dataset[of[token]])      # the input is the end of its document
                targets.append(-100 if ends else [*row, last][s + 1])
                seen.add((s, new, ends))
                learnt += not ends
            assert batch.tokens[r].tolist() == row and batch.documents[r].tolist() == numbers
            assert batch.positions[r].tolist() == positions and batch.targets[r].tolist() == targets
        assert loader.targets == learnt
        loader.advance()
    assert len(seen) >= 7 * 3       # at each place: inside, at the beginning, at the end of a document
    assert (batch.documents.dtype, batch.positions.dtype) == (torch.int32, torch.int64)
    assert all(tensor.is_contiguous() for tensor in (batch.tokens, batch.targets, batch.documents, batch.positions))


def test_a_mask_that_leaves_nothing(tmp_path):
    loader = Loader(write(tmp_path / "t", [[1]] * 40), seq_len=7, batch_size=4, mask_end=True)
    with pytest.raises(ValueError, match=r"data.mask_end leaves nothing to learn of rows 0 to 4"):
        _ = loader.targets


def test_without_the_options_there_is_nothing(tmp_path):
    loader = Loader(write(tmp_path / "t", documents(40)), seq_len=7, batch_size=4)
    batch = loader.batch()
    assert batch.documents is batch.positions is None and batch.borders("cpu") == {}
    assert (batch.targets >= 0).all() and loader.targets == 28


def test_a_flat_file_knows_no_documents(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "flat.bin")
    dataset = IndexedDataset(tmp_path / "flat.bin")
    for option in ("reset_attention", "reset_positions", "mask_end"):
        with pytest.raises(ValueError, match=r"flat.bin has no index, .* leave data.reset_attention, .* off"):
            Loader(dataset, seq_len=7, batch_size=1, **{option: True})


@torch.no_grad()
def test_a_token_knows_its_own_document_alone(data, tmp_path):                              # noqa: F811
    """Each document of a row gives the logits that it gives alone, whatever stands beside it."""
    config = plain(parse(flags(data, tmp_path, model__position="learned")))
    model, generator = build(config).double().eval(), np.random.default_rng(0)
    dataset = write(tmp_path / "t", [generator.integers(0, 320, size) for size in generator.integers(1, 20, 60)], 320)

    def logits(**options):
        batch = Loader(dataset, seq_len=32, batch_size=6, seed=3, **options).batch()
        return batch, model.lm_head(model.hidden(batch.tokens, **batch.borders("cpu"))[0])

    batch, got_BSV = logits(reset_attention=True, reset_positions=True)
    for tokens, numbers, got_SV in zip(batch.tokens, batch.documents, got_BSV, strict=True):
        assert numbers.max() >= 2
        for number in numbers.unique():
            alone = model.logits(tokens[numbers == number][None])[0]
            torch.testing.assert_close(got_SV[numbers == number], alone, rtol=0, atol=1e-12)
    for part in (dict(reset_attention=True), dict(reset_positions=True)):
        assert (logits(**part)[1] - got_BSV).abs().max() > 1e-4


# ---- blends ----------------------------------------------------------------------------------------------------------
def greedy(weights, rows):
    """Megatron-Core 0.16.1's build_blending_indices, in Python."""
    taken = [0] * len(weights)
    for row in range(rows):
        behind = [weight * max(row, 1) - count for weight, count in zip(weights, taken, strict=True)]
        k = behind.index(max(behind))
        yield k, taken[k]
        taken[k] += 1


def test_a_blend_takes_rows_by_megatrons_rule(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_ext.data.blend.BLOCK", 16)
    sets = [write(tmp_path / name, [list(range(begin, begin + n))], 60000)
            for name, begin, n in (("a", 0, 50), ("b", 1000, 80), ("c", 2000, 30))]
    blend = Blend(list(zip((1.0, 0.5, 0.5), sets, strict=True)))        # of any sum
    assert [k for k, _ in greedy([.5, .25, .25], 8)] == [0, 1, 2, 0, 0, 1, 2, 0]    # as measured in Megatron-Core
    alone = [Loader(dataset, seq_len=7, batch_size=1, seed=3) for dataset in sets]
    loader = Loader(blend, seq_len=7, batch_size=6, seed=3)
    want = [alone[k].sample(row).tolist() for k, row in greedy([.5, .25, .25], 120)]
    assert [loader.sample(row).tolist() for row in (*range(120), 5, 77, 31)] == [*want, want[5], want[77], want[31]]
    assert [row.tolist() for batch in batches(loader, 20, 2) for row in batch.tokens] == [row[:-1] for row in want]
    assert loader.samples == sum(of.samples for of in alone) and loader.epoch == 120 / loader.samples


def test_a_blend_resumes_and_knows_its_weights(tmp_path):
    sets = [write(tmp_path / name, documents(40, seed)) for seed, name in enumerate("ab")]
    loader = Loader(Blend([(0.7, sets[0]), (0.3, sets[1])]), seq_len=7, batch_size=4, seed=3)
    batches(loader, 5)
    state = json.loads(json.dumps(loader.state_dict()))
    again = Loader(Blend([(7, sets[0]), (3, sets[1])]), seq_len=7, batch_size=4, seed=3)
    again.load_state_dict(state)
    assert same(batches(loader, 5), batches(again, 5))
    for weights in ((0.3, 0.7), (0.6, 0.4)):
        with pytest.raises(ValueError, match=r"loader state: data .* there, .* here"):
            Loader(Blend(list(zip(weights, sets, strict=True))), seq_len=7, batch_size=4, seed=3).load_state_dict(state)


def test_how_a_blend_is_written(tmp_path):
    assert read_blend("data/my text/train") == [(1.0, "data/my text/train")] == read_blend(write_blend([(1.0, "data/my "
                                                                                                        "text/train")]))
    text = '2 data/a 1e-1 "data/my text/b"'
    assert read_blend(text) == [(2.0, "data/a"), (0.1, "data/my text/b")] == read_blend(write_blend(read_blend(text)))
    for bad, words in {"0.5 a b": "got 3 words", "0.5 a 0 b": "got the weight 0", "0.5 a -1 b": "got the weight -1",
                       "0.5 a nan b": "got the weight nan", "1 a b 1": "got the weight b"}.items():
        with pytest.raises(ValueError, match=f"the blend '{bad}': {words}"):
            open_data(bad)
    write(tmp_path / "a", documents(10))
    with pytest.raises(FileNotFoundError, match=r"no token file .*nowhere.bin"):
        open_data(f"0.5 {tmp_path}/a 0.5 {tmp_path}/nowhere")


def test_unigram_entropy_of_a_blend(tmp_path):
    sets = [write(tmp_path / name, [[token] * 9]) for name, token in (("a", 1), ("b", 6))]
    want = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert unigram_entropy(Blend([(3, sets[0]), (1, sets[1])])) == pytest.approx(want, abs=1e-15)


# ---- splits ----------------------------------------------------------------------------------------------------------
def several(tmp_path, sequences, per_document):
    """A file of equal sequences, several to a document."""
    import struct
    tokens = np.arange(3 * sequences, dtype="<i4")
    tokens.tofile(tmp_path / "s.bin")
    borders = np.arange(0, sequences + 1, per_document, dtype="<i8")
    (tmp_path / "s.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, sequences, len(borders)) +
                                     np.full(sequences, 3, "<i4").tobytes() +
                                     np.arange(0, 12 * sequences, 12, dtype="<i8").tobytes() + borders.tobytes())
    return str(tmp_path / "s")


def test_a_split_divides_sequences(tmp_path):
    """50 documents of two sequences each at 949,50,1 are 95 and 5 sequences and nothing, as in Megatron-Core 0.16.1."""
    prefix = several(tmp_path, 100, 2)
    with pytest.raises(ValueError, match=r"data.split 949,50,1: .*s.bin has 100 sequences, of which test gets none"):
        open_data(prefix, split="949,50,1")
    train, valid, test = open_data(prefix, split="949,50")
    assert (len(train.tokens), len(valid.tokens), test) == (3 * 95, 3 * 5, None)
    assert [document.tolist() for document in valid][:2] == [[285, 286, 287], list(range(288, 294))]    # cut, whole
    assert train[-1].tolist() == [282, 283, 284] and len(train) == 48 and train.digest != valid.digest
    train, valid, test = open_data(prefix, split="8,1,1")
    assert [of.tokens[0] for of in (train, valid, test)] == [0, 240, 270] and test.tokens[-1] == 299
    assert open_data(several(tmp_path, 5, 1), split="1,1").valid.tokens[0] == 6         # round(2.5) is 2
    assert open_data(prefix, split="1").valid is None
    loader = Loader(train, seq_len=7, batch_size=1)
    assert {int(token) for row in range(loader.samples) for token in loader.sample(row)} <= set(range(240))


@pytest.mark.parametrize("split", ["", "a", "0,1", "1,2,3,4", "-1,2", "nan", "inf,1", "1;2"])
def test_bad_splits(tmp_path, split):
    with pytest.raises(ValueError, match=r"data.split: got .* as in 949,50,1"):
        open_data(several(tmp_path, 10, 1), split=split or ",")


def test_a_split_of_a_blend(tmp_path):
    for name in "ab":
        write(tmp_path / name, documents(40, ord(name)))
    whole = f"0.5 {tmp_path}/a 0.5 {tmp_path}/b"
    train, valid, _ = open_data(whole, split="8,2")
    for (_, one), (_, other), (_, all_of_it) in zip(*(of.parts for of in (train, valid, open_data(whole).train)),
                                                    strict=True):
        assert [*one.tokens, *other.tokens] == list(all_of_it.tokens) and len(one) == 32


def test_totals_are_megatrons_lines(tmp_path):
    """In the seed 2,560,000 rows of 156,609 an epoch are 17 epochs; so they are here, with 9 an epoch and 150 rows."""
    dataset = write(tmp_path / "t", [list(range(i, i + 8)) for i in range(8)])
    assert totals(dataset, 7, 150) == ["> total number of sequences: 8", "> total number of documents: 8",
                                       f"> total number of samples: {17 * 9}"]


# ---- the index cache -------------------------------------------------------------------------------------------------
@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A data set whose epochs have cache files; and what was built."""
    monkeypatch.setattr(index, "CACHE_FROM", 0)
    built, build = [], index.Samples.build
    monkeypatch.setattr(index.Samples, "build", lambda self, number: built.append(number) or build(self, number))
    (tmp_path / "data").mkdir()
    return write(tmp_path / "data" / "t", documents(60)), built


def loader_of(dataset, **options):
    return Loader(dataset, **{"seq_len": 7, "batch_size": 4, "seed": 3} | options)


def test_an_epoch_is_built_once(cached, tmp_path, recwarn):
    dataset, built = cached
    want = batches(loader_of(dataset), 30)
    epochs = 1 + (30 * 4 - 1) // loader_of(dataset).samples
    assert built == list(range(epochs)) and len(list((tmp_path / "data" / "index").iterdir())) == epochs
    assert same(batches(loader_of(IndexedDataset(tmp_path / "data" / "t")), 30), want) and len(built) == epochs
    assert isinstance(loader_of(dataset).sets[0].load(0).order.base, np.memmap)
    for other in (dict(seed=4), dict(seq_len=8), dict(shuffle=False)):
        batches(loader_of(dataset, **other), 1)
    assert len(built) == epochs + 3
    batches(loader_of(dataset, cache=str(tmp_path / "elsewhere" / "cache")), 1)
    assert len(built) == epochs + 4 and len(list((tmp_path / "elsewhere" / "cache").iterdir())) == 1
    write(tmp_path / "data" / "t", documents(60, seed=1))                   # other data of that name
    batches(loader_of(IndexedDataset(tmp_path / "data" / "t")), 1)
    assert len(built) == epochs + 5 and not recwarn.list


def test_a_small_epoch_has_no_file(tmp_path):
    batches(loader_of(write(tmp_path / "t", documents(60))), 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.bin", "t.idx"]


@pytest.mark.parametrize("damage, words", [
    (lambda raw: raw[:-8], "got .* bytes, wanted"), (lambda raw: b"", "got 0 bytes"),
    (lambda raw: b"X" + raw[1:], "made of other inputs, or by another version"),
    (lambda raw: raw[:20] + bytes([raw[20] ^ 1]) + raw[21:], "made of other inputs"),
    (lambda raw: raw[:100] + bytes([raw[100] ^ 4]) + raw[101:], "its checksum is wrong, so it is damaged"),
])
def test_a_damaged_cache_is_built_anew(cached, tmp_path, damage, words):
    dataset, built = cached
    want = batches(loader_of(dataset), 1)
    (path,) = (tmp_path / "data" / "index").iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.warns(UserWarning, match=f"{path} is no index of .*: {words}.*; it is built anew"):
        assert same(batches(loader_of(dataset), 1), want)
    assert path.read_bytes() == whole and built == [0, 0]


def test_a_cache_of_other_data_is_not_taken(cached, tmp_path):
    dataset, _ = cached
    want = batches(loader_of(dataset), 1)
    (path,) = (tmp_path / "data" / "index").iterdir()
    path.unlink()
    (tmp_path / "other").mkdir()
    batches(loader_of(write(tmp_path / "other" / "t", documents(60, seed=1))), 1)
    (other,) = (tmp_path / "other" / "index").iterdir()
    shutil.copyfile(other, path)
    with pytest.warns(UserWarning, match="is no index of"):
        assert same(batches(loader_of(dataset), 1), want)


@pytest.mark.parametrize("where", ["full", "no folder"])
def test_without_room_the_order_stays_in_memory(cached, tmp_path, monkeypatch, where):
    dataset, built = cached
    want = batches(loader_of(dataset), 1)
    (folder := tmp_path / "data" / "index").joinpath("older.order").touch()
    for path in folder.glob("t-*"):
        path.unlink()
    if where == "full":
        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "replace", full)
        words = "No space left on device"
    else:
        (tmp_path / "file").touch()
        words = "Not a directory"
    cache = "" if where == "full" else str(tmp_path / "file" / "cache")
    with pytest.warns(UserWarning, match=f"is not kept in .*: {words}; it stays in memory, .* another --data.cache"):
        assert same(batches(loader_of(dataset, cache=cache), 1), want)
    assert [path.name for path in folder.iterdir()] == ["older.order"] and built == [0, 0]


def test_builders_take_turns(cached, tmp_path):
    """Four processes at once build one file once; a file that a killed builder left goes."""
    dataset, _ = cached
    (tmp_path / "data" / "index").mkdir()
    want = batches(loader_of(dataset, cache=str(tmp_path / "else")), 2)
    (path,) = (tmp_path / "else").iterdir()
    (tmp_path / "data" / "index" / f"{path.name}.tmp-killed").touch()

    def body(rank):
        built, build = [], index.Samples.build
        index.Samples.build = lambda self, number: built.append(number) or build(self, number)
        assert same(batches(loader_of(dataset), 2), want)
        (tmp_path / f"built-{rank}-{len(built)}").touch()

    run_ranks(4, body, tmp_path)
    assert len(list(tmp_path.glob("built-?-1"))) == 1 and len(list(tmp_path.glob("built-?-0"))) == 3
    assert [file.name for file in (tmp_path / "data" / "index").iterdir()] == [path.name]


# ---- reading ahead ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_what_is_read_ahead_is_the_same(tmp_path, prefetch):
    """Also when the batch size changes between steps, in the middle of an epoch and across its end."""
    dataset = write(tmp_path / "t", documents(60))
    options = dict(reset_attention=True, reset_positions=True, mask_end=True)
    plain_one, ahead = loader_of(dataset, **options), loader_of(dataset, prefetch=prefetch, **options)
    for batch_size in (4, 4, 4, 8, 2, 2, 8, 8, 8, 8, 4):
        plain_one.batch_size = ahead.batch_size = batch_size
        assert plain_one.targets == ahead.targets
        assert same(batches(plain_one, 2, 2), batches(ahead, 2, 2))
        assert len(ahead.ahead) <= prefetch
    ahead.load_state_dict(plain_one.state_dict())
    assert same(batches(plain_one, 2), batches(ahead, 2))


def test_the_thread_does_the_reading(tmp_path, monkeypatch):
    loader = loader_of(write(tmp_path / "t", documents(200)), prefetch=2)
    readers, read = [], loader.read
    monkeypatch.setattr(loader, "read", lambda *rows: readers.append(threading.current_thread().name) or read(*rows))
    batches(loader, 6, 2)
    names = [name.startswith("moe-data") for name in readers]
    assert names.count(False) == 2 and not any(names[:1])       # the first step's two, of which nothing was known


def test_what_fails_in_the_thread_is_raised(tmp_path):
    dataset = write(tmp_path / "t", [[1] * 60 + [9] * 60])
    loader = Loader(dataset, seq_len=7, batch_size=1, vocab_size=9, shuffle=False, prefetch=2)
    batches(loader, 8)
    with pytest.raises(ValueError, match="got token ids from 1 to 9, wanted ids below vocab_size 9"):
        loader.batch()


def test_no_thread_stays(tmp_path):
    dataset = write(tmp_path / "t", documents(60))
    loader = loader_of(dataset, prefetch=2)
    batches(loader, 2)
    (thread,) = loader.reader._threads
    del loader
    gc.collect()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_a_fork_reads_on(tmp_path):
    dataset = write(tmp_path / "t", documents(60))
    loader, want = loader_of(dataset, prefetch=2), loader_of(dataset)
    batches(loader, 3), batches(want, 3)

    def body(rank):
        assert loader.sample(5).tolist() == want.sample(5).tolist()
        assert same(batches(loader, 3), batches(want, 3))

    with loader.lock:       # as if the thread were reading
        run_ranks(1, body, tmp_path)


# ---- which tokens ----------------------------------------------------------------------------------------------------
def test_a_position_in_other_tokens_is_refused(tmp_path):
    """Also when there are as many; but a state of an earlier version knows no more than that."""
    state = loader_of(write(tmp_path / "t", [[1] * 50, [2] * 50])).state_dict()
    for other in ([[1] * 50, [3] * 50], [[1] * 49, [1, *[2] * 50]]):
        with pytest.raises(ValueError, match=r"loader state: data \w{64} there, \w{64} here: .* with the same data"):
            loader_of(write(tmp_path / "other", other)).load_state_dict(state)
    del state["data"]
    loader_of(write(tmp_path / "other", [[1] * 50, [3] * 50])).load_state_dict(state)


def test_the_digest_samples_large_files(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_ext.data.indexed.SAMPLED", 5)
    monkeypatch.setattr("moe_ext.data.indexed.BLOCK", 8)
    digests = [write(tmp_path / "t", [[int(i == changed) for i in range(400)]]).digest for changed in (-1, 0, 50, 399)]
    assert len(set(digests)) == 3 and digests[0] == digests[2]      # the 51st token is in no block
    digests = [write(tmp_path / "t", [[int(i == changed) for i in range(40)]]).digest for changed in range(-1, 40)]
    assert len(set(digests)) == 41


# ---- which tokenizer -------------------------------------------------------------------------------------------------
@pytest.fixture
def tied(data, tmp_path):                                                                   # noqa: F811
    """The data with a meta.json, and the same with another tokenizer, as prepare leaves them."""
    for name, changed in (("one", ""), ("two", "\n")):
        shutil.copytree(data, tmp_path / name)
        path = tmp_path / name / "tokenizer.json"
        path.write_text(path.read_text() + changed)
        (tmp_path / name / "meta.json").write_text(json.dumps(
            {"tokenizer_sha256": tokenizer_hash(path), "train": {"bytes": 1}, "valid": {"bytes": 1}}))
    return tmp_path


@pytest.mark.parametrize("field", ["train", "valid", "tokenizer", "eval_sets", "a blend"])
def test_another_tokenizer_is_refused_at_the_start(tied, monkeypatch, field):
    options = {"data__eval_sets": "x=" + str(tied / "two" / "valid")} if field == "eval_sets" else \
        {"data__train": f"1 {tied}/one/train 1 {tied}/two/train"} if field == "a blend" else \
        {f"data__{field}": tied / "two" / ("tokenizer.json" if field == "tokenizer" else field)}
    monkeypatch.setattr(moe_ext.train, "build", None)       # it does not come to that
    for more in ([], ["--dry-run"]):
        with pytest.raises(SystemExit, match=r"is of another tokenizer .* prepare both with one"):
            main(monkeypatch, moe_ext.train, *flags(tied / "one", tied / "runs", **options), *more)
    assert not (tied / "runs" / "debug").exists()


def test_a_run_keeps_its_tokenizer(tied, monkeypatch, capsys):
    arguments = flags(tied / "one", tied / "runs", train__steps=5)
    main(monkeypatch, moe_ext.train, *arguments)
    folder = tied / "runs" / "debug"
    assert run.tokenizer_of(folder) == tokenizer_hash(folder / "tokenizer.json")
    assert "not checked" not in (folder / "run.log").read_text()
    main(monkeypatch, evaluate, folder)
    with pytest.raises(SystemExit, match=r"two/valid is of another tokenizer .* --tokenizer .*debug/tokenizer.json"):
        main(monkeypatch, evaluate, folder, "--data", tied / "two" / "valid")
    shutil.copyfile(tied / "two" / "meta.json", tied / "one" / "meta.json")                 # prepared again
    with pytest.raises(SystemExit, match="one/valid is of another tokenizer"):
        main(monkeypatch, evaluate, folder)
    with pytest.raises(SystemExit, match="is of another tokenizer"):
        main(monkeypatch, moe_ext.train, *arguments, "--resume", "auto")
    path = folder / "ckpt" / "step-000005"
    config = plain(parse(flags(tied / "two", tied / "runs", train__steps=7)))
    loader = Loader(IndexedDataset(tied / "two" / "train"), seq_len=32, batch_size=config.sequences_per_step,
                    seed=config.train.seed)
    with pytest.raises(CheckpointError, match=r"is of a run with the tokenizer .* give the tokenizer that it had"):
        run.check(path, config, loader)
    for more in ([], ["--dry-run"]):
        with pytest.raises(SystemExit, match=r"is of a run with the tokenizer .* give the tokenizer that it had"):
            main(monkeypatch, moe_ext.train, *flags(tied / "two", tied / "runs", log__name="new"), "--weights", folder,
                 *more)
    main(monkeypatch, generate, folder, "--max-tokens", 2)
    shutil.copyfile(tied / "two" / "tokenizer.json", folder / "tokenizer.json")
    with pytest.raises(SystemExit, match=r"debug/tokenizer.json is of another tokenizer"):
        main(monkeypatch, generate, folder, "--max-tokens", 2)


def test_evaluate_knows_the_held_out_shares_of_a_split(tied, monkeypatch, capsys):
    options = dict(data__valid="", train__steps=5, train__sample_tokens=0)
    for name, split in (("half", "5,5"), ("none", "9"), ("test", "8,0,2")):
        main(monkeypatch, moe_ext.train,
             *flags(tied / "one", tied / "runs", log__name=name, data__split=split, **options))
    with pytest.raises(SystemExit, match=r"data.split 9 has no share of it.: give --data PREFIX"):
        main(monkeypatch, evaluate, tied / "runs" / "none")
    capsys.readouterr()
    main(monkeypatch, evaluate, tied / "runs" / "test")
    assert capsys.readouterr().out.startswith("step 5 | test loss ")
    main(monkeypatch, evaluate, tied / "runs" / "half")
    shutil.copyfile(tied / "two" / "meta.json", tied / "one" / "meta.json")                 # prepared again
    with pytest.raises(SystemExit, match="one/train is of another tokenizer"):
        main(monkeypatch, evaluate, tied / "runs" / "half")


def test_tokens_of_other_programs_are_allowed_and_said(data, tied, monkeypatch, capsys):   # noqa: F811
    main(monkeypatch, moe_ext.train, *flags(tied / "one", tied / "runs", data__valid=data / "valid", train__steps=7))
    said = (tied / "runs" / "debug" / "run.log").read_text()
    assert said.count(f"not checked, for no meta.json tells it: which tokenizer {data}/valid is of") == 1
    with pytest.warns(UserWarning, match=r"not checked, .* whether .*valid is of the tokenizer of"):
        main(monkeypatch, evaluate, tied / "runs" / "debug")


# ---- the driver ------------------------------------------------------------------------------------------------------
def test_a_run_on_parts_of_a_blend(data, tmp_path, monkeypatch):                            # noqa: F811
    """From another directory too; documents change the loss, and what the thread reads ahead changes nothing."""
    blend = f"0.7 {data}/train 0.3 {data}/valid"
    options = dict(data__train=blend, data__valid="", data__split="8,2", train__steps=5, train__eval_every=3,
                   train__accumulation=2, data__tokenizer="")
    losses = {}
    for name, more in {"ahead": [], "plain": ["--data.prefetch", 0], "masked": ["--data.mask-end"],
                       "apart": ["--data.reset-attention", "--data.reset-positions"]}.items():
        main(monkeypatch, moe_ext.train, *flags(data, tmp_path / name, **options), *more)
        lines = (tmp_path / name / "debug" / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line) for line in lines]
    for key in ("loss", "valid_loss"):
        ahead, direct, masked, apart = ([line[key] for line in losses[name] if key in line] for name in losses)
        assert ahead == direct and masked != direct != apart
    said = (tmp_path / "ahead" / "debug" / "run.log").read_text()
    assert "data        0.700 of the rows: " in said and " epochs\ndata        0.300 of the rows: " in said
    main(monkeypatch, evaluate, tmp_path / "ahead" / "debug")
    monkeypatch.chdir(tmp_path)
    main(monkeypatch, moe_ext.train, *flags(data, tmp_path / "ahead", **options | {"train__steps": 7}), "--resume",
         "auto")
    assert "changed since step 5: train.steps was 5 and is 7" in (tmp_path / "ahead" / "debug" / "run.log").read_text()


def test_megatrons_totals_in_the_log(data, tmp_path, monkeypatch, capsys):                  # noqa: F811
    main(monkeypatch, moe_ext.train, *flags(data, tmp_path, log__style="megatron"), "--dry-run")
    assert "> total number of documents: 50\n> total number of samples: " in capsys.readouterr().out


def test_what_does_not_go_together(data, tmp_path):                                         # noqa: F811
    with pytest.raises(ConfigError, match=r"data.split 8,2 takes the held-out text out of data.train, but data.valid"):
        DataConfig(split="8,2")
    with pytest.raises(ConfigError, match=r"data.prefetch is -1"):
        DataConfig(prefetch=-1)
    config = plain(parse(flags(data, tmp_path, data__valid="", data__split="999,1,1")))
    with pytest.raises(ValueError, match="of which valid gets none"):
        preflight.preflight(config)
    with pytest.raises(ConfigError, match=r"ids below model.vocab_size"):
        write(tmp_path / "high", [[400] * 50], 500)
        preflight.preflight(plain(parse(flags(data, tmp_path, data__train=f"1 {data}/train 1 {tmp_path}/high"))))


def test_checkpoints_of_earlier_versions_know_no_digest(straight, data, tmp_path):          # noqa: F811
    state = checkpoint.read_state(straight / "ckpt" / "step-000020").loader
    assert state.pop("data") == IndexedDataset(data / "train").digest
    loader = Loader(IndexedDataset(data / "train"), seq_len=32, batch_size=8, seed=state["seed"])
    loader.load_state_dict(state)
    assert loader.row == state["row"]
