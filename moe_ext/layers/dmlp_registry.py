"""The experts' MLP of a dropless layer, by mlp_type and mlp_impl."""

from moe_ext.layers import glu, mlp
from moe_ext.layers.arguments import Arguments

_REGISTRY = {
    "mlp": {"grouped": mlp.GroupedMLP, "sparse": mlp.SparseMLP},
    "glu": {"grouped": glu.GroupedGLU, "sparse": glu.SparseGLU},
}


def get(args: Arguments):
    """A new MLP. ValueError on an unknown mlp_type or mlp_impl."""
    if args.mlp_type not in _REGISTRY:
        raise ValueError(f"Unsupported mlp type: {args.mlp_type!r}; use one of {list(_REGISTRY)}")
    classes = _REGISTRY[args.mlp_type]
    if args.mlp_impl not in classes:
        raise ValueError(f"{args.mlp_type} does not support mlp_impl={args.mlp_impl!r}; use one of {list(classes)}")
    return classes[args.mlp_impl](args)
