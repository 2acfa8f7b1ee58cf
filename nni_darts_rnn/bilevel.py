"""The architecture gradient of the unrolled validation loss, for any loss(weights, α, batch).

Let g = ∇w L_train(w, α), and let one weight step be w′ = w + F(J(g)). J is the clip (or the identity). F is what the optimizer does: −ρ(J(g) + λw) for SGD
(`weight_step.py`). Then the derivative of L_val(w′, α) is

    ∇α L_val(w′, α) − ∇α [ ∇w L_train(w, α) · q ],   q = −J'ᵀ(F'∘∇w′ L_val(w′, α))                      (DARTS, eq. 7)

The second term is computed as a central difference along q (eq. 8), or by double backprop. Nothing here depends on NNI, fastai or recurrent cells.
All passes of a step over its training batch draw the same random numbers. Two losses then differ because of the weights, not because of dropout masks.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .weight_step import Linear, Tensors, WeightStep, norm

MODES = ("finite_difference", "exact", "first_order")
EPSILON = 3e-2
"""Default r of the finite difference. It has the least error in float32 over sizes and moments of training (`benchmarks/epsilon.py`).

Each kink of relu between w − r and w + r adds noise, which falls as r grows, in float64 too. Below 1e-4 float32's rounding adds to it. Curvature asks for a
small r.
"""

Loss = Callable[[Tensors, Tensors, object], Tensor]
Reduce = Callable[[Sequence["Tensor | None"]], "list[Tensor | None]"]


class RandomState:
    """The state of every random generator a loss may draw from: torch (CPU and the given CUDA devices), numpy, random."""

    def __init__(self, tensors: Tensors = ()):
        self.devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(d) for d in self.devices]
        self.numpy, self.python = np.random.get_state(), random.getstate()

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in zip(self.devices, self.cuda):
            torch.cuda.set_rng_state(state, device)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


@dataclass(frozen=True)
class TrainingPass:
    """A training pass that was just run at (w, α): ∇w of its loss (None for a weight without one), its loss, and the generators' state before it."""

    grads: Sequence[Tensor | None]
    loss: Tensor
    start: RandomState


class AlphaGradient(NamedTuple):
    """α's gradient: `grads` = `direct` − `implicit`, each shaped like α; the two losses (detached); ‖∇w L_train‖ and the clip factor c of the weight step."""

    grads: list[Tensor]
    direct: list[Tensor]
    implicit: list[Tensor] | None
    train_loss: Tensor | None
    valid_loss: Tensor
    grad_norm: float | None = None
    coefficient: float = 1.0


@contextlib.contextmanager
def all_digits():
    """Compute float32 products in full float32 precision and without autocast, whatever the process allows elsewhere (cuDNN has TF32 by default). In a lower
    precision the difference of two gradients would not keep enough digits."""
    every = torch.backends  # torch's older setting for all of them cannot be read once one of these was set
    backends = (every.cuda.matmul, every.cudnn.conv, every.cudnn.rnn, every.mkldnn.matmul, every.mkldnn.conv, every.mkldnn.rnn)
    allowed = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with contextlib.ExitStack() as whole:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    whole.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        for backend, was in zip(backends, allowed):
            backend.fp32_precision = was


def is_first_order(mode: str, lr: float | None) -> bool:
    """Whether no step is unrolled: because of `mode`, or because the step's learning rate ξ, `lr`, is 0 (None: the optimizer's own)."""
    return mode == "first_order" or lr == 0


