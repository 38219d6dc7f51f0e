"""LoRA: low-rank factors on experts and linear layers, ours and transformers', against plain torch, merged matrices,
one process and peft."""

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import ROUTINGS
from compare import close, evaluate
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moe_ext import ops, reference
from moe_ext.config import MeshConfig, ModelConfig, MoEConfig
from moe_ext.layers.fused import Draws, FusedMoE, site
from moe_ext.layers.lora import (
    add_lora,
    is_factor,
    lora_parameters,
    lora_state_dict,
    low_rank_expert_mlp,
    merge_lora,
)
from moe_ext.model import GPT
from moe_ext.ops.enums import GATED
from moe_ext.parallel.mesh import Mesh
from moe_ext.parallel.shard import backward, initialize, own, parallelize

T, K, E, D, H, RANK, SCALE = 13, 2, 4, 6, 10, 3, 2.0
pytestmark = pytest.mark.c_core
FLOAT64 = torch.float64


# ---- the arithmetic --------------------------------------------------------------------------------------------------


def tensors(act, dtype, biases=True, routing="empty_experts"):
    g, U = torch.Generator().manual_seed(2), 2 * H if act in GATED else H
    shapes = dict(x=(T, D), w13=(E, U, D), w2=(E, D, H), weights=(T, K), a13=(E, RANK, D), c13=(E, U, RANK),
                  a2=(E, RANK, H), c2=(E, D, RANK), b13=(E, U), b2=(E, D))  # fmt: skip
    inputs = {name: torch.randn(*shape, generator=g).to(dtype) for name, shape in shapes.items()}
    ids = ROUTINGS[routing](T, K, E, g)
    ids[::5, 0] = -1
    return {n: t for n, t in inputs.items() if biases or n not in ("b13", "b2")}, ids


def plain(ids, act, turns):
    """What low_rank_expert_mlp computes, one copy after the other."""
    def linear(x, w, a, c, b):
        y = F.linear(x, w) if a is None else F.linear(x, w) + F.linear(F.linear(x, a) * SCALE, c)
        return y if b is None else y + b

    def call(x, w13, w2, weights, a13=None, c13=None, a2=None, c2=None, b13=None, b2=None):
        def of(t, e):
            return None if t is None else t[e]

        rows = []
        for r in range(T):
            y = torch.zeros_like(x[r])
            for k, e in enumerate(ids[r].tolist()):
                if e >= 0:
                    h = linear(x[r], w13[e], of(a13, e), of(c13, e), of(b13, e))
                    h = h.unflatten(0, (-1, 2)).T.flatten() if turns else h
                    a = reference.activation(h[None], act)[0]
                    y = y + linear(a, w2[e], of(a2, e), of(c2, e), of(b2, e)) * weights[r, k].to(x.dtype)
            rows.append(y)
        return torch.stack(rows)

    return call


def ours(ids, act, turns):
    index, copies = ops.route_index(ids, E), int(ids.ge(0).sum())
    return lambda x, w13, w2, weights, **factors: low_rank_expert_mlp(
        x, w13, w2, weights, index, scale=SCALE, act=act, in_turns=turns, num_copies=copies, **factors)


FROZEN = {"x", "weights", "a13", "c13", "a2", "c2"}
CASES = [("swiglu", False, True, None), ("swiglu_oai", True, True, None), ("geglu", False, False, FROZEN),
         ("relu", False, True, FROZEN), ("swiglu", False, True, {"a2"}), ("swiglu", False, False, {"c2", "x"}),
         ("swiglu", False, True, {"w2", "c2", "b13"}), ("silu", False, True, {"weights"}),
         ("geglu_tanh", True, True, {"a13"})]  # fmt: skip


@pytest.mark.parametrize(("act", "turns", "biases", "wanted"), CASES)
def test_the_product_and_every_gradient(act, turns, biases, wanted):
    inputs, ids = tensors(act, FLOAT64, biases)
    got, want = (evaluate(of(ids, act, turns), inputs, wanted) for of in (ours, plain))
    for name in want:
        assert (got[name] - want[name]).abs().max() <= 1e-12 * want[name].abs().max(), name


