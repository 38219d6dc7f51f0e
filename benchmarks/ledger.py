"""What a training step moves through memory outside its products, counted without a device:
python -m benchmarks.ledger [recipes/moe_gpt2_8e.toml], half a minute.

One micro-batch of the recipe, forward and backward, runs on fake tensors, which have shapes and no values, in the
region of autocast and behind another micro-batch, so that gradients are there to be added to. Every op counts its
arguments' and results' bytes once, as if it read and wrote each a single time: what a pass over memory costs at least,
and what fusing two of them would save. Products and attention have FLOPs to pay for and are left out, as are views.
Layers are alike, so one layer is the difference between two and one. Ops take the ways of a GPU.

Prints a line for each kind of op and shape, costliest first: of a step its calls, GB and milliseconds at --speed; and
the sum. What an optimizer reads and writes is in `python -m moe_ext.plan`.
"""

import argparse
import collections
import dataclasses
from pathlib import Path
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_ext.config import load
from moe_ext.layers.fused import Draws
from moe_ext.model import GPT, half_dtype

ROOT = Path(__file__).parent.parent
PRODUCTS = "mm", "addmm", "bmm", "expert_mlp", "linear_cross_entropy", "scaled_dot_product"
NOTHING = "device", "detach", "empty", "new_empty", "empty_like", "empty_strided", "promote_types"  # no byte is touched


class Ledger(TorchDispatchMode):
    """{(pass, op, its tensors): [calls, bytes]} of the ops that run while `part` is set."""

    def __init__(self):
        super().__init__()
        self.part, self.lines = None, collections.defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        results = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        if self.part and name not in NOTHING and not is_product(name) and not is_view(op):
            came, went = map(tensors_of, ((args, kwargs), results))
            line = self.lines[self.part, name, f"{shapes(came)} -> {shapes(went)}"]
            line[0] += 1
            line[1] += sum(x.nbytes for x in came + went)
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


def micro_batch(config, layers, half):
    """The lines of one micro-batch of a model of so many layers."""
    model_config = dataclasses.replace(config.model, layers=layers)
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
        model = GPT(model_config, device="cpu")
        tokens_BS = torch.zeros(config.train.micro_batch, model_config.seq_len, dtype=torch.int64, device="cpu")
        for is_first in (True, False):
            with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
                ledger.part = None if is_first else "forward"
                out = model(tokens_BS, tokens_BS, Draws(0, 1))
                loss = out.token_loss + out.aux_loss
            ledger.part = None if is_first else "backward"
            loss.backward()
        ledger.part = None
    return ledger.lines


def step(config):
    """The lines of a step of the recipe, but for its optimizer."""
    with patch("moe_ext.ops.dense.SLOW", ()), patch("moe_ext.ops.head.chunk_on", lambda device: 4096):
        one, two = (micro_batch(config, layers, half_dtype(config)) for layers in (1, 2))
    more, micros = config.model.layers - 1, config.train.accumulation
    each = {key: zip(one[key], two[key], strict=True) for key in {**one, **two}}
    return {key: [micros * (first + more * (both - first)) for first, both in pairs] for key, pairs in each.items()}


def cost(moved, speed):
    return f"{moved / 1e9:9.3f} GB {moved / speed / 1e9:8.3f} ms"


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ledger", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("recipe", nargs="?", type=Path, default=ROOT / "recipes" / "moe_gpt2_8e.toml")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--speed", type=float, default=4.2, help="of memory, in TB/s; an H200's copies have 4.2")
    parser.add_argument("--top", type=int, default=40, help="lines")
    arguments = parser.parse_args(arguments)
    config = load(arguments.recipe)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation=arguments.accumulation))
    lines = sorted(step(config).items(), key=lambda line: -line[1][1])
    for (part, name, tensors), (calls, moved) in lines[: arguments.top]:
        print(f"{cost(moved, arguments.speed)} {calls:5d}  {part:8s} {name}  {tensors[:150]}")
    print(f"{cost(sum(moved for _, (_, moved) in lines), arguments.speed)}  in all")


if __name__ == "__main__":
    main()
