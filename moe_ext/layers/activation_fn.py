"""Activations: applied as they are, and recognised where a fused kernel exists."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

_FUNCTIONS = {F.gelu: "gelu", F.silu: "silu", F.relu: "relu", torch.relu: "relu"}
_MODULES = {torch.nn.GELU: "gelu", torch.nn.SiLU: "silu", torch.nn.ReLU: "relu"}
_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"}


def kernel_name(function: Callable, gated: bool) -> str | None:
    """The `act` of ops.expert_mlp that computes `function` (times the second projection if gated), or None."""
    options = {}
    if isinstance(function, partial) and not function.args:
        function, options = function.func, function.keywords
    elif type(function) is torch.nn.GELU:
        options = {"approximate": function.approximate}
    name = _MODULES.get(type(function)) or _FUNCTIONS.get(function)
    if name == "gelu" and options == {"approximate": "tanh"}:
        name = "gelu_tanh"
    elif options not in ({}, {"approximate": "none"}):
        return None
    return _GATED.get(name) if gated else name


def act_fn(x: torch.Tensor, function: Callable, return_grad_fn: bool = False, **kwargs):
    """y = function(x), and with return_grad_fn also y.backward, which leaves the gradient in x.grad."""
    with torch.set_grad_enabled(torch.is_grad_enabled() or return_grad_fn):
        if return_grad_fn:
            x.requires_grad_()
        y = function(x, **kwargs)
    return (y, y.backward) if return_grad_fn else y