@pytest.mark.parametrize("side", [("a13", "c13"), ("a2", "c2")])
def test_factors_on_one_side_only(side):
    inputs, ids = tensors("swiglu", FLOAT64)
    inputs = {n: t for n, t in inputs.items() if n not in side}
    got, want = (evaluate(of(ids, "swiglu", False), inputs) for of in (ours, plain))
    for name in want:
        assert (got[name] - want[name]).abs().max() <= 1e-12 * want[name].abs().max(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_errs_as_plain_torch_does(dtype):
    inputs, ids = tensors("swiglu", dtype, routing="random")
    inputs["weights"] = inputs["weights"].float()
    got, coarse = (evaluate(of(ids, "swiglu", False), inputs) for of in (ours, plain))
    oracle = evaluate(plain(ids, "swiglu", False), {n: t.double() for n, t in inputs.items()})
    for name in oracle:
        close(got[name], coarse[name], oracle[name], name)


def test_it_keeps_no_more_than_the_fused_mlp_and_two_narrow_rows():
    inputs, ids = tensors("swiglu", FLOAT64, biases=False, routing="random")
    leaves = {n: t.requires_grad_(n in FROZEN) for n, t in inputs.items()}
    parameters = {t.untyped_storage().data_ptr() for n, t in leaves.items() if n not in ("x", "weights")}
    kept = {}

    def keep(t):
        if t.is_floating_point() and t.untyped_storage().data_ptr() not in parameters:
            kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = ours(ids, "swiglu", False)(**leaves)
    copies = int(ids.ge(0).sum())
    assert sum(kept.values()) == T * D + T * K + copies * (2 * H + 2 * RANK)
    y.sum().backward()
    assert leaves["w13"].grad is leaves["w2"].grad is None


def test_torch_compile_traces_it_and_it_says_that_it_has_one_derivative():
    inputs, ids = tensors("swiglu", torch.float32)
    call, wanted = ours(ids, "swiglu", False), {"x", "a13"}
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, want = evaluate(compiled, inputs, wanted), evaluate(call, inputs, wanted)
    assert all(torch.equal(got[name], want[name]) for name in want)
    x = inputs["x"].requires_grad_()
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(call(**inputs).sum(), x, create_graph=True)


# ---- our layers ------------------------------------------------------------------------------------------------------

SIZES = ModelConfig(layers=2, dim=16, heads=4, vocab_size=50, seq_len=8, hidden=24,
                    moe=MoEConfig(experts=4, top_k=2, hidden=24, shared_hidden=16, dense_layers=1))  # fmt: skip
ALL = r"self_attn|experts|mlp\.\w+_proj|shared"
TEXT = torch.randint(0, 50, (2, 4, 8), generator=torch.Generator().manual_seed(1))


def gpt(targets=ALL, dropout=0.0, **options):
    model = GPT(SIZES, dtype=FLOAT64, **options)
    names = add_lora(model, 4, 8.0, targets, dropout)
    for name, p in model.named_parameters():
        p.requires_grad_(is_factor(name))
    return model, names


@torch.no_grad()
def shake(model):
    """B that is not zero, the same on every mesh."""
    for name, p in lora_parameters(model).items():
        if name.endswith("lora_B"):
            noise = 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(site(name)), dtype=FLOAT64)
            (p.to_local() if isinstance(p, DTensor) else p).copy_(own(noise, p))


def test_a_model_begins_as_it_was_trains_its_factors_alone_and_merges_into_a_plain_one():
    model, names = gpt()
    before = GPT(SIZES, dtype=FLOAT64)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert names == list(lora_state_dict(model)) == [n for n, p in model.named_parameters() if p.requires_grad]
    assert {"layers.1.mlp.experts.w13_lora_A", "layers.0.self_attn.q_proj.lora_B"} < set(names)
    assert (model.logits(TEXT[0]) - before.logits(TEXT[0])).abs().max() < 1e-14
    for name in names:
        A = ops.random_normal(4, start[name].shape[-1], seed=0, step=0, site=site(name), dtype=FLOAT64,
                              std=(3 * start[name].shape[-1]) ** -0.5)  # fmt: skip
        first_rows = start[name].flatten(0, -2)[:4]
        assert torch.equal(first_rows, A) if name.endswith("A") else not start[name].any(), name
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):
        losses = model(*TEXT)
        (losses.token_loss / 32 + losses.aux_loss).backward()
        assert all((p.grad is not None) == is_factor(name) for name, p in model.named_parameters())
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, start[name]) != is_factor(name), name

    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied.logits(TEXT[0]), model.logits(TEXT[0]))
        merge_lora(copied)
    again, _ = gpt(seed=1)
    assert again.load_state_dict(lora_state_dict(model), strict=False).unexpected_keys == []
    again.load_state_dict(model.state_dict())
    want = model.logits(TEXT[0])
    assert (want - before.logits(TEXT[0])).abs().max() > 1e-3
    merge_lora(again)
    assert (again.logits(TEXT[0]) - want).abs().max() < 1e-14
    assert [(n, p.shape) for n, p in again.state_dict().items()] == [
        (n, p.shape) for n, p in before.state_dict().items()]
    assert [type(m) for m in again.modules()] == [type(m) for m in before.modules()]


