#!/usr/bin/env bash
# torch.distributed.pipelining.pipeline() cuts a model by tracing it. A weight that the embedding and the head share comes out
# as three tensors, without a word: the first stage's embedding, the last stage's head and, in the first stage, a "head.weight"
# that no forward uses and an optimizer skips for want of a gradient. The gradients of the first two add up to the tied one;
# each steps by its own, so that from the first step on the pipeline trains another, larger model than the one it was given,
# and the stages' state dicts hold two different tensors named "head.weight". The ties are the caller's to restore: sum
# the two gradients over the two ranks before every step.
#
# Seen with torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package index. Two minutes, most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy

cat > tied.py <<'PY'
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining import Schedule1F1B, SplitPoint, pipeline

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
MICROS, TOKENS, WIDTH, WORDS = 4, 16, 8, 11


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.layers(self.embedding(ids)))


model = Model()
ids, labels = torch.randint(WORDS, (2, MICROS * TOKENS))
F.cross_entropy(model(ids), labels).backward()
expected = model.embedding.weight.grad
model.zero_grad()

cut = pipeline(model, (ids[:TOKENS],), split_spec={"layers.2": SplitPoint.BEGINNING})
stage = cut.build_stage(rank, torch.device("cpu"))
Schedule1F1B(stage, MICROS, loss_fn=F.cross_entropy).step(*([ids] if rank == 0 else []), target=labels)
tables = {name: p for name, p in stage.submod.named_parameters() if p.shape == (WORDS, WIDTH)}
started_equal = all(torch.equal(p, model.embedding.weight) for p in tables.values())
gradients = {name: p.grad for name, p in tables.items()}
torch.optim.SGD(stage.submod.parameters(), lr=0.1).step()

everyone = [None, None]
dist.all_gather_object(everyone, (started_equal, gradients, {name: p.detach() for name, p in tables.items()}))
if rank == 0:
    (equal0, gradients0, stepped0), (equal1, gradients1, stepped1) = everyone
    print("parameters of the model:", sorted(name for name, p in model.named_parameters() if p.shape == (WORDS, WIDTH)))
    print("stage 0:", sorted(gradients0), "stage 1:", sorted(gradients1), "equal at first:", equal0 and equal1)
    print("without a gradient in stage 0:", [name for name, g in gradients0.items() if g is None])
    a, b = gradients0["embedding.weight"], gradients1["head.weight"]
    for name, g in (("embedding's gradient", a), ("head's gradient", b), ("their sum", a + b)):
        print(f"{name} is the tied one: {torch.allclose(g, expected)}")
    print("after one step embedding and head are equal:", torch.equal(stepped0["embedding.weight"], stepped1["head.weight"]))
    print("the two tensors named head.weight are equal:", torch.equal(stepped0["head.weight"], stepped1["head.weight"]))
PY

export OMP_NUM_THREADS=1
venv/bin/torchrun --standalone --nproc-per-node 2 tied.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
parameters of the model: ['embedding.weight']
stage 0: ['embedding.weight', 'head.weight'] stage 1: ['head.weight'] equal at first: True
without a gradient in stage 0: ['head.weight']
embedding's gradient is the tied one: False
head's gradient is the tied one: False
their sum is the tied one: True
after one step embedding and head are equal: False
the two tensors named head.weight are equal: False
SEEN
