"""Every layer of MegaBlocks against ours: one seed gives the same parameters, one input the same output, losses and
gradients; state dicts load both ways; so does expert parallelism on forked ranks."""

import dataclasses
import inspect
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_ranks
from upstream import DEVICE, megablocks

import moe_ext
from moe_ext.layers import arguments, moe, router

their_arguments, their_moe, their_router = (getattr(megablocks.layers, name) for name in ("arguments", "moe", "router"))

# Theirs cannot be built with fewer than 128 features in all experts of a rank; sparse ones need whole blocks of 128.
SMALL, BLOCK = dict(hidden_size=6, ffn_hidden_size=32), dict(hidden_size=128, ffn_hidden_size=128)
TOLERANCE = 2e-6 if DEVICE == "cpu" else 1e-5  # of a tensor's maximum, in fp32; a GPU's sums have other orders


def configure(module, mlp_impl="grouped", **changes):
    """Their Arguments refuse "sparse" with this Triton, needlessly in the interpreter: it is set afterwards. On a GPU
    they are right."""
    if mlp_impl == "sparse" and DEVICE != "cpu":
        pytest.skip("their sparse kernels do not run on a GPU with this Triton")
    base = dict(SMALL, moe_num_experts=4, moe_top_k=2, fp16=False, device=DEVICE)
    args = module.Arguments(**base | changes | {"mlp_impl": "grouped"})
    args.mlp_impl = mlp_impl
    return args


def build(name, changes):
    """Their layer and ours, each from seed 0 and in training mode, with a bias that is not zero."""
    layers = []
    for package, module in ((megablocks, their_arguments), (moe_ext, arguments)):
        torch.manual_seed(0)
        layer = getattr(package, name)(configure(module, **changes))
        if layer.experts.bias is not None:
            torch.nn.init.normal_(layer.experts.bias)
        for p in layer.parameters():
            p.data *= 20  # from small initial values, whose gradients would be roundoff
        layers.append(layer)
    return layers


def losses(layer, batched, z):
    args = layer.experts.args
    loss = batched(args)
    return loss + z(args).sum() if args.moe_zloss_weight else loss


def run(layer, x, batched, z):
    """{name: output, losses and every gradient} of one training step."""
    x = x.clone().requires_grad_()
    torch.manual_seed(7)  # for jitter
    out = layer(x)
    y, bias = out if isinstance(out, tuple) else (out, None)
    dy = torch.randn(y.shape, generator=torch.Generator(DEVICE).manual_seed(1))
    aux = losses(layer, batched, z)
    objective = (y * dy).sum() + (aux if torch.is_tensor(aux) else 0)
    objective = objective if bias is None else objective + (bias * dy.flatten(0, -2).sum(0)).sum()
    named = dict(layer.named_parameters(), x=x)
    grads = torch.autograd.grad(objective, list(named.values()))
    return {"y": y.detach(), "aux": torch.as_tensor(aux).detach()} | {
        f"d {n}": g for n, g in zip(named, grads, strict=True)
    }


def run_both(theirs, ours, x):
    want = run(theirs, x, their_moe.batched_load_balancing_loss, their_router.batched_router_zloss)
    got = run(ours, x, moe.batched_load_balancing_loss, router.batched_router_zloss)
    forget()
    return got, want


def forget():
    for module in (their_moe, moe):
        module.clear_load_balancing_loss()
    for module in (their_router, router):
        module.clear_router_zloss()


def assert_near(got, want):
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name] - want[name]).abs().max() / want[name].abs().max().clamp(min=1e-6)
        assert error <= TOLERANCE, f"{name}: {error:.1e}"


def clear_choice(layer, x):
    """Whether no token's logits tie, which would make two right answers."""
    logits = (x.flatten(0, 1) @ layer.router.layer.weight.T).sort().values
    return bool((logits.diff() > 1e-4).all())


