"""Tensors between the stages of a pipeline: activations to the next one, their gradients to the one before.

A tensor's id is the Action that takes it: ("F", chunk, micro) an activation, ("B", chunk, micro) a gradient, `chunk` of
the stage that gets it. All have one shape and dtype, known beforehand. Every rank of a stage exchanges its own with the
rank in its place of the next stage and of the one before.

    links = open_links(mesh, "torch", chunks=2, micros=8, shape=(2, 1024, 512), dtype=torch.float32)
    links.begin(step)                   # a new step, whose number is greater; nothing of it has arrived
    links.send(action, x)               # to the stage that takes it; nobody writes into x afterwards
    x = links.take(action)              # a new tensor; waits for it, where it has not arrived
    action = links.agree(choose)        # dynamic schedules: the next action, the same on all ranks of the stage
    links.end()                         # of the step: all that was sent has been taken
    links.waited, links.sending         # seconds since begin that take and agree have waited, and that send has taken
    links.close()

agree calls choose(arrived) on the stage's first rank, its leader, until it returns an Action; the others get that one.
arrived(action): whether its tensor has come to ALL ranks of the stage; such a one is taken without a wait.
"""
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from moe_ext.parallel.schedule import Action


def open_links(mesh, transport: str, *, chunks: int, micros: int, shape, dtype,
               delay: Callable[[Action], float] | None = None):
    """The links of this rank; all ranks of the mesh call. micros: the most micro-batches of a step. delay: seconds by
    which a tensor that this rank sends is to come later than it does, for tests and benchmarks."""
    return {"torch": TorchLinks}[transport](mesh, chunks, micros, tuple(shape), dtype, delay)


class TorchLinks:
    def __init__(self, mesh, chunks, micros, shape, dtype, delay):
        self.group, self.stage, self.pp, self.device = mesh.pipe.get_group("pp"), mesh.pp_rank, mesh.config.pp, mesh.device
        self.micros, self.shape, self.dtype, self.sent = micros, shape, dtype, []

    def begin(self, step: int):
        self.waited = self.sending = 0.0

    def send(self, action: Action, x):
        stage = (self.stage + (1 if action.kind == "F" else -1)) % self.pp
        to, began = dist.get_global_rank(self.group, stage), time.monotonic()
        self.sent.append((x, dist.isend(x, to, group=self.group, tag=self.tag(action))))
        self.sending += time.monotonic() - began

    def take(self, action: Action):
        stage = (self.stage + (-1 if action.kind == "F" else 1)) % self.pp
        x, began = torch.empty(self.shape, dtype=self.dtype, device=self.device), time.monotonic()
        dist.recv(x, dist.get_global_rank(self.group, stage), group=self.group, tag=self.tag(action))
        self.waited += time.monotonic() - began
        return x

    def tag(self, action):
        return 2 * (action.chunk * self.micros + action.micro) + (action.kind == "B")

    def end(self):
        for _, work in self.sent:
            work.wait()
        self.sent = []

    def close(self):
        """Nothing to free."""
