"""What the routers of a trained model do with held-out text:

    python -m moe_ext.statistics RUN [--data PREFIX] [--batches N] [--checkpoint best] [--out FILE.json|FILE.csv]

Per MoE layer, and per expert in it; docs/replay.md says what each number is. What a run writes of its training, loads
alone, is in its metrics.jsonl (moe_ext.log).
"""
from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path

import torch
import tyro

from moe_ext import ops
from moe_ext.config import require
from moe_ext.data import Loader, open_data
from moe_ext.evaluate import load_run, not_finite
from moe_ext.layers.common import finite
from moe_ext.log.writer import expert_load
from moe_ext.model import precision
from moe_ext.preflight import check_tokens
from moe_ext.run import loader_options


class Statistics:
    """What the routers of a GPT in one process do with the tokens that it runs inside `with Statistics(model) as seen`;
    real tokens alone, before capacity, without noise and jitter."""

    def __init__(self, model):
        self.model, self.layers = model, model.moe_layers()
        if not self.layers:
            raise ValueError("Statistics: the model is dense, without routers")
        E = self.layers[0].num_experts
        # per layer and expert: tokens that chose it, its probability and weight; per layer: entropy, largest weight
        self.tokens, self.sums_LE3 = 0, torch.zeros(len(self.layers), E, 3, dtype=torch.float64)
        self.sums_L2 = torch.zeros(len(self.layers), 2, dtype=torch.float64)
        self.pairs_LEE = torch.zeros(len(self.layers), E, E, dtype=torch.float64)

    def __enter__(self):
        self.hooks, self.logits = [], {}
        for row, layer in enumerate(self.layers):
            self.hooks += [
                layer.gate.register_forward_hook(lambda _, args, logits, row=row: self.logits.update({row: logits})),
                layer.register_forward_hook(lambda _, args, result, row=row: self.add(row, result[1].ids))]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    @torch.no_grad()
    def add(self, row: int, ids) -> None:
        """One forward of a layer, whose gate has just given its logits."""
        layer, ids_TK = self.layers[row], ids.flatten(0, -2)
        real_T = (ids_TK >= 0).any(1)
        ids_TK, logits_TE = ids_TK[real_T], finite(self.logits.pop(row))[0][real_T]
        weights_TK, _, scores_TE = ops.router(logits_TE, layer.top_k, score=layer.score, norm_p=layer.norm_p,
                                              scale=layer.scale, ids_TK=ids_TK)
        share_TE = (scores_TE / scores_TE.sum(1, keepdim=True)).double()
        # what a -1 would count as goes to a column that is left out
        places_TK = torch.where(ids_TK >= 0, ids_TK, layer.num_experts).long()
        chosen_TE, weight_TE = (share_TE.new_zeros(len(ids_TK), layer.num_experts + 1).scatter(1, places_TK, x)[:, :-1]
                                for x in (torch.ones_like(weights_TK).double(), weights_TK.double()))
        self.tokens += len(ids_TK) * (row == 0)
        self.sums_LE3[row] += torch.stack([chosen_TE.sum(0), share_TE.sum(0), weight_TE.sum(0)], 1).cpu()
        self.sums_L2[row] += torch.stack([torch.special.entr(share_TE).sum(), weights_TK.double().amax(1).sum()]).cpu()
        self.pairs_LEE[row] += (chosen_TE.T @ chosen_TE).cpu()

    def table(self) -> dict:
        """The numbers by name, as docs/replay.md explains them."""
        counts_LE, tokens = self.sums_LE3[..., 0], max(self.tokens, 1)
        load, E = expert_load(counts_LE), counts_LE.shape[1]
        first = self.model.config.layers - len(self.layers)
        layers = []
        for row, (sums_E3, (entropy, largest)) in enumerate(zip(self.sums_LE3, self.sums_L2.tolist(), strict=True)):
            columns = {"count": sums_E3[:, 0].long(), "share": sums_E3[:, 0] / sums_E3[:, 0].sum().clamp(min=1),
                       "probability": sums_E3[:, 1] / tokens, "weight": sums_E3[:, 2] / sums_E3[:, 0].clamp(min=1)}
            layers.append({
                "layer": first + row, "load": load["load_L"][row], "dead": load["dead_L"][row],
                "load_entropy": load["entropy_L"][row], "router_entropy": entropy / tokens / max(math.log(E), 1e-300),
                "largest_weight": largest / tokens,
                "experts": [dict(zip(columns, values, strict=True)) for values in
                            zip(*(column.tolist() for column in columns.values()), strict=True)],
                "together": self.pairs_LEE[row].long().tolist()})
        return {"tokens": self.tokens, "layers": layers}


