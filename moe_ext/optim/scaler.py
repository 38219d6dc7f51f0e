"""Dynamic loss scaling for float16, whose gradients underflow below 6e-8 and overflow above 65504."""
import math
from collections.abc import Iterable, Mapping

import torch

from moe_ext.optim.clip import NonFiniteGradient, clip_grad_norm


class LossScaler:
    """The factor of the loss, as large as the gradients bear: halved when they overflow, doubled after `window` good
    steps in a row. One loop serves every dtype:

        scaler = LossScaler(enabled=config.train.dtype == "fp16")
        for step in range(steps):
            for micro_batch in batches:
                (scaler.scale * loss(micro_batch)).backward()
            grad_norm = scaler.clip(model.named_parameters(), max_norm)
            if grad_norm is not None:           # None: overflow, the step is skipped
                optimizer.step()
            optimizer.zero_grad()

    scale: the first factor, a power of two, so that scaling rounds nothing. hysteresis: the first hysteresis - 1
    overflows after the start, or after a doubling, leave the scale as it is. enabled: if False, scale stays 1 and clip
    is clip_grad_norm. All ranks hold the same numbers without exchanging any, since clip_grad_norm gives all of them
    the same verdict. ValueError: a setting out of range.
    """

    def __init__(self, scale: float = 2.0**16, *, window: int = 2000, hysteresis: int = 1, enabled: bool = True):
        if not (1 <= scale < math.inf and math.frexp(scale)[0] == 0.5):
            raise ValueError(f"scale: got {scale}, wanted a power of two from 1 on, such as 65536")
        for name, number in (("window", window), ("hysteresis", hysteresis)):
            if number < 1:
                raise ValueError(f"{name}: got {number}, wanted at least 1")
        self.scale = float(scale) if enabled else 1.0
        self.window, self.hysteresis, self.enabled = window, hysteresis, enabled
        self.good_steps, self.tolerated = 0, hysteresis - 1     # overflows that do not halve yet

    def clip(self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]], max_norm: float = 0.0,
             holders: Mapping[str, int] | None = None) -> float | None:
        """clip_grad_norm of the gradients divided by the scale, then a new scale; None if they overflowed, and then
        they are as they were: drop them. FloatingPointError: they overflow at a scale of 1, so scaling is no cure."""
        try:
            norm = clip_grad_norm(named_parameters, max_norm, self.scale, holders)
        except NonFiniteGradient as error:
            if not self.enabled:
                raise
            self._overflowed(error)
            return None
        if self.enabled:
            self._succeeded()
        return norm

    def _overflowed(self, error: NonFiniteGradient) -> None:
        self.good_steps = 0
        if self.tolerated:
            self.tolerated -= 1
        elif self.scale == 1:
            raise FloatingPointError(f"float16 overflows even at a loss scale of 1: {error}") from error
        else:
            self.scale /= 2

    def _succeeded(self) -> None:
        self.good_steps += 1
        if self.good_steps >= self.window:
            self.scale, self.good_steps, self.tolerated = self.scale * 2, 0, self.hysteresis - 1

    def state_dict(self) -> dict[str, float]:
        """Plain numbers, to be saved as JSON; none if not enabled."""
        names = ("scale", "good_steps", "tolerated") if self.enabled else ()
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """ValueError: the state of another kind of scaler, and then nothing has changed."""
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"loss scaler: got the state {dict(state)}, wanted the keys {list(self.state_dict())}: is "
                             "this the checkpoint of a run with another train.dtype?")
        vars(self).update(state)
