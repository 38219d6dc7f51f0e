"""When one rank of a run fails, every rank ends: soon, with one sentence, with exit status 1.

    store, rank, world = join(timeout=120.0)                                # torchrun's store, which outlives rank 0
    with Watch(store, rank, world, timeout=120.0, hint=resumable) as watch: # before anything that can fail or wait
        dist.init_process_group(store=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
        agree(store, rank, world, facts(config, resume=resume))             # ConfigError on all ranks, or on none
        ..
        watch.at("step 12")                                                 # for the sentence; 20 us
        ..
        dist.destroy_process_group()                                        # no thread of gloo may outlive Python

    error: rank 1 (pid 4242 on node7) died in step 12 (killed or crashed); rank 0 was in step 12; --resume auto ..

What failed                                 Who notices, and when
    a rank raises                           it says so itself, before it ends; its own exception goes on as usual
    a process dies                          its neighbour: at once on the same host, otherwise by the heartbeat
    a process stops, a host is cut off      its neighbour, after `timeout` seconds without a heartbeat
    a rank waits or computes for ever       the others' collectives, given the same timeout: one that raises. Then each
                                            thread looks what its rank is at, and who waits for nobody is named

A thread of each rank writes a heartbeat into the store, looks for the first failure reported there, and watches the
next rank that has not left: work per rank does not grow with the world. When it learns of a failure it gives the main
thread a moment to come out by itself (a RankFailure, raised on leaving the `with`) and then prints the sentence and
ends the process, for the main thread may be in a collective that nobody will join.

A RuntimeError may be what a collective says when another rank is gone. It raises the alarm: for PATIENCE beats the
others look for a rank that has fallen silent, and only if there is none is the RuntimeError itself the failure. So a
thread must get to run: one C call that holds the GIL for longer than `timeout` is taken for a stop.

torchrun sends SIGTERM to the other ranks 0.1 s after one has died. It is held back from ending a process before the
sentence; a handler of your own (moe_ext.train.Stop) stays in force. A rank that leaves early is not missed; rank 0
leaves last, because without torchrun its process holds the store.
"""
from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import moe_ext
from moe_ext.config import Config, ConfigError

PATIENCE = 6            # beats of silence that convict a rank once another one has had a RuntimeError
LINGER = 20             # seconds within which a process that has lost another rank must have ended
LEFT = "left"           # the last heartbeat of a rank that ended well
EXCHANGE = re.compile(r"/torch/distributed/(?!tensor/)|/moe_ext/parallel/(links|transport)\.py:"
                      r"|/moe_ext/(optim/owners|checkpoint)\.py:arrived$")       # files and functions that wait
LATE = re.compile(r"timed? ?out|within [\d.]+ s", re.I)      # in the words of one that has waited long enough


def join(timeout: float) -> tuple[dist.Store, int, int]:
    """(store, rank, world) as torchrun's environment has them; `timeout`: seconds to wait for the store."""
    store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    # after a restart (--max-restarts) the store still holds the keys of the attempt that failed
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store), rank, world


class RankFailure(RuntimeError):
    """Another rank failed; the message is the sentence: which rank, what happened, where this one was, what next."""


