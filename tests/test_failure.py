"""One rank of a run fails in every way there is: all ranks end, each with one sentence that names it, with status 1.

The ranks are forked, joined by gloo, and really killed, stopped or left waiting. One that would hang says where and
ends within a minute, and so does its test. Only the silence of a stopped rank takes a timeout to notice.
"""

import faulthandler
import gc
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import fork, run_ranks

import moe_ext
from moe_ext.config import Config, ConfigError, ModelConfig
from moe_ext.parallel import failure
from moe_ext.parallel.failure import LEFT, Neighbour, RankFailure, Watch, agree, facts

HINT = "--resume auto continues from step-000002"


@pytest.fixture
def server():
    """A store that no rank holds, as torchrun's; `server.port` is where."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def client(port):
    return dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))


def run(world, body, folder, store, timeout=60.0, started=None):
    """body(watch, rank, store) under a Watch in `world` forked ranks, or the first `started` of them, ended as
    moe_ext.train ends: an expected error in one sentence. store() makes a rank's store. Returns exit statuses (-9: by
    SIGKILL), what each wrote to stderr, and the pids."""
    pids, (gate, go) = [], os.pipe()
    for rank in range(started or world):
        pid = fork()
        if pid == 0:
            status = 1
            try:
                os.dup2(os.open(folder / f"stderr{rank}", os.O_WRONLY | os.O_CREAT, 0o600), 2)
                faulthandler.dump_traceback_later(60, exit=True, file=2)
                os.close(go)
                os.read(gate, 1)        # until `go` is closed everywhere: all ranks are there
                torch.set_num_threads(1)
                shared = store()
                with Watch(shared, rank, world, timeout, hint=lambda: HINT) as watch:
                    body(watch, rank, shared)
                status = 0
            except (RankFailure, ConfigError, ValueError, FileNotFoundError) as error:
                os.write(2, f"error: {error}\n".encode())
            except SystemExit as error:
                status = error.code
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(status)
        pids.append(pid)
    os.close(go)    # not before: the store's thread, welcoming a rank, holds glibc's locks, and a fork would copy them
    os.close(gate)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return statuses, [(folder / f"stderr{rank}").read_text() for rank in range(len(pids))], pids


def steps(act, world=3):
    """A body: three steps with a collective each; in the third each rank does act(rank, store) before it."""

    def body(watch, rank, store):
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        for step in (1, 2, 3):
            watch.at(f"step {step}")
            if step == 3:
                act(rank, store)
            dist.all_reduce(torch.ones(1))

    return body


def kill_rank_1(rank, store):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def sentence(rank, what, where="step 3"):
    return rf"error: {what}; rank {rank} was in {where}; {HINT}\n"


def who(rank, pids):
    return rf"rank {rank} \(pid {pids[rank]} on \S+\)"


def died(rank, pids):
    return rf"{who(rank, pids)} died in step 3 \(killed or crashed\)"


@pytest.mark.parametrize("kind", ["tcp", "file"])
def test_a_rank_killed_in_a_step_ends_all_with_one_sentence(tmp_path, server, kind):
    store = {"tcp": lambda: client(server.port), "file": lambda: dist.FileStore(f"{tmp_path}/store", 3)}[kind]
    statuses, said, pids = run(3, steps(kill_rank_1), tmp_path, store)
    assert statuses == [1, -9, 1]
    assert said[1] == ""
    for rank in (0, 2):
        assert re.fullmatch(sentence(rank, died(1, pids)), said[rank])


def test_a_rank_killed_on_another_host_is_told_from_those_whose_connections_broke(tmp_path, server, monkeypatch):
    monkeypatch.setattr(failure, "pid_space", lambda: str(os.getpid()))    # as if no two ranks shared a host
    statuses, said, pids = run(3, steps(kill_rank_1), tmp_path, lambda: client(server.port))
    assert statuses == [1, -9, 1]
    for rank in (0, 2):
        what = who(1, pids) + r" has given no sign of life for \d\.\d s in step 3, and rank [02] failed in step 3: .+"
        assert re.fullmatch(sentence(rank, what), said[rank])


def test_a_rank_that_raises_names_itself_and_its_error(tmp_path, server):
    def act(rank, store):
        if rank == 2:
            raise ValueError("row 7 is empty\nand more")

    statuses, said, pids = run(3, steps(act), tmp_path, lambda: client(server.port))
    assert statuses == [1, 1, 1]
    assert said[2] == "error: row 7 is empty\nand more\n"
    for rank in (0, 1):
        assert re.fullmatch(sentence(rank, who(2, pids) + " failed in step 3: ValueError: row 7 is empty"), said[rank])


def test_ranks_that_raise_together_each_say_their_own(tmp_path, server):
    def act(rank, store):
        raise ValueError(f"the loss of rank {rank} is nan")

    statuses, said, _ = run(3, steps(act), tmp_path, lambda: client(server.port))
    assert statuses == [1, 1, 1]
    assert said == [f"error: the loss of rank {rank} is nan\n" for rank in range(3)]


def test_a_runtime_error_is_the_failure_if_no_rank_is_gone(tmp_path, server):
    def act(rank, store):
        if rank == 0:
            raise RuntimeError("a kernel failed")

    statuses, said, pids = run(2, steps(act, world=2), tmp_path, lambda: client(server.port), timeout=10)
    assert statuses == [1, 1]
    assert "RuntimeError: a kernel failed" in said[0] and "Traceback" in said[0]
    assert re.fullmatch(sentence(1, who(0, pids) + " failed in step 3: RuntimeError: a kernel failed"), said[1])


def test_a_rank_that_computes_for_ever_is_told_from_those_that_wait_for_it(tmp_path, server):
    """Ranks 0 and 2 give up one after the other, in a group with rank 1 and in one without it."""
    def body(watch, rank, store):
        limit = timedelta(seconds=1.5)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=3, timeout=limit)
        group = dist.new_group([0, 2], timeout=limit)
        watch.at("step 3")
        if rank == 1:
            threading.Event().wait()
        if rank == 0:
            dist.all_reduce(torch.ones(1))
        dist.all_reduce(torch.ones(1), group=group)

    statuses, said, pids = run(3, body, tmp_path, lambda: client(server.port), timeout=8)
    assert statuses == [1, 1, 1]
    for rank in range(3):
        what = who(1, pids) + r" kept the others waiting in step 3, and rank [02] failed in step 3: RuntimeError: .+"
        assert re.fullmatch(sentence(rank, what), said[rank])


def test_a_stopped_rank_is_found_and_ends_when_it_goes_on(tmp_path, server):
    def act(rank, store):
        store.set(f"pid of {rank}", str(os.getpid()))
        if rank == 1:
            rank_0 = int(store.get("pid of 0"))
            if fork() == 0:
                select.select([os.pidfd_open(rank_0)], [], [])
                os.kill(os.getppid(), signal.SIGCONT)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGSTOP)

    statuses, said, pids = run(2, steps(act, world=2), tmp_path, lambda: client(server.port), timeout=3)
    assert statuses == [1, 1]
    what = who(1, pids) + r" has given no sign of life for \d+\.\d s in step 3"
    for rank in (0, 1):
        assert re.fullmatch(sentence(rank, what), said[rank])


def test_a_rank_that_never_starts(tmp_path, server):
    def body(watch, rank, store):
        threading.Event().wait()

    statuses, said, _ = run(2, body, tmp_path, lambda: client(server.port), timeout=1, started=1)
    assert statuses == [1]
    assert re.fullmatch(sentence(0, r"rank 1 has not started within 1\.\d s", "start-up"), said[0])


def test_a_lost_store_ends_all(tmp_path):
    read, write = os.pipe()
    holder = fork()
    if holder == 0:
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(write, str(server.port).encode())
        signal.alarm(60)
        signal.pause()
    port = int(os.read(read, 10))

    def body(watch, rank, store):
        if rank == 1:
            store.get("rank 0 is in")
            os.kill(holder, signal.SIGKILL)
        store.set("rank 0 is in", "yes")
        threading.Event().wait()

    statuses, said, _ = run(2, body, tmp_path, lambda: client(port))
    os.waitpid(holder, 0)
    assert statuses == [1, 1]
    for rank in (0, 1):
        what = r"the store of the run is gone, with the process that held it \(.+\)"
        assert re.search(sentence(rank, what, "start-up"), said[rank])   # after a warning of torch's own


def test_a_file_missing_on_one_rank_ends_those_that_wait_for_it(tmp_path, server):
    def body(watch, rank, store):
        if rank == 1:
            raise FileNotFoundError("no data/train.bin")
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))

    statuses, said, pids = run(2, body, tmp_path, lambda: client(server.port))
    assert statuses == [1, 1]
    what = who(1, pids) + " failed in start-up: FileNotFoundError: no data/train.bin"
    assert re.fullmatch(sentence(0, what, "start-up"), said[0])


@pytest.mark.parametrize("handler", [None, lambda *_: None], ids=["default", "Stop"])
def test_sigterm_from_the_launcher_does_not_hide_the_sentence(tmp_path, server, handler):
    """torchrun's SIGTERM: at its default, and caught by a handler whose main thread then waits for the dead rank."""

    def act(rank, store):
        if handler and rank == 0:
            signal.signal(signal.SIGTERM, handler)
        store.set(f"pid of {rank}", str(os.getpid()))
        if rank == 1:
            os.kill(int(store.get("pid of 0")), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGKILL)
        if handler:
            threading.Event().wait()

    statuses, said, pids = run(2, steps(act, world=2), tmp_path, lambda: client(server.port))
    assert statuses == [1, -9]
    assert re.fullmatch(sentence(0, died(1, pids)), said[0])


