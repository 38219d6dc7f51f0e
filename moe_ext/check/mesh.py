"""A small GPT on any mesh: six steps on one sentence, whose losses must not depend on the mesh.

    DP=1 SHARD=2 TP=1 torchrun --standalone --nproc-per-node 2 -m moe_ext.check mesh
    DP=2 SHARD=2 TP=2 torchrun --standalone --nproc-per-node 8 -m moe_ext.check mesh --dtype fp64
    PP=2 TP=2 torchrun --standalone --nproc-per-node 4 -m moe_ext.check mesh --chunks 2     # two stages of a pipeline
    SP=2 torchrun --standalone --nproc-per-node 4 -m moe_ext.check mesh --attention gather  # two ranks share a sequence
    python -m moe_ext.check mesh --all          # the proof, moe_ext.proof: every mesh, forked from one process

Every rank gets the same sentence, so all meshes see the same batch. The learning rate is far too high, on purpose: what
is a little wrong in the first step is very wrong in the last. Rounding grows in the same way: compare meshes in fp64.
Nothing is compared here but by the eye; --all compares.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

from moe_ext.check.world import OnMesh, World, describe, from_environment
from moe_ext.config import Config, MeshConfig, ModelConfig, PipelineConfig, Sharing, TrainConfig, require
from moe_ext.model import GPT
from moe_ext.parallel.collectives import gather
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.pipeline import Pipeline
from moe_ext.parallel.shard import build
from moe_ext.parallel.stages import Stage

SENTENCE = "i love lingua and 3d parallelism :)"
LENGTH = 48  # of the padded sentence: a multiple of every small sp * tp


@dataclass(frozen=True)
class OneSentence(OnMesh):
    """Six steps of a GPT on one sentence, on any mesh."""

    pp: int = from_environment("PP", 1)  # stages of a pipeline, each of dp * shard * sp * tp ranks; $PP
    chunks: int = 1  # pieces of the model on each stage
    sp: int = from_environment("SP", 1)  # ranks that share the sentence, and the parameters as shard's do; $SP
    attention: Sharing = "ulysses"  # over sp: all tokens of some heads, or all keys and values
    dtype: Literal["fp32", "fp64"] = "fp32"  # of parameters and activations; fp64 runs on the CPU
    loss_parallel: bool = True  # each tp rank holds the logits of its part of the vocabulary; else all of them
    vocab: int = 4096  # rows of embedding and head, at least 256; GPT-2 has 50257
    dim: int = 1024
    heads: int = 8
    layers: int = 4
    steps: int = 6
    profile: Path | None = None  # folder for a torch.profiler trace of each rank
    all: bool = False  # instead: the table of every mesh of 1, 2, 4 and 8 ranks against one process

    def run(self, world: World) -> bool:
        if self.all:
            require(world.size == 1, f"--all forks the ranks of every mesh itself: run it without torchrun, not as one "
                    f"of {world.size}")
            from moe_ext.proof import prove_all  # which imports more than any other check needs
            return prove_all(out=world.say)
        require(self.pp > 0 and world.size % self.pp == 0, f"PP is {self.pp}, which does not divide the {world.size} "
                "ranks: change --nproc-per-node or PP")
        stage = world.size // self.pp
        require(self.sp > 0 and stage % self.sp == 0, f"SP is {self.sp}, which does not divide the number of ranks "
                f"of a stage, {stage}: change --nproc-per-node or SP")
        dp, fsdp, tp, ep = self.sizes(stage // self.sp)
        require(ep == 1, f"EP is {ep}, but this model is dense: unset it, or see `check dmoe` and `check mesh --all`")
        model = ModelConfig(vocab_size=self.vocab, seq_len=LENGTH, layers=self.layers, dim=self.dim, heads=self.heads,
                            hidden=4 * self.dim, act="gelu", norm="layernorm", norm_eps=1e-5)
        sizes = dict(pp=self.pp, rep=dp, fsdp=fsdp, sp=self.sp, tp=tp)
        config = Config(model=model, mesh=MeshConfig(**sizes, attention=self.attention),
                        pipeline=PipelineConfig(chunks=self.chunks),
                        train=TrainConfig(seed=1234, dtype=self.dtype, device=world.device.type))
        with world.joined():
            mesh = Mesh(config.mesh, world.device, store=world.store, seconds=self.seconds)
            gpt = build(config, mesh)
            if tp > 1 and not self.loss_parallel and gpt.lm_head is not None:
                gpt.lm_head.cross_entropy = functools.partial(gathered_cross_entropy, vocab_size=self.vocab,
                                                              group=mesh.dense.get_group("tp"))
            dense = mesh.dense["rep", "fsdp", "tp"] if mesh.world > 1 else one_rank(world)
            world.say_each(f"rank: {world.rank}, world size: {world.size}, device: {world.device}")
            shared = f"sp_mesh: {describe(mesh.tokens['sp'])}\n    " if self.sp > 1 else ""
            world.say(f"""
    mesh_3d: {describe(dense)}
    fsdp_mesh: {describe(dense["rep", "fsdp"])}
    {shared}tp_mesh: {describe(dense["tp"])}

    model: {gpt}

