"""Which parameters decay, which optimizer moves which (optim.name, optim.rule), and the optimizer of a run.

    kind         which parameters                                               decay   with optim.name muon, shampoo
    matrices     two dimensions: attention, dense MLPs, shared experts, routers yes     that
    experts      stacks of matrices [E, .., ..]                                 yes     that
    embeddings   tables of nn.Embedding and the head                            yes     AdamW
    norms        one dimension, and biases of any, as an expert's               no      AdamW
"""
import fnmatch
import re
from typing import NamedTuple

import torch
from torch import nn

from moe_ext.config import KINDS, ConfigError, OptimConfig
from moe_ext.optim.adamw import AdamW
from moe_ext.optim.muon import Muon
from moe_ext.optim.shampoo import Shampoo
from moe_ext.optim.together import Together

TABLE = re.compile(r"(^|\.)(embed_\w+|lm_head)\.weight$")
BIAS = re.compile(r"(^|\.)(\w*bias\w*|b\d+_\w+)$")      # proj.bias, mlp.b13_E2F
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


class Choice(NamedTuple):
    """What happens to a parameter."""
    kind: str           # one of KINDS
    optimizer: str      # one of OPTIMIZERS
    lr_factor: float    # of the learning rate
    decays: bool
    entry: str          # of optim.rule, that decided: a kind or a pattern


def kind_of(name: str, ndim: int, table: bool = False) -> str:
    """table: whether it is the weight of an nn.Embedding, of a name that no GPT of ours has."""
    if table or TABLE.search(name):
        return "embeddings"
    if ndim < 2 or BIAS.search(name):
        return "norms"
    return "matrices" if ndim == 2 else "experts"


def choose(name: str, ndim: int, optim: OptimConfig, table: bool = False) -> Choice:
    """By name and shape alone, so for plans too. ConfigError: optim.rule sends it nowhere, or what is no matrix to
    Muon."""
    kind = kind_of(name, ndim, table)
    for what, optimizer, factor in optim.rules:
        if what == kind or fnmatch.fnmatchcase(name, what):
            if (kind, optimizer) == ("norms", "muon"):
                raise ConfigError(f"optim.rule {optim.rule!r} sends {name} ({kind}) to muon, which makes matrices "
                                  f"orthogonal: write \"{name}: adamw\" before {what}, or kinds in its place, as in "
                                  "\"matrices: muon, norms: adamw\"")
            return Choice(kind, optimizer, factor, kind != "norms", what)
    raise ConfigError(f"optim.rule {optim.rule!r} sends {name} ({kind}) nowhere: add \"{kind}: adamw\"")


def choices(model: nn.Module, optim: OptimConfig) -> dict[str, Choice]:
    """NAME -> choice, of each trainable parameter, under its first name if it is tied. Errors: as of choose."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {name: choose(name, p.ndim, optim, id(p) in tables) for name, p in model.named_parameters()
            if p.requires_grad}


def check_rule(model: nn.Module, optim: OptimConfig) -> None:
    """ConfigError where optim.rule does not fit the model, a whole one on any device: as choose, and where a pattern
    decides nothing."""
    used = {choice.entry for choice in choices(model, optim).values()}
    for what in [rule.what for rule in optim.rules if rule.what not in KINDS and rule.what not in used]:
        fits = fnmatch.filter([name for name, p in model.named_parameters() if p.requires_grad], what)
        raise ConfigError(f"optim.rule {optim.rule!r}: {what} decides nothing: " + (
            f"{fits[0]} has an earlier entry: write the narrower pattern first" if fits else
            "no parameter that moves has such a name: delete it or write another pattern, as layers.*.gate.weight"))


def param_groups(model: nn.Module, weight_decay: float, *, decay_embeddings: bool = True) -> list[dict]:
    """Two groups for any torch optimizer: "decay" (matrices) and "no_decay".

    A parameter decays if it has two or more dimensions and is no bias by its name (an expert's bias b2_ED is a
    matrix too); the tables of nn.Embedding only with decay_embeddings. Each trainable parameter is in exactly one
    group, under its first name if it is tied. Each group: name, params, param_names, weight_decay. An empty group is
    left out.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}

    def decays(name, parameter):
        table = id(parameter) in tables
        return kind_of(name, parameter.ndim, table) != "norms" and (decay_embeddings or not table)

    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = []
    for label, decay in (("decay", weight_decay), ("no_decay", 0.0)):
        members = [(name, p) for name, p in trainable if decays(name, p) == (label == "decay")]
        if members:
            groups.append({"name": label, "params": [p for _, p in members],
                           "param_names": [name for name, _ in members], "weight_decay": decay})
    return groups


def build_optimizer(model: nn.Module, optim: OptimConfig, timeout=None) -> torch.optim.Optimizer:
    """The optimizer of a run: one, or several Together; its groups are named as "muon decay x0.5". set_learning_rate
    gives them the schedule's rate at each step.

    On a mesh all ranks call, and step() is collective too. timeout: a timedelta, of process groups that Muon and
    Shampoo make. Errors: as of choose.
    """
    named, groups = dict(model.named_parameters()), {}
    for name, choice in choices(model, optim).items():
        label = f"{choice.optimizer} {'decay' if choice.decays else 'no_decay'}"
        if choice.lr_factor != 1:
            label += f" x{choice.lr_factor:g}"
        group = groups.setdefault(choice.optimizer, {}).setdefault(label, {
            "name": label, "params": [], "param_names": [], "lr_factor": choice.lr_factor,
            "weight_decay": optim.weight_decay if choice.decays else 0.0})
        group["params"].append(named[name])
        group["param_names"].append(name)
    if not groups:      # of a frozen stage of a pipeline
        groups["adamw"] = {"": {"name": "adamw no_decay", "params": [], "param_names": []}}
    parts = [MAKE[name](list(groups[name].values()), optim, timeout) for name in sorted(groups)]
    return parts[0] if len(parts) == 1 else Together(parts)


def adamw(groups, optim: OptimConfig, timeout) -> AdamW:
    return AdamW(groups, optim.lr, (optim.beta1, optim.beta2), optim.eps, state=optim.state)


def muon(groups, optim: OptimConfig, timeout) -> Muon:
    m = optim.muon
    return Muon(groups, optim.lr, momentum=m.momentum, nesterov=m.nesterov, ns_steps=m.ns_steps,
                ns_dtype=DTYPES[m.ns_dtype], adjust_lr_fn=m.adjust_lr_fn, state=optim.state, timeout=timeout)


def shampoo(groups, optim: OptimConfig, timeout) -> Shampoo:
    s = optim.shampoo
    return Shampoo(groups, optim.lr, (optim.beta1, optim.beta2), s.epsilon,
                   precondition_frequency=s.precondition_frequency, max_preconditioner_dim=s.max_preconditioner_dim,
                   start_preconditioning_step=s.start_preconditioning_step, grafting=s.grafting,
                   graft_eps=optim.eps, root_dtype=DTYPES[s.root_dtype], state=optim.state, timeout=timeout)


MAKE = {"adamw": adamw, "muon": muon, "shampoo": shampoo}
