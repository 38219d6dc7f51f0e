#!/usr/bin/env bash
# A V-shaped pipeline schedule puts the first and the last stage on one rank, so the embedding and the head can be one tied
# parameter without an exchange. In torch.distributed.pipelining each stage, when its own backwards are over, divides the
# .grad of its parameters in place by the number of micro-batches (scale_grads=True, the default, meant for mean losses). The
# tied gradient is divided by the head's stage and once more by the embedding's, except what the embedding's last micro-batches
# add in between: it is too small and points elsewhere, and all other gradients are right. By the same division a second
# step() before the optimizer's divides the gradients of the first again: 1.25 of one step's with 4 micro-batches, where
# accumulating means 2. Right: scale_grads=False and a loss divided by the number of micro-batches.
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
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import ScheduleDualPipeV, ScheduleZBVZeroBubble

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
MICROS, TOKENS, WIDTH, WORDS = 4, 16, 8, 11
embedding, head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
head.weight = embedding.weight
layers = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
modules = [nn.Sequential(layer, nn.Tanh()) for layer in layers]
modules[0], modules[3] = nn.Sequential(embedding, modules[0]), nn.Sequential(modules[3], head)
ids, labels = torch.randint(WORDS, (2, MICROS * TOKENS))

F.cross_entropy(nn.Sequential(*modules)(ids), labels).backward()
parameters = {"tied": embedding.weight, "last layer": layers[3].weight}
expected = {name: p.grad for name, p in parameters.items()}

for schedule in (ScheduleZBVZeroBubble, ScheduleDualPipeV):
    for steps, scale_grads in ((1, True), (2, True), (1, False), (2, False)):
        for module in modules:
            module.zero_grad()
        stages = [PipelineStage(modules[i], i, 4, torch.device("cpu")) for i in (rank, 3 - rank)]
        run = schedule(stages, MICROS, loss_fn=lambda x, y: F.cross_entropy(x, y) / (1 if scale_grads else MICROS),
                       scale_grads=scale_grads)
        for _ in range(steps):
            run.step(*([ids] if rank == 0 else []), target=labels)
        if rank == 0:
            # norms over that of one step on one process
            print(f"{schedule.__name__}, scale_grads={scale_grads}, {steps} step(s), norm, cosine:",
                  ", ".join(f"{name} {p.grad.norm() / expected[name].norm():.3f} "
                            f"{F.cosine_similarity(p.grad.flatten(), expected[name].flatten(), dim=0):.3f}"
                            for name, p in parameters.items()))
PY

export OMP_NUM_THREADS=1
venv/bin/torchrun --standalone --nproc-per-node 2 tied.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
ScheduleZBVZeroBubble, scale_grads=True, 1 step(s), norm, cosine: tied 0.275 0.935, last layer 1.000 1.000
ScheduleZBVZeroBubble, scale_grads=True, 2 step(s), norm, cosine: tied 0.293 0.935, last layer 1.250 1.000
ScheduleZBVZeroBubble, scale_grads=False, 1 step(s), norm, cosine: tied 1.000 1.000, last layer 1.000 1.000
ScheduleZBVZeroBubble, scale_grads=False, 2 step(s), norm, cosine: tied 2.000 1.000, last layer 2.000 1.000
ScheduleDualPipeV, scale_grads=True, 1 step(s), norm, cosine: tied 0.275 0.935, last layer 1.000 1.000
ScheduleDualPipeV, scale_grads=True, 2 step(s), norm, cosine: tied 0.293 0.935, last layer 1.250 1.000
ScheduleDualPipeV, scale_grads=False, 1 step(s), norm, cosine: tied 1.000 1.000, last layer 1.000 1.000
ScheduleDualPipeV, scale_grads=False, 2 step(s), norm, cosine: tied 2.000 1.000, last layer 2.000 1.000
SEEN
