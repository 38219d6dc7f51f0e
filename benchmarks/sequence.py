"""Ranks that share a sequence: memory and time of attention and of training; python -m benchmarks.sequence --help.

    memory     live storage (moe_ext.check.live) of attention on 4 ranks at four N, forward and backward: of the program
               that moe_ext.plan ulysses plans, beside the plan; of documents; and, at the smallest N, with the scores
               of all queries and keys and a mask in memory, beside the formula for that
    layer      one layer, x [1,N/P,D] in and out on each of P ranks, in every form that FORMS names
    exchange   what Ulysses moves in it: its all-to-alls alone, and with an attention that does nothing, so that what
               remains are the copies that make messages of heads and heads of messages
    training   steps of a small MoE on whole meshes, beside one process with a thread for each core

Ranks are forked processes of one thread each. Where they are more than the cores they share these, and a time measures
work and overheads, not what so many cores would gain. So beside the wall time, from the first rank's start to the last
one's end, stands the CPU time of the busiest rank: what the form takes at least if each rank has a core to itself.

A round runs the forms one after the other in turns, on the same input; the first warms up and compares results and
gradients with one process. A ratio is the median over the rounds of (another's time / Ulysses'): above 1 Ulysses is
faster. Prints Markdown and what was wanted of it; writes benchmarks/results/sequence-<cpu>.json.
"""

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from benchmarks.compare import Trainee
from benchmarks.ops import _ratio, machine, write
from moe_ext.attention import Documents, attend
from moe_ext.check.live import Live
from moe_ext.check.ulysses import Memory, Program
from moe_ext.config import Config, MeshConfig, ModelConfig, MoEConfig, TrainConfig
from moe_ext.data.loader import Batch
from moe_ext.model import Attention, Block
from moe_ext.parallel.collectives import all_to_all, gather_rows
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.ranks import run_ranks
from moe_ext.parallel.sequence import sequence_parallel
from moe_ext.parallel.tensor import tensor_parallel
from moe_ext.plan.ulysses import Sizes, steps

CORES = len(os.sched_getaffinity(0))


# ---- turns -----------------------------------------------------------------------------------------------------------
class Marks(NamedTuple):
    """Of a step on one rank: when it began, when its forward and all of it ended; CPU seconds until then."""

    begin: float
    forward: float
    end: float
    cpu_forward: float
    cpu: float


def clocked(forward: Callable, backward: Callable) -> tuple:
    """Marks, as a plain tuple, which torch.load takes. backward takes what forward returns."""
    cpu, begin = time.process_time(), time.monotonic()
    results = forward()
    middle, cpu_middle = time.monotonic(), time.process_time()
    backward(results)
    return begin, middle, time.monotonic(), cpu_middle - cpu, time.process_time() - cpu


def in_turns(steps: dict[str, Callable[[], tuple | None]], rounds: int, check=lambda: None) -> dict[str, list]:
    """What each step returns in each round but the first, after which there is `check`."""
    found = {name: [] for name in steps}
    for round in range(rounds + 1):
        for name in list(steps)[:: 1 if round % 2 else -1]:
            dist.barrier()
            marks = steps[name]()
            if round:
                found[name].append(marks)
        if round == 0:
            check()
    return found


def rounds_of(ranks: list[dict[str, list]], name: str) -> list[list[Marks]]:
    """The marks of the ranks that took part, round by round."""
    return [[Marks(*marks) for marks in round if marks]
            for round in zip(*(rank[name] for rank in ranks), strict=True)]  # fmt: skip


def wall(rounds: list[list[Marks]], until="end") -> list[float]:
    return [max(getattr(m, until) for m in round) - min(m.begin for m in round) for round in rounds]


def cpu(rounds: list[list[Marks]], of=max) -> list[float]:
    return [of(m.cpu for m in round) for round in rounds]


# ---- one layer -------------------------------------------------------------------------------------------------------
class Shape(NamedTuple):
    """Of a layer: P ranks that share it, N tokens, H query and G key/value heads of d columns. what: attention, with
    its matrices, without RoPE; or a block of that and a dense MLP."""

    P: int
    N: int
    H: int
    G: int
    d: int
    what: str = "attention"

    @property
    def model(self) -> ModelConfig:
        D = self.H * self.d
        return ModelConfig(layers=1, dim=D, heads=self.H, kv_heads=self.G, seq_len=self.N, hidden=3 * D)

    @property
    def forms(self) -> list[str]:
        """tp gives each rank key/value heads of its own."""
        return [form for form in FORMS if form != "tp" or self.G % self.P == 0]