def test_sigterm_alone_ends_all(tmp_path, server):
    def act(rank, store):
        if rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    statuses, said, pids = run(2, steps(act, world=2), tmp_path, lambda: client(server.port), timeout=10)
    assert statuses == [1, 1]
    assert said[0] == "error: ended by SIGTERM\n"
    assert re.fullmatch(sentence(1, who(0, pids) + " failed in step 3: RankFailure: ended by SIGTERM"), said[1])


# ---- good ends -------------------------------------------------------------------------------------------------------
def wait_for_beats(watch, number):
    until = watch.beats + number
    while watch.beats < until:
        threading.Event().wait(watch.interval / 4)


@pytest.mark.parametrize("last", [0, 1, 2])
def test_ranks_that_leave_at_different_times_are_not_missed(tmp_path, last):
    """Rank 0 holds the store, as without torchrun, and stays for the others."""

    def store():
        rank = int(Path(os.readlink("/proc/self/fd/2")).name.removeprefix("stderr"))
        if rank == 0:
            server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            (tmp_path / "port.new").write_text(str(server.port))
            (tmp_path / "port.new").rename(tmp_path / "port")
            return server
        while not (tmp_path / "port").exists():
            threading.Event().wait(0.01)
        return client(int((tmp_path / "port").read_text()))

    def body(watch, rank, store):
        wait_for_beats(watch, 4 if rank == last else 1)

    assert run(3, body, tmp_path, store)[:2] == ([0, 0, 0], ["", "", ""])


