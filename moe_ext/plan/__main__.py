"""`python -m moe_ext.plan RECIPE.toml [--mesh.fsdp 8 ..] [--device h100] [--type dense] [--search N]`: a run's cost.
`python -m moe_ext.plan schedule [RECIPE.toml] [--pp 4 --chunks 4 --micros 8 ..]`: a pipeline's step (plan.schedule).
`python -m moe_ext.plan ulysses [--n 60000 --tp 8 --dp 2 ..]`: a long sequence that ranks share (plan.ulysses).

It needs no GPU, no ranks and no data: the model lies on the meta device. Every field of a recipe is an option, as with
moe_ext.train.
"""
from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace

from moe_ext import tune
from moe_ext.config import Config, parse, plain, require
from moe_ext.model import GPT, parameter_dtype
from moe_ext.plan import schedule, ulysses
from moe_ext.plan.report import found, plan
from moe_ext.plan.roofline import DEVICES, SHARES, Device
from moe_ext.plan.search import MOST


@dataclass(frozen=True)
class Command(Config):
    """Plan a run: a recipe, overridden field by field."""
    type: str = ""              # dense, capacity or dropless: the recipe's model as another type
    device: str = "h100"        # whose roofline: a100, a100-40gb, h100, h100-pcie, h200, b200, l40s, rtx4090
    per_host: int = 8           # devices of a host
    search: int = 0             # the best meshes of so many devices, up to 10,000; 0: the recipe's mesh alone
    top: int = 5                # of them, so many are shown
    pp: int = 1                 # pipeline stages in Megatron's formulas, for a recipe without them (mesh.pp)
    vpp: int = 1                # model chunks per pipeline stage, likewise (pipeline.chunks)
    peak_tflops: float = 0.0    # these are the device's own, if not 0: TFLOP/s of matrix products in train.dtype
    memory_gb: float = 0.0      # 10^9 bytes of memory
    bandwidth: float = 0.0      # of memory, GB/s
    link: float = 0.0           # to another device of the host, each way, GB/s
    network: float = 0.0        # to another host, each way, for each device, GB/s
    host: float = 0.0           # to the memory of its own host, each way, GB/s
    efficiency: float = 0.0     # share of peak_tflops that a step's matrix products reach; 0: as measured on an H200

    def check(self) -> None:
        known = ("choose one, or the nearest and its peaks: --peak-tflops, --memory-gb, --bandwidth, --link, "
                 "--network, --host")
        require(self.device in DEVICES, f"--device: got {self.device!r}, wanted one of {', '.join(DEVICES)}: {known}")
        for name in ("per_host", "top", "pp", "vpp"):
            value = getattr(self, name)
            require(value > 0, f"--{name.replace('_', '-')} is {value}; it must be positive")
        for name in ("peak_tflops", "memory_gb", "bandwidth", "link", "network", "host"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"--{name.replace('_', '-')} is {value}; it must be positive, or 0 for the "
                    "device's own")
        require(0 <= self.efficiency <= 1, f"--efficiency is {self.efficiency}; it must lie in [0, 1], and 0 is what "
                "was measured")
        require(0 <= self.search <= MOST, f"--search is {self.search}; it must be a number of devices, 1 to {MOST:,}")

    @property
    def peaks(self) -> Device:
        own = DEVICES[self.device]
        tflops = {"tflops": self.peak_tflops, "tflops_fp32": self.peak_tflops}
        given = tflops | dict(memory=self.memory_gb, bandwidth=self.bandwidth, link=self.link, network=self.network,
                              host=self.host)
        return replace(own, **{name: value for name, value in given.items() if value})


def main() -> None:
    try:
        args = sys.argv[1:]
        if args[:1] == ["schedule"]:
            return schedule.main(args[1:])
        if args[:1] == ["ulysses"]:
            return ulysses.main(args[1:])
        command = parse(args, Command, "moe_ext.plan")
        command.check()
        config, device = plain(command), command.peaks
        shares = SHARES._replace(compute=command.efficiency or SHARES.compute)
        model = GPT(config.model, dtype=parameter_dtype(config), device="meta")
        tune.check(model)
        if command.search:
            print(found(config, command.search, device, command.per_host, shares, command.top, args[0]))
        else:
            print(plan(config, model, device, command.per_host, shares, args[0], command.pp, command.vpp))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
