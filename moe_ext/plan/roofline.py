"""How long a step takes on a named device: a bound from below, and what this program is likely to need.

The bound takes each of four things at its peak and the others as free: the matrix products of a rank (attention over
the keys that are seen, recomputation and Newton-Schulz included), its memory traffic, and what it sends over the links
of a host and over the network between hosts. What is likely adds the first two up at the shares of the peak that were
measured (SHARES), and of the traffic what has nothing to hide behind.

Ranks are numbered as in moe_ext.parallel.mesh, tp and etp fastest, then sp, so neighbours share a host. A ring of n
ranks that leaves its host takes the network of all its devices; an exchange sends each pair of ranks the same.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from moe_ext.config import Config, ModelConfig, require
from moe_ext.layers.lora import is_factor
from moe_ext.plan import optimizer
from moe_ext.plan.memory import head_moves, saved
from moe_ext.plan.pipeline import turns
from moe_ext.plan.shares import Pieces, Share, axes, blocks, ends, kinds, makes, stages, widths
from moe_ext.plan.traffic import traffic


@dataclass(frozen=True)
class Device:
    """Peaks of a data sheet, products of matrices without sparsity."""
    name: str
    tflops: float       # of bf16 and fp16 with fp32 sums
    tflops_fp32: float
    memory: float       # GB
    bandwidth: float    # of memory, GB/s
    link: float         # to the other devices of a host, GB/s each way
    network: float      # to other hosts, GB/s each way: one adapter of 200, 400 or 100 Gb/s a device, as in the maker's
                        # own servers
    host: float         # to the memory of its own host, GB/s each way: PCIe x16


# NVIDIA's data sheets: A100 (DS-10031, 2021), H100 (2287922, 2023), H200 (3567064, 2024), B200 in HGX B200 (2025), L40S
# (2023), RTX 4090 in the Ada whitepaper (2.01, 2022); NVLink, or PCIe of 4.0 x16 (L40S, RTX 4090) and 5.0 x16.
DEVICES = {d.name: d for d in (
    Device("a100", 312, 19.5, 80, 2039, 300, 25, 32),
    Device("a100-40gb", 312, 19.5, 40, 1555, 300, 25, 32),
    Device("h100", 989, 67, 80, 3350, 450, 50, 64),
    Device("h100-pcie", 756, 51, 80, 2000, 64, 50, 64),
    Device("h200", 989, 67, 141, 4800, 450, 50, 64),
    Device("b200", 2250, 75, 180, 7700, 900, 50, 64),
    Device("l40s", 362, 91.6, 48, 864, 32, 12.5, 32),
    Device("rtx4090", 165, 82.6, 24, 1008, 32, 12.5, 32),
)}
RESERVE = 0.1       # of a device's memory: the CUDA context, libraries, workspaces and what the allocator cannot use


class Shares(NamedTuple):
    """Of the peaks, what this program reaches: in one run on an H200, 1.3 B parameters in 12 layers of width 1024, 8
    experts top-2, bf16, 2 x 16 sequences of 2048. Elsewhere it is a guess."""
    compute: float = 0.27   # 634 ms in matrix products and attention, which at the peak take 171
    memory: float = 0.35    # 148 ms in AdamW, norms, casts and sums, for whose bytes, as counted here, 54 would do
    wires: float = 0.7      # not measured: what collectives usually reach of a link
    eigen: float = 0.02     # not measured, of the fp32 peak: eigendecompositions are mostly matrix-vector products


SHARES = Shares()


class Estimate(NamedTuple):
    """Seconds of a step."""
    compute: float      # these four at their peak
    memory: float
    links: float        # inside hosts
    network: float      # between them
    likely: float

    @property
    def at_least(self) -> float:
        return max(self[:4])

    @property
    def bound(self) -> str:
        """What the bound is bound by."""
        return ("compute", "memory", "links", "network")[self[:4].index(self.at_least)]


def keys_seen(model: ModelConfig, causal: bool = True, pieces: Pieces | None = None, parts: int = 1) -> float:
    """The keys that a token's attention reads, summed over layers, on average over the tokens of the last of so many
    equal parts of a sequence; if not causal, those that come later too, as GPT.flops_per_token counts them."""
    S, total = model.seq_len, 0.0
    for (_, window), count in blocks(model, pieces).items():
        w = window or S
        growing = max(0, w - S + S // parts)        # of the part's tokens, those that see one more than the one before
        total += count * (w - growing * (growing - 1) / 2 * parts / S if causal else w)
    return total


def forward_flops(model: ModelConfig, causal: bool = True, pieces: Pieces | None = None,
                  parts: int = 1) -> tuple[float, float]:
    """Of the matrix products of one token, parts as in keys_seen: (in the blocks, in the head)."""
    weights = sum(weight_flops(model, pieces))
    head = 2 * model.vocab_size * model.dim if ends(model, pieces)[1] else 0
    return weights + attention_flops(model, causal, pieces, parts), head


def weight_flops(model: ModelConfig, pieces: Pieces | None = None) -> tuple[float, float]:
    """Of them, those of the blocks' matrices: (of frozen ones, of those that move)."""
    flops = [0.0, 0.0]
    for name, shape, moves, count in kinds(model, pieces):
        matrix = name.endswith(("weight", "E2FD", "EDF")) or is_factor(name)
        if name.startswith("layers.") and matrix and len(shape) > 1:
            active = model.moe.top_k / model.moe.experts if ".experts." in name else 1
            flops[moves] += 2 * count * math.prod(shape) * active
    return tuple(flops)


