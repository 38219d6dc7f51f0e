"""Large tensors on the CPU come from an arena that keeps its memory: a steady step faults nothing in, results behave as
any tensor, and what is kept is bounded. Faults are counted by the kernel, in processes of their own."""

import copy
import io
import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cases import random
from ranks import run_ranks

import moe_ext
from moe_ext import ops
from moe_ext.config import ModelConfig, OptimConfig
from moe_ext.model import GPT
from moe_ext.optim import build_optimizer

MIB = 2**20
pytestmark = pytest.mark.c_core


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def big(mib, value=1.0):
    """A result of an op of so many MiB, all of one value."""
    y = ops.activation(torch.full((mib * 256, 1024), float(value)), "relu")
    assert y.nbytes == mib * MIB
    return y


# ---- no page fault in a steady step ----------------------------------------------------------------------------------
# Counted for ten steps each, by this file as a program. Fewer than one a step: memory that a step loses costs a fault
# for each 4 KB or, in huge pages, each 2 MB. The heaps of malloc and Python grow for some dozens of steps, how many
# varies with the hash seed, and a little now and then: the first ten steps in ROUNDS times ten that are steady count.
# What every step loses shows in all.

STEPS, ROUNDS = 10, 30


def ops_step(dtype, before=lambda: None):
    """Forward and backward of the experts, on a routing of its own each time; all memory is the ops'."""
    T, D, F, E, K = 512, 256, 256, 8, 2
    generator = torch.Generator().manual_seed(0)
    x, weights, gate, up, down = (
        torch.randn(*size, generator=generator).to(dtype).requires_grad_()
        for size in [(T, D), (T, K), (E, F, D), (E, F, D), (E, D, F)]
    )
    dy = torch.randn(T, D, generator=generator).to(dtype)

    def step():
        before()
        for leaf in (x, weights, gate, up, down):
            leaf.grad = None
        index = ops.route_index(random(T, K, E, generator), E)
        ops.expert_mlp(x, gate, up, down, weights, index, act="swiglu").backward(dy)

    return step


def model_step():
    """A training step of the driver's model: most of its tensors are malloc's."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=512, seq_len=128, layers=2, dim=128, heads=4))
    optimizer = build_optimizer(model, OptimConfig())

    def step():
        tokens, targets = torch.randint(512, (2, 2, 128))
        losses = model(tokens, targets)
        (losses.token_loss + losses.aux_loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def faults_of(step):
    counts = []
    while len(counts) < ROUNDS and min(counts, default=STEPS) >= STEPS:
        before = faults()
        for _ in range(STEPS):
            step()
        counts.append(faults() - before)
    return min(counts)


# ---- what is kept is bounded -----------------------------------------------------------------------------------------
# Resident memory, in the same process: in pytest's, what other tests have freed and malloc has kept would count too.


class Grown:
    """MiB that have become resident since the arena was last empty."""

    def __init__(self):
        moe_ext.empty_cache()
        self.before = resident()

    def __call__(self):
        return (resident() - self.before) / MIB


def grown_by_a_peak():
    """After 64 MiB were lent and given back; when the arena is emptied while 2 MiB live."""
    grown = Grown()
    y = big(64)
    del y
    kept = grown()
    z = big(2)
    moe_ext.empty_cache()
    emptied = grown()
    assert (z == 1).all()                       # what lives, stays
    assert (big(64, 2.0) == 2).all()            # and what was given back can be had again
    return kept, emptied


def grown_by_any_sizes():
    """After 64 MiB were lent in pieces of any sizes, given back in no order."""
    grown = Grown()
    for sizes in [(64,), (32, 32), (16, 16, 16, 16), (40, 24), (8,) * 8, (63,)] * 2:
        lent = [big(size) for size in sizes]
        assert all((y == 1).all() for y in lent)
        while lent:
            lent.pop(len(lent) // 2)            # neither first nor last
    return grown()


def grown_after_a_past_peak(survives):
    """After 16 times the arena's size has been lent without need for the rest, twice as a margin."""
    x = torch.ones(256, 1024)
    grown = Grown()
    y = big(40)
    survivor = ops.activation(x, "relu") if survives else None      # made at the peak: it keeps nothing but itself
    del y
    for _ in range(4 * 16 * 64):
        ops.activation(x, "relu")
    assert survivor is None or (survivor == 1).all()
    return grown()