FORMS = {
    "ulysses": lambda P: MeshConfig(sp=P),
    "gather": lambda P: MeshConfig(sp=P, attention="gather"),
    "tp": lambda P: MeshConfig(tp=P),  # whole sequences, but H/P heads and a part of each matrix
    "one": lambda P: MeshConfig(),  # rank 0 alone, with a thread for each rank, but no more than there are cores
}


class Layer:
    """A form of a layer on one of P ranks."""

    def __init__(self, shape: Shape, form: str):
        self.alone, rank = form == "one", dist.get_rank()
        self.idle, self.threads = self.alone and rank > 0, min(shape.P, CORES) if self.alone else 1
        torch.manual_seed(0)
        self.module = Block(shape.model, 0) if shape.what == "block" else Attention(shape.model)
        x_BSD, self.dy_BSD = torch.randn(2, 1, shape.N, shape.H * shape.d)
        if not self.alone:
            x_BSD, self.dy_BSD = (t.chunk(shape.P, dim=1)[rank].contiguous() for t in (x_BSD, self.dy_BSD))
            mesh = Mesh(FORMS[form](shape.P))
            spread = sequence_parallel if mesh.config.sp > 1 else tensor_parallel
            spread(self.module, mesh)
        self.x_BSD = x_BSD.requires_grad_()

    def forward(self):
        if isinstance(self.module, Block):
            x_BSD, y_BSD, _ = self.module(self.x_BSD, None, None)
            return x_BSD + y_BSD
        return self.module(self.x_BSD, None)

    def step(self) -> tuple | None:
        if self.idle:
            return None
        torch.set_num_threads(self.threads)
        self.module.zero_grad()
        self.x_BSD.grad = None
        marks = clocked(self.forward, lambda y_BSD: y_BSD.backward(self.dy_BSD))
        torch.set_num_threads(1)
        return marks

    def results(self) -> list[torch.Tensor]:
        """y and dx, of all tokens."""
        with torch.no_grad():
            parts = [self.forward(), self.x_BSD.grad]
        return parts if self.alone else [gather_rows(part, 1, dist.group.WORLD) for part in parts]


def check_layers(layers: dict[str, Layer]) -> None:
    """AssertionError, on rank 0, unless all forms compute what one process does."""
    results = {form: layer.results() for form, layer in layers.items() if not layer.idle}
    for form, parts in results.items():
        for name, got, want in zip(("y", "dx"), parts, results.get("one", parts), strict=True):
            if (got - want).norm() > 1e-4 * want.norm():
                raise AssertionError(f"{form}: {name} is not that of one process")


