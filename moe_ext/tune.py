"""Fine-tuning: which parameters of a model move (model.tune of the config), and what they are checked against."""
from __future__ import annotations

import difflib
import re

from moe_ext.config import patterns, require
from moe_ext.layers.lora import candidates
from moe_ext.model import GPT


def check(model: GPT) -> None:
    """ConfigError, with the nearest names, where an entry of model.tune finds nothing of the whole model, which may lie
    on the meta device, or nothing is left to move."""
    tune, names = model.config.tune, [name for name, _ in model.named_parameters()]
    for field, what, among in (("train", "parameter", names), ("freeze", "parameter", names),
                               ("lora_targets", "matrix that can have adapters", list(candidates(model)))):
        for pattern in patterns(getattr(tune, field)):
            if not any(re.search(pattern, name) for name in among):
                near = difflib.get_close_matches(pattern, among, n=3, cutoff=0.3) or among[:3]
                require(False, f"model.tune.{field}: {pattern!r} is found in the name of no {what}; the nearest are "
                        f"{', '.join(near)}")
    require(any(p.requires_grad for p in model.parameters()), f"model.tune.train {tune.train!r} and model.tune.freeze "
            f"{tune.freeze!r} leave nothing that moves: name less in model.tune.freeze")
