"""What a run will cost, before it starts: parameters, tokens, FLOPs and memory. `moe_ext.train --dry-run` shows it."""
from __future__ import annotations

import os
from typing import NamedTuple

import torch

import moe_ext
from moe_ext.config import Config
from moe_ext.model import GPT, pick_device
from moe_ext.ops.expert import GATED


def describe(config: Config, model: GPT) -> str:
    """The table that stands before the first step, and what each rank of a mesh has. `model` may lie on the meta device.
    """
    c, m, t, mesh, device = config.model, config.model.moe, config.train, config.mesh, pick_device(config)
    total, active = model.num_parameters()
    share = Share.of(config, model)
    state, activations = memory(config, share.parameters)
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    experts = f", {m.experts} experts of width {m.hidden}, top-{m.top_k}" if m.experts else ""
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.sizes.items() if size > 1)
    local = f", {share.whole:,} local to a rank before FSDP" if mesh.world > 1 else ""
    rows = {
        "versions": f"moe_ext {moe_ext.__version__}, torch {torch.__version__}; {device.type}, "
                    f"{torch.get_num_threads()} threads",
        "mesh": f"{mesh.world} ranks: {sizes}; tokens travel by {mesh.transport}" if mesh.world > 1 else "one process",
        "model": f"{c.layers} layers, width {c.dim}, {c.heads} heads, vocabulary {c.vocab_size}{experts}",
        "parameters": f"{total:,} in all, {active:,} active per token{local}",
        "tokens": f"{config.tokens_per_step:,} per step = {t.accumulation} x {t.micro_batch * mesh.dp} sequences of "
                  f"{c.seq_len}; {t.steps * config.tokens_per_step:,} in {t.steps} steps",
        "FLOPs": f"{model.flops_per_token():,} per token, forward and backward",
        "memory": f"{state / 2**20:,.0f} MiB parameters, gradients and moments, about {activations / 2**20:,.0f} MiB "
                  f"activations{' per rank' if mesh.world > 1 else ''}; the device has {available / 2**20:,.0f} MiB",
    }
    lines = [f"{name:10}  {text}" for name, text in rows.items()]
    if mesh.world > 1:
        lines += banner(config, device)
    return "\n".join(lines)


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


class Share(NamedTuple):
    """A rank's share of the parameters."""
    whole: int              # what tp, ep and etp leave to it: what it computes with
    parameters: int         # what FSDP leaves of that: what it stores

    @classmethod
    def of(cls, config: Config, model: GPT) -> Share:
        mesh = config.mesh
        experts = sum(p.numel() for moe in model.moe_layers() for p in moe.experts.parameters())
        dense = model.num_parameters()[0] - experts
        return cls(dense // mesh.tp + experts // (mesh.ep * mesh.etp),
                   dense // (mesh.tp * mesh.fsdp) + experts // (mesh.ep * mesh.etp * mesh.efsdp))


def memory(config: Config, parameters: int) -> tuple[int, int]:
    """Of a rank that stores so many parameters: (bytes of parameters, gradients and AdamW's two moments, exactly; bytes
    of activations at their peak, about: what autograd keeps of every block, or with recompute every block's input and one
    block, and the head's chunk)."""
    c, m, t, tp = config.model, config.model.moe, config.train, config.mesh.tp
    real, a = (8, 8) if t.dtype == "fp64" else (4, 4 if t.dtype == "fp32" else 2)
    gated = 2 if c.act in GATED else 1
    attention = a * c.head_width * (3 * c.heads + 3 * c.kv_groups)      # q and k before and after RoPE, v, the output
    norms = 2 * c.dim * (real + a)
    dense = a * (2 * gated + 1) * c.hidden
    moe = a * (m.top_k * gated * m.hidden + c.dim) + real * (c.dim + 3 * m.experts) + a * 3 * m.shared_hidden
    moe_layers = (c.layers - m.dense_layers) if m.experts else 0
    blocks = c.layers * (attention + norms) + moe_layers * moe + (c.layers - moe_layers) * dense
    if t.recompute:
        blocks = c.layers * real * c.dim + blocks // c.layers
    tokens = t.micro_batch * c.seq_len
    head = 2 * min(1024, tokens) * c.vocab_size // tp * real + tokens * c.dim * 2 * real
    return 4 * parameters * real, tokens * blocks // tp + head
