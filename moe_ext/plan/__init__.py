"""What a run costs, before it starts: parameters, tokens, FLOPs, memory, traffic. `moe_ext.train --dry-run` shows it.

Of a mesh it is rank 0 that is described: where something divides unevenly, it has the largest piece.
"""
from __future__ import annotations

import collections
import importlib.util
import math
import os
from typing import NamedTuple

import torch

import moe_ext
from moe_ext.config import Config
from moe_ext.model import GPT, pick_device
from moe_ext.ops.expert import GATED
from moe_ext.parallel.shard import dense_dim, experts_dim
from moe_ext.parallel.tensor import COLUMNS, ROWS


def describe(config: Config, model: GPT) -> str:
    """The table that stands before the first step, and what the ranks are. `model` may lie on the meta device."""
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
    local = f", {share.whole:,} local to a rank, which stores {share.parameters:,}" if mesh.world > 1 else ""
    rows = {
        "versions": f"moe_ext {moe_ext.__version__}, torch {torch.__version__}; {device.type}, "
                    f"{torch.get_num_threads()} threads",
        "mesh": f"{mesh.world} ranks: {sizes}; tokens travel by {mesh.transport}" if mesh.world > 1 else "one process",
        "model": f"{c.layers} layers, width {c.dim}, {c.heads} heads, vocabulary {c.vocab_size}{experts}",
        "parameters": f"{total:,} in all, {active:,} active per token{local}",
        "tokens": f"{config.tokens_per_step:,} per step = {t.accumulation} x {t.micro_batch * mesh.dp} sequences of "
                  f"{c.seq_len}; {config.tokens_in_all:,} in {t.steps} steps"
                  + (f", from {config.ramp[0]} sequences per step on" if t.batch_ramp else ""),
        "FLOPs": f"{model.flops_per_token():,} per token, forward and backward",
        "memory": f"{mib(state)} parameters, gradients and moments, about {mib(activations)} activations"
                  f"{' per rank' if mesh.world > 1 else ''}; the device has {mib(available)}",
    }
    if passing := [f"{mib(size)} {what}" for what, size in buffers(config, model).items() if size]:
        rows["buffers"] = "about " + ", ".join(passing)
    rows["checkpoint"] = f"{mib(checkpoint_size(config, total))}, in {config.run_folder}"
    if not importlib.util.find_spec("matplotlib"):
        rows["plot"] = "none, for that needs matplotlib: pip install matplotlib"
    if mesh.world > 1:
        sent = [f"{axis} {mib(size)}" for axis, size in traffic(config, model).items() if size]
        rows["traffic"] = "each rank sends per step: " + ", ".join(sent)
    lines = [f"{name:10}  {text}" for name, text in rows.items()]
    if mesh.world > 1:
        lines += banner(config, device)
    return "\n".join(lines)


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


class Box(NamedTuple):
    """What rank 0 has of a parameter, in elements."""
    name: str
    whole: int              # what tp, ep and etp leave to it: what it computes with
    stored: int             # what FSDP leaves of that
    fsdp: str               # the axis over which FSDP shards it: "fsdp", or "efsdp" for experts
    partial: str            # the axis whose ranks each have a part of its gradient: "tp", "etp" or ""

    @property
    def block(self) -> str:
        """The block whose parameters come and go together; "" for the embedding, the last norm and the head."""
        return ".".join(self.name.split(".")[:2]) if self.name.startswith("layers.") else ""


def boxes(config: Config, model: GPT) -> list[Box]:
    """One for each parameter, by the rules of moe_ext.parallel; a tied one counts once."""
    mesh, result = config.mesh, []
    for name, p in model.named_parameters():
        rows, columns, bias = ROWS.search(name), COLUMNS.search(name), "bias" in name
        if ".experts." in name:
            fsdp, dim, partial = "efsdp", experts_dim(name.rpartition(".")[2], mesh.etp), "etp" if bias else ""
            whole = first_piece(p.shape, {0: mesh.ep} if bias else {0: mesh.ep, 2: mesh.etp})
        else:
            fsdp, dim, partial = "fsdp", dense_dim(name, mesh.tp), "" if rows or columns else "tp"
            whole = first_piece(p.shape, {0: mesh.tp} if rows else {1: mesh.tp} if columns else {})
        stored = first_piece(whole, {dim: getattr(mesh, fsdp)})
        result.append(Box(name, math.prod(whole), math.prod(stored), fsdp, partial))
    return result


