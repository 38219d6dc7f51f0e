"""How an op is declared: schema, shape function, gradient and autocast rule in one place.

The kernel of an op is the function of the same name in csrc/ops.cpp, unless `kernel` gives one in Python. Ops are pure
(but for a trailing underscore), return no views, and take a size that depends on data as a SymInt.
"""

import torch

_library = torch.library.Library("moe_ext", "DEF")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def define(schema, *, fake, save=None, backward=None, autocast=(), autocast_dtype=None, kernel=None):
    """Declares moe_ext::<schema> and returns its OpOverload.

    fake            the shape function: takes the op's arguments, returns empty tensors like its results
    save, backward  the gradient as torch.library.register_autograd wants it
    autocast        under torch.autocast the floating arguments at these positions are cast, float64 excepted ...
    autocast_dtype  ... to this dtype; None is the region's own dtype
    kernel          a Python implementation for all devices, for an op that is composed of others
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=_tags)
    op = getattr(torch.ops.moe_ext, name).default
    torch.library.register_fake(f"moe_ext::{name}", fake, lib=_library)
    if backward:
        torch.library.register_autograd(f"moe_ext::{name}", backward, setup_context=save, lib=_library)
    if kernel:
        _library.impl(name, kernel, "CompositeExplicitAutograd")
    if autocast:
        for device in ("cpu", "cuda"):
            _library.impl(name, _autocast_kernel(op, device, autocast, autocast_dtype), f"Autocast{device.upper()}")
    return op


def _autocast_kernel(op, device, positions, dtype):
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def cast(x):
        castable = isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype or torch.get_autocast_dtype(device)) if castable else x

    def kernel(*args):
        with torch._C._ExcludeDispatchKeyGuard(key):
            return op(*(cast(x) if i in positions else x for i, x in enumerate(args)))

    return kernel


def real(dtype):
    """The dtype in which sums of `dtype` run: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32
