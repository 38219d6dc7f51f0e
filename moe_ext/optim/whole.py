"""What optimizers of whole matrices have in common: their owners, and the step of those that have a gradient."""
from __future__ import annotations

import torch

from moe_ext.optim.owners import Owners
from moe_ext.optim.state import Keeping, local, loss_of, named


class WholeMatrices(Keeping):
    """An optimizer that computes with whole matrices, at their owners. step() is collective over the parameters'
    meshes, and leaves alone a parameter without a gradient. `_cost` and `_move` are the optimizer's.

    timeout: of process groups that have to be made, a timedelta. Errors: ValueError on all ranks that share a
    parameter, before anything is moved, if some have a gradient of it and some have none.
    """

    timeout = _owners = None
    max_preconditioner_dim = 0      # blocks of at most so many rows and columns; 0: matrices are whole

    def _cost(self, shape) -> float:
        """FLOPs of a step of a matrix."""
        raise NotImplementedError

    def _move(self, members: list[tuple[torch.Tensor, dict]], moved: list[int], device) -> None:
        """Move the members (parameter, group) with these numbers, whose gradients all ranks have."""
        raise NotImplementedError

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "timeout": self.timeout, "_owners": None}

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        self._owners = None

    @property
    def owners(self) -> Owners:
        """Who owns which matrix. The first use is collective over the parameters' meshes."""
        if self._owners is None:
            names, parameters = zip(*named(self.param_groups), strict=True)
            self._owners = Owners(list(parameters), self._cost, most=self.max_preconditioner_dim, timeout=self.timeout,
                                  names=list(names))
        return self._owners

    @torch.no_grad()
    def step(self, closure=None):
        """Move the parameters -> what the closure gives, if there is one."""
        loss = loss_of(closure)
        members = [(p, group) for group in self.param_groups for p in group["params"]]
        if members:
            moved, device = [i for i, (p, _) in enumerate(members) if p.grad is not None], local(members[0][0]).device
            self.owners.agree(moved, device)
            self._move(members, moved, device)
        return loss
