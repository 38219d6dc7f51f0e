#!/usr/bin/env bash
# A PipelineStage without given shapes infers them in the first step by one real forward of its module, not on the meta device
# and not with its buffers put aside; every stage but the first runs it on uninitialised memory. BatchNorm's running
# statistics and a router's count of tokens per expert take that in for good: one micro-batch too many everywhere, and
# garbage in the later stages. With use_deterministic_algorithms(True), which fills such memory with NaN, the running
# mean is NaN in every stage but the first from the first step on, while training, which reads the batch's own statistics,
# has the losses of one process. The first evaluation finds it. Right: input_args and output_args.
#
# Seen with torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package index. Two minutes, most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy

cat > buffers.py <<'PY'
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.use_deterministic_algorithms(True)
MICROS, ROWS, WIDTH, EXPERTS, STEPS = 4, 8, 8, 4, 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.register_buffer("tokens", torch.zeros(EXPERTS, dtype=torch.int64))

    def forward(self, x):
        with torch.no_grad():
            self.tokens += F.one_hot(self.router(x).argmax(-1), EXPERTS).sum(0)
        return torch.tanh(self.norm(self.linear(x)))


def blocks():
    torch.manual_seed(0)
    return [Block(), Block()]


one = blocks()
x, target = torch.randn(2, MICROS * ROWS, WIDTH)
expected = []
for _ in range(STEPS):
    expected.append([F.mse_loss(one[1](one[0](a)), b) for a, b in zip(x.split(ROWS), target.split(ROWS))])

for given in (True, False):
    block = blocks()[rank]
    example = dict(input_args=torch.empty(ROWS, WIDTH, requires_grad=rank > 0),
                   output_args=torch.empty(ROWS, WIDTH, requires_grad=True))
    stage = PipelineStage(block, rank, 2, torch.device("cpu"), **example if given else {})
    run = Schedule1F1B(stage, MICROS, loss_fn=F.mse_loss)
    same = True
    for step in range(STEPS):
        losses = []
        run.step(*([x] if rank == 0 else []), target=target, losses=losses)
        same &= rank == 0 or torch.allclose(torch.stack(losses), torch.stack(expected[step]))
    found = (f"stage {rank}: batches seen {block.norm.num_batches_tracked} of {one[rank].norm.num_batches_tracked}, tokens "
             f"{block.tokens.sum()} of {one[rank].tokens.sum()}, "
             f"running mean finite: {bool(block.norm.running_mean.isfinite().all())}")
    if rank == 1:
        found += f", losses right: {same}"
    everyone = [None, None]
    dist.all_gather_object(everyone, found)
    if rank == 0:
        for line in everyone:
            print("shapes given," if given else "shapes inferred,", line)
PY

export OMP_NUM_THREADS=1
venv/bin/torchrun --standalone --nproc-per-node 2 buffers.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
shapes given, stage 0: batches seen 12 of 12, tokens 96 of 96, running mean finite: True
shapes given, stage 1: batches seen 12 of 12, tokens 96 of 96, running mean finite: True, losses right: True
shapes inferred, stage 0: batches seen 13 of 12, tokens 104 of 96, running mean finite: True
shapes inferred, stage 1: batches seen 13 of 12, tokens 104 of 96, running mean finite: False, losses right: True
SEEN
