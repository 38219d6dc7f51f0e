"""AdamW, Muon and Shampoo on the same small GPT, and Muon's batch of experts; python -m benchmarks.optimizers --help.

    rates      held-out loss of short runs of each optimizer, one for each learning rate; the lowest is the one it gets
    training   the three train the same GPT with experts on the text of `make train`, from the same values, in one
               process: they take each step in turn on the same batch, so whatever else the machine does meets all
               alike. Held-out loss by step, and by seconds of an optimizer's own steps
    shares     what the optimizer's part of a step is, and Shampoo's at other frequencies of its inverse roots
    experts    one step of Muon over a stack of experts beside loops over its matrices: torch.optim.Muon, whose bf16
               products are slow on a CPU without such instructions, and the same lines in fp32. What a loop leaves to
               gain is at most the peak, that of a product of large matrices, over its own rate

Muon and Shampoo move matrices and experts, AdamW embeddings and norms. Muon's rate is that of match_rms_adamw, Shampoo
has Adam's grafting: steps as long as AdamW's, so one grid of rates serves all. Prints Markdown and what was wanted of
it; writes benchmarks/results/optimizers-<cpu>.json and the plot.
"""

import itertools
import math
import os
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from benchmarks.compare import Trainee, loader_of, say
from benchmarks.ops import machine, seconds, write
from benchmarks.sequence import table
from moe_ext.config import Config, DataConfig, ModelConfig, MoEConfig, OptimConfig, ShampooConfig, TrainConfig
from moe_ext.data import open_data
from moe_ext.evaluate import evaluate
from moe_ext.log.draw import centred_mean
from moe_ext.optim import Muon
from moe_ext.optim.muon import COEFFICIENTS, EPS, STEPS, cost

CORES = len(os.sched_getaffinity(0))
LABELS = {"adamw": "AdamW", "muon": "Muon", "shampoo": "Shampoo"}
COLOURS = {"adamw": "#636363", "muon": "#d94801", "shampoo": "#08519c"}
MODEL = ModelConfig(vocab_size=4096, seq_len=128, layers=4, dim=128, heads=4, act="swiglu", norm="rmsnorm",
                    position="rope", qk_norm=True,
                    moe=MoEConfig(experts=8, top_k=2, hidden=128, balance_weight=0.05))  # fmt: skip
RATES = 1e-3, 2e-3, 4e-3, 8e-3
FREQUENCIES = 1, 5, 20, 100


