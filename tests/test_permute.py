"""Movement in its three forms: plain, padded and binned. Copies are bitwise, weighted sums obey the tolerance rule."""

import mmap

import pytest
import torch
from cases import CASES, SMALLEST, Case, Shape
from compare import against_reference, each_set_alone, gradcheck, kept, same
from drawn import drawn_case
from hypothesis import given, settings

from moe_ext import ops, reference

FORMS = ["plain", "padded", "binned"]
BLOCK = 8


class Layout:
    """One form of movement for the routing of a case. x_T are token rows, x_P expert rows [P,D] whatever the form."""

    def __init__(self, form, case, device):
        ids_TK = case.ids(device)
        self.form, self.T, self.K, self.E = form, *ids_TK.shape, case.shape.E
        self.ids_N = ids_TK.flatten()
        self.index = reference.route_index(ids_TK, self.E)
        self.padded_bins = reference.round_up(self.index.counts_E, BLOCK).cumsum(0).int()
        self.capacity = max(1, self.T * self.K // self.E)  # so that skewed routings drop copies
        self.P = {
            "plain": self.T * self.K,
            "padded": int(self.padded_bins[-1]),
            "binned": self.E * self.capacity,
        }[form]

    def gather(self, impl, x_TD):
        order, bins = self.index.order_N, self.index.bins_E
        if self.form == "plain":
            return impl.gather(x_TD, order, None, bins, self.K)
        if self.form == "padded":
            return impl.padded_gather(x_TD, order, None, bins, self.padded_bins, self.K)
        return impl.binned_gather(x_TD, order, bins, self.capacity, self.K).flatten(0, 1)

    def scatter(self, impl, x_PD, weights_N):
        order, bins = self.index.order_N, self.index.bins_E
        if self.form == "plain":
            return impl.scatter(x_PD, order, None, weights_N, bins, self.K)
        if self.form == "padded":
            return impl.padded_scatter(x_PD, order, None, weights_N, bins, self.padded_bins, self.K)
        return impl.binned_scatter(x_PD.view(self.E, self.capacity, -1), order, weights_N, bins, self.K)

    def rows(self):
        """The expert row of each flat id, -1 where it has none, counted one by one."""
        starts = {
            "plain": [0, *self.index.bins_E.tolist()],
            "padded": [0, *self.padded_bins.tolist()],
            "binned": [e * self.capacity for e in range(self.E)],
        }[self.form]
        taken, rows = [0] * self.E, []
        for e in self.ids_N.tolist():
            fits = e >= 0 and (self.form != "binned" or taken[e] < self.capacity)
            rows.append(starts[e] + taken[e] if fits else -1)
            if fits:
                taken[e] += 1
        return rows


def any_bits(dtype, *size):
    """Random bit patterns: NaN payloads, infinities, denormals and negative zeros must survive a copy."""
    return torch.randint(0, 256, (*size[:-1], size[-1] * dtype.itemsize), dtype=torch.uint8).view(dtype)


def check_gather(impl, form, case, dtype, device):
    layout = Layout(form, case, device)
    x_TD = any_bits(dtype, layout.T, case.shape.d).to(device)
    want = torch.zeros(layout.P, case.shape.d, dtype=dtype, device=device)
    for f, row in enumerate(layout.rows()):
        if row >= 0:
            want[row] = x_TD[f // layout.K]
    same(layout.gather(impl, x_TD), want)
    x_TD = case.randn(layout.T, case.shape.d, salt=1, dtype=dtype, device=device)
    against_reference(impl, layout.gather, {"x_TD": x_TD})


def check_scatter(impl, form, case, dtype, device, weights_dtype=None):
    layout = Layout(form, case, device)
    D, rows = case.shape.d, torch.tensor(layout.rows(), dtype=torch.long)
    x_PD = torch.full((layout.P, D), torch.nan, dtype=dtype, device=device)  # a row that nobody has is never read
    owned = rows[rows >= 0]
    x_PD[owned] = case.randn(len(owned), D, salt=2, dtype=dtype, device=device)
    weights_N = case.randn(layout.T * layout.K, salt=3, dtype=weights_dtype or dtype, device=device)

    # Without weights: the sum in slot order, in fp32 (fp64), rounded once. Bit for bit.
    copies_NKD = torch.cat([x_PD, x_PD.new_zeros(1, D)])[rows].view(layout.T, layout.K, D)
    total = torch.zeros(layout.T, D, dtype=torch.promote_types(dtype, torch.float32), device=device)
    for slot in range(layout.K):
        total = total + copies_NKD[:, slot]
    same(layout.scatter(impl, x_PD, None), total.to(dtype))

    against_reference(impl, layout.scatter, {"x_PD": x_PD, "weights_N": weights_N})

    weights_N.requires_grad_()
    layout.scatter(impl, x_PD, weights_N).sum().backward()
    assert weights_N.grad[rows < 0].eq(0).all(), "a copy without a row has a zero gradient"


@pytest.mark.parametrize("form", FORMS)
def test_gather(form, case, dtype, device):
    check_gather(ops, form, case, dtype, device)


@pytest.mark.parametrize("form", FORMS)
def test_scatter(form, case, dtype, device):
    check_scatter(ops, form, case, dtype, device)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scatter_with_fp32_weights(form, case, dtype, device):
    check_scatter(ops, form, case, dtype, device, weights_dtype=torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_each_set_of_gradients_alone(form, device):
    """Of movement with weights; x is kept for their gradient alone."""
    case, _ops = CASES[1], torch.ops.moe_ext
    layout = Layout(form, case, device)
    padded_bins = layout.padded_bins if form == "padded" else None
    index = layout.index.order_N, layout.index.bins_E, padded_bins
    where = layout.K, layout.capacity if form == "binned" else 0
    x_TD, x_PD = (case.randn(n, 19, salt=n, dtype=torch.float32, device=device) for n in (layout.T, layout.P))
    weights_N = case.randn(len(layout.ids_N), salt=3, dtype=torch.float32, device=device)
    for call, x in (
        (lambda x, other: _ops.gather(x, other, *index, layout.P, *where), x_TD),
        (lambda x, other: _ops.scatter(x, other, *index, *where), x_PD),
    ):
        inputs = {"x": x, "other": weights_N}
        each_set_alone(call, inputs)
        assert kept(call, inputs, ["x"])[0] == {"other"} and "x" in kept(call, inputs, ["other"])[0]

    def dweights(x, other):
        return _ops.scatter_dweights(x, other, *index, *where, torch.float32)

    inputs = {"x": x_PD, "other": x_TD}
    each_set_alone(dweights, inputs)
    assert kept(dweights, inputs, ["x"])[0] == {"other"} and kept(dweights, inputs, ["other"])[0] == {"x"}


@pytest.mark.c_core
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    layout = Layout(form, SMALLEST, "cpu")
    gradcheck(lambda x: layout.gather(ops, x), {"x": SMALLEST.randn(layout.T, 4, salt=1)})
    x_PD, weights_N = SMALLEST.randn(layout.P, 4, salt=2), SMALLEST.randn(10, salt=3)
    gradcheck(lambda x, w: layout.scatter(ops, x, w), {"x": x_PD, "w": weights_N})
    gradcheck(lambda x: layout.scatter(ops, x, None), {"x": x_PD})


@settings(derandomize=True, max_examples=30, deadline=None)
@given(case=drawn_case())
def test_drawn_routings(case, device):
    for form in FORMS:
        check_gather(ops, form, case, torch.float32, device)
        check_scatter(ops, form, case, torch.float32, device)


def test_strided_rows_are_copied_right(device):
    """A transposed or sliced input gives the result of its contiguous twin, whether taken as it is or copied."""
    case = CASES[0]
    layout = Layout("plain", case, device)
    x_TD = case.randn(case.shape.d, case.shape.T, salt=1, dtype=torch.float32, device=device).T
    same(layout.gather(ops, x_TD), layout.gather(reference, x_TD))
    x_PD = case.randn(layout.P, 2 * case.shape.d, salt=2, dtype=torch.float32, device=device)[:, ::2]
    same(layout.scatter(ops, x_PD, None), layout.scatter(reference, x_PD.contiguous(), None))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("D", [2049, 8300])
def test_rows_wider_than_a_block(form, D, dtype, device):
    case = Case("wide", Shape(4, D, 8, 3, 2), "some_absent")
    check_gather(ops, form, case, dtype, device)
    check_scatter(ops, form, case, dtype, device)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("K", [1, 2, 3, 8, 19, 600])
def test_any_number_of_copies(form, K, dtype, device):
    """Fewer and more of them than a kernel has under way at once, and than it looks up for many tokens."""
    check_scatter(ops, form, Case("many", Shape(5, 16, 8, K + 1, K), "some_absent"), dtype, device)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_rows_at_any_address(offset, dtype, device):
    """Bit for bit what they give at an aligned address, gradients too."""
    case = CASES[0]
    layout = Layout("plain", case, device)

    def moved(x):
        buffer = x.new_empty(offset + x.numel())
        return buffer[offset:].view(x.shape).copy_(x)

    def results(x_TD, x_PD, dy_TD):
        weights_N = case.randn(layout.P, salt=3, dtype=dtype, device=device).requires_grad_()
        y_TD = layout.scatter(ops, x_PD.requires_grad_(), weights_N)
        return layout.gather(ops, x_TD), y_TD, *torch.autograd.grad(y_TD, [x_PD, weights_N], dy_TD)

    x = [case.randn(n, case.shape.d, salt=n, dtype=dtype, device=device) for n in (layout.T, layout.P, layout.T)]
    for got, want in zip(results(*map(moved, x)), results(*x), strict=True):
        same(got, want)


def far_rows(P, D, device):
    """[P,D] of bfloat16 that takes no memory but for the rows that are touched (on a GPU it does)."""
    if device == "cuda":
        return torch.empty(P, D, dtype=torch.bfloat16, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, 2 * P * D, flags=flags), dtype=torch.bfloat16).view(P, D)


def test_more_elements_than_32_bits_count(device):
    P, D = 2**22 + 2, 1024
    want_TD = torch.randn(4, D).bfloat16().to(device)
    index = reference.route_index(torch.tensor([[1], [0], [1], [0]], dtype=torch.int32, device=device), 2)
    x_PD, padded_bins = far_rows(P, D, device), torch.tensor([2**22, P], dtype=torch.int32, device=device)
    rows = [2**22, 0, 2**22 + 1, 1]
    x_PD[rows] = want_TD
    weights_N = torch.ones(4, device=device, requires_grad=True)
    y_TD = ops.padded_scatter(x_PD, index.order_N, None, weights_N, index.bins_E, padded_bins, 1)
    same(y_TD.detach(), want_TD)
    (dweights_N,) = torch.autograd.grad(y_TD, weights_N, want_TD)
    torch.testing.assert_close(dweights_N, want_TD.float().square().sum(1))
    order_N = torch.full((P,), -1, dtype=torch.int32, device=device)
    order_N[:4] = torch.tensor(rows, dtype=torch.int32)
    bins_E = torch.tensor([4], dtype=torch.int32, device=device)
    same(ops.binned_gather(x_PD, order_N, bins_E, 4, 1)[0], want_TD)
