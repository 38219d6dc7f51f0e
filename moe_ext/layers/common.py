"""dtypes of parameters and activations."""

import torch

from moe_ext.layers.arguments import Arguments


def dtype(args: Arguments):
    """The dtype of the parameters: fp16 wins over bf16; None is torch's default dtype."""
    if args.fp16:
        return torch.float16
    return torch.bfloat16 if args.bf16 else None


def cast_if_autocast_enabled(x: torch.Tensor) -> torch.Tensor:
    """x in the autocast dtype of its device, if autocast is on there."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
