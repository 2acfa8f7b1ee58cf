"""The weight step that α's gradient is unrolled through: what an optimizer is about to do with a gradient, and the derivative of that step.

A step multiplies g = ∇w of the loss by the clip factor c = min(1, clip/(‖g‖ + 1e-6)), as `torch.nn.utils.clip_grad_norm_` does, and moves w to
w′ = w + F(c·g), where F acts on each number of w by itself. Its derivative takes v, a gradient at w′, back to g: q = −J'ᵀ(F'(c·g)∘v), where J is the clip.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Sequence[Tensor]
ADAMS = (torch.optim.Adam, torch.optim.AdamW)
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
"""The optimizers that a recipe may name."""


def norm(tensors: Sequence[Tensor | None]) -> Tensor:
    """The Euclidean norm of all tensors taken together; 0 where there is none."""
    squares = [(t.float() if t.dtype.itemsize < 4 else t).pow(2).sum() for t in tensors if t is not None]  # float16 has no room for squares
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())


def takes_step_of(optimizer, *kinds: type[torch.optim.Optimizer]) -> bool:
    """Whether the optimizer is of one of these classes, or of a subclass with the same step, such as `nni.trace` makes."""
    return any(isinstance(optimizer, kind) and inspect.unwrap(type(optimizer).step) is inspect.unwrap(kind.step) for kind in kinds)  # torch wraps each class's


@dataclass(frozen=True)
class Linear:
    """SGD's step of one weight, which is linear in the gradient: w′ = w − rate·(c·g) − decay·w − offset.

    `offset`, shaped like the weight, is what momentum carries over."""

    rate: float
    decay: float = 0.0
    offset: Tensor | None = None

    @classmethod
    def following(cls, state: dict, group: dict, rate: float) -> Linear:
        """The step from the `state` that torch's SGD keeps of the weight, and the settings of its `group`."""
        momentum = group["momentum"]
        buffer = state.get("momentum_buffer") if momentum else None
        # torch.optim.SGD: d = c·g + λw;  b = d at first, then μb + (1−τ)d;  the step goes along b, or along d + μb (Nesterov)
        share = 1.0 if buffer is None else 1.0 - group["dampening"]
        carried = 0.0 if buffer is None else momentum
        if group["nesterov"]:
            share, carried = 1.0 + momentum * share, momentum * carried
        return cls(float(rate * share), float(rate * share * group["weight_decay"]), None if buffer is None or not rate else rate * carried * buffer)

    @property
    def moves(self) -> bool:
        """Whether w′ is another place than w."""
        return self.rate != 0 or self.offset is not None

    def step(self, w: Tensor, clipped: Tensor) -> Tensor:
        """w′."""
        return w - self.rate * clipped - self.decay * w - (0 if self.offset is None else self.offset)

    def slope(self, w: Tensor, clipped: Tensor) -> float:
        """−∂w′/∂(c·g)."""
        return self.rate


@dataclass(frozen=True)
class Moments:
    """Adam's step of one weight, or AdamW's (`decoupled`), after `steps` gradients. m and v are the moments of those gradients (None: no gradient yet)."""

    rate: float
    beta1: float
    beta2: float
    eps: float
    decay: float
    decoupled: bool
    steps: float
    m: Tensor | None
    v: Tensor | None

    @classmethod
    def following(cls, state: dict, group: dict, rate: float) -> Moments:
        """The step from the `state` that torch's Adam keeps of the weight, and the settings of its `group`; `ValueError` for amsgrad."""
        if group["amsgrad"]:
            raise ValueError("Adam with amsgrad=True cannot be unrolled: its step has a kink wherever a second moment is as large as the largest before; use amsgrad=False")
        beta1, beta2 = map(float, group["betas"])
        return cls(rate, beta1, beta2, group["eps"], float(group["weight_decay"]), group["decoupled_weight_decay"], float(state.get("step", 0)),
                   state.get("exp_avg"), state.get("exp_avg_sq"))

    @property
    def moves(self) -> bool:
        """Whether w′ is another place than w."""
        return self.rate != 0

    def after(self, w: Tensor, clipped: Tensor):
        """For the step to come: the gradient d that the moments take in, m̂ and √v̂, and the shares (1 − β)/(1 − β^t) of d in m̂ and of d² in v̂."""
        d = clipped if self.decoupled else clipped + self.decay * w
        m, v, count = (1 - self.beta1) * d, (1 - self.beta2) * d.square(), self.steps + 1
        if self.m is not None:
            m, v = m + self.beta1 * self.m, v + self.beta2 * self.v
        whole1, whole2 = 1 - self.beta1**count, 1 - self.beta2**count
        return d, m / whole1, (v / whole2).sqrt(), (1 - self.beta1) / whole1, (1 - self.beta2) / whole2

    def step(self, w: Tensor, clipped: Tensor) -> Tensor:
        """w′, as `torch.optim.Adam` computes it."""
        _, m, root, *_ = self.after(w, clipped)
        return (w * (1 - self.rate * self.decay) if self.decoupled else w) - self.rate * m / (root + self.eps)

    def slope(self, w: Tensor, clipped: Tensor) -> Tensor:
        """−∂w′/∂(c·g), number by number, with b = (1 − β)/(1 − β^t): rate·(b₁ − b₂ m̂ d/(√v̂ (√v̂+ε)))/(√v̂+ε).

        It is set to 0 where the gradient is 0, or so small that its square is 0. A number that a mask or a relu cuts off is cut off for every α. Where Adam
        has never met a gradient, the slope has the factor 1/ε, and a finite difference would see nothing else.
        """
        d, m, root, share1, share2 = self.after(w, clipped)
        away = root + self.eps
        return torch.where((clipped == 0) | (root == 0), 0.0, self.rate * (share1 - share2 * m * (d / root) / away) / away)