def test_recomputation_and_dropout_whose_numbers_are_those_of_the_step():
    model, _ = gpt(r"self_attn|mlp\.\w+_proj|shared", dropout=0.3)
    shake(model)

    def gradients(recompute, step, training=True):
        model.recompute = recompute
        loss = model.train(training)(*TEXT, Draws(0, step)).token_loss
        return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

    attention = model.layers[0].self_attn
    first, second, other = gradients(False, 1), gradients(True, 1), gradients(False, 2)
    assert all(map(torch.equal, first, second)) and not any(map(torch.equal, first, other))
    ones = torch.ones(1, 8, 16, dtype=FLOAT64)
    assert not torch.equal(attention.q_proj.dropped(ones), attention.k_proj.dropped(ones))
    assert all(map(torch.equal, gradients(False, 1, False), gradients(False, 2, False)))


def test_autocast_and_float32_factors_on_bf16_matrices():
    torch.manual_seed(0)
    layer = FusedMoE(16, 24, 4, 2).to(torch.bfloat16)
    assert {p.dtype for p in lora_parameters(layer).values()} == set()
    add_lora(layer, 4, 8.0, "experts")
    assert {p.dtype for p in lora_parameters(layer).values()} == {torch.float32}
    shake(layer)
    x = torch.randn(2, 9, 16)
    y, _ = layer(x.bfloat16())
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and layer.experts.w13_lora_A.grad.dtype == torch.float32
    wide = copy.deepcopy(layer).float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = wide(x.bfloat16().float())
    merge_lora(layer)
    merged = layer(x.bfloat16())[0]
    assert (y - mixed).abs().max() < 0.02 * y.abs().max() and (y - merged).abs().max() < 0.02 * y.abs().max()


