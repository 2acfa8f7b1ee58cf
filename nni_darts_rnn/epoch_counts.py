"""The counts of the current epoch, and an estimate of how long its phase will take. The reports of both phases use them."""

from __future__ import annotations

import logging
import math
import time

from torch import Tensor

from .talk import duration, many

logger = logging.getLogger(__name__)
LOOK = 2.0  # seconds of batches after which the duration of the phase is estimated


def perplexity_of(nats: float) -> float:
    """e^`nats`, where `nats` is the mean over tokens. At most e^700, since float64 ends at e^709."""
    return math.exp(min(nats, 700.0))


class EpochCounts:
    """The training tokens of the current epoch, the sum of their losses (nats), and the epoch's seconds.

    Once in a phase, LOOK seconds after its first batch, it logs (level INFO) how long the phase will still take. That depends on the machine, the
    corpus and the recipe, so it is estimated from the first batches.
    """

    def __init__(self, phase: str):
        self.phase, self.foretold = phase, False
        self.since: float | None = None  # when the first batch was done; it is not timed, as it compiles, allocates and so on
        self.batches = 0  # batches after the first
        self.begin()

    def begin(self) -> None:
        self.began, self.tokens, self.nats = time.perf_counter(), 0, 0.0

    def add(self, tokens: int, loss: Tensor, epochs: int, left: float) -> None:
        """Count a batch of `tokens` tokens with the mean loss `loss` (nats), which stays on its device. `left` batches of all `epochs` are still to come."""
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
        """What a checkpoint in the middle of the epoch keeps."""
        return {"seconds": self.seconds, "tokens": self.tokens, "nats": self.nats}

    def go_on(self, seconds: float, tokens: int, nats: Tensor | float) -> None:
        """Go on from what `state` returned."""
        self.began, self.tokens, self.nats = time.perf_counter() - seconds, tokens, nats

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    @property
    def loss(self) -> float:
        """Nats per training token."""
        return float(self.nats) / max(1, self.tokens)
