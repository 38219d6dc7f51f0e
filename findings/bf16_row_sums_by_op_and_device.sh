#!/usr/bin/env bash
# 1000 ones in bf16 added to one row give 1000 or 256, where additions of 1 stop being seen, depending on which of torch's
# ops adds them; and the CPU and CUDA disagree about which. On the CPU index_add_, scatter_add_ and the gradients of
# index_select and gather keep a wider sum, index_put_(accumulate=True) and the gradients of F.embedding and x[idx] do not.
# On an H200 (torch 2.11.0+cu130) it was the other way round: index_add_ and scatter_add_ 256, index_put_ and the gradient of
# the embedding 1000. Two spellings of one thing, and whoever compares a model on both devices sees neither's error alone.
#
# Seen with torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package index. Two minutes, most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy

cat > add.py <<'PY'
import torch
import torch.nn.functional as F

ones, rows = torch.ones(1000, 1, dtype=torch.bfloat16), torch.zeros(1000, dtype=torch.long)


def zero(**options):
    return torch.zeros(1, 1, dtype=torch.bfloat16, **options)


def gradient(read):
    table = zero(requires_grad=True)
    read(table).backward(ones)
    return table.grad.item()


print("index_add_", zero().index_add_(0, rows, ones).item())
print("scatter_add_", zero().scatter_add_(0, rows[:, None], ones).item())
print("index_put_", zero().index_put_((rows,), ones, accumulate=True).item())
print("gradient of index_select", gradient(lambda t: t.index_select(0, rows)))
print("gradient of gather", gradient(lambda t: t.gather(0, rows[:, None])))
print("gradient of x[idx]", gradient(lambda t: t[rows]))
print("gradient of F.embedding", gradient(lambda t: F.embedding(rows, t)))
PY

venv/bin/python add.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
index_add_ 1000.0
scatter_add_ 1000.0
index_put_ 256.0
gradient of index_select 1000.0
gradient of gather 1000.0
gradient of x[idx] 256.0
gradient of F.embedding 256.0
SEEN
