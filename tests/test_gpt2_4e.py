"""recipes/moe_gpt2_4e.toml: the published run of four experts on two ranks, its counts replayed and its defects absent.

That run recorded, for 11 layers of one micro-step, how many of each rank's 32768 tokens went to each rank: a token once
to each rank that owns one of its two experts. Here ids with these counts go through the plan.
"""
import functools
import json
import re
from dataclasses import replace

import pytest
import torch
from ranks import run_ranks

import moe_ext.train
from moe_ext import FusedMoE, checkpoint, ops
from moe_ext.config import DataConfig, LogConfig, MeshConfig, load
from moe_ext.data import IndexedWriter
from moe_ext.layers.fused import Draws
from moe_ext.model import GPT
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.shard import parallelize
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
    assert Share.of(config).whole == 237_092_400
    said = describe(config, model)
    for line in ("Rank 0: Managing experts 0 to 1", "Rank 1: Managing experts 2 to 3",
                 "407,127,600 in all, 237,092,400 active per token, 237,092,400 local",
                 "effective batch size desired: 131072", "accumulation steps desired: 2", "world size: 2",
                 "Optimizer initialized", "Scheduler initialized"):
        assert line in said, line


# ---- in small, on two ranks: what was wrong in the published program -------------------------------------------------

def small(folder, ranks):
    """The recipe in little, for one rank or two; either way 2 x 4 sequences per step."""
    config = load(RECIPE)
    model = replace(config.model, vocab_size=64, seq_len=16, layers=2, dim=32, heads=4,
                    moe=replace(config.model.moe, hidden=16))
    return replace(config, model=model, mesh=MeshConfig(fsdp=ranks, ep=ranks),
                   train=replace(config.train, steps=3, micro_batch=4 // ranks, dtype="fp64", save_every=0),
                   optim=replace(config.optim, warmup=1, lr=1e-2, eps=1e-5),
                   data=DataConfig(train=str(folder / "text"), valid="", tokenizer=""),
                   log=LogConfig(folder=str(folder), name=f"on{ranks}", every=1, tensorboard=False,
                                 trace_exchange=ranks > 1))


def test_small_run_on_two_ranks(tmp_path, capfd):
    """Experts that stay four different ones, every step's line equal to one process; the trace says who sent what."""
    with IndexedWriter(tmp_path / "text", 64) as writer:
        writer.add(torch.randint(64, (4000,), generator=torch.Generator().manual_seed(1)).tolist())
    one, two = small(tmp_path, 1), small(tmp_path, 2)
    moe_ext.train.fit(one, Mesh(one.mesh), "")
    run_ranks(2, lambda rank: moe_ext.train.fit(two, Mesh(two.mesh), "")[1], tmp_path)

    runs = [[json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]
            for config in (one, two)]
    assert [record["step"] for record in runs[1]] == [1, 2, 3]
    for alone, shared in zip(*runs, strict=True):
        for name in ("loss", "aux", "grad_norm", "lr"):
            assert shared[name] == pytest.approx(alone[name], rel=1e-12), name
        assert shared["counts_LE"] == alone["counts_LE"] and shared["tokens_per_s"] > 0

    models = [GPT(one.model, dtype=torch.float64) for _ in range(2)]
    for model, config in zip(models, (one, two), strict=True):
        checkpoint.load(config.run_folder / "ckpt" / "step-000003", model=model)
    for (name, want), got in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11, msg=name)
    for moe in models[1].moe_layers():
        w2_EDF = moe.experts.w2_EDF
        assert all((w2_EDF[a] - w2_EDF[b]).abs().max() > 1e-3 for a in range(E) for b in range(a))

    said = capfd.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("[DEBUG] Rank 1: layers.0.mlp:")][:8]
    for line, words in zip(lines, ("gate assignments complete", "sending .* tokens to rank 0",
                                   "sending .* tokens to rank 1", "recv_counts: .* N_recv", "received .* tokens",
                                   "expected to process", "processed tokens back to rank 0",
                                   "processed tokens back to rank 1"), strict=True):
        assert re.search(words, line), line
    sent = [int(n) for n in re.findall(r"sending (\d+) tokens to rank", said)]
    micro_steps = 3 * 2 * 2 * 2 * 2         # steps, accumulation, layers, ranks, receivers
    assert len(sent) == micro_steps
    assert 1.2 < 2 * sum(sent) / micro_steps / 32 < 1.99, "rows per token: many have experts on both ranks, once each"


def test_layer_on_two_ranks(tmp_path, monkeypatch):
    """One call of the experts per layer, on the copies that are there and no others; a sum of both ranks' results;
    three exchanges forward and two back; gradients of the main loss for experts, router and input."""
    generator = torch.Generator().manual_seed(3)
    x_BSD = torch.randn(2, 9, 12, dtype=torch.float64, generator=generator)

    def layer():
        torch.manual_seed(5)
        return FusedMoE(12, 8, E, K, score="topk_softmax", norm_p=0, noise=True, bias=True, dtype=torch.float64)

    def run(layer, x_BSD):
        x_BSD = x_BSD.clone().requires_grad_()
        y_BSD, _ = layer(x_BSD, Draws(1, 1))
        y_BSD.sin().sum().backward()
        return y_BSD.detach(), x_BSD.grad

    def count(exchanges, name, method, *args):
        exchanges.append(name)
        return method(*args)

    def body(rank):
        calls, exchanges, experts = [], [], ops.expert_mlp
        monkeypatch.setattr(ops, "expert_mlp", lambda *args, **options: calls.append(
            (options["num_copies"], int(args[5].bins_E[-1]))) or experts(*args, **options))
        mine, mesh = layer(), Mesh(MeshConfig(fsdp=2, ep=2))
        parallelize(mine, mesh)
        for name in ("counts", "rows"):
            counted = functools.partial(count, exchanges, name, getattr(mesh.transport, name))
            setattr(mesh.transport, name, counted)
        y, dx = run(mine, x_BSD[rank:rank + 1])
        moved = all(p.grad.to_local().abs().max() > 0 for name, p in mine.named_parameters() if name != "noise_E")
        return y, dx, calls, exchanges, moved

    got = run_ranks(2, body, tmp_path)
    whole = layer()
    y_BSD, dx_BSD = zip(*(run(whole, x_BSD[rank:rank + 1]) for rank in range(2)), strict=True)
    for rank, (y, dx, calls, exchanges, moved) in enumerate(got):
        torch.testing.assert_close(y, y_BSD[rank], rtol=0, atol=1e-13)
        torch.testing.assert_close(dx, dx_BSD[rank], rtol=0, atol=1e-13)
        assert len(calls) == 1 and calls[0][0] == calls[0][1]
        assert exchanges == ["counts", "rows", "rows", "rows", "rows"] and moved
    assert sum(calls[0][0] for _, _, calls, *_ in got) == 2 * 9 * K
