"""Bad input ends in an exception that names op and argument, what it got and wants, and where it can, what to type.

Sizes, dtypes and options are refused by the call, in the same words on every device. Values in memory the C core sees
during the call; a kernel leaves a verdict that the call (MOE_CHECK=1, as in these tests), the next call or
moe_ext.synchronize() raises.
"""

import math
import re

import devices
import pytest
import torch
from cases import SMALLEST
from checks import CHECKS, Tapped

import moe_ext
from moe_ext import ops, reference

T, D, F, E, K = 6, 4, 5, 3, 2
raw = torch.ops.moe_ext
KEY = dict(seed=0, step=0, site=0)
ELSEWHERE = {"cpu": "meta", "cuda": "cpu"}


def add_norm(x, y, w_n):
    return ops.add_norm(x, y, w_n, None, 1e-6, centred=True, dtype=torch.bfloat16)


class Inputs:
    """Good arguments of every op on one device."""

    def __init__(self, device):
        generator = torch.Generator().manual_seed(0)

        def randn(*size):
            return torch.randn(*size, generator=generator).to(device)

        self.device, self.elsewhere = device, ELSEWHERE[device]
        self.x, self.rows, self.w = randn(T, D), randn(T * K, D), randn(E, D, F)
        self.gate, self.down = randn(E, F, D), randn(E, D, F)
        self.weights, self.logits = randn(T, K), randn(T, E)
        self.ids = (torch.arange(T * K, dtype=torch.int32).view(T, K) % E).to(device)
        self.targets = torch.arange(T, device=device) % F
        self.index = reference.route_index(self.ids, E)
        self.order, self.bins = self.index.order_N, self.index.bins_E

    def i32(self, *values):
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def one_nan(self):
        logits = self.logits.clone()
        logits[2, 1] = math.nan
        return logits

    def mlp(self, act="swiglu", num_copies=None, down_bias=None, **changes):
        arguments = dict(x=self.x, gate=self.gate, up=self.gate, down=self.down, weights=self.weights) | changes
        return ops.expert_mlp(*arguments.values(), self.index, act=act, num_copies=num_copies, down_bias=down_bias)


