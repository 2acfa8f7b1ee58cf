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
    """What a language model answers: decoded (T, B, V) logits, raw (T, B, H) outputs, dropped (T, B, H) outputs after dropout, hidden (B, H)."""

    decoded: Tensor
    raw: Tensor
    dropped: Tensor
    hidden: Tensor


class LanguageModel(nn.Module):
    """Predicts the next word from tokens (T, B) and a hidden state (B, H).

    `rnn` is any module with `input_size == hidden_size`, `rnn(x (T, B, H), h0 (B, H)) -> outputs (T, B, H)`, whose last output is the next hidden state:
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
        """tokens (T, B) -> (T, B, H), with words dropped whole (Merity et al. 2017, section 4.3) and then variational dropout."""
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
        """Mean nats per predicted token, without keeping logits for the caller: (nll, raw, dropped, hidden)."""
        raw, dropped = self.encode(tokens, hidden)
        nll = linear_cross_entropy(dropped.flatten(0, 1), self.decoder.weight, self.decoder.bias, targets.flatten())  # (T·B, H), (T·B)
        return nll, raw, dropped, raw[-1]


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """The model in evaluation mode meanwhile; each of its modules is then in its own mode again."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def without_dropout(model: nn.Module):
    """No dropout in the model's passes meanwhile, and all else as it is: in training a supernet still draws its cell, where `eval()` would settle it.

    That of this package's modules, and of every module whose class is named …Dropout, as torch's and fastai's are.
    """
    dropping = [m for m in model.modules() if m.training and (
        isinstance(m, (LanguageModel, RecurrentWeights, DartsRNN)) or type(m).__name__.rstrip("123d").endswith("Dropout"))]
    for module in dropping:
        module.training = False  # its own alone; `eval()` would change its parts too
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
    """exp(nats per predicted token) of a text (n,) read in `batch_size` streams, the hidden state carried along; `model` in evaluation mode.

    `model` is a `LanguageModel` or anything with its `loss` and `init_hidden`. Sums are kept in float64. `ValueError` where the text is
    shorter than two tokens a stream.
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
    """Trainable numbers, each shared (tied) tensor once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def expected_parameters(vocab_size: int, hidden_size: int, n_nodes: int) -> int:
    """Those of a language model of one cell: V·H of the embedding, V of the decoder, 2H·2H of W0, N·H·2H of the nodes."""
    V, H = vocab_size, hidden_size
    return V * H + V + 4 * H * H + 2 * n_nodes * H * H


def choose_device(device: str | torch.device | None = "auto") -> torch.device:
    """"auto" or None: CUDA where torch finds it, else the CPU; "gpu" is "cuda". `ValueError` for a name that is none, and where a GPU is asked for and there is none."""
    there = torch.cuda.is_available()
    usual = {None: "cuda" if there else "cpu", "auto": "cuda" if there else "cpu", "gpu": "cuda"}
    try:
        chosen = torch.device(usual.get(device, device))
    except (RuntimeError, TypeError):
        raise ValueError(f"device: {device!r} is none of auto, cpu, gpu") from None
    if chosen.type == "cuda" and not there:
        raise ValueError(f"device: {device} was asked for, but torch finds no CUDA device; use auto or cpu")
    return chosen
