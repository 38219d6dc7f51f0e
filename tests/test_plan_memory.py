"""The plan's memory beside tensors that are there: what autograd saves of a forward, and the exchange's messages."""

import collections
import contextlib
import functools
import tempfile
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_ext.config import Config, DataConfig, MeshConfig, ModelConfig, MoEConfig, TrainConfig
from moe_ext.halves import halves
from moe_ext.layers.fused import Draws
from moe_ext.model import GPT, half_dtype, parameter_dtype, precision
from moe_ext.ops import logits
from moe_ext.optim import build_optimizer
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.shard import build
from moe_ext.plan import memory
from moe_ext.plan.memory import again
from moe_ext.plan.shares import stages

pytestmark = pytest.mark.c_core
MOE = MoEConfig(experts=8, top_k=2, hidden=64)
# Taking turns, top-1 experts send as many rows as uniform routing is expected to.
TURNS = replace(MOE, top_k=1, balanced=True)
MODEL = ModelConfig(vocab_size=512, seq_len=128, layers=2, dim=64, heads=4, hidden=96)
DENSE = MoEConfig()


def case(moe=MOE, *, dtype="fp32", micro_batch=2, micros=1, mesh=None, data=None, recompute_attention=False, **model):
    return Config(model=replace(MODEL, moe=moe, **model), data=DataConfig(**data or {}), mesh=MeshConfig(**mesh or {}),
                  train=TrainConfig(micro_batch=micro_batch, accumulation=micros, dtype=dtype,
                                    recompute_attention=recompute_attention))


CASES = {
    "dense": case(DENSE),
    "dense bf16": case(DENSE, dtype="bf16"),
    "dense fp64": case(DENSE, dtype="fp64"),
    "dense fp16, tied": case(DENSE, dtype="fp16", tied=True),
    "layernorm, biases, learned, dropout": case(DENSE, norm="layernorm", bias=True, position="learned", dropout=0.1),
    "GQA, gelu": case(DENSE, act="gelu", kv_heads=2),
    "other sizes": case(DENSE, vocab_size=317, seq_len=72, layers=3, dim=48, head_dim=20, hidden=112, micro_batch=3),
    "qk norm": case(DENSE, qk_norm=True, kv_heads=2, dtype="bf16"),
    "qk norm over the width": case(DENSE, qk_norm=True, qk_norm_over="width", kv_heads=2),
    "qk norm, learned": case(DENSE, qk_norm=True, position="learned"),
    "partial rope": case(DENSE, rope_fraction=0.5),
    "sinks": case(DENSE, sinks=True),
    "sinks, learned": case(DENSE, sinks=True, position="learned", dtype="bf16"),
    "window": case(DENSE, window=32),
    "window, sinks, every other block": case(window=48, window_full_every=2, sinks=True, kv_heads=2),
    "window of one sequence": case(DENSE, window=32, sinks=True, dtype="bf16", micro_batch=1, layers=3),
    "window beyond the sequence": case(DENSE, window=500),
    "documents": case(DENSE, data=dict(reset_attention=True)),
    "documents, sinks, learned": case(DENSE, data=dict(reset_attention=True), sinks=True, position="learned"),
    "documents, window": case(DENSE, data=dict(reset_attention=True), window=32, layers=3),
    "documents, positions": case(DENSE, data=dict(reset_attention=True, reset_positions=True), dtype="bf16"),
    "moe": case(),
    "moe bf16": case(dtype="bf16"),
    "moe bf16, cast once": case(dtype="bf16", micros=2),
    "biases fp16, tied, cast once": case(dtype="fp16", micros=3, bias=True, tied=True),
    "moe top-1": case(replace(MOE, top_k=1)),
    "shared expert": case(replace(MOE, shared_hidden=48)),
    "shared expert bf16": case(replace(MOE, shared_hidden=48), dtype="bf16"),
    "shared gate": case(replace(MOE, shared_hidden=48, shared_gate=True)),
    "shared gate bf16": case(replace(MOE, shared_hidden=48, shared_gate=True), dtype="bf16"),
    "groups": case(replace(MOE, experts=8, score="sigmoid", select_bias_rate=0.1, groups=4, top_groups=2)),
    "jitter": case(replace(MOE, jitter=0.1)),
    "jitter bf16": case(replace(MOE, jitter=0.1), dtype="bf16"),
    "noise, z-loss": case(replace(MOE, noise=True, z_weight=0.1, experts=16, top_k=3)),
    "sigmoid": case(replace(MOE, score="sigmoid", select_bias_rate=0.1)),
    "capacity": case(replace(MOE, capacity_factor=0.5, balanced=True)),
    "dense layers, relu, biases": case(replace(MOE, dense_layers=1), act="relu", bias=True, layers=3),
    "gpt-oss": case(replace(MOE, router_bias=True), act="swiglu_oai", bias=True, rope_scale=4.0, rope_context=32),
}  # fmt: skip


