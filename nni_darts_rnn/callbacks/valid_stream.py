"""The batches that α learns from, read again and again beside a training, which this does not change."""

from __future__ import annotations

from collections.abc import Iterator

from fastai.torch_core import to_device
from torch import Tensor

from ..bilevel import RandomState
from ..weight_step import Tensors


class ValidStream:
    """Reads `batches` again and again, without end; for batches with `set_epoch`, always those of `epoch`. Their loader draws from a random state of its own,
    which begins as a copy of the training's and then goes on by itself. The devices of `tensors` are those whose generators belong to it."""

    def __init__(self, batches, epoch: int, tensors: Tensors):
        self.reader, self.tensors = _read(batches, epoch), tensors
        self.random: RandomState | None = None

    def next(self, n_inputs: int, device) -> tuple[tuple, tuple]:
        """The next batch as (inputs, targets), with `n_inputs` inputs, on `device`. Tensors are plain ones, not fastai's subclasses."""
        training = RandomState(self.tensors)
        if self.random is not None:
            self.random.restore()
        batch = next(self.reader)
        self.random = RandomState(self.tensors)
        training.restore()
        placed = [t.as_subclass(Tensor) if isinstance(t, Tensor) else t for t in to_device(tuple(batch), device)]
        return tuple(placed[:n_inputs]), tuple(placed[n_inputs:])


def _read(batches, epoch: int) -> Iterator:  # not a method: a reader with a reference to its stream would outlive it, with the loader's workers
    while True:
        if hasattr(batches, "set_epoch"):
            batches.set_epoch(epoch)
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("valid_batches gives no batch, or none when it is read again: the validation text is too short for this batch size, or valid_batches is a "
                             "generator, which can be read once only; give a list or a DataLoader")
