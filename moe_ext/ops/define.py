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
    save, backward  the gradient: save(ctx, inputs, output) and backward(ctx, *grads), as in torch.autograd.Function
                    with a setup_context of its own
    autocast        under torch.autocast the floating arguments at these positions are cast, float64 excepted ...
    autocast_dtype  ... to this dtype; None is the region's own dtype
    kernel          a Python implementation for all devices, for an op that is composed of others
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=_tags)
    op = getattr(torch.ops.moe_ext, name).default
    torch.library.register_fake(f"moe_ext::{name}", _on_one_device(op, fake), lib=_library)
    if backward:
        _library.impl(name, _autograd_kernel(op, save, backward), "Autograd", with_keyset=True)
    if kernel:
        _library.impl(name, _on_one_device(op, kernel), "CompositeExplicitAutograd")
    if autocast:
        for device in ("cpu", "cuda"):
            _library.impl(name, _autocast_kernel(op, device, autocast, autocast_dtype), f"Autocast{device.upper()}")
    return op


def _on_one_device(op, function):
    """What runs without the check of a kernel in csrc/: meta tensors beside real ones end here, and composed ops."""

    def checked(*args):
        tensors = [(a.name, x) for a, x in zip(op._schema.arguments, args, strict=True) if isinstance(x, torch.Tensor)]
        for name, x in tensors:
            if x.device != tensors[0][1].device:
                raise RuntimeError(
                    f"{op._schema.name}: {name} is on device {x.device}, the first argument on {tensors[0][1].device}. "
                    f"Hint: {name}.to({tensors[0][0]}.device)"
                )
        return function(*args)

    return checked


def _autograd_kernel(op, save, backward):
    """What torch.library.register_autograd makes, without its handling of default values: that takes 0.2 ms a call."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            *args, keyset = args
            with torch._C._AutoDispatchBelowAutograd():
                output = op.redispatch(keyset, *args)
                save(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return *backward(ctx, *grads), None

    Function.__name__ = Function.__qualname__ = op._opname

    def kernel(keyset, *args):
        keyset = keyset & torch._C._after_autograd_keyset
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return Function.apply(*args, keyset)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset, *args)

    return kernel


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


# Waits for like's device and raises what its kernels found wrong in memory; moe_ext.synchronize() is its public face.
define("check(Tensor like) -> ()", fake=lambda like: None)
