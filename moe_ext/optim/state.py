"""How an optimizer keeps a tensor between two steps: as it is, rounded, or in the host's memory.

    keep = Kept("bf16")
    state["exp_avg"] = keep.zeros(p)            # like the parameter, a DTensor if it is one
    m = keep.get(state["exp_avg"], p)           # to compute with: this rank's part, of p's dtype, on its device
    m.lerp_(grad, 1 - beta1)
    keep.put(m, state["exp_avg"])

    "full"  the parameter's dtype, on its device: `get` gives the kept tensor itself, `put` has nothing to do
    "bf16"  rounded to the nearest bfloat16, on the parameter's device
    "host"  the parameter's dtype, in the host's memory, pinned for a parameter on CUDA; without CUDA as "full"

A copy from or to pinned memory is one more piece of work of the current stream, for which the host does not wait: who
reads what is kept on the host by other means than `get` synchronises first. Optimizers get and put one bucket after
another, so what is fetched or widened at a time is bounded.

An optimizer that is Keeping says with `place` which tensors its state has, and where: checkpoints and load_state_dict
read into them what was kept in another way, or on another mesh, and refuse what another optimizer kept. With `check`
it refuses hyperparameters, be they of a new group or of a state that is loaded.
"""
from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from moe_ext.config import BF16_DECAY, STATES

# of a group of torch's AdamW, which older ones lack and __setstate__ fills in
FILLED = {"amsgrad", "capturable", "decoupled_weight_decay", "differentiable", "foreach", "fused", "maximize"}


class Kept:
    """How one optimizer keeps its state. ValueError for another word."""

    def __init__(self, how: str = "full"):
        if how not in STATES:
            raise ValueError(f"state: got {how!r}, wanted \"full\", \"bf16\" or \"host\"")
        self.how = how

    def zeros(self, like: torch.Tensor, shape=None) -> torch.Tensor:
        """Zeros as they are kept, shaped and sharded as `like` is; of another shape, plain, on this rank alone."""
        dtype = torch.bfloat16 if self.how == "bf16" else like.dtype
        where = dict(device=like.device)
        if self.how == "host":
            where = dict(device="cpu", pin_memory=like.device.type == "cuda")
        if shape is None:
            return torch.zeros_like(like, dtype=dtype, requires_grad=False, **where)
        return torch.zeros(tuple(shape), dtype=dtype, **where)

    def get(self, stored: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """This rank's part of a kept tensor, or a slice of it, in the dtype and on the device of `like`."""
        return local(stored).to(device=like.device, dtype=like.dtype, non_blocking=True)

    def put(self, value: torch.Tensor, stored: torch.Tensor) -> None:
        """Keep a value that `get` gave, changed in place since."""
        if value is not (stored := local(stored)):
            stored.copy_(value, non_blocking=True)

    def check_decay(self, name: str, beta: float) -> None:
        """ValueError if a mean of squares with this decay would stand still: of bf16 a change of less than 2^-9 is
        lost, and with beta .999 no step changes the mean by more until a square is thrice as large."""
        if self.how == "bf16" and beta > BF16_DECAY:
            raise ValueError(f"{name}: got {beta}, wanted at most {BF16_DECAY} with state \"bf16\", which rounds away "
                             f"what a step changes: set {name} lower, or state to \"host\" or \"full\"")


class Keeping(torch.optim.Optimizer):
    """Mixed in before an optimizer, with a Kept as `keep`, made before Optimizer.__init__; `place` is the optimizer's.
    """

    keep: Kept

    def check(self, group: dict) -> None:
        """ValueError or TypeError unless this optimizer can move a group with its hyperparameters."""
        if missing := sorted(self.defaults.keys() - FILLED - group.keys()):
            name = type(self).__name__
            raise ValueError(f"{name}: got a state whose groups lack {', '.join(missing)}, as another optimizer's do; "
                             f"wanted one of {name}.state_dict()")

    def add_param_group(self, param_group: dict) -> None:
        """As torch's. Errors: as of check, and nothing is added."""
        super().add_param_group(param_group)
        try:
            self.check(self.param_groups[-1])
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise

    def name_of(self, p: torch.Tensor) -> str:
        return next(name for name, q in named(self.param_groups) if q is p)

    def place(self, p: torch.Tensor, key: str, shape, dtype: torch.dtype) -> torch.Tensor | None:
        """Room for the state `key` of parameter p, which was saved with this shape and dtype: a tensor as this
        optimizer keeps it, to be filled; None if it is another rank's. ValueError if it keeps no such state."""
        raise NotImplementedError

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "keep": self.keep}

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but each tensor is kept as this optimizer keeps it, and what another one kept is an error. Of
        state_dict() on the same mesh: for another there are checkpoints. Errors: as of check and place, and nothing is
        loaded."""
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            self.check({**saved, "params": own["params"]})
        states = {}
        moved = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(indices, moved, strict=False):          # super() refuses other numbers of parameters
            states[p] = {}
            for key, value in state_dict["state"].get(i, {}).items():
                if not isinstance(value, torch.Tensor):
                    raise ValueError(f"{self.name_of(p)}: got a state {key} that is {value!r}, wanted a tensor: is it "
                                     "another optimizer's?")
                room = self.place(p, key, list(value.shape), value.dtype)
                if room is None:
                    continue
                if isinstance(room, DTensor) != isinstance(value, DTensor):
                    raise ValueError(f"{self.name_of(p)}: got a state {key} that is a {type(value).__name__}, wanted "
                                     f"a {type(room).__name__} as the parameter is: load it on the mesh that it is of, "
                                     "or from a checkpoint")
                states[p][key] = room.copy_(value)
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update({p: state for p, state in states.items() if state})
        self.loaded()

    def loaded(self) -> None:
        """After load_state_dict."""


def loss_of(closure):
    """What step's closure gives, with gradients on; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def local(x: torch.Tensor) -> torch.Tensor:
    """This rank's part, the memory itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def gradient(p: torch.Tensor) -> torch.Tensor:
    """p.grad, sharded as p is; collective where it is not yet, as with torch's SequenceParallel."""
    if isinstance(p, DTensor) and p.grad.placements != p.placements:
        return p.grad.redistribute(p.device_mesh, p.placements)
    return p.grad


def named(groups: list[dict]) -> list[tuple[str, torch.Tensor]]:
    """(name, parameter) of all groups, in order; without the group's param_names by number and shape."""
    found = []
    for group in groups:
        names = group.get("param_names") or [f"parameter {i} of shape {list(p.shape)}" for i, p in
                                             enumerate(group["params"], start=len(found))]
        found += zip(names, group["params"], strict=True)
    return found
