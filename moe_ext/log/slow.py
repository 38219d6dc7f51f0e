"""Which rank or link holds a pipeline up: `python -m moe_ext.log slow RUN`, of RUN/trace.json, or of a simulated trace.

    a rank is slow      its usual forward or backward takes longer than that of ranks of other stages
    a rank stalls       single actions take much longer than it usually needs for them
    a link is slow      its receiver waits for what has been sent, more than on other links
Usual is the median, over micro-batches and steps, of each piece; of a rank the median of its pieces, so that embedding
or head on one of several does not count. Ranks of one stage whose collectives pair are slow together, and are named so.
"""
from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from statistics import median

from moe_ext.log.trace import Event, read

SLOW = 1.25         # times what others need: a slow rank
STALL = 2.0         # times what an action usually takes: a stall
STALLED = 0.1       # of a rank's work lost in stalls, from which on it is named
LOST = 0.05         # of the time lost on a link, from which on it is named
WORDS = {"forward": "forwards", "backward": "backwards"}


def slow(path: Path) -> str:
    """Sentences that name what is slow in a trace, the worst first. path: trace.json, or the folder of a run."""
    path = path / "trace.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: a run writes it with --pipeline.trace STEPS")
    events, names = read(path)
    stages = [int(found[1]) if (found := re.search(r"stage (\d+)", name)) else lane for lane, name in enumerate(names)]
    found = [*slow_ranks(events, stages), *stalling_ranks(events, stages), *slow_links(events, stages)]
    return "\n".join(sentence for _, sentence in sorted(found, reverse=True)) or "nothing stands out"


def usual(events: list[Event]) -> dict[str, dict[int, dict[int, float]]]:
    """-> {forward, backward: {lane: {chunk: median seconds}}}"""
    times = {kind: defaultdict(lambda: defaultdict(list)) for kind in WORDS}
    for e in events:
        if e.kind in WORDS:
            times[e.kind][e.lane][e.chunk].append(e.end - e.begin)
    return {kind: {lane: {chunk: median(each) for chunk, each in chunks.items()} for lane, chunks in lanes.items()}
            for kind, lanes in times.items()}


def slow_ranks(events, stages):
    times = {kind: {lane: median(chunks.values()) for lane, chunks in lanes.items()}
             for kind, lanes in usual(events).items()}
    ratios = defaultdict(dict)      # {lane: {kind: times what other stages need}}
    for kind, lanes in times.items():
        for lane, seconds in lanes.items():
            others = [s for other, s in lanes.items() if stages[other] != stages[lane]]
            if others and seconds >= SLOW * median(others):
                ratios[lane][kind] = seconds / median(others)
    for lanes in by_stage(ratios, stages):
        worst = {kind: max(ratios[lane].get(kind, 0) for lane in lanes) for kind in WORDS}
        what = " and ".join(f"{'its' if len(lanes) == 1 else 'their'} {WORDS[kind]} take {ratio:.1f}x"
                            for kind, ratio in worst.items() if ratio)
        yield max(worst.values()), f"{named(lanes)} slow: {what} the median of the other stages'"


def stalling_ranks(events, stages):
    times, work, stalls = usual(events), defaultdict(list), defaultdict(list)
    for e in events:
        if e.kind in WORDS:
            seconds, expected = e.end - e.begin, times[e.kind][e.lane][e.chunk]
            work[e.lane].append(seconds)
            if seconds > STALL * expected:
                stalls[e.lane].append(seconds - expected)
    shares = {lane: sum(stalls[lane]) / sum(work[lane]) for lane in work}
    limit = max(STALLED, 2 * median(shares.values())) if shares else 0
    stalled = {lane: share for lane, share in shares.items() if share >= limit}
    for lanes in by_stage(stalled, stages):
        lane = max(lanes, key=stalled.get)
        yield 1 / (1 - stalled[lane]), (
            f"{named(lanes)} stalling: {len(stalls[lane])} of {len(work[lane])} actions take over {STALL:g}x their "
            f"usual time, {100 * stalled[lane]:.0f} % of the work in all")


def slow_links(events, stages):
    lost = waits_for_links(events, stages)
    steps = defaultdict(list)
    for e in events:
        steps[e.step].append(e)
    whole = sum(max(e.end for e in step) - min(e.begin for e in step) for step in steps.values())
    shares = {link: sum(seconds for seconds, _ in waits) / whole for link, waits in lost.items()}
    for (sender, receiver), share in shares.items():
        rest = median(other for link, other in shares.items() if link != (sender, receiver)) if len(shares) > 1 else 0
        if share >= max(LOST, 2 * rest):
            waits = lost[sender, receiver]
            way = sum(seconds * way for seconds, way in waits) / sum(seconds for seconds, _ in waits)
            yield 1 / (1 - share), (
                f"the link from rank {sender} to rank {receiver} is slow: rank {receiver} waits {100 * share:.0f} % of "
                f"the time for what is under way on it, {1e3 * way:.1f} ms each; on other links {100 * rest:.0f} %")


def waits_for_links(events, stages) -> dict[tuple[int, int], list[tuple[float, float]]]:
    """-> {(sending rank, receiving rank): of each tensor (how long it was waited for after it had been sent, how long
    it was under way), in seconds}"""
    ranks, pp = stages.count(0), max(stages) + 1
    sends, waits, found = defaultdict(list), {}, defaultdict(list)
    for e in sorted(events, key=lambda e: (e.begin, e.kind in WORDS)):
        at = e.lane, e.step, e.chunk, e.micro
        if e.kind == "send":
            sends[at].append(e)
        elif e.kind == "wait":
            waits[at] = e
        elif e.kind in WORDS:
            wait = waits.pop(at, None)
            if sends[at]:
                send = sends[at].pop(0)         # an activation first, then a gradient
                stage = (stages[e.lane] + (-1 if e.kind == "forward" else 1)) % pp
                seconds = max(0.0, wait.end - max(wait.begin, send.begin)) if wait else 0.0
                found[stage * ranks + e.lane % ranks, e.lane].append((seconds, e.begin - send.begin))
    return found


def by_stage(lanes, stages) -> list[list[int]]:
    return [[lane for lane in lanes if stages[lane] == stage] for stage in sorted({stages[lane] for lane in lanes})]


def named(lanes: list[int]) -> str:
    words = [str(lane) for lane in lanes]
    return f"rank {words[0]} is" if len(words) == 1 else f"ranks {', '.join(words[:-1])} and {words[-1]} are"
