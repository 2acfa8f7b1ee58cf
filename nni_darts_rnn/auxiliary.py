"""Passes over a user's modules that are no part of their training: each sees what was there before the training step, and leaves no trace."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
from torch import Tensor, nn

from .bilevel import RandomState

OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # parameters, buffers, hooks: no attributes that a training step assigns
PLAIN = {str, bytes, int, float, bool, complex, type(None)}  # cannot be changed in place
CONTAINERS = (list, dict, deque, Counter, OrderedDict, defaultdict)


class Before:
    """What a module was before a training step: its `buffers` by name (copies), its modules' own attributes, and the random `generators`."""

    def __init__(self, module: nn.Module):
        self.buffers = {name: b.clone() for name, b in module.named_buffers()}
        self.attributes = [(m, _copies(vars(m))) for m in module.modules()]
        self.generators = RandomState(list(module.parameters()))

    @contextlib.contextmanager
    def again(self):
        """Attributes that the modules assign in a step (counters, the states of torchmetrics) are at first what they were before it, and in the
        end what they are now. Buffers are for `torch.func.functional_call` to replace."""
        now = [dict(vars(module)) for module, _ in self.attributes]
        for module, attributes in self.attributes:
            _replace(module, _copies(attributes))
        try:
            yield
        finally:
            for (module, _), attributes in zip(self.attributes, now):
                _replace(module, attributes)


def _copies(attributes: dict) -> dict:
    """A module's own attributes; what can be changed in place is a copy."""
    return {name: _copy(value) for name, value in attributes.items() if name not in OF_EVERY_MODULE}


def _copy(value):
    """What a step may change in place as a copy, with what it holds; anything else, such as a module, as it is."""
    if type(value) is Tensor:
        return value.clone()
    if type(value) is np.ndarray:
        return value.copy()
    if type(value) is set:  # what it holds cannot be changed in place
        return value.copy()
    if type(value) in CONTAINERS:
        new = copy.copy(value)
        if set(map(type, new.values() if isinstance(new, dict) else new)) <= PLAIN:  # a vocabulary, say: at C's speed
            return new
        for key, held in new.items() if isinstance(new, dict) else enumerate(new):
            new[key] = _copy(held)
        return new
    return tuple(map(_copy, value)) if type(value) is tuple else value


def _replace(module: nn.Module, attributes: dict) -> None:
    for name in vars(module).keys() - attributes.keys() - OF_EVERY_MODULE:
        del vars(module)[name]
    vars(module).update(attributes)