class Watch:
    """Between enter and exit the ranks answer for each other.

    store    a torch.distributed store that all ranks share and that serves no other Watch
    timeout  seconds without a heartbeat after which a rank is given up
    hint     () -> str: what to do next, the end of the sentence; called from another thread
    Errors: RankFailure on leaving, if another rank has failed and this one has no exception of its own to raise.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, timeout: float, hint=str):
        self.store = dist.PrefixStore("watch", store)
        self.rank, self.world, self.timeout, self.hint = rank, world, timeout, hint
        self.interval = min(0.5, timeout / 20)          # seconds between heartbeats
        self.where, self.beats = "start-up", 0
        self.error = self.failure = None                # what this rank has raised; what another one has reported
        self.leaving, self.answered = threading.Event(), threading.Event()

    def __enter__(self):
        if self.world > 1:
            self.store.set(f"{self.rank}/who", json.dumps([os.getpid(), socket.gethostname(), pid_space()]))
            self.at(self.where)
            self.wake = os.eventfd(0)
            self.guard_sigterm = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            if self.guard_sigterm:
                signal.signal(signal.SIGTERM, self._terminated)
            self.thread = threading.Thread(target=self._run, args=(self.store.clone(),), name="watch", daemon=True)
            self.thread.start()
        return self

    def at(self, where: str) -> None:
        """Say where this rank is now, as "step 12"."""
        self.where = where
        if self.world > 1:
            self.store.set(f"{self.rank}/at", where)    # from here, not by the thread: a kill may come right after

    def __exit__(self, kind, error, trace):
        if self.world == 1:
            return
        good_end = error is None or (isinstance(error, SystemExit) and not error.code)
        self.error = None if good_end else error
        self.leaving.set()
        os.eventfd_write(self.wake, 1)
        beats = None
        while not self.answered.wait(self.timeout / 2) and beats != self.beats:
            beats = self.beats
        if self.answered.is_set():
            self.thread.join()      # and drops its store: done while Python finalizes, that aborts the process
            os.close(self.wake)
        else:
            self.failure = f"the store of the run has not answered for {self.timeout:g} s"
        if self.guard_sigterm and good_end and not self.failure:    # else not even now: the sentence is not printed yet
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.failure and (good_end or isinstance(error, RuntimeError)):
            raise RankFailure(self._sentence()) from error

    def _terminated(self, number, frame):
        if not self.leaving.is_set():
            raise RankFailure("ended by SIGTERM")       # a RuntimeError: most likely because another rank has failed

    def _sentence(self) -> str:
        return "; ".join(filter(None, (self.failure, f"rank {self.rank} was in {self.where}", self.hint())))

    # ---- the thread --------------------------------------------------------------------------------------------------
    def _run(self, store):
        try:
            self.failure = self._guard(store)
        except Exception as error:                      # whatever it is, a rank must not go on unwatched
            self.failure = f"the store of the run is gone, with the process that held it ({first_line(error)})"
        if self.failure:
            faulthandler.dump_traceback_later(LINGER, exit=True, file=2)    # ends the process even without the GIL
        if self.failure or self.error:
            time.sleep(2 * self.interval)               # the main thread may come, and others still read the store
        if self.failure and not self.leaving.is_set():
            os.write(2, f"error: {self._sentence()}\n".encode())
            sys.stdout.flush()
            os._exit(1)
        self.answered.set()

    def _guard(self, store) -> str | None:
        """Watch until this rank has left or has reported its own failure: None; or until another one's is known."""
        neighbour, now, alarm = Neighbour(self.rank, self.world), time.monotonic(), None
        while True:
            self.beats += 1
            store.set(f"{self.rank}/beat", str(self.beats))
            if store.check(["failure"]):
                return store.get("failure").decode()
            before, now = now, time.monotonic()
            alarm = alarm or (now if store.check(["alarm"]) else None)
            if alarm:
                store.set(f"{self.rank}/waits", str(self._waits()))
            patience = PATIENCE * self.interval if alarm else self.timeout

            if self.leaving.is_set() and self.error is None:
                if self.rank > 0 or store.add("left", 0) == self.world - 1:
                    store.set(f"{self.rank}/beat", LEFT)
                    store.add("left", 1)                # answered, so the line before has arrived as well
                    return None
            elif self.leaving.is_set():
                mine = f"failed in {self.where}: {type(self.error).__name__}: {first_line(self.error)}"
                if isinstance(self.error, RuntimeError) and not alarm:
                    store.set("alarm", f"rank {self.rank} {mine}")
                elif not isinstance(self.error, RuntimeError) or now > alarm + patience + 2 * self.interval:
                    if late := self._late(store):
                        return report(store, f"{late}, and rank {self.rank} {mine}")
                    mine = f"{name(store, self.rank)} {mine}"
                    first = report(store, mine)
                    return None if first == mine else first

            verdict = neighbour.look(store, min(now - before, 2 * self.interval), patience)
            if verdict:
                return report(store, verdict)
            neighbour.dead = self._sleep(neighbour.pid)

    def _waits(self) -> bool:
        """Whether this rank is not who keeps the others waiting: it has raised or left, or is in an exchange."""
        frame = sys._current_frames().get(threading.main_thread().ident)
        while frame and not EXCHANGE.search(f"{frame.f_code.co_filename}:{frame.f_code.co_name}"):
            frame = frame.f_back
        return self.leaving.is_set() or frame is not None

    def _late(self, store) -> str:
        """Who has kept others waiting until the first of them gave up; "" if none did, or if nobody can be told."""
        late = [rank for rank in range(self.world) if read(store, f"{rank}/waits") == str(False)]
        if not late or not isinstance(self.error, RuntimeError) or not LATE.search(read(store, "alarm")):
            return ""
        return f"{name(store, late[0])} kept the others waiting in {read(store, f'{late[0]}/at')}"

    def _sleep(self, pid: int | None) -> bool:
        """Until the next beat, or until the main thread leaves or process `pid` dies; whether it is dead."""
        poll = select.poll()
        poll.register(self.wake, select.POLLIN)
        with contextlib.ExitStack() as stack:
            pidfd = None
            if pid is not None:
                try:
                    pidfd = os.pidfd_open(pid)
                except ProcessLookupError:
                    return True
                stack.callback(os.close, pidfd)
                poll.register(pidfd, select.POLLIN)     # readable once the process has ended, reaped or not
            ready = {fd for fd, _ in poll.poll(1000 * self.interval)}
        if self.wake in ready:
            os.eventfd_read(self.wake)
        return pidfd in ready


