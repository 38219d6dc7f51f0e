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
from test_experts import ROUTED, E, experts, tensors
from test_permute import any_bits

from moe_ext import ops
from moe_ext.parallel.experts import ExpertExchange, Trip
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


DTYPES_OF_TRIPS = [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
                   (torch.bfloat16, torch.float32), (torch.float16, torch.float32)]  # fmt: skip


@pytest.mark.parametrize("sizes", [(13, 0), (9, 4, 0, 6)], ids=str)
def test_an_exchange_has_the_bits_of_gloo(sizes, tmp_path):
    """Forward and backward, for every routing, dtype of tokens and dtype of weights; gradients that are not contiguous,
    or not wanted. The windows are too small at first."""
    world = len(sizes)
    share = E // world

    def through(transport, rank, routing, dtype, weights_dtype, wanted=range(4)):
        x, weights, ids_TK, w13, w2, dy = tensors(routing, sizes)
        mine, its_weights, ids, its_dy = (t.split(sizes)[rank].clone() for t in (x, weights, ids_TK, dy))
        leaves = [mine.to(dtype), its_weights.to(weights_dtype)]
        leaves += [t[rank * share : (rank + 1) * share].to(dtype) for t in (w13, w2)]
        leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(leaves)]
        exchange = ExpertExchange(E, transport)
        x_RD, weights_RK, ids_RK, num_copies, trip = exchange.dispatch(*leaves[:2], ids)
        y = exchange.combine(experts(x_RD, weights_RK, ids_RK, *leaves[2:], num_copies), trip)
        grads = torch.autograd.grad(y, [leaves[i] for i in wanted], its_dy[:, :1].to(dtype).expand(-1, y.shape[1]))
        return x_RD.detach(), weights_RK.detach(), ids_RK, y.detach(), *grads

    def body(rank):
        windows, gloo, least = connect(tmp_path, world, rank, bytes=10), TorchTransport(), []
        for routing in ROUTED:
            for dtypes in DTYPES_OF_TRIPS:
                for wanted in (range(4), (0, 2), (1, 2)):
                    got, want = (through(transport, rank, routing, *dtypes, wanted) for transport in (windows, gloo))
                    for g, w in zip(got, want, strict=True):
                        same(g, w)
            least.append(len(want[0]))
        windows.close()
        return min(least)

    assert min(run_ranks(world, body, tmp_path)) == 0, "a rank that receives nothing is part of this test"


def trip_of(transport, T, D):
    """Tokens that go to every rank, and their way."""
    ids_TK = torch.arange(transport.ranks, dtype=torch.int32).repeat(T, 1)
    rows_PP = torch.full((transport.ranks, transport.ranks), T)
    trip = Trip(transport, transport.ranks, ids_TK, ops.exchange_plan(ids_TK, *[transport.ranks] * 2), rows_PP)
    return trip, torch.arange(T * D).view(T, D) + 100.0 * transport.rank, torch.ones(ids_TK.shape)


def test_results_are_no_views_of_a_window(tmp_path):
    def body(rank):
        windows = connect(tmp_path, 2, rank)
        trip, x, weights = trip_of(windows, 5, 4)
        kept = [*windows.forth(trip, x, weights), *windows.back(trip, x.repeat(2, 1), weights.repeat(2, 1))]
        copies = [t.clone() for t in kept]
        for _ in range(4):
            windows.rows(torch.full((10, 50), -1.0), trip.rows_PP)
        windows.close()
        for mine, copy in zip(kept, copies, strict=True):
            same(mine, copy)

    run_ranks(2, body, tmp_path)


def test_a_call_that_one_rank_refuses(tmp_path):
    """Before the others were told anything it was no call; a bad index among what returns comes when all have their
    rows. Either way the ranks stay in step."""

    def body(rank):
        windows = connect(tmp_path, 2, rank)
        trip, x, weights = trip_of(windows, 5, 4)
        y = x.repeat(2, 1)
        bad_send = trip._replace(plan=trip.plan._replace(send_M=trip.plan.send_M + 10))
        bad_place = trip._replace(plan=trip.plan._replace(place_TP=trip.plan.place_TP + 10))
        if rank == 0:
            for call, sentence in [
                (lambda: windows.forth(bad_send, x, weights), "send must hold flat pairs of a token and a rank"),
                (lambda: windows.forth(trip, x, weights[1:]), r"weights has shape \[4, 2\], wanted \[T=5, K\]"),
                (lambda: windows.forth(trip, x.long()), "x has dtype int64"),
                (lambda: windows.forth(trip, x.to("meta")), "moves tensors on cpu, got one on meta"),
                (lambda: windows.back(trip, y[1:]), r"y has shape \[9, 4\], wanted \[R=10, D\]"),
                (lambda: windows.back(trip, y, weights), r"weights has shape \[5, 2\], wanted \[R=10, K\]"),
            ]:
                with pytest.raises((RuntimeError, ValueError), match=sentence):
                    call()
        x_RD, ids_RK, weights_RK = windows.forth(trip, x, weights)
        same(x_RD, torch.cat([trip_of(TorchTransport(), 5, 4)[1] - 100.0 * rank + 100.0 * p for p in range(2)]))
        same(ids_RK, torch.tensor([[0, -1], [-1, 0]][rank], dtype=torch.int32).repeat(10, 1))
        same(weights_RK, torch.ones(10, 2))
        if rank == 0:
            with pytest.raises(RuntimeError, match="place must hold rows below S=10 or -1"):
                windows.back(bad_place, y)
        else:
            windows.back(trip, y)
        same(windows.back(trip, y)[0], 2 * x - 100.0 * rank + 100.0 * (1 - rank))
        windows.close()
        with pytest.raises(RuntimeError, match="WindowTransport is closed"):
            windows.forth(trip, x)

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
