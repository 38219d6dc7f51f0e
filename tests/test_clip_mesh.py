"""Clipping and AdamW for parameters on two meshes, sharded and replicated in several ways, against one process.

Dense mesh (rep, fsdp, tp), sparse mesh (rep, efsdp, ep); 1 x 4 values on 2 x 2 ranks leave two shards empty.
"""
import math

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from moe_ext.config import OptimConfig
from moe_ext.optim import (
    LossScaler,
    NonFiniteGradient,
    build_optimizer,
    clip,
    clip_grad_norm,
    count_zeros,
    param_groups,
    parameter_norm,
)

COPY, ROWS, COLUMNS = Replicate(), Shard(0), Shard(1)
LAYOUT = {  # name: shape, mesh dimensions, placements
    "embed": ((7, 6), ("rep", "fsdp"), (COPY, ROWS)),
    "attention": ((6, 8), ("rep", "fsdp", "tp"), (COPY, COLUMNS, ROWS)),
    "norm": ((5,), ("rep", "fsdp"), (COPY, ROWS)),
    "router": ((3, 4), ("rep", "fsdp", "tp"), (COPY, COPY, COPY)),
    "wide": ((1, 4), ("rep", "fsdp", "tp"), (COPY, ROWS, COLUMNS)),
    "experts": ((4, 6, 3), ("rep", "efsdp", "ep"), (COPY, COLUMNS, ROWS)),
    "expert_bias": ((4, 3), ("rep", "efsdp", "ep"), (COPY, COPY, ROWS)),
    "unused": ((3,), ("rep", "fsdp"), (COPY, ROWS)),
}
MESHES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2), (1, 4, 1)]  # rep, fsdp, tp


def model_on(rep, fsdp, tp, dtype=torch.float64):
    """The parameters as DTensors, and for each the function that distributes a whole tensor as it."""
    ranks, ep = torch.arange(rep * fsdp * tp), min(2, fsdp * tp)
    dense = DeviceMesh("cpu", ranks.view(rep, fsdp, tp), mesh_dim_names=("rep", "fsdp", "tp"))
    sparse = DeviceMesh("cpu", ranks.view(rep, -1, ep), mesh_dim_names=("rep", "efsdp", "ep"))
    model, put = nn.Module(), {}
    for name, (_, dims, placements) in LAYOUT.items():
        mesh = (sparse if "ep" in dims else dense)[dims]
        put[name] = lambda whole, mesh=mesh, placements=placements: distribute_tensor(whole, mesh, placements)
    for name, whole in tensors(0, dtype).items():
        model.register_parameter(name, nn.Parameter(put[name](whole)))
    return model, put


def one_process(dtype=torch.float64):
    model = nn.Module()
    for name, whole in tensors(0, dtype).items():
        model.register_parameter(name, nn.Parameter(whole))
    return model, {name: lambda whole: whole for name in LAYOUT}


def tensors(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, (shape, *_) in LAYOUT.items()}


