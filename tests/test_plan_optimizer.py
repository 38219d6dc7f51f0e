"""What a plan says of optimizers beside real ones: bytes of state, bytes sent, FLOPs, bytes alive in a step."""

import functools
import re
import tempfile
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import run_ranks
from test_owners import traffic as traffic_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from moe_ext.config import (
    Config,
    ConfigError,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    MuonConfig,
    OptimConfig,
    PipelineConfig,
    ShampooConfig,
    TrainConfig,
    load,
    meshes,
)
from moe_ext.model import GPT, parameter_dtype
from moe_ext.optim import build_optimizer, muon, owners, shampoo
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.shard import build
from moe_ext.plan import checkpoint_size, describe, memory, optimizer, traffic
from moe_ext.plan.optimizer import cost, optimizer_flops, optimizer_state, optimizer_traffic
from moe_ext.plan.roofline import DEVICES, SHARES, estimate, of_optimizer, share_of_optimizer
from moe_ext.plan.search import search, smallest
from moe_ext.plan.shares import stages

MOE = MoEConfig(experts=4, top_k=2, hidden=16, shared_hidden=8, shared_gate=True, dense_layers=1)
MODEL = ModelConfig(vocab_size=51, seq_len=8, layers=3, dim=16, heads=4, hidden=24, kv_heads=2, qk_norm=True, moe=MOE)
BLOCKS = ShampooConfig(precondition_frequency=1, max_preconditioner_dim=7)      # roots after one step
MIXED = ("layers.0.*: shampoo, *.gate.weight: adamw, matrices: muon, experts: shampoo, embeddings: muon 0.5, "
         "norms: adamw")


def case(name="muon", *, dtype="fp32", mesh=None, pipeline=None, model=MODEL, **optim):
    return Config(model=model, mesh=MeshConfig(**mesh or {}), pipeline=PipelineConfig(**pipeline or {}),
                  optim=OptimConfig(name=name, shampoo=optim.pop("shampoo", BLOCKS), **optim),
                  train=TrainConfig(micro_batch=2, accumulation=2, dtype=dtype))


CASES = {
    "adamw": case("adamw"),
    "adamw bf16": case("adamw", state="bf16"),
    "muon": case(muon=MuonConfig(ns_dtype="fp32")),
    "muon bf16, biases": case(state="bf16", model=replace(MODEL, bias=True, tied=True)),
    "shampoo": case("shampoo"),
    "shampoo, whole matrices, host": case("shampoo", state="host", shampoo=replace(BLOCKS, max_preconditioner_dim=999)),
    "shampoo without moments": case("shampoo", beta1=0.0, shampoo=replace(BLOCKS, grafting="none"), dtype="fp64"),
    "all three": case(rule=MIXED, state="bf16"),
    "fsdp": case(mesh=dict(fsdp=2)),
    "fsdp, shampoo": case("shampoo", mesh=dict(fsdp=2)),
    "rep, all three": case(rule=MIXED, mesh=dict(rep=2)),
    "tp, norms too": case("shampoo", rule="*: shampoo", mesh=dict(tp=2)),
    "ep": case(mesh=dict(fsdp=2, ep=2), muon=MuonConfig(ns_dtype="fp64"), dtype="fp64"),
    "pp": case(mesh=dict(pp=2), model=replace(MODEL, tied=True, layers=4),
               rule="matrices: muon, experts: shampoo, embeddings: muon, norms: adamw"),
    "sp, host": case("shampoo", mesh=dict(sp=2), state="host"),
    "rep, fsdp": case(mesh=dict(rep=2, fsdp=2), muon=MuonConfig(ns_dtype="fp32")),
    "fsdp, ep": case("shampoo", mesh=dict(fsdp=4, ep=2)),
    "rep, tp, ep": case(rule=MIXED, mesh=dict(rep=2, tp=2, ep=2)),
    "fsdp, tp, etp": case("shampoo", mesh=dict(fsdp=2, tp=2, etp=2)),
    "fsdp, tp, ep, biases": case(rule="*: shampoo", name="shampoo", mesh=dict(fsdp=2, tp=2, ep=2),
                                 model=replace(MODEL, bias=True)),
    "fsdp of three": case(rule=MIXED, mesh=dict(fsdp=3), model=replace(MODEL, dim=24, moe=replace(MOE, hidden=12))),
    "pp of two pieces, fsdp": case(mesh=dict(pp=2, fsdp=2), pipeline=dict(chunks=2),
                                   model=replace(MODEL, layers=5), rule=MIXED),
}  # fmt: skip


def stepped(model, optim):
    """An optimizer after a step with some gradients."""
    optimizer = build_optimizer(model, optim)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.1)
    optimizer.step()
    return optimizer