# The words that a message must hold, in this order, and the call that must raise it.
REFUSED = {
    # dtype
    "route_index: ids float32 wanted int32 Hint ids.to": lambda i: ops.route_index(i.ids.float(), E),
    "gather: x int32 wanted float32 Hint x.to": lambda i: ops.gather(i.x.int(), i.order, None, i.bins, K),
    "gather: bins int64 wanted int32 Hint bins.to": lambda i: ops.gather(i.x, i.order, None, i.bins.long(), K),
    "scatter: weights float64 wanted float32 Hint": (
        lambda i: ops.scatter(i.rows, i.order, None, i.weights.flatten().double(), i.bins, K)
    ),
    "grouped_gemm: w float64 wanted float32 Hint w.to": lambda i: ops.grouped_gemm(i.rows, i.w.double(), i.bins),
    "expert_mlp: gate bfloat16 wanted float32 Hint": lambda i: i.mlp(gate=i.gate.bfloat16()),
    "linear: w float64 wanted float32 Hint w.to": lambda i: raw.linear(i.x, i.w[0].T.double()),
    "select_bias_update: counts int32 wanted int64": (
        lambda i: ops.select_bias_update(torch.zeros(E, device=i.device), i.i32(1, 2, 3), 0.1)
    ),
    "targets int32 wanted int64 Hint": lambda i: ops.linear_cross_entropy(i.x, i.w[0].T, i.targets.int()),
    "linear_cross_entropy: w float64 wanted float32": (
        lambda i: ops.linear_cross_entropy(i.x, i.w[0].T.double(), i.targets)
    ),
    "sort: x float32 wanted int16 int32 int64": lambda i: ops.sort(i.x[0]),
    "histogram: x float32 wanted": lambda i: ops.histogram(i.x, E),
    # device
    "grouped_gemm: w on device first argument on Hint w.to": (
        lambda i: ops.grouped_gemm(i.rows, i.w.to(i.elsewhere), i.bins)
    ),
    "grouped_gemm: bins on device first argument on": lambda i: ops.grouped_gemm(i.rows, i.w, i.bins.to(i.elsewhere)),
    "gather: indices on device first argument on": lambda i: ops.gather(i.x, i.order.to(i.elsewhere), None, i.bins, K),
    "expert_mlp: down on device first argument on": lambda i: i.mlp(down=i.down.to(i.elsewhere)),
    # shape
    "route_index: ids shape [2] wanted [T, K]": lambda i: ops.route_index(i.ids[0], E),
    "gather: x shape [1, 6, 4] wanted [T, D]": lambda i: raw.gather(i.x[None], None, i.order, i.bins, None, 12, K, 0),
    "gather: indices shape [11] wanted [N=12]": (
        lambda i: raw.gather(i.x, None, i.order[:-1], i.bins, None, 12, K, 0)
    ),
    "scatter: weights shape [11] wanted [N=12]": (
        lambda i: raw.scatter(i.rows, i.weights.flatten()[1:], i.order, i.bins, None, K, 0)
    ),
    "gather: indices shape [12] wanted [N=30]": lambda i: raw.gather(i.x, None, i.order, i.bins, None, 12, 5, 0),
    "grouped_gemm: w [3, 3, 5] wanted I=4": lambda i: ops.grouped_gemm(i.rows, i.w[:, :3], i.bins),
    "grouped_gemm: bins [3] wanted [E=2]": lambda i: ops.grouped_gemm(i.rows, i.w[:2], i.bins),
    "activation: h 3 columns swiglu wants equal width": lambda i: ops.activation(i.x[:, :3], "swiglu"),
    "expert_mlp: gate [3, 5, 4] wanted [E=3, F=3, D=4]": lambda i: i.mlp(down=i.down[:, :, :3]),
    "expert_mlp: gate [3, 5, 4] wanted 2F=10": lambda i: i.mlp(up=None),
    "expert_mlp: down_bias [3, 5] wanted [E=3, D=4]": lambda i: i.mlp(down_bias=torch.zeros(E, F, device=i.device)),
    'expert_mlp: up act="gelu" Hint up=None': lambda i: i.mlp(act="gelu"),
    "router: select_bias [4] wanted [E=3]": (
        lambda i: ops.router(i.logits, K, select_bias_E=torch.zeros(4, device=i.device))
    ),
    "router: ids [6, 2] wanted [T=6, k=1]": lambda i: ops.router(i.logits, 1, ids_TK=i.ids),
    "router: ids int64 wanted int32 Hint ids.to": lambda i: ops.router(i.logits, K, ids_TK=i.ids.long()),
    "router: ids and balanced Hint balanced=False": (
        lambda i: ops.router(i.logits, K, ids_TK=i.ids, balanced=True)
    ),
    "linear_cross_entropy: w [5, 3] wanted [V, D=4]": (
        lambda i: ops.linear_cross_entropy(i.x, i.w[0].T[:, :3], i.targets)
    ),
    "router_logits: x [6, 4] w [5, 3] wanted [T, D] [E, D]": (
        lambda i: raw.router_logits(i.x.bfloat16(), i.w[0].T[:, :3])
    ),
    "linear_cross_entropy: targets [5] wanted [T=6]": (
        lambda i: ops.linear_cross_entropy(i.x, i.w[0].T, i.targets[1:])
    ),
    "balance_counts: T=6 multiple rows_per_scope=4": lambda i: ops.balance_counts(i.ids, E, 4),
    "capacity_drop: T=6 rows_per_scope=4": lambda i: ops.capacity_drop(i.ids, E, i.i32(2), rows_per_scope=4),
    "capacity_drop: capacity shape [1] wanted [G=3]": (
        lambda i: ops.capacity_drop(i.ids, E, i.i32(2), rows_per_scope=2)
    ),
    "balance_loss: counts G=4 divide T=6": lambda i: ops.balance_loss(i.logits, i.bins.repeat(4, 1), K),
    "expert_mlp: size num_copies number of ids >= 0": lambda i: i.mlp(num_copies=13),
    "topology: E*cols=40000 int16": lambda i: ops.topology(i.i32(4, 8), 4, 2, 20000),
    # options
    "router: k is 4 wanted 1 .. E=3": lambda i: ops.router(i.logits, 4),
    "router: k is 0 wanted 1 .. E=3": lambda i: ops.router(i.logits, 0),
    'router: score "softmax" wanted softmax_topk sigmoid': lambda i: ops.router(i.logits, K, score="softmax"),
    "router: norm_p=-1": lambda i: ops.router(i.logits, K, norm_p=-1.0),
    'activation: act "swish" wanted swiglu': lambda i: ops.activation(i.x, "swish"),
    'balance_loss: form "l2" wanted switch': lambda i: ops.balance_loss(i.logits, i.bins[None], K, form="l2"),
    "linear_cross_entropy: chunk is 0 wanted >= 1": (
        lambda i: ops.linear_cross_entropy(i.x, i.w[0].T, i.targets, chunk=0)
    ),
    "random_uniform: got 1 and 0 wanted low < high": (
        lambda i: ops.random_uniform(2, 2, low=1.0, high=0.0, device=i.device, **KEY)
    ),
    "random_normal: got 0 and -1 wanted std >= 0": (
        lambda i: ops.random_normal(2, 2, std=-1.0, device=i.device, **KEY)
    ),
    "dropout: step site must lie in got -1": lambda i: ops.dropout(i.x, 0.5, seed=0, step=-1, site=0),
    "histogram: max_val is -1 wanted >= 0": lambda i: ops.histogram(i.ids, -1),
    "dropout: p 1.5 wanted 0 <= p < 1": lambda i: ops.dropout(i.x, 1.5, **KEY),
    "sort: end_bit=40": lambda i: ops.sort(i.ids[0], 40),
    "sort: n=40000 fit dtype": lambda i: ops.sort(torch.zeros(40000, dtype=torch.int16, device=i.device)),
    "rms_norm: w float64 wanted float32 Hint w.to": lambda i: ops.rms_norm(i.x, i.x[0].double(), 1e-6),
    "rms_norm: w [3] wanted [n=4]": lambda i: ops.rms_norm(i.x, i.x[0, 1:], 1e-6),
    "rms_norm: x int32 wanted float": lambda i: ops.rms_norm(i.x.int(), i.x[0], 1e-6),
    "rms_norm: a size is negative n=0 columns": lambda i: ops.rms_norm(i.x[:, :0], i.x[0, :0], 1e-6),
    "add_norm: x float64 wanted float32 Hint x.to": lambda i: add_norm(i.x.double(), None, i.x[0]),
    "add_norm: w [3] wanted [n=4]": lambda i: add_norm(i.x, None, i.x[0, 1:]),
    "add_norm: y float32 wanted bfloat16 Hint y.to": lambda i: add_norm(i.x, i.x, i.x[0]),
    "add_norm: y [3, 2, 4] wanted that of x ([2, 3, 4])": (
        lambda i: add_norm(i.x.view(2, 3, 4), i.x.bfloat16().view(3, 2, 4), i.x[0])
    ),
    "add_norm: a size is negative n=0 columns": lambda i: add_norm(i.x[:, :0], None, i.x[0, :0]),
    "square_sum: x int32 wanted float": lambda i: ops.square_sum(i.x.int()),
    "rotate: x int32 wanted float": lambda i: ops.rotate(i.x.int()[None, :, None], *[i.x[:, None]] * 2),
    "rotate: P=3 that divide R=4": lambda i: raw.rotate(i.x[:4, None], *[i.x[:3, :1].contiguous()] * 2, False),
    "rotate: n=4 <= d/2 d=4": lambda i: ops.rotate(i.x[:, None, None], *[i.x[:1, None]] * 2),
    "rotate: cos [2, 1, 1] wanted [S=4, 1, n] or [B=1, S=4": (
        lambda i: ops.rotate(i.x[None, :4, None], *[i.x[:2, :1, None]] * 2)
    ),
    "rotate: sin [2, 4, 1, 1] wanted alike": (
        lambda i: ops.rotate(i.x[None, :4, None].expand(2, 4, 1, 4), i.x[:4, :1, None], i.x.new_ones(2, 4, 1, 1))
    ),
}
# The same for ValueErrors of the functions that have MegaBlocks' names.
SHAPES = {
    "gather: x shape [1, 6, 4] wanted [T, D]": lambda i: ops.gather(i.x[None], i.order, None, i.bins, K),
    "gather: indices shape [11] wanted [N=12]": lambda i: ops.gather(i.x, i.order[:-1], None, i.bins, K),
    "gather: indices shape [12] wanted [N=30]": lambda i: ops.gather(i.x, i.order, None, i.bins, 5),
    "gather: bin_ids shape [11] wanted [N=12]": lambda i: ops.gather(i.x, i.order, i.order[1:], i.bins, K),
    "gather: bins shape [3, 1] wanted [E]": lambda i: ops.gather(i.x, i.order, None, i.bins[:, None], K),
    "scatter: x shape [4] wanted [rows, D]": lambda i: ops.scatter(i.rows[0], i.order, None, None, i.bins, K),
    "scatter: weights shape [11] wanted [N=12]": (
        lambda i: ops.scatter(i.rows, i.order, None, i.weights.flatten()[1:], i.bins, K)
    ),
    "padded_gather: padded_bins shape [2] wanted [E=3]": (
        lambda i: ops.padded_gather(i.x, i.order, None, i.bins, i.bins[1:], K)
    ),
    "padded_scatter: bin_ids shape [3] wanted [N=12]": (
        lambda i: ops.padded_scatter(i.rows, i.order, i.bins, None, i.bins, i.bins, K)
    ),
    "binned_gather: indices shape [11] wanted [N=12]": lambda i: ops.binned_gather(i.x, i.order[1:], i.bins, 2, K),
    "binned_scatter: x shape [12, 4] wanted [E, C, D]": (
        lambda i: ops.binned_scatter(i.rows, i.order, None, i.bins, K)
    ),
    "binned_scatter: bins shape [2] wanted [E=3]": (
        lambda i: ops.binned_scatter(i.w, i.order, None, i.bins[1:], K)
    ),
    "sort: x shape [6, 2] wanted [n]": lambda i: ops.sort(i.ids),
    "histogram: x shape [1, 6, 2] wanted [B, n]": lambda i: ops.histogram(i.ids[None], E),
    "cumsum: x shape [] wanted [n]": lambda i: ops.inclusive_cumsum(i.bins[0], 0),
    "topology: padded_bins shape [1, 3] wanted [E]": lambda i: ops.topology(i.bins[None], 4, 2, 1),
    "replicate: bins shape [3] wanted [nb=4]": lambda i: ops.replicate(i.x, i.bins, 12),
}

