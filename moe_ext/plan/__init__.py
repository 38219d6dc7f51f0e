"""What a run costs, before it starts: parameters, tokens, FLOPs, memory, traffic. `moe_ext.train --dry-run` shows it.

Of a mesh it is rank 0 that is described: where something divides unevenly, it has the largest piece. Of a pipeline it
is the first rank of the stage that has most; with mesh.attention "gather" the last rank of its first sequence, whose
tokens see most.
"""
from __future__ import annotations

import importlib.util
import os
from dataclasses import replace

import torch

import moe_ext
from moe_ext.config import Config, TuneConfig
from moe_ext.model import GPT, pick_device
from moe_ext.plan.memory import Memory, fullest, memory
from moe_ext.plan.optimizer import cost, kept, movers, optimizer_state, saved
from moe_ext.plan.pipeline import turns
from moe_ext.plan.shares import Share, boxes, makes, rows_per_token, stages, widths
from moe_ext.plan.traffic import traffic

__all__ = ["Memory", "Share", "boxes", "checkpoint_size", "describe", "memory", "mib", "ranks", "rows_per_token",
           "sizes", "traffic"]


def describe(config: Config, model: GPT) -> str:
    """The table that stands before the first step, and what the ranks are. `model` may lie on the meta device."""
    c, t, mesh, device = config.model, config.train, config.mesh, pick_device(config)
    total, active = model.num_parameters()
    held = memory(config, device.type)
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most = f" of stage {fullest(config, device.type)}, which has most" if mesh.pp > 1 else ""
    rows = {
        "versions": f"moe_ext {moe_ext.__version__}, torch {torch.__version__}; {device.type}, "
                    f"{torch.get_num_threads()} threads",
        "mesh": f"{ranks(config)}; tokens travel by {mesh.transport}" if mesh.world > 1 else "one process",
        "model": sizes(config),
        "parameters": f"{total:,} in all, {active:,} active per token"
                      + (f", {local(config)}" if mesh.world > 1 else ""),
        **({"moving": moving(config, model)} if c.tune != TuneConfig() else {}),
        "tokens": f"{config.tokens_per_step:,} per step = {t.accumulation} x {t.micro_batch * mesh.dp} sequences of "
                  f"{c.seq_len}; {config.tokens_in_all:,} in {t.steps} steps"
                  + (f", from {config.ramp[0]} sequences per step on" if t.batch_ramp else ""),
        "FLOPs": f"{model.flops_per_token():,} per token, forward and backward",
        "memory": f"{mib(held.state)} parameters, gradients and {kept(config)}, about {mib(held.activations)} "
                  f"activations{' per rank' if mesh.world > 1 else ''}{most}; the device has {mib(available)}",
    }
    passing = {"logits and gradient of the head": held.head, "parameters and gradients whole in FSDP": held.fsdp,
               "weights cast to 16 bits": held.cast, "messages of the exchange": held.exchange,
               "messages between the ranks of a sequence": held.sequence, "tensors between the stages": held.links,
               "the optimizer while it steps": held.step}
    rows["buffers"] = "about " + ", ".join(f"{mib(size)} {what}" for what, size in passing.items() if size)
    rows["checkpoint"] = f"{mib(checkpoint_size(config, total))}, in {config.run_folder}"
    if t.saves_on_the_way:
        stage = fullest(config, device.type)
        rows["checkpoint"] += f"; {mib(held.weights + optimizer_state(config, stage))} of the host's memory keep a copy"
        rows["checkpoint"] += " of it" if mesh.world == 1 else " of a rank's part, at most"
    if config.optim.rule or (config.optim.name, config.optim.state) != ("adamw", "full"):
        rows["optimizer"] = f"\n{'':12}".join(f"{name} ({what}): {spent(config, name)}"
                                              for name, what in movers(config).items())
    if not importlib.util.find_spec("matplotlib"):
        rows["plot"] = "none, for that needs matplotlib: pip install matplotlib"
    if mesh.pp > 1:
        rows["pipeline"] = pace(config)
    if mesh.world > 1:
        sent = [f"{axis} {mib(size)}" for axis, size in traffic(config).items() if size]
        rows["traffic"] = "each rank sends per step: " + ", ".join(sent)
    lines = [f"{name:10}  {text}" for name, text in rows.items()]
    if mesh.world > 1:
        lines += banner(config, device)
    return "\n".join(lines)