def measure():
    torch.set_num_threads(1)
    kept, emptied = grown_by_a_peak()
    measured = {
        "kept": kept,
        "emptied": emptied,
        "any sizes": grown_by_any_sizes(),
        "past peak": grown_after_a_past_peak(False),
        "past peak below": grown_after_a_past_peak(True),
        "float32": faults_of(ops_step(torch.float32)),
        "bfloat16": faults_of(ops_step(torch.bfloat16)),
        "not kept": faults_of(ops_step(torch.float32, moe_ext.empty_cache)),
        "keep_freed_memory": moe_ext.keep_freed_memory(),
        "model": faults_of(model_step()),
    }
    print(json.dumps(measured))


@pytest.fixture(scope="module")
def measured():
    environment = {name: value for name, value in os.environ.items() if name != "MOE_CHECK"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_steady_step_of_the_ops_faults_nothing_in(measured, dtype):
    assert measured[dtype] < STEPS


def test_a_steady_step_of_the_drivers_model_faults_nothing_in(measured):
    assert measured["keep_freed_memory"] and measured["model"] < STEPS


def test_the_count_sees_memory_that_is_not_kept(measured):
    assert measured["not kept"] >= 2 * STEPS


def test_empty_cache(measured):
    assert measured["kept"] > 60 and measured["emptied"] < 8


def test_any_free_memory_serves_any_size(measured):
    """Pieces join, and the arena is not larger than what was lent at once, 64; the rest is the op's arguments, which
    are malloc's."""
    assert measured["any sizes"] < 64 + 2 * 64 + 8


@pytest.mark.parametrize("where", ["past peak", "past peak below"])
def test_a_peak_of_the_past_is_let_go(measured, where):
    assert measured[where] < 8


# ---- results behave as any tensor ------------------------------------------------------------------------------------


def test_copies_pickles_and_shared_memory():
    y = big(2, 3.0)
    assert (copy.deepcopy(y) == 3).all()
    file = io.BytesIO()
    torch.save(y, file)
    assert file.tell() < 2 * MIB + 2**16        # the tensor, not its neighbours
    file.seek(0)
    assert (torch.load(file) == 3).all()
    address = y.data_ptr()
    y.share_memory_()
    assert y.is_shared() and y.data_ptr() != address and (y == 3).all()
    assert big(2, 4.0).data_ptr() == address    # its block came back
    assert (y == 3).all()


def test_views_and_arrays_keep_the_memory():
    y = big(2, 5.0)
    row, array = y[7], y.numpy()
    del y
    assert (big(2, 6.0) == 6).all() and (row == 5).all() and (array == 5).all()
    row.add_(1)
    assert (array[7] == 6).all()


def test_a_larger_size_is_refused_aloud():
    """torch resizes only what it allocated: the one thing that a result cannot do."""
    y = big(2)
    assert y.resize_(100).shape == (100,)
    with pytest.raises(RuntimeError, match="not resizable"):
        y.resize_(2**20)
    y.set_(torch.zeros(3))
    assert y.shape == (3,)


def test_strides_of_a_gradient_are_its_weights():
    x, weights = torch.randn(64, 256), torch.ones(64, 2)
    index = ops.route_index(random(64, 2, 4, torch.Generator().manual_seed(0)), 4)
    for make in (lambda w: w, lambda w: w.transpose(1, 2).contiguous().transpose(1, 2)):
        gate, down = make(torch.randn(4, 256, 256)).requires_grad_(), make(torch.randn(4, 256, 256)).requires_grad_()
        ops.expert_mlp(x, gate, gate, down, weights, index, act="swiglu").sum().backward()
        assert down.grad.stride() == down.stride() and gate.grad.stride() == gate.stride()


# ---- threads and forks -----------------------------------------------------------------------------------------------


def test_threads():
    def work(number, wrong):
        kept = []
        for i in range(100):
            kept.append((number * 100 + i, big(1, float(number * 100 + i))))
            if len(kept) > 3:
                value, y = kept.pop(i % 3)
                wrong.extend([value] if (y != value).any() else [])

    wrong = []
    threads = [threading.Thread(target=work, args=(number, wrong)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_child_has_its_own(tmp_path):
    """It reads what the parent had, and neither writes into the other, while another thread takes and gives."""
    y, stop = big(2, 7.0), threading.Event()

    def churn():
        while not stop.is_set():
            big(1)

    def body(rank):
        mine = [big(1, rank + i) for i in range(8)]
        return bool((y == 7).all()) and all((z == rank + i).all() for i, z in enumerate(mine))

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        assert run_ranks(2, body, tmp_path) == [True, True]
    finally:
        stop.set()
        thread.join()
    assert (y == 7).all()


if __name__ == "__main__":
    measure()
