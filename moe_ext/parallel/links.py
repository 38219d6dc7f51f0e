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
    links.close()

agree calls choose(arrived) on the stage's first rank, its leader, until it returns an Action; the others get that one.
arrived(action): whether its tensor has come to ALL ranks of the stage; such a one is taken without a wait.
"""
import json
import socket
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from moe_ext.parallel.failure import first_line, pid_space
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
    """What both kinds check and name. A slot is the number of a tensor of a step: activations, then gradients.

    A kind has begin, put and get; look(awaited), which waits until one of the awaited slots' tensors has come to all
    ranks of the stage, if any is given, and says of all slots whether theirs has; decide and follow; end and close.
    """

    def __init__(self, mesh, chunks, micros, shape, dtype, delay):
        self.mesh, self.chunks, self.micros, self.delay = mesh, chunks, micros, delay
        self.shape, self.dtype = shape, dtype
        self.n, self.step, self.inside = chunks * micros, 0, False      # inside a step

    def send(self, action: Action, x):
        slot, device = self.slot(action), self.mesh.device.type
        if x.shape != self.shape or x.dtype != self.dtype or x.device.type != device:
            raise ValueError(f"links.send of {self.name(slot)}: got {list(x.shape)} {x.dtype} on {x.device}, wanted "
                             f"{list(self.shape)} {self.dtype} on {device}, as given to open_links")
        self.put(slot, x.detach().contiguous(), self.delay(action) if self.delay else 0.0)

    def take(self, action: Action):
        return self.get(self.slot(action))

    def agree(self, choose: Callable[[Callable[[Action], bool]], Action | None]) -> Action:
        if self.mesh.stage_rank > 0:
            return self.action(self.follow())
        awaited, here = [], self.look([])

        def arrived(action):
            slot = self.slot(action)
            if not here[slot]:
                awaited.append(slot)
            return bool(here[slot])

        while (action := choose(arrived)) is None:
            if not awaited:
                raise RuntimeError(f"rank {self.mesh.rank} has nothing to do in step {self.step}, and asks for nothing")
            here = self.look(awaited)
            awaited.clear()
        if self.mesh.config.stage > 1:
            self.decide(self.slot(action))
        return action

    def slot(self, action: Action) -> int:
        kind, chunk, micro = action
        if kind not in ("F", "B") or not 0 <= chunk < self.chunks or not 0 <= micro < self.micros:
            raise ValueError(f"links were opened for {self.chunks} chunks and {self.micros} micro-batches, got {kind} "
                             f"of chunk {chunk}, micro-batch {micro}: open_links(.., micros=) is the most of any step")
        return (kind == "B") * self.n + chunk * self.micros + micro

    def action(self, slot: int) -> Action:
        return Action("FB"[slot // self.n], *divmod(slot % self.n, self.micros))

    def name(self, slot: int) -> str:
        kind, chunk, micro = self.action(slot)
        what = "activation" if kind == "F" else "gradient"
        return f"the {what} of chunk {chunk}, micro-batch {micro}, step {self.step}"

    def peer(self, rank: int, slot: int, way: int) -> int:
        """The rank from which `rank` gets the slot's tensor (way -1), or to which it sends such a one (way 1)."""
        return (rank + (way if slot < self.n else -way) * self.mesh.config.stage) % self.mesh.world


