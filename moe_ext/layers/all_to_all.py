"""Uneven all-to-all of rows, differentiable.

Rank p's block of input_split_sizes[q] rows goes to rank q; the blocks received are stacked in rank order.
"""

import torch.distributed as dist

from moe_ext.ops.define import Function


def _exchange(x, output_split_sizes, input_split_sizes, group, async_op):
    y = x.new_empty((sum(output_split_sizes), *x.shape[1:]))
    handle = dist.all_to_all_single(y, x.contiguous(), output_split_sizes, input_split_sizes, group, async_op)
    return y, handle


class AllToAllOp(Function):
    @staticmethod
    def forward(ctx, x, output_split_sizes, input_split_sizes, group, async_op):
        ctx.splits = input_split_sizes, output_split_sizes
        ctx.group = group
        return _exchange(x, output_split_sizes, input_split_sizes, group, async_op)

    @staticmethod
    def backward(ctx, dy, _):
        dx, _ = AllToAllOp.apply(dy, *ctx.splits, ctx.group, False)
        return dx, None, None, None, None


def all_to_all(x, output_split_sizes, input_split_sizes, group, async_op=False):
    """x [sum(input_split_sizes), ...] -> (y [sum(output_split_sizes), ...], handle).

    The split sizes are lists of ints, one for each rank of `group` (None: all ranks). The handle is None unless
    async_op; then y may be read after handle.wait().
    """
    return AllToAllOp.apply(x, output_split_sizes, input_split_sizes, group, async_op)
