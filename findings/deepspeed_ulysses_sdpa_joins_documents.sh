#!/usr/bin/env bash
# DeepSpeed's Ulysses for transformers demands position_ids in every batch, restarting at each document of a packed row, and
# accepts SDPA as the attention inside. With SDPA the restarts say nothing: the mask that transformers derives from the very
# same position_ids is dropped on the way in (it is that of a shard) and none is made for the gathered sequence, so every
# token attends to all documents before its own. A sliding window is that mask too, and is gone even in a row of one document.
# On one process the same models, rows and attn_implementation="sdpa" keep both; nothing warns. Plain causal rows are exact.
#
# Seen with deepspeed 0.19.8, transformers 5.24.0, torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package
# index. Four minutes, most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy setuptools wheel transformers==5.24.0
DS_BUILD_OPS=0 venv/bin/pip install -q --no-build-isolation deepspeed==0.19.8

cat > documents.py <<'PY'
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

deepspeed.ops.__compatible_ops__.clear()            # no compiled communication
deepspeed.init_distributed("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
LENGTH = 64
sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, initializer_range=0.2, attn_implementation="sdpa")
models = {"Qwen3": Qwen3ForCausalLM(Qwen3Config(**sizes)),
          "Mistral, window 8": MistralForCausalLM(MistralConfig(**sizes, sliding_window=8))}
ids = torch.randint(64, (1, LENGTH))
rows = {"one document": torch.arange(LENGTH)[None],
        "two documents": torch.cat([torch.arange(40), torch.arange(24)])[None]}
mine = slice(rank * LENGTH // ranks, (rank + 1) * LENGTH // ranks)


@torch.no_grad()
def logits(model, ids, positions):
    return model.double()(input_ids=ids, position_ids=positions, use_cache=False).logits


alone = {(name, row): logits(model, ids, rows[row]) for name, model in models.items() for row in rows}
UlyssesSPAttentionHF.register_with_transformers(models["Qwen3"], "sdpa", sequence_parallel_size=ranks, micro_batch_size=1)
for (name, row), expected in alone.items():
    parts = [torch.empty(LENGTH // ranks) for _ in range(ranks)]
    error = (logits(models[name], ids[:, mine], rows[row][:, mine]) - expected[:, mine]).abs().amax(-1)[0]
    dist.all_gather(parts, error.float())
    wrong = (torch.cat(parts) > 1e-6).nonzero().flatten().tolist()
    if rank == 0:
        print(f"{name}, {row}: {len(wrong)} of {LENGTH} tokens differ" + (f", the first is {wrong[0]}" if wrong else ""))
PY

export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu
venv/bin/torchrun --standalone --nproc-per-node 2 documents.py 2> stderr | grep tokens | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
Qwen3, one document: 0 of 64 tokens differ
Qwen3, two documents: 24 of 64 tokens differ, the first is 40
Mistral, window 8, one document: 56 of 64 tokens differ, the first is 8
Mistral, window 8, two documents: 56 of 64 tokens differ, the first is 8
SEEN
