"""Tensors between stages: both transports bring the same bits in any order, agree on one, and end with a sentence.

What the C core says to its caller is in c/test_slots.c. Under --simt windows are those of cuda/slots.cu.
"""
import os
import random
import signal
import traceback
from datetime import timedelta
from functools import partial

import devices
import pytest
import torch
import torch.distributed as dist
from compare import same
from ranks import fork, run_ranks

from moe_ext.config import MeshConfig
from moe_ext.parallel import links as module
from moe_ext.parallel.links import open_links
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.schedule import Action

TRANSPORTS = [pytest.param("torch", marks=pytest.mark.c_core), "windows"]
SHAPE = (2, 3, 5)


def tensor_of(step, action, rank, dtype=torch.float32):
    """What `rank` gets as `action` of a step."""
    seed = hash((step, action.kind == "B", action.chunk, action.micro, rank)) % 2**31
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def actions(chunks, micros):
    return [Action(kind, chunk, micro) for kind in "FB" for chunk in range(chunks) for micro in range(micros)]


def receiver(mesh, action):
    return (mesh.rank + (mesh.config.stage if action.kind == "F" else -mesh.config.stage)) % mesh.world


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("mesh", [dict(pp=2), dict(pp=3, tp=2)], ids=str)
def test_bits_arrive_in_any_order_of_sends(transport, mesh, tmp_path):
    """Every rank sends in an order of its own and takes in another, some steps with fewer micro-batches."""
    config, chunks, micros = MeshConfig(**mesh), 2, 3

    def body(rank):
        mesh, order = Mesh(config), random.Random(rank)
        links = open_links(mesh, transport, chunks=chunks, micros=micros, shape=SHAPE, dtype=torch.bfloat16)
        for step in range(1, 8):
            links.begin(step)
            todo = actions(chunks, 1 + step % micros)
            for action in order.sample(todo, len(todo)):
                links.send(action, tensor_of(step, action, receiver(mesh, action), torch.bfloat16))
            for action in order.sample(todo, len(todo)):
                same(links.take(action), tensor_of(step, action, rank, torch.bfloat16))
            links.end()
        links.close()

    run_ranks(config.world, body, tmp_path)


def first_of(left):
    return lambda arrived: next((action for action in left if arrived(action)), None)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_stage_shares_one_order_under_random_delays(transport, tmp_path):
    """Each tensor comes to each rank with a delay of its own; the leader takes the first that has come to all ranks of
    its stage, and all of them take that."""
    config, chunks, micros = MeshConfig(pp=2, tp=2), 2, 3

    def body(rank):
        mesh, jitter = Mesh(config), random.Random(rank)
        links = open_links(mesh, transport, chunks=chunks, micros=micros, shape=SHAPE, dtype=torch.float32,
                           delay=lambda action: jitter.choice((0.0, 0.0005, 0.003)))
        orders = []
        for step in range(1, 6):
            links.begin(step)
            for action in random.Random(step + mesh.pp_rank).sample(actions(chunks, micros), 2 * chunks * micros):
                links.send(action, tensor_of(step, action, receiver(mesh, action)))
            left, order, shuffle = actions(chunks, micros), [], random.Random(rank)
            while left:
                shuffle.shuffle(left)       # the leader's taste; that of the others must not matter
                action = links.agree(first_of(left))
                same(links.take(action), tensor_of(step, action, rank))
                left.remove(action)
                order.append(tuple(action))
            links.end()
            orders.append(order)
        links.close()
        return orders

    orders = run_ranks(config.world, body, tmp_path)
    assert orders[0] == orders[1] and orders[2] == orders[3]
    assert len({tuple(order) for order in orders[0] + orders[2]}) > 5, "the order is decided by what arrives"


# -- ends ------------------------------------------------------------------------------------------------------------
def sentences(config, lost, folder, body, seconds):
    """What body(mesh, rank) raised on each rank but the `lost`, which is killed when all others have ended."""
    children = {}
    for rank in range(config.world):
        children[rank] = fork()
        if children[rank] == 0:
            try:
                torch.set_num_threads(1)
                dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", config.world), rank=rank,
                                        world_size=config.world, timeout=timedelta(seconds=60))
                mesh = Mesh(config, store=dist.FileStore(f"{folder}/links", config.world), seconds=seconds)
                with pytest.raises(RuntimeError) as caught:
                    body(mesh, rank)
                (folder / str(rank)).write_text(str(caught.value))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
    for rank, child in children.items():
        if rank != lost:
            os.waitpid(child, 0)
    os.kill(children[lost], signal.SIGKILL)
    os.waitpid(children[lost], 0)
    return {rank: (folder / str(rank)).read_text() for rank in children if rank != lost}


