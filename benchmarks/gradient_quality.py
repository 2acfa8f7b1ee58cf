"""How near several estimators of the architecture gradient come to the exact gradient: the published code's, ours, two in between, and first order.

    python benchmarks/gradient_quality.py --corpus FOLDER      (ten minutes; writes gradient_quality.csv and .json under benchmarks/results)

The exact gradient is double backprop through the step that is taken, including the clip, with the dropout masks of that step. There is a row for each size,
moment of training, ξ and estimator. Its cosine to the exact gradient and the relative error of the whole gradient are medians over draws of batches and masks.
Its signal-to-noise ratio ‖mean‖ / √mean‖g − mean‖² is over redraws of the masks alone, on one pair of batches. All is float64, and α keeps its initial value.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from functools import partial

import torch
from epsilon import CLIP, WEIGHT_DECAY, Supernet, error, parse
from torch import Tensor

from nni_darts_rnn import fused
from nni_darts_rnn.bilevel import EPSILON, RandomState, architecture_gradient
from nni_darts_rnn.corpus import load_corpus
from nni_darts_rnn.files import write_csv
from nni_darts_rnn.published import original_gradient
from nni_darts_rnn.weight_step import norm


def original(loss, weights, alphas, train, valid, step, mode, same_masks=False, tied=(0,)):
    """quark0/darts: new masks in each pass, direction clipped, clip factor not capped at 1, r = 1e-2; in w′ the tied embedding (weight 0) stays at w."""
    start = RandomState(weights)

    def train_loss(at_weights, at_alphas, batch):
        if same_masks:
            start.restore()
        return loss(at_weights, at_alphas, batch)

    return original_gradient(train_loss, weights, alphas, train, valid, step.parts[0].rate, WEIGHT_DECAY, CLIP, valid_loss=loss, tied=tied)


ESTIMATORS = {
    "the original": ("finite_difference", original),
    "same masks, direction clipped, factor not capped": ("finite_difference", partial(original, same_masks=True, tied=())),
    "new masks, direction not clipped": ("finite_difference", partial(architecture_gradient, same_masks=False)),
    "ours (finite difference)": ("finite_difference", architecture_gradient),
    "first order": ("first_order", architecture_gradient),
    "exact": ("exact", architecture_gradient),
}


def flat(grads) -> Tensor:
    return torch.cat([g.double().flatten() for g in grads])


def signal_to_noise(vectors: list[Tensor]) -> float:
    mean = torch.stack(vectors).mean(0)
    noise = math.sqrt(statistics.fmean(float((v - mean).pow(2).sum()) for v in vectors))
    return float(mean.norm()) / noise if noise else math.inf


def measure(supernet: Supernet, xi: float, draws: int) -> list[dict]:
    exact = [supernet.gradient(draw, xi, "exact") for draw in range(draws)]
    share = statistics.median(float(norm(r.implicit) / norm(r.direct)) if r.implicit else 0.0 for r in exact)
    rows = []
    for name, (mode, estimator) in ESTIMATORS.items():
        if xi == 0 and name not in ("first order", "exact"):
            continue  # at ξ = 0 they all equal the first order
        own = [e.grads if name == "exact" else supernet.gradient(draw, xi, mode, estimator=estimator).grads for draw, e in enumerate(exact)]
        redrawn = [flat(supernet.gradient(0, xi, mode, estimator=estimator, masks=draw).grads) for draw in range(draws)]
        cosines = [float(torch.cosine_similarity(flat(a), flat(e.grads), 0)) for a, e in zip(own, exact)]
        errors = [error(a, e.grads) for a, e in zip(own, exact)]
        rows.append(dict(estimator=name, cosine=statistics.median(cosines), relative_error=statistics.median(errors),
                         signal_to_noise=signal_to_noise(redrawn), second_to_first_order=share,
                         train_grad_norm=statistics.median(r.grad_norm or math.nan for r in exact)))
    return rows


def main() -> None:
    args = parse(__doc__, sizes=[16, 32, 48], moments=[0, 300], draws=5)
    fused.enable()
    corpus, began, rows = load_corpus(args.corpus), time.perf_counter(), []
    for size in args.sizes:
        supernet = Supernet(corpus, size, args.batch_size, args.length)
        for moment in sorted(args.moments):
            supernet.train(moment - supernet.steps, args.lr)
            for xi in (0.0, args.lr / 100, args.lr / 10, args.lr):
                for row in measure(supernet, xi, args.draws):
                    short = {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in row.items()}
                    rows.append(dict(hidden_size=size, steps=moment, xi=xi) | short)
                    print(f"H {size}, {moment:4d} steps, ξ {xi:5.2f}: {row['estimator']:48s} cosine {row['cosine']:6.3f}  "
                          f"relative error {row['relative_error']:8.3g}  signal to noise {row['signal_to_noise']:7.3g}")
    write_csv(args.out / "gradient_quality.csv", rows)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "corpus")}
    # JSON has no NaN (the norm where there was no training pass) and no infinity
    clean = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]
    report = dict(settings=settings | dict(corpus=corpus.name, epsilon=EPSILON, torch=torch.__version__, seconds=round(time.perf_counter() - began)),
                  rows=clean)
    (args.out / "gradient_quality.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
