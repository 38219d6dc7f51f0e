"""Functions of cuda/ for Hopper that no op shows by themselves, against numbers in double: direct.cu calls them."""

import ctypes
import itertools
import os

import devices
import pytest
import torch

from moe_ext import reference

DTYPES = {2: torch.bfloat16, 3: torch.float16}  # by moe_dtype
WIDE, TURNS, NARROW = 1, 2, 3  # moe_way: tiles of 128 x 256, 192, 128
BAD_INDEX, BAD_BINS = 3, 4  # moe_status
ACTS = ["swiglu", "geglu", "geglu_tanh", "swiglu_oai", "silu", "gelu", "gelu_tanh", "relu"]  # by moe_act


pytestmark = pytest.mark.kernels


class Direct:
    """The functions of direct.cu in a library of the host harness."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))

    def __call__(self, name, *arguments):
        """What kernels complain of: a moe_status, and where; (0, 0) is nothing."""
        word = ctypes.c_uint64(0)
        sent = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else x if x is None else ctypes.c_int64(x)
                for x in arguments]  # fmt: skip
        status = getattr(self.library, f"direct_{name}")(*sent, ctypes.byref(word))
        assert status == 0, f"{name}: status {status}"
        return word.value >> 56, word.value & (1 << 48) - 1


@pytest.fixture
def direct():
    if not devices.simt:
        pytest.skip("only the host harness has direct.cu")
    calls = Direct(os.path.abspath(devices.simt))
    yield calls
    calls.library.direct_force(-1, 0)


# ---- rows_sm90 -------------------------------------------------------------------------------------------------------
class Rows:
    """y = sum of a[t] b[t] + bias over ragged rows, of small integers: exact. All that is beside the operands is NaN,
    and so are the rows and the matrix of expert 5. gathered: a has 40 rows, of which the index makes three copies."""

    def __init__(
        self, rows, N, K, dtype, along_k=True, terms=1, tail=False, bias=False, gathered=False, pad=0, extra=3
    ):
        generator = torch.Generator().manual_seed(N + K)
        self.N, self.K, self.dtype, self.along_k, self.tail, self.pad = N, K, dtype, along_k, tail, pad
        self.bins_E, self.R, E = torch.tensor(rows).cumsum(0).int(), sum(rows) + extra, len(rows)
        self.index = torch.randint(0, 120, [self.R], generator=generator).int() if gathered else None
        self.a = self.integers(generator, terms, 40 if gathered else self.R, K)
        self.b = self.integers(generator, terms, E, *((N, K) if along_k else (K, N)))
        self.bias = self.integers(generator, E, N) if bias else None
        if E > 5:
            self.b[:, 5] = torch.nan
            if not gathered:
                self.a[:, self.bins_E[4] : self.bins_E[5]] = torch.nan
        self.y = torch.full([self.R, N + pad], torch.nan, dtype=DTYPES[dtype])

    def integers(self, generator, *shape):
        x = torch.full([*shape[:-1], -(-shape[-1] // 8) * 8 + self.pad], torch.nan, dtype=DTYPES[self.dtype])
        x[..., : shape[-1]] = torch.randint(-3, 4, shape, generator=generator)
        return x

    def run(self, direct, way, bins_E=None, group=0):
        bins_E = self.bins_E if bins_E is None else bins_E
        direct.library.direct_force(way, group)
        return direct("rows", self.dtype, self.R, len(bins_E), self.N, self.K, len(self.a), self.along_k, self.tail,
                      self.a, self.a.stride(1), self.index, 3, 40, self.b, self.b.stride(2), bins_E, self.bias,
                      0 if self.bias is None else self.bias.stride(0), self.y, self.y.stride(0))  # fmt: skip

    def want(self, zeros=()):
        y, begin = torch.full_like(self.y, torch.nan), 0
        a = self.a if self.index is None else self.a[:, (self.index.clamp(0, 119) // 3).long()]
        a[:, list(zeros)] = 0
        for e, end in enumerate(self.bins_E.tolist()):
            b = self.b[:, e].mT if self.along_k else self.b[:, e]
            sums = (a[:, begin:end, : self.K].double() @ b[:, : self.K, : self.N].double()).sum(0)
            y[begin:end, : self.N] = sums if self.bias is None else sums + self.bias[e, : self.N].double()
            begin = end
        if self.tail:
            y[begin:, : self.N] = 0
        return y

    def check(self, direct, way, group=0):
        assert self.run(direct, way, group=group) == (0, 0)
        torch.testing.assert_close(self.y, self.want(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("along_k", [True, False])
@pytest.mark.parametrize("way", [WIDE, TURNS, NARROW])
def test_rows(way, along_k, direct):
    """Sums of any length, columns that no tile divides, experts of no row and of one, two terms, the tail."""
    rows = [130, 0, 1, 300, 0, 17]
    for N, K in ((136, 200), (264, 64), (8, 8)):
        Rows(rows, N, K, 2, along_k).check(direct, way)
    Rows(rows, 200, 72, 3, along_k, terms=2, bias=True, pad=8).check(direct, way)
    Rows(rows, 200, 5, 2, along_k, terms=2, tail=True, bias=True, pad=16, extra=140).check(direct, way)
    Rows([0, 0], 64, 64, 2, along_k, tail=True, extra=20).check(direct, way)


@pytest.mark.parametrize("group", [1, 3])
def test_groups_of_row_tiles(group, direct):
    """Every tile is somebody's, in any order: of five row tiles the last group has two, and the tail is an expert."""
    Rows([600, 0, 130], 264, 8, 2, tail=True, extra=300).check(direct, NARROW, group)
    s = Sums([20, 0, 70], 600, 264, 2)
    assert s.run(direct, NARROW, group=group) == (0, 0)
    s.check_all()