def around(links, step, mesh, lost, how):
    """A step in which every activation goes one stage on and its gradient back; rank `lost` ends in the middle."""
    links.begin(step)
    forth, back = Action("F", 0, 0), Action("B", 0, 0)
    for action in (forth, back):
        first = mesh.pp_rank == (0 if action == forth else mesh.config.pp - 1)
        if not first:
            links.take(action)
        if step == 2 and mesh.rank == lost and action == back:
            os.kill(os.getpid(), how)
        if mesh.pp_rank != (mesh.config.pp - 1 if action == forth else 0):
            links.send(action, torch.zeros(SHAPE))
    links.end()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda s: s.name)
def test_all_name_the_stage_that_is_lost(transport, how, tmp_path):
    """Also those that wait for one that waits for it."""
    config, lost = MeshConfig(pp=4), 2

    def body(mesh, rank):
        links = open_links(mesh, transport, chunks=1, micros=1, shape=SHAPE, dtype=torch.float32)
        for step in (1, 2, 3):
            around(links, step, mesh, lost, how)

    said = sentences(config, lost, tmp_path, body, 60 if how == signal.SIGKILL else 2)
    text = "has died" if how == signal.SIGKILL else "has sent nothing of what the others wait for within 2 s"
    for rank, sentence in said.items():
        assert f"rank {lost} " in sentence and text in sentence and f"; rank {rank} was to " in sentence, said
    assert "take the gradient of chunk 0, micro-batch 0, step 2" in said[0]


def test_a_stage_that_takes_nothing_any_more_is_named(tmp_path):
    """It has not died, nor has the one that cannot send to it."""
    shape = 8, 1024, 1024       # more than the system keeps on the way

    def body(mesh, rank):
        links = open_links(mesh, "torch", chunks=1, micros=1, shape=shape, dtype=torch.float32)
        links.begin(1)
        if rank == 0:
            links.send(Action("F", 0, 0), torch.zeros(shape))
            links.works[-1][1].wait()
            os.kill(os.getpid(), signal.SIGSTOP)
        links.take(Action("F", 0, 0))
        links.send(Action("B", 0, 0), torch.zeros(shape))
        links.end()

    said = sentences(MeshConfig(pp=2), 0, tmp_path, body, 2)
    assert said == {1: "rank 0 has sent nothing of what the others wait for within 2 s; rank 1 was to end step 1"}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("lost", [0, 3])
