"""The two losses of a search Learner as functions of its weights and its α, and the functions that tell α from the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from fastai.callback.rnn import RNNCallback, RNNRegularizer
from torch import Tensor, nn

from ..auxiliary import Before
from ..model import activation_regularisation, without_dropout


def architecture_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All α by name, in the order of the modules: every parameter whose own name is `alpha`. Where some of these belong to a module that has a method
    `genotype`, as a `MixedRNN` has, they are the α; a weight of that name of another module (of an activation, say) is a weight."""
    named = {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] == "alpha"}
    searched = {name: p for name, p in named.items() if hasattr(model.get_submodule(name.rpartition(".")[0]), "genotype")}
    return searched or named


def weight_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All trainable parameters but α. As the `splitter` of a search Learner this keeps α out of the weights' optimizer."""
    architecture = {id(p) for p in architecture_parameters(model).values()}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in architecture]


@dataclass(frozen=True)
class Passes:
    weights: dict[str, nn.Parameter]
    alphas: dict[str, nn.Parameter]
    train_loss: Callable[..., Tensor]
    """(weights, alphas, batch) -> the loss of the weight step. A batch is (inputs, targets), two tuples."""
    valid_loss: Callable[..., Tensor]
    """(weights, alphas, batch) -> the loss that α learns from."""
    moved_on: dict[str, Tensor]
    """The hidden states after the batch of `valid_loss`; empty until that is called."""

    @classmethod
    def of(cls, learn, before: Before, valid_state: dict[str, Tensor], alpha_dropout: bool, regularised: bool) -> Passes:
        """The losses of `learn`, with its modules as `before` found them. The validation loss begins with the hidden states `valid_state`, and has dropout only
        with `alpha_dropout`. The training loss has the AR/TAR of the Learner's regularizers if `regularised`."""
        model = learn.model
        alphas = architecture_parameters(model)
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad and name not in alphas}
        regularizers = [cb for cb in learn.cbs if isinstance(cb, RNNRegularizer) and regularised]
        triple = any(isinstance(cb, RNNCallback) for cb in learn.cbs)  # three tensors, which `RNNCallback` takes apart in the training pass

        def run(at_weights, at_alphas, batch, carried, learning=True):
            predicted, state = before.call(model, carried | dict(zip(weights, at_weights)) | dict(zip(alphas, at_alphas)), *batch[0])
            decoded, raw, dropped = predicted if triple else (predicted, None, None)
            now, learn.training = learn.training, learning  # or `MixUp` would mix the training batch's targets into another batch's loss
            try:
                return learn.loss_func(decoded, *batch[1]), raw, dropped, state
            finally:
                learn.training = now

        def train_loss(at_weights, at_alphas, batch):
            loss, raw, dropped, _ = run(at_weights, at_alphas, batch, {})
            for regularizer in regularizers:
                loss = loss + activation_regularisation(raw.transpose(0, 1), dropped.transpose(0, 1), regularizer.alpha, regularizer.beta)
            return loss

        def valid_loss(at_weights, at_alphas, batch):
            with contextlib.nullcontext() if alpha_dropout else without_dropout(model):
                loss, _, _, state = run(at_weights, at_alphas, batch, valid_state, learning=False)
            moved_on.update({name: state[name] for name in valid_state})
            return loss

        moved_on: dict[str, Tensor] = {}
        return cls(weights, alphas, train_loss, valid_loss, moved_on)
