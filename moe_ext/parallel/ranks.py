"""Ranks for proofs: forked from this process, which has imported everything, and joined by gloo over a file."""

import gc
import os
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist


def fork() -> int:
    """os.fork, whose child leaves alone what it inherits. To collect the parent's garbage would run its destructors,
    and that of a TCPStore waits for a thread that the child does not have."""
    pid = os.fork()
    if pid == 0:
        gc.freeze()
    return pid


def run_ranks(world, body, folder=None):
    """Call body(rank) in `world` forked gloo ranks and return what they returned, in rank order. `folder`: a new one
    for each call, for the meeting and the results; None: a temporary one. RuntimeError if a rank fails; its traceback
    is on stderr."""
    if folder is None:
        with tempfile.TemporaryDirectory() as folder:
            return run_ranks(world, body, folder)
    children = []
    for rank in range(world):
        child = fork()
        if child == 0:
            status = 1
            try:
                torch.set_num_threads(1)  # the parent's pool of threads did not survive the fork
                store = dist.FileStore(f"{folder}/store", world)
                dist.init_process_group("gloo", store=store, rank=rank, world_size=world,
                                        timeout=timedelta(seconds=300))
                torch.save(body(rank), f"{folder}/{rank}.pt")
                dist.barrier()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    failed = [rank for rank, child in enumerate(children) if os.waitpid(child, 0)[1]]
    if failed:
        raise RuntimeError(f"ranks {failed} of {world} failed; their tracebacks are above")
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(world)]
