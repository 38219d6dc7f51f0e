"""Router, capacity, balance and z losses, selection bias."""

import math

import pytest
import torch
from cases import ROUTINGS
from compare import against_reference, evaluate, gradcheck, same
from devices import floats, widest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_ext import ops, reference

SCORES = ["softmax_topk", "topk_softmax", "sigmoid"]
SIZES = [(37, 8, 2), (5, 1, 1), (1, 7, 7), (0, 4, 2), (64, 61, 6), (9, 128, 8), (3, 70, 40), (3, 1030, 5)]  # T, E, k


def logits_of(T, E, dtype, device="cpu"):
    return (2 * torch.randn(T, E, dtype=torch.float64)).to(dtype).to(device)


def check_router(impl, logits_TE, k, **options):
    def call(ops, logits_TE):
        weights, _, scores = ops.router(logits_TE, k, **options)
        return weights, scores

    same(impl.router(logits_TE, k, **options)[1], reference.router(logits_TE, k, **options)[1], "ids")
    against_reference(impl, call, {"logits_TE": logits_TE})


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_router(score, size, dtype, device):
    T, E, k = size
    check_router(ops, logits_of(T, E, dtype, device), k, score=score)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("norm_p", [1.0, 2.0, 3.5, math.inf], ids=str)
def test_norm_and_scale(score, norm_p, dtype, device):
    check_router(ops, logits_of(37, 8, dtype, device), 3, score=score, norm_p=norm_p, scale=2.5)


@pytest.mark.parametrize("score", SCORES)
def test_equal_maxima_share_the_gradient_of_their_norm(score, dtype, device):
    logits_TE = torch.randint(-1, 2, (37, 8)).to(dtype).to(device)
    check_router(ops, logits_TE, 4, score=score, norm_p=math.inf)


@pytest.mark.parametrize("score", ["softmax_topk", "sigmoid"])
def test_selection_bias_chooses_but_does_not_weigh(score, dtype, device):
    logits_TE, bias_E = logits_of(50, 6, dtype, device), torch.randn(6, device=device)
    check_router(ops, logits_TE, 2, score=score, select_bias_E=bias_E)
    weights_TK, ids_TK, scores_TE = ops.router(logits_TE, 2, score=score, select_bias_E=bias_E)
    same(weights_TK, scores_TE.gather(1, ids_TK.long()))


@pytest.mark.parametrize("score", SCORES)
def test_balanced(score, dtype, device):
    check_router(ops, logits_of(37, 8, dtype, device), 3, score=score, norm_p=1.0, balanced=True)
    ids_TK = ops.router(logits_of(8, 4, dtype, device), 3, score=score, balanced=True)[1]
    assert ids_TK.flatten().tolist() == [n % 4 for n in range(24)]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("E", [4, 8, 33, 64, 1100])
def test_lowest_id_wins_a_tie(score, E, dtype, device):
    """Logits of few values: without the reference, the order is by (-logit, id)."""
    logits_TE = torch.randint(-2, 3, (40, E)).to(dtype).to(device)
    ids_TK = ops.router(logits_TE, 4, score=score)[1]
    for row, ids in zip(logits_TE.tolist(), ids_TK.tolist(), strict=True):
        assert ids == sorted(range(E), key=lambda e: (-row[e], e))[:4]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("E", [8, 32, 64, 124, 200, 256, 300, 512])
def test_a_row_of_any_width_at_any_address(E, biased, dtype, device):
    """Kernels move it in vectors where it is whole and aligned, and one by one elsewhere."""
    logits_TE, bias_E = logits_of(19, E, dtype, device), torch.randn(E, device=device) / E if biased else None
    elsewhere_TE = logits_TE.new_empty(19 * E + 1)[1:].view(19, E).copy_(logits_TE)
    want = ops.router(logits_TE, 6, select_bias_E=bias_E)
    same(want[1], reference.router(logits_TE, 6, select_bias_E=bias_E)[1], "ids")
    torch.testing.assert_close(want[2], logits_TE.softmax(1))
    for got, aligned in zip(ops.router(elsewhere_TE, 6, select_bias_E=bias_E), want, strict=True):
        same(got, aligned)


@pytest.mark.parametrize("score", SCORES)
def test_masked_experts_are_never_chosen(score, dtype, device):
    logits_TE = logits_of(37, 8, dtype, device)
    logits_TE[:, 1::2] = -math.inf
    bias_E = None if score == "topk_softmax" else torch.tensor([3.0, 9.0] * 4, device=device)
    weights_TK, ids_TK, scores_TE = ops.router(logits_TE, 4, score=score, select_bias_E=bias_E, norm_p=1.0)
    assert ids_TK.remainder(2).eq(0).all() and scores_TE[:, 1::2].eq(0).all()
    same(ids_TK, reference.router(logits_TE, 4, score=score, select_bias_E=bias_E, norm_p=1.0)[1])
    assert weights_TK.isfinite().all()


