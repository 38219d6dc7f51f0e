"""Texts -> token ids, with any tokenizer of the `tokenizers` library; the buckets of `shuffle` in parallel.

Whatever a text says is text: characters that spell a special token, <|endoftext|> among them, become ordinary tokens,
and only the end of a document becomes the end-of-text id. The tokenizer's own additions (a beginning-of-text token) and
its truncation and padding are off.
"""
import ctypes
import gc
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from moe_ext.data.indexed import IndexedWriter, token_dtype
from moe_ext.data.shuffle import Bucket, Plan
from moe_ext.data.target import write_whole

END_OF_TEXT = "<|endoftext|>"
ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")    # end-of-text tokens, tried in this order
DOCUMENTS, BYTES = 256, 2**22       # of a batch: whichever is reached first
SIDES = ("train", "valid")


class Tokeniser:
    """A tokenizer.json made ready. end_of_text: its token; "": found. Errors: ValueError if there is none.

    end         its id
    vocab_size  the largest id plus 1
    """

    def __init__(self, path: Path, end_of_text: str = ""):
        from tokenizers import Tokenizer
        self.tokenizer = tokenizer = Tokenizer.from_file(str(path))
        names = [end_of_text] if end_of_text else ENDS
        name = next((name for name in names if tokenizer.token_to_id(name) is not None), None)
        if name is None:
            raise ValueError(f"tokenizer: got one without {' or '.join(names)}, wanted a token that ends documents: "
                             "name it with --end-of-text")
        self.end = tokenizer.token_to_id(name)
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        token_dtype(self.vocab_size)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.add_special_tokens([name])        # else the next line does not mean it
        tokenizer.encode_special_tokens = True      # no file and no pickle keeps this: it is set wherever one is loaded
        if any(self.end in ids for ids in self.encode([name, f"a {name} b"])):
            raise ValueError(f"tokenizer: it makes token {self.end} of the characters {name!r} in a text, which would "
                             "cut documents in two: name another token with --end-of-text")

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def load(path: Path):
    """The Tokenizer of a tokenizer.json. ValueError if it is none."""
    from tokenizers import Tokenizer
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:      # the library raises no class of its own
        raise ValueError(f"tokenizer: {path}: {error}; wanted a tokenizer.json of the `tokenizers` library") from None


def install(path: Path, target: Path) -> None:
    """Put the tokenizer behind --tokenizer at `target`: a tokenizer.json as it is, GPT-2's vocab.json with merges.txt
    beside it as a tokenizer.json. ValueError for anything else."""
    from tokenizers import Tokenizer
    vocab, merges = tokenizer_files(path)
    try:
        if merges is None:
            Tokenizer.from_file(str(vocab))
            shutil.copyfile(vocab, target)
        else:
            from tokenizers.models import BPE
            write_whole(target, byte_level(BPE.from_file(str(vocab), str(merges))).to_str(pretty=True))
    except OSError:
        raise
    except Exception as error:      # the library raises no class of its own
        raise ValueError(f"tokenizer: {vocab}: {error}; wanted a tokenizer.json of the `tokenizers` library, or "
                         "GPT-2's vocab.json and merges.txt") from None


def tokenizer_files(path: Path) -> tuple[Path, Path | None]:
    """(tokenizer.json, None) or (vocab.json, merges.txt) behind --tokenizer, a file or its folder."""
    if path.is_dir():
        path = next((path / name for name in ("tokenizer.json", "vocab.json") if (path / name).is_file()), path)
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer: no file {path}, and no tokenizer.json or vocab.json in it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"tokenizer: {path}: {error}; wanted a tokenizer.json, or GPT-2's vocab.json") from None
    if not isinstance(content, dict) or isinstance(content.get("model"), dict):
        return path, None
    merges = path.with_name(path.name.replace("vocab.json", "merges.txt"))
    if merges == path or not merges.is_file():
        raise FileNotFoundError(f"tokenizer: {path} is no tokenizer.json, and has no merges.txt beside it")
    return path, merges


def byte_level(model):
    """GPT-2's tokenizer around a BPE model: its word pattern, all bytes; any text decodes to itself."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def train(texts: Iterable[str], vocab_size: int, target: Path) -> None:
    """Learn a byte-level BPE with <|endoftext|> as id 0."""
    from tokenizers import models, pre_tokenizers, trainers
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    write_whole(target, tokenizer.to_str(pretty=True))


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) == DOCUMENTS or size > BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def part(parts: Path, number: int, side: str) -> Path:
    """PREFIX of a bucket's tokens of one side."""
    return parts / f"{number:03d}-{side}"


def tokenise_bucket(tokeniser: Tokeniser, folder: Path, parts: Path, plan: Plan, number: int) -> int:
    """Write the tokens of a bucket, what an earlier run finished apart; its number of kept documents."""
    bucket = Bucket(folder, number)
    for side in SIDES:
        which, prefix = plan.side(number, bucket, side), part(parts, number, side)
        if len(which) and not prefix.with_name(prefix.name + ".bin").is_file():
            with IndexedWriter(prefix, tokeniser.vocab_size) as writer:
                for batch in batches(bucket.texts(which)):
                    for ids in tokeniser.encode(batch):
                        ids.append(tokeniser.end)
                        writer.add(np.array(ids, dtype=np.int64))
    return plan.kept[number]


def tokenise(path: Path, end_of_text: str, folder: Path, parts: Path, plan: Plan, workers: int,
             advance: Callable[[int], None]) -> None:
    """Write the tokens of all buckets. One worker: this process and the library's threads; several: a bucket each."""
    parts.mkdir(exist_ok=True)
    numbers = [number for number, kept in enumerate(plan.kept) if kept]
    workers = min(workers, len(numbers))
    if workers == 1:
        tokeniser = Tokeniser(path, end_of_text)
        for number in numbers:
            advance(tokenise_bucket(tokeniser, folder, parts, plan, number))
        return
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"      # its threads do not live through a fork
    pool = ProcessPoolExecutor(workers, get_context("fork"), begin_worker, (path, end_of_text, folder, parts, plan))
    try:
        for done in as_completed([pool.submit(work, number) for number in numbers]):
            advance(done.result())
    except BrokenProcessPool:
        raise ValueError("a worker process was killed; perhaps memory ran out: give fewer --workers and run the same "
                         "command again, which continues") from None
    finally:
        pool.shutdown(cancel_futures=True)
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


worker: tuple       # of a worker process: its tokeniser and what is the same for all buckets


def begin_worker(path: Path, end_of_text: str, *rest) -> None:
    global worker
    gc.freeze()     # to collect what the parent left would run destructors that wait for its threads
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)          # PR_SET_PDEATHSIG: it ends with the process that waits for it
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    worker = (Tokeniser(path, end_of_text), *rest)


def work(number: int) -> int:
    return tokenise_bucket(*worker, number)
