"""What a run costs, before it starts: parameters, tokens, FLOPs, memory, traffic. `moe_ext.train --dry-run` shows it.

Of a mesh it is rank 0 that is described: where something divides unevenly, it has the largest piece.
"""
from __future__ import annotations

import importlib.util
import os

import torch

import moe_ext
from moe_ext.config import Config
from moe_ext.model import GPT, pick_device
from moe_ext.plan.memory import Memory, memory
from moe_ext.plan.shares import Share, boxes, rows_per_token, widths
from moe_ext.plan.traffic import traffic

__all__ = ["Memory", "Share", "boxes", "checkpoint_size", "describe", "memory", "mib", "ranks", "rows_per_token",
           "sizes", "traffic"]


def describe(config: Config, model: GPT) -> str:
    """The table that stands before the first step, and what the ranks are. `model` may lie on the meta device."""
    c, t, mesh, device = config.model, config.train, config.mesh, pick_device(config)
    total, active = model.num_parameters()
    share, held = Share.of(config), memory(config, device.type)
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    local = f", {share.whole:,} local to a rank, which stores {share.parameters:,}" if mesh.world > 1 else ""
    rows = {
        "versions": f"moe_ext {moe_ext.__version__}, torch {torch.__version__}; {device.type}, "
                    f"{torch.get_num_threads()} threads",
        "mesh": f"{ranks(config)}; tokens travel by {mesh.transport}" if mesh.world > 1 else "one process",
        "model": sizes(config),
        "parameters": f"{total:,} in all, {active:,} active per token{local}",
        "tokens": f"{config.tokens_per_step:,} per step = {t.accumulation} x {t.micro_batch * mesh.dp} sequences of "
                  f"{c.seq_len}; {config.tokens_in_all:,} in {t.steps} steps"
                  + (f", from {config.ramp[0]} sequences per step on" if t.batch_ramp else ""),
        "FLOPs": f"{model.flops_per_token():,} per token, forward and backward",
        "memory": f"{mib(held.state)} parameters, gradients and moments, about {mib(held.activations)} activations"
                  f"{' per rank' if mesh.world > 1 else ''}; the device has {mib(available)}",
    }
    passing = {"logits and gradient of the head": held.head, "parameters and gradients whole in FSDP": held.fsdp,
               "weights cast by autocast": held.cast, "messages of the exchange": held.exchange}
    rows["buffers"] = "about " + ", ".join(f"{mib(size)} {what}" for what, size in passing.items() if size)
    rows["checkpoint"] = f"{mib(checkpoint_size(config, total))}, in {config.run_folder}"
    if not importlib.util.find_spec("matplotlib"):
        rows["plot"] = "none, for that needs matplotlib: pip install matplotlib"
    if mesh.world > 1:
        sent = [f"{axis} {mib(size)}" for axis, size in traffic(config).items() if size]
        rows["traffic"] = "each rank sends per step: " + ", ".join(sent)
    lines = [f"{name:10}  {text}" for name, text in rows.items()]
    if mesh.world > 1:
        lines += banner(config, device)
    return "\n".join(lines)


def sizes(config: Config) -> str:
    """The model in a line."""
    c, m = config.model, config.model.moe
    experts = f", {m.experts} experts of width {m.hidden}, top-{m.top_k}" if m.experts else ""
    return f"{c.layers} layers, width {c.dim}, {c.heads} heads, vocabulary {c.vocab_size}{experts}"


def ranks(config: Config) -> str:
    """The mesh in a line: its ranks, by axis."""
    axes = " x ".join(f"{name} {size}" for name, size in config.mesh.sizes.items() if size > 1)
    return f"{config.mesh.world} ranks: {axes}"


def checkpoint_size(config: Config, parameters: int) -> int:
    """Bytes of a checkpoint with so many parameters in all: they and AdamW's two moments."""
    return 3 * parameters * widths(config)[0]


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