def architecture_gradient(loss: Loss, weights: Tensors, alphas: Tensors, train_batch, valid_batch, step: WeightStep | None,
                          mode: str = "finite_difference", epsilon: float = EPSILON, neumann_terms: int = 0,
                          valid_loss: Loss | None = None, same_masks: bool = True, reduce: Reduce = list,
                          ran: TrainingPass | None = None) -> AlphaGradient:
    """∇α of valid_loss(w′(α), α), where w′ is the result of the weight step from (w, α) on the train batch.

    `loss(weights, alphas, batch)` returns a scalar. It may draw from random generators, but must leave nothing else behind. At the end the generators are
    put back to where they stood, so that the weight step that follows draws the masks of the unrolled step. Weights and α are only read.
    `valid_loss` defaults to `loss`. `mode`: "finite_difference" (`epsilon` is r: the weights move by r in all, eq. 8), "exact" (double
    backprop; `loss` must allow it) or "first_order" (w′ = w; `step` and the train batch are not used). A `step` of None means first order too.
    `neumann_terms` K: in q, v = ∇w′ L_val becomes Σ_{k=0..K} (1 − decay − ∇w² L_train J'ᵀρ)ᵏ v. This is the derivative through K+1 such steps on the same
    batch, all with the curvature at w (iDARTS, arXiv 2106.10784, eq. 9, here with the clip and the decay of the step that is taken).
    `same_masks=False` draws new masks in every pass, as published code does.
    `ran`: the weight step's training pass, if it has been run already. The whole step then costs the arithmetic of 10 forward passes, not 13. The
    generators are put back to where that pass left them. Its gradients must already have gone through `reduce`.
    `reduce` is for processes that share a step. Each has its own part of the batches, and all have the same weights and α. `reduce` gives the mean of each
    gradient over the processes (None stays None). All then get the gradient of the mean losses, but each returns its own losses.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
    if not epsilon > 0:
        raise ValueError(f"epsilon: {epsilon!r} must be above 0")
    if neumann_terms < 0:
        raise ValueError(f"neumann_terms: {neumann_terms!r} must be at least 0")
    if neumann_terms and step is not None and not all(isinstance(part, Linear) for part in step.parts):
        raise ValueError(f"neumann_terms: {neumann_terms} terms are derivatives of steps that are all alike, as SGD's are; Adam's are not: give 0, or use SGD for the weights")
    valid_loss = valid_loss or loss
    end = RandomState([*weights, *alphas])
    start = end if ran is None else ran.start
    weights = [w.detach() for w in weights]
    alphas = [a.detach().requires_grad_() for a in alphas]
    if mode == "first_order" or step is None or not step.moves:  # w′ = w
        value = valid_loss(weights, alphas, valid_batch)
        direct = reduce(gradients(value, alphas))
        end.restore()
        return AlphaGradient(direct, direct, None, None, value.detach())

    if any(w.is_complex() for w in weights):
        raise ValueError("complex weights cannot be unrolled; keep their real and imaginary parts (torch.view_as_real), or use hvp='first_order'")
    coarse = next((w.dtype for w in weights if w.dtype.itemsize < 4), None)
    if coarse is not None and mode == "finite_difference":
        raise ValueError(f"weights of {coarse}: the finite difference moves them by less than their digits tell apart; keep them in float32 (Lightning's 'bf16-mixed' does), or use hvp='exact'")

    def train(at: Tensors, at_alphas: Tensors = alphas) -> Tensor:
        if same_masks:
            start.restore()
        return loss(at, at_alphas, train_batch)

    # w′; the graph of g is kept only where g is differentiated again
    exact = mode == "exact"
    leaves = [w.requires_grad_() for w in weights]
    if ran is None or exact:
        train_value = train(leaves, alphas if exact else [a.detach() for a in alphas])  # a model may be cheaper where no gradient of α is asked for
        g = torch.autograd.grad(train_value, leaves, create_graph=exact, allow_unused=True)
    else:
        train_value = ran.loss
    gd = list(ran.grads) if ran else reduce([None if x is None else x.detach() for x in g])
    # the generators now stand where the training pass left them, so the validation pass has masks of its own
    c = step.coefficient(gd)
    unrolled = [w.detach().requires_grad_() for w in step.apply(leaves, gd, c)]
    valid_value = valid_loss(unrolled, alphas, valid_batch)
    found = gradients(valid_value, [*alphas, *unrolled])
    direct, v = found[:len(alphas)], found[len(alphas):]
    q = step.pull_back(reduced := reduce(v), weights, gd, c)
    if neumann_terms:
        q = _neumann(train, leaves, reduced, q, step, gd, c, neumann_terms, epsilon, g if exact else None, reduce)
    if exact:
        implicit = gradients(sum(((x * y).sum() for x, y in zip(g, q) if x is not None and y is not None), torch.zeros(())), alphas)
    else:
        plus, minus, scale = two_ends(leaves, q, epsilon)
        if scale == 0:
            implicit = [torch.zeros_like(a) for a in alphas]
        else:
            with all_digits():
                up, down = gradients(train(plus), alphas), gradients(train(minus), alphas)
            implicit = [(a - b) / scale for a, b in zip(up, down)]
    end.restore()
    direct, implicit = reduce(direct), reduce(implicit)
    grads = [d - i for d, i in zip(direct, implicit)]
    return AlphaGradient(grads, direct, implicit, train_value.detach(), valid_value.detach(), float(norm(gd)), float(c))


def gradients(value: Tensor, inputs: Tensors) -> list[Tensor]:
    """The gradients of `value` with respect to `inputs`; zeros for an input that takes no part."""
    if not value.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    return list(torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True))


def two_ends(weights: Tensors, direction: Sequence[Tensor | None], epsilon: float) -> tuple[list[Tensor], list[Tensor], float]:
    """The points w ± r·q/‖q‖ without a graph, and 2r/‖q‖, the divisor for the difference of their gradients (0 where q is 0)."""
    length = float(norm(direction))
    if length == 0 or math.isinf(length):  # the squares are beyond float32's range
        length = float(norm([None if q is None else q.double() for q in direction]))
    if length == 0:
        return [], [], 0.0
    scale = epsilon / length
    plus = [w.detach() if q is None else torch.add(w.detach(), q, alpha=scale) for w, q in zip(weights, direction)]
    minus = [w.detach() if q is None else torch.add(w.detach(), q, alpha=-scale) for w, q in zip(weights, direction)]
    return plus, minus, 2 * scale


def _neumann(train, weights, v, q, step, gd, c, terms, epsilon, g, reduce) -> list[Tensor | None]:
    """Σ_{k=0..K} J'ᵀρ∘ (1 − decay − ∇w² L_train J'ᵀρ)ᵏ v. Each product with ∇w² is a central difference of ∇w L_train, or exact where g has its
    graph."""
    total = list(q)
    for _ in range(terms):
        if g is not None:
            dot = sum(((x * y).sum() for x, y in zip(g, q) if x is not None and y is not None), torch.zeros(()))
            product = torch.autograd.grad(dot, weights, retain_graph=True, allow_unused=True) if dot.requires_grad else [None] * len(q)
        else:
            plus, minus, scale = two_ends(weights, q, epsilon)
            if scale == 0:
                break
            ends = [[w.requires_grad_() for w in end] for end in (plus, minus)]
            with all_digits():
                up, down = [torch.autograd.grad(train(end), end, allow_unused=True) for end in ends]
            product = [None if a is None else (a - b) / scale for a, b in zip(up, down)]
        v = [(1 - part.decay) * x - (0 if h is None else h) for x, h, part in zip(v, reduce(product), step.parts)]
        q = step.pull_back(v, weights, gd, c)
        total = [None if s is None else s + t for s, t in zip(total, q)]
    return total
