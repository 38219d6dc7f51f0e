"""The drop-in layers against a loop over experts, in the widest dtype of the device: output and every gradient; losses,
the defects of the layers that they replace, expert parallelism on forked ranks, and torch.compile."""

import copy
import dataclasses
import io
import math
import types
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from devices import widest
from ranks import run_ranks
from torch.utils.checkpoint import checkpoint

import moe_ext
from moe_ext.layers import MoE, activation_fn, all_to_all, arguments, common, dMoE, gelu, mlp, moe, mpu, router, saved
from moe_ext.layers.arguments import Arguments

D, HIDDEN, E, T = 6, 10, 5, 14


@pytest.fixture(autouse=True)
def fresh(request):
    """Everything is made on the test's device (the CPU where a test names none), in fp64 where the ops have it; one
    seed, no statistics left over."""
    device = request.getfixturevalue("device") if "device" in request.fixturenames else "cpu"
    torch.manual_seed(0)
    torch.set_default_dtype(widest(device))
    torch.set_default_device(device)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    forget()


def forget():
    moe.clear_load_balancing_loss()
    router.clear_router_zloss()


def arguments_(**changes):
    wide = partial(torch.nn.init.normal_, std=0.5)  # away from ties and from zero
    base = dict(hidden_size=D, ffn_hidden_size=HIDDEN, moe_num_experts=E, moe_top_k=2, fp16=False,
                device=torch.get_default_device(), init_method=wide, output_layer_init_method=wide)  # fmt: skip
    return Arguments(**base | changes)


def layer_(cls, **changes):
    layer = cls(arguments_(**changes))
    if layer.experts.bias is not None:
        torch.nn.init.normal_(layer.experts.bias)
    return layer


def expert_matrices(layer):
    """w1_EDF, v1_EDF or None, w2_EFD of either layout."""
    w = {name: p for name, p in layer.experts.mlp.named_parameters()}
    if isinstance(layer, dMoE):
        experts = layer.experts.args.moe_num_experts
        w = {name: p.view(experts, -1, p.shape[1]) for name, p in w.items()}
        return w["w1"].mT, w["v1"].mT if "v1" in w else None, w["w2"]
    return w["w1"], None, w["w2"]


def dense(layer, x):
    """(y, scores_TE, counts_E): what the layer's configuration says, one token and one expert at a time."""
    args = layer.experts.args
    x_TD = x.reshape(-1, x.shape[-1])
    scores_TE = (x_TD @ layer.router.layer.weight.T).softmax(-1)
    weights_TK, ids_TK = scores_TE.topk(args.moe_top_k)
    if args.moe_normalize_expert_weights:
        weights_TK = weights_TK / weights_TK.norm(p=args.moe_normalize_expert_weights, dim=1, keepdim=True)
    if args.uniform_expert_assignment:
        ids_TK = torch.arange(ids_TK.numel()).view_as(ids_TK) % args.moe_num_experts
    counts_E = ids_TK.flatten().bincount(minlength=args.moe_num_experts)
    capacity = 0 if isinstance(layer, dMoE) else layer.experts.expert_capacity(len(x_TD))
    room = [capacity or len(x_TD)] * args.moe_num_experts
    w1_EDF, v1_EDF, w2_EFD = expert_matrices(layer)
    rows = []
    for x_D, ids, weights in zip(x_TD, ids_TK.tolist(), weights_TK, strict=True):
        y_D = torch.zeros_like(x_D)
        for e, weight in zip(ids, weights, strict=True):
            if room[e]:
                room[e] -= 1
                h_F = args.activation_fn(x_D @ w1_EDF[e])
                h_F = h_F if v1_EDF is None else h_F * (x_D @ v1_EDF[e])
                y_D = y_D + weight * (h_F @ w2_EFD[e])
        rows.append(y_D)
    y = torch.stack(rows).view(x.shape)
    bias = layer.experts.bias
    y = y if bias is None else y + bias
    if layer.shared_expert is not None:
        s = layer.shared_expert
        h = s.act(s.up_proj(x)) if args.mlp_type == "mlp" else s.act(s.gate_proj(x)) * s.up_proj(x)
        k = args.moe_top_k
        y = (s.down_proj(h) + k * y) / (k + 1) if args.shared_expert_weighted_sum else s.down_proj(h) + y
    return y, scores_TE, counts_E


def gradients(y, x, layer):
    tensors = dict(layer.named_parameters(), x=x)
    dy = torch.randn(y.shape, generator=torch.Generator("cpu").manual_seed(1), dtype=torch.float64, device="cpu").to(y)
    return dict(zip(tensors, torch.autograd.grad(y, list(tensors.values()), dy), strict=True))


