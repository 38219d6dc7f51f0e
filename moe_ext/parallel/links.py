"""Tensors between the stages of a pipeline: activations to the next one, their gradients to the one before.

A tensor's id is the Action that takes it: ("F", chunk, micro) an activation, ("B", chunk, micro) a gradient, `chunk` of
the stage that gets it. All have one shape and dtype, known beforehand. Every rank of a stage exchanges its own with the
rank in its place of the next stage and of the one before.

    links = open_links(mesh, "torch", chunks=2, micros=8, shape=(2, 1024, 512), dtype=torch.float32)
    links.begin(step)                   # a new step, whose number is greater; nothing of it has arrived
    links.send(action, x)               # to the stage that takes it; x may be written again
    x = links.take(action)              # a new tensor; waits for it, where it has not arrived
    action = links.agree(choose)        # dynamic schedules: the next action, the same on all ranks of the stage
    links.end()                         # of the step: all that was sent has been taken
    links.waited, links.sending         # seconds since begin that take and agree have waited, and that send has taken
    links.close()

agree calls choose(arrived) on the stage's first rank, its leader, until it returns an Action; the others get that one.
arrived(action): whether its tensor has come to ALL ranks of the stage; such a one is taken without a wait.
"""
import socket
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from moe_ext.parallel.failure import pid_space
from moe_ext.parallel.schedule import Action

_library = torch.library.Library("moe_wire", "FRAGMENT")
for _schema in (
    "slots_open(Tensor like, int ranks, int rank, int stage, int n, int bytes, float seconds) -> (int, Tensor)",
    "slots_join(Tensor like, int slots, Tensor handles) -> ()",
    "slots_begin(Tensor like, int slots, int step) -> ()",
    "slots_end(Tensor like, int slots) -> ()",
    "slots_send(Tensor x, int slots, int slot, int delay) -> ()",
    "slots_take(Tensor(a!) x, int slots, int slot) -> ()",
    "slots_arrived(Tensor like, int slots, int[] awaited, int n) -> Tensor",
    "slots_decide(Tensor like, int slots, int slot) -> ()",
    "slots_decision(Tensor like, int slots) -> int",
    "slots_waited(Tensor like, int slots) -> float",
    "slots_leave(Tensor like, int slots) -> ()",
    "slots_close(Tensor like, int slots) -> ()",
):
    _library.define(_schema)
_wire = torch.ops.moe_wire


def open_links(mesh, transport: str, *, chunks: int, micros: int, shape, dtype,
               delay: Callable[[Action], float] | None = None):
    """The links of this rank; all ranks of the mesh call. micros: the most micro-batches of a step. delay: seconds by
    which a tensor that this rank sends is to come later than it does, for tests and benchmarks."""
    kind = {"torch": TorchLinks, "windows": SlotLinks}[transport]
    return kind(mesh, chunks, micros, torch.Size(shape), dtype, delay)


class Links:
    """What both kinds check, name and time. Slots number the tensors of a step: activations, then gradients."""

    def __init__(self, mesh, chunks, micros, shape, dtype, delay):
        self.mesh, self.chunks, self.micros, self.shape, self.dtype, self.delay = mesh, chunks, micros, shape, dtype, delay
        self.n, self.step, self.sending = chunks * micros, 0, 0.0

    def send(self, action: Action, x):
        if x.shape != self.shape or x.dtype != self.dtype or x.device.type != self.mesh.device.type:
            raise ValueError(f"links.send of {self.name(self.slot(action))}: got {list(x.shape)} {x.dtype} on {x.device}, "
                             f"wanted {list(self.shape)} {self.dtype} on {self.mesh.device.type}, as links were opened for")
        began = time.perf_counter()
        self.put(self.slot(action), x.detach().contiguous(), self.delay(action) if self.delay else 0.0)
        self.sending += time.perf_counter() - began

    def take(self, action: Action):
        return self.get(self.slot(action))

    def slot(self, action: Action) -> int:
        kind, chunk, micro = action
        if kind not in ("F", "B") or not 0 <= chunk < self.chunks or not 0 <= micro < self.micros:
            raise ValueError(f"links know F and B, chunks 0 to {self.chunks - 1} and micro-batches 0 to {self.micros - 1}, "
                             f"not {kind} of chunk {chunk}, micro-batch {micro}; the most micro-batches of a step are "
                             "given to open_links as `micros`")
        return (kind == "B") * self.n + chunk * self.micros + micro

    def action(self, slot: int) -> Action:
        chunk, micro = divmod(slot % self.n, self.micros)
        return Action("FB"[slot >= self.n], chunk, micro)

    def name(self, slot: int) -> str:
        kind, chunk, micro = self.action(slot)
        return f"the {'activations' if kind == 'F' else 'gradients'} of chunk {chunk}, micro-batch {micro}, step {self.step}"


