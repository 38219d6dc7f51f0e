#!/usr/bin/env bash
# A linear layer's training step is three products of the same size: x w^T, dy w, dy^T x. In float32 they take the same time. In
# bfloat16 and float16, on a CPU with AVX2 but no AVX-512, torch multiplies by its own loops, and one would expect all three
# to be slow alike. They are not: dy w, the gradient of the input, is the slowest, 60 times slower than in float32 and six
# times slower than the forward product of the same sizes; for a GPT that is most of a bf16 step.
#
# Seen with torch 2.13.0+cpu on Zen 3 (SEEN below; GFLOP/s on one thread: float32 81, 92, 83; bfloat16 8.5, 1.4, 26;
# float16 9.4, 1.4, 5.7). Needs: Python 3.11, network to a package index, a CPU with AVX2 and without AVX-512.
set -euo pipefail
if grep -qm1 avx512f /proc/cpuinfo || ! grep -qm1 avx2 /proc/cpuinfo; then
    echo "this CPU is not one that stops at AVX2"
    exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy

cat > products.py <<'PY'
import time

import torch

torch.set_num_threads(1)
T, I, O = 512, 256, 256


def seconds(f):
    times = []
    for _ in range(5):
        start = time.process_time()
        f()
        times.append(time.process_time() - start)
    return min(times)


def products(dtype):
    x, w, dy = (torch.randn(shape).to(dtype) for shape in ((T, I), (O, I), (T, O)))
    return [seconds(f) for f in (lambda: x @ w.T, lambda: dy @ w, lambda: dy.T @ x)]


forward, dx, dw = products(torch.float32)
print("float32: dx over forward below 2:", dx / forward < 2)
for dtype in (torch.bfloat16, torch.float16):
    forward, half_dx, _ = products(dtype)
    print(f"{str(dtype)[6:]}: dx over float32's above 20: {half_dx / dx > 20}; over its own forward above 3: {half_dx / forward > 3}")
PY
venv/bin/python products.py | tee seen
diff seen - <<'SEEN'
float32: dx over forward below 2: True
bfloat16: dx over float32's above 20: True; over its own forward above 3: True
float16: dx over float32's above 20: True; over its own forward above 3: True
SEEN
