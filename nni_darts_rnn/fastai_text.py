"""A found cell as an architecture of fastai's text library: `language_model_learner(dls, AWD_DARTS, …)`, `text_classifier_learner(dls, AWD_DARTS, …)`.

Importing this module registers `AWD_DARTS` with fastai, beside fastai's own `AWD_LSTM`. For each kind of learner it registers a configuration, and a
function that splits the parameters into groups, for a learning rate each. Entries of a configuration that end in `_p` are dropout rates, which `drop_mult`
scales.
"""

from __future__ import annotations

from pathlib import Path

import torch
from fastai.learner import Learner
from fastai.text.models.awdlstm import EmbeddingDropout, RNNDropout
from fastai.text.models.core import _model_meta  # where fastai looks up an architecture; there is no public function to add one
from fastcore.foundation import L
from torch import Tensor, nn

from .cell import DiscreteRNN
from .checks import whole_number
from .corpus import EOS, UNK
from .genotype import DARTS_V2, Genotype, load_genotype
from .trained import load_trained

awd_darts_lm_config = dict(emb_sz=400, n_hid=400, n_layers=1, genotype=DARTS_V2, pad_token=1, output_p=0.75, hidden_p=0.25, input_p=0.2,
                           embed_p=0.1, cell_input_p=0.75, cell_hidden_p=0.25, tie_weights=True, out_bias=True)
"""Configuration of a language model, with the dropout rates of the `penn` recipe's retraining. A text of another size needs another `drop_mult`."""

awd_darts_clas_config = dict(emb_sz=400, n_hid=400, n_layers=1, genotype=DARTS_V2, pad_token=1, output_p=0.4, hidden_p=0.3, input_p=0.4,
                             embed_p=0.05, cell_input_p=0.4, cell_hidden_p=0.25)
"""Configuration of a text classifier. To load a language model's encoder, sizes and genotype must be the same as there."""

SPECIAL = {"xxunk": UNK, "xxbos": EOS, "xxeos": EOS}
"""fastai's special tokens, each with the token of `corpus` that is used in the same places."""


class AWD_DARTS(nn.Module):
    """fastai's `AWD_LSTM` with a genotype's cell in place of the LSTM: tokens (B, T) -> outputs (B, T, emb_sz).

    There are `n_layers` cells, of sizes emb_sz -> n_hid -> … -> emb_sz. Dropout rates: `embed_p` for whole words, `input_p` for embedded words, `hidden_p`
    between layers, `cell_input_p` and `cell_hidden_p` within each cell (one mask for a batch). The hidden state of each layer is carried from batch to batch
    without its graph; `reset()` sets it to zero. A batch of fewer sequences continues the first ones, as fastai's sentence encoder expects. In a batch of
    more sequences, the additional ones start from zeros.
    """

    def __init__(self, vocab_sz: int, emb_sz: int, n_hid: int, n_layers: int, genotype: Genotype | str = DARTS_V2, pad_token: int = 1,
                 hidden_p: float = 0.2, input_p: float = 0.6, embed_p: float = 0.1, cell_input_p: float = 0.0, cell_hidden_p: float = 0.0):
        super().__init__()
        whole_number("n_layers", n_layers)
        for name, value in (("hidden_p", hidden_p), ("input_p", input_p), ("embed_p", embed_p)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}: {value!r} must be at least 0 and below 1; drop_mult scales it")
        self.emb_sz, self.n_hid, self.n_layers, self.pad_token, self.genotype = emb_sz, n_hid, n_layers, pad_token, load_genotype(genotype)
        sizes = [emb_sz, *[n_hid] * (n_layers - 1), emb_sz]
        self.encoder = nn.Embedding(vocab_sz, emb_sz, padding_idx=pad_token)
        self.encoder_dp = EmbeddingDropout(self.encoder, embed_p)
        self.input_dp = RNNDropout(input_p)
        self.rnns = nn.ModuleList(DiscreteRNN(i, o, self.genotype, cell_input_p, cell_hidden_p) for i, o in zip(sizes, sizes[1:]))
        self.hidden_dps = nn.ModuleList(RNNDropout(hidden_p) for _ in self.rnns)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)  # as in fastai's
        self.reset()

    def reset(self) -> None:
        self.hidden = [self.encoder.weight.new_zeros(1, rnn.hidden_size) for rnn in self.rnns]

    def forward(self, tokens: Tensor, from_embeds: bool = False) -> Tensor:
        x = self.input_dp(tokens if from_embeds else self.encoder_dp(tokens)).transpose(0, 1)  # (B, T, emb_sz) -> (T, B, emb_sz)
        hidden = []
        for layer, (rnn, dropout, h) in enumerate(zip(self.rnns, self.hidden_dps, self.hidden)):
            x = rnn(x, _of_size(h.to(x), x.shape[1]))  # (T, B, H)
            hidden.append(x[-1].detach().clone())
            if layer + 1 < self.n_layers:
                x = dropout(x.transpose(0, 1)).transpose(0, 1)  # `RNNDropout` makes its mask for (B, T, H)
        self.hidden = hidden
        return x.transpose(0, 1)


