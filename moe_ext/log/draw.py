"""Plots of metrics.jsonl: the losses of one run and its experts' load, or several runs beside each other."""
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch

from moe_ext.log.files import read_metrics

FIELDS = {"step": "step", "tokens": "tokens", "time": "seconds"}     # --by: the field of a record
UNITS = {   # by what it is divided, and what stands below the axis; the largest unit of which there is one
    "step": [(1, "step")],
    "tokens": [(1e9, "tokens (billions)"), (1e6, "tokens (millions)"), (1, "tokens")],
    "time": [(3600, "running time (hours)"), (60, "running time (minutes)"), (1, "running time (seconds)")],
}
COLOURS = "#08519c", "#d94801", "#238b45", "#6a51a3", "#a50f15", "#636363", "#b8860b", "#008b8b"


class Run(NamedTuple):
    """What a run folder's metrics.jsonl says."""
    folder: Path
    name: str
    train: list[dict]
    valid: list[dict]

    @property
    def routed(self) -> list[dict]:
        """The step lines of a model with experts."""
        return [record for record in self.train if "counts_LE" in record]

    def has(self, by: str) -> bool:
        """Whether all lines can stand there; those of earlier versions know only their step."""
        return all(FIELDS[by] in record for record in self.train + self.valid)


class Axis(NamedTuple):
    """Where records stand from left to right."""
    by: str
    unit: float
    label: str

    @classmethod
    def of(cls, by: str, runs: list[Run]) -> "Axis":
        most = max((run.train[-1][FIELDS[by]] for run in runs if run.has(by)), default=0)
        return cls(by, *next((unit for unit in UNITS[by] if most >= unit[0]), UNITS[by][-1]))

    def places(self, records: list[dict]) -> list[float]:
        return [record[FIELDS[self.by]] / self.unit for record in records]