def statistics(run, dataset, batches: int = 0) -> dict:
    """Statistics.table of a run's model (evaluate.Run) over whole rows of a data set, in the file's order; the first
    `batches` micro-batches, 0: all. Errors: ValueError; FloatingPointError if a router's logits are not finite."""
    require(batches >= 0, f"--batches is {batches}, wanted 0 (all of the held-out text) or a positive number")
    config, device = run.config, next(run.model.parameters()).device
    bad_L = 0
    with Statistics(run.model) as seen, torch.no_grad():
        for _, part in dataset.parts:
            loader = Loader(part, seq_len=min(config.model.seq_len, len(part.tokens) - 1), batch_size=1, shuffle=False,
                            vocab_size=config.model.vocab_size, **loader_options(config) | {"prefetch": 0})
            rows = min(loader.samples, batches * config.train.micro_batch or loader.samples)
            while loader.row < rows:
                loader.batch_size = min(config.train.micro_batch, rows - loader.row)
                read = loader.batch()
                with precision(config, device):
                    bad_L += run.model(read.tokens.to(device), read.targets.to(device), **read.borders(device)).bad_L
                loader.advance()
    if problem := not_finite(config.model, bad_L, {}):
        raise FloatingPointError(problem)
    return seen.table()


def write(table: dict, path: Path) -> None:
    """A table as .json, or without `together` as .csv: a line for each layer and expert."""
    if path.suffix == ".json":
        path.write_text(json.dumps(table))
        return
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["layer", "expert", *table["layers"][0]["experts"][0]])
        lines.writerows([layer["layer"], expert, *numbers.values()] for layer in table["layers"]
                        for expert, numbers in enumerate(layer["experts"]))


def main() -> None:
    def command(run: tyro.conf.Positional[Path], /, data: str = "", checkpoint: Path | None = None, batches: int = 0,
                out: Path | None = None) -> None:
        """What the routers of a trained model do with held-out text: a line per MoE layer, and a file.

        Args:
            run: the run folder
            data: prefix of the tokens (PREFIX.bin, PREFIX.idx); the run's data.valid if not given
            checkpoint: folder of one checkpoint, or best; the newest of the run if not given
            batches: micro-batches to read; 0, or more than there are: all of them
            out: .json or .csv; RUN/experts.json if not given
        """
        path = out or run / "experts.json"
        require(path.suffix in (".json", ".csv"), f"--out {path}: wanted a name that ends in .json or .csv")
        require(path.parent.is_dir(), f"--out {path}: there is no folder {path.parent}: make it, or name another")
        loaded = load_run(run, checkpoint)
        require(data or loaded.config.data.valid, f"{run} was trained without data.valid: give --data PREFIX")
        dataset = open_data(data or loaded.config.data.valid).train
        for _, part in dataset.parts:
            check_tokens(part, loaded.config.model.vocab_size, 0, 1)
        table = statistics(loaded, dataset, batches)
        for layer in table["layers"]:
            print("layer {layer:3d} | load {load:.2f}x dead {dead} | entropy of loads {load_entropy:.3f}, of the "
                  "router {router_entropy:.3f} | largest weight {largest_weight:.3f}".format(**layer))
        write({"run": str(run), "step": loaded.step} | table, path)
        print(f"{table['tokens']:,} tokens; {path}")

    try:
        tyro.cli(command, prog="python -m moe_ext.statistics")
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
