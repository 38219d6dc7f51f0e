#!/usr/bin/env bash
# torch.optim.Adafactor multiplies its step by the parameter's root mean square. On a parameter sharded as FSDP2 shards it (a
# DTensor, Shard(0)) one would expect that of the whole tensor, whose norm DTensor knows how to sum. A stack of expert matrices
# [8, 32, 24] steps without an error, 1 / sqrt(shards) as far as one process with the same gradients: .71 on two ranks, half
# on four. A plain matrix raises, on one rank too, because a norm that is still a partial sum is squared in place.
#
# Seen with torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package index. Two minutes, most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy

cat > step.py <<'PY'
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import Shard, distribute_tensor


def step(shape, put):
    generator = torch.Generator().manual_seed(0)
    value, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    p = torch.nn.Parameter(put(value.clone()))
    p.grad = put(gradient)
    torch.optim.Adafactor([p], lr=0.01, weight_decay=0.0).step()
    after = p.detach()
    return getattr(after, "full_tensor", lambda: after)() - value


def main(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)
    mesh = dist.init_device_mesh("cpu", (ranks,))
    for shape in ((8, 32, 24), (64, 48)):
        want = step(shape, lambda x: x)
        try:
            got = step(shape, lambda x: distribute_tensor(x, mesh, [Shard(0)]))
            found = f"norm of the step over one process's: {(got.norm() / want.norm()).item():.2f}"
        except RuntimeError as error:
            found = str(error).split(":")[1].split(".")[0].strip()
        if rank == 0:
            print(f"{ranks} shards of {list(shape)}: {found}")
    dist.destroy_process_group()


if __name__ == "__main__":
    for ranks in (1, 2, 4):
        mp.spawn(main, (ranks, os.getcwd()), nprocs=ranks)
PY

venv/bin/python step.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
1 shards of [8, 32, 24]: norm of the step over one process's: 1.00
1 shards of [64, 48]: in-place operations that require placement changes are not supported
2 shards of [8, 32, 24]: norm of the step over one process's: 0.71
2 shards of [64, 48]: in-place operations that require placement changes are not supported
4 shards of [8, 32, 24]: norm of the step over one process's: 0.50
4 shards of [64, 48]: in-place operations that require placement changes are not supported
SEEN
