"""The ranks of a run as meshes: who shares parameters, matrices, experts, sequences and scopes with whom.

    dense   (pp, rep, fsdp, tp)         all parameters but the experts'; sp ranks count as fsdp ranks here
    sparse  (pp, rep, efsdp, ep, etp)   the experts'; efsdp = fsdp*sp*tp / (ep*etp)
    data    (pp, dp, sequence)          the ranks with sequences of their own; those that share a sequence
    tokens  (replica, sp, tp)           how these share it; only if sp > 1
    pipe    (pp, stage)                 the ranks of one stage of the pipeline; those in the same place of each stage
All number the ranks alike, as (pp, rep, fsdp, sp, tp), the last axis fastest. sp and tp ranks see the same sequences
and hold S/(sp*tp) consecutive tokens of each between the modules; the rep*fsdp groups of them have sequences of their
own. Axes of size 1 carry no traffic.
"""
import dataclasses
import math

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from moe_ext.config import Config, ConfigError, MeshConfig, divisors, meshes, sequences
from moe_ext.layers.fused import Draws
from moe_ext.parallel.collectives import gather, scope_sum
from moe_ext.parallel.transport import NcclTransport, TorchTransport, WindowTransport


class Mesh:
    """The mesh of an initialised process group of config.world ranks; of one process without any. All ranks make it.

    config: the sizes. device: of the parameters. store: for the meeting of windows, slots and nccl transports, and
    seconds, how long these wait for a rank. timeout: how long collectives do, a timedelta; None: torch's default. at:
    takes the place where this rank is, as "step 12", for the sentence with which others end if it dies. Errors:
    ConfigError if the sizes are not those of the process group.
    """

    def __init__(self, config: MeshConfig, device="cpu", *, store=None, seconds: float = 120.0, timeout=None,
                 at=lambda place: None):
        self.config, self.device, self.at = config, torch.device(device), at
        self.store, self.seconds, self.timeout = store, seconds, timeout
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        check_world(config, self.world)
        self.pp_rank, self.stage_rank = divmod(self.rank, config.stage)
        self.dp_rank, self.sequence_rank = divmod(self.stage_rank, config.sequence)
        self.sp_rank, self.tp_rank = divmod(self.sequence_rank, config.tp)
        self.transport = None
        if self.world > 1:
            def over(**axes):
                """As init_device_mesh, whose groups have torch's timeout, not that of the run."""
                ranks, own = torch.arange(self.world).view(*axes.values()), []
                for axis, size in enumerate(ranks.shape):
                    rows = ranks.movedim(axis, -1).reshape(-1, size).tolist()
                    groups = [dist.new_group(row, timeout=timeout) for row in rows]
                    own += [group for group, row in zip(groups, rows, strict=True) if self.rank in row]
                return DeviceMesh.from_group(own, self.device.type, ranks, mesh_dim_names=tuple(axes))

            c = config
            self.dense = over(pp=c.pp, rep=c.rep, fsdp=c.shards, tp=c.tp)
            self.sparse = over(pp=c.pp, rep=c.rep, efsdp=c.efsdp, ep=c.ep, etp=c.etp)
            self.data = over(pp=c.pp, dp=c.dp, sequence=c.sequence)
            if c.sp > 1:
                self.tokens = over(replica=c.pp * c.dp, sp=c.sp, tp=c.tp)
            self.pipe = over(pp=c.pp, stage=c.stage)
        if config.ep > 1:
            group = self.sparse.get_group("ep")
            if config.transport == "torch":
                self.transport = TorchTransport(group)
            else:
                kind = WindowTransport if config.transport == "windows" else NcclTransport
                self.transport = kind(store, config.ep, dist.get_rank(group), device=self.device, seconds=seconds,
                                      name=f"experts/{dist.get_process_group_ranks(group)[0]}")

    @property
    def ep_rank(self) -> int:
        return self.rank // self.config.etp % self.config.ep

    @property
    def etp_rank(self) -> int:
        return self.rank % self.config.etp

    def draws(self, seed: int, step: int, row0: int, seq_len: int) -> Draws:
        """Where this rank's random numbers come from, for sequences row0, row0 + 1, .. of the step."""
        mine = seq_len // self.config.sequence
        runs = dict(run=mine, stride=seq_len) if self.config.sequence > 1 else {}
        return Draws(seed, step, row0 * seq_len + self.sequence_rank * mine, **runs)

    def rows(self, micro: int, micro_batch: int) -> tuple[int, int]:
        """This rank's rows [begin, end) of a step's sequences in its micro-batch number `micro`."""
        begin = (micro * self.config.dp + self.dp_rank) * micro_batch
        return begin, begin + micro_batch

    def sum(self, *numbers: torch.Tensor) -> list[torch.Tensor]:
        """The sum over all ranks of each tensor, in fp64, by one all-reduce."""
        if self.world == 1:
            return [n.double() for n in numbers]
        flat = torch.cat([n.double().flatten() for n in numbers])
        dist.all_reduce(flat)
        return [part.view(n.shape) for part, n in zip(flat.split([n.numel() for n in numbers]), numbers, strict=True)]

    def each(self, numbers) -> list[list[float]]:
        """The numbers of every rank, by rank, from each rank's own."""
        own = torch.zeros(self.world, len(numbers), dtype=torch.float64, device=self.device)
        own[self.rank] = torch.tensor(numbers, dtype=torch.float64)
        return self.sum(own)[0].tolist()

    def close(self) -> None:
        """Frees the transport; every rank calls it after its last step."""
        if hasattr(self.transport, "close"):
            self.transport.close()


