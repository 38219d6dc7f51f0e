"""Which parameters decay, and the optimizer over them."""
import re

import torch
from torch import nn

from moe_ext.config import OptimConfig

BIAS = re.compile(r"(^|\.)(\w*bias\w*|b\d+_\w+)$")      # proj.bias, mlp.b13_E2F


def param_groups(model: nn.Module, weight_decay: float, *, decay_embeddings: bool = True) -> list[dict]:
    """Two groups for any torch optimizer: "decay" (matrices) and "no_decay".

    A parameter decays if it has two or more dimensions and is no bias by its name (an expert's bias b2_ED is a
    matrix too); the tables of nn.Embedding only with decay_embeddings. Each trainable parameter is in exactly one
    group, under its first name if it is tied. Each group: name, params, param_names, weight_decay. An empty group is
    left out.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}

    def decays(name, parameter):
        matrix = parameter.ndim >= 2 and not BIAS.search(name)
        return matrix and (decay_embeddings or id(parameter) not in tables)

    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = []
    for label, decay in (("decay", weight_decay), ("no_decay", 0.0)):
        members = [(name, p) for name, p in trainable if decays(name, p) == (label == "decay")]
        if members:
            groups.append({"name": label, "params": [p for _, p in members],
                           "param_names": [name for name, _ in members], "weight_decay": decay})
    return groups


def adamw(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW with torch's fused step; the learning rate is set each step from the schedule."""
    return torch.optim.AdamW(param_groups(model, optim.weight_decay), lr=optim.lr, betas=(optim.beta1, optim.beta2),
                             eps=optim.eps, fused=True)
