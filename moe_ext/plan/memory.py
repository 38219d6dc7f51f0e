"""Bytes that a rank holds: its state, what autograd saves of a forward, and what comes and goes beside them.

The saved activations are those of model.py and layers/fused.py, module by module; S tokens, B sequences on the rank, T
tokens between the modules (B S / tp), `whole` tokens inside them (B S), `real` and `half` bytes as in shares.widths. On
a CPU torch's RMSNorm is made of single ops and saves its input twice, once normalised; on a GPU it is one op.
"""
from __future__ import annotations

import collections
from typing import NamedTuple

from moe_ext.config import Config
from moe_ext.ops.enums import GATED
from moe_ext.plan.shares import Share, boxes, message, moe_layers, rows_per_token, widths

CHUNK = 1024        # tokens of which the head has logits at a time (ops.linear_cross_entropy)


class Memory(NamedTuple):
    """Bytes of a rank, each part at its own peak, so that their sum is an upper bound."""
    weights: int        # these three exactly
    gradients: int
    optimizer: int      # AdamW's two moments
    activations: int    # saved for the backward; with recompute every block's input, and all of one block
    head: int           # logits of a chunk of tokens, and the gradient of the head's matrix while it is summed up
    fsdp: int           # parameters and gradients whole in FSDP: the root's, two blocks' parameters, one's gradients
    cast: int           # weights of the blocks cast by autocast, which their backward reads
    exchange: int       # at balance, one message to all ranks and one from all

    @property
    def state(self) -> int:
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return sum(self)


def memory(config: Config, device: str = "cuda") -> Memory:
    """Of rank 0, on a device of this kind: "cuda" or "cpu"."""
    real, _ = widths(config)
    stored = Share.of(config).parameters * real
    return Memory(stored, stored, 2 * stored, activations(config, device), head(config), *passing(config),
                  exchange(config))


