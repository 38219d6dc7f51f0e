"""Initial values: every box has the bits of the same place in the whole, every model from the meta device those of one
made directly, in its buffers too."""

import math
from dataclasses import replace

import pytest
import torch
from compare import same
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from moe_ext import ops
from moe_ext.config import MeshConfig, ModelConfig, MoEConfig
from moe_ext.model import GPT, normal_
from moe_ext.parallel import init
from moe_ext.parallel.init import box_normal
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.shard import box_of, initialize, parallelize

KEY = dict(seed=11, site=1234567890, std=0.02)
BOXES = {  # shape: [(start, size), ..]
    (7, 13): [((0, 0), (7, 13)), ((2, 0), (3, 13)), ((0, 5), (7, 6)), ((6, 12), (1, 1)), ((1, 3), (0, 5))],
    (5, 6, 9): [((0, 0, 0), (5, 6, 9)), ((3, 0, 0), (2, 6, 9)), ((0, 2, 0), (5, 3, 9)), ((1, 4, 3), (3, 2, 5))],
    (3, 2, 4, 10): [((0, 0, 0, 0), (3, 2, 4, 10)), ((1, 0, 1, 0), (2, 2, 2, 10)), ((0, 1, 0, 7), (3, 1, 4, 3))],
    (2, 3, 2, 3, 5): [((0, 1, 1, 0, 2), (2, 2, 1, 3, 3))],
    (4, 8): [((4, 0), (0, 8)), ((9, 0), (0, 8)), ((0, 8), (4, 0))],  # what FSDP leaves to a rank behind the last row
    (0, 8): [((0, 0), (0, 8))],
}


@pytest.fixture
def drawn(monkeypatch):
    """The [rows, cols] of each draw."""
    sizes = []

    def random_normal(rows, cols, **options):
        sizes.append((rows, cols))
        return draw(rows, cols, **options)

    draw = ops.random_normal
    monkeypatch.setattr(ops, "random_normal", random_normal)
    return sizes


@pytest.mark.parametrize("piece", [init.PIECE, 30, 1])
@pytest.mark.parametrize("shape", BOXES, ids=str)
def test_a_box_is_the_slice_of_the_whole(shape, piece, dtype, device, drawn, monkeypatch):
    monkeypatch.setattr(init, "PIECE", piece)
    whole = torch.empty(shape, dtype=dtype, device=device)
    normal_(whole, KEY["std"], KEY["seed"], KEY["site"])
    for start, size in BOXES[shape]:
        drawn.clear()
        box = box_normal(shape, start, size, dtype=dtype, device=device, **KEY)
        same(box, whole[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))].reshape(size))
        assert sum(rows for rows, _ in drawn) == (math.prod(size[:-1]) if box.numel() else 0), "rows beyond the box"
        assert all(rows * cols <= max(piece, cols) and cols <= shape[-1] for rows, cols in drawn), "memory"


def test_a_last_row_of_a_huge_parameter():
    """Row numbers beyond 32 bits, of which no rank could draw the whole."""
    shape, row = (1 << 20, 1 << 16, 6), (1 << 36) - 1
    want = ops.random_normal(1, 6, step=0, row0=row, **KEY)
    same(box_normal(shape, ((1 << 20) - 1, (1 << 16) - 1, 0), (1, 1, 6), **KEY), want.view(1, 1, 6))


@pytest.mark.parametrize("shape, start, size", [
    ((4, 8), (0, 0), (5, 8)), ((4, 8), (3, 0), (2, 8)), ((4, 8), (-1, 0), (2, 8)), ((4, 8), (0, 0), (4, -1)),
    ((4, 8), (0,), (4, 8)), ((4, 8), (0, 0), (4,)), ((8,), (0,), (8,)),
])  # fmt: skip
def test_a_box_outside_is_refused(shape, start, size):
    with pytest.raises(ValueError, match=r"box_normal: got the box of size .* wanted one inside shape"):
        box_normal(shape, start, size, **KEY)


# ---- which box a rank holds ------------------------------------------------------------------------------------------
CUTS = [(Shard(0), Shard(1)), (Shard(1), Shard(0)), (Shard(0), Shard(0)), (Replicate(), Shard(0)),
        (Shard(1), Replicate())]  # fmt: skip