# ---- training --------------------------------------------------------------------------------------------------------
def config_of(name: str, rate: float, base: Config, steps: int) -> Config:
    shampoo = ShampooConfig(precondition_frequency=min(20, max(1, steps // 3)))  # until then it is Adam
    optim = OptimConfig(name=name, lr=rate, min_lr=rate / 10, warmup=max(1, steps // 10), shampoo=shampoo)
    return replace(base, optim=optim, train=replace(base.train, steps=steps))


def train(configs: dict[str, Config], data, valid, every: int) -> dict[str, dict[str, list]]:
    """Of each optimizer: losses; seconds of "gradients" and "update" of each step; [step, seconds so far, loss] of each
    evaluation. What is not finite ends it, with a loss of inf."""
    first = next(iter(configs.values()))
    trainees, loader = {name: Trainee(config) for name, config in configs.items()}, loader_of(first, data)
    series = {name: {"loss": [], "gradients": [], "update": [], "held out": []} for name in configs}
    for step in range(1, first.train.steps + 1):
        batch, turn = loader.batch(), step % len(configs)
        for name in filter(trainees.__contains__, [*configs][turn:] + [*configs][:turn]):
            trainee, mine = trainees[name], series[name]
            try:
                took, parts = seconds(trainee.gradients, batch, step)
                mine["gradients"].append(took)
                mine["loss"].append(float(parts["loss"]))
                mine["update"].append(seconds(trainee.update, step)[0])
                loss = 0.0
                if step % every == 0 or step == first.train.steps:
                    loss = evaluate(trainee.model, trainee.config, valid, trainee.config.train.eval_batches)
            except FloatingPointError:
                del trainees[name]
                loss = math.inf
            if loss:
                mine["held out"].append([step, sum(mine["gradients"]) + sum(mine["update"]), loss])
        loader.advance()
    return series


def sweep(base: Config, data, valid, rates: tuple[float, ...], steps: int) -> list[dict]:
    found = []
    for name, rate in itertools.product(LABELS, rates):
        series = train({name: config_of(name, rate, base, steps)}, data, valid, steps)
        found.append({"optimizer": name, "lr": rate, "steps": steps, "held out": series[name]["held out"][-1][-1]})
        say(f"{LABELS[name]}, learning rate {rate:g}: {found[-1]['held out']:.4f} after {steps} steps")
    return found


def best(rates: list[dict], name: str) -> float:
    return min((line for line in rates if line["optimizer"] == name), key=lambda line: line["held out"])["lr"]


def shares(configs: dict[str, Config], data, gradients: float, frequencies: tuple[int, ...]) -> list[dict]:
    """Seconds of optimizer.step() alone, the mean over the steps from one inverse root to the next; gradients: seconds
    of forward and backward."""
    found = []
    for name, config in configs.items():
        for frequency in frequencies if name == "shampoo" else (0,):
            if frequency:
                shampoo = ShampooConfig(precondition_frequency=frequency)
                config = replace(config, optim=replace(config.optim, shampoo=shampoo))
            trainee, warm = Trainee(config), max(2, frequency)
            trainee.gradients(loader_of(config, data).batch(), 1)
            taken = [seconds(trainee.optimizer.step)[0] for _ in range(2 * warm)][warm:]
            took = statistics.mean(taken)
            found.append({"optimizer": name, "frequency": frequency, "ms": 1e3 * took, "of them longest":
                          1e3 * max(taken), "share": took / (took + gradients)})  # fmt: skip
    return found


# ---- experts ---------------------------------------------------------------------------------------------------------
def loop(parameters, buffers, lr: float, weight_decay: float, momentum: float) -> None:
    """Muon's step as torch.optim.Muon does it, matrix by matrix, in the dtype of the parameters."""
    a, b, c = COEFFICIENTS
    for p, buffer in zip(parameters, buffers, strict=True):
        buffer.lerp_(p.grad, 1 - momentum)
        x = p.grad.lerp(buffer, momentum)
        tall = len(x) > len(x[0])
        x = x.T if tall else x
        x = x / x.norm().clamp(min=EPS)
        for _ in range(STEPS):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        x = x.T if tall else x
        p.mul_(1 - lr * weight_decay)
        p.add_(x, alpha=-lr * math.sqrt(max(1, p.shape[0] / p.shape[1])))


def expert_lines(E: int, rows: int, columns: int, rounds: int) -> tuple[list[dict], float]:
    """A line for each form, and GFLOP/s of a large product. Forms take turns; torch's bf16 loop, the slowest by far,
    takes its first alone. AssertionError if forms in one precision differ."""
    torch.manual_seed(0)
    values, grad = torch.randn(2, E, rows, columns)
    how = dict(lr=0.02, weight_decay=0.1, momentum=0.95)
    large = torch.randn(2048, 2048)

    def parameters(*tensors):
        found = [nn.Parameter(x.clone()) for x in tensors]
        for p, g in zip(found, [grad] if len(found) == 1 else grad, strict=True):
            p.grad = g.clone()
        return found

    stacks, singles = [parameters(values) for _ in range(2)], [parameters(*values) for _ in range(2)]
    buffers = [torch.zeros_like(p) for p in singles[0]]
    forms = {
        ("batch", "bf16"): Muon(stacks[0], **how).step,
        ("batch", "fp32"): Muon(stacks[1], **how, ns_dtype=torch.float32).step,
        ("loop", "fp32"): torch.no_grad()(lambda: loop(singles[0], buffers, **how)),
        ("torch.optim.Muon", "bf16"): torch.optim.Muon(singles[1], **how).step,
    }
    taken, peak = {form: [] for form in forms}, []
    for number in range(rounds + 1):
        for form, step in forms.items():
            if number == 0 or form[0] != "torch.optim.Muon":
                taken[form].append(seconds(step)[0])
        peak.append(2e-9 * len(large) ** 3 / seconds(torch.mm, large, large)[0])
        if number == 0:  # elements of 256 orthogonal columns are about 2**-4
            for stack, single, limit in ((stacks[0], singles[1], 2**-6), (stacks[1], singles[0], 1e-5)):
                far = (stack[0].detach() - torch.stack(list(single)).detach()).abs().max()
                assert far <= how["lr"] * limit, f"a batch is {far} away from the loop"
    flops, found = E * cost((rows, columns)), []
    for (form, dtype), times in taken.items():
        took = statistics.median(times[1:] or times)
        found.append({"form": form, "dtype": dtype, "E": E, "rows": rows, "columns": columns, "ms": 1e3 * took,
                      "GFLOP/s": 1e-9 * flops / took})  # fmt: skip
    return found, max(peak)


def ratio(lines: list[dict], form: str, dtype: str) -> float:
    """Another's time over that of the batch in the same dtype."""
    ms = {(line["form"], line["dtype"]): line["ms"] for line in lines}
    return ms[form, dtype] / ms["batch", dtype]


# ---- the report ------------------------------------------------------------------------------------------------------
def wanted(report: dict) -> list[dict]:
    """The bars, and whether they are met."""
    found = []

    def line(what, value, bar, least=False):
        found.append({"what": what, "value": value, "bar": bar, "met": value >= bar if least else value <= bar})

    experts, last = report["experts"], {name: of["held out"][-1][-1] for name, of in report["training"].items()}
    line("experts: torch.optim.Muon's loop over our batch, bf16", ratio(experts, "torch.optim.Muon", "bf16"), 3.0, True)
    most = report["peak GFLOP/s"] / next(line["GFLOP/s"] for line in experts if line["form"] == "loop")
    line(f"experts: a loop over our batch, fp32 (at the peak {most:.2f})", ratio(experts, "loop", "fp32"),
         3.0, True)  # fmt: skip
    for name in ("muon", "shampoo"):
        line(f"held-out loss of {LABELS[name]} less AdamW's, last step", last[name] - last["adamw"], 0.0)
    return found


def draw(training: dict[str, dict], rates: dict[str, float], image: Path) -> None:
    """Losses by step and by time: faint in training, dots held out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for name, of in training.items():
        steps = len(of["update"])
        times = list(itertools.accumulate(map(sum, zip(of["gradients"][:steps], of["update"], strict=True))))
        losses = centred_mean(of["loss"][:steps], steps // 80)
        held = of["held out"]
        for axes, places, column in zip(panels, (range(1, steps + 1), times), (0, 1), strict=True):
            axes.plot(places, losses, color=COLOURS[name], linewidth=1, alpha=0.35)
            axes.plot([line[column] for line in held], [line[2] for line in held], color=COLOURS[name], marker="o",
                      markersize=3.5, linewidth=1.4,
                      label=f"{LABELS[name]}, rate {rates[name]:g} ({held[-1][2]:.3f})")  # fmt: skip
    panels[0].set(xlabel="step", ylabel="loss (nats per token)")
    panels[1].set(xlabel="seconds of its own steps")
    panels[0].legend(frameon=False, fontsize="small", title="faint: train, dots: held out (its last value)",
                     title_fontsize="small", alignment="left")  # fmt: skip
    for axes in panels:
        axes.grid(alpha=0.3)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image)


def main(
    steps: int = 300,
    sweep_steps: int = 40,
    rates: tuple[float, ...] = RATES,
    rounds: int = 5,
    threads: int = CORES,
    quick: bool = False,
    data: Path = Path("data/tiny"),
    out: Path = Path("benchmarks/results"),
    plot: Path = Path("docs/optimizers.png"),
):
    """Compare AdamW, Muon and Shampoo on a small GPT, and Muon's batch of experts with loops.

    Args:
        steps: of training.
        sweep_steps: of the short runs that choose the learning rates.
        rates: from which they choose.
        rounds: timed rounds of the experts, after one that warms up.
        threads: of torch; one where others work on the machine.
        quick: hardly any tokens, steps and rates, narrow models: to see that it runs.
        data: folder of tokens, train and valid, as `make train` prepares it.
        out: folder of the JSON file.
        plot: image of the losses.
    """
    model, sequences, every, batches, frequencies, experts = MODEL, 16, 25, 16, FREQUENCIES, (64, 512, 256)
    if quick:
        model = replace(MODEL, seq_len=16, layers=1, dim=32, moe=replace(MODEL.moe, hidden=16))
        steps, sweep_steps, rates, rounds, sequences, every, batches = 6, 2, rates[:2], 1, 2, 3, 2
        frequencies, experts = (1, 3), (4, 24, 16)
    torch.set_num_threads(threads)
    if not Path(f"{data}/train.idx").exists():
        raise FileNotFoundError(f"{data}/train.idx: there is no text: python -m moe_ext.data prepare --max-mb 24 "
                                f"--cut-kb 0 --out {data}, or give --data the folder of another")  # fmt: skip
    base = Config(model, data=DataConfig(f"{data}/train", f"{data}/valid", tokenizer=""),
                  train=TrainConfig(micro_batch=sequences, eval_batches=batches, device="cpu"))  # fmt: skip
    text, valid, _ = open_data(base.data.train, base.data.valid, base.data.split)
    report = {**machine(), "threads": threads, "load": os.getloadavg()[0], "tokens per step": base.tokens_per_step}
    print(f"{report['cpu']}, {threads} threads (load {report['load']:.1f}), torch {report['torch']}, commit "
          f"{report['commit']}")  # fmt: skip
    report["experts"], report["peak GFLOP/s"] = expert_lines(*experts, rounds)
    table("a step of Muon over E x rows x columns | in | ms | GFLOP/s | of the peak | x the batch",
          ([f"{line['form']}, {line['E']} x {line['rows']} x {line['columns']}", line["dtype"], f"{line['ms']:.0f}",
            f"{line['GFLOP/s']:.0f}", f"{line['GFLOP/s'] / report['peak GFLOP/s']:.0%}",
            f"{ratio(report['experts'], line['form'], line['dtype']):.2f}"] for line in report["experts"]))  # fmt: skip
    report["rates"] = sweep(base, text, valid, rates, sweep_steps)
    chosen = {name: best(report["rates"], name) for name in LABELS}
    configs = {name: config_of(name, rate, base, steps) for name, rate in chosen.items()}
    report["training"] = train(configs, text, valid, every)
    held = {name: of["held out"][-1::-2][::-1] for name, of in report["training"].items()}
    table("optimizer | learning rate | seconds | " + " | ".join(f"held out, step {at}" for at, *_ in held["adamw"]),
          ([LABELS[name], f"{chosen[name]:g}", f"{lines[-1][1]:.0f}", *(f"{loss:.3f}" for *_, loss in lines)]
           for name, lines in held.items()))  # fmt: skip
    gradients = statistics.median(t for of in report["training"].values() for t in of["gradients"])
    report["shares"] = shares(configs, text, gradients, frequencies)
    table("optimizer | steps from root to root | ms of its step | longest | of a whole step",
          ([LABELS[line["optimizer"]], f"{line['frequency'] or '-'}", f"{line['ms']:.1f}",
            f"{line['of them longest']:.1f}", f"{line['share']:.1%}"] for line in report["shares"]))  # fmt: skip
    report["wanted"] = wanted(report)
    table("wanted | value | bar | met", ([line["what"], f"{line['value']:.3f}", f"{line['bar']:.2f}",
                                          "yes" if line["met"] else "NO"] for line in report["wanted"]))  # fmt: skip
    draw(report["training"], chosen, plot)
    write(report, out, "optimizers-{cpu}.json")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
