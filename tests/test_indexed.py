"""Token files: what the writer refuses, merging, damage of every byte, and Megatron's own reader and builder."""
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moe_ext.data import Blend, IndexedDataset, IndexedWriter, Loader, token_dtype
from moe_ext.data.indexed import DTYPES, HEADER, MAGIC, merge, read_index


def write(prefix, documents, vocab_size=4096):
    with IndexedWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add(document)
    return IndexedDataset(prefix)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("wrong, message", [
    ([70000, 5, -1], "ids from -1 to 70000, wanted ids from 0 to 4095"),
    ([4096], "ids from 4096 to 4096"),
    ([2**70], "dtype object"),
    ([1.5], "dtype float64"),
    ([1.0], "dtype float64"),
    ([True], "dtype bool"),
    (["5"], "wanted a list of integers"),
    ([[1, 2], [3, 4]], r"shape \[2, 2\]"),
    (5, r"shape \[\]"),
    (np.array([-1], np.int8), "ids from -1"),
])
def test_ids_that_are_none_are_refused(tmp_path, wrong, message):
    with IndexedWriter(tmp_path / "t", 4096) as writer:
        writer.add([1, 2])
        with pytest.raises(ValueError, match=message):
            writer.add(wrong)
        writer.add(np.array([4095], np.uint64))
        writer.add([])
    assert [document.tolist() for document in IndexedDataset(tmp_path / "t")] == [[1, 2], [4095], []]


def test_vocabularies_that_no_token_type_holds(tmp_path):
    assert token_dtype(2**31) == np.int32
    for size in (0, -1, 2**31 + 1):
        with pytest.raises(ValueError, match=f"vocab_size: got {size}"):
            token_dtype(size)


def test_a_failed_writer_leaves_what_was_there(tmp_path):
    with pytest.raises(KeyError), IndexedWriter(tmp_path / "t", 4096) as writer:
        writer.add([1])
        raise KeyError
    assert names(tmp_path) == []
    write(tmp_path / "t", [[7]])
    with pytest.raises(KeyError), IndexedWriter(tmp_path / "t", 4096) as writer:
        writer.add([1])
        raise KeyError
    assert IndexedDataset(tmp_path / "t")[0].tolist() == [7] and names(tmp_path) == ["t.bin", "t.idx"]
    write(tmp_path / "t", [[8]])
    assert IndexedDataset(tmp_path / "t")[0].tolist() == [8] and names(tmp_path) == ["t.bin", "t.idx"]


@pytest.mark.parametrize("fails", ["fsync", "rename"])
def test_a_disk_that_fails_at_the_end(tmp_path, monkeypatch, fails):
    """Neither half a file nor an index without its tokens."""
    def full(*_):
        raise OSError(28, "No space left on device")
    writer = IndexedWriter(tmp_path / "t", 4096)
    writer.add([1])
    monkeypatch.setattr(*{"fsync": (os, "fsync"), "rename": (Path, "rename")}[fails], full)
    with pytest.raises(OSError), writer:
        pass
    assert "t.bin" not in names(tmp_path) and not [name for name in names(tmp_path) if "partial" in name]


def test_two_writers_of_one_file(tmp_path):
    with IndexedWriter(tmp_path / "t", 4096) as writer:
        writer.add([1])
        with pytest.raises(ValueError, match=r"t.bin.partial: another process is writing it"):
            IndexedWriter(tmp_path / "t", 4096)
    assert IndexedDataset(tmp_path / "t")[0].tolist() == [1]
    with pytest.raises(ValueError, match="make it first"):
        IndexedWriter(tmp_path / "nowhere" / "t", 4096)


# ---- merge -----------------------------------------------------------------------------------------------------------
def several_sequences(prefix):
    """Documents [0, 1, 2] of two sequences and [3, 4, 5] of one, int32, as Megatron splits sentences."""
    Path(f"{prefix}.bin").write_bytes(struct.pack("<6i", *range(6)))
    Path(f"{prefix}.idx").write_bytes(
        MAGIC + struct.pack("<QBQQ", 1, 4, 3, 3) + struct.pack("<3i", 1, 2, 3) + struct.pack("<3q", 0, 4, 12)
        + struct.pack("<3q", 0, 2, 3))
    return prefix


def test_merged_files_are_those_written_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_ext.data.indexed.CHUNK", 2)    # in pieces
    documents = [[1, 2, 3], [], [4], [5, 6], [7], [8, 9]]
    write(tmp_path / "a", documents[:3])
    write(tmp_path / "b", documents[3:5])
    write(tmp_path / "c", documents[5:])
    write(tmp_path / "all", documents)
    merge([tmp_path / name for name in "abc"], tmp_path / "merged")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"merged{suffix}").read_bytes() == (tmp_path / f"all{suffix}").read_bytes()


