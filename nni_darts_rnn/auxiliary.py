"""Passes over a user's modules that are no part of their training: each sees the modules as they were before the training step, and leaves no trace."""

from __future__ import annotations

import contextlib
import random
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .bilevel import RandomState

OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # parameters, buffers, hooks: not the attributes that a training step assigns
PLAIN = {str, bytes, int, float, bool, complex, type(None)}  # cannot be changed in place
CONTAINERS = (list, dict, deque, Counter, OrderedDict, defaultdict, set)
GENERATORS = {torch.Generator: (torch.Generator.get_state, torch.Generator.set_state), random.Random: (random.Random.getstate, random.Random.setstate),
              np.random.RandomState: (np.random.RandomState.get_state, np.random.RandomState.set_state),
              np.random.Generator: (lambda g: g.bit_generator.state, lambda g, state: setattr(g.bit_generator, "state", state))}


@dataclass(frozen=True)
class Held:
    """A container and the values it held; those that can be changed in place are copies. `plain`: there are no copies, because no value can be changed in
    place, or because the container is a set, whose members are told apart by what they are."""

    container: Any
    contents: dict | list
    plain: bool


class Before:
    """A module as it was before a training step: its `buffers` by name (copies), its modules' own attributes, and the state of random `generators`.

    Containers and generators stay the same objects, as hooks and other modules may hold them too. Their former contents are written back into them.
    """

    def __init__(self, module: nn.Module):
        self.buffers = {name: b.clone() for name, b in module.named_buffers()}
        self.without = [(m, name) for m in module.modules() for name, b in m._buffers.items() if b is None]
        self.held: dict[int, Held | None] = {}
        self.states: dict[int, tuple] = {}  # of generators that are attributes of a module
        copies: dict[int, tuple] = {}
        self.attributes = [(m, {name: self._note(value, copies) for name, value in vars(m).items() if name not in OF_EVERY_MODULE}) for m in module.modules()]
        self.generators = RandomState(list(module.parameters()))

    def _note(self, value, copies: dict[int, tuple]):
        """`value` as it is to be kept: a copy if a step may change it in place. A container is kept itself, and its contents are noted in `held`."""
        if type(value) in GENERATORS:
            self.states[id(value)] = (value, GENERATORS[type(value)][0](value))
        elif type(value) in CONTAINERS and id(value) not in self.held:
            self.held[id(value)] = None  # it may hold itself
            contents = _contents(value)
            types = {type(held) for held in (contents.values() if isinstance(contents, dict) else contents)}
            plain = type(value) is set or types <= PLAIN  # not item by item: it may be a vocabulary
            if not plain:
                contents = _each(contents, lambda held: self._note(held, copies))
            self.held[id(value)] = Held(value, contents, plain)
        elif type(value) is tuple:
            return tuple(self._note(held, copies) for held in value)
        return _copy(value, copies)

    def call(self, module: nn.Module, named: dict[str, Tensor], *args) -> tuple[Any, dict[str, Tensor]]:
        """Call `module` as it was before the step, with `named` in place of its tensors and with copies of the buffers, so that `buffers` do not change.
        Returns the result, and the tensors that the module was called with (`named` and the copies) as the pass left them."""
        state = {name: b.clone() for name, b in self.buffers.items()} | named
        with self.again():
            return torch.func.functional_call(module, state, args), state

    @contextlib.contextmanager
    def again(self):
        """Within the context, attributes that the modules assign in a step (counters, the states of torchmetrics) are what they were before it. Afterwards
        they are again what they are now. Buffers are left to `torch.func.functional_call`, which replaces them."""
        attributes_now, buffers_now = [dict(vars(module)) for module, _ in self.attributes], [m._buffers[name] for m, name in self.without]
        held_now = [Held(h.container, h.contents if _same(h) else _contents(h.container), h.plain) for h in self.held.values()]
        states_now = [(generator, GENERATORS[type(generator)][0](generator)) for generator, _ in self.states.values()]
        copies: dict[int, tuple] = {}
        for module, attributes in self.attributes:
            _replace(module, {name: _copy(value, copies) for name, value in attributes.items()})
        for module, name in self.without:
            module._buffers[name] = None
        for held in self.held.values():
            _fill(Held(held.container, held.contents if held.plain else _each(held.contents, lambda value: _copy(value, copies)), held.plain))
        for generator, state in self.states.values():
            GENERATORS[type(generator)][1](generator, state)
        try:
            yield
        finally:
            for (module, _), attributes in zip(self.attributes, attributes_now):
                _replace(module, attributes)
            for (module, name), buffer in zip(self.without, buffers_now):
                module._buffers[name] = buffer
            for held in held_now:
                _fill(held)
            for generator, state in states_now:
                GENERATORS[type(generator)][1](generator, state)


def _copy(value, copies: dict[int, tuple]):
    """A copy of a tensor or an array, the same one for all that refer to it; anything else, such as a module, is returned as it is."""
    if type(value) is tuple:
        return tuple(_copy(held, copies) for held in value)
    if type(value) is not Tensor and type(value) is not np.ndarray:
        return value
    if id(value) not in copies:
        copies[id(value)] = (value, value.clone() if type(value) is Tensor else value.copy())  # with `value`: while it lives, nothing else has its id
    return copies[id(value)][1]


def _contents(container) -> dict | list:
    return dict(container) if isinstance(container, dict) else list(container)


def _each(contents: dict | list, function) -> dict | list:
    return {key: function(value) for key, value in contents.items()} if isinstance(contents, dict) else list(map(function, contents))


def _same(held: Held) -> bool:
    """Whether the container still holds what it held."""
    now, then = held.container, held.contents
    if isinstance(then, dict) and list(now) != list(then):  # in another order too
        return False
    if held.plain and type(now) is not set:
        return (now if isinstance(then, dict) else list(now)) == then
    if isinstance(then, dict):
        return all(now[key] is value for key, value in then.items())
    return len(now) == len(then) and all(a is b for a, b in zip(now, then))


def _fill(held: Held) -> None:
    """Write the held values back into the container. If it still holds them it is left alone, as somebody may be iterating over it."""
    container, contents = held.container, held.contents
    if _same(held):
        return
    if isinstance(contents, dict):
        if list(container) != list(contents):
            container.clear()
        for key, value in contents.items():
            container[key] = value
    else:
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(contents)


def _replace(module: nn.Module, attributes: dict) -> None:
    for name in vars(module).keys() - attributes.keys() - OF_EVERY_MODULE:
        del vars(module)[name]
    vars(module).update(attributes)
