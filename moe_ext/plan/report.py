"""The planner's pages: the plan of one mesh, and the best meshes of a number of devices."""
from __future__ import annotations

import collections

from moe_ext.config import Config, ConfigError, TuneConfig, divisors, load
from moe_ext.model import GPT
from moe_ext.plan import local, megatron, moving, pace, ranks, roofline, sizes, spent
from moe_ext.plan.memory import fullest, memory
from moe_ext.plan.optimizer import cost, kept, movers
from moe_ext.plan.roofline import DEVICES, RESERVE, Device, Estimate, Shares, estimate, training_flops
from moe_ext.plan.search import enough, fits, flags, largest, on, room, search, smallest
from moe_ext.plan.shares import makes
from moe_ext.plan.traffic import traffic

PARTS = {
    "weights": "weights", "gradients": "gradients",
    "activations": "activations that the backward reads", "head": "logits and gradient of the head",
    "fsdp": "parameters and gradients whole in FSDP", "cast": "weights cast to 16 bits",
    "exchange": "messages of the token exchange", "sequence": "messages between the ranks of a sequence",
    "links": "tensors between the stages", "step": "the optimizer while it steps",
}


def plan(config: Config, model: GPT, device: Device, per_host: int, shares: Shares, recipe: str, pp: int = 1,
         vpp: int = 1) -> str:
    """Parameters, FLOPs, memory, traffic and time of a rank, what to change if it does not fit, and Megatron's figures,
    with stages that a recipe without them does not have if pp asks for some. `model` lies on the meta device. Errors:
    ConfigError."""
    formulas = config if pp == vpp == 1 else megatron.staged(config, pp, vpp)
    c, m, mesh, t, held = config.model, config.model.moe, config.mesh, config.train, memory(config)
    (total, active), tokens = model.num_parameters(), config.tokens_per_step
    each = [sum(p.numel() for p in layer.experts.parameters()) // m.experts for layer in model.moe_layers()[:1]]
    products, seen = (training_flops(c, causal) for causal in (False, True))
    rows = {
        "model": sizes(config),
        "parameters": f"{total:,} in all, {active:,} active per token" + "".join(f", {n:,} per expert" for n in each)
                      + f"; {local(config)}",
        **({"moving": moving(config, model)} if c.tune != TuneConfig() else {}),
        "tokens": f"{tokens:,} per step = {t.accumulation} x {t.micro_batch * mesh.dp} sequences of {c.seq_len}",
        "FLOPs": f"{model.flops_per_token():,} per token, {model.flops_per_token() * tokens:,} per iteration: 6 per "
                 f"active weight{', 4 if it rests' * (c.tune != TuneConfig())}, attention without the causal half",
        "products": f"{products:,.0f} FLOPs per token in matrix products alone, {seen:,.0f} of them over keys that are "
                    "seen",
        "mesh": named(config, per_host),
    }
    lines = [f"{name:10}  {text}" for name, text in rows.items()]
    if mesh.pp > 1:
        lines.append(f"pipeline    {pace(config)}")
    for name, what in movers(config).items():
        share = roofline.share_of_optimizer(config, device, per_host, shares, name)
        lines.append(f"optimizer   {name} ({what}): {spent(config, name)}, {share:.1%} of the step")
    names = PARTS | {"optimizer": "AdamW's two moments" if (state := kept(config)) == "moments" else state}
    rank = fullest(config) * mesh.stage + ((mesh.sp - 1) * mesh.tp if mesh.attention == "gather" else 0)
    lines += ["", f"memory of rank {rank} on a GPU, {t.dtype}, each part at its own peak",
              *(f"  {size(part)}  {names[name]}" for name, part in held._asdict().items() if part),
              f"  {size(held.total)}  in all, of {size(room(device)).strip()}, the {1 - RESERVE:.0%} of {device.name} "
              f"memory that a run can use: it {'fits' if fits(config, device) else 'does not fit'}"]
    if away := max(cost(config, stage).host for stage in makes(config)):
        lines.append(f"  {size(away)}  in the memory of the host, for each of its {per_host} devices")
    if not fits(config, device):
        lines += ["", "what would fit", *changes(config, device, per_host, shares, recipe)]
    if mesh.world > 1:
        lines += ["", "traffic: each rank sends per step"]
        lines += [f"  {size(sent)}  {axis}" for axis, sent in traffic(config).items() if sent]
    lines += ["", f"time of a step on {mesh.world} x {device.name}",
              *clock(config, estimate(config, device, per_host, shares), shares)]
    return "\n".join([*lines, "", *figures(formulas, model)])


def named(config: Config, per_host: int) -> str:
    hosts = -(-config.mesh.world // per_host)
    return f"{ranks(config)}; {hosts} host{'s' * (hosts > 1)} of {per_host}" if config.mesh.world > 1 else "one process"


def size(count: float) -> str:
    return f"{count / 2**30:10,.2f} GiB" if count >= 2**30 else f"{count / 2**20:10,.2f} MiB"


def clock(config: Config, time: Estimate, shares: Shares) -> list[str]:
    def line(label, seconds, why):
        return f"  {label:8} {1000 * seconds:12,.1f} ms, {config.tokens_per_step / seconds:,.0f} tokens/s: {why}"

    peaks = ", ".join(f"{name} {1000 * value:,.1f}" for name, value in time._asdict().items()
                      if name != "likely" and value)
    return [line("at least", time.at_least, f"the longest of what each takes alone at its peak ({peaks})"),
            line("likely", time.likely, f"at {shares.compute:.0%} of the peak in matrix products, {shares.memory:.0%} "
                 f"of memory's and {shares.wires:.0%} of the wires', where nothing hides these")]


def changes(config: Config, device: Device, per_host: int, shares: Shares, recipe: str) -> list[str]:
    """Options that make it fit, each planned again before it is said."""
    same = config.mesh.world
    ways = {on(config, config.mesh, config.train.micro_batch, True): "recompute"}
    for recompute in (False, True):
        if way := largest(config, device, recompute):
            ways.setdefault(way, "the largest micro-batches that do" + ", with recompute" * recompute)
    lines = [f"  {name}: {' '.join(flags(way, config))} ({size(memory(way).total).strip()})"
             for way, name in ways.items() if fits(way, device)]
    try:
        best = search(config, same, device, per_host, shares)
    except ConfigError:         # a batch that no mesh of so many divides
        best = []
    if best and best[0].config.mesh != config.mesh:
        lines.append(f"  another mesh of {same}: {' '.join(flags(best[0].config, config))} "
                     f"({size(best[0].memory.total).strip()})")
    if not lines:
        lines += more(config, same, device, recipe)
    return lines


def more(config: Config, devices: int, device: Device, recipe: str) -> list[str]:
    """What helps where so many devices do not."""
    try:
        least, held = smallest(config, devices)
    except ValueError:
        lines = []
    else:
        lines = [f"  nothing on {devices} x {device.name}: the least is {size(held.total).strip()} of "
                 f"{size(room(device)).strip()}, with {' '.join(flags(least, config)) or 'these options'}"]
    if number := enough(config, 2 * devices, device):
        options = " ".join([*flags(config, load(recipe)), *described(device), f"--search {number}"])
        lines.append(f"  {number} devices: python -m moe_ext.plan {recipe} {options}")
    else:
        lines.append("  or devices with more memory (--device), fewer tokens (model.seq_len), a smaller model")
    return lines


def described(device: Device) -> list[str]:
    """The planner's options that make this device."""
    own = DEVICES[device.name]
    names = {"tflops": "peak-tflops", "memory": "memory-gb", "bandwidth": "bandwidth", "link": "link",
             "network": "network", "host": "host"}
    return [f"--device {device.name}", *(f"--{option} {getattr(device, name)}" for name, option in names.items()
                                         if getattr(device, name) != getattr(own, name))]


def found(config: Config, devices: int, device: Device, per_host: int, shares: Shares, top: int, recipe: str) -> str:
    """The best meshes of so many devices and how to start them. Errors: ConfigError if there is none."""
    best = search(config, devices, device, per_host, shares)
    base = load(recipe)
    lines = [f"{devices} x {device.name}: {config.sequences_per_step} sequences of {config.model.seq_len} per step; "
             f"{len(best)} meshes fit in {size(room(device)).strip()} a device"]
    if not best:
        return "\n".join([*lines, *more(config, devices, device, recipe)])
    for rank, (way, held, time) in enumerate(best[:top], 1):
        sent = ", ".join(f"{axis} {size(part).strip()}" for axis, part in traffic(way).items() if part) or "nothing"
        lines += ["", f"{rank}. {named(way, per_host)}; {way.train.accumulation} x {way.train.micro_batch} sequences"
                  + (", recomputed" if way.train.recompute else ""),
                  *([f"   pipeline {pace(way)}"] if way.mesh.pp > 1 else []),
                  f"   memory   {size(held.total).strip()}; state {size(held.state).strip()}, activations "
                  f"{size(held.activations).strip()}",
                  f"   traffic  {sent}",
                  f"   time     likely {1000 * time.likely:,.1f} ms, at least {1000 * time.at_least:,.1f} (bound by "
                  f"{time.bound}); {config.tokens_per_step / time.likely:,.0f} tokens/s",
                  f"   {start(way, base, recipe, per_host)}"]
    return "\n".join(lines)


def start(config: Config, base: Config, recipe: str, per_host: int) -> str:
    """The command that runs it."""
    world = config.mesh.world
    each = max(ranks for ranks in divisors(world) if ranks <= per_host)
    hosts = f"--nnodes {world // each} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
    hosts = "--standalone" if each == world else hosts
    run = "python" if world == 1 else f"torchrun {hosts} --nproc-per-node {each}"
    return " ".join([run, "-m moe_ext.train", recipe, *flags(config, base)])


def figures(config: Config, model: GPT) -> list[str]:
    """What Megatron-LM would print, and the exact figures beside its memory."""
    (exact, aware), mesh = megatron.exact_memory(config, model), config.mesh
    context = f", context {mesh.sp}" if mesh.sp > 1 else ""
    lines = [f"Megatron's formulas (tensor {mesh.tp}, pipeline {mesh.pp}{context}, data {mesh.dp}; vocabulary padded "
             f"to {megatron.padded_vocabulary(config)})",
             f"FLOPs per iteration: {megatron.num_floating_point_operations(config):,}",
             megatron.parameter_lines(config, model), megatron.footprint(config),
             f"  of the parameters that there are: {exact:.2f} MB"
             + (f"; each expert on one of {mesh.ep} ranks: {aware:.2f} MB" if mesh.ep > 1 else "")]
    if mesh.pp == 1:
        for what, buffer in zip(("", " of the experts"), megatron.buckets(config, model), strict=False):
            sizes = collections.Counter(sum(p.size for p in bucket) for bucket in buffer)
            lines.append(f"gradient buckets{what} (Megatron rule), in elements: " + " + ".join(
                f"{count} x {elements:,}" if count > 1 else f"{elements:,}" for elements, count in sizes.items()))
    return lines
