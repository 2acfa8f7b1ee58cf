"""The batches that α learns from, read again and again, without an effect on the random numbers of the training."""

from __future__ import annotations

from collections.abc import Iterator

from fastai.torch_core import to_device
from torch import Tensor

from ..bilevel import RandomState
from ..weight_step import Tensors


class ValidStream:
    """`batches`, read again from their beginning whenever they end; of epoch `epoch`, if they have epochs. Their loader draws from a random state of its own, which
    begins as the training's and then goes on separately. `tensors` name the devices that have a random state."""

    def __init__(self, batches, epoch: int, tensors: Tensors):
        self.reader, self.tensors = _read(batches, epoch), tensors
        self.random: RandomState | None = None

    def next(self, n_inputs: int, device) -> tuple[tuple, tuple]:
        """The next batch as (inputs, targets), of which the first `n_inputs` are inputs; on `device`, as plain tensors and not fastai's subclasses."""
        training = RandomState(self.tensors)
        if self.random is not None:
            self.random.restore()
        batch = next(self.reader)
        self.random = RandomState(self.tensors)
        training.restore()
        placed = [t.as_subclass(Tensor) if isinstance(t, Tensor) else t for t in to_device(tuple(batch), device)]
        return tuple(placed[:n_inputs]), tuple(placed[n_inputs:])


def _read(batches, epoch: int) -> Iterator:  # not a method: a generator that refers to its stream would keep it, and the loader's workers, alive
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