def test_one_rank_needs_no_store():
    with Watch(store := dist.HashStore(), 0, 1, 60.0) as watch:
        watch.at("step 1")
    assert watch.where == "step 1" and store.num_keys() == 0


def test_sys_exit_0_is_a_good_end(tmp_path, server):
    def body(watch, rank, store):
        sys.exit(0)

    assert run(2, body, tmp_path, lambda: client(server.port))[:2] == ([0, 0], ["", ""])


def test_the_thread_has_ended_when_a_rank_has_left(monkeypatch):
    ended = []

    def run_slowly(watch, store):
        run_thread(watch, store)
        time.sleep(0.2)
        ended.append(watch.rank)

    run_thread = Watch._run
    monkeypatch.setattr(Watch, "_run", run_slowly)
    with Watch(dist.HashStore(), 1, 2, 60.0):
        pass
    assert ended == [1]


class Trapped:
    """Garbage that writes down who collects it: of a TCPStore's destructor, run in a child, none would return."""

    def __init__(self, folder):
        self.folder, self.cycle = folder, self

    def __del__(self):
        (self.folder / f"collected{os.getpid()}").touch()


def test_ranks_leave_their_parents_garbage_alone(tmp_path):
    gc.collect()
    gc.disable()
    try:
        Trapped(tmp_path)
        run_ranks(2, lambda rank: gc.collect(), tmp_path)
        assert not list(tmp_path.glob("collected*"))
    finally:
        gc.enable()
    gc.collect()
    assert (tmp_path / f"collected{os.getpid()}").exists()


