"""The plan of a recipe on a mesh beside what its ranks do: bytes handed to collectives, bytes held, rows exchanged."""

import collections
import functools
import math
import sys
import tempfile
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

import moe_ext.train
from moe_ext import ops
from moe_ext.config import Config, MeshConfig, ModelConfig, MoEConfig, TrainConfig, load, meshes, sequences
from moe_ext.model import GPT, precision
from moe_ext.optim import build_optimizer
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.shard import backward, build
from moe_ext.plan import describe, memory, rows_per_token, traffic

# Taking turns, top-1 and one expert per rank send as many rows as uniform routing is expected to. 51 does not divide.
MOE = MoEConfig(experts=4, top_k=1, hidden=16, balanced=True, noise=True, shared_hidden=8)
MODEL = ModelConfig(vocab_size=51, seq_len=8, layers=3, dim=16, heads=4, hidden=24, bias=True, qk_norm=True, dropout=.1)
PLAIN, DENSE = replace(MOE, shared_hidden=0), MoEConfig()


def case(moe=MOE, *, mesh, dtype="fp32", accumulation=1, recompute=False, recompute_attention=False, **model):
    return Config(model=replace(MODEL, moe=moe, **model), mesh=MeshConfig(**mesh),
                  train=TrainConfig(micro_batch=2, dtype=dtype, accumulation=accumulation, recompute=recompute,
                                    recompute_attention=recompute_attention))


CASES = {
    "fsdp": case(replace(MOE, shared_gate=True), mesh=dict(fsdp=2), recompute=True),
    "fsdp, bf16": case(PLAIN, mesh=dict(fsdp=2), dtype="bf16", accumulation=2),
    "rep": case(replace(MOE, scope="micro_batch"), mesh=dict(rep=2)),
    "tp": case(PLAIN, mesh=dict(tp=2), recompute=True),
    "tp, dense": case(DENSE, mesh=dict(tp=2), recompute=True, position="learned", tied=True, norm="layernorm"),
    "tp, wide norm, sinks, window": case(DENSE, mesh=dict(tp=2), qk_norm_over="width", sinks=True, window=3,
                                         attention_bias="qkv", rope_fraction=0.5),
    "tp, wide norm, recompute": case(replace(PLAIN, router_bias=True), mesh=dict(tp=2), qk_norm_over="width",
                                     recompute=True, dtype="bf16"),
    "fsdp, dense": case(DENSE, mesh=dict(fsdp=2), recompute=True, dtype="bf16", tied=True),
    "ep": case(mesh=dict(fsdp=2, ep=2), recompute=True, dtype="bf16"),
    "tp, ep": case(PLAIN, mesh=dict(tp=2, ep=2), recompute=True, dtype="fp64"),
    "tp, etp": case(replace(MOE, shared_gate=True), mesh=dict(tp=2, etp=2), recompute=True, dtype="bf16"),
    "tp, etp, no shared expert": case(PLAIN, mesh=dict(tp=2, etp=2), recompute=True),
    "fsdp, tp, ep, etp": case(replace(MOE, capacity_factor=2.0), mesh=dict(fsdp=2, tp=2, ep=2, etp=2), dtype="bf16"),
    "rep, tp, ep": case(replace(MOE, scope="micro_batch", capacity_factor=2.0, drop_by="probability"),
                        mesh=dict(rep=2, tp=2, ep=2), recompute=True),
    "rep, fsdp, ep": case(replace(MOE, dense_layers=1), mesh=dict(rep=2, fsdp=2, ep=2), accumulation=2),
    "fsdp, efsdp, ep": case(mesh=dict(fsdp=4, ep=2)),
    "ep of one expert, top-3": case(replace(MOE, top_k=3), mesh=dict(fsdp=4, ep=4), dtype="fp64"),
    "tp of four": case(mesh=dict(tp=4), dtype="bf16", seq_len=16),
    "sp": case(mesh=dict(sp=2), recompute=True, dtype="bf16", kv_heads=1),
    "sp, attention again": case(DENSE, mesh=dict(sp=2), recompute_attention=True, window=3, sinks=True, accumulation=2),
    "sp, gather": case(DENSE, mesh=dict(sp=2, attention="gather"), kv_heads=2, tied=True, dtype="fp64"),
    "sp of four, ep": case(replace(MOE, capacity_factor=2.0), mesh=dict(sp=4, ep=2), kv_heads=2, seq_len=16),
    "fsdp, sp, micro-batch": case(replace(MOE, scope="micro_batch", capacity_factor=2.0), mesh=dict(fsdp=2, sp=2, ep=4),
                                  dtype="bf16"),
    "rep, sp, gather": case(mesh=dict(rep=2, sp=2, attention="gather"), recompute=True),
    "sp, tp, wide norm": case(mesh=dict(sp=2, tp=2, ep=2, etp=2), qk_norm_over="width", kv_heads=2, seq_len=16),
    "sp, tp, gather": case(PLAIN, mesh=dict(sp=2, tp=2, attention="gather"), recompute=True, kv_heads=2, dtype="bf16",
                           seq_len=16),
    "a real router": case(replace(MOE, experts=8, top_k=2, balanced=False), mesh=dict(fsdp=4, ep=4), seq_len=256),
}  # fmt: skip


