"""Whether the weight step that is taken is the one that was unrolled: hooks and callbacks may change its rate or its gradients in between."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .weight_step import norm

READ = {"lr", "momentum", "dampening", "weight_decay", "nesterov", "betas", "eps", "amsgrad", "decoupled_weight_decay", "maximize"}
"""Of a group's settings those that `weight_step` reads."""
ALMOST = 1e-2
"""What a clip may do to the length of gradients by its rounding, in bfloat16 too."""


def gradient_length(optimizer: torch.optim.Optimizer) -> Tensor:
    """Of the gradients of all weights that it moves, taken together."""
    return norm([p.grad for group in optimizer.param_groups for p in group["params"]])


class UnrolledStep:
    """The settings of `optimizer` when its step is unrolled, with the rate `lr` in place of its own where given, and, once the weights have their gradients,
    how long these are after a clip."""

    def __init__(self, optimizer: torch.optim.Optimizer, lr: float | None = None):
        self.optimizer, self.names = optimizer, READ - (set() if lr is None else {"lr"})
        self.length: float | None = None
        self.settings = [self._settings(group) for group in optimizer.param_groups]

    def clipped_to(self, clip: float | None, length: float) -> None:
        """The weights have their gradients, of that length, which are clipped next."""
        self.length = length if clip is None else min(length, length * clip / (length + 1e-6))

    def check(self) -> None:
        """Just before the weights move: `ValueError` with one line where it would be by another step. A change that keeps the gradients' length is not seen."""
        for was, group in zip(self.settings, self.optimizer.param_groups):
            for name, value in self._settings(group).items():
                if value != was.get(name):
                    raise ValueError(f"{name}: {value!r} in the weights' step, but {was.get(name)!r} when that was unrolled; change it in a scheduler or before the batch, not within "
                                     "the step, or use hvp='first_order'")
        if self.length is not None and not math.isclose(float(gradient_length(self.optimizer)), self.length, rel_tol=ALMOST, abs_tol=1e-12):
            raise ValueError("the gradients are no longer those of the step that was unrolled: a hook or a callback has changed them; change the loss or the learning rate instead, or use "
                             "hvp='first_order'")

    def _settings(self, group: dict) -> dict:
        return {name: group[name].item() if isinstance(group[name], Tensor) else group[name] for name in self.names & group.keys()}
