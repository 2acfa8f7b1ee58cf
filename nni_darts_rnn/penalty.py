"""NNI's `penalty`, what an expected architecture costs, with a gradient for α. NNI 3.0 computes it from `export_probs`, which are plain numbers, but
for the depth of Proxyless's `Repeat`: of a penalty that is added, α then learns nothing. This can go once NNI's penalties have a gradient."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping

from torch import Tensor, nn


def differentiable_probs(module: nn.Module, at: Mapping[int, Tensor] | None = None) -> dict[str, dict]:
    """What `module.export_probs()` of an NNI one-shot module gives, {label: {choice: probability}}, with probabilities that are tensors () with a graph.

    `at` gives another α (K,), or (E, K) of a cell, in the place of a parameter, by its `id`. What NNI gives for a kind of choice that is not known here
    stays as it is.
    """
    found = module.export_probs()
    for layer in module.supernet_modules():
        for label, shares in _shares(layer, at or {}):
            if label in found:
                found[label] = dict(zip(found[label], shares.unbind()))
    return found


def _shares(layer: nn.Module, at: Mapping[int, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(label, probabilities (K,)) of each choice of a layer."""
    if hasattr(layer, "edge_shares"):  # our mixed cell
        yield from layer.edge_shares(at.get(id(layer.alpha), layer.alpha)).items()
    elif hasattr(layer, "_arch_alpha"):  # NNI's mixed layers: one α, or one by label
        alphas = layer._arch_alpha
        for label, alpha in alphas.items() if hasattr(alphas, "items") else [(layer.label, alphas)]:
            yield label, layer._softmax(at.get(id(alpha), alpha))


def with_gradient(module: nn.Module) -> None:
    """Gives the penalty of NNI's own DARTS module, where it has one, its gradient. The strategy's penalty, which others may use too, stays as it is."""
    if module.penalty is not None:
        module.penalty = copy.copy(module.penalty)
        module.penalty.forward = functools.partial(_penalised, module, module.penalty)


def _penalised(module: nn.Module, penalty: nn.Module, loss: Tensor, probs: dict):
    return type(penalty).forward(penalty, loss, differentiable_probs(module))
