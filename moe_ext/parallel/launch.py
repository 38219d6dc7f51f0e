"""The beginning and the end of a run on many ranks: `with joined(config, facts) as mesh:`.

Under torchrun the processes meet, watch each other, compare what they are about to run (moe_ext.parallel.failure) and
build the mesh. One process alone has nobody to meet.
"""
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from moe_ext.config import Config
from moe_ext.model import pick_device
from moe_ext.parallel.failure import LINGER, Watch, agree, join
from moe_ext.parallel.mesh import Mesh, check_world


@contextmanager
def joined(config: Config, facts: dict, hint=str) -> Iterator[Mesh]:
    """The mesh of config.mesh over the processes that torchrun started (environment RANK, WORLD_SIZE, ..).

    facts: what must be the same on all ranks. A rank that dies or raises inside ends all others within train.timeout
    seconds, with a sentence that ends in what hint() says. Errors: ConfigError if the mesh does not fit the processes
    or they disagree; RankFailure.
    """
    world, device, timeout = int(os.environ.get("WORLD_SIZE", 1)), pick_device(config), config.train.timeout
    if world == 1:
        yield Mesh(config.mesh, device)
        return
    check_world(config.mesh, world, config)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world = join(timeout)
    with Watch(store, rank, world, timeout, hint) as watch:
        agree(store, rank, world, facts | {"the device": device.type})
        # NCCL ends a process without a word: not before the Watch has spoken
        backend, seconds = ("cpu:gloo,cuda:nccl", 2 * timeout + LINGER) if device.type == "cuda" else ("gloo", timeout)
        limit = timedelta(seconds=seconds)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
        mesh = Mesh(config.mesh, device, store=store, seconds=timeout, timeout=limit, at=watch.at)
        yield mesh
        mesh.close()
        dist.destroy_process_group()
