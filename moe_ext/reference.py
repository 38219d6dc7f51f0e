"""Every op again in plain torch: same name, same arguments. This file is the specification, and in fp64 the oracle.

Shapes, written as suffixes: T tokens, K choices per token, N = T*K copies, R rows given to the experts, P expert rows,
E experts, D model width, F expert width, U = 2F if the activation is gated else F, V vocabulary, G scopes.

Index contract (that of MegaBlocks). The flat id of a copy is f = token*K + slot. `order_N` holds the flat ids sorted by
expert, stable; `bins_E` holds int32 inclusive ends, so that expert e owns order[bins[e-1] : bins[e]]. An expert id of
-1 means "not here": such a copy has no row, and order ends in as many -1.

Everything is written for the reader: loops over experts, no fused passes, gradients left to autograd. Arithmetic stays
in the dtype of its input unless a line says `_real`, which is float64 for float64 and float32 for the rest.
Bad input is the business of `ops`; here it may do anything.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F


def _real(x):
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


# ---- index -----------------------------------------------------------------------------------------------------------


class RouteIndex(NamedTuple):
    """Where each copy goes. All int32."""

    counts_E: torch.Tensor  # copies per expert
    bins_E: torch.Tensor  # their inclusive sum
    order_N: torch.Tensor  # flat ids sorted by expert, stable, then -1
    inverse_TK: torch.Tensor  # sorted position of each flat id, -1 where the id is -1


def route_index(ids_TK, num_experts):
    ids_N = ids_TK.flatten().to(torch.int32)
    counts_E = histogram(ids_N, num_experts)
    bins_E = inclusive_cumsum(counts_E, 0)
    absent = ids_N < 0
    order_N = torch.where(absent, num_experts, ids_N).argsort(stable=True)
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(len(ids_N), device=ids_TK.device)
    inverse_N[absent] = -1
    order_N[len(ids_N) - int(absent.sum()) :] = -1
    return RouteIndex(counts_E, bins_E, order_N.int(), inverse_N.int().view_as(ids_TK))


def sort(x_n, end_bit=None):
    """Stable ascending sort by the low `end_bit` bits as unsigned (by value if that is all of them)."""
    bits = torch.iinfo(x_n.dtype).bits
    key_n = x_n if end_bit is None or end_bit >= bits else x_n & ((1 << end_bit) - 1)
    order_n = key_n.argsort(stable=True)
    return x_n[order_n], order_n.to(x_n.dtype)


def histogram(x, max_val):
    """x [n] or [B,n] -> int32 [max_val] or [B,max_val]. Values outside [0, max_val) are ignored."""
    return (x.unsqueeze(-1) == torch.arange(max_val, device=x.device)).sum(-2, dtype=torch.int32)


def inclusive_cumsum(x, dim):
    return x.cumsum(dim, dtype=x.dtype)


def exclusive_cumsum(x, dim):
    return x.cumsum(dim, dtype=x.dtype) - x


def topology(padded_bins, block, rows, cols):
    """Columns of the block-sparse [rows, E*cols] matrix: block row r of expert e holds e*cols .. e*cols + cols-1."""
    expert_r = torch.searchsorted(padded_bins // block, torch.arange(rows, device=padded_bins.device), right=True)
    return (expert_r[:, None] * cols + torch.arange(cols, device=padded_bins.device)).flatten().to(torch.int16)


def replicate(x, bins, n):
    """x [B,nb] -> y [B,n]: x[:,i] over columns bins[i-1] .. bins[i]; zeros from bins[-1] on."""
    owner_n = torch.searchsorted(bins, torch.arange(n, device=x.device, dtype=bins.dtype), right=True)
    return F.pad(x, (0, 1))[:, owner_n]


def round_up(x, value):
    return torch.div(x + value - 1, value, rounding_mode="trunc") * value


def repeat(x, tiling):
    return x if all(n == 1 for n in tiling) else x.repeat(tiling)


def sum(x, dim=0):
    return x.squeeze(dim) if x.shape[dim] == 1 else x.sum(dim=dim)


# ---- movement --------------------------------------------------------------------------------------------------------


def _rows(indices_N, bins_E, starts_E, capacity=None):
    """The expert row of each flat id, -1 where it has none: an absent copy, or one beyond its expert's capacity."""
    position = torch.arange(int(bins_E[-1]), device=bins_E.device)
    expert = torch.searchsorted(bins_E, position, right=True)
    place = position - _begins(bins_E)[expert]  # among the copies of its expert
    row = starts_E[expert] + place
    if capacity is not None:
        row[place >= capacity] = -1
    rows_N = torch.full(indices_N.shape, -1, device=bins_E.device)
    rows_N[indices_N[: len(position)].long()] = row
    return rows_N


