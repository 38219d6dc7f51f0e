"""Every op's check on the kernels of cuda/, under every schedule and timing, with the race detector: right, free of
races, and each time with the same bits."""

import ctypes
import hashlib
import itertools

import devices
import pytest
import torch
from cases import Case, Shape
from checks import CHECKS, Tapped
from harness import library
from test_direct import NARROW, TURNS, WIDE, Direct, Rows, Sums

RAGGED = Case("ragged", Shape(37, 24, 40, 5, 3), "some_absent")  # rows of whole 16-byte pieces
ODD = Case("odd", Shape(21, 19, 23, 4, 2), "empty_experts")  # rows of none
TILES = Case("tiles", Shape(100, 136, 72, 2, 2), "skewed")  # more than one tile and more than two stages
GEMMS = ("grouped_gemm", "grouped_gemm_wgrad", "expert_mlp")
SCHEDULES = ["inorder", "reverse", "shuffled", "warps"]
TIMINGS = ["early", "late", "random"]


@pytest.fixture(scope="module")
def configure():
    path = str(library("race"))
    devices.serve(path)
    yield ctypes.CDLL(path).simt_configure
    devices.serve(None)


def fingerprint(name, case, dtype):
    torch.manual_seed(0)
    digest = hashlib.sha256()

    def record(place, x):
        if not place.startswith("argument"):
            digest.update(place.encode() + x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return x

    CHECKS[name](Tapped(name, record), case, dtype, "cpu")
    return digest.hexdigest()


CASES = [(name, case) for name in CHECKS for case in (RAGGED, ODD)] + [(name, TILES) for name in GEMMS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name, case", CASES, ids=[f"{name}-{case.name}" for name, case in CASES])
def test_every_schedule(name, case, dtype, configure):
    seen = {}
    timings = TIMINGS if name in GEMMS else TIMINGS[:1]  # only these kernels copy asynchronously
    for schedule in SCHEDULES:
        for timing in timings:
            assert configure(schedule.encode(), timing.encode(), ctypes.c_uint64(len(seen))) == 0
            seen[schedule, timing] = fingerprint(name, case, dtype)
    assert len(set(seen.values())) == 1, seen


def test_sums_for_hopper(configure):
    """sums_sm90 in both tiles: sums that are not exact have the same bits every time."""
    torch.manual_seed(0)
    direct, seen = Direct(library("race")), {}
    for way in (WIDE, NARROW):
        s = Sums([70, 0, 129, 1, 40], 136, 72, 2)
        s.a[:240], s.b[:240] = torch.randn(240, 136).bfloat16(), torch.randn(240, 72).bfloat16()
        for schedule, timing in itertools.product(SCHEDULES, TIMINGS):
            assert configure(schedule.encode(), timing.encode(), ctypes.c_uint64(len(seen))) == 0
            s.dw.fill_(torch.nan)
            assert s.run(direct, way) == (0, 0)
            assert seen.setdefault(way, s.dw.clone()).equal(s.dw)
        for e, (begin, end) in enumerate(itertools.pairwise([0, *s.bins_E.tolist()])):
            torch.testing.assert_close(s.dw[e].double(), s.want(e, begin, end).double(), rtol=2**-8, atol=1e-4)


def test_rows_for_hopper(configure):
    """rows_sm90 in all tiles, and gathered."""
    direct = Direct(library("race"))
    for seed, (schedule, timing) in enumerate(itertools.product(SCHEDULES, TIMINGS)):
        assert configure(schedule.encode(), timing.encode(), ctypes.c_uint64(seed)) == 0
        for way in (WIDE, TURNS, NARROW):
            Rows([130, 0, 1, 140], 136, 136, 2, way == WIDE).check(direct, way)
        Rows([130, 0, 1, 20], 24, 136, 2, gathered=True).check(direct, WIDE)
