"""How much the weights' gradient differs between α before and after its step, compared with the difference between two draws of dropout masks.

    python benchmarks/shared_step.py --corpus FOLDER        (a minute; writes benchmarks/results/shared_step.json)

With a shared step, the weights use a gradient from before α's step. Here α takes a step like Adam's first: each of its numbers moves up or down at random, by
3e-3. Differences are relative to the norm of the gradient, and medians over draws of batches, masks and moves.
"""

from __future__ import annotations

import statistics
import sys

import torch
from epsilon import Supernet, error, parse
from hardware import keep, made

from nni_darts_rnn import fused
from nni_darts_rnn.corpus import load_corpus

MOVE = 3e-3


def gradient(supernet: Supernet, alphas, draw: int, masks: int):
    """The weights' gradient on training batch number `draw`. `masks` seeds the dropout masks, and the draw of the cell where one is drawn."""
    weights = [w.detach().requires_grad_() for w in supernet.weights]
    torch.manual_seed(masks)
    return torch.autograd.grad(supernet.loss(weights, alphas, supernet.batch("train", supernet.steps + draw)), weights)


def main() -> None:
    args = parse(__doc__, sizes=[48], moments=[0, 100, 300], draws=12)
    fused.enable()
    corpus, rows = load_corpus(args.corpus), []
    for relaxation in ("edge", "gumbel"):
        for size in args.sizes:
            supernet = Supernet(corpus, size, args.batch_size, args.length, relaxation=relaxation)
            for moment in sorted(args.moments):
                supernet.train(moment - supernet.steps, args.lr)
                moved, masks = [], []
                for draw in range(args.draws):
                    alphas = [a.detach() for a in supernet.alphas]
                    first = [g.double() for g in gradient(supernet, alphas, draw, draw)]
                    torch.manual_seed(2000 + draw)
                    after = [a + MOVE * torch.randn_like(a).sign() for a in alphas]
                    moved.append(error(gradient(supernet, after, draw, draw), first))
                    masks.append(error(gradient(supernet, alphas, draw, 1000 + draw), first))
                row = {"relaxation": relaxation, "hidden_size": size, "steps": moment, "alpha_moved": statistics.median(moved), "alpha_moved_most": max(moved),
                       "other_masks": statistics.median(masks)}
                rows.append({name: float(f"{value:.3g}") if isinstance(value, float) else value for name, value in row.items()})
                print(rows[-1], flush=True)
    keep(args.out / "shared_step.json", made(__file__, ["--corpus", "FOLDER"] * ("--corpus" in sys.argv), corpus=corpus.name, draws=args.draws,
                                             batch_size=args.batch_size, length=args.length, move=MOVE, rows=rows))


if __name__ == "__main__":
    main()
