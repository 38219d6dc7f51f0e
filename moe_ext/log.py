"""What a run tells: the step line, RUN/run.log, RUN/metrics.jsonl, RUN/tb (TensorBoard), and a plot of all of it.

step 120/10000 | loss 3.2145 | aux 1.0e-2 | gnorm 0.61 | lr 3.0e-4 | 412 ms | 318k tok/s | epoch 1.24
               | load 1.31x dead 0 | eta 1h08m                                              (on the same line)

    ms, tok/s   of the steps since the last line, without evaluation and saving; the first step of a process, which
                pays for warm-up, counts only in its own line
    epoch       passes over the training tokens so far
    load        the fullest expert of any layer over its layer's mean; dead: experts without a token
    eta         everything that remains at the pace so far, evaluation and saving included

metrics.jsonl holds one object per line: {"step", "loss", "aux", "grad_norm", "lr", "ms", "tokens_per_s", "epoch",
"load", "dead", "counts_LE"} for a step line, {"step", "valid_loss", "unigram_entropy", "valid_perplexity",
"valid_bits_per_byte"} for an evaluation, the same with NAME_ for a set of data.eval_sets and {"step",
"choices_questions", "choices_acc", "choices_acc_stderr", ..} for data.choices; losses in nats per token. A resumed run
appends; steps beyond its start are set aside first (moe_ext.run). Where a step stands twice, as in folders of earlier
versions, the later line holds.

`python -m moe_ext.log plot RUN_DIR [-o out.png]` draws the curves (matplotlib).
"""
import json
import math
import os
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, NamedTuple

import torch


class Mark(NamedTuple):
    seconds: float      # running time, pauses taken out
    steps: int
    tokens: int


class Meter:
    """Step time, throughput and time left. clock: seconds, monotonic; a test gives its own."""

    def __init__(self, clock=time.perf_counter):
        self.clock = clock
        self.began = clock()
        self.pauses = 0.0
        self.window = self.now = Mark(0.0, 0, 0)
        self.first = None       # (Mark, clock) at the end of the first step

    def tick(self, tokens: int) -> None:
        """An optimizer step over `tokens` tokens has ended."""
        clock = self.clock()
        self.now = Mark(clock - self.began - self.pauses, self.now.steps + 1, self.now.tokens + tokens)
        self.first = self.first or (self.now, clock)

    @contextmanager
    def paused(self):
        """Time inside is no step time: evaluation, saving, sampling."""
        begin = self.clock()
        yield
        self.pauses += self.clock() - begin

    def rates(self) -> tuple[float, float]:
        """(milliseconds per step, tokens per second) since the last call; at least one tick must lie between."""
        begin = self.window
        if begin.steps == 0 and self.now.steps > 1:
            begin = self.first[0]
        seconds, steps, tokens = (a - b for a, b in zip(self.now, begin, strict=True))
        self.window = self.now
        return 1e3 * seconds / steps, tokens / seconds

    def eta(self, steps_left: int) -> float:
        """Seconds for the steps that remain."""
        if self.now.steps == 1:
            return steps_left * (self.clock() - self.began)
        return steps_left * (self.clock() - self.first[1]) / (self.now.steps - 1)


def beside(loss: float, entropy: float) -> str:
    """Held-out loss against the entropy of its tokens' frequencies, which a model of frequencies alone would reach."""
    side = "below" if loss <= entropy else "above"
    return f"unigram entropy {entropy:.4f} | {side} it by {abs(entropy - loss):.4f} nats"


def measured(name: str, loss: float, entropy: float, **numbers: float) -> str:
    """Held-out loss of the set `name`, other forms of it (evaluate.Text.compare), and beside what it stands."""
    forms = [f"{key.replace('_', ' ')} {value:.{4 if 'bits' in key else 2}f}" for key, value in numbers.items()]
    return " | ".join([f"{name} loss {loss:.4f}", *forms, beside(loss, entropy)])


def chosen(scores: dict[str, float]) -> str:
    """The scores of moe_ext.choices, as shares with standard errors."""
    shares = [f"{name} {scores[name]:.4f} +- {scores[name + '_stderr']:.4f}" for name in scores
              if name + "_stderr" in scores]
    return " | ".join([f"choices of {scores['questions']}", *shares])


