"""Files to documents: encodings, compression, records, and everything that is left out with its reason."""
import bz2
import gzip
import io
import json
import lzma
import os
import socket

import numpy as np
import pytest

from moe_ext.data import sources
from moe_ext.data.sources import LeftOut, NotText, Reader, Source, find

try:
    import pyarrow
    from pyarrow import parquet
except ImportError:
    pyarrow = None


def read(path, left_out=None, alone=False, **options):
    """The documents of one file."""
    return list(Reader(left_out if left_out is not None else LeftOut(), **options).documents(Source(path, True), alone))


def counts(left_out):
    return {reason: entry["count"] for reason, entry in left_out.reasons.items()}


# ---- folders ---------------------------------------------------------------------------------------------------------
def test_all_that_a_folder_holds_is_read_or_counted(tmp_path, monkeypatch):
    """Nothing hangs (a pipe), nothing goes round (a link to the folder itself), nothing is skipped unsaid."""
    for name in ("a.txt", "B.TXT", "c.Md", "d.py", "e.jsonl", "f.txt.gz", "g.JSONL.zst", "h.parquet", "i.ndjson",
                 "v1.2.txt", "x.json", "y.csv", "z.png", "noext", "tar.tar.gz"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "sub" / "tests").mkdir(parents=True)
    (tmp_path / "sub" / "tests" / "deep.txt").write_text("deep")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "again.txt").symlink_to("a.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "round").symlink_to(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)     # a socket's name must be short
        server.bind("socket.txt")
    left_out = LeftOut()
    found = find((str(tmp_path),), left_out)
    assert {source.path.name for source in found} == {"a.txt", "B.TXT", "c.Md", "d.py", "e.jsonl", "f.txt.gz",
                                                      "g.JSONL.zst", "h.parquet", "i.ndjson", "v1.2.txt", "deep.txt"}
    assert counts(left_out) == {"other suffix": 5, "neither file nor folder": 3, "link to a folder": 1,
                                "file met twice": 1}
    assert str(left_out).startswith("file met twice: 1 (first: ") and left_out.reasons["other suffix"]["bytes"] == 10


def test_a_folder_that_cannot_be_read_is_counted(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.txt").write_text("a")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    left_out = LeftOut()
    assert len(find((str(tmp_path),), left_out)) == 1 and counts(left_out) == {"unreadable folder": 1}


def test_named_paths_must_be_good(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a path or `stdlib`"):
        find((str(tmp_path / "nowhere"),), LeftOut())
    with pytest.raises(ValueError, match="got an empty name"):
        find(("",), LeftOut())
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        find((str(tmp_path / "pipe"),), LeftOut())
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match=r"got a .json file, wanted text"):
        find((str(tmp_path / "x.json"),), LeftOut())
    with pytest.raises(FileNotFoundError, match=r"no .txt, .*left out: neither file nor folder: 1 .*other suffix: 1"):
        find((str(tmp_path),), LeftOut())
    (tmp_path / "a.odd").write_text("text")
    (tmp_path / "b.txt").write_text("text")
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    left_out = LeftOut()
    assert len(find((str(tmp_path / "a.odd"), str(tmp_path / "b.txt"), str(link)), left_out)) == 2
    assert counts(left_out)["file met twice"] == 1


def test_a_file_that_became_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(NotText, match="neither file nor folder"):
        read(tmp_path / "a.txt")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(NotText, match=r"cannot be read .No such file"):
        read(tmp_path / "gone.txt")


# ---- compression -----------------------------------------------------------------------------------------------------
PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
if sources.zstd:
    PACK["zst"] = sources.zstd.compress
LINES = "".join(json.dumps({"text": f"document {i} ünï" + " x" * i}) + "\n" for i in range(300)).encode()


@pytest.mark.parametrize("name", PACK)
def test_compressed_by_magic(tmp_path, name):
    """By their first bytes, under a right or a wrong name; two streams end to end are one file."""
    wanted = [json.loads(line)["text"] for line in LINES.splitlines()]
    for suffix in (f".jsonl.{name}", ".jsonl"):
        path = tmp_path / f"data{suffix}"
        path.write_bytes(PACK[name](LINES[:1500]) + PACK[name](LINES[1500:]))
        assert read(path) == wanted


@pytest.mark.parametrize("name", PACK)
def test_cut_or_damaged_archives_are_no_text(tmp_path, name):
    data = bytearray(PACK[name](np.random.default_rng(0).integers(97, 123, 3000, np.uint8).tobytes()))
    path = tmp_path / f"a.txt.{name}"
    zeroed = data[:100] + bytes(50) + data[150:]            # zstd's frames have no checksum by default
    for damaged in (data[:-7], data[:len(data) // 2], data[:8], *[zeroed] * (name != "zst")):
        path.write_bytes(damaged)
        with pytest.raises(NotText, match=r"damaged or cut off|cannot be read"):
            read(path)


@pytest.mark.parametrize("magic, name", [(b"PK\3\4", "zip"), (b"7z\xbc\xaf\x27\x1c", "7z"), (b"%PDF-1.4", "PDF")])
def test_archives_that_are_not_read_are_named(tmp_path, magic, name):
    (tmp_path / "a.txt").write_bytes(magic + b"rest")
    with pytest.raises(NotText, match=f"{name} file, not text"):
        read(tmp_path / "a.txt")


def test_zstd_without_its_library(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "zstd", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"(\xb5/\xfd1234")
    with pytest.raises(NotText, match=r"pip install 'moe_ext\[zstd\]'"):
        read(tmp_path / "a.jsonl.zst")


# ---- encodings -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_by_their_mark(tmp_path, encoding):
    text = "grüße \U0001f600\r\nsecond\rline\n"
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert read(tmp_path / "a.txt") == [text]
    (tmp_path / "a.jsonl").write_bytes("".join(f'{{"text": "é{i}"}}\n' for i in range(3)).encode(encoding))
    assert read(tmp_path / "a.jsonl") == ["é0", "é1", "é2"]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode(encoding)))
    assert read(tmp_path / "a.txt.gz") == [text]


def test_big_endian_marks(tmp_path):
    for mark, encoding in ((b"\xfe\xff", "utf-16-be"), (b"\0\0\xfe\xff", "utf-32-be")):
        (tmp_path / "a.txt").write_bytes(mark + "grün\n".encode(encoding))
        assert read(tmp_path / "a.txt") == ["grün\n"]


def test_bytes_of_no_encoding_are_counted_and_refused_above_one_percent(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 997 + b"\xff\xfe\xfd")
    before = sources.undecodable.count
    assert read(path) == ["x" * 997 + "\ufffd" * 3] and sources.undecodable.count == before + 3
    path.write_bytes("U+FFFD that was there: \ufffd".encode())
    assert len(read(path)) == 1 and sources.undecodable.count == before + 3
    path.write_bytes(b"x" * 900 + b"\xff" * 100)
    with pytest.raises(NotText, match=r"not utf-8 .more than 1 %"):
        read(path)
    path.write_bytes("Grüße aus Köln, schöne Grüße".encode("latin-1"))
    with pytest.raises(NotText, match="not utf-8"):
        read(path)


def test_binary_files_are_no_text(tmp_path):
    for data in (np.random.default_rng(0).bytes(100_000), "text without a mark".encode("utf-16-le"), b"\x7fELF\0\1"):
        (tmp_path / "a.txt").write_bytes(data)
        with pytest.raises(NotText, match="binary"):
            read(tmp_path / "a.txt")


# ---- text and records ------------------------------------------------------------------------------------------------
def test_long_files_are_cut_at_line_ends(tmp_path):
    text = "".join(f"line {i} {'é' * (i % 60)}\n" for i in range(4000))
    path = tmp_path / "a.txt"
    path.write_text(text)
    pieces = read(path, alone=True)
    assert "".join(pieces) == text and len(pieces) > 10
    assert all(piece.endswith("\n") and len(piece.encode()) >= sources.PIECE for piece in pieces[:-1])
    assert max(len(piece.encode()) for piece in pieces) < sources.PIECE + 200
    assert read(path, cut_kb=100) == pieces                     # one of several
    assert read(path, cut_kb=1000) == read(path) == [text]      # not long; never cut
    path.write_text("x" * 100_000)                              # a line without an end
    assert [len(piece) for piece in read(path, alone=True)] == [sources.PIECE] * 6 + [100_000 - 6 * sources.PIECE]


def test_a_file_of_just_so_many_bytes_leaves_no_empty_piece(tmp_path):
    left_out = LeftOut()
    (tmp_path / "a.txt").write_text(("x" * 63 + "\n") * 512)
    assert [len(piece) for piece in read(tmp_path / "a.txt", left_out, cut_kb=32.7)] == [sources.PIECE] * 2
    assert not left_out.reasons


def test_empty_documents_are_counted(tmp_path):
    left_out = LeftOut()
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text(" \n\t")
    (tmp_path / "c.jsonl").write_text('{"text": ""}\n\n{"text": "\\n"}\n{"text": "yes"}\n')
    assert [read(tmp_path / name, left_out) for name in ("a.txt", "b.txt", "c.jsonl")] == [[], [], ["yes"]]
    assert counts(left_out) == {"empty document": 4}


@pytest.mark.parametrize("bad", ['{"text": 3}', '["text"]', "{", '{"content": "x"}', '"text"', "null", '{"text": null}',
                                 "[" * 100_000])
def test_broken_lines_are_refused_or_left_out(tmp_path, bad):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "good"}) + "\n" + bad + "\n" + json.dumps({"text": "too"}))
    with pytest.raises(ValueError, match=r'a.jsonl: line 2: got .* wanted one JSON object with a string "text"'):
        read(path)
    left_out = LeftOut()
    assert read(path, left_out, broken="skip") == ["good", "too"]
    assert left_out.reasons["broken line"] == {"count": 1, "bytes": 0, "first": f"{path}: line 2"}


