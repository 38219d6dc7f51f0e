"""Run by torchrun in tests/test_failure.py: rank 1 kills itself in step 3 of the first attempt, while rank 0 waits
for it."""

import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from moe_ext.parallel.failure import RankFailure, Watch, join

try:
    store, rank, world = join(timeout=60.0)
    with Watch(store, rank, world, 60.0, hint=lambda: "--resume auto continues from step-000002") as watch:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        for step in (1, 2, 3):
            watch.at(f"step {step}")
            if step == 3 and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                os.kill(os.getpid(), signal.SIGKILL)
            dist.all_reduce(torch.ones(1))
        print(rank)
        dist.destroy_process_group()
except RankFailure as error:
    sys.exit(f"error: {error}")
