"""Bytes that a rank holds: its state, what autograd saves of a forward, and what comes and goes beside them.

The saved activations are those of model.py and layers/fused.py, module by module, with all of it trained (where parts
are frozen, an upper bound: what only their gradients read is not saved); S tokens, B sequences on the rank, T
tokens between the modules, B S / (sp tp), and B S / sp `inside` them, `real` and `half` bytes as in shares.widths.
"""
from __future__ import annotations

import collections
import functools
import re
from typing import NamedTuple

import torch

from moe_ext.attention import computed_in
from moe_ext.config import Config, MeshConfig, ModelConfig
from moe_ext.halves import cast_once
from moe_ext.model import half_dtype
from moe_ext.ops import logits
from moe_ext.ops.enums import GATED
from moe_ext.ops.head import chunk_on
from moe_ext.plan.optimizer import cost
from moe_ext.plan.pipeline import alive
from moe_ext.plan.shares import (
    Box,
    Pieces,
    Share,
    axes,
    blocks,
    boxes_of,
    ends,
    makes,
    message,
    rows_per_token,
    sent_columns,
    stages,
    tokens,
    widths,
)

# The parameters of Linear and Experts, but for a tied head's, which goes by the table's name.
HALVED = re.compile(r"_proj\.|\.experts\.|\.shared_gate\.|^lm_head\.")


class Memory(NamedTuple):
    """Bytes of a rank, each part at its own peak, so that their sum is an upper bound."""
    weights: int        # these three exactly; with Shampoo the last one is of the rank that owns most
    gradients: int
    optimizer: int      # what it keeps between two steps: of AdamW two moments (plan.optimizer)
    activations: int    # saved for the backward; with recompute every block's input, and all of one block
    head: int           # logits of a chunk of tokens, and the gradient of the head's matrix while it is summed up
    fsdp: int           # parameters and gradients whole in FSDP: the root's, two blocks' parameters, one's gradients
    cast: int           # weights in 16 bits: cast once (moe_ext.halves), or by autocast those that backwards will read
    exchange: int       # at balance, one message to all ranks and one from all
    sequence: int       # of attention between the ranks of a sequence: one message to all of them and one from all
    links: int = 0      # tensors between the stages of a pipeline
    step: int = 0       # of the optimizer, while it steps

    @property
    def state(self) -> int:
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return sum(self)


def memory(config: Config, device: str = "cuda", stage: int | None = None) -> Memory:
    """Of the first rank of a stage, None: of the one that holds most, on a device of this kind: "cuda" or "cpu"."""
    if stage is None:
        return max((memory(config, device, stage) for stage in makes(config)), key=lambda held: held.total)
    pieces = stages(config)[stage]
    share, real = Share.of(config, stage), widths(config)[0]
    each, work = [saved(config, device, piece) for piece in pieces], again(config, device, pieces)
    live = alive(config, stage, [sum(size) for size in each])
    activations, cast = (sum(n * size for n, size in zip(live, sizes, strict=True)) + more
                         for sizes, more in zip(zip(*each, strict=True), work, strict=True))
    cast, moves = cast + halves(config, pieces), cost(config, stage)
    return Memory(share.parameters * real, share.trained * real, moves.state + moves.host * (device == "cpu"),
                  activations, head(config, device) if ends(config.model, pieces)[1] else 0, whole(config, pieces),
                  cast, exchange(config, pieces), sequence(config), links(config, device, pieces), moves.work)


def fullest(config: Config, device: str = "cuda") -> int:
    """The stage whose ranks hold most."""
    return max(makes(config), key=lambda stage: memory(config, device, stage).total)


class Saved(NamedTuple):
    """Bytes of a micro-batch between the forward and the backward of a piece of the model."""
    activations: int
    cast: int       # weights in a copy of its own, where autocast makes one in every forward


