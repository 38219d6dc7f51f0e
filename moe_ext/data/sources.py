"""Files -> documents. What is left out is counted by reason, never lost in silence.

    folders      all their .txt, .md, .py, .jsonl and .parquet files, also compressed; links to folders are not followed
    text         a file is a document. A single file, and one of several above `cut_kb`, is cut into documents of about
                 16 KiB, at line ends and in longer lines, so that some can be held out.
    .jsonl       a document is the line's field `text_key`; .parquet: the column `text_key`
    compressed   gzip, bzip2, xz and zstd, by their first bytes, whatever their names
    encodings    UTF-8, or UTF-16 and UTF-32 by their byte order mark. Other bytes become U+FFFD and are counted; a file
                 with more than 1 % of them, or with NUL characters, is no text.

A path named by the user must be good: it raises ValueError or FileNotFoundError. A bad file found in a folder is left
out. Only regular files are opened.
"""
import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import stat
import sysconfig
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copyfileobj
from typing import BinaryIO, NamedTuple

TEXT, LINES, TABLES = (".txt", ".md", ".py"), (".jsonl", ".ndjson"), (".parquet",)
OTHER_DATA = (".json", ".csv", ".tsv")          # not text to learn from as they stand
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}  # of the standard library
PIECE = 16 * 1024                               # bytes of a document cut from a text file
LINE = 2**26                                    # longest line of .jsonl, in characters
UNDECODABLE = 0.01                              # share of a file's bytes

COMPRESSED = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0", ".zst": b"(\xb5/\xfd"}
UNREADABLE = {"zip": b"PK\x03\x04", "7z": b"7z\xbc\xaf\x27\x1c", "rar": b"Rar!", "lz4": b"\x04\x22\x4d\x18",
              "compress": b"\x1f\x9d", "PDF": b"%PDF-"}
MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
DAMAGED = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)
try:
    from compression import zstd  # Python 3.14
except ImportError:
    try:
        from backports import zstd
    except ImportError:
        zstd = None
if zstd:
    DAMAGED += (zstd.ZstdError,)


class NotText(ValueError):
    """A file that holds no text that can be read; reason: a few words."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.reason = reason


@dataclass
class LeftOut:
    """What is not in the data: for each reason how many, how many bytes where they are known, and the first."""
    reasons: dict[str, dict] = field(default_factory=dict)

    def add(self, reason: str, first, count: int = 1, size: int = 0) -> None:
        entry = self.reasons.setdefault(reason, {"count": 0, "bytes": 0, "first": str(first)})
        entry["count"] += count
        entry["bytes"] += size

    def __str__(self):
        return "; ".join(f"{reason}: {entry['count']:,}" + (f" (first: {entry['first']})" if entry["first"] else "")
                         for reason, entry in sorted(self.reasons.items()))


class Replace:
    """The error handler "moe_ext": bytes that are not of the encoding become U+FFFD and are counted."""

    def __init__(self):
        self.count = 0
        codecs.register_error("moe_ext", self)

    def __call__(self, error: UnicodeError) -> tuple[str, int]:
        self.count += error.end - error.start
        return "\ufffd", error.end


undecodable = Replace()


class Source(NamedTuple):
    path: Path
    named: bool             # by the user, not found in a folder
    held_out: bool = False


def find(roots: tuple[str, ...], left_out: LeftOut) -> list[Source]:
    """The files behind --text, each once, sorted by name within a folder. FileNotFoundError if there are none."""
    found = {}
    for text in roots:
        if not text:
            raise ValueError("text: got an empty name, wanted files and folders (. is this one)")
        root = Path(sysconfig.get_path("stdlib") if text == "stdlib" else text)
        if root.is_dir():
            def unreadable(error):
                left_out.add("unreadable folder", error.filename)
            for folder, folders, names in os.walk(root, onerror=unreadable):
                skipped = {name for name in folders if text == "stdlib" and name in SKIPPED}
                for name in folders:
                    if name in skipped:
                        left_out.add("folder of tests or packages", os.path.join(folder, name))
                    elif os.path.islink(os.path.join(folder, name)):
                        left_out.add("link to a folder", os.path.join(folder, name))
                folders[:] = sorted(set(folders) - skipped)
                for name in sorted(names):
                    path = Path(folder, name)
                    if not path.is_file():
                        left_out.add("neither file nor folder", path)
                    elif kind(path) not in TEXT + LINES + TABLES:
                        left_out.add("other suffix", path, size=path.stat().st_size)
                    elif path.resolve() in found:
                        left_out.add("file met twice", path)
                    else:
                        found[path.resolve()] = Source(path, False)
        elif root.is_file():
            if kind(root) in OTHER_DATA:
                raise ValueError(f"text: {root}: got a {kind(root)} file, wanted text, .jsonl with a record a line, or "
                                 ".parquet: convert it")
            if root.resolve() in found:
                left_out.add("file met twice", root)
            found[root.resolve()] = Source(root, True)
        elif root.exists():
            raise ValueError(f"text: {root} is neither a file nor a folder (a pipe, a socket, a device): write what "
                             "comes out of it to a file")
        else:
            raise FileNotFoundError(f"text: no file or folder {root}; give a path or `stdlib`")
    if not found:
        raise FileNotFoundError(f"text: no {', '.join(TEXT + LINES + TABLES)} file in {', '.join(roots)}"
                                + (f"; left out: {left_out}" if left_out.reasons else ""))
    return list(found.values())


def kind(path: Path) -> str:
    """The suffix in small letters, that of compression apart."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in COMPRESSED), "")


