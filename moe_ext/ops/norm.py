"""RMSNorm, a residual addition with the norm behind it, RoPE's rotation and the sum of squares, each one pass:
csrc/norm.c, rope.c. float64 on a GPU, for which there are no kernels, is torch's."""

import torch
import torch.nn.functional as F

from moe_ext.ops.define import define, real


def _torchs(x):
    return x.is_cuda and x.dtype == torch.float64


def _rows(x):
    return x.flatten(0, -2) if x.ndim > 1 else x[None]


# ---- RMSNorm ---------------------------------------------------------------------------------------------------------


def _save_rms_norm(ctx, inputs, output):
    x, w, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w, output[1])


def _backward_rms_norm(ctx, dy, _):
    if dy is None:
        return None, None, None
    return *_rms_norm_backward(*ctx.saved_tensors, dy.contiguous()), None


_rms_norm = define(
    "rms_norm(Tensor x, Tensor w, float eps) -> (Tensor, Tensor)",
    fake=lambda x, w, eps: (torch.empty_like(x), x.new_empty(x.shape[0], dtype=real(x.dtype))),
    save=_save_rms_norm,
    backward=_backward_rms_norm,
)
_rms_norm_backward = define(
    "rms_norm_backward(Tensor x, Tensor w, Tensor r, Tensor dy) -> (Tensor, Tensor)",
    fake=lambda x, w, r, dy: (torch.empty_like(x), torch.empty_like(w)),
)


def rms_norm(x, w_n, eps):
    """x / sqrt(mean over the last dimension of x^2 + eps) * w (Zhang and Sennrich, 2019), computed in float32 (float64
    for float64), rounded once.

    x [..,n]; w_n of x's dtype or of the one that it is computed in. -> x's shape and dtype. Differentiable in x and w.
    Of DTensors it is torch's, which knows how they are sharded.
    """
    if _torchs(x) or hasattr(x, "placements") or hasattr(w_n, "placements"):
        return F.rms_norm(x.to(w_n.dtype), (x.shape[-1],), w_n, eps).to(x.dtype)
    return _rms_norm(_rows(x).contiguous(), w_n.contiguous(), eps)[0].view(x.shape)


# ---- addition and norm -----------------------------------------------------------------------------------------------

_HALVES = {torch.bfloat16: 2, torch.float16: 3}  # as in moe.h


def _fake_add_norm(x, y, w, b, eps, centred, half):
    (R, n), dtype = x.shape, next(dtype for dtype, number in _HALVES.items() if number == half)
    return x.new_empty(0 if y is None else R, n), x.new_empty(R, n, dtype=dtype), x.new_empty(R, 2)


def _save_add_norm(ctx, inputs, output):
    (x, y, w, *_, ctx.centred, _), (s, z, stats) = inputs, output
    ctx.half = z.dtype
    ctx.mark_non_differentiable(stats, *([s] if y is None else []))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if y is None else s, w, stats)


def _backward_add_norm(ctx, ds, dz, _):
    s, w, stats = ctx.saved_tensors
    if dz is None:      # nobody read the norm
        return ds, ds if ds is None else ds.to(ctx.half), *(None,) * 5
    want_dy, want_db = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
    ds = ds if ds is None else ds.contiguous()
    dx, dy, dw, db = _add_norm_backward(ds, dz.contiguous(), s, w, stats, ctx.centred, want_dy, want_db)
    return dx, dy if want_dy else None, dw, db if want_db else None, None, None, None


_add_norm = define(
    "add_norm(Tensor x, Tensor? y, Tensor w, Tensor? b, float eps, bool centred, int half) -> (Tensor, Tensor, Tensor)",
    fake=_fake_add_norm,
    save=_save_add_norm,
    backward=_backward_add_norm,
)
_add_norm_backward = define(
    "add_norm_backward(Tensor? ds, Tensor dz, Tensor s, Tensor w, Tensor stats, bool centred, bool want_dy, "
    "bool want_db) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda ds, dz, s, w, stats, centred, want_dy, want_db: (
        torch.empty_like(s),
        dz.new_empty(s.shape[0] if want_dy else 0, s.shape[1]),
        torch.empty_like(w),
        w.new_empty(w.shape[0] if want_db else 0),
    ),
)


