"""Bad input ends in an exception that names op and argument, what it got and wants, and where it can, what to type."""

import math
import re

import pytest
import torch

from moe_ext import ops

T, D, F, E, K = 6, 4, 5, 3, 2
X = torch.randn(T, D)
ROWS = torch.randn(T * K, D)
IDS = torch.arange(T * K, dtype=torch.int32).view(T, K) % E
INDEX = ops.route_index(IDS, E)
ORDER, BINS = INDEX.order_N, INDEX.bins_E
W = torch.randn(E, D, F)
GATE, DOWN = torch.randn(E, F, D), torch.randn(E, D, F)
WEIGHTS = torch.rand(T, K)
LOGITS = torch.randn(T, E)
TARGETS = torch.arange(T) % F
KEY = dict(seed=0, step=0, site=0)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def one_nan():
    logits = LOGITS.clone()
    logits[2, 1] = math.nan
    return logits


def mlp(x=X, gate=GATE, up=GATE, down=DOWN, weights=WEIGHTS, act="swiglu", **more):
    return ops.expert_mlp(x, gate, up, down, weights, INDEX, act=act, **more)


# The words that a message must hold, in this order, and the call that must raise it.
BAD = {
    # dtype
    "route_index: ids float32 wanted int32 Hint ids.to": lambda: ops.route_index(IDS.float(), E),
    "gather: x int32 wanted float32 Hint x.to": lambda: ops.gather(X.int(), ORDER, None, BINS, K),
    "gather: bins int64 wanted int32 Hint bins.to": lambda: ops.gather(X, ORDER, None, BINS.long(), K),
    "scatter: weights float64 wanted float32 Hint": (
        lambda: ops.scatter(ROWS, ORDER, None, WEIGHTS.flatten().double(), BINS, K)
    ),
    "grouped_gemm: w float64 wanted float32 Hint w.to": lambda: ops.grouped_gemm(ROWS, W.double(), BINS),
    "expert_mlp: gate bfloat16 wanted float32 Hint": lambda: mlp(gate=GATE.bfloat16()),
    "select_bias_update: counts int32 wanted int64": lambda: ops.select_bias_update(torch.zeros(E), i32(1, 2, 3), 0.1),
    "targets int32 wanted int64 Hint": lambda: ops.linear_cross_entropy(X, W[0].T, TARGETS.int()),
    "linear_cross_entropy: w float64 wanted float32": lambda: ops.linear_cross_entropy(X, W[0].T.double(), TARGETS),
    "sort: x float32 wanted int16 int32 int64": lambda: ops.sort(X[0]),
    "histogram: x float32 wanted": lambda: ops.histogram(X, E),
    # device
    "grouped_gemm: w on device meta first argument on cpu Hint": lambda: ops.grouped_gemm(ROWS, W.to("meta"), BINS),
    "gather: order on device meta first argument on cpu": lambda: ops.gather(X, ORDER.to("meta"), None, BINS, K),
    "expert_mlp: down on device meta first argument on cpu": lambda: mlp(down=DOWN.to("meta")),
    # shape
    "route_index: ids shape [2] wanted [T, K]": lambda: ops.route_index(IDS[0], E),
    "gather: x shape [1, 6, 4] wanted [T, D]": lambda: ops.gather(X[None], ORDER, None, BINS, K),
    "gather: indices shape [11] wanted [N=12]": lambda: ops.gather(X, ORDER[:-1], None, BINS, K),
    "scatter: weights shape [11] wanted [N=12]": lambda: ops.scatter(ROWS, ORDER, None, WEIGHTS.flatten()[1:], BINS, K),
    "gather: indices shape [12] wanted [N=30]": lambda: ops.gather(X, ORDER, None, BINS, 5),
    "grouped_gemm: w [3, 3, 5] wanted I=4": lambda: ops.grouped_gemm(ROWS, W[:, :3], BINS),
    "grouped_gemm: bins [3] wanted [E=2]": lambda: ops.grouped_gemm(ROWS, W[:2], BINS),
    "activation: h 3 columns swiglu wants equal width": lambda: ops.activation(X[:, :3], "swiglu"),
    "expert_mlp: gate [3, 5, 4] wanted [E=3, F=3, D=4]": lambda: mlp(down=DOWN[:, :, :3]),
    "expert_mlp: gate [3, 5, 4] wanted 2F=10": lambda: mlp(up=None),
    "expert_mlp: down_bias [3, 5] wanted [E=3, D=4]": lambda: mlp(down_bias=torch.zeros(E, F)),
    'expert_mlp: up act="gelu" Hint up=None': lambda: mlp(act="gelu"),
    "router: select_bias [4] wanted [E=3]": lambda: ops.router(LOGITS, K, select_bias_E=torch.zeros(4)),
    "linear_cross_entropy: w [5, 3] wanted [V, D=4]": lambda: ops.linear_cross_entropy(X, W[0].T[:, :3], TARGETS),
    "linear_cross_entropy: targets [5] wanted [T=6]": lambda: ops.linear_cross_entropy(X, W[0].T, TARGETS[1:]),
    "balance_counts: T=6 multiple rows_per_scope=4": lambda: ops.balance_counts(IDS, E, 4),
    "capacity_drop: T=6 rows_per_scope=4": lambda: ops.capacity_drop(IDS, E, 2, rows_per_scope=4),
    "balance_loss: counts G=4 divide T=6": lambda: ops.balance_loss(LOGITS, BINS.repeat(4, 1), K),
    # ids, bins
    "route_index: ids 3 wanted < 3 or -1": lambda: ops.route_index(IDS + 1, E),
    "route_index: ids -2 wanted or -1": lambda: ops.route_index(IDS - 2, E),
    "route_index: ids wanted < 3 or -1": lambda: ops.route_index(IDS.long() + 2**32, E),
    "capacity_drop: ids 2 wanted < 2 or -1": lambda: ops.capacity_drop(IDS, 2, 2),
    "balance_counts: ids 2 wanted < 2 or -1": lambda: ops.balance_counts(IDS, 2),
    "gather: out of range indices": lambda: ops.gather(X, ORDER + 20, None, BINS, K),
    "targets 5 wanted < 5 or -100": lambda: ops.linear_cross_entropy(X, W[0].T, TARGETS + 1),
    "gather: bins non-decreasing": lambda: ops.gather(X, ORDER, None, i32(5, 3, 12), K),
    "gather: bins start at 0": lambda: ops.gather(X, ORDER, None, i32(-5, 3, 12), K),
    "gather: bins end within the rows": lambda: ops.gather(X, ORDER, None, i32(5, 9, 13), K),
    "scatter: bins end": lambda: ops.scatter(ROWS, ORDER, None, None, i32(5, 9, 13), K),
    "grouped_gemm: bins non-decreasing": lambda: ops.grouped_gemm(ROWS, W, i32(5, 3, 12)),
    "grouped_gemm: bins within R=12": lambda: ops.grouped_gemm(ROWS, W, i32(5, 9, 13)),
    "gather: bins within the rows": lambda: ops.padded_gather(X, ORDER, None, BINS, i32(1, 2, 3), K),
    "topology: padded_bins multiples of block=4": lambda: ops.topology(i32(3, 4), 4, 1, 2),
    "topology: E*cols=40000 int16": lambda: ops.topology(i32(4, 8), 4, 2, 20000),
    "replicate: bins within n=5": lambda: ops.replicate(X, i32(1, 2, 3, 9), 5),
    "expert_mlp: bins num_copies number of ids >= 0": lambda: mlp(num_copies=11),
    "expert_mlp: size num_copies number of ids >= 0": lambda: mlp(num_copies=13),
    # values
    "router: k is 4 wanted 1 .. E=3": lambda: ops.router(LOGITS, 4),
    "router: k is 0 wanted 1 .. E=3": lambda: ops.router(LOGITS, 0),
    "router: NaN logits Hint torch.isnan": lambda: ops.router(one_nan(), K),
    'router: score "softmax" wanted softmax_topk sigmoid': lambda: ops.router(LOGITS, K, score="softmax"),
    "router: norm_p=-1": lambda: ops.router(LOGITS, K, norm_p=-1.0),
    'activation: act "swish" wanted swiglu': lambda: ops.activation(X, "swish"),
    'balance_loss: form "l2" wanted switch': lambda: ops.balance_loss(LOGITS, BINS[None], K, form="l2"),
    "capacity_drop: capacity=-1": lambda: ops.capacity_drop(IDS, E, -1),
    "linear_cross_entropy: chunk is 0 wanted >= 1": lambda: ops.linear_cross_entropy(X, W[0].T, TARGETS, chunk=0),
    "random_uniform: got 1 and 0 wanted low < high": lambda: ops.random_uniform(2, 2, low=1.0, high=0.0, **KEY),
    "random_normal: got 0 and -1 wanted std >= 0": lambda: ops.random_normal(2, 2, std=-1.0, **KEY),
    "dropout: step site must lie in got -1": lambda: ops.dropout(X, 0.5, seed=0, step=-1, site=0),
    "histogram: max_val is -1 wanted >= 0": lambda: ops.histogram(IDS, -1),
    "dropout: p 1.5 wanted 0 <= p < 1": lambda: ops.dropout(X, 1.5, **KEY),
    "sort: end_bit=40": lambda: ops.sort(IDS[0], 40),
    "sort: n=40000 fit dtype": lambda: ops.sort(torch.zeros(40000, dtype=torch.int16)),
}


@pytest.mark.parametrize("words", BAD)
def test_message(words):
    with pytest.raises(RuntimeError, match=re.compile(".*".join(map(re.escape, words.split(" "))), re.DOTALL)):
        BAD[words]()


def test_a_failed_op_leaves_its_inputs_alone():
    before = [t.clone() for t in (X, ORDER, BINS, W, LOGITS)]
    for call in BAD.values():
        with pytest.raises(RuntimeError):
            call()
    assert all(torch.equal(a, b) for a, b in zip(before, (X, ORDER, BINS, W, LOGITS), strict=True))
