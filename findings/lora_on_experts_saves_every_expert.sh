#!/usr/bin/env bash
# peft reaches the experts of transformers' mixtures, one parameter [E, ..], by LoraConfig(target_parameters=..). The adapter
# is folded into the weights in every forward, for all experts, those without a token too, and autograd keeps what it folded:
# the products' backward needs it, once per layer until the step is over. Two tokens, each to 2 of 16 experts, keep a second
# copy of the experts (but the first layer's gate_up_proj: nothing below it is trained), 29 times what TRAINING EVERY WEIGHT
# keeps. The backward makes the gradient of a whole [E, ..] to get the adapters' from it. So LoRA on the experts
# wants twice the frozen weights where LoRA on attention wants them once. Gradient checkpointing keeps one layer's at a time.
#
# Seen with peft 0.21.2, transformers 5.24.0, torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package index.
# Two minutes, most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy transformers==5.24.0 accelerate==1.15.0 peft==0.21.2

cat > saved.py <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

EXPERTS = 16


def saved(trained, tokens, checkpointed):
    """Bytes that the backward of a step on `tokens` keeps beyond the parameters, and those of the experts."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=EXPERTS, num_experts_per_tok=2, use_cache=False,
        experts_implementation="grouped_mm")).train()
    experts = sum(p.nbytes for name, p in model.named_parameters() if "experts" in name)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if trained == "LoRA on experts":
        model = get_peft_model(model, LoraConfig(
            r=4, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]))
    elif trained == "LoRA on attention":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    own = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage          # holds it, so that no address comes twice
        return t

    ids = torch.randint(64, (1, tokens))
    with saved_tensors_hooks(keep, lambda t: t):
        loss = model(ids, labels=ids).loss
    loss.backward()
    return sum(s.nbytes() for s in kept.values()), experts


for tokens in (2, 64):
    for trained in ("every weight", "LoRA on attention", "LoRA on experts"):
        for checkpointed in (False, True):
            kept, experts = saved(trained, tokens, checkpointed)
            print(f"{tokens} tokens, {trained}, checkpointing {checkpointed}: kept for backward",
                  f"{kept / experts:.3f} of the experts' bytes")
PY

venv/bin/python saved.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
2 tokens, every weight, checkpointing False: kept for backward 0.029 of the experts' bytes
2 tokens, every weight, checkpointing True: kept for backward 0.003 of the experts' bytes
2 tokens, LoRA on attention, checkpointing False: kept for backward 0.018 of the experts' bytes
2 tokens, LoRA on attention, checkpointing True: kept for backward 0.002 of the experts' bytes
2 tokens, LoRA on experts, checkpointing False: kept for backward 0.851 of the experts' bytes
2 tokens, LoRA on experts, checkpointing True: kept for backward 0.002 of the experts' bytes
64 tokens, every weight, checkpointing False: kept for backward 0.911 of the experts' bytes
64 tokens, every weight, checkpointing True: kept for backward 0.084 of the experts' bytes
64 tokens, LoRA on attention, checkpointing False: kept for backward 0.577 of the experts' bytes
64 tokens, LoRA on attention, checkpointing True: kept for backward 0.063 of the experts' bytes
64 tokens, LoRA on experts, checkpointing False: kept for backward 1.399 of the experts' bytes
64 tokens, LoRA on experts, checkpointing True: kept for backward 0.063 of the experts' bytes
SEEN
