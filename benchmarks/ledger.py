"""What a training step moves through memory outside its products, counted without a device:
python -m benchmarks.ledger [recipes/moe_gpt2_8e.toml], half a minute.

A step's first micro-batch and another, forward and backward, run on fake tensors, which have shapes and no values, as
the driver runs them. Every op counts its arguments' and results' bytes once, as if it read and wrote each a single
time: what a pass over memory costs at least, and what fusing two of them would save. Products and attention have FLOPs
to pay for and are left out, as are views. Layers are alike, so one layer is the difference between two and one. Ops
take the ways of a GPU.

Prints a line for each kind of op and shape, costliest first: of a step its calls, GB and milliseconds at --speed; and
the sum. What an optimizer reads and writes is in `python -m moe_ext.plan`.
"""

import argparse
import collections
import dataclasses
import functools
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_ext.config import load
from moe_ext.halves import halves
from moe_ext.layers.fused import Draws
from moe_ext.model import GPT, half_dtype
from moe_ext.ops import dense, head, logits
from moe_ext.ops.head import chunk_on

ROOT = Path(__file__).parent.parent
PRODUCTS = "mm", "addmm", "bmm", "expert_mlp", "linear_cross_entropy", "scaled_dot_product"
NOTHING = "device", "detach", "empty", "new_empty", "empty_like", "empty_strided", "promote_types"  # no byte is touched


class Ledger(TorchDispatchMode):
    """Calls and bytes of each (part of a step, op, its tensors), of the ops that run while `part` is set."""

    def __init__(self):
        super().__init__()
        self.part = None
        self.take()

    def take(self):
        """-> calls, bytes since the last take."""
        taken = getattr(self, "counts", None)
        self.counts = collections.Counter(), collections.Counter()
        return taken

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        results = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        if self.part and name not in NOTHING and not is_product(name) and not is_view(op):
            came, went = map(tensors_of, ((args, kwargs), results))
            line, (calls, moved) = (self.part, name, f"{shapes(came)} -> {shapes(went)}"), self.counts
            calls[line] += 1
            moved[line] += sum(x.nbytes for x in came + went)
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


def passes(config):
    """-> (calls, bytes) of the weights' casts for a step, of its first micro-batch, and of another."""
    half, found = half_dtype(config), []
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
        model = GPT(config.model, device="cpu")
        tokens_BS = torch.zeros(config.train.micro_batch, config.model.seq_len, dtype=torch.int64, device="cpu")
        ledger.part = "cast"
        with halves(model, config):
            found.append(ledger.take())
            for _ in range(2):
                ledger.part = "forward"
                with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
                    out = model(tokens_BS, tokens_BS, Draws(0, 1))
                    loss = out.token_loss + out.aux_loss
                ledger.part = "backward"
                loss.backward()
                found.append(ledger.take())
            ledger.part = None
    return found


def step(config):
    """-> calls, bytes of a step of the recipe, but for its optimizer."""
    def few(layers):
        return passes(dataclasses.replace(config, model=dataclasses.replace(config.model, layers=layers)))

    totals = collections.Counter(), collections.Counter()
    more, times = config.model.layers - 1, (1, 1, config.train.accumulation - 1)
    with as_on_a_gpu():
        for n, ones, twos in zip(times, few(1), few(2), strict=True):
            for total, one, two in zip(totals, ones, twos, strict=True):
                for line in two:
                    total[line] += n * (one[line] + more * (two[line] - one[line]))
    return totals


@contextmanager
def as_on_a_gpu():
    """Ops take the ways that they take there."""
    def product(a, b):      # which CUDA alone has without a cast; products do not count
        return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)

    from_halves = functools.partial(logits.from_halves, torch.device("cuda"))
    with (patch.object(dense, "SLOW", ()), patch.object(head, "chunk_on", lambda device: chunk_on("cuda")),
          patch.object(logits, "from_halves", lambda device, *rest: from_halves(*rest)),
          patch.object(logits, "_float_product", product)):
        yield


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
    calls, moved = step(config)
    for line, size in moved.most_common(arguments.top):
        part, name, tensors = line
        print(f"{cost(size, arguments.speed)} {calls[line]:5d}  {part:8s} {name}  {tensors[:150]}")
    print(f"{cost(moved.total(), arguments.speed)}  in all")


if __name__ == "__main__":
    main()