def assert_near(got, want, tolerance=None):
    """Of each tensor's maximum; 1e-12 in fp64, 2e-5 in fp32."""
    tolerance = tolerance or (1e-12 if torch.get_default_dtype() == torch.float64 else 2e-5)
    assert got.keys() == want.keys()
    for name in want:
        error = (got[name] - want[name]).abs().max() / want[name].abs().max().clamp(min=1e-3)
        assert error <= tolerance, f"{name}: {error:.2e}"


def cube(x):
    """An activation that no kernel knows."""
    return x * x * x


CASES = {
    "plain": dict(),
    "glu": dict(mlp_type="glu"),
    "sparse": dict(mlp_impl="sparse"),
    "sparse glu, memory-optimised": dict(mlp_impl="sparse", mlp_type="glu", memory_optimized_mlp=True),
    "silu": dict(activation_fn=F.silu),
    "swiglu": dict(activation_fn=torch.nn.SiLU(), mlp_type="glu"),
    "exact gelu": dict(activation_fn=F.gelu),
    "exact geglu": dict(activation_fn=torch.nn.GELU(), mlp_type="glu"),
    "relu": dict(activation_fn=torch.relu),
    "gated relu": dict(activation_fn=F.relu, mlp_type="glu"),
    "unknown activation": dict(activation_fn=cube),
    "unknown gate": dict(activation_fn=cube, mlp_type="glu"),
    "top 1": dict(moe_top_k=1),
    "every expert": dict(moe_top_k=E),
    "one expert": dict(moe_num_experts=1, moe_top_k=1),
    "p-norm 1": dict(moe_normalize_expert_weights=1),
    "p-norm 2": dict(moe_normalize_expert_weights=2.0),
    "uniform": dict(uniform_expert_assignment=True),
    "no bias": dict(bias=False),
    "bias apart": dict(return_bias=True),
    "shared": dict(shared_expert=True, shared_expert_hidden_size=7),
    "shared glu, bias apart": dict(shared_expert=True, mlp_type="glu", return_bias=True),
    "shared, weighted, bias apart": dict(shared_expert=True, shared_expert_weighted_sum=True, return_bias=True),
}
LAYERS = [(dMoE, name, case) for name, case in CASES.items()]
LAYERS += [(MoE, f"{name}, capacity {c}", case | {"moe_capacity_factor": c})
           for name, case in CASES.items() for c in (0, 0.6, 1) if "glu" not in str(case)]  # fmt: skip


