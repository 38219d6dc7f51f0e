"""Text to a data folder: train.bin/.idx, valid.bin/.idx, tokenizer.json, meta.json. Memory does not grow with the text.

    collect     files -> documents (sources.py), dealt to buckets on disk (shuffle.py)
    plan        which documents are used, and which of them are held out
    tokenizer   the one that --tokenizer names, or a byte-level BPE trained on the training side; its end-of-text token
                ends every document
    tokenise    bucket by bucket, in parallel, each to a token file of its own (tokenise.py)
    merge       those end to end

All of it happens in OUT.partial, which takes the place of OUT when it is whole; on disk it needs the text once and the
tokens twice. A run that was stopped continues when the same command is given again: it collects anew if it had not
finished that, else only unfinished buckets are tokenised. A second run with the same text and options does nothing.
"""
import errno
import hashlib
import json
import math
import os
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from moe_ext.data import shuffle, sources, tokenise
from moe_ext.data.identity import tokenizer_hash
from moe_ext.data.indexed import IndexedDataset, merge, unigram_entropy
from moe_ext.data.shuffle import Buckets, buckets
from moe_ext.data.sources import LeftOut, NotText, Reader, Source
from moe_ext.data.target import replace, work_folder, write_whole
from moe_ext.data.tokenise import END_OF_TEXT, SIDES, Tokeniser

FORMAT = 2                                          # of meta.json and of the rules above
NOT_INPUTS = ("out", "workers", "overwrite")        # options that do not change the data


@dataclass(frozen=True)
class Text:
    """Where documents come from, and in what order."""
    out: Path = Path("data/text")       # folder to write
    text: tuple[str, ...] = ("stdlib",) # files and folders, see docs/data.md; stdlib: Python's standard library
    text_key: str = "text"              # field of a .jsonl line, column of a .parquet file
    broken: Literal["refuse", "skip"] = "refuse"    # what to do with a .jsonl line without text
    cut_kb: float = 256.0               # longer files among several are cut, as a single one always is; 0: none is
    seed: int = 0                       # of the order of the documents
    overwrite: bool = False             # replace what `out` holds if it was made of other text or with other options

    def __post_init__(self):
        object.__setattr__(self, "out", Path(self.out))
        if isinstance(self.text, str):
            object.__setattr__(self, "text", (self.text,))
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: got {self.seed}, wanted 0 to 2^64 - 1")
        if not 0 <= self.cut_kb < math.inf:
            raise ValueError(f"cut_kb: got {self.cut_kb}, wanted kilobytes, or 0 for no limit")


@dataclass(frozen=True)
class Prepare(Text):
    """Turn text into training data."""
    valid_text: tuple[str, ...] = ()    # held-out documents, e.g. of `shards`, instead of a share of `text`
    valid_fraction: float = 0.05        # share of the documents held out
    max_mb: float = 0.0                 # megabytes of text used, chosen evenly from all of it; 0: all
    tokenizer: str = ""                 # tokenizer.json, or GPT-2's vocab.json with merges.txt beside it; "": train one
    end_of_text: str = ""               # the token that ends documents; "": <|endoftext|>, <|end_of_text|>, </s>, <eos>
    vocab_size: int = 4096              # of a new tokenizer: ids, the 256 bytes and <|endoftext|> included
    bpe_mb: float = 16.0                # megabytes of training text that a new tokenizer learns from
    workers: int = 0                    # processes that tokenise; 0: one per core

    def __post_init__(self):
        super().__post_init__()
        if not 257 <= self.vocab_size < 2**31:
            raise ValueError(f"vocab_size: got {self.vocab_size}, wanted at least 257 (256 bytes and {END_OF_TEXT})")
        if not 0 < self.valid_fraction < 1:
            raise ValueError(f"valid_fraction: got {self.valid_fraction}, wanted a number between 0 and 1")
        for name in ("max_mb", "bpe_mb", "workers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted 0 or more")