class SlotLinks(Links):
    """The ranks of one host: csrc/slots.c, on GPUs cuda/slots.cu too. A tensor is written straight into its slot in the
    receiver's memory, which is 2 * chunks * micros tensors large, and seen there without a message. On GPUs send and
    take queue their copies on the current stream, which is the same at every call; the host waits only until the slot
    is free, or the tensor has come."""

    def __init__(self, mesh, *options):
        super().__init__(mesh, *options)
        self.like, self.slots = torch.empty(0, device=mesh.device), None
        slots, handles = _wire.slots_open(self.like, mesh.world, mesh.rank, mesh.config.stage, self.n,
                                          self.shape.numel() * self.dtype.itemsize, mesh.seconds)
        try:
            every = [None] * mesh.world
            dist.all_gather_object(every, (handles, pid_space(), socket.gethostname()))
            for rank, (_, space, host) in enumerate(every):
                if space != every[0][1]:
                    raise ValueError(f"windows join stages of one host, but rank {rank} is on {host} and rank 0 on "
                                     f"{every[0][2]}, or in another container: --pipeline.transport torch")
            _wire.slots_join(self.like, slots, torch.cat([handles for handles, *_ in every], 1))
        except BaseException:
            _wire.slots_close(self.like, slots)
            raise
        self.slots = slots

    def call(self, what: str, op, x, *arguments):
        """The op, whose failure says what this rank was about to do."""
        if self.slots is None:
            raise RuntimeError("links are closed")
        try:
            return op(x, self.slots, *arguments)
        except RuntimeError as error:
            raise RuntimeError(f"{error}; rank {self.mesh.rank} was to {what}") from None

    def begin(self, step: int):
        self.call(f"begin step {step}", _wire.slots_begin, self.like, step)
        self.step, self.inside = step, True

    def put(self, slot, x, delay):
        self.call(f"send {self.name(slot)}", _wire.slots_send, x, slot, int(1e9 * delay))

    def get(self, slot):
        x = self.like.new_empty(self.shape, dtype=self.dtype)
        self.call(f"take {self.name(slot)}", _wire.slots_take, x, slot)
        return x

    def look(self, awaited):
        what = f"lead its stage in step {self.step}"
        return self.call(what, _wire.slots_arrived, self.like, awaited, 2 * self.n).tolist()

    def decide(self, slot):
        self.call(f"lead its stage in step {self.step}", _wire.slots_decide, self.like, slot)

    def follow(self):
        return self.call(f"follow its stage in step {self.step}", _wire.slots_decision, self.like)

    def end(self):
        self.call(f"end step {self.step}", _wire.slots_end, self.like)
        self.inside = False

    def close(self):
        """Every rank closes, after its last step; one that fails within a step waits for nobody."""
        slots, self.slots = self.slots, None
        if slots is not None:
            try:
                _wire.slots_leave(self.like, slots)
                if not self.inside:
                    dist.barrier()
            finally:
                _wire.slots_close(self.like, slots)


FORWARD, BACKWARD, NOTES, DECISIONS = 0, 2, 4, 5        # tags of announcements; that of a tensor is one more
FOREVER = timedelta(days=1000)
END = -1                                                # announced: the sender's step has ended


