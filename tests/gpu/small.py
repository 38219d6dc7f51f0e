"""Every op once, forward and backward, on small shapes that divide nothing: what compute-sanitizer watches.

    export PYTHONPATH=.:tests PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck python tests/gpu/small.py [cuda|cpu] [op .. | 2/4]

2/4: the second of four shares of the ops, for as many processes. On Hopper, whose kernels take the second of the
shapes, ops with products run once for each tile that these may have.
Without torch's caching every tensor has its own allocation, so a step past its end is seen."""

import sys

import torch
from cases import Case, Shape
from checks import CHECKS

import moe_ext
from moe_ext import ops
from tests import cublas

PRODUCTS = ("grouped_gemm", "grouped_gemm_wgrad", "expert_mlp")
CASES = [
    Case("odd", Shape(37, 19, 23, 5, 3), "some_absent"),
    Case("aligned, a tile and a bit", Shape(70, 72, 40, 4, 2), "skewed"),
]


def share(text):
    """"2/4": the second of four shares of the ops."""
    number, shares = map(int, text.split("/"))
    return list(CHECKS)[number - 1::shares]


def checks(name, dtype, device):
    old = device == "cpu" or torch.cuda.get_device_capability() != (9, 0)
    if old or name not in PRODUCTS or dtype == torch.float32:
        return [CHECKS[name]]
    return [cublas.forced(cublas.load(), way, CHECKS[name]) for way in cublas.WAYS]


def main(device="cuda", *names):
    torch.manual_seed(0)
    names = share(names[0]) if names and "/" in names[0] else names or list(CHECKS)
    for name in names:
        print(name, flush=True)
        for case in CASES:
            for dtype in (torch.float32, torch.bfloat16):
                for check in checks(name, dtype, device):
                    check(ops, case, dtype, device)
    moe_ext.synchronize(device)
    print(f"{len(names)} ops pass on {device}")


if __name__ == "__main__":
    main(*sys.argv[1:])
