"""How an op is declared: schema, shape function, gradient and autocast rule in one place.

The kernel of an op is the function of the same name in csrc/ops.cpp, unless `kernel` gives one in Python. Ops are pure
(but for a trailing underscore), return no views, and take a size that depends on data as a SymInt.
"""

import functools

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

_library = torch.library.Library("moe_ext", "DEF")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def define(schema, *, fake, save=None, backward=None, constant=False, autocast=(), autocast_dtype=None, kernel=None):
    """Declares moe_ext::<schema> and returns it, for the functions of moe_ext.ops to call.

    fake            the shape function: takes the op's arguments, returns empty tensors like its results
    save, backward  the gradient: save(ctx, inputs, output) and backward(ctx, *grads), as in torch.autograd.Function
                    with a setup_context of its own. An op without them raises when a gradient reaches it: so does
                    the second derivative of an op whose backward is made of such ops. Forward mode always raises
    constant        the results are constants to a derivative: integers, random numbers
    autocast        under torch.autocast the floating arguments at these positions are cast, float64 excepted ...
    autocast_dtype  ... to this dtype; None is the region's own dtype
    kernel          a Python implementation for all devices, for an op that is composed of others
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=_tags)
    op = getattr(torch.ops.moe_ext, name).default
    torch.library.register_fake(f"moe_ext::{name}", _on_one_device(op, fake), lib=_library)
    if constant:
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    else:
        kernels = (save, backward) if backward else (_save_nothing, _refuse(op))
        _library.impl(name, _autograd_kernel(op, *kernels), "Autograd", with_keyset=True)
    if kernel:
        _library.impl(name, _on_one_device(op, kernel), "CompositeExplicitAutograd")
    if autocast:
        for device in ("cpu", "cuda"):
            _library.impl(name, _autocast_kernel(op, device, autocast, autocast_dtype), f"Autocast{device.upper()}")
    return op if backward or constant else _past_autograd(op)


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


class Function(torch.autograd.Function):
    """A torch.autograd.Function that says so where forward mode meets it."""

    @classmethod
    def jvp(cls, *_):
        raise NotImplementedError(_no_forward_mode(f"{cls.__module__}.{cls.__name__}", "torch.autograd.grad"))


class _Once(Function):
    """Gradients, made of what came in, that may not be differentiated again."""

    @staticmethod
    def forward(ctx, name, results, *sources):
        ctx.name = name
        return results

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            f"{ctx.name} has no gradient, so that there is no second derivative. "
            "Hint: one process has it, with moe_ext.reference for the ops"
        )


def once_differentiable(backward):
    """For the backward of a linear autograd.Function. torch's own of this name hangs its error on copies of the
    results: torch.autograd.grad finds no way from there to its inputs, and with allow_unused that counts as zeros."""

    @functools.wraps(backward)
    def once(ctx, *grads):
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        return _Once.apply(f"{backward.__module__}.{backward.__qualname__}", results, *grads)

    return once


def _autograd_kernel(op, save, backward):
    """What torch.library.register_autograd makes, without its handling of default values: that takes 0.2 ms a call.

    The op runs before its node is made, not in the node's forward: grad mode is off there, also for the levels of
    torch.func further out.
    """

    def node_forward(ctx, *args):
        *args, (output,) = args
        save(ctx, args, output)
        return output

    def node_backward(ctx, *grads):
        return *backward(ctx, *grads), None

    parts = {"forward": staticmethod(node_forward), "backward": staticmethod(node_backward)}
    apply = type(op._opname, (_SingleLevelFunction,), parts).apply  # autograd.Function is closed to torch.func

    def kernel(keyset, *args):
        if forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled():
            _refuse_tangents(op, args)
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if recorded and op._schema.is_mutable:
            raise NotImplementedError(_no_gradient(op._schema.name))
        with torch._C._AutoDispatchBelowAutograd():
            output = op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        if not recorded:
            return output
        if not torch._C._are_functorch_transforms_active():
            return apply(*args, (output,))
        with enable_single_level_autograd_function():
            return apply(*args, (output,))

    return kernel


def _save_nothing(ctx, inputs, output):
    pass


def _refuse(op):
    """The backward of an op that has none."""

    def backward(ctx, *grads):
        raise NotImplementedError(_no_gradient(op._schema.name))

    return backward


def _refuse_tangents(op, args):
    for argument, x in zip(op._schema.arguments, args, strict=True):
        if isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            name = f"{op._schema.name}: {argument.name} has a tangent, but the op"
            instead = "torch.autograd.grad or torch.func.vjp, or moe_ext.reference, which has the ops in plain torch"
            raise NotImplementedError(_no_forward_mode(name, instead))


def _past_autograd(op):
    """op, but where nobody asks for a derivative it spares the way through its autograd kernel: 5 us and more."""

    def call(*args):
        if (
            torch.is_grad_enabled()
            or forward_ad._current_level >= 0
            or torch._C._are_functorch_transforms_active()
            or torch.compiler.is_compiling()
        ):
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def _no_gradient(name):
    first, backward, _ = name.partition("_backward")
    if backward:
        return (
            f"{first} has no second derivative ({name} has no gradient). "
            "Hint: moe_ext.reference has it in plain torch, with every derivative"
        )
    return (
        f"{name} has no gradient. Hint: call it under torch.no_grad(), or in a torch.autograd.Function that knows the "
        "gradient, as moe_ext.parallel does"
    )


def _no_forward_mode(name, instead):
    return f"{name} has no forward mode (jvp). Hint: {instead}"


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
define("check(Tensor like) -> ()", fake=lambda like: None, constant=True)
