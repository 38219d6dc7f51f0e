"""What a step took: time and tokens per second, its parts on every rank, optimizers, memory."""
import itertools
import re
import resource
import time
from contextlib import contextmanager
from typing import NamedTuple

import torch

from moe_ext.config import Config
from moe_ext.model import half_dtype
from moe_ext.optim.state import local
from moe_ext.optim.together import parts_of
from moe_ext.plan.roofline import DEVICES, Device


class Mark(NamedTuple):
    seconds: float      # running time, pauses taken out
    steps: int
    tokens: int


class Meter:
    """Step time, throughput and time left. clock: seconds, monotonic; a test gives its own."""

    def __init__(self, clock=time.perf_counter):
        self.clock = clock
        self.began = clock()
        self.pauses = 0.0
        self.window = self.now = Mark(0.0, 0, 0)
        self.first = None       # (Mark, clock) at the end of the first step

    def tick(self, tokens: int) -> None:
        """An optimizer step over `tokens` tokens has ended."""
        clock = self.clock()
        self.now = Mark(clock - self.began - self.pauses, self.now.steps + 1, self.now.tokens + tokens)
        self.first = self.first or (self.now, clock)

    @contextmanager
    def paused(self):
        """Time inside is no step time: evaluation, saving, sampling."""
        begin = self.clock()
        yield
        self.pauses += self.clock() - begin

    def rates(self) -> tuple[float, float]:
        """(milliseconds per step, tokens per second) since the last call; at least one tick must lie between."""
        begin = self.window
        if begin.steps == 0 and self.now.steps > 1:
            begin = self.first[0]
        seconds, steps, tokens = (a - b for a, b in zip(self.now, begin, strict=True))
        self.window = self.now
        return 1e3 * seconds / steps, tokens / seconds

    def eta(self, steps_left: int) -> float:
        """Seconds for the steps that remain."""
        if self.now.steps == 1:
            return steps_left * (self.clock() - self.began)
        return steps_left * (self.clock() - self.first[1]) / (self.now.steps - 1)


class Timers:
    """Time of the parts of a step, on this rank:

        timers = Timers(device)
        timers.on = True                # for this step; otherwise they do nothing
        with timers("forward"): ...
        timers.milliseconds()           # of each part, summed over its spans

    On CUDA they are events in the stream, so nothing waits for the device until the sums are asked for.
    """
    PARTS = "data", "forward", "backward", "optimizer"

    def __init__(self, device: torch.device):
        self.cuda, self.on, self.spans = device.type == "cuda", False, []

    @contextmanager
    def __call__(self, part: str):
        if not self.on:
            yield
            return
        begin = self.mark()
        yield
        self.spans.append((part, begin, self.mark()))

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self) -> list[float]:
        """In the order of PARTS; the next sums begin at 0."""
        sums = dict.fromkeys(self.PARTS, 0.0)
        for part, begin, end in self.spans:
            sums[part] += self.between(begin, end)
        self.spans = []
        return list(sums.values())

    def between(self, begin, end) -> float:
        """Milliseconds from one mark to another."""
        if not self.cuda:
            return 1e3 * (end - begin)
        end.synchronize()
        return begin.elapsed_time(end)


class Spent(NamedTuple):
    """What an optimizer costs a rank."""
    ms: float           # per step, of the steps since the last time; 0: not measured
    state_mib: float    # kept between steps, wherever it lies
    sent_mib: float     # in the last step, to owners of matrices and back
    fallbacks: float    # since the last time


class Spending:
    """What each optimizer of a run costs this rank. names: of the optimizers of any rank. timed: on CUDA, whether to
    measure time, with events as Timers do; on a CPU it always is, in every step."""

    def __init__(self, optimizer: torch.optim.Optimizer, names: list[str], timers: Timers, timed: bool):
        self.parts = {type(part).__name__.lower(): part for part in parts_of(optimizer)}
        self.timers, self.marks, self.steps = timers, {name: [] for name in names}, 0
        self.fallbacks = dict.fromkeys(names, 0)
        if timed or not timers.cuda:
            for name, part in self.parts.items():
                part.register_step_pre_hook(lambda *_, name=name: self.marks[name].append(timers.mark()))
                part.register_step_post_hook(lambda *_, name=name: self.marks[name].append(timers.mark()))

    def tick(self) -> None:
        """Call after every step, also one that was skipped."""
        self.steps += 1

    def now(self) -> list[float]:
        """A Spent for each of names, one after the other; at least one tick since the last call."""
        numbers = []
        for name, marks in self.marks.items():
            part, before = self.parts.get(name), self.fallbacks[name]
            ms = sum(self.timers.between(*span) for span in zip(marks[::2], marks[1::2], strict=True))
            kept = [value for group in part.param_groups for p in group["params"]
                    for value in part.state.get(p, {}).values()] if part else []
            owners = getattr(part, "owners", None)
            self.fallbacks[name] = getattr(part, "fallbacks", 0)
            numbers += Spent(ms / self.steps, sum(local(x).nbytes for x in kept) / 2**20,
                             owners.sent / 2**20 if owners else 0.0, self.fallbacks[name] - before)
            marks.clear()
        self.steps = 0
        return numbers


class Memory(NamedTuple):
    """Of one rank, in MiB: of its CUDA device, as torch's allocator has it; on a CPU of the process (resident)."""
    allocated: float
    max_allocated: float
    reserved: float
    max_reserved: float

    @classmethod
    def now(cls, device: torch.device) -> "Memory":
        if device.type == "cuda":
            c = torch.cuda
            sizes = c.memory_allocated(), c.max_memory_allocated(), c.memory_reserved(), c.max_memory_reserved()
            return cls(*(size / 2**20 for size in sizes))
        with open("/proc/self/statm") as file:
            here = int(file.read().split()[1]) * resource.getpagesize() / 2**20
        most = max(here, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
        return cls(here, most, here, most)


OTHERS = {"laptop", "mig", "nvl", "d"}      # words in the names of devices that are less than their namesake


def peak_flops(config: Config, device: torch.device) -> float:
    """FLOPs per second of a device in train.dtype: log.peak_tflops, or what plan.roofline has of it; 0: not known."""
    if config.log.peak_tflops or device.type != "cuda":
        return config.log.peak_tflops * 1e12
    known = find_device(torch.cuda.get_device_name(device))
    return 1e12 * (0 if known is None else known.tflops if half_dtype(config) else known.tflops_fp32)


def find_device(name: str) -> Device | None:
    """By the name that CUDA gives it, as "NVIDIA A100-SXM4-40GB"; the entry that says most about it."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    said = {*words, *map("".join, itertools.pairwise(words))}
    fits = [d for d in DEVICES.values() if said.issuperset(d.name.split("-"))]
    return None if said & OTHERS else max(fits, key=lambda d: len(d.name), default=None)
