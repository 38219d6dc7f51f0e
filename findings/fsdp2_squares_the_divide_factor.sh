#!/usr/bin/env bash
# FSDP2's set_gradient_divide_factor(f) on a mesh of one rank divides the gradients by f in float32 and bf16, by f * f in
# float16 and float64. Dtypes other than the first two are divided before and after the reduction, against overflow; the
# branch without a reduction divides too, for those whose reduction would have, and is not told of the others. Two ranks are
# right. transformers sets the factor on experts that lie whole on one rank each (fsdp_size = ep_size): of a model in float64,
# as a careful comparison has it, or in float16, all gradients are right but the experts', which are half as large.
#
# Seen with transformers 5.24.0, accelerate 1.15.0, torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package
# index. Two minutes, most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy transformers==5.24.0 accelerate==1.15.0

cat > divide.py <<'PY'
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.distributed import DistributedConfig

dist.init_process_group("gloo")
rank = dist.get_rank()
DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64


def say(*words):
    if rank == 0:
        print(*words)


mesh = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("two", "one"))
for ranks, dtypes in (("one", DTYPES), ("two", DTYPES[2:])):    # for the first dtypes two want a sum that gloo lacks
    for factor in (2.0, 4.0):
        for dtype in dtypes:
            layer = torch.nn.Linear(1, 1, bias=False, dtype=dtype)
            fully_shard(layer, mesh=mesh[ranks])
            layer.set_gradient_divide_factor(factor)
            layer(torch.ones(1, 1, dtype=dtype)).sum().backward()
            gradient = layer.weight.grad.full_tensor().item()
            say(f"mesh of {ranks}, a gradient of 1 on each rank, factor {factor:g}, {dtype}: {gradient:g}")

torch.manual_seed(0)
model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, use_cache=False))
ids = torch.randint(64, (2, 16))
if rank == 0:
    model.save_pretrained("model")
dist.barrier()
for dtype in DTYPES:
    options = {"dtype": dtype, "experts_implementation": "eager"}
    whole = Qwen3MoeForCausalLM.from_pretrained("model", **options)
    for row in ids.split(1):
        (whole(row, labels=row).loss / 2).backward()
    parts = Qwen3MoeForCausalLM.from_pretrained(
        "model", distributed_config=DistributedConfig(fsdp_size=2, ep_size=2), **options)
    row = ids[rank:rank + 1]
    parts(row, labels=row).loss.backward()
    ratios = {"experts": [], "others": []}
    for (name, p), q in zip(parts.named_parameters(), whole.parameters(), strict=True):
        ratios["experts" if "experts" in name else "others"].append(p.grad.full_tensor().norm() / q.grad.norm())
    say(f"Qwen3-MoE, fsdp_size 2, ep_size 2, {dtype}: gradients over one process's:",
        ", ".join(f"{name} {min(r):.2f} to {max(r):.2f}" for name, r in ratios.items()))
dist.destroy_process_group()
PY

export OMP_NUM_THREADS=1
venv/bin/torchrun --standalone --nproc-per-node 2 divide.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
mesh of one, a gradient of 1 on each rank, factor 2, torch.float32: 0.5
mesh of one, a gradient of 1 on each rank, factor 2, torch.bfloat16: 0.5
mesh of one, a gradient of 1 on each rank, factor 2, torch.float16: 0.25
mesh of one, a gradient of 1 on each rank, factor 2, torch.float64: 0.25
mesh of one, a gradient of 1 on each rank, factor 4, torch.float32: 0.25
mesh of one, a gradient of 1 on each rank, factor 4, torch.bfloat16: 0.25
mesh of one, a gradient of 1 on each rank, factor 4, torch.float16: 0.0625
mesh of one, a gradient of 1 on each rank, factor 4, torch.float64: 0.0625
mesh of two, a gradient of 1 on each rank, factor 2, torch.float16: 1
mesh of two, a gradient of 1 on each rank, factor 2, torch.float64: 1
mesh of two, a gradient of 1 on each rank, factor 4, torch.float16: 0.5
mesh of two, a gradient of 1 on each rank, factor 4, torch.float64: 0.5
Qwen3-MoE, fsdp_size 2, ep_size 2, torch.float32: gradients over one process's: experts 1.00 to 1.00, others 1.00 to 1.00
Qwen3-MoE, fsdp_size 2, ep_size 2, torch.bfloat16: gradients over one process's: experts 1.00 to 1.00, others 1.00 to 1.00
Qwen3-MoE, fsdp_size 2, ep_size 2, torch.float16: gradients over one process's: experts 0.50 to 0.50, others 1.00 to 1.00
Qwen3-MoE, fsdp_size 2, ep_size 2, torch.float64: gradients over one process's: experts 0.50 to 0.50, others 1.00 to 1.00
SEEN