def activations(config: Config, device: str = "cuda") -> int:
    """Saved by a micro-batch's forward."""
    c, moe, t = config.model, config.model.moe, config.train
    real, half = widths(config)
    whole = t.micro_batch * c.seq_len
    x = whole // config.mesh.tp * c.dim * real
    outside, sparse = 2 * norm(config, device) + attended(config, device), moe_layers(c)
    blocks = []         # (how many, bytes of one)
    if sparse < c.layers:
        blocks.append((c.layers - sparse, outside + mlp(config, c.hidden)))
    if sparse:
        shared = mlp(config, moe.shared_hidden, shared=True) if moe.shared_hidden else 0
        blocks.append((sparse, outside + routed(config) + shared))
    if t.recompute:
        inner = c.layers * x + max(size for _, size in blocks)
    else:
        inner = sum(count * size for count, size in blocks)
    # RoPE's angles in fp64; the last norm; the gradients of the head's input and matrix, which its forward makes
    angles = 8 * c.seq_len * c.head_width if c.position == "rope" and (t.recompute or half == 8) else 0
    return inner + angles + norm(config, device) + half * (whole + -(-c.vocab_size // config.mesh.tp)) * c.dim


def normed(config: Config, rows: int, columns: int, rmsnorm: bool, device: str) -> int:
    """Of a norm over so many columns: its input, statistics and perhaps the normalised input."""
    real, _ = widths(config)
    return rows * real * (columns * (2 if rmsnorm and device == "cpu" else 1) + (1 if rmsnorm else 2))


def norm(config: Config, device: str) -> int:
    """One of a block's two, or the last."""
    c = config.model
    return normed(config, config.train.micro_batch * c.seq_len // config.mesh.tp, c.dim, c.norm == "rmsnorm", device)


def copies(config: Config, readers: int) -> int:
    """How often an input is kept that so many matrices read: autocast casts it for each of them; tp's gather before."""
    real, half = widths(config)
    return readers if half < real and config.mesh.tp == 1 else 1


def attended(config: Config, device: str) -> int:
    """The input of q, k and v; these after norm and RoPE; the output; the sums of softmax; the input of o."""
    c, tp = config.model, config.mesh.tp
    real, half = widths(config)
    whole, heads, groups = config.train.micro_batch * c.seq_len, c.heads // tp, c.kv_groups // tp
    size = whole * (half * (copies(config, 3) * c.dim + 2 * (heads + groups) * c.head_width) + real * heads)
    if c.position == "rope":        # RoPE leaves heads outermost, so that o's input is a copy; angles as q and k want
        size += half * whole * heads * c.head_width
        if half < 8:
            size += half * 2 * c.seq_len * c.head_width
    if c.qk_norm:
        size += normed(config, whole * (heads + groups), c.head_width, True, device)
    return size


def mlp(config: Config, hidden: int, shared: bool = False) -> int:
    """Of a dense MLP or a shared expert: its input (the latter's is there where it is neither cast nor gathered), the
    values before the activation and after it."""
    c, tp = config.model, config.mesh.tp
    real, half = widths(config)
    halves, whole = 2 if c.act in GATED else 1, config.train.micro_batch * c.seq_len
    inputs = 0 if shared and half == real and tp == 1 else copies(config, halves)
    return half * whole * (inputs * c.dim + (halves + 1) * hidden // tp)


def routed(config: Config) -> int:
    """Router and experts: the router's input, logits, scores and choice, and what jitter, noise and losses add; the
    rows that the experts read, the values before the activation of every copy, and where each row goes."""
    c, m, mesh = config.model, config.model.moe, config.mesh
    real, half = widths(config)
    halves, T, K, E = 2 if c.act in GATED else 1, config.train.micro_batch * c.seq_len // mesh.tp, m.top_k, m.experts
    kept = min(1.0, m.capacity_factor or 1.0)
    copied = T * K * kept * mesh.etp                        # the ranks of ep have equal shares
    x = T * c.dim * real
    extra = m.noise * E + (m.z_weight > 0) + (E + 2 if m.score == "sigmoid" and m.balance_weight else 0)
    size = x * (2 if m.jitter else 1) + T * ((2 * E + extra) * real + K * 4 + 1)
    if mesh.ep * mesh.etp > 1:
        rows = T * mesh.etp * rows_per_token(E, K, mesh.ep)
        size += rows * (c.dim * half + K * (real + 4))      # x, weights and their place
    else:
        rows = T
        size += T * K * (real + 4) + (x if m.jitter and half == real else T * c.dim * half if half < real else 0)
    size += copied * (halves * m.hidden // mesh.etp * half + 4)
    return round(size)


def head(config: Config) -> int:
    """While it works: logits of a chunk; the sum of its matrix's gradient over chunks, in fp32, and the next term; its
    matrix as autocast casts it."""
    c = config.model
    real, half = widths(config)
    rows = -(-c.vocab_size // config.mesh.tp)
    width = c.dim * (real + half + (half if half < real else 0))
    return rows * (half * min(CHUNK, config.train.micro_batch * c.seq_len) + width)


def passing(config: Config) -> tuple[int, int]:
    """(whole in FSDP, cast by autocast)."""
    mesh, (real, half) = config.mesh, widths(config)
    kept, blocks, cast = 0, collections.Counter(), collections.Counter()
    layers = {box.block: box.count for box in boxes(config)}
    for box in boxes(config):
        mixed = box.fsdp == "efsdp" and mesh.rep * mesh.efsdp > 1       # FSDP casts the experts, autocast the rest
        if half < real and not mixed and not box.partial and box.block:
            cast[box.block] += box.whole * half
        if getattr(mesh, box.fsdp) > 1:
            size = box.whole * (half if mixed else real)
            if box.block:
                blocks[box.block] += size
            else:
                kept += 2 * size
    each = [size * (1 if config.train.recompute else layers[block]) for block, size in cast.items()] or [0]
    return kept + 3 * max(blocks.values(), default=0), (max if config.train.recompute else sum)(each)


def exchange(config: Config) -> int:
    """Of the dispatch, the largest message, sent and received."""
    c, m, mesh = config.model, config.model.moe, config.mesh
    real, half = widths(config)
    if mesh.ep == 1:
        return 0
    rows = config.train.micro_batch * c.seq_len // mesh.tp * mesh.etp * rows_per_token(m.experts, m.top_k, mesh.ep)
    return round(2 * rows * message(c.dim * half, 4 * m.top_k, real * m.top_k))