def _begins(bins_E):
    return F.pad(bins_E[:-1], (1, 0)).long()


def _copy(x_TD, rows_N, top_k, num_rows):
    """y_PD[row of f] = x_TD[f // K]; rows that nobody has are zeros."""
    flat = (rows_N >= 0).nonzero().squeeze(1)
    return x_TD.new_zeros(num_rows, x_TD.shape[1]).index_copy(0, rows_N[flat], x_TD[flat // top_k])


def _combine(x_PD, rows_N, weights_N, top_k):
    """y_TD[t] = sum over slots of w[f] * x_PD[row of f]; a copy without a row counts as zeros."""
    copies_ND = _real(F.pad(x_PD, (0, 0, 0, 1))[rows_N])  # index -1 is the zero row
    if weights_N is not None:
        copies_ND = _real(weights_N)[:, None] * copies_ND
    return copies_ND.view(-1, top_k, x_PD.shape[1]).sum(1).to(x_PD.dtype)


def gather(x, indices, bin_ids, bins, top_k):
    """x [T,D] -> [N,D], rows sorted by expert; rows from bins[-1] on are zeros. `bin_ids` is never read."""
    return _copy(x, _rows(indices, bins, _begins(bins)), top_k, len(indices))


def scatter(x, indices, bin_ids, weights, bins, top_k):
    """x [N,D] -> [T,D], the weighted sum of each token's copies. weights [N], or None for ones."""
    return _combine(x, _rows(indices, bins, _begins(bins)), weights, top_k)


def padded_gather(x, indices, bin_ids, bins, padded_bins, top_k):
    """-> [padded_bins[-1],D]; expert e starts at padded_bins[e-1], pad rows are zeros."""
    return _copy(x, _rows(indices, bins, _begins(padded_bins)), top_k, int(padded_bins[-1]))


def padded_scatter(x, indices, bin_ids, weights, bins, padded_bins, top_k):
    return _combine(x, _rows(indices, bins, _begins(padded_bins)), weights, top_k)


def _bin_rows(indices, bins, bin_size):
    return _rows(indices, bins, torch.arange(len(bins), device=bins.device) * bin_size, bin_size)


def binned_gather(x, indices, bins, bin_size, top_k):
    """-> [E,bin_size,D]; copies beyond bin_size are dropped in flat order, free rows are zeros."""
    y_PD = _copy(x, _bin_rows(indices, bins, bin_size), top_k, len(bins) * bin_size)
    return y_PD.view(len(bins), bin_size, x.shape[1])


def binned_scatter(x, indices, weights, bins, top_k):
    """x [E,C,D] -> [T,D]; a dropped copy counts as zeros."""
    return _combine(x.flatten(0, 1), _bin_rows(indices, bins, x.shape[1]), weights, top_k)


# ---- exchange --------------------------------------------------------------------------------------------------------


class ExchangePlan(NamedTuple):
    """Where each token goes. All int32."""

    counts_P2: torch.Tensor  # rows, and copies (ids), for each rank
    send_M: torch.Tensor  # token*P + rank of each row sent, sorted by rank, then token; then -1. M = T * min(P,K)
    place_TP: torch.Tensor  # its inverse: the sent row of a token for a rank, -1 if there is none


def _owner(ids_TK, num_experts, ranks):
    """The rank of each expert; `ranks` where the id is -1."""
    return torch.where(ids_TK < 0, ranks, ids_TK // (num_experts // ranks)).long()


def exchange_plan(ids_TK, num_experts, ranks):
    (T, K), P = ids_TK.shape, ranks
    copies_TP = F.one_hot(_owner(ids_TK, num_experts, P), P + 1).sum(1)[:, :P]
    rank_S, token_S = copies_TP.T.nonzero(as_tuple=True)
    send_S = token_S * P + rank_S
    place_TP = torch.full((T, P), -1, dtype=torch.int32, device=ids_TK.device)
    place_TP.view(-1)[send_S] = torch.arange(len(send_S), dtype=torch.int32, device=ids_TK.device)
    counts_P2 = torch.stack([(copies_TP > 0).sum(0), copies_TP.sum(0)], 1).int()
    return ExchangePlan(counts_P2, F.pad(send_S, (0, T * min(P, K) - len(send_S)), value=-1).int(), place_TP)


def _bytes(x):
    return x.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _message_parts(dtype, D, K, ids, weights_dtype):
    """Bytes of the values, ids and weights of a row (no weights: None), and of each with the zeros behind it."""
    sizes = [D * dtype.itemsize, 4 * K * ids, K * weights_dtype.itemsize if weights_dtype else 0]
    return sizes, [(n + 15) // 16 * 16 for n in sizes] if ids or weights_dtype else sizes


def exchange_pack(x_TD, ids_TK, weights_TK, send_M, num_experts, ranks, rows):
    token_S = torch.arange(rows, device=x_TD.device) if send_M is None else send_M[:rows].long() // ranks
    parts = [x_TD[token_S]]
    if ids_TK is not None:
        ids_SK, rank_S = ids_TK[token_S], send_M[:rows, None].long() % ranks
        here_SK = _owner(ids_SK, num_experts, ranks) == rank_S
        parts.append(torch.where(here_SK, ids_SK % (num_experts // ranks) + 1, 0).int())
    if weights_TK is not None:
        parts.append(weights_TK[token_S])
    parts = [_bytes(part) for part in parts]
    if len(parts) > 1:
        parts = [F.pad(part, (0, -part.shape[1] % 16)) for part in parts]
    return torch.cat(parts, 1).view(x_TD.dtype)


def exchange_unpack(message_RW, D, K, weights_dtype):
    sizes, padded = _message_parts(message_RW.dtype, D, K, True, weights_dtype)
    parts = _bytes(message_RW).split(padded, 1)
    x, ids, weights = (_bytes(part[:, :n]) for part, n in zip(parts, sizes, strict=True))
    return x.view(message_RW.dtype), ids.view(torch.int32) - 1, weights.view(weights_dtype)


def exchange_combine(message_SW, place_TP, ids_TK=None, num_experts=0, D=None, weights_dtype=torch.float32):
    D = message_SW.shape[1] if D is None else D
    x_SD = F.pad(_real(message_SW[:, :D]), (0, 0, 0, 1))  # a row of zeros for place -1
    y_TD = x_SD.new_zeros(len(place_TP), D)
    for p in range(place_TP.shape[1]):
        y_TD = y_TD + x_SD[place_TP[:, p].long()]
    if ids_TK is None:
        return y_TD.to(message_SW.dtype)
    K = ids_TK.shape[1]
    sizes, padded = _message_parts(message_SW.dtype, D, K, False, weights_dtype)
    weights_S = _bytes(_bytes(message_SW)[:, padded[0] : padded[0] + sizes[2]])
    weights_SK = F.pad(weights_S.view(weights_dtype), (0, 0, 0, 1))
    place_TP1 = F.pad(place_TP, (0, 1), value=-1).long()
    row_TK = place_TP1.gather(1, _owner(ids_TK, num_experts, place_TP.shape[1]))
    return y_TD.to(message_SW.dtype), weights_SK[row_TK, torch.arange(K, device=row_TK.device)]


# ---- experts ---------------------------------------------------------------------------------------------------------


def _segments(bins_E):
    """(begin, end) of each expert's rows."""
    ends = bins_E.tolist()
    return list(zip([0, *ends], ends, strict=False))


def grouped_gemm(x_RI, w_EIO, bins_E):
    """y[rows of e] = x[rows of e] @ w[e]; rows from bins[-1] on are zeros."""
    parts = [x_RI[begin:end] @ w_IO for (begin, end), w_IO in zip(_segments(bins_E), w_EIO, strict=True)]
    tail = x_RI.new_zeros(x_RI.shape[0] - int(bins_E[-1]), w_EIO.shape[2])
    return torch.cat([*parts, tail])


def grouped_gemm_wgrad(x_RI, dy_RO, bins_E):
    """dw[e] = x[rows of e]^T @ dy[rows of e]; zeros for an empty expert."""
    return torch.stack([x_RI[begin:end].T @ dy_RO[begin:end] for begin, end in _segments(bins_E)])


_act = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
_gated = {
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up: F.gelu(gate) * up,
    "geglu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "swiglu_oai": lambda gate, up: _clamped_swiglu(_below(7, gate), -_below(7, -_below(7, up))),
}


def _below(most, x):
    """min(x, most), with a slope of 1 at most: that of torch.clamp up to torch 2.13; from 2.14 on it is 0 there."""
    return torch.where(x > most, most, x)


def _clamped_swiglu(gate, up):
    """gpt-oss."""
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def activation(h_NU, act):
    """act(h), or act(gate) * up of h = [gate | up]."""
    return _act[act](h_NU) if act in _act else _gated[act](*h_NU.chunk(2, dim=-1))


def _linear(x_NI, w_EOI, bias_EO, index):
    """The experts' linear layers on sorted rows: x_n w_e^T + b_e."""
    y_NO = grouped_gemm(x_NI, w_EOI.transpose(1, 2), index.bins_E)
    return y_NO if bias_EO is None else y_NO + bias_EO.repeat_interleave(index.counts_E, dim=0)


def expert_mlp(x_RD, gate, up, down_EDF, weights_RK, index, *, act,
               gate_bias=None, up_bias=None, down_bias=None, num_copies=None):  # fmt: skip
    """y_r = sum_k s_rk (act([x_r Wg_e^T + bg_e | x_r Wu_e^T + bu_e]) Wd_e^T + bd_e) with e = ids[r,k].

    gate_EFD and up_EFD, or gate = w13_E2FD = [gate | up], of three or four dimensions, and up = None; without a gate
    only gate_EFD.
    num_copies is the number of ids >= 0, which an op that must not look into `index` has to be told.
    """
    K = weights_RK.shape[1]
    gate = gate.flatten(1, -2)
    x_ND = gather(x_RD, index.order_N, None, index.bins_E, K)[: int(index.bins_E[-1])]
    h_NU = _linear(x_ND, gate, gate_bias, index)
    if up is not None:
        h_NU = torch.cat([h_NU, _linear(x_ND, up, up_bias, index)], dim=1)
    y_ND = _linear(activation(h_NU, act), down_EDF, down_bias, index)
    return scatter(y_ND, index.order_N, None, weights_RK.flatten(), index.bins_E, K)


# ---- router ----------------------------------------------------------------------------------------------------------


def router(logits_TE, k, *, score="softmax_topk", select_bias_E=None, ids_TK=None, norm_p=None, scale=1.0,
           balanced=False):
    """-> weights_TK, ids_TK int32, scores_TE. The K largest in descending order; the lowest id wins a tie.

    softmax_topk  scores = softmax(logits), chosen by scores + select_bias, weights = scores[ids]
    sigmoid       the same with sigmoid
    topk_softmax  chosen by logits, weights = softmax(logits[ids])
    The weights are then divided by their p-norm (norm_p; weights that are all zero stay so) and multiplied by scale.
    balanced replaces the choice by ids[t,k] = (t*K + k) mod E, ids_TK by itself, where -1 is absent: its weight is 0. A
    logit of -inf masks its expert, whatever its bias; if ids_TK has it, its weight is 0.
    """
    T, E = logits_TE.shape
    logits = _real(logits_TE)
    scores = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    choice = logits if score == "topk_softmax" else scores if select_bias_E is None else scores + select_bias_E
    choice = choice.masked_fill(logits == -math.inf, -math.inf)
    if balanced:
        ids_TK = torch.arange(T * k, device=logits.device).view(T, k) % E
    elif ids_TK is None:
        ids_TK = choice.argsort(dim=-1, descending=True, stable=True)[:, :k]
    at_TK = ids_TK.clamp(min=0).long()
    none_TK = (ids_TK < 0) | (logits.gather(1, at_TK) == -math.inf)
    if score == "topk_softmax":
        some_T1 = ~none_TK.all(-1, keepdim=True)        # a softmax of nothing would be NaN
        weights = logits.gather(1, at_TK).masked_fill(none_TK & some_T1, -math.inf)
        weights = torch.where(some_T1, weights, 0).softmax(-1)
    else:
        weights = scores.gather(1, at_TK)
    weights = weights.masked_fill(none_TK, 0)
    if norm_p is not None:
        norm = torch.linalg.vector_norm(weights, ord=norm_p, dim=-1, keepdim=True)
        weights = weights / torch.where(norm > 0, norm, 1)
    return (weights * scale).to(logits_TE.dtype), ids_TK.int(), scores.to(logits_TE.dtype)


def capacity_drop(ids_TK, num_experts, capacity_G, *, rows_per_scope=None, priority_TK=None):
    """In each scope g of rows an expert keeps capacity_G[g] copies, the first by flat id or those of largest priority
    (the lowest flat id wins a tie). The ids of the others become -1."""
    ids_GN = ids_TK.reshape(_scopes(ids_TK, rows_per_scope), -1)
    if priority_TK is None:
        order_GN = torch.arange(ids_GN.shape[1], device=ids_TK.device).expand_as(ids_GN)
    else:
        order_GN = priority_TK.reshape(ids_GN.shape).argsort(dim=1, descending=True, stable=True)
    sorted_GN = ids_GN.gather(1, order_GN)
    is_GNE = sorted_GN[..., None] == torch.arange(num_experts, device=ids_TK.device)
    rank_GN = (is_GNE.cumsum(1) * is_GNE).sum(-1)  # 1 for the first copy of its expert
    kept_GN = torch.where(rank_GN <= capacity_G[:, None], sorted_GN, -1)
    return torch.empty_like(ids_GN).scatter(1, order_GN, kept_GN).view_as(ids_TK).int()


def _scopes(x, rows_per_scope):
    return 1 if rows_per_scope is None else x.shape[0] // rows_per_scope


def balance_counts(ids_TK, num_experts, rows_per_scope=None):
    """-> int32 [G,E]: copies per expert in each scope."""
    return histogram(ids_TK.reshape(_scopes(ids_TK, rows_per_scope), -1), num_experts)


def balance_loss(scores_TE, counts_GE, top_k, *, form="switch"):
    """The mean over scopes, of S = T/G rows each, of
    switch  E / (S*K) * sum_e counts[g,e] * mean_t scores[t,e]   (Switch Transformer; MegaBlocks; 1.0 when balanced)
    mse     mean_e (mean_t scores[t,e] - 1/E)^2
    Zero without tokens."""
    T, E = scores_TE.shape
    G = len(counts_GE)
    if T == 0:
        return _real(scores_TE).sum()
    mean_GE = _real(scores_TE).view(G, T // G, E).mean(1)
    if form == "mse":
        return (mean_GE - 1 / E).square().mean()
    return E * G / (T * top_k) * (counts_GE.to(mean_GE.dtype) * mean_GE).sum(1).mean()


def z_loss(logits_TE):
    """mean_t logsumexp(logits[t])^2 (ST-MoE). Zero without tokens."""
    return _real(logits_TE).logsumexp(-1).square().sum() / max(1, logits_TE.shape[0])


def select_bias_update(bias_E, counts_E, rate):
    """Towards balance, once per optimizer step: bias + rate * sign(mean(counts) - counts) (DeepSeek-V3)."""
    counts = counts_E.double()
    return bias_E + rate * (counts.mean() - counts).sign().to(bias_E.dtype)


# ---- what surrounds the experts --------------------------------------------------------------------------------------


def linear(x, w_OI, bias_O=None):
    """x W^T + b."""
    return F.linear(x, w_OI, bias_O)


def router_logits(x_TD, w_ED, bias_E=None):
    """x w^T + b in w's dtype."""
    return F.linear(x_TD.to(w_ED.dtype), w_ED, bias_E)


def rms_norm(x, w_n, eps):
    """x / sqrt(mean of x^2 + eps) * w along the last dimension (Zhang and Sennrich, 2019)."""
    r = (_real(x).square().mean(-1, keepdim=True) + eps).rsqrt()
    return (_real(x) * r * _real(w_n)).to(x.dtype)


def add_norm(x, y, w_n, b_n, eps, *, centred, dtype):
    """-> x + y, or None without y, and its norm in dtype (float64 stays so): LayerNorm if centred, else RMSNorm + b."""
    s = x if y is None else x + y
    u = s - s.mean(-1, keepdim=True) if centred else s
    z = u * (u.square().mean(-1, keepdim=True) + eps).rsqrt() * w_n
    z = z if b_n is None else z + b_n
    return None if y is None else s, z if z.dtype == torch.float64 else z.to(dtype)


def rotate(x_BSHd, cos, sin):
    """The pairs (x[i], x[i + n]) of the first 2n columns turned by the angles of cos, sin [..,n] (Su et al., 2021)."""
    n, x = cos.shape[-1], _real(x_BSHd)
    a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    cos, sin = cos.to(x), sin.to(x)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x_BSHd.dtype)


def square_sum(x):
    """-> float64 scalar: the sum of x^2."""
    return x.double().square().sum()


# ---- head ------------------------------------------------------------------------------------------------------------


def linear_cross_entropy(x_TD, w_VD, targets_T, *, ignore_index=-100, chunk=None):
    """-> the sum over tokens of logsumexp(x w^T) - (x w^T)[target]; `chunk` bounds the op's memory, not its value."""
    return F.cross_entropy(_real(x_TD @ w_VD.T), targets_T, ignore_index=ignore_index, reduction="sum")


# ---- random numbers that do not know the mesh ------------------------------------------------------------------------

_low = 0xFFFFFFFF


def _philox(rows, cols, device, *, seed, step, site, row0=0, run=0, stride=0):
    """Philox4x32-10 (Salmon et al., 2011) -> int64 words in [0, 2^32), [rows, cols rounded up to 4], a function of
    (seed, step, site, row, col) alone: word col % 4 of counter {low row, high row, col / 4, step} under
    key {low seed, high seed ^ site}. Rows count from row0, `stride` from one run of `run` rows to the next (0: one)."""
    r = torch.arange(rows, device=device)
    row = row0 + (r // run * stride + r % run if run else r)
    row, block = torch.meshgrid(row, torch.arange((cols + 3) // 4, device=device), indexing="ij")
    c0, c1, c2, c3 = row & _low, row >> 32 & _low, block & _low, torch.full_like(row, step & _low)
    k0, k1 = seed & _low, (seed >> 32 ^ site) & _low
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps modulo 2^64, as it should
        c0, c1, c2, c3 = (b >> 32 & _low) ^ c1 ^ k0, b & _low, (a >> 32 & _low) ^ c3 ^ k1, a & _low
        k0, k1 = k0 + 0x9E3779B9 & _low, k1 + 0xBB67AE85 & _low
    return torch.stack([c0, c1, c2, c3], dim=-1).flatten(1)


def _unit(words):
    """The upper 24 bits as a number in [0, 1): exact in float32."""
    return (words >> 8).double() * 2.0**-24


def random_uniform(rows, cols, *, low=0.0, high=1.0, dtype=torch.float32, device=None, **key):
    """-> [rows,cols] in [low, high), computed in float32 whatever the dtype; two-byte dtypes may round up to high."""
    low, width, high = torch.tensor([low, high - low, high], device=device).unbind()
    u = _unit(_philox(rows, cols, device, **key)[:, :cols]).float()
    return torch.minimum(width * u + low, high.nextafter(torch.full_like(high, -math.inf))).to(dtype)


def random_normal(rows, cols, *, mean=0.0, std=1.0, dtype=torch.float32, device=None, **key):
    """-> [rows,cols] by Box-Muller: columns 2i and 2i+1 are the two numbers made of the words 2i and 2i+1."""
    words = _philox(rows, cols, device, **key)
    u, v = 1 - _unit(words[:, 0::2]), _unit(words[:, 1::2])  # u in (0, 1]
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    z = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)[:, :cols]
    return (mean + std * z).to(dtype)


def dropout(x, p, **key):
    """x / (1-p) where the element's uniform number is >= p, else 0. x [rows,cols]."""
    u = random_uniform(*x.shape, device=x.device, **key)
    return (x * (u >= p).double() / (1 - p)).to(x.dtype)


def jitter(x, eps, **key):
    """x * U[1-eps, 1+eps)."""
    return x * random_uniform(*x.shape, low=1 - eps, high=1 + eps, dtype=x.dtype, device=x.device, **key)


def noisy(logits_TE, scale_E, **key):
    """logits + scale * N(0,1)."""
    z = random_normal(*logits_TE.shape, dtype=logits_TE.dtype, device=logits_TE.device, **key)
    return logits_TE + scale_E * z
