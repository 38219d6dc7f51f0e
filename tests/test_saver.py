"""Checkpoints written while training goes on: the bits of those that hold it up, whole or absent whatever happens.

The writer is not timed but held: it waits in `write_data` until a test lets it go on, or until something waits for it.
"""
import ctypes
import functools
import json
import os
import re
import signal
import sys
import threading
from datetime import timedelta

import pytest
import torch
import torch._dynamo  # fully_shard imports it, which takes seconds: once here, not in every rank
import torch.distributed as dist
from ranks import fork, run_ranks
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import moe_ext.train
from moe_ext import checkpoint, snapshot
from moe_ext.checkpoint import CheckpointError, Saver, latest, load, save, step_of, whole
from moe_ext.config import load as read_config
from moe_ext.config import parse
from moe_ext.data import IndexedWriter
from moe_ext.optim import Muon, Shampoo
from moe_ext.optim.adamw import AdamW
from moe_ext.optim.state import local
from moe_ext.parallel import failure

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


class Stream:
    """A data loader in miniature, whose state is its own dict."""

    def __init__(self):
        self.state = {"row": 0}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = dict(state)


class Run:
    """Sharded if there are ranks, otherwise with a strided parameter; dtypes of several widths."""

    def __init__(self, seed=0, device=CPU, state="full"):
        torch.manual_seed(seed)
        self.model = nn.Linear(8, 7)
        self.model.wide = nn.Parameter(torch.randn(6, 40) if dist.is_initialized() else torch.randn(40, 6).T)
        self.model.register_buffer("narrow", torch.randn(3).bfloat16())
        self.model.register_buffer("bias_E", torch.randn(3, dtype=torch.float64))
        self.model.to(device)
        if dist.is_initialized():
            fully_shard(self.model)
        self.optimizer = AdamW(self.model.parameters(), 0.01, state=state)
        self.loader = Stream()

    def step(self, number):
        """Changes, in place, all that a checkpoint holds."""
        for p in self.model.parameters():
            p.grad = torch.full_like(p, float(number))
        self.optimizer.step()
        self.model.bias_E += number
        self.loader.state["row"] += number
        torch.rand(1)

    @property
    def content(self):
        return dict(model=self.model, optimizer=self.optimizer, loader=self.loader, config={"model": {"dim": 8}},
                    extra={"scale": 2.0})

    def save(self, folder, step, **options):
        return save(folder, step=step, **self.content, **options)


class Held:
    """While `open` is not set, whoever writes a checkpoint's data waits. `begun`: somebody does."""

    def __init__(self, patch):
        self.open, self.begun, self.write = threading.Event(), threading.Event(), snapshot.write_data
        patch.setattr(snapshot, "write_data", self)

    def __call__(self, *arguments):
        self.begun.set()
        assert self.open.wait(60)
        self.write(*arguments)

    def until_settled(self, patch):
        """Goes on when a main thread waits."""
        settle = Saver.settle

        def settled(saver):
            if saver.thread:
                self.open.set()
            settle(saver)
        patch.setattr(Saver, "settle", settled)


def files(path):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.fixture
def ranks(tmp_path):
    """ranks(world, body): what body(rank, patch) returns on each; in this process if world is 1."""
    def run(world, body):
        def patched(rank):
            with pytest.MonkeyPatch.context() as patch:
                return body(rank, patch)
        return run_ranks(world, patched, tmp_path) if world > 1 else [patched(0)]
    return run


