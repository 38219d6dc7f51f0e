"""The demonstrations of moe_ext.check: what they print, and that they notice what is wrong."""

import contextlib
import dataclasses
import io
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.run import get_args_parser

from moe_ext.check.__main__ import COMMANDS
from moe_ext.check.all_to_all import AllToAll, draw_splits
from moe_ext.check.dmoe import Dmoe
from moe_ext.check.env import Env, faults, slowness
from moe_ext.check.mesh import OneSentence
from moe_ext.check.world import Facts, OnMesh, World, WorldError, identity
from moe_ext.config import ConfigError


def run_check(world, command, folder):
    """-> what the ranks printed, whether each was content."""

    def body(rank):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            ranks = World(dist.FileStore(f"{folder}/world", world), rank, world, rank, device="cpu", seconds=30)
            fine = command.run(ranks)
            ranks.leave()
        return printed.getvalue(), fine

    texts, fine = zip(*run_ranks(world, body, folder), strict=True)
    return "".join(texts), fine


ALL_TO_ALL = """\
rank: 0, world size: 2
rank: 1, world size: 2

    (input) (rank 0): [tensor([0, 1, 2, 3, 4]), tensor([10, 11, 12, 13, 14, 15])]
    (input_splits) (rank 0): [[2, 3], [3, 3]]
    (input_splitted) (rank 0): [tensor([0, 1]), tensor([2, 3, 4])]
    (output before all_to_all) (rank 0): [tensor([0, 0]), tensor([0, 0, 0])]

    (input) (rank 1): [tensor([0, 1, 2, 3, 4]), tensor([10, 11, 12, 13, 14, 15])]
    (input_splits) (rank 1): [[2, 3], [3, 3]]
    (input_splitted) (rank 1): [tensor([10, 11, 12]), tensor([13, 14, 15])]
    (output before all_to_all) (rank 1): [tensor([0, 0, 0]), tensor([0, 0, 0])]

    (output after all_to_all) (rank 0): [tensor([0, 1]), tensor([10, 11, 12])]
    (output after all_to_all) (rank 1): [tensor([2, 3, 4]), tensor([13, 14, 15])]

torch.distributed: right on every rank
moe_ext TorchTransport: right on every rank
moe_ext WindowTransport: right on every rank
"""


def test_all_to_all_prints_what_the_seed_printed(tmp_path):
    assert run_check(2, AllToAll(), tmp_path) == (ALL_TO_ALL, (True, True))


@pytest.mark.parametrize("world", [1, 3, 8])
def test_all_to_all_on_any_number_of_ranks(world, tmp_path):
    text, fine = run_check(world, AllToAll(), tmp_path)
    assert all(fine) and text.count("right on every rank") == 3
    assert ("their last pieces are empty" in text) == (world == 8)


def test_all_to_all_notices_a_transport_that_swaps_rows(tmp_path, monkeypatch):
    from moe_ext.parallel.transport import TorchTransport

    rows = TorchTransport.rows
    monkeypatch.setattr(TorchTransport, "rows", lambda *args: rows(*args).flip(0))
    text, fine = run_check(2, AllToAll(), tmp_path)
    assert fine == (False, False) and "TorchTransport: WRONG on ranks 0, 1" in text


@pytest.mark.parametrize("command", COMMANDS.values())
def test_torchrun_takes_no_option_for_its_own(command):
    """It reads abbreviations of its options after the module's name too, as "--start" (and "--n", which has a second
    name, --tokens)."""
    own = [option for action in get_args_parser()._actions for option in action.option_strings]
    for field in dataclasses.fields(command):
        option = "--" + field.name.replace("_", "-")
        assert option == "--n" or not any(name.startswith(option) for name in own), option


def test_splits():
    assert draw_splits(1) == [[5]]
    assert draw_splits(2) == [[2, 3], [3, 3]]
    assert draw_splits(4) == [[1, 1, 1, 2], [1, 1, 1, 3], [1, 1, 1, 1], [1, 1, 1, 1]]
    for pieces in draw_splits(16):
        assert min(pieces) == 0 and 4 <= sum(pieces) <= 8


def test_env(tmp_path):
    text, fine = run_check(2, Env(), tmp_path)
    assert fine == (True, True) and text.splitlines()[-1] == "ok: 2 ranks on 1 host"
    for rank in (0, 1):
        assert re.search(rf"^rank: {rank}, local rank: {rank}, world size: 2, host: \S+, pid: \d+, device: cpu, "
                         rf"backend: gloo, torch: {re.escape(torch.__version__)}, moe_ext: ", text, re.MULTILINE)
    for name in ("all_reduce", "all_gather", "all_to_all"):
        assert re.search(rf"^{name} +right, [\d.]+ ms$", text, re.MULTILINE)


def test_env_notices_a_wrong_collective(tmp_path, monkeypatch):
    all_reduce = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda x: (all_reduce(x), x.add_(dist.get_rank())))
    text, fine = run_check(2, Env(), tmp_path)
    assert fine == (False, False) and "wrong: all_reduce gives wrong values on rank 1\n" in text