# RuntimeErrors again, about values in memory, in the words of the C core.
VALUES = {
    "route_index: ids 3 wanted < 3 or -1": lambda i: ops.route_index(i.ids + 1, E),
    "route_index: ids -2 wanted or -1": lambda i: ops.route_index(i.ids - 2, E),
    "route_index: ids wanted < 3 or -1": lambda i: ops.route_index(i.ids.long() + 2**32, E),
    "capacity_drop: ids 2 wanted < 2 or -1": lambda i: ops.capacity_drop(i.ids, 2, i.i32(2)),
    "capacity_drop: wanted capacity >= 0": lambda i: ops.capacity_drop(i.ids, E, i.i32(2, -1), rows_per_scope=3),
    "balance_counts: ids 2 wanted < 2 or -1": lambda i: ops.balance_counts(i.ids, 2),
    "gather: out of range indices": lambda i: ops.gather(i.x, i.order + 20, None, i.bins, K),
    "xent_: targets 5 wanted < 5 or -100": lambda i: ops.linear_cross_entropy(i.x, i.w[0].T, i.targets + 1),
    "gather: bins non-decreasing": lambda i: ops.gather(i.x, i.order, None, i.i32(5, 3, 12), K),
    "gather: bins start at 0": lambda i: ops.gather(i.x, i.order, None, i.i32(-5, 3, 12), K),
    "gather: bins end within the rows": lambda i: ops.gather(i.x, i.order, None, i.i32(5, 9, 13), K),
    "scatter: bins end": lambda i: ops.scatter(i.rows, i.order, None, None, i.i32(5, 9, 13), K),
    "grouped_gemm: bins non-decreasing": lambda i: ops.grouped_gemm(i.rows, i.w, i.i32(5, 3, 12)),
    "grouped_gemm: bins within R=12": lambda i: ops.grouped_gemm(i.rows, i.w, i.i32(5, 9, 13)),
    "gather: bins within the rows": lambda i: ops.padded_gather(i.x, i.order, None, i.bins, i.i32(1, 2, 3), K),
    "topology: padded_bins multiples of block=4": lambda i: ops.topology(i.i32(3, 4), 4, 1, 2),
    "replicate: bins within n=5": lambda i: ops.replicate(i.x, i.i32(1, 2, 3, 9), 5),
    "expert_mlp: bins num_copies number of ids >= 0": lambda i: i.mlp(num_copies=11),
    "router: ids 3 at flat position 1 wanted 0 <= id < 3 or -1": lambda i: ops.router(i.logits, K, ids_TK=i.ids + 2),
    "router: ids -3 wanted or -1": lambda i: ops.router(i.logits, K, ids_TK=i.ids - 3),
    "router: ids expert 1 twice for token 0 wanted distinct": (
        lambda i: ops.router(i.logits, K, ids_TK=torch.ones_like(i.ids))
    ),
    "router: NaN logits Hint torch.isnan": lambda i: ops.router(i.one_nan(), K),
}