GLU = dict(mlp_type="glu")
CASES = {
    "mlp": ("dMoE", dict()),
    "mlp, memory-optimised": ("dMoE", dict(memory_optimized_mlp=True)),
    "glu": ("dMoE", GLU),
    "glu, memory-optimised": ("dMoE", GLU | dict(memory_optimized_mlp=True)),
    "sparse mlp": ("dMoE", BLOCK | dict(mlp_impl="sparse")),
    "sparse mlp, memory-optimised": ("dMoE", BLOCK | dict(mlp_impl="sparse", memory_optimized_mlp=True)),
    "sparse glu": ("dMoE", BLOCK | GLU | dict(mlp_impl="sparse", activation_fn=F.silu)),
    "silu": ("dMoE", dict(activation_fn=F.silu)),
    "swiglu": ("dMoE", GLU | dict(activation_fn=F.silu)),
    "exact geglu": ("dMoE", GLU | dict(activation_fn=F.gelu)),
    "relu": ("dMoE", dict(activation_fn=F.relu)),
    "another activation": ("dMoE", GLU | dict(activation_fn=torch.tanh)),
    "top 1": ("dMoE", dict(moe_top_k=1)),
    "every expert": ("dMoE", dict(moe_top_k=4)),
    "one expert": ("dMoE", dict(moe_num_experts=1, moe_top_k=1, ffn_hidden_size=128)),
    "normalised by 1": ("dMoE", dict(moe_normalize_expert_weights=1)),
    "normalised by 2": ("dMoE", dict(moe_normalize_expert_weights=2.0)),
    "uniform": ("dMoE", dict(uniform_expert_assignment=True)),
    "jitter": ("dMoE", dict(moe_jitter_eps=0.01)),
    "no bias": ("dMoE", dict(bias=False)),
    "bias added": ("dMoE", dict(return_bias=False)),
    "z-loss": ("dMoE", dict(moe_zloss_weight=0.1, moe_zloss_in_fp32=True, moe_lbl_in_fp32=True)),
    "no balance loss": ("dMoE", dict(moe_loss_weight=0)),
    "shared": ("dMoE", dict(shared_expert=True, return_bias=False, shared_expert_hidden_size=5)),
    "shared glu, weighted": ("dMoE", GLU | dict(shared_expert=True, bias=False, shared_expert_weighted_sum=True)),
    "capacity 1": ("MoE", dict()),
    "capacity 0.5": ("MoE", dict(moe_capacity_factor=0.5, moe_top_k=1)),
    "capacity 0": ("MoE", dict(moe_capacity_factor=0)),
    "capacity, shared": ("MoE", dict(shared_expert=True, return_bias=False, activation_fn=F.silu)),
}


@pytest.mark.parametrize("case", CASES)
def test_layer(case):
    theirs, ours = build(*CASES[case])
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), f"{name}: one seed, different numbers"
    x = torch.randn(4, 2, theirs.experts.args.hidden_size)
    assert clear_choice(theirs, x)
    got, want = run_both(theirs, ours, x)
    assert_near(got, want)