def plot(runs: str | Path | list[Path], out: str | Path | None = None, by: str | None = None) -> Path:
    """Draw the losses over `by` ("step", "tokens", "time") and expert load of a run folder or several to `out`.

    One: over the step, to RUN/plot.png. Several: over each of the three, to comparison.png here. Errors: RuntimeError
    without matplotlib; FileNotFoundError; ValueError for a file that says nothing, or nothing about `by`, for no run
    and for a name `out` that says no format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError("the plot needs matplotlib: pip install matplotlib") from None
    folders = list(map(Path, runs)) if isinstance(runs, list) else [Path(runs)]
    if not folders:
        raise ValueError("got no run to plot: give one or several run folders, as in plot runs/tiny")
    if out and not Path(out).suffix:        # matplotlib would add one, and the image lie elsewhere
        raise ValueError(f"-o {out}: wanted the name of an image, as in -o {Path(out) / 'plot.png'}")
    runs = [read_run(folder, name) for folder, name in zip(folders, names(folders), strict=True)]
    for run in runs:
        if by and not run.has(by):
            raise ValueError(f"{run.folder}/metrics.jsonl has lines without {FIELDS[by]!r}, as earlier versions wrote "
                             "them: plot it --by step")
    if len(runs) == 1:
        figure = draw_run(Figure, runs[0], by or "step")
        out = Path(out or runs[0].folder / "plot.png")
    else:
        figure = draw_comparison(Figure, runs, [by] if by else list(FIELDS))
        out = Path(out or "comparison.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
    return out


def names(folders: list[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        short = [os.path.join(*path[-length:]) for path in paths]
        if len(set(short)) == len(set(paths)):
            return short
    return short


def read_run(folder: Path, name: str) -> Run:
    train, valid = read_metrics(folder / "metrics.jsonl")
    if not train:
        raise ValueError(f"{folder}/metrics.jsonl: got no step line, wanted at least one: train some steps first")
    return Run(folder, name, train, valid)


# ---- one run ---------------------------------------------------------------------------------------------------------
def draw_run(Figure, run: Run, by: str):
    routed = run.routed
    figure = Figure(figsize=(10, 7.5 if routed else 4.5), dpi=130, layout="constrained")
    figure.suptitle(run.name, fontweight="bold")
    axes = figure.subplot_mosaic([["loss", "loss"], ["lines", "heat"]] if routed else [["loss"]])
    for panel in axes.values():
        panel.xaxis.get_major_locator().set_params(integer=by == "step" or panel is axes.get("heat"))
    axis = Axis.of(by, [run])
    draw_loss(axes["loss"], run, axis)
    if routed:
        draw_load_lines(axes["lines"], run, axis)
        image = draw_load_map(axes["heat"], routed)
        figure.colorbar(image, ax=axes["heat"], label="tokens / layer's mean")
    return figure


def draw_loss(axes, run: Run, axis: Axis) -> None:
    places, losses = axis.places(run.train), column(run.train, "loss")
    axes.plot(places, losses, color="#9ecae1", linewidth=1, label="train")
    if len(places) >= 20:
        axes.plot(places, centred_mean(losses, len(places) // 40 + 1), color="#08519c", linewidth=1.6,
                  label="train, centred mean")
    if run.valid:
        heldout, entropy = column(run.valid, "valid_loss"), run.valid[-1]["unigram_entropy"]
        axes.plot(axis.places(run.valid), heldout, color="#d94801", marker="o", markersize=4,
                  linewidth=1.2, label=f"held out (last {heldout[-1]:.2f})")
        axes.axhline(entropy, color="#636363", linestyle="--", linewidth=1,
                     label=f"unigram entropy of held-out tokens ({entropy:.2f})")
    axes.set(xlabel=axis.label, ylabel="loss (nats per token)", title="Loss")
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


def draw_load_lines(axes, run: Run, axis: Axis) -> None:
    """Per layer: the fullest expert's tokens over the layer's mean."""
    from matplotlib import colormaps
    loads_SL = [[max(row) * len(row) / max(sum(row), 1) for row in record["counts_LE"]] for record in run.routed]
    layers = len(loads_SL[0])
    for layer, loads in enumerate(zip(*loads_SL, strict=True)):
        colour = colormaps["viridis"](0.9 * layer / max(1, layers - 1))
        axes.plot(axis.places(run.routed), loads, color=colour, linewidth=1.2,
                  label=f"MoE layer {layer}" if layers <= 8 else None)
    axes.axhline(1.0, color="#636363", linestyle="--", linewidth=1)
    axes.set(xlabel=axis.label, ylabel="fullest expert / mean", title="Fullest expert per layer (1 is balanced)")
    axes.grid(alpha=0.3)
    if layers <= 8:
        axes.legend(frameon=False, fontsize="small")


def draw_load_map(axes, routed: list[dict], top: float = 0.0):
    """Layer x expert, summed over the last quarter of the step lines, relative to the layer's mean; the colours reach
    at least up to `top`."""
    from matplotlib.colors import TwoSlopeNorm
    load_LE, step = recent_load(routed), routed[-1]["step"]
    image = axes.imshow(load_LE.numpy(), cmap="RdBu_r", aspect="auto",
                        norm=TwoSlopeNorm(1.0, vmin=0.0, vmax=max(2.0, top, load_LE.max().item())))
    layers, experts = load_LE.shape
    if layers * experts <= 64:
        for layer in range(layers):
            for expert in range(experts):
                load = load_LE[layer, expert].item()
                axes.text(expert, layer, f"{load:.2f}", ha="center", va="center", fontsize=7,
                          color="white" if abs(image.norm(load) - 0.5) > 0.3 else "black")
    axes.set(xlabel="expert", ylabel="MoE layer", title=f"Expert load per layer, up to step {step}")
    axes.set_xticks(range(0, experts, max(1, experts // 16)))
    axes.set_yticks(range(0, layers, max(1, layers // 12)))
    return image


def recent_load(routed: list[dict]) -> torch.Tensor:
    """Copies per layer and expert over the layer's mean, [L,E], of the last quarter of the step lines."""
    recent = routed[-max(1, len(routed) // 4):]
    counts_LE = torch.tensor([record["counts_LE"] for record in recent], dtype=torch.float64).sum(dim=0)
    return counts_LE / counts_LE.mean(dim=1, keepdim=True).clamp(min=1e-30)


# ---- several runs ----------------------------------------------------------------------------------------------------
ACROSS = 4      # maps of expert load in a row


def draw_comparison(Figure, runs: list[Run], axes_by: list[str]):
    """A row of losses, over each of axes_by, and below it the maps of expert load, in one scale of colours."""
    routed = [run for run in runs if run.routed]
    rows, across = -(-len(routed) // ACROSS), min(len(routed), ACROSS)
    figure = Figure(figsize=(max(5 * len(axes_by), 10), 4.6 + 3.2 * rows), dpi=130, layout="constrained")
    losses, maps = (figure.subfigures(2, 1, height_ratios=[4.6, 3.2 * rows]) if routed else (figure, None))
    panels = losses.subplots(1, len(axes_by), sharey=True, squeeze=False)[0]
    for panel, by in zip(panels, axes_by, strict=True):
        draw_losses(panel, runs, Axis.of(by, runs))
    panels[0].set_ylabel("loss (nats per token)")
    panels[0].legend(frameon=False, fontsize="small", title="faint: train, dots: held out (its last value)",
                     title_fontsize="small", alignment="left")
    if routed:
        top = max(recent_load(run.routed).max().item() for run in routed)
        grid = maps.subplots(rows, across, squeeze=False)
        for number, panel in enumerate(grid.flat):
            if number >= len(routed):
                panel.set_visible(False)
                continue
            image = draw_load_map(panel, routed[number].routed, top)
            panel.set_title(f"{routed[number].name}: expert load, up to step {routed[number].routed[-1]['step']}",
                            fontsize="medium")
        maps.colorbar(image, ax=grid, label="tokens / layer's mean")
    return figure


def draw_losses(axes, runs: list[Run], axis: Axis) -> None:
    left_out = [run.name for run in runs if not run.has(axis.by)]
    for number, run in enumerate(runs):
        if run.name in left_out:
            continue
        colour, reach = COLOURS[number % len(COLOURS)], len(run.train) // 40 + 1
        style = dict(color=colour, linestyle="-" if number < len(COLOURS) else "--")
        losses, label = centred_mean(column(run.train, "loss"), reach), run.name
        if run.valid:
            heldout = column(run.valid, "valid_loss")
            label += f" ({heldout[-1]:.3f})"
            axes.plot(axis.places(run.valid), heldout, marker="o", markersize=4, linewidth=1.4, **style, label=label)
        axes.plot(axis.places(run.train), losses, linewidth=1.2, alpha=0.45 if run.valid else 1.0, **style,
                  label=None if run.valid else label)
    axes.set(xlabel=axis.label)
    axes.xaxis.get_major_locator().set_params(integer=axis.by == "step")
    axes.grid(alpha=0.3)
    if left_out:
        axes.set_title(f"not known of {', '.join(left_out)}", fontsize="small")
