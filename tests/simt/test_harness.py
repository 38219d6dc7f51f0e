"""The harness finds what it is there to find: the kernels of toy.cu and toy_sm90.cu pass where right, and fail where
they are not."""

import ctypes
import os
import re
import subprocess
import sys

import pytest
import torch
from harness import library

N = 128
SCHEDULES = ["inorder", "reverse", "shuffled", "warps"]
TIMINGS = ["early", "late", "random"]

TOYS = {  # what the harness says, and from which variant on; None: only the result is wrong, under some schedule
    "no_barrier": ("race", "race on shared memory"),
    "no_warp_barrier": ("race", "race on shared memory"),
    "half_barriers": ("race", "race on shared memory"),
    "no_wait": ("race", "a cp.async under way"),
    "short_wait": ("race", "a cp.async under way"),
    "early_refill": ("race", "race on shared memory"),
    "two_barriers": ("plain", "a divergent barrier"),
    "early_end": ("plain", "deadlock; 32 wait at __syncthreads"),
    "crossed_waits": ("plain", "wait at __ballot_sync"),
    "two_shuffles": ("plain", "meet at different places"),
    "absent_lane": ("plain", "reads lane 20, which is not in mask 0000ffff"),
    "not_in_mask": ("plain", "is not in its own mask 0000ffff"),
    "beyond_shared": ("race", r"4 bytes at shared memory \+ 2064"),
    "copy_beyond_shared": ("plain", "shared memory ends at 2064"),
    "crooked_row": ("plain", "not a multiple of 16"),
    "never_written": ("plain", None),
    "same_place": ("race", "of another block"),
    "across_blocks": ("race", "of another block"),
    "half_atomic": ("race", "an atomic by thread"),
    "first_come": ("plain", None),
    "no_flag": ("plain", "a wait without end; 64 spin at"),
    "read_beyond": ("asan", "heap-buffer-overflow"),
    "write_beyond": ("asan", "heap-buffer-overflow"),
}
SM90_TOYS = {
    "init_without_fence": ("plain", "no fence_mbarrier_init by thread 0"),
    "init_without_syncthreads": ("plain", r"mbarrier_arrive \(toy_sm90.*(no __syncthreads|has not made)"),
    "init_twice": ("plain", "mbarrier_init .* again"),
    "init_at_4": ("plain", "0x10004 is not a multiple of 8"),
    "no_init": ("plain", "mbarrier_init has not made a barrier"),
    "arrival_too_many": ("plain", "an arrival too many"),
    "arrival_missing": ("plain", r"deadlock; 128 wait at mbarrier_wait .* 1 of 2 arrivals and 0 bytes to come"),
    "overwritten": ("plain", "has been overwritten"),
    "wait_missing": ("race", "race on shared memory"),
    "arrives_before_it_writes": ("race", "race on shared memory"),
    "lapped": ("plain", "a phase misread: phase 1 of .* ends before thread|deadlock; .* wait at mbarrier_wait"),
    "a_turn_ahead": ("plain", "a phase misread: .* told again of the end of phase 0, not of phase 2"),
    "copies_not_awaited": ("race", "a cp.async under way"),
    "load_not_awaited": ("plain", "nobody waited for the TMA load|an arrival too many"),
    "load_swizzled": ("plain", None),
    "tail": ("plain", None),
    "expects_too_little": ("plain", "128 bytes more than expected"),
    "expects_too_much": ("plain", "deadlock; 128 wait at mbarrier_wait .* 128 bytes to come"),
    "load_to_64": ("plain", "0x40 is not a multiple of 128"),
    "load_beyond": ("plain", "shared memory ends at 66560"),
    "load_of_another_rank": ("plain", "3 coordinates for a tensor map of rank 2"),
    "no_map": ("plain", "no tensor map"),
    "load_left_alone": ("plain", "nobody waited for the TMA load"),
    "refilled_early": ("race", "a TMA load .* and a read by thread|a read by thread .* and a TMA load"),
    "wgmma_without_fence": ("plain", "uses d without a wgmma_fence"),
    "second_fence_missing": ("plain", "uses d without a wgmma_fence"),
    "used_before_wait": ("race", "touches accumulators"),
    "wait_too_short": ("race", "touches accumulators"),
    "never_awaited": ("plain", "ends without wgmma_wait"),
    "accumulators_overwritten": ("plain", r"d\[5\] of thread 77 was written"),
    "operands_overwritten": ("race", "a write by thread .* and a wgmma of warpgroup 0"),
    "released_early": ("race", "a TMA load .* and a wgmma of warpgroup 0|a wgmma of warpgroup 0 .* and a TMA load"),
    "operands_differ": ("plain", "threads of a warpgroup differ"),
    "stride_wrong": ("plain", "operand a has another stride than 1024"),
    "leading_wrong": ("plain", "operand b has another leading dimension than 8192"),
    "swizzle_wrong": ("plain", "operand b is not of 128-byte swizzle"),
    "operand_at_128": ("plain", "operand b is no whole step of 16 from a multiple of 1024"),
    "operand_at_64_along_i": ("plain", "operand b is no whole step of 16 from a multiple of 1024"),
    "operand_beyond": ("plain", "shared memory ends at 66560"),
    "a_warp_missing": ("plain", "deadlock; 96 wait at wgmma_wait .* for its warpgroup"),
    "stored_without_fence": ("race", "a wgmma of warpgroup 0 .* and a write by thread .* no fence_async"),
    "copied_without_fence": ("race", "a wgmma of warpgroup 0 .* and a write by thread .* no fence_async"),
    "load_over_stores": ("race", "a TMA load .* and a write by thread .* no fence_async"),
    "half_a_block": ("race", "race on shared memory"),
    "counts_differ": ("plain", r"sync_threads \(.*\) of (64|128) threads at barrier 1, where thread"),
    "too_few_come": ("plain", "deadlock; 96 wait at sync_threads .* for 128 threads at barrier 3"),
    "lanes_missing": ("plain", r"of warp [23] only lanes 0000ffff came to barrier 2"),
    "too_many_registers": ("plain", "deadlock; .* wait at setmaxnreg .* for 232 registers a thread"),
    "more_that_are_fewer": ("plain", "40 registers are not more than 248"),
    "stmatrix_without_syncwarp": ("race", "race on shared memory"),
}
MISTAKES = TOYS | SM90_TOYS