def test_all_name_a_rank_that_dies_in_an_agreement(transport, lost, tmp_path):
    """The leader of the first stage, which keeps its peer and, by that, the last stage waiting; or that one's peer."""
    def body(mesh, rank):
        links = open_links(mesh, transport, chunks=1, micros=2, shape=SHAPE, dtype=torch.float32)
        dist.barrier()      # nobody dies before all have joined
        links.begin(1)
        links.send(Action("F", 0, 0), torch.zeros(SHAPE))
        assert links.agree(first_of(actions(1, 2))) == Action("F", 0, 0)
        if rank == lost:
            os.kill(os.getpid(), signal.SIGKILL)
        links.agree(first_of(actions(1, 2)[1:]))

    for rank, sentence in sentences(MeshConfig(pp=2, tp=2), lost, tmp_path, body, 60).items():
        assert f"rank {lost} " in sentence and "has died" in sentence and f"; rank {rank} was to " in sentence


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_links_refuse(transport, tmp_path):
    def body(rank):
        mesh, x, action = Mesh(MeshConfig(pp=2)), torch.zeros(SHAPE), Action("F", 0, 0)
        links = open_links(mesh, transport, chunks=2, micros=3, shape=SHAPE, dtype=torch.float32)

        def refused(call, sentence, error=(ValueError, RuntimeError)):
            with pytest.raises(error, match=sentence):
                call()

        links.begin(2)
        refused(lambda: links.begin(2), "step 2 begins after step 2")
        refused(lambda: links.send(action, x[1:]), r"activation of chunk 0, micro-batch 0, step 2: got \[1, 3, 5\] "
                r"torch.float32 on cpu, wanted \[2, 3, 5\] torch.float32 on cpu, as given to open_links", ValueError)
        refused(lambda: links.send(action, x.double()), r"got \[2, 3, 5\] torch.float64", ValueError)
        refused(lambda: links.send(action, x.to("meta")), "torch.float32 on meta", ValueError)
        for bad in (Action("F", 0, 3), Action("B", 2, 0), Action("F", -1, 0), Action("W", 0, 0)):
            refused(partial(links.send, bad, x), f"for 2 chunks and 3 micro-batches, got {bad.kind} of", ValueError)
            refused(partial(links.take, bad), r"open_links\(.., micros=\) is the most of any step", ValueError)
        refused(lambda: links.agree(lambda arrived: None), "has nothing to do in step 2, and asks for", RuntimeError)
        links.send(action, torch.arange(30.0).view(5, 3, 2).permute(2, 1, 0))       # not contiguous
        refused(lambda: links.send(action, x), "before", RuntimeError)
        same(links.take(action), torch.arange(30.0).view(5, 3, 2).permute(2, 1, 0).contiguous())
        refused(lambda: links.take(action), "before", RuntimeError)
        links.send(Action("B", 1, 2), x)
        links.agree(first_of([Action("B", 1, 2)]))
        refused(links.end, "step 2 ends, but the ", RuntimeError)
        links.take(Action("B", 1, 2))
        links.end()
        links.close()
        links.close()  # twice is as good as once
        refused(lambda: links.begin(3), "links are closed", RuntimeError)

    run_ranks(2, body, tmp_path)


def test_what_windows_refuse(tmp_path, monkeypatch):
    def body(rank):
        before = len(os.listdir("/proc/self/fd")), os.listdir("/dev/shm")
        if rank == 1:
            monkeypatch.setattr(module, "pid_space", lambda: "elsewhere")
        with pytest.raises(ValueError, match=r"rank 1 is on .* and rank 0 on .*: --pipeline.transport torch"):
            open_links(Mesh(MeshConfig(pp=2)), "windows", chunks=1, micros=1, shape=SHAPE, dtype=torch.float32)
        dist.barrier()
        return (len(os.listdir("/proc/self/fd")), os.listdir("/dev/shm")) == before

    run_ranks(2, body, tmp_path)


# -- between GPUs ----------------------------------------------------------------------------------------------------
@pytest.mark.kernels
@pytest.mark.skipif(not devices.simt, reason="holds what is queued on a stream")
def test_a_stream_moves_the_bytes_and_then_the_flag(tmp_path):
    """send and take come back while their streams stand still. A tensor is seen when its bytes have come, and its slot
    is not free before they have left it."""
    program = f"""if True:
        import ctypes, pytest
        import torch.distributed as dist
        from ranks import run_ranks
        from moe_ext.config import MeshConfig
        from moe_ext.parallel.links import open_links
        from moe_ext.parallel.mesh import Mesh
        from moe_ext.parallel.schedule import Action

        stream, forth, sent = ctypes.CDLL(devices.simt), Action("F", 0, 0), torch.arange(1.0, 7.0)

        def body(rank):
            links = open_links(Mesh(MeshConfig(pp=2), seconds=1), "windows", chunks=1, micros=1, shape=(6,),
                               dtype=torch.float32)
            ctypes.c_int.in_dll(stream, "simt_held").value = 1
            links.begin(1)
            if rank == 0:
                links.send(forth, sent)
            for seen in (False, False, True):
                dist.barrier()
                assert rank == 0 or bool(links.look([])[0]) == seen
                dist.barrier()
                stream.simt_run(int(rank == 0))     # the copy; then the flag
            if rank == 1:
                got = links.take(forth)
                stream.simt_run(1)
                assert torch.equal(got, sent)
            links.end()
            dist.barrier()
            links.begin(2)
            if rank == 0:
                with pytest.raises(RuntimeError, match="rank 1 .* has sent nothing .* rank 0 was to send"):
                    links.send(forth, sent)

        run_ranks(2, body, {str(tmp_path)!r})
    """
    done = devices.python(program, "cpu", MOE_CHECK="0")
    assert done.returncode == 0, done.stderr
