"""Do the shared weights of a search rank cells as training each from scratch does? On the example's text, or on the Penn Treebank with all words.

    python benchmarks/shared_weights.py --seeds 2 --save                                                     # every way of searching below
    python benchmarks/shared_weights.py --way "no α dropout, anneal 0.5" --seeds 8 --descend --save          # the recipe small
    python benchmarks/shared_weights.py --study all-words --corpus FOLDER --seeds 2 --save                   # with all words

A search through fastai runs to its end. Every cell that `search_quality.py` has retrained is then judged by its validation perplexity with the shared weights.
That is compared with its perplexity after a training of its own. With `--descend` the shared weights also choose a cell, starting from α's: node by node, each
function of each earlier state is tried and the best one kept, until nothing improves. (This is perturbation-based selection, Wang et al. 2021. The searches
draw cells, so their weights can judge a cell as it is.) Both the cell that this leads to and α's cell are then retrained.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from hardware import machine
from quality_table import by_genotype, by_retraining, depth, mean, sign_flip, spearman, stored

from nni_darts_rnn import fused, get_recipe, load_corpus, search_learner
from nni_darts_rnn.files import write_json
from nni_darts_rnn.genotype import PRIMITIVES, Genotype
from nni_darts_rnn.learner import language_dls, retrain
from nni_darts_rnn.model import LanguageModel, perplexity

RESULTS = Path(__file__).parent / "results"
OLD = {"search.clip": 0.25, "search.init_range": 0.04, "search.alpha_dropout": True, "search.anneal": 0}
EXAMPLE = {  # each changes one setting of the one before it
    "clip 0.25, ±0.04": OLD,
    "clip 0.1": OLD | {"search.clip": 0.1},
    "±0.12": OLD | {"search.clip": 0.1, "search.init_range": 0.12},
    "no α dropout": {"search.anneal": 0},
    "no α dropout, anneal 0.5": {},
}
ADAM = {"search.optimizer": "adam", "search.lr": 0.003, "search.clip": 0.25, "search.unrolled_lr": None,  # with as little dropout as the cells are trained with
        "search.dropout": 0.1, "search.dropout_x": 0.1, "search.dropout_h": 0.05, "search.dropout_i": 0.05}
ALL_WORDS = {"SGD, the recipe's": {}, "Adam, dropout 0.1": ADAM}


@dataclass(frozen=True)
class Study:
    """Which cells are judged, the recipe and the ways of the searches that judge them, the file of the figures, and the command that makes them."""

    cells: str  # the stem of a study of `search_quality.py`
    recipe: str
    ways: dict[str, dict]
    results: str
    command: str


STUDIES = {"example": Study("search_quality_example", "small", EXAMPLE, "shared_weights.json",
                            "python benchmarks/shared_weights.py --seeds 2 --save, then --way 'no α dropout, anneal 0.5' --seeds 8 --descend --save"),
           "all-words": Study("search_quality_all_words", "drawn", ALL_WORDS, "shared_weights_all_words.json",
                              "python benchmarks/shared_weights.py --study all-words --corpus FOLDER --seeds 2 --save")}


def neighbours(cell: Genotype, node: int) -> list[Genotype]:
    """The cells that differ from `cell` in nothing but `node` (1 to N), and `cell` itself."""
    return [Genotype((*cell.recurrent[:node - 1], (op, j), *cell.recurrent[node:]), cell.concat) for op in PRIMITIVES if op != "none" for j in range(node)]


def descend(cell: Genotype, judge) -> Genotype:
    """Go from `cell` to the best of its neighbours at one node, and on from there, until a round over all nodes finds no better one."""
    before = None
    while cell != before:
        before = cell
        for node in range(1, cell.n_nodes + 1):
            cell = min([cell, *neighbours(cell, node)], key=judge)  # the first among equal ones
    return cell


class Judge:
    """Gives the validation perplexity of a cell with a supernet's weights. Each cell is measured once."""

    def __init__(self, supernet: LanguageModel, corpus, recipe):
        self.weights, self.corpus, self.recipe, self.known = supernet.state_dict(), corpus, recipe, {}

    def __call__(self, cell: Genotype) -> float:
        if cell.recurrent not in self.known:
            model = LanguageModel.from_genotype(len(self.corpus.vocab), self.recipe.hidden_size, cell)
            model.load_state_dict({name: w for name, w in self.weights.items() if name != "rnn.alpha"})
            self.known[cell.recurrent] = perplexity(model, self.corpus.valid, self.recipe.eval_batch_size, self.recipe.bptt)
        return self.known[cell.recurrent]


def study_one(study: Study, way: str, seed: int, down: bool, corpus: str) -> dict:
    return one(way, seed, down, load_corpus(corpus), get_recipe(study.recipe, study.ways[way]), known_cells(study))