def saved(config: Config, device: str, piece: range) -> Saved:
    """What the forward leaves to the backward; with recomputation, what that begins with."""
    c, t = config.model, config.train
    real, half = widths(config)
    (T, inside), size = tokens(config), 0
    for (sparse, window), count in blocks(c, (piece,)).items():
        shared, own = mask(config, window, device)
        size += shared
        if t.recompute:
            size += count * T * c.dim * real
        else:
            size += count * (block(config, sparse, window, device) + own)
    if c.position == "rope" and (t.recompute or half == 8):     # RoPE's angles in fp64
        size += 8 * places(config) * c.rope_columns
    if ends(c, (piece,))[1]:    # the last norm; the gradients of the head's input and matrix, which its forward makes
        size += norm(config) + half * (inside + -(-c.vocab_size // config.mesh.tp) * head_moves(c)) * c.dim
    return Saved(size, 0 if t.recompute else sum(count * size for size, count in casts(config, (piece,))))


def again(config: Config, device: str, pieces: Pieces) -> Saved:
    """What recomputation makes again of one block at a time."""
    each = blocks(config.model, pieces)
    if config.train.recompute:
        return Saved(max((block(config, *kind, device) for kind in each), default=0)
                     + sum(mask(config, window, device)[1] for _, window in each),
                     max((size for size, _ in casts(config, pieces)), default=0))
    return Saved(max((core(config, window, device)[1] for _, window in each), default=0), 0)


def block(config: Config, sparse: bool, window: int, device: str) -> int:
    """One block with all that it saves."""
    c, moe = config.model, config.model.moe
    inner = routed(config, device) if sparse else mlp(config, c.hidden)
    if sparse and moe.shared_hidden:
        inner += mlp(config, moe.shared_hidden, shared=True)
    if sparse and moe.shared_gate:      # what the shared expert gives, its gate
        inner += tokens(config)[0] * widths(config)[1] * (c.dim + 1)
    return 2 * norm(config) + attended(config, window, device) + inner


def norm(config: Config) -> int:
    """One of a block's two, or the last: its input and statistics."""
    c, (real, half) = config.model, widths(config)
    return tokens(config)[0] * real * (c.dim + (1 if c.norm == "rmsnorm" and half == real else 2))


def places(config: Config) -> int:
    """Positions that have angles of their own: where they begin anew in each document, those of every sequence."""
    inside = tokens(config)[1]
    return inside if config.data.reset_positions else inside // config.train.micro_batch


def spans(config: Config, window: int) -> tuple[int, int, int]:
    """(queries, keys, columns of a head) of attention over one sequence, with the keys of the sinks; in a window run by
    run (attention.attend)."""
    c, (asking, asked, _, _) = config.model, met(config)
    columns, past = c.head_width + 8 * c.sinks, asked - asking
    if window:
        runs = -(-(asking + min(past, window)) // window)
        return runs * window, runs * (2 * window + c.sinks), columns
    return asking + (c.sinks and not past), asked + c.sinks, columns


def met(config: Config) -> tuple[int, int, int, int]:
    """What meets in a rank's attention over one sequence: (tokens that ask, tokens that are asked, heads of queries, of
    keys and values). With "gather" the last rank's, which asks all."""
    c, mesh = config.model, config.mesh
    H, G = c.heads // mesh.tp, c.kv_groups // mesh.tp
    if mesh.attention == "gather":
        return c.seq_len // mesh.sp, c.seq_len, H, G
    return c.seq_len, c.seq_len, H // mesh.sp, max(1, G // mesh.sp)


def met_in(config: Config, device: str) -> int:
    """Bytes of an element of queries, keys and values where they meet."""
    _, half = widths(config)
    return computed_in(device, half_dtype(config)).itemsize if device == "cpu" and half == 2 else half


def mask(config: Config, window: int, device: str) -> tuple[int, int]:
    """(of all blocks together, of each): that of a window, for each sequence, and document, again."""
    c, B = config.model, config.train.micro_batch
    row = met_in(config, device) * (2 * window + c.sinks)
    if not window:
        return 0, 0
    if B == 1 and not config.data.reset_attention:
        return -(-c.seq_len // window) * window * row, 0
    return 0, B * spans(config, window)[0] * row


def attended(config: Config, window: int, device: str) -> int:
    """The input of q, k and v, their norms and angles, attention itself."""
    c, tp, inside = config.model, config.mesh.tp, tokens(config)[1]
    real, half = widths(config)
    size = half * inside * c.dim + core(config, window, device)[0]
    if c.position == "rope" and half < 8:               # angles as q and k want them
        size += real * 2 * places(config) * c.rope_columns
    if c.qk_norm:
        wide = c.qk_norm_over == "width"
        for n in (c.heads // tp, c.kv_groups // tp):
            rows, over = (inside, n * c.head_width) if wide else (inside * n, c.head_width)
            width = 2 * real if wide and tp > 1 else half       # made of single ops with tp
            size += rows * (over * width + real)
    return size


def core(config: Config, window: int, device: str) -> tuple[int, int]:
    """(saved of attention itself, made again in the backward): q, k and v after norm, RoPE and sinks; the output; the
    sums of softmax; the input of o. With train.recompute_attention the first is q, k and v before sinks, and the input
    of o."""
    c, B, mesh, documents = config.model, config.train.micro_batch, config.mesh, config.data.reset_attention
    real, half = widths(config)
    asking, asked, H, G = met(config)
    queries, keys, columns = spans(config, window)
    width = met_in(config, device)
    full = B * (width * 2 * (queries * H + keys * G) * columns + queries * H * real)
    copied = half * B * asking * H * c.head_width
    if config.train.recompute_attention:
        given = half * B * (asking * H + 2 * asked * G) * c.head_width
        return given + copied, full - (0 if c.sinks or window or documents or width > half else given)
    # tokens that sinks, fillings of runs, documents or Ulysses have moved come back as a copy, which is o's input
    moved = c.sinks or queries != asking or documents or width > half or (mesh.sp > 1 and mesh.attention == "ulysses")
    return full + (copied if moved else 0), 0


def mlp(config: Config, hidden: int, shared: bool = False) -> int:
    """Of a dense MLP or a shared expert: its input (the latter's is there where it is not gathered), the values before
    the activation and after it."""
    c, tp, half = config.model, config.mesh.tp, widths(config)[1]
    halves, inside = 2 if c.act in GATED else 1, tokens(config)[1]
    inputs = 0 if shared and tp == 1 else c.dim
    return half * inside * (inputs + (halves + 1) * hidden // tp)


def routed(config: Config, device: str) -> int:
    """Router and experts: the router's input, logits, scores and choice, and what jitter, noise and losses add; the
    rows that the experts read, as autocast has them, or a shared expert, its gate or a GPU's router where ranks
    exchange those; the values before the activation of every copy, and where each row goes."""
    c, m, mesh = config.model, config.model.moe, config.mesh
    real, half = widths(config)
    halves, T, K, E = 2 if c.act in GATED else 1, tokens(config)[0], m.top_k, m.experts
    kept = min(1.0, m.capacity_factor or 1.0)
    copied = T * K * kept * mesh.etp                        # the ranks of ep have equal shares
    x = T * c.dim * real
    same_x = not m.jitter and logits.from_halves(torch.device(device), half_dtype(config), torch.float32, T)
    extra = m.noise * E + (m.z_weight > 0) + (E + 2 if m.score == "sigmoid" and m.balance_weight else 0)
    size = x * (0 if same_x else 2 if m.jitter else 1) + T * ((2 * E + extra) * real + K * 4 + 1)
    exchanged = mesh.ep * mesh.etp > 1
    if half < real and (same_x or not exchanged or m.shared_gate or (m.shared_hidden and mesh.tp == 1)):
        size += T * c.dim * half
    if exchanged:
        rows = T * mesh.etp * rows_per_token(E, K, mesh.ep)
        size += rows * (c.dim * half + K * (real + 4))      # x, weights and their place
    else:
        rows = T
        size += T * K * (real + 4) + (x if m.jitter and half == real else 0)
    size += copied * (halves * m.hidden // mesh.etp * half + 4)
    return round(size)


def head_moves(model: ModelConfig) -> bool:
    """Whether the head's matrix is trained."""
    return model.tune.moves("embed_tokens.weight" if model.tied else "lm_head.weight")


def head(config: Config, device: str) -> int:
    """While it works: logits of a chunk; the sum of its matrix's gradient over chunks, in fp32, and the next term; its
    matrix as autocast casts it, if it does."""
    c = config.model
    real, half = widths(config)
    rows = -(-c.vocab_size // config.mesh.tp)
    width = c.dim * ((real + half) * head_moves(c) + (half if half < real and not cast_once(config) else 0))
    return rows * (half * min(chunk_on(device), tokens(config)[1]) + width)


def whole(config: Config, pieces: Pieces) -> int:
    """Of what FSDP gathers and reduces."""
    return _whole(config.model, config.mesh, widths(config), pieces)


@functools.lru_cache(maxsize=256)
def _whole(model: ModelConfig, mesh: MeshConfig, of: tuple[int, int], pieces: Pieces) -> int:
    (real, half), ranks, kept, fetched = of, axes(mesh), 0, collections.Counter()
    for box in boxes_of(model, mesh, pieces):
        if ranks[box.fsdp] > 1:
            size = box.whole * (half if mixed(mesh, box) else real)
            if box.block:
                fetched[box.block] += (2 + box.moves) * size
            else:
                kept += (1 + box.moves) * size
    return kept + max(fetched.values(), default=0)


def mixed(mesh: MeshConfig, box: Box) -> bool:
    """FSDP casts the experts, autocast the rest."""
    return box.fsdp == "efsdp" and mesh.rep * mesh.efsdp > 1


def casts(config: Config, pieces: Pieces) -> list[tuple[int, int]]:
    """Of each kind of block: (what autocast casts of one, how many there are)."""
    real, half = widths(config)
    return _casts(config.model, config.mesh, half, pieces) if half < real and not cast_once(config) else []


@functools.lru_cache(maxsize=256)
def _casts(model: ModelConfig, mesh: MeshConfig, half: int, pieces: Pieces) -> list[tuple[int, int]]:
    sizes, counts = collections.Counter(), {}
    for box in boxes_of(model, mesh, pieces):
        if not mixed(mesh, box) and not box.partial and box.block:
            sizes[box.block] += box.whole * half
            counts[box.block] = box.count
    return [(sizes[block], counts[block]) for block in sizes]


def halves(config: Config, pieces: Pieces) -> int:
    """Of the weights that are cast once, of all parameters that moe_ext.halves takes."""
    c = config.model
    if not cast_once(config):
        return 0
    size = sum(box.count * box.whole for box in boxes_of(c, config.mesh, pieces) if HALVED.search(box.name))
    if c.tied and ends(c, pieces)[1]:
        size += c.vocab_size * c.dim
    return size * widths(config)[1]


def exchange(config: Config, pieces: Pieces) -> int:
    """Of the dispatch, the largest message, sent and received."""
    c, m, mesh = config.model, config.model.moe, config.mesh
    real, half = widths(config)
    if mesh.ep == 1 or not any(sparse for sparse, _ in blocks(c, pieces)):
        return 0
    rows = tokens(config)[0] * mesh.etp * rows_per_token(m.experts, m.top_k, mesh.ep)
    return round(2 * rows * message(c.dim * half, 4 * m.top_k, real * m.top_k))


def sequence(config: Config) -> int:
    """Of queries, keys and values together, or of their gradients: the message sent and the one received."""
    return 2 * widths(config)[1] * tokens(config)[1] * sent_columns(config)[0] if config.mesh.sp > 1 else 0


def links(config: Config, device: str, pieces: Pieces) -> int:
    """Between the stages: a slot for every tensor of a step (windows); or, on a CPU, all that is sent until the step's
    end; and one that comes and one that goes."""
    c, t, mesh = config.model, config.train, config.mesh
    if mesh.pp == 1:
        return 0
    each, kept = t.accumulation * len(pieces), 2
    if config.pipeline.transport == "windows":
        kept += 2 * each
    elif device == "cpu":
        kept += 2 * each - t.accumulation * sum(ends(c, pieces))
    return kept * tokens(config)[0] * c.dim * widths(config)[0]
