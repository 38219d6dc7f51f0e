"""Initial values of a part of a parameter: the bits that one process draws there, so that no rank needs the whole."""
import itertools

import torch

from moe_ext import ops

PIECE = 1 << 24     # numbers drawn at a time, which are as many elements of memory beside the box; at least one row


def box_normal(shape, start, size, *, seed, site, std, dtype=torch.float32, device=None):
    """-> the box [start, start + size) of a parameter [.., n] drawn as GPT.init_weights does: by row and column of its
    [rows, n] view, N(0, std). Draws the rows of the box alone, from column 0 to the box's last.

    shape, start, size: >= 2 numbers each; an empty box may lie anywhere. Errors: ValueError if the box leaves the
    parameter.
    """
    inside = len(shape) == len(start) == len(size) >= 2 and min(size) >= 0
    if inside and 0 not in size:
        inside = all(0 <= a and a + n <= whole for whole, a, n in zip(shape, start, size, strict=True))
    if not inside:
        raise ValueError(f"box_normal: got the box of size {tuple(size)} at {tuple(start)}, wanted one inside shape "
                         f"{tuple(shape)}, of 2 dimensions or more")
    options = dict(dtype=dtype, device=device)
    box, end = torch.empty(tuple(size), **options), start[-1] + size[-1]
    if box.numel() == 0:
        return box
    runs = itertools.product(*(range(a, a + n) for a, n in zip(start[:-2], size[:-2], strict=True)))
    for index, rows in zip(runs, box.view(-1, *size[-2:]), strict=True):    # rows that are neighbours in the parameter
        row0 = 0
        for i, n in zip((*index, start[-2]), shape[:-1], strict=True):
            row0 = row0 * n + i
        for piece in rows.split(max(1, PIECE // end)):
            drawn = ops.random_normal(len(piece), end, seed=seed, step=0, site=site, row0=row0, std=std, **options)
            piece.copy_(drawn[:, start[-1]:])
            row0 += len(piece)
    return box
