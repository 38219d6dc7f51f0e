#!/usr/bin/env bash
# Group-limited routing is three rules under one name. A group of experts is scored by the sum of its best 2 in transformers'
# DeepSeek-V3, by its best 1 in transformers' DeepSeek-V2, and by its best (top k // groups chosen) in megatron-core, which
# names both models as its use cases. The quotient is 2 in the shapes of both: right for V3 (256 experts, top 8 of 4 of 8
# groups), and for V2 (160 experts, top 6 of 3 of 8) every third token gets other experts. In other shapes up to half of the
# tokens do, and none of the shapes below is refused.
#
# Seen with transformers 5.24.0, megatron-core 0.16.1, torch 2.13.0+cpu (SEEN below). Needs: Python 3.11, network to a
# package index. Three minutes, most of them pip.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy transformers==5.24.0 megatron-core==0.16.1

cat > groups.py <<'PY'
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

V2 = (DeepseekV2TopkRouter, DeepseekV2Config, {"topk_method": "group_limited_greedy"}, {"use_pre_softmax": True})
V3 = (DeepseekV3TopkRouter, DeepseekV3Config, {}, {"score_function": "sigmoid"})
torch.manual_seed(0)


@torch.no_grad()
def compare(name, model, experts, k, groups):
    Router, Config, chosen_by, scored_by = model
    router = Router(Config(hidden_size=experts, n_routed_experts=experts, n_group=8, topk_group=groups,
                           num_experts_per_tok=k, **chosen_by))
    router.weight.copy_(torch.eye(experts))         # the logits are the rows themselves
    logits = torch.randn(2000, experts)
    ids = router(logits)[-1]
    theirs = torch.zeros(logits.shape, dtype=torch.bool).scatter(1, ids, True)
    megatron = topk_routing_with_score_function(logits, k, num_groups=8, group_topk=groups, **scored_by)[1].bool()
    print(f"{name}, {experts} experts, top {k} of {groups} of 8 groups: {int((theirs == megatron).all(1).sum())} of 2000 agree")


compare("V3", V3, 256, 8, 4)
compare("V2", V2, 160, 6, 3)
for k, groups in ((4, 4), (6, 2), (8, 2)):
    compare("V3", V3, 256, k, groups)
for k, groups in ((3, 3), (8, 4)):
    compare("V2", V2, 160, k, groups)
PY

venv/bin/python groups.py 2> stderr | tee found || { cat stderr; exit 1; }
diff found - <<'SEEN' && echo "as it was seen"
V3, 256 experts, top 8 of 4 of 8 groups: 2000 of 2000 agree
V2, 160 experts, top 6 of 3 of 8 groups: 1365 of 2000 agree
V3, 256 experts, top 4 of 4 of 8 groups: 1295 of 2000 agree
V3, 256 experts, top 6 of 2 of 8 groups: 1324 of 2000 agree
V3, 256 experts, top 8 of 2 of 8 groups: 987 of 2000 agree
V2, 160 experts, top 3 of 3 of 8 groups: 2000 of 2000 agree
V2, 160 experts, top 8 of 4 of 8 groups: 1309 of 2000 agree
SEEN
