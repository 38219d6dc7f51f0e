"""Which parameters decay, which optimizer moves which, and the optimizer of a run."""
import fnmatch
import re

import torch
from torch import nn

from moe_ext.config import ConfigError, OptimConfig
from moe_ext.optim.muon import Muon
from moe_ext.optim.shampoo import Shampoo
from moe_ext.optim.together import Together

BIAS = re.compile(r"(^|\.)(\w*bias\w*|b\d+_\w+)$")      # proj.bias, mlp.b13_E2F
KINDS = "matrices", "experts", "embeddings", "norms"
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def kinds(model: nn.Module) -> dict[str, str]:
    """NAME -> kind of each trainable parameter: "embeddings" are tables and the head, "experts" stacks of three or more
    dimensions, "matrices" all others of two, "norms" the rest, biases too."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}

    def kind(name, p):
        if id(p) in tables or name.endswith("lm_head.weight"):
            return "embeddings"
        if p.ndim < 2 or BIAS.search(name):
            return "norms"
        return "matrices" if p.ndim == 2 else "experts"
    return {name: kind(name, p) for name, p in model.named_parameters() if p.requires_grad}


def rules(optim: OptimConfig) -> list[tuple[str, str, float]]:
    """(kind or pattern of names, optimizer, factor of its learning rate), the first that fits holds."""
    text = optim.rule or f"matrices: {optim.name}, experts: {optim.name}, embeddings: adamw, norms: adamw"
    found = []
    for entry in text.split(","):
        what, _, how = entry.partition(":")
        name, *factor = how.split()
        found.append((what.strip(), name, float(factor[0]) if factor else 1.0))
    return found


def param_groups(model: nn.Module, weight_decay: float, *, decay_embeddings: bool = True,
                 optim: OptimConfig | None = None) -> list[dict]:
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


def build_optimizer(model: nn.Module, optim: OptimConfig, timeout=None) -> torch.optim.Optimizer:
    """The optimizer of a run; the learning rate is set each step from the schedule. On a mesh all ranks call."""
    kind, by_optimizer = kinds(model), {}
    table = rules(optim)
    for group in param_groups(model, optim.weight_decay):
        for name, p in zip(group["param_names"], group["params"], strict=True):
            fits = [(how, factor) for what, how, factor in table
                    if what == kind[name] or fnmatch.fnmatchcase(name, what)]
            if not fits:
                raise ConfigError(f"optim.rule sends {name} ({kind[name]}) nowhere: add \"{kind[name]}: adamw\"")
            how, factor = fits[0]
            groups = by_optimizer.setdefault(how, {})
            label = group["name"] + (f" x{factor:g}" if factor != 1 else "")
            into = groups.setdefault(label, {**group, "name": label, "params": [], "param_names": [],
                                             "lr_factor": factor})
            into["params"].append(p)
            into["param_names"].append(name)
    parts = [MAKE[how](list(groups.values()), optim, timeout) for how, groups in sorted(by_optimizer.items())]
    return parts[0] if len(parts) == 1 else Together(parts)


def adamw(groups, optim: OptimConfig, timeout=None) -> torch.optim.AdamW:
    """AdamW with torch's fused step."""
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def muon(groups, optim: OptimConfig, timeout=None) -> Muon:
    m = optim.muon
    return Muon(groups, optim.lr, momentum=m.momentum, nesterov=m.nesterov, ns_steps=m.ns_steps,
                ns_dtype=DTYPES[m.ns_dtype], adjust_lr_fn=m.adjust_lr, timeout=timeout)


def shampoo(groups, optim: OptimConfig, timeout=None) -> Shampoo:
    s = optim.shampoo
    return Shampoo(groups, optim.lr, (optim.beta1, optim.beta2), optim.eps,
                   precondition_frequency=s.precondition_frequency, max_preconditioner_dim=s.max_preconditioner_dim,
                   start_preconditioning_step=s.start_preconditioning_step, grafting=s.grafting,
                   graft_eps=s.graft_eps, root_dtype=DTYPES[s.root_dtype], timeout=timeout)


MAKE = {"adamw": adamw, "muon": muon, "shampoo": shampoo}
