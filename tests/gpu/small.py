"""Every op once, forward and backward, on small shapes that divide nothing: what compute-sanitizer watches.

    export PYTHONPATH=.:tests PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck python tests/gpu/small.py [cuda|cpu] [op .. | 2/4]

2/4: the second of four shares of the ops, for as many processes.
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


def share(text):
    """"2/4": the second of four shares of the ops."""
    number, shares = map(int, text.split("/"))
    return list(CHECKS)[number - 1::shares]


def main(device="cuda", *names):
    torch.manual_seed(0)
    names = share(names[0]) if names and "/" in names[0] else names or list(CHECKS)
    for name in names:
        print(name, flush=True)
        for case in CASES:
            for dtype in (torch.float32, torch.bfloat16):
                CHECKS[name](ops, case, dtype, device)
    moe_ext.synchronize(device)
    print(f"{len(names)} ops pass on {device}")


if __name__ == "__main__":
    main(*sys.argv[1:])
