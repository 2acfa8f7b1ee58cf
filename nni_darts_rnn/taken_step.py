"""Checks that the weight step that is taken is the one that was unrolled: hooks and callbacks may change its rate or its gradients in between."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .weight_step import norm

READ = {"lr", "momentum", "dampening", "weight_decay", "nesterov", "betas", "eps", "amsgrad", "decoupled_weight_decay", "maximize"}
"""The settings of a parameter group that `weight_step` reads."""
ALMOST = 1e-2
"""Relative tolerance for the gradients' length: the rounding of a clip may change it, in bfloat16 too."""


def gradient_length(optimizer: torch.optim.Optimizer) -> Tensor:
    """The norm of the gradients of all weights that the optimizer moves, taken together."""
    return norm([p.grad for group in optimizer.param_groups for p in group["params"]])


class UnrolledStep:
    """The step that was unrolled: the optimizer's settings at that time and, once the weights have their gradients, the length of these after a clip.
    Where the step was unrolled with a rate of its own, `lr`, the optimizer's rate is not compared."""

    def __init__(self, optimizer: torch.optim.Optimizer, lr: float | None = None):
        self.optimizer, self.names = optimizer, READ - (set() if lr is None else {"lr"})
        self.length: float | None = None
        self.settings = [self._settings(group) for group in optimizer.param_groups]

    def clipped_to(self, clip: float | None, length: float) -> None:
        """Call when the weights have their gradients, of this `length`, and before they are clipped."""
        self.length = length if clip is None else min(length, length * clip / (length + 1e-6))

    def check(self) -> None:
        """Call just before the weights move: `ValueError` with one line if their step would be another. A change that keeps the gradients' length is missed."""
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