def _of_size(hidden: Tensor, B: int) -> Tensor:
    """The hidden state (b, H) for B sequences, (B, H): its first B rows, or all of them and then zeros."""
    b = len(hidden)
    return hidden[:B] if b >= B else torch.cat([hidden, hidden.new_zeros(B - b, hidden.shape[1])])


def _groups(*modules: nn.Module) -> L:
    """The parameters of each module, in order, frozen ones too. A tied parameter is in the first group that has it, and in no other."""
    seen: dict[int, nn.Parameter] = {}
    groups = []
    for module in modules:
        groups.append([p for p in module.parameters() if id(p) not in seen])
        seen |= {id(p): p for p in groups[-1]}
    return L(groups)


def awd_darts_lm_split(model: nn.Module) -> L:
    """Parameter groups of a language model, for discriminative learning rates: each cell, then embedding and decoder together."""
    return _groups(*model[0].rnns, nn.ModuleList([model[0].encoder, model[1]]))


def awd_darts_clas_split(model: nn.Module) -> L:
    """Parameter groups of a classifier, for discriminative learning rates and gradual unfreezing: embedding, each cell, head."""
    return _groups(model[0].module.encoder, *model[0].module.rnns, model[1])


_model_meta[AWD_DARTS] = {"hid_name": "emb_sz", "config_lm": awd_darts_lm_config, "split_lm": awd_darts_lm_split,
                          "config_clas": awd_darts_clas_config, "split_clas": awd_darts_clas_split}


def config_of(folder: str | Path, config: dict = awd_darts_lm_config) -> dict:
    """`config` with the sizes and the genotype of the trained language model in `folder`, so that `load_trained_encoder` works."""
    model, _ = load_trained(folder)
    return config | dict(emb_sz=model.hidden_size, n_hid=model.hidden_size, n_layers=1, genotype=model.rnn.genotype)


@torch.no_grad()
def load_trained_encoder(learn: Learner, folder: str | Path) -> Learner:
    """Load the embedding and the cell of the language model that `nni-darts-rnn retrain` left in `folder` into a learner of `AWD_DARTS` (see `config_of`).

    Each of the learner's words gets the vector of the same word there. fastai's `xxunk`, `xxbos` and `xxeos` get those of `<unk>` and `<eos>` (`SPECIAL`).
    Any other word gets the mean of all vectors, as in fastai's `match_embeds`. A tied decoder changes with the embedding, and its bias likewise.
    All groups but the last are frozen. Returns the learner. `ValueError` with one line where the encoder is no `AWD_DARTS`, or sizes or cells differ.
    """
    model, words = load_trained(folder)
    encoder = getattr(learn.model[0], "module", learn.model[0])
    if not isinstance(encoder, AWD_DARTS):
        raise ValueError(f"load_trained_encoder: the learner's encoder is a {type(encoder).__name__}; expected AWD_DARTS")
    there, here = ([m.hidden_size, m.hidden_size, 1, m.rnn.genotype] if m is model else [m.emb_sz, m.rnns[-1].hidden_size, m.n_layers, m.genotype]
                   for m in (model, encoder))
    if there != here:
        raise ValueError(f"load_trained_encoder: {folder} has {there[0]} units in {there[2]} layer of {there[3]}, the learner {here[0]} units in "
                         f"{here[2]} of {here[3]}; make it with config=config_of(folder)")
    vectors, index = model.encoder.weight, {word: i for i, word in enumerate(words)}
    index |= {theirs: index[ours] for theirs, ours in SPECIAL.items() if ours in index}
    vocab = learn.dls.vocab[0] if isinstance(learn.dls.vocab, L) else learn.dls.vocab  # a classifier's vocab is (words, classes)

    def of_the_words(rows: Tensor) -> Tensor:
        return torch.stack([rows[index[word]] if word in index else rows.mean(0) for word in vocab])  # (V, …) -> (V here, …)

    encoder.encoder.weight.copy_(of_the_words(vectors))
    encoder.rnns[0].load_state_dict(model.rnn.state_dict())
    decoder = getattr(learn.model[1], "decoder", None)  # of a language model
    if decoder is not None and decoder.weight is encoder.encoder.weight and decoder.bias is not None:
        decoder.bias.copy_(of_the_words(model.decoder.bias))
    learn.freeze()
    return learn
