"""The best mesh on N devices: each mesh that the model accepts, with the largest micro-batch that fits, by likely time.

The step stays the same: micro_batch * accumulation * the data-parallel ranks are the global batch, and where balance
and capacity are taken over the micro-batch of all ranks, accumulation stays too. Each mesh is tried with and without
recomputation. Ranks share a sequence, in both forms of attention, as long as each keeps LEAST tokens of it. Pipelines
have 2, 4, 8, .. stages, one chunk on each or four (if there are blocks for them), and the order "interleaved"; of their
micro-batches, of which smaller ones leave a smaller bubble, it is the likely fastest.
"""
from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple, get_args

from moe_ext.config import Config, ConfigError, MeshConfig, PipelineConfig, Sharing, divisors
from moe_ext.parallel.schedule import check
from moe_ext.plan.memory import Memory, memory
from moe_ext.plan.roofline import RESERVE, SHARES, Device, Estimate, Shares, estimate

MOST = 10_000       # devices
LEAST = 1024        # tokens of a sequence that a rank has between the modules, if sp ranks share it


class Candidate(NamedTuple):
    config: Config
    memory: Memory
    time: Estimate


def room(device: Device) -> int:
    """Bytes of a device that a plan may fill."""
    return round((1 - RESERVE) * device.memory * 1e9)


def fits(config: Config, device: Device) -> bool:
    return memory(config).total <= room(device)