def set_gradients(model, put, seed=1, dtype=torch.float64, spoil=lambda whole: None):
    whole = tensors(seed, dtype)
    spoil(whole)
    for name, p in model.named_parameters():
        p.grad = put[name](whole[name].clone()) if name != "unused" else None


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor):
    """Gathered from this rank's own replicas: equal on all ranks only if the replicas are."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def gradients(model):
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


# ---- the norm --------------------------------------------------------------------------------------------------------
def clipped(model, put, clip_them, **arguments):
    set_gradients(model, put)
    norm = clip_them(list(model.named_parameters()), **arguments)
    return norm, gradients(model)


def check(results, wanted):
    """Each rank's norm and gradients: the same bits everywhere, and one process's values."""
    norm, grads = results[0]
    for other_norm, other_grads in results[1:]:
        assert other_norm == norm
        assert all(torch.equal(other_grads[name], grad) for name, grad in grads.items())
    assert norm == pytest.approx(wanted[0], rel=1e-15, abs=0)
    torch.testing.assert_close(grads, wanted[1], rtol=1e-15, atol=0)


def per_mesh(named, max_norm, scale):
    dense = [(name, p) for name, p in named if "expert" not in name]
    sparse = [(name, p) for name, p in named if "expert" in name]
    return math.hypot(clip_grad_norm(dense, max_norm, scale), clip_grad_norm(sparse, max_norm, scale))


def counting(copies):
    def wrong(named, max_norm, scale):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(clip, "_copies", copies)
            return clip_grad_norm(named, max_norm, scale)
    return wrong


def copies_on_own_mesh(name, grad, world, right=clip._copies):
    return right(name, grad, grad.device_mesh.size())


def without_all_reduce(named, max_norm, scale):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", lambda x: None)
        return clip_grad_norm(named, max_norm, scale)


WRONG = {  # name: function, the meshes on which it does no harm
    "clip per mesh": (per_mesh, []),
    "replicas counted twice": (counting(lambda name, grad, world: 1), [(1, 1, 1)]),
    "every value on all ranks": (counting(lambda name, grad, world: world), [(1, 1, 1), (2, 1, 1)]),
    "only the dimensions of its mesh": (counting(copies_on_own_mesh), [mesh for mesh in MESHES if mesh[2] == 1]),
    "each rank its own": (without_all_reduce, [(1, 1, 1)]),
}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_any_mesh_clips_as_one_process(mesh, tmp_path):
    arguments = dict(max_norm=0.005, scale=1024.0)      # the norm is 0.0139

    def body(rank):
        model, put = model_on(*mesh)
        return {name: clipped(model, put, function, **arguments) for name, function in functions.items()}

    functions = {"right": clip_grad_norm} | {name: function for name, (function, _) in WRONG.items()}
    ranks = run_ranks(math.prod(mesh), body, tmp_path)
    wanted = clipped(*one_process(), clip_grad_norm, **arguments)
    check([rank["right"] for rank in ranks], wanted)
    for name, (_, harmless) in WRONG.items():
        if mesh not in harmless:
            with pytest.raises(AssertionError):
                check([rank[name] for rank in ranks], wanted)
                pytest.fail(name)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_any_mesh_measures_as_one_process(mesh, tmp_path, monkeypatch):
    """The parameters' norm, and how many values of the gradients are zero: in part of a tensor, in all of it."""
    def plant(whole):
        whole["embed"][2:5] = 0
        whole["experts"][1] = 0
        whole["wide"][0, 3] = 0
        whole["router"].zero_()

    def measured(model, put):
        set_gradients(model, put, spoil=plant)
        return count_zeros(model.named_parameters()), parameter_norm(model.named_parameters())

    def body(rank):
        made = model_on(*mesh)
        right = measured(*made)
        monkeypatch.setattr(clip, "_copies", lambda name, grad, world: 1)
        return right, measured(*made)

    ranks = run_ranks(math.prod(mesh), body, tmp_path)
    zeros, norm = measured(*one_process())
    assert zeros == 3 * 6 + 6 * 3 + 1 + 12
    assert norm == pytest.approx(math.sqrt(sum(t.square().sum() for t in tensors(0).values())), rel=1e-15)
    for right, counted_twice in ranks:
        assert right == (zeros, pytest.approx(norm, rel=1e-15)) and right == ranks[0][0]
        assert mesh == (1, 1, 1) or (counted_twice[0] > zeros and counted_twice[1] > norm)


@pytest.mark.parametrize("world, wanted", [(1, []), (2, [(torch.float64, len(LAYOUT) - 1)])])
def test_one_all_reduce_and_none_in_one_process(world, wanted, tmp_path, monkeypatch):
    def body(rank):
        calls, all_reduce = [], dist.all_reduce
        model, put = model_on(1, world, 1)
        set_gradients(model, put)
        monkeypatch.setattr(dist, "all_reduce", lambda x: (calls.append((x.dtype, x.numel())), all_reduce(x)))
        clip_grad_norm(model.named_parameters(), 0.5)
        monkeypatch.undo()
        return calls

    assert run_ranks(world, body, tmp_path) == [wanted] * world


# ---- what is not finite ----------------------------------------------------------------------------------------------
def spoiled(name, *values):
    def spoil(whole):
        whole[name].view(-1)[-len(values):] = torch.tensor(values, dtype=torch.float64)
    return spoil


def one_rank_only(model):
    """A replica that has gone wrong by itself, on the last rank alone."""
    if dist.get_rank() == dist.get_world_size() - 1:
        model.router.grad.to_local()[0, 0] = math.nan