def test_merge_keeps_documents_of_several_sequences(tmp_path):
    several_sequences(tmp_path / "s")
    write(tmp_path / "t", [[70000], [5]], vocab_size=2**17)
    merge([tmp_path / "s", tmp_path / "t", tmp_path / "s"], tmp_path / "out")
    dataset = IndexedDataset(tmp_path / "out")
    assert [document.tolist() for document in dataset] == [[0, 1, 2], [3, 4, 5], [70000], [5], [0, 1, 2], [3, 4, 5]]
    data = (tmp_path / "out.idx").read_bytes()
    assert HEADER.unpack_from(data)[3:] == (8, 7)
    assert struct.unpack_from("<7q", data, HEADER.size + 12 * 8) == (0, 2, 3, 4, 5, 7, 8)


def test_what_cannot_be_merged(tmp_path):
    several_sequences(tmp_path / "s")
    write(tmp_path / "t", [[1]])
    with pytest.raises(ValueError, match="got tokens of int32, wanted uint16"):
        merge([tmp_path / "t", tmp_path / "s"], tmp_path / "out")
    with open(tmp_path / "s.idx", "ab") as file:
        file.write(bytes(3))
    with pytest.raises(ValueError, match="modes"):
        merge([tmp_path / "s"], tmp_path / "out")
    assert "out.bin" not in names(tmp_path) and "out.bin.partial" not in names(tmp_path)


# ---- damage ----------------------------------------------------------------------------------------------------------
def outcome(prefix):
    """The documents, or None if the file is refused; anything else is an error of the reader."""
    try:
        return [document.tolist() for document in IndexedDataset(prefix)]
    except ValueError as error:
        assert str(prefix) in str(error)
        return None


def test_damage_of_every_byte(tmp_path):
    """Whatever one byte says, and wherever the file ends: refused, or documents of the file's tokens in their order."""
    several_sequences(tmp_path / "t")
    data = (tmp_path / "t.idx").read_bytes()
    assert outcome(tmp_path / "t") == [[0, 1, 2], [3, 4, 5]]
    refused = total = 0
    for at in range(len(data)):
        for value in {0, 1, 255, data[at] ^ 1, data[at] ^ 128, (data[at] + 1) % 256} - {data[at]}:
            (tmp_path / "t.idx").write_bytes(data[:at] + bytes([value]) + data[at + 1:])
            got = outcome(tmp_path / "t")
            total += 1
            refused += got is None
            if got is not None:     # the document index alone can be another: it has no second witness
                assert [token for document in got for token in document] == [0, 1, 2, 3, 4, 5]
                assert HEADER.size + 36 <= at
    assert refused > 0.95 * total
    for size in range(len(data)):
        (tmp_path / "t.idx").write_bytes(data[:size])
        assert outcome(tmp_path / "t") is None


def test_foreign_and_random_headers(tmp_path):
    several_sequences(tmp_path / "t")
    rng = np.random.default_rng(0)
    for start in (b"", b"TNTIDX\0\0", b"PK\3\4", MAGIC, MAGIC + struct.pack("<QB", 1, 4),
                  MAGIC + struct.pack("<QBQQ", 1, 4, 2**60, 2**61), MAGIC + struct.pack("<QBQQ", 1, 4, 0, 1)):
        for _ in range(50):
            (tmp_path / "t.idx").write_bytes(start + rng.bytes(rng.integers(0, 200)))
            assert outcome(tmp_path / "t") is None


def test_a_document_index_that_wraps_around(tmp_path):
    """Differences of these entries overflow to positive numbers."""
    several_sequences(tmp_path / "t")
    data = bytearray((tmp_path / "t.idx").read_bytes())
    struct.pack_into("<Q", data, 26, 4)
    data[HEADER.size + 36:] = struct.pack("<4q", 0, 2**63 - 1, -2**63, 3)
    (tmp_path / "t.idx").write_bytes(data)
    with pytest.raises(ValueError, match="document index"):
        read_index(tmp_path / "t.idx")


# ---- Megatron's own code ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def megatron():
    pytest.importorskip("megatron.core", reason="pip install --no-deps -r requirements-parity.txt")
    from megatron.core.datasets import indexed_dataset
    return indexed_dataset


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("vocab_size", [4096, 128256])
def test_megatron_reads_ours_and_we_read_megatrons(tmp_path, megatron, vocab_size):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, vocab_size, size).tolist() for size in (5, 1, 30, 2, 0, 7)]
    write(tmp_path / "ours", documents, vocab_size)
    theirs = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert len(theirs) == 6 and [theirs[i].tolist() for i in range(6)] == documents
    assert theirs.document_indices.tolist() == list(range(7)) and theirs.index.dtype == token_dtype(vocab_size)

    import torch
    dtype = megatron.DType.optimal_dtype(vocab_size)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    assert [document.tolist() for document in IndexedDataset(tmp_path / "theirs")] == documents


@pytest.mark.filterwarnings("ignore")
def test_our_merge_is_megatrons(tmp_path, megatron):
    several_sequences(tmp_path / "a")
    write(tmp_path / "b", [[70000], [1, 2]], vocab_size=2**17)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for name in "ab":
        builder.add_index(str(tmp_path / name))
    builder.finalize(str(tmp_path / "theirs.idx"))
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ours")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


