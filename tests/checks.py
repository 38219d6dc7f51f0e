"""The check of every op in one table, and `ops` with a tap on each argument, result and gradient.

test_mutants.py distorts what flows through a tap and expects the check to fail; test_determinism.py records it.
"""

import functools
import inspect

import test_dense
import test_exchange
import test_expert
import test_gemm
import test_head
import test_index
import test_norm
import test_permute
import test_random
import test_route
import torch

from moe_ext import ops, reference


def _sort(impl, case, dtype, device):
    test_index.check_sort(impl, case.ids(device).flatten() + 1, 8)


def _histogram(impl, case, dtype, device):
    test_index.check_histogram(impl, case.ids(device), case.shape.E)


def _cumsum(impl, case, dtype, device):
    test_index.check_cumsum(impl, case.ids(device) + 2, 1)


def _topology(impl, case, dtype, device):
    test_index.check_topology(impl, reference.route_index(case.ids(device), case.shape.E).counts_E, 4, 3)


def _replicate(impl, case, dtype, device):
    x = case.randn(3, case.shape.E, salt=1, dtype=dtype, device=device)
    index = reference.route_index(case.ids(device), case.shape.E)
    test_index.check_replicate(impl, x, index.bins_E, case.ids().numel() + 3)


def _movement(check, form):
    return lambda impl, case, dtype, device: check(impl, form, case, dtype, device)


def _expert_mlp(impl, case, dtype, device):
    test_expert.check_expert_mlp(impl, case, dtype, device, biases=test_expert.BIASES)


def _exchange_plan(impl, case, dtype, device):
    test_exchange.check_plan(impl, case.ids(device), case.shape.E, case.shape.E)


def _logits(case, dtype, device):
    return 2 * case.randn(case.shape.T, case.shape.E, salt=1, dtype=dtype, device=device)


def _router(impl, case, dtype, device):
    logits_TE = _logits(case, dtype, device)
    test_route.check_router(impl, logits_TE, case.shape.k, norm_p=2.0, scale=1.5)
    ids_TK = test_route.forced_ids(case.shape.T, case.shape.E, case.shape.k, device)
    test_route.check_router(impl, logits_TE, case.shape.k, score="topk_softmax", norm_p=2.0, ids_TK=ids_TK)


def _capacity_drop(impl, case, dtype, device):
    priority_TK = case.randn(*case.ids().shape, salt=2, dtype=dtype, device=device)
    test_route.check_capacity_drop(impl, case.ids(device), case.shape.E, 6, priority_TK=priority_TK)


def _balance(impl, case, dtype, device):
    test_route.check_balance(impl, case.ids(device), _logits(case, dtype, device).softmax(1), 1, "switch")


def _select_bias_update(impl, case, dtype, device):
    counts_E = reference.route_index(case.ids(device), case.shape.E).counts_E.long()
    bias_E = case.randn(case.shape.E, salt=1, dtype=torch.float32, device=device)
    test_route.check_select_bias_update(impl, bias_E, counts_E, 1e-3)


def _noisy(impl, case, dtype, device):
    logits_TE = _logits(case, dtype, device)
    test_random.check_noisy(impl, logits_TE, logits_TE[0])


def _linear_cross_entropy(impl, case, dtype, device):
    size = (case.shape.T, case.shape.d, 3 * case.shape.h)
    test_head.check_linear_cross_entropy(impl, dtype, device, size, chunk=case.shape.T // 3, ignored=[1])


def _random(check, *arguments):
    return lambda impl, case, dtype, device: check(impl, case.shape.T, case.shape.d, dtype, device, *arguments)


CHECKS = {  # op -> check(impl, case, dtype, device)
    "route_index": lambda impl, case, dtype, device: test_index.check_route_index(impl, case, device),
    "sort": _sort,
    "histogram": _histogram,
    "inclusive_cumsum": _cumsum,
    "exclusive_cumsum": _cumsum,
    "topology": _topology,
    "replicate": _replicate,
    "gather": _movement(test_permute.check_gather, "plain"),
    "scatter": _movement(test_permute.check_scatter, "plain"),
    "padded_gather": _movement(test_permute.check_gather, "padded"),
    "padded_scatter": _movement(test_permute.check_scatter, "padded"),
    "binned_gather": _movement(test_permute.check_gather, "binned"),
    "binned_scatter": _movement(test_permute.check_scatter, "binned"),
    "grouped_gemm": test_gemm.check_grouped_gemm,
    "grouped_gemm_wgrad": test_gemm.check_grouped_gemm_wgrad,
    "activation": lambda impl, case, dtype, device: test_gemm.check_activation(impl, "swiglu_oai", dtype, device),
    "expert_mlp": _expert_mlp,
    "exchange_plan": _exchange_plan,
    "exchange_pack": test_exchange.check_pack,
    "exchange_unpack": test_exchange.check_unpack,
    "exchange_combine": test_exchange.check_combine,
    "router": _router,
    "capacity_drop": _capacity_drop,
    "balance_counts": _balance,
    "balance_loss": _balance,
    "z_loss": lambda impl, case, dtype, device: test_route.check_z_loss(impl, _logits(case, dtype, device)),
    "select_bias_update": _select_bias_update,
    "linear": lambda impl, case, dtype, device: test_dense.check_linear(impl, case, dtype, device),
    "linear_cross_entropy": _linear_cross_entropy,
    "rms_norm": lambda impl, case, dtype, device: test_norm.check_rms_norm(impl, case, dtype, device),
    "add_norm": lambda impl, case, dtype, device: test_norm.check_add_norm(impl, case, dtype, device),
    "rotate": lambda impl, case, dtype, device: test_norm.check_rotate(impl, case, dtype, device),
    "square_sum": lambda impl, case, dtype, device: test_norm.check_square_sum(impl, case, dtype, device),
    "random_uniform": _random(test_random.check_uniform),
    "random_normal": _random(test_random.check_normal),
    "dropout": lambda impl, case, dtype, device: test_random.check_dropout(impl, _logits(case, dtype, device), 0.3),
    "jitter": lambda impl, case, dtype, device: test_random.check_jitter(impl, _logits(case, dtype, device)),
    "noisy": _noisy,
}


class _GradientTap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tap):
        ctx.tap = tap
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.tap(gradient), None


class Tapped:
    """`ops`, where every tensor that enters or leaves op `name` goes through tap(place, tensor), a place being
    "argument x", "gradient of x" or "result i"."""

    def __init__(self, name, tap):
        self._name, self._tap = name, tap

    def __getattr__(self, name):
        op = getattr(ops, name)
        return functools.partial(self._call, op) if name == self._name else op

    def _call(self, op, *args, **kwargs):
        bound = inspect.signature(op).bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if isinstance(value, torch.Tensor):
                value = self._tap(f"argument {name}", value)
                if value.requires_grad:
                    value = _GradientTap.apply(value, functools.partial(self._tap, f"gradient of {name}"))
                bound.arguments[name] = value
        result = op(*bound.args, **bound.kwargs)
        if isinstance(result, torch.Tensor):
            return self._tap("result 0", result)
        results = [self._tap(f"result {i}", y) for i, y in enumerate(result)]
        return result._make(results) if hasattr(result, "_make") else tuple(results)
