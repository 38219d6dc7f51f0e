"""The ops: torch.ops.moe_ext.* and the functions over them, by area. `moe_ext.reference` has them all in plain torch.

Forward, shape function, gradient and autocast rule of an op stand together in one file; its kernel is the function of
the same name in csrc/ops.cpp, which calls the C function moe_<name>.
Bad input raises RuntimeError naming op, argument, got and wanted; a wrong shape ValueError in the functions that have
MegaBlocks' names. The functions copy data that is not contiguous; the ops below them, and all indices and bins, want it
contiguous.
"""

from moe_ext.ops.dense import linear
from moe_ext.ops.exchange import (
    ExchangePlan,
    exchange_combine,
    exchange_pack,
    exchange_plan,
    exchange_unpack,
)
from moe_ext.ops.expert import activation, expert_mlp, grouped_gemm, grouped_gemm_wgrad
from moe_ext.ops.head import linear_cross_entropy
from moe_ext.ops.index import (
    RouteIndex,
    exclusive_cumsum,
    histogram,
    inclusive_cumsum,
    repeat,
    replicate,
    round_up,
    route_index,
    sort,
    sum,
    topology,
)
from moe_ext.ops.logits import router_logits
from moe_ext.ops.norm import add_norm, rms_norm, rotate, square_sum
from moe_ext.ops.permute import binned_gather, binned_scatter, gather, padded_gather, padded_scatter, scatter
from moe_ext.ops.random import dropout, jitter, noisy, random_normal, random_uniform
from moe_ext.ops.route import (
    balance_counts,
    balance_loss,
    capacity_drop,
    router,
    select_bias_update,
    z_loss,
)

__all__ = [
    "ExchangePlan",
    "RouteIndex",
    "activation",
    "add_norm",
    "balance_counts",
    "balance_loss",
    "binned_gather",
    "binned_scatter",
    "capacity_drop",
    "dropout",
    "exchange_combine",
    "exchange_pack",
    "exchange_plan",
    "exchange_unpack",
    "exclusive_cumsum",
    "expert_mlp",
    "gather",
    "grouped_gemm",
    "grouped_gemm_wgrad",
    "histogram",
    "inclusive_cumsum",
    "jitter",
    "linear",
    "linear_cross_entropy",
    "noisy",
    "padded_gather",
    "padded_scatter",
    "random_normal",
    "random_uniform",
    "repeat",
    "replicate",
    "rms_norm",
    "rotate",
    "round_up",
    "route_index",
    "router",
    "router_logits",
    "scatter",
    "select_bias_update",
    "sort",
    "square_sum",
    "sum",
    "topology",
    "z_loss",
]