def state_bytes(optimizer):
    """All but the counters of steps."""
    tensors = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    return sum(getattr(t, "_local_tensor", t).nbytes for t in tensors)


def sent_bytes(optimizer):
    parts = getattr(optimizer, "parts", [optimizer])
    return sum(part.owners.sent for part in parts if hasattr(part, "owners"))


@functools.cache
def measured(world):
    """Per case of so many ranks: each rank's (bytes of state, bytes sent)."""

    def body(rank):
        result = {}
        for name, config in CASES.items():
            if config.mesh.world == world:
                optimizer = stepped(build(config, Mesh(config.mesh)), config.optim)
                result[name] = state_bytes(optimizer), sent_bytes(optimizer)
        return result

    if world == 1:
        return [body(0)]
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(world, body, folder)


@pytest.mark.parametrize("name", CASES)
def test_state_and_traffic(name):
    """To the byte, of the rank of each stage that has most, and of a checkpoint."""
    config = CASES[name]
    ranks, size = measured(config.mesh.world), config.mesh.stage
    for stage in range(config.mesh.pp):
        state, sent = zip(*(found[name] for found in ranks[stage * size:][:size]), strict=True)
        assert max(state) == optimizer_state(config, stage)
        assert max(sent) == sum(optimizer_traffic(config, stage).values()) == traffic(config, stage)["optimizer"]
        held = memory(config, "cuda", stage)
        assert held.optimizer == (0 if config.optim.state == "host" else max(state))
        assert held.total == sum(held[:-1]) + held.step
    if config.mesh.world == 1:
        total = GPT(config.model, device="meta").num_parameters()[0]
        assert checkpoint_size(config, total) == max(state) + total * (8 if config.train.dtype == "fp64" else 4)


@pytest.mark.parametrize("name, most", [("muon", 0), ("shampoo", 7), ("shampoo", 0)])
def test_share_out_is_assign(name, most):
    """On every mesh of eight: whom owners.assign gives each matrix, and the bytes that follow, by numbers alone."""
    price = {"muon": muon.cost, "shampoo": shampoo.cost}[name]
    config = case(name, model=replace(MODEL, heads=8, kv_heads=8, moe=replace(MOE, experts=8)))
    for mesh in meshes(8):
        try:
            config = replace(config, mesh=mesh)
        except ConfigError:
            continue
        parameters = optimizer.stored(config.model, mesh, config.optim, stages(config)[0])[name.capitalize()]
        loads, owned = optimizer.share_out(parameters, price, most)
        held = [owners.places(p.shape, range(8), p.sizes, p.placements) for p in parameters]
        assigned = owners.assign(held, [p.shape for p in parameters], price, most)
        want, sent = np.zeros(8), traffic_of(held, assigned, 1)
        for matrix, rank in assigned:
            want[rank] += price(matrix.shape)
        assert loads == pytest.approx(want, rel=1e-12)
        assert optimizer.sent(owned).tolist() == [sent.get(rank, 0) for rank in range(8)]


@pytest.mark.parametrize("loads, price, tasks, want", [
    ([0, 0, 0], 5, 4, [0, 1, 2, 0]), ([7, 0, 2], 3, 5, [1, 2, 1, 2, 1]), ([1, 0], 1, 3, [1, 0, 1]), ([4], 1, 2, [0, 0]),
    ([9, 0], 2, 2, [1, 1]),
])  # fmt: skip
def test_in_turn(loads, price, tasks, want):
    assert optimizer.in_turn(loads, price, tasks).tolist() == want


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_flops_are_what_torch_counts(dtype):
    config = case(muon=MuonConfig(ns_steps=3, ns_dtype=dtype), dtype=dtype)
    model = GPT(config.model, dtype=parameter_dtype(config))
    with FlopCounterMode(display=False) as counter:
        stepped(model, config.optim)
    assert optimizer_flops(config) == counter.get_total_flops() == getattr(cost(config), dtype)


