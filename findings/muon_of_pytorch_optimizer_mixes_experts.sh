#!/usr/bin/env bash
# pytorch-optimizer's Muon takes a stack of expert matrices [4, 16, 32] for ONE matrix of 4 x 512: it orthogonalises the
# experts against each other, and the rows of each expert not at all. The flattened update has singular values near 1, each
# expert's own update has not, down to .06. A mixture of experts trains on, with another optimizer than its name says.
#
# Seen with pytorch-optimizer 4.1.0, torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package index. Two minutes, most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy pytorch-optimizer==4.1.0

cat > step.py <<'PY'
import torch
from pytorch_optimizer import Muon

torch.manual_seed(0)
experts = torch.nn.Parameter(torch.zeros(4, 16, 32))
experts.grad = torch.randn(4, 16, 32)
Muon([{"params": [experts], "use_muon": True}], lr=1.0, weight_decay=0.0).step()
update = -experts.detach()
for name, matrices in (("one 4 x 512", update.reshape(4, 512)), ("each 16 x 32", update)):
    values = torch.linalg.svdvals(matrices)
    print(f"singular values of {name}: {values.min():.1f} to {values.max():.1f}")
PY

venv/bin/python step.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
singular values of one 4 x 512: 0.7 to 1.0
singular values of each 16 x 32: 0.1 to 0.4
SEEN
