#!/usr/bin/env bash
# A transformers model in float64 is no float64 reference. RMSNorm, RoPE and the router ask for float32 whatever the model's
# dtype, to lift bf16, and here that rounds down: its logits are right to 6e-8, and to mend RMSNorm alone leaves them
# at 1e-8. torch.autograd.gradcheck, whose steps of 1e-6 meet that rounding, refuses a norm, a router, a mixture and a layer
# that are all right: it passes each of them if requests for float32 are answered with float64 (the mode below). torch's own
# RMSNorm keeps float64.
#
# Seen with transformers 5.24.0, torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package index. Two minutes,
# most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy transformers==5.24.0

cat > double.py <<'PY'
from contextlib import nullcontext

import torch
from torch.overrides import TorchFunctionMode
from transformers import (DeepseekV3Config, DeepseekV3ForCausalLM, GptOssConfig, GptOssForCausalLM, MixtralConfig,
                          MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM)


class Float64(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = torch.Tensor.double if function is torch.Tensor.float else function
        args = [torch.float64 if a is torch.float32 else a for a in args]
        kwargs = {key: torch.float64 if a is torch.float32 else a for key, a in (kwargs or {}).items()}
        return function(*args, **kwargs)


def make(Model, Config, **more):
    torch.manual_seed(0)
    with Float64():         # the tables of RoPE, too, are made here
        return Model(Config(
            vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=4, head_dim=8, num_experts_per_tok=2, use_cache=False, experts_implementation="eager",
            **{"num_key_value_heads": 2, **more})).double().eval()


ids = torch.arange(24)[None]
for Model, Config, more in (
        (Qwen3MoeForCausalLM, Qwen3MoeConfig, {"num_experts": 4}),
        (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}),
        (GptOssForCausalLM, GptOssConfig, {"num_local_experts": 4}),
        (DeepseekV3ForCausalLM, DeepseekV3Config, {
            "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "q_lora_rank": 16,
            "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
            "first_k_dense_replace": 1})):
    model = make(Model, Config, **more)
    with torch.no_grad():
        plain = model(ids).logits
        with Float64():
            exact = model(ids).logits
    error = (plain - exact).norm() / exact.norm()
    print(f"{Model.__name__}: logits {plain.dtype}, an error of float32's size: {bool(1e-8 < error < 1e-6)}")

model = make(Qwen3MoeForCausalLM, Qwen3MoeConfig, num_experts=4)
layer = model.model.layers[0]
with Float64():
    position = model.model.rotary_emb(torch.zeros(1, dtype=torch.float64), torch.arange(3)[None])
pieces = {
    "torch.nn.RMSNorm": torch.nn.RMSNorm(32, dtype=torch.float64),
    "Qwen3MoeRMSNorm": layer.input_layernorm,
    "Qwen3MoeTopKRouter's weights": lambda x: layer.mlp.gate(x)[1],
    "Qwen3MoeSparseMoeBlock": lambda x: layer.mlp(x[None]),
    "Qwen3MoeDecoderLayer": lambda x: layer(x[None], position_embeddings=position),
}
x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
for name, piece in pieces.items():
    passes = []
    for mode in (nullcontext, Float64):
        with mode():
            passes.append(torch.autograd.gradcheck(piece, x, raise_exception=False))
    print(f"{name}: gradcheck passes: {passes[0]}, with float64 for float32: {passes[1]}")
PY

venv/bin/python double.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
Qwen3MoeForCausalLM: logits torch.float64, an error of float32's size: True
MixtralForCausalLM: logits torch.float64, an error of float32's size: True
GptOssForCausalLM: logits torch.float64, an error of float32's size: True
DeepseekV3ForCausalLM: logits torch.float64, an error of float32's size: True
torch.nn.RMSNorm: gradcheck passes: True, with float64 for float32: True
Qwen3MoeRMSNorm: gradcheck passes: False, with float64 for float32: True
Qwen3MoeTopKRouter's weights: gradcheck passes: False, with float64 for float32: True
Qwen3MoeSparseMoeBlock: gradcheck passes: False, with float64 for float32: True
Qwen3MoeDecoderLayer: gradcheck passes: False, with float64 for float32: True
SEEN