def moving(config: Config, model: GPT) -> str:
    """What model.tune leaves to train and what that saves, in a line: optim.rule may say nothing of what rests, so that
    counts as optim.name alone would keep it."""
    plain = replace(config, model=replace(config.model, tune=TuneConfig()), optim=replace(config.optim, rule=""))
    each = " per rank" if config.mesh.world > 1 else ""
    less = max(memory(plain, stage=stage).state for stage in makes(plain)) - max(
        memory(config, stage=stage).state for stage in makes(config))
    total, active = model.num_parameters(moving=True)
    return (f"{total:,} parameters, {active:,} active per token; that the others rest saves {mib(less)} of gradients "
            f"and {kept(plain)}{each}")


def spent(config: Config, optimizer: str) -> str:
    """What an optimizer costs the rank that has most of it."""
    moves = [cost(config, stage, optimizer) for stage in makes(config)]
    each = "a rank" if config.mesh.world > 1 else "it"
    state, host, flops = (max(getattr(one, what) for one in moves) for what in ("state", "host", "flops"))
    sent = max(one.dense + one.experts for one in moves)
    parts = [f"{mib(state)} state"] if state else []
    parts += [f"{mib(host)} state in the host's memory"] if host else []
    parts += [f"{mib(sent)} sent per step by {each}"] if sent else []
    parts += [f"{flops / 1e9:,.1f} GFLOP per step"] if flops else []
    return ", ".join(parts)


def sizes(config: Config) -> str:
    """The model in a line."""
    c, m = config.model, config.model.moe
    experts = f", {m.experts} experts of width {m.hidden}, top-{m.top_k}" if m.experts else ""
    return f"{c.layers} layers, width {c.dim}, {c.heads} heads, vocabulary {c.vocab_size}{experts}"


def ranks(config: Config) -> str:
    """The mesh in a line: its ranks, by axis."""
    mesh = config.mesh
    axes = " x ".join(f"{name} {size}" + (f" ({mesh.attention})" if name == "sp" else "")
                      for name, size in mesh.sizes.items() if size > 1)
    return f"{mesh.world} ranks: {axes}"


def local(config: Config) -> str:
    """The parameters of a rank in a line."""
    each = [Share.of(config, stage) for stage in range(config.mesh.pp)]
    return (f"{by_stage([share.whole for share in each])} local to a rank, which stores "
            f"{by_stage([share.parameters for share in each])}")


def pace(config: Config) -> str:
    """The pipeline in a line: its pieces and how its stages take turns."""
    p, (idle, live) = config.pipeline, turns(config)
    pieces = [" + ".join(str(len(piece)) for piece in part) for part in stages(config)]
    return (f"{p.schedule}; blocks {by_stage(pieces)}; bubble {idle:.1%}, at most {by_stage(live)} live chunks of "
            f"{p.chunks * config.train.accumulation}")


def by_stage(values: list) -> str:
    """A value of each stage, alike ones together: "3 (stage 0), 4 (1 to 2), 3 (3)"; 3 if all are."""
    runs = []
    for stage, value in enumerate(values):
        if runs and runs[-1][0] == value:
            runs[-1][2] = stage
        else:
            runs.append([value, stage, stage])
    texts = [f"{value:,}" if isinstance(value, int) else value for value, _, _ in runs]
    if len(runs) == 1:
        return texts[0]
    names = [f"{first}" if first == last else f"{first} to {last}" for _, first, last in runs]
    names[0] = f"stage {names[0]}"
    return ", ".join(f"{text} ({name})" for text, name in zip(texts, names, strict=True))


def checkpoint_size(config: Config, parameters: int) -> int:
    """Bytes of a checkpoint with so many parameters in all: they and what the optimizer keeps."""
    real = widths(config)[0]
    return parameters * real + saved(config.model, config.optim, real)


def mib(size: int) -> str:
    """Bytes in MiB, below ten with a decimal."""
    return f"{size / 2**20:,.{int(size < 10 * 2**20)}f} MiB"


def banner(config: Config, device: torch.device) -> list[str]:
    """What the ranks of a mesh set up, one line each."""
    mesh, experts = config.mesh, config.model.moe.experts
    lines = [f"FSDP initialized on device: {device.type}, rank: {rank}, world size: {mesh.world}"
             for rank in range(mesh.world)]
    if experts:
        each = experts // mesh.ep
        owners = [rank // mesh.etp % mesh.ep for rank in range(mesh.world)]
        lines += [f"Rank {rank}: Managing experts {owner * each} to {owner * each + each - 1}"
                  for rank, owner in enumerate(owners)]
    return [*lines, f"Optimizer initialized: {config.optim.name} on {mesh.world} ranks",
            f"Scheduler initialized: {config.optim.schedule} on {mesh.world} ranks",
            f"effective batch size desired: {config.tokens_per_step}",
            f"accumulation steps desired: {config.train.accumulation}"]