DOCUMENTS = [[1, 2, 3], [], [4, 100], [5], [6, 7, 8, 9, 10]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("multimodal", [False, True])
def test_every_dtype_of_megatrons_in_documents_of_several_sequences(tmp_path, megatron, multimodal):
    """We read its files of every integer type, with modes or without, and refuse floats; it reads ours of each type."""
    for kind in megatron.DType:
        dtype = getattr(np, kind.name)
        builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype, multimodal)
        for document in DOCUMENTS:
            lengths = [2, len(document) - 2] if len(document) > 2 else [len(document)]
            builder.add_document(np.array(document), lengths, list(range(len(lengths))) if multimodal else None)
        builder.finalize(str(tmp_path / "theirs.idx"))
        if kind.value not in DTYPES:
            with pytest.raises(ValueError, match=f"dtype code: got {kind.value}, wanted an integer dtype"):
                IndexedDataset(tmp_path / "theirs")
            continue
        ours = IndexedDataset(tmp_path / "theirs")
        assert ours.tokens.dtype == dtype and [document.tolist() for document in ours] == DOCUMENTS
        with IndexedWriter(tmp_path / "ours", dtype=dtype) as writer:
            for document in DOCUMENTS:
                writer.add(document)
        read = megatron.IndexedDataset(str(tmp_path / "ours"))
        assert read.index.dtype == dtype and [read[i].tolist() for i in range(5)] == DOCUMENTS
        assert (tmp_path / "ours.bin").read_bytes() == (tmp_path / "theirs.bin").read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_offsets_beyond_32_bits(tmp_path, megatron):
    """Three documents of 2^30 uint16 and one of three, in a file of 6 GiB that is a hole but for the last: both write
    the same index of it, and find that one."""
    sizes = [2**30] * 3 + [3]
    writer = IndexedWriter(tmp_path / "t", 4096)
    with writer:
        writer.sizes.extend(sizes)
        writer.documents.extend(range(1, 5))
        writer.file.truncate(2 * 3 * 2**30)
        writer.file.write(np.array([7, 8, 9], np.uint16).tobytes())
    with megatron._IndexWriter(str(tmp_path / "theirs.idx"), np.uint16) as index:
        index.write(sizes, None, range(5))
    assert (tmp_path / "t.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    assert IndexedDataset(tmp_path / "t")[3].tolist() == [7, 8, 9]
    theirs = megatron.IndexedDataset(str(tmp_path / "t"))       # which must outlive what it gives
    assert theirs[3].tolist() == [7, 8, 9]


@pytest.mark.filterwarnings("ignore")
def test_samples_are_megatrons(tmp_path, megatron):
    """Its build_sample_idx cuts documents in our order where we cut them, and its GPTDataset of one document, whose
    order is no matter, gives the samples of our loader's epoch, in another order."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.helpers import build_sample_idx
    from megatron.core.datasets.utils import Split

    rng = np.random.default_rng(1)
    several = write(tmp_path / "several", [rng.integers(0, 4096, n) for n in rng.integers(0, 20, 50)])
    loader = Loader(several, seq_len=7, batch_size=1, seed=3)
    epoch = loader.sets[0].epoch(0)
    index = build_sample_idx(several.sizes, epoch.docs.astype(np.int32), 7, 1, len(several.tokens), True, True)
    line = np.concatenate([several[d] for d in epoch.docs])
    begins = np.concatenate([[0], np.cumsum(several.sizes[epoch.docs])])
    cut = [line[begins[doc] + offset:][:8].tolist() for doc, offset in index[:-1]]
    assert [loader.sample(row).tolist() for row in np.argsort(epoch.order)] == cut and len(cut) == loader.samples

    one = write(tmp_path / "one", [rng.integers(0, 4096, 300)])
    config = GPTDatasetConfig(
        random_seed=5, sequence_length=7, split="1", tokenizer=SimpleNamespace(
            eod=0, vocab_size=4096, unique_identifiers={}),
        path_to_cache=str(tmp_path), reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False)
    theirs = GPTDataset(megatron.IndexedDataset(str(tmp_path / "one")), str(tmp_path / "one"), np.zeros(1, np.int32),
                        None, Split.train, config)
    loader = Loader(one, seq_len=7, batch_size=1, seed=3)
    ours = [loader.sample(row).tolist() for row in range(loader.samples)]
    got = [[*sample["tokens"].tolist(), sample["labels"][-1].item()] for sample in map(theirs.__getitem__,
                                                                                     range(len(theirs)))]
    assert sorted(got) == sorted(ours) and len(ours) == 42


@pytest.mark.filterwarnings("ignore")
def test_blends_are_megatrons(tmp_path, megatron):
    from megatron.core.datasets.helpers import build_blending_indices
    sets = [write(tmp_path / name, [list(range(60))]) for name in "abcd"]
    for weights in ([0.5, 0.25, 0.25], [0.1, 0.2, 0.3, 0.4], [0.7, 0.3], [1 / 3] * 3):
        of, row = np.zeros(500, np.int16), np.zeros(500, np.int64)
        build_blending_indices(of, row, weights, len(weights), 500, False)
        mine = Blend(list(zip(weights, sets, strict=False))).rows(0, 500)
        assert [part.tolist() for part in mine] == [of.tolist(), row.tolist()]