class Reader:
    """Documents of files. broken: whether a .jsonl line without text is refused or left out. cut_kb: see above."""

    def __init__(self, left_out: LeftOut, text_key: str = "text", broken: str = "refuse", cut_kb: float = 0):
        self.left_out, self.text_key, self.broken, self.cut_bytes = left_out, text_key, broken, int(cut_kb * 1000)

    def documents(self, source: Source, alone: bool) -> Iterator[str]:
        """The documents of a file that hold anything but white space; alone: a text file is cut whatever its length.
        NotText, perhaps only at its end, if it must be left out as a whole."""
        with ExitStack() as stack:
            try:
                stream = self.open(source.path, stack)
                if kind(source.path) in TABLES or stream.peek(4)[:4] == b"PAR1":
                    pieces = self.table(source.path, stream, stack)
                else:
                    pieces = self.text(source.path, stream, alone)
                for place, text in pieces:
                    if text and not text.isspace():
                        yield text
                    else:
                        self.left_out.add("empty document", place)
            except DAMAGED as error:
                raise NotText(source.path, "damaged or cut off") from error
            except OSError as error:
                raise NotText(source.path, f"cannot be read ({error.strerror or error})") from error

    def open(self, path: Path, stack: ExitStack) -> BinaryIO:
        """The file's bytes as they were before compression."""
        file = stack.enter_context(open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb"))
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise NotText(path, "neither file nor folder")
        start = file.peek(8)[:8]
        for name, magic in UNREADABLE.items():
            if start.startswith(magic):
                raise NotText(path, f"{name} file, not text: unpack or convert it")
        if start.startswith(COMPRESSED[".gz"]):
            file = gzip.open(file)
        elif start.startswith(COMPRESSED[".bz2"]):
            file = bz2.open(file)
        elif start.startswith(COMPRESSED[".xz"]):
            file = lzma.open(file)
        elif start.startswith(COMPRESSED[".zst"]):
            if not zstd:
                raise NotText(path, "zstd file, which needs backports.zstd: pip install 'moe_ext[zstd]'")
            file = zstd.open(file)
        else:
            return file
        return stack.enter_context(io.BufferedReader(file))

    def text(self, path: Path, stream: BinaryIO, alone: bool) -> Iterator[tuple[str, str]]:
        """(place, document): of a .jsonl file the field of each line, else the file or its pieces."""
        start = stream.peek(4)[:4]
        encoding = next((name for mark, name in MARKS if start.startswith(mark)), "utf-8")
        lines = io.TextIOWrapper(stream, encoding, errors="moe_ext", newline="\n")
        before, size = undecodable.count, 0
        records = kind(path) in LINES
        whole, held = not alone and not records, []     # the lines of a text that may yet prove long
        number = 0
        while line := lines.readline(LINE if records else PIECE):
            number += 1
            if "\0" in line:
                raise NotText(path, "binary (has NUL characters)")
            length = len(line.encode())
            size += length
            if records:
                yield from self.record(path, number, line, lines)
                continue
            held.append(line)
            if whole and self.cut_bytes and size > self.cut_bytes:
                whole = False
                *done, last = cut(held)
                yield from ((str(path), piece) for piece in done)
                held, filled = [last] * bool(last), len(last.encode())
            elif not whole:
                filled = length if len(held) == 1 else filled + length
            if not whole and filled >= PIECE:
                yield str(path), "".join(held)
                held = []
        if undecodable.count - before > UNDECODABLE * max(size, 1):
            raise NotText(path, f"not {encoding} (more than 1 % of its bytes)")
        if held or not number:
            yield str(path), "".join(held)

    def record(self, path: Path, number: int, line: str, lines) -> Iterator[tuple[str, str]]:
        """The text of one .jsonl line; nothing for an empty or broken one."""
        got = line[:60]
        if len(line) == LINE and not line.endswith("\n"):
            while (rest := lines.readline(LINE)) and not rest.endswith("\n"):
                pass
            line = ""
        elif line.isspace():
            return
        try:
            text = json.loads(line)[self.text_key]
            if isinstance(text, str):
                yield f"{path}: line {number}", text.encode("utf-8", errors="replace").decode()
                return          # a lone surrogate is legal JSON, not UTF-8
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        if self.broken == "refuse":
            raise ValueError(f"{path}: line {number}: got {got!r}, wanted one JSON object with a string "
                             f'"{self.text_key}" a line, below {LINE:,} characters: mend it, choose another --text-key '
                             "or leave out such lines with --broken skip")
        self.left_out.add("broken line", f"{path}: line {number}")

    def table(self, path: Path, stream: BinaryIO, stack: ExitStack) -> Iterator[tuple[str, str]]:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise ValueError(f"{path}: reading .parquet needs pyarrow: pip install 'moe_ext[parquet]'") from None
        if not isinstance(getattr(stream, "raw", None), io.FileIO):     # a parquet file is read from its end
            packed, stream = stream, stack.enter_context(tempfile.TemporaryFile())
            copyfileobj(packed, stream)
        try:
            table = parquet.ParquetFile(stream)
            column = {entry.name: entry.type for entry in table.schema_arrow}.get(self.text_key)
            if column not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
                raise ValueError(f"{path}: got columns {', '.join(table.schema_arrow.names)}, wanted one of strings "
                                 f"named {self.text_key}: name it with --text-key")
            row = 0
            for batch in table.iter_batches(256, columns=[self.text_key]):
                for text in batch.column(0):
                    row += 1
                    yield f"{path}: row {row}", text.as_py() or ""
        except pyarrow.ArrowException:
            raise NotText(path, "damaged .parquet") from None


def cut(lines: list[str]) -> list[str]:
    """Documents of at least PIECE bytes, cut at line ends; the last may be shorter, or empty."""
    pieces, held, filled = [], [], 0
    for line in lines:
        held.append(line)
        filled += len(line.encode())
        if filled >= PIECE:
            pieces.append("".join(held))
            held, filled = [], 0
    return [*pieces, "".join(held)]
