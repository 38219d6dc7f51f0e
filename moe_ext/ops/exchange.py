"""The token exchange between ranks, but for the wire: which token goes where, and its messages. csrc/exchange.c.

E experts over P ranks: expert e is local expert e mod E/P of rank e // (E/P). A token goes ONCE to each rank that owns
at least one of its experts, with its K local ids (-1 elsewhere) and weights in the same row; the rank returns one row,
already weighted; the source adds them in rank order. One plan serves all four messages:

    dispatch            pack(x, ids, weights, send)  -> wire -> unpack
    combine             the rows as they are         -> wire -> combine
    backward of combine     pack(dy, send)           -> wire -> the rows as they are
    backward of dispatch    pack(dx, dweights)       -> wire -> combine, with ids: dx and dweights

A message [rows, W] has the dtype of its values, D of them per row; ids and weights follow as raw bytes, each part at a
multiple of 16. The ops are not differentiable one by one: moe_ext.parallel.experts is, around the wire.
"""

from typing import NamedTuple

import torch

from moe_ext.ops.define import define


class ExchangePlan(NamedTuple):
    """Where each token goes. All int32."""

    counts_P2: torch.Tensor  # rows, and copies (ids), for each rank
    send_M: torch.Tensor  # token*P + rank of each row sent, sorted by rank, then token; then -1. M = T * min(P,K)
    place_TP: torch.Tensor  # its inverse: the sent row of a token for a rank, -1 if there is none


def _fake_plan(ids, num_experts, ranks):
    (T, K), P = ids.shape, ranks
    return ids.new_empty(P, 2), ids.new_empty(T * min(P, K)), ids.new_empty(T, P)


_plan = define(
    "exchange_plan(Tensor ids, int num_experts, int ranks) -> (Tensor, Tensor, Tensor)", fake=_fake_plan, constant=True
)


def exchange_plan(ids_TK, num_experts, ranks):
    """ids_TK int32 in [-1, num_experts), -1 for "nowhere" -> ExchangePlan. `ranks` divides num_experts."""
    return ExchangePlan(*_plan(ids_TK.contiguous(), num_experts, ranks))


def message_width(dtype, D, K, ids, weights):
    """Elements of dtype in a row of a message; ids: whether it has any; weights: their dtype or None."""
    if not ids and weights is None:
        return D

    def aligned(n):
        return (n + 15) // 16 * 16

    parts = aligned(D * dtype.itemsize) + (aligned(4 * K) if ids else 0)
    return (parts + (aligned(K * weights.itemsize) if weights is not None else 0)) // dtype.itemsize


def _fake_pack(x, ids, weights, send, num_experts, ranks, rows):
    K = next((t.shape[1] for t in (ids, weights) if t is not None), 0)
    width = message_width(x.dtype, x.shape[1], K, ids is not None, None if weights is None else weights.dtype)
    return x.new_empty(rows, width)


_pack = define(
    "exchange_pack(Tensor x, Tensor? ids, Tensor? weights, Tensor? send, int num_experts, int ranks, SymInt rows) "
    "-> Tensor",
    fake=_fake_pack,
)


def exchange_pack(x_TD, ids_TK, weights_TK, send_M, num_experts, ranks, rows):
    """-> message [rows, W]: for each of the first `rows` entries of send_M, the token's values, local ids and weights.

    ids_TK, weights_TK (float32 or x's dtype) or both may be None. send_M None: row r is x[r], rows = len(x), no ids.
    """
    contiguous = [t if t is None else t.contiguous() for t in (x_TD, ids_TK, weights_TK, send_M)]
    return _pack(*contiguous, num_experts, ranks, rows)


def _fake_unpack(message, D, K, weights_dtype):
    R = message.shape[0]
    ids = message.new_empty(R, K, dtype=torch.int32)
    return message.new_empty(R, D), ids, message.new_empty(R, K, dtype=weights_dtype)


_unpack = define(
    "exchange_unpack(Tensor message, SymInt D, SymInt K, ScalarType weights_dtype) -> (Tensor, Tensor, Tensor)",
    fake=_fake_unpack,
)


def exchange_unpack(message_RW, D, K, weights_dtype):
    """A message of values, ids and weights -> x_RD, ids_RK (int32, local), weights_RK."""
    return _unpack(message_RW.contiguous(), D, K, weights_dtype)


def _fake_combine(message, place, ids, num_experts, D, weights_dtype):
    weights = message.new_empty(0 if ids is None else ids.shape, dtype=weights_dtype)
    return message.new_empty(place.shape[0], D), weights


_combine = define(
    "exchange_combine(Tensor message, Tensor place, Tensor? ids, int num_experts, SymInt D, ScalarType weights_dtype) "
    "-> (Tensor, Tensor)",
    fake=_fake_combine,
)


def exchange_combine(message_SW, place_TP, ids_TK=None, num_experts=0, D=None, weights_dtype=torch.float32):
    """y_TD[t] = the sum over ranks p, in their order, of row place[t,p], in float32 (float64), rounded once.

    Rows that carry weights [K] of weights_dtype behind D values need ids_TK, the ids of the plan: then -> (y_TD,
    weights_TK), where weights[t,k] comes from the rank that owns ids[t,k] and is 0 where that is -1.
    """
    D = message_SW.shape[1] if D is None else D
    y_TD, weights_TK = _combine(message_SW.contiguous(), place_TP, ids_TK, num_experts or place_TP.shape[1], D,
                                weights_dtype)  # fmt: skip
    return y_TD if ids_TK is None else (y_TD, weights_TK)