class Log:
    """Writes what a run tells, from one process.

    folder: the run folder, made if absent. steps: of the whole run. flops_per_token and peak_flops (1/s): both above 0
    add "mfu" to the line. clock, stream: where time and the console come from.
    """

    def __init__(self, folder: str | Path, *, steps: int, tensorboard: bool = True, flops_per_token: float = 0.0,
                 peak_flops: float = 0.0, clock=time.perf_counter, stream=sys.stdout):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.steps, self.stream = steps, stream
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.text = open(self.folder / "run.log", "a")
        self.metrics = open_whole_lines(self.folder / "metrics.jsonl")
        self.board = self.open_board() if tensorboard else None
        self.meter = Meter(clock)

    def open_board(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.say("TensorBoard is not installed (pip install tensorboard): metrics go to metrics.jsonl alone")
            return None
        return SummaryWriter(str(self.folder / "tb"))

    def say(self, text: str) -> None:
        """A line for the console and run.log."""
        print(text, file=self.text, flush=True)
        try:
            print(text, file=self.stream, flush=True)
        except OSError:         # a closed terminal or pipe: the run goes on, and SIGHUP still saves
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def tick(self, tokens: int) -> None:
        """Call after every optimizer step."""
        self.meter.tick(tokens)

    def paused(self):
        """`with log.paused():` around whatever is not a training step."""
        return self.meter.paused()

    def step(self, step: int, *, loss: float, lr: float, aux: float | None = None, grad_norm: float | None = None,
             counts_LE: torch.Tensor | None = None, epoch: float | None = None) -> str:
        """The step line, printed and recorded. counts_LE: copies per layer and expert; None for a dense model. epoch:
        passes over the data so far."""
        ms, tokens_per_s = self.meter.rates()
        record = {"step": step, "loss": loss, "aux": aux, "grad_norm": grad_norm, "lr": lr, "ms": ms,
                  "tokens_per_s": tokens_per_s}
        if self.flops_per_token and self.peak_flops:
            record["mfu"] = tokens_per_s * self.flops_per_token / self.peak_flops
        if epoch is not None:
            record["epoch"] = epoch
        if counts_LE is not None and counts_LE.numel():
            record |= expert_load(counts_LE)
        line = step_line(record, self.steps, self.meter.eta(self.steps - step))
        self.say(line)
        self.record(record)
        return line

    def evaluation(self, step: int, loss: float, unigram_entropy: float, name: str = "valid", **numbers: float) -> None:
        """Held-out loss of the set `name` beside the entropy of its tokens' frequencies, in nats per token; numbers:
        other forms of the loss (evaluate.Text.compare)."""
        self.say(f"eval {step}/{self.steps} | {measured(name, loss, unigram_entropy, **numbers)}")
        prefix = "" if name == "valid" else name + "_"
        self.record({"step": step, f"{name}_loss": loss, f"{prefix}unigram_entropy": unigram_entropy,
                     **{f"{name}_{key}": value for key, value in numbers.items()}})

    def choices(self, step: int, scores: dict[str, float]) -> None:
        """Multiple choice: what moe_ext.choices.score gives."""
        self.say(f"eval {step}/{self.steps} | {chosen(scores)}")
        self.record({"step": step, **{f"choices_{key}": value for key, value in scores.items()}})

    def record(self, record: dict) -> None:
        """One line of metrics.jsonl (NaN and infinity as null) and its numbers to TensorBoard."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.metrics.write(json.dumps(finite) + "\n")
        self.metrics.flush()
        if self.board:
            for name, value in record.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self.text.close()
        self.metrics.close()
        if self.board:
            self.board.close()


class Silence:
    """The Log of a rank that writes nothing."""
    def say(self, text): pass
    def tick(self, tokens): pass
    def step(self, step, **numbers): pass
    def evaluation(self, step, loss, unigram_entropy, name="valid", **numbers): pass
    def choices(self, step, scores): pass
    def paused(self): return nullcontext()
    def close(self): pass


def open_whole_lines(path: Path):
    """`path` for appending; a last line cut by a kill is dropped first."""
    if path.is_file():
        data = path.read_bytes()
        if not data.endswith(b"\n"):
            path.write_bytes(data[:data.rfind(b"\n") + 1])
    return open(path, "a")


def expert_load(counts_LE: torch.Tensor) -> dict:
    """Copies per expert -> load (max over mean, of the worst layer), dead (experts without a copy), counts_LE."""
    mean_L1 = counts_LE.double().mean(dim=1, keepdim=True).clamp(min=1e-30)
    return {"load": (counts_LE / mean_L1).max().item(), "dead": int((counts_LE == 0).sum()),
            "counts_LE": counts_LE.tolist()}


def step_line(record: dict, steps: int, eta: float) -> str:
    """A step's record as one line; parts that the record lacks are left out."""
    parts = [f"step {record['step']}/{steps}", f"loss {record['loss']:.4f}"]
    if record.get("aux") is not None:
        parts.append(f"aux {scientific(record['aux'])}")
    if record.get("grad_norm") is not None:
        parts.append(f"gnorm {record['grad_norm']:.2f}")
    parts += [f"lr {scientific(record['lr'])}", f"{record['ms']:.{0 if record['ms'] >= 10 else 1}f} ms",
              f"{thousands(record['tokens_per_s'])} tok/s"]
    if "mfu" in record:
        parts.append(f"mfu {record['mfu']:.1%}")
    if "epoch" in record:
        parts.append(f"epoch {record['epoch']:.2f}")
    if "load" in record:
        parts.append(f"load {record['load']:.2f}x dead {record['dead']}")
    return " | ".join([*parts, f"eta {duration(eta)}"])


def scientific(x: float) -> str:
    """3.0e-4: one digit after the point, no padding in the exponent."""
    digits, _, exponent = f"{x:.1e}".partition("e")
    return f"{digits}e{int(exponent)}" if exponent else digits


def thousands(x: float) -> str:
    """950, 4.4k, 318k, 1.2M"""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if x >= size:
            return f"{x / size:.{1 if x < 10 * size else 0}f}{unit}"
    return f"{x:.0f}"


def duration(seconds: float) -> str:
    """45s, 12m05s, 1h08m, 2d03h"""
    s = round(seconds)
    for name, size, below, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if s >= size:
            return f"{s // size}{name}{s % size // part:02d}{below}"
    return f"{s}s"


def read_metrics(path: Path) -> tuple[list[dict], list[dict]]:
    """metrics.jsonl -> (step records, evaluation records of data.valid), each by rising step, the later line where one
    stands twice.

    A last line without its newline is one that is being written, and is left out.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: give the folder of a run, which holds metrics.jsonl")
    train, valid = {}, {}
    lines = path.read_text().split("\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            kind = valid if "unigram_entropy" in record else train if "loss" in record else {}      # other sets
            kind[record["step"]] = record
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}: line {number}: got {line[:60]!r}, wanted a JSON object with a step: delete the "
                             "line or plot another run") from None
    return tuple([records[step] for step in sorted(records)] for records in (train, valid))


def split_metrics(data: bytes, step: int) -> tuple[bytes, bytes]:
    """metrics.jsonl -> the lines up to `step`, and those beyond it. What is no record stays where it is."""
    parts = [], []
    for line in data.splitlines(keepends=True):
        try:
            parts[json.loads(line)["step"] > step].append(line)
        except (ValueError, TypeError, KeyError):
            parts[False].append(line)
    return b"".join(parts[False]), b"".join(parts[True])


def split_events(data: bytes, step: int) -> tuple[bytes, bytes]:
    """The same for a file of TensorBoard's events; each part that is not empty begins with the file's header.

    A record is a length (8 bytes, little endian), its checksum (4), an event, its checksum (4). In an event, the time
    (9 bytes) comes first and then, if it is not 0, the step: the byte 16 and a varint.
    """
    parts, at = ([], []), 0
    while at + 12 <= len(data) and (end := at + 16 + int.from_bytes(data[at:at + 8], "little")) <= len(data):
        event, number = data[at + 12:end - 4], 0
        if event[9:10] == b"\x10":
            for index, byte in enumerate(event[10:20]):
                number |= (byte & 127) << 7 * index
                if byte < 128:
                    break
        parts[number > step].append(data[at:end])
        at = end
    kept, beyond = parts
    return b"".join(kept), b"".join(kept[:1] + beyond if beyond else [])


def plot(run: Path, out: Path | None = None) -> Path:
    """Draw losses and expert load of a run folder to `out` (RUN/plot.png). RuntimeError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError("the plot needs matplotlib: pip install matplotlib") from None
    train, valid = read_metrics(Path(run) / "metrics.jsonl")
    if not train:
        raise ValueError(f"{run}/metrics.jsonl: got no step line, wanted at least one: train some steps first")
    routed = [record for record in train if "counts_LE" in record]

    figure = Figure(figsize=(10, 7.5 if routed else 4.5), dpi=130, layout="constrained")
    figure.suptitle(Path(run).resolve().name, fontweight="bold")
    axes = figure.subplot_mosaic([["loss", "loss"], ["lines", "heat"]] if routed else [["loss"]])
    for panel in axes.values():
        panel.xaxis.get_major_locator().set_params(integer=True)    # half a step is no place
    draw_loss(axes["loss"], train, valid)
    if routed:
        draw_load_lines(axes["lines"], routed)
        image = draw_load_map(axes["heat"], routed)
        figure.colorbar(image, ax=axes["heat"], label="tokens / layer's mean")
    out = Path(out or Path(run) / "plot.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return out


def draw_loss(axes, train: list[dict], valid: list[dict]) -> None:
    steps = [record["step"] for record in train]
    losses = column(train, "loss")
    axes.plot(steps, losses, color="#9ecae1", linewidth=1, label="train")
    if len(steps) >= 20:
        axes.plot(steps, centred_mean(losses, len(steps) // 40 + 1), color="#08519c", linewidth=1.6,
                  label="train, centred mean")
    if valid:
        heldout, entropy = column(valid, "valid_loss"), valid[-1]["unigram_entropy"]
        axes.plot([record["step"] for record in valid], heldout, color="#d94801", marker="o", markersize=4,
                  linewidth=1.2, label=f"held out (last {heldout[-1]:.2f})")
        axes.axhline(entropy, color="#636363", linestyle="--", linewidth=1,
                     label=f"unigram entropy of held-out tokens ({entropy:.2f})")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def column(records: list[dict], name: str) -> list[float]:
    return [math.nan if record[name] is None else record[name] for record in records]


def centred_mean(values: list[float], reach: int) -> list[float]:
    """Mean of each value and up to `reach` neighbours on either side, as many on both; it does not lag."""
    means = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        means.append(sum(values[i - near:i + near + 1]) / (2 * near + 1))
    return means


def draw_load_lines(axes, routed: list[dict]) -> None:
    """Per layer: the fullest expert's tokens over the layer's mean."""
    from matplotlib import colormaps
    steps = [record["step"] for record in routed]
    loads_SL = [[max(row) * len(row) / max(sum(row), 1) for row in record["counts_LE"]] for record in routed]
    layers = len(loads_SL[0])
    for layer, loads in enumerate(zip(*loads_SL, strict=True)):
        colour = colormaps["viridis"](0.9 * layer / max(1, layers - 1))
        axes.plot(steps, loads, color=colour, linewidth=1.2, label=f"MoE layer {layer}" if layers <= 8 else None)
    axes.axhline(1.0, color="#636363", linestyle="--", linewidth=1)
    axes.set(xlabel="step", ylabel="fullest expert / mean", title="Fullest expert per layer (1 is balanced)")
    axes.grid(alpha=0.3)
    if layers <= 8:
        axes.legend(frameon=False, fontsize="small")


def draw_load_map(axes, routed: list[dict]):
    """Layer x expert, summed over the last quarter of the step lines, relative to the layer's mean."""
    from matplotlib.colors import TwoSlopeNorm
    recent = routed[-max(1, len(routed) // 4):]
    counts_LE = torch.tensor([record["counts_LE"] for record in recent], dtype=torch.float64).sum(dim=0)
    load_LE = counts_LE / counts_LE.mean(dim=1, keepdim=True).clamp(min=1e-30)
    image = axes.imshow(load_LE.numpy(), cmap="RdBu_r", aspect="auto",
                        norm=TwoSlopeNorm(1.0, vmin=0.0, vmax=max(2.0, load_LE.max().item())))
    layers, experts = load_LE.shape
    if layers * experts <= 64:
        for layer in range(layers):
            for expert in range(experts):
                load = load_LE[layer, expert].item()
                axes.text(expert, layer, f"{load:.2f}", ha="center", va="center", fontsize=7,
                          color="white" if abs(image.norm(load) - 0.5) > 0.3 else "black")
    axes.set(xlabel="expert", ylabel="MoE layer",
             title=f"Expert load per layer, up to step {recent[-1]['step']}")
    axes.set_xticks(range(0, experts, max(1, experts // 16)))
    axes.set_yticks(range(0, layers, max(1, layers // 12)))
    return image


def main() -> None:
    import tyro

    def command(run: tyro.conf.Positional[Path], /,
                out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None) -> None:
        """Draw losses and expert load of a run.

        Args:
            run: the run folder, which holds metrics.jsonl
            out: image to write; RUN/plot.png if not given
        """
        print(plot(run, out))

    tyro.extras.subcommand_cli_from_dict({"plot": command}, prog="python -m moe_ext.log")


if __name__ == "__main__":
    try:
        main()
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