class Alive(TorchDispatchMode):
    """The most bytes of storages made inside that were alive at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (storage := t.untyped_storage()) not in self.seen:
                if storage._cdata not in before:
                    self.seen[storage] = size = storage.nbytes()
                    self.now += size
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self.gone, size)
        return out

    def gone(self, size):
        self.now -= size


@pytest.mark.parametrize("config", [case(dtype="fp64", muon=MuonConfig(ns_dtype="fp64")), case("shampoo"),
                                    case("adamw", state="bf16")], ids=["muon", "shampoo", "adamw"])  # fmt: skip
def test_a_step_needs_no_more_than_planned(config):
    """Nor less than a fifth: what is alive at a time beside the state."""
    model = GPT(config.model, dtype=parameter_dtype(config))
    optimizer = stepped(model, config.optim)
    with Alive() as alive:
        optimizer.step()
    held = memory(config)
    assert alive.most <= held.step <= 5 * alive.most


QWEN = replace(load("recipes/qwen3_30b_a3b.toml"), mesh=MeshConfig(fsdp=64, ep=8))


def test_qwen3_on_64_ranks():
    """Muon's momentum of a 64th of the matrices, AdamW's moments of a 64th of tables, head and norms."""
    config = replace(QWEN, optim=OptimConfig(name="muon"))
    c, m = config.model, config.model.moe
    experts = c.layers * m.experts * 3 * c.dim * m.hidden
    dense = c.layers * c.dim * (c.head_width * (2 * c.heads + 2 * c.kv_groups) + m.experts)
    tables = 2 * c.vocab_size * c.dim
    found, adam = cost(config), cost(QWEN)
    assert found.state == pytest.approx((4 * (experts + dense) + 8 * tables) / 64, rel=1e-3)
    assert adam.state == memory(QWEN).optimizer == 2 * memory(QWEN).weights
    assert adam.flops == adam.work == adam.dense == adam.experts == 0
    each = 5 * (4 * m.hidden**2 * c.dim + 2 * m.hidden**3)      # Newton-Schulz of an expert's matrix
    assert found.in_all > c.layers * 3 * m.experts * each
    assert found.in_all / 64 <= found.flops < 1.01 * found.in_all / 64          # nobody waits
    # of what a rank has, 7/8 of the experts and 63/64 of the rest goes to owners in bf16; as much comes back
    assert found.experts == pytest.approx(2 * 2 * 7 / 8 * experts / 64, rel=0.02)
    assert found.dense == pytest.approx(2 * 2 * 63 / 64 * dense / 64, rel=0.25)


def test_state_elsewhere():
    """bf16 halves it, host leaves nothing of it on the device, and its way there costs time."""
    full, bf16, host = (replace(QWEN, optim=OptimConfig(state=state)) for state in ("full", "bf16", "host"))
    assert cost(full).state == 2 * cost(bf16).state == cost(host).host and cost(host).state == 0
    assert memory(full, "cpu").optimizer == memory(host, "cpu").optimizer
    assert memory(full).optimizer - memory(host).optimizer == cost(host).host
    device = DEVICES["h100"]
    extra = of_optimizer(host, 0, device, 8, SHARES).likely - of_optimizer(full, 0, device, 8, SHARES).likely
    assert extra > 2 * cost(host).host / device.host / 1e9


def test_time():
    """Of AdamW the traffic of its state alone, as ever; of Muon its products too, of Shampoo the eigenvalues most."""
    device = DEVICES["h100"]
    config = {name: replace(QWEN, optim=OptimConfig(name=name)) for name in ("adamw", "muon", "shampoo")}
    likely = {name: of_optimizer(one, 0, device, 8, SHARES).likely for name, one in config.items()}
    assert likely["adamw"] == pytest.approx(7 * memory(QWEN).weights / device.bandwidth / 1e9 / SHARES.memory)
    assert likely["adamw"] < likely["muon"] < likely["shampoo"]
    products = cost(config["muon"]).bf16 / device.tflops / 1e12
    assert estimate(config["muon"], device).compute - estimate(QWEN, device).compute == pytest.approx(products)
    for name, one in config.items():
        share = share_of_optimizer(one, device)
        assert share == pytest.approx(likely[name] / estimate(one, device).likely) and 0 < share < 1


def test_search_counts_the_state():
    """A device that AdamW's two moments do not fit has room for Muon's momentum, or for what is on the host."""
    config = load("recipes/moe_gpt2_8e.toml")
    config = replace(config, model=replace(config.model, moe=replace(config.model.moe, scope="sequence")))

    def least(**optim):
        return smallest(replace(config, optim=OptimConfig(**optim)), 1)[1].total
    for optim in (dict(name="muon"), dict(state="host")):
        between = replace(DEVICES["h100"], memory=(least() + least(**optim)) / 2 / 1e9 / 0.9)
        assert least(**optim) < least() and not search(config, 1, between)
        assert search(replace(config, optim=OptimConfig(**optim)), 1, between)


def test_words():
    config = replace(QWEN, optim=OptimConfig(name="muon", state="host"))
    said = describe(config, GPT(config.model, device="meta"))
    assert re.search(r"^optimizer   Muon \(matrices, experts\): .+\n {12}AdamW \(embeddings, norms\): ", said, re.M)
    assert "gradients and AdamW's moments and Muon's momentum in the host's memory" in said
    assert "\noptimizer" not in describe(QWEN, GPT(QWEN.model, device="meta"))
