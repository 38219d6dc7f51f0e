"""What a run will cost, before it starts: parameters, tokens, FLOPs and memory. `moe_ext.train --dry-run` shows it."""
from __future__ import annotations

import os

import torch

import moe_ext
from moe_ext.config import Config
from moe_ext.model import GPT, pick_device
from moe_ext.ops.expert import GATED


def describe(config: Config, model: GPT) -> str:
    """The table that stands before the first step. `model` may lie on the meta device."""
    c, m, t, device = config.model, config.model.moe, config.train, pick_device(config)
    total, active = model.num_parameters()
    state, activations = memory(config, total)
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    experts = f", {m.experts} experts of width {m.hidden}, top-{m.top_k}" if m.experts else ""
    rows = {
        "versions": f"moe_ext {moe_ext.__version__}, torch {torch.__version__}; {device.type}, "
                    f"{torch.get_num_threads()} threads",
        "model": f"{c.layers} layers, width {c.dim}, {c.heads} heads, vocabulary {c.vocab_size}{experts}",
        "parameters": f"{total:,} in all, {active:,} active per token",
        "tokens": f"{config.tokens_per_step:,} per step = {t.accumulation} x {t.micro_batch} sequences of {c.seq_len}; "
                  f"{t.steps * config.tokens_per_step:,} in {t.steps} steps",
        "FLOPs": f"{model.flops_per_token():,} per token, forward and backward",
        "memory": f"{state / 2**20:,.0f} MiB parameters, gradients and moments, about {activations / 2**20:,.0f} MiB "
                  f"activations; the device has {available / 2**20:,.0f} MiB",
    }
    return "\n".join(f"{name:10}  {text}" for name, text in rows.items())


def memory(config: Config, parameters: int) -> tuple[int, int]:
    """(bytes of parameters, gradients and AdamW's two moments, exactly; bytes of activations at their peak, about: what
    autograd keeps of every block, or with recompute every block's input and one block, and the head's chunk)."""
    c, m, t = config.model, config.model.moe, config.train
    real, a = (8, 8) if t.dtype == "fp64" else (4, 2 if t.dtype == "bf16" else 4)
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
    head = 2 * min(1024, tokens) * c.vocab_size * real + tokens * c.dim * 2 * real
    return 4 * parameters * real, tokens * blocks + head
