"""python -m moe_ext: what was built, what runs here, and whether it computes what it should."""

import platform
import sys

import numpy
import torch

import moe_ext
from moe_ext import ops, reference

TOLERANCE = 1e-4


def self_check(device):
    """One fused expert MLP with its gradients, in fp32, against plain torch in fp64: the largest relative error."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    T, K, E, D, F = 64, 2, 4, 32, 48
    tensors = normal(T, D), normal(E, 2 * F, D), normal(E, D, F), normal(T, E)
    results = []
    for library, dtype in ((ops, torch.float32), (reference, torch.float64)):
        x, w13, w2, logits = (t.detach().to(dtype).requires_grad_() for t in tensors)
        weights, ids, _ = library.router(logits, K)
        y = library.expert_mlp(x, w13, None, w2, weights, library.route_index(ids, E), act="swiglu")
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, w13, w2, logits))))
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results, strict=True))


def cuda():
    """The devices that the CUDA kernels can run on, or why there are none."""
    if why := moe_ext._C.cuda():
        return why
    if not torch.cuda.is_available():
        return f"kernels for sm_80 and newer; torch {torch.__version__} sees no device"
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return "kernels for " + ", ".join(f"{d.name} (sm_{d.major}{d.minor}, {d.total_memory >> 30} GiB)" for d in devices)


def main():
    versions = moe_ext._C.versions()
    features = [name for name, has in moe_ext._C.cpu_features().items() if has]
    print(f"moe_ext   {moe_ext.__version__} (compiler {versions['compiler']}, {versions['api']})")
    print(f"torch     {torch.__version__}, numpy {numpy.__version__}, Python {platform.python_version()}")
    print(f"kernels   {versions['isa']}, {torch.get_num_threads()} threads; this CPU has {', '.join(features)}")
    print(f"CUDA      {cuda()}")
    errors = {device: self_check(device) for device in ["cpu"] + ["cuda"] * moe_ext.has_cuda()}
    for device, error in errors.items():
        ok = "ok" if error < TOLERANCE else "WRONG"
        print(f"check     {ok} on {device}: expert MLP and its gradients differ from plain torch by {error:.1e}")
    return any(error >= TOLERANCE for error in errors.values())


if __name__ == "__main__":
    sys.exit(main())