class SlotLinks(Links):
    """The ranks of one host, on CPUs: csrc/slots.c. A tensor is written straight into its slot in the receiver's memory,
    which is 2 * chunks * micros tensors large, and seen there without a message."""

    def __init__(self, mesh, *options):
        super().__init__(mesh, *options)
        if mesh.device.type != "cpu":
            raise ValueError("windows between stages need CPUs yet, the model is on "
                             f"{mesh.device.type}: --pipeline.transport torch")
        self.like, self.slots = torch.empty(0), None
        bytes = self.shape.numel() * self.dtype.itemsize
        slots, handle = _wire.slots_open(self.like, mesh.world, mesh.rank, mesh.config.stage, self.n, bytes, mesh.seconds)
        try:
            mine, every = (handle, pid_space(), socket.gethostname()), [None] * mesh.world
            dist.all_gather_object(every, mine)
            for rank, (_, space, host) in enumerate(every):
                if space != every[0][1]:
                    raise ValueError(f"windows join stages of one host, but rank {rank} is on {host}, rank 0 on "
                                     f"{every[0][2]} (or in another container): --pipeline.transport torch")
            _wire.slots_join(self.like, slots, torch.cat([handle for handle, *_ in every]))
        except BaseException:
            _wire.slots_close(self.like, slots)
            raise
        self.slots = slots

    def call(self, what: str, op, x, *arguments):
        """The op, whose failure says what this rank did."""
        if self.slots is None:
            raise RuntimeError("links are closed")
        try:
            return op(x, self.slots, *arguments)
        except RuntimeError as error:
            raise RuntimeError(f"{error}; rank {self.mesh.rank} was to {what}") from None

    def begin(self, step: int):
        self.call(f"begin step {step}", _wire.slots_begin, self.like, step)
        self.step, self.sending = step, 0.0

    def put(self, slot, x, delay):
        self.call(f"send {self.name(slot)}", _wire.slots_send, x, slot, int(1e9 * delay))

    def get(self, slot):
        x = torch.empty(self.shape, dtype=self.dtype)
        self.call(f"take {self.name(slot)}", _wire.slots_take, x, slot)
        return x

    def agree(self, choose: Callable[[Callable[[Action], bool]], Action | None]) -> Action:
        what = f"agree on the next action of step {self.step}"
        if self.mesh.stage_rank > 0:
            return self.action(self.call(what, _wire.slots_decision, self.like))
        awaited = []
        while True:
            here = self.call(what, _wire.slots_arrived, self.like, awaited, 2 * self.n).tolist()
            awaited = []

            def arrived(action):
                slot = self.slot(action)
                if not here[slot]:
                    awaited.append(slot)
                return bool(here[slot])

            action = choose(arrived)
            if action is not None:
                break
            if not awaited:
                raise RuntimeError(f"rank {self.mesh.rank} has nothing to do in step {self.step}, and waits for nothing")
        if self.mesh.config.stage > 1:
            self.call(what, _wire.slots_decide, self.like, self.slot(action))
        return action

    @property
    def waited(self) -> float:
        return self.call("say how long it waited", _wire.slots_waited, self.like)

    def end(self):
        self.call(f"end step {self.step}", _wire.slots_end, self.like)

    def close(self):
        slots, self.slots = self.slots, None
        if slots is not None:
            try:
                _wire.slots_leave(self.like, slots)
                dist.barrier()
            finally:
                _wire.slots_close(self.like, slots)


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
