#!/usr/bin/env bash
# megatron-core's hybrid context parallelism (new, for packed sequences of mixed lengths) puts every sequence on as many ranks
# as its memory needs, and runs the groups side by side; BalancedCPScheduler's stated aim is roughly the same work on all
# ranks. Ranks grow with the length and work with its square, so the longest sequence takes the most time, and one would
# expect it to get the ranks left over. They go to the shortest: each gets a rank of its own, and while a rank is still empty
# it is a smallest group that is doubled. Below, batches with a few long sequences leave the ranks idle three quarters of the
# time, by the scheduler's own estimate of the work (length squared over ranks); plain context parallelism, one sequence after
# the other over all ranks, takes a quarter of the time by the same estimate. Equal sequences are balanced perfectly.
#
# Seen with megatron-core 0.16.1, torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package index. Two minutes,
# most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy megatron-core==0.16.1

cat > plan.py <<'PY'
from collections import Counter

from megatron.core.pipeline_parallel.hybrid_cp_schedule import BalancedCPScheduler


class Ranks:                    # all that the scheduler asks of a process group
    def __init__(self, size):
        self.size = lambda: size


def plan(ranks, lengths, most=8192):
    scheduler = BalancedCPScheduler(most, Ranks(ranks))
    plans = scheduler.get_groups_and_subsamples(list(enumerate(lengths)), None)[1]
    assert sorted({i for step in plans for order in step for i in order}) == list(range(len(lengths)))
    time = 0
    print(f"{ranks} ranks of at most {most} tokens:")
    for number, step in enumerate(plans):
        shared = Counter(i for order in step for i in order)
        times = [sum(scheduler.get_total_workload(lengths[i], shared[i]) for i in order) for order in step]
        time += max(times)
        kinds = Counter((lengths[i], scheduler.gpus_needed(lengths[i]), n) for i, n in shared.items())
        for (length, needed, given), count in sorted(kinds.items(), reverse=True):
            print(f"    step {number}: {count} of {length} tokens need {needed}, get {given}")
    whole = sum(scheduler.get_total_workload(length, ranks) for length in lengths)
    print(f"    idle {1 - whole / time:.0%}, time over that of plain context parallelism {time / whole:.2f}")


plan(16, [32768] + [4096] * 6)
plan(16, [32768] + [1024] * 11)
plan(32, [32768] * 2 + [4096] * 12)
plan(64, [131072] + [16384] * 4 + [4096] * 16 + [1024] * 64)
plan(16, [32768] * 8)
PY

venv/bin/python plan.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
16 ranks of at most 8192 tokens:
    step 0: 1 of 32768 tokens need 4, get 4
    step 0: 6 of 4096 tokens need 1, get 2
    idle 73%, time over that of plain context parallelism 3.66
16 ranks of at most 8192 tokens:
    step 0: 1 of 32768 tokens need 4, get 4
    step 0: 1 of 1024 tokens need 1, get 2
    step 0: 10 of 1024 tokens need 1, get 1
    idle 75%, time over that of plain context parallelism 3.96
32 ranks of at most 8192 tokens:
    step 0: 2 of 32768 tokens need 4, get 4
    step 0: 12 of 4096 tokens need 1, get 2
    idle 73%, time over that of plain context parallelism 3.66
64 ranks of at most 8192 tokens:
    step 0: 1 of 131072 tokens need 16, get 16
    step 0: 4 of 16384 tokens need 2, get 2
    step 0: 16 of 4096 tokens need 1, get 1
    step 0: 64 of 1024 tokens need 1, get 1
    idle 73%, time over that of plain context parallelism 3.70
16 ranks of at most 8192 tokens:
    step 0: 8 of 32768 tokens need 4, get 4
    idle 0%, time over that of plain context parallelism 1.00
SEEN