class Neighbour:
    """The next rank in the ring that has not left, as this one sees it; itself, once all others have left."""

    def __init__(self, me: int, world: int):
        self.me, self.world, self.rank = me, world, me
        self.next()

    def next(self):
        self.rank = (self.rank + 1) % self.world
        self.beat, self.silence = "", 0.0               # its last heartbeat, and for how many seconds there was none
        self.known, self.pid, self.dead = False, None, False    # pid: only of a process of this host

    def look(self, store, elapsed: float, patience: float) -> str | None:
        """What has become of it, if it is lost. elapsed: seconds since the last look, cut where this rank itself was
        stopped: then its neighbour may have been too."""
        while self.rank != self.me and (beat := read(store, f"{self.rank}/beat")) == LEFT:
            self.next()
        if self.rank == self.me:
            return None
        self.silence = self.silence + elapsed if beat == self.beat else 0.0
        self.beat = beat
        if not self.known and (who := read(store, f"{self.rank}/who")):
            pid, _, space = json.loads(who)
            self.known, self.pid = True, pid if space == pid_space() else None
        where = read(store, f"{self.rank}/at")
        if self.dead:
            return f"{name(store, self.rank)} died in {where} (killed or crashed)"
        if self.silence > patience:
            alarm = read(store, "alarm")
            return (f"{name(store, self.rank)} has given no sign of life for {self.silence:.1f} s in {where}"
                    if self.known else f"rank {self.rank} has not started within {self.silence:.1f} s"
                    ) + (f", and {alarm}" if alarm else "")
        return None


def report(store, failure: str) -> str:
    """Make `failure` known, unless an earlier one is; returns the one that is."""
    return store.compare_set("failure", "", failure).decode()


def read(store, key: str) -> str:
    """The value of `key`, "" if there is none: a store's get would wait for it."""
    return store.get(key).decode() if store.check([key]) else ""


def name(store, rank: int) -> str:
    pid, host, _ = json.loads(store.get(f"{rank}/who"))
    return f"rank {rank} (pid {pid} on {host})"


def pid_space() -> str:
    """Where this process's pid is valid: host names repeat, and so do pids between containers."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or "no message"


# ---- agreement at the start ------------------------------------------------------------------------------------------
def facts(config: Config, **more: str) -> dict:
    """What must be the same on all ranks: every field of the recipe, the versions, and `more` (as resume="auto")."""
    flat = {}

    def walk(node, prefix):
        for field, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{field}.")
            else:
                flat[prefix + field] = value

    walk(dataclasses.asdict(config), "")
    return flat | {"the version of torch": torch.__version__, "the version of moe_ext": moe_ext.__version__} | more


def agree(store: dist.Store, rank: int, world: int, facts: dict) -> None:
    """ConfigError on every rank if `facts` (name -> what JSON can hold) differ on any. Collective; waits as long as
    the store does, or until a Watch ends it."""
    store = dist.PrefixStore("agree", store)
    mine = {name: json.dumps(value) for name, value in facts.items()}
    if rank > 0:
        first = json.loads(store.get("0"))
        store.set(str(rank), json.dumps({name: mine.get(name, "absent") for name in first | mine
                                         if mine.get(name) != first.get(name)}))
    else:
        store.set("0", json.dumps(mine))
        differ = {}                                     # name -> value -> the ranks that have it
        for other in range(1, world):
            for name, value in json.loads(store.get(str(other))).items():
                differ.setdefault(name, {}).setdefault(value, []).append(other)
        store.set("verdict", "; ".join(
            f"{name} is {mine.get(name, 'absent')} on rank 0"
            + "".join(f" and {value} on {ranks_in_words(ranks)}" for value, ranks in values.items())
            for name, values in differ.items()))
    if verdict := store.get("verdict").decode():
        raise ConfigError(f"ranks disagree: {verdict}; start all ranks with the same recipe, options and installation")


def ranks_in_words(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"
