"""The error of the finite difference as a function of r, in float32 and in float64: the default r comes from here.

    python benchmarks/epsilon.py --corpus FOLDER        (eight minutes; writes benchmarks/results/epsilon.csv and epsilon.svg)

The error is the relative error of α's whole gradient against double backprop in float64 with the same dropout masks, for supernets of several sizes at
several moments of a search. The weights move by r in all (DARTS, eq. 8, along the direction that the derivatives of the clip and of the step give).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from nni_darts_rnn import fused
from nni_darts_rnn.bilevel import architecture_gradient
from nni_darts_rnn.corpus import load_corpus, streams
from nni_darts_rnn.files import write_csv
from nni_darts_rnn.model import LanguageModel
from nni_darts_rnn.supernet import MixedRNN
from nni_darts_rnn.weight_step import WeightStep, norm

RESULTS = Path(__file__).parent / "results"
DROPOUT = dict(dropout=0.75, dropout_i=0.2)  # of the paper's search, as below
CELL_DROPOUT = dict(dropout_x=0.75, dropout_h=0.25)
WEIGHT_DECAY, CLIP = 5e-7, 0.25


class LossOf(nn.Module):
    """The language model's loss (nll) as `forward(tokens, targets, hidden)`, for `functional_call`."""

    def __init__(self, lm: LanguageModel):
        super().__init__()
        self.lm = lm

    def forward(self, tokens, targets, hidden):
        return self.lm.loss(tokens, targets, hidden)[0]


class Supernet:
    """A supernet with H units on a corpus, at some moment of its training. It provides the arguments of `bilevel.architecture_gradient`."""

    def __init__(self, corpus, hidden_size: int, batch_size: int, length: int, n_nodes: int = 8, seed: int = 0, relaxation: str = "edge"):
        torch.manual_seed(seed)
        self.length, self.batch_size = length, batch_size
        self.texts = {"train": streams(corpus.train, batch_size), "valid": streams(corpus.valid, batch_size)}  # (n, B) each
        self.module = LossOf(LanguageModel(len(corpus.vocab), MixedRNN(hidden_size, hidden_size, n_nodes, relaxation=relaxation, **CELL_DROPOUT), **DROPOUT))
        self.names = [name for name, _ in self.module.named_parameters() if name != "lm.rnn.alpha"]
        self.steps = 0

    @property
    def weights(self):
        return [self.module.get_parameter(name) for name in self.names]

    @property
    def alphas(self):
        return [self.module.lm.rnn.alpha]

    def batch(self, part: str, index: int):
        """Batch number `index` of `part`, "train" or "valid": tokens (T, B), targets (T, B) and a hidden state of zeros (B, H)."""
        text = self.texts[part]
        start = index * self.length % (len(text) - self.length - 1)
        return text[start:start + self.length], text[start + 1:start + 1 + self.length], self.module.lm.init_hidden(self.batch_size)

    def loss(self, weights, alphas, batch):
        state = dict(zip(self.names, weights)) | {"lm.rnn.alpha": alphas[0]}
        tokens, targets, hidden = batch
        return torch.func.functional_call(self.module, state, (tokens, targets, hidden.to(weights[0].dtype)))

    def train(self, steps: int, lr: float) -> None:
        """Train the weights by clipped SGD. α stays as it is, and every batch starts from a hidden state of zeros."""
        optimizer = torch.optim.SGD(self.weights, lr, weight_decay=WEIGHT_DECAY)
        for _ in range(steps):
            optimizer.zero_grad()
            self.module(*self.batch("train", self.steps)).backward()
            nn.utils.clip_grad_norm_(self.weights, CLIP)
            optimizer.step()
            self.steps += 1

    def gradient(self, draw: int, lr: float, mode: str, dtype=torch.float64, estimator=architecture_gradient, masks: int | None = None, **kwargs):
        """α's gradient on the batches of draw number `draw`, with masks number `masks` (default: `draw`). Every estimator and dtype gets the same draws."""
        train, valid = self.batch("train", self.steps + draw), self.batch("valid", draw)
        torch.manual_seed(1000 + (draw if masks is None else masks))
        weights, alphas = [w.detach().to(dtype) for w in self.weights], [a.detach().to(dtype) for a in self.alphas]
        step = WeightStep.sgd(len(weights), lr, WEIGHT_DECAY, CLIP)
        return estimator(self.loss, weights, alphas, train, valid, step, mode, **kwargs)


