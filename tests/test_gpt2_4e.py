"""recipes/moe_gpt2_4e.toml: the published run of four experts on two ranks, its counts replayed and its defects absent.

That run recorded, for 11 layers of one micro-step, how many of each rank's 32768 tokens went to each rank: a token once
to each rank that owns one of its two experts. Here ids with these counts go through the plan.
"""
import pytest
import torch

from moe_ext import ops
from moe_ext.config import load
from moe_ext.model import GPT
from moe_ext.plan import Share, describe

RECIPE = "recipes/moe_gpt2_4e.toml"
T, K, E, P = 32768, 2, 4, 2
SENT = [  # per layer: rank 0 sends [to 0, to 1], rank 1 sends [to 0, to 1], [rank 0, rank 1] receive
    ([29266, 25198], [29100, 25091], [58366, 50289]),
    ([27179, 27859], [27330, 28740], [54509, 56599]),
    ([30462, 23544], [31629, 22618], [62091, 46162]),
    ([29527, 23892], [29446, 25951], [58973, 49843]),
    ([32382, 9430], [32726, 9979], [65108, 19409]),
    ([31198, 23615], [30316, 19468], [61514, 43083]),
    ([31594, 25004], [30144, 20871], [61738, 45875]),
    ([26907, 31144], [25682, 30675], [52589, 61819]),
    ([25788, 29459], [19255, 30511], [45043, 59970]),
    ([25796, 30835], [17571, 30981], [43367, 61816]),
    ([23032, 30702], [20871, 31813], [43903, 62515]),
]


def ids_that_send(first, second, generator):
    """[T,2] distinct experts of which `first` tokens have one on rank 0 (experts 0, 1), `second` on rank 1 (2, 3)."""
    both = first + second - T
    on_0, on_1 = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[2, 3], [3, 2]])
    pick = torch.randint(2, (T, 2), generator=generator)
    split = torch.stack([pick[:, 0], 2 + pick[:, 1]], 1)
    split = torch.where(torch.rand(T, 1, generator=generator) < 0.5, split, split.flip(1))
    ids_TK = torch.cat([split[:both], on_0[pick[:first - both, 0]], on_1[pick[:second - both, 0]]])
    return ids_TK[torch.randperm(T, generator=generator)].int()


@pytest.mark.c_core
@pytest.mark.parametrize("layer", range(len(SENT)))
def test_recorded_counts(layer):
    *sent, received = SENT[layer]
    generator = torch.Generator().manual_seed(layer)
    for rank in range(P):
        ids_TK = ids_that_send(*sent[rank], generator)
        plan = ops.exchange_plan(ids_TK, E, P)
        assert plan.counts_P2[:, 0].tolist() == sent[rank]
        assert plan.counts_P2[:, 1].tolist() == [int((ids_TK // 2 == p).sum()) for p in range(P)]
        rows = sum(sent[rank])
        pairs = plan.send_M[:rows].long()
        assert torch.equal(pairs % P, torch.arange(P).repeat_interleave(torch.tensor(sent[rank])))
        wanted = [(t, p) for p in range(P) for t in (ids_TK // 2 == p).any(1).nonzero().flatten().tolist()]
        assert pairs.tolist() == [t * P + p for t, p in wanted] and plan.send_M[rows:].eq(-1).all()
    assert torch.tensor(sent).sum(0).tolist() == received


def test_the_recipe_is_that_run():
    config = load(RECIPE)
    model = GPT(config.model, device="meta")
    assert model.num_parameters() == (407_127_600, 237_092_400)
    assert Share.of(config, model).whole == 237_092_400
    said = describe(config, model)
    for line in ("Rank 0: Managing experts 0 to 1", "Rank 1: Managing experts 2 to 3",
                 "407,127,600 in all, 237,092,400 active per token, 237,092,400 local",
                 "effective batch size desired: 131072", "accumulation steps desired: 2", "world size: 2",
                 "Optimizer initialized", "Scheduler initialized"):
        assert line in said, line
