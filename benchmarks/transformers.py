"""moe_ext as experts implementation of transformers beside its own; python -m benchmarks.transformers --help.

    experts    the experts module of an architecture: hidden states, fresh ids and weights in, their gradients and those
               of its parameters out. Expert shapes and top-k are the published model's, divided by four to eight
    model      two layers of that architecture with half as many tokens: loss and all gradients of a batch
    decode     the experts module with the four tokens of a step of generation, forward alone

The same module takes turns with each implementation, on the same ids, in one process; the first round does not count,
but results are compared, and the experts' gradients: an implementation that computes something else ends the benchmark.
(A model's gradients are not: where rounding chooses another expert for a token, they differ.) F is a forward without
gradients, F+B a forward and its backward. A ratio is the median over the rounds of (its time / ours). Who took more
than ten times ours in the first round is not asked again, and that is its ratio; nor has it a part in the model's
backward, unless it is the best. batched_mm copies the weights of every chosen expert for every token: it takes part in
decode alone. With one thread the time is the process's CPU time, with more it is wall time. --tuned asks malloc to keep
what is freed, which spares the others' tensors the page faults that ours never have.

Prints Markdown, writes benchmarks/results/transformers-<cpu>.json.
"""

import statistics
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, __version__

import moe_ext.transformers
from benchmarks.ops import DTYPES, _ratio, bold_below, machine, seconds, write
from benchmarks.sequence import table
from tests.cases import random

COMMON = dict(num_hidden_layers=2, vocab_size=2048, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
              max_position_embeddings=4096, eos_token_id=1)  # fmt: skip
MODELS = {
    "qwen3_moe": dict(hidden_size=512, moe_intermediate_size=192, num_experts=128, num_experts_per_tok=8),
    "mixtral": dict(hidden_size=512, intermediate_size=1792, num_local_experts=8, num_experts_per_tok=2),
    "olmoe": dict(hidden_size=512, intermediate_size=256, num_experts=64, num_experts_per_tok=8),
    "deepseek_v3": dict(hidden_size=896, moe_intermediate_size=256, n_routed_experts=64, num_experts_per_tok=8,
                        first_k_dense_replace=0, num_key_value_heads=8, head_dim=32, q_lora_rank=192, kv_lora_rank=64,
                        qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32),
    "glm4_moe": dict(hidden_size=512, moe_intermediate_size=176, n_routed_experts=128, num_experts_per_tok=8,
                     first_k_dense_replace=0),
    "gpt_oss": dict(hidden_size=576, intermediate_size=576, num_local_experts=32, num_experts_per_tok=4,
                    layer_types=["full_attention", "sliding_attention"]),
}  # fmt: skip
PEERS = ("eager", "grouped_mm", "batched_mm")
HOPELESS = 10  # times ours: not asked again
FAR = {"fp32": 1e-4, "bf16": 5e-2}  # relative difference of results and of gradients
DECODE = 4  # tokens


