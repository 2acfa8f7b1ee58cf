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
    """Cut (tokens,) into B = `batch_size` streams, (S, B). Column b is the b-th of B consecutive, equally long parts. Tokens left over at the end are dropped.

    The result is a view, not a copy. `ValueError` if there are fewer than two tokens for each stream.
    """
    whole_number("batch_size", batch_size)
    if len(tokens) < 2 * batch_size:
        raise ValueError(f"batch_size: {batch_size} streams need a text of at least {2 * batch_size} tokens, this one has {len(tokens)}; "
                         "take fewer streams or more text")
    length = len(tokens) // batch_size
    return tokens[:length * batch_size].view(batch_size, length).t()


@dataclass(frozen=True)
class LengthRule:
    """The rule for the number of time steps of the next batch. It is drawn from the normal distribution N(`bptt`, `std`), with `short_probability` from
    N(`bptt`/2, `std`), cut to its whole part and kept between `minimum` and `maximum`. With `bptt` alone, every batch has that length. `ValueError` for
    values that make no length.

    quark0/darts has a `short_probability` of 0.05 in its search (`rnn/train_search.py`); its retraining also has a `std` and a `minimum` of 5 (`rnn/train.py`).
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
    """Two views on the streams, (T, B) each. `targets` are the tokens one time step later."""

    tokens: Tensor
    targets: Tensor


class BpttBatches:
    """The batches of streams (S, B) in one epoch. They are consecutive, and each of the (S-1)·B targets is in exactly one of them.

    `set_epoch` draws the lengths of epoch e from a generator of its own, seeded with (`seed`, e). So a resumed run has the same lengths, and nothing else that
    draws random numbers changes them. Batches can also be taken by number, which lets a run go on in the middle of an epoch.
    """

    def __init__(self, stream: Tensor, lengths: LengthRule, seed: int = 0, device: torch.device | str | None = None):
        if stream.dim() != 2 or len(stream) < 2 or not stream.shape[1]:
            raise ValueError(f"streams of shape {tuple(stream.shape)} hold no target; expected (S, B) with S of at least 2")
        self.stream = stream if device is None else stream.to(device)
        self.rule, self.seed = lengths, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the lengths of this epoch. An iterator that has already begun keeps the old ones."""
        generator = np.random.default_rng((self.seed, epoch))
        starts, targets = [0], len(self.stream) - 1
        while starts[-1] < targets:
            starts.append(min(starts[-1] + self.rule.draw(generator), targets))
        self.epoch, self._starts = epoch, starts

    @property
    def lengths(self) -> list[int]:
        """T of each batch of this epoch. They sum to S-1."""
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
        """The same, but with one target per stream in place of the text. fastai's `export` keeps this of its DataLoaders."""
        return BpttBatches(self.stream.new_zeros(2, self.stream.shape[1]), self.rule, self.seed)

    def to(self, device: torch.device | str) -> BpttBatches:
        """Move the streams to another device. Returns self."""
        self.stream = self.stream.to(device)
        return self
