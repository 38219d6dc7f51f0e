"""Every op once, forward and backward, on small shapes that divide nothing: what compute-sanitizer watches.

    export PYTHONPATH=.:tests PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck python tests/gpu/small.py [cuda|cpu] [op ..]

Without torch's caching every tensor has its own allocation, so a step past its end is seen."""

import sys

import torch
from cases import Case, Shape
from checks import CHECKS

import moe_ext
from moe_ext import ops

CASES = [
    Case("odd", Shape(37, 19, 23, 5, 3), "some_absent"),
    Case("aligned, a tile and a bit", Shape(70, 72, 40, 4, 2), "skewed"),
]


def main(device="cuda", *names):
    torch.manual_seed(0)
    for name in names or CHECKS:
        print(name, flush=True)
        for case in CASES:
            for dtype in (torch.float32, torch.bfloat16):
                CHECKS[name](ops, case, dtype, device)
    moe_ext.synchronize(device)
    print(f"{len(names or CHECKS)} ops pass on {device}")


if __name__ == "__main__":
    main(*sys.argv[1:])
