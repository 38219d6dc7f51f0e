"""The shared expert, by mlp_type."""

from moe_ext.layers import glu, mlp
from moe_ext.layers.arguments import Arguments

_REGISTRY = {"mlp": mlp.SharedMLP, "glu": glu.SharedGLU}


def get(args: Arguments):
    """A new shared expert. ValueError on an unknown mlp_type."""
    if args.mlp_type not in _REGISTRY:
        raise ValueError(f"Unsupported mlp type: {args.mlp_type!r}; use one of {list(_REGISTRY)}")
    return _REGISTRY[args.mlp_type](args)
