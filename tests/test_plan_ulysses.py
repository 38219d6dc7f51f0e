"""The plan of attention over a sequence that ranks share: the log of the program that keeps all scores, what one of its
16 ranks printed, without NCCL (ulysses_log.txt); our own program by hand; and what is refused. That the plan is what is
measured is test_check_ulysses's."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moe_ext.config import ConfigError
from moe_ext.plan import __main__ as command
from moe_ext.plan.roofline import DEVICES
from moe_ext.plan.ulysses import Command as Ulysses
from moe_ext.plan.ulysses import Measured, Sizes, block, fit, lines, most, report, seed, steps

THEIRS = Sizes()
SMALL = Sizes(n=1920, dim=256, heads=16, hidden=512, layers=3, tp=2, dp=4, mlp_backward=True)
X, W, WORKSPACE = 2 * 3750 * 16384, 2 * 16384 ** 2, 32 * 2 ** 20


def all_bytes(planned, *phases):
    return sum(step.sent.sent for step in planned if step.sent and step.phase in phases)


def test_the_log_comes_out_again():
    said, attention = seed(THEIRS)
    log = (Path(__file__).parent / "ulysses_log.txt").read_text().splitlines()
    assert [line for line in said if not line.startswith("#")] == log
    assert sum("memory allocation" in line for line in log) == 12
    later = [line.removeprefix("# ") for line in said if line.startswith("#")]
    assert "[N/DP, d]" in later[0]              # its label is wrong
    assert [line.removeprefix("its next version goes on: ") for line in later[1:]] == [
        "flops: 6595.46 TFLOPs", "activation f(inter)", "output = inter x W2", "flops: 6595.46 TFLOPs"]
    assert attention == 4 * W + 10 * 123_731_968 + WORKSPACE + 57_600_376_832


def test_blocks_of_the_allocator():
    assert block(X) == 123_731_968              # whose rest of less than 1 MiB stays with it
    assert block(399_360_000) == 399_360_000    # whose rest is split off
    assert block(W) == W
    assert block(1) == 512


def test_attention_in_a_twentieth_of_the_memory():
    forward = steps(replace(THEIRS, backward=False))
    assert most(forward, "attention") == 4 * W + 10 * X
    assert f"{(4 * W + 10 * X + WORKSPACE) / 1e9:.2f}" == "3.41"
    both = steps(THEIRS)
    assert most(both, "attention") == 4 * W + 10 * X + 4 * 8 * 60000        # the logarithms of the sums
    assert most(both, "backward") == 8 * W + 6 * X
    alive = max((step for step in both if step.phase == "backward"), key=lambda step: step.most).alive
    assert sum(tensor.bytes for tensor in alive) == 8 * W + 6 * X


def test_flops_and_bytes_of_the_log_s_sizes():
    N, D, planned = 60000, 16384, {(step.phase, step.name): step for step in steps(THEIRS)}
    forward = {name: planned["attention", name].flops for name in ("qkv", "attend", "output")}
    assert forward == dict(qkv=6 * N * D ** 2, attend=2 * N * (N + 1) * D, output=2 * N * D ** 2)
    assert planned["backward", "attend"].flops == 5 * N * (N + 1) * D       # five products for two
    assert planned["backward", "qkv"].flops == 2 * forward["qkv"]
    assert planned["attention", "attend"].rank_flops == forward["attend"] // 16
    assert planned["MLP", "inter"].flops == 2 * 126 * N * D * 53248
    assert all_bytes(planned.values(), "attention") == all_bytes(planned.values(), "backward") == 460_800_000
    whole = 2 * (N // 2) * D
    assert all_bytes(planned.values(), "MLP") == whole * 7 // 8 * (1 + 2 * 126)
    scattered = steps(replace(THEIRS, mlp="reduce-scatter"))
    assert all_bytes(scattered, "MLP") == whole * 7 // 8 * 2 * 126
    assert most(scattered, "MLP") < most(list(planned.values()), "MLP")


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
def test_exchanged_bytes(kv_heads, dtype):
    """b (N/P) d (2 Hq + 2 max(Hkv,P)) (P-1)/P in each direction; gathered, all ranks' keys and values."""
    s = replace(SMALL, kv_heads=kv_heads, dtype=dtype)
    b = {"bf16": 2, "fp32": 4, "fp64": 8}[dtype]
    for phase in ("attention", "backward"):
        assert all_bytes(steps(s), phase) == b * 240 * 16 * (2 * 16 + 2 * max(kv_heads, 8)) * 7 // 8
        assert all_bytes(steps(replace(s, attention="gather")), phase) == 7 * 2 * b * 240 * 16 * kv_heads


