#!/usr/bin/env bash
# DeepSpeed's DualPipeV (new in 2026, to shrink the bubble of 1F1B) keeps the weights' gradients in the backward, and with a
# whole backward its order idles longer than interleaved 1F1B of the same cut, two stages a rank, which is older and simpler:
# 27 forwards of a half stage against 21 on 8 ranks, where 1F1B idles 42. The gap grows with the backward: one that recomputes
# its forward, as a pipeline's mostly does, gives 41, 28 and 56. What it buys is memory on the first ranks: 17 half stages'
# micro-batches at most instead of 23.
#
# The orders are the packages' own; the script plays each action as soon as its rank and its inputs are free, and counts no
# communication (DeepSpeed's waits in batches, which can only add to it).
#
# Seen with deepspeed 0.19.8, torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package index. Two minutes,
# most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy setuptools wheel
DS_BUILD_OPS=0 venv/bin/pip install -q --no-build-isolation deepspeed==0.19.8

cat > idle.py <<'PY'
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg
from deepspeed.runtime.pipe.schedule import BackwardPass, DualPipeVSchedule, ForwardPass, TrainSchedule
from torch import device, nn
from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B


def deepspeed(schedule, ranks, micros):
    """The (kind, stage, micro-batch) of every rank, in its order."""
    orders = []
    for rank in range(ranks):
        order, done = [], {}
        for step in schedule(micro_batches=micros, stages=ranks, stage_id=rank):
            for action in step:
                if isinstance(action, (ForwardPass, BackwardPass)):
                    kind, phase = type(action).__name__[0], action.kwargs.get("phase", 0)
                    done[kind, phase] = done.get((kind, phase), -1) + 1
                    order.append((kind, 2 * ranks - 1 - rank if phase else rank, done[kind, phase]))
        orders.append(order)
    return orders


def torch_interleaved(ranks, micros):
    dist.init_process_group("fake", rank=0, world_size=ranks)
    stages = [PipelineStage(nn.Identity(), i, 2 * ranks, device("cpu")) for i in (0, ranks)]
    orders = ScheduleInterleaved1F1B(stages, micros, loss_fn=nn.MSELoss()).pipeline_order
    dist.destroy_process_group()
    return [[(a.computation_type.value, a.stage_index, a.microbatch_index) for a in orders[rank] if a]
            for rank in range(ranks)]


def play(orders, forward, backward):
    """Time of the last action and most micro-batches alive on a rank, each action as soon as its rank and inputs are free."""
    last = max(stage for order in orders for _, stage, _ in order)
    ends, clocks, at = {}, [0] * len(orders), [0] * len(orders)
    alive, most = [0] * len(orders), 0
    while any(at[r] < len(order) for r, order in enumerate(orders)):
        for r, order in enumerate(orders):
            while at[r] < len(order):
                kind, stage, micro = order[at[r]]
                if kind == "F":
                    needs = [("F", stage - 1, micro)] if stage else []
                else:
                    needs = [("F", stage, micro)] + ([("B", stage + 1, micro)] if stage < last else [])
                if any(n not in ends for n in needs):
                    break
                clocks[r] = max([clocks[r], *(ends[n] for n in needs)]) + (forward if kind == "F" else backward)
                ends[kind, stage, micro] = clocks[r]
                alive[r] += 1 if kind == "F" else -1
                most, at[r] = max(most, alive[r]), at[r] + 1
    return max(clocks), most


for ranks in (2, 4, 8):
    micros = 4 * ranks
    for forward, backward in ((1, 2), (1, 3)):
        print(f"{ranks} ranks, {micros} micro-batches, backward {backward} forwards:")
        for name, orders, halves in (("DeepSpeed 1F1B", deepspeed(TrainSchedule, ranks, micros), 2),
                                     ("DeepSpeed DualPipeV", deepspeed(DualPipeVSchedule, ranks, micros), 1),
                                     ("torch interleaved 1F1B", torch_interleaved(ranks, micros), 1)):
            end, most = play(orders, halves * forward, halves * backward)
            print(f"    {name}: idle {end - 2 * micros * (forward + backward)},",
                  f"at most {most} micro-batches of a {'half' if halves == 1 else 'whole'} stage on a rank")
PY

DS_ACCELERATOR=cpu venv/bin/python idle.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
2 ranks, 8 micro-batches, backward 2 forwards:
    DeepSpeed 1F1B: idle 6, at most 2 micro-batches of a whole stage on a rank
    DeepSpeed DualPipeV: idle 3, at most 5 micro-batches of a half stage on a rank
    torch interleaved 1F1B: idle 3, at most 5 micro-batches of a half stage on a rank
2 ranks, 8 micro-batches, backward 3 forwards:
    DeepSpeed 1F1B: idle 8, at most 2 micro-batches of a whole stage on a rank
    DeepSpeed DualPipeV: idle 5, at most 5 micro-batches of a half stage on a rank
    torch interleaved 1F1B: idle 4, at most 5 micro-batches of a half stage on a rank
4 ranks, 16 micro-batches, backward 2 forwards:
    DeepSpeed 1F1B: idle 18, at most 4 micro-batches of a whole stage on a rank
    DeepSpeed DualPipeV: idle 11, at most 9 micro-batches of a half stage on a rank
    torch interleaved 1F1B: idle 9, at most 11 micro-batches of a half stage on a rank
4 ranks, 16 micro-batches, backward 3 forwards:
    DeepSpeed 1F1B: idle 24, at most 4 micro-batches of a whole stage on a rank
    DeepSpeed DualPipeV: idle 17, at most 9 micro-batches of a half stage on a rank
    torch interleaved 1F1B: idle 12, at most 11 micro-batches of a half stage on a rank
8 ranks, 32 micro-batches, backward 2 forwards:
    DeepSpeed 1F1B: idle 42, at most 8 micro-batches of a whole stage on a rank
    DeepSpeed DualPipeV: idle 27, at most 17 micro-batches of a half stage on a rank
    torch interleaved 1F1B: idle 21, at most 23 micro-batches of a half stage on a rank
8 ranks, 32 micro-batches, backward 3 forwards:
    DeepSpeed 1F1B: idle 56, at most 8 micro-batches of a whole stage on a rank
    DeepSpeed DualPipeV: idle 41, at most 17 micro-batches of a half stage on a rank
    torch interleaved 1F1B: idle 28, at most 23 micro-batches of a half stage on a rank
SEEN
