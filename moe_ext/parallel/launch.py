"""The beginning and the end of a run on many ranks: `with joined(config) as mesh:`.

Under torchrun the processes meet, compare what they are about to run, watch each other (moe_ext.parallel.failure) and
build the mesh; in one process without torchrun there is nothing to meet.
"""
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from moe_ext.config import Config, dumps
from moe_ext.model import pick_device
from moe_ext.parallel.failure import Watch, agree
from moe_ext.parallel.mesh import Mesh, check_world


@contextmanager
def joined(config: Config, resumable=None) -> Iterator[Mesh]:
    """The mesh of config.mesh over the processes that torchrun started (environment RANK, WORLD_SIZE, ..).

    A rank that dies or raises inside ends all others within train.timeout seconds, with a sentence that ends in what
    resumable() says. Errors: ConfigError if the mesh does not fit the processes, or theirs is not one config.
    """
    world, device = int(os.environ.get("WORLD_SIZE", 1)), pick_device(config)
    if world == 1:
        yield Mesh(config.mesh, device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=config.train.timeout)))
    with Watch(store, rank, world, timeout=config.train.timeout, resumable=resumable) as watch:
        agree(store, rank, world, {"config": dumps(config)}, timeout=config.train.timeout)
        check_world(config.mesh, world)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world, timeout=timedelta(seconds=config.train.timeout))
        mesh = Mesh(config.mesh, device, store=store, seconds=config.train.timeout)
        mesh.at = watch.at
        yield mesh
        mesh.close()
    dist.destroy_process_group()