def one(way: str, seed: int, down: bool, corpus, recipe, cells: dict[str, float], retrainings: int = 2) -> dict:
    """Run one search, and judge `cells` (genotype -> perplexity after training) and the search's own cell with its weights; descend if `down`."""
    torch.set_num_threads(1)
    fused.prepare(float("inf"), torch.device("cpu"))
    search = search_learner(language_dls(corpus, recipe.search, seed), recipe, seed=seed, metrics_file=None)
    with search.no_bar(), search.no_logging():
        search.fit(recipe.search.epochs)
    cell, judge = search.model.genotype(), Judge(search.model.lm, corpus, recipe.search)
    shared, trained = np.array([judge(Genotype.from_json(there)) for there in cells]), np.array(list(cells.values()))
    row = {"way": way, "seed": seed, "cells": len(cells), "rank_correlation": spearman(shared, trained), "best": float(shared.min()), "median": float(np.median(shared)),
           "worst": float(shared.max()), "genotype": cell.to_json(), "depth": depth(cell.recurrent), "perplexity": judge(cell)}
    if down:
        lower = descend(cell, judge)
        row |= {"lower": {"genotype": lower.to_json(), "depth": depth(lower.recurrent), "perplexity": judge(lower)}, "judged": len(judge.known)}
        for found, there in ((cell, row), (lower, row["lower"])):
            with tempfile.TemporaryDirectory() as folder:
                done = [retrain(corpus, found, recipe.retrain, again, folder)["valid_perplexity"] for again in range(retrainings)]
            there["retrained"] = float(np.mean(done))
    return row


def known_cells(study: Study) -> dict[str, float]:
    """genotype -> mean validation perplexity, for every cell of the study, after the way of retraining that was stored last."""
    rows = stored(study.cells)
    way = next(iter(by_retraining(rows)))
    return {genotype: mean(there, "valid") for genotype, there in by_genotype(by_retraining(rows)[way]).items()}


def summary(rows: list[dict]) -> dict:
    """By way of searching: means over the seeds, and for the seeds that descended the paired test between the two retrained cells."""
    found = {}
    for way in dict.fromkeys(row["way"] for row in rows):
        there = [row for row in rows if row["way"] == way]
        found[way] = {"seeds": len(there), **{k: float(np.mean([row[k] for row in there])) for k in ("rank_correlation", "best", "median", "worst", "depth", "perplexity")},
                      "rank_correlation_sd": float(np.std([row["rank_correlation"] for row in there], ddof=1)) if len(there) > 1 else None}
        pairs = [(row["retrained"], row["lower"]["retrained"]) for row in there if "lower" in row]
        if pairs:
            down = [row["lower"] for row in there if "lower" in row]
            own, lower = np.array(pairs).T
            found[way]["lower"] = {"seeds": len(pairs), **{k: float(np.mean([row[k] for row in down])) for k in ("depth", "perplexity")},
                                   "retrained_alpha": own.mean(), "retrained": lower.mean()}
            if len(pairs) > 1:
                found[way]["lower"] |= {"retrained_alpha_sd": own.std(ddof=1), "retrained_sd": lower.std(ddof=1), "p": sign_flip(lower - own)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", choices=STUDIES, default="example")
    parser.add_argument("--corpus", default="pydoc", help="pydoc, or a folder with train.txt, valid.txt and test.txt")
    parser.add_argument("--way", nargs="+", help="ways of searching; default: every one of the study")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--descend", action="store_true")
    parser.add_argument("--workers", type=int, default=2, help="searches at a time, a thread each")
    parser.add_argument("--save", action="store_true", help="keep the figures in results/")
    options = parser.parse_args()
    study = STUDIES[options.study]
    place, ways = RESULTS / study.results, list(study.ways)
    if options.way and not set(options.way) <= set(ways):
        parser.error(f"--way: {', '.join(sorted(set(options.way) - set(ways)))} is none of {'; '.join(ways)}")
    rows = json.loads(place.read_text(encoding="utf-8"))["rows"] if place.exists() else []
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        runs = [pool.submit(study_one, study, way, seed, options.descend, options.corpus) for way in options.way or ways for seed in range(1, options.seeds + 1)]
        for run in runs:
            row = run.result()
            rows = sorted([r for r in rows if (r["way"], r["seed"]) != (row["way"], row["seed"])] + [row], key=lambda r: (ways.index(r["way"]), r["seed"]))
            print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            if options.save:
                write_json(place, {"ways": summary(rows), "rows": rows, "command": study.command, "date": date.today().isoformat(), "machine": machine()})
    print(json.dumps(summary(rows), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