def steps(mesh):
    """Initial values, gradients of the second step, parameters then; and of what each is a part."""
    model, _ = gpt(device="meta" if mesh.world > 1 else None)
    parallelize(model, mesh)
    if mesh.world > 1:
        initialize(model, 0, "cpu")

    def values(of=lambda p: p.detach()):
        return {n: of(p).to_local().clone() if isinstance(p, DTensor) else of(p).clone()
                for n, p in model.named_parameters() if of(p) is not None}  # fmt: skip

    initial = values()
    shake(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    mine = slice(mesh.dp_rank * 4 // mesh.config.dp, (mesh.dp_rank + 1) * 4 // mesh.config.dp)
    for _ in range(2):
        optimizer.zero_grad()
        backward(model, model(*TEXT[:, mine]), mesh, tokens=32)
        gradients = values(lambda p: p.grad)
        optimizer.step()
    return initial, gradients, values(), dict(model.named_parameters())


def test_meshes_equal_one_process():
    one = steps(Mesh(MeshConfig(), torch.device("cpu")))
    meshes = [dict(fsdp=2, tp=2, etp=2), dict(fsdp=4, ep=2)]

    def body(rank):
        worst = {}
        for sizes in meshes:
            *got, like = steps(Mesh(MeshConfig(**sizes), torch.device("cpu")))
            assert all(torch.equal(x, own(one[0][name], like[name])) for name, x in got[0].items()), sizes
            for mine, whole in zip(got[1:], one[1:3], strict=True):
                assert mine.keys() == whole.keys(), sizes
                for name, x in mine.items():
                    error = (x - own(whole[name], like[name])).abs().max() / whole[name].abs().max()
                    worst[str(sizes), name] = float(error)
        with pytest.raises(ValueError, match=r"cannot share dimension 1 of .*lora_B .* evenly"):
            model = GPT(SIZES, dtype=FLOAT64)
            add_lora(model, 3, 8.0, "q_proj")
            parallelize(model, Mesh(MeshConfig(tp=2, fsdp=2), torch.device("cpu")))
        with pytest.raises(ValueError, match=r"dropout with mesh.tp"):
            parallelize(gpt("q_proj", 0.1)[0], Mesh(MeshConfig(tp=4), torch.device("cpu")))
        with pytest.raises(ValueError, match=r"merge_lora: .* is sharded"):
            model = gpt("q_proj")[0]
            parallelize(model, Mesh(MeshConfig(fsdp=4), torch.device("cpu")))
            merge_lora(model)
        return worst

    for worst in run_ranks(4, body):
        assert max(worst.values()) < 1e-12, max(worst.items(), key=lambda item: item[1])


@pytest.mark.parametrize(("change", "message"), [
    (dict(rank=0), "rank is 0, wanted an integer from 1 up"),
    (dict(rank=2.0), "rank is 2.0"),
    (dict(alpha=0), "alpha is 0"),
    (dict(dropout=1.0), "dropout is 1.0"),
    (dict(dropout=0.1), "experts have none"),
    (dict(targets="attention"), r"finds nothing.*layers\.\*\.mlp\.experts\.w13_E2FD.*layers\.\*\.self_attn\.q_proj"),
    (dict(targets="q_proj["), "wanted a regular expression"),
    (dict(targets="k_proj"), "has LoRA already"),
])  # fmt: skip
def test_errors(change, message):
    model, _ = gpt("k_proj")
    with pytest.raises(ValueError, match=message):
        add_lora(model, **dict(rank=4, alpha=8.0, targets="w2") | change)
    assert add_lora(model, 4, 8.0, "q_proj"), "what was refused has changed nothing"


def test_nothing_to_merge_and_tied_matrices():
    with pytest.raises(ValueError, match="has no LoRA"):
        merge_lora(GPT(SIZES))
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="0 is tied"):
        add_lora(model, 1, 1.0, "0")


# ---- transformers ----------------------------------------------------------------------------------------------------


def hugging_face(kind, dtype=FLOAT64):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                 head_dim=8, num_experts_per_tok=2, max_position_embeddings=32)  # fmt: skip
    config = {"qwen": lambda: transformers.Qwen3MoeConfig(**sizes, moe_intermediate_size=12, num_experts=4),
              "oss": lambda: transformers.GptOssConfig(**sizes, intermediate_size=12, num_local_experts=4)}[kind]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


WORDS = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(3))
THEIRS = r"q_proj|experts\.(gate_up|down)_proj$"


def adapted(base):
    from moe_ext.transformers import lora
    model = copy.deepcopy(base)
    lora.add_lora(model, 3, 6.0, THEIRS)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in lora_parameters(model).values():
            p.normal_(std=0.3)
    return model, lora


def gradients(model):
    model.zero_grad()
    model(WORDS).logits.square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["qwen", "oss"])
