"""The token exchange: the plan and the messages, bit for bit; then whole exchanges over every transport."""

import pytest
import torch
from cases import CASES, Case, Shape
from compare import same
from drawn import drawn_case
from hypothesis import given, settings
from test_permute import any_bits

from moe_ext import ops, reference

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
    for weights_dtype in {dtype, torch.float32}:
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
    for weights_dtype in {dtype, torch.float32}:
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
                                        (3, 5, 128, 128)])  # fmt: skip
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
