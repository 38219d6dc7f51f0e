"""The log of a run: each number goes into the step line, metrics.jsonl, TensorBoard and wandb by way of one record."""
import dataclasses
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from moe_ext.config import Config
from moe_ext.log.files import Lines, Progress
from moe_ext.log.line import Line, chosen, perplexity
from moe_ext.log.megatron import Megatron, leaves
from moe_ext.log.meter import Memory, Meter, Spent, Timers
from moe_ext.model import GPT
from moe_ext.plan.megatron import num_floating_point_operations


class Log:
    """Writes what a run tells, from one process.

    samples, tokens, seconds: behind the run when it starts; seconds of running time. flops_per_token and peak_flops (of
    all devices, 1/s): both above 0 make "mfu". clock, stream: where time and the console come from. Errors: OSError if
    the run folder cannot be written.
    """

    def __init__(self, config: Config, *, samples: int = 0, seconds: float = 0.0, flops_per_token: float = 0.0,
                 peak_flops: float = 0.0, clock=time.perf_counter, stream=sys.stdout):
        self.config, self.folder, self.stream = config, config.run_folder, stream
        self.folder.mkdir(parents=True, exist_ok=True)
        self.samples, self.tokens, self.seconds_before = samples, samples * config.model.seq_len, seconds
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.style = Megatron(config) if config.log.style == "megatron" else Line(config)
        self.troubled = set()
        self.text = Lines(self.folder / "run.log", self.trouble)
        self.metrics = Lines(self.folder / "metrics.jsonl", self.trouble)
        self.progress = Progress(self.folder, self.trouble, world=config.mesh.world, flops_per_token=(
            num_floating_point_operations(config) / config.tokens_per_step))
        self.meter = Meter(clock)
        self.losses, self.balances, self.skipped = [], [], 0        # since the last line
        self.sinks = {}
        if config.log.tensorboard:
            self.attempt("TensorBoard", lambda: self.sinks.update(TensorBoard=Board(self.folder)))
        if config.log.wandb:
            self.attempt("wandb", lambda: self.sinks.update(wandb=Wandb(config, resumed=samples > 0)))

    def say(self, text: str) -> None:
        """Lines for the console and run.log."""
        self.text.write(text)
        self.show(text)

    def show(self, text: str) -> None:
        try:
            print(text, file=self.stream, flush=True)
        except OSError:         # a closed terminal or pipe: the run goes on, and SIGHUP still saves
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def trouble(self, path: Path, error: OSError) -> None:
        """Says once, where it can be said, that a file takes no more lines."""
        if path not in self.troubled:
            self.troubled.add(path)
            sentence = f"{path} cannot be written: {error.strerror}: the run goes on, and its lines wait for room"
            self.show(sentence) if path == self.text.path else self.say(sentence)

    def attempt(self, name: str, action) -> None:
        """Does what TensorBoard or wandb may fail to do, for whatever reason; then the run goes on without it."""
        try:
            action()
        except Exception as error:
            self.sinks.pop(name, None)
            self.say(f"no {name} from here on: {type(error).__name__}: {error}; the numbers are in {self.metrics.path}")

    def start(self, model: GPT, loaded: Path | None, step: int, lines: list[str], data: list[str],
              setup: list[list[float]]) -> None:
        """What the run is, and from which checkpoint of how many steps it starts; `lines` say more of that, `data` of
        its data. setup: of each rank the milliseconds that the model and the data took."""
        self.say(self.style.start(model, loaded, step, lines, data, setup))
        self.progress.started(step, self.tokens)

    def tick(self, sequences: int, loss: float | None = None, balance: float | None = None) -> None:
        """Call after every optimizer step; loss None: of one that was skipped."""
        self.samples, self.tokens = self.samples + sequences, self.tokens + sequences * self.config.model.seq_len
        self.meter.tick(sequences * self.config.model.seq_len)
        self.skipped += loss is None
        for kept, number in ((self.losses, loss), (self.balances, balance)):
            if loss is not None and number is not None:
                kept.append(number)

    def paused(self):
        """`with log.paused():` around whatever is not a training step."""
        return self.meter.paused()

    @property
    def seconds(self) -> float:
        """Running time up to the last step, over all restarts."""
        return self.seconds_before + self.meter.now.seconds

    def step(self, step: int, *, sequences: int, loss: float, lr: float, aux: float | None = None,
             grad_norm: float | None = None, zeros: int | None = None, parameter_norm: float | None = None,
             loss_scale: float = 1.0, counts_LE: torch.Tensor | None = None, dropped_L: torch.Tensor | None = None,
             epoch: float | None = None, memory: list[Memory] = (), times: list[list[float]] = (),
             spent: list[list[float]] = ()) -> str:
        """The step line, printed and recorded. counts_LE: copies per layer and expert; None for a dense model.
        dropped_L: of these, dropped by capacity; None without one. epoch: passes over the data so far. memory, times:
        of each rank; times as from Timers, spent as from Spending."""
        ms, tokens_per_s = self.meter.rates()
        record = {"step": step, "tokens": self.tokens, "samples": self.samples, "seconds": self.seconds,
                  "sequences": sequences, "world": self.config.mesh.world, "loss": loss, "aux": aux,
                  "mean_loss": mean(self.losses), "balance": mean(self.balances), "grad_norm": grad_norm,
                  "zeros": zeros, "parameter_norm": parameter_norm, "lr": lr, "loss_scale": loss_scale,
                  "skipped": self.skipped, "ms": ms, "tokens_per_s": tokens_per_s}
        self.losses, self.balances, self.skipped = [], [], 0
        if self.flops_per_token and self.peak_flops:
            record["mfu"] = tokens_per_s * self.flops_per_token / self.peak_flops
        if epoch is not None:
            record["epoch"] = epoch
        if counts_LE is not None and counts_LE.numel():
            record |= expert_load(counts_LE, dropped_L)
        if memory:
            record["memory_mib"], record["max_memory_mib"] = (
                max(getattr(rank, name) for rank in memory) for name in ("allocated", "max_allocated"))
        if times:
            record["time_ms"] = {part: [min(column), max(column)]
                                 for part, column in zip(Timers.PARTS, zip(*times, strict=True), strict=True)}
        if spent:
            record["optimizer"] = cost_of_optimizers(self.config.optim.optimizers, spent, ms)
        line = self.style.step(record | {"memory": memory}, self.meter.eta(self.config.train.steps - step))
        self.say(line)
        self.record(record)
        return line

    def evaluation(self, step: int, loss: float, unigram_entropy: float, name: str = "valid", **numbers: float) -> None:
        """Held-out loss of the set `name` beside the entropy of its tokens' frequencies, in nats per token, and other
        numbers about the set."""
        prefix = "" if name == "valid" else f"{name}_"
        self.say(self.style.evaluation(step, name, loss, unigram_entropy, numbers))
        numbers = {"loss": loss, "perplexity": perplexity(loss)} | numbers
        self.record({"step": step, "tokens": self.tokens, "seconds": self.seconds,
                     **{f"{name}_{key}": value for key, value in numbers.items()},
                     f"{prefix}unigram_entropy": unigram_entropy})

    def choices(self, step: int, scores: dict[str, float]) -> None:
        """Multiple choice: shares of right answers with their standard errors, and how many questions."""
        self.say(f"eval {step}/{self.config.train.steps} | {chosen(scores)}")
        self.record({"step": step, "tokens": self.tokens, "seconds": self.seconds,
                     **{f"choices_{key}": value for key, value in scores.items()}})

    def saving(self, step: int) -> None:
        self.tokens_saved = self.tokens
        if line := self.style.saving(step):
            self.say(line)

    def saved(self, path: Path, step: int, waited: float, written: float) -> None:
        """waited, written: seconds, as checkpoint.Saver tells them."""
        self.say(self.style.saved(path, step, waited, written))
        self.progress.saved(step, self.tokens_saved)

    def record(self, record: dict) -> None:
        """One line of metrics.jsonl (NaN and infinity as null), and its numbers to TensorBoard and wandb."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.metrics.write(json.dumps(finite))
        for name, sink in list(self.sinks.items()):
            self.attempt(name, lambda sink=sink: sink.send(record["step"], scalars(record)))

    def close(self) -> None:
        for name, sink in list(self.sinks.items()):
            self.attempt(name, sink.close)
        for file in (self.text, self.metrics, self.progress.file):
            file.close()


class Silence:
    """The Log of a rank that writes nothing."""
    seconds = 0.0
    def say(self, text): pass
    def start(self, *what): pass
    def tick(self, *numbers): pass
    def step(self, step, **numbers): pass
    def evaluation(self, step, loss, unigram_entropy, name="valid", **numbers): pass
    def choices(self, step, scores): pass
    def saving(self, step): pass
    def saved(self, path, step, waited, written): pass
    def paused(self): return nullcontext()
    def close(self): pass


class Board:
    """TensorBoard: RUN/tb."""

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError("TensorBoard is not installed (pip install tensorboard)") from None
        self.writer = SummaryWriter(str(folder / "tb"))

    def send(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases in the project log.wandb. RUN/wandb-id keeps its id, under which a resumed run goes on;
    its axis is "step", so that steps which a killed run must do again are drawn in their place."""

    def __init__(self, config: Config, resumed: bool):
        import wandb
        path = config.run_folder / "wandb-id"
        kept = path.read_text().strip() if resumed and path.is_file() else None
        self.run = wandb.init(project=config.log.wandb, name=config.log.name, id=kept, dir=str(config.run_folder),
                              resume="allow", config=dict(leaves(dataclasses.asdict(config))))
        path.write_text(f"{self.run.id}\n")
        self.run.define_metric("*", step_metric="step")

    def send(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log({"step": step, **numbers})

    def close(self) -> None:
        self.run.finish()


def scalars(record: dict) -> dict[str, float]:
    """A record's numbers by tag: of MoE layer 3 "load/layer_03"; of a part of the step "time_ms/forward_max"."""
    numbers = {}
    for name, value in record.items():
        if isinstance(value, (int, float)) and name != "step":
            numbers[name] = value
        elif name.endswith("_L"):
            numbers |= {f"{name[:-2]}/layer_{layer:02d}": number for layer, number in enumerate(value)}
        elif name == "optimizer":
            numbers |= {f"{name}/{which}_{key}": number for which, spent in value.items()
                        for key, number in spent.items()}
        elif name == "time_ms":
            numbers |= {f"{name}/{part}_{which}": number for part, span in value.items()
                        for which, number in zip(("min", "max"), span, strict=True)}
    return numbers


def expert_load(counts_LE: torch.Tensor, dropped_L: torch.Tensor | None = None) -> dict:
    """Copies per layer and expert -> the names that the head of this package explains."""
    counts_LE = counts_LE.double()
    share_LE = counts_LE / counts_LE.sum(dim=1, keepdim=True).clamp(min=1)
    experts = counts_LE.shape[1]
    load_L, dead_L = share_LE.amax(dim=1) * experts, (counts_LE == 0).sum(dim=1)
    entropy_L = torch.special.entr(share_LE).sum(dim=1) / math.log(experts) if experts > 1 else torch.ones_like(load_L)
    record = {"load": load_L.max().item(), "dead": int(dead_L.sum()), "load_L": load_L.tolist(),
              "dead_L": dead_L.tolist(), "entropy_L": entropy_L.tolist()}
    if dropped_L is not None:
        record["dropped_L"] = dropped_L.long().tolist()
    return record | {"counts_LE": counts_LE.long().tolist()}


def cost_of_optimizers(names: list[str], spent: list[list[float]], step_ms: float) -> dict[str, dict[str, float]]:
    """What Spending has of each rank -> "optimizer", as the head of this package explains it."""
    costs = {}
    each = len(Spent._fields)
    for i, name in enumerate(names):
        ms, state, sent, fallbacks = zip(*(row[each * i:each * (i + 1)] for row in spent), strict=True)
        costs[name] = {"ms": max(ms), "share": max(ms) / step_ms} if any(ms) else {}
        costs[name] |= {"state_mib": max(state), "sent_mib": max(sent)}
        if any(fallbacks):
            costs[name]["fallbacks"] = int(sum(fallbacks))
    return costs


def mean(numbers: list[float]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None
