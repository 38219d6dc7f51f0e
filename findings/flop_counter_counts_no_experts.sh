#!/usr/bin/env bash
# torch.utils.flop_counter.FlopCounterMode counts by operator, and a product without a formula counts as nothing, without a
# word. Grouped matrix multiplication has no formula (so on no device), nor has the flash attention that SDPA takes on a CPU.
# Of a layer of attention and experts, each by torch's own function for it, only the projections are counted, one sixth. With
# the experts in a loop and attention by the "math" backend the same layer is counted to the last FLOP. On a CPU dropout has
# that effect on attention, since SDPA then takes "math".
#
# Seen with torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package index. Two minutes, most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy

cat > count.py <<'PY'
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, flop_registry

TOKENS, DIM, HEADS, EXPERTS, HIDDEN = 512, 64, 4, 4, 128
torch.manual_seed(0)
qkv, out = (torch.randn(DIM, n, requires_grad=True) for n in (3 * DIM, DIM))
up, down = (torch.randn(EXPERTS, *shape, requires_grad=True) for shape in ((DIM, HIDDEN), (HIDDEN, DIM)))
ends = torch.arange(TOKENS // EXPERTS, TOKENS + 1, TOKENS // EXPERTS, dtype=torch.int32)
x = torch.randn(TOKENS, DIM, requires_grad=True)


def grouped_mm(x, w):
    return F.grouped_mm(x, w, offs=ends)


def loop(x, w):
    return torch.cat([part @ expert for part, expert in zip(x.chunk(EXPERTS), w)])


def layer(experts, dropout):
    q, k, v = (x @ qkv).view(1, TOKENS, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    y = y.transpose(1, 2).reshape(TOKENS, DIM) @ out
    return experts(F.silu(experts(y, up)), down)


aten = torch.ops.aten
for op in (aten.bmm, aten._grouped_mm, aten._scaled_dot_product_flash_attention,
           aten._scaled_dot_product_flash_attention_for_cpu):
    print(op, "has a formula" if op in flop_registry else "has none")
# forward, and twice that for the gradients
projections = 3 * 2 * TOKENS * DIM * 4 * DIM
attention = 3 * 2 * 2 * TOKENS * TOKENS * DIM
mlp = 3 * 2 * 2 * TOKENS * DIM * HIDDEN
print(f"by hand: projections {projections}, attention {attention}, experts {mlp}, in all {projections + attention + mlp}")
for experts in (grouped_mm, loop):
    for dropout in (0.0, 0.1):
        with FlopCounterMode(display=False) as counter:
            layer(experts, dropout).square().sum().backward()
        print(f"experts by {experts.__name__}, dropout {dropout}: {counter.get_total_flops()}")
PY

venv/bin/python count.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
aten.bmm has a formula
aten._grouped_mm has none
aten._scaled_dot_product_flash_attention has a formula
aten._scaled_dot_product_flash_attention_for_cpu has none
by hand: projections 50331648, attention 201326592, experts 50331648, in all 301989888
experts by grouped_mm, dropout 0.0: 50331648
experts by grouped_mm, dropout 0.1: 251658240
experts by loop, dropout 0.0: 100663296
experts by loop, dropout 0.1: 301989888
SEEN