# ---- the neighbour, on a clock that the test turns -------------------------------------------------------------------
def test_silence_is_counted_between_heartbeats():
    store = dist.HashStore()
    store.set("1/who", '[17, "node7", "elsewhere"]')
    store.set("1/at", "step 5")
    neighbour = Neighbour(0, 3)
    for beat in "12":
        store.set("1/beat", beat)
        assert [neighbour.look(store, 30.0, 60.0) for _ in range(3)] == [None] * 3     # 0, 30, 60 s
    assert neighbour.look(store, 0.1, 60.0) == "rank 1 (pid 17 on node7) has given no sign of life for 60.1 s in step 5"
    assert neighbour.pid is None        # it runs on another host
    store.set("alarm", alarm := "rank 2 failed in step 5: RuntimeError: Connection closed by peer")
    assert neighbour.look(store, 0.0, 3.0).endswith(f"for 60.1 s in step 5, and {alarm}")


def test_the_ring_closes_over_ranks_that_have_left():
    store = dist.HashStore()
    neighbour = Neighbour(1, 4)
    store.set("2/beat", LEFT)
    assert neighbour.look(store, 0.0, 60.0) is None and neighbour.rank == 3
    store.set("3/beat", LEFT)
    store.set("0/beat", LEFT)
    assert neighbour.look(store, 0.0, 60.0) is None and neighbour.rank == 1
    assert neighbour.look(store, 1e9, 60.0) is None


# ---- agreement -------------------------------------------------------------------------------------------------------
def refused(tmp_path, server, table):
    """What three ranks say that agree() on table[rank]."""
    def body(watch, rank, store):
        agree(store, rank, 3, table[rank])

    statuses, said, _ = run(3, body, tmp_path, lambda: client(server.port))
    assert len(set(statuses)) == len(set(said)) == 1
    return statuses[0], said[0]


def test_the_same_facts_are_agreed_on(tmp_path, server):
    assert refused(tmp_path, server, [facts(Config(), resume="auto")] * 3) == (0, "")


def test_different_recipes_are_refused_on_every_rank(tmp_path, server):
    same, other = Config(), Config(model=ModelConfig(dim=512, heads=8))
    assert refused(tmp_path, server, [facts(same), facts(other), facts(other)]) == (1, (
        "error: ranks disagree: model.dim is 256 on rank 0 and 512 on ranks 1, 2; model.heads is 4 on rank 0 and 8 on "
        "ranks 1, 2; start all ranks with the same recipe, options and installation\n"))


def test_each_value_is_named_with_its_ranks(tmp_path, server):
    torch_of = [{"the version of torch": version, "train.seed": 1} for version in ("2.13.0", "2.12.0", "2.11.0")]
    torch_of[2]["resume"] = "auto"
    assert refused(tmp_path, server, torch_of) == (1, (
        'error: ranks disagree: the version of torch is "2.13.0" on rank 0 and "2.12.0" on rank 1 and "2.11.0" on rank '
        '2; resume is absent on rank 0 and "auto" on rank 2; start all ranks with the same recipe, options and '
        'installation\n'))


# ---- the real launcher -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("restarts", [0, 1])
def test_torchrun_ends_after_a_kill_or_starts_again(restarts):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           "--max-restarts", str(restarts), str(Path(__file__).parent / "killed_rank.py")],
                          env=os.environ | {"PYTHONPATH": str(Path(moe_ext.__file__).parents[1])},
                          capture_output=True, text=True, timeout=120)
    what = r"rank 1 \(pid \d+ on \S+\) died in step 3 \(killed or crashed\)"
    assert len(re.findall(sentence(0, what), done.stderr)) == done.stderr.count("error: ") == 1
    said = sorted("".join(done.stdout.split()))         # ranks share the pipe: a line may end behind the next
    assert (done.returncode == 0, said) == ((True, ["0", "1"]) if restarts else (False, []))
