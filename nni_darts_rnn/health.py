"""Watch the numbers of a run: what is not finite ends the step that made it, the phase then goes back to a checkpoint, and a search that collapses is named."""

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
"""A phase whose numbers go wrong goes back to the end of an epoch, at most ROLLBACKS times, and multiplies its learning rate by SHRINK each time."""
HOPELESS = 10.0
"""An epoch went wrong, though its numbers are finite, if its perplexity is above HOPELESS times V, the perplexity of guessing every word alike."""


class NotFinite(FloatingPointError):
    """A loss, a gradient, weights or α with a NaN or an infinite number, or an epoch that is hopeless. `what` says which; fastai puts words of its own
    before the message of an exception from a callback."""

    def __init__(self, what: str):
        super().__init__(what)
        self.what = what


def check_finite(**named: Tensor | Iterable[Tensor | None] | None) -> None:
    """Raise `NotFinite`, with the name of the first argument that holds a NaN or an infinite number. Synchronises with the device once if there is none."""
    found = {}
    for name, value in named.items():
        tensors = [t for t in ([value] if isinstance(value, Tensor) else value or ()) if t is not None]
        if tensors:
            # a norm is finite if every number is, unless the sum of squares overflows, which would be as bad
            found[name] = torch.stack([torch.linalg.vector_norm(t.detach()).float() for t in tensors]).sum()
    sums = torch.stack(list(found.values())) if found else torch.zeros(1)
    if not bool(torch.isfinite(sums).all()):
        name = next(name for name, total in zip(found, sums.tolist()) if not math.isfinite(total))
        raise NotFinite(f"the {name.replace('_', ' ')} is no longer finite")


def check_epoch(perplexity: float, vocab_size: int, what: str) -> None:
    """Raise `NotFinite` if the perplexity of an epoch is not finite, or more than HOPELESS times that of guessing every word alike."""
    if not math.isfinite(perplexity) or perplexity > HOPELESS * vocab_size:
        raise NotFinite(f"the {what} perplexity is {perplexity:.3g}, where guessing every word alike has {vocab_size:,}")


def name_poor(phase: str, perplexity: float, vocab_size: int) -> None:
    """Log a warning if a phase ended with a perplexity worse than guessing every word alike."""
    if perplexity > vocab_size * (1 + 1e-6):  # the margin is for rounding
        logger.warning("%s: a validation perplexity of %.4g is worse than guessing every word alike (%d); %s.lr may be too large, or the text too short",
                       phase, perplexity, vocab_size, phase)


def with_rollbacks(store: Checkpoints, phase: str, epochs: int, once: Callable[[dict | None, float], Result]) -> Result:
    """Run `once(state, factor)` from the newest checkpoint; `state` is None if there is none, and `factor` multiplies the learning rate.

    Each `NotFinite` multiplies `factor` by SHRINK, and `once` begins again from the newest checkpoint at an epoch's end, ROLLBACKS times at most. Then, or if
    there is no such checkpoint, `FloatingPointError` with one line. The checkpoints that follow hold the count, so a run that was
    stopped and resumed has no more attempts than one that was not.
    """
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
            except ValueError as nothing:  # no checkpoint could be written, or none is intact
                raise FloatingPointError(f"{phase}: {error.what}; {nothing}; lower {phase}.init_range or {phase}.lr") from None
            logger.warning("%s: %s; back to the beginning of epoch %d with %g times the learning rate (%d of at most %d times)",
                           phase, error.what, state["epoch"] + 1, SHRINK**rollbacks, rollbacks, ROLLBACKS)


def spread(probabilities: Tensor, primitives) -> dict[str, float]:
    """For softmax(α), (E, K): the entropy of an edge in nats, averaged over the edges, and the shares of `none` and `identity` if they are primitives."""
    p = probabilities.double()
    edge = p / p.sum(1, keepdim=True)  # a row sums to less than 1 if the softmax is over all edges of a node
    found = {"alpha_entropy": float(-(edge * edge.clamp_min(1e-30).log()).sum(1).mean())}
    return found | {f"{name}_share": float(p[:, list(primitives).index(name)].sum() / p.sum()) for name in ("none", "identity") if name in primitives}


def watched_spread(mixed, phase: str, epoch: int) -> dict[str, float]:
    """The `spread` of a mixed cell after an epoch. Logs a warning if the search collapses."""
    shares = spread(mixed.probabilities(), mixed.primitives)
    if words := collapse(shares, mixed.genotype()):
        logger.warning("%s, epoch %d: %s", phase, epoch, words)
    return shares


def collapse(shares: dict[str, float], genotype: Genotype) -> str | None:
    """One sentence about how a search collapses, or None if it does not. It does if `none` or `identity` has more than half
    of the weight, or if more than three quarters of the cell's nodes (three or more) are identity."""
    ops = [op for op, _ in genotype.recurrent]
    if shares.get("none_share", 0) > 0.5:
        return f"none has {shares['none_share']:.0%} of the weight of all edges: the supernet computes little, and the cell is read from what is left"
    if shares.get("identity_share", 0) > 0.5:
        return f"identity has {shares['identity_share']:.0%} of the weight of all edges: the search prefers cells that compute nothing"
    if len(ops) > 2 and ops.count("identity") > 0.75 * len(ops):
        return f"{ops.count('identity')} of the cell's {len(ops)} nodes are identity: the search prefers cells that compute nothing"
    return None
