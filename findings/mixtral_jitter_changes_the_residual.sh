#!/usr/bin/env bash
# transformers' Mixtral multiplies the hidden states by its router jitter IN PLACE: in training the experts see the jittered
# rows, and so does whoever still holds the tensor that went in. (MegaBlocks, from which the option comes, jitters the
# router's input alone.) In evaluation nothing changes, so a test in eval mode cannot see it.
#
# Seen with transformers 5.24.0, torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package index. Two minutes, most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy transformers==5.24.0

cat > jitter.py <<'PY'
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

config = MixtralConfig(hidden_size=8, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2,
                       router_jitter_noise=0.1)
torch.manual_seed(0)
layer = MixtralSparseMoeBlock(config)
for parameter in layer.parameters():
    torch.nn.init.normal_(parameter, std=0.1)
for mode in (True, False):
    x = torch.ones(1, 3, 8)
    layer.train(mode)(x)
    print("training" if mode else "evaluation", "leaves the caller's ones as they were:", bool((x == 1).all()))
PY

venv/bin/python jitter.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
training leaves the caller's ones as they were: False
evaluation leaves the caller's ones as they were: True
SEEN