@pytest.mark.parametrize("name", ["MoE", "dMoE"])
def test_state_dict_loads_both_ways(name):
    x = torch.randn(3, 2, 6)
    theirs, ours = build(name, GLU | dict(shared_expert=True, return_bias=False))
    for source, target in ((theirs, ours), (ours, theirs)):
        for p in source.parameters():
            torch.nn.init.normal_(p, std=0.3)
        target.load_state_dict(source.state_dict(), strict=True)
        assert_near(*run_both(theirs, ours, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_seed_in_half_precision(dtype):
    theirs, ours = build("dMoE", GLU | dict(fp16=dtype == torch.float16, bf16=dtype == torch.bfloat16))
    for name, tensor in theirs.state_dict().items():
        assert tensor.dtype == dtype and torch.equal(tensor, ours.state_dict()[name])


def test_router():
    theirs, ours = build("dMoE", dict(moe_top_k=3))
    x = torch.randn(5, 2, 6)
    for got, want in zip(ours.router(x), theirs.router(x), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        assert torch.equal(got, want) if got.dtype == torch.int64 else torch.allclose(got, want, atol=1e-6)


def test_losses_of_several_layers():
    """The balance loss over a stack of layers, and the z-loss, which is a vector of one value for each router."""
    changes = dict(num_layers=2, moe_loss_weight=0.2, moe_zloss_weight=0.3)
    x = torch.randn(4, 2, 6)
    theirs, ours = zip(build("dMoE", changes), build("MoE", changes), strict=True)
    for layer in (*theirs, *ours):
        layer(x)
    args = configure(arguments, **changes)
    torch.testing.assert_close(moe.batched_load_balancing_loss(args), their_moe.batched_load_balancing_loss(args))
    torch.testing.assert_close(router.batched_router_zloss(args), their_router.batched_router_zloss(args))
    wrong = dataclasses.replace(args, num_layers=3)
    for module in (moe, their_moe):
        with pytest.raises(ValueError):
            module.batched_load_balancing_loss(wrong)
    forget()
    for layer in (theirs[0].eval(), ours[0].eval()):
        layer(x)
    assert moe.get_load_balancing_loss() == their_moe.get_load_balancing_loss() == []
    assert len(their_router._ROUTER_LOGITS) == 1
    with pytest.raises(ValueError, match="no router saved"):
        router.batched_router_zloss(args)
    forget()
    for module in (router, their_router):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert module.batched_router_zloss(configure(arguments)) == 0 and len(caught) == 1


def test_losses_of_several_forwards():
    """Before a clear: the same values in the same order, and another layer's statistics beside them."""
    changes = dict(num_layers=2, moe_zloss_weight=0.3)
    theirs, ours = zip(build("dMoE", changes), build("MoE", changes), strict=True)
    for x in torch.randn(2, 4, 2, 6):
        for layer in (*theirs, *ours):
            layer(x)
    args = configure(arguments, **changes)
    torch.testing.assert_close(router.batched_router_zloss(args), their_router.batched_router_zloss(args))
    for module in (moe, their_moe):
        module.save_load_balancing_loss((torch.ones(4, dtype=torch.int32), torch.ones(8, 4)))
    for got, want in zip(moe.get_load_balancing_loss(), their_moe.get_load_balancing_loss(), strict=True):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)
    forget()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_losses(reentrant):
    """Theirs save again in backward, and without a gradient where reentrant; ours are refused there."""
    changes = dict(moe_zloss_weight=0.3, bias=False)
    theirs, ours = build("dMoE", changes)
    x = torch.randn(4, 2, 6)
    assert clear_choice(theirs, x)
    want = run(theirs, x, their_moe.batched_load_balancing_loss, their_router.batched_router_zloss)
    forget()

    class Recomputed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.experts = ours, ours.experts

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=reentrant)

        def named_parameters(self):
            return self.layer.named_parameters()

    def recompute():
        return run(Recomputed(), x, moe.batched_load_balancing_loss, router.batched_router_zloss)

    if reentrant:
        with pytest.raises(ValueError, match="use_reentrant=False"):
            recompute()
    else:
        assert_near(recompute(), want)
    forget()


def test_arguments_and_names():
    want = {f.name: f for f in dataclasses.fields(their_arguments.Arguments)}
    got = {f.name: f for f in dataclasses.fields(arguments.Arguments)}
    assert got.keys() == want.keys()
    functions = ("activation_fn", "init_method", "output_layer_init_method")
    for name in functions:
        a, b = got[name].default, want[name].default
        assert (a.func, a.args, a.keywords) == (b.func, b.args, b.keywords)
    different = [n for n in want if n not in functions and got[n].default != want[n].default]
    assert different == ["mlp_impl"]  # "grouped" here, as in the versions after 0.10.0
    assert [name for name in megablocks.__all__ if not hasattr(moe_ext, name)] == []
    for layer in ("MoE", "dMoE"):
        assert inspect.signature(getattr(moe_ext, layer)).parameters.keys() == {"args"}


PARALLEL = {
    "experts": (2, "dMoE", GLU),
    "features": (2, "dMoE", dict(moe_num_experts=1, moe_top_k=1, ffn_hidden_size=256)),
    "experts and features": (4, "dMoE", GLU | dict(moe_num_experts=2, ffn_hidden_size=128)),
    "capacity 0": (2, "MoE", dict(moe_capacity_factor=0)),
    "capacity 0.5": (2, "MoE", dict(moe_capacity_factor=0.5, moe_top_k=1)),
}


@pytest.mark.skipif(DEVICE != "cpu", reason="the ranks are forked, which CUDA does not survive")
@pytest.mark.parametrize("case", PARALLEL)
def test_expert_parallel(case, tmp_path):
    world, name, changes = PARALLEL[case]

    def body(rank):
        theirs, ours = build(name, changes | dict(moe_expert_model_parallelism=True))
        for key, tensor in theirs.state_dict().items():
            assert torch.equal(tensor, ours.state_dict()[key]), key
        for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
            assert getattr(p, "expert_model_parallel", None) == getattr(q, "expert_model_parallel", None)
        x = torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(rank))
        got, want = run_both(theirs, ours, x)
        assert_near(got, want)
        return dist.get_world_size()

    assert run_ranks(world, body, tmp_path) == [world] * world
