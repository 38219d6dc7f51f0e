"""Is this set of ranks in order? Who is where, whether all agree, whether collectives give the right results, how fast.

    wrong: ..   the run would fail or give wrong numbers: exit status 1
    slow: ..    it would run, but not as well as it could
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moe_ext.check.world import Command, Facts, World, first_line, ranks


@dataclass(frozen=True)
class Env(Command):
    """Check the ranks, what they run on, and their collectives."""

    def run(self, world: World) -> bool:
        for fact in world.facts:
            world.say(line(fact))
        for reason in dict.fromkeys(fact.cuda for fact in world.facts):
            world.say(f"CUDA kernels: {reason}")
        wrong = list(faults(world.facts))
        if not wrong:
            with world.joined():
                wrong = collectives(world)
        for sentence in slowness(world.facts):
            world.say(f"slow: {sentence}")
        for sentence in wrong:
            world.say(f"wrong: {sentence}")
        if not wrong:
            world.say(f"ok: {world.size} rank{'s' * (world.size > 1)} on {world.hosts} host{'s' * (world.hosts > 1)}")
        return not wrong


def line(fact: Facts) -> str:
    return (f"rank: {fact.rank}, local rank: {fact.local_rank}, world size: {fact.size}, host: {fact.host}, "
            f"pid: {fact.pid}, device: {fact.device}, backend: {fact.backend}, torch: {fact.torch}, "
            f"moe_ext: {fact.moe_ext}, isa: {fact.isa}, threads: {fact.threads}, cores: {fact.cores}, "
            f"GPUs: {fact.gpus}, CUDA kernels: {'yes' if fact.cuda == 'yes' else 'no'}")


def disagreement(facts: list[Facts], name: str) -> str | None:
    """ "torch: 2.13.0 on ranks 0, 1; 2.12.0 on rank 2", None if all ranks say the same."""
    said = defaultdict(list)
    for fact in facts:
        said[str(getattr(fact, name))].append(fact.rank)
    if len(said) == 1:
        return None
    return f"{name}: " + "; ".join(f"{value} on {ranks(who)}" for value, who in said.items())


def faults(facts: list[Facts]) -> Iterator[str]:
    """What makes a run fail or give wrong numbers."""
    for name, hint in (
        ("size", "every node must be started with the same --nnodes and --nproc-per-node"),
        ("torch", "install the same one on every host"),
        ("moe_ext", "install the same one on every host"),
        ("backend", "every rank needs a GPU, or choose --device cpu"),
    ):
        if said := disagreement(facts, name):
            yield f"ranks disagree on {said}: {hint}"
    for (host, local_rank), times in Counter((fact.host, fact.local_rank) for fact in facts).items():
        if times > 1:
            yield f"{times} ranks on {host} have LOCAL_RANK {local_rank} and would share a device: let torchrun set it"
    hosts = len({fact.host for fact in facts})
    for fact in facts:
        if fact.device.startswith("cuda") and (fact.cuda != "yes" or fact.local_rank >= fact.gpus):
            why = f"{fact.host} has {fact.gpus} GPUs" if fact.cuda == "yes" else fact.cuda
            yield f"rank {fact.rank} cannot use {fact.device}: {why}; start fewer ranks or choose --device cpu"
        if fact.interface and fact.interface not in fact.interfaces:
            yield (f"GLOO_SOCKET_IFNAME of rank {fact.rank} is {fact.interface}, but {fact.host} has "
                   f"{', '.join(fact.interfaces)}: export one of these, or unset it")
        if hosts > 1 and not fact.interface and (not fact.address or fact.address.startswith("127.")):
            yield (f"the name {fact.host} of rank {fact.rank}'s host is {fact.address or 'no address'}, which other "
                   f"hosts do not reach: export GLOO_SOCKET_IFNAME, one of {', '.join(fact.interfaces)}, or mend "
                   "/etc/hosts")


def slowness(facts: list[Facts]) -> Iterator[str]:
    """What makes a run slower than it could be, or its bits depend on the rank."""
    if said := disagreement(facts, "isa"):
        yield f"ranks disagree on {said}: all wait for the slowest, and bits depend on the rank; MOE_ISA sets it"
    for host in dict.fromkeys(fact.host for fact in facts):
        here = [fact for fact in facts if fact.host == host]
        threads, cores = sum(fact.threads for fact in here), max(fact.cores for fact in here)
        if len(here) > cores:
            yield f"{len(here)} ranks share the {cores} cores of {host}: start at most {cores} there"
        elif threads > cores:
            yield (f"{len(here)} ranks use {threads} threads on the {cores} cores of {host}: export "
                   f"OMP_NUM_THREADS={cores // len(here)}")
        if here[0].gpus and here[0].cuda != "yes":
            yield f"{host} has {here[0].gpus} GPUs, but moe_ext does not use them: {here[0].cuda}"


def collectives(world: World) -> list[str]:
    """Prints each collective's verdict and time -> a sentence for each that is wrong. Every value differs from every
    other, so nothing that lands in a wrong place can look right."""
    P, me = world.size, world.rank
    options = dict(dtype=torch.int64, device=world.device)
    everyone = torch.arange(P, **options)
    row_P = 1 + me * P + everyone  # what this rank has for each

    def all_reduce():
        x = everyone + me
        dist.all_reduce(x)
        return x

    def all_gather():
        rows = [torch.zeros(P, **options) for _ in range(P)]
        dist.all_gather(rows, row_P)
        return torch.cat(rows)

    def all_to_all():
        x = torch.zeros(P, **options)
        dist.all_to_all_single(x, row_P)
        return x

    wrong = []
    for call, want in (
        (all_reduce, P * everyone + P * (P - 1) // 2),
        (all_gather, 1 + torch.arange(P * P, **options)),
        (all_to_all, 1 + me + P * everyone),
    ):
        name = call.__name__
        try:
            mine = "" if call().equal(want) else "gives wrong values"
        except RuntimeError as error:
            mine = f"fails ({first_line(error)})"
        said = world.gather(mine)       # what every rank does next, all do
        bad = [rank for rank, words in enumerate(said) if words]
        if bad:
            return [*wrong, f"{name} {said[bad[0]]} on {ranks(bad)}"]
        world.say(f"{name:10}  right, {world.milliseconds(call):.2f} ms")
    return wrong