SMALL = dict(dim=16, hidden=8, dtype="fp64")


@pytest.mark.c_core
@pytest.mark.parametrize("world, sizes", [
    (1, dict()),
    (2, dict(shard=1, ep=2)),
    (4, dict(dp=2, shard=1, ep=2)),
    (2, dict(shard=2)),
    (2, dict(shard=2, ep=2)),
    (4, dict(dp=2, shard=2, ep=2)),
    (4, dict(shard=4, ep=2)),
], ids=str)
def test_dmoe_equals_torch(world, sizes, tmp_path):
    text, fine = run_check(world, Dmoe(**SMALL, **sizes), tmp_path)
    assert fine == (True,) * world and len(re.findall(r"differs by \S+ of its maximum: ok", text)) == 10
    assert ("DistributedDataParallel" in text) == (sizes.get("shard") == 1)


def test_dmoe_in_the_dtype_and_at_the_size_of_the_seed(tmp_path):
    text, fine = run_check(2, Dmoe(shard=2, ep=2), tmp_path)
    assert fine == (True, True), text
    assert "    x.size(): torch.Size([2, 3, 256])\n    x.device: cpu\n" in text


@pytest.mark.c_core
def test_dmoe_notices_another_activation(tmp_path, monkeypatch):
    gelu = torch.nn.functional.gelu
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x: gelu(x, approximate="tanh"))
    text, fine = run_check(2, Dmoe(**SMALL, shard=2, ep=2), tmp_path)
    assert fine == (False, False) and re.search("output +differs by .*: WRONG", text)


@pytest.mark.parametrize("sizes, sentence", [
    (dict(tp=2), "TP is 2, but this check spreads experts"),
    (dict(shard=1, ep=4), r"DP 1 \* EP 4 = 4, but there are 2 ranks"),
    (dict(shard=2, ep=4), "mesh.ep"),
])
def test_dmoe_refuses_sizes(sizes, sentence, tmp_path):
    def body(rank):
        world = World(dist.FileStore(f"{tmp_path}/world", 2), rank, 2, rank, device="cpu", seconds=30)
        with contextlib.redirect_stdout(io.StringIO()), pytest.raises(ConfigError, match=sentence):
            Dmoe(**SMALL, **sizes).run(world)

    run_ranks(2, body, tmp_path)


TINY = dict(vocab=257, dim=16, heads=4, layers=2, steps=3, dtype="fp64")


def losses(text):
    found = re.findall(r"^(\d)th step loss: ([\d.]+)$", text, re.MULTILINE)
    assert [step for step, _ in found] == list("012")
    return torch.tensor([float(loss) for _, loss in found], dtype=torch.float64)


@pytest.mark.c_core
def test_losses_do_not_depend_on_the_mesh(tmp_path):
    text, _ = run_check(1, OneSentence(**TINY), tmp_path)
    want = losses(text)
    assert "mesh_3d: DeviceMesh('cpu', [[[0]]]" in text
    for world, more in (
        (2, dict(shard=2)),
        (2, dict(dp=2, shard=1)),
        (2, dict(tp=2)),
        (2, dict(tp=2, loss_parallel=False)),
        (2, dict(pp=2, shard=1)),
        (4, dict(pp=2, shard=1, tp=2, loss_parallel=False)),
        (4, dict(shard=1, sp=2, tp=2)),
        (4, dict(shard=2, tp=2)),
    ):
        folder = tmp_path / str(more)
        folder.mkdir()
        text, _ = run_check(world, OneSentence(**TINY, **more), folder)
        assert (losses(text) - want).abs().max() < 1e-9, more
    for line in ("mesh_3d: DeviceMesh('cpu', [[[0, 1], [2, 3]]], ", "fsdp_mesh: DeviceMesh('cpu', [[0, 2]], ",
                 "tp_mesh: DeviceMesh('cpu', [0, 1], "):
        assert line in text


def test_mesh_refuses_ranks_that_sp_does_not_divide():
    world = World(dist.HashStore(), rank=0, size=1, local_rank=0, device="cpu")
    with pytest.raises(ConfigError, match="SP is 2, which does not divide the number of ranks of a stage, 1"):
        OneSentence(**TINY, sp=2).run(world)


def test_mesh_leaves_a_trace_of_each_rank(tmp_path):
    run_check(2, OneSentence(**TINY | dict(steps=1), shard=2, profile=tmp_path / "traces"), tmp_path)
    names = {str(path.relative_to(tmp_path / "traces")) for path in tmp_path.rglob("*.json")}
    assert names == {f"DP_1_SHARD_2_TP_1_USE_LOSS_PARALLEL_False/rank{rank}.json" for rank in (0, 1)}


FACTS = Facts(rank=0, local_rank=0, size=2, host="a", pid=1, device="cpu", backend="gloo", torch="2.13", moe_ext="0.1",
              isa="avx2", threads=1, cores=4, gpus=0, cuda="no", interface="", interfaces=["lo", "eth0"],
              address="10.0.0.1")


