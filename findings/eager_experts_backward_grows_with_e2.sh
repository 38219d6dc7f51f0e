#!/usr/bin/env bash
# transformers' "eager" experts take each expert's matrix as weight[expert]. The backward of such a selection is a tensor of
# the whole [E, ..] parameter, zero but for one expert, and autograd adds them up: every expert that got a token, however few,
# costs an allocation, a fill and an addition of the size of all experts. At a fixed number of tokens the products are the
# same for any E and the traffic grows with E squared: 128 experts write 128 times the layer's weights and add them, where
# grouped_mm writes them once. The peak of memory hardly rises, so no memory reading shows it. The same forward on
# weight.unbind(), whose backward is one stack, does none of it. "eager" is what one takes as the reference.
#
# Seen with transformers 5.24.0, torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a package index. Two minutes,
# most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy transformers==5.24.0

cat > bytes.py <<'PY'
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

TOKENS, DIM, HIDDEN, K = 256, 32, 16, 2


class Stacks(TorchDispatchMode):
    """Bytes of the tensors [experts, ., .] made under it, without autograd's sums of them, which it adds in place."""

    def __init__(self, experts):
        super().__init__()
        self.experts, self.bytes = experts, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.ndim == 3 and len(out) == self.experts and op.overloadpacket not in (
                torch.ops.aten.add, torch.ops.aten.transpose, torch.ops.aten.detach):
            self.bytes += out.nbytes
        return out


def backward(implementation, experts):
    torch.manual_seed(0)
    layer = Qwen3MoeExperts(Qwen3MoeConfig(
        hidden_size=DIM, moe_intermediate_size=HIDDEN, num_experts=experts, num_experts_per_tok=K,
        experts_implementation=implementation.split()[0]))
    weights = dict(layer.named_parameters())
    for name, w in weights.items():
        torch.nn.init.normal_(w, std=0.1)
        if "unbind" in implementation:
            delattr(layer, name)
            setattr(layer, name, w.unbind())
    ids = torch.arange(TOKENS * K).view(TOKENS, K) % experts
    y = layer(torch.randn(TOKENS, DIM), ids, torch.rand(TOKENS, K))
    with Stacks(experts) as made:
        y.square().sum().backward()
    return made.bytes / sum(w.nbytes for w in weights.values()), [w.grad for w in weights.values()]


for experts in (8, 32, 128):
    copies, gradients = zip(*(backward(name, experts) for name in ("grouped_mm", "eager", "eager on unbind()")))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])
    print(f"{experts} experts, {TOKENS} tokens, copies of the weights made by backward:",
          "grouped_mm {:g}, eager {:g}, eager on unbind() {:g}".format(*copies))
PY

venv/bin/python bytes.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
8 experts, 256 tokens, copies of the weights made by backward: grouped_mm 1, eager 8, eager on unbind() 1
32 experts, 256 tokens, copies of the weights made by backward: grouped_mm 1, eager 32, eager on unbind() 1
128 experts, 256 tokens, copies of the weights made by backward: grouped_mm 1, eager 128, eager on unbind() 1
SEEN
