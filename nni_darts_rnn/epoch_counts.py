"""What an epoch has come to so far, and how long its phase will take: for the reports of both phases."""

from __future__ import annotations

import logging
import math
import time

from torch import Tensor

from .talk import duration, many

logger = logging.getLogger(__name__)
LOOK = 2.0  # seconds of batches from which the rest of a phase is foretold


def perplexity_of(nats: float) -> float:
    """e^`nats`, the mean over tokens; no more than e^700, as float64 ends at e^709."""
    return math.exp(min(nats, 700.0))


class EpochCounts:
    """Training tokens of the epoch at hand, the sum of their losses (nats) and the epoch's seconds.

    Once, some seconds into a phase, it says how long the phase has to go (level INFO): what a corpus and a recipe take depends on the machine,
    and the first batches tell.
    """

    def __init__(self, phase: str):
        self.phase, self.foretold = phase, False
        self.since: float | None = None  # when the first batch was done, which compiles, allocates and so on
        self.batches = 0  # after that one
        self.begin()

    def begin(self) -> None:
        self.began, self.tokens, self.nats = time.perf_counter(), 0, 0.0

    def add(self, tokens: int, loss: Tensor, epochs: int, left: float) -> None:
        """A batch of `tokens` with a mean loss in nats, which stays on its device; `left` batches of all `epochs` are still to come."""
        self.tokens += tokens
        self.nats = self.nats + loss.detach() * tokens
        if self.foretold:
            return
        now = time.perf_counter()
        if self.since is None:
            self.since = now
            return
        self.batches += 1
        if now - self.since >= LOOK:
            self.foretold = True
            took = (now - self.since) / self.batches
            logger.info("%s: about %s to go, for %s in all", self.phase, duration(left * took), many(epochs, "epoch"))

    def state(self) -> dict:
        """For a checkpoint in the middle of the epoch."""
        return {"seconds": self.seconds, "tokens": self.tokens, "nats": self.nats}

    def go_on(self, seconds: float, tokens: int, nats: Tensor | float) -> None:
        """The inverse of `state`."""
        self.began, self.tokens, self.nats = time.perf_counter() - seconds, tokens, nats

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    @property
    def loss(self) -> float:
        """Nats per training token."""
        return float(self.nats) / max(1, self.tokens)
