"""GELU in its tanh form, 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), and its backward."""

import torch
import torch.nn.functional as F


def gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def gelu_backward_(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Overwrites grad with grad * gelu'(x)."""
    return grad.copy_(torch.ops.aten.gelu_backward(grad, x, approximate="tanh"))
