"""Dense, capacity and dropless GPTs beside each other on the same tokens: `make compare`, or

    python -m benchmarks.compare recipes/compare.toml [--train.steps 100 ..]

The recipe is the dropless type, the others are made of it as by --type (moe_ext.config.as_type): the dense type has one
MLP as wide as a token's K experts; the capacity type's experts keep at most their even share of the copies, the most
probable ones. The active FLOPs are equal but for the router.

    memory    each type in a process of its own
    mesh      the dropless type on several ranks with as many shares of the experts, beside one: losses, fp64 and fp32
    training  the types take each step in turn, in one process, on the same batch, each timed: forward and backward;
              clip and optimizer. So whatever else the machine does meets all alike. Every few steps is a round, in
              which other forms of the dense MLP run too, and a capacity that nothing exceeds

A time is the median over the rounds, the first ones left out. A ratio is the median over them of the ratio in each; its
base is the fastest form of dense. Prints a table and what was wanted of it; writes every measured time into
benchmarks/results/compare-<cpu>.json, the curves into a plot, the table into a page between its two marks.
"""

import dataclasses
import importlib.util
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.ops import machine, seconds, write
from moe_ext import ops, private
from moe_ext.config import TYPES, Config, MeshConfig, as_type, parse, plain, require
from moe_ext.data import IndexedDataset, Loader
from moe_ext.evaluate import evaluate
from moe_ext.layers.fused import MLP
from moe_ext.log.draw import centred_mean, draw_load_map
from moe_ext.model import GPT, precision
from moe_ext.optim import build_optimizer, clip_grad_norm, learning_rate, set_learning_rate
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.ranks import run_ranks
from moe_ext.parallel.shard import backward, build
from moe_ext.preflight import preflight

private.require("moe_ext.proof")  # and imports it, as FSDP does at its first use: ranks are forked when it is there

KINDS = ("forward and backward", "with clip and optimizer")
MEGATRON = {"dense": 1.0, "capacity": 2.75, "dropless": 1.84}  # time per iteration over dense, Megatron-LM on 8 A100
EQUAL = 1e-12  # losses in fp64, relative
MARKS = ("<!-- written by make compare -->\n", "<!-- to here -->\n")


@dataclass(frozen=True)
class Command(Config):
    """Train the dense, the capacity and the dropless type of a recipe beside each other."""

    every: int = 4  # steps from round to round
    warmup: int = 2  # rounds that are not counted
    ranks: tuple[int, ...] = (2, 4)  # beside one process
    fp64_steps: int = 4  # steps there in fp64
    fp32_steps: int = 16  # and in fp32
    out: Path = Path("benchmarks/results")  # folder of the JSON file
    plot: Path = Path("docs/compare.png")  # image to write
    page: Path = Path("docs/compare.md")  # page that shows the table

    def __post_init__(self):
        super().__post_init__()
        model, moe = self.model, self.model.moe
        require(moe.experts > 0 and not moe.dense_layers and not moe.shared_hidden, "the recipe of a comparison is the "
                "dropless type, with nothing but experts: set model.moe.experts, and model.moe.dense_layers and "
                "model.moe.shared_hidden to 0")  # fmt: skip
        require(self.train.device == "cpu" and self.train.dtype != "fp16", f"train.device is {self.train.device} and "
                f"train.dtype {self.train.dtype}, but here is neither a device's clock nor a loss scale: set "
                "train.device to cpu, and train.dtype to fp32 or bf16")  # fmt: skip
        require(model.act == "swiglu" and not model.bias, "the dense MLP is timed in forms for swiglu without biases: "
                "set model.act to swiglu and model.bias to false")  # fmt: skip
        require(self.every > 0, f"every is {self.every}; it must be positive")
        rounds, least = self.train.steps // self.every, self.every * (self.warmup + 2)
        require(rounds >= self.warmup + 2, f"train.steps {self.train.steps} makes {rounds} rounds of {self.every} "
                f"steps, of which {self.warmup} are not counted: give at least {least}")  # fmt: skip
        require(self.mesh.world == self.train.accumulation == 1, "a comparison runs in one process without "
                "accumulation: set mesh.* and train.accumulation to 1")  # fmt: skip


