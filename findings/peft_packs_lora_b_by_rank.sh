#!/usr/bin/env bash
# peft's LoRA of a stack of experts, a parameter [E, ..], is two matrices with E * r rows and E * r columns, packed in two
# orders: row e * r + i of lora_A belongs to expert e, and so does column i * E + e of lora_B. Cutting both the same way, as
# one would for expert parallelism or to take one expert's adapter, gives each expert columns of the others. The shapes are
# the same, and while lora_B is zero, as it begins, or r is 1, nothing tells the two orders apart.
#
# Seen with peft 0.21.2, transformers 5.24.0, torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package index.
# Two minutes, most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy transformers==5.24.0 accelerate==1.15.0 peft==0.21.2

cat > packing.py <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

EXPERTS = 4


def experts_changed(rank, matrix, i):
    """The experts whose weights change: ones in row i of lora_A, or in column i of lora_B, and in all of the other."""
    model = MixtralForCausalLM(MixtralConfig(
        vocab_size=16, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=EXPERTS))
    weights = model.model.layers[0].mlp.experts.down_proj
    before = weights.detach().clone()
    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules=[], target_parameters=["experts.down_proj"]))
    for name, p in adapted.named_parameters():
        if "lora" in name:
            p.data.fill_(1.0)
            if matrix in name:
                part = p.data if matrix == "lora_A" else p.data.T
                part.zero_()[i] = 1.0
    adapted.merge_and_unload()
    return (weights != before).flatten(1).any(1).nonzero().flatten().tolist()


for rank in (1, 3):
    for matrix, parts in (("lora_A", "rows"), ("lora_B", "columns")):
        owners = [experts_changed(rank, matrix, i) for i in range(EXPERTS * rank)]
        print(f"{EXPERTS} experts, r = {rank}, {matrix}'s {parts} belong to experts:", *(e for owner in owners for e in owner))
PY

venv/bin/python packing.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
4 experts, r = 1, lora_A's rows belong to experts: 0 1 2 3
4 experts, r = 1, lora_B's columns belong to experts: 0 1 2 3
4 experts, r = 3, lora_A's rows belong to experts: 0 0 0 1 1 1 2 2 2 3 3 3
4 experts, r = 3, lora_B's columns belong to experts: 0 1 2 3 0 1 2 3 0 1 2 3
SEEN
