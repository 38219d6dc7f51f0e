"""The harness finds what it is there to find: the kernels of toy.cu pass where right, and fail where they are not."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from harness import library

N = 128
SCHEDULES = ["inorder", "reverse", "shuffled", "warps"]
TIMINGS = ["early", "late", "random"]

MISTAKES = {  # what the harness says, and from which variant on; None: only the result is wrong, under some schedule
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
    "beyond_shared": ("race", "4 bytes at shared memory + 2064"),
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


@pytest.fixture(scope="module")
def toys():
    made = {}
    os.environ["SIMT_PATIENCE"] = "1"  # seconds until a wait without end is one

    def of(variant):
        if variant not in made:
            made[variant] = ctypes.CDLL(library(variant, "libtoy.so"))
            made[variant].run_toy.restype = ctypes.c_char_p
        return made[variant]

    return of


def run(toys, name, wrong, schedule, timing):
    """What the harness says, and whether the result is right."""
    assert toys.simt_configure(schedule.encode(), timing.encode(), ctypes.c_uint64(5)) == 0
    x, y = torch.arange(1.0, N + 1), torch.full([N], torch.nan)
    said = toys.run_toy(name.encode(), wrong, ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()))
    return said and said.decode(), torch.equal(x, y)


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
        assert all(said and message in said for said, _ in found), found
        assert f"{name}<true> (toy.cu:" in found[0][0]


@pytest.mark.parametrize("name", [name for name, (variant, _) in MISTAKES.items() if variant == "race"])
def test_a_race_is_found_under_every_schedule(toys, name):
    for schedule in SCHEDULES:
        for timing in TIMINGS:
            said, _ = run(toys("race"), name, True, schedule, timing)
            assert said and MISTAKES[name][1] in said and "toy.cu:" in said, (said, schedule, timing)


@pytest.mark.parametrize("name", ["no_barrier", "no_wait", "short_wait", "early_refill"])
def test_without_the_detector_some_schedule_shows_it(toys, name):
    assert not all(run(toys("plain"), name, True, s, t)[1] for s in SCHEDULES for t in TIMINGS)


def test_after_a_failure_the_next_launch_is_whole(toys):
    for variant in ("plain", "race"):
        assert run(toys(variant), "early_end", True, "inorder", "early")[0]
        assert run(toys(variant), "early_end", False, "inorder", "early") == (None, True)


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