@dataclass(frozen=True)
class WeightStep:
    """The step of all weights. `parts` has one step for each weight; `clip` is the largest norm of all gradients together, or None."""

    parts: tuple[Linear | Moments, ...]
    clip: float | None = None

    @classmethod
    def sgd(cls, n_weights: int, lr: float, weight_decay: float = 0.0, clip: float | None = None) -> WeightStep:
        """Plain SGD on `n_weights` tensors."""
        return cls((Linear(lr, lr * weight_decay),) * n_weights, clip)

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, weights: Tensors, clip: float | None = None, lr: float | None = None) -> WeightStep:
        """The step that `optimizer` is about to take on `weights`; `lr`, if given, replaces every group's own rate.

        The optimizer may be `torch.optim.SGD` with weight decay, momentum, dampening and Nesterov momentum, or `Adam` or `AdamW`. Others are refused with
        `ValueError`. So are weights that are in no group, as their step would be a guess.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Lightning's wrapper holds the real one
        sgd = takes_step_of(optimizer, torch.optim.SGD)
        if not sgd and not takes_step_of(optimizer, *ADAMS):
            name = type(optimizer).__qualname__
            what = f"{type(optimizer).__module__}.{name}, a subclass, has a step of its own" if isinstance(optimizer, (torch.optim.SGD, *ADAMS)) else f"not {name}"
            raise ValueError(f"the second-order step unrolls torch.optim.SGD, Adam and AdamW; {what}: use one of these for the weights, or hvp='first_order'")
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        parts = []
        for w in weights:
            if id(w) not in group_of:
                raise ValueError(f"a weight of shape {tuple(w.shape)} takes part in the loss but is in no group of the optimizer")
            group = group_of[id(w)]
            if group.get("maximize"):
                raise ValueError(f"{type(optimizer).__name__} with maximize=True cannot be unrolled: the search minimises the training loss")
            parts.append((Linear if sgd else Moments).following(optimizer.state.get(w, {}), group, float(group["lr"] if lr is None else lr)))
        return cls(tuple(parts), clip)

    @property
    def moves(self) -> bool:
        """Whether w′ is another place than w."""
        return any(part.moves for part in self.parts)

    def coefficient(self, grads: Sequence[Tensor | None]) -> Tensor | float:
        """The clip factor c, differentiable in the gradients."""
        if self.clip is None:
            return 1.0
        return (self.clip / (norm(grads) + 1e-6)).clamp(max=1.0)

    def apply(self, weights: Tensors, grads: Sequence[Tensor | None], c: Tensor | float) -> list[Tensor]:
        """w′ of all weights. A weight without a gradient does not move, as in the optimizer's own step."""
        return [w if g is None else part.step(w, c * g) for w, g, part in zip(weights, grads, self.parts)]

    @torch.no_grad()
    def pull_back(self, vector: Tensors, weights: Tensors, grads: Sequence[Tensor | None], c: Tensor | float) -> list[Tensor | None]:
        """q for v = `vector`. Where the clip is active, J(g) = clip·g/(‖g‖ + δ), so J'ᵀu = c·(u − g (gᵀu)/(‖g‖(‖g‖ + δ)))."""
        u = [None if g is None else part.slope(w, c * g) * v for v, w, g, part in zip(vector, weights, grads, self.parts)]
        if self.clip is None or float(c) >= 1:
            return u
        length = norm(grads)
        if length == 0:
            return [None if x is None else c * x for x in u]
        along = sum((g * x).sum() for g, x in zip(grads, u) if x is not None) / (length * (length + 1e-6))
        return [None if x is None else c * (x - along * g) for x, g in zip(u, grads)]
