#!/usr/bin/env bash
# transformers' mixtures collect the router logits of their balancing loss by hooks. With gradient checkpointing of the
# reentrant kind (use_reentrant=True) the hooks see its first pass, which runs without gradients: the losses reported are the
# same to the last digit, and the balancing loss trains nothing. The gates still receive the language model's gradient, so
# none is missing and none is zero; it is the gradient of router_aux_loss_coef = 0. Each of the two is right by itself.
#
# Seen with transformers 5.24.0, torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package index. Two minutes,
# most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy transformers==5.24.0

cat > aux.py <<'PY'
import torch
from transformers import MixtralConfig, MixtralForCausalLM

torch.manual_seed(0)
model = MixtralForCausalLM(MixtralConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4, output_router_logits=True, use_cache=False)).train()
ids = torch.randint(64, (2, 16))


def step(coefficient):
    model.router_aux_loss_coef = coefficient
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    return out, model.model.layers[1].mlp.gate.weight.grad


_, without = step(0.0)
for name, options in (("no checkpointing", None), ("use_reentrant=False", {"use_reentrant": False}),
                      ("use_reentrant=True", {"use_reentrant": True})):
    if options:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    out, gradient = step(0.1)
    print(f"{name}: loss {out.loss:.4f}, aux loss {out.aux_loss:.4f} differentiable: {out.aux_loss.requires_grad},",
          "gate's gradient that of coefficient 0:", torch.allclose(gradient, without, rtol=1e-3))
PY

venv/bin/python aux.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
no checkpointing: loss 4.4012, aux loss 2.0007 differentiable: True, gate's gradient that of coefficient 0: False
use_reentrant=False: loss 4.4012, aux loss 2.0007 differentiable: True, gate's gradient that of coefficient 0: False
use_reentrant=True: loss 4.4012, aux loss 2.0007 differentiable: False, gate's gradient that of coefficient 0: True
SEEN