def add_norm(x, y, w_n, b_n, eps, *, centred, dtype):
    """-> s = x + y, or None without y, and its norm along the last dimension, computed in float32 and rounded once to
    dtype: (s - mean) / sqrt(variance + eps) * w + b, LayerNorm, if `centred`; else s / sqrt(mean of s^2 + eps) * w + b.

    x [..,n], w_n and b_n (None: zeros) in float32; y (None: zeros) and the norm in dtype, bfloat16 or float16: those of
    an autocast region whose residual stream is float32. Differentiable in all four.
    """
    if dtype not in _HALVES:
        raise ValueError(f"add_norm: dtype is {dtype}, wanted torch.bfloat16 or torch.float16")
    if y is not None and y.shape != x.shape:    # the op knows rows alone
        raise RuntimeError(f"moe_ext::add_norm: y has shape {list(y.shape)}, wanted that of x ({list(x.shape)})")
    rows, y_rows = (t if t is None else _rows(t).contiguous() for t in (x, y))
    w_n, b_n = (t if t is None else t.contiguous() for t in (w_n, b_n))
    s, z, _ = _add_norm(rows, y_rows, w_n, b_n, eps, centred, _HALVES[dtype])
    return None if y is None else s.view(x.shape), z.view(x.shape)


# ---- RoPE ------------------------------------------------------------------------------------------------------------


def _save_rotate(ctx, inputs, output):
    x, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(x if any(ctx.needs_input_grad[1:3]) else None, cos, sin)


def _backward_rotate(ctx, dy):
    x, cos, sin = ctx.saved_tensors
    dx = _rotate(dy.contiguous(), cos, sin, not ctx.inverse)
    if x is None:
        return dx, None, None, None
    P, n = cos.shape
    a, b, da, db = (t[..., i : i + n].to(cos.dtype) for t in (x, dy) for i in (0, n))
    dcos, dsin = (t.unflatten(0, (-1, P)).sum((0, 2)) for t in (a * da + b * db, a * db - b * da))
    return dx, dcos, -dsin if ctx.inverse else dsin, None


_rotate = define(
    "rotate(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor",
    fake=lambda x, cos, sin, inverse: torch.empty_like(x),
    save=_save_rotate,
    backward=_backward_rotate,
)


def rotate(x_BSHd, cos, sin):
    """Turns the pairs (x[i], x[i + n]) of the first 2n columns of every head; the others stay (Su et al., 2021, by
    halves as in Hugging Face's models).

    cos, sin [S,1,n] or [B,S,1,n], of any floating dtype. -> x's shape and dtype. Differentiable in all.
    """
    B, S, *_ = x_BSHd.shape
    for name, table in (("cos", cos), ("sin", sin)):    # the op knows rows alone, and repeats the tables of fewer
        if table.shape != cos.shape or table.shape[:-1] not in ((S, 1), (B, S, 1)):
            wanted = f"[S={S}, 1, n] or [B={B}, S={S}, 1, n], cos and sin alike"
            raise RuntimeError(f"moe_ext::rotate: {name} has shape {list(table.shape)}, wanted {wanted}")
    cos, sin = (t.to(real(x_BSHd.dtype)) for t in (cos, sin))
    if _torchs(x_BSHd):
        n = cos.shape[-1]
        a, b = x_BSHd[..., : 2 * n].chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, x_BSHd[..., 2 * n :]], dim=-1)
    tables = (t.flatten(0, -2).contiguous() for t in (cos, sin))
    return _rotate(x_BSHd.flatten(0, 1).contiguous(), *tables, False).view(x_BSHd.shape)


# ---- the sum of squares ----------------------------------------------------------------------------------------------

_square_sum = define("square_sum(Tensor x) -> Tensor", fake=lambda x: x.new_empty((), dtype=torch.float64))


def square_sum(x):
    """-> float64 scalar, the sum of x^2, squared and added in float64: finite and exact to its rounding for float32 of
    any size. x: any shape and floating dtype. It has no gradient."""
    if _torchs(x):
        return torch.linalg.vector_norm(x, dtype=torch.float64).square()
    return _square_sum(x.reshape(-1).contiguous())