def first_piece(shape, cuts: dict[int, int]) -> list[int]:
    """The shape of the first piece, the largest, if each dimension of `cuts` is cut into so many."""
    return [-(-size // cuts.get(dim, 1)) for dim, size in enumerate(shape)]


class Share(NamedTuple):
    """A rank's share of the parameters, in elements."""
    whole: int              # what tp, ep and etp leave to it: what it computes with
    parameters: int         # what FSDP leaves of that: what it stores

    @classmethod
    def of(cls, config: Config, model: GPT) -> Share:
        held = boxes(config, model)
        return cls(sum(box.whole for box in held), sum(box.stored for box in held))


def widths(config: Config) -> tuple[int, int]:
    """Bytes of an element: of parameters, gradients, residual stream and router; of what matrix products read."""
    return {"fp64": (8, 8), "fp32": (4, 4)}.get(config.train.dtype, (4, 2))


def rows_per_token(experts: int, top_k: int, ranks: int) -> float:
    """To how many of P ranks a token goes that chooses its experts uniformly: P * (1 - C(E - E/P, K) / C(E, K))."""
    return ranks * (1 - math.comb(experts - experts // ranks, top_k) / math.comb(experts, top_k))


def message(*parts: int) -> int:
    """Bytes of a row of the token exchange with ids or weights beside its values: each part fills 16s (message.h)."""
    return sum(-(-part // 16) * 16 for part in parts)


def traffic(config: Config, model: GPT) -> dict[str, int]:
    """Bytes that one rank sends over each axis per optimizer step, in its forwards, backwards and sum_replicated.

    Of n ranks each sends (n-1) * b in an all-gather of pieces of b bytes, or a reduce-scatter into them, and
    2 (n-1)/n * b in an all-reduce of b bytes, as in a ring. Tokens choose experts uniformly and none is dropped. "dp"
    and "world" carry the statistics of the scope micro_batch. Not counted: the step's sums of loss, counts and norm.
    """
    c, m, t, mesh = config.model, config.model.moe, config.train, config.mesh
    real, half = widths(config)
    ranks = {axis: getattr(mesh, axis) for axis in ("rep", "fsdp", "efsdp", "tp", "ep", "etp", "dp", "world")}
    sent = dict.fromkeys(ranks, 0)

    def pieces(axis, size, times):          # all-gather, reduce-scatter
        sent[axis] += times * (ranks[axis] - 1) * size

    def total(axis, size, times):           # all-reduce
        sent[axis] += times * 2 * (ranks[axis] - 1) * size // ranks[axis]

    micro = t.accumulation
    for box in boxes(config, model):
        gathers = 2 if box.block else 1             # for forward and backward; the root keeps what no block has
        pieces(box.fsdp, box.stored * (half if box.fsdp == "efsdp" else real), micro * gathers)
        pieces(box.fsdp, box.stored * real, micro)                                  # gradients
        total("rep", box.stored * real, 1)
        if box.partial:
            total(box.partial, box.stored * real, 1)

    # Recomputation repeats a block's forward up to the last tensor that the backward reads: without its last
    # reduce-scatter, and without combine unless the shared expert comes after it.
    B, T, again = t.micro_batch, t.micro_batch * c.seq_len // mesh.tp, int(t.recompute)
    x, moe_layers = T * c.dim * half, (c.layers - m.dense_layers if m.experts else 0)
    pieces("tp", T * c.dim * real, 2 * micro)                                       # embedding
    pieces("tp", x, micro * c.layers * (4 + 2 * again))                             # attention: in and out, twice
    pieces("tp", x, micro * (c.layers - moe_layers) * (4 + again))                  # dense MLP
    pieces("tp", 2 * x + 2 * T * mesh.tp * real, micro)                             # head; every token's loss, logit
    if m.experts:
        backwards, forwards = micro * moe_layers, micro * moe_layers * (1 + again)
        combines = forwards if m.shared_hidden else backwards
        ids, weights, values = 4 * m.top_k, real * m.top_k, c.dim * half
        if m.shared_hidden:
            pieces("tp", x, backwards * (4 + again))
        pieces("etp", x + T * (ids + weights), forwards)                            # dispatch
        pieces("etp", x, combines + backwards)                                      # combine and its backward
        pieces("etp", x + T * weights, backwards)                                   # backward of dispatch
        rows = T * mesh.etp * rows_per_token(m.experts, m.top_k, mesh.ep) * (mesh.ep - 1) / mesh.ep     # to other ranks
        sent["ep"] += round(rows * (message(values, ids, weights) * forwards + values * (combines + backwards)
                                    + message(values, weights) * backwards))
        pieces("ep", mesh.ep * 2 * 4, forwards)                                     # counts of rows and copies, int32

        whole = m.scope == "micro_batch"
        if m.balance_weight:                                                        # scores and counts, int32
            total("world" if whole else "tp", (1 if whole else B) * m.experts * (real + 4), forwards)
        if m.capacity_factor:                                                       # ids, and scores where they decide
            scores = real * m.top_k if m.drop_by == "probability" else 0
            pieces("tp", T * (ids + scores), forwards)
            pieces("dp", T * mesh.tp * (ids + scores), forwards if whole else 0)
    return sent


def memory(config: Config, parameters: int) -> tuple[int, int]:
    """Of a rank that stores so many parameters: (bytes of parameters, gradients and AdamW's two moments, exactly; bytes
    of activations at their peak, about: what autograd keeps of every block, or with recompute every block's input and
    one block, and the head's chunk)."""
    c, m, t, mesh = config.model, config.model.moe, config.train, config.mesh
    real, half = widths(config)
    up = 2 if c.act in GATED else 1
    whole = t.micro_batch * c.seq_len       # tokens of attention, MLPs and head, which gather whole sequences
    T = whole // mesh.tp
    norm = T * c.dim * real
    # attention keeps its input, which autocast copies for q, k and v alike unless gather did; q and k before and after
    # RoPE, v, and its output before the last matrix
    inputs = 3 if half < real and mesh.tp == 1 else 1
    attention = norm + whole * half * (inputs * c.dim + c.head_width * (3 * c.heads + 3 * c.kv_groups) // mesh.tp)
    if c.qk_norm:
        attention += whole * real * c.head_width * (c.heads + c.kv_groups) // mesh.tp
    dense = norm + whole * half * (c.dim + (2 * up + 1) * c.hidden // mesh.tp)
    moe_layers = (c.layers - m.dense_layers) if m.experts else 0
    moe = 0
    if m.experts:
        received = T * mesh.etp * rows_per_token(m.experts, m.top_k, mesh.ep)
        moe = norm + T * (half * c.dim + real * (c.dim + 3 * m.experts)) \
            + round(received) * half * c.dim + T * half * m.top_k * up * m.hidden
        if m.shared_hidden:
            moe += half * ((whole - T) * c.dim + whole * (2 * up + 1) * m.shared_hidden // mesh.tp)
    blocks = c.layers * attention + moe_layers * moe + (c.layers - moe_layers) * dense
    if t.recompute:
        blocks = c.layers * norm + blocks // c.layers
    head = 2 * min(1024, whole) * c.vocab_size // mesh.tp * real + whole * c.dim * 2 * real
    return 4 * parameters * real, blocks + head


def buffers(config: Config, model: GPT) -> dict[str, int]:
    """Bytes that come and go beside those of `memory`, at their peak, about. FSDP: all that is kept whole, two blocks'
    parameters, of which one is fetched ahead, and one block's gradients. Exchange, at balance: one message to all ranks
    and one from all."""
    m, t, mesh = config.model.moe, config.train, config.mesh
    real, half = widths(config)
    kept, blocks, copies = 0, collections.Counter(), collections.Counter()
    for box in boxes(config, model):
        mixed = box.fsdp == "efsdp" and mesh.rep * mesh.efsdp > 1       # FSDP casts the experts, autocast the rest
        if half < real and not mixed and not box.partial:
            copies[box.block] += box.whole * half
        if getattr(mesh, box.fsdp) > 1:
            size = box.whole * (half if mixed else real)
            if box.block:
                blocks[box.block] += size
            else:
                kept += 2 * size
    outside = copies.pop("", 0)
    cast = outside + (max if t.recompute else sum)(copies.values() or [0])
    messages = 0
    if mesh.ep > 1:
        rows = t.micro_batch * config.model.seq_len // mesh.tp * mesh.etp * rows_per_token(m.experts, m.top_k, mesh.ep)
        messages = round(2 * rows * message(config.model.dim * half, 4 * m.top_k, real * m.top_k))
    return {"parameters and gradients whole in FSDP": kept + 3 * max(blocks.values(), default=0),
            "weights cast by autocast": cast, "messages of the exchange": messages}
