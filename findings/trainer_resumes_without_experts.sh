#!/usr/bin/env bash
# transformers' Trainer, told to resume a Qwen3-MoE from its own checkpoint, continues with the experts that the model happens
# to have: attention, embeddings and routers come back, the experts do not. The checkpoint has them one by one, as
# save_pretrained writes them, and the resume looks for the fused tensors of memory; from_pretrained, which converts, is not
# asked. All that is said is a warning about missing keys. The optimizer's moments and the data's position are those of the
# checkpoint, so the run goes on as if nothing were wrong.
#
# Seen with transformers 5.24.0, accelerate 1.15.0, torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package index. Two minutes, most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy transformers==5.24.0 accelerate==1.15.0

cat > resume.py <<'PY'
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Trainer, TrainingArguments, set_seed

config = Qwen3MoeConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                        head_dim=8, intermediate_size=32, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
                        norm_topk_prob=True, eos_token_id=1)
torch.manual_seed(0)
data = [{"input_ids": row, "labels": row} for row in torch.randint(64, (8, 16))]


def fresh(seed):
    set_seed(seed)
    return AutoModelForCausalLM.from_config(config, experts_implementation="eager")


def train(model, **more):
    arguments = TrainingArguments("out", max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
                                  report_to=[], disable_tqdm=True, use_cpu=True)
    Trainer(model=model, args=arguments, train_dataset=data).train(**more)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


straight = train(fresh(0))
other = fresh(1)
begun = {name: p.detach().clone() for name, p in other.named_parameters()}
resumed = train(other, resume_from_checkpoint="out/checkpoint-2")
for part in ("self_attn.q_proj", "mlp.gate", "experts.gate_up_proj", "experts.down_proj"):
    name = next(name for name in straight if part in name)
    nearer = (resumed[name] - begun[name]).norm() < (resumed[name] - straight[name]).norm()
    print(f"{part}: equals the run that was not interrupted {torch.equal(resumed[name], straight[name])}, "
          f"nearer to the fresh model's random values {bool(nearer)}")
stored = AutoModelForCausalLM.from_pretrained("out/checkpoint-4")
print("from_pretrained of a checkpoint has its experts:", bool(all(
    (p == resumed[name]).all() for name, p in stored.named_parameters() if "experts" in name)))
PY

venv/bin/python resume.py 2> stderr | grep -v "^{" | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
self_attn.q_proj: equals the run that was not interrupted False, nearer to the fresh model's random values False
mlp.gate: equals the run that was not interrupted False, nearer to the fresh model's random values False
experts.gate_up_proj: equals the run that was not interrupted False, nearer to the fresh model's random values True
experts.down_proj: equals the run that was not interrupted False, nearer to the fresh model's random values True
from_pretrained of a checkpoint has its experts: True
SEEN