def error(estimate, exact) -> float:
    return float(norm([a.double() - b for a, b in zip(estimate, exact)]) / norm(exact))


def masks_agree() -> bool:
    """Whether float32 and float64 draw the same masks on this machine. If they do not, their gradients cannot be compared."""
    drawn = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        drawn.append(torch.empty(1000, dtype=dtype).bernoulli_(0.3).double())
    return torch.equal(*drawn)


def parse(description: str, **defaults):
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--corpus", default="pydoc", help="pydoc, or a folder with train.txt, valid.txt and test.txt")
    parser.add_argument("--sizes", type=int, nargs="+", default=defaults["sizes"], help="hidden sizes H")
    parser.add_argument("--moments", type=int, nargs="+", default=defaults["moments"], help="training steps before the measurement")
    parser.add_argument("--draws", type=int, default=defaults["draws"], help="draws of batches and masks")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=16, help="time steps of a batch")
    parser.add_argument("--lr", type=float, default=20.0, help="learning rate of the weights, and ξ")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    return parser.parse_args()


def plot(rows: list[dict], path: Path) -> None:
    """Draw the median error against r: one panel for each dtype, one line for each size and moment."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "epsilon", "svg.fonttype": "none"}
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, dtype in zip(axes, ("float32", "float64")):
        for size, moment in dict.fromkeys((r["hidden_size"], r["steps"]) for r in rows):
            mine = [r for r in rows if (r["hidden_size"], r["steps"], r["dtype"]) == (size, moment, dtype)]
            axis.loglog([r["r"] for r in mine], [r["median_error"] for r in mine], marker=".", label=f"H {size}, {moment} steps")
        axis.set(title=dtype, xlabel="r, by which the weights move in all")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative error of α's gradient")
    axes[1].legend(fontsize=7)
    fig.savefig(path, metadata={"Date": None})


def main() -> None:
    args = parse(__doc__, sizes=[16, 48, 96], moments=[0, 100, 300], draws=4)
    if not masks_agree():
        raise SystemExit("on this machine float32 and float64 draw different masks, so their gradients cannot be compared")
    fused.enable()  # faster than the readable cell, and equal to it up to rounding; double backprop still uses the readable cell
    corpus, began, rows = load_corpus(args.corpus), time.perf_counter(), []
    grid = [round(m * 10.0 ** e, 12) for e in range(-5, 0) for m in (1, 3)] + [1.0]
    for size in args.sizes:
        supernet = Supernet(corpus, size, args.batch_size, args.length)
        for moment in sorted(args.moments):
            supernet.train(moment - supernet.steps, args.lr)
            exact = [supernet.gradient(draw, args.lr, "exact").grads for draw in range(args.draws)]
            for dtype in (torch.float32, torch.float64):
                for r in grid:
                    errors = [error(supernet.gradient(draw, args.lr, "finite_difference", dtype, epsilon=r).grads, exact[draw])
                              for draw in range(args.draws)]
                    rows.append(dict(hidden_size=size, steps=moment, dtype=str(dtype).removeprefix("torch."), r=r,
                                     median_error=float(f"{statistics.median(errors):.3g}"), largest_error=float(f"{max(errors):.3g}"),
                                     draws=args.draws, batch_size=args.batch_size, length=args.length, lr=args.lr, corpus=corpus.name))
            best = min((r for r in rows if (r["hidden_size"], r["steps"], r["dtype"]) == (size, moment, "float32")), key=lambda r: r["median_error"])
            print(f"H {size}, {moment} steps: least float32 error {best['median_error']:.2g} at r = {best['r']:g} "
                  f"({time.perf_counter() - began:.0f} s)")
    write_csv(args.out / "epsilon.csv", rows)
    plot(rows, args.out / "epsilon.svg")
    logs = {r: statistics.fmean(torch.tensor([row["median_error"] for row in rows if row["dtype"] == "float32" and row["r"] == r]).log().tolist())
            for r in grid}
    print(f"least geometric mean over all: r = {min(logs, key=logs.get):g}")


if __name__ == "__main__":
    main()
