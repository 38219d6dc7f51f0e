"""A test that cannot fail is a defect: each op is broken in each way, and its check must notice.

Every result and every gradient is in turn zeroed, doubled, shifted by a row, and deprived of its last row or column;
every stack of experts is swapped on its way in.
"""

import pytest
import torch
from cases import CASES
from checks import CHECKS, Tapped

from moe_ext import ops

CASE = next(case for case in CASES if case.name == "divides_nothing")


def zeros(x):
    return x * 0


def doubled(x):
    return x * 2


def shifted_row(x):
    return x.roll(1, 0)


def dropped_tail(x):
    """The last two rows that hold anything become zeros."""
    used = x.detach().ne(0).flatten(1).any(1) if x.dim() > 1 else x.detach().ne(0)
    return x.index_fill(0, used.nonzero().flatten()[-2:], 0)


def dropped_column(x):
    return x.index_fill(-1, torch.tensor([x.shape[-1] - 1]), 0)


def distortions(x):
    """Those that change x."""
    ways = [zeros, doubled] + [shifted_row, dropped_tail] * (x.dim() > 0) + [dropped_column] * (x.dim() > 1)
    return [way for way in ways if not torch.equal(way(x), x)]


def swapped_experts(x):
    return x.flip(0)


STACKS = {"gate", "up", "down_EDF", "gate_bias", "up_bias", "down_bias", "w_EIO"}  # arguments [E, ..]


def passes(check, impl, dtype):
    try:
        check(impl, CASE, dtype, "cpu")
    except AssertionError:
        return False
    return True


@pytest.mark.c_core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CHECKS)
def test_every_mutant_is_noticed(name, dtype):
    mutants = set()

    def look(place, x):
        if place.startswith("argument"):
            if place.removeprefix("argument ") in STACKS:
                mutants.add((place, swapped_experts))
        elif x.numel():
            mutants.update((place, way) for way in distortions(x.detach()))
        return x

    assert passes(CHECKS[name], Tapped(name, look), dtype)
    assert mutants

    survivors = []
    for target, way in mutants:
        def distort(place, x, target=target, way=way):
            return way(x) if place == target and way in (*distortions(x.detach()), swapped_experts) else x

        if passes(CHECKS[name], Tapped(name, distort), dtype):
            survivors.append(f"{target}: {way.__name__}")
    assert not survivors


def test_every_op_has_a_check():
    plain_torch = {"ExchangePlan", "RouteIndex", "round_up", "repeat", "router_logits", "sum"}
    assert set(CHECKS) == set(ops.__all__) - plain_torch
