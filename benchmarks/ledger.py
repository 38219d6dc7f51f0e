"""What a training step moves through memory outside its products, counted without a device:
python -m benchmarks.ledger [recipes/moe_gpt2_8e.toml], half a minute.

A step of the recipe in one process runs on fake tensors, which have shapes and no values: the weights' casts
(moe_ext.halves), the first micro-batch, and one of the others, which finds gradients to add to and stands for all of
them. Every op counts its arguments' and results' bytes once, as if it read and wrote each a single time: what a pass
over memory costs at least, and what fusing two of them would save. Products and attention have FLOPs to pay for and are
left out, as are views. Layers are taken as alike, so that one is the difference between two and one. Ops take the ways
of a GPU.

Prints a line for each kind of op and shape, costliest first: of a step its calls, GB and milliseconds at --speed; and
the sum. What an optimizer reads and writes is in `python -m moe_ext.plan`.
"""

import argparse
import collections
import functools
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_ext.config import MeshConfig, PipelineConfig, load
from moe_ext.halves import halves
from moe_ext.layers.fused import Draws
from moe_ext.model import GPT, precision, set_recomputation
from moe_ext.ops import logits
from moe_ext.ops.head import chunk_on

ROOT = Path(__file__).parent.parent
PRODUCTS = "mm", "addmm", "bmm", "expert_mlp", "linear_cross_entropy", "router_logits"
NOTHING = "device", "detach", "empty", "new_empty", "empty_like", "empty_strided", "promote_types"  # no byte is touched


class Ledger(TorchDispatchMode):
    """{(part, op, its tensors): [calls, bytes]} of a step. `times`: how often it does what runs; 0: never."""

    def __init__(self):
        super().__init__()
        self.part, self.times, self.lines = "", 0, collections.defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        results = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        if self.times and name not in NOTHING and not is_product(name) and not is_view(op):
            came, went = map(tensors_of, ((args, kwargs), results))
            line = self.lines[self.part, name, f"{shapes(came)} -> {shapes(went)}"]
            line[0] += self.times
            line[1] += self.times * sum(x.nbytes for x in came + went)
        return results


def tensors_of(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def is_product(name):
    return name.removesuffix("_backward") in PRODUCTS or "scaled_dot_product" in name


def is_view(op):
    """Its result is its argument's memory, unwritten."""
    return any(a.alias_info is not None and not a.alias_info.is_write for a in op._schema.arguments)


def shapes(tensors):
    return " ".join(f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in tensors)


def step_of(config):
    """The lines of a step, but for its optimizer."""
    c, device = config.model, torch.device("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
        model = GPT(c, device=device)
        set_recomputation(model, config.train)
        tokens_BS = torch.zeros(config.train.micro_batch, c.seq_len, dtype=torch.int64, device=device)
        ledger.part, ledger.times = "casts", 1
        with halves(model, config):
            for ledger.times in (1, config.train.accumulation - 1):
                ledger.part = "forward"
                with precision(config, device):
                    out = model(tokens_BS, tokens_BS, Draws(0, 1))
                    loss = out.token_loss + out.aux_loss
                ledger.part = "backward"
                loss.backward()
    return ledger.lines


def step(config):
    """The lines of a step of the recipe in one process, on a GPU, but for its optimizer."""
    config = replace(config, mesh=MeshConfig(), pipeline=PipelineConfig())
    on_a_gpu, chunk = functools.partial(logits.from_halves, torch.device("cuda")), chunk_on("cuda")
    with (patch("moe_ext.ops.dense.SLOW", ()), patch("moe_ext.ops.head.chunk_on", lambda device: chunk),
          patch("moe_ext.ops.logits.from_halves", lambda device, *given: on_a_gpu(*given))):  # fmt: skip
        one, two = (step_of(replace(config, model=replace(config.model, layers=layers))) for layers in (1, 2))
    more = config.model.layers - 1
    each = {key: zip(one[key], two[key], strict=True) for key in {**one, **two}}
    return {key: [first + more * (both - first) for first, both in pairs] for key, pairs in each.items()}


def cost(moved, speed):
    return f"{moved / 1e9:9.3f} GB {moved / speed / 1e9:8.3f} ms"


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ledger", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("recipe", nargs="?", type=Path, default=ROOT / "recipes" / "moe_gpt2_8e.toml")
    parser.add_argument("--accumulation", type=int, help="micro-batches of a step; if not given, the recipe's")
    parser.add_argument("--speed", type=float, default=4.2, help="of memory, in TB/s; an H200's copies have 4.2")
    parser.add_argument("--top", type=int, default=40, help="lines")
    arguments = parser.parse_args(arguments)
    config = load(arguments.recipe)
    micros = arguments.accumulation or config.train.accumulation
    config = replace(config, train=replace(config.train, accumulation=micros))
    lines = sorted(step(config).items(), key=lambda line: -line[1][1])
    for (part, name, tensors), (calls, moved) in lines[: arguments.top]:
        print(f"{cost(moved, arguments.speed)} {calls:5d}  {part:8s} {name}  {tensors[:150]}")
    print(f"{cost(sum(moved for _, (_, moved) in lines), arguments.speed)}  in all")


if __name__ == "__main__":
    main()
