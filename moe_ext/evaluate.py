"""Held-out loss of a run: `python -m moe_ext.evaluate RUN_DIR [--data PREFIX | --sets "code=PREFIX ..."]
[--choices FILE] [--checkpoint best] [--batches 100]`.

The mean cross-entropy, in nats per token, over rows of the held-out tokens; without dropout, router noise or capacity.
All of them: the file's tokens in its order, cut every seq_len, each predicted once from those before it in its row (the
very first has none). A part of them: rows of the shuffled text, the same ones each time. Beside it stand

    perplexity      exp(loss)
    bits per byte   loss * tokens / (ln 2 * bytes): comparable between tokenizers. End-of-document tokens are among the
                    tokens and their loss in the mean, but they have no bytes
    unigram entropy of these tokens, the loss of the best model that sees no context
"""
from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import tyro

from moe_ext import checkpoint
from moe_ext.config import Config, ModelConfig, load, named_sets, require
from moe_ext.data import Blend, IndexedDataset, Loader, open_data, unigram_entropy
from moe_ext.data.blend import read_blend
from moe_ext.data.loader import IGNORED
from moe_ext.log import chosen, measured, perplexity
from moe_ext.model import GPT, build, precision
from moe_ext.parallel.mesh import Mesh
from moe_ext.run import loader_options, same_tokenizer


class Run(NamedTuple):
    """A trained model and where it came from."""
    config: Config
    model: GPT          # in evaluation mode, on train.device
    step: int           # optimizer steps behind it
    folder: Path


def load_run(folder: str | Path, path: str | Path | None = None) -> Run:
    """The model of a run folder: of its newest checkpoint, of the one at `path`, or of the "best", which a run with
    train.keep_best keeps. Errors: ConfigError, FileNotFoundError, CheckpointError."""
    folder = Path(folder)
    require((folder / "config.toml").is_file(), f"{folder} is no run folder: it holds no config.toml")
    config = load(folder / "config.toml")
    if str(path) == "best":
        path = checkpoint.best(folder / "ckpt")
        require(path is not None, f"{folder}/ckpt knows no best checkpoint: train with --train.keep-best, or give "
                "the folder of another")
    path = path or checkpoint.latest(folder / "ckpt")
    require(path is not None, f"{folder}/ckpt holds no checkpoint yet: train longer or set train.save_every")
    model = build(config)
    state = checkpoint.load(path, model=model)
    return Run(config, model.eval(), state.step, folder)


class Text(NamedTuple):
    """Held-out tokens, and what their loss is compared with."""
    dataset: IndexedDataset | Blend
    entropy: float                  # of the tokens' frequencies, nats
    bytes_per_token: float | None   # of the text; None: not known

    def compare(self, loss: float) -> dict[str, float]:
        """Other forms of a loss in nats per token: its perplexity and, where the bytes are known, bits per byte."""
        numbers = {"perplexity": perplexity(loss)}
        if self.bytes_per_token:
            numbers["bits_per_byte"] = loss / (math.log(2) * self.bytes_per_token)
        return numbers


def held_out(dataset: IndexedDataset | Blend, tokenizer: str | Path) -> Text:
    """The Text of a dataset. tokenizer: the file that decodes it, "" or missing if there is none."""
    sizes = [(weight, count_bytes(part, Path(tokenizer)), len(part.tokens)) for weight, part in dataset.parts]
    known = all(size is not None for _, size, _ in sizes)
    return Text(dataset, unigram_entropy(dataset),
                sum(weight * size / tokens for weight, size, tokens in sizes) if known else None)


def count_bytes(dataset: IndexedDataset, tokenizer: Path) -> int | None:
    """Bytes of a dataset's text in UTF-8: those of meta.json beside it, if that tells of as many tokens; else the
    tokens are decoded. Special tokens, as those that end documents, have none. None without meta.json and tokenizer."""
    for path in (dataset.path.with_suffix(".meta.json"), dataset.path.with_name("meta.json")):
        try:
            side = json.loads(path.read_bytes())[dataset.path.stem]
            if side["tokens"] == len(dataset.tokens):
                return side["bytes"]
        except (OSError, ValueError, LookupError, TypeError):       # none, or not one of moe_ext.data
            pass
    if not tokenizer.is_file():
        return None
    from moe_ext.generate import load_tokenizer  # which imports this file

    decode, size = load_tokenizer(tokenizer).decode_batch, 0
    for begin in range(0, len(dataset), 256):
        documents = [dataset[d].tolist() for d in range(begin, min(begin + 256, len(dataset)))]
        size += sum(len(text.encode()) for text in decode(documents, skip_special_tokens=True))
    return size