def exchanges(layer: Layer, shape: Shape) -> dict[str, Callable[[], tuple]]:
    """The parts of what Ulysses does, each a step: "whole" with an attention that hands q on; "alone", the messages;
    "copy", one plain copy of them, which is the least that packing them takes."""
    P, N, H, G, d, _ = shape
    n, heads = N // P, (H + 2 * max(G, P)) // P
    q, k, v = (torch.randn(1, h, n, d, requires_grad=True) for h in (H, G, G))
    sent = [torch.randn(P, n, 1, h, d, requires_grad=True) for h in (heads, H // P)]

    def whole():
        return [layer.module.across(lambda q, *_: q, q, k, v)]

    def alone():
        return [all_to_all(x, dist.group.WORLD) for x in sent]

    def copy(_=None):
        return [x.detach().clone() for x in sent]

    def back(sources):
        return lambda results: torch.autograd.grad(results, sources, [y.detach() for y in results])

    return {
        "whole": lambda: clocked(whole, back((q, k, v))),
        "alone": lambda: clocked(alone, back(sent)),
        "copy": lambda: clocked(copy, copy),
    }


def sent_bytes(shape: Shape) -> int:
    """What one rank sends in a layer and a pass of Ulysses, fp32."""
    P, N, H, G, d, _ = shape
    return 4 * (N // P) * d * (2 * H + 2 * max(G, P)) * (P - 1) // P


def time_layer(rank: int, shape: Shape, rounds: int) -> dict[str, list]:
    layers = {form: Layer(shape, form) for form in shape.forms}
    found = in_turns({form: layer.step for form, layer in layers.items()}, rounds, partial(check_layers, layers))
    if shape.what == "attention":
        found |= in_turns(exchanges(layers["ulysses"], shape), 3 * rounds)
    return found


def layer_lines(shape: Shape, rounds: int) -> tuple[list[dict], list[dict]]:
    """-> lines of the tables of layers and of exchanges."""
    ranks = run_ranks(shape.P, partial(time_layer, shape=shape, rounds=rounds))
    marks = {name: rounds_of(ranks, name) for name in ranks[0]}
    lines = []
    for form in shape.forms:
        line = {**shape._asdict(), "form": form}
        for name, of in {"forward": partial(wall, until="forward"), "both": wall, "busiest": cpu}.items():
            times = of(marks[form])
            line[name] = {"ms": 1e3 * statistics.median(times), "ratio": _ratio(times, of(marks["ulysses"]))}
        lines.append(line)
    if shape.what != "attention":
        return lines, []
    # what many ranks wait for each other disturbs small differences of wall times: these are of CPU times
    whole, alone, copy, layer = (statistics.median(cpu(marks[name], sum)) for name in ("whole", "alone", "copy",
                                                                                       "ulysses"))  # fmt: skip
    seconds, sent = statistics.median(wall(marks["alone"])), 2 * sent_bytes(shape)
    return lines, [{**shape._asdict(), "bytes": sent, "ms": 1e3 * seconds, "GB/s": sent / seconds / 1e9,
                    "plain copies": (whole - alone) / copy, "share": whole / layer,
                    "copies share": (whole - alone) / layer}]  # fmt: skip


# ---- memory ----------------------------------------------------------------------------------------------------------
def all_scores(q_BHSd, k_BHSd, v_BHSd, *_):
    """What attend computes, with the scores of all queries and keys and a mask of that size."""
    S, d = q_BHSd.shape[2:]
    scores_BHSS = q_BHSd @ k_BHSd.mT / math.sqrt(d)
    return scores_BHSS.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -math.inf).softmax(-1) @ v_BHSd


def sizes_of(shape: Shape, form: str) -> Sizes:
    P, N, H, G, d, _ = shape
    return Sizes(n=N, dim=H * d, heads=H, kv_heads=G, hidden=P, layers=1, tp=P, dp=1, dtype="fp32", attention=form)


def program_bytes(shape: Shape, form: str) -> int:
    """The most bytes of live storage of the program that is planned, input and weights included."""
    program = Program(sizes_of(shape, form), torch.device("cpu"))
    with Live() as live:
        program.attention(meter := Memory(live), keep=False)
    return max(most for _, most in meter.read.values())


def core_bytes(shape: Shape, form: str, of: str) -> int:
    """The most bytes of live storage of q, k, v and all that attention makes of them, forward and backward."""
    across = Layer(shape, form).module.across
    core, seen = all_scores if of == "scores" else attend, None
    if of == "documents":  # of 1000 tokens on average
        seen = Documents.of((torch.rand(1, shape.N) < 1e-3).cumsum(1))
    with Live() as live:
        q, k, v = (torch.randn(1, h, shape.N // shape.P, shape.d, requires_grad=True)
                   for h in (shape.H, shape.G, shape.G))  # fmt: skip
        y = across(core, q, k, v, seen)
        y.backward(torch.ones_like(y))
    return live.most


def memory_lines(shapes: list[Shape]) -> list[dict]:
    """Bytes are those of the rank that has most."""
    lines = [(shape, of, form) for of, form in product(("program", "documents"), ("ulysses", "gather"))
             for shape in shapes] + [(shapes[0], "scores", "ulysses")]  # fmt: skip
    ranks = run_ranks(shapes[0].P, lambda rank: [program_bytes(shape, form) if of == "program"
                                                else core_bytes(shape, form, of) for shape, of, form in lines])
    report = []
    for (shape, of, form), *bytes in zip(lines, *ranks, strict=True):
        P, N, H, *_ = shape
        # in the backward a softmax, its gradient and that of the scores, and the mask's bytes
        formula = (3 * 4 * H // P + 1) * N * N
        report.append({**shape._asdict(), "of": of, "form": form, "bytes": max(bytes), "all scores": formula})
        if of == "program":
            attention = [step for step in steps(sizes_of(shape, form)) if step.phase in ("attention", "backward")]
            report[-1]["planned"] = max(step.most for step in attention)
        elif of == "scores":
            report[-1]["planned"] = formula
    return report


def slope(lines: list[dict], key: str) -> float:
    """Bytes for each token more."""
    return statistics.linear_regression([line["N"] for line in lines], [line[key] for line in lines]).slope


# ---- training --------------------------------------------------------------------------------------------------------
MODEL = ModelConfig(vocab_size=256, layers=2, dim=64, heads=4, kv_heads=4, moe=MoEConfig(experts=8, hidden=128))
MESHES = {
    "one process": MeshConfig(),
    **{f"{axis} {n}": MeshConfig(**{axis: n}) for axis, n in (("sp", 2), ("sp", 4), ("fsdp", 2), ("tp", 2))},
}


def random_batch(mesh: Mesh, S: int) -> Batch:
    torch.manual_seed(0)
    begin, end = mesh.rows(0, 1)
    tokens = torch.randint(MODEL.vocab_size, (mesh.config.dp, S + 1))[begin:end]
    return Batch(tokens[:, :-1], tokens[:, 1:], begin)


def train(rank: int, mesh: MeshConfig, lengths: tuple[int, ...], rounds: int) -> dict[str, list]:
    """-> for each length the most bytes of live storage in a rank's first step, and marks of those after it."""
    found = {}
    for S in lengths:
        torch.set_num_threads(CORES if mesh.world == 1 else 1)
        config = Config(dataclasses.replace(MODEL, seq_len=S), mesh=mesh, train=TrainConfig(micro_batch=1))
        with Live() as live:
            trainee = Trainee(config)
            batch = random_batch(trainee.mesh, S)
            live.restart()
            trainee.gradients(batch, 1)
            trainee.update(1)
        found[f"bytes {S}"], found[f"{S}"] = live.most, []
        for step in range(2, rounds + 2):
            dist.barrier()
            found[f"{S}"].append(training_step(trainee, batch, step))
    return found


def training_step(trainee: Trainee, batch: Batch, step: int) -> tuple:
    return clocked(lambda: trainee.gradients(batch, step), lambda _: trainee.update(step))


def training_lines(name: str, mesh: MeshConfig, lengths: tuple[int, ...], rounds: int) -> list[dict]:
    ranks = run_ranks(mesh.world, partial(train, mesh=mesh, lengths=lengths, rounds=rounds))
    return [{"mesh": name, "S": S, "tokens/s": mesh.dp * S / statistics.median(wall(rounds_of(ranks, f"{S}"))),
             "bytes": max(rank[f"bytes {S}"] for rank in ranks)} for S in lengths]  # fmt: skip


# ---- the report ------------------------------------------------------------------------------------------------------
MEMORY = [Shape(4, N, 4, 4, 16) for N in (7500, 15000, 30000, 60000)]
SHAPES = (
    Shape(4, 2048, 8, 8, 64),
    Shape(4, 8192, 8, 2, 64),
    Shape(4, 16384, 4, 4, 32),
    Shape(4, 4096, 8, 8, 64, "block"),
    Shape(2, 8192, 4, 2, 64),
)
LENGTHS = (8192, 16384, 32768)


def table(heads: str, rows: list[list[str]]) -> None:
    print(f"\n| {heads} |\n" + "|---" * (heads.count("|") + 1) + "|")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def memory_row(line: dict) -> list[str]:
    got, planned = line["bytes"], line.get("planned")
    return [line["of"], line["form"], f"{line['N']}", f"{planned / 1e6:.2f}" if planned else "-", f"{got / 1e6:.2f}",
            f"{got / planned:.3f}" if planned else "-", f"{line['all scores'] / 1e6:.0f}"]  # fmt: skip


def layer_row(line: dict) -> list[str]:
    times = (f"{line[name]['ms']:.0f} | {line[name]['ratio']:.2f}" for name in ("forward", "both", "busiest"))
    return [line["what"], *(f"{line[key]}" for key in ("P", "N", "H", "G", "d", "form")), *times]


def exchange_row(line: dict) -> list[str]:
    return [*(f"{line[key]}" for key in ("P", "N", "H", "G", "d")), f"{line['bytes'] / 1e6:.1f}", f"{line['ms']:.1f}",
            f"{line['GB/s']:.2f}", f"{line['plain copies']:.1f}", f"{line['share']:.1%}",
            f"{line['copies share']:.1%}"]  # fmt: skip


def wanted(report: dict) -> list[dict]:
    """The bars, and whether they are met."""
    found = []

    def line(what, value, bar, least=False):
        found.append({"what": what, "value": value, "bar": bar, "met": value >= bar if least else value <= bar})

    for form in ("ulysses", "gather"):
        lines = [m for m in report["memory"] if (m["of"], m["form"]) == ("program", form)]
        far = max(abs(m["bytes"] / m["planned"] - 1) for m in lines)
        line(f"memory, {form}, beside the plan: the farthest", far, 0.05)
        far = abs(slope(lines, "bytes") / slope(lines, "planned") - 1)
        line(f"memory, {form}, beside the plan: its slope in N", far, 0.1)
        of_token = [m["bytes"] / m["N"] for m in report["memory"] if (m["of"], m["form"]) == ("documents", form)]
        line(f"memory, {form}, documents: bytes per token, most over least", max(of_token) / min(of_token), 1.1)
    for kind in ("forward", "both"):
        ratios = [row[kind]["ratio"] for row in report["layers"] if row["form"] == "gather" and row["P"] == 4]
        line(f"gather over ulysses on 4 ranks, {kind}, the least", min(ratios), 1.0, least=True)
    return found


def main(rounds: int = 3, quick: bool = False, out: Path = Path("benchmarks/results")):
    """Measure attention and training of ranks that share a sequence.

    Args:
        rounds: timed rounds of each layer, after one that warms up.
        quick: hardly any tokens, fewer lines and one round: to see that it runs.
        out: folder of the JSON file.
    """
    memory, shapes, meshes, lengths = MEMORY, SHAPES, MESHES, LENGTHS
    if quick:
        rounds, lengths = 1, [S // 128 for S in LENGTHS[:2]]
        memory = [shape._replace(N=shape.N // 75) for shape in MEMORY[::3]]
        shapes = [shape._replace(N=shape.N // 16) for shape in (SHAPES[0], SHAPES[3])]
        meshes = {name: mesh for name, mesh in MESHES.items() if mesh.world == 1 or mesh.sp == 2}
    report = {**machine(), "cores": CORES, "layers": [], "exchanges": [], "training": []}
    print(f"{report['cpu']}, {CORES} cores, torch {report['torch']}, commit {report['commit']}")
    report["memory"] = memory_lines(memory)
    table("memory of | form | N | planned MB | measured MB of a rank | of it planned | all scores, MB",
          map(memory_row, report["memory"]))  # fmt: skip
    for shape in shapes:
        layers, exchanges = layer_lines(shape, rounds)
        report["layers"] += layers
        report["exchanges"] += exchanges
    table("layer | P | N | H | G | d | form | F ms | x ulysses | F+B ms | x ulysses | busiest, CPU ms | x ulysses",
          map(layer_row, report["layers"]))  # fmt: skip
    table("P | N | H | G | d | MB sent, F+B | ms | GB/s | copies, in plain ones | exchange of the layer | copies of it",
          map(exchange_row, report["exchanges"]))  # fmt: skip
    for name, mesh in meshes.items():
        report["training"] += training_lines(name, mesh, lengths, 1)
    table("mesh | S | tokens/s | peak of a rank, MB",
          ([line["mesh"], f"{line['S']}", f"{line['tokens/s']:.0f}", f"{line['bytes'] / 1e6:.0f}"]
           for line in report["training"]))  # fmt: skip
    report["wanted"] = wanted(report)
    table("wanted | value | bar | met", ([line["what"], f"{line['value']:.3f}", f"{line['bar']:.2f}",
                                          "yes" if line["met"] else "NO"] for line in report["wanted"]))  # fmt: skip
    write(report, out, "sequence-{cpu}.json")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