def training_flops(model: ModelConfig, causal: bool = True, pieces: Pieces | None = None, parts: int = 1) -> float:
    """Of one token in the forward and the backward, which makes no gradient of a frozen matrix."""
    inner, head = forward_flops(model, causal, pieces, parts)
    return 3 * (inner + head) - weight_flops(model, pieces)[0] - head * (not head_moves(model))


def attention_flops(model: ModelConfig, causal: bool = True, pieces: Pieces | None = None, parts: int = 1) -> float:
    """Of them, those of queries with keys and of scores with values."""
    return 4 * model.heads * model.head_width * keys_seen(model, causal, pieces, parts)


def share_of_optimizer(config: Config, device: Device, per_host: int = 8, shares: Shares = SHARES,
                       only: str = "") -> float:
    """Of a step's likely time, that of the stage whose optimizer takes longest. only: of one of several, as "Muon"."""
    longest = max(of_optimizer(config, stage, device, per_host, shares, only).likely for stage in makes(config))
    return longest / estimate(config, device, per_host, shares).likely


def estimate(config: Config, device: Device, per_host: int = 8, shares: Shares = SHARES) -> Estimate:
    """Of a step, which takes as long as the stage that has the most to do. Errors: ConfigError for fp64, which has no
    CUDA kernels."""
    require(config.train.dtype != "fp64", "train.dtype is fp64, which has no CUDA kernels: plan with bf16, fp16 or "
            "fp32")
    each = [of_stage(config, stage, device, per_host, shares) for stage in makes(config)]
    return Estimate(*(max(times) for times in zip(*each, strict=True)))


