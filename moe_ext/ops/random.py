"""Random numbers that do not know the mesh: Philox4x32-10 of (seed, step, site, global row, col). csrc/random.c.

An element depends on its own coordinates alone, so a rank draws exactly its part of what one process would draw: rows
row0 .. or, if it holds `run` rows of every `stride`, as with a part of each sequence, row r is the global row
row0 + r // run * stride + r % run. `site` tells apart the places of a model that draw; `step` is the optimizer step.
"""

import torch

from moe_ext.ops.define import define

_key = "SymInt seed, SymInt step, SymInt site, SymInt row0, SymInt run, SymInt stride"


def _fake(x, *_):
    return x.new_empty(x.shape)


# `like` gives shape, dtype and device; its values are not read.
_random_uniform = define(
    f"random_uniform(Tensor like, float low, float high, {_key}) -> Tensor", fake=_fake, constant=True
)
_random_normal = define(
    f"random_normal(Tensor like, float mean, float std, {_key}) -> Tensor", fake=_fake, constant=True
)


def random_uniform(
    rows, cols, *, seed, step, site, row0=0, run=0, stride=0, low=0.0, high=1.0, dtype=torch.float32, device=None
):
    """-> [rows,cols] in [low, high), 24 random bits each."""
    like = torch.empty(rows, cols, dtype=dtype, device=device)
    return _random_uniform(like, low, high, seed, step, site, row0, run, stride)


def random_normal(
    rows, cols, *, seed, step, site, row0=0, run=0, stride=0, mean=0.0, std=1.0, dtype=torch.float32, device=None
):
    """-> [rows,cols] normal, by Box-Muller on pairs of columns."""
    like = torch.empty(rows, cols, dtype=dtype, device=device)
    return _random_normal(like, mean, std, seed, step, site, row0, run, stride)


def _save_dropout(ctx, inputs, output):
    _, *ctx.args = inputs


_dropout = define(
    f"dropout(Tensor x, float p, {_key}) -> Tensor",
    fake=_fake,
    save=_save_dropout,
    backward=lambda ctx, dy: (_dropout(dy.contiguous(), *ctx.args), *[None] * len(ctx.args)),
)


def dropout(x, p, *, seed, step, site, row0=0, run=0, stride=0):
    """x [rows,cols] -> x * keep / (1-p), keep where the uniform number of the element is >= p. Saves nothing: the
    backward draws the same numbers again."""
    return _dropout(x.contiguous(), p, seed, step, site, row0, run, stride)


def jitter(x, eps, *, seed, step, site, row0=0, run=0, stride=0):
    """x * U[1-eps, 1+eps). Differentiable in x."""
    return x * _random_uniform(x.detach(), 1 - eps, 1 + eps, seed, step, site, row0, run, stride)


def noisy(logits_TE, scale_E, *, seed, step, site, row0=0, run=0, stride=0):
    """logits + scale * N(0,1). Differentiable in logits and scale (Noisy top-k gating, Shazeer et al., 2017)."""
    return logits_TE + scale_E * _random_normal(logits_TE.detach(), 0.0, 1.0, seed, step, site, row0, run, stride)