class ScopePeers:
    """The `peers` of an MoE layer: the ranks that share a scope's tokens: "sequence", the sp * tp ranks;
    "micro_batch", all of its stage."""

    def __init__(self, mesh: Mesh, scope: str):
        self.whole = scope == "micro_batch"
        self.sequence, self.dp = mesh.data.get_group("sequence"), mesh.data.get_group("dp")
        self.sequence_rank, self.dp_rank = mesh.sequence_rank, mesh.dp_rank
        self.group = mesh.pipe.get_group("stage") if self.whole else self.sequence
        self.ranks = dist.get_world_size(self.group)

    def sum(self, x):
        return scope_sum(x, self.group)

    def gather(self, x_BSn):
        x_BSn = gather(x_BSn, 1, self.sequence)
        return gather(x_BSn, 0, self.dp) if self.whole else x_BSn

    def own(self, x_BSn):
        if self.whole:
            x_BSn = x_BSn.chunk(dist.get_world_size(self.dp))[self.dp_rank]
        return x_BSn.chunk(dist.get_world_size(self.sequence), dim=1)[self.sequence_rank]


def check_world(mesh: MeshConfig, world: int, config: Config | None = None) -> None:
    """ConfigError, with the nearest mesh that fits (the model of `config` too), unless the mesh has `world` ranks."""
    def distance(other):
        return sum(abs(math.log(other.sizes[name] / size)) for name, size in mesh.sizes.items())

    def fits(other):
        try:
            return config is None or dataclasses.replace(config, mesh=other) is not None
        except ConfigError:
            return False

    if mesh.world != world:
        hint = f"start {mesh.world}"
        others = [dataclasses.replace(other, pp=pp, attention=mesh.attention) for pp in divisors(world)
                  for other in (*meshes(world // pp), *sequences(world // pp))]
        if best := next(filter(fits, sorted(others, key=distance)), None):
            sizes = " ".join(f"--mesh.{name} {size}" for name, size in best.sizes.items() if size != mesh.sizes[name])
            hint += f", or take the nearest mesh of {world}: {sizes}"
        stages, shared = (f"{axis} {mesh.sizes[axis]} * " if mesh.sizes[axis] > 1 else "" for axis in ("pp", "sp"))
        raise ConfigError(f"the mesh has {stages}rep {mesh.rep} * fsdp {mesh.fsdp} * {shared}tp {mesh.tp} = "
                          f"{mesh.world} ranks, but {world} {'process runs' if world == 1 else 'processes run'}: "
                          f"{hint}")