def say(text: str) -> None:
    print(text, flush=True)


# ---- what trains -----------------------------------------------------------------------------------------------------


def torch_mlp(mlp: MLP, x):
    """Plain torch."""
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def kernel_mlp(mlp: MLP, x):
    """The experts' kernel, with one expert for all rows."""
    x_TD = x.flatten(0, -2)
    index = ops.route_index(torch.zeros(len(x_TD), 1, dtype=torch.int32), 1)
    gate, up, down = (proj.weight[None] for proj in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    return ops.expert_mlp(x_TD, gate, up, down, x.new_ones(len(x_TD), 1), index, act="swiglu").view(x.shape)


@contextmanager
def mlps_by(function: Callable, model: GPT) -> Iterator[None]:
    """A dense model whose MLPs are computed by another function of the same parameters."""
    mlps = [block.mlp for block in model.layers]
    for mlp in mlps:
        mlp.forward = partial(function, mlp)
    yield
    for mlp in mlps:
        del mlp.forward


@contextmanager
def room_for_all(model: GPT) -> Iterator[None]:
    """A dropless model that does all that a capacity takes, of which none is exceeded."""
    for layer in model.moe_layers():
        layer.capacity_factor = layer.num_experts
    yield
    for layer in model.moe_layers():
        layer.capacity_factor = 0.0


class Form(NamedTuple):
    """Another way to compute a type."""

    type: str
    of: Callable[[GPT], AbstractContextManager]


FORMS = {
    "dense, plain torch": Form("dense", partial(mlps_by, torch_mlp)),
    "dense, experts' kernel": Form("dense", partial(mlps_by, kernel_mlp)),
    "capacity, room for all": Form("dropless", room_for_all),
}
BASES = ("dense", *(name for name, form in FORMS.items() if form.type == "dense"))


class Trainee:
    """A model in training, or a rank's part of it."""

    def __init__(self, config: Config):
        self.config, self.mesh = config, Mesh(config.mesh)
        self.model = build(config, self.mesh)
        self.optimizer = build_optimizer(self.model, config.optim)

    def gradients(self, batch, step: int) -> dict[str, torch.Tensor]:
        """Forward and backward -> this rank's parts of the loss per token and of the balance loss (1: balanced), its
        copies per MoE layer and expert, and how many of them were dropped."""
        config = self.config
        draws = self.mesh.draws(config.train.seed, step, batch.row0, config.model.seq_len)
        with precision(config, self.mesh.device):
            out = self.model(batch.tokens, batch.targets, draws)
        loss, aux = backward(self.model, out, self.mesh, tokens=config.tokens_per_step)
        balance = aux / (config.model.moe.balance_weight or 1)
        return {"loss": loss, "balance": balance, "counts_LE": out.counts_LE, "dropped": out.dropped_L.sum()}

    def update(self, step: int) -> None:
        optim = self.config.optim
        set_learning_rate(self.optimizer, learning_rate(step, optim, self.config.train.steps))
        clip_grad_norm(self.model.named_parameters(), optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def loader_of(config: Config, data: IndexedDataset) -> Loader:
    return Loader(data, seq_len=config.model.seq_len, batch_size=config.sequences_per_step, seed=config.train.seed)


# ---- memory ----------------------------------------------------------------------------------------------------------


def peak_rss() -> int:
    """Bytes. That of a forked process begins with what its parent holds."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory(config: Config, data: IndexedDataset, steps: int = 2) -> dict[str, int]:
    """Bytes that a process holds which trains for some steps, by what they are."""

    def body(rank):
        kept, before = {}, peak_rss()

        def keep(x):
            storage = x.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return x

        trainee, loader = Trainee(config), loader_of(config, data)
        parameters = list(trainee.model.parameters())
        for step in range(1, steps + 1):
            kept.clear()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                trainee.gradients(loader.batch(), step)
            gradients = sum(p.grad.nbytes for p in parameters)
            trainee.update(step)
        for p in parameters:
            kept.pop(p.untyped_storage().data_ptr(), None)
        moments = [state[key] for state in trainee.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        return {"parameters": sum(p.nbytes for p in parameters), "gradients": gradients,
                "moments": sum(moment.nbytes for moment in moments), "kept": sum(kept.values()),
                "peak RSS": peak_rss() - before}  # fmt: skip

    return run_ranks(1, body)[0]


# ---- the mesh --------------------------------------------------------------------------------------------------------


def losses_on(config: Config, data: IndexedDataset, ranks: int, dtype: str, steps: int) -> list[list[float]]:
    """[loss, balance loss] of each of the first steps, with experts and all other parameters shared by the ranks."""
    rows, left = divmod(config.train.micro_batch, ranks)
    require(left == 0, f"{ranks} ranks do not divide train.micro_batch {config.train.micro_batch}")
    config = replace(config, mesh=MeshConfig(fsdp=ranks, ep=ranks),
                     train=replace(config.train, micro_batch=rows, dtype=dtype))  # fmt: skip

    def body(rank):
        trainee, loader, losses = Trainee(config), loader_of(config, data), []
        for step in range(1, steps + 1):
            parts = trainee.gradients(loader.batch(*trainee.mesh.rows(0, rows)), step)
            losses.append([float(x) for x in trainee.mesh.sum(parts["loss"], parts["balance"])])
            trainee.update(step)
            loader.advance()
        trainee.mesh.close()
        return losses

    return run_ranks(ranks, body)[0]


def beside_one(config: Config, data: IndexedDataset, ranks: tuple[int, ...], dtype: str, steps: int) -> list[dict]:
    """A line for each number of ranks: of each step the worse of the two losses' relative distances from one process's.
    """
    alone = losses_on(config, data, 1, dtype, steps)
    lines = []
    for n in ranks:
        losses = losses_on(config, data, n, dtype, steps)
        errors = [max(abs(a - b) / b for a, b in zip(*pair, strict=True)) for pair in zip(losses, alone, strict=True)]
        lines.append({"ranks": n, "dtype": dtype, "errors": errors, "losses": losses, "one process": alone})
        say(mesh_line(lines[-1]))
    return lines


def mesh_line(line: dict) -> str:
    n, errors = line["ranks"], line["errors"]
    return (f"{n} ranks with ep {n} beside one process, {line['dtype']}: the losses differ by {errors[0]:.1e} in step "
            f"1, by {max(errors):.1e} at most in {len(errors)} steps")  # fmt: skip


# ---- training --------------------------------------------------------------------------------------------------------


def train(configs: dict[str, Config], data: IndexedDataset, every: int):
    """-> the models of the types; and a list for each type, of what it did in each step: "gradients" and "update" in
    seconds, losses, loads. For each of FORMS too, of the rounds alone and without "update"."""
    trainees, loader = {type: Trainee(config) for type, config in configs.items()}, loader_of(configs["dense"], data)
    series = {name: [] for name in (*TYPES, *FORMS)}

    def gradients(name, trainee, batch, step):
        took, parts = seconds(trainee.gradients, batch, step)
        series[name].append({"gradients": took, **{key: x.tolist() for key, x in parts.items()}})

    for step in range(1, configs["dense"].train.steps + 1):
        batch, first = loader.batch(), step % len(TYPES)
        for type in TYPES[first:] + TYPES[:first]:
            trainee = trainees[type]
            for name, form in FORMS.items() if step % every == 0 else ():
                if form.type == type:
                    with form.of(trainee.model):
                        gradients(name, trainee, batch, step)
                    trainee.optimizer.zero_grad()
            gradients(type, trainee, batch, step)
            series[type][-1]["update"], _ = seconds(trainee.update, step)
        loader.advance()
        if step % 10 == 0:
            last = {type: series[type][-1] for type in TYPES}
            said = [f"{type} {s['loss']:.4f} {1e3 * (s['gradients'] + s['update']):.0f} ms" for type, s in last.items()]
            say(f"step {step}/{configs['dense'].train.steps} | {' | '.join(said)}")
    return {type: trainee.model for type, trainee in trainees.items()}, series


def check_forms(series: dict[str, list[dict]], every: int) -> None:
    """AssertionError unless every form computes what its type does."""
    for name, form in FORMS.items():
        for got, want in zip(series[name], series[form.type][every - 1 :: every], strict=True):
            if abs(got["loss"] - want["loss"]) > 1e-4 * want["loss"] or got["dropped"]:
                raise AssertionError(f"{name}: the loss is {got['loss']} and {got['dropped']} copies are dropped, but "
                                     f"the loss of {form.type} is {want['loss']}")  # fmt: skip


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def times(series: dict[str, list[dict]], every: int, warmup: int) -> tuple[str, dict]:
    """-> the form of dense that is the base; and of each name, by KINDS, quartiles over the rounds: "ms", and the
    ratios "over dense" and "over dropless", with those of the medians."""
    rounds = {name: (steps[every - 1 :: every] if name in TYPES else steps)[warmup:] for name, steps in series.items()}
    taken = {}
    for name, steps in rounds.items():
        updates = [step["update"] for step in (steps if name in TYPES else rounds[FORMS[name].type])]
        alone = [step["gradients"] for step in steps]
        taken[name] = dict(zip(KINDS, (alone, [a + b for a, b in zip(alone, updates, strict=True)]), strict=True))
    base = min(BASES, key=lambda name: statistics.median(taken[name][KINDS[0]]))
    found = {name: {} for name in taken}
    for name in taken:
        for kind in KINDS:
            mine = taken[name][kind]
            found[name][kind] = {"ms": quartiles([1e3 * t for t in mine])}
            for to, other in {"dense": base, "dropless": "dropless"}.items():
                theirs = taken[other][kind]
                found[name][kind][f"over {to}"] = {
                    "ratios": quartiles([a / b for a, b in zip(mine, theirs, strict=True)]),
                    "of medians": statistics.median(mine) / statistics.median(theirs),
                }
    return base, found


# ---- the report ------------------------------------------------------------------------------------------------------


def late(steps: list[dict], key: str) -> float:
    """The mean over the last tenth of the steps."""
    return statistics.mean(step[key] for step in steps[-max(1, len(steps) // 10) :])


def table(report: dict) -> str:
    """Markdown, a column for each type."""
    series, tokens, copies = report["series"], report["tokens per step"], report["copies per step"]
    best = {type: report["times"][report["base"] if type == "dense" else type] for type in TYPES}
    rate = {type: 1e3 * tokens / best[type][KINDS[1]]["ms"][1] for type in TYPES}
    rows = {}

    def row(name, cell, types=TYPES):
        rows[name] = [cell(type) if type in types else "-" for type in TYPES]

    def spread(low_middle_high, digits):
        low, middle, high = (f"{x:.{digits}f}" for x in low_middle_high)
        return f"{middle} ({low} to {high})"

    row("parameters", lambda type: f"{report['parameters'][type][0]:,}")
    row("active per token", lambda type: f"{report['parameters'][type][1]:,}")
    row("MFLOPs per token", lambda type: f"{report['FLOPs per token'][type] / 1e6:.2f}")
    for kind in KINDS:
        row(f"ms per iteration, {kind}", lambda type, kind=kind: spread(best[type][kind]["ms"], 0))
        row(f"over dense, {kind}", lambda type, kind=kind: spread(best[type][kind]["over dense"]["ratios"], 2))
    row("over dense in the Megatron runs", lambda type: f"{MEGATRON[type]:.2f}")
    row("tokens/s", lambda type: f"{rate[type]:,.0f}")
    row("GFLOP/s", lambda type: f"{rate[type] * report['FLOPs per token'][type] / 1e9:.0f}")
    for name, parts in {
        "parameters, gradients, moments": ("parameters", "gradients", "moments"),
        "kept for the backward": ("kept",),
        "peak RSS of training": ("peak RSS",),
    }.items():
        row(f"MiB, {name}", lambda type, parts=parts: f"{sum(report['memory'][type][p] for p in parts) / 2**20:,.0f}")
    row("loss, last tenth of the steps", lambda type: f"{late(series[type], 'loss'):.3f}")
    row("held-out loss", lambda type: f"{report['held-out loss'][type]:.3f}")
    row("balance loss, first step", lambda type: f"{series[type][0]['balance']:.3f}", TYPES[1:])
    row("balance loss, last tenth", lambda type: f"{late(series[type], 'balance'):.3f}", TYPES[1:])
    row("copies dropped, last tenth", lambda type: f"{late(series[type], 'dropped') / copies:.1%}", TYPES[1:])
    lines = [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join([f"| | {' | '.join(TYPES)} |", "|---|---|---|---|", *lines])


def wanted(report: dict) -> list[dict]:
    """What was wanted, what was got, and whether that will do."""
    kind = KINDS[0]
    exact = max((error for line in report["mesh"] if line["dtype"] == "fp64" for error in line["errors"]), default=0.0)
    lines = []
    for name, to, most in (("capacity", "dropless", 1.0), ("dropless", "dense", 1.3)):
        ratio = report["times"][name][kind][f"over {to}"]
        lines.append({"what": f"{name} over {to}, {kind}", "got": ratio["ratios"][1], "most": most,
                      "of medians": ratio["of medians"]})  # fmt: skip
    lines.append({"what": "losses of several ranks beside one's, fp64", "got": exact, "most": EQUAL})
    return [{**line, "met": line["got"] <= line["most"]} for line in lines]


def words(report: dict) -> str:
    """The table and what belongs to it, as Markdown."""
    threads, times = report["threads"], report["times"]
    dense = [f"{times[name][KINDS[0]]['ms'][1]:.0f} ms {name[7:] or 'as the model has it'}" for name in BASES]
    low, middle, high = times["capacity, room for all"][KINDS[0]]["over dropless"]["ratios"]
    lines = [
        f"{report['cpu']}, {report['isa']}, {threads} threads{', CPU time' * (threads == 1)}, torch {report['torch']}: "
        f"{report['steps']} steps of {report['tokens per step']:,} tokens, {report['rows per expert']:.0f} rows per "
        f"expert; {report['seconds'] / 60:.1f} minutes in all.",
        "",
        table(report),
        "",
        f"Dense, {KINDS[0]}: {', '.join(dense)}. The fastest is the base. A capacity with room for all copies takes "
        f"{middle:.2f} ({low:.2f} to {high:.2f}) of the dropless type's time.",
        "",
    ]
    lines += [f"- {mesh_line(line)}" for line in report["mesh"]]
    for line in report["wanted"]:
        medians = f" ({line['of medians']:.3f} of the medians)" if "of medians" in line else ""
        verdict = "met" if line["met"] else "NOT MET"
        lines.append(f"- {line['what']}: {line['got']:.3g}{medians}, wanted {line['most']:g} at most: {verdict}")
    return "\n".join(lines) + "\n"


def split_page(page: Path) -> tuple[str, str]:
    """What stands before and after the table of a page. Errors: ValueError, OSError."""
    before, begin, rest = page.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not end:
        raise ValueError(f"{page} lacks the lines {MARKS[0].strip()} and {MARKS[1].strip()}, between which the table "
                         "goes: write them, or give another --page")  # fmt: skip
    return before + begin, end + after


def draw(report: dict, image: Path) -> None:
    """The losses by step, tokens and time; the balance loss; the experts' loads."""
    from matplotlib.figure import Figure

    series, colours = report["series"], dict(zip(TYPES, ("#636363", "#d94801", "#08519c"), strict=True))
    figure = Figure(figsize=(13, 7.5), dpi=110, layout="constrained")
    axes = figure.subplot_mosaic([["step", "tokens", "seconds"], ["balance", *TYPES[1:]]])
    for type in TYPES:
        steps = series[type]
        numbers, spent = range(1, len(steps) + 1), 0.0
        at = {"step": list(numbers), "tokens": [n * report["tokens per step"] / 1e3 for n in numbers], "seconds": []}
        for step in steps:
            spent += step["gradients"] + step["update"]
            at["seconds"].append(spent)
        label = f"{type}, held out {report['held-out loss'][type]:.3f}"
        losses = centred_mean([step["loss"] for step in steps], len(steps) // 80)
        for axis, x in at.items():
            axes[axis].plot(x, losses, color=colours[type], label=label)
        if type != "dense":
            axes["balance"].plot(at["step"], [step["balance"] for step in steps], color=colours[type], label=type)
            loads = [{"step": n, "counts_LE": step["counts_LE"]} for n, step in zip(numbers, steps, strict=True)]
            figure.colorbar(draw_load_map(axes[type], loads), ax=axes[type], label="copies before drops / layer's mean")
            axes[type].set_title(f"{type}: load of the experts, last quarter")
    for axis, name in {"step": "step", "tokens": "thousand tokens", "seconds": "seconds of its own work"}.items():
        axes[axis].set(xlabel=name, ylabel="loss (nats per token)")
    axes["balance"].set(xlabel="step", ylabel="balance loss", title="Balance loss (1 is balanced)")
    for name in ("step", "tokens", "seconds", "balance"):
        axes[name].grid(alpha=0.3)
        axes[name].legend(frameon=False)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image)


def compare(command: Command) -> dict:
    """The whole comparison -> the report."""
    began, config = time.perf_counter(), plain(command)
    data, valid = preflight(config)
    configs = {type: as_type(config, type) for type in TYPES}
    moe, tokens = config.model.moe, config.tokens_per_step
    report = {
        **machine(), "threads": torch.get_num_threads(), "steps": config.train.steps, "tokens per step": tokens,
        "rows per expert": tokens * moe.top_k / moe.experts,
        "copies per step": tokens * moe.top_k * config.model.layers,
    }  # fmt: skip
    # first, while this process is small and has no threads that a fork would lose
    report["memory"] = {type: memory(c, data) for type, c in configs.items()}
    report["mesh"] = [line for dtype, steps in {"fp64": command.fp64_steps, "fp32": command.fp32_steps}.items()
                      for line in beside_one(configs["dropless"], data, command.ranks, dtype, steps)]  # fmt: skip
    models, report["series"] = train(configs, data, command.every)
    check_forms(report["series"], command.every)
    report["base"], report["times"] = times(report["series"], command.every, command.warmup)
    report["parameters"] = {type: model.num_parameters() for type, model in models.items()}
    report["FLOPs per token"] = {type: model.flops_per_token() for type, model in models.items()}
    report["held-out loss"] = {type: evaluate(model, configs[type], valid, config.train.eval_batches)
                               for type, model in models.items()}  # fmt: skip
    report["wanted"] = wanted(report)
    report["configs"] = {type: dataclasses.asdict(c) for type, c in configs.items()}
    report["seconds"] = time.perf_counter() - began
    return report


def main(args: list[str]) -> None:
    command = parse(args, Command, "benchmarks.compare")
    if not importlib.util.find_spec("matplotlib"):
        raise ValueError("the plot needs matplotlib: pip install matplotlib")
    before, after = split_page(command.page)
    report = compare(command)
    text = words(report)
    say(f"\n{text}")
    write(report, command.out, "compare-{cpu}.json")
    draw(report, command.plot)
    command.page.write_text(before + text + after)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
