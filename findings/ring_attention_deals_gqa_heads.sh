#!/usr/bin/env bash
# In grouped-query attention of torch (SDPA's enable_gqa), transformers and flash-attn, neighbouring query heads share a
# key/value head: query head i reads head i // (heads // kv_heads). ring-attention-pytorch, in the ring as in its plain
# attention, deals the query heads out like cards: head i reads head i % kv_heads. Every shape fits and training from scratch
# works, so nothing tells; weights of another model compute another attention, unless there are as many key/value heads as
# query heads, or one. With the query heads reordered it is torch's to fp32's precision, forward and backward.
#
# Seen with ring-attention-pytorch 0.5.20, torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package index. Two
# minutes, most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy ring-attention-pytorch==0.5.20

cat > heads.py <<'PY'
import torch
import torch.nn.functional as F
from ring_attention_pytorch import default_attention, ring_flash_attn

torch.manual_seed(0)
TOKENS, DIM = 64, 16


def with_gradients(attention, q, k, v, order):
    """Outputs and gradients of `attention` when it gets the query heads in `order`; the outputs are put back."""
    tensors = [t.clone().requires_grad_() for t in (q, k, v)]
    y = attention(tensors[0][:, :, order], *tensors[1:])[:, :, order.argsort()]
    return y, *torch.autograd.grad(y.sin().sum(), tensors)


def sdpa(*qkv):
    q, k, v = (t.transpose(1, 2) for t in qkv)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def ring(*qkv):
    return ring_flash_attn(*qkv, causal=True, bucket_size=16)


def plain(*qkv):
    return default_attention(*qkv, causal=True)


for heads, kv_heads in ((8, 8), (8, 4), (8, 2), (8, 1)):
    q = torch.randn(1, TOKENS, heads, DIM)
    k, v = torch.randn(2, 1, TOKENS, kv_heads, DIM)
    given = torch.arange(heads)
    expected = with_gradients(sdpa, q, k, v, given)
    for attention in (ring, plain):
        same = []
        for order in (given, given.view(kv_heads, -1).T.flatten()):
            found = with_gradients(attention, q, k, v, order)
            same.append(all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected)))
        print(f"{heads} heads, {kv_heads} of keys and values, {attention.__name__}: equal to torch {same[0]},",
              f"with query heads {order.tolist()} {same[1]}")
PY

venv/bin/python heads.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
8 heads, 8 of keys and values, ring: equal to torch True, with query heads [0, 1, 2, 3, 4, 5, 6, 7] True
8 heads, 8 of keys and values, plain: equal to torch True, with query heads [0, 1, 2, 3, 4, 5, 6, 7] True
8 heads, 4 of keys and values, ring: equal to torch False, with query heads [0, 2, 4, 6, 1, 3, 5, 7] True
8 heads, 4 of keys and values, plain: equal to torch False, with query heads [0, 2, 4, 6, 1, 3, 5, 7] True
8 heads, 2 of keys and values, ring: equal to torch False, with query heads [0, 4, 1, 5, 2, 6, 3, 7] True
8 heads, 2 of keys and values, plain: equal to torch False, with query heads [0, 4, 1, 5, 2, 6, 3, 7] True
8 heads, 1 of keys and values, ring: equal to torch True, with query heads [0, 1, 2, 3, 4, 5, 6, 7] True
8 heads, 1 of keys and values, plain: equal to torch True, with query heads [0, 1, 2, 3, 4, 5, 6, 7] True
SEEN
