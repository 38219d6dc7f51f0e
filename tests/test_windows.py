"""Windows of shared memory beside gloo: the same bits for any dtype and matrix; nothing left behind; what they refuse.

What windows have in common with other transports, a killed rank among it, is in test_exchange.py; what the C core says
to its caller is in c/test_windows.c.
"""

import os
import threading

import pytest
import torch
import torch.distributed as dist
from compare import same
from ranks import run_ranks
from test_experts import E, experts, tensors
from test_permute import any_bits

from moe_ext.parallel.experts import ExpertExchange
from moe_ext.parallel.transport import TorchTransport, WindowTransport

pytestmark = pytest.mark.c_core
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.uint8]


def connect(folder, world, rank, **more):
    return WindowTransport(dist.FileStore(f"{folder}/windows", world), world, rank, device="cpu", **more)


def matrices(world, generator):
    """Rows from p to q: random with silent pairs, everything to one rank, everything from one rank, none."""
    random = torch.randint(0, 40, (world, world), generator=generator)
    random *= torch.randint(0, 3, (world, world), generator=generator) > 0
    to_one, from_one = torch.zeros_like(random), torch.zeros_like(random)
    to_one[:, -1], from_one[0] = 50, 30
    return [random, to_one, random.T.contiguous(), from_one, torch.zeros_like(random), random * 20]


@pytest.mark.parametrize("world", [2, 4])
def test_windows_move_what_gloo_moves(world, tmp_path):
    """Odd widths too. The windows grow on the way, from less than a row."""

    def body(rank):
        gloo, windows, generator = TorchTransport(), connect(tmp_path, world, rank, bytes=10), torch.Generator()
        torch.manual_seed(rank)
        for round in range(3):
            for rows_PP in matrices(world, generator.manual_seed(round)):
                mine = torch.stack([rows_PP[rank], rows_PP[rank] + rank], 1).int()
                same(windows.counts(mine), gloo.counts(mine))
                for dtype in DTYPES:
                    sent = any_bits(dtype, int(rows_PP[rank].sum()), 7 + 26 * round)
                    same(windows.rows(sent, rows_PP), gloo.rows(sent, rows_PP))
        windows.close()

    run_ranks(world, body, tmp_path)


@pytest.mark.parametrize("routing", ["random", "skewed", "one_takes_all", "all_absent"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_exchange_has_the_bits_of_gloo(routing, dtype, tmp_path):
    sizes = [13, 0]
    x, weights, ids_TK, w13, w2, dy = tensors(routing, sizes, dtype)

    def through(transport, rank):
        here, exchange = slice(rank * E // 2, (rank + 1) * E // 2), ExpertExchange(E, transport)
        mine, its_weights, ids, its_dy = (t.split(sizes)[rank].clone() for t in (x, weights, ids_TK, dy))
        leaves = [t.clone().requires_grad_() for t in (mine, its_weights, w13[here], w2[here])]
        x_RD, weights_RK, ids_RK, num_copies, trip = exchange.dispatch(*leaves[:2], ids)
        y = exchange.combine(experts(x_RD, weights_RK, ids_RK, *leaves[2:], num_copies), trip)
        return y, *torch.autograd.grad(y, leaves, its_dy)

    def body(rank):
        windows = connect(tmp_path, 2, rank)
        for got, want in zip(through(windows, rank), through(TorchTransport(), rank), strict=True):
            same(got, want)
        windows.close()

    run_ranks(2, body, tmp_path)


def left_behind():
    """Open files of this process, windows that it has mapped, names in /dev/shm."""
    with open("/proc/self/maps") as maps:
        return len(os.listdir("/proc/self/fd")), sum("moe_window" in line for line in maps), os.listdir("/dev/shm")


def test_nothing_is_left_behind(tmp_path):
    """By windows that were closed, grew, or were never joined. A killed rank has no name to leave either: while all
    windows are open there is none."""

    def body(rank):
        store = dist.FileStore(f"{tmp_path}/windows", 2)
        before = left_behind()
        for name in ("a", "b"):
            transport = WindowTransport(store, 2, rank, device="cpu", name=name, bytes=100)
            for rows in (1, 3000):
                transport.rows(torch.ones(2 * rows, 4), torch.full((2, 2), rows))
            files, windows, names = left_behind()
            assert files > before[0] and windows == 2 and names == before[2]
            transport.close()
            transport.close()  # twice is as good as once
            assert left_behind() == before
        with pytest.raises(RuntimeError, match="rank 0 did not come to the meeting within"):
            WindowTransport(store, 3, 2, device="cpu", name=f"absent{rank}", seconds=0.2)
        assert left_behind() == before

    run_ranks(2, body, tmp_path)


def test_ranks_may_be_threads():
    """Each waits for the other, so a call that kept the interpreter's lock would end in `did not answer`."""
    store, world, results = dist.HashStore(), 2, {}

    def body(rank):
        transport = WindowTransport(store, world, rank, device="cpu", seconds=20.0)
        for round in range(50):
            results[rank, round] = transport.counts(torch.tensor([rank, round], dtype=torch.int32)).tolist()
        transport.close()

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {(rank, round): [[0, round], [1, round]] for rank in range(world) for round in range(50)}


def test_what_windows_refuse(tmp_path):
    transport, rows_PP, x = connect(tmp_path, 1, 0, bytes=100), torch.tensor([[3]]), torch.ones(3, 2)
    for call, error, sentence in [
        (lambda: transport.rows(x[:2], rows_PP), ValueError, r"sends 3 rows of rank 0, wanted \[1, 1\] and the 2 rows"),
        (lambda: transport.rows(x, torch.tensor([[3, 0]])), ValueError, r"rows_PP \[1, 2\]"),
        (lambda: transport.rows(x.to("meta"), rows_PP), ValueError, "moves tensors on cpu, got one on meta"),
        (lambda: transport.counts(x), RuntimeError, "mine has dtype float32, wanted int32"),
        (lambda: transport.rows(x.T, torch.tensor([[2]])), None, None),
        (lambda: transport.counts(torch.zeros(5000, dtype=torch.int32)), RuntimeError, "a window holds 4096 bytes"),
        (transport.close, None, None),
        (lambda: transport.counts(rows_PP[0].int()), RuntimeError, "WindowTransport is closed"),
        (lambda: transport.rows(torch.ones(3, 1000), rows_PP), RuntimeError, "WindowTransport is closed"),
        (lambda: connect(tmp_path, 2, 2), RuntimeError, "wanted 0 <= rank=2 < ranks=2"),
        (lambda: connect(tmp_path, 1, 0, seconds=0), RuntimeError, "seconds=0 > 0"),
    ]:
        if error is None:
            call()
        else:
            with pytest.raises(error, match=sentence):
                call()
