#!/usr/bin/env bash
# F.grouped_mm, torch's own product of a mixture of experts, stands on no autocast list: in a bf16 region mm, bmm and linear
# give bf16, and the experts beside them compute and return fp32, at fp32's speed, with nothing said. And its rows behind
# the last offset (tokens that are routed nowhere) are memory that nobody wrote, in the result and in the gradient of the
# rows; with torch's poison for unwritten memory they show as NaN. The gradient of the weights is clean.
#
# Seen with torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package index. Two minutes, most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy

cat > grouped.py <<'PY'
import torch
import torch.nn.functional as F

offsets = torch.tensor([16, 32], dtype=torch.int32)
x, w = torch.randn(32, 16), torch.randn(2, 16, 32)
with torch.autocast("cpu", dtype=torch.bfloat16):
    print("autocast: mm", (x @ w[0]).dtype, "bmm", torch.bmm(x.view(2, 16, 16), w).dtype, "grouped_mm",
          F.grouped_mm(x, w, offs=offsets).dtype)

torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
for dtype in (torch.bfloat16, torch.float32):
    x = torch.randn(48, 16, dtype=dtype, requires_grad=True)
    w = torch.randn(2, 16, 32, dtype=dtype, requires_grad=True)
    y = F.grouped_mm(x, w, offs=offsets)
    y[:32].square().sum().backward()
    nan = [t.isnan().any(-1) for t in (y, x.grad, w.grad)]
    print(dtype, "unwritten rows of y, dx, dw:", [int(rows.sum()) for rows in nan])
PY

venv/bin/python grouped.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
autocast: mm torch.bfloat16 bmm torch.bfloat16 grouped_mm torch.float32
torch.bfloat16 unwritten rows of y, dx, dw: [16, 16, 0]
torch.float32 unwritten rows of y, dx, dw: [16, 16, 0]
SEEN