@pytest.mark.parametrize("attention", ["ulysses", "gather"])
@pytest.mark.parametrize("mlp", ["all-reduce", "reduce-scatter"])
@pytest.mark.parametrize("tp, dp", [(1, 1), (1, 4), (4, 1), (2, 4)])
def test_memory_is_linear_in_the_tokens(attention, mlp, tp, dp):
    """No tensor of N x N elements: twice the tokens make the same difference wherever they are added."""
    each = [steps(replace(SMALL, n=n, attention=attention, mlp=mlp, tp=tp, dp=dp)) for n in (9600, 19200, 28800)]
    for little, middle, much in zip(*each, strict=True):
        assert middle.held - little.held == much.held - middle.held >= 0
        assert middle.most - little.most == much.most - middle.most >= 0
        assert middle.held <= middle.most
        assert middle.most == sum(tensor.bytes for tensor in middle.alive)
        assert all(tensor.elements <= 4 * 2 * 28800 * 256 or "W" in tensor.name for tensor in middle.alive)


def test_more_ranks_hold_less():
    meshes = (1, 1), (2, 1), (2, 2), (4, 4)
    held = [max(step.most for step in steps(replace(SMALL, tp=tp, dp=dp))) for tp, dp in meshes]
    assert held == sorted(held, reverse=True) and len(set(held)) == 4


def test_the_gathered_form_keeps_all_keys_and_its_last_rank_computes_most():
    exchanged, gathered = (steps(replace(SMALL, attention=form)) for form in ("ulysses", "gather"))
    for phase in ("attention", "backward"):
        assert most(gathered, phase) > most(exchanged, phase)
    attend, = (step for step in gathered if (step.phase, step.name) == ("attention", "attend"))
    assert attend.rank_flops == 4 * 256 * sum(range(1921 - 240, 1921))
    assert attend.flops == 4 * 256 * sum(range(1921))