class TorchLinks(Links):
    """torch.distributed's point-to-point over gloo, between any hosts; from GPUs by way of the host's memory.

    The sender first announces a tensor's slot, so that receives match whatever its order. While a step lasts, a thread
    for each direction takes in announcements and tensors, until it hears of the sender's end. Where the ranks of a
    stage agree, the others note to the leader what has come, and it tells them what it decides; threads take that in
    too: a message of each rank for a tensor and one to each rank for an action. What is sent is kept until the step's
    end.

    Only the main thread has a deadline: it counts how long it waits, not how long others compute. From its half on
    mesh.store knows who waits for whom, so that at the deadline the rank that keeps all waiting is named; a first
    failure is there for all. Without a store a rank names the one that it waits for itself.
    """

    def __init__(self, mesh, *options):
        super().__init__(mesh, *options)
        self.leader = mesh.rank - mesh.stage_rank
        self.members = range(self.leader, self.leader + mesh.config.stage)
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=mesh.seconds))
        self.store = mesh.store and dist.PrefixStore("links", mesh.store)
        self.changed, self.threads, self.failure = threading.Condition(), [], None

    # ---- a step ------------------------------------------------------------------------------------------------------
    def begin(self, step: int):
        if self.group is None:
            raise RuntimeError("links are closed")
        if step <= self.step:
            raise ValueError(f"step {step} begins after step {self.step}")
        self.join()
        self.step, self.inside = step, True
        self.works, self.sent, self.taken = [], set(), set()
        self.tensors, self.decisions, self.conferring = {}, deque(), False
        self.seen = defaultdict(dict)           # slot -> rank of the stage -> when its tensor counts as arrived there
        for tag, slot in ((FORWARD, 0), (BACKWARD, self.n)):
            self.listen(self.peer(self.mesh.rank, slot, -1), tag, self.receive)

    def put(self, slot, x, delay):
        if slot in self.sent:
            raise RuntimeError(f"{self.name(slot)} has been sent before")
        self.check(f"send {self.name(slot)}")
        to, tag = self.peer(self.mesh.rank, slot, 1), FORWARD if slot < self.n else BACKWARD
        self.sent.add(slot)
        with self.changed:
            self.tell(to, tag, slot, delay)
            self.works.append((to, dist.isend(x.cpu(), to, group=self.group, tag=tag + 1)))

    def get(self, slot):
        mine = self.mesh.rank
        if slot in self.taken:
            raise RuntimeError(f"{self.name(slot)} has been taken before")
        with self.changed:
            self.wait(lambda: self.here(slot, [mine]), lambda: [self.peer(mine, slot, -1)], f"take {self.name(slot)}")
            self.taken.add(slot)
            return self.tensors.pop(slot).to(self.mesh.device)

    def look(self, awaited):
        def missing():
            return [self.peer(p, slot, -1) for slot in awaited for p in self.members if not self.here(slot, [p])]

        with self.changed:
            self.confer()
            if awaited:
                self.wait(lambda: any(self.here(slot, self.members) for slot in awaited), missing,
                          f"lead its stage in step {self.step}")
            return [self.here(slot, self.members) for slot in range(2 * self.n)]

    def decide(self, slot):
        with self.changed:
            for member in self.members[1:]:
                self.tell(member, DECISIONS, slot)

    def follow(self):
        with self.changed:
            self.confer()
            self.wait(lambda: self.decisions, lambda: [self.leader], f"follow its stage in step {self.step}")
            return self.decisions.popleft()

    def end(self):
        what = f"end step {self.step}"
        self.check(what)
        if self.tensors:
            raise RuntimeError(f"step {self.step} ends, but {self.name(min(self.tensors))} has not been taken")
        with self.changed:
            ends = [(self.peer(self.mesh.rank, slot, 1), tag) for slot, tag in ((0, FORWARD), (self.n, BACKWARD))]
            if self.conferring and self.mesh.rank != self.leader:
                ends.append((self.leader, NOTES))
            elif self.conferring:
                ends += [(member, DECISIONS) for member in self.members[1:]]
            for to, tag in ends:
                self.tell(to, tag, END)
            leaving = deque(self.works)
            threading.Thread(target=self.leave, args=[leaving], name="links, leaving", daemon=True).start()
            self.wait(lambda: not leaving, lambda: [to for to, _ in leaving], what)
        self.works, self.inside = [], False

    def close(self):
        """Every rank closes, after its last step; one that fails within a step waits for nobody."""
        group, self.group = self.group, None
        if group is not None and not self.inside and not self.failure:
            self.join()
            dist.barrier(group=group)
            dist.destroy_process_group(group)

    # ---- messages ----------------------------------------------------------------------------------------------------
    def leave(self, leaving):
        """A thread: takes out of `leaving` what has gone. Without a deadline of its own, at which gloo would close all
        connections, so that this rank seemed to have died to the others, and they to it."""
        try:
            while leaving:
                leaving[0][1].wait(FOREVER)
                with self.changed:
                    leaving.popleft()
                    self.changed.notify_all()
        except RuntimeError as error:
            with self.changed:
                self.failure = self.failure or self.lost(leaving[0][0], error)
                self.changed.notify_all()

    def tell(self, to, tag, slot, delay=0.0):
        message = torch.tensor([slot, int(1e9 * delay)])
        self.works.append((to, dist.isend(message, to, group=self.group, tag=tag)))

    def listen(self, source, tag, heard):
        """A thread that calls heard(source, tag, slot, due) for what `source` announces, until the step's end."""
        def get(x, tag):
            dist.irecv(x, source, group=self.group, tag=tag).wait(FOREVER)
            return x

        def run():
            message = torch.empty(2, dtype=torch.int64)
            try:
                while (slot := get(message, tag)[0].item()) != END:
                    tensor = get(torch.empty(self.shape, dtype=self.dtype), tag + 1) if heard == self.receive else None
                    with self.changed:
                        heard(source, slot, time.monotonic() + 1e-9 * message[1].item(), tensor)
                        self.changed.notify_all()
            except RuntimeError as error:
                with self.changed:
                    self.failure = self.failure or self.lost(source, error)
                    self.changed.notify_all()

        thread = threading.Thread(target=run, name=f"links from rank {source}", daemon=True)
        thread.start()
        self.threads.append((source, thread))

    def receive(self, source, slot, due, tensor):
        self.tensors[slot] = tensor
        self.seen[slot][self.mesh.rank] = due
        if self.conferring and self.mesh.rank != self.leader:
            self.tell(self.leader, NOTES, slot, due - time.monotonic())

    def noted(self, source, slot, due, _):
        self.seen[slot][source] = due

    def decided(self, source, slot, due, _):
        self.decisions.append(slot)

    def confer(self):
        """From a step's first agreement on the leader hears of what comes to the others, and they of its choice."""
        if self.conferring or len(self.members) == 1:
            return
        self.conferring = True
        if self.mesh.rank == self.leader:
            for member in self.members[1:]:
                self.listen(member, NOTES, self.noted)
        else:
            self.listen(self.leader, DECISIONS, self.decided)
            for slot, dues in self.seen.items():
                self.tell(self.leader, NOTES, slot, max(0.0, dues[self.mesh.rank] - time.monotonic()))

    def join(self):
        """All have heard that the others' step has ended."""
        for source, thread in self.threads:
            thread.join(self.mesh.seconds)
            if thread.is_alive():
                self.fail(self.late([source]), f"begin a step after step {self.step}")
        self.threads = []
        self.check(f"begin a step after step {self.step}")

    # ---- waits -------------------------------------------------------------------------------------------------------
    def here(self, slot, ranks) -> bool:
        dues, now = self.seen.get(slot, {}), time.monotonic()
        return all(rank in dues and dues[rank] <= now for rank in ranks)

    def wait(self, met, missing, what):
        """Until met(). missing() -> the ranks that are waited for."""
        began, said, seconds = time.monotonic(), False, self.mesh.seconds
        while not met():
            self.check(what)
            now = time.monotonic()
            if now - began > seconds:
                self.fail(self.late(missing()), what)
            if now - began > seconds / 2:
                self.say(missing())
                said = True
            due = min((due for dues in self.seen.values() for due in dues.values() if due > now), default=now + 1)
            self.changed.wait(min(due - now, seconds / 8))
        if said:
            self.say([])

    def say(self, missing):
        """For all to know: whom this rank waits for."""
        with suppress(RuntimeError):            # a store that has gone with its rank
            if self.store:
                self.store.set(str(self.mesh.rank), json.dumps(missing))

    def asked(self, rank) -> list[int]:
        """Whom `rank` waits for; none, if it is not known."""
        with suppress(RuntimeError):
            if self.store and self.store.check([str(rank)]):
                return json.loads(self.store.get(str(rank)))
        return []

    def late(self, missing) -> str:
        """The sentence of a deadline: who keeps the others waiting; one that is waited for, if all wait."""
        found = list(dict.fromkeys(missing))
        for rank in found:
            waits = self.asked(rank)
            found += [other for other in waits if other not in found]
            if not waits:
                break
        else:
            rank = found[0]
        return self.first(f"rank {rank} has sent nothing of what the others wait for within {self.mesh.seconds:g} s")

    def lost(self, rank, error) -> str:
        return self.first(f"rank {rank} has died or ended ({first_line(error)})")

    def first(self, sentence) -> str:
        """The first sentence of any rank, this one's own if that cannot be known."""
        with suppress(RuntimeError):
            if self.store:
                return self.store.compare_set("failure", "", sentence).decode()
        return sentence

    def check(self, what):
        if self.failure:
            self.fail(self.failure, what)

    def fail(self, sentence, what):
        self.failure = sentence
        raise RuntimeError(f"{sentence}; rank {self.mesh.rank} was to {what}")