@pytest.mark.parametrize("along_k", [True, False])
def test_gathered_rows(along_k, direct):
    for N, K in ((264, 200), (24, 8), (40, 3)):
        Rows([130, 0, 1, 300, 0, 17], N, K, 2, along_k, bias=True, gathered=True).check(direct, WIDE)


def test_gathered_rows_out_of_range(direct):
    rows = Rows([130, 9], 24, 72, 3, gathered=True)
    rows.index[7], rows.index[131] = 120, -1
    status, position = rows.run(direct, WIDE)
    assert status == BAD_INDEX and position in (7, 131)
    torch.testing.assert_close(rows.y, rows.want(zeros=(7, 131)), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", range(len(ACTS)), ids=ACTS)
def test_act(act, dtype, direct):
    """h is rounded once, and so is act of what it was before: within half a unit of the last place."""
    parts, F, K, row_F, type_ = 1 + (act < 4), 264, 24, 272, DTYPES[dtype]
    generator = torch.Generator().manual_seed(act)
    bins_E = torch.tensor([130, 130, 131, 160]).int()
    N, E, index = 160, 4, torch.randint(0, 120, [160], generator=generator).int()
    x = torch.randint(-1, 2, [40, K], generator=generator).to(type_)
    w = torch.randint(-1, 2, [parts, E, F, K], generator=generator).to(type_)
    bias = (torch.randint(-255, 256, [parts, E, F], generator=generator) / 1024).to(type_)
    h, a = torch.full([N, parts * F], torch.nan, dtype=type_), torch.full([N, row_F], torch.nan, dtype=type_)
    assert direct("act", dtype, act, N, E, F, K, x, index, 3, 40, w, bins_E, bias, h, a, row_F) == (0, 0)
    expert = torch.bucketize(torch.arange(N), bins_E, right=True)
    sums = torch.einsum("nk,pnfk->npf", x[index.long() // 3].double(), w[:, expert].double())
    sums = (sums + bias[:, expert].double().transpose(0, 1)).flatten(1)
    assert h.equal(sums.to(type_))
    want = reference.activation(sums, ACTS[act])
    half_a_unit = torch.finfo(type_).eps / 4 * torch.exp2(torch.frexp(want).exponent.double())
    assert ((a[:, :F].double() - want).abs() <= half_a_unit + 1e-6).all() and a[:, F:].isnan().all()


@pytest.mark.parametrize("way", [WIDE, TURNS, NARROW])
def test_rows_under_wrong_bins(way, direct):
    rows = Rows([40, 50, 3], 64, 64, 2)
    for wrong in ([40, 30, 93], [-1, 90, 93], [40, 97, 97]):
        status, _ = rows.run(direct, way, torch.tensor(wrong).int())
        assert status == BAD_BINS and rows.y.isnan().all()


# ---- sums_sm90 -------------------------------------------------------------------------------------------------------
RAGGED = [130, 0, 1, 64, 16, 200, 0, 33]


class Sums:
    """dw[e] = a^T b over the rows of e, of small integers: exact in float, so that dw has one right value. All that is
    beside the operands and beside dw is NaN."""

    def __init__(self, rows, M, N, dtype, pad=0):
        self.bins_E = torch.tensor(rows).cumsum(0).int()
        self.rows, self.M, self.N, self.dtype = rows, M, N, dtype
        R = sum(rows) + 3  # rows of no expert
        generator = torch.Generator().manual_seed(len(rows))
        self.a, self.b = (self.operand(R, size, pad, generator) for size in (M, N))
        self.dw = torch.full([len(rows), M + pad, N + pad], torch.nan, dtype=DTYPES[dtype])

    def operand(self, R, size, pad, generator):
        x = torch.full([R, -(-size // 8) * 8 + pad], torch.nan, dtype=DTYPES[self.dtype])
        x[: sum(self.rows), :size] = torch.randint(-3, 4, [sum(self.rows), size], generator=generator)
        return x

    def run(self, direct, way, bins_E=None, group=0):
        bins_E = self.bins_E if bins_E is None else bins_E
        direct.library.direct_force(way, group)
        return direct("sums", self.dtype, len(self.a), len(self.rows), self.M, self.N, self.a,
                      self.a.stride(0), self.b, self.b.stride(0), bins_E, self.dw, self.dw.stride(0),
                      self.dw.stride(1))  # fmt: skip

    def want(self, e, begin, end):
        a, b = self.a[begin:end, : self.M].double(), self.b[begin:end, : self.N].double()
        return (a.mT @ b).to(self.dw.dtype)

    def check(self, e, want):
        got = self.dw[e, : self.M, : self.N]
        assert got.equal(want), f"expert {e}: {int((got != want).sum())} of {want.numel()} are wrong"

    def check_all(self):
        ends = [0, *self.bins_E.tolist()]
        for e, (begin, end) in enumerate(itertools.pairwise(ends)):
            self.check(e, self.want(e, begin, end))
        assert self.dw[:, self.M :].isnan().all() and self.dw[:, :, self.N :].isnan().all()


@pytest.mark.parametrize("way", [WIDE, NARROW])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, N, pad", [(136, 264, 0), (131, 72, 16), (5, 8, 8)])
def test_sums(M, N, pad, dtype, way, direct):
    s = Sums(RAGGED, M, N, dtype, pad)
    assert s.run(direct, way) == (0, 0)
    s.check_all()


def test_sums_of_every_rest(direct):
    """Every length of a last stage; NaN in the rows of every second expert is nobody else's."""
    s = Sums(list(range(64)), 16, 24, 2)
    ends = [0, *s.bins_E.tolist()]
    for e in range(1, 64, 2):
        s.a[ends[e] : ends[e + 1], :16] = torch.nan
        s.b[ends[e] : ends[e + 1], :24] = torch.nan
    assert s.run(direct, NARROW) == (0, 0)
    for e in range(64):
        if e % 2:
            assert s.dw[e].isnan().all()
        else:
            s.check(e, s.want(e, ends[e], ends[e + 1]))


def check_many(direct):
    rows = torch.randint(0, 40, [300], generator=torch.Generator().manual_seed(0)).tolist()
    s = Sums([*rows, 700], 8, 8, 2)
    assert s.run(direct, NARROW) == (0, 0)
    s.check_all()


def test_sums_of_many_experts(direct):
    """More than are sorted or dealt out at once."""
    check_many(direct)


def test_wrong_bins(direct):
    """Zeros for the expert whose bin is wrong, and a verdict; the others are right."""
    s = Sums([10, 60, 30], 24, 40, 2)
    for bins, wrong in [([10, 5, 100], 1), ([10, 1 << 30, 100], 1), ([-4, 70, 100], 0)]:
        s.dw.fill_(torch.nan)
        status, e = s.run(direct, NARROW, bins_E=torch.tensor(bins).int())
        assert (status, e) == (BAD_BINS, wrong)
        s.check(wrong, torch.zeros(24, 40, dtype=torch.bfloat16))
        s.check(2, s.want(2, bins[1], 100) if bins[1] < 100 else torch.zeros(24, 40, dtype=torch.bfloat16))


def test_more_blocks_than_two(direct):
    """Tiles are dealt out to an odd number of blocks, of which some wait for the longest."""
    for blocks in ("1", "7"):
        program = "import test_direct; test_direct.check_many(test_direct.Direct(devices.simt))"
        done = devices.python(program, "cpu", SIMT_SMS=blocks)
        assert done.returncode == 0, done.stderr


# ---- sort_rows -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("D", [8, 40, 19])
@pytest.mark.parametrize("K", [1, 3, 11])
def test_sort_rows(K, D, direct):
    generator = torch.Generator().manual_seed(K)
    ids_RK = torch.randint(-1, 4, [13, K], generator=generator).int()
    index = reference.route_index(ids_RK, 4)
    N, row_D = int(index.bins_E[-1]), -(-D // 8) * 8
    x = torch.randn(13, D, generator=generator).bfloat16()
    x[0, 0] = torch.nan  # rows are bytes
    to = torch.full([N, row_D], torch.nan, dtype=torch.bfloat16)
    order, inverse = index.order_N, index.inverse_TK
    assert direct("sort_rows", 2, 13, K, D, N, x, order, inverse, to, row_D) == (0, 0)
    want = torch.nn.functional.pad(x[order[:N].long() // K], (0, row_D - D))
    assert to.view(torch.int16).equal(want.view(torch.int16))


@pytest.mark.parametrize("order, inverse", [([0, 4, 1, 3], [0, 2, -1, 3]), ([0, 2, 1, 3], [0, 2, 4, 3])])
def test_a_place_without_a_row_is_zeros(order, inverse, direct):
    x, to = torch.ones(4, 8).bfloat16(), torch.full([4, 8], torch.nan).bfloat16()
    order, inverse = torch.tensor(order).int(), torch.tensor(inverse).int()
    status, at = direct("sort_rows", 2, 4, 1, 8, 4, x, order, inverse, to, 8)
    assert status == BAD_INDEX and at in (1, 2)
    assert to.eq(torch.tensor([[1.0], [0], [1], [1]])).all()


# ---- dact_pass -------------------------------------------------------------------------------------------------------
SLAB, COLUMNS = 128, 256  # positions of a slab; columns of a part of ds


def slabs_of(rows):
    """The positions of each slab, by its number, as expert_sums.cuh cuts them."""
    slabs, begin = {}, 0
    for e, n in enumerate(rows):
        for i in range(0, n, SLAB):
            slabs[begin // SLAB + e + i // SLAB] = slice(begin + i, begin + min(n, i + SLAB))
        begin += n
    assert max(slabs) < begin // SLAB + len(rows)
    return slabs


class Dact:
    """A dA' of experts of so many rows, and what is near it; one position is nobody's, and counts as zeros."""

    def __init__(self, rows, F, dtype, wide, act):
        generator = torch.Generator().manual_seed(F)
        self.rows, self.N, self.F, self.act, self.wide = rows, sum(rows), F, act, wide
        self.dtype, self.type, self.gated = dtype, DTYPES[dtype], act < 4
        self.bins_E, self.U = torch.tensor(rows).cumsum(0).int(), F * (1 + self.gated)
        self.h = (2 * torch.randn(self.N, self.U, generator=generator)).to(self.type)
        self.da = torch.randn(self.N, F, generator=generator).to(self.type)
        flat_ids = self.N + 3
        self.weights = torch.rand(flat_ids, generator=generator).to(torch.float32 if wide else self.type)
        self.order = torch.randperm(flat_ids, generator=generator)[: self.N].int()
        self.order[self.N // 2] = -1

    def blank(self):
        """Where results go: parts of a slab that does not exist stay NaN."""
        sizes = {"sA": (self.N, self.F), "dh": (self.N, self.U), "ds": (self.N, -(-self.F // COLUMNS)),
                 "parts": (self.N // SLAB + len(self.rows), self.U)}  # fmt: skip
        return {name: torch.full(size, torch.nan, dtype=torch.float32 if name in ("ds", "parts") else self.type)
                for name, size in sizes.items()}  # fmt: skip

    def run(self, direct, to, da):
        places = [to.get(name) for name in ("sA", "dh", "ds", "parts")]
        direct("dact", self.dtype, self.act, self.N, self.F, len(self.rows), self.bins_E, self.N + 3, self.order,
               self.weights, self.wide, self.h, da, *places)  # fmt: skip
        return to

    def want(self):
        s = torch.where(self.order < 0, 0, self.weights[self.order.long()]).double()[:, None]
        h, da = self.h.double().requires_grad_(), self.da.double()
        A = reference.activation(h, ACTS[self.act])
        (dh,) = torch.autograd.grad(A, h, s * da)
        ds = [x.sum(1) for x in (da * A.detach()).split(COLUMNS, 1)]
        parts = torch.full([self.N // SLAB + len(self.rows), self.U], torch.nan, dtype=torch.double)
        for slab, positions in slabs_of(self.rows).items():
            parts[slab] = dh[positions].sum(0)
        return {"sA": s * A.detach(), "dh": dh, "ds": torch.stack(ds, 1), "parts": parts}


@pytest.mark.parametrize("act", range(len(ACTS)), ids=ACTS)
@pytest.mark.parametrize("F, dtype, wide", [(40, 2, True), (264, 3, False), (512, 2, False)])
def test_dact(F, dtype, wide, act, direct):
    case = Dact([0, 130, 3, 0, 9], F, dtype, wide, act)
    got, want = case.run(direct, case.blank(), case.da), case.want()
    for name, x in got.items():
        rounding = 1e-5 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps
        assert x.isnan().equal(want[name].isnan()), name
        error = (x.double() - want[name]).nan_to_num().abs().max() / want[name].nan_to_num().abs().max()
        assert error <= rounding, f"{name}: {error:.1e}"
    # What is not wanted changes no bits of the rest; sA may take the place of dA', and alone needs none.
    for left_out in ("sA", "dh", "ds", "parts", "all but sA"):
        some = case.blank() | {"sA": case.da.clone()}
        da = None if left_out == "all but sA" else some["sA"]
        gone = {"dh": ("dh", "parts"), "all but sA": ("dh", "ds", "parts")}.get(left_out, (left_out,))
        for name in gone:
            del some[name]
        for name, x in case.run(direct, some, da).items():
            assert torch.equal(x.nan_to_num(), got[name].nan_to_num()), f"{name} without {left_out}"


def test_a_slab_knows_no_other_expert(direct):
    """The sums of an expert have the same bits wherever it stands, beside NaN and where others have other rows."""
    case = Dact([257, 100, 140], 264, 2, False, 0)
    want = case.run(direct, case.blank(), case.da)["parts"]
    its, here = slice(257, 357), 257 // SLAB + 1
    alone = Dact([3, 100, 0], 264, 2, False, 0)
    alone.h.fill_(torch.nan), alone.da.fill_(torch.nan)
    alone.weights, alone.order[3:103] = torch.cat([case.weights, case.weights])[:106], torch.arange(100)
    alone.h[3:103], alone.da[3:103] = case.h[its], case.da[its]
    alone.weights[:100] = torch.where(case.order[its] < 0, 0, case.weights[case.order[its].long()])
    got = alone.run(direct, alone.blank(), alone.da)["parts"]
    assert torch.equal(got[3 // SLAB + 1], want[here]) and want[here].isfinite().all()


@pytest.mark.parametrize("bins", [[100, 40, 138], [-5, 100, 500], [500, 0, 138], [0, 0, -1]], ids=str)
def test_wrong_bins_lead_to_nothing_outside(bins, direct):
    case, pad = Dact([40, 60, 38], 40, 2, False, 0), 400
    case.bins_E = torch.tensor(bins).int()
    beside = {name: torch.full([len(x) + 2 * pad, x.shape[1]], torch.nan, dtype=x.dtype)
              for name, x in case.blank().items()}  # fmt: skip
    case.run(direct, {name: x[pad:-pad] for name, x in beside.items()}, case.da)
    for name, x in beside.items():
        assert x[:pad].isnan().all() and x[-pad:].isnan().all(), name