def two(**other):
    """The facts of two ranks in order, but for what `other` says of the second."""
    return [FACTS, dataclasses.replace(FACTS, **{"rank": 1, "local_rank": 1, **other})]


@pytest.mark.parametrize("other, sentence", [
    (dict(torch="2.12"), "ranks disagree on torch: 2.13 on rank 0; 2.12 on rank 1"),
    (dict(moe_ext="0.2"), "ranks disagree on moe_ext"),
    (dict(size=4), "ranks disagree on size: 2 on rank 0; 4 on rank 1"),
    (dict(backend="cpu:gloo,cuda:nccl"), "ranks disagree on backend"),
    (dict(local_rank=0), "2 ranks on a have LOCAL_RANK 0"),
    (dict(device="cuda:1", cuda="yes", gpus=1), "rank 1 cannot use cuda:1: a has 1 GPUs"),
    (dict(device="cuda:1", cuda="not built", gpus=2), "rank 1 cannot use cuda:1: not built"),
    (dict(interface="eth9"), "GLOO_SOCKET_IFNAME of rank 1 is eth9, but a has lo, eth0"),
    (dict(host="b", address="127.0.1.1"), "the name b of rank 1's host is 127.0.1.1"),
    (dict(host="b", address=""), "the name b of rank 1's host is no address"),
])
def test_faults(other, sentence):
    told = list(faults(two(**other)))
    assert len(told) == 1 and sentence in told[0]


def test_ranks_in_order_have_no_fault():
    for facts in (two(), two(host="b"), two(host="b", address="127.0.0.1", interface="eth0"), two(address="127.0.0.1")):
        assert list(faults(facts)) == [] and list(slowness(facts)) == []


@pytest.mark.parametrize("other, sentence", [
    (dict(isa="base"), "ranks disagree on isa: avx2 on rank 0; base on rank 1"),
    (dict(threads=4), "2 ranks use 5 threads on the 4 cores of a: export OMP_NUM_THREADS=2"),
    (dict(gpus=1, host="b"), "b has 1 GPUs, but moe_ext does not use them: no"),
])
def test_slowness(other, sentence):
    told = list(slowness(two(**other)))
    assert len(told) == 1 and sentence in told[0]
    assert "share the 1 cores" in next(slowness([dataclasses.replace(fact, cores=1) for fact in two()]))


TORCHRUN = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="a", MASTER_PORT="1")


@pytest.mark.parametrize("change, sentence", [
    ({"WORLD_SIZE": None}, "WORLD_SIZE is not set"),
    ({"RANK": None, "LOCAL_RANK": None}, "RANK is not set; LOCAL_RANK is not set.*--nproc-per-node 2"),
    ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
    ({"RANK": "one"}, "RANK is 'one', wanted a whole number"),
    ({"RANK": "2"}, "RANK is 2, wanted 0 to WORLD_SIZE - 1 = 1"),
])
def test_variables_that_describe_no_rank(change, sentence):
    with pytest.raises(WorldError, match=sentence):
        identity({name: value for name, value in (TORCHRUN | change).items() if value is not None})


def test_identity():
    assert identity(TORCHRUN) == dict(rank=1, size=2, local_rank=1)
    assert identity(dict(MASTER_ADDR="a")) is None


def test_a_rank_that_does_not_come_is_named(tmp_path):
    with pytest.raises(WorldError, match=r"rank 0 waited 0.2 s for ranks 1, 2: not started"):
        World(dist.FileStore(f"{tmp_path}/world", 3), 0, 3, 0, seconds=0.2)


def test_a_master_that_does_not_answer(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in (TORCHRUN | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(WorldError, match=rf"does not reach the master at 127.0.0.1:{port} within 0.1 s.*refused"):
        World.from_environment(seconds=0.1)


def test_sizes_come_from_the_environment_and_from_options(monkeypatch):
    for name, value in (("DP", "2"), ("SHARD", "2"), ("TP", "1"), ("EP", "2")):
        monkeypatch.setenv(name, value)
    assert OnMesh().sizes(4) == (2, 2, 1, 2)
    assert OnMesh(dp=1, shard=0, tp=2).sizes(4) == (1, 2, 2, 2)
    with pytest.raises(ConfigError, match=r"DP 2 \* SHARD 2 \* TP 1 = 4, but there are 8 ranks"):
        OnMesh().sizes(8)
    monkeypatch.setenv("DP", "two")
    with pytest.raises(ConfigError, match="the environment's DP is 'two'"):
        OnMesh()


def test_by_torchrun():
    torchrun = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", "2"]
    process = subprocess.run([*torchrun, "-m", "moe_ext.check", "env"], capture_output=True, text=True, timeout=600,
                             cwd=Path(__file__).parent.parent, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == "ok: 2 ranks on 1 host"


def test_no_gpu_for_a_rank():
    world = World(dist.HashStore(), 0, 1, torch.cuda.device_count(), device="cuda", seconds=5)
    with pytest.raises(WorldError, match=r"has no GPU of its own: .* take --device cpu"), world.joined():
        pass
