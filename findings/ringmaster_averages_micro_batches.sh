#!/usr/bin/env bash
# Transformers' Trainer divides the loss of each micro-batch by the targets of the whole accumulated step (num_items_in_batch),
# so that every token weighs the same. Ringmaster (new in 2026, sequence parallelism for transformers and axolotl) has to scale
# that number when it shards a batch, and one would expect it to start from what it is handed. It counts anew, in the one
# micro-batch that it sees, times the number of micro-batches: the step's gradient is exactly the mean of the
# micro-batches' means, a token of a micro-batch with 4 targets weighs 15 times one of a micro-batch with 60, and the gradient
# is off by more than its own norm. An odd number of targets on two ranks is halved and rounded to even: with 61 and 5
# targets it is neither mean. The model runs unchanged, by ringmaster's Ulysses on two gloo ranks.
#
# Seen with axolotl-ringmaster 0.2.7, transformers 5.24.0, torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a
# package index. Three minutes, most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy transformers==5.24.0 axolotl-ringmaster==0.2.7

cat > tokens.py <<'PY'
import ringmaster
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

dist.init_process_group("gloo")
torch.manual_seed(0)
LENGTH = 64
model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                     num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa"))
ids = torch.randint(32, (2, 1, LENGTH))


def gradient(losses):
    model.zero_grad()
    for loss in losses():
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def micro_batches(counted, tokens):
    """Losses of two micro-batches, the last counted[i] tokens of each its targets, divided by tokens or else by their own."""
    for row, n in zip(ids, counted):
        labels = row.masked_fill(torch.arange(LENGTH) < LENGTH - n, -100)
        yield model(input_ids=row, labels=labels, **({"num_items_in_batch": tokens} if tokens else {})).loss


for counted in ((60, 4), (61, 5)):
    model.set_attn_implementation("sdpa")
    per_token = gradient(lambda: micro_batches(counted, sum(counted)))
    per_batch = gradient(lambda: (loss / 2 for loss in micro_batches(counted, None)))

    runtime = ringmaster.setup(ringmaster.RingmasterConfig(size=2, backend=ringmaster.Backend.ULYSSES), num_kv_heads=2,
                               device_type="cpu", inner_attn="sdpa")
    model.set_attn_implementation(runtime.attn_implementation)
    with ringmaster.ContextParallelContextManager([model], runtime.cp_group, gradient_accumulation_steps=2):
        parallel = gradient(lambda: micro_batches(counted, sum(counted)))
    dist.all_reduce(parallel)
    parallel /= 2
    if dist.get_rank() == 0:
        print(f"{counted[0]} and {counted[1]} targets:")
        for name, one in (("mean over the step's tokens", per_token), ("mean of the micro-batches' means", per_batch)):
            print(f"    {name}: relative difference {(parallel - one).norm() / one.norm():.3f},",
                  f"cosine {F.cosine_similarity(parallel, one, dim=0):.3f}")
PY

export OMP_NUM_THREADS=1
venv/bin/torchrun --standalone --nproc-per-node 2 tokens.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
60 and 4 targets:
    mean over the step's tokens: relative difference 1.741, cosine 0.478
    mean of the micro-batches' means: relative difference 0.000, cosine 1.000
61 and 5 targets:
    mean over the step's tokens: relative difference 1.966, cosine 0.476
    mean of the micro-batches' means: relative difference 0.240, cosine 0.999
SEEN
