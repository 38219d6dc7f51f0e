"""A training step of a recipe's GPT beside the same model in plain torch; python -m benchmarks.step --help.

    ours      what the trainer does in one process: forward, backward, clip, optimizer (benchmarks.compare.Trainee)
    plain     the model as it is written without us: nn.RMSNorm, RoPE and router of torch's ops,
              F.scaled_dot_product_attention, the experts a loop of torch.mm over sorted tokens, F.cross_entropy of all
              logits, clip_grad_norm_ and AdamW(fused=True). train.dtype bf16 is autocast in both

Plain begins with our weights. Both take each step in turn, on the same batch; the first steps do not count, but their
losses are compared, the balance loss too: a plain model that computes something else ends the benchmark. A ratio is the
median over the steps of (plain's time / ours). With one thread the time is the process's CPU time, with more it is wall
time. After each step torch.mm multiplies large matrices: beside the ratio stands the one that a step would have whose
FLOPs (GPT.flops_per_token) all ran at this rate and which had nothing else to do. Tokens are drawn by Zipf's law, so
there need be no text.

With --profile also what takes which share of our step, by torch.profiler, which makes small ops look larger: the
innermost module around an op's forward has its backward too. Prints Markdown, writes
benchmarks/results/step-<cpu>.json.
"""

import itertools
import re
import statistics
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as profiler

from benchmarks.compare import Trainee
from benchmarks.ops import BF16_INSTRUCTIONS, _ratio, bold_below, machine, seconds, sorted_mm, write
from benchmarks.sequence import table
from moe_ext.config import Config, MeshConfig, ModelConfig, load
from moe_ext.data.loader import Batch
from moe_ext.model import GPT, half_dtype, parameter_dtype, precision
from moe_ext.optim import learning_rate, set_learning_rate

BARS = {"fp64": 1.0, "fp32": 1.6, "bf16": 2.0}  # of the ratio
FAR = {"fp64": 1e-10, "fp32": 1e-5, "bf16": 1e-2}  # relative difference of losses
WARMUP = 3  # steps that are compared, not counted


# ---- the plain model -------------------------------------------------------------------------------------------------
def turned(x_BHSd, cos_Sd, sin_Sd):
    a, b = x_BHSd.chunk(2, dim=-1)
    return x_BHSd * cos_Sd + torch.cat([-b, a], dim=-1) * sin_Sd


