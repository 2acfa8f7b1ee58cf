"""Numbers that go wrong: what is not finite is noticed in the step that made it, and a search that collapses is named."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from .checkpoints.store import Checkpoints, where
from .genotype import Genotype

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

ROLLBACKS, SHRINK = 4, 0.5
"""A run whose numbers go wrong returns to the last end of an epoch so many times, each time with the learning rate times SHRINK."""
HOPELESS = 10.0
"""An epoch whose perplexity is so many times the vocabulary's size (that of guessing every word alike) went wrong, though its numbers are finite."""


class NotFinite(FloatingPointError):
    """A loss, a gradient or α that is NaN or infinite, or an epoch that is hopeless; `what` says which. fastai puts words of its own before the
    text of any exception in a callback."""

    def __init__(self, what: str):
        super().__init__(what)
        self.what = what


def check_finite(**named: Tensor | Iterable[Tensor | None] | None) -> None:
    """`NotFinite` that names the first of these that holds a NaN or an infinite number. One synchronisation with the device."""
    found = {}
    for name, value in named.items():
        tensors = [t for t in ([value] if isinstance(value, Tensor) else value or ()) if t is not None]
        if tensors:
            # a norm is finite where every number is, and short of an overflow that would be as bad
            found[name] = torch.stack([torch.linalg.vector_norm(t.detach()).float() for t in tensors]).sum()
    sums = torch.stack(list(found.values())) if found else torch.zeros(1)
    if not bool(torch.isfinite(sums).all()):
        name = next(name for name, total in zip(found, sums.tolist()) if not math.isfinite(total))
        raise NotFinite(f"the {name.replace('_', ' ')} is no longer finite")


def check_epoch(perplexity: float, vocab_size: int, what: str) -> None:
    """`NotFinite` for the perplexity of an epoch that is not finite, or more than HOPELESS times that of guessing every word alike."""
    if not math.isfinite(perplexity) or perplexity > HOPELESS * vocab_size:
        raise NotFinite(f"the {what} perplexity is {perplexity:.3g}, where guessing every word alike has {vocab_size:,}")


def name_poor(phase: str, perplexity: float, vocab_size: int) -> None:
    """Says in words that a phase ended worse than guessing."""
    if perplexity > vocab_size * (1 + 1e-6):  # more than rounding
        logger.warning("%s: a validation perplexity of %.4g is worse than guessing every word alike (%d); %s.lr may be too large, or the text too short",
                       phase, perplexity, vocab_size, phase)


def with_rollbacks(store: Checkpoints, phase: str, epochs: int, once: Callable[[dict | None, float], Result]) -> Result:
    """`once(state, factor)` from the newest checkpoint. Where it ends with `NotFinite`, again from the last end of an epoch with the learning rate
    times SHRINK, up to ROLLBACKS times in all; then `FloatingPointError` with one line. The count is in the checkpoints: a run that is
    stopped and goes on takes no more turns than one that is not."""
    state = store.load()
    rollbacks = state["rollbacks"] if state else 0
    if state and state["epoch"] < epochs:
        logger.warning("%s: goes on from %s", phase, where(state["epoch"], state["batch"]))
    while True:
        try:
            return once(state, SHRINK**rollbacks)
        except NotFinite as error:
            if rollbacks >= ROLLBACKS:
                raise FloatingPointError(f"{phase}: {error.what}, and smaller learning rates down to {SHRINK**rollbacks:g} times {phase}.lr did not help; "
                                         f"lower {phase}.lr or {phase}.clip") from None
            rollbacks += 1
            try:
                state = store.roll_back() | {"rollbacks": rollbacks}
            except ValueError as nothing:  # no checkpoint could be written, or none is whole
                raise FloatingPointError(f"{phase}: {error.what}; {nothing}") from None
            logger.warning("%s: %s; back to the beginning of epoch %d with %g times the learning rate (%d of at most %d times)",
                           phase, error.what, state["epoch"] + 1, SHRINK**rollbacks, rollbacks, ROLLBACKS)


def spread(probabilities: Tensor, primitives) -> dict[str, float]:
    """Of softmax(α) (E, K): the entropy (nats, of an edge, mean over edges) and the shares of `none` and `identity`, where they are among the primitives."""
    p = probabilities.double()
    edge = p / p.sum(1, keepdim=True)  # a row has less than 1 where the softmax is over all edges of a node
    found = {"alpha_entropy": float(-(edge * edge.clamp_min(1e-30).log()).sum(1).mean())}
    return found | {f"{name}_share": float(p[:, list(primitives).index(name)].sum() / p.sum()) for name in ("none", "identity") if name in primitives}


def watched_spread(mixed, phase: str, epoch: int) -> dict[str, float]:
    """`spread` of a mixed cell after an epoch; a collapse is named."""
    shares = spread(mixed.probabilities(), mixed.primitives)
    if words := collapse(shares, mixed.genotype()):
        logger.warning("%s, epoch %d: %s", phase, epoch, words)
    return shares


def collapse(shares: dict[str, float], genotype: Genotype) -> str | None:
    """One sentence about a search that collapses, or None: `none` or `identity` has most of the weight, or the cell is nothing but identity."""
    ops = [op for op, _ in genotype.recurrent]
    if shares.get("none_share", 0) > 0.5:
        return f"none has {shares['none_share']:.0%} of the weight of all edges: the supernet computes little, and the cell is read from what is left"
    if shares.get("identity_share", 0) > 0.5:
        return f"identity has {shares['identity_share']:.0%} of the weight of all edges: the search prefers cells that compute nothing"
    if len(ops) > 2 and ops.count("identity") > 0.75 * len(ops):
        return f"{ops.count('identity')} of the cell's {len(ops)} nodes are identity: the search prefers cells that compute nothing"
    return None
