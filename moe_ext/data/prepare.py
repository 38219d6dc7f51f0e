"""Text to a data folder: train.bin/.idx, valid.bin/.idx, tokenizer.json, meta.json.

    collect    files -> documents. A folder's unit is the file; a .jsonl file's is the line (its "text" field); a single
               text file is cut at line ends into documents of about 16 KiB, so that some can be held out.
    order      a document's SHA-256 decides everything: its first 8 bytes are its place in the shuffled order, the next
               8 its side (valid if below valid_fraction). So the split does not depend on file names or on which other
               documents there are, and equal documents never stand on both sides.
    tokenizer  byte-level BPE trained on the training side; <|endoftext|> is id 0 and ends every document.
    tokenise   in batches; only the digests and the batch at hand are in memory.

The folder is written beside its place and renamed when it is whole. A second run with the same text and options does
nothing.
"""
import hashlib
import json
import math
import os
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from moe_ext.data.indexed import IndexedDataset, IndexedWriter, unigram_entropy

FORMAT = 1                                          # of meta.json and of the rules above
END_OF_TEXT = "<|endoftext|>"
SUFFIXES = (".txt", ".md", ".py", ".jsonl")
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}  # of the standard library
PIECE = 16 * 1024                                   # bytes of a document cut from a single text file
BATCH = 256                                         # documents tokenised at a time


@dataclass(frozen=True)
class Prepare:
    """Turn text into training data."""
    out: Path = Path("data/text")       # folder to write
    text: str = "stdlib"                # file or folder of .txt, .md, .py, .jsonl; stdlib: Python's standard library
    vocab_size: int = 4096              # token ids, the 256 bytes and <|endoftext|> included
    valid_fraction: float = 0.05        # share of the documents held out
    max_mb: float = 24.0                # megabytes of text used, chosen evenly from all of it; 0: all
    bpe_mb: float = 16.0                # megabytes of training text that the tokenizer learns from

    def __post_init__(self):
        if not 257 <= self.vocab_size < 2**31:
            raise ValueError(f"vocab_size: got {self.vocab_size}, wanted at least 257 (256 bytes and {END_OF_TEXT})")
        if not 0 < self.valid_fraction < 1:
            raise ValueError(f"valid_fraction: got {self.valid_fraction}, wanted a number between 0 and 1")


class Document(NamedTuple):
    order: int      # place in the shuffled order
    side: int       # in [0, 2^64), uniform
    size: int       # bytes
    file: Path
    begin: int      # byte range of the file (of the raw line in a .jsonl)
    end: int


