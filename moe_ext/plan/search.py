"""The best mesh on N devices: each mesh that the model accepts, with the largest micro-batch that fits, by likely time.

The step stays the same: micro_batch * accumulation * the data-parallel ranks are the global batch, and where balance
and capacity are taken over the micro-batch of all ranks, accumulation stays too. Each mesh is tried with and without
recomputation.
"""
from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from moe_ext.config import Config, ConfigError, MeshConfig, divisors
from moe_ext.plan.memory import Memory, memory
from moe_ext.plan.roofline import RESERVE, SHARES, Device, Estimate, Shares, estimate

MOST = 10_000       # devices


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
    c, moe = config.model, config.model.moe
    experts, wide = moe.experts or 1, math.gcd(c.dim, moe.hidden) if moe.experts else 0
    widths = [c.seq_len, c.heads, c.kv_groups, moe.shared_hidden]
    widths += [c.hidden] if not moe.experts or moe.dense_layers else []
    parts = [tp for tp in divisors(devices) if not any(width % tp for width in widths)]
    ways = divisors(math.gcd(experts, devices))
    for tp in parts:
        for fsdp in divisors(devices // tp):
            for etp in sorted({1, tp}) if moe.experts else [1]:
                for ep in ways:
                    efsdp, rest = divmod(fsdp * tp, ep * etp)
                    if rest or (wide and wide % efsdp):
                        continue
                    mesh = MeshConfig(rep=devices // tp // fsdp, fsdp=fsdp, tp=tp, ep=ep, etp=etp,
                                      transport=config.mesh.transport if ep > 1 else "torch")
                    if batches := micro_batches(config, mesh):
                        try:
                            yield on(config, mesh, batches[0])
                        except ConfigError:     # what else a Config asks for
                            pass


def micro_batches(config: Config, mesh: MeshConfig) -> list[int]:
    """Those that leave the global batch as it is, smallest first."""
    each, rest = divmod(config.sequences_per_step, mesh.dp)
    if rest:
        return []
    if config.model.moe.experts and config.model.moe.scope == "micro_batch":
        return [each // config.train.accumulation] if each % config.train.accumulation == 0 else []
    return divisors(each)


def on(config: Config, mesh: MeshConfig, micro_batch: int, recompute: bool | None = None) -> Config:
    """The same step on another mesh."""
    t = config.train
    accumulation = config.sequences_per_step // (micro_batch * mesh.dp)
    return replace(config, mesh=mesh, train=replace(
        t, micro_batch=micro_batch, accumulation=accumulation,
        recompute=t.recompute if recompute is None else recompute))


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


def search(config: Config, devices: int, device: Device, per_host: int = 8,
           shares: Shares = SHARES) -> list[Candidate]:
    """What fits, the likely fastest first; of equals the simpler mesh. Errors: ConfigError if no mesh of so many
    devices is one for this model and batch."""
    found, meshes = [], 0
    for start in accepted(config, devices):
        meshes += 1
        ways = filter(None, (largest(start, device, recompute) for recompute in (False, True)))
        timed = [Candidate(way, memory(way), estimate(way, device, per_host, shares)) for way in ways]
        found += [min(timed, key=lambda way: way.time.likely)] if timed else []
    if not meshes:
        raise ConfigError(no_mesh(config, devices))
    return sorted(found, key=lambda way: (way.time.likely, tuple(way.config.mesh.sizes.values())))


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
