"""python -m moe_ext: what was built, what runs here, and whether it computes what it should."""

import platform
import sys

import numpy
import torch

import moe_ext
from moe_ext import ops, reference


def self_check():
    """One fused expert MLP with its gradients, in fp32, against plain torch in fp64: the largest relative error."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    T, K, E, D, F = 64, 2, 4, 32, 48
    tensors = normal(T, D), normal(E, 2 * F, D), normal(E, D, F), normal(T, E)
    results = []
    for library, dtype in ((ops, torch.float32), (reference, torch.float64)):
        x, w13, w2, logits = (t.detach().to(dtype).requires_grad_() for t in tensors)
        weights, ids, _ = library.router(logits, K)
        y = library.expert_mlp(x, w13, None, w2, weights, library.route_index(ids, E), act="swiglu")
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, w13, w2, logits))))
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results, strict=True))


def main():
    versions = moe_ext._C.versions()
    features = [name for name, has in moe_ext._C.cpu_features().items() if has]
    print(f"moe_ext   {moe_ext.__version__} (compiler {versions['compiler']}, {versions['api']})")
    print(f"torch     {torch.__version__}, numpy {numpy.__version__}, Python {platform.python_version()}")
    print(f"kernels   {versions['isa']}, {torch.get_num_threads()} threads; this CPU has {', '.join(features)}")
    error = self_check()
    ok = error < 1e-4
    print(f"check     {'ok' if ok else 'WRONG'}: expert MLP and its gradients differ from plain torch by {error:.1e}")
    return not ok


if __name__ == "__main__":
    sys.exit(main())
