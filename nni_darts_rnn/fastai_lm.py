"""The language model in the form that fastai trains: it holds its hidden state, and its loss and metrics count tokens.

Tokens and targets are batch-first, (B, T), as in fastai. Losses are in nats per token.
"""

from __future__ import annotations

import contextlib
import functools

import numpy as np
import torch
import torch.nn.functional as F
from fastai.learner import AvgLoss, AvgSmoothLoss
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import Perplexity
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .cross_entropy import linear_cross_entropy
from .extension import rounds
from .genotype import Genotype
from .model import LanguageModel


def _products(precision: str, tokens: Tensor):
    """A context for matrix products: in bfloat16 if `precision` says so and the device gains from it, else unchanged. fastai's `MixedPrecision` (2.8) is for
    CUDA alone."""
    return torch.autocast(tokens.device.type, torch.bfloat16) if precision == "bfloat16" and rounds(tokens.device) else contextlib.nullcontext()


class DeferredLogits:
    """Stands for the logits in training, and holds what they are made of: dropped (T, B, H), the decoder's weight (V, H) and its bias (V).

    `SequenceLoss` computes the (T·B, V) logits in blocks of rows. They are the largest tensor of a training step, and are never kept. Any other code, such
    as another loss, can use this object like the tensor of logits (B, T, V), which is then computed.
    """

    def __init__(self, dropped: Tensor, weight: Tensor, bias: Tensor, precision: str = "float32"):
        self.dropped, self.weight, self.bias, self.precision = dropped, weight, bias, precision

    @functools.cached_property
    def logits(self) -> Tensor:
        with torch.enable_grad(), _products(self.precision, self.dropped):  # with a graph for the loss, even if a metric asks first
            return F.linear(self.dropped.transpose(0, 1), self.weight, self.bias)  # (T, B, H) -> (B, T, H) -> (B, T, V)

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.logits, name)

    def __getitem__(self, index) -> Tensor:
        return self.logits[index]

    def __len__(self) -> int:
        return len(self.logits)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.is_floating_point:  # fastai's mixed precision asks this before it converts a prediction to float32; the loss converts by itself
            return False
        args, kwargs = tree_map(lambda value: value.logits if isinstance(value, cls) else value, (args, kwargs or {}))
        return function(*args, **kwargs)


def _of_logits(name: str):
    return lambda self, *others: getattr(self.logits, name)(*others)  # an operand that is a DeferredLogits too comes to `__torch_function__`


# Python looks these up in the class, past `__getattr__`
for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "neg", "abs", "matmul", "lt", "le", "gt", "ge"):
    setattr(DeferredLogits, f"__{_name}__", _of_logits(f"__{_name}__"))


class StatefulLM(nn.Module):
    """A `LanguageModel` (`lm`) with fastai's interface: tokens (B, T) -> decoded (B, T, V), raw and dropped (B, T, H), all views of time-major memory.

    In training `decoded` is a `DeferredLogits`, which `SequenceLoss` knows how to use, and matrix products have the given `precision`.

    The hidden state (B, H) is a buffer that is not in the state dict. It is carried from batch to batch without its graph. `reset()` sets it to zero, and
    a batch of another B starts from zeros. `carried` names the buffers that belong to a stream of text and not to the model.
    """

    carried = ("hidden",)

    def __init__(self, lm: LanguageModel, precision: str = "float32"):
        super().__init__()
        self.lm, self.precision = lm, precision
        self.register_buffer("hidden", lm.init_hidden(1), persistent=False)

    def reset(self) -> None:
        self.hidden = torch.zeros_like(self.hidden)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.hidden if len(self.hidden) == len(tokens) else self.lm.init_hidden(len(tokens))
        with _products(self.precision, tokens) if self.training else contextlib.nullcontext():
            raw, dropped = self.lm.encode(tokens.t(), hidden)  # (T, B, H) each
        self.hidden = raw[-1].detach().clone()  # a new tensor: the old one may be part of a graph, and a view would keep all of `raw` alive
        decoder = self.lm.decoder
        decoded = DeferredLogits(dropped, decoder.weight, decoder.bias, self.precision) if self.training else decoder(dropped).transpose(0, 1)
        return decoded, raw.transpose(0, 1), dropped.transpose(0, 1)

    def genotype(self) -> Genotype:
        """The cell: the discrete layer's own genotype, or the one that a supernet's α stands for."""
        cell = self.lm.rnn.genotype
        return cell() if callable(cell) else cell


class SequenceLoss(CrossEntropyLossFlat):
    """fastai's cross-entropy over the words, which are the last axis. Rows are flattened time first. So `StatefulLM`'s logits are not copied, and sums run in
    the same order as in `LanguageModel.loss`."""

    def __init__(self, *args, axis: int = -1, **kwargs):
        if axis != -1:
            raise ValueError(f"axis: the words are along the last axis of a model's answer (B, T, V); -1 is the only one, not {axis!r}")
        super().__init__(*args, **kwargs)

    def __call__(self, decoded: Tensor | DeferredLogits, targets: Tensor, **kwargs) -> Tensor:
        plain = self.func.weight is None and self.func.ignore_index == -100 and not self.func.label_smoothing
        if isinstance(decoded, DeferredLogits):
            if plain and not bool((targets == self.func.ignore_index).any()):
                with _products(decoded.precision, targets):
                    return linear_cross_entropy(decoded.dropped.flatten(0, 1), decoded.weight, decoded.bias, targets.t().flatten())  # (T·B, H), (T·B)
            decoded = decoded.logits
        if self.reduction != "mean" or not plain:
            return super().__call__(decoded, targets, **kwargs)  # another reduction (batch first), class weights, another ignore_index, label smoothing
        return F.cross_entropy(decoded.transpose(0, 1).flatten(0, 1), targets.t().flatten())


class TokenLoss(AvgLoss):
    """Mean loss over the tokens that the loss counts (not its `ignore_index`). fastai's `AvgLoss` weights a batch by its number of sequences, however short
    they are. Sums are kept in float64."""

    def accumulate(self, learn):
        left_out = getattr(getattr(learn.loss_func, "func", learn.loss_func), "ignore_index", None)
        n = learn.yb[0].numel() if left_out is None else int((learn.yb[0] != left_out).sum())
        if n:
            self.total += float(learn.loss.detach().mean()) * n
            self.count += n


class SmoothLoss(AvgSmoothLoss):
    """fastai's smoothed loss as a plain number. fastai keeps a small tensor for every step. The freed memory between these cannot go back to the system:
    memory was measured to grow by 0.3 MB a step."""

    def reset(self):
        self.count, self.val = 0, 0.0

    def accumulate(self, learn):
        self.count += 1
        self.val = (1 - self.beta) * float(learn.loss.detach().mean()) + self.beta * self.val

    @property
    def value(self):
        if not self.count:
            return np.float64("nan")
        return np.float64(self.val / (1 - self.beta**self.count))  # a NumPy number, as fastai's progress bar calls its `item()`


class TokenPerplexity(Perplexity):
    """fastai's `Perplexity` over tokens: exp(nats per predicted token), and None before the first."""

    def accumulate(self, learn):
        TokenLoss.accumulate(self, learn)

    @property
    def value(self):
        return float(torch.exp(torch.tensor(self.total / self.count, dtype=torch.float64))) if self.count else None
