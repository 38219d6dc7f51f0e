"""Several optimizers as one: each has parameters of its own, all have one state and one list of groups."""
import torch

from moe_ext.optim.state import Keeping, loss_of


def parts_of(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, ...]:
    """The optimizers that are one together, or the one."""
    return optimizer.parts if isinstance(optimizer, Together) else (optimizer,)


class Together(Keeping):
    """step() is that of each part in turn. Groups and state are the same objects for the parts and the whole, so
    schedules, checkpoints and state dicts see one torch optimizer. Errors: ValueError for a parameter in two parts."""

    def __init__(self, parts: list[Keeping]):
        self.parts = ()
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = tuple(parts)
        self._share()

    def _share(self) -> None:
        groups, self.movers = iter(self.param_groups), {}
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state
            self.movers |= {p: part for group in part.param_groups for p in group["params"]}

    def __getstate__(self) -> dict:
        return {**torch.optim.Optimizer.__getstate__(self), "parts": self.parts}

    def __setstate__(self, state: dict) -> None:        # load_state_dict ends with it too
        super().__setstate__(state)
        self._share()

    def __repr__(self) -> str:
        return f"Together({', '.join(map(repr, self.parts))})"

    @property
    def fallbacks(self) -> int:
        """How often an optimizer of this rank took another way than its own."""
        return sum(getattr(part, "fallbacks", 0) for part in self.parts)

    def add_param_group(self, param_group: dict) -> None:
        if self.parts:
            raise ValueError("a group for several optimizers as one: give it to one of them before Together([..])")
        super().add_param_group(param_group)

    def check(self, group: dict) -> None:
        for part in self.parts:
            if any(group["params"] is own["params"] for own in part.param_groups):
                part.check(group)

    def loaded(self) -> None:
        for part in self.parts:
            part.loaded()

    def place(self, p, key, shape, dtype):
        return self.movers[p].place(p, key, shape, dtype)

    def step(self, closure=None):
        loss = loss_of(closure)
        for part in self.parts:
            part.step()
        return loss
