"""The orders of a pipeline beside torch's and that of seed 001; the memory cap; all ranks of a stage do the same."""
import itertools
import random
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B, schedules

from moe_ext.config import ConfigError
from moe_ext.parallel.schedule import SCHEDULES, Action, Turns, check, following, tensor_id
from moe_ext.plan.pipeline import simulate

GRID = [(pp, vpp, micros) for pp in (1, 2, 3, 4, 8) for vpp in (1, 2, 4) for micros in (1, 3, 4, 8, 9)]

# "rank R forward|backward start tensor K" of the first iteration of the seed's log, which ranks 6 and 7 print, the two
# tensor-parallel ranks of the last stage; F: forward, B: backward
GOLDEN = """
    F0 F1 F2 F3 F16 F17 F18 F19 F4 F5 F6 F7 F20 F21 F22 F23 F8 F9 F10 F11 F24 F25 F26 F27
    F12 B0 F13 B1 F14 B2 F15 B3 F28 B16 F29 B17 F30 B18 F31 B19
    B4 B5 B6 B7 B20 B21 B22 B23 B8 B9 B10 B11 B24 B25 B26 B27 B12 B13 B14 B15 B28 B29 B30 B31""".split()


def takes(name, pp, vpp, micros):
    try:
        check(name, pp, vpp, micros)
    except ConfigError:
        return False
    return True


def peak_live(order):
    """The most chunks whose activations a stage holds at a time."""
    return max(itertools.accumulate(1 if action.kind == "F" else -1 for action in order))


def cost(kind, backward=2.0):
    return backward if kind == "B" else 1.0


# ---- orders ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_order_has_each_action_once_and_can_be_run(name):
    """A static order waits for each tensor in turn: that it ends is that blocking receives cannot deadlock."""
    for pp, vpp, micros in GRID:
        if not takes(name, pp, vpp, micros):
            continue
        every = {Action(kind, c, m) for kind in "FB" for c in range(vpp) for m in range(micros)}
        step = simulate(name, pp, vpp, micros, lambda stage, action: cost(action.kind))
        for stage, turns in enumerate(step.turns):
            order = SCHEDULES[name].order(pp, vpp, micros, stage)
            assert len(order) == len(every) and set(order) == every == {turn.action for turn in turns}
            if not SCHEDULES[name].dynamic:
                assert [turn.action for turn in turns] == order and step.live[stage] == peak_live(order)
        at = {(stage, turn.action): turn for stage, turns in enumerate(step.turns) for turn in turns}
        for (stage, action), turn in at.items():
            if receiver := following(action, stage, pp, vpp):
                assert at[receiver].begin >= turn.end
            if action.kind == "B":
                assert turn.begin >= at[stage, action._replace(kind="F")].end