tokens are bytes, not GPT-2's: losses are not those of a run with GPT-2's tokenizer""")
            parallel = tp > 1 and self.loss_parallel
            more = "".join(f"{axis}_{size}_" for axis, size in (("PP", self.pp), ("SP", self.sp)) if size > 1)
            with self.profiled(world, f"{more}DP_{dp}_SHARD_{fsdp}_TP_{tp}_USE_LOSS_PARALLEL_{parallel}"):
                self.train(world, gpt, mesh, config.pipeline)
        return True

    def train(self, world: World, model: GPT | Stage, mesh: Mesh, config: PipelineConfig) -> None:
        tokens_BS, targets_BS, count = one_sentence(SENTENCE, world.device)
        pipeline = Pipeline(model, mesh, config, micro_batch=1, micros=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(self.steps):
            totals = pipeline.step(lambda micro: (tokens_BS, targets_BS), 1, tokens=mesh.config.dp * count)
            optimizer.step()
            optimizer.zero_grad()
            loss, = pipeline.sum(totals.loss)
            world.say(f"{step}th step loss: {loss.item()}")
        pipeline.close()

    def profiled(self, world: World, name: str):
        """torch.profiler around the steps; each rank writes PROFILE/name/rank<r>.json (chrome://tracing)."""
        if self.profile is None:
            return nullcontext()
        folder = self.profile / name
        folder.mkdir(parents=True, exist_ok=True)
        world.say(f"traces: {folder}")
        return torch.profiler.profile(
            on_trace_ready=lambda trace: trace.export_chrome_trace(str(folder / f"rank{world.rank}.json")))


def one_rank(world: World):
    """The dense mesh of one process, which Mesh does not make."""
    return init_device_mesh(world.device.type, (1, 1, 1), mesh_dim_names=("rep", "fsdp", "tp"))


def one_sentence(sentence: str, device) -> tuple[torch.Tensor, torch.Tensor, int]:
    """-> tokens [1,LENGTH], targets [1,LENGTH] (-100 after the sentence), number of targets. A token is a byte."""
    text = torch.tensor([list(sentence.encode())], device=device)
    count = text.shape[1] - 1
    return F.pad(text[:, :-1], (0, LENGTH - count)), F.pad(text[:, 1:], (0, LENGTH - count), value=-100), count


def gathered_cross_entropy(x_TD, w_vD, targets_T, *, vocab_size, group):
    """The cross-entropy without loss parallelism: every rank gets all logits and computes the same loss."""
    ranks = dist.get_world_size(group)
    most = -(-vocab_size // ranks)      # rows of a rank that is full
    logits_Tv = F.pad(x_TD @ w_vD.T, (0, most - len(w_vD)))
    loss = F.cross_entropy(gather(logits_Tv, 1, group)[:, :vocab_size], targets_T, reduction="sum")
    return loss.detach() + (loss - loss.detach()) / ranks   # gather's backward adds up what all ranks say
