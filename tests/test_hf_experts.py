"""transformers' models and experts modules under experts_implementation="moe_ext", against "eager"."""

import copy
import importlib
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compare import close, doubles, evaluate, kept
from ranks import run_ranks
from torch.func import functional_call

pytest.importorskip("transformers")
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import moe_ext.transformers
from moe_ext.ops import expert
from moe_ext.transformers.experts import fused_act

COMMON = dict(hidden_size=16, num_hidden_layers=2, vocab_size=40, num_attention_heads=2, num_key_value_heads=1,
              head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
MODELS = {
    "qwen3_moe": dict(moe_intermediate_size=12, num_experts=6, num_experts_per_tok=2),
    "mixtral": dict(intermediate_size=12, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": dict(intermediate_size=12, num_experts=6, num_experts_per_tok=3),
    "deepseek_v3": dict(moe_intermediate_size=12, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2,
                        first_k_dense_replace=1, intermediate_size=20, num_key_value_heads=2, head_dim=4, q_lora_rank=8,
                        kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
    "glm4_moe": dict(moe_intermediate_size=12, n_routed_experts=6, num_experts_per_tok=2, first_k_dense_replace=1,
                     intermediate_size=20),
    "gpt_oss": dict(intermediate_size=12, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
                    layer_types=["sliding_attention", "full_attention"]),
}  # fmt: skip
# The forms that the six do not have; by name of the folder in transformers.models and of the class.
OTHERS = {
    "aria": "AriaExperts",  # transposed
    "gemma4": "Gemma4TextExperts",  # gelu
    "minimax_m3_vl": "MiniMaxM3VLExperts",  # gpt-oss's gate, the weights as everywhere
    "nemotron_h": "NemotronHExperts",  # no gate, relu squared
    "deepseek_v4": "DeepseekV4Experts",  # silu with clamps
    "muse_spark": "MuseSparkExperts",  # a norm after each expert
}
COMPOSED = ("nemotron_h", "deepseek_v4", "muse_spark", "gpt_oss limit 1")
E, K, D, T = 5, 2, 12, 17


@pytest.fixture(autouse=True)
def quiet_rope(monkeypatch):
    monkeypatch.setattr("transformers.modeling_rope_utils.logger.warning", lambda *_: None)


def tiny(name, dtype=torch.float64, implementation="moe_ext"):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **COMMON | MODELS[name])
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation=implementation)
    for parameter in model.parameters():  # as they are made, experts are too small to be seen in the logits
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def tokens():
    return torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))


def step(model, implementation=None, **options):
    """-> logits and every gradient of a batch, by name."""
    if implementation:
        model.set_experts_implementation(implementation)
    model.zero_grad()
    output = model(tokens(), labels=tokens(), use_cache=False, **options)
    output.loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach()} | named


def far(got, want):
    """The largest relative difference."""
    assert got.keys() == want.keys()
    return max(float((got[name] - w).norm() / (w.norm() + 1e-300)) for name, w in want.items())


