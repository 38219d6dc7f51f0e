"""moe_ext.check ulysses: what it measures is what was planned, what it computes is what one process computes, and it
notices where that is not so."""
import sys

import pytest
import torch.nn.functional as F
from ranks import run_ranks
from test_check import run_check

from moe_ext.check import __main__, ulysses
from moe_ext.check.ulysses import Long
from moe_ext.config import ConfigError
from moe_ext.parallel import mlp
from moe_ext.parallel.collectives import scope_sum
from moe_ext.plan.ulysses import steps

SMALL = dict(n=64, dim=32, heads=8, hidden=64, layers=3, dtype="fp64")
COMPARED = 10       # two results and eight gradients


@pytest.mark.parametrize("world, more", [
    (1, dict()),
    (1, dict(n=1)),
    (2, dict(attention="gather", mlp="reduce-scatter")),
    (4, dict(tp=2)),
    (4, dict(tp=4, kv_heads=2, mlp="reduce-scatter")),
    (4, dict(tp=2, kv_heads=1, attention="gather", mlp="reduce-scatter")),
    (4, dict(tp=1, kv_heads=4)),
    (2, dict(dtype="fp32")),
    (2, dict(dtype="bf16", mlp="reduce-scatter")),
], ids=str)
def test_equal_and_as_planned(world, more, tmp_path):
    command = Long(**SMALL | more)
    text, fine = run_check(world, command, tmp_path)
    assert fine == (True,) * world, text
    assert text.count(" is right: ok\n") == COMPARED and " of the plan: ok\n" in text
    said = iter(text.splitlines())
    assert all(step.title in said for step in steps(command.sizes(world)))      # in this order


@pytest.mark.parametrize("more, told", [
    (dict(mlp_backward=False), COMPARED - 3),
    (dict(mlp_backward=False, mlp="reduce-scatter"), COMPARED - 3),
    (dict(backward=False, mlp_backward=False), COMPARED - 8),
    (dict(alone=63), 0),
], ids=str)
def test_in_part(more, told, tmp_path):
    text, fine = run_check(2, Long(**SMALL | more), tmp_path)
    assert fine == (True, True), text
    assert text.count(" is right: ok\n") == told
    assert ("not compared with one process: 64 tokens are more than --alone 63\n" in text) == (told == 0)


def unmasked(monkeypatch):
    monkeypatch.setattr(ulysses, "attend", lambda q, k, v, *_: F.scaled_dot_product_attention(q, k, v))


def unsummed_gradients(monkeypatch):
    monkeypatch.setattr(mlp, "all_reduce", scope_sum)


def forgotten_storage(monkeypatch):
    attend, kept = ulysses.attend, []
    monkeypatch.setattr(ulysses, "attend", lambda q, *more: kept.append(q.repeat(1, 1, 2, 1)) or attend(q, *more))


@pytest.mark.parametrize("plant, right, wrong", [
    (unmasked, "", "output"),
    (unsummed_gradients, "y", "d W1"),
    (forgotten_storage, "d Q", "memory of attention, attend, at its end"),
])
def test_notices(plant, right, wrong, tmp_path, monkeypatch):
    plant(monkeypatch)
    text, fine = run_check(2, Long(**SMALL), tmp_path)
    assert fine == (False, False)
    verdicts = [(line.split("  ")[0].split(":")[0], line.endswith("ok")) for line in text.splitlines()
                if line.endswith((": ok", ": WRONG"))]
    assert (wrong, False) in verdicts and (not right or (right, True) in verdicts), text


@pytest.mark.parametrize("plant, status", [(lambda monkeypatch: None, 0), (unmasked, 1)])
def test_exit_status(plant, status, tmp_path, monkeypatch):
    plant(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["check", "ulysses", "--n", "32", "--layers", "1", "--device", "cpu"])

    def body(rank):
        with pytest.raises(SystemExit) as left:
            __main__.main()
        return int(left.value.code)

    assert run_ranks(1, body, tmp_path) == [status]


@pytest.mark.parametrize("more, sentence", [
    (dict(tp=3), "--tp 3 does not divide the 4 ranks: the nearest that does is 2"),
    (dict(n=62), r"--n 62 cannot be shared evenly by the 4 ranks"),
    (dict(heads=2), "--attention gather"),
    (dict(heads=3), "--heads 3 does not divide --dim 32"),
    (dict(hidden=66), "--tp 4 does not divide --hidden 66"),
    (dict(layers=0), "--layers is 0"),
])
def test_refuses_what_the_plan_refuses(more, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Long(**SMALL | more).sizes(4)