class Saved(contextlib.AbstractContextManager):
    """The storages that autograd saves, each once; none of `known` tensors."""

    def __init__(self, known):
        self.known, self.kept = {t.untyped_storage()._cdata for t in known}, {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)

    def pack(self, t):
        if t.untyped_storage()._cdata not in self.known:
            self.kept[t.untyped_storage()._cdata] = t
        return t

    def __enter__(self):
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception):
        self.hooks.__exit__(*exception)

    @property
    def bytes(self):
        """Now: FSDP has freed the parameters that it will gather again."""
        return sum(t.untyped_storage().nbytes() for t in self.kept.values())


def forward(config, model, mesh):
    c, generator = config.model, torch.Generator().manual_seed(1)
    tokens = torch.randint(c.vocab_size, (config.train.micro_batch, c.seq_len), generator=generator)
    documents, place = {}, torch.arange(c.seq_len).expand_as(tokens)
    if config.data.reset_attention:     # halves, whose windows the plan has; or one in a row, in the others two
        cut = torch.full((len(tokens), 1), c.seq_len // 2 if c.window else c.seq_len * 3 // 4)
        cut[0] += 0 if c.window else c.seq_len
        documents["documents_BS"] = (place >= cut).long()
    if config.data.reset_positions:
        documents["positions_BS"] = torch.where(place < cut, place, place - cut)
    draws = Draws(1, 1) if mesh is None else mesh.draws(1, 1, 0, c.seq_len)
    with halves(model, config):
        known = [p.to_local() if hasattr(p, "to_local") else p for p in (*model.parameters(), *model.buffers())]
        with Saved([*known, tokens]) as saved, precision(config, torch.device("cpu")):
            out = model(tokens, tokens, draws, **documents)
    return out, saved.bytes


def halved(config, model):
    """Bytes of the weights that a step casts once."""
    with halves(model, config):
        return sum(p.nbytes for p in model.parameters() if p.dtype == half_dtype(config))


def near(got, want, within=0.01):
    return abs(got / want - 1) < within


@pytest.mark.parametrize("name", CASES)
def test_activations(name):
    config = CASES[name]
    model = GPT(config.model, dtype=parameter_dtype(config))
    _, saved = forward(config, model, None)
    held = memory(config, "cpu")
    assert near(held.activations + held.cast, saved + halved(config, model))
    assert held.exchange == held.fsdp == 0


@pytest.mark.parametrize("options", [dict(), dict(jitter=0.1), dict(shared_hidden=48)], ids=str)
def test_a_gpu_s_router_shares_the_experts_input(options, monkeypatch):
    on_a_gpu = functools.partial(logits.from_halves, torch.device("cuda"))
    monkeypatch.setattr(logits, "from_halves", lambda device, *given: on_a_gpu(*given))
    config = case(replace(MOE, **options), dtype="bf16", micro_batch=8)
    _, saved = forward(config, GPT(config.model), None)
    held = memory(config, "cpu")
    assert near(held.activations + held.cast, saved, 0.001)


@pytest.mark.parametrize("name", ["dense fp64", "qk norm", "window, sinks, every other block", "moe bf16",
                                  "moe bf16, cast once", "dense layers, relu, biases"])  # fmt: skip
def test_recomputation(name):
    """Every block's input is kept, and in the backward all that a block saves: of the kind that saves most."""
    config = CASES[name]
    model = GPT(config.model, dtype=parameter_dtype(config))
    _, whole = forward(config, model, None)
    each = []
    for block in model.layers:      # the whole without it
        less, kept = GPT(config.model, dtype=parameter_dtype(config)), block.layer
        less.layers.pop(kept)
        each.append(whole - forward(config, less, None)[1])
    model.recompute = True
    _, inputs = forward(config, model, None)
    held = memory(replace(config, train=replace(config.train, recompute=True)), "cpu")
    assert near(held.activations + held.cast, inputs + max(each) + halved(config, model), within=0.05)


def test_state():
    """Weights, gradients and moments of one process, to the byte."""
    config = case(bias=True, tied=True)
    model = GPT(config.model)
    optimizer = build_optimizer(model, config.optim)
    out, _ = forward(config, model, None)
    (out.token_loss + out.aux_loss).backward()
    optimizer.step()
    held = memory(config)
    assert held.weights == sum(p.nbytes for p in model.parameters())
    assert held.gradients == sum(p.grad.nbytes for p in model.parameters())
    moments = [optimizer.state[p][name] for p in model.parameters() for name in ("exp_avg", "exp_avg_sq")]
    assert held.optimizer == sum(t.nbytes for t in moments)


GATHER = dict(sp=2, attention="gather")
MESHES = {
    "fsdp": case(mesh=dict(fsdp=2)),
    "fsdp bf16": case(mesh=dict(fsdp=2), dtype="bf16"),
    "rep bf16": case(mesh=dict(rep=2), dtype="bf16"),
    "tp": case(DENSE, mesh=dict(tp=2), kv_heads=2),
    "tp bf16, window, sinks": case(DENSE, mesh=dict(tp=2), dtype="bf16", window=32),
    "tp, wide norm": case(DENSE, mesh=dict(tp=2), qk_norm=True, qk_norm_over="width"),
    "tp, shared bf16": case(replace(MOE, shared_hidden=48, shared_gate=True), mesh=dict(tp=2), dtype="bf16"),
    "tp, etp": case(mesh=dict(tp=2, etp=2)),
    "tp, etp bf16": case(mesh=dict(tp=2, etp=2), dtype="bf16", bias=True),
    "ep": case(TURNS, mesh=dict(fsdp=2, ep=2)),
    "ep bf16": case(replace(TURNS, shared_hidden=48), mesh=dict(fsdp=2, ep=2), dtype="bf16"),
    "ep, jitter": case(replace(TURNS, jitter=0.1), mesh=dict(fsdp=2, ep=2), dtype="fp64"),
    "tp, ep": case(TURNS, mesh=dict(tp=2, ep=2)),
    "sp": case(DENSE, mesh=dict(sp=2), kv_heads=2),
    "sp, learned": case(DENSE, mesh=dict(sp=2), position="learned", kv_heads=1),
    "sp bf16, MQA": case(DENSE, mesh=dict(sp=2), kv_heads=1, dtype="bf16", qk_norm=True),
    "sp, window, sinks": case(mesh=dict(sp=2), window=32, sinks=True, dtype="bf16"),
    "sp, documents, ep": case(TURNS, mesh=dict(sp=2, ep=2), data=dict(reset_attention=True), dtype="fp64"),
    "sp, documents, window": case(DENSE, mesh=dict(sp=2), data=dict(reset_attention=True), window=32),
    "sp, ep bf16": case(replace(TURNS, shared_hidden=48), mesh=dict(sp=2, ep=2), dtype="bf16"),
    "sp, attention again": case(DENSE, mesh=dict(sp=2), kv_heads=2, recompute_attention=True),
    "sp of four, documents": case(DENSE, mesh=dict(sp=4), kv_heads=2, data=dict(reset_attention=True)),
    "sp, tp": case(mesh=dict(sp=2, tp=2), kv_heads=2, dtype="bf16", qk_norm=True, qk_norm_over="width"),
    "gather": case(DENSE, mesh=GATHER, kv_heads=2),
    "gather, learned, one kv head": case(mesh=GATHER, kv_heads=1, position="learned", dtype="bf16"),
    "gather, window, sinks": case(DENSE, mesh=GATHER, window=48, window_full_every=2, sinks=True, layers=3),
    "gather, window of one sequence": case(DENSE, mesh=GATHER, window=32, micro_batch=1),
    "gather, documents": case(DENSE, mesh=GATHER, data=dict(reset_attention=True), dtype="bf16"),
    "gather, attention again": case(DENSE, mesh=GATHER, kv_heads=2, recompute_attention=True),
    "gather, tp": case(DENSE, mesh=dict(sp=2, tp=2, attention="gather"), heads=6, head_dim=16),
}  # fmt: skip


class Messages(TorchDispatchMode):
    """The most bytes that a collective takes and gives, by the name of its group."""

    def __init__(self):
        super().__init__()
        self.most = collections.Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "c10d":
            group = dist.ProcessGroup.unbox(next(a for a in args if isinstance(a, torch.ScriptObject))).group_name
            taken = sum(t.nbytes for t in tree_leaves(args) if isinstance(t, torch.Tensor))
            self.most[group] = max(self.most[group], taken)
        return op(*args, **(kwargs or {}))


@functools.cache
def measured(world):
    """Per case: (bytes saved on the first sequence's last rank, bytes of the largest pair of messages of the token
    exchange, of attention)."""

    def body(rank):
        result = {}
        for name, config in MESHES.items():
            if config.mesh.world == world:
                mesh = Mesh(config.mesh)
                with Messages() as messages:
                    out, saved = forward(config, build(config, mesh), mesh)
                    (out.token_loss + out.aux_loss).backward()
                tokens = messages.most[mesh.sparse.get_group("ep").group_name]
                heads = messages.most[mesh.tokens.get_group("sp").group_name] if config.mesh.sp > 1 else 0
                result[name] = saved, tokens, heads
        return result

    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(world, body, folder)
    return {name: ranks[MESHES[name].mesh.sequence - 1][name] for name in ranks[0]}


@pytest.mark.parametrize("name", MESHES)
def test_activations_and_messages_of_ranks(name):
    config, (saved, tokens, heads) = MESHES[name], measured(MESHES[name].mesh.world)[name]
    held = memory(config, "cpu")
    assert near(held.activations + held.cast - sum(again(config, "cpu", stages(config)[0])), saved)
    assert near(held.exchange, tokens, within=0.05) if tokens else held.exchange == 0
    assert held.sequence == heads


def test_a_head_has_a_chunk_of_logits_as_its_op_has():
    config = case(DENSE, dtype="bf16", seq_len=5000, micro_batch=1)
    matrix = 512 * 64 * (4 + 2 + 2)     # the sum of its gradient, a chunk's part, its cast
    assert memory(config, "cpu").head == 512 * 1024 * 2 + matrix
    assert memory(config, "cuda").head == 512 * 4096 * 2 + matrix
    assert memory(case(DENSE, dtype="bf16"), "cuda").head == 512 * 256 * 2 + matrix     # two sequences of 128 tokens
    once = case(DENSE, dtype="bf16", micros=2)      # all of them
    assert memory(once, "cuda").head == 512 * 256 * 2 + matrix - 512 * 64 * 2
