"""The settings of the architecture step, checked in the same way for the NNI strategy and the fastai callback, and the gradient that they ask for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .bilevel import MODES, AlphaGradient, Loss, architecture_gradient, is_first_order
from .checks import one_of
from .published import original_gradient, plain_sgd, tied
from .weight_step import Tensors, WeightStep

ABOVE_0 = {"epsilon", "gradient_clip_val"}  # other numbers may be 0 too
WHOLE = {"neumann_terms", "warmup_epochs", "log_prob_every_n_step"}
OPTIONAL = {"unrolled_lr", "gradient_clip_val"}
FLAGS = {"own_gradient", "reproduce_original", "alpha_dropout"}
BETAS = {"arc_betas", "arch_betas"}


def check_step(*, hvp: str, unrolled_lr: float | None, neumann_terms: int, reproduce_original: bool, **others) -> None:
    """`ValueError` with one line that names the first setting that is not allowed, or that another setting would leave without effect."""
    for name, value in {**others, "unrolled_lr": unrolled_lr, "neumann_terms": neumann_terms, "reproduce_original": reproduce_original}.items():
        if name in FLAGS:
            if not isinstance(value, bool):
                raise ValueError(f"{name}: {value!r} must be True or False")
        elif name in BETAS:
            if not isinstance(value, Sequence) or len(value) != 2 or not all(_number(name, beta) and 0 <= beta < 1 for beta in value):
                raise ValueError(f"{name}: {value!r} must be two numbers, each at least 0 and below 1")
        elif value is not None or name not in OPTIONAL:
            if not (_number(name, value) and (0 < value if name in ABOVE_0 else 0 <= value) and value < math.inf):
                raise ValueError(f"{name}: {value!r} must be {'above' if name in ABOVE_0 else 'at least'} 0, and finite")
            if name in WHOLE and value != int(value):
                raise ValueError(f"{name}: {value!r} must be a whole number")
    one_of("hvp", hvp, MODES)
    if neumann_terms and is_first_order(hvp, unrolled_lr):
        raise ValueError(f"neumann_terms: {neumann_terms} terms belong to the second-order gradient, and this one is first order; give 0")
    if reproduce_original and (hvp == "exact" or neumann_terms):
        raise ValueError(f"reproduce_original: the published code has a finite difference and no series; leave it out with hvp={hvp!r} and neumann_terms={neumann_terms}")


def gradient_by(settings, module: nn.Module, weights: dict[str, Tensor], alphas: Tensors, train_batch, valid_batch, train_loss: Loss, valid_loss: Loss,
                optimizer: Optimizer, clip: float | None, *, first: bool, **passes) -> AlphaGradient:
    """∇α, ours or the published code's, by those attributes of `settings` that `check_step` checks.

    `weights` are the weights of `module`, by name, that `optimizer` is about to move, with gradients clipped to the norm `clip`. `passes` are `ran`
    and `reduce` of `architecture_gradient`. In the `first` step of a search this checks that the loss does not reach weights of `module` past the
    ones it is given.
    """
    tensors = list(weights.values())
    first_order = is_first_order(settings.hvp, settings.unrolled_lr)
    if not first_order:
        known = {id(w) for w in tensors}
        strangers = sum(p.requires_grad and id(p) not in known for group in optimizer.param_groups for p in group["params"])
        if strangers:
            raise ValueError(f"the optimizer moves {strangers} tensors that belong to no module of the model (are layers in a plain list?); use nn.ModuleList or nn.ParameterList")
    if settings.reproduce_original and settings.hvp != "first_order":
        group = plain_sgd(optimizer)
        lr = group["lr"] if settings.unrolled_lr is None else settings.unrolled_lr
        return original_gradient(train_loss, tensors, alphas, train_batch, valid_batch, lr, group["weight_decay"], clip, valid_loss=valid_loss,
                                 tied=tied(module, weights))
    step = None if first_order else WeightStep.of(optimizer, tensors, clip, settings.unrolled_lr)

    def unrolled_loss(*at) -> Tensor:
        loss = valid_loss(*at)
        if first and step is not None and loss.requires_grad and any(g is not None for g in torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)):
            raise ValueError("the loss keeps weights of its own, as in a list, so it does not see those of the unrolled step; take them from parameters() each time, or "
                             "use hvp='first_order'")
        return loss

    return architecture_gradient(train_loss, tensors, alphas, train_batch, valid_batch, step, settings.hvp, settings.epsilon, settings.neumann_terms, unrolled_loss,
                                 **passes)


def _number(name: str, value) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}: {value!r} must be {'a whole number' if name in WHOLE else 'a number'}")
    return True