def of_stage(config: Config, stage: int, device: Device, per_host: int, shares: Shares) -> Estimate:
    """A step of the ranks of one stage."""
    t, mesh, pieces = config.train, config.mesh, stages(config)[stage]
    real, half = widths(config)
    parts = mesh.sp if mesh.attention == "gather" else 1        # whose last rank all wait for
    inner, _ = forward_flops(config.model, pieces=pieces, parts=parts)
    again = inner * t.recompute + attention_flops(config.model, pieces=pieces, parts=parts) * t.recompute_attention
    flops = config.tokens_per_step / mesh.stage * (training_flops(config.model, True, pieces, parts) + again)
    compute = flops / (device.tflops if half < real else device.tflops_fp32) / 1e12
    share = Share.of(config, stage)
    whole = replace(config, train=replace(t, recompute=False, recompute_attention=False))
    kept = sum(saved(whole, "cuda", piece).activations for piece in pieces)
    weights = t.accumulation * share.whole * (2 * half + real)
    busy = 1 - turns(config)[0]           # the share of a step's forwards and backwards in which a stage computes
    state = optimizer.cost(config, stage).moved
    memory = (state + (weights + t.accumulation * 2 * kept) / busy) / device.bandwidth / 1e9

    strides = {"pp": mesh.stage, "rep": mesh.shards * mesh.tp, "fsdp": mesh.tp, "efsdp": mesh.ep * mesh.etp,
               "ep": mesh.etp, "dp": mesh.sequence, "sp": mesh.tp}
    ranks, exchanges = axes(mesh), ("ep", "sp") if mesh.attention == "ulysses" else ("ep",)
    links, network, hidden, waited, each = 0.0, 0.0, 0.0, 0.0, traffic(config, stage)
    for axis in ranks:
        sent = each[axis]
        on_link, on_network = wires(sent, ranks[axis], strides.get(axis, 1), per_host, exchange=axis in exchanges)
        on_link, on_network = on_link / device.link / 1e9, on_network / device.network / 1e9
        links, network = links + on_link, network + on_network
        time = max(on_link, on_network)
        if axis in ("pp", "rep", "fsdp", "efsdp"):
            hidden += time
        else:
            waited += time
        if axis == "pp":        # all stages wait for the first micro-batch's way there and the last one's way back
            waited += time * (mesh.pp - 1) / (t.accumulation * len(pieces))
    # each value saved is written and read by the forward, again if that is recomputed, and its gradient by the backward
    moved = weights + t.accumulation * (4 + 2 * t.recompute) * kept
    computing = (compute / shares.compute + moved / device.bandwidth / 1e9 / shares.memory) / busy
    moves = of_optimizer(config, stage, device, per_host, shares)
    computing += moves.likely
    return Estimate(compute / busy + moves.compute, memory, links + moves.links, network + moves.network,
                    computing + waited / shares.wires + max(0.0, hidden / shares.wires - computing))


def of_optimizer(config: Config, stage: int, device: Device, per_host: int, shares: Shares,
                 only: str = "") -> Estimate:
    """Of the optimizer's step of one stage, which begins when all gradients are there: matrices travel while others are
    computed; what is kept on the host comes and goes one after the other, for which nothing is faster than `host`."""
    moves, mesh = optimizer.cost(config, stage, only), config.mesh
    fp32 = (moves.fp32 + moves.fp64) / device.tflops_fp32 / 1e12    # fp64 as fp32, as the A100, H100 and H200 have it
    products, eigen = moves.bf16 / device.tflops / 1e12 + fp32, moves.eigen / device.tflops_fp32 / 1e12
    memory, host = moves.moved / device.bandwidth / 1e9, moves.carried / device.host / 1e9
    dense = wires(moves.dense, mesh.stage, 1, per_host, exchange=True)
    experts = wires(moves.experts, mesh.rep * mesh.efsdp * mesh.etp, mesh.ep, per_host, exchange=True)
    links, network = (sum(way) / speed / 1e9 for way, speed in zip(zip(dense, experts, strict=True),
                                                                  (device.link, device.network), strict=True))
    computing = products / shares.compute + eigen / shares.eigen
    likely = max(computing, max(links, network) / shares.wires) + memory / shares.memory + host / shares.wires
    return Estimate(products + eigen, memory, links, network, likely)


def wires(sent: float, ranks: int, stride: int, per_host: int, exchange: bool = False) -> tuple[float, float]:
    """Of the bytes that a rank sends in a group of so many ranks, each `stride` after the last: (those over its link,
    those over its own network adapter)."""
    if ranks * stride <= per_host or ranks == 1:
        return sent, 0.0
    here = max(1, per_host // stride)       # of the group, on one host
    if exchange:
        away = sent * (ranks - here) / (ranks - 1)
        return sent - away, away
    return (sent if here > 1 else 0.0), sent * min(stride, per_host) / per_host