@pytest.mark.c_core
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("norm_p", [None, 1.0, 2.0], ids=str)
def test_router_gradcheck(score, norm_p):
    logits = logits_of(4, 5, torch.float64)
    gradcheck(lambda x: ops.router(x, 2, score=score, norm_p=norm_p, scale=1.5)[::2], {"x": logits})


def test_router_gradient_through_one_output_alone(device):
    """The gradient of the other output may be absent."""
    for i in (0, 2):
        inputs = {"logits": logits_of(9, 5, widest(device), device)}
        against_reference(ops, lambda ops, logits, i=i: ops.router(logits, 2, norm_p=1.0)[i], inputs)


# ---- forced ids ------------------------------------------------------------------------------------------------------


def forced_ids(T, E, k, device="cpu"):
    """Another choice than any router's: some are absent, all of the last token's."""
    generator = torch.Generator().manual_seed(T + E)
    ids_TK = torch.rand(T, E, generator=generator).argsort(1)[:, :k].int()
    ids_TK = torch.where(torch.rand(T, k, generator=generator) < 0.2, -1, ids_TK)
    ids_TK[-1:] = -1
    return ids_TK.to(device)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("norm_p", [None, 1.0, 2.0, math.inf], ids=str)
def test_forced_ids(score, norm_p, dtype, device):
    for T, E, k in [(37, 8, 3), (9, 61, 6), (0, 4, 2), (3, 70, 40), (3, 1030, 5)]:
        ids_TK = forced_ids(T, E, k, device)
        options = dict(score=score, norm_p=norm_p, scale=2.5, ids_TK=ids_TK)
        check_router(ops, logits_of(T, E, dtype, device), k, **options)
        weights_TK, got_TK, _ = ops.router(logits_of(T, E, dtype, device), k, **options)
        same(got_TK, ids_TK)
        assert weights_TK[ids_TK < 0].eq(0).all()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("size", [(37, 8, 3), (5, 40, 7), (2, 600, 4)], ids=str)
def test_a_router_s_own_ids_give_its_bits(score, size, dtype, device):
    """Weights, scores and the gradient, with a selection bias and masked experts."""
    T, E, k = size
    logits_TE = logits_of(T, E, dtype, device)
    logits_TE[:, ::3] = -math.inf
    bias_E = None if score == "topk_softmax" else torch.randn(E, device=device)

    def call(logits_TE, ids_TK=None):
        return ops.router(logits_TE, k, score=score, select_bias_E=bias_E, norm_p=1.0, ids_TK=ids_TK)

    ids_TK = call(logits_TE)[1]
    want = evaluate(lambda x: call(x)[::2], {"x": logits_TE})
    got = evaluate(lambda x: call(x, ids_TK)[::2], {"x": logits_TE})
    for name in want:
        same(got[name], want[name], name)


@pytest.mark.parametrize("score", SCORES)
def test_a_masked_expert_that_is_forced_weighs_nothing(score, dtype, device):
    logits_TE = logits_of(4, 6, dtype, device)
    logits_TE[:, :3] = -math.inf
    ids_TK = torch.tensor([[0, 1], [2, 3], [-1, 2], [5, 4]], dtype=torch.int32, device=device)
    check_router(ops, logits_TE, 2, score=score, norm_p=1.0, ids_TK=ids_TK)
    weights_TK = ops.router(logits_TE, 2, score=score, norm_p=1.0, ids_TK=ids_TK)[0]
    assert weights_TK.sum(1).tolist() == pytest.approx([0, 1, 0, 1], abs=0.01)


@pytest.mark.c_core
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("norm_p", [None, 1.0, 2.0], ids=str)
def test_gradient_at_forced_ids(score, norm_p):
    """Finite differences: the choice stays where the logits would have moved it."""
    ids_TK = forced_ids(4, 5, 3)
    gradcheck(lambda x: ops.router(x, 3, score=score, norm_p=norm_p, scale=1.5, ids_TK=ids_TK)[::2],
              {"x": logits_of(4, 5, torch.float64)})


# ---- capacity --------------------------------------------------------------------------------------------------------


