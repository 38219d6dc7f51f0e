"""The token exchange: the plan and the messages, bit for bit; then whole exchanges over every transport."""

import ctypes
import multiprocessing
import os
import re
import signal
import subprocess
import time
import traceback
from pathlib import Path

import devices
import pytest
import torch
import torch.distributed as dist
from cases import CASES, Case, Shape
from compare import same
from drawn import drawn_case
from hypothesis import given, settings
from ranks import fork, run_ranks
from test_permute import any_bits

from moe_ext import ops, reference
from moe_ext.parallel.experts import ExpertExchange
from moe_ext.parallel.transport import NcclTransport, TorchTransport, WindowTransport

# ---- the plan --------------------------------------------------------------------------------------------------------


def divisors(E):
    return [P for P in range(1, E + 1) if E % P == 0]


def check_plan(impl, ids_TK, E, P):
    got, counts, send, place = impl.exchange_plan(ids_TK, E, P), [], [], torch.full((len(ids_TK), P), -1)
    for p in range(P):
        goes = [t for t, ids in enumerate(ids_TK.tolist()) if any(id >= 0 and id // (E // P) == p for id in ids)]
        copies = sum(id >= 0 and id // (E // P) == p for id in ids_TK.flatten().tolist())
        counts.append([len(goes), copies])
        for t in goes:
            place[t, p] = len(send)
            send.append(t * P + p)
    send += [-1] * (len(got.send_M) - len(send))
    want = torch.tensor(counts), torch.tensor(send, dtype=torch.long), place
    for g, w, name in zip(got, want, got._fields, strict=True):
        same(g, w.int().to(g.device), name)
    assert len(got.send_M) == len(ids_TK) * min(P, ids_TK.shape[1])


# ---- the messages ----------------------------------------------------------------------------------------------------


def routed(case, device, K=8):
    """ids of K slots (so that no message ends in padding, which nobody reads), experts, ranks."""
    return case.ids(device).repeat(1, K)[:, :K].contiguous(), case.shape.E, max(divisors(case.shape.E))


def check_pack(impl, case, dtype, device, K=8):
    """Every form of message, against plain torch; then unpacked: what was sent, and nothing else's ids."""
    ids_TK, E, P = routed(case, device, K)
    plan = reference.exchange_plan(ids_TK, E, P)
    T, D, S = case.shape.T, case.shape.d, int(plan.counts_P2[:, 0].sum())
    for weights_dtype in dict.fromkeys((dtype, torch.float32)):
        x_TD = case.randn(T, D, salt=1, dtype=dtype, device=device)
        weights_TK = case.randn(T, K, salt=2, dtype=weights_dtype, device=device)
        for arguments in (
            (x_TD, ids_TK, weights_TK, plan.send_M, E, P, S),
            (x_TD, None, None, plan.send_M, E, P, S),
            (x_TD, None, weights_TK, None, E, P, T),
        ):
            same(impl.exchange_pack(*arguments), reference.exchange_pack(*arguments))


def check_unpack(impl, case, dtype, device, K=8):
    ids_TK, E, P = routed(case, device, K)
    plan = reference.exchange_plan(ids_TK, E, P)
    T, D, S = case.shape.T, case.shape.d, int(plan.counts_P2[:, 0].sum())
    x_TD = any_bits(dtype, T, D).to(device)
    weights_TK = case.randn(T, K, salt=2, dtype=torch.float32, device=device)
    message_SW = reference.exchange_pack(x_TD, ids_TK, weights_TK, plan.send_M, E, P, S)
    x_SD, ids_SK, weights_SK = impl.exchange_unpack(message_SW, D, K, torch.float32)
    token_S, rank_S = plan.send_M[:S].long() // P, plan.send_M[:S] % P
    same(x_SD, x_TD[token_S])
    same(weights_SK, weights_TK[token_S])
    want_SK = ids_TK[token_S] - rank_S[:, None] * (E // P)
    same(ids_SK, torch.where((want_SK >= 0) & (want_SK < E // P), want_SK, -1).int())


def check_combine(impl, case, dtype, device, K=8):
    ids_TK, E, P = routed(case, device, K)
    plan = reference.exchange_plan(ids_TK, E, P)
    S, D = int(plan.counts_P2[:, 0].sum()), case.shape.d
    rows_SD = case.randn(S, D, salt=3, dtype=dtype, device=device)
    same(impl.exchange_combine(rows_SD, plan.place_TP), reference.exchange_combine(rows_SD, plan.place_TP))
    for weights_dtype in dict.fromkeys((dtype, torch.float32)):
        weights_SK = case.randn(S, K, salt=4, dtype=weights_dtype, device=device)
        message_SW = reference.exchange_pack(rows_SD, None, weights_SK, None, E, P, S)
        got = impl.exchange_combine(message_SW, plan.place_TP, ids_TK, E, D, weights_dtype)
        want = reference.exchange_combine(message_SW, plan.place_TP, ids_TK, E, D, weights_dtype)
        same(got[0], want[0])
        same(got[1], want[1])
        for t, ids in enumerate(ids_TK.tolist()):
            for k, id in enumerate(ids):
                row = plan.place_TP[t, id // (E // P)] if id >= 0 else -1
                assert got[1][t, k] == (weights_SK[row, k] if row >= 0 else 0)


def test_plan(case, device):
    for P in divisors(case.shape.E):
        check_plan(ops, case.ids(device), case.shape.E, P)


@pytest.mark.parametrize("T, K, E, P", [(1000, 8, 64, 64), (513, 4, 300, 60), (257, 1, 3, 3), (256, 2, 40, 1),
                                        (3, 5, 128, 128), (1300, 1, 200, 200)])  # fmt: skip
def test_plan_over_many_blocks(T, K, E, P, device):
    check_plan(ops, Case("many", Shape(T, 1, 1, E, K), "skewed").ids(device), E, P)


@pytest.mark.parametrize("K", [1, 3, 8])
@pytest.mark.parametrize("check", [check_pack, check_unpack, check_combine])
def test_messages(check, case, dtype, device, K):
    check(ops, case, dtype, device, K)


@pytest.mark.parametrize("D", [8, 64, 72, 1000, 1031])
@pytest.mark.parametrize("check", [check_pack, check_unpack, check_combine])
def test_messages_of_many_ranks_and_widths(check, D, dtype, device):
    """More ranks than lanes of a warp; widths with and without a vector path."""
    check(ops, Case("wide", Shape(33, D, 1, 40, 8), "skewed"), dtype, device)


def test_a_row_that_is_not_aligned_moves_too(dtype, device):
    x = torch.arange(1.0, 6 * 16 + 2, device=device).to(dtype)[1:].view(6, 16)
    plan = ops.exchange_plan(torch.tensor([[0, 1]], dtype=torch.int32, device=device).repeat(6, 1), 2, 2)
    got = ops.exchange_pack(x, None, None, plan.send_M, 2, 2, 12)
    same(got, torch.cat([x, x]))
    same(ops.exchange_combine(got, plan.place_TP), x + x)


def test_weights_travel_alone(dtype, device):
    """In rows of no values: gradients of x that nobody wants."""
    ids_TK, E, P = routed(CASES[0], device)
    plan = ops.exchange_plan(ids_TK, E, P)
    S = int(plan.counts_P2[:, 0].sum())
    weights_SK = CASES[0].randn(S, ids_TK.shape[1], salt=1, dtype=dtype, device=device)

    def returned(D):
        message = ops.exchange_pack(weights_SK.new_ones(S, D), None, weights_SK, None, E, P, S)
        return ops.exchange_combine(message, plan.place_TP, ids_TK, E, D, dtype)

    alone, beside = returned(0), returned(5)
    assert alone[0].shape == (len(ids_TK), 0)
    same(alone[1], beside[1])


@settings(derandomize=True, max_examples=30, deadline=None)
@given(drawn_case())
def test_drawn_routings(device, case):
    check_plan(ops, case.ids(device), case.shape.E, case.shape.E)
    for check in (check_pack, check_unpack, check_combine):
        check(ops, case, torch.float32, device, K=case.shape.k)


def test_a_plan_out_of_range_is_refused_and_harms_nothing(device):
    ids = CASES[0].ids(device)
    plan, x = ops.exchange_plan(ids, 4, 2), torch.ones(len(ids), 8, device=device)
    for bad in (plan.send_M + 64, -plan.send_M - 7):
        with pytest.raises(RuntimeError, match="out of range"):
            ops.exchange_pack(x, None, None, bad, 4, 2, 10)
    rows = torch.ones(10, 8, device=device)
    for bad in (plan.place_TP + 100, plan.place_TP - 100):
        with pytest.raises(RuntimeError, match="out of range"):
            ops.exchange_combine(rows, bad)
    with pytest.raises(RuntimeError, match="do not divide over ranks=3"):
        ops.exchange_plan(ids, 4, 3)
    for bad in (4, -2):
        with pytest.raises(RuntimeError, match="exchange_plan"):
            ops.exchange_plan(torch.full_like(ids, bad), 4, 2)
    same(ops.exchange_pack(x, None, None, plan.send_M, 4, 2, 10), torch.ones(10, 8, device=device))


# ---- transports ------------------------------------------------------------------------------------------------------
# On the host: forked ranks; the C core's windows, or under --simt the kernels of cuda/, and for NCCL the small library
# of tests/simt. On a GPU: processes of their own on one card.

SIMT = Path(__file__).parent / "simt"


@pytest.fixture
def stand_in(device, tmp_path, monkeypatch):
    """On the host, libnccl.so.2 is the stand-in in every rank of this test."""
    if device == "cuda":
        return
    try:
        ctypes.CDLL("libnccl.so.2", os.RTLD_NOLOAD)
        pytest.skip("this torch has brought a real NCCL")
    except OSError:
        library = f"{tmp_path}/libnccl.so.2"
    command = "gcc -std=c11 -O1 -Wall -Wextra -Werror -D_GNU_SOURCE -fPIC -shared -fvisibility=hidden"
    subprocess.run([*command.split(), "-Wl,-soname,libnccl.so.2", "-o", library, SIMT / "nccl_stand_in.c"], check=True)
    monkeypatch.setenv("STAND_IN", library)


@pytest.fixture(params=[pytest.param(NcclTransport, marks=pytest.mark.kernels), WindowTransport])
def kind(request):
    if request.param is NcclTransport:
        request.getfixturevalue("stand_in")
    return request.param


def connect(kind, world, rank, folder, device, **more):
    if library := os.environ.get("STAND_IN"):
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    return kind(dist.FileStore(f"{folder}/store", world), world, rank, device=device, **more)


def child(body, rank, world, folder, device, arguments):
    try:
        torch.set_num_threads(1)
        torch.save(body(rank, world, folder, device, *arguments), f"{folder}/{rank}.pt")
        return 0
    except BaseException:
        traceback.print_exc()
        return 1


def spawned(*arguments):
    os._exit(child(*arguments))


def run(world, body, folder, device, *arguments):
    """What body(rank, world, folder, device, *arguments) returned on each rank; None for a rank that was killed."""
    os.makedirs(folder, exist_ok=True)
    if device == "cpu":
        pids = []
        for rank in range(world):
            pids.append(fork())
            if pids[-1] == 0:
                os._exit(child(body, rank, world, folder, device, arguments))
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    else:  # CUDA does not survive a fork
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=spawned, args=(body, rank, world, folder, device, arguments))
                     for rank in range(world)]  # fmt: skip
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        codes = [process.exitcode for process in processes]
    assert set(codes) <= {0, -signal.SIGKILL}, f"exit codes {codes}; tracebacks are above"
    return [torch.load(f"{folder}/{rank}.pt") if code == 0 else None for rank, code in enumerate(codes)]


def matrices(world):
    """Rows from p to q: uneven, with silent pairs; a rank that gets nothing; nobody has any; more than one block."""
    g = torch.Generator().manual_seed(world)
    uneven = torch.randint(1, 9, (world, world), generator=g)
    if world > 1:
        uneven[0, -1] = 0
    one_gets_nothing = uneven.clone()
    one_gets_nothing[:, world - 1] = 0
    return [uneven, one_gets_nothing, torch.zeros_like(uneven), uneven * 40, uneven.T.contiguous()]


def block(p, q, rows, W, dtype):
    """What rank p sends to q: numbers that name both."""
    return (torch.arange(rows * W).view(rows, W) % 97 + 100 * p + 10 * q).to(dtype)


def check_rounds(transport, world, rank, device):
    for rows_PP in matrices(world):
        mine = torch.stack([rows_PP[rank], rows_PP[rank] * 3], 1).int().to(device)
        want_PP2 = torch.stack([rows_PP, rows_PP * 3], 2).int()
        same(transport.counts(mine), want_PP2)
        for dtype, W in [(torch.float32, 5), (torch.bfloat16, 8), (torch.float16, 3), (torch.float32, 256)]:
            for forth_PP in (rows_PP, rows_PP.T):
                sent = torch.cat([block(rank, q, int(forth_PP[rank, q]), W, dtype) for q in range(world)]).to(device)
                want = torch.cat([block(p, rank, int(forth_PP[p, rank]), W, dtype) for p in range(world)])
                same(transport.rows(sent, forth_PP).cpu(), want)


def rounds_body(rank, world, folder, device, kind, more):
    transport = connect(kind, world, rank, folder, device, **more)
    check_rounds(transport, world, rank, device)
    transport.close()


def experts_body(rank, world, folder, device, kind):
    """A whole exchange with experts that need no weights of their own: expert e of a rank multiplies by e + 1."""
    E, K, T, D = 4 * world, 3, 17 + rank, 24
    g = torch.Generator().manual_seed(rank)
    x, weights = torch.randn(T, D, generator=g), torch.rand(T, K, generator=g)
    ids = torch.randint(-1, E, (T, K), generator=g).int()
    transport = connect(kind, world, rank, folder, device, **({"bytes": 1000} if kind is WindowTransport else {}))
    exchange = ExpertExchange(E, transport)

    def scale(weights, ids):
        return (weights * ids.remainder(4).add(1) * (ids >= 0)).sum(1, keepdim=True)

    for _ in range(3):
        leaves = [t.to(device).requires_grad_() for t in (x, weights)]
        x_RD, weights_RK, ids_RK, copies, trip = exchange.dispatch(*leaves, ids.to(device))
        assert copies == ids_RK.ge(0).sum() and ids_RK.max() < 4
        y = exchange.combine(x_RD * scale(weights_RK, ids_RK), trip)
        wanted = [t.clone().requires_grad_() for t in (x, weights)]
        want = wanted[0] * scale(wanted[1], ids)
        torch.testing.assert_close(y.cpu(), want)
        for got, w in zip(torch.autograd.grad(y.square().sum(), leaves),
                          torch.autograd.grad(want.square().sum(), wanted), strict=True):  # fmt: skip
            torch.testing.assert_close(got.cpu(), w)
    transport.close()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_exchange_over_each_transport(kind, world, device, tmp_path):
    if device == "cuda" and world != (1 if kind is NcclTransport else 2):
        pytest.skip("one card")
    run(world, experts_body, tmp_path, device, kind)


def killed_body(rank, world, folder, device, kind, during):
    """Rank 1 dies after the first exchange; the others say so in time, and again at once."""
    transport = connect(kind, world, rank, folder, device, seconds=1.0)
    rows_PP = torch.full((world, world), 2)
    counts, sent = rows_PP[rank].int().to(device), torch.ones(2 * world, 4, device=device)
    transport.counts(counts)
    transport.rows(sent, rows_PP)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    said, began = [], time.monotonic()
    for _ in range(2):
        with pytest.raises(RuntimeError) as raised:
            transport.counts(counts) if during == "counts" else transport.rows(sent, rows_PP)
            transport.counts(counts)  # rows are only queued: at the latest, the next host read says it
        said.append((time.monotonic() - began, str(raised.value)))
    return said


def absent_body(rank, world, folder, device, kind):
    if rank != 1:
        with pytest.raises(RuntimeError) as raised:
            connect(kind, world, rank, folder, device, seconds=1.0)
        return str(raised.value)


def test_torch_transport(tmp_path):
    run_ranks(3, lambda rank: check_rounds(TorchTransport(), 3, rank, "cpu"), tmp_path)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_transport(kind, world, device, tmp_path):
    """Every matrix of rows, forth and back. Windows begin too small and grow. On a GPU: NCCL to itself, for it takes
    one rank per card, and windows between two processes."""
    if device == "cuda" and world != (1 if kind is NcclTransport else 2):
        pytest.skip("one card")
    more = {} if kind is NcclTransport else {"bytes": 1000}
    run(world, rounds_body, tmp_path, device, kind, more)


@pytest.mark.parametrize("during", ["counts", "rows"])
def test_a_killed_rank_ends_the_others_in_time(kind, during, device, tmp_path):
    if device == "cuda" and kind is NcclTransport:
        pytest.skip("one card")
    world = 3 if device == "cpu" else 2
    ended = run(world, killed_body, tmp_path, device, kind, during)
    assert ended[1] is None
    for (first, why), (second, again) in (said for said in ended if said):
        assert first < 5 and second - first < 0.5
        ended_by = r"rank 1 did not answer|rank 1 \(pid \d+\) has died" if kind is WindowTransport else "one of 3 ranks"
        assert re.search(ended_by, why) and re.search("did not answer|has died", again), (why, again)


def test_a_rank_that_never_comes(kind, device, tmp_path):
    if device == "cuda" and kind is NcclTransport:
        pytest.skip("one card")
    why = run(2, absent_body, tmp_path, device, kind)[0]
    assert re.search("rank 1 did not come|did not answer", why), why


def stuck_body(rank, world, folder, device):
    transport = connect(NcclTransport, world, rank, folder, device, seconds=0.5)
    rows_PP = torch.full((1, 1), 2)
    stuck = ctypes.c_int.in_dll(ctypes.CDLL(os.path.abspath(devices.simt)), "simt_stuck")
    stuck.value = 1
    transport.rows(torch.ones(2, 4), rows_PP)  # queued; nobody on the host waits for it
    time.sleep(1.0)
    stuck.value = 0  # as an abort ends the kernels
    with pytest.raises(RuntimeError, match="did not answer"):
        transport.rows(torch.ones(2, 4), rows_PP)


@pytest.mark.kernels
def test_rows_that_never_arrive_are_noticed(device, tmp_path, stand_in):
    if device == "cuda":
        pytest.skip("needs a stream that can be stopped")
    run(1, stuck_body, tmp_path, device)


def no_nccl_body(rank, world, folder, device):
    with pytest.raises(RuntimeError, match=r"NCCL is not to be had.*Hint"):
        connect(NcclTransport, world, rank, folder, device)


@pytest.mark.kernels
def test_a_missing_nccl_is_a_sentence(device, tmp_path):
    if device == "cuda":
        pytest.skip("it is there")
    try:
        ctypes.CDLL("libnccl.so.2")
    except OSError:
        run(1, no_nccl_body, tmp_path, device)


@pytest.mark.c_core
def test_nccl_wants_cuda_tensors(tmp_path):
    with pytest.raises(RuntimeError, match=r"moves CUDA tensors, got one on cpu\. Hint: WindowTransport"):
        connect(NcclTransport, 1, 0, tmp_path, "cpu")
