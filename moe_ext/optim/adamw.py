"""AdamW (Loshchilov 2019): torch's fused step, with moments kept as they are, rounded, or on the host."""
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.optim.adamw import adamw

from moe_ext.optim.state import Keeping, Kept, gradient, local, loss_of

MOMENTS = "exp_avg", "exp_avg_sq"
BUCKET = 2**26      # bytes of moments that are fetched or widened at a time


class Chunk(NamedTuple):
    """A part of what a rank has of a parameter, small enough for a bucket."""
    p: torch.Tensor
    grad: torch.Tensor
    moments: tuple[torch.Tensor, torch.Tensor]      # as they are kept
    step: torch.Tensor      # before this step; of the last chunk the parameter's own, which it counts on


class AdamW(Keeping, torch.optim.AdamW):
    """state "full": bit for bit torch.optim.AdamW(fused=True), its state dict too. "bf16" and "host" (see Kept) run the
    same step, bucket by bucket, on moments in the parameter's dtype on its device, so "host" gives the same bits.

    Errors: ValueError, for beta2 above 0.99 with "bf16", for amsgrad, and as torch's.
    """

    def __init__(self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 1e-2, *, state: str = "full"):
        self.keep = Kept(state)
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)

    def check(self, group: dict) -> None:
        super().check(group)
        self.keep.check_decay("beta2", group["betas"][1])
        if group.get("amsgrad"):
            raise ValueError("amsgrad: got True, wanted False, or torch.optim.AdamW")

    def place(self, p: torch.Tensor, key: str, shape, dtype: torch.dtype) -> torch.Tensor:
        if key == "step" and list(shape) == []:
            return torch.zeros((), dtype=torch.float32, device=p.device)
        if key in MOMENTS and list(shape) == list(p.shape):
            return self.keep.zeros(p)
        raise ValueError(f"got {key} {list(shape)}, wanted the state of AdamW: step [], exp_avg and exp_avg_sq "
                         f"{list(p.shape)}")

    @torch.no_grad()
    def step(self, closure=None):
        loss = loss_of(closure)
        for group in self.param_groups:
            for bucket in self.buckets(group["params"]):
                self._step(group, bucket)
        return loss

    def _step(self, group: dict, bucket: list[Chunk]) -> None:
        """Of one bucket; what has been fetched for it is gone when this returns."""
        beta1, beta2 = group["betas"]
        means, squares = ([self.keep.get(c.moments[i], c.p) for c in bucket] for i in (0, 1))
        adamw([c.p for c in bucket], [c.grad for c in bucket], means, squares, [], [c.step for c in bucket],
              amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
              eps=group["eps"], maximize=group["maximize"], fused=True, grad_scale=getattr(self, "grad_scale", None),
              found_inf=getattr(self, "found_inf", None))
        for c, *moments in zip(bucket, means, squares, strict=True):
            for value, stored in zip(moments, c.moments, strict=True):
                self.keep.put(value, stored)

    def buckets(self, parameters: list[torch.Tensor]) -> Iterator[list[Chunk]]:
        """The parameters that have a gradient, in pieces: of at most BUCKET bytes of moments, all in one if `get`
        copies nothing."""
        most = math.inf if self.keep.how == "full" else BUCKET
        bucket, size = [], 0
        for p in parameters:
            for chunk in self.chunks(p, most) if p.grad is not None else ():
                more = 2 * chunk.p.nbytes
                if bucket and size + more > most:
                    yield bucket
                    bucket, size = [], 0
                bucket.append(chunk)
                size += more
        if bucket:
            yield bucket

    def chunks(self, p: torch.Tensor, most: float) -> Iterator[Chunk]:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state |= {key: self.keep.zeros(p) for key in MOMENTS}
        parts = [local(x) for x in (p, gradient(p), *(state[key] for key in MOMENTS))]
        if 2 * parts[0].nbytes > most and all(x.is_contiguous() for x in parts):
            parts = [x.view(-1).split(most // (2 * parts[0].element_size())) for x in parts]
        else:
            parts = [[x] for x in parts]
        for i, (own, grad, *moments) in enumerate(zip(*parts, strict=True), start=1):
            yield Chunk(own, grad, moments, state["step"] if i == len(parts[0]) else state["step"].clone())
