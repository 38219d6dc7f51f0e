"""log.style "line": one short line a step.

step 120/10000 | loss 3.2145 | aux 1.0e-2 | gnorm 0.61 | lr 3.0e-4 | 412 ms | 318k tok/s | adamw 1% muon 9%
               | epoch 1.24 | load 1.31x dead 0 | eta 1h08m                                 (on the same line)

    ms, tok/s   of the steps since the last line, without evaluation and saving; the first step of a process, which
                pays for warm-up, counts only in its own line
    mfu         FLOPs of the model per second over the peak of all devices, where that is known
    adamw, muon an optimizer's share of the time of these steps, on the rank where it is most; "shampoo 12% fell back 3
                times": there was no new inverse root, of any rank
    epoch       passes over the training tokens so far
    load        the fullest expert of any layer over its layer's mean; dead: experts without a token; dropped: the share
                of all copies that capacity dropped
    eta         everything that remains at the pace so far, evaluation and saving included
"""
import math
from pathlib import Path

from moe_ext.config import Config
from moe_ext.model import GPT
from moe_ext.plan import describe


def beside(loss: float, entropy: float) -> str:
    """Held-out loss against the entropy of its tokens' frequencies, which a model of frequencies alone would reach."""
    side = "below" if loss <= entropy else "above"
    return f"unigram entropy {entropy:.4f} | {side} it by {abs(entropy - loss):.4f} nats"


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def measured(name: str, loss: float, entropy: float, **numbers: float) -> str:
    """Held-out loss of the set `name`, other forms of it, and beside what it stands."""
    forms = [f"{key.replace('_', ' ')} {value:.{4 if 'bits' in key else 2}f}" for key, value in numbers.items()]
    return " | ".join([f"{name} loss {loss:.4f}", *forms, beside(loss, entropy)])


def chosen(scores: dict[str, float]) -> str:
    """The scores of multiple choice, as shares with standard errors."""
    shares = [f"{name} {scores[name]:.4f} +- {scores[name + '_stderr']:.4f}" for name in scores
              if name + "_stderr" in scores]
    return " | ".join([f"choices of {scores['questions']}", *shares])


class Line:
    """What the console and run.log show, as text, in this style."""

    def __init__(self, config: Config):
        self.config, self.steps = config, config.train.steps

    def start(self, model: GPT, loaded: Path | None, step: int, lines: list[str], data: list[str], setup) -> str:
        first = f"continuing from {loaded}" if loaded else f"writing {self.config.run_folder}"
        return "\n".join([describe(self.config, model), *data, first, *lines])

    def step(self, record: dict, eta: float) -> str:
        return step_line(record, self.steps, eta)

    def evaluation(self, step: int, name: str, loss: float, entropy: float, numbers: dict[str, float]) -> str:
        return f"eval {step}/{self.steps} | {measured(name, loss, entropy, **numbers)}"

    def saving(self, step: int) -> str:
        return ""

    def saved(self, path: Path, step: int, waited: float, written: float) -> str:
        return f"saved {path} | waited {waited:.2f} s" + (f", then written in {written:.2f} s" if written else "")


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
    spent = [name + (f" {cost['share']:.0%}" if "share" in cost else "")
             + (f" fell back {cost['fallbacks']} times" if "fallbacks" in cost else "")
             for name, cost in record.get("optimizer", {}).items() if {"share", "fallbacks"} & cost.keys()]
    if spent:
        parts.append(" ".join(spent))
    if "epoch" in record:
        parts.append(f"epoch {record['epoch']:.2f}")
    if "load" in record:
        dropped, copies = sum(record.get("dropped_L", [])), sum(map(sum, record["counts_LE"]))
        parts.append(f"load {record['load']:.2f}x dead {record['dead']}"
                     + (f" dropped {dropped / copies:.1%}" if dropped else ""))
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
