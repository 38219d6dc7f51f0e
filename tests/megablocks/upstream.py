"""The real MegaBlocks as the oracle of the parity files beside this one, on a GPU or on a CPU (MOE_PARITY_DEVICE).

Before its first import it is given stand-ins in plain torch for its two compiled modules: `grouped_gemm`, whose own
kernels know bf16 alone, and `megablocks_ops`, unless that is installed on a GPU. Of several tuning candidates, which
choose no other result, each Triton kernel keeps one. On a GPU the kernels then run as they are. On a CPU they run in
Triton's interpreter, with TRITON_INTERPRET=1 and a `torch.cuda.current_device` that answers "cpu". All this changes the
process, so the parity files are not named test_*: tests/test_megablocks.py runs each of them in a process of its own.
(No __init__.py here: it would hide the real one.)

Limits of the interpreter: fp32; fp16 and bf16 only where rows are copied, because it truncates fp32 to bf16. A routed
row costs about 3 ms, so cases are small.
"""

import importlib.util
import os
import sys
import types
from pathlib import Path

import torch

DEVICE = os.environ.get("MOE_PARITY_DEVICE", "cpu")

sys.path.append(str(Path(__file__).parents[1]))  # tests/ranks.py


def sort(x, end_bit, x_out, indices_out):
    order = (x.long() & ((1 << end_bit) - 1)).argsort(stable=True)
    x_out.copy_(x[order])
    indices_out.copy_(order)


def histogram(x, bins):
    rows = x.reshape(-1, x.shape[-1]).long()
    counts = torch.stack([torch.bincount(r[(r >= 0) & (r < bins)], minlength=bins) for r in rows]).int()
    return counts.reshape(*x.shape[:-1], bins)


def inclusive_cumsum(x, dim, out):
    out.copy_(x.cumsum(dim))


def exclusive_cumsum(x, dim, out):
    out.copy_(x.cumsum(dim) - x)


def indices(padded_bins, block, rows, cols, out):
    begin_R, cols_C = (torch.arange(n, device=out.device) for n in (rows, cols))
    expert_R = torch.searchsorted(padded_bins.long(), begin_R * block, right=True)
    out.copy_((expert_R[:, None] * cols + cols_C).flatten())


def counts_of(bins):
    return torch.diff(bins.long(), prepend=bins.new_zeros(1).long())


def replicate_forward(x, bins, out):
    out[:, : int(bins[-1])] = x.repeat_interleave(counts_of(bins), dim=1)


def replicate_backward(dy, bins, out):
    expert = torch.arange(len(bins), device=bins.device).repeat_interleave(counts_of(bins))
    out.zero_().index_add_(1, expert, dy[:, : int(bins[-1])])


def gmm(a, b, batch_sizes, trans_b=False):
    parts = a.split(batch_sizes.tolist())
    return torch.cat([part @ (w.T if trans_b else w) for part, w in zip(parts, b, strict=True)])


def backend_gmm(a, b, batch_sizes, trans_a=False, trans_b=False, c=None):
    if trans_a:
        sizes = batch_sizes.tolist()
        y = torch.stack([p.T @ q for p, q in zip(a.split(sizes), b.split(sizes), strict=True)])
    else:
        y = gmm(a, b, batch_sizes, trans_b)
    return y if c is None else c.copy_(y)


def stand_in(name, *functions, **members):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update({f.__name__: f for f in functions}, **members)


def load():
    """Import megablocks, with its stand-ins; a sentence says what to do where that cannot be."""
    if DEVICE == "cpu":
        if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("triton is already imported: run the parity files in a process of their own")
        os.environ["TRITON_INTERPRET"] = "1"
        torch.cuda.current_device = lambda: torch.device("cpu")
    else:
        os.environ.pop("TRITON_INTERPRET", None)
        torch.set_default_device(DEVICE)  # of what the parity files make; the stand-ins go by their arguments
    if DEVICE == "cpu" or importlib.util.find_spec("megablocks_ops") is None:
        stand_in("megablocks_ops", sort, histogram, inclusive_cumsum, exclusive_cumsum, indices, replicate_forward,
                 replicate_backward)  # fmt: skip
    stand_in("grouped_gemm", ops=types.SimpleNamespace(gmm=gmm), backend=types.SimpleNamespace(gmm=backend_gmm))
    try:
        import megablocks
        import megablocks.ops
        from megablocks.backend import kernels
        from stk.backend import triton_kernels
    except ImportError as error:
        raise ImportError(f"the parity tests need MegaBlocks ({error}): `make test` installs it into .venv") from error
    for owner in (kernels, triton_kernels):
        for kernel in vars(owner).values():
            if hasattr(kernel, "configs"):
                kernel.configs = kernel.configs[:1]
    return megablocks


megablocks = load()
