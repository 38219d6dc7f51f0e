#!/usr/bin/env bash
# A bf16 all-reduce over gloo rounds to bf16 at every hop of its ring, so the sum of 256 + 1 + 1 + 1 over four ranks is 256
# or 260 depending on where in the tensor the element lies: one tensor of equal elements comes back with two values, the
# same on all ranks. Gradients reduced in bf16 on CPUs depend on how parameters are laid out in the bucket. And `reduce`
# with AVG leaves on the ranks that are not its target neither their input nor the mean.
#
# Seen with torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package index. Two minutes, most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy

cat > sum.py <<'PY'
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def main(rank, ranks, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    x = torch.full((1024,), 256.0 if rank == 0 else 1.0, dtype=torch.bfloat16)
    dist.all_reduce(x)
    y = torch.tensor([2.0 * (rank + 1)])
    dist.reduce(y, dst=0, op=dist.ReduceOp.AVG)
    gathered = [torch.empty(1) for _ in range(ranks)]
    dist.all_gather(gathered, y)
    if rank == 0:
        print("sums of 256 + 1 + 1 + 1:", {value: int((x == value).sum()) for value in x.unique().tolist()})
        print("mean of 2, 4, 6, 8 reduced to rank 0, on each rank:", [t.item() for t in gathered])
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(main, (4, os.getcwd()), nprocs=4)
PY

venv/bin/python sum.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
sums of 256 + 1 + 1 + 1: {256.0: 512, 260.0: 512}
mean of 2, 4, 6, 8 reduced to rank 0, on each rank: [5.0, 4.5, 3.5, 2.0]
SEEN