@pytest.mark.parametrize("mesh", [(2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 2, 2)], ids=str)
def test_a_bad_value_is_told_alike_on_all_ranks(mesh, tmp_path):
    nan, inf = math.nan, math.inf
    cases = [  # what goes wrong in the whole gradient or on this rank, the sentence's beginning
        (spoiled("embed", nan, -inf, nan), None, "gradient of embed: 2 NaN and 1 infinite of 42 values: lower"),
        (spoiled("attention", inf), None, "gradient of attention: 0 NaN and 1 infinite of 48 values: lower"),
        (spoiled("experts", nan, nan), None, "gradient of experts: 2 NaN and 0 infinite of 72 values: lower"),
        (spoiled("wide", nan), None, "gradient of wide: 1 NaN and 0 infinite of 4 values: lower"),
        (spoiled("norm", 0.0), one_rank_only, "gradient of router: 1 NaN and 0 infinite of 12 values: lower"),
    ]

    def body(rank):
        model, put = model_on(*mesh)
        sentences, moved = [], []
        for spoil, spoil_here, _ in cases:
            set_gradients(model, put, spoil=spoil)
            if spoil_here:
                spoil_here(model)
            before = {name: local(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
            with pytest.raises(NonFiniteGradient) as caught:
                clip_grad_norm(model.named_parameters(), 0.5, scale=8.0)
            sentences.append(str(caught.value))
            moved += [name for name, grad in before.items()
                      if not torch.equal(grad.view(torch.int64), local(getattr(model, name).grad).view(torch.int64))]
        return sentences, moved

    ranks = run_ranks(math.prod(mesh), body, tmp_path)
    for sentences, moved in ranks:
        assert sentences == ranks[0][0] and moved == []
    for sentence, (*_, beginning) in zip(ranks[0][0], cases, strict=True):
        assert sentence.startswith(beginning)


def test_a_partial_gradient_is_refused(tmp_path):
    def body(rank):
        model, put = model_on(1, 2, 1)
        set_gradients(model, put)
        mesh = model.router.device_mesh
        model.router.grad = DTensor.from_local(torch.ones(3, 4, dtype=torch.float64), mesh, [COPY, Partial(), COPY])
        with pytest.raises(ValueError, match=r"gradient of router: got placements .*wanted shards and replicas"):
            clip_grad_norm(model.named_parameters())

    run_ranks(2, body, tmp_path)


def test_one_rank_overflows_and_all_skip(tmp_path):
    def body(rank):
        model, put = model_on(1, 2, 1)
        scaler, norms = LossScaler(window=2), []
        for bad in (False, True, False, False):
            set_gradients(model, put)
            if bad and rank == 1:
                model.attention.grad.to_local()[0, 0] = math.inf
            norms.append(scaler.clip(model.named_parameters(), 0.5))
        return norms, scaler.state_dict()

    ranks = run_ranks(2, body, tmp_path)
    assert ranks[0] == ranks[1]
    norms, state = ranks[0]
    assert [norm is None for norm in norms] == [False, True, False, False]
    assert norms[2] == 2 * norms[0]
    assert state == {"scale": 2.0**16, "good_steps": 0, "tolerated": 0}


# ---- AdamW -----------------------------------------------------------------------------------------------------------
def three_steps(model, put, dtype):
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.1))
    for step in range(1, 4):
        set_gradients(model, put, step, dtype)
        clip_grad_norm(model.named_parameters(), 1.0)
        optimizer.step()
    return {name: whole(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize("mesh", [(2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 2, 2)], ids=str)
def test_adamw_on_any_mesh_steps_as_one_process(mesh, tmp_path):
    dtypes = {torch.float64: 1e-14, torch.float32: 1e-5}

    def body(rank):
        model, _ = model_on(*mesh)
        groups = [(group["name"], group["param_names"]) for group in param_groups(model, 0.1)]
        return groups, [three_steps(*model_on(*mesh, dtype), dtype) for dtype in dtypes]

    ranks = run_ranks(math.prod(mesh), body, tmp_path)
    for groups, steps in ranks:
        assert groups == [("decay", ["embed", "attention", "router", "wide", "experts"]),
                          ("no_decay", ["norm", "expert_bias", "unused"])]
        for (dtype, rtol), got, same in zip(dtypes.items(), steps, ranks[0][1], strict=True):
            assert all(torch.equal(got[name], p) for name, p in same.items())
            torch.testing.assert_close(got, three_steps(*one_process(dtype), dtype), rtol=rtol, atol=rtol / 10)