@pytest.mark.parametrize("changes, sentence", [
    (dict(n=0), "--n is 0; it must be positive"),
    (dict(kv_heads=-1), "--kv-heads is -1; it must be positive, or 0 for as many as --heads"),
    (dict(n=60001), r"--n 60001 cannot be shared evenly by the 16 ranks \(--tp 8 \* --dp 2\): .* 60000 and 60016"),
    (dict(n=7), "the nearest that can is 16"),
    (dict(heads=100), "--heads 100 does not divide --dim 16384: the nearest that does is 128"),
    (dict(kv_heads=3), "--kv-heads 3 does not divide --heads 128: the nearest that does is 2"),
    (dict(hidden=53244), "--tp 8 does not divide --hidden 53244: the nearest that does is"),
    (dict(heads=8), "--heads 8 are fewer than the 16 ranks .* take at most 8 ranks, or --attention gather"),
    (dict(tp=1, dp=10), "do not share --heads 128 and 128 key/value heads evenly: the nearest number that does is 8"),
    (dict(kv_heads=32, heads=192, dim=192, dp=6, n=48), "192 and 32 key/value heads evenly: the nearest .* is 32"),
])
def test_refused(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Sizes(**changes)


def test_the_gathered_form_takes_fewer_heads_than_ranks():
    assert steps(replace(THEIRS, heads=8, attention="gather"))
    assert "torch.Size" not in report(Ulysses(heads=8, attention="gather"))


def test_flash_is_of_16_bits():
    small = Ulysses(n=1600, layers=1)
    assert "on a GPU flash adds" in report(small) and "flash" not in report(replace(small, dtype="fp32"))


def test_too_many_tokens_for_the_device():
    long = replace(THEIRS, n=600000)
    with pytest.raises(ConfigError, match="does not fit h100: a rank holds") as refused:
        fit(long, steps(long), DEVICES["h100"])
    n, ranks, tp, dp = map(int, re.search(r"--n (\d+) is the longest .* (\d+) ranks are the fewest: --tp (\d+) --dp "
                                          r"(\d+)", str(refused.value)).groups())
    assert (ranks, tp * dp) == (32, 32)
    for fits in (replace(long, n=n), replace(long, tp=tp, dp=dp)):
        fit(fits, steps(fits), DEVICES["h100"])
    longer = replace(long, n=n + 16)
    with pytest.raises(ConfigError, match=f"--n {n} is the longest"):
        fit(longer, steps(longer), DEVICES["h100"])
    whole = replace(THEIRS, tp=1, dp=16)        # half as many ranks hold less, if they share the weights
    with pytest.raises(ConfigError, match=r"8 ranks are the fewest: --tp 8 --dp 1\. Less is .* fewer --layers$"):
        fit(whole, steps(whole), DEVICES["h100"])
    halved = replace(THEIRS, n=1000, tp=4)      # two ranks in the place of one have twice the weights
    with pytest.raises(ConfigError, match="no --n does; for --n 1000 8 ranks are the fewest: --tp 8 --dp 1"):
        fit(halved, steps(halved), DEVICES["h100"])


def test_lines_say_what_was_measured_instead():
    planned = steps(SMALL)
    measured = [Measured(step.held + step.held // 100, step.most, 0.5) for step in planned]
    plan, run = lines(SMALL, planned), lines(SMALL, planned, measured)
    assert len(plan) == len(run)
    for before, after in zip(plan, run, strict=True):
        assert before == after or ": at most " in before or before.startswith(("  memory: ", "  flops: ", "  all-",
                                                                               "  reduce-scatter"))
    memory = [line for line in run if line.startswith("  memory: ")]
    assert len(memory) == len(planned) and all("planned" in line and "+1.0%, +0.0%" in line for line in memory)
    twice = [each._replace(most=2 * each.most) for each in measured]
    totals = [line for line in lines(SMALL, planned, twice) if ": at most " in line]
    assert len(totals) == 4 and totals[0].startswith("Attention: at most 3.54 MB alive; planned 1.77 MB, in ")
    attend, = (step for step in planned if (step.phase, step.name) == ("attention", "attend"))
    assert any(f"500 ms, {attend.rank_flops / 0.5e6:.2f} MFLOP/s" in line for line in run)


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan", "ulysses"])
    command.main()
    said = capsys.readouterr().out
    assert "Peak memory allocation: 61.02 GB\n" in said
    assert "attention forward: 3.38 GB at most, 3.41 GB with the workspace of cuBLAS; that program: 61.02 GB" in said
    assert "; 7.455 ms, 989.00 TFLOP/s" in said         # 7.37 TFLOPs on an H100
    assert "345600000 bytes sent by a rank; 3.686 ms" in said   # to 8 of 15 ranks over the network, at 50 GB/s
    monkeypatch.setattr(sys, "argv", ["plan", "ulysses", "--n", "1000", "--dp", "1", "--no-backward"])
    command.main()
    assert "Attention, backward" not in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["plan", "ulysses", "--heads", "8"])
    with pytest.raises(SystemExit, match="error: --heads 8 are fewer"):
        command.main()
    monkeypatch.setattr(sys, "argv", ["plan", "ulysses", "--device", "abacus"])
    with pytest.raises(SystemExit, match="error: --device: got 'abacus', wanted one of a100"):
        command.main()
