"""What the functions with MegaBlocks' names refuse, as it does: ValueError on a wrong shape. Their ops, which other
code may call and torch.compile calls alone, check again: RuntimeError."""

import torch


def check_shapes(op, top_k=None, **tensors):
    """tensors: name=(tensor or None, its dimensions' names). A name has one size; N is T*top_k, if top_k is given.

    ValueError names the op, the tensor, its shape and the one that was wanted. Traced code is left to the op.
    """
    if torch.compiler.is_compiling():
        return
    sizes = {}
    for name, (x, dims) in tensors.items():
        if x is None:
            continue
        dims = dims.split()
        if x.dim() != len(dims) or any(sizes.setdefault(d, n) != n for d, n in zip(dims, x.shape, strict=True)):
            wanted = ", ".join(f"{d}={sizes[d]}" if d in sizes else d for d in dims)
            raise ValueError(f"moe_ext::{op}: {name} has shape {list(x.shape)}, wanted [{wanted}]")
        if top_k is not None and "T" in sizes:
            sizes["N"] = sizes["T"] * top_k
