"""Whether the weight step that is taken is the one that was unrolled: hooks and callbacks may change its rate or its gradients in between."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .weight_step import norm

ALMOST = 1e-2
"""What a clip may do to the length of gradients by its rounding, in bfloat16 too."""


class UnrolledStep:
    """The settings of `optimizer` when its step is unrolled, and, once the weights have their gradients, how long these are after a clip."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.length: float | None = None
        self.settings = [_settings(group) for group in optimizer.param_groups]

    def clipped_to(self, clip: float | None) -> None:
        """The weights have their gradients, which are clipped next."""
        length = self._length()
        self.length = length if clip is None else min(length, length * clip / (length + 1e-6))

    def check(self) -> None:
        """Just before the weights move: `ValueError` with one line where it would be by another step. A change that keeps the gradients' length is not seen."""
        for was, group in zip(self.settings, self.optimizer.param_groups):
            for name, value in _settings(group).items():
                if value != was.get(name):
                    raise ValueError(f"{name}: {value!r} in the weights' step, but {was.get(name)!r} when that was unrolled; change it in a scheduler or in on_train_batch_start, not in "
                                     "optimizer_step, or use hvp='first_order'")
        if self.length is not None and not math.isclose(self._length(), self.length, rel_tol=ALMOST, abs_tol=1e-12):
            raise ValueError("on_before_optimizer_step: the gradients are no longer those of the step that was unrolled; change the loss or the learning rate instead, or use "
                             "hvp='first_order'")

    def _length(self) -> float:
        return float(norm([p.grad for group in self.optimizer.param_groups for p in group["params"]]))


def _settings(group: dict) -> dict:
    return {name: value.item() if isinstance(value, Tensor) else value for name, value in group.items() if name != "params"}