def test_a_line_without_end_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LINE", 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "' + "x" * 5000 + '"}\n{"text": "y"}\n')
    left_out = LeftOut()
    assert read(tmp_path / "a.jsonl", left_out, broken="skip") == ["y"] and counts(left_out) == {"broken line": 1}


def test_other_keys_and_half_characters(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "caf\\u00e9 \\ud800", "text": 1}\n')
    assert read(tmp_path / "a.jsonl", text_key="body") == ["café ?"]


# ---- parquet ---------------------------------------------------------------------------------------------------------
def test_parquet_without_its_library(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"pip install 'moe_ext\[parquet\]'"):
        read(tmp_path / "a.parquet")


@pytest.mark.skipif(not pyarrow, reason="needs pyarrow")
def test_parquet(tmp_path):
    texts = [f"row {i} ü" for i in range(1000)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": range(1002), "text": [*texts, None, ""]}), path, row_group_size=300)
    left_out = LeftOut()
    assert read(path, left_out) == texts and counts(left_out) == {"empty document": 2}
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read(tmp_path / "b.parquet.gz") == texts
    (tmp_path / "c.txt").write_bytes(path.read_bytes())
    assert read(tmp_path / "c.txt") == texts
    for key in ("body", "id"):
        with pytest.raises(ValueError, match=f"got columns id, text, wanted one of strings named {key}"):
            read(path, text_key=key)
    buffer = io.BytesIO(path.read_bytes())
    for damaged in (buffer.getvalue()[:-20], b"PAR1 and no more PAR1", buffer.getvalue()[:200]):
        path.write_bytes(damaged)
        with pytest.raises(NotText, match=r"damaged .parquet"):
            read(path)