class Meter(TorchDispatchMode):
    """Adds up what this rank sends, by the ranks of the group."""

    def __init__(self):
        super().__init__()
        self.sent = collections.Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "c10d":
            name = op._schema.name.removeprefix("c10d::")
            group = next(a for a in args if isinstance(a, torch.ScriptObject))
            ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
            self.sent[tuple(ranks)] += sent_by(name, ranks, *args)
        return op(*args, **(kwargs or {}))


def sent_by(name, ranks, first, second, *rest):
    """Bytes that one rank of a ring sends; the arguments are c10d's: (output, input, ..), of allreduce (tensors)."""
    n = len(ranks)
    if name == "_allgather_base_":
        return (n - 1) * second.nbytes
    if name == "allgather_":
        return (n - 1) * sum(t.nbytes for t in second)
    if name == "_reduce_scatter_base_":
        return (n - 1) * first.nbytes
    if name == "allreduce_":
        return 2 * (n - 1) * sum(t.nbytes for t in first) // n
    assert name == "alltoall_base_", f"a collective that the plan does not know: {name}"
    rows = rest[2] or [len(second) // n] * n
    return second.nbytes - rows[ranks.index(dist.get_rank())] * math.prod(second.shape[1:]) * second.element_size()


def step(config, mesh, model):
    """A training step but for the optimizer, as in moe_ext.train."""
    t, c, generator = config.train, config.model, torch.Generator().manual_seed(1)
    text = torch.randint(c.vocab_size, (config.sequences_per_step, c.seq_len + 1), generator=generator)
    for micro in range(t.accumulation):
        begin, end = mesh.rows(micro, t.micro_batch)
        draws = mesh.draws(t.seed, 1, begin, c.seq_len)
        with precision(config, mesh.device):
            out = model(text[begin:end, :-1], text[begin:end, 1:].contiguous(), draws)
        backward(model, out, mesh, tokens=config.tokens_per_step, accumulation=t.accumulation,
                 last=micro == t.accumulation - 1)


@functools.cache
def measured(world):
    """Per case of so many ranks: (rank 0's bytes sent by group, each axis's group, each rank's bytes of state)."""

    def state(model, optimizer):
        tensors = [t for p in model.parameters()
                   for t in (p, p.grad, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"])]  # fmt: skip
        return sum(t.to_local().nbytes for t in tensors)

    def body(rank):
        result = {}
        for name, config in CASES.items():
            if config.mesh.world == world:
                mesh = Mesh(config.mesh)
                model = build(config, mesh)
                optimizer = build_optimizer(model, config.optim)
                with Meter() as meter:
                    step(config, mesh, model)
                optimizer.step()
                groups = {axis: mesh.dense.get_group(axis) for axis in ("rep", "fsdp", "tp")}
                groups |= {axis: mesh.sparse.get_group(axis) for axis in ("efsdp", "ep", "etp")}
                groups |= {axis: mesh.data.get_group(axis) for axis in ("pp", "dp", "sequence")}
                groups |= {"sp": mesh.tokens.get_group("sp")} if config.mesh.sp > 1 else {}
                groups |= {"world": mesh.pipe.get_group("stage")}
                groups = {axis: tuple(dist.get_process_group_ranks(group)) for axis, group in groups.items()}
                result[name] = meter.sent, groups, state(model, optimizer)
        return result

    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(world, body, folder)
    return {name: (sent, groups, [rank[name][2] for rank in ranks]) for name, (sent, groups, _) in ranks[0].items()}


def planned(config):
    return GPT(config.model, device="meta")


@pytest.mark.parametrize("name", CASES)
def test_traffic(name):
    config = CASES[name]
    sent, groups, _ = measured(config.mesh.world)[name]
    want = collections.Counter()  # axes with the same ranks together
    for axis, size in traffic(config).items():
        if size:
            want[groups[axis]] += size
    if config.model.moe.experts and not config.model.moe.balanced:
        assert sent.keys() == {ranks for ranks in want if want[ranks]}
        assert all(abs(want[ranks] / sent[ranks] - 1) < 0.05 for ranks in sent)
    else:
        assert {ranks: size for ranks, size in sent.items() if size} == {r: size for r, size in want.items() if size}


@pytest.mark.parametrize("name", CASES)
def test_state(name):
    """Parameters, gradients and moments of the rank that holds the most, to the byte."""
    config = CASES[name]
    _, _, state = measured(config.mesh.world)[name]
    assert max(state) == state[0] == memory(config).state


@pytest.mark.c_core
@pytest.mark.parametrize("E, K, P", [(8, 2, 4), (8, 2, 2), (16, 4, 4), (6, 6, 3), (6, 1, 3), (64, 8, 8)])
def test_rows_per_token(E, K, P):
    """The expectation beside 20000 tokens that choose uniformly."""
    generator = torch.Generator().manual_seed(0)
    ids_TK = torch.rand(20000, E, generator=generator).argsort(1)[:, :K].int()
    rows = ops.exchange_plan(ids_TK, E, P).counts_P2[:, 0].sum().item() / len(ids_TK)
    assert abs(rows - rows_per_token(E, K, P)) < (0.01 * rows if 1 < K < E else 1e-12)


def test_traffic_of_a_sequence_is_ulysses():
    """Of each layer and pass, by the paper's formula."""
    for sp, kv_heads in ((2, 4), (4, 1), (4, 2)):
        config = case(DENSE, mesh=dict(sp=sp), kv_heads=kv_heads, dtype="bf16", seq_len=64)
        c, passes = config.model, 2 * config.model.layers
        want = 2 * (c.seq_len // sp) * 2 * c.head_width * (2 * c.heads + 2 * max(kv_heads, sp)) * (sp - 1) // sp
        assert traffic(config)["sp"] == passes * want


@pytest.mark.parametrize("mesh", [*meshes(8), *sequences(8)], ids=lambda mesh: "-".join(map(str, mesh.sizes.values())))
def test_every_mesh_has_a_plan(mesh):
    config = Config(model=replace(MODEL, heads=8, moe=replace(MOE, experts=8, balanced=False)), mesh=mesh)
    said = describe(config, planned(config))
    assert mesh.sp == 1 or f"sp {mesh.sp} (ulysses)" in said
    assert (mesh.sp > 1) == ("messages between the ranks of a sequence" in said)
    assert all(f"{axis} {size}" in said for axis, size in mesh.sizes.items() if size > 1)
    assert "each rank sends per step: " in said


@pytest.mark.parametrize("flags", [[], "--mesh.rep 2 --mesh.tp 2 --mesh.ep 4".split()], ids=["recipe", "flags"])
def test_dry_run_needs_no_ranks(flags, monkeypatch, capsys):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["train", "recipes/moe_gpt2_4e.toml", *flags, "--dry-run", "--data.train", "none"])
    with pytest.raises(SystemExit, match=r"no token file none\.bin"):      # after the plan
        moe_ext.train.main()
    said = capsys.readouterr().out
    config = load("recipes/moe_gpt2_4e.toml")
    config = replace(config, mesh=MeshConfig(rep=2, fsdp=2, tp=2, ep=4) if flags else config.mesh)
    assert said == describe(config, planned(config)) + "\n"
    assert f"mesh        {config.mesh.world} ranks: " in said