class PlainAttention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.width = c.head_width
        q_width, kv_width = c.heads * c.head_width, c.kv_groups * c.head_width
        self.q_proj = nn.Linear(c.dim, q_width, bias=False)
        self.k_proj = nn.Linear(c.dim, kv_width, bias=False)
        self.v_proj = nn.Linear(c.dim, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, c.dim, bias=False)
        self.q_norm = nn.RMSNorm(c.head_width, eps=c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_width, eps=c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x_BSD, cos_Sd, sin_Sd):
        q, k, v = (proj(x_BSD).unflatten(-1, (-1, self.width)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (t.transpose(1, 2) for t in (self.q_norm(q), self.k_norm(k), v))
        q, k = (turned(t, cos_Sd.to(t.dtype), sin_Sd.to(t.dtype)) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(y.transpose(1, 2).flatten(2))


class PlainMoE(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        m = c.moe
        self.experts, self.top_k = m.experts, m.top_k
        self.gate = nn.Linear(c.dim, m.experts, bias=False)
        self.w13 = nn.ParameterList(torch.empty(2 * m.hidden, c.dim) for _ in range(m.experts))
        self.w2 = nn.ParameterList(torch.empty(c.dim, m.hidden) for _ in range(m.experts))

    def forward(self, x_BSD):
        """-> y_BSD, the balance loss (Switch Transformer) of each sequence, averaged."""
        B, S, _ = x_BSD.shape
        x_TD = x_BSD.flatten(0, 1)
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.softmax(-1, dtype=torch.promote_types(logits_TE.dtype, torch.float32))
        weights_TK, ids_TK = scores_TE.topk(self.top_k)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        y_TD = sorted_mm(x_TD, self.w13, self.w2, weights_TK.to(x_TD.dtype), ids_TK, self.experts)
        chosen_BE = F.one_hot(ids_TK.view(B, -1), self.experts).sum(1) / (S * self.top_k)
        balance = self.experts * (chosen_BE * scores_TE.view(B, S, -1).mean(1)).sum(-1).mean()
        return y_TD.view_as(x_BSD), balance


class PlainBlock(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.input_layernorm, self.self_attn = nn.RMSNorm(c.dim, eps=c.norm_eps), PlainAttention(c)
        self.post_attention_layernorm, self.mlp = nn.RMSNorm(c.dim, eps=c.norm_eps), PlainMoE(c)

    def forward(self, x_BSD, cos_Sd, sin_Sd):
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), cos_Sd, sin_Sd)
        y_BSD, balance = self.mlp(self.post_attention_layernorm(x_BSD))
        return x_BSD + y_BSD, balance


class PlainGPT(nn.Module):
    """The models of recipes like tiny.toml: RMSNorm, RoPE, dropless SwiGLU experts with softmax routing, no biases."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.dim)
        self.layers = nn.ModuleList(PlainBlock(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.lm_head = nn.Linear(c.dim, c.vocab_size, bias=False)
        frequencies = c.rope_base ** (-torch.arange(0, c.head_width, 2, dtype=torch.float64) / c.head_width)
        angles_Sd = torch.arange(c.seq_len)[:, None] * frequencies.repeat(2)
        self.register_buffer("cos_Sd", angles_Sd.cos(), persistent=False)
        self.register_buffer("sin_Sd", angles_Sd.sin(), persistent=False)

    def take(self, model: GPT):
        """Our weights, whose names are the same but for the experts'."""
        weights = {}
        for name, w in model.state_dict().items():
            if name.endswith(("w13_E2FD", "w2_EDF")):
                prefix = name.replace("experts.w13_E2FD", "w13.").replace("experts.w2_EDF", "w2.")
                weights |= {f"{prefix}{e}": w_e.reshape(-1, w_e.shape[-1]) for e, w_e in enumerate(w)}
            else:
                weights[name] = w
        self.load_state_dict(weights)

    def forward(self, tokens_BS, targets_BS):
        """-> cross-entropy per token, mean balance loss of the layers."""
        x_BSD, balances = self.embed_tokens(tokens_BS), []
        for block in self.layers:
            x_BSD, balance = block(x_BSD, self.cos_Sd, self.sin_Sd)
            balances.append(balance)
        logits_BSV = self.lm_head(self.norm(x_BSD))
        return F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten()), torch.stack(balances).mean()


class PlainTrainee:
    """The plain model in training, with the methods of Trainee."""

    def __init__(self, config: Config, ours: GPT):
        self.config, o = config, config.optim
        self.model = PlainGPT(config.model)
        self.model.to(next(ours.parameters()).dtype).take(ours)
        decayed, others = ([p for p in self.model.parameters() if (p.ndim > 1) == decays] for decays in (True, False))
        groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, o.lr, (o.beta1, o.beta2), o.eps, fused=True)

    def gradients(self, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        with precision(self.config, torch.device("cpu")):
            loss, balance = self.model(batch.tokens, batch.targets)
        (loss + self.config.model.moe.balance_weight * balance).backward()
        return {"loss": loss.detach(), "balance": balance.detach()}

    def update(self, step: int) -> None:
        set_learning_rate(self.optimizer, learning_rate(step, self.config.optim, self.config.train.steps))
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


# ---- steps -----------------------------------------------------------------------------------------------------------
def batches(config: Config):
    """Without end."""
    c, generator = config.model, torch.Generator().manual_seed(0)
    chances_V = 1 / torch.arange(1, c.vocab_size + 1)
    while True:
        drawn = torch.multinomial(chances_V, config.tokens_per_step + config.sequences_per_step, True,
                                  generator=generator).view(config.sequences_per_step, -1)  # fmt: skip
        yield Batch(drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous(), 0)


def step_of(trainee, batch: Batch, step: int) -> dict[str, torch.Tensor]:
    losses = trainee.gradients(batch, step)
    trainee.update(step)
    return losses


def check(ours: dict, plain: dict, dtype: str) -> None:
    """AssertionError if they are losses of different models."""
    for name, loss in plain.items():
        far = abs(float(ours[name]) / float(loss) - 1)
        assert far <= FAR[dtype], f"the plain model is another: its {name} is {float(loss)}, ours {float(ours[name])}"


def race(config: Config, steps: int) -> dict:
    """-> one line of the table."""
    trainee, dtype = Trainee(config), config.train.dtype
    trainees = {"ours": trainee, "plain": PlainTrainee(config, trainee.model)}
    times = {name: [] for name in (*trainees, "mm")}
    large = torch.randn(1024, 1024, dtype=half_dtype(config) or parameter_dtype(config))
    products = config.tokens_per_step * trainee.model.flops_per_token() / (2 * len(large) ** 3)
    for step, batch in zip(range(1, WARMUP + steps + 1), batches(config), strict=False):
        losses = {}
        for name in sorted(trainees, reverse=step % 2):
            took, losses[name] = seconds(step_of, trainees[name], batch, step)
            times[name].append(took)
        times["mm"].append(products * seconds(torch.mm, large, large)[0])
        if step <= WARMUP:
            check(losses["ours"], losses["plain"], dtype)
    times = {name: taken[WARMUP:] for name, taken in times.items()}
    line = {"dtype": dtype, "threads": torch.get_num_threads()}
    for name, taken in times.items():
        took = statistics.median(taken)
        line[name] = {"ms": 1e3 * took, "tokens/s": config.tokens_per_step / took}
    return line | {"ratio": _ratio(times["plain"], times["ours"]), "bound": _ratio(times["plain"], times["mm"])}


# ---- the profile -----------------------------------------------------------------------------------------------------
MARK = "in "  # how the name of a span around a module or a part of the step begins
PARTS = {  # by how a place begins: the first that matches
    r"self_attn scaled_dot_product": "attention",
    r"self_attn\.\w+_proj ": "attention's projections",
    r"\S*norm ": "norms",
    r"self_attn ": "RoPE, and what else is in attention",
    r"mlp\.(experts|\w+_proj) ": "experts",
    r"mlp": "router and its losses",
    r"embed": "embedding",
    r"lm_head": "head and cross-entropy",
    r"update Optimizer": "optimizer",
    r"update": "clip",
    r"": "the rest",
}


@contextmanager
def marked(model: nn.Module):
    """Spans around the forwards of all modules, named by their place in a block or the model."""
    spans, hooks = [], []

    def begin(name):
        spans.append(record_function(MARK + name))
        spans[-1].__enter__()

    def end(*_):
        spans.pop().__exit__(None, None, None)

    for path, module in model.named_modules():
        name = re.sub(r"layers\.\d+\.?", "", path)
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: begin(name)))
        hooks.append(module.register_forward_hook(end))
    yield
    for hook in hooks:
        hook.remove()