@torch.no_grad()
def evaluate(model: GPT, config: Config, dataset: IndexedDataset | Blend, batches: int = 0,
             mesh: Mesh | None = None) -> float:
    """Mean loss in nats per token over `batches` micro-batches of `dataset`, always the same rows; 0, or more than
    there are: over all of it, its last row being shorter. Of a Blend: the mean of its sets' losses, by its weights.

    A micro-batch is that of all ranks together. mesh: of a model that lies on one; every rank calls, all get the mean.
    Errors: ValueError; FloatingPointError if the mean is not finite.
    """
    if batches < 0:
        raise ValueError(f"evaluate: batches is {batches}, wanted 0 (all of the held-out text) or a positive number")
    if len(dataset.parts) > 1:
        return sum(weight * evaluate(model, config, part, batches, mesh) for weight, part in dataset.parts)
    micro_batch, seq_len, device = config.train.micro_batch, config.model.seq_len, next(model.parameters()).device
    rows_per_batch = micro_batch * config.mesh.dp
    mine = rows_per_batch // (mesh.config.dp if mesh else 1)
    first = mesh.dp_rank * mine if mesh else 0
    rows = math.ceil((len(dataset.tokens) - 1) / seq_len)
    part = 0 < batches * rows_per_batch < rows
    rows = batches * rows_per_batch if part else rows
    options = dict(vocab_size=config.model.vocab_size, **loader_options(config) | {"prefetch": 0})
    loader = Loader(dataset, seq_len=seq_len, batch_size=rows_per_batch, shuffle=part, **options)
    tail = None                     # what no whole row predicts
    if rows > loader.samples:
        rest = dataset.between(loader.samples * seq_len, len(dataset.tokens))
        tail = Loader(rest, seq_len=len(rest.tokens) - 1, batch_size=1, shuffle=False, **options).batch()
    training, total, bad_L = model.training, torch.zeros(2, dtype=torch.float64, device=device), 0
    model.eval()
    for begin in range(0, rows, rows_per_batch):
        for micro in range(first, first + mine, micro_batch):
            batch, left = loader.batch(micro, micro + micro_batch), rows - begin - micro
            batch.targets[max(0, left):] = IGNORED      # rows past the last: ranks go on together
            if tail and 0 < left <= micro_batch:        # in front of the last row, where it sees nothing of the rest
                batch.targets[left - 1] = IGNORED
                for whole, short in zip(batch, tail, strict=True):
                    if torch.is_tensor(whole):
                        whole[left - 1, :short.shape[1]] = short
            with precision(config, device):
                out = model(batch.tokens.to(device), batch.targets.to(device), **batch.borders(device))
            learnt = (batch.targets >= 0).sum().to(device)
            total, bad_L = total + torch.stack([out.token_loss.double(), learnt]), bad_L + out.bad_L
        loader.advance()
    model.train(training)
    if mesh:
        total, bad_L = mesh.sum(total / mesh.config.tp, bad_L)
        total[1] /= mesh.config.pp * mesh.config.sp     # every stage has counted them, and every rank of a sequence
    loss = (total[0] / total[1]).item()
    if problem := not_finite(config.model, bad_L, {"the held-out loss": loss}):
        raise FloatingPointError(problem)
    return loss


def not_finite(config: ModelConfig, bad_L, losses: dict[str, float]) -> str:
    """What went wrong first in forwards whose tokens with bad logits are bad_L; "" if nothing did."""
    for layer, bad in enumerate(bad_L.tolist(), start=config.moe.dense_layers):
        if bad:
            return f"the logits of the router layers.{layer}.mlp are not finite for {bad:,.0f} tokens"
    return next((f"{name} is {loss:g}" for name, loss in losses.items() if not math.isfinite(loss)), "")


def main() -> None:
    # these import this file
    from moe_ext.choices import read, score
    from moe_ext.generate import load_tokenizer
    from moe_ext.preflight import check_tokens

    def command(run: tyro.conf.Positional[Path], /, data: str = "", sets: str = "", choices: str = "",
                plain: bool = False, checkpoint: Path | None = None, batches: int = 0) -> None:
        """Held-out loss of a run, and its share of right answers to multiple-choice questions. Without data, sets and
        choices: of all that the run itself was evaluated on, and of the test part of its data.split.

        Args:
            run: the run folder
            data: prefix of the tokens (PREFIX.bin, PREFIX.idx), of the run's tokenizer
            sets: several, also blends: "NAME=PREFIX NAME='0.7 PREFIX 0.3 PREFIX'"
            choices: a file of questions in HellaSwag's layout (.jsonl)
            plain: of the questions read ctx and endings as they stand, as build-nanogpt does, not as
                lm-evaluation-harness does
            checkpoint: folder of one checkpoint, or best; the newest of the run if not given
            batches: micro-batches of each set; 0, or more than there are: all of them
        """
        require(not (data and sets), "--data and --sets both name tokens: put all into --sets \"NAME=PREFIX ..\"")
        loaded = load_run(run, checkpoint)
        tokenizer, model, own = run / "tokenizer.json", loaded.config.model, loaded.config.data
        split = ""
        if not (data or sets or choices):
            data, split, sets, choices = own.valid, own.split, own.eval_sets, own.choices
            require(data or split or sets or choices, f"{run} was trained without held-out text (data.valid): give "
                    "--data PREFIX")
        prefixes = ({"valid": data} if data else {}) | named_sets(sets)
        sides = open_data(own.train, split=split)._asdict() if split else {}
        opened = {name: sides[name] for name in ("valid", "test") if sides.get(name)} | \
            {name: open_data(text).train for name, text in prefixes.items()}
        for _, prefix in (pair for text in (own.train if split else "", *prefixes.values()) if text
                          for pair in read_blend(text)):
            same_tokenizer(run, prefix)
        texts = {name: held_out(dataset, tokenizer) for name, dataset in opened.items()}
        require(texts or choices, f"{run} was trained without held-out text (data.split {split} has no share of it): "
                "give --data PREFIX")
        for _, dataset in (pair for text in texts.values() for pair in text.dataset.parts):
            check_tokens(dataset, model.vocab_size, 0, 1)
        questions = read(choices, load_tokenizer(tokenizer), model, plain) if choices else []

        for name, text in texts.items():
            loss = evaluate(loaded.model, loaded.config, text.dataset, batches)
            print(f"step {loaded.step} | {measured(name, loss, text.entropy, **text.compare(loss))}")
        if questions:
            print(f"step {loaded.step} | {chosen(score(loaded.model, loaded.config, questions))}")

    try:
        tyro.cli(command, prog="python -m moe_ext.evaluate")
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