# ---- the same bits ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("world", [1, 2])
def test_steps_go_on_while_it_is_written_and_do_not_reach_the_file(tmp_path, ranks, world):
    def body(rank, patch):
        patch.setattr(snapshot.Image, "BLOCK", 100)     # tensors begin, end and go on in the middle of a block
        run, told, found = Run(), [], []
        run.step(1)
        with Saver(CPU, told=lambda *what: told.append(what)) as saver:
            for step in (2, 3):
                run.step(step)
                same = run.save(tmp_path / "same", step)
                with pytest.MonkeyPatch.context() as held:
                    writer = Held(held)
                    saver.save(tmp_path / "behind", step=step, **run.content)
                    assert writer.begun.wait(60)
                    run.step(10)
                    run.step(20)
                    assert whole(tmp_path / "behind") == [path for _, path in found]
                    assert not saver.failed() and len(told) == step - 2
                    writer.open.set()
                    saver.wait()
                found.append((same, tmp_path / "behind" / same.name))
                assert [(path, number) for path, number, *_ in told] == [(path, step_of(path)) for _, path in found]
                assert all(waited > 0 and wrote > 0 for *_, waited, wrote in told)
            blocks = [block.data_ptr() for block in saver.image.blocks]
            saver.save(tmp_path / "behind", step=4, **run.content)
            assert [block.data_ptr() for block in saver.image.blocks] == blocks     # one copy, and the same memory
            assert 3 < len(blocks) == -(-saver.image.size // 100)
        dist.barrier() if world > 1 else None
        for same, behind in found:
            assert files(same) == files(behind) and len(files(same)) == world + 1
        other = Run(seed=9)
        load(latest(tmp_path / "behind"), model=other.model, optimizer=other.optimizer, loader=other.loader)
        one, two = ([local(t) for p in of.model.parameters() for t in (p, *of.optimizer.state[p].values())]
                    for of in (run, other))
        assert all(map(torch.equal, one, two)) and len(one) == 12
    ranks(world, body)


def test_the_library_reads_the_file_which_has_no_gap_and_each_tensor_at_a_multiple_of_its_width(tmp_path):
    run = Run()
    run.step(1)
    file, = run.save(tmp_path, 1).glob("*.safetensors")
    tensors, data = load_file(file), file.read_bytes()
    begin = end = 8 + int.from_bytes(data[:8], "little")
    for name, entry in sorted(json.loads(data[8:begin]).items(), key=lambda item: item[1].get("data_offsets", [-1])):
        if name != "__metadata__":
            first, last = (begin + at for at in entry["data_offsets"])
            assert first == end and first % tensors[name].itemsize == 0
            assert data[first:last] == tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
            end = last
    assert end == len(data) and torch.equal(tensors["model.wide"], run.model.wide)
    assert {tensor.itemsize for tensor in tensors.values()} == {1, 2, 4, 8}


OPTIMIZERS = {
    "adamw": functools.partial(AdamW, betas=(0.9, 0.95)), "muon": Muon,
    "shampoo": functools.partial(Shampoo, betas=(0.9, 0.95), precondition_frequency=1, max_preconditioner_dim=5),
}


@pytest.mark.parametrize("state", ["full", "host", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_of_owners_and_on_the_host_are_copied_too(tmp_path, ranks, name, state):
    """Of matrices that are cut in two, and of experts of which each rank has one."""
    def body(rank, patch):
        patch.setattr(snapshot.Image, "BLOCK", 100)
        torch.manual_seed(0)
        run, writer = Run(), Held(patch)
        run.model = nn.ParameterDict({"square": torch.randn(8, 6), "experts_EHD": torch.randn(2, 3, 4)})
        fully_shard(run.model)
        run.optimizer = OPTIMIZERS[name](run.model.parameters(), 0.01, state=state)

        def step(number):
            for p in run.model.parameters():
                p.grad = (p.detach() * number).sin()
            run.optimizer.step()
            run.loader.state["row"] += number

        step(1)
        writer.open.set()
        same = run.save(tmp_path / "same", 1)
        writer.open.clear()
        with Saver(CPU) as saver:
            saver.save(tmp_path / "behind", step=1, **run.content)
            step(2)
            step(3)
            writer.open.set()
        dist.barrier()
        assert files(same) == files(tmp_path / "behind" / same.name)
        return saver.image.size
    sizes = ranks(2, body)
    assert min(sizes) > 100


def test_a_rank_that_has_nothing_to_write(tmp_path, ranks):
    def body(rank, patch):
        run = Run()
        run.model = nn.Linear(1, 1, bias=False)
        run.optimizer = AdamW(run.model.parameters(), 0.01)
        given = run.model.weight.item()
        with Saver(CPU) as saver:
            saver.reserve(run.model, run.optimizer)
            saver.save(tmp_path / "ckpt", step=1, **run.content)
        with torch.no_grad():
            run.model.weight.fill_(7.0)
        load(checkpoint.on_rank_0(lambda: latest(tmp_path / "ckpt")), model=run.model, optimizer=run.optimizer,
             loader=run.loader)
        return run.model.weight.item() == given, saver.image.size
    assert sorted(ranks(2, body)) == [(True, 0), (True, 4 + torch.get_rng_state().nbytes)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("state", ["full", "host"])
def test_on_cuda_it_is_copied_to_pinned_memory(tmp_path, state, monkeypatch):
    run = Run(device=torch.device("cuda"), state=state)
    run.step(1)
    same, writer = run.save(tmp_path / "same", 1), Held(monkeypatch)
    with Saver(torch.device("cuda")) as saver:
        saver.save(tmp_path / "behind", step=1, **run.content)
        run.step(2)
        torch.cuda.synchronize()
        assert saver.image.blocks[0].is_pinned()
        writer.open.set()
    assert files(same) == files(tmp_path / "behind" / same.name)


# ---- whole or absent -------------------------------------------------------------------------------------------------
def die_at(event, folder):
    """From now on this process is killed at its event-th file operation in `folder`; nothing more is written."""
    left = [event]

    def hook(name, arguments):
        if name in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and str(folder) in str(arguments[0]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """One child per file operation of a save behind training, killed there; what is left is the old one or the new."""
    run = Run()
    run.step(1)
    old = files(run.save(tmp_path / "same", 1))
    run.step(2)
    new, generator = files(run.save(tmp_path / "same", 2)), torch.get_rng_state()
    outcomes = []
    for event in range(1, 100):
        folder = tmp_path / str(event)
        first = Run()
        load(tmp_path / "same" / "step-000001", model=first.model, optimizer=first.optimizer, loader=first.loader)
        first.save(folder, 1, keep_last=1)
        child = fork()
        if child == 0:
            torch.set_rng_state(generator)
            die_at(event, folder)
            with Saver(CPU) as saver:
                saver.save(folder, step=2, keep_last=1, **run.content)
                run.step(3)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        found = [(step_of(path), files(path)) for path in whole(folder)]
        assert found in ([(1, old)], [(1, old), (2, new)], [(2, new)]), event
        outcomes.append(found[-1][0])
        if not os.WIFSIGNALED(status):
            break
    assert os.WEXITSTATUS(status) == 0 and len(outcomes) > 8
    assert outcomes[0] == 1 and outcomes[-1] == 2 and outcomes == sorted(outcomes)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_dies_while_it_writes(tmp_path, killed):
    """The other raises gloo's error, which parallel.failure takes for a sign of that, and the old one is the newest."""
    folder, children = tmp_path / "ckpt", []
    for rank in range(2):
        child = fork()
        if child == 0:
            status = 1
            try:
                dist.init_process_group("gloo", store=dist.FileStore(f"{tmp_path}/store", 2), rank=rank, world_size=2,
                                        timeout=timedelta(seconds=30))
                run, saver = Run(), Saver(CPU, timedelta(seconds=30))
                run.save(folder, 1)
                if rank == killed:
                    os.fsync = lambda descriptor: os._exit(7)
                saver.save(folder, step=2, keep_last=1, **run.content)
                saver.wait()
            except RuntimeError:
                status = 8
            finally:
                os._exit(status)
        children.append(child)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert ends == [7 if rank == killed else 8 for rank in range(2)]
    assert [path.name for path in whole(folder)] == ["step-000001"]


def test_old_ones_go_when_the_new_one_is_whole_and_the_next_save_waits_for_that(tmp_path, monkeypatch):
    run, there, begin = Run(), [], checkpoint.begin
    run.save(tmp_path, 1)
    writer = Held(monkeypatch)
    writer.until_settled(monkeypatch)
    monkeypatch.setattr(checkpoint, "begin",
                        lambda folder, name: there.append([p.name for p in whole(folder)]) or begin(folder, name))
    with Saver(CPU) as saver:
        saver.save(tmp_path, step=2, keep_last=1, **run.content)
        assert writer.begun.wait(60) and latest(tmp_path).name == "step-000001"
        saver.save(tmp_path, step=3, keep_last=1, **run.content)
    assert there == [["step-000001"], ["step-000002"]]
    assert os.listdir(tmp_path) == ["step-000003"]


def test_what_the_next_one_has_waited_for_the_one_before_is_told(tmp_path, monkeypatch):
    """Of a clock that only stands still or, while a main thread waits for the writer, goes on by 50 s."""
    run, told, clock, wait = Run(), [], [0.0], checkpoint.arrived

    def arrived(thread):
        clock[0] += 50
        wait(thread)
    monkeypatch.setattr(checkpoint, "arrived", arrived)
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: clock[0])
    writer = Held(monkeypatch)
    writer.until_settled(monkeypatch)
    with Saver(CPU, told=lambda path, step, waited, written: told.append((step, waited))) as saver:
        saver.save(tmp_path, step=1, **run.content)
        saver.wait()
        saver.save(tmp_path, step=2, **run.content)     # asks once more
        saver.save(tmp_path, step=3, behind=False, **run.content)
    assert told == [(1, 0), (2, 50), (3, 50)]


# ---- errors ----------------------------------------------------------------------------------------------------------
def fail(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("world, on, where", [(1, 0, "fsync"), (2, 0, "fsync"), (2, 1, "fsync"), (2, 0, "rename")])
def test_an_error_of_the_writer_is_that_of_every_rank_and_what_it_always_was(tmp_path, ranks, world, on, where):
    def body(rank, patch):
        run, folder, said = Run(), tmp_path / "ckpt", []
        run.save(folder, 1)
        with pytest.MonkeyPatch.context() as broken:
            if rank == on:
                broken.setattr(os, "fsync", fail) if where == "fsync" else broken.setattr("pathlib.Path.rename", fail)
            with pytest.raises(Exception) as error:
                run.save(folder, 2)
            said.append(f"{type(error.value).__name__}: {error.value}")
            saver = Saver(CPU)
            saver.save(folder, step=2, keep_last=1, **run.content)
            failed = torch.zeros(())
            while not failed:       # steps of a run
                failed = torch.tensor(float(saver.failed()))
                dist.all_reduce(failed) if world > 1 else None
            with pytest.raises(Exception) as error:
                saver.wait()
            said.append(f"{type(error.value).__name__}: {error.value}")
        assert [path.name for path in whole(folder)] == ["step-000001"]
        saver.save(folder, step=3, keep_last=1, **run.content)
        saver.wait()
        dist.barrier() if world > 1 else None
        assert os.listdir(folder) == ["step-000003"]
        return said
    first, *others = ranks(world, body)
    assert all(said == first for said in others) and first[0] == first[1]
    message = rf"CheckpointError: .*step-000002 was not saved, earlier .*: rank {on}: OSError: .*No space left"
    assert re.match(message if where == "fsync" else r"OSError: .*No space left", first[0])


def test_a_rank_that_raises_waits_for_its_checkpoint_and_needs_no_other_main_thread(tmp_path, ranks):
    def body(rank, patch):
        run, writer = Run(), Held(patch)
        saver = Saver(CPU)
        if rank == 1:
            writer.until_settled(patch)
            with pytest.raises(ValueError, match="row 7"), saver:
                saver.save(tmp_path / "ckpt", step=1, **run.content)
                raise ValueError("row 7 is empty")
            names = [path.name for path in whole(tmp_path / "ckpt")]
        else:
            saver.save(tmp_path / "ckpt", step=1, **run.content)
            writer.open.set()
            names = ["step-000001"]
        dist.barrier()      # where rank 0 has been from the beginning, as in a collective of the step
        saver.settle()
        return names
    assert ranks(2, body) == [["step-000001"]] * 2


def test_an_exception_is_told_what_became_of_the_checkpoint(tmp_path, monkeypatch):
    run = Run()
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ValueError, match="row 7") as error, Saver(CPU) as saver:
        saver.save(tmp_path, step=1, **run.content)
        raise ValueError("row 7 is empty")
    assert "step-000001 was not saved" in error.value.__notes__[0] and not whole(tmp_path)


def test_without_a_thread_nothing_waits_for_one(tmp_path, monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")
    run = Run()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="new thread"), Saver(CPU) as saver:
        patch.setattr(threading.Thread, "start", start)
        saver.save(tmp_path, step=1, **run.content)
    assert not whole(tmp_path)
    saver.save(tmp_path, step=2, **run.content)
    saver.wait()
    assert os.listdir(tmp_path) == ["step-000002"]


def test_the_user_reads_what_was_not_saved(monkeypatch):
    def train(*_):
        error = FloatingPointError("step 3: the loss is nan")
        error.add_note("step-000002 was not saved")
        raise error
    monkeypatch.setattr(moe_ext.train, "train", train)
    monkeypatch.setattr(sys, "argv", ["train", RECIPE])
    with pytest.raises(SystemExit) as end:
        moe_ext.train.main()
    assert end.value.code == "error: step 3: the loss is nan\nstep-000002 was not saved"


@pytest.mark.parametrize("world", [1, 2])
def test_no_room_for_the_copy(tmp_path, ranks, world):
    def body(rank, patch):
        run, saver, empty = Run(), Saver(CPU), torch.empty
        patch.setattr(snapshot.Image, "BLOCK", 128)
        if rank == world - 1:
            def full(*shape, **options):
                if shape == (128,) and len(saver.image.blocks) == 2:
                    raise RuntimeError("out of memory\nat frame 0")
                return empty(*shape, **options)
            patch.setattr(torch, "empty", full)
        said = []
        for action in (lambda: saver.reserve(run.model, run.optimizer),
                       lambda: saver.save(tmp_path / "ckpt", step=1, **run.content)):
            with pytest.raises(CheckpointError) as error:
                action()
            said.append(str(error.value))
        assert not whole(tmp_path / "ckpt")
        saver.save(tmp_path / "ckpt", step=1, behind=False, **run.content)      # takes no copy
        return said
    said = ranks(world, body)
    assert said[0] == said[-1]
    assert all("--train.save-every 0" in text and text.endswith("out of memory") for of in said for text in of)


def test_what_is_reserved_the_host_has_given(monkeypatch):
    """Pages of a fresh allocation are a promise alone: a full host would end the run at its first checkpoint."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)   # which would touch it
    image, page = snapshot.Image(CPU), os.sysconf("SC_PAGE_SIZE")
    image.reserve(image.BLOCK)
    first, pages = -(-image.blocks[0].data_ptr() // page), image.BLOCK // page - 1
    present = (ctypes.c_ubyte * pages)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(first * page), ctypes.c_size_t(pages * page), present) == 0
    assert all(state & 1 for state in present)


def test_who_waits_for_anothers_file_is_not_taken_for_late():
    assert failure.EXCHANGE.search(f"{checkpoint.__file__}:{checkpoint.arrived.__name__}")
    assert not failure.EXCHANGE.search(f"{checkpoint.__file__}:{Saver.settle.__name__}")


# ---- the driver ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def data(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("data") / "train"
    with IndexedWriter(prefix, 320) as writer:
        for i in range(40):
            writer.add([(i * j) % 320 for j in range(100)])
    return prefix


RECIPE = os.path.join(os.path.dirname(__file__), "..", "recipes", "debug.toml")


def drive(data, folder, patch, at, act, **options):
    """A run of 8 steps that saves after every second; before step number `at` it does act(). -> its run folder."""
    options = {"data.train": data, "data.valid": "", "data.tokenizer": "", "train.eval_every": 0, "train.steps": 8,
               "train.save_every": 2, "train.keep_last": 0, "log.every": 1, "log.folder": folder} | options
    schedule = moe_ext.train.learning_rate
    patch.setattr(moe_ext.train, "learning_rate",
                  lambda step, *rest: (act() if step == at else None, schedule(step, *rest))[1])
    return moe_ext.train.train(parse([RECIPE, *(word for name, value in options.items()
                                                for word in (f"--{name}", str(value)))]))


def writers():
    return [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


def saved(folder):
    return [step_of(path) for path in whole(folder / "ckpt")]


def test_a_run_saves_what_it_would_have_saved_if_it_had_waited(data, tmp_path, monkeypatch):
    """Also where it continues from: all files but for the running time and the folder's name in state.json."""
    behind = drive(data, tmp_path / "behind", monkeypatch, 0, None)
    assert "saved " in (text := (behind / "run.log").read_text()) and "waited" in text and "written in" in text
    save = Saver.save
    monkeypatch.setattr(Saver, "save", lambda saver, folder, *, behind, **content:
                        save(saver, folder, behind=False, **content))
    waiting = drive(data, tmp_path / "waiting", monkeypatch, 0, None)
    assert saved(behind) == saved(waiting) == [2, 4, 6, 8]
    for step in saved(behind):
        name = f"ckpt/step-{step:06d}"
        one, other = files(behind / name), files(waiting / name)
        states = [checkpoint.read_state(folder / name) for folder in (behind, waiting)]
        assert one.keys() == other.keys() and all(one[key] == other[key] for key in one if key != "state.json")
        assert states[0]._replace(extra={}, config={}) == states[1]._replace(extra={}, config={})
    assert read_config(behind / "config.toml").train == read_config(waiting / "config.toml").train


def test_sigterm_waits_for_the_one_before(data, tmp_path, monkeypatch):
    writer = Held(monkeypatch)
    writer.until_settled(monkeypatch)

    def terminate():
        assert writer.begun.wait(60) and not writer.open.is_set()       # step 2 is being written, step 3 is under way
        os.kill(os.getpid(), signal.SIGTERM)
    folder = drive(data, tmp_path, monkeypatch, 3, terminate)
    assert saved(folder) == [2, 3] and "stopped by SIGTERM after step 3" in (folder / "run.log").read_text()
    lines = re.findall(r"(saved|step)[ -].*?(\d+)(?:/8| \|)", (folder / "run.log").read_text())
    assert [(what, int(n)) for what, n in lines] == [("step", 1), ("step", 2), ("step", 3), ("saved", 2), ("saved", 3)]
    assert not writers()


def test_a_writer_that_fails_stops_the_run_in_the_next_step(data, tmp_path, monkeypatch):
    sync = os.fsync

    def fsync(descriptor):
        if threading.current_thread() in writers() and "step-000004" in os.readlink(f"/proc/self/fd/{descriptor}"):
            fail()
        sync(descriptor)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match=r"step-000004 was not saved, .*: rank 0: OSError: .*No space left"):
        drive(data, tmp_path, monkeypatch, 5, lambda: [thread.join() for thread in writers()])
    assert saved(tmp_path / "debug") == [2]
    text = (tmp_path / "debug" / "run.log").read_text()
    assert "step 4/8" in text and "step 5/8" not in text


def test_what_a_diverging_run_names_is_the_newest(data, tmp_path, monkeypatch):
    writer = Held(monkeypatch)
    writer.until_settled(monkeypatch)

    def diverge():
        assert writer.begun.wait(60)
        monkeypatch.setattr(moe_ext.train, "not_finite", lambda *_: "the loss is nan")
    with pytest.raises(FloatingPointError, match=r"step 3: the loss is nan.*continues from .*step-000002$"):
        drive(data, tmp_path, monkeypatch, 3, diverge)
    assert saved(tmp_path / "debug") == [2]


def test_the_copys_memory_is_there_after_the_first_step_or_never(data, tmp_path, monkeypatch):
    reserved, reserve = [], Saver.reserve
    monkeypatch.setattr(Saver, "reserve", lambda saver, *what: reserved.append(saver) or reserve(saver, *what))
    blocks = []
    drive(data, tmp_path / "some", monkeypatch, 2, lambda: blocks.append(len(reserved[0].image.blocks)),
          **{"train.steps": 5})
    assert blocks == [len(reserved[0].image.blocks)] and blocks[0] > 0
    drive(data, tmp_path / "last", monkeypatch, 0, None, **{"train.steps": 4, "train.save_every": 0})
    assert len(reserved) == 1