def check_capacity_drop(impl, ids_TK, E, capacity, rows_per_scope=None, priority_TK=None):
    """In the last scope an expert has one place less, if it has any."""
    capacity_G = torch.full((len(ids_TK) // rows_per_scope if rows_per_scope else 1,), capacity, dtype=torch.int32)
    capacity_G[-1:] -= min(capacity, 1)
    capacity_G, options = capacity_G.to(ids_TK.device), dict(rows_per_scope=rows_per_scope, priority_TK=priority_TK)
    got = impl.capacity_drop(ids_TK, E, capacity_G, **options)
    same(got, reference.capacity_drop(ids_TK, E, capacity_G, **options))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("rows_per_scope", [None, 1, 4, 24], ids=str)
@pytest.mark.parametrize("capacity", [0, 1, 2, 4, 1000])
def test_capacity_drop(routing, rows_per_scope, capacity, device):
    ids_TK = ROUTINGS[routing](24, 2, 6, torch.Generator().manual_seed(0)).to(device)
    check_capacity_drop(ops, ids_TK, 6, capacity, rows_per_scope)
    for dtype in floats(device):
        check_capacity_drop(ops, ids_TK, 6, capacity, rows_per_scope, torch.rand(24, 2).to(dtype).to(device))
        ties = torch.randint(0, 2, (24, 2)).to(dtype).to(device)
        check_capacity_drop(ops, ids_TK, 6, capacity, rows_per_scope, ties)


def test_capacity_keeps_the_first_or_the_likeliest(device):
    """Without the reference."""
    ids_TK = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 2]], dtype=torch.int32, device=device)
    priority = torch.tensor([[0.1, 0.9], [0.7, 0.9], [0.7, 0.9], [0.8, 0.9]], device=device)
    one, two, other = (torch.tensor(n, dtype=torch.int32, device=device) for n in ([1], [2], [1, 2]))
    assert ops.capacity_drop(ids_TK, 3, one).tolist() == [[0, 1], [-1, 2], [-1, -1], [-1, -1]]
    assert ops.capacity_drop(ids_TK, 3, other, rows_per_scope=2).tolist() == [[0, 1], [-1, 2], [0, 1], [0, 2]]
    kept = ops.capacity_drop(ids_TK, 3, two, priority_TK=priority)
    assert kept.tolist() == [[-1, 1], [0, 2], [-1, 1], [0, 2]], "0.8, then the first 0.7"
    kept = ops.capacity_drop(ids_TK, 3, other, rows_per_scope=2, priority_TK=priority)
    assert kept.tolist() == [[-1, 1], [0, 2], [0, 1], [0, 2]], "0.7 alone, then both"


