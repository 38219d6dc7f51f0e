"""y = x W^T + b: torch's product, or that of csrc/gemm.c where torch's leaves the CPU's instructions unused.

torch multiplies bfloat16 through oneDNN, which wants AVX-512, float16 likewise with AVX512-FP16, and without these by
loops that take 10 to 60 times as long as ours. float32 is MKL's, which knows no AVX-512 but Intel's: on AMD's ours
takes 0.6 of its time. Elsewhere the two are as fast.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from moe_ext import _C
from moe_ext.ops.define import define
from moe_ext.ops.expert import _grouped_gemm, _grouped_gemm_wgrad

HALVES = torch.bfloat16, torch.float16
FEW = 128, 8    # rows from which on our product, which packs w at every call, is worth it: of float32, of halves


def slow_dtypes() -> tuple:
    """Those whose product torch makes with less than the instructions of the CPU."""
    knows_bf16 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    knows_floats = not _C.versions()["isa"].startswith(("avx512", "amx")) or "AuthenticAMD" not in _vendor()
    return HALVES[knows_bf16:] + (() if knows_floats else (torch.float32, torch.float64))


def _vendor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


SLOW = slow_dtypes()    # once: what torch.compile traces cannot ask the CPU


def torch_knows(dtype) -> bool:
    """Whether torch's product of this dtype on the CPU uses the instructions that it has."""
    return dtype not in SLOW


def ours(device, dtype, rows) -> bool:
    """Whether our product takes so many rows; in a graph, which is for any number of them, whether it takes many."""
    if device.type != "cpu" or torch_knows(dtype):
        return False
    return torch.compiler.is_compiling() or rows >= FEW[dtype in HALVES]


def product(x_RI, w_IO, out_RO):
    """x w, below autograd, of matrices with any strides: torch's in out_RO, which fits or is empty, ours anew."""
    if ours(x_RI.device, x_RI.dtype, len(x_RI)):
        return _product(x_RI.contiguous(), w_IO)
    return torch.mm(x_RI, w_IO, out=out_RO)


def outer(x_RI, y_RO):
    """x^T y -> [I,O], as `product`."""
    if ours(x_RI.device, x_RI.dtype, len(x_RI)):
        return _outer(x_RI.contiguous(), y_RO.contiguous())
    return torch.mm(x_RI.T, y_RO)


def _product(x_RI, w_IO):
    bins_1 = torch.full((1,), len(x_RI), dtype=torch.int32, device=x_RI.device)
    return _grouped_gemm(x_RI, w_IO.unsqueeze(0), bins_1)


def _outer(x_RI, y_RO):
    bins_1 = torch.full((1,), x_RI.shape[0], dtype=torch.int32, device=x_RI.device)
    return _grouped_gemm_wgrad(x_RI, y_RO, bins_1).squeeze(0)


def _linear_kernel(x_TI, w_OI):
    if x_TI.dtype != w_OI.dtype:
        raise RuntimeError(
            f"moe_ext::linear: w has dtype {w_OI.dtype}, wanted that of x ({x_TI.dtype}). "
            "Hint: w.to(x.dtype), or torch.autocast"
        )
    if w_OI.dim() != 2 or x_TI.shape[1] != w_OI.shape[1]:
        raise RuntimeError(f"moe_ext::linear: w has shape {list(w_OI.shape)}, wanted [O, I={x_TI.shape[1]}]")
    return _product(x_TI, w_OI.T)


def _save_linear(ctx, inputs, output):
    (x, w), (need_dx, need_dw) = inputs, ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if need_dw else None, w if need_dx else None)


def _backward_linear(ctx, dy):
    (x, w), dy, (need_dx, need_dw) = ctx.saved_tensors, dy.contiguous(), ctx.needs_input_grad[:2]
    return _linear(dy, w.T) if need_dx else None, _outer(dy, x) if need_dw else None


_linear = define(
    "linear(Tensor x, Tensor w) -> Tensor",
    fake=lambda x, w: x.new_empty(x.shape[0], w.shape[0]),
    save=_save_linear,
    backward=_backward_linear,
    autocast=(0, 1),
    kernel=_linear_kernel,
)


def linear(x, w_OI, bias_O=None):
    """x W^T + b as torch.nn.functional.linear: x [..,I] -> [..,O]. Differentiable in all; follows autocast. Of DTensors
    it is torch's, which knows how they are sharded."""
    if x.device.type != "cpu" or hasattr(x, "placements") or hasattr(w_OI, "placements"):
        return F.linear(x, w_OI, bias_O)
    region = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    rows = x.numel() // max(1, x.shape[-1])
    if not ours(x.device, torch.get_autocast_dtype("cpu") if region else x.dtype, rows):
        return F.linear(x, w_OI, bias_O)
    y = _linear(x.reshape(rows, x.shape[-1]).contiguous(), w_OI).view(*x.shape[:-1], w_OI.shape[0])
    return y if bias_O is None else y + bias_O.to(y.dtype)
