#!/usr/bin/env bash
# FSDP2 with MixedPrecisionPolicy(param_dtype=bf16) casts floating inputs of the wrapped module, and it finds them inside
# dataclasses too: routing weights that a router computed in fp32 arrive in the experts as bf16, however they are passed.
# One would expect an object of the caller's own class to be left alone. cast_forward_inputs=False leaves all of them.
#
# Seen with torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package index. Two minutes, most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy

cat > cast.py <<'PY'
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


@dataclass
class Routing:
    weights: torch.Tensor


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.eye(4))

    def forward(self, x, routing):
        print("inside:", routing.weights.dtype, routing.weights[0].item())
        return x.to(self.w.dtype) @ self.w * routing.weights


dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store", rank=0, world_size=1)
for cast in (True, False):
    experts = Experts()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=cast)
    fully_shard(experts, mesh=dist.init_device_mesh("cpu", (1,)), mp_policy=policy)
    experts(torch.ones(2, 4), Routing(torch.full((2, 1), 1 / 3)))
dist.destroy_process_group()
PY

venv/bin/python cast.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
inside: torch.bfloat16 0.333984375
inside: torch.float32 0.3333333432674408
SEEN
