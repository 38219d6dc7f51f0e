"""Optimizers of whole matrices on any mesh: a GPT learns one sentence, along one curve however it is sharded.

    DP=1 SHARD=4 torchrun --standalone --nproc-per-node 4 -m moe_ext.check shampoo --dim 32 --layers 2 --lr 1e-2
    DP=2 SHARD=2 torchrun --standalone --nproc-per-node 4 -m moe_ext.check muon --dim 32 --layers 2 --lr 1e-2
    python -m moe_ext.check shampoo --dtype fp64 --dim 32 --layers 2 --lr 1e-2 --all     # a table of five meshes

Every rank gets the same sentence, so all meshes see the same batch. Without TP, and with ranks in powers of two, they
get gradients of the same bits, and owners compute whole matrices: losses are equal to the last bit, if all ranks have
equally many threads. TP adds in another order, and inverse roots with an epsilon of 1e-12 enlarge what that changes.
Where the program and the settings come from: docs/shampoo.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from moe_ext.check.mesh import LENGTH, one_sentence
from moe_ext.check.world import OnMesh, World
from moe_ext.config import (
    Config,
    MeshConfig,
    ModelConfig,
    MuonConfig,
    OptimConfig,
    ShampooConfig,
    TrainConfig,
    require,
)
from moe_ext.layers.fused import site
from moe_ext.model import precision
from moe_ext.optim import build_optimizer
from moe_ext.optim.state import local
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.pipeline import Pipeline
from moe_ext.parallel.ranks import run_ranks
from moe_ext.parallel.shard import build, own

SENTENCE = "i love shampoo so much"
BAR = 3e-3      # of the last loss, above which a run is stuck
MESHES = dict(dp=1, shard=1), dict(dp=1, shard=2), dict(dp=1, shard=4), dict(dp=2, shard=2), dict(dp=1, shard=2, tp=2)

# Losses of that public program at steps 10, 20, .. 100: 4 layers, width 1024, GPT-2's vocabulary, bf16, on GPUs.
LOG = {     # (init, frequency = start, graft_eps): {what its log calls the mesh: losses}
    ("default", 100, 1e-12): {
        "FSDP1 2x2": (1.274e-3, 3.889e-4, 2.023e-4, 1.437e-4, 1.166e-4, 1.011e-4, 9.018e-5, 8.183e-5, 7.501e-5,
                      6.914e-5)},
    ("default", 20, 1e-12): {
        "FSDP1 2x2": (1.274e-3, 3.889e-4, 3.666e-6, 1.639e-6, 1.043e-6, 8.047e-7, 7.153e-7, 6.855e-7, 5.960e-7,
                      5.364e-7),
        "FSDP2 2x2": (1.769e-3, 6.171e-4, 1.693e-4, 1.318e-4, 1.177e-4, 1.040e-4, 1.033e-4, 1.025e-4, 1.017e-4,
                      1.008e-4)},
    ("meta", 20, 1e-12): {
        "FSDP1 2x2": (1.3547, 1.0302, 0.41616, 0.12017, 0.012903, 5.782e-3, 2.563e-3, 1.611e-3, 1.288e-3, 1.133e-3)},
    ("meta", 20, 1e-8): {
        "FSDP1 2x2": (1.3546, 1.0279, 0.20810, 0.087669, 0.026547, 9.020e-3, 5.379e-3, 3.187e-3, 2.674e-3, 2.211e-3),
        "FSDP2 4x1": (1.3543, 0.86676, 0.35721, 0.34353, 0.11896, 0.053416, 0.010956, 4.343e-3, 2.879e-3, 2.415e-3),
        "FSDP2 1x4": (3.9338, 3.2685, 2.5939, 2.3788, 2.3688, 2.3632, 2.3611, 2.3606, 2.3604, 2.3602),
        "FSDP2 2x1": (1.3505, 0.88847, 0.16790, 0.049091, 1.428e-3, 5.324e-4, 2.380e-4, 1.530e-4, 1.192e-4, 1.133e-4),
        "FSDP2 1x2": (4.3626, 4.5526, 2.8102, 2.5427, 2.5377, 2.5348, 2.5337, 2.5334, 2.5333, 2.5333)},
}


@dataclass(frozen=True)
class OneCurve(OnMesh):
    """A GPT learns one sentence; its losses must not depend on the mesh."""

    init: Literal["default", "meta"] = "meta"  # torch's own initial values, or this package's: N(0, 0.02)
    dtype: Literal["fp32", "fp64", "bf16"] = "fp32"  # of parameters and activations; bf16: autocast; fp64: on the CPU
    lr: float = 1e-3
    vocab: int = 256  # rows of embedding and head, at least 256; GPT-2 has 50257
    dim: int = 1024
    heads: int = 8
    layers: int = 4
    steps: int = 100
    all: bool = False  # instead: a table of five meshes, whose ranks are forked here, on the CPU

    def optim(self) -> OptimConfig:
        raise NotImplementedError

    def logged(self) -> dict[str, tuple[float, ...]]:
        """Curves to put beside ours."""
        return {}

    def config(self, ranks: int, device: str = "cpu") -> Config:
        """Of a run on so many ranks."""
        dp, fsdp, tp, ep = self.sizes(ranks)
        require(ep == 1, f"EP is {ep}, but this model is dense: unset it, or see `check mesh --all`")
        require(self.vocab >= 256, f"--vocab is {self.vocab}, but tokens are bytes: give 256 or more")
        require(self.steps > 0, f"--steps is {self.steps}, wanted 1 or more")
        model = ModelConfig(vocab_size=self.vocab, seq_len=LENGTH, layers=self.layers, dim=self.dim, heads=self.heads,
                            hidden=4 * self.dim, act="gelu", norm="layernorm", norm_eps=1e-5)
        return Config(model=model, mesh=MeshConfig(rep=dp, fsdp=fsdp, tp=tp), optim=self.optim(),
                      train=TrainConfig(seed=1234, dtype=self.dtype, device=device))

    def run(self, world: World) -> bool:
        if self.all:
            require(self.device != "cuda", "--all forks ranks on the CPU: leave --device cuda out, or run one mesh by "
                    "torchrun")
            require(world.size == 1, f"--all forks the ranks of every mesh itself: run it without torchrun, not as one "
                    f"of {world.size}")
            return self.compare(world.say)
        losses = self.train(world, world.say)
        return world.agree(f"the last loss, {losses[-1]:.3e}, is below {BAR:g}", losses[-1] < BAR)

    def train(self, world: World, say: Callable[[str], None]) -> list[float]:
        """-> the loss of each step."""
        config = self.config(world.size, world.device.type)
        with world.joined():
            mesh = Mesh(config.mesh, world.device, store=world.store, seconds=self.seconds)
            gpt = build(config, mesh)
            if self.init == "default":
                torch_values(gpt, config.train.seed)
            say(f"""
    world_size: {world.size}
    DP: {config.mesh.rep}
    SHARD: {config.mesh.fsdp}
    TP: {config.mesh.tp}

    model: {gpt}