def ancestors(event):
    while event is not None:
        yield event
        event = event.cpu_parent


def place(event) -> str:
    """Where an event of a forward or an update lies: the innermost span, and its op there."""
    op = ""
    for around in ancestors(event):
        if around.name.startswith(MARK):
            return f"{around.name.removeprefix(MARK)} {op}"
        op = around.name.split("::")[-1]
    return f" {op}"


def shares(config: Config, steps: int) -> list[dict]:
    """-> lines: milliseconds of a step by part and place, forward and backward."""
    trainee, feed = Trainee(config), batches(config)
    for step in range(1, WARMUP + 1):
        step_of(trainee, next(feed), step)
    with marked(trainee.model), profiler(activities=[ProfilerActivity.CPU]) as trace:
        for step in range(WARMUP + 1, WARMUP + steps + 1):
            trainee.gradients(next(feed), step)
            with record_function(MARK + "update"):
                trainee.update(step)
    # The forward's op that makes a node of the backward is the last with its number; what makes none may have it too.
    places, found = {}, defaultdict(lambda: {"forward": 0.0, "backward": 0.0})
    for event in sorted(trace.events(), key=lambda event: event.time_range.start):
        node = next((of for of in ancestors(event) if of.name.startswith("autograd::engine")), None)
        if node is None:
            where = place(event)
            if event.sequence_nr >= 0:
                places[event.sequence_nr] = where
            found[where]["forward"] += 1e-3 * event.self_cpu_time_total / steps
        else:
            where = places.get(node.sequence_nr, " " + node.name.split("::")[-1])  # such as AccumulateGrad
            found[where]["backward"] += 1e-3 * event.self_cpu_time_total / steps
    return [{"part": next(part for pattern, part in PARTS.items() if re.match(pattern, where)), "place": where, **ms}
            for where, ms in found.items()]  # fmt: skip