def torch_order(table, pp):
    """torch's actions of a rank as ours."""
    kinds = {schedules.FORWARD: "F", schedules.FULL_BACKWARD: "B"}
    return [Action(kinds[a.computation_type], a.stage_index // pp, a.microbatch_index) for a in table
            if a is not None and a.computation_type in kinds]


def table(kind, pp, vpp, micros):
    rounds = max(1, micros // pp)
    return SimpleNamespace(_num_stages=pp, _n_microbatches=micros, pp_group_size=pp, _stages=range(vpp),
                           n_local_stages=vpp, number_of_rounds=rounds, microbatches_per_round=micros // rounds)


@pytest.mark.parametrize("name, kind", [("gpipe", ScheduleGPipe), ("1f1b", Schedule1F1B)])
@pytest.mark.parametrize("pp, micros", [(2, 1), (2, 5), (4, 3), (4, 4), (4, 9), (8, 7), (8, 16)])
def test_one_chunk_beside_torch(name, kind, pp, micros):
    theirs = kind._get_pipeline_order(table(kind, pp, 1, micros))
    for stage in range(pp):
        order = torch_order(theirs[stage], pp)
        if kind is Schedule1F1B and stage == pp - 1:    # torch's table, not its step, counts forwards from 1 there
            order = [a._replace(micro=a.micro - 1) if a.kind == "F" else a for a in order]
        assert SCHEDULES[name].order(pp, 1, micros, stage) == order


def test_interleaved_beside_torch():
    for pp, vpp, micros in [(2, 2, 2), (2, 4, 8), (4, 2, 3), (4, 2, 4), (4, 4, 8), (4, 2, 16), (8, 4, 16), (8, 2, 5)]:
        ahead = []
        for stage in range(pp):
            ours = SCHEDULES["interleaved"].order(pp, vpp, micros, stage)
            theirs = ScheduleInterleaved1F1B._calculate_single_rank_operations(table(None, pp, vpp, micros), stage)
            assert ours == torch_order(theirs, pp)
            ahead.append([action.kind for action in ours].index("B"))
        if (pp, vpp, micros) == (4, 2, 16):
            assert ahead == [11, 9, 7, 5]       # Megatron's warm-up of 10, 8, 6, 4 and the forward of the first pair


def test_with_one_chunk_torch_begins_interleaved_later():
    """The known difference: with one chunk torch's interleaved class has twice the warm-up; ours is 1F1B."""
    theirs = ScheduleInterleaved1F1B._calculate_single_rank_operations(table(None, 4, 1, 8), 0)
    assert peak_live(torch_order(theirs, 4)) == 7
    ours = SCHEDULES["interleaved"].order(4, 1, 8, 0)
    assert peak_live(ours) == 4 and ours == SCHEDULES["1f1b"].order(4, 1, 8, 0)


def test_breadth_first_beside_torch():
    """The known difference: LoopedBFS runs a chunk's backwards from the last micro-batch on, ours from the first on."""
    for pp, vpp, micros in [(2, 2, 3), (4, 4, 8), (8, 2, 4)]:
        for stage in range(pp):
            theirs = torch_order(schedules.ScheduleLoopedBFS._calculate_single_rank_operations(
                table(None, pp, vpp, micros), stage), pp)
            ours = SCHEDULES["breadth_first"].order(pp, vpp, micros, stage)
            assert ours == [a if a.kind == "F" else a._replace(micro=micros - 1 - a.micro) for a in theirs] != theirs


def test_depth_first_holds_least():
    for pp, vpp, micros in [(2, 2, 8), (4, 4, 8), (4, 2, 10), (8, 1, 16)]:
        peaks = {name: peak_live(SCHEDULES[name].order(pp, vpp, micros, 0)) for name in SCHEDULES
                 if takes(name, pp, vpp, micros) and not SCHEDULES[name].dynamic}
        assert peaks["depth_first"] == min(peaks.values()) <= pp * vpp


def test_tensor_ids_are_megatrons():
    pp, vpp = 4, 4
    virtual = [(c, 4 * group + slot) for group in range(2) for c in range(vpp) for slot in range(4)]
    assert [tensor_id(Action("F", c, m), pp, vpp) for c, m in virtual] == list(range(32))
    assert [tensor_id(Action("B", 3 - c, m), pp, vpp) for c, m in virtual] == list(range(32))
    # 6 micro-batches: 2 of the second group, so its chunks begin at 16, 20, ..
    ids = [tensor_id(Action("F", c, m), pp, vpp) for c in range(vpp) for m in range(6)]
    assert len(set(ids)) == len(ids) and set(range(32)) - set(ids) == {18, 19, 22, 23, 26, 27, 30, 31}


@pytest.mark.parametrize("given, said", [
    (("1f1b", 4, 2, 8), "1f1b and pipeline.chunks 2.*pipeline.chunks = 1.*interleaved"),
    (("interleaved", 4, 2, 9), "9 micro-batches .train.accumulation.: it takes multiples of 4, the nearest is 8"),
    (("interleaved", 4, 2, 11), "the nearest is 12"),
    (("interleaved", 4, 2, 8, 12), "pipeline.live is 12 and pipeline.schedule interleaved.*\"dfc\" or \"bfc\""),
    (("bfc", 4, 4, 8, 3), "pipeline.live is 3.* set it to 4 or more, or to 0"),
])
def test_refused_with_the_nearest_setting(given, said):
    with pytest.raises(ConfigError, match=said):
        check(*given)
    name, pp, vpp, micros, *live = given
    with pytest.raises(ConfigError, match=said):
        Turns(name, pp, vpp, micros, 0, *live)


# ---- dynamic ---------------------------------------------------------------------------------------------------------
def printed(turns, pp=4, vpp=4):
    return [f"{turn.action.kind}{tensor_id(turn.action, pp, vpp)}" for turn in turns]


@pytest.mark.parametrize("backward, latency", [(2, 0), (2, 1), (2, 3), (2, 8), (0.5, 0), (1, 0), (3, 0), (8, 0)])
def test_the_seeds_order(backward, latency):
    assert len(GOLDEN) == 64
    step = simulate("bfc", 4, 4, 8, lambda stage, action: cost(action.kind, backward), lambda stage, action: latency)
    assert printed(step.turns[3]) == GOLDEN
    if (backward, latency) == (2, 0):
        assert step.time == 105 and step.live == [32, 31, 28, 25]
        assert simulate("interleaved", 4, 4, 8, lambda stage, action: cost(action.kind)).live == [19, 17, 15, 13]


def test_the_seeds_order_under_jitter():
    rng = random.Random(3)
    for _ in range(20):         # up to one forward
        step = simulate("bfc", 4, 4, 8, lambda stage, action: cost(action.kind), lambda stage, action: rng.random())
        assert printed(step.turns[3]) == GOLDEN
        assert step.live[3] == 25 and all(27 <= live <= 32 for live in step.live[:3])


def test_the_seeds_second_iteration():
    """Where its log ends: rank 6 has the input of F28 but not the gradient of B4, rank 7 the reverse. Each alone goes
    on with what it has, and their collectives no longer pair; together they wait until one of the two is on both."""
    turns = Turns("bfc", 4, 4, 8, 3)
    every = {f"{a.kind}{tensor_id(a, 4, 4)}": a for a in turns.order}
    for name in GOLDEN[:GOLDEN.index("F28")]:
        turns.ran(every[name])
    rank6, rank7 = {every["F28"]}, {every["B4"]}
    assert turns.choose(rank6.__contains__) == every["F28"] and turns.choose(rank7.__contains__) == every["B4"]
    assert turns.choose((rank6 & rank7).__contains__) is None
    rank7.add(every["F28"])
    assert turns.choose((rank6 & rank7).__contains__) == every["F28"]


def test_a_choice_asks_of_each_micro_batch_once():
    turns, asked = Turns("dfc", 4, 4, 16, 1), []
    assert turns.choose(lambda action: asked.append(action)) is None
    assert asked == [Action("F", 0, micro) for micro in range(16)]


@pytest.mark.parametrize("name", ["dfc", "bfc"])
def test_the_cap_holds_and_costs_little(name):
    """Never more live chunks than allowed, no deadlock from the least cap on; with as many as the static order holds
    dfc is as fast, bfc nearly, and less room costs time, not the step."""
    rng = random.Random(5)
    for _ in range(150):
        pp, vpp, micros = rng.randint(1, 5), rng.randint(1, 4), rng.randint(1, 10)
        live = rng.randint(vpp, 3 * pp * vpp)
        speed, reach = rng.choice([1, 3]), rng.choice([0, 1, 5])
        step = simulate(name, pp, vpp, micros, lambda stage, action, s=speed: cost(action.kind) * rng.uniform(1, s),
                        lambda stage, action, r=reach: r * rng.random(), live)
        assert max(step.live) <= live
    times = [simulate(name, 4, 4, 16, lambda stage, action: cost(action.kind), live=live).time
             for live in (4, 8, 12, 16, 19, 24, 32, 0)]
    static = simulate("interleaved", 4, 4, 16, lambda stage, action: cost(action.kind)).time
    assert times[0] <= 3.2 * static and times[3] <= 1.1 * static
    assert times[4] <= (1.0 if name == "dfc" else 1.03) * static and times[-2] == times[-1] == static


# ---- the protocol ----------------------------------------------------------------------------------------------------
class Stuck(Exception):
    """Nothing can happen any more, and the step is not done. args: the orders of each stage's ranks."""


def protocol(rng, name, pp, vpp, micros, ranks, live, alone=False):
    """A step of all ranks, in any order of events that the protocol allows. Errors: Stuck.

    The first rank of a stage decides by what has come to all of its ranks (alone: each rank by its own) and begins; the
    others begin the same some time later. Collectives make an action end when all ranks of the stage have begun it;
    then each sends, when it pleases, and what is sent arrives when it pleases.
    """
    lanes = [(stage, rank) for stage in range(pp) for rank in range(ranks)]
    turns = {lane: Turns(name, pp, vpp, micros, lane[0], live) for lane in lanes}
    here, orders, ended = ({lane: make() for lane in lanes} for make in (set, list, list))
    flying, pace = [], rng.choice([0.1, 0.4, 0.8])

    def go(stage, rank):
        """Whether that rank could do something."""
        lane, team = (stage, rank), [(stage, other) for other in range(ranks)]
        own, first = orders[lane], orders[stage, 0]
        if len(ended[lane]) < len(own):
            if any(orders[other][:len(own)][-1:] != own[-1:] for other in team):
                return False
            ended[lane].append(own[-1])
            if receiver := following(own[-1], stage, pp, vpp):
                flying.append(((receiver[0], rank), receiver[1]))
            return True
        if rank == 0 or alone:
            come = here[lane] if alone else set.intersection(*(here[other] for other in team))
            action = turns[lane].choose(come.__contains__) if turns[lane].left else None
        else:
            action = first[len(own)] if len(own) < len(first) else None
            assert action is None or action in here[lane] or not turns[lane].takes(action)
        if action:
            own.append(action)
            turns[lane].ran(action)
            assert turns[lane].live <= (live or vpp * micros)
        return action is not None

    while True:
        start = rng.randrange(len(lanes))
        if not (flying and rng.random() < pace) and any(go(*lane) for lane in lanes[start:] + lanes[:start]):
            continue
        if not flying:
            break
        lane, action = flying.pop(rng.randrange(len(flying)))
        here[lane].add(action)
    of_stages = [[orders[stage, rank] for rank in range(ranks)] for stage in range(pp)]
    if any(turns[lane].left for lane in lanes):
        raise Stuck(of_stages)
    assert all(order == of_ranks[0] for of_ranks in of_stages for order in of_ranks)


def test_no_order_of_arrivals_parts_the_ranks_of_a_stage_or_stops_them():
    rng = random.Random(11)
    for _ in range(2000):
        pp, vpp = rng.randint(2, 3), rng.randint(1, 3)
        protocol(rng, rng.choice(["dfc", "bfc"]), pp, vpp, micros=rng.randint(1, 4), ranks=rng.randint(1, 3),
                 live=rng.choice([0, vpp, rng.randint(vpp, 2 * pp * vpp)]))


def test_ranks_that_decide_alone_are_caught():
    rng, parted = random.Random(12), 0
    for _ in range(50):
        try:
            protocol(rng, "bfc", 3, 2, micros=4, ranks=2, live=0, alone=True)
        except Stuck as stuck:
            parted += any(first[:len(second)] != second[:len(first)] for first, second in stuck.args[0])
    assert parted > 25
