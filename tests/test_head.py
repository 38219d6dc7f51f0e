"""Linear + cross-entropy in chunks of tokens."""

import json

import pytest
import torch
from compare import against_reference, each_set_alone, gradcheck
from devices import widest

import moe_ext
from moe_ext import ops, reference
from moe_ext.ops.head import chunk_on


def head_inputs(T, D, V, dtype, device):
    x_TD = torch.randn(T, D, dtype=torch.float64).to(dtype).to(device)
    w_VD = (torch.randn(V, D, dtype=torch.float64) / D**0.5).to(dtype).to(device)
    return {"x_TD": x_TD, "w_VD": w_VD}, torch.randint(0, V, (T,), device=device)


def check_linear_cross_entropy(impl, dtype, device, size=(37, 12, 53), chunk=10, ignored=(), ignore_index=-100):
    inputs, targets_T = head_inputs(*size, dtype, device)
    targets_T[list(ignored)] = ignore_index

    def call(ops, x_TD, w_VD):
        return ops.linear_cross_entropy(x_TD, w_VD, targets_T, ignore_index=ignore_index, chunk=chunk)

    against_reference(impl, call, inputs)


@pytest.mark.parametrize("chunk", [1, 10, 37, 1024])
def test_chunks(chunk, dtype, device):
    check_linear_cross_entropy(ops, dtype, device, chunk=chunk)


def test_a_device_has_chunks_of_its_own(device, monkeypatch):
    inputs, targets_T = head_inputs(chunk_on(device) + 5, 2, 3, torch.float32, device)
    head, rows = moe_ext.ops.head, []
    pass_ = head._xent_
    monkeypatch.setattr(head, "_xent_", lambda logits, *rest: rows.append(len(logits)) or pass_(logits, *rest))
    got = ops.linear_cross_entropy(*inputs.values(), targets_T)
    assert rows == [{"cpu": 1024, "cuda": 4096}[device], 5]
    torch.testing.assert_close(got, reference.linear_cross_entropy(*inputs.values(), targets_T))


@pytest.mark.parametrize("ignored", [(), (0, 3, 36), range(10), range(37)], ids=["none", "some", "a chunk", "all"])
@pytest.mark.parametrize("ignore_index", [-100, -1, 7])
def test_ignored_targets(ignored, ignore_index, dtype, device):
    check_linear_cross_entropy(ops, dtype, device, ignored=ignored, ignore_index=ignore_index)


@pytest.mark.parametrize("size", [(0, 4, 5), (1, 1, 1), (3, 5, 3000), (3, 5, 3001), (130, 33, 2)], ids=str)
def test_sizes(size, dtype, device):
    check_linear_cross_entropy(ops, dtype, device, size)


def test_a_weight_that_is_transposed_has_a_gradient_as_the_shape_function_says():
    inputs, targets_T = head_inputs(5, 3, 4, torch.float32, "cpu")
    x, w = inputs["x_TD"], inputs["w_VD"].T.contiguous().T
    for T in (0, 5):
        args = x[:T], w, targets_T[:T], -100, 2, True, True
        torch.library.opcheck(torch.ops.moe_ext.linear_cross_entropy, args, test_utils="test_faketensor")


@pytest.mark.c_core
def test_gradcheck():
    inputs, targets_T = head_inputs(5, 3, 7, torch.float64, "cpu")
    targets_T[2] = -100
    gradcheck(lambda x_TD, w_VD: ops.linear_cross_entropy(x_TD, w_VD, targets_T, chunk=2), inputs)


def test_only_one_gradient_wanted(device):
    inputs, targets_T = head_inputs(9, 4, 11, widest(device), device)
    each_set_alone(lambda x_TD, w_VD: ops.linear_cross_entropy(x_TD, w_VD, targets_T), inputs)
    with torch.no_grad():
        assert not ops.linear_cross_entropy(inputs["x_TD"].requires_grad_(), inputs["w_VD"], targets_T).requires_grad


def peak_bytes(f, path):
    """The most bytes that f had allocated at once: torch's, by its profiler, and the arena's, each at its most."""
    moe_ext._C.memory_peak()
    before = moe_ext._C.memory_peak()  # of no time at all: what is lent now
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = f()  # noqa: F841  keeps what f returns alive until the profiler has stopped
    profile.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    return peak + moe_ext._C.memory_peak() - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["evaluation", "training"])
def test_at_most_one_chunk_of_logits_is_alive(dtype, trained, tmp_path):
    """Sixteen chunks take what one takes, which may be a product's workspace too."""
    T, D, V, chunk = 1024, 16, 4000, 64
    inputs, targets_T = head_inputs(T, D, V, dtype, "cpu")
    x_TD, w_VD = (t.requires_grad_(trained) for t in inputs.values())

    def peak(tokens):
        def step():
            loss = ops.linear_cross_entropy(x_TD[:tokens], w_VD, targets_T[:tokens], chunk=chunk)
            if trained:
                loss.backward()
            return loss

        step()
        x_TD.grad = w_VD.grad = None
        return peak_bytes(step, tmp_path / "trace.json")

    logits = chunk * V * dtype.itemsize
    gradients = 3 * (T * D + 2 * V * D) * 4  # dx, dw and dw's accumulator, in fp32, and a copy of each at most
    one, all_of_them = peak(chunk), peak(T)
    assert logits <= one and all_of_them <= one + 0.2 * logits + trained * gradients
