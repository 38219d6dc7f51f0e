"""Whose threads help, and that it shows in no result: uneven experts, several callers, forked children. A child has no
threads of torch's, and so its regions are run by those of csrc/pool.c (tests/c/test_pool.c)."""

import functools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cases import Case, Shape
from ranks import fork

from moe_ext import ops

pytestmark = pytest.mark.c_core

# Little work in many tasks: an expert of more than 768 rows is cut. Below 32768 elements torch uses no threads itself.
UNEVEN = [
    Case("one_takes_all", Shape(1000, 24, 40, 6, 1), "one_takes_all"),
    Case("skewed", Shape(500, 24, 40, 8, 3), "skewed"),
    Case("empty_experts", Shape(300, 24, 40, 17, 2), "empty_experts"),
    Case("all_absent", Shape(20, 24, 40, 5, 2), "all_absent"),
    Case("one_expert", Shape(900, 24, 40, 1, 1), "random"),
    Case("no_tokens", Shape(0, 24, 40, 4, 2), "random"),
    Case("wide", Shape(20, 24, 600, 2, 1), "random"),
]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@functools.cache
def inputs(case):
    """Of a layer with biases; dy at the end."""
    T, D, F, E, K = case.shape
    sizes = [(T, D), (E, F, D), (E, F, D), (E, D, F), (T, K), (E, F), (E, F), (E, D), (T, D)]
    return case.ids(), [case.randn(*size, salt=1 + i, dtype=torch.float32) for i, size in enumerate(sizes)]


def bits(case):
    """Of the result and every gradient."""
    ids_TK, (*leaves, dy_TD) = inputs(case)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    *inner, gate_bias, up_bias, down_bias = leaves
    y_TD = ops.expert_mlp(*inner, ops.route_index(ids_TK, case.shape.E), act="swiglu", gate_bias=gate_bias,
                          up_bias=up_bias, down_bias=down_bias, num_copies=(ids_TK >= 0).sum().item())  # fmt: skip
    y_TD.backward(dy_TD)
    return [t.detach().numpy().tobytes() for t in (y_TD, *(leaf.grad for leaf in leaves))]


def in_child(body, seconds=100):
    """Whether body() is true in a forked child, which a hang ends."""
    child = fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(seconds)
            status = 0 if body() else 2
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


def own_threads():
    """Of csrc/pool.c, as the kernel numbers them."""
    tasks = Path("/proc/self/task")
    return [int(task.name) for task in tasks.iterdir() if (task / "comm").read_text().strip() == "moe_ext"]


@pytest.mark.parametrize("case", UNEVEN, ids=lambda case: case.name)
def test_the_same_bits_for_any_number_of_threads(case):
    torch.set_num_threads(1)
    want = bits(case)

    def same():
        for n in (2, 3, 5, 2):
            torch.set_num_threads(n)
            if bits(case) != want:
                return False
        return True

    assert same()
    assert in_child(lambda: same() and (len(own_threads()) > 0 or case.shape.T == 0))


def test_callers_beside_each_other():
    """Two Python threads, which also change the number of threads as they go."""
    case = UNEVEN[1]
    want = bits(case)

    def same():
        wrong = []

        def call(numbers):
            for n in numbers:
                torch.set_num_threads(n)
                wrong.extend(bits(case) != want for _ in range(5))

        callers = [threading.Thread(target=call, args=(numbers,)) for numbers in ((2, 3, 1, 2), (3, 1, 5, 2))]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        return len(wrong) == 40 and not any(wrong)

    assert same()
    assert in_child(same)


def test_a_child_of_a_child():
    """Each has threads of its own, though its parent's regions had some before."""
    case = UNEVEN[1]
    torch.set_num_threads(1)
    want = bits(case)

    def first():
        torch.set_num_threads(3)
        return bits(case) == want and len(own_threads()) == 2 and in_child(second, 50)

    def second():
        return not own_threads() and bits(case) == want and len(own_threads()) == 2

    assert in_child(first)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_own_threads_run_in_all_places_of_a_bound_openmp():
    """Which binds the caller to one of them; and a process with such threads ends."""
    command = (
        "import os, torch, test_threads; torch.set_num_threads(2)\n"
        "def places():\n"
        "    test_threads.bits(test_threads.UNEVEN[1])\n"
        "    print(*map(len, [os.sched_getaffinity(0), *map(os.sched_getaffinity, test_threads.own_threads())]))\n"
        "pid = os.fork()\n"
        "if pid: raise SystemExit(os.waitpid(pid, 0)[1])\n"
        "places()\n"
    )
    environment = os.environ | {"OMP_PROC_BIND": "true", "OMP_PLACES": "threads",
                                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", str(len(os.sched_getaffinity(0)))]