def accepted(config: Config, devices: int) -> Iterator[Config]:
    """The config on every mesh of so many devices on which it can be, its global batch in micro-batches of one
    sequence, or as the scope of the balance loss wants them."""
    for pp, pipeline in pipelines(config, devices):
        for mesh in stage_meshes(config, pp, devices // pp):
            if batches := micro_batches(config, mesh, pipeline):
                try:
                    yield on(config, mesh, batches[0], pipeline=pipeline)
                except ConfigError:     # what else a Config asks for
                    pass


def pipelines(config: Config, devices: int) -> Iterator[tuple[int, PipelineConfig]]:
    """(stages, their chunks and order) that are tried."""
    own = replace(config.pipeline, schedule="interleaved", layers="", live=0)
    yield 1, replace(own, chunks=1, trace=0, lines=False)
    pp = 2
    while pp <= config.model.layers and devices % pp == 0:
        for chunks in {1, min(4, config.model.layers // pp)}:
            yield pp, replace(own, chunks=chunks)
        pp *= 2


def stage_meshes(config: Config, pp: int, devices: int) -> Iterator[MeshConfig]:
    """Those that divide the model, with `devices` ranks in each of pp stages."""
    c, moe = config.model, config.model.moe
    experts, wide = moe.experts or 1, math.gcd(c.dim, moe.hidden) if moe.experts else 0
    widths = [c.seq_len, c.heads, c.kv_groups, moe.shared_hidden]
    widths += [c.hidden] if not moe.experts or moe.dense_layers else []
    parts = [tp for tp in divisors(devices) if not any(width % tp for width in widths)]
    ways = divisors(math.gcd(experts, devices))
    for tp in parts:
        for sp, attention in sharings(config, tp, devices // tp):
            for fsdp in divisors(devices // tp // sp):
                for etp in sorted({1, tp}) if moe.experts else [1]:
                    for ep in ways:
                        efsdp, rest = divmod(fsdp * sp * tp, ep * etp)
                        if not rest and not (wide and wide % efsdp):
                            yield MeshConfig(pp=pp, rep=devices // tp // sp // fsdp, fsdp=fsdp, sp=sp, tp=tp, ep=ep,
                                             etp=etp, attention=attention,
                                             transport=config.mesh.transport if ep > 1 else "torch")


def sharings(config: Config, tp: int, most: int) -> Iterator[tuple[int, str]]:
    """(ranks that share a sequence beside tp, how they attend to it) that are tried, up to so many."""
    c = config.model
    yield 1, config.mesh.attention
    for sp in divisors(math.gcd(most, c.seq_len // tp))[1:]:
        if c.seq_len >= LEAST * sp * tp:
            yield from ((sp, attention) for attention in get_args(Sharing))


def micro_batches(config: Config, mesh: MeshConfig, pipeline: PipelineConfig | None = None) -> list[int]:
    """Those that leave the global batch as it is and that the pipeline, None: the config's, takes, smallest first."""
    each, rest = divmod(config.sequences_per_step, mesh.dp)
    if rest:
        return []
    if config.model.moe.experts and config.model.moe.scope == "micro_batch":
        batches = [each // config.train.accumulation] if each % config.train.accumulation == 0 else []
    else:
        batches = divisors(each)
    return [batch for batch in batches if takes(pipeline or config.pipeline, mesh.pp, each // batch)]


def takes(pipeline: PipelineConfig, pp: int, micros: int) -> bool:
    try:
        if pp > 1:
            check(pipeline.schedule, pp, pipeline.chunks, micros, pipeline.live)
    except ConfigError:
        return False
    return True


def on(config: Config, mesh: MeshConfig, micro_batch: int, recompute: bool | None = None,
       pipeline: PipelineConfig | None = None) -> Config:
    """The same step on another mesh, recomputed and in turns as before where these are None."""
    t = config.train
    accumulation = config.sequences_per_step // (micro_batch * mesh.dp)
    recompute = t.recompute if recompute is None else recompute
    return replace(config, mesh=mesh, pipeline=pipeline or config.pipeline, train=replace(
        t, micro_batch=micro_batch, accumulation=accumulation, recompute=recompute,
        recompute_attention=t.recompute_attention and not recompute))


def largest(config: Config, device: Device, recompute: bool) -> Config | None:
    """With the largest micro-batch that fits; memory grows with it."""
    batches, low = micro_batches(config, config.mesh), 0
    high = len(batches)
    while low < high:
        middle = (low + high) // 2
        if fits(on(config, config.mesh, batches[middle], recompute), device):
            low = middle + 1
        else:
            high = middle
    return on(config, config.mesh, batches[low - 1], recompute) if low else None


def fastest(config: Config, device: Device, per_host: int, shares: Shares, recompute: bool) -> Candidate | None:
    """With the largest micro-batch that fits; of a pipeline with a smaller one if that is faster."""
    way = largest(config, device, recompute)
    if way is None:
        return None
    best, time = way, estimate(way, device, per_host, shares)
    smaller = [batch for batch in micro_batches(way, way.mesh) if batch < way.train.micro_batch]
    for batch in reversed(smaller) if way.mesh.pp > 1 else ():
        way = on(config, config.mesh, batch, recompute)
        if (likely := estimate(way, device, per_host, shares)).likely >= time.likely:
            break
        if fits(way, device):
            best, time = way, likely
    return Candidate(best, memory(best), time)


def search(config: Config, devices: int, device: Device, per_host: int = 8,
           shares: Shares = SHARES) -> list[Candidate]:
    """What fits, the likely fastest first; of equals the simpler mesh. Errors: ConfigError if no mesh of so many
    devices is one for this model and batch."""
    found, meshes = [], 0
    for start in accepted(config, devices):
        meshes += 1
        ways = [way for recompute in (False, True) if (way := fastest(start, device, per_host, shares, recompute))]
        found += [min(ways, key=lambda way: way.time.likely)] if ways else []
    if not meshes:
        raise ConfigError(no_mesh(config, devices))
    return sorted(found, key=lambda way: (way.time.likely, tuple(way.config.mesh.sizes.values()),
                                          way.config.pipeline.chunks))


def no_mesh(config: Config, devices: int) -> str:
    near = (n for distance in range(1, MOST) for n in (devices - distance, devices + distance) if 0 < n <= MOST)
    other = next((n for n in near if next(accepted(config, n), None)), None)
    return (f"no mesh of {devices} devices divides this model and its {config.sequences_per_step} sequences per step "
            "(train.accumulation * train.micro_batch * mesh.rep * mesh.fsdp): "
            + (f"the nearest number that has one is {other}, or " if other else "") + "choose another global batch"
            + (", or model.moe.scope sequence" if config.model.moe.scope == "micro_batch" else ""))


def smallest(config: Config, devices: int) -> tuple[Config, Memory]:
    """What needs the least memory on so many devices, whether it fits or not."""
    each = ((c, memory(c)) for start in accepted(config, devices)
            for c in (on(start, start.mesh, micro_batches(start, start.mesh)[0], True),))
    return min(each, key=lambda pair: pair[1].total)


def enough(config: Config, devices: int, device: Device) -> int:
    """The number of devices, doubled as often as it takes, on which something fits; 0: not up to MOST."""
    while devices <= MOST:
        if any(largest(start, device, recompute) for start in accepted(config, devices) for recompute in (True, False)):
            return devices
        devices *= 2
    return 0


def flags(config: Config, base: Config) -> list[str]:
    """The options that make `config` of `base`."""
    result = []

    def compare(node, other, prefix):
        for f in dataclasses.fields(node):
            now, was, name = getattr(node, f.name), getattr(other, f.name), prefix + f.name.replace("_", "-")
            if dataclasses.is_dataclass(now):
                compare(now, was, name + ".")
            elif now != was and isinstance(now, bool):
                result.append("--" + name if now else f"--{prefix}no-{f.name.replace('_', '-')}")
            elif now != was:
                result.append(f"--{name} {shlex.quote(str(now))}")

    compare(config, base, "")
    return result