def test_box_of_is_what_torch_leaves_to_a_rank(tmp_path):
    def body(rank):
        mesh = init_device_mesh("cpu", (2, 2))
        for shape in [(4, 6), (7, 13), (1, 3), (2, 1, 5)]:
            whole = torch.arange(math.prod(shape)).view(shape)
            for cuts in CUTS:
                p = distribute_tensor(whole, mesh, cuts, src_data_rank=None)
                start, size = box_of(p)
                box = whole[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]
                assert torch.equal(box, p.to_local()), (shape, cuts, rank)
        with pytest.raises(ValueError, match=r"box_of: got placements \(Replicate\(\), Partial\(sum\)\), wanted Shard"):
            box_of(DTensor.from_local(torch.ones(2), mesh, (Replicate(), Partial())))

    run_ranks(4, body, tmp_path)


# ---- models from the meta device ------------------------------------------------------------------------------------
MOE = MoEConfig(experts=4, top_k=2, hidden=12)
MODELS = {name: ModelConfig(**dict(vocab_size=30, seq_len=8, layers=2, dim=16, heads=4, hidden=24) | options)
          for name, options in {
    "rope": dict(),
    "yarn": dict(rope_fraction=0.5, rope_scale=4.0, rope_context=4, rope_base=50000.0),
    "learned, tied": dict(position="learned", tied=True),
    "layernorm, bias": dict(norm="layernorm", bias=True, act="gelu"),
    "attention": dict(kv_heads=2, head_dim=6, qk_norm=True, window=3, window_full_every=2, sinks=True,
                      attention_bias="qkv"),
    "qk_norm over width": dict(qk_norm=True, qk_norm_over="width", attention_bias="all"),
    "moe": dict(moe=replace(MOE, shared_hidden=20, shared_gate=True, dense_layers=1)),
    "moe, all of it": dict(bias=True, moe=replace(MOE, score="sigmoid", select_bias_rate=0.01, router_bias=True,
                                                  noise=True, jitter=0.1)),
}.items()}  # fmt: skip
SIZES = [dict(), dict(fsdp=2), dict(tp=2), dict(rep=2), dict(fsdp=2, ep=2), dict(fsdp=2, tp=2, ep=2, etp=2)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_model_from_the_meta_device_is_the_direct_one(sizes, monkeypatch):
    """Parameters, buffers kept in a checkpoint or not, and what the forward makes of them. New memory holds NaN: what
    nobody fills is seen."""
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: poison(torch.zeros_like(*args, **options)))

    def body(rank):
        mesh = Mesh(MeshConfig(**sizes))
        for name, config in MODELS.items():
            direct = GPT(config, seed=7, dtype=torch.float64)
            model = GPT(config, dtype=torch.float64, device="meta")
            parallelize(model, mesh)
            initialize(model, 7, "cpu")
            assert model.state_dict().keys() == direct.state_dict().keys(), name
            assert [key for key, _ in model.named_parameters()] == [key for key, _ in direct.named_parameters()], name
            equal(name, model.named_parameters(), dict(direct.named_parameters()))
            buffers = dict(direct.named_buffers())
            assert dict(model.named_buffers()).keys() == buffers.keys(), name
            equal(name, model.named_buffers(), buffers)
            assert all(key.endswith("select_bias_E") for key in buffers), "a table of RoPE would be one to forget"
            if not sizes:
                tokens_BS = torch.arange(8)[None]
                same(model.eval().logits(tokens_BS), direct.eval().logits(tokens_BS))

    run_ranks(MeshConfig(**sizes).world, body)


def poison(x):
    return x.fill_(math.nan if x.is_floating_point() else -1) if not x.is_meta else x


def equal(name, got, want):
    """A rank's parts of tensors, by name, against whole ones."""
    for key, p in got:
        whole = want[key].detach()
        if isinstance(p, DTensor):
            start, size = box_of(p)
            whole = whole[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]
            p = p.to_local()
        assert torch.equal(p.detach(), whole), (name, key)
