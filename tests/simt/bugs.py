"""Mistakes to plant in the kernels of cuda/, and the check that must find each: see test_bugs.py.

`old` occurs in the file exactly once. The check, arguments of pytest, runs on the library of `variant` under `schedule`
and with `timing` of asynchronous copies; the race variant also fails on what only the detector sees.
"""

from typing import NamedTuple


class Bug(NamedTuple):
    file: str
    old: str
    new: str
    why: str
    check: str
    variant: str = "plain"
    schedule: str = "inorder"
    timing: str = "early"


BUGS = [
    Bug(
        "cuda/expert.cu",
        "gate_bias.add(e, j, n, gate);",
        "gate_bias.add(0, j, n, gate);",
        "every expert gets the bias of the first",
        "tests/test_expert.py -k 'test_expert_mlp and balanced and float32 and biased'",
    ),
    Bug(
        "cuda/expert.cu",
        "dup[v] = sda * value[v];",
        "dup[v] = c[0][v] * value[v];",
        "the routing weight is lost in the gradient of up",
        "tests/test_expert.py -k 'test_expert_mlp and balanced and float32 and plain'",
    ),
    Bug(
        "cuda/expert.cu",
        "ds = fmaf(c[0][v], a, ds);",
        "ds = fmaf(sda, a, ds);",
        "dweights have the routing weight once too often",
        "tests/test_expert.py -k 'test_expert_mlp and balanced and float32 and plain'",
    ),
    Bug(
        "cuda/expert.cu",
        "w.row_F == a.F;",
        "w.row_F >= a.F;",
        "gate and up taken for one matrix although rows of dh have a gap between them",
        "tests/test_expert.py -k 'test_stored_weights and divides_nothing and w13 and float32'",
    ),
    Bug(
        "cuda/expert.cu",
        ".terms = gated ? 2 : 1,",
        ".terms = 1,",
        "dx without the term of up",
        "tests/test_expert.py -k 'test_expert_mlp and balanced and float32 and plain'",
    ),
    Bug(
        "cuda/expert_sums.cuh",
        "p[u] = k + u < g.K ?",
        "p[u] = k + u <= g.K ?",
        "the first slot of the next row is added",
        "tests/test_expert.py -k 'test_expert_mlp and balanced and float32 and plain'",
    ),
    Bug(
        "cuda/expert_sums.cuh",
        "    __syncthreads();\n",
        "",
        "bias sums read before all parts are written",
        "tests/test_expert.py -k 'test_expert_mlp and balanced and float32 and biased'",
        variant="race",
    ),
    Bug(
        "cuda/expert_sums.cuh",
        "ceil_div(a.R * a.K, THREADS / 32)",
        "a.R * a.K / (THREADS / 32)",
        "the last flat ids get no dweight",
        "tests/test_expert.py -k 'test_expert_mlp and one_token and float32 and plain'",
    ),
    Bug(
        "cuda/expert_sums.cuh",
        "g.dy_RD + f / g.K * g.D",
        "g.dy_RD + p / g.K * g.D",
        "the bias term of ds takes the row of the position, not of the flat id",
        "tests/test_expert.py -k 'test_expert_mlp and balanced and float32 and biased'",
    ),
    Bug(
        "cuda/act.cu",
        "dup[v] = da[v] * value[v];",
        "dup[v] = da[v] * slope[v];",
        "derivative for value",
        "tests/test_gemm.py -k 'test_activation and geglu and float32'",
    ),
    Bug(
        "cuda/index.cu",
        "__syncwarp();                                   // all have read",
        "",
        "the leader of a bucket moves its counter before its peers have read it",
        "tests/test_index.py -k route_index_is_the_contract",
        variant="race",
    ),
    Bug(
        "cuda/index.cu",
        "if (b >= 0 && rank == 0) next_B[b] = at + __popc(peers);",
        "if (b >= 0 && rank == 0) next_B[b] = at + 1;",
        "equal ids within 32 items land on each other",
        "tests/test_index.py -k route_index_is_the_contract",
    ),
    Bug(
        "cuda/index.cu",
        "for (int w = 0; w < warp_id(); w++) sum += sums[w * 32 + lane_id()];",
        "for (int w = 0; w <= warp_id(); w++) sum += sums[w * 32 + lane_id()];",
        "the scan over pieces counts a run of pieces twice",
        "tests/test_index.py -k route_index_is_the_contract",
    ),
    Bug(
        "cuda/index.cu",
        "placed += total;\n        if (b >= c.B) continue;",
        "placed = total;\n        if (b >= c.B) continue;",
        "buckets beyond the first 32 * warps begin too low (E > 256)",
        "tests/test_index.py -k many_flat_ids",
    ),
    Bug(
        "cuda/index.cu",
        "const U sign = static_cast<U>(U{1} << (8 * sizeof(T) - 1));",
        "const U sign = 0;",
        "negative keys sort above positive ones",
        "tests/test_index.py -k test_sort",
    ),
    Bug(
        "cuda/index.cu",
        "carry += total;",
        "carry = total;",
        "a row of a cumsum forgets all but the last pass of the block (more than two passes)",
        "tests/test_index.py -k histogram_and_cumsum",
    ),
    Bug(
        "cuda/index.cu",
        "const int64_t begin = b ? max64(0, bins_b[b - 1]) : 0, end = min64(n, bins_b[b]);",
        "const int64_t begin = b ? max64(0, bins_b[b - 1]) : 0, end = n;",
        "each segment of the backward of replicate runs to the end of the row",
        "tests/test_index.py -k test_replicate",
    ),
    Bug(
        "cuda/index.cu",
        "if (b < c.B && warp_id() == warps - 1) count_B[b] = sum;",
        "if (b < c.B && warp_id() == 0) count_B[b] = sum;",
        "counts are those of the first run of pieces",
        "tests/test_index.py -k many_flat_ids",
    ),
    Bug(
        "cuda/index.cu",
        "    __syncthreads();\n    if (p < c.pieces) walk<true>",
        "    if (p < c.pieces) walk<true>",
        "a warp places before other warps have filled its counters",
        "tests/test_index.py -k many_flat_ids",
        variant="race",
    ),
    Bug(
        "cuda/index.cu",
        "if (count_b[b]) atomicAdd(row_b + b, count_b[b]);",
        "if (count_b[b]) row_b[b] = count_b[b];",
        "a row of more than one chunk keeps the counts of one",
        "tests/test_index.py -k histogram_and_cumsum",
    ),
    Bug(
        "cuda/permute.cu",
        "g.packs + mine.at;\n        if constexpr",
        "g.packs;\n        if constexpr",
        "gather: every piece of a wide row is its first piece",
        "tests/test_permute.py -k 'wider and float32-8300-plain'",
    ),
    Bug(
        "cuda/permute.cu",
        "static_cast<int>(min64(g.rows, rows - row))",
        "g.rows",
        "gather, scatter: the last tile writes past the last row",
        "tests/test_permute.py -k 'test_gather and divides_nothing and float32-plain'",
    ),
    Bug(
        "cuda/permute.cu",
        "    return min64(l.bins_E[e] - first_copy(l, e), region_end(l, e) - region_begin(l, e));",
        "    return l.bins_E[e] - first_copy(l, e);",
        "binned: copies past the capacity are not dropped, into the next expert's rows",
        "tests/test_permute.py -k 'test_scatter and skewed and float32-binned'",
    ),
    Bug(
        "cuda/permute.cu",
        "k + u < K ? row_N[t * K + k + u] : -1",
        "row_N[t * K + k + u]",
        "scatter: slots past K belong to the next token",
        "tests/test_permute.py -k 'test_scatter and divides_nothing and float32-plain'",
    ),
    Bug(
        "cuda/permute.cu",
        "if (present != 1 || w.p) ",
        "if (present != 1) ",
        "scatter: a token with one copy loses its weight",
        "tests/test_permute.py -k 'test_scatter and one_expert and float32-plain'",
    ),
    Bug(
        "cuda/permute.cu",
        "dy_TD + static_cast<int>(f) / K * D",
        "dy_TD + f * D",
        "dweights: dy of another token, and past its end",
        "tests/test_permute.py -k 'test_scatter and balanced and float32-plain'",
    ),
    Bug(
        "cuda/permute.cu",
        "c < n && group * n + c < D",
        "c < n",
        "dweights: the tail of a row that 16 bytes do not divide is the next row",
        "tests/test_permute.py -k 'test_scatter and divides_nothing and float32-plain'",
    ),
    Bug(
        "cuda/permute.cu",
        "    __syncthreads();\n    y += mine.row",
        "    y += mine.row",
        "gather: copies before the rows' origins are there",
        "tests/test_permute.py -k 'test_gather and divides_nothing and float32-plain'",
        variant="race",
    ),
    Bug(
        "cuda/balance.cu",
        "        drops = space->digit >= 0;",
        "        drops = true;",
        "capacity: an expert with fewer copies than places drops some",
        "tests/test_route.py -k 'capacity_drop_in_long and 40-None'",
    ),
    Bug(
        "cuda/balance.cu",
        "for (int w = 0; w < warp_id(); w++) rank += space->ties[w];",
        "",
        "capacity: every warp keeps the first of its own part",
        "tests/test_route.py -k 'capacity_drop_in_long and 5-None'",
    ),
    Bug(
        "cuda/balance.cu",
        "x + 0.0f",
        "x",
        "capacity: -0 loses to 0 instead of being its equal",
        "tests/test_route.py -k 'capacity_drop_in_long and 5-None'",
    ),
    Bug(
        "cuda/balance.cu",
        "last |= static_cast<uint32_t>",
        "last = static_cast<uint32_t>",
        "capacity: the higher digits are forgotten",
        "tests/test_route.py -k 'capacity_drop_in_long and 5-None'",
    ),
    Bug(
        "cuda/balance.cu",
        "piece % s.pieces * s.piece, end",
        "piece % s.pieces * (s.piece - 1), end",
        "balance loss: pieces of a scope overlap",
        "tests/test_route.py -k 'long_scopes and float32 and 10000 and mse'",
    ),
    Bug(
        "cuda/balance.cu",
        "        __syncthreads();\n        if (lane < half)",
        "        if (lane < half)",
        "balance loss: lanes are added before they are written",
        "tests/test_route.py -k 'long_scopes and float32 and 10000 and mse'",
        variant="race",
    ),
    Bug(
        "cuda/balance.cu",
        "const int64_t from = scope + (within",
        "const int64_t from = scope + 0 * (within",
        "balance loss: a block that meets a second scope gives its rows the first one's gradient",
        "tests/test_route.py -k 'test_balance_loss and one_takes_all-4 and float32'",
    ),
    Bug(
        "cuda/balance.cu",
        "    for (int e = threadIdx.x; e < E; e += blockDim.x) counts_E[e] = 0;\n    __syncthreads();",
        "    for (int e = threadIdx.x; e < E; e += blockDim.x) counts_E[e] = 0;",
        "counts: a late zero wipes out counts",
        "tests/test_route.py -k 'test_balance_loss and one_takes_all-4 and float32'",
        variant="race",
    ),
]
