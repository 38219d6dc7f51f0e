"""Chrome trace of a pipeline's steps, of a real run (RUN/trace.json) or of a simulated one (moe_ext.plan schedule).

chrome://tracing and ui.perfetto.dev open it: a group of rows for every rank, a bar for everything that it does.
"""
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

# by kind; names of Chrome's palette
COLOURS = {"forward": "good", "backward": "bad", "send": "grey", "wait": "white", "sync": "yellow"}


class Event(NamedTuple):
    """Something that a rank did. Seconds count from any one moment, the same for all ranks."""
    lane: int           # rank
    kind: str           # forward, backward, wait (nothing to do), sync (of a chunk's gradients), send (on its way here)
    chunk: int          # of the stage; -1: none
    micro: int          # micro-batch; -1: none
    begin: float
    end: float
    step: int = 0


def write(path: str | Path, events: Iterable[Event], names: list[str]) -> None:
    """Complete events ("ph": "X") with a process for each lane: thread 0 is what the rank does; what is sent to it has
    as many threads as are on their way at a time. names: of the lanes, from lane 0 on. Times are in microseconds."""
    lines, busy = [], [[] for _ in names]       # busy: until when, for each lane and thread of what is sent to it
    for lane, name in enumerate(names):
        lines += [{"ph": "M", "name": "process_name", "pid": lane, "args": {"name": name}},
                  {"ph": "M", "name": "process_sort_index", "pid": lane, "args": {"sort_index": lane}}]
    for event in sorted(events, key=lambda event: event.begin):
        label, thread = event.kind, 0
        label += f" chunk {event.chunk}" if event.chunk >= 0 else ""
        label += f" micro {event.micro}" if event.micro >= 0 else ""
        if event.kind == "send":
            ends = busy[event.lane]
            thread = next((thread for thread, end in enumerate(ends) if end <= event.begin), len(ends))
            ends[thread:thread + 1] = [event.end]
            thread += 1
        lines.append({"ph": "X", "name": label, "cat": event.kind, "cname": COLOURS[event.kind], "pid": event.lane,
                      "tid": thread, "ts": 1e6 * event.begin, "dur": 1e6 * (event.end - event.begin),
                      "args": {"chunk": event.chunk, "micro": event.micro, "step": event.step}})
    Path(path).write_text(json.dumps({"traceEvents": lines, "displayTimeUnit": "ms"}))


def read(path: str | Path) -> tuple[list[Event], list[str]]:
    """The events and names that `write` was given. Errors: ValueError for another file."""
    try:
        lines = json.loads(Path(path).read_text())["traceEvents"]
        events = [Event(line["pid"], line["cat"], line["args"]["chunk"], line["args"]["micro"], line["ts"] / 1e6,
                        (line["ts"] + line["dur"]) / 1e6, line["args"]["step"]) for line in lines if line["ph"] == "X"]
        names = [line["args"]["name"] for line in lines if line["name"] == "process_name"]
        if not events or any(e.lane not in range(len(names)) for e in events):
            raise ValueError("no events, or some of a rank without a name")
        if any(e.kind in ("forward", "backward") and e.end <= e.begin for e in events):
            raise ValueError("work that takes no time")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no trace of a pipeline: wanted one as --pipeline.trace STEPS writes it") from error
    return events, names
