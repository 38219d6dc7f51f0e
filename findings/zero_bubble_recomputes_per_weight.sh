#!/usr/bin/env bash
# Zero-bubble schedules split a backward into the input's and the weights' part. In torch.distributed.pipelining the weights'
# part is one autograd call for each group of parameters, and non-reentrant checkpointing recomputes its whole block for
# every call: a checkpointed transformer layer runs forward 8 times per micro-batch (1, then 1 for the input, then 6 for
# the groups of its weights), where 1F1B runs it 2 times; the first stage, whose backward is not split, runs 2. The gradients
# are right. Checkpointing, which is to buy memory with a third more work, costs seven forwards more, and whatever a forward
# counts (tokens per expert, batches seen) is counted 8 times.
#
# Seen with torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package index. Two minutes, most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy

cat > recompute.py <<'PY'
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining import PipelineStage, schedules
from torch.utils.checkpoint import checkpoint

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.set_default_dtype(torch.float64)
MICROS, SHAPE = 8, (1, 5, 16)


class Block(nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.checkpointed, self.forwards = checkpointed, 0

    def run(self, x):
        self.forwards += 1
        return self.layer(x)

    def forward(self, x):
        return checkpoint(self.run, x, use_reentrant=False) if self.checkpointed else self.run(x)


for checkpointed in (False, True):
    for name in ("Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"):
        torch.manual_seed(0)
        blocks = [Block(checkpointed) for _ in range(4)]
        x, target = torch.randn(2, MICROS, *SHAPE[1:])
        F.mse_loss(nn.Sequential(*blocks)(x), target).backward()
        expected = [[p.grad for p in block.parameters()] for block in blocks]
        mine = (rank, 3 - rank) if name == "ZBVZeroBubble" else (rank, rank + 2)
        stages = []
        for i in mine:
            blocks[i].zero_grad()
            blocks[i].forwards = 0
            stages.append(PipelineStage(blocks[i], i, 4, torch.device("cpu"),
                                        input_args=torch.empty(SHAPE, requires_grad=i > 0),
                                        output_args=torch.empty(SHAPE, requires_grad=True)))
        run = getattr(schedules, "Schedule" + name)(stages, MICROS, loss_fn=F.mse_loss)
        run.step(*([x] if rank == 0 else []), target=target)
        for i in mine:
            for p, gradient in zip(blocks[i].parameters(), expected[i]):
                torch.testing.assert_close(p.grad, gradient)
        everyone = [None, None]
        dist.all_gather_object(everyone, [(i, blocks[i].forwards / MICROS) for i in mine])
        if rank == 0:
            print(f"{name}, checkpointing {checkpointed}: forwards per micro-batch in stages 0 to 3:",
                  *(f"{count:g}" for _, count in sorted(sum(everyone, []))))
PY

export OMP_NUM_THREADS=1
venv/bin/torchrun --standalone --nproc-per-node 2 recompute.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
Interleaved1F1B, checkpointing False: forwards per micro-batch in stages 0 to 3: 1 1 1 1
InterleavedZeroBubble, checkpointing False: forwards per micro-batch in stages 0 to 3: 1 1 1 1
ZBVZeroBubble, checkpointing False: forwards per micro-batch in stages 0 to 3: 1 1 1 1
Interleaved1F1B, checkpointing True: forwards per micro-batch in stages 0 to 3: 2 2 2 2
InterleavedZeroBubble, checkpointing True: forwards per micro-batch in stages 0 to 3: 2 8 8 8
ZBVZeroBubble, checkpointing True: forwards per micro-batch in stages 0 to 3: 2 8 8 8
SEEN