def prepare(options: Prepare, say=print) -> dict:
    """Write options.out and return its meta.json. Errors: FileNotFoundError, ValueError with what to do."""
    started = time.perf_counter()
    with target(options, say) as (work, files, left_out, meta):
        if meta:
            return meta
        if options.tokenizer:       # a wrong one shows before the text is read
            tokenise.install(Path(options.tokenizer), work / "tokenizer.json")
            Tokeniser(work / "tokenizer.json", options.end_of_text)
        collected = collect(options, work, files, left_out, say)
        plan = shuffle.plan(work / "buckets", options.max_mb * 1e6 or math.inf, options.valid_fraction)
        for reason, (count, size) in (("beyond --max-mb", plan.cap), ("held out too", plan.repeated)):
            if count:
                left_out.add(reason, "", count, size)
        documents = plan.train[0] + plan.valid[0]
        for side in SIDES:
            if not getattr(plan, side)[0]:
                raise ValueError(f"text: got {documents} documents in {' '.join(options.text)}, none of them for "
                                 f"{side}: give more text or another valid_fraction (equal documents stay together)"
                                 + (f"; left out: {left_out}" if left_out.reasons else ""))
        size = plan.train[1] + plan.valid[1]
        say(f"{documents:,} documents, {size / 1e6:.1f} MB from {collected['files']:,} files")
        say_left_out(left_out.reasons, collected["undecodable_bytes"], say)

        path = work / "tokenizer.json"
        if not path.is_file():
            tokenise.train(learnt(work / "buckets", plan, options.bpe_mb * 1e6), options.vocab_size, path)
        tokeniser = Tokeniser(path, options.end_of_text)
        say(f"tokenizer: {tokeniser.vocab_size:,} ids, {time.perf_counter() - started:.1f} s")
        meta = about(options, files, collected, left_out) | {
            "vocab_size": tokeniser.vocab_size, "end_of_text": tokeniser.end, "tokenizer": "tokenizer.json",
            "tokenizer_sha256": tokenizer_hash(path)}
        with progress("tokenise", documents) as advance:
            tokenise.tokenise(path, options.end_of_text, work / "buckets", work / "parts", plan,
                              options.workers or len(os.sched_getaffinity(0)), advance)
        data = work / "data"
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir()
        shutil.copyfile(path, data / path.name)
        for side in SIDES:
            merge(sorted(prefix.with_suffix("") for prefix in (work / "parts").glob(f"*-{side}.bin")), data / side)
            dataset = IndexedDataset(data / side)
            count, size = getattr(plan, side)
            if len(dataset) != count:
                raise ValueError(f"out: got {len(dataset)} documents for {side}, wanted {count}: something else has "
                                 f"changed {work}; delete it and start again")
            meta[side] = {"documents": count, "bytes": size, "tokens": len(dataset.tokens),
                          "unigram_entropy_nats": unigram_entropy(dataset)}
            say(f"{side}: {meta[side]['tokens']:,} tokens of {count:,} documents, unigram entropy "
                f"{meta[side]['unigram_entropy_nats']:.3f} nats, {time.perf_counter() - started:.1f} s")
        write_whole(data / "meta.json", json.dumps(meta, indent=1) + "\n")
        replace(data, options.out)
    return meta


@contextmanager
def target(options: Text, say):
    """(work folder, files, what was left out so far, {}); or (None, None, None, meta.json) if `out` has it all."""
    left_out = LeftOut()
    files = sources.find(options.text, left_out)
    if held_out := getattr(options, "valid_text", ()):
        files += [Source(*source[:2], held_out=True) for source in sources.find(held_out, left_out)]
    inputs = fingerprint(options, files)
    out = options.out
    if (out / "meta.json").is_file():
        if not options.overwrite:
            meta = read_meta(out)
            if meta["inputs"] == inputs:
                say(f"{out} is up to date")
                yield None, None, None, meta
                return
            there, here = meta["options"], plain(options)
            changed = ", ".join(f"{name} {there.get(name)} there, {here.get(name)} here" for name in {**there, **here}
                                if name not in NOT_INPUTS and there.get(name) != here.get(name))
            raise ValueError(f"out: {out} was made of other text or with other options ({changed or 'files changed'}): "
                             "replace it with --overwrite, or choose another --out")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {out} exists and was not made by this program (no meta.json): choose another folder")
    try:
        with work_folder(out, inputs) as work:
            yield work, files, left_out, {}
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise ValueError(f"out: writing {out}.partial: {error.strerror}; {out} is as it was. Make room and give the "
                         f"same command again, which continues, or delete {out}.partial") from error