# ---- the report ------------------------------------------------------------------------------------------------------
def print_shares(lines: list[dict], least: float = 0.01) -> None:
    """By part, and by place those of at least that share."""
    total = sum(line["forward"] + line["backward"] for line in lines)
    for key in ("part", "place"):
        sums = defaultdict(lambda: [0.0, 0.0])
        for line in lines:
            sums[line[key]][0] += line["forward"]
            sums[line[key]][1] += line["backward"]
        table(f"{key} of a profiled step | forward or update, ms | backward, ms | share",
              ([name, f"{forward:.1f}", f"{backward:.1f}", f"{(forward + backward) / total:.1%}"]
               for name, (forward, backward) in sorted(sums.items(), key=lambda item: -sum(item[1]))
               if key == "part" or forward + backward >= least * total))  # fmt: skip


def main(
    recipe: Path = Path("recipes/tiny.toml"),
    dtypes: tuple[Literal["fp32", "bf16", "fp64"], ...] = ("fp32", "bf16") if BF16_INSTRUCTIONS else ("fp32",),
    threads: tuple[int, ...] = (1, 2),
    steps: int = 30,
    profile: bool = False,
    out: Path = Path("benchmarks/results"),
):
    """Race training steps of a recipe's model with those of the same model in plain torch.

    Args:
        recipe: of the model, as tiny.toml's; its mesh is one process.
        dtypes: train.dtype; bf16 by default where the CPU has instructions for it.
        threads: numbers of threads, each timed.
        steps: timed, after those that warm up and are compared.
        profile: say too what takes which share of our step.
        out: folder of the JSON file.
    """
    config = load(recipe)
    train = replace(config.train, device="cpu", micro_batch=config.sequences_per_step, accumulation=1)
    one = replace(config, mesh=MeshConfig(), train=train)
    configs = {dtype: replace(one, train=replace(train, dtype=dtype)) for dtype in dtypes}
    report = {**machine(), "recipe": str(recipe), "tokens per step": config.tokens_per_step, "steps": [], "shares": []}
    print(f"{report['cpu']}, {report['isa']}, torch {report['torch']}, commit {report['commit']}, {recipe}")

    def rows():
        for n, dtype in itertools.product(threads, dtypes):
            torch.set_num_threads(n)
            line, bar = race(configs[dtype], steps), BARS[dtype]
            report["steps"].append(line)
            yield [dtype, f"{n}", *(f"{line[name][of]:.0f}" for name in ("ours", "plain") for of in ("tokens/s", "ms")),
                   bold_below(line["ratio"], bar), f"{bar}", f"{line['bound']:.2f}"]  # fmt: skip

    table("dtype | threads | ours, tokens/s | ms | plain torch, tokens/s | ms | x | bar | x at the rate of torch.mm",
          rows())  # fmt: skip
    for n, dtype in itertools.product(threads, dtypes) if profile else ():
        torch.set_num_threads(n)
        print(f"\n{dtype}, threads: {n}")
        report["shares"].append({"dtype": dtype, "threads": n, "of": shares(configs[dtype], steps)})
        print_shares(report["shares"][-1]["of"])
    write(report, out, "step-{cpu}.json")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
