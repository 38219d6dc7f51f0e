"""Token files byte for byte and the loader's order; every damaged input is named."""
import json
import struct

import numpy as np
import pytest
import torch

from moe_ext import _C
from moe_ext.data import IndexedDataset, IndexedWriter, Loader, token_dtype, unigram_entropy


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
        doc, offset = np.full(samples, -1), np.full(samples, -1, np.int32)
        _C.sample_index(8, 50, docs.ctypes.data, 50, sizes.ctypes.data, length, samples, doc.ctypes.data,
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
        line = np.concatenate([dataset[d] for d in loader.sets[0].epoch(epoch).docs])
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
    orders = [order for epoch in map(loader.sets[0].epoch, (0, 1)) for order in (epoch.docs, epoch.order)]
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
    assert loader.epoch == pytest.approx(3, abs=6 / loader.samples) and len(loader.sets[0].epochs) <= 2


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
    with pytest.raises(ValueError, match=f"loader state: {name} .* there, .* here"):
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
