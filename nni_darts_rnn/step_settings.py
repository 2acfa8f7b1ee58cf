"""What a user may set of the architecture step, checked alike for the NNI strategy and the fastai callback."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

from .bilevel import MODES, is_first_order
from .checks import one_of

ABOVE_0 = {"epsilon", "gradient_clip_val"}  # of other numbers 0 is allowed too
WHOLE = {"neumann_terms", "warmup_epochs", "log_prob_every_n_step"}
OPTIONAL = {"unrolled_lr", "gradient_clip_val"}
FLAGS = {"own_gradient", "reproduce_original", "alpha_dropout"}
BETAS = {"arc_betas", "arch_betas"}


def check_step(*, hvp: str, unrolled_lr: float | None, neumann_terms: int, reproduce_original: bool, **others) -> None:
    """`ValueError` with one line for the first setting, by its name, that is not allowed, or that would be without effect beside another."""
    for name, value in {**others, "unrolled_lr": unrolled_lr, "neumann_terms": neumann_terms, "reproduce_original": reproduce_original}.items():
        if name in FLAGS:
            if not isinstance(value, bool):
                raise ValueError(f"{name}: {value!r} must be True or False")
        elif name in BETAS:
            if not isinstance(value, Sequence) or len(value) != 2 or not all(_number(name, beta) and 0 <= beta < 1 for beta in value):
                raise ValueError(f"{name}: {value!r} must be at least 0 and below 1, two of them")
        elif value is not None or name not in OPTIONAL:
            if not (_number(name, value) and (0 < value if name in ABOVE_0 else 0 <= value) and value < math.inf):
                raise ValueError(f"{name}: {value!r} must be {'above' if name in ABOVE_0 else 'at least'} 0, and finite")
            if name in WHOLE and value != int(value):
                raise ValueError(f"{name}: {value!r} must be a whole number")
    one_of("hvp", hvp, MODES)
    if neumann_terms and is_first_order(hvp, unrolled_lr):
        raise ValueError(f"neumann_terms: {neumann_terms} terms of the second-order gradient go with no first-order one; give 0")
    if reproduce_original and (hvp == "exact" or neumann_terms):
        raise ValueError(f"reproduce_original: the published code has a finite difference and no series; hvp={hvp!r} and neumann_terms={neumann_terms} go without it")


def _number(name: str, value) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}: {value!r} must be {'a whole number' if name in WHOLE else 'a number'}")
    return True
