"""Muon and Shampoo on meshes against one fp64 process: parameters after ten steps, to 1e-11.

The ranks of one world run all its cases one after the other. Nothing divides the vocabulary of 50; Shampoo cuts
matrices of 16 and 24 into blocks of 10; the rule sends tables to these optimizers too.
"""
import functools
from collections import defaultdict

import pytest
import torch
from ranks import run_ranks
from torch.distributed.tensor import DTensor

import moe_ext.optim.whole
from moe_ext.config import (
    Config,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    MuonConfig,
    OptimConfig,
    ShampooConfig,
    TrainConfig,
)
from moe_ext.optim import build_optimizer
from moe_ext.optim.owners import Owners
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.pipeline import Pipeline
from moe_ext.parallel.shard import box_of, build

SEQUENCES, LENGTH, VOCABULARY, STEPS = 8, 8, 50, 10
SIZES = dict(vocab_size=VOCABULARY, seq_len=LENGTH, layers=1, dim=16, heads=4, hidden=24)
EXPERTS = MoEConfig(experts=4, top_k=2, hidden=24)
MODELS = {"dense": ModelConfig(**SIZES), "moe": ModelConfig(**SIZES, moe=EXPERTS),
          "stages": ModelConfig(**SIZES | dict(layers=2, tied=True), moe=EXPERTS)}
BOTH = "muon", "shampoo"
CASES = [(name, model, mesh) for names, model, mesh in [
    (BOTH, "moe", dict(fsdp=2)), (BOTH, "moe", dict(rep=2)), (BOTH, "moe", dict(tp=2)),
    (BOTH, "moe", dict(fsdp=2, ep=2)), (BOTH, "moe", dict(tp=2, etp=2)), (BOTH, "dense", dict(sp=2)),
    (BOTH, "stages", dict(pp=2)),
    (BOTH, "dense", dict(fsdp=4)), (BOTH, "moe", dict(rep=2, fsdp=2, ep=2)), (["muon"], "moe", dict(rep=4)),
    (["shampoo"], "stages", dict(pp=2, fsdp=2)), (["muon"], "moe", dict(fsdp=2, tp=2, ep=2, etp=2)),
    (["muon"], "moe", dict(fsdp=2, sp=2, ep=2)),
    (BOTH, "dense", dict(fsdp=8)), (["shampoo"], "moe", dict(rep=2, fsdp=2, tp=2, ep=2)),
] for name in names]


@functools.cache
def mesh_of(config):
    return Mesh(config, "cpu")


def ten_steps(name, model, mesh):
    """-> name: (start, size, values) of this rank's part of each parameter."""
    config = Config(
        model=MODELS[model], mesh=MeshConfig(**mesh),
        train=TrainConfig(dtype="fp64", device="cpu", seed=3, micro_batch=SEQUENCES // MeshConfig(**mesh).dp),
        optim=OptimConfig(name=name, lr=1e-2, eps=1e-6, muon=MuonConfig(ns_dtype="fp64"),
                          rule=f"matrices: {name}, experts: {name}, embeddings: {name}, norms: adamw",
                          shampoo=ShampooConfig(precondition_frequency=3, epsilon=1e-6, max_preconditioner_dim=10)))
    mesh = mesh_of(config.mesh)
    model = build(config, mesh)
    optimizer = build_optimizer(model, config.optim)
    pipeline = Pipeline(model, mesh, config.pipeline, micro_batch=config.train.micro_batch, micros=1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator)

        def feed(micro, ids=ids):
            begin, end = mesh.rows(micro, config.train.micro_batch)
            return ids[begin:end, :-1], ids[begin:end, 1:]
        pipeline.step(feed, 1, tokens=SEQUENCES * LENGTH)
        optimizer.step()
        optimizer.zero_grad()
    pipeline.close()
    return {key: (*box_of(p), p.to_local().detach().clone()) if isinstance(p, DTensor)
            else ([0] * p.ndim, list(p.shape), p.detach().clone()) for key, p in model.named_parameters()}


@functools.cache
def one_process(name, model):
    return {key: values for key, (_, _, values) in ten_steps(name, model, {}).items()}


def difference(parts, name, model):
    """The largest, of each parameter's maximum."""
    worst = 0.0
    for key, (start, size, values) in parts.items():
        whole = one_process(name, model)[key]
        wanted = whole[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]
        assert values.shape == wanted.shape
        if values.numel():
            worst = max(worst, float((values - wanted).abs().max() / whole.abs().max()))
    return worst


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ten_steps_are_those_of_one_process(world):
    cases = [case for case in CASES if MeshConfig(**case[2]).world == world]
    for name, model, _ in cases:
        one_process(name, model)
    results = run_ranks(world, lambda rank: [ten_steps(*case) for case in cases])
    for case, ranks in zip(cases, zip(*results, strict=True), strict=True):
        assert max(difference(parts, *case[:2]) for parts in ranks) < 1e-11, case
        assert set().union(*ranks) == set(one_process(*case[:2])), case
        copies = defaultdict(list)      # replicas, and a tied table of two stages, stay equal to the bit
        for parts in ranks:
            for key, (start, size, values) in parts.items():
                copies[key, tuple(start), tuple(size)].append(values)
        assert all(torch.equal(values, there[0]) for there in copies.values() for values in there), case


def test_the_same_mesh_gives_the_same_bits_and_shards_taken_for_matrices_are_found():
    cases = [("muon", "moe", dict(fsdp=2)), ("shampoo", "moe", dict(fsdp=2))]

    def body(rank):
        twice = [[ten_steps(*case) for case in cases] for _ in range(2)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(moe_ext.optim.whole, "Owners", shards_as_matrices)
            return *twice, [ten_steps(*case) for case in cases]

    for first, second, planted in run_ranks(2, body):
        for case, one, other, wrong in zip(cases, first, second, planted, strict=True):
            assert all(torch.equal(one[key][2], other[key][2]) for key in one)
            assert difference(one, *case[:2]) < 1e-11 < 1e-6 < difference(wrong, *case[:2])


def shards_as_matrices(parameters, *args, **options):
    """The mistake that kept Shampoo from converging under FSDP: what a rank holds is taken for the matrix."""
    return Owners([p.to_local() if isinstance(p, DTensor) else p for p in parameters], *args, **options)