def test_fused_experts_of_transformers_equal_peft(kind, tmp_path):
    peft = pytest.importorskip("peft")
    base = hugging_face(kind)
    model, lora = adapted(base)
    got, grads = model(WORDS).logits, gradients(model)
    assert (got - base(WORDS).logits).abs().max() > 1e-2
    assert grads.keys() == lora_parameters(model).keys() and all(g.abs().max() > 0 for g in grads.values())

    lora.save_lora(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours", is_trainable=True)
    want = theirs(WORDS).logits
    assert (got - want).abs().max() < 1e-12 * want.abs().max()
    want_grads = gradients(theirs)
    for layer, side in ((layer, side) for layer in range(2) for side in range(2)):
        names = [f"model.layers.{layer}.mlp.experts.{('gate_up', 'down')[side]}_proj_lora_{s}" for s in "AB"]
        for s, grad in zip("AB", lora.to_peft(*(grads[name] for name in names)), strict=True):
            inner = ".base_layer" if side == 0 else ""
            there = want_grads[f"base_model.model.model.layers.{layer}.mlp.experts{inner}.lora_{s}.default.weight"]
            assert (grad - there).abs().max() < 1e-12 * there.abs().max(), (layer, side, s)

    theirs.save_pretrained(tmp_path / "theirs")
    back = copy.deepcopy(base)
    lora.load_lora(back, tmp_path / "theirs")
    assert lora_state_dict(back).keys() == lora_state_dict(model).keys()
    assert all(torch.equal(x, lora_state_dict(model)[name]) for name, x in lora_state_dict(back).items())
    lora.merge_lora(back)
    assert (back(WORDS).logits - want).abs().max() < 1e-12 * want.abs().max()
    assert [type(m) for m in back.modules()] == [type(m) for m in base.modules()]
    back.save_pretrained(tmp_path / "merged")
    saved = type(base).from_pretrained(tmp_path / "merged", dtype=FLOAT64, experts_implementation="eager")
    assert (saved(WORDS).logits - want).abs().max() < 1e-12 * want.abs().max()


def test_checkpointing_ddp_and_fsdp2_reach_the_experts_factors(tmp_path):
    base = hugging_face("qwen")
    model, lora = adapted(base)
    want = gradients(model)

    def compare(got, bound=1e-12):
        assert got.keys() == want.keys()
        worst = max((got[n] - g).abs().max() / g.abs().max() for n, g in want.items())
        assert worst < bound, worst

    model.train()
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        compare(gradients(model))

    def body(rank):
        half = slice(rank, rank + 1)
        replica = adapted(base)[0]
        data_parallel = nn.parallel.DistributedDataParallel(replica)
        data_parallel(WORDS[half]).logits.square().mean().backward()
        compare({n: p.grad for n, p in replica.named_parameters() if p.grad is not None})
        shards = adapted(base)[0]
        for layer in shards.model.layers:
            fully_shard(layer)
        fully_shard(shards)(WORDS[half]).logits.square().mean().backward()
        compare({n: p.grad.full_tensor() for n, p in shards.named_parameters() if p.grad is not None})
        lora.save_lora(shards, tmp_path / "adapter")

    run_ranks(2, body)
    whole = copy.deepcopy(base)
    lora.load_lora(whole, tmp_path / "adapter")
    assert all(torch.equal(x, lora_state_dict(model)[n]) for n, x in lora_state_dict(whole).items())


def test_a_bf16_model_and_an_activation_that_is_not_ours():
    model, _ = adapted(hugging_face("qwen", torch.bfloat16))
    assert {p.dtype for p in lora_parameters(model).values()} == {torch.float32}
    assert all(g.abs().max() > 0 and g.dtype == torch.float32 for g in gradients(model).values())

    base = hugging_face("qwen")
    for layer in base.model.layers:
        layer.mlp.experts.act_fn = nn.Mish()
    model, lora = adapted(base)
    want, grads = model(WORDS).logits, gradients(model)
    assert grads.keys() == lora_parameters(model).keys()
    lora.merge_lora(model)
    assert (model(WORDS).logits - want).abs().max() < 1e-12 * want.abs().max()


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    base = hugging_face("qwen")
    model, lora = adapted(base)
    lora.save_lora(model, tmp_path / "adapter")
    with pytest.raises(FileExistsError):
        lora.save_lora(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="save_lora: the model has no LoRA"):
        lora.save_lora(base, tmp_path / "other")
    with pytest.raises(ValueError, match="load_lora: the model has LoRA already"):
        lora.load_lora(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    for change, message in [(dict(use_dora=True), "use_dora"), (dict(peft_type="LOHA"), "LOHA"),
                            (dict(target_parameters=["down_proj"]), "have no place here"), (dict(r=4), "factors")]:
        path.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            lora.load_lora(base, tmp_path / "adapter")
    path.write_text("{")
    with pytest.raises(ValueError, match="adapter is damaged"):
        lora.load_lora(base, tmp_path / "adapter")
    path.write_text(json.dumps(config))
    whole = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="adapter is damaged"):
        lora.load_lora(base, tmp_path / "adapter")
    assert not lora_state_dict(base)
    projection = base.model.layers[1].self_attn.q_proj
    projection.forward = projection.forward     # as accelerate does it
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj is of a module whose forward"):
        lora.add_lora(base, targets="q_proj")
    del projection.forward
    base.peft_config = {}
    with pytest.raises(ValueError, match="has adapters of peft"):
        lora.add_lora(base)
    del base.peft_config
    assert not lora_state_dict(base)
    lora.add_lora(base, targets="q_proj")
    lora.add_lora(base, rank=2, targets="v_proj")
    with pytest.raises(ValueError, match="2 kinds"):
        lora.save_lora(base, tmp_path / "two")