# ---- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_models(name, monkeypatch):
    """Both ways to ask for it, each gradient; and with weights in which an expert stands for another it is seen."""
    asked = []
    ours = ALL_EXPERTS_FUNCTIONS["moe_ext"]
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "moe_ext",
                        lambda *args: asked.append(args[0]) or ours(*args))  # fmt: skip
    model = tiny(name)
    got = step(model)
    assert len(asked) == 2 - getattr(model.config, "first_k_dense_replace", 0)
    want = step(model, "eager")
    assert far(got, want) < 1e-12 and any("experts" in parameter for parameter in want)
    assert far(step(model, "moe_ext"), want) < 1e-12
    experts = model.model.layers[-1].mlp.experts
    experts.gate_up_proj.data = experts.gate_up_proj.roll(1, 0)
    assert far(step(model), want) > 1e-3


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_generation(name):
    """Greedy, with a cache, of prompts of several lengths."""
    model, prompts = tiny(name), tokens()
    mask = torch.ones_like(prompts)
    prompts[0, :4] = mask[0, :4] = 0
    texts = []
    for implementation in ("eager", "moe_ext"):
        model.set_experts_implementation(implementation)
        texts.append(model.generate(prompts, attention_mask=mask, max_new_tokens=12, do_sample=False))
    assert texts[0].equal(texts[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = tiny("gpt_oss")
    want = step(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    assert far(step(model), want) < 1e-12


def test_ranks():
    """Under DDP and FSDP2 two ranks get one process's gradients."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    model = tiny("gpt_oss")
    want = step(model)

    def body(rank):
        both = {}
        for how in ("ddp", "fsdp2"):
            one = copy.deepcopy(model)
            one.zero_grad()
            if how == "ddp":
                whole = DistributedDataParallel(one)
            else:
                for layer in one.model.layers:
                    fully_shard(layer)
                whole = fully_shard(one)
            row = tokens()[rank : rank + 1]
            whole(row, labels=row, use_cache=False).loss.backward()
            grads = {name: p.grad for name, p in one.named_parameters()}
            both[how] = {name: g.full_tensor() if how == "fsdp2" else g for name, g in grads.items()}
        return both

    del want["logits"]
    for both in run_ranks(2, body):
        assert all(far(got, want) < 1e-12 for got in both.values())


def test_lora_of_peft():
    """On the parameters of experts: peft makes W + B A anew in each forward."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    for name in ("qwen3_moe", "gpt_oss"):
        model = peft.get_peft_model(tiny(name), config).double()
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        model.set_experts_implementation = model.base_model.model.set_experts_implementation
        got, want = step(model, "moe_ext"), step(model, "eager")
        assert far(got, want) < 1e-12 and len(want) == 1 + 2 * 2 * 2 and all("lora" in n for n in want if n != "logits")


# ---- one experts module ----------------------------------------------------------------------------------------------


def module_of(name):
    """The experts of an architecture, in fp64."""
    name, _, limit = name.partition(" limit ")
    fields = dict(num_experts=E, num_local_experts=E, n_routed_experts=E, hidden_size=D, moe_hidden_size=D,
                  intermediate_size=8, moe_intermediate_size=8, moe_num_experts=E, hidden_act="silu",
                  hidden_activation="gelu_pytorch_tanh", mlp_hidden_act="relu2", moe_latent_size=None,
                  swiglu_limit=float(limit or 7), swiglu_alpha=1.702, post_norm_eps=1e-6,
                  _experts_implementation="moe_ext")  # fmt: skip
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    class_name = OTHERS.get(name) or "".join(word.capitalize() for word in name.split("_")) + "Experts"
    experts = getattr(modeling, class_name)(SimpleNamespace(**fields)).double()
    torch.manual_seed(0)
    for p in experts.parameters():
        torch.nn.init.normal_(p)
    return experts


def inputs_of(experts, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    inputs = {"x_TD": torch.randn(T, D, generator=generator, dtype=torch.float64),
              "weights_TK": torch.rand(T, K, generator=generator, dtype=torch.float64),
              "ids_TK": torch.rand(T, E, generator=generator).topk(K).indices}  # fmt: skip
    inputs |= {name: 0.5 * p.detach() for name, p in experts.named_parameters()}
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def under(experts, implementation):
    def call(x_TD, ids_TK, weights_TK, **parameters):
        experts.config._experts_implementation = implementation
        return functional_call(experts, parameters, (x_TD, ids_TK, weights_TK))

    return call


@pytest.mark.parametrize("name", ["gpt_oss limit 1", *OTHERS])
def test_other_experts(name):
    experts = module_of(name)
    inputs = inputs_of(experts)
    got, want = (evaluate(under(experts, of), inputs) for of in ("moe_ext", "eager"))
    assert far(got, want) < (1e-6 if name == "muse_spark" else 1e-12)  # whose norm is in fp32
    assert (fused_act(experts) is None) == (name in COMPOSED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*MODELS, "nemotron_h", "gpt_oss limit 1"])
def test_precision(name, dtype):
    """Within twice eager's error, the routing weights in the rows' dtype or, as Mixtral has them, in fp32."""
    experts = module_of(name)
    inputs = inputs_of(experts, dtype)
    for weights_dtype in {dtype, torch.float32}:
        inputs["weights_TK"] = inputs["weights_TK"].to(weights_dtype)
        oracle = evaluate(under(experts, "eager"), doubles(inputs))
        got, plain = (evaluate(under(experts, of), inputs) for of in ("moe_ext", "eager"))
        for what in got:
            close(got[what], plain[what], oracle[what], what, floor=torch.finfo(dtype).eps)


def test_experts_in_fp32():
    """Of a bf16 model: the products are in fp32, as under grouped_mm, and only the results are rounded."""
    experts = module_of("mixtral")
    inputs = inputs_of(experts, torch.float32)
    inputs["x_TD"] = inputs["x_TD"].bfloat16()
    oracle = evaluate(under(experts, "eager"), doubles(inputs))
    got, plain = (evaluate(under(experts, of), inputs) for of in ("moe_ext", "grouped_mm"))
    for what in got:
        close(got[what], plain[what], oracle[what], what)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_autocast(name):
    experts = module_of(name)
    inputs = inputs_of(experts, torch.float32)

    def call(implementation):
        def inside(**inputs):
            with torch.autocast("cpu", torch.bfloat16):
                return under(experts, implementation)(**inputs)

        return evaluate(inside, inputs)

    oracle = evaluate(under(experts, "eager"), doubles(inputs))
    got, plain = call("moe_ext"), call("eager")
    for what in got:
        close(got[what], plain[what], oracle[what], what, floor=torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "gpt_oss limit 1", "muse_spark"])
def test_sentinels(name):
    """Of an expert-parallel module: copies that have no expert here, among others and alone."""
    experts = module_of(name)
    experts._is_expert_parallel = True
    inputs = inputs_of(experts)
    inputs["ids_TK"][::3, 0] = inputs["ids_TK"][1] = E
    if not experts.has_bias:  # of the others' forward
        assert far(evaluate(under(experts, "moe_ext"), inputs), evaluate(under(experts, "eager"), inputs)) < 1e-6
    got = evaluate(under(experts, "moe_ext"), inputs)
    assert got["dweights_TK"][inputs["ids_TK"] == E].eq(0).all() and got["dx_TD"][1].eq(0).all()
    assert got["result 0"][1].eq(0).all() and got["result 0"][3].ne(0).all()
    inputs["ids_TK"][:] = E
    assert all(x.eq(0).all() for x in evaluate(under(experts, "moe_ext"), inputs).values())


@pytest.mark.parametrize("name", ["qwen3_moe", "aria", "gpt_oss"])
def test_what_it_keeps(name):
    """No copy of a weight in any layout; frozen experts have no gradient and keep no rows for it."""
    experts = module_of(name)
    inputs = inputs_of(experts)
    weights, both = {"gate_up_proj", "down_proj"}, 2 * 8 * T * K * 8  # bytes before the activation
    index = 4 * (2 * E + 2 * T * K)
    copies = E * (D + 2 * 8) * 8 if experts.has_bias else 0
    names, rest = kept(under(experts, "moe_ext"), inputs, {"x_TD", "weights_TK", *weights})
    assert names >= weights | {"x_TD"} and both <= rest <= both + index + copies
    names, rest = kept(under(experts, "moe_ext"), inputs, {"x_TD", "weights_TK"})
    assert names >= weights and "x_TD" not in names and both <= rest <= both + index + copies
    grads = evaluate(under(experts, "moe_ext"), inputs, ["gate_up_proj"])
    assert grads["dgate_up_proj"].is_contiguous()


def test_frozen_experts(monkeypatch):
    experts, asked, backward = module_of("gpt_oss"), [], expert._expert_mlp_backward
    monkeypatch.setattr(expert, "_expert_mlp_backward", lambda *args: asked.append(args[-1]) or backward(*args))
    got, want = (evaluate(under(experts, of), inputs_of(experts), ["x_TD", "weights_TK"])
                 for of in ("moe_ext", "eager"))  # fmt: skip
    assert far(got, want) < 1e-12
    assert asked == [0b10001]  # x and the weights of the routing


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v4"])
def test_compiled(name):
    experts = module_of(name)
    inputs, call = inputs_of(experts), under(experts, "moe_ext")
    want = evaluate(call, inputs)
    experts.config._experts_implementation = "moe_ext"
    torch.compiler.reset()
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    for name, p in experts.named_parameters():
        p.data = inputs[name]
    x_TD, weights_TK = (inputs[name].requires_grad_() for name in ("x_TD", "weights_TK"))
    got = compiled(x_TD, inputs["ids_TK"], weights_TK)
    got.sum().backward()
    assert far({"y": got.detach()}, {"y": want["result 0"]}) < 1e-14 and experts.down_proj.grad.ne(0).any()


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_experts_that_cannot_be_served():
    experts, ids_TK = module_of("qwen3_moe"), torch.zeros(1, 1, dtype=torch.int64)
    arguments = torch.randn(1, D).double(), ids_TK, torch.ones(1, 1).double()
    with pytest.raises(RuntimeError, match="ids has 5 at flat position 0, wanted 0 <= id < 5"):
        experts(arguments[0], ids_TK + E, arguments[2])
    with pytest.raises(RuntimeError, match="on device"):
        experts(arguments[0].to("meta"), ids_TK, arguments[2])
    with pytest.raises(ValueError, match=r"Qwen3MoeExperts: .* are \[1, 12\], \[1, 1\] and \[1, 2\], wanted \[T,D\]"):
        experts(arguments[0], ids_TK, torch.ones(1, 2).double())
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to(torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"cannot run Qwen3MoeExperts: its down_proj is torch.int8 \[5, 12, 8\]"):
        experts(*arguments)
    del experts.down_proj
    with pytest.raises(TypeError, match=r"its down_proj is NoneType.*set_experts_implementation\(\"eager\"\)"):
        experts(*arguments)


def test_versions(monkeypatch, recwarn):
    check = moe_ext.transformers.check_version
    for version in (moe_ext.transformers.TRIED + ".9", moe_ext.transformers.OLDEST + ".0"):
        check(version)
    assert not recwarn
    with pytest.raises(ImportError, match=r"needs transformers 5.23 or later.*this is 4.57.6. Type: pip install"):
        check("4.57.6")
    with pytest.warns(UserWarning, match=r"tried with transformers 5.24, this is 6.0.0.dev0"):
        check("6.0.0.dev0")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers 5\.23 or later.*Type: pip install"):
        runpy.run_path(moe_ext.transformers.__file__)


def test_tried():
    """What the documentation calls tried is what CI installs."""
    pinned = (Path(__file__).parent.parent / "requirements-dev.txt").read_text()
    assert re.search(r"transformers==(\d+\.\d+)", pinned)[1] == moe_ext.transformers.TRIED
