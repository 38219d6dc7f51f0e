"""Expert parallelism: the token exchange as a differentiable object, for the `exchange` of an MoE layer.

    exchange = ExpertExchange(num_experts, TorchTransport(group))
    layer = FusedMoE(.., exchange=exchange)         # with w13, w2 of this rank's num_experts / ranks experts

Expert e lives on rank e // (E/P). A token goes once to each rank that owns one of its experts (moe_ext.ops.exchange).
There is one host read per forward, of the counts; backward needs none, for it goes the same ways back:

    dispatch  x, weights, ids -> forth -> x_RD, weights_RK, ids_RK      backward: dx, dweights -> back
    combine   y_RD -> back -> y_TD[t] = sum of t's rows, in rank order  backward: dy -> forth

Of dx and dweights those travel whose inputs require a gradient; the experts' ranks do not compute the others either.
Exchanges are collective: every rank runs forward and backward in the same order, also one that has or gets no tokens,
and the same inputs require gradients on all ranks.
"""

from typing import NamedTuple

import torch

from moe_ext import ops
from moe_ext.ops.define import Function
from moe_ext.parallel.collectives import as_autocast, gather, once_differentiable, reduce_scatter


class Trip(NamedTuple):
    """What one dispatch, its combine and both backwards share."""

    transport: object
    num_experts: int
    ids_TK: torch.Tensor
    plan: ops.ExchangePlan
    rows_PP: torch.Tensor  # int64 on the CPU: rows from p to q

    @property
    def sent(self):
        return int(self.rows_PP[self.transport.rank].sum())


class _Dispatch(Function):
    @staticmethod
    def forward(ctx, x_TD, weights_TK, trip):
        ctx.trip = trip
        x_RD, ids_RK, weights_RK = trip.transport.forth(trip, x_TD, weights_TK)
        unwanted = [t for t, need in zip((x_RD, weights_RK, ids_RK), ctx.needs_input_grad, strict=True) if not need]
        ctx.mark_non_differentiable(*unwanted)
        return x_RD, weights_RK, ids_RK

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_RD, dweights_RK, _):
        need_dx, need_dweights, _ = ctx.needs_input_grad
        dx_RD, dweights_RK = dx_RD if need_dx else dx_RD[:, :0], dweights_RK if need_dweights else None
        dx_TD, dweights_TK = ctx.trip.transport.back(ctx.trip, dx_RD, dweights_RK)
        return dx_TD if need_dx else None, dweights_TK if need_dweights else None, None


class _Combine(Function):
    @staticmethod
    def forward(ctx, y_RD, trip):
        ctx.trip = trip
        return trip.transport.back(trip, y_RD)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TD):
        return ctx.trip.transport.forth(ctx.trip, dy_TD)[0], None


class ExpertExchange:
    """Moves tokens to the ranks that own their experts and back, over a transport (moe_ext.parallel.transport).

    num_experts: of all ranks, a multiple of them. Under torch.autocast rows travel in the region's dtype.
    """

    def __init__(self, num_experts, transport):
        if num_experts % transport.ranks:
            raise ValueError(
                f"ExpertExchange: num_experts is {num_experts}, wanted a multiple of the {transport.ranks} ranks"
            )
        self.num_experts, self.transport = num_experts, transport

    def dispatch(self, x_TD, weights_TK, ids_TK):
        """-> x_RD, weights_RK, ids_RK (int32, local, -1 where the expert lives elsewhere), number of ids_RK >= 0, and
        the trip that combine wants. weights_TK: float32 or x's dtype. Differentiable in x_TD and weights_TK."""
        x_TD = as_autocast(x_TD)
        ids_TK = ids_TK.int().contiguous()
        plan = ops.exchange_plan(ids_TK, self.num_experts, self.transport.ranks)
        counts_PP2 = self.transport.counts(plan.counts_P2).long()
        trip = Trip(self.transport, self.num_experts, ids_TK, plan, counts_PP2[..., 0])
        num_copies = int(counts_PP2[:, self.transport.rank, 1].sum())
        return *_Dispatch.apply(x_TD, weights_TK, trip), num_copies, trip

    def combine(self, y_RD, trip):
        """y_RD [R,D], one row for each row that dispatch received -> y_TD, the sum of each token's rows."""
        return _Combine.apply(y_RD, trip)


class SplitExperts:
    """The exchange of experts that are split over the ranks of `group` (expert TP), each with a part of F.

    All tokens of the group go to each of its ranks, and of their partial results the sum comes back. `exchange`:
    between the owners of the same part of different experts, None if there is one.
    """

    def __init__(self, group, exchange=None):
        self.group, self.exchange = group, exchange

    def dispatch(self, x_TD, weights_TK, ids_TK):
        x_TD, weights_TK, ids_TK = (gather(t, 0, self.group) for t in (as_autocast(x_TD), weights_TK, ids_TK))
        if self.exchange is None:
            return x_TD, weights_TK, ids_TK, int((ids_TK >= 0).sum()), None
        return self.exchange.dispatch(x_TD, weights_TK, ids_TK)

    def combine(self, y_RD, trip):
        y_TD = y_RD if self.exchange is None else self.exchange.combine(y_RD, trip)
        return reduce_scatter(y_TD, 0, self.group)
