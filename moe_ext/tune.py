"""Fine-tuning: what of a model moves (model.tune of the config), and how it becomes a plain model again.

    python -m moe_ext.train RECIPE.toml --weights RUN --model.tune.freeze "experts, embed_tokens"
    python -m moe_ext.train RECIPE.toml --weights RUN --model.tune.lora-rank 8      # W + alpha / r * B A; W rests
    python -m moe_ext.tune merge runs/RECIPE --out runs/merged                      # W has become that

A parameter that rests has no gradient, no optimizer state, and no weight gradient is computed for it; what comes before
it gets its gradients through it all the same. The losses of a frozen router stay in the loss, since they depend on what
comes before it (model.moe.balance_weight 0 leaves them out); its selection bias rests too. Clipping, Muon and Shampoo
see what moves alone. A checkpoint has all parameters, adapters included, so it needs no other to be whole.

FOLDER becomes a run folder with a checkpoint of step 0, as moe_ext.upcycle makes one; one process holds the model.
"""
from __future__ import annotations

import difflib
import re
import sys
from dataclasses import replace
from pathlib import Path

import tyro

from moe_ext import checkpoint
from moe_ext.config import Config, TuneConfig, build, patterns, require
from moe_ext.layers.lora import candidates, merge_lora
from moe_ext.model import GPT
from moe_ext.run import carry
from moe_ext.upcycle import empty, fill, source_of, whole


def check(model: GPT) -> None:
    """ConfigError, with the nearest names, where an entry of model.tune finds nothing of the whole model, which may lie
    on the meta device, or nothing is left to move."""
    tune, names = model.config.tune, [name for name, _ in model.named_parameters()]
    for field, what, among in (("train", "parameter", names), ("freeze", "parameter", names),
                               ("lora_targets", "matrix that can have adapters", list(candidates(model)))):
        for pattern in patterns(getattr(tune, field)):
            if not any(re.search(pattern, name) for name in among):
                alike = list({re.sub(r"\d+", "", name): name for name in reversed(among)}.values())     # of one layer
                near = difflib.get_close_matches(pattern, alike, n=3, cutoff=0)
                require(False, f"model.tune.{field}: {pattern!r} is found in the name of no {what}; the nearest are "
                        f"{', '.join(near)}")
    require(any(p.requires_grad for p in model.parameters()), f"model.tune.train {tune.train!r} and model.tune.freeze "
            f"{tune.freeze!r} leave nothing that moves: name less in model.tune.freeze")


def merge(source: Path, out: Path) -> str:
    """Write the run folder `out`, whole or not at all, with a checkpoint's adapters added to its matrices -> what was
    done. source: a run folder, whose newest checkpoint counts, or a checkpoint. Errors: ConfigError, CheckpointError,
    OSError."""
    source = source_of(source)
    config = build(Config, checkpoint.read_state(source).config)
    require(config.model.tune.lora_rank > 0, f"{source} has no adapters (model.tune.lora_rank is 0): nothing is to be "
            "merged")
    with whole(out) as work:
        model = empty(config)
        checkpoint.load(source, model=model)
        merge_lora(model)
        model.requires_grad_(True)
        fill(work, out, model, replace(config, model=replace(config.model, tune=TuneConfig())), like=source)
        carry(source, work)
    return f"{out}: the model of {source} without adapters, which computes the same. Go on with --weights {out}"


def main() -> None:
    def command(run: tyro.conf.Positional[Path], /, out: Path) -> None:
        """Add the adapters of a LoRA run to its matrices.

        Args:
            run: the run folder, whose newest checkpoint counts, or a checkpoint
            out: run folder to be made
        """
        print(merge(run, out))

    try:
        tyro.extras.subcommand_cli_from_dict({"merge": command}, prog="python -m moe_ext.tune")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
