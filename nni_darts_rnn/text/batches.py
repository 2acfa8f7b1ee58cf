"""Token streams and batches of consecutive text for truncated back-propagation.

Axes: T time steps of a batch, B streams read side by side, S tokens of a stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks import whole_number


def streams(tokens: Tensor, batch_size: int) -> Tensor:
    """(tokens,) as B = `batch_size` streams (S, B): column b is the b-th of B equal consecutive parts; what is over at the end is cut off.

    A view, not a copy. `ValueError` for a text of less than two tokens a stream.
    """
    whole_number("batch_size", batch_size)
    if len(tokens) < 2 * batch_size:
        raise ValueError(f"batch_size: {batch_size} streams need a text of at least {2 * batch_size} tokens, this one has {len(tokens)}; "
                         "take fewer streams or more text")
    length = len(tokens) // batch_size
    return tokens[:length * batch_size].view(batch_size, length).t()


@dataclass(frozen=True)
class LengthRule:
    """How many time steps the next batch has: the whole part of N(`bptt`, `std`), of N(`bptt`/2, `std`) with `short_probability`,
    kept between `minimum` and `maximum`. With a `bptt` alone, always that. `ValueError` for values that make no length.

    quark0/darts searches with a `short_probability` of 0.05 (`rnn/train_search.py`), and retrains with a `std` of 5 and a `minimum` of 5 too (`rnn/train.py`).
    """

    bptt: int
    short_probability: float = 0.0
    std: float = 0.0
    minimum: int = 1
    maximum: float = math.inf

    def __post_init__(self):
        if not (math.isfinite(self.bptt) and self.bptt >= 1):
            raise ValueError(f"bptt: {self.bptt!r} must be at least 1")
        if not 0 <= self.short_probability <= 1:
            raise ValueError(f"short_probability: {self.short_probability!r} must be from 0 to 1")
        if not (math.isfinite(self.std) and self.std >= 0):
            raise ValueError(f"std: {self.std!r} must be at least 0")
        if not 1 <= self.minimum <= self.maximum:
            raise ValueError(f"minimum: {self.minimum!r} must be from 1 to the maximum, {self.maximum!r}")

    def draw(self, generator: np.random.Generator) -> int:
        mean = self.bptt / 2 if generator.random() < self.short_probability else self.bptt
        return int(min(max(int(generator.normal(mean, self.std)), self.minimum), self.maximum))


class Batch(NamedTuple):
    """Views on a stream, (T, B) each: `targets` are the tokens one step later."""

    tokens: Tensor
    targets: Tensor


class BpttBatches:
    """The batches of streams (S, B) for one epoch: consecutive, and each of the (S-1)·B targets in exactly one.

    The lengths of epoch e (`set_epoch`) come from a generator seeded with (`seed`, e) alone, so a resumed run has the same ones, and
    nothing else that draws random numbers changes them. Batches can also be taken by number, so a run can go on in the middle of an epoch.
    """

    def __init__(self, stream: Tensor, lengths: LengthRule, seed: int = 0, device: torch.device | str | None = None):
        if stream.dim() != 2 or len(stream) < 2 or not stream.shape[1]:
            raise ValueError(f"streams of shape {tuple(stream.shape)} hold no target; expected (S, B) with S of at least 2")
        self.stream = stream if device is None else stream.to(device)
        self.rule, self.seed = lengths, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the lengths of this epoch. An iterator already begun keeps its own."""
        generator = np.random.default_rng((self.seed, epoch))
        starts, targets = [0], len(self.stream) - 1
        while starts[-1] < targets:
            starts.append(min(starts[-1] + self.rule.draw(generator), targets))
        self.epoch, self._starts = epoch, starts

    @property
    def lengths(self) -> list[int]:
        """T of each batch of this epoch; they sum to S-1."""
        return [end - start for start, end in zip(self._starts, self._starts[1:])]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        return self._batch(self._starts, number)

    def _batch(self, starts: list[int], number: int) -> Batch:
        start, end = starts[number:number + 2]
        return Batch(self.stream[start:end], self.stream[start + 1:end + 1])

    def __iter__(self) -> Iterator[Batch]:
        starts = self._starts
        return (self._batch(starts, number) for number in range(len(starts) - 1))

    def new_empty(self) -> BpttBatches:
        """Of no text, but for one target a stream: what fastai's `export` keeps of its DataLoaders."""
        return BpttBatches(self.stream.new_zeros(2, self.stream.shape[1]), self.rule, self.seed)

    def to(self, device: torch.device | str) -> BpttBatches:
        """The same batches on another device; returns itself."""
        self.stream = self.stream.to(device)
        return self