class Contest:
    """The work of a model or of its experts, done by one implementation after the other."""

    def __init__(self, model, function, inputs, backward):
        self.model, self.function, self.inputs, self.backward = model, function, inputs, backward

    def run(self, implementation):
        """-> seconds, the result and, if there are leaves, the gradients."""
        self.model.set_experts_implementation(implementation)
        arguments, leaves = self.inputs()
        self.model.zero_grad()
        took, y = seconds(self.work, arguments)
        leaves = (*leaves, *self.model.parameters()) if leaves else ()
        return took, [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    def work(self, arguments):
        with torch.set_grad_enabled(self.backward):
            y = self.function(*arguments)
        if self.backward:
            y.backward(torch.ones_like(y))
        return y


def race(contest, peers, dtype, rounds, update):
    """-> seconds of each contender by round, in one line of the table."""
    times, ours = {}, None
    update()
    for contender in ("moe_ext", *peers):
        took, tensors = contest.run(contender)
        ours = ours or (took, tensors)
        if not all((got - want).norm() <= FAR[dtype] * want.norm() for got, want in zip(tensors, ours[1], strict=True)):
            raise AssertionError(f"{contender} and moe_ext compute different things")
        times[contender] = [took] if took > HOPELESS * ours[0] else []
    first = ours[0]
    asked = [contender for contender in times if not times[contender]]
    del tensors, ours
    for round in range(rounds):
        update()
        turn = round % len(asked)
        for contender in asked[turn:] + asked[:turn]:
            times[contender].append(contest.run(contender)[0])
    ratio = {peer: _ratio(times[peer], times["moe_ext"] if peer in asked else [first]) for peer in peers}
    return {"ms": {who: 1e3 * statistics.median(took) for who, took in times.items()}, "ratio": ratio,
            "best": min(ratio, key=ratio.get)}  # fmt: skip


def lines(name, fields, dtype, tokens, rounds):
    """The lines of one architecture in one dtype."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    config = AutoConfig.for_model(name, **COMMON | fields)
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).train()
    module = model.model.layers[-1].mlp.experts
    E, K, D = module.num_experts, config.num_experts_per_tok, config.hidden_size
    state, line = {}, None

    def update(T):
        state["x_TD"] = torch.randn(T, D, generator=generator).to(DTYPES[dtype])
        state["weights_TK"] = torch.rand(T, K, generator=generator).to(DTYPES[dtype])
        state["ids_TK"] = random(T, K, E, generator).long()
        state["tokens"] = torch.randint(config.vocab_size, (2, T // 2), generator=generator)

    def rows():
        x_TD, weights_TK = (state[name].detach().requires_grad_() for name in ("x_TD", "weights_TK"))
        return (x_TD, state["ids_TK"], weights_TK), (x_TD, weights_TK)

    def batch():
        return (state["tokens"],), ()

    def loss(tokens):
        return model(tokens, labels=tokens, use_cache=False).loss

    apart = [peer for peer in PEERS if peer != "batched_mm"]
    for part, function, inputs, T, backward, peers in (
        ("experts", module, rows, tokens, False, apart),
        ("model", loss, batch, tokens // 2, False, apart),
        ("experts", module, rows, tokens, True, apart),
        ("model", loss, batch, tokens // 2, True, apart),
        ("decode", module, rows, DECODE, False, PEERS),
    ):
        again = rounds if part != "decode" else 10 * rounds
        if part == "model" and backward:
            peers = [peer for peer in peers if peer == line["best"] or line["ratio"][peer] < HOPELESS]
        line = race(Contest(model, function, inputs, backward), peers, dtype, again, lambda T=T: update(T))
        shape = {"T": T, "D": D, "E": E, "K": K, "parameters of experts": sum(p.numel() for p in module.parameters())}
        yield {"model": name, "part": part, "dtype": dtype, "pass": "F+B" if backward else "F", **shape, **line}


def main(
    models: tuple[str, ...] = tuple(MODELS),
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16"),
    threads: int = 1,
    tokens: int = 512,
    rounds: int = 3,
    tuned: bool = False,
    out: Path = Path("benchmarks/results"),
):
    """Time transformers' experts implementations and ours.

    Args:
        models: names of architectures, keys of MODELS.
        dtypes: of the model.
        threads: of torch and of moe_ext.
        tokens: of the experts; half as many of the model.
        rounds: timed, after one that warms up and compares; ten times as many of decode.
        tuned: malloc keeps what is freed.
        out: folder of the JSON file.
    """
    if tuned and not moe_ext.keep_freed_memory():
        raise OSError("malloc is not glibc's: there is no tuned one")
    torch.set_num_threads(threads)
    report = {**machine(), "transformers": __version__, "threads": threads, "tuned": tuned, "lines": []}
    print(f"{report['cpu']}, {report['isa']}, torch {report['torch']}, transformers {__version__}, commit "
          f"{report['commit']}, threads: {threads}, malloc {'tuned' if tuned else 'as it is'}")  # fmt: skip

    def rows():
        for dtype in dtypes:
            for name in models:
                for line in lines(name, MODELS[name], dtype, tokens, rounds):
                    report["lines"].append(line)
                    ratios = (f"{line['ratio'][peer]:.2f}" if peer in line["ratio"] else "-" for peer in PEERS)
                    yield [line["part"], name, dtype, line["pass"], f"{line['ms']['moe_ext']:.1f}", *ratios,
                           bold_below(line["ratio"][line["best"]], 1)]  # fmt: skip

    table(" | ".join(["of", "model", "dtype", "pass", "ours, ms", *(f"x {peer}" for peer in PEERS), "x best"]), rows())
    report["median"] = {}
    for part in dict.fromkeys(line["part"] for line in report["lines"]):
        best = [line["ratio"][line["best"]] for line in report["lines"] if line["part"] == part]
        report["median"][part] = statistics.median(best)
        print(f"\n{part}: x best in the median {report['median'][part]:.2f}, at the least {min(best):.2f}")
    write(report, out, "transformers-{cpu}.json")


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
