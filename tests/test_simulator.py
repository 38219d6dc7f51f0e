"""The simulated times of schedules, and `python -m moe_ext.plan schedule`: table, timeline, trace, refusals."""
import itertools
import sys
from statistics import fmean

import pytest

import moe_ext.plan.__main__
from moe_ext.config import Config, ConfigError, MeshConfig, ModelConfig, PipelineConfig, TrainConfig, dumps
from moe_ext.log import trace
from moe_ext.parallel.schedule import SCHEDULES, Action
from moe_ext.plan.pipeline import turns
from moe_ext.plan.schedule import Hiccup, Times


def mean(name, times, live=0, steps=15):
    return fmean(times.run(name, live, seed).time for seed in range(steps if times.random else 1))


def gain(name, **conditions):
    """How many times longer the static interleaved order takes: 4 stages x 4 chunks, 8 micro-batches."""
    times = Times(4, 4, 8, **conditions)
    return mean("interleaved", times) / mean(name, times)


def test_without_jitter_by_hand():
    """The bubble is pp - 1 forwards and backwards of a chunk; depth_first has it in each group of pp micro-batches."""
    for pp, vpp, micros in [(2, 2, 4), (4, 4, 8), (4, 2, 16), (8, 1, 8)]:
        for name in SCHEDULES:
            if name != "1f1b" or vpp == 1:
                work, wait = 3 * vpp * micros, 3 * (pp - 1) * (micros // pp if name == "depth_first" else 1)
                step = Times(pp, vpp, micros).run(name)
                assert step.time == work + wait and step.bubble == pytest.approx(wait / (work + wait))
    # 1F1B with a link: every piece but the last sends there and back
    assert Times(4, 1, 1, link=0.5, backward=1.0).run("1f1b").time == 8 + 6 * 0.5


def test_gradients_of_the_last_chunk_are_complete_earlier_breadth_first():
    steps = {name: Times(4, 4, 8).run(name) for name in ("interleaved", "bfc")}
    assert max(steps["bfc"].complete(3)) == 57 and max(steps["interleaved"].complete(3)) >= 80
    assert all(max(step.complete(0)) == step.time == 105 for step in steps.values())


@pytest.mark.parametrize("name", ["bfc", "dfc"])
def test_dynamic_beside_static(name):
    assert gain(name) == 1
    for jitter, expected in ((1.0, 1.095), (2.0, 1.21), (4.0, 1.38)):
        assert gain(name, jitter=jitter) == pytest.approx(expected, abs=0.03)
    assert gain(name, jitter=2.0) >= 1.15
    for rank in range(4):
        assert gain(name, late=Hiccup(rank, 0.1, 8.0)) >= 1.1
        assert gain(name, slow=(rank, 1.5)) == gain(name, slow=(rank, 2.0)) == 1
        for factor in (1.05, 1.1, 1.2, 1.3):
            assert gain(name, slow=(rank, factor)) >= (0.99 if name == "dfc" else 0.965)


def test_no_order_hides_what_one_rank_loses():
    """Its own work is a bound; the static order is at most the bubble above it."""
    times = Times(4, 4, 8, stall=Hiccup(1, 0.1, 8.0))
    for seed in range(5):
        work = sum(time for (stage, _), time in times.draw(seed)[0].items() if stage == 1)
        static, dynamic = (times.run(name, seed=seed).time for name in ("interleaved", "bfc"))
        assert work <= dynamic and static <= 105 / 96 * work


def test_ranks_of_a_stage_wait_for_each_other():
    alone, four = (mean("dfc", Times(4, 2, 8, tp=tp, jitter=2.0)) for tp in (1, 4))
    assert four > alone
    slow = Times(4, 2, 8, tp=2, slow=(5, 1.5)).draw()[0]
    assert {stage for (stage, action), time in slow.items() if time > (1 if action.kind == "F" else 2)} == {2}


def test_uneven_pieces_and_chance():
    work, _ = Times(2, 2, 1, forward=(1, 2, 3, 4), backward=0.5).draw()
    assert work[1, Action("F", 1, 0)] == 4 and work[0, Action("B", 1, 0)] == 1.5
    assert Times(2, 2, 1, forward=(1, 2)).draw()[0][1, Action("F", 1, 0)] == 2
    times = Times(2, 2, 2, jitter=1.0)
    assert times.draw(3) == times.draw(3) != times.draw(4)


def test_64_ranks():
    step = Times(64, 2, 16, jitter=0.5).run("bfc")
    assert sum(map(len, step.turns)) == 2 * 64 * 2 * 16 and step.live[0] == 32
    assert len(Times(16, 2, 8, tp=4, jitter=0.5).run("dfc").turns) == 16


def config(**pipeline):
    return Config(model=ModelConfig(layers=16), mesh=MeshConfig(pp=4), train=TrainConfig(accumulation=8),
                  pipeline=PipelineConfig(chunks=4, **pipeline))


def test_what_the_planner_asks():
    assert turns(config()) == (pytest.approx(9 / 105), [19, 17, 15, 13])
    share, live = turns(config(schedule="bfc", live=20))
    assert 9 / 105 < share < 0.12 and max(live) == 20
    assert turns(Config(train=TrainConfig(accumulation=3))) == (0, [1])
    with pytest.raises(ConfigError, match="1f1b has one chunk"):
        turns(config(schedule="1f1b"))


def command(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["plan", "schedule", *map(str, args)])
    moe_ext.plan.__main__.main()


def test_table_timeline_and_traces(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    command(monkeypatch, "--pp", 2, "--tp", 2, "--chunks", 2, "--micros", 4, "--jitter", 1, "--steps", 2, "--late",
            "all:0.1:3", "--out", tmp_path / "new/s")
    said = capsys.readouterr().out
    assert "2 stages x 2 chunks, 4 micro-batches; means of 2 steps" in said and "1f1b has one chunk on a stage" in said
    shown = [name for name in SCHEDULES if name != "1f1b"]
    assert [line.split()[0] for line in said.splitlines()[2:-2]] == shown
    assert (tmp_path / "new/s.png").read_bytes()[:4] == b"\x89PNG"
    times = Times(2, 2, 4, tp=2, jitter=1.0, late=Hiccup(-1, 0.1, 3.0))
    for name in shown:
        events, names = trace.read(tmp_path / f"new/s-{name}.json")
        step = times.run(name)
        assert names == ["rank 0, stage 0", "rank 1, stage 0", "rank 2, stage 1", "rank 3, stage 1"]
        for lane in range(4):
            mine = [e for e in events if e.lane == lane]
            turns = [(e.kind[0].upper(), e.chunk, e.micro) for e in mine if e.kind in ("forward", "backward")]
            assert turns == [turn.action for turn in step.turns[lane // 2]]
            busy = [e for e in mine if e.kind in ("forward", "backward", "wait")]
            assert all(b.begin == pytest.approx(a.end, abs=1e-6) for a, b in itertools.pairwise(busy))
            assert sum(e.kind == "sync" for e in mine) == 2 and sum(e.kind == "send" for e in mine) == 12


def test_recipes_give_what_is_not_given(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "run.toml"
    recipe.write_text(dumps(config(schedule="bfc")))
    command(monkeypatch, recipe, "--schedule", "bfc")
    assert "4 stages x 4 chunks, 8 micro-batches" in (said := capsys.readouterr().out)
    assert said.splitlines()[2].split()[:7] == ["bfc", "105", "8.6", "%", "32", "31", "28"]
    command(monkeypatch, recipe, "--mesh.pp", 2, "--micros", 6, "--live", 5, "--schedule", "dfc")
    assert "2 stages x 4 chunks, 6 micro-batches, at most 5 live chunks" in capsys.readouterr().out


@pytest.mark.parametrize("args, said", [
    ([], "--pp is 1.*give --pp 4"),
    (["--pp", 4, "--micros", -1], "--micros is -1; it must be positive"),
    (["--pp", 4, "--micros", 10**7], "at most 5,000,000 are simulated: give fewer --steps"),
    (["--pp", 4, "--backward", 0], "--backward is 0.0; it must be positive"),
    (["--pp", 4, "--link", -1], "--link is -1.0; it must be 0 or more"),
    (["--pp", 4, "--jitter", "nan"], "--jitter is nan; it must be 0 or more"),
    (["--pp", 4, "--live", -3], "--live is -3; it must be 0 or more"),
    (["--pp", 4, "--forward", "1,2"], "--forward 1,2: wanted one positive time, 4"),
    (["--pp", 4, "--forward", "nan"], "--forward nan: wanted numbers as in 1"),
    (["--pp", 4, "--slow", "4:2"], "--slow 4:2: wanted RANK:.* as in 2:1.5, with a rank of 0 to 3"),
    (["--pp", 4, "--stall", "1:2:3"], "--stall 1:2:3: wanted"),
    (["--pp", 4, "--late", "one"], "--late one: wanted numbers as in 2:0.1:8"),
    (["--pp", 4, "--chunks", 2, "--micros", 6, "--schedule", "interleaved"], "it takes multiples of 4"),
    (["nowhere.toml"], "no recipe nowhere.toml"),
])
def test_refusals(args, said, monkeypatch):
    with pytest.raises(SystemExit, match=said):
        command(monkeypatch, *args)


def test_traces_of_others_are_refused(tmp_path):
    for text in ("", "[]", '{"traceEvents": [{"ph": "X"}]}'):
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(ValueError, match=r"t\.json is no trace of a pipeline"):
            trace.read(tmp_path / "t.json")
