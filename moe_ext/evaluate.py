"""Held-out loss of a run: `python -m moe_ext.evaluate RUN_DIR [--data PREFIX] [--checkpoint best] [--batches 100]`.

The mean cross-entropy, in nats per token, over rows of the held-out tokens in an order that is always the same; without
dropout, router noise or capacity. Printed beside the unigram entropy of these tokens, the loss of the best model that
sees no context.
"""
from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import tyro

from moe_ext import checkpoint
from moe_ext.config import Config, load, require
from moe_ext.data import Blend, IndexedDataset, Loader, open_data, unigram_entropy
from moe_ext.data.blend import read_blend
from moe_ext.log import beside
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


@torch.no_grad()
def evaluate(model: GPT, config: Config, dataset: IndexedDataset | Blend, batches: int = 0,
             mesh: Mesh | None = None) -> float:
    """Mean loss in nats per token over `batches` micro-batches of `dataset`, always the same rows (0, or more than
    there are: all of them). Of a Blend: the mean of its sets' losses, by its weights.

    A micro-batch is that of all ranks together. mesh: of a model that lies on one; every rank calls, all get the mean.
    Errors: ValueError; FloatingPointError if the mean is not finite.
    """
    if batches < 0:
        raise ValueError(f"evaluate: batches is {batches}, wanted 0 (all of the held-out text) or a positive number")
    if len(dataset.parts) > 1:
        return sum(weight * evaluate(model, config, part, batches, mesh) for weight, part in dataset.parts)
    rows_per_batch, device = config.train.micro_batch * config.mesh.dp, model.norm.weight.device
    mine = rows_per_batch // (mesh.config.dp if mesh else 1)
    first = mesh.dp_rank * mine if mesh else 0
    loader = Loader(dataset, seq_len=config.model.seq_len, batch_size=rows_per_batch,
                    vocab_size=config.model.vocab_size, **loader_options(config) | {"prefetch": 0})
    rows = min(batches * rows_per_batch or loader.samples, loader.samples)
    training, total, bad_L = model.training, torch.zeros(2, dtype=torch.float64, device=device), 0
    model.eval()
    for begin in range(0, rows, rows_per_batch):
        for micro in range(first, first + mine, config.train.micro_batch):
            batch = loader.batch(micro, micro + config.train.micro_batch)
            batch.targets[max(0, rows - begin - micro):] = -100     # rows past the last: ranks go on together
            with precision(config, device):
                out = model(batch.tokens.to(device), batch.targets.to(device), **batch.borders(device))
            learnt = (batch.targets >= 0).sum().to(device)
            total, bad_L = total + torch.stack([out.token_loss.double(), learnt]), bad_L + out.bad_L
        loader.advance()
    model.train(training)
    if mesh:
        total, bad_L = mesh.sum(total / mesh.config.tp, bad_L)
    loss = (total[0] / total[1]).item()
    if problem := not_finite(model, bad_L, {"the held-out loss": loss}):
        raise FloatingPointError(problem)
    return loss


def not_finite(model: GPT, bad_L, losses: dict[str, float]) -> str:
    """What went wrong first in forwards whose tokens with bad logits are bad_L; "" if nothing did."""
    for layer, bad in zip(model.moe_layers(), bad_L.tolist(), strict=True):
        if bad:
            return f"the logits of the router {layer.name} are not finite for {bad:,.0f} tokens"
    return next((f"{name} is {loss:g}" for name, loss in losses.items() if not math.isfinite(loss)), "")


def main() -> None:
    def command(run: tyro.conf.Positional[Path], /, data: str = "", checkpoint: Path | None = None,
                batches: int = 0) -> None:
        """Held-out loss of a run.

        Args:
            run: the run folder
            data: prefix of the tokens (PREFIX.bin, PREFIX.idx), of the run's tokenizer; its data.valid if not given
            checkpoint: folder of one checkpoint, or best; the newest of the run if not given
            batches: micro-batches of these tokens; 0, or more than there are: all of them
        """
        loaded = load_run(run, checkpoint)
        own = loaded.config.data
        require(data or own.valid or own.split, f"{run} was trained without held-out text (data.valid): give --data "
                "PREFIX")
        for _, prefix in read_blend(data or own.valid or own.train):
            same_tokenizer(run, prefix)
        dataset = open_data(data).train if data else open_data(own.train, own.valid, own.split).valid
        loss, entropy = evaluate(loaded.model, loaded.config, dataset, batches), unigram_entropy(dataset)
        perplexity = math.exp(loss) if loss < 700 else math.inf
        print(f"step {loaded.step} | valid loss {loss:.4f} | perplexity {perplexity:.2f} | {beside(loss, entropy)}")

    try:
        tyro.cli(command, prog="python -m moe_ext.evaluate")
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
