"""Index ops: exact, on every integer dtype and every routing."""

import pytest
import torch
from compare import against_reference, gradcheck, same
from devices import floats
from drawn import drawn_case
from hypothesis import given, settings

from moe_ext import ops, reference

INTEGERS = [torch.int16, torch.int32, torch.int64]


def check_route_index(impl, case, device):
    ids_TK, E = case.ids(device), case.shape.E
    for dtype in (torch.int32, torch.int64):
        got, want = impl.route_index(ids_TK.to(dtype), E), reference.route_index(ids_TK, E)
        for name, g, w in zip(want._fields, got, want, strict=True):
            same(g, w, name)


def check_sort(impl, x_n, end_bit):
    for got, want in zip(impl.sort(x_n, end_bit), reference.sort(x_n, end_bit), strict=True):
        same(got, want)


def check_histogram(impl, x, max_val):
    same(impl.histogram(x, max_val), reference.histogram(x, max_val))


def check_cumsum(impl, x, dim):
    same(impl.inclusive_cumsum(x, dim), reference.inclusive_cumsum(x, dim))
    same(impl.exclusive_cumsum(x, dim), reference.exclusive_cumsum(x, dim))


def check_topology(impl, counts_E, block, cols):
    padded_bins = (reference.round_up(counts_E, block)).cumsum(0).int()
    rows = int(padded_bins[-1]) // block
    same(impl.topology(padded_bins, block, rows, cols), reference.topology(padded_bins, block, rows, cols))


def check_replicate(impl, x, bins, n):
    same(impl.replicate(x, bins, n), reference.replicate(x, bins, n))
    if x.is_floating_point():
        against_reference(impl, lambda ops, x: ops.replicate(x, bins, n), {"x": x})


def test_route_index(case, device):
    check_route_index(ops, case, device)


def test_route_index_is_the_contract(case, device):
    """Without the reference: what each field promises."""
    ids_TK = case.ids(device)
    counts_E, bins_E, order_N, inverse_TK = ops.route_index(ids_TK, case.shape.E)
    present = int((ids_TK >= 0).sum())
    flat = order_N[:present].tolist()
    ids = ids_TK.flatten().tolist()
    assert flat == sorted(flat, key=lambda f: (ids[f], f)), "sorted by expert, and stable"
    assert sorted(flat) == [f for f in range(len(ids)) if ids[f] >= 0], "every present copy once"
    assert order_N[present:].eq(-1).all()
    assert counts_E.tolist() == [ids.count(e) for e in range(case.shape.E)]
    assert bins_E.tolist() == counts_E.cumsum(0).tolist()
    position = {f: p for p, f in enumerate(flat)}
    assert inverse_TK.flatten().tolist() == [position.get(f, -1) for f in range(len(ids))]


@pytest.mark.parametrize("integer", INTEGERS, ids=str)
@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_sort(integer, n, device):
    small = torch.randint(0, 100, (n,)).to(integer).to(device)
    anything = torch.randint(-30000, 30000, (n,)).to(integer).to(device)
    check_sort(ops, small, 7)
    check_sort(ops, small, None)
    check_sort(ops, anything, None)
    check_sort(ops, anything, 5)


@pytest.mark.parametrize("integer", INTEGERS, ids=str)
@pytest.mark.parametrize("shape", [(0,), (1,), (999,), (9000,), (3, 77), (2, 0)], ids=str)
def test_histogram_and_cumsum(integer, shape, device):
    x = torch.randint(-3, 20, shape).to(integer).to(device)  # the histogram ignores what is outside
    check_histogram(ops, x, 16)
    check_histogram(ops, x, 1)
    check_cumsum(ops, x, len(shape) - 1)


@pytest.mark.parametrize("block", [1, 4, 128])
def test_topology(block, device):
    for counts in ([3, 0, 500, 1], [0, 0], [1], [0, 9, 0]):
        check_topology(ops, torch.tensor(counts, dtype=torch.int32, device=device), block, cols=3)


@pytest.mark.parametrize("bins", [[2, 5, 5, 9], [0, 0, 0, 1], [0, 0, 0, 0], [9, 9, 9, 9]], ids=str)
def test_replicate(bins, device):
    bins = torch.tensor(bins, dtype=torch.int32, device=device)
    for dtype in (*floats(device), *INTEGERS):
        check_replicate(ops, (torch.randn(3, 4) * 100).to(dtype).to(device), bins, 11)


@pytest.mark.c_core
def test_gradcheck():
    bins = torch.tensor([2, 5, 5, 9], dtype=torch.int32)
    gradcheck(lambda x: ops.replicate(x, bins, 11), {"x": torch.randn(3, 4)})


def test_plain_torch_helpers():
    x = torch.tensor([0, 1, 127, 128, 129], dtype=torch.int32)
    same(ops.round_up(x, 128), torch.tensor([0, 128, 128, 128, 256], dtype=torch.int32))
    y = torch.arange(6.0).view(1, 6)
    same(ops.sum(y, 0), y[0])
    same(ops.sum(y.view(2, 3), 0), y.view(2, 3)[0] + y.view(2, 3)[1])
    assert ops.repeat(y, (1, 1)) is y
    same(ops.repeat(y, (2, 1)), torch.cat([y, y]))


@settings(derandomize=True, max_examples=40, deadline=None)
@given(case=drawn_case())
def test_route_index_on_drawn_routings(case, device):
    check_route_index(ops, case, device)


@pytest.mark.parametrize("E", [300, 5000])
def test_many_flat_ids(E, device):
    """Flat ids pass 2^15 and 2^16, and the counting is cut into pieces."""
    ids_TK = torch.randint(0, E, (40000, 2), dtype=torch.int32, device=device)
    for got, want in zip(ops.route_index(ids_TK, E), reference.route_index(ids_TK, E), strict=True):
        same(got, want)
