#!/usr/bin/env bash
# torch.optim.Muon orthogonalises in bf16 whatever it is given: with fp64 parameters and gradients the step is the fp32 one
# bit for bit, every element a bf16 number, more than 1 % off the same iteration in fp64, although the momentum is kept in
# fp64. In exact arithmetic the step does not depend on the gradient's scale, nor on which way round the matrix is stored;
# here three times the gradient, or the transposed matrix, is a step that differs by more than 1 %. An fp64 test of another
# Muon against this one cannot ask for more.
#
# Seen with torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package index. Two minutes, most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy

cat > step.py <<'PY'
import torch


def step(gradient):
    p = torch.nn.Parameter(torch.zeros_like(gradient))
    p.grad = gradient.clone()
    optimizer = torch.optim.Muon([p], lr=1.0, weight_decay=0.0)
    optimizer.step()
    return -p.detach(), optimizer.state[p]["momentum_buffer"].dtype


torch.manual_seed(0)
gradient = torch.randn(64, 64, dtype=torch.float64)
update, momentum = step(gradient)
exact = gradient / gradient.norm()
a, b, c = 3.4445, -4.775, 2.0315        # torch's defaults, as its five iterations
for _ in range(5):
    gram = exact @ exact.T
    exact = a * exact + (b * gram + c * gram @ gram) @ exact

print("momentum", momentum, "update", update.dtype)
print("equal to the fp32 step:", torch.equal(update, step(gradient.float())[0].double()))
print("all elements bf16 numbers:", torch.equal(update, update.bfloat16().double()))
for name, other in (("the same iteration in fp64", exact), ("the step of 3 G", step(3 * gradient)[0]),
                    ("the step of G transposed", step(gradient.T.contiguous())[0].T)):
    print(f"over 1 % from {name}:", bool((update - other).norm() > 0.01 * other.norm()))
PY

venv/bin/python step.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
momentum torch.float64 update torch.float64
equal to the fp32 step: True
all elements bf16 numbers: True
over 1 % from the same iteration in fp64: True
over 1 % from the step of 3 G: True
over 1 % from the step of G transposed: True
SEEN
