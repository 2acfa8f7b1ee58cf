"""How much of α's gradient is signal when cells are drawn, and how far α moves, by the number of cells drawn for a batch and by α's weight decay.

    python benchmarks/draws.py --corpus FOLDER --save

The searches have the size of the study `penn` in `search_quality.py`. Measuring starts after two epochs in which α waits, and lasts `STEPS` steps. *Signal*:
each step's gradient is scaled to length 1; this is the cosine between the mean over the even steps and the mean over the odd steps. It is 1 if every step has
the same gradient. *Spread*: the standard deviation of α after these steps. The logits from which cells are drawn differ by about as much.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback, CancelFitException
from hardware import keep, made
from search_arms import beginning
from search_quality import STUDIES, frequent

from nni_darts_rnn import fused, get_recipe, load_corpus, search_learner
from nni_darts_rnn.callbacks import ArchParamUpdate
from nni_darts_rnn.learner import language_dls

RESULTS = Path(__file__).parent / "results" / "draws.json"
WAYS = tuple({"search.draws": draws, "search.arch_weight_decay": decay} for draws, decay in product((1, 8), (1e-3, 0.0)))
COMMON = {"search.relaxation": "gumbel", "search.unrolled_lr": 2, "search.epochs": 3, "search.warmup_epochs": 2, "search.arch_lr": 0.03}
STEPS = 190  # an even number; an epoch at this size has about 205 steps


class Gradients(Callback):
    """Keeps α's gradient of each step, and ends the fit after `STEPS` of them."""

    order = ArchParamUpdate.order + 10

    def before_fit(self):
        self.seen = []

    def after_step(self):
        if self.epoch >= COMMON["search.warmup_epochs"]:
            self.seen.append(self.arch_param_update.last.grads[0].detach().clone())  # (E, K)
            if len(self.seen) == STEPS:
                raise CancelFitException


def one(way: dict, seed: int, corpus: str) -> dict:
    torch.set_num_threads(1)
    fused.prepare(float("inf"), torch.device("cpu"))
    study = STUDIES["penn"]
    text, recipe = beginning(frequent(load_corpus(corpus), study.words), study.share), get_recipe(study.recipe, study.settings | COMMON | way)
    search = search_learner(language_dls(text, recipe.search, seed), recipe, seed=seed, metrics_file=None, cbs=[Gradients()])
    with search.no_bar(), search.no_logging():
        search.fit(recipe.search.epochs)
    units = torch.stack([g / g.norm() for g in search.gradients.seen])  # (STEPS, E, K)
    even, odd = units[::2].mean(0).flatten(), units[1::2].mean(0).flatten()
    cell = search.model.genotype()
    return way | {"seed": seed, "steps": len(units), "signal": float(torch.nn.functional.cosine_similarity(even, odd, 0)),
                  "spread": float(search.model.lm.rnn.alpha.detach().std()), "genotype": cell.to_json()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True, help="folder of the Penn Treebank")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="searches at a time, a thread each")
    parser.add_argument("--save", nargs="?", type=Path, const=RESULTS, help=f"write the figures to this file; default {RESULTS.name}")
    parser.set_defaults(threads=1)
    options = parser.parse_args()
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        runs = [pool.submit(one, way, seed, options.corpus) for way in WAYS for seed in range(1, options.seeds + 1)]
        rows = []
        for run in runs:
            rows.append(run.result())
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    ways = [way | {"seeds": len(there), **{key: float(np.mean([row[key] for row in there])) for key in ("signal", "spread")}}
            for way in WAYS if (there := [row for row in rows if way.items() <= row.items()])]
    keep(options.save, {"settings": COMMON, "steps": STEPS, "ways": ways, "rows": rows} | made(__file__, ["--corpus", "FOLDER", "--seeds", str(options.seeds)], threads=options.threads))


if __name__ == "__main__":
    main()