def pattern(words):
    return re.compile(".*".join(map(re.escape, words.split(" "))), re.DOTALL)


@pytest.mark.parametrize("words", REFUSED)
def test_message(words, device):
    with pytest.raises(RuntimeError, match=pattern(words)):
        REFUSED[words](Inputs(device))


@pytest.mark.parametrize("name", CHECKS)
def test_an_argument_elsewhere_is_called_as_its_caller_calls_it(name, device):
    def call(tap):
        CHECKS[name](Tapped(name, tap), SMALLEST, torch.float32, device)

    places = []
    call(lambda place, x: places.append(place) or x)
    arguments = {place.removeprefix("argument "): place for place in places if place.startswith("argument ")}
    torchs_own = {("padded_gather", "padded_bins"), ("noisy", "scale_E"), ("linear", "w_OI"), ("linear", "bias_O")}
    for argument in list(arguments)[1:]:
        if (name, argument) in torchs_own:  # .item(), an operator, whole ops
            continue
        with pytest.raises(RuntimeError, match=r"is on device .*, the first argument on ") as error:
            call(lambda place, x, here=arguments[argument]: x.to(ELSEWHERE[device]) if place == here else x)
        said = re.match(r"moe_ext::\w+: (\w+) is", str(error.value))[1]
        assert argument in (said, f"{said}_{argument.rpartition('_')[2]}")


