"""A genotype's cell beside `nn.LSTM` of the same number of parameters: same text, tokens, optimiser, dropout and schedule.

    python benchmarks/against_lstm.py --corpus FOLDER --genotype DARTS_V2 --set retrain.epochs=6 --save benchmarks/results/against_lstm.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from hardware import keep, made
from torch import Tensor, nn

from nni_darts_rnn import learner
from nni_darts_rnn.cell import variational_mask
from nni_darts_rnn.genotype import load_genotype
from nni_darts_rnn.model import LanguageModel, expected_parameters, number_of_parameters
from nni_darts_rnn.options import add_run_options, checked_recipe, open_corpus, prepare_torch
from nni_darts_rnn.outputs.versions import package_versions
from nni_darts_rnn.pipeline import take_fast_path
from nni_darts_rnn.recipes import RetrainRecipe
from nni_darts_rnn.text.baselines import bigram_perplexity, unigram_perplexity


class LSTMLayer(nn.Module):
    """`nn.LSTM` in the recurrent place: x (T, B, H), h0 (B, H) -> outputs (T, B, H), with variational dropout of its input.

    `nn.LSTM` has no place for the dropout of states between time steps; the recipe's `dropout_h` acts on its recurrent matrix instead, as in
    AWD-LSTM (weight drop, Merity et al. 2017, section 2).

    The memory c, which the language model does not carry, is kept here and begins anew with a hidden state of zeros.
    """

    def __init__(self, hidden_size: int, dropout_x: float, dropout_h: float):
        super().__init__()
        self.input_size = self.hidden_size = hidden_size
        self.dropout_x, self.dropout_h = dropout_x, dropout_h
        self.lstm = nn.LSTM(hidden_size, hidden_size)
        self.register_buffer("memory", torch.zeros(1, 1, hidden_size), persistent=False)

    def forward(self, x: Tensor, h0: Tensor) -> Tensor:
        if len(h0) != self.memory.shape[1] or not h0.any():
            self.memory = torch.zeros_like(h0).unsqueeze(0)  # (1, B, H)
        mask = variational_mask(x[0], self.dropout_x, self.training)
        weights = dict(self.lstm.named_parameters())
        weights["weight_hh_l0"] = F.dropout(weights["weight_hh_l0"], self.dropout_h, self.training)
        inputs = (x if mask is None else x * mask, (h0.unsqueeze(0), self.memory))
        output, (_, memory) = torch.func.functional_call(self.lstm, weights, inputs)
        self.memory = memory.detach()
        return output


def lstm_size(parameters: int, vocab_size: int) -> int:
    """The H whose language model (tied embedding V·H + V, LSTM 8H² + 8H) comes nearest to a number of parameters."""
    return min(range(8, 4000), key=lambda H: abs(vocab_size * H + vocab_size + 8 * H * H + 8 * H - parameters))


def lstm_model(vocab_size: int, hidden_size: int, recipe: RetrainRecipe, seed: int) -> LanguageModel:
    """The cell's language model with an LSTM in the cell's place."""
    torch.manual_seed(seed)
    layer = LSTMLayer(hidden_size, recipe.dropout_x, recipe.dropout_h)
    return LanguageModel(vocab_size, layer, recipe.dropout, recipe.dropout_i, recipe.dropout_e, recipe.init_range)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_run_options(parser)
    parser.add_argument("--genotype", default="DARTS_V2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("cell", "lstm"), help="train one of the two; the other may run beside it")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args(argv)
    prepare_torch(arguments)
    recipe, corpus = checked_recipe(arguments, {}).retrain, open_corpus(arguments)
    genotype = load_genotype(arguments.genotype)
    print(corpus.describe(), flush=True)

    def report(row):
        print(f"  epoch {row['epoch']}: validation perplexity {row['default']:.2f}, {row['tokens_per_second']:,.0f} tokens/s", flush=True)

    rows = {}
    H_cell, N, V = recipe.hidden_size, genotype.n_nodes, len(corpus.vocab)
    H_lstm = lstm_size(expected_parameters(V, H_cell, N), V)
    layers = {"cell": (f"{genotype}", H_cell), "lstm": ("nn.LSTM", H_lstm)}

    take_fast_path(corpus, recipe, arguments.device, N)
    for name, (what, H) in layers.items():
        if arguments.only not in (None, name):
            continue
        print(f"{what} with {H} units", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            done = learner.retrain(corpus, genotype if name == "cell" else lstm_model(V, H, recipe, arguments.seed), recipe, arguments.seed, folder, report,
                                   device=arguments.device)
        rows[name] = {k: done[k] for k in ("valid_perplexity", "test_perplexity", "parameters", "seconds")} | {"hidden_size": H}
        assert number_of_parameters(done["model"]) == done["parameters"]
    rows["unigram"] = {"test_perplexity": unigram_perplexity(corpus)}
    rows["bigram"] = {"test_perplexity": bigram_perplexity(corpus)}
    for name, row in rows.items():
        print(f"{name:8} test perplexity {row['test_perplexity']:8.2f}" + (f"  {row['parameters']:,} parameters" if "parameters" in row else ""))
    words = ["--corpus", corpus.name, "--genotype", arguments.genotype, "--recipe", arguments.recipe, *(f"--set {setting}" for setting in arguments.set)]
    keep(arguments.save, made(__file__, words, threads=torch.get_num_threads(), genotype=genotype.to_json(), recipe=asdict(recipe), versions=package_versions(),
                              results=rows))


if __name__ == "__main__":
    began = time.perf_counter()
    main()
    print(f"{time.perf_counter() - began:.0f} s")