@pytest.mark.parametrize("cls, case", [pytest.param(c, k, id=f"{c.__name__}-{name}") for c, name, k in LAYERS])
def test_layer_equals_loop(cls, case, device):
    layer = layer_(cls, return_bias=False, **case) if "return_bias" not in case else layer_(cls, **case)
    x = torch.randn(T // 2, 2, D, requires_grad=True)
    y = layer(x)
    y = y[0] + y[1] if layer.experts.args.return_bias and layer.experts.bias is not None else y
    want, scores_TE, counts_E = dense(layer, x)
    assert_near({"y": y} | gradients(y, x, layer), {"y": want} | gradients(want, x, layer))
    ((counts, scores),) = moe.get_load_balancing_loss()
    assert counts.tolist() == counts_E.tolist()
    assert_near({"scores": scores}, {"scores": scores_TE})


@pytest.mark.parametrize("cls", [MoE, dMoE])
def test_grouped_and_sparse_give_the_same_bits(cls, device):
    x = torch.randn(T, 1, D)
    outputs = []
    for impl in ("grouped", "sparse"):
        torch.manual_seed(3)
        outputs.append(cls(arguments_(mlp_impl=impl, bias=False))(x))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("cls", [MoE, dMoE])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
def test_lower_precision(cls, dtype, tolerance, device):
    """fp32, bf16 and fp16 layers stay near the loop in fp64 with the same (rounded) weights and choices."""
    torch.set_default_dtype(torch.float32)
    changes = dict(fp16=dtype == torch.float16, bf16=dtype == torch.bfloat16, uniform_expert_assignment=True)
    layer = layer_(cls, return_bias=False, **changes)
    assert {p.dtype for p in layer.parameters()} == {dtype} == {common.dtype(layer.experts.args) or torch.float32}
    x = torch.randn(T, 1, D).to(dtype).requires_grad_()
    got = {"y": layer(x)}
    got |= gradients(got["y"], x, layer)
    assert {g.dtype for g in got.values()} == {dtype}
    oracle, x64 = layer_(cls, **changes).double(), x.detach().double().requires_grad_()
    oracle.load_state_dict(layer.state_dict())
    want, _, _ = dense(oracle, x64)
    assert_near(got, {"y": want} | gradients(want, x64, oracle), tolerance)


@pytest.mark.parametrize("cls", [MoE, dMoE])
def test_autocast(cls, device):
    torch.set_default_dtype(torch.float32)
    layer, x = layer_(cls, return_bias=False, uniform_expert_assignment=True), torch.randn(T, 1, D)
    want = layer(x)
    with torch.autocast(device, torch.bfloat16):
        got = layer(x)
        assert layer.router(x)[0].dtype == torch.float32
    assert_near({"y": got}, {"y": want}, 4e-2)


@pytest.mark.parametrize("cls", [MoE, dMoE])
def test_zero_tokens(cls, device):
    layer = layer_(cls, return_bias=False, moe_zloss_weight=0.1, moe_capacity_factor=0)
    x = torch.randn(0, 1, D, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    loss = moe.batched_load_balancing_loss(layer.experts.args) + router.batched_router_zloss(layer.experts.args).sum()
    (y.sum() + loss).backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("memory_optimized_mlp", [False, True])
def test_keeps_only_the_input_and_the_preactivation(memory_optimized_mlp, device):
    """No copy of a weight, no activation: bytes * (T*D + N*2F) and what has T*E elements or fewer."""
    size = torch.get_default_dtype().itemsize
    layer = layer_(dMoE, mlp_type="glu", hidden_size=40, memory_optimized_mlp=memory_optimized_mlp, return_bias=False)
    x, kept = torch.randn(T, 1, 40, requires_grad=True), {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    for parameter in layer.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    assert sorted(n for n in kept.values() if n > size * T * E) == [size * T * 40, size * T * 2 * 2 * HIDDEN]
    y.sum().backward()


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_load_balancing_loss(device):
    args = arguments_(num_layers=2, moe_loss_weight=0.3)
    layers, x = [dMoE(args), MoE(args)], torch.randn(T, 1, D)
    saved = [dense(layer, x)[1:] for layer in layers]
    for layer in layers:
        layer(x)
    want = 0.3 * E / (2 * T * 2) * sum(scores_TE.mean(0) @ counts_E.to(scores_TE) for scores_TE, counts_E in saved)
    got = moe.batched_load_balancing_loss(args)
    weights = [layer.router.layer.weight for layer in layers]
    assert_near({"loss": got, **dict(enumerate(torch.autograd.grad(got, weights, retain_graph=True)))},
                {"loss": want, **dict(enumerate(torch.autograd.grad(want, weights)))})  # fmt: skip
    each = [
        layer.experts.load_balancing_loss(c, s)
        for layer, (c, s) in zip(layers, moe.get_load_balancing_loss(), strict=True)
    ]
    assert_near({"sum": 0.3 / 2 * sum(each)}, {"sum": want})
    with pytest.raises(ValueError, match=r"2 layers saved .* 1 were expected"):
        moe.batched_load_balancing_loss(dataclasses.replace(args, num_layers=1))
    stage = dataclasses.replace(args, num_layers=8, num_layers_per_virtual_pipeline_stage=2)
    assert_near({"loss": moe.batched_load_balancing_loss(stage)}, {"loss": want / 4})
    assert moe.batched_load_balancing_loss(dataclasses.replace(args, moe_loss_weight=0)) == 0
    moe.clear_load_balancing_loss()
    assert moe.get_load_balancing_loss() == []
    layers[0].eval()(x)
    assert moe.get_load_balancing_loss() == []


def test_load_balancing_loss_counts_beyond_256_in_bf16(device):
    """bf16 has no 257: a count must not pass through the scores' dtype."""
    args = arguments_(moe_num_experts=2, moe_top_k=1, num_layers=1, moe_loss_weight=1.0)
    scores_TE = torch.tensor([[0.75, 0.25]], dtype=torch.bfloat16).expand(514, 2)
    moe.save_load_balancing_loss((torch.tensor([257, 257], dtype=torch.int32), scores_TE))
    assert moe.batched_load_balancing_loss(args) == 1.0


def test_router_zloss(device):
    args = arguments_(moe_zloss_weight=0.01)
    layers, x = [MoE(args), dMoE(args)], torch.randn(T, 1, D)
    for layer in layers:
        layer(x)
    logits = [x.view(T, D) @ layer.router.layer.weight.T for layer in layers]
    want = torch.stack([0.01 * z.logsumexp(1).square().mean() for z in logits])
    assert_near({"z": router.batched_router_zloss(args)}, {"z": want})
    router.clear_router_zloss()
    with pytest.raises(ValueError, match="no router saved its logits since the last clear_router_zloss"):
        router.batched_router_zloss(args)
    with pytest.warns(UserWarning, match="moe_zloss_weight is 0"):
        assert router.batched_router_zloss(arguments_()) == 0


def losses(args):
    return moe.batched_load_balancing_loss(args) + router.batched_router_zloss(args).sum()


def test_only_training_with_gradients_saves(device):
    """Batches of validation between two steps change no loss."""
    args = arguments_(moe_zloss_weight=0.01)
    layer, x = dMoE(args), torch.randn(T, 1, D)
    layer(x)
    want = losses(args)
    forget()
    layer.eval()(100 * x)
    with torch.no_grad():
        layer.train()(100 * x)
    torch.export.export(layer, (100 * x,))
    layer(x)
    assert torch.equal(losses(args), want)


def test_losses_keep_their_order(device):
    """Of several forwards of several layers, as in a list that grows; what is saved by hand comes last."""
    args = arguments_(moe_zloss_weight=1, num_layers=5)
    layers, x = [dMoE(args), MoE(args)], torch.randn(3, T, 1, D)
    for batch in x[:2]:
        for layer in layers:
            layer(batch)
    logits = [batch.view(T, D) @ layer.router.layer.weight.T for batch in x[:2] for layer in layers]
    want = torch.stack([z.logsumexp(1).square().mean() for z in logits])
    assert_near({"z": router.batched_router_zloss(args)}, {"z": want})
    scores = [z.softmax(1) for z in logits]
    assert_near(dict(enumerate(s for _, s in moe.get_load_balancing_loss())), dict(enumerate(scores)))
    mine = (torch.ones(E, dtype=torch.int32), torch.rand(T, E))
    moe.save_load_balancing_loss(mine)
    assert moe.get_load_balancing_loss()[-1] is mine
    moe.batched_load_balancing_loss(args)
    moe.clear_load_balancing_loss()
    assert moe.get_load_balancing_loss() == []


def test_whoever_never_clears_keeps_a_bounded_number(device):
    layer, x = layer_(dMoE, moe_zloss_weight=0.01), torch.randn(T, 1, D)
    for forwards in range(1, 3 * saved.KEPT):
        layer(x)
        if forwards == saved.KEPT:
            assert len(moe.get_load_balancing_loss()) == forwards
            assert len(router.batched_router_zloss(layer.experts.args)) == forwards
    assert len(layer.router.saved.records) == len(layer.experts.saved.records) == saved.KEPT + 1
    for read, name in ((moe.get_load_balancing_loss, "load_balancing_loss"),
                       (lambda: router.batched_router_zloss(layer.experts.args), "router_zloss")):  # fmt: skip
        with pytest.raises(ValueError, match=f"more than {saved.KEPT} forwards, .* call clear_{name}\\(\\) after each"):
            read()
    forget()
    layer(x)
    assert len(moe.get_load_balancing_loss()) == 1


def test_a_copied_layer_saves_for_itself():
    """deepcopy and pickle work between forward and clear; what a layer saved goes with it."""
    layer, x = layer_(dMoE), torch.randn(T, 1, D)
    layer(x)
    twin = copy.deepcopy(layer)
    torch.save(layer, file := io.BytesIO())
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert len(moe.get_load_balancing_loss()) == 1
    twin(x)
    loaded(x)
    (_, first), *rest = moe.get_load_balancing_loss()
    assert len(rest) == 2 and all(torch.equal(first, scores) for _, scores in rest)
    del twin, loaded, rest
    assert len(moe.get_load_balancing_loss()) == 1


@pytest.mark.parametrize("clear_before_backward", [True, False])
@pytest.mark.parametrize("cls", [MoE, dMoE])
def test_losses_of_a_checkpointed_layer(cls, clear_before_backward, device):
    """Recomputation saves nothing: three steps have the gradients of the layer that keeps its activations."""
    args = arguments_(moe_zloss_weight=0.01, return_bias=False)
    layer = cls(args)

    def steps(forward):
        for x in batches:
            layer.zero_grad()
            loss = forward(x).square().mean() + losses(args)
            if clear_before_backward:
                forget()
            loss.backward()
            if not clear_before_backward:
                forget()
            yield {name: p.grad.clone() for name, p in layer.named_parameters()}

    batches = [torch.randn(T, 1, D, requires_grad=True) for _ in range(3)]
    want = list(steps(layer))
    for g, w in zip(steps(lambda x: checkpoint(layer, x, use_reentrant=False)), want, strict=True):
        assert_near(g, w)


@pytest.mark.parametrize("name", ["balance loss", "z-loss"])
def test_a_reentrant_checkpoint_is_refused(name, device):
    """Its forward runs without gradients: the losses have none to give, and say so."""
    args = arguments_(moe_zloss_weight=0.01 if name == "z-loss" else 0, moe_loss_weight=0.1 if name != "z-loss" else 0,
                      return_bias=False)  # fmt: skip
    y = checkpoint(dMoE(args), torch.randn(T, 1, D, requires_grad=True), use_reentrant=True)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        losses(args)
    with pytest.raises(RuntimeError, match=f"the {name} would get no gradient .* Pass use_reentrant=False"):
        y.sum().backward()


def test_the_example_in_readme():
    """It runs, its router learns from the balance loss, and it leaves nothing behind."""
    torch.set_default_dtype(torch.float32)
    text = (Path(__file__).parents[1] / "README.md").read_text().partition("## An MoE layer in your own model")[2]
    exec(text.partition("```python\n")[2].partition("```")[0], example := {"__name__": "example"})
    assert example["loss"].isfinite() and moe.get_load_balancing_loss() == []
    assert all(p.grad.any() for p in example["model"].parameters())


# ---- padding ---------------------------------------------------------------------------------------------------------

MASKED = {
    "dMoE": (dMoE, dict(mlp_type="glu")),
    "unknown activation": (dMoE, dict(activation_fn=cube)),
    "capacity 0": (MoE, dict(moe_capacity_factor=0)),
    "capacity 1": (MoE, dict()),
    "capacity 0.6, bias apart": (MoE, dict(moe_capacity_factor=0.6, return_bias=True)),
    "shared, weighted": (dMoE, dict(shared_expert=True, shared_expert_weighted_sum=True)),
}


@pytest.mark.parametrize("pads", ["nan", "many", "none", "all"])
@pytest.mark.parametrize("case", MASKED)
def test_masked_tokens_are_as_if_they_were_not_there(case, pads, device):
    cls, changes = MASKED[case]
    layer = layer_(cls, **dict(return_bias=False, moe_zloss_weight=0.01) | changes)
    args = layer.experts.args
    mask = {"none": torch.ones(3, 40), "all": torch.zeros(3, 40)}.get(pads, torch.rand(3, 40) < 0.2).bool()
    x = torch.randn(3, 40, D)
    if pads == "nan":
        x[~mask] = torch.nan
    x.requires_grad_()

    def run(*inputs):
        y = layer(*inputs)
        y, bias = y if args.return_bias else (y, None)
        loss, number = losses(args), len(moe.get_load_balancing_loss()[0][1])
        forget()
        return y, bias, loss, number

    y, bias, loss, number = run(x, mask)
    want_y, _, want_loss, want_number = run(x[mask])
    assert number == want_number == mask.sum()
    pads = layer.shared_expert(torch.zeros_like(x)) / 3 if layer.shared_expert else torch.zeros_like(x)
    whole = torch.where(mask.unsqueeze(2), torch.zeros_like(x).masked_scatter(mask.unsqueeze(2), want_y), pads)
    assert (bias is layer.experts.bias) if args.return_bias else bias is None
    tensors = dict(layer.named_parameters(), x=x)
    dy = torch.randn(want_y.shape)
    got, want = [
        dict(zip(tensors, torch.autograd.grad((part * dy).sum() + aux, list(tensors.values()), allow_unused=True,
                                              materialize_grads=True), strict=True))
        for part, aux in ((y[mask], loss), (want_y, want_loss))
    ]  # fmt: skip
    assert_near({"y": y, "loss": loss} | got, {"y": whole, "loss": want_loss} | want)


def test_padding_in_front_takes_no_capacity(device):
    """Behind 96 pads of one kind, 32 tokens lose what they lose alone, and the balance loss is theirs."""
    layer = layer_(MoE, moe_num_experts=4, return_bias=False, bias=False)
    tokens, pads = torch.randn(32, 1, D), torch.randn(D).expand(96, 1, D)
    padded = torch.cat([pads, tokens])
    mask = torch.arange(128).ge(96).unsqueeze(1)
    args = layer.experts.args

    def run(*inputs):
        y, loss = layer(*inputs), moe.batched_load_balancing_loss(args)
        forget()
        return y[-32:], loss

    want, got, blind = run(tokens), run(padded, mask), run(padded)
    assert_near(dict(enumerate(got)), dict(enumerate(want)))
    assert not torch.allclose(blind[0], want[0]) and not torch.allclose(blind[1], want[1])


def test_a_wrong_mask_is_refused():
    layer, x = layer_(MoE), torch.randn(T, 2, D)
    with pytest.raises(TypeError, match=r"MoE: token_mask is torch.int64, wanted torch.bool, True for a real token"):
        layer(x, torch.ones(T, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"MoE: token_mask \(14,\) must have the shape of x .*, \(14, 2\)"):
        layer(x, token_mask=torch.ones(T, dtype=torch.bool))


def test_jitter_only_in_training(device):
    layer = layer_(dMoE, moe_jitter_eps=0.3)
    x = torch.randn(T, 1, D)
    noise = layer.router.jitter(x)
    assert 0.7 <= noise.min() < 0.8 and 1.2 < noise.max() < 1.3
    torch.manual_seed(5)
    got = layer.router(x)[0]
    torch.manual_seed(5)
    assert_near({"scores": got}, {"scores": layer.router.eval()(x * layer.router.jitter(x))[0]})


# ---- the door --------------------------------------------------------------------------------------------------------


def test_default_arguments_run_on_the_cpu():
    layer = dMoE(Arguments(hidden_size=16, ffn_hidden_size=32, moe_num_experts=4, shared_expert=True, device="cpu"))
    assert {p.dtype for p in layer.parameters()} == {torch.float16}
    y, bias = layer(torch.randn(3, 2, 16).half())
    assert y.dtype == bias.dtype == torch.float16 and y.isfinite().all()


def test_default_device(monkeypatch):
    monkeypatch.setattr(moe_ext, "has_cuda", lambda: False)
    assert Arguments().device == torch.device("cpu")
    monkeypatch.setattr(moe_ext, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert Arguments().device == torch.device("cuda:3")


def test_wrong_dtype_says_what_to_do():
    with pytest.raises(TypeError, match=r"dMoE: x is torch.float32, the layer torch.float16.*fp16=False"):
        dMoE(arguments_(fp16=True))(torch.randn(T, 1, D, dtype=torch.float32))


@pytest.mark.parametrize("changes, message", [
    (dict(mlp_type="gul"), "Unsupported mlp type: 'gul'; use one of"),
    (dict(mlp_impl="dense"), "mlp does not support mlp_impl='dense'; use one of"),
])  # fmt: skip
def test_unknown_mlp(changes, message):
    with pytest.raises(ValueError, match=message):
        dMoE(arguments_(**changes))


@pytest.mark.parametrize("p", [1, 2.0])
def test_normalising_a_single_weight_is_refused(p):
    with pytest.raises(ValueError, match=f"moe_normalize_expert_weights={p} with moe_top_k=1 .* no gradient"):
        dMoE(arguments_(moe_top_k=1, moe_normalize_expert_weights=p))
    dMoE(arguments_(moe_top_k=1, moe_normalize_expert_weights=p, moe_num_experts=1))  # has nothing to route
    layer, x = layer_(dMoE, moe_top_k=1, return_bias=False), torch.randn(T, 1, D)
    layer(x).sum().backward()
    assert layer.router.layer.weight.grad.abs().max() > 1e-3


def test_gated_experts_with_a_capacity_are_refused():
    with pytest.raises(ValueError, match=r"MoE: mlp_type='glu' would change nothing.* Use dMoE"):
        MoE(arguments_(mlp_type="glu"))
    MoE(arguments_(mlp_type="glu", shared_expert=True))  # the shared expert is gated


def test_wrong_width():
    with pytest.raises(ValueError, match=r"MoE: x \(3, 1, 5\) must end in hidden_size=6"):
        MoE(arguments_())(torch.randn(3, 1, 5))


def test_top_k_beyond_experts():
    with pytest.raises(RuntimeError, match=r"router.*k"):
        layer_(dMoE, moe_top_k=E + 1)(torch.randn(T, 1, D))


def test_from_megatron():
    theirs = types.SimpleNamespace(hidden_size=8, ffn_hidden_size=24, fp16=False, moe_top_k=3, sequence_parallel=True)
    args = arguments.from_megatron(theirs)
    assert (args.hidden_size, args.ffn_hidden_size, args.fp16, args.moe_top_k) == (8, 24, False, 3)
    assert args.shared_expert_hidden_size == 24


def test_gelu_and_act_fn(device):
    x, dy = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    y, backward = activation_fn.act_fn(x, gelu.gelu, return_grad_fn=True)
    backward(dy)
    assert torch.equal(y, F.gelu(x, approximate="tanh"))
    assert_near({"dx": gelu.gelu_backward_(dy.clone(), x.detach())}, {"dx": x.grad})


def test_custom_linear_for_the_shared_expert(device):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    changes = dict(shared_expert=True, bias=False, activation_fn=F.relu)
    plain, doubled = layer_(dMoE, **changes), layer_(dMoE, fc_cls=Doubled, **changes)
    doubled.load_state_dict(plain.state_dict())
    x = torch.randn(T, 1, D)
    assert_near({"y": doubled.shared_expert(x)}, {"y": 4 * plain.shared_expert(x)})
    assert plain.shared_expert.down_proj._is_residual


# ---- torch.compile and torch.export ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls, changes", [(dMoE, dict(mlp_type="glu")), (MoE, {})])
def test_compile_without_graph_breaks(cls, changes, device):
    torch._dynamo.reset()
    layer = layer_(cls, return_bias=False, moe_zloss_weight=0.1, **changes)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (T, T + 3):
        x = torch.randn(tokens, 1, D, requires_grad=True)
        want = layer(x)
        got = compiled(x)
        assert_near({"y": got} | gradients(got, x, layer), {"y": want} | gradients(want, x, layer))


@pytest.mark.parametrize("cls, clear", [(dMoE, True), (MoE, False)])
def test_layers_compile_once(cls, clear, device):
    """24 layers, 100 steps, one graph, whether somebody clears or not; the losses have their gradients."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    args = arguments_(num_layers=24, moe_zloss_weight=0.01, return_bias=False, init_method=torch.nn.init.normal_)
    layers = torch.nn.ModuleList(cls(args) for _ in range(24))
    for layer in layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    for _ in range(100):
        for layer in layers:
            layer(torch.randn(3, 1, D))
        if clear:
            loss = losses(args)
            forget()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    if clear:
        loss.backward()
        assert all(layer.router.layer.weight.grad.abs().max() > 0 for layer in layers)


def test_a_model_compiles_once(device):
    """Layers in one graph train as they do in eager mode."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    args = arguments_(num_layers=3, moe_zloss_weight=0.01, return_bias=False, bias=False)
    model = torch.nn.Sequential(dMoE(args), MoE(args), dMoE(args))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(10):
        x = torch.randn(T, 1, D, requires_grad=True)
        results = []
        for forward in (compiled, model):
            results.append(gradients(forward(x) + losses(args), x, model))
            forget()
        assert_near(*results)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compile_with_a_mask(device):
    torch._dynamo.reset()
    layer = layer_(MoE, return_bias=False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, mask = torch.randn(T, 1, D, requires_grad=True), torch.rand(T, 1) < 0.6
    want = layer(x, mask)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        got = compiled(x, mask)
    assert_near({"y": got} | gradients(got, x, layer), {"y": want} | gradients(want, x, layer))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cls, capacity", [(dMoE, 1), (MoE, 1), (MoE, 0.6), (MoE, 0)])
def test_export_with_any_length(cls, capacity, masked, device):
    """Down to the length whose capacity is 0, which drops nothing."""
    layer = layer_(cls, moe_capacity_factor=capacity, return_bias=False).eval()

    def inputs(tokens):
        x = torch.randn(tokens, 1, D)
        return (x, torch.rand(tokens, 1) < 0.6) if masked else (x,)

    length = torch.export.Dim("length")
    program = torch.export.export(layer, inputs(T), dynamic_shapes=({0: length},) * (1 + masked)).module()
    for tokens in (T, 1, 2, 5, 40):
        given = inputs(tokens)
        assert torch.equal(program(*given), layer(*given))


# ---- expert parallelism ----------------------------------------------------------------------------------------------


PARALLEL = {
    "2 ranks": (2, dMoE, dict(moe_num_experts=4)),
    "2 ranks, glu": (2, dMoE, dict(moe_num_experts=4, mlp_type="glu", mlp_impl="sparse")),
    "2 ranks, unknown activation": (2, dMoE, dict(moe_num_experts=4, activation_fn=cube)),
    "2 ranks, features of one expert": (2, dMoE, dict(moe_num_experts=1, moe_top_k=1, mlp_type="glu")),
    "4 ranks, experts and features": (4, dMoE, dict(moe_num_experts=2, mlp_type="glu")),
    "2 ranks, drops": (2, MoE, dict(moe_num_experts=4, moe_capacity_factor=0.5)),
    "2 ranks, no drops": (2, MoE, dict(moe_num_experts=4, moe_capacity_factor=0)),
    "4 ranks, features, drops": (4, MoE, dict(moe_num_experts=2, moe_capacity_factor=0.5)),
}


@pytest.mark.parametrize("case", PARALLEL)
def test_expert_parallel_equals_one_process(case, tmp_path):
    """Each rank computes its rows of one process; expert gradients are those of all tokens divided by the ranks."""
    world, cls, changes = PARALLEL[case]
    tokens = [7, 0, 5, 2][:world]

    def build(parallel):
        torch.manual_seed(2)
        return cls(arguments_(**changes, return_bias=False, moe_expert_model_parallelism=parallel))

    one = build(False)
    x = torch.randn(sum(tokens), 1, D, requires_grad=True)
    dy = torch.randn_like(x)
    want = one(x)
    want.backward(dy)

    def rank_body(rank):
        layer = build(True)
        mine = x.detach().split(tokens)[rank].requires_grad_()
        y = layer(mine)
        y.backward(dy.split(tokens)[rank])
        counts = moe.get_load_balancing_loss()[-1][0]
        return {"y": y.detach(), "x": mine.grad, "counts": counts} | {n: p.grad for n, p in layer.named_parameters()}

    ranks = run_ranks(world, rank_body, tmp_path)
    whole = {"y": torch.cat([r["y"] for r in ranks]), "x": torch.cat([r["x"] for r in ranks])}
    whole |= {name: sum(r[name] for r in ranks) for name in ("router.layer.weight", "experts.bias")}
    expected = {"y": want, "x": x.grad} | {n: p.grad for n, p in one.named_parameters()}
    degree = min(world, changes["moe_num_experts"])
    for name in [n for n in expected if ".mlp." in n]:
        parts = [r[name] for r in ranks]
        if cls is dMoE:  # [e*F,D] -> [e,F,D]
            parts = [p.view(changes["moe_num_experts"] // degree, -1, D) for p in parts]
        features = 2 if name.endswith("w1") and cls is MoE else 1
        blocks = [torch.cat(parts[i : i + degree]) for i in range(0, world, degree)]
        whole[name] = world * torch.cat(blocks, dim=features).view_as(expected[name])
    assert_near(whole, expected)
    counts = moe.get_load_balancing_loss()[0][0]
    assert sum(r["counts"] for r in ranks).tolist() == counts.tolist()


MASKED_PARALLEL = {
    "dMoE": (2, dMoE, dict(moe_num_experts=4, mlp_type="glu")),
    "drops": (2, MoE, dict(moe_num_experts=4, moe_capacity_factor=0.5)),
    "features, drops": (4, MoE, dict(moe_num_experts=2, moe_capacity_factor=0.7)),
}


@pytest.mark.parametrize("case", MASKED_PARALLEL)
def test_masks_under_expert_parallelism(case, tmp_path):
    """Ranks with unlike numbers of pads, one with nothing else, give what one process gives the real tokens alone."""
    world, cls, changes = MASKED_PARALLEL[case]

    def build(parallel):
        torch.manual_seed(2)
        return cls(arguments_(**changes, return_bias=False, bias=False, moe_expert_model_parallelism=parallel))

    x, mask = torch.randn(world, 9, D), torch.rand(world, 9) < 0.7
    mask[1] = False
    real = x[mask].requires_grad_()
    dy = torch.randn_like(real)
    want = build(False)(real)
    want.backward(dy)

    def rank_body(rank):
        mine, here = x[rank].clone().requires_grad_(), mask[rank]
        y = build(True)(mine, here)
        assert not y[~here].any()
        y[here].backward(dy[mask[:rank].sum() :][: here.sum()])
        return y[here].detach(), mine.grad[here]

    y, dx = (torch.cat(parts) for parts in zip(*run_ranks(world, rank_body, tmp_path), strict=True))
    assert_near({"y": y, "dx": dx}, {"y": want, "dx": real.grad})


def test_uneven_sharing_is_refused(tmp_path):
    def rank_body(rank):
        errors = []
        for changes in (dict(moe_num_experts=3), dict(moe_num_experts=1, ffn_hidden_size=5)):
            try:
                dMoE(arguments_(moe_top_k=1, moe_expert_model_parallelism=True, **changes))
            except ValueError as error:
                errors.append(str(error))
        return errors

    for errors in run_ranks(2, rank_body, tmp_path):
        assert "moe_num_experts=3 among 2 ranks" in errors[0]
        assert "ffn_hidden_size=5 among 2 ranks" in errors[1]


def test_all_to_all(tmp_path):
    splits = [[1, 3], [2, 0]]  # rows from rank p to rank q

    def rank_body(rank):
        x = (10.0 * rank + torch.arange(sum(splits[rank]))).unsqueeze(1).requires_grad_()
        y, handle = all_to_all.all_to_all(x, [row[rank] for row in splits], splits[rank], None, async_op=True)
        handle.wait()
        y.backward((rank + 1.0) * torch.ones_like(y).expand(-1, 1))
        return y.detach().flatten().tolist(), x.grad.flatten().tolist()

    assert run_ranks(2, rank_body, tmp_path) == [([0, 10, 11], [1, 2, 2, 2]), ([1, 2, 3], [1, 1])]


def test_expert_parameters_are_marked():
    layer = dMoE(arguments_(mlp_type="glu"))
    marked = [name for name, p in layer.named_parameters() if mpu.is_moe_param(p)]
    assert marked == ["experts.mlp.w1", "experts.mlp.w2", "experts.mlp.v1"]
    assert not mpu.param_is_expert_model_parallel(layer.experts.mlp.w1)
    other = torch.nn.Parameter(torch.zeros(1))
    mpu.copy_expert_model_parallel_attributes(other, layer.experts.mlp.w1)
    assert mpu.is_moe_param(other)


def test_scale_gradient():
    x = torch.randn(3, requires_grad=True)
    mlp.scale_gradient(x, 0.25).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 0.25))


@pytest.mark.parametrize("layer", ["MoE", "dMoE"])
def test_a_token_that_is_not_finite_is_nan_as_in_torch(layer):
    """A loss scaler skips such a step; an error would end the run."""
    args = moe_ext.Arguments(hidden_size=8, ffn_hidden_size=16, moe_num_experts=4, moe_top_k=2, bias=False,
                             return_bias=False, fp16=False, device="cpu", moe_capacity_factor=0)
    layer = getattr(moe_ext, layer)(args)
    x = torch.randn(6, 8)
    x[2, 3] = math.inf
    y = layer(x)
    assert y[2].isnan().any() and y[[0, 1, 3, 4, 5]].isfinite().all()
    scores = moe_ext.layers.moe.get_load_balancing_loss()[-1][1]
    assert scores[2].isnan().all() and scores[[0, 1, 3, 4, 5]].isfinite().all()
    moe_ext.layers.moe.clear_load_balancing_loss()
    y.square().sum().backward()
    assert any(p.grad.isnan().any() for p in layer.parameters())
