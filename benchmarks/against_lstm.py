"""A genotype's cell beside `nn.LSTM` and `nn.GRU` of as many parameters: the same text, tokens, optimizer, dropout and schedule, from several seeds.

    python benchmarks/against_lstm.py --corpus FOLDER --recipe drawn --genotype DRAWN_V1 --rates 0.003 0.006 0.012 --threads 1 --work DIR --save

A recipe's learning rate was chosen for cells. torch's layers may be given several: all for the first seed, and for the others the one that was best on
validation. Each training's figures are kept in DIR, and one that is there is not made again. With `--models` several processes can share the work.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from hardware import keep, made
from torch import Tensor, nn

from nni_darts_rnn import learner
from nni_darts_rnn.cell import variational_mask
from nni_darts_rnn.files import write_text
from nni_darts_rnn.genotype import load_genotype
from nni_darts_rnn.model import LanguageModel, expected_parameters
from nni_darts_rnn.options import add_run_options, checked_recipe, open_corpus, prepare_torch
from nni_darts_rnn.outputs.versions import package_versions
from nni_darts_rnn.pipeline import take_fast_path
from nni_darts_rnn.recipes import RetrainRecipe
from nni_darts_rnn.text.baselines import counted

RESULTS = Path(__file__).parent / "results" / "against_lstm.json"
LIBRARY = {"lstm": nn.LSTM, "gru": nn.GRU}
GATES = {"lstm": 4, "gru": 3}
KEPT = ("valid_perplexity", "test_perplexity", "parameters", "seconds", "epochs")


class LibraryLayer(nn.Module):
    """`nn.LSTM` or `nn.GRU` in the recurrent place: x (T, B, H), h0 (B, H) -> outputs (T, B, H), with variational dropout of its input.

    They have no place for the dropout of states between time steps; the recipe's `dropout_h` acts on the recurrent matrix instead, as in
    AWD-LSTM (weight drop, Merity et al. 2017, section 2).

    An LSTM's memory c, which the language model does not carry, is kept here and begins anew with a hidden state of zeros.
    """

    def __init__(self, kind: str, hidden_size: int, dropout_x: float, dropout_h: float):
        super().__init__()
        self.input_size = self.hidden_size = hidden_size
        self.kind, self.dropout_x, self.dropout_h = kind, dropout_x, dropout_h
        self.layer = LIBRARY[kind](hidden_size, hidden_size)
        self.register_buffer("memory", torch.zeros(1, 1, hidden_size), persistent=False)

    def forward(self, x: Tensor, h0: Tensor) -> Tensor:
        if len(h0) != self.memory.shape[1] or not h0.any():
            self.memory = torch.zeros_like(h0).unsqueeze(0)  # (1, B, H)
        mask = variational_mask(x[0], self.dropout_x, self.training)
        weights = dict(self.layer.named_parameters())
        weights["weight_hh_l0"] = F.dropout(weights["weight_hh_l0"], self.dropout_h, self.training)
        state = h0.unsqueeze(0)  # (B, H) -> (1, B, H)
        output, last = torch.func.functional_call(self.layer, weights, (x if mask is None else x * mask, (state, self.memory) if self.kind == "lstm" else state))
        if self.kind == "lstm":
            self.memory = last[1].detach()
        return output


def library_size(kind: str, parameters: int, vocab_size: int) -> int:
    """The H whose language model (tied embedding V·H + V; two matrices H² and two biases H a gate) comes nearest to a number of parameters."""
    return min(range(8, 4000), key=lambda H: abs(vocab_size * H + vocab_size + 2 * GATES[kind] * (H * H + H) - parameters))


def library_model(kind: str, vocab_size: int, hidden_size: int, recipe: RetrainRecipe, seed: int) -> LanguageModel:
    """The cell's language model with an LSTM or a GRU in the cell's place. Weights begin as torch's layers do, the embedding as the recipe's."""
    torch.manual_seed(seed)
    layer = LibraryLayer(kind, hidden_size, recipe.dropout_x, recipe.dropout_h)
    return LanguageModel(vocab_size, layer, recipe.dropout, recipe.dropout_i, recipe.dropout_e, recipe.init_range)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_run_options(parser)
    parser.add_argument("--genotype", default="DRAWN_V1")
    parser.add_argument("--rates", nargs="+", type=float, help="learning rates for torch's layers; default: the recipe's")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each model; default %(default)s")
    parser.add_argument("--models", nargs="+", choices=("cell", *LIBRARY), default=["cell", *LIBRARY], help="train these; default all")
    parser.add_argument("--work", type=Path, required=True, help="folder for the figures of each training")
    parser.add_argument("--save", nargs="?", type=Path, const=RESULTS, help=f"write the figures of all to this file; default {RESULTS.name}")
    parser.add_argument("--note", help="a sentence on how it ran, for the results page")
    arguments = parser.parse_args(argv)
    prepare_torch(arguments)
    recipe, corpus = checked_recipe(arguments, {}).retrain, open_corpus(arguments)
    genotype = load_genotype(arguments.genotype)
    print(corpus.describe(), flush=True)
    N, V = genotype.n_nodes, len(corpus.vocab)
    aim = expected_parameters(V, recipe.hidden_size, N)
    take_fast_path(corpus, recipe, arguments.device, N)

    def trained(name: str, seed: int, lr: float) -> dict:
        answer = arguments.work / f"{name}-{seed}-{lr:g}.json"
        if answer.exists():
            return json.loads(answer.read_text(encoding="utf-8"))
        H = recipe.hidden_size if name == "cell" else library_size(name, aim, V)
        print(f"{arguments.genotype if name == 'cell' else name} with {H} units, seed {seed}, learning rate {lr:g}", flush=True)

        def report(row):
            print(f"  epoch {row['epoch']}: validation perplexity {row['default']:.2f}, {row['tokens_per_second']:,.0f} tokens/s", flush=True)

        with tempfile.TemporaryDirectory() as folder:
            done = learner.retrain(corpus, genotype if name == "cell" else library_model(name, V, H, recipe, seed), replace(recipe, lr=lr), seed, folder, report,
                                   device=arguments.device)
        arguments.work.mkdir(parents=True, exist_ok=True)
        row = {"model": name, "seed": seed, "lr": lr, "hidden_size": H} | {key: done[key] for key in KEPT}
        write_text(answer, json.dumps(row))
        return row

    rows = []
    for name in arguments.models:
        first = [trained(name, 1, lr) for lr in ([recipe.lr] if name == "cell" or not arguments.rates else arguments.rates)]
        best = min(first, key=lambda row: row["valid_perplexity"])["lr"]
        rows += first + [trained(name, seed, best) for seed in range(2, arguments.seeds + 1)]
    for row in rows:
        print(f"{row['model']:8} {row['seed']} {row['lr']:g} test perplexity {row['test_perplexity']:8.2f}  {row['parameters']:,} parameters")
    words = ["--corpus", corpus.name, "--recipe", arguments.recipe, "--genotype", arguments.genotype, *(f"--set {setting}" for setting in arguments.set),
             *(["--rates", *(f"{lr:g}" for lr in arguments.rates)] if arguments.rates else []), "--threads", str(torch.get_num_threads()), "--seeds", str(arguments.seeds), "--work", "DIR"]
    counts = counted(corpus)
    keep(arguments.save, {"genotype": arguments.genotype, "recipe": asdict(recipe), "versions": package_versions(), **counts, "trained": rows}
         | ({"note": arguments.note} if arguments.note else {}) | made(__file__, words, threads=torch.get_num_threads()))


if __name__ == "__main__":
    main()
