"""A training step of our GPT and of the same model in plain torch; python -m benchmarks.step --help."""

import statistics
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.compare import Trainee
from benchmarks.sequence import table
from moe_ext.config import MeshConfig, load
from moe_ext.data.loader import Batch

MARK = "part "


def random_batch(config, seed):
    g = torch.Generator().manual_seed(seed)
    m = config.model
    p = 1.0 / torch.arange(1, m.vocab_size + 1, dtype=torch.float64)
    ids = torch.multinomial(p, config.sequences_per_step * (m.seq_len + 1), replacement=True, generator=g)
    ids = ids.view(config.sequences_per_step, -1)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), 0)


@contextmanager
def marked(model):
    handles = []
    for _, module in model.named_modules():
        opened = []
        name = MARK + type(module).__name__

        def before(module, args, opened=opened, name=name):
            opened.append(record_function(name))
            opened[-1].__enter__()

        def after(module, args, result, opened=opened):
            opened.pop().__exit__(None, None, None)

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    yield
    for handle in handles:
        handle.remove()


def part_of(event):
    """Innermost part around an event, and the op of that part that the event belongs to."""
    top = event
    while event is not None:
        if event.name.startswith(MARK):
            return event.name[len(MARK):], top.name
        top, event = event, event.cpu_parent
    return None, top.name


def parts(trace):
    """-> {(part, op): [forward us, backward us]}"""
    owner, found = {}, defaultdict(lambda: [0.0, 0.0])
    events = [e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CPU]
    for e in events:
        part, op = part_of(e)
        if part is not None and not e.name.startswith(MARK) and e.sequence_nr >= 0:
            owner.setdefault(e.sequence_nr, (part, op))
    for e in events:
        if e.name.startswith("ProfilerStep") or e.name.startswith(MARK + "step"):
            continue
        part, op = part_of(e)
        if e.name.startswith(MARK):
            found[part, "(between ops)"][0] += e.self_cpu_time_total
            continue
        node = e
        while node is not None and not node.name.startswith("autograd::engine"):
            node = node.cpu_parent
        if node is not None:
            key = owner.get(node.sequence_nr, ("gradients added up", op)) if node.sequence_nr >= 0 else None
            if key is None or "AccumulateGrad" in node.name:
                key = ("backward: other", node.name.split(": ")[-1])
            found[key][1] += e.self_cpu_time_total
        else:
            found[part or "other", op][0] += e.self_cpu_time_total
    return found


def main(recipe: str = "recipes/tiny.toml", threads: int = 1, steps: int = 5, dtype: str = "fp32"):
    torch.set_num_threads(threads)
    config = load(recipe)
    config = replace(config, mesh=MeshConfig(), train=replace(config.train, micro_batch=config.sequences_per_step, dtype=dtype, device="cpu"))
    trainee = Trainee(config)

    def step(i, mark=lambda name: record_function(MARK + name)):
        batch = random_batch(config, i)
        with mark("step: gradients"):
            out = trainee.gradients(batch, i)
        with mark("clip, optimizer"):
            trainee.update(i)
        return out

    took = []
    for i in range(1, 13):
        c, t = time.process_time(), time.perf_counter()
        step(i)
        took.append((time.process_time() - c if threads == 1 else time.perf_counter() - t))
    ms = 1e3 * statistics.median(took[3:])
    print(f"unprofiled step: {ms:.1f} ms, {config.tokens_per_step / ms * 1e3:.0f} tokens/s, threads {threads} {dtype}")
    with marked(trainee.model), profile(activities=[ProfilerActivity.CPU]) as trace:
        for i in range(13, 13 + steps):
            step(i)
    found = parts(trace)
    total = sum(map(sum, found.values()))
    by_part = defaultdict(lambda: [0.0, 0.0])
    for (part, _), (f, b) in found.items():
        by_part[part][0] += f
        by_part[part][1] += b
    row = lambda f, b: [f"{f / 1e3 / steps:.2f}", f"{b / 1e3 / steps:.2f}", f"{(f + b) / total:.1%}"]
    print(f"profiled: {total / 1e3 / steps:.1f} ms per step")
    table("part | forward ms | backward ms | of the step",
          [[p, *row(*fb)] for p, fb in sorted(by_part.items(), key=lambda x: -sum(x[1]))])
    table("part | op | forward ms | backward ms | of the step",
          [[p, op, *row(*fb)] for (p, op), fb in sorted(found.items(), key=lambda x: -sum(x[1])) if sum(fb) > 0.004 * total])


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
