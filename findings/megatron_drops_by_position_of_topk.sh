#!/usr/bin/env bash
# megatron-core's moe_token_drop_policy "position" is documented to drop the tokens at the end of each batch once an expert
# is full. It takes topk over a column of zeros and ones, and topk promises no order among equals. On a CPU an expert that all
# 1000 tokens chose keeps exactly the LAST 500, and exactly the first 15 where its capacity is 15; with two of eight experts
# per token nearly as many tokens go from the first half of the batch as from the second. A CPU reference of this policy pins
# the order in which a selection algorithm leaves ties, not a rule of position.
#
# Seen with megatron-core 0.16.1, torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package index. Two minutes,
# most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy megatron-core==0.16.1

cat > drop.py <<'PY'
import torch
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping

torch.manual_seed(0)
for experts, k, factor in ((1, 1, 0.5), (1, 1, 0.015), (8, 2, 0.5)):
    probs, ids = torch.rand(1000, experts).topk(k)
    chosen = torch.zeros(1000, experts, dtype=torch.bool).scatter(1, ids, True)
    routing = torch.zeros(1000, experts).scatter(1, ids, probs)
    kept = apply_router_token_dropping(routing, chosen, k, factor, drop_policy="position")[1]
    print(f"{experts} expert(s), top {k}, capacity factor {factor}: kept", int(kept.sum()), end=" ")
    if experts == 1:
        tokens = kept.nonzero()[:, 0]
        assert len(tokens) == tokens[-1] - tokens[0] + 1
        print(f"of 1000, tokens {tokens[0]} to {tokens[-1]}")
    else:
        dropped = (chosen & ~kept).view(2, -1).sum(1)
        print(f"of 2000, dropped {dropped[0]} in the first half of the batch and {dropped[1]} in the second")
PY

venv/bin/python drop.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
1 expert(s), top 1, capacity factor 0.5: kept 500 of 1000, tokens 500 to 999
1 expert(s), top 1, capacity factor 0.015: kept 15 of 1000, tokens 0 to 14
8 expert(s), top 2, capacity factor 0.5: kept 1000 of 2000, dropped 466 in the first half of the batch and 534 in the second
SEEN