{self}
tokens are bytes, not GPT-2's: losses are not those of a run with GPT-2's tokenizer
""")
            optimizer, pipeline = build_optimizer(gpt, config.optim), Pipeline(gpt, mesh, micro_batch=1, micros=1)
            tokens_BS, targets_BS, count = one_sentence(SENTENCE, world.device)
            losses = []
            for step in range(1, self.steps + 1):
                totals = pipeline.step(lambda micro: (tokens_BS, targets_BS), 1, tokens=config.mesh.dp * count,
                                       around=lambda kind: precision(config, world.device) if kind == "forward"
                                       else nullcontext())
                optimizer.step()
                optimizer.zero_grad()
                losses.append(pipeline.sum(totals.loss)[0].item())
                if step % 10 == 0:
                    say(f"({step}th step) loss: {losses[-1]}")
            pipeline.close()
        return losses

    def compare(self, say: Callable[[str], None]) -> bool:
        """Prints the table of MESHES -> whether all have one curve (judged in fp64 alone), which ends below BAR."""
        commands = [replace(self, all=False, ep=1, **sizes) for sizes in MESHES]
        for command in commands:
            command.config(command.ranks)       # what cannot be is said before anything is forked
        marks = range(9, self.steps, 10)

        def row(name, losses, more=""):
            say(f"{name:22}" + "".join(f"{loss:9.2e}" for loss in losses) + more)

        say(f"{self}\n\n{'step':22}" + "".join(f"{i + 1:9}" for i in marks) + "  differs")
        for name, losses in self.logged().items():
            row(name, losses[:len(marks)])
        first, fine = None, True
        for command in commands:
            losses = forked(command)
            curve = torch.tensor(losses, dtype=torch.float64)
            first = curve if first is None else first
            apart = ((curve - first) / first).abs().max().item()
            equal = self.dtype != "fp64" or apart <= (1e-9 if command.tp == 1 else 1e-4)
            right = equal and losses[-1] < BAR
            fine &= right
            row(f"DP {command.dp} SHARD {command.shard} TP {command.tp}", [losses[i] for i in marks],
                f"  {apart:.1e}" + ("" if right else " WRONG"))
        one = "all meshes have one curve, which" if self.dtype == "fp64" else "the curve of every mesh"
        say(f"\n{one} ends below {BAR:g}: " + ("ok" if fine else "WRONG"))
        return fine

    @property
    def ranks(self) -> int:
        return self.dp * self.shard * self.tp


def forked(command: OneCurve) -> list[float]:
    """The losses of command.train on ranks forked for it."""
    size = command.ranks
    with tempfile.TemporaryDirectory() as folder:
        def body(rank):
            world = World(dist.FileStore(f"{folder}/world", size), rank, size, rank, device="cpu",
                          seconds=command.seconds)
            return command.train(world, lambda text: None)
        return run_ranks(size, body, folder)[0]


@torch.no_grad()
def torch_values(gpt: nn.Module, seed: int) -> None:
    """torch's own: Linear U(-1/sqrt(in), 1/sqrt(in)), Embedding N(0, 1); drawn whole by every rank, which takes its
    box, so that no mesh changes them."""
    for name, p in gpt.named_parameters():
        if p.ndim == 2:
            draw, whole = torch.Generator().manual_seed(seed ^ site(name)), torch.empty(p.shape, dtype=torch.float64)
            if name == "embed_tokens.weight":
                whole.normal_(generator=draw)
            else:
                whole.uniform_(-p.shape[1] ** -0.5, p.shape[1] ** -0.5, generator=draw)
            local(p).copy_(own(whole, p))


@dataclass(frozen=True)
class OneShampoo(OneCurve):
    """Shampoo learns one sentence; its losses must not depend on the mesh."""

    freq: int = 20  # steps between two preconditioners
    start_step: int = 0  # the step of the first; until then grafting's Adam alone; 0: as freq
    graft_eps: float = 1e-12  # of grafting's Adam; the log has 1e-12 and 1e-8
    max_preconditioner_dim: int = 8192  # matrices with more rows or columns are cut into blocks

    def optim(self) -> OptimConfig:
        require(self.freq > 0, f"--freq is {self.freq}, wanted a number of steps, as 20")
        require(self.start_step == 0 or self.start_step >= self.freq, f"--start-step is {self.start_step}, before the "
                f"first preconditioner at --freq {self.freq}: give --start-step {self.freq} or more, or leave it out")
        return OptimConfig(
            name="shampoo", rule="matrices: shampoo, embeddings: shampoo, norms: shampoo", lr=self.lr, min_lr=0.0,
            beta2=0.999, eps=self.graft_eps, weight_decay=1e-5, shampoo=ShampooConfig(
                precondition_frequency=self.freq, start_preconditioning_step=self.start_step, epsilon=1e-12,
                max_preconditioner_dim=self.max_preconditioner_dim))

    def logged(self):
        return LOG.get((self.init, self.freq, self.graft_eps), {}) if self.start_step in (0, self.freq) else {}


@dataclass(frozen=True)
class OneMuon(OneCurve):
    """Muon, with AdamW for embeddings, head and norms, learns one sentence; its losses must not depend on the mesh."""

    def optim(self) -> OptimConfig:
        return OptimConfig(name="muon", lr=self.lr, min_lr=0.0, muon=MuonConfig(ns_dtype=self.dtype))
