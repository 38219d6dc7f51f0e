"""Held-out loss of a run: `python -m moe_ext.evaluate RUN_DIR [--checkpoint RUN_DIR/ckpt/step-000500] [--batches 100]`.

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
from moe_ext.config import Config, ConfigError, load, require
from moe_ext.data import IndexedDataset, Loader, unigram_entropy
from moe_ext.log import beside
from moe_ext.model import GPT, build, precision
from moe_ext.parallel.mesh import Mesh


class Run(NamedTuple):
    """A trained model and where it came from."""
    config: Config
    model: GPT          # in evaluation mode, on train.device
    step: int           # optimizer steps behind it
    folder: Path


def load_run(folder: str | Path, path: str | Path | None = None) -> Run:
    """The model of a run folder: of its newest checkpoint, or of the one at `path`. Errors: ConfigError,
    FileNotFoundError, CheckpointError."""
    folder = Path(folder)
    require((folder / "config.toml").is_file(), f"{folder} is no run folder: it holds no config.toml")
    config = load(folder / "config.toml")
    path = path or checkpoint.latest(folder / "ckpt")
    require(path is not None, f"{folder}/ckpt holds no checkpoint yet: train longer or set train.save_every")
    model = build(config)
    state = checkpoint.load(path, model=model)
    return Run(config, model.eval(), state.step, folder)


@torch.no_grad()
def evaluate(model: GPT, config: Config, dataset: IndexedDataset, batches: int = 0, mesh: Mesh | None = None) -> float:
    """Mean loss in nats per token over `batches` micro-batches of `dataset`, always the same rows (0: all of them).

    A micro-batch is that of all ranks together. mesh: of a model that lies on one; every rank calls, all get the mean.
    """
    rows_per_batch, device = config.train.micro_batch * config.mesh.dp, model.norm.weight.device
    mine = rows_per_batch // (mesh.config.dp if mesh else 1)
    first = mesh.dp_rank * mine if mesh else 0
    loader = Loader(dataset, seq_len=config.model.seq_len, batch_size=rows_per_batch,
                    vocab_size=config.model.vocab_size)
    rows = min(batches * rows_per_batch or loader.samples, loader.samples)
    training, total = model.training, torch.zeros((), dtype=torch.float64, device=device)
    model.eval()
    for begin in range(0, rows, rows_per_batch):
        for micro in range(first, first + mine, config.train.micro_batch):
            batch = loader.batch(micro, micro + config.train.micro_batch)
            batch.targets[max(0, rows - begin - micro):] = -100     # rows past the last: ranks go on together
            with precision(config, device):
                total += model(batch.tokens.to(device), batch.targets.to(device)).token_loss
        loader.advance()
    model.train(training)
    total, = mesh.sum(total / mesh.config.tp) if mesh else [total]
    return total.item() / (rows * config.model.seq_len)


def main() -> None:
    def command(run: tyro.conf.Positional[Path], /, checkpoint: Path | None = None, batches: int = 0) -> None:
        """Held-out loss of a run.

        Args:
            run: the run folder
            checkpoint: folder of one checkpoint; the newest of the run if not given
            batches: micro-batches of held-out text; 0: all of it
        """
        loaded = load_run(run, checkpoint)
        require(loaded.config.data.valid != "", f"{run} was trained without held-out text (data.valid)")
        dataset = IndexedDataset(loaded.config.data.valid)
        loss, entropy = evaluate(loaded.model, loaded.config, dataset, batches), unigram_entropy(dataset)
        print(f"step {loaded.step} | valid loss {loss:.4f} | perplexity {math.exp(loss):.2f} | "
              f"{beside(loss, entropy)}")

    tyro.cli(command, prog="python -m moe_ext.evaluate")


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, checkpoint.CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
