"""The batches that α learns from, read again and again beside a training that is not to notice."""

from __future__ import annotations

from collections.abc import Iterator

from fastai.torch_core import to_device
from torch import Tensor

from ..bilevel import RandomState
from ..weight_step import Tensors


class ValidStream:
    """`batches` without end, of that epoch where they have any. What their loader draws comes from random numbers of its own, which begin where the training's
    stand and go on by themselves. `tensors` name the devices."""

    def __init__(self, batches, epoch: int, tensors: Tensors):
        self.reader, self.tensors = _read(batches, epoch), tensors
        self.random: RandomState | None = None

    def next(self, n_inputs: int, device) -> tuple[tuple, tuple]:
        """(inputs, targets), so many inputs, on that device, as plain tensors rather than fastai's subclasses."""
        training = RandomState(self.tensors)
        if self.random is not None:
            self.random.restore()
        batch = next(self.reader)
        self.random = RandomState(self.tensors)
        training.restore()
        placed = [t.as_subclass(Tensor) if isinstance(t, Tensor) else t for t in to_device(tuple(batch), device)]
        return tuple(placed[:n_inputs]), tuple(placed[n_inputs:])


def _read(batches, epoch: int) -> Iterator:  # no method: a reader that knew its stream would outlive it, with the loader's workers
    while True:
        if hasattr(batches, "set_epoch"):
            batches.set_epoch(epoch)
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("valid_batches holds no batch, or none when it is read again: the validation text is too short for this batch size, or it is a generator, "
                             "where a list or a DataLoader can be read from its beginning")