def collect(options: Text, work: Path, files: list[Source], left_out: LeftOut, say) -> dict:
    """All documents into work/buckets; what was counted meanwhile. Done already: only the latter."""
    done = work / "collected.json"
    if done.is_file():
        say(f"continuing in {work}")
        collected = json.loads(done.read_text())
        left_out.reasons = collected["left_out"]
        return collected
    shutil.rmtree(work / "buckets", ignore_errors=True)
    total = sum(source.path.stat().st_size for source in files)
    dealt = Buckets(work / "buckets", total, options.seed)
    reader = Reader(left_out, options.text_key, options.broken, options.cut_kb)
    begin = sources.undecodable.count
    given = any(source.held_out for source in files)
    with progress("read", total, unit="bytes") as advance:
        for source in files:
            mark, before = dealt.mark(), sources.undecodable.count
            side = (shuffle.HELD_OUT if source.held_out else shuffle.LEARNT) if given else None
            try:
                for text in reader.documents(source, alone=len(files) == 1):
                    advance(dealt.add(text, side))
            except NotText as error:
                if source.named:
                    raise ValueError(f"text: {error}") from None
                dealt.rollback(mark)
                sources.undecodable.count = before
                left_out.add(error.reason, source.path, size=source.path.stat().st_size)
    dealt.finish()
    collected = {"files": len(files), "left_out": left_out.reasons,
                 "undecodable_bytes": sources.undecodable.count - begin}
    write_whole(done, json.dumps(collected))
    return collected


def about(options: Text, files: list[Source], collected: dict, left_out: LeftOut) -> dict:
    """What meta.json says of the text, whatever is made of it."""
    return {"format": FORMAT, "inputs": fingerprint(options, files), "options": plain(options),
            "files": collected["files"], "left_out": left_out.reasons,
            "undecodable_bytes": collected["undecodable_bytes"]}


def learnt(folder: Path, plan: shuffle.Plan, limit: float):
    """The longest beginning of the training documents within `limit` bytes; one at least."""
    texts = chain.from_iterable(bucket.texts(plan.side(number, bucket, "train"))
                                for number, bucket in enumerate(buckets(folder)))
    total = 0
    for text in texts:
        size = len(text.encode())
        if total and total + size > limit:
            return
        total += size
        yield text


def say_left_out(reasons: dict, undecodable: int, say) -> None:
    if reasons:
        say(f"left out: {LeftOut(reasons)}")
    if undecodable:
        say(f"{undecodable:,} bytes that are not of their file's encoding became U+FFFD")


@contextmanager
def progress(what: str, total: int, unit: str = "documents"):
    """A function that counts what is done; a bar where standard error is a terminal."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    with Progress(TextColumn("{task.description}"), BarColumn(), TextColumn(f"{{task.completed:,.0f}} {unit}"),
                  TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=total)
        yield lambda count: bars.advance(task, count)


def read_meta(folder: Path) -> dict:
    """meta.json of a data folder. Errors: FileNotFoundError, ValueError if it is damaged or of another format."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; make it with `python -m moe_ext.data prepare --out {folder}`")
    try:
        meta = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}; a damaged file: delete {folder} and prepare it again") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        got = meta.get("format") if isinstance(meta, dict) else meta
        raise ValueError(f"{path}: format: got {got}, wanted {FORMAT}: of another version of this program; prepare it "
                         f"again, with --overwrite, or delete {folder}")
    return meta


def plain(options: Text) -> dict:
    return json.loads(json.dumps(asdict(options), default=str))


def fingerprint(options: Text, files: list[Source]) -> str:
    """Changes when an option, any input file (its name, size or time) or the tokenizer does."""
    shown = {name: value for name, value in asdict(options).items() if name not in NOT_INPUTS}
    digest = hashlib.sha256(repr((FORMAT, type(options).__name__, shown)).encode())
    for source in files:
        stat = source.path.stat()
        digest.update(f"{source.path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    if shown.get("tokenizer"):
        for path in tokenise.tokenizer_files(Path(shown["tokenizer"])):
            digest.update(path.read_bytes() if path else b"")
    return digest.hexdigest()
