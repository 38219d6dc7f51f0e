"""dtypes of parameters and activations; router logits that are not finite."""

import math

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


def finite(logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> logits with zeros for every token that has one which is not finite, and bool [T,1], True for such a token.

    What a router makes of it becomes NaN, as in torch: the op would raise, on one rank of a mesh, on CUDA at some later
    call, and where a loss scaler would skip the step.
    """
    # The largest magnitude, NaN if there is one: two passes, where isfinite().all() is five. torch's infinity norm
    # would be one, but exported it raises where no token is real.
    bad_T1 = ~(logits_TE.detach().abs().amax(-1, keepdim=True) < math.inf)
    return logits_TE.masked_fill(bad_T1, 0), bad_T1
