"""Fine-tuning: which parameters of a model move (model.tune of the config), and what they are checked against."""
from __future__ import annotations

import difflib
import fnmatch

from moe_ext.config import patterns, require
from moe_ext.model import GPT


def check(model: GPT) -> None:
    """ConfigError, with the nearest names, where a pattern of model.tune fits nothing of the whole model, which may lie
    on the meta device, or nothing is left to move."""
    tune, names = model.config.tune, [name for name, _ in model.named_parameters()]
    for field in ("train", "freeze"):
        for pattern in patterns(getattr(tune, field)):
            require(bool(fnmatch.filter(names, pattern)), f"model.tune.{field}: no parameter has a name like {pattern}: "
                    f"{nearest(pattern, names)}")
    require(any(p.requires_grad for p in model.parameters()), f"model.tune.train {tune.train!r} and model.tune.freeze "
            f"{tune.freeze!r} leave no parameter that moves: name fewer in model.tune.freeze")


def nearest(pattern: str, names: list[str]) -> str:
    """What to write in its stead."""
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
    return f"the nearest names are {', '.join(near)}; * stands for any characters, as in *.experts.*"
