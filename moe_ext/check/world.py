"""The ranks of a check: who we are, who the others are, and how all speak without talking over each other.

    world = World.from_environment()        # torchrun's variables; without them one process is a world of its own
    world.say("once")                       # from rank 0
    world.say_each(f"rank {world.rank}")    # every rank's text, in rank order
    with world.joined():                    # the default process group

Ranks meet in a store before there is a process group, so what keeps a group from forming can be told. No wait is longer
than `seconds`: then a WorldError says which ranks did not come, and what to look at.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

import moe_ext
from moe_ext.config import require

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
VARIABLES = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"


class WorldError(RuntimeError):
    """The ranks cannot meet; the message says why and what to do."""


@dataclass(frozen=True)
class Command:
    """What every check can be told."""

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if the ops run there and each local rank has a GPU
    seconds: float = 60.0  # longest wait for another rank

    def run(self, world: World) -> bool:
        """The check itself -> whether everything was as it should be."""
        raise NotImplementedError


def from_environment(name: str, default: int):
    """A field whose default is an environment variable's value."""

    def read():
        text = os.environ.get(name, str(default))
        require(text.isdecimal(), f"the environment's {name} is {text!r}, wanted a whole number: export {name}=1")
        return int(text)

    return field(default_factory=read)


@dataclass(frozen=True)
class OnMesh(Command):
    """A check on a mesh of dp * shard * tp ranks, tp innermost."""

    dp: int = from_environment("DP", 1)  # replicas of the sharded model; default: $DP
    shard: int = from_environment("SHARD", 0)  # ranks that shard parameters; 0: those that dp and tp leave; $SHARD
    tp: int = from_environment("TP", 1)  # ranks that share a matrix; $TP
    ep: int = from_environment("EP", 1)  # ranks that share the experts; $EP

    def sizes(self, ranks: int) -> tuple[int, int, int, int]:
        """(dp, shard, tp, ep) for a world of `ranks`; ConfigError if they do not fill it."""
        shard = self.shard or max(1, ranks // max(1, self.dp * self.tp))
        require(self.dp * shard * self.tp == ranks, f"DP {self.dp} * SHARD {shard} * TP {self.tp} = "
                f"{self.dp * shard * self.tp}, but there are {ranks} ranks: change --nproc-per-node or the sizes")
        return self.dp, shard, self.tp, self.ep


@dataclass(frozen=True)
class Facts:
    """What a rank tells the others about itself."""

    rank: int
    local_rank: int
    size: int
    host: str
    pid: int
    device: str
    backend: str
    torch: str
    moe_ext: str
    isa: str
    threads: int
    cores: int  # that this process may run on
    gpus: int
    cuda: str  # "yes", or why there are no CUDA kernels
    interface: str  # GLOO_SOCKET_IFNAME
    interfaces: list[str]
    address: str  # of the host's name, which gloo offers to the other ranks if no interface is named


def identity(variables: Mapping[str, str]) -> dict[str, int] | None:
    """{"rank", "size", "local_rank"} of torchrun's variables, None if there are none of them. WorldError with one
    sentence for each variable that is missing or senseless."""
    if not any(name in variables for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return None
    wrong = [f"{name} is not set" for name in VARIABLES if name not in variables]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if not variables.get(name, "0").isdecimal():
            wrong.append(f"{name} is {variables[name]!r}, wanted a whole number")
    if not wrong:
        rank, size, local_rank = (int(variables[name]) for name in VARIABLES[:3])
        if rank < size:
            return dict(rank=rank, size=size, local_rank=local_rank)
        wrong = [f"RANK is {rank}, wanted 0 to WORLD_SIZE - 1 = {size - 1}"]
    raise WorldError("; ".join(wrong) + ": torchrun sets all of them: torchrun --standalone --nproc-per-node "
                     f"{variables.get('WORLD_SIZE', 2)} -m moe_ext.check ..")


class World:
    """rank, size, local_rank, device, store; `facts` of every rank, in rank order."""

    def __init__(self, store, rank: int, size: int, local_rank: int, *, device="auto", seconds=60.0):
        self.store, self.rank, self.size, self.local_rank = store, rank, size, local_rank
        self.seconds, self.meetings = seconds, 0
        gpus = torch.cuda.device_count() if moe_ext.has_cuda() else 0
        on_gpu = device == "cuda" or (device == "auto" and local_rank < gpus)
        self.device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
        self.backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        mine = Facts(
            rank=rank, local_rank=local_rank, size=size, host=socket.gethostname(), pid=os.getpid(),
            device=str(self.device), backend=self.backend, torch=torch.__version__, moe_ext=moe_ext.__version__,
            isa=moe_ext._C.versions()["isa"], threads=torch.get_num_threads(), cores=len(os.sched_getaffinity(0)),
            gpus=torch.cuda.device_count(), cuda=moe_ext._C.cuda() or "yes",
            interface=os.environ.get("GLOO_SOCKET_IFNAME", ""),
            interfaces=[name for _, name in socket.if_nameindex()], address=own_address(),
        )
        self.facts = [Facts(**json.loads(text)) for text in self.gather(json.dumps(asdict(mine)))]

    @classmethod
    def from_environment(cls, *, device="auto", seconds=60.0) -> World:
        """The world that torchrun describes, or one process. WorldError if it cannot be entered within `seconds`."""
        who = identity(os.environ)
        if who is None:
            return cls(dist.HashStore(), rank=0, size=1, local_rank=0, device=device, seconds=seconds)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        hosts_store = who["rank"] == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun
        if not hosts_store:
            knock(address, port, seconds)
        try:
            store = dist.TCPStore(address, port, is_master=hosts_store, timeout=timedelta(seconds=seconds),
                                  wait_for_workers=False)
        except (RuntimeError, ValueError) as error:
            raise WorldError(f"rank {who['rank']} cannot hold the store at {address}:{port}: MASTER_PORT must be a "
                             f"free port of this host ({first_line(error)})") from error
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(dist.PrefixStore(f"check/{restart}", store), **who, device=device, seconds=seconds)

    @property
    def hosts(self) -> int:
        return len({fact.host for fact in self.facts})

    def gather(self, text: str = "") -> list[str]:
        """What every rank says here, in rank order. All ranks gather the same number of times."""
        self.meetings += 1
        keys = [f"{self.meetings}/{rank}" for rank in range(self.size)]
        try:
            self.store.set(keys[self.rank], text)
            self.store.wait(keys, timedelta(seconds=self.seconds))
            return [self.store.get(key).decode() for key in keys]
        except RuntimeError as error:
            raise WorldError(f"rank {self.rank} waited {self.seconds:g} s for {self.absent(keys)}: not started, "
                             f"ended, or standing still ({first_line(error)})") from error

    def absent(self, keys: list[str]) -> str:
        try:
            missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
        except RuntimeError:
            return "the others, and the store that rank 0 holds is gone"
        return ranks(missing)

    def say(self, text: str = "") -> None:
        """One text, from rank 0."""
        if self.rank == 0:
            print(text, flush=True)

    def say_each(self, text: str) -> None:
        """The texts of all ranks, in rank order."""
        self.say("\n".join(self.gather(text)))

    def leave(self) -> None:
        """The last call: nobody leaves before rank 0 has spoken, for torchrun ends all ranks with the first that fails,
        and rank 0, which may hold the store, leaves last."""
        self.gather()
        if self.rank == 0:
            self.store.wait([f"left/{rank}" for rank in range(1, self.size)], timedelta(seconds=self.seconds))
        else:
            self.store.set(f"left/{self.rank}", "")

    def agree(self, what: str, right: bool) -> bool:
        """Says whether all ranks found something right, and which did not."""
        bad = [rank for rank, said in enumerate(self.gather(str(right))) if said != "True"]
        self.say(f"{what}: " + (f"WRONG on {ranks(bad)}" if bad else "right on every rank"))
        return not bad

    @contextmanager
    def joined(self):
        """The default process group, made of these ranks; one that exists already is used and left alone."""
        if dist.is_initialized():
            yield
            return
        if self.device.type == "cuda":
            if self.local_rank >= torch.cuda.device_count():
                raise WorldError(f"rank {self.rank} on {socket.gethostname()} has no GPU of its own: torch sees "
                                 f"{torch.cuda.device_count()} for local rank {self.local_rank}: take --device cpu, or "
                                 "no more ranks than GPUs")
            torch.cuda.set_device(self.device)
        limit = timedelta(seconds=self.seconds)
        try:
            dist.init_process_group(self.backend, store=dist.PrefixStore("group", self.store), rank=self.rank,
                                    world_size=self.size, timeout=limit)
        except RuntimeError as error:
            raise WorldError(f"rank {self.rank} on {socket.gethostname()} met the others in the store, but the "
                             f"{self.backend} group does not form: {first_line(error)}: a firewall between the nodes, "
                             "or GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the wrong interface") from error
        try:
            yield
        finally:
            dist.destroy_process_group()

    def milliseconds(self, call: Callable[[], object], times: int = 20) -> float:
        """The median duration of a call, after one to warm up; the slowest rank's. Collective, as the call is."""
        durations = []
        for _ in range(1 + times):
            begin = time.perf_counter()
            call()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            durations.append(1e3 * (time.perf_counter() - begin))
        return max(map(float, self.gather(str(statistics.median(durations[1:])))))


def knock(address: str, port: int, seconds: float) -> None:
    """Waits until something listens there. torch's own client would say the same in pages of C++ frames."""
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((address, port), timeout=max(0.1, end - time.monotonic())).close()
        except OSError as error:
            if time.monotonic() > end:
                raise WorldError(f"rank {os.environ['RANK']} on {socket.gethostname()} does not reach the master at "
                                 f"{address}:{port} within {seconds:g} s ({error}): MASTER_ADDR must be the first "
                                 "node's name or address, MASTER_PORT a port that is open there, and rank 0 must have "
                                 "been started") from error
            time.sleep(0.1)


def describe(mesh) -> str:
    """A DeviceMesh with its ranks, which torch's own text leaves out."""
    return f"DeviceMesh('{mesh.device_type}', {mesh.mesh.tolist()}, mesh_dim_names={mesh.mesh_dim_names})"


def own_address() -> str:
    """The address of the host's name, "" if it has none."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def ranks(numbers: list[int]) -> str:
    """[3] -> "rank 3", [0, 2] -> "ranks 0, 2"."""
    return ("rank " if len(numbers) == 1 else "ranks ") + ", ".join(map(str, numbers))


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
