"""The architecture gradient as the published code computes it, for reproduction and for comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from .bilevel import AlphaGradient, Loss, RandomState, gradients, two_ends
from .weight_step import Tensors, norm, takes_step_of


def plain_sgd(optimizer: torch.optim.Optimizer) -> dict:
    """The only group of an optimizer that `original_gradient` can unroll; `ValueError` unless the optimizer is plain SGD, as in the published code."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # Lightning's wrapper holds the real one
    group, *others = optimizer.param_groups
    if not takes_step_of(optimizer, torch.optim.SGD) or others or group["momentum"]:
        raise ValueError(f"reproduce_original: the published code has plain SGD, one group of weights without momentum; this is {type(optimizer).__name__}"
                         f" with {1 + len(others)}")
    return group


def tied(module: nn.Module, weights: Iterable[str]) -> list[int]:
    """The indices of those `weights`, given by their names in the module, that have a second name."""
    names = {id(p): name for name, p in module.named_parameters()}
    twice = {names[id(p)] for name, p in module.named_parameters(remove_duplicate=False) if names[id(p)] != name}
    return [i for i, name in enumerate(weights) if name in twice]


def original_gradient(loss: Loss, weights: Tensors, alphas: Tensors, train_batch, valid_batch, lr: float, weight_decay: float, clip: float,
                      valid_loss: Loss | None = None, tied: Sequence[int] = ()) -> AlphaGradient:
    """The estimate that quark0/darts `rnn/architect.py` computes, kept for reproduction and for comparison.

    It draws new masks in each pass, clips ∇w′ L_val before using it as a direction, and multiplies by clip/‖g‖ even where that is above 1. Afterwards the
    random state is as before, so the weights' step has the first pass's masks; the published code draws new ones there.
    `tied` are the indices of weights that have two names: the embedding, which is the decoder's matrix too. In the published w′ they stay at w, because
    `_construct_model_from_theta` writes the new matrix into a state dict in which the old one, under its second name, is loaded last.
    """
    start = RandomState([*weights, *alphas])
    alphas = [a.detach().requires_grad_() for a in alphas]
    leaves = [w.detach().requires_grad_() for w in weights]
    train_value = loss(leaves, alphas, train_batch)
    g = torch.autograd.grad(train_value, leaves, allow_unused=True)
    factor = float(clip / (norm(g) + 1e-6))
    unrolled = [(w if x is None or i in tied else w - lr * (min(factor, 1.0) * x + weight_decay * w)).detach().requires_grad_()
                for i, (w, x) in enumerate(zip(leaves, g))]
    valid_value = (valid_loss or loss)(unrolled, alphas, valid_batch)
    found = gradients(valid_value, [*alphas, *unrolled])
    direct, v = found[:len(alphas)], found[len(alphas):]
    shrink = min(float(clip / (norm(v) + 1e-6)), 1.0)
    v = [shrink * x for x in v]
    plus, minus, scale = two_ends(leaves, v, 1e-2)  # the published r
    up, down = gradients(loss(plus, alphas, train_batch), alphas), gradients(loss(minus, alphas, train_batch), alphas)
    implicit = [lr * factor * (a - b) / scale for a, b in zip(up, down)]
    start.restore()
    return AlphaGradient([d - i for d, i in zip(direct, implicit)], direct, implicit, train_value.detach(), valid_value.detach(),
                         float(norm(g)), factor)
