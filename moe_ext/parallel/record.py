"""What every rank of a pipeline does, and when: the trace of a real run.

    recorder = Recorder(mesh)                       # all ranks
    with recorder.span(step, "forward", action): .. # of a step: forward, backward, send, wait, sync
    recorder.write("RUN/trace.json")                # all ranks; rank 0 writes (moe_ext.log.trace)

Times are those of CLOCK_MONOTONIC, which all processes of a host share. A rank on another host than rank 0's first
measures how far the two clocks are apart: the fastest of ROUNDS round trips tells it to half its own length, and clocks
drift by some microseconds a second. On CUDA each mark waits for the device, so that times are those of the work and not
of its launch: a traced step is slower there.

A send is drawn where it goes to, from when the sender began with it until it has arrived: when a receiver who waited
for it had it; if nobody waited, when the sender was done with it.
"""
from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist

from moe_ext.log.trace import Event, write
from moe_ext.parallel.schedule import Action

ROUNDS = 20
WAITED = 1e-4       # seconds; a tensor that is taken in less was there before


class Span:
    """A context: one thing that this rank does. action: may be set inside."""

    def __init__(self, recorder: Recorder, step: int, kind: str, action: Action | None):
        self.recorder, self.kind, self.step, self.action = recorder, kind, step, action

    def __enter__(self):
        self.begin = self.recorder.mark()
        return self

    def __exit__(self, *exception):
        self.end = self.recorder.mark()
        self.recorder.spans.append(self)


class Recorder:
    def __init__(self, mesh):
        self.mesh, self.spans = mesh, []
        self.offset = clock_offset(mesh)        # seconds, of rank 0's clock before this one's

    def mark(self) -> float:
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize(self.mesh.device)
        return time.monotonic()

    def span(self, step: int, kind: str, action: Action | None = None) -> Span:
        return Span(self, step, kind, action)

    def gather(self) -> list[Event] | None:
        """The events of all ranks by their beginning, on rank 0; begins anew."""
        own = [(s.kind, s.step, s.action, s.begin + self.offset, s.end + self.offset) for s in self.spans]
        self.spans, every = [], [None] * self.mesh.world if self.mesh.rank == 0 else None
        dist.gather_object(own, every)
        return every and sorted(merge(every, self.mesh.config.stage), key=lambda event: event.begin)

    def write(self, path: Path | str) -> None:
        events = self.gather()
        if events is not None:
            begin = min(event.begin for event in events)
            write(path, (e._replace(begin=e.begin - begin, end=e.end - begin) for e in events),
                  [f"rank {rank}, stage {rank // self.mesh.config.stage}" for rank in range(self.mesh.world)])


def merge(spans_of: list[list[tuple]], stage: int) -> list[Event]:
    """spans_of: (kind, step, action, begin, end) of each rank. stage: ranks of a stage."""
    taken = {(rank, step, action): (begin, end) for rank, spans in enumerate(spans_of)
             for kind, step, action, begin, end in spans if kind == "wait"}
    events = []
    for rank, spans in enumerate(spans_of):
        for kind, step, action, begin, end in spans:
            lane = rank
            if kind == "send":
                lane = (rank + (stage if action.kind == "F" else -stage)) % len(spans_of)
                waits, had = taken[lane, step, action]
                end = had if had - waits > WAITED else min(end, had)
            events.append(Event(lane, kind, *(action[1:] if action else (-1, -1)), begin, end, step))
    return events


def clock_offset(mesh) -> float:
    """What to add to this rank's clock for rank 0's; all ranks call."""
    hosts = [None] * mesh.world
    dist.all_gather_object(hosts, Path("/proc/sys/kernel/random/boot_id").read_text())
    offset = 0.0
    for rank in (rank for rank, host in enumerate(hosts) if host != hosts[0]):
        if mesh.rank == 0:
            answer(mesh, rank)
        elif mesh.rank == rank:
            offset = ask(mesh)
    return offset


def ask(mesh) -> float:
    there = torch.zeros(1, dtype=torch.float64, device=mesh.device)
    trips = []
    for _ in range(ROUNDS):
        begin = time.monotonic()
        dist.send(there, 0)
        dist.recv(there, 0)
        theirs, end = there.item(), time.monotonic()
        trips.append((end - begin, theirs - (begin + end) / 2))
    return min(trips)[1]


def answer(mesh, rank: int) -> None:
    asked = torch.zeros(1, dtype=torch.float64, device=mesh.device)
    for _ in range(ROUNDS):
        dist.recv(asked, rank)
        dist.send(asked.fill_(time.monotonic()), rank)