def prepare(options: Prepare, say=print) -> dict:
    """Write options.out and return its meta.json. Errors: FileNotFoundError, ValueError with what to do."""
    started = time.perf_counter()
    out = Path(options.out)
    files = find_files(options.text)
    inputs = fingerprint(options, files)
    if (out / "meta.json").is_file():
        meta = read_meta(out)
        if meta["inputs"] == inputs:
            say(f"{out} is up to date")
            return meta
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {out} exists and was not made by this program (no meta.json): choose another folder")

    documents = sorted(document for file in files for document in scan(file, whole=len(files) > 1))
    documents = first_bytes(documents, options.max_mb * 1e6 or math.inf)
    border = int(options.valid_fraction * 2**64)
    sides = {"train": [d for d in documents if d.side >= border], "valid": [d for d in documents if d.side < border]}
    for side, members in sides.items():
        if not members:
            raise ValueError(f"text: got {len(documents)} documents in {options.text}, none of them for {side}: give "
                             "more text or another valid_fraction")
    say(f"{len(documents):,} documents, {sum(d.size for d in documents) / 1e6:.1f} MB from {len(files):,} files")

    out.parent.mkdir(parents=True, exist_ok=True)
    for stale in out.parent.glob(out.name + ".tmp-*"):      # of a run that was killed
        shutil.rmtree(stale)
    work = Path(tempfile.mkdtemp(prefix=out.name + ".tmp-", dir=out.parent))
    try:
        tokenizer = train_tokenizer(first_bytes(sides["train"], options.bpe_mb * 1e6), options.vocab_size)
        tokenizer.save(str(work / "tokenizer.json"))
        say(f"tokenizer: {tokenizer.get_vocab_size():,} ids, {time.perf_counter() - started:.1f} s")
        meta = {"format": FORMAT, "inputs": inputs, "options": json.loads(json.dumps(asdict(options), default=str)),
                "vocab_size": tokenizer.get_vocab_size(), "end_of_text": tokenizer.token_to_id(END_OF_TEXT),
                "tokenizer": "tokenizer.json"}
        for side, members in sides.items():
            with IndexedWriter(work / side, options.vocab_size) as writer:
                for tokens in tokenise(tokenizer, members):
                    writer.add(tokens)
            dataset = IndexedDataset(work / side)
            meta[side] = {"documents": len(members), "bytes": sum(d.size for d in members),
                          "tokens": len(dataset.tokens), "unigram_entropy_nats": unigram_entropy(dataset)}
            say(f"{side}: {meta[side]['tokens']:,} tokens of {meta[side]['documents']:,} documents, unigram entropy "
                f"{meta[side]['unigram_entropy_nats']:.3f} nats, {time.perf_counter() - started:.1f} s")
        (work / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        work.chmod(0o755)
        replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return meta


def read_meta(folder: Path) -> dict:
    """meta.json of a data folder. Errors: FileNotFoundError, ValueError if it is damaged or of another format."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; make it with `python -m moe_ext.data prepare --out {folder}`")
    try:
        meta = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}; a damaged file: delete {folder} and prepare it again") from None
    if meta.get("format") != FORMAT:
        raise ValueError(f"{path}: format: got {meta.get('format')}, wanted {FORMAT}: delete {folder} and prepare it "
                         "again")
    return meta


def find_files(text: str) -> list[Path]:
    """The text files behind --text, sorted by name."""
    root = Path(sysconfig.get_path("stdlib") if text == "stdlib" else text)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise FileNotFoundError(f"text: no file or folder {root}; give a path or `stdlib`")
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if text != "stdlib" or name not in SKIPPED)
        files += [Path(folder, name) for name in sorted(names) if name.endswith(SUFFIXES)]
    if not files:
        raise FileNotFoundError(f"text: no {', '.join(SUFFIXES)} file in {root}")
    return files


def fingerprint(options: Prepare, files: list[Path]) -> str:
    """Changes when an option or any input file (its name, size or time) does."""
    digest = hashlib.sha256(repr((FORMAT, {**asdict(options), "out": None})).encode())
    for file in files:
        stat = file.stat()
        digest.update(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def scan(file: Path, whole: bool) -> Iterator[Document]:
    """The documents of a file that hold anything but white space. whole: a text file is one document."""
    with open(file, "rb") as stream:
        begin = 0
        while raw := read_raw(stream, file, whole):
            content = decode(file, raw, begin).encode()
            if content.strip():
                digest = hashlib.sha256(content).digest()
                yield Document(int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big"), len(content),
                               file, begin, begin + len(raw))
            begin += len(raw)


def read_raw(stream, file: Path, whole: bool) -> bytes:
    """The next document's bytes as they stand in the file; empty at its end."""
    if file.suffix == ".jsonl":
        return stream.readline()
    return stream.read() if whole else b"".join(stream.readlines(PIECE))


def decode(file: Path, raw: bytes, begin: int) -> str:
    """The text of one document; bytes that are not UTF-8 become U+FFFD. ValueError for a bad .jsonl line."""
    text = raw.decode("utf-8", errors="replace")
    if file.suffix != ".jsonl" or not text.strip():
        return text
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f'{file}: byte {begin}: got {text[:60]!r}, wanted one JSON object with a string "text" a line')
    return record["text"].encode("utf-8", errors="replace").decode()    # a lone surrogate is legal JSON, not UTF-8


def contents(documents: list[Document]) -> Iterator[str]:
    for document in documents:
        with open(document.file, "rb") as stream:
            stream.seek(document.begin)
            yield decode(document.file, stream.read(document.end - document.begin), document.begin)


def first_bytes(documents: list[Document], limit: float) -> list[Document]:
    """The longest beginning of the list whose sizes stay within `limit` bytes; at least one document."""
    total = 0
    for count, document in enumerate(documents):
        total += document.size
        if total > limit and count:
            return documents[:count]
    return documents


def train_tokenizer(documents: list[Document], vocab_size: int):
    """Byte-level BPE with GPT-2's word pattern; any text can be encoded and decodes to itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(contents(documents), trainer)
    return tokenizer


def tokenise(tokenizer, documents: list[Document]) -> Iterator[list[int]]:
    """Each document's ids with <|endoftext|> at the end. The same characters inside a text are ordinary characters."""
    tokenizer.encode_special_tokens = True
    end = tokenizer.token_to_id(END_OF_TEXT)
    for begin in range(0, len(documents), BATCH):
        for encoding in tokenizer.encode_batch_fast(list(contents(documents[begin:begin + BATCH]))):
            yield [*encoding.ids, end]


def replace(work: Path, out: Path) -> None:
    """Put the finished folder in its place; a previous one goes only after that."""
    old = work.with_name(work.name + "-old")
    if out.exists():
        out.rename(old)
    work.rename(out)
    shutil.rmtree(old, ignore_errors=True)
