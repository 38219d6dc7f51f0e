"""Chrome trace of a pipeline's steps, of a real run (RUN/trace.json) or of a simulated one (moe_ext.plan schedule).

chrome://tracing and ui.perfetto.dev open it: a row for every rank, a bar for everything that it does.
"""
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

# colours are names of Chrome's palette
COLOURS = {"forward": "good", "backward": "bad", "send": "grey", "wait": "white", "sync": "yellow"}


class Event(NamedTuple):
    """Something that a rank did. Seconds count from any one moment, the same for all ranks."""
    lane: int           # rank, or stage
    kind: str           # forward, backward, send (on its way to lane), wait (nothing to do), sync (gradients of a chunk)
    chunk: int          # of the stage; -1: none
    micro: int          # micro-batch; -1: none
    begin: float
    end: float
    step: int = 0


def write(path: str | Path, events: Iterable[Event], names: list[str]) -> None:
    """names: of the lanes, from lane 0 on, as they are to be shown.

    Each event becomes a complete event ("ph": "X") of process `lane`; what is sent has a row of its own below, so bars of
    one row never overlap partly.
    """
    lines = [{"ph": "M", "name": "process_name", "pid": lane, "args": {"name": name}} for lane, name in enumerate(names)]
    lines += [{"ph": "M", "name": "process_sort_index", "pid": lane, "args": {"sort_index": lane}}
              for lane in range(len(names))]
    for event in events:
        label = event.kind + (f" chunk {event.chunk}" if event.chunk >= 0 else "")
        label += f" micro {event.micro}" if event.micro >= 0 else ""
        lines.append({"ph": "X", "name": label, "cat": event.kind, "cname": COLOURS[event.kind], "pid": event.lane,
                      "tid": int(event.kind == "send"), "ts": 1e6 * event.begin, "dur": 1e6 * (event.end - event.begin),
                      "args": {"chunk": event.chunk, "micro": event.micro, "step": event.step}})
    Path(path).write_text(json.dumps({"traceEvents": lines, "displayTimeUnit": "ms"}))


def read(path: str | Path) -> tuple[list[Event], list[str]]:
    """What `write` wrote. Errors: ValueError for a file that it did not."""
    try:
        lines = json.loads(Path(path).read_text())["traceEvents"]
        events = [Event(line["pid"], line["cat"], line["args"]["chunk"], line["args"]["micro"], line["ts"] / 1e6,
                        (line["ts"] + line["dur"]) / 1e6, line["args"]["step"]) for line in lines if line["ph"] == "X"]
        names = [line["args"]["name"] for line in lines if line["name"] == "process_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no trace of a pipeline: wanted RUN/trace.json of a run with pipeline.trace") from error
    return events, names
