"""moe_ext: Mixture-of-Experts training in C and CUDA for PyTorch.

    import moe_ext
    layer = moe_ext.FusedMoE(dim=512, hidden=1024, num_experts=16, top_k=2)   # or moe_ext.dMoE(args), as in MegaBlocks
    y, routing = layer(x)       # x [B,S,D]; routing.loss is to be added to the loss

`python -m moe_ext` says what was built and what runs. Importing needs only torch and
numpy. The environment's MOE_ISA=base|avx2|avx512|avx512bf16|amx forces a set of kernels; MOE_SM90=0
leaves out those of Hopper's own.
"""

import ctypes
import os
import signal
import sys
from importlib import import_module
from importlib.util import find_spec

if sys.argv[:1] == ["-m"] and any(word.startswith("moe_ext") for word in sys.orig_argv):
    # `python -m moe_ext.train` begins: from the slow imports below on, Ctrl-C is a line instead of a traceback. Not by
    # an exception, which some `except ImportError` in there swallows.
    def interrupted(number, frame):
        os.write(2, b"\ninterrupted\n")
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted)

import torch  # first: the extension is linked to the libraries that torch has loaded

from moe_ext import private

__version__ = "0.1.0"

if folder := os.environ.get("MOE_BINARY"):  # another build of _C, such as the one of `make sanitize`
    __path__.insert(0, folder)
try:
    _C = import_module("moe_ext._C")
except ImportError as error:
    if "MOE_ISA" in str(error):
        raise
    raise ImportError(
        f"moe_ext is not built for this Python and torch {torch.__version__} ({error}). "
        "Type: pip install --no-build-isolation -e ."
    ) from error

private.require("moe_ext.ops")
from moe_ext import ops  # noqa: E402

_LAYERS = {
    "Arguments": "moe_ext.layers.arguments",
    "Draws": "moe_ext.layers.fused",
    "FusedMoE": "moe_ext.layers.fused",
    "LearnedRouter": "moe_ext.layers.router",
    "MLP": "moe_ext.layers.mlp",
    "MoE": "moe_ext.layers.moe",
    "ParallelDroplessMLP": "moe_ext.layers.dmoe",
    "ParallelMLP": "moe_ext.layers.moe",
    "SparseGLU": "moe_ext.layers.glu",
    "SparseMLP": "moe_ext.layers.mlp",
    "dMoE": "moe_ext.layers.dmoe",
    "get_load_balancing_loss": "moe_ext.layers.moe",
}
__all__ = ["__version__", "empty_cache", "has_cuda", "keep_freed_memory", "ops", "synchronize", *_LAYERS]


def has_cuda() -> bool:
    """Whether the ops run on CUDA here: torch sees a device, and this build has kernels for it."""
    return _C.cuda() is None and torch.cuda.is_available()


def empty_cache():
    """Gives the memory that the ops keep on the CPU back to the system. They keep what their large results and their
    workspaces have had, as much as was in use at once, because a step that has to ask for it anew loses up to a quarter
    of its time to page faults. Memory of tensors that still live stays. Of CUDA's: torch.cuda.empty_cache()."""
    _C.empty_cache()


def keep_freed_memory() -> bool:
    """Makes malloc keep what this process frees, for its next allocations: then torch's own tensors are not faulted in
    anew at every step either, as those of the ops never are. For all of the process and for good, so a program asks
    for it, early; moe_ext.train does. False where malloc is not glibc's, and nothing changes."""
    mallopt, trim_threshold, mmap_max = getattr(ctypes.CDLL(None), "mallopt", None), -1, -4  # <malloc.h>
    return mallopt is not None and mallopt(mmap_max, 0) == mallopt(trim_threshold, -1) == 1


def synchronize(device=None):
    """Waits for a CUDA device (by default the current one) and raises RuntimeError if a kernel found bad values in
    memory since the last call: an id out of range, bins that decrease, NaN logits. Nothing to do on the CPU."""
    device = torch.device(device or ("cuda" if has_cuda() else "cpu"))
    torch.ops.moe_ext.check(torch.empty(0, device=device))


def __getattr__(name):
    """The layers and the modules of this package, imported when first asked for."""
    if name in _LAYERS:
        return getattr(import_module(_LAYERS[name]), name)
    if not name.startswith("_") and find_spec(f"moe_ext.{name}"):
        return import_module(f"moe_ext.{name}")
    raise AttributeError(f"module 'moe_ext' has no attribute '{name}'")