@pytest.mark.parametrize("words", SHAPES)
def test_message_about_shapes(words, device):
    with pytest.raises(ValueError, match=pattern(words)):
        SHAPES[words](Inputs(device))


@pytest.mark.parametrize("words", VALUES)
def test_message_about_values(words, device):
    said = words
    if device == "cuda" or devices.simt:
        said = f"moe_ext::{words.partition(' ')[0]} at flat position of an earlier on this device. Hint"
    with pytest.raises(RuntimeError, match=pattern(said)):
        VALUES[words](Inputs(device))


def test_a_failed_op_leaves_its_inputs_alone(device):
    inputs = Inputs(device)
    tensors = [t for t in vars(inputs).values() if isinstance(t, torch.Tensor)]
    before = [t.clone() for t in tensors]
    for call in (*REFUSED.values(), *SHAPES.values(), *VALUES.values()):
        with pytest.raises((RuntimeError, ValueError)):
            call(inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


# ---- the device error word: without MOE_CHECK ------------------------------------------------------------------------

LATER = """
import sys
from test_errors import E, VALUES, Inputs
from moe_ext import ops
def finished():
    if device == "cuda":
        torch.cuda.synchronize()
    return Inputs(device)
for words, call in VALUES.items():
    inputs = finished()
    call(inputs)                                        # says nothing yet
    try:
        moe_ext.synchronize(device)
        sys.exit(f"synchronize() is silent about: {words}")
    except RuntimeError as error:
        assert "moe_ext::check: " in str(error) and "of an earlier" in str(error), error
    moe_ext.synchronize(device)                               # a verdict is told once
    assert ops.route_index(inputs.ids, E).order_N.equal(inputs.order), "the device stays usable"
    call(inputs)
    finished()
    try:
        ops.histogram(inputs.ids, E)
        sys.exit(f"the next call is silent about: {words}")
    except RuntimeError as error:
        assert "moe_ext::histogram: " in str(error) and "of an earlier" in str(error), error
    for name, tensor in vars(Inputs(device)).items():
        assert not isinstance(tensor, torch.Tensor) or tensor.equal(getattr(inputs, name)), name
print("all told later")
"""


@pytest.mark.kernels
def test_a_verdict_waits_for_check_or_the_next_call(device):
    done = devices.python(LATER, device, MOE_CHECK="0")
    assert done.returncode == 0 and "all told later" in done.stdout, done.stdout + done.stderr


@pytest.mark.kernels
@pytest.mark.skipif(not devices.simt, reason="needs a device that is too old")
def test_an_old_device_is_refused(device):
    program = "from test_errors import Inputs; moe_ext.ops.route_index(Inputs(device).ids, 3)"
    said = devices.python(program, device, SIMT_SM="75").stderr.splitlines()[-1]
    assert "moe_ext::route_index: CUDA device 0 is sm_75; these kernels need sm_80 (A100) or newer" in said


def test_check_has_nothing_to_say(device):
    moe_ext.synchronize(device)


def test_no_memory(device):
    x, bins = torch.ones(1, 2, device=device), torch.tensor([1, 2], dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match=r"no memory for \d+ elements on (cpu|cuda:0)\. Hint: fewer tokens"):
        ops.replicate(x, bins, 2**50)
    assert ops.replicate(x, bins, 2).tolist() == [[1, 1]]
