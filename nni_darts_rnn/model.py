"""The AWD-LSTM backbone as a language model around any recurrent layer: hidden state in, hidden state out.

Merity, Keskar, Socher, *Regularizing and Optimizing LSTM Language Models* (2017); the DARTS authors' use of it in quark0/darts `rnn/model.py`:
tied embedding and decoder, word-level embedding dropout, variational dropout on the embedded words and on the outputs.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cell import INIT_RANGE, DiscreteRNN, RecurrentWeights, check_rates, variational_mask
from .checks import whole_number
from .corpus import BpttBatches, LengthRule, streams
from .cross_entropy import linear_cross_entropy
from .genotype import Genotype
from .layer import DartsRNN


class LMOutput(NamedTuple):
    """What a language model returns: decoded (T, B, V) logits, raw (T, B, H) outputs, dropped (T, B, H) outputs after dropout, hidden (B, H)."""

    decoded: Tensor
    raw: Tensor
    dropped: Tensor
    hidden: Tensor


class LanguageModel(nn.Module):
    """Predicts the next word from tokens (T, B) and a hidden state (B, H).

    `rnn` is any module with `input_size == hidden_size` and `rnn(x (T, B, H), h0 (B, H)) -> outputs (T, B, H)`. Its last output is the next hidden state:
    `cell.DiscreteRNN` for retraining, `supernet.MixedRNN` for a search. Dropout rates: `dropout` on the outputs,
    `dropout_i` on the embedded words, `dropout_e` on whole words of the embedding. Weights are tied, so H is the embedding size too; they start
    uniform in ±`init_range`.
    """

    def __init__(self, vocab_size: int, rnn: nn.Module, dropout: float = 0.0, dropout_i: float = 0.0, dropout_e: float = 0.0,
                 init_range: float = INIT_RANGE):
        super().__init__()
        whole_number("vocab_size", vocab_size)
        check_rates(dropout=dropout, dropout_i=dropout_i, dropout_e=dropout_e)
        if rnn.input_size != rnn.hidden_size:
            raise ValueError(f"rnn: input_size {rnn.input_size} and hidden_size {rnn.hidden_size} must be equal: "
                             "the decoder's weights are the embedding's")
        self.vocab_size, self.hidden_size = vocab_size, rnn.hidden_size
        self.dropout, self.dropout_i, self.dropout_e = dropout, dropout_i, dropout_e
        self.encoder = nn.Embedding(vocab_size, rnn.hidden_size)
        self.rnn = rnn
        self.decoder = nn.Linear(rnn.hidden_size, vocab_size)
        self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -init_range, init_range)
        nn.init.zeros_(self.decoder.bias)

    @classmethod
    def from_genotype(cls, vocab_size: int, hidden_size: int, genotype: Genotype, dropout: float = 0.0, dropout_h: float = 0.0,
                      dropout_x: float = 0.0, dropout_i: float = 0.0, dropout_e: float = 0.0, init_range: float = INIT_RANGE) -> LanguageModel:
        """The language model whose recurrent layer is the genotype's cell."""
        rnn = DiscreteRNN(hidden_size, hidden_size, genotype, dropout_x, dropout_h, init_range)
        return cls(vocab_size, rnn, dropout, dropout_i, dropout_e, init_range)

    def init_hidden(self, batch_size: int) -> Tensor:
        """The hidden state (B, H) before the first token: zeros, on the weights' device and in their dtype."""
        return self.encoder.weight.new_zeros(batch_size, self.hidden_size)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (T, B) -> (T, B, H), with dropout of whole words (Merity et al. 2017, section 4.3) and then variational dropout."""
        weight = self.encoder.weight
        if self.training and self.dropout_e > 0:
            keep = weight.new_empty(self.vocab_size, 1).bernoulli_(1 - self.dropout_e).div_(1 - self.dropout_e)
            embedded = F.embedding(tokens, weight) * F.embedding(tokens, keep)
        else:
            embedded = F.embedding(tokens, weight)
        mask = variational_mask(embedded[0], self.dropout_i, self.training)
        return embedded if mask is None else embedded * mask

    def encode(self, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (T, B), hidden (B, H) -> raw and dropped outputs (T, B, H)."""
        raw = self.rnn(self.embed(tokens), hidden)
        mask = variational_mask(raw[0], self.dropout, self.training)
        return raw, raw if mask is None else raw * mask

    def forward(self, tokens: Tensor, hidden: Tensor) -> LMOutput:
        raw, dropped = self.encode(tokens, hidden)
        return LMOutput(self.decoder(dropped), raw, dropped, raw[-1])

    def loss(self, tokens: Tensor, targets: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(nll, raw, dropped, hidden), where nll is the mean nats per predicted token. No logits are kept for the caller."""
        raw, dropped = self.encode(tokens, hidden)
        nll = linear_cross_entropy(dropped.flatten(0, 1), self.decoder.weight, self.decoder.bias, targets.flatten())  # (T·B, H), (T·B)
        return nll, raw, dropped, raw[-1]


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """Within the context, the model is in evaluation mode; afterwards each of its modules is in its former mode again."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def without_dropout(model: nn.Module):
    """Within the context, the model's passes have no dropout, and all else is as before: in training a supernet still draws its cell, unlike after `eval()`.

    The dropout is that of this package's modules, and of every module whose class is named …Dropout, as torch's and fastai's are.
    """
    dropping = [m for m in model.modules() if m.training and (
        isinstance(m, (LanguageModel, RecurrentWeights, DartsRNN)) or type(m).__name__.rstrip("123d").endswith("Dropout"))]
    for module in dropping:
        module.training = False  # of this module alone; `eval()` would change its parts too
    try:
        yield
    finally:
        for module in dropping:
            module.training = True


def activation_regularisation(raw: Tensor, dropped: Tensor, ar: float, tar: float) -> Tensor | float:
    """AR and TAR of Merity et al. 2017, section 4.6: ar·mean(dropped²) + tar·mean((raw_t+1 − raw_t)²)."""
    penalty = 0.0
    if ar:
        penalty = penalty + ar * dropped.pow(2).mean()
    if tar and len(raw) > 1:
        penalty = penalty + tar * (raw[1:] - raw[:-1]).pow(2).mean()
    return penalty


@torch.no_grad()
def perplexity(model, tokens: Tensor, batch_size: int, bptt: int) -> float:
    """Perplexity of `model`, in evaluation mode, on a text (n,): exp(nats per predicted token).

    The text is read in `batch_size` streams, and the hidden state is carried along. `model` is a `LanguageModel` or anything with its `loss` and
    `init_hidden`. Sums are kept in float64. `ValueError` where the text is shorter than two tokens a stream.
    """
    hidden = model.init_hidden(batch_size)
    batches = BpttBatches(streams(tokens, batch_size).to(hidden.device), LengthRule(bptt))
    nats, count = torch.zeros((), dtype=torch.float64, device=hidden.device), 0
    with evaluating(model):
        for x, y in batches:
            nll, _, _, hidden = model.loss(x, y, hidden)
            nats += nll.double() * y.numel()
            count += y.numel()
    return float(torch.exp(nats / count))


def number_of_parameters(model: nn.Module) -> int:
    """The number of trainable parameters, with each shared (tied) tensor counted once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def expected_parameters(vocab_size: int, hidden_size: int, n_nodes: int) -> int:
    """The number of parameters of a language model of one cell: V·H of the embedding, V of the decoder, 2H·2H of W0, N·H·2H of the nodes."""
    V, H = vocab_size, hidden_size
    return V * H + V + 4 * H * H + 2 * n_nodes * H * H


def choose_device(device: str | torch.device | None = "auto") -> torch.device:
    """The torch device of a name. "auto" or None: CUDA where torch finds it, else the CPU; "gpu" is "cuda". `ValueError` for an unknown name, and where a GPU
    is asked for but there is none."""
    there = torch.cuda.is_available()
    usual = {None: "cuda" if there else "cpu", "auto": "cuda" if there else "cpu", "gpu": "cuda"}
    try:
        chosen = torch.device(usual.get(device, device))
    except (RuntimeError, TypeError):
        raise ValueError(f"device: {device!r} is none of auto, cpu, gpu") from None
    if chosen.type == "cuda" and not there:
        raise ValueError(f"device: {device} was asked for, but torch finds no CUDA device; use auto or cpu")
    return chosen