@pytest.mark.parametrize("rows_per_scope", [None, 350], ids=str)
@pytest.mark.parametrize("E", [5, 40])
def test_capacity_drop_in_long_scopes(rows_per_scope, E, device):
    ids_TK = torch.randint(-1, E, (700, 3), dtype=torch.int32, device=device)
    priorities = torch.randn(700, 3), torch.randint(-2, 3, (700, 3)) * torch.tensor([1.0, -0.5, 1e-40])  # zeros of both
    for capacity in (1, 700 * 3 // E // 2, 700 * 3 // E):
        check_capacity_drop(ops, ids_TK, E, capacity, rows_per_scope)
        for priority_TK in priorities:
            check_capacity_drop(ops, ids_TK, E, capacity, rows_per_scope, priority_TK.to(device))


# ---- losses ----------------------------------------------------------------------------------------------------------


def check_balance(impl, ids_TK, scores_TE, rows_per_scope, form):
    E, K = scores_TE.shape[1], ids_TK.shape[1]
    counts_GE = impl.balance_counts(ids_TK, E, rows_per_scope)
    same(counts_GE, reference.balance_counts(ids_TK, E, rows_per_scope))
    against_reference(impl, lambda ops, s: ops.balance_loss(s, counts_GE, K, form=form), {"s": scores_TE})


def check_z_loss(impl, logits_TE):
    against_reference(impl, lambda ops, logits_TE: ops.z_loss(logits_TE), {"logits_TE": logits_TE})


@pytest.mark.parametrize("form", ["switch", "mse"])
@pytest.mark.parametrize("rows_per_scope", [None, 4, 24], ids=str)
@pytest.mark.parametrize("routing", ["random", "one_takes_all", "some_absent"])
def test_balance_loss(form, rows_per_scope, routing, dtype, device):
    ids_TK = ROUTINGS[routing](24, 2, 6, torch.Generator().manual_seed(0)).to(device)
    check_balance(ops, ids_TK, logits_of(24, 6, dtype, device).softmax(1), rows_per_scope, form)


@pytest.mark.parametrize("form", ["switch", "mse"])
@pytest.mark.parametrize("size", [(10000, 6, 5000), (600, 300, 300)], ids=str)
def test_balance_loss_of_long_scopes(form, size, dtype, device):
    T, E, rows_per_scope = size
    ids_TK = ROUTINGS["random"](T, 2, E, torch.Generator().manual_seed(0)).to(device)
    check_balance(ops, ids_TK, logits_of(T, E, dtype, device).softmax(1), rows_per_scope, form)


def test_balance_loss_of_known_routings(device):
    """1 when all experts share alike, E when one takes all; scopes are averaged."""
    T, E, K = 12, 6, 2
    dtype = widest(device)
    tolerance = 100 * torch.finfo(dtype).eps
    even = torch.full((T, E), 1 / E, device=device, dtype=dtype)
    ids_TK = ROUTINGS["balanced"](T, K, E, None).to(device)
    assert abs(float(ops.balance_loss(even, ops.balance_counts(ids_TK, E), K)) - 1) < tolerance
    assert abs(float(ops.balance_loss(even, ops.balance_counts(ids_TK, E), K, form="mse"))) < tolerance
    sure = torch.zeros(T, E, device=device, dtype=dtype)
    sure[:, 3] = 1
    threes = torch.full((T, K), 3, dtype=torch.int32, device=device)
    assert abs(float(ops.balance_loss(sure, ops.balance_counts(threes, E), K)) - E) < tolerance
    mixed, ids = torch.cat([even, sure]), torch.cat([ids_TK, threes])
    assert abs(float(ops.balance_loss(mixed, ops.balance_counts(ids, E, T), K)) - (1 + E) / 2) < tolerance


def test_counts_beyond_bf16(device):
    """257 copies stay 257, whatever the dtype of the scores."""
    ids_TK = torch.zeros(257, 1, dtype=torch.int32, device=device)
    assert ops.balance_counts(ids_TK, 2).tolist() == [[257, 0]]
    scores = torch.tensor([1.0, 0.0], dtype=torch.bfloat16, device=device).expand(257, 2).contiguous()
    assert float(ops.balance_loss(scores, ops.balance_counts(ids_TK, 2), 1)) == 2.0


@pytest.mark.parametrize("size", [(37, 8), (1, 1), (300, 61)], ids=str)
def test_z_loss(size, dtype, device):
    check_z_loss(ops, logits_of(*size, dtype, device))
    check_z_loss(ops, logits_of(*size, dtype, device) + 60)  # exp overflows where fp16 or fp32 is used carelessly


def test_no_tokens_have_no_loss(dtype, device):
    scores = torch.empty(0, 4, dtype=dtype, device=device, requires_grad=True)
    ids_TK = torch.empty(0, 2, dtype=torch.int32, device=device)
    balance = []
    for rows_per_scope, scopes in ((None, 1), (8, 0)):
        counts_GE = ops.balance_counts(ids_TK, 4, rows_per_scope)
        same(counts_GE, torch.zeros(scopes, 4, dtype=torch.int32, device=device))
        balance += [ops.balance_loss(scores, counts_GE, 2, form=form) for form in ("switch", "mse")]
    for loss in (*balance, ops.z_loss(scores)):
        assert loss.item() == 0
        (dscores,) = torch.autograd.grad(loss, scores)
        assert dscores.shape == (0, 4)


@pytest.mark.c_core
def test_losses_gradcheck():
    scores_TE = logits_of(6, 4, torch.float64).softmax(1)
    counts_GE = torch.tensor([[3, 1, 0, 2], [1, 1, 4, 0]], dtype=torch.int32)
    gradcheck(lambda s: ops.balance_loss(s, counts_GE, 2), {"s": scores_TE})
    gradcheck(lambda s: ops.balance_loss(s, counts_GE, 2, form="mse"), {"s": scores_TE})
    gradcheck(lambda s: ops.z_loss(s), {"s": scores_TE})


def check_select_bias_update(impl, bias_E, counts_E, rate):
    same(impl.select_bias_update(bias_E, counts_E, rate), reference.select_bias_update(bias_E, counts_E, rate))


def test_select_bias_update(device):
    for counts in ([5, 5, 5], [0, 1, 8], [3, 2, 1], [0, 0, 0], [2**40, 2**40 + 1, 2**40 + 2]):
        bias_E = torch.randn(3, device=device)
        before = bias_E.clone()
        check_select_bias_update(ops, bias_E, torch.tensor(counts, device=device), 1e-3)
        same(bias_E, before)  # the op returns a new one


@settings(derandomize=True, max_examples=40, deadline=None)
@given(T=st.integers(1, 12), E=st.integers(1, 9), k=st.integers(1, 4), score=st.sampled_from(SCORES),
       norm_p=st.sampled_from([None, 1.0, 2.0]), capacity=st.integers(0, 5), seed=st.integers(0, 2**31))  # fmt: skip
def test_drawn_routers(device, T, E, k, score, norm_p, capacity, seed):
    k = min(k, E)
    logits_TE = 3 * torch.randn(T, E, generator=torch.Generator().manual_seed(seed)).to(device)
    check_router(ops, logits_TE, k, score=score, norm_p=norm_p)
    weights_TK, ids_TK, scores_TE = ops.router(logits_TE, k, score=score)
    check_capacity_drop(ops, ids_TK, E, capacity, priority_TK=weights_TK)
    for form in ("switch", "mse"):
        check_balance(ops, ids_TK, scores_TE, 1, form)