@pytest.fixture(scope="module")
def toys():
    made = {}
    os.environ["SIMT_PATIENCE"] = "1"  # seconds until a wait without end is one

    def of(variant):
        if variant not in made:
            made[variant] = ctypes.CDLL(library(variant, "libtoy.so"))
            made[variant].run_toy.restype = made[variant].run_toy_sm90.restype = ctypes.c_char_p
        return made[variant]

    return of


def run(toys, name, wrong, schedule, timing):
    """What the harness says, and whether the result is right."""
    assert toys.simt_configure(schedule.encode(), timing.encode(), ctypes.c_uint64(5)) == 0
    x, y = torch.arange(1.0, N + 1), torch.full([N], torch.nan)
    if name in TOYS:
        said = toys.run_toy(name.encode(), wrong, *map(_pointer, (x, y)))
        return said and said.decode(), torch.equal(x, y)
    x_RC = ((5 * torch.arange(70)[:, None] + 3 * torch.arange(128)) % 7 - 3).bfloat16()
    said = toys.run_toy_sm90(name.encode(), wrong, *map(_pointer, (x_RC, y)))
    return said and said.decode(), torch.equal(x, y)


def _pointer(x):
    return ctypes.c_void_p(x.data_ptr())


@pytest.mark.parametrize("variant", ["plain", "race"])
@pytest.mark.parametrize("name", MISTAKES)
def test_a_right_kernel_passes_under_every_schedule(toys, name, variant):
    for schedule in SCHEDULES:
        for timing in TIMINGS:
            assert run(toys(variant), name, False, schedule, timing) == (None, True), (schedule, timing)


@pytest.mark.parametrize("name", [name for name, (variant, _) in MISTAKES.items() if variant == "plain"])
def test_a_mistake_is_found(toys, name):
    found = [run(toys("plain"), name, True, schedule, "early") for schedule in SCHEDULES]
    if (message := MISTAKES[name][1]) is None:
        assert not all(right for _, right in found)
    else:
        assert all(said and re.search(message, said) for said, _ in found), found
        assert f"{name}<true> (toy" in found[0][0]


@pytest.mark.parametrize("name", [name for name, (variant, _) in MISTAKES.items() if variant == "race"])
def test_a_race_is_found_under_every_schedule(toys, name):
    for schedule in SCHEDULES:
        for timing in TIMINGS:
            said, _ = run(toys("race"), name, True, schedule, timing)
            assert said and re.search(MISTAKES[name][1], said) and ".cu:" in said, (said, schedule, timing)


SHOWN = ["no_barrier", "no_wait", "short_wait", "early_refill", "wait_missing", "copies_not_awaited", "refilled_early",
         "used_before_wait", "wait_too_short", "operands_overwritten", "released_early", "half_a_block"]  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_without_the_detector_some_schedule_shows_it(toys, name):
    assert not all(run(toys("plain"), name, True, s, t)[1] for s in SCHEDULES for t in TIMINGS)


@pytest.mark.parametrize("change, accepted", [
    ({}, True), ({"base": 4096 + 8}, False), ({"columns": 0}, False), ({"rows": 0}, False), ({"rows": 2**32}, True),
    ({"rows": 2**32 + 1}, False), ({"stride": 200}, False), ({"stride": 0}, True), ({"stride": 2**40}, False),
    ({"box_columns": 128}, False), ({"box_rows": 256}, True), ({"box_rows": 257}, False), ({"rows": 3}, True),
])  # fmt: skip
def test_the_encoder_refuses_what_the_driver_does(toys, change, accepted):
    sizes = {"base": 4096, "columns": 100, "rows": 70, "stride": 208, "box_columns": 64, "box_rows": 32} | change
    assert (toys("plain").encode_toy(*map(ctypes.c_uint64, sizes.values())) == 0) == accepted


def test_after_a_failure_the_next_launch_is_whole(toys):
    for variant in ("plain", "race"):
        for name in ("early_end", "arrival_missing", "never_awaited"):
            assert run(toys(variant), name, True, "inorder", "early")[0]
            assert run(toys(variant), name, False, "inorder", "early") == (None, True)


@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("name", [name for name, (variant, _) in MISTAKES.items() if variant == "asan"])
def test_an_address_outside_an_array_ends_the_process(name, wrong):
    libraries = [subprocess.check_output(["gcc", f"-print-file-name={lib}"], text=True).strip()
                 for lib in ("libasan.so", "libstdc++.so.6")]  # fmt: skip
    program = f"""if True:
        import ctypes
        malloc = ctypes.CDLL(None).malloc
        malloc.restype = ctypes.c_void_p
        x, y = ((ctypes.c_float * {N}).from_address(malloc(4 * {N})) for _ in range(2))
        ctypes.CDLL({str(library("asan", "libtoy.so"))!r}).run_toy({name!r}.encode(), {wrong}, x, y)"""
    environment = os.environ | {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode != 0) == bool(wrong), done.stderr
    assert (MISTAKES[name][1] in done.stderr) == bool(wrong)
