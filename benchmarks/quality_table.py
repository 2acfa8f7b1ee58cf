"""The figures of `search_quality.py`: storing its rows, summing them up by arm, and drawing them.

A row is one retraining of the cell that one search found. An arm is known by the name of its rows.
"""

from __future__ import annotations

import csv
import json
import textwrap
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy.stats import permutation_test, spearmanr

from nni_darts_rnn.files import write_csv
from nni_darts_rnn.genotype import PRIMITIVES

RESULTS = Path(__file__).parent / "results"
RANDOM = ("one", "random")
"""The arms whose cells are chosen by chance alone, or by chance and a short training."""
AGAINST = ("random", "shared", "original", "one", "first-order, gumbel, α warm-up")
"""The arms with which the others are compared."""


def save(rows: list[dict], stem: str) -> None:
    """Write rows to a study's CSV. They replace those with the same name, way of retraining and seeds."""
    path = RESULTS / f"{stem}.csv"
    before = stored(stem) if path.exists() else []
    new = {_which(row) for row in rows}
    write_csv(path, [row for row in before if _which(row) not in new] + rows)


def _which(row: dict) -> tuple:
    return row["name"], row["retraining"], int(row["seed"]), int(row["retrain_seed"])


def stored(stem: str) -> list[dict]:
    with open(RESULTS / f"{stem}.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def by_retraining(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of each way of retraining, the way of the last stored row first."""
    ways = dict.fromkeys(row["retraining"] for row in reversed(rows))
    return {way: [row for row in rows if row["retraining"] == way] for way in ways}


def by_cell(rows: list[dict]) -> dict[str, dict[int, list[dict]]]:
    """arm -> search seed -> the rows of the cell that this seed found, one for each retraining."""
    cells: dict = {}
    for row in rows:
        cells.setdefault(row["name"], {}).setdefault(int(row["seed"]), []).append(row)
    return cells


def by_genotype(rows: list[dict]) -> dict[str, list[dict]]:
    """genotype as JSON -> the rows of that cell, whichever searches found it."""
    cells: dict[str, list[dict]] = {}
    for row in rows:
        cells.setdefault(row["genotype"], []).append(row)
    return cells


def mean(retrained: list[dict], what: str) -> float:
    """The figure `what` of a cell: its mean over the cell's retrainings."""
    return float(np.mean([float(row[what]) for row in retrained]))


def ways_agree(rows: list[dict]) -> list[dict]:
    """For each pair of ways of retraining that share more than two cells: how many, and the rank correlation of the cells' mean validation perplexities."""
    valid = {way: {cell: mean(retrained, "valid") for cell, retrained in by_genotype(there).items()} for way, there in by_retraining(rows).items()}
    found = []
    for (one, a), (other, b) in combinations(valid.items(), 2):
        both = [cell for cell in a if cell in b]
        if len(both) > 2:
            found.append({"ways": [one, other], "cells": len(both), "rank_correlation": spearman(*(np.array([m[cell] for cell in both]) for m in (a, b)))})
    return found


def sign_flip(differences: np.ndarray) -> float:
    """p of the two-sided paired test that the mean is 0. It is exact: over all 2^n choices of signs (Fisher 1935, section 21)."""
    return float(permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(spearmanr(a, b).statistic)


def agreement(cells: list[list]) -> float | None:
    """The share of nodes with the same (op, predecessor) in two cells, as a mean over all pairs of cells; None for a single cell."""
    pairs = list(combinations(cells, 2))
    return float(np.mean([[a == b for a, b in zip(one, other)] for one, other in pairs])) if pairs else None


def depth(recurrent: list) -> float:
    """The mean over the nodes of how many functions lie between state 0 and the node: 1 for a star, (N+1)/2 for a chain. `recurrent` has (op, predecessor)s."""
    deep = [0]
    for _, read in recurrent:
        deep.append(deep[read] + 1)
    return float(np.mean(deep[1:]))


def traits(rows: list[dict]) -> dict:
    """What a cell's perplexity goes with: the rank correlation, over all different cells, of the mean validation perplexity with the depth and with the
    number of nodes that have each op. p is that of no correlation; it takes the cells for independent, which those of one arm are not."""
    cells = by_genotype(rows)
    valid = [mean(retrained, "valid") for retrained in cells.values()]
    recurrent = [json.loads(genotype)["recurrent"] for genotype in cells]
    what = {"depth": [depth(cell) for cell in recurrent]}
    what |= {op: [float(sum(name == op for name, _ in cell)) for cell in recurrent] for op in PRIMITIVES if op != "none"}
    found = {}
    for name, values in what.items():
        if len(set(values)) > 1 and len(set(valid)) > 1:  # else the correlation is not defined
            result = spearmanr(values, valid)
            found[name] = {"rank_correlation": float(result.statistic), "p": float(result.pvalue)}
    return {"cells": len(cells), "with": found}


def summary(rows: list[dict]) -> dict:
    """The figures of one way of retraining, by arm and over all cells. A cell's perplexity is the mean over its retrainings.

    An arm has the number of its seeds, the mean and standard deviation of its cells' perplexities, its best cell, how far its cells agree and which ops they
    have, and the test against each other arm of `AGAINST`, paired by seed. Over all cells there are the rank correlation of short and long retraining, what
    the perplexity goes with (`traits`), and how much retrainings of one cell differ.
    """
    cells = by_cell(rows)
    means = {name: {seed: {k: mean(there, k) for k in ("short_valid", "valid", "test", "search_seconds")} for seed, there in seeds.items()}
             for name, seeds in cells.items()}
    found: dict = {"arms": {}}
    for name, seeds in means.items():
        valid, test = (np.array([cell[k] for cell in seeds.values()]) for k in ("valid", "test"))
        best = min(seeds, key=lambda seed: seeds[seed]["valid"])
        genotypes = [json.loads(there[0]["genotype"])["recurrent"] for there in cells[name].values()]
        ops = Counter(op for genotype in genotypes for op, _ in genotype)
        supernets = [float(there[0]["supernet_valid"]) for there in cells[name].values() if there[0].get("supernet_valid")]
        arm = {"seeds": len(seeds), "retrainings": min(map(len, cells[name].values())), "valid_mean": valid.mean(), "valid_sd": valid.std(ddof=1) if len(valid) > 1 else None,
               "test_mean": test.mean(), "test_sd": test.std(ddof=1) if len(test) > 1 else None, "best_valid": seeds[best]["valid"], "best_test": seeds[best]["test"],
               "best_genotype": cells[name][best][0]["genotype"], "search_seconds": float(np.mean([c["search_seconds"] for c in seeds.values()])),
               "supernet_valid": float(np.median(supernets)) if supernets else None, "agreement": agreement(genotypes),
               "ops": {op: count / sum(ops.values()) for op, count in sorted(ops.items())}, "depth": float(np.mean([depth(genotype) for genotype in genotypes]))}
        for other in AGAINST:
            both = sorted(seeds.keys() & means.get(other, {}).keys())
            if other != name and len(both) > 1:
                for suffix, what in (("", "valid"), ("_test", "test")):
                    differences = np.array([seeds[s][what] - means[other][s][what] for s in both])
                    arm[f"minus_{other}{suffix}"], arm[f"p_{other}{suffix}"] = differences.mean(), sign_flip(differences)
        found["arms"][name] = arm
    every = [cell for seeds in means.values() for cell in seeds.values()]
    n_nodes = len(json.loads(rows[0]["genotype"])["recurrent"])
    found["agreement_by_chance"] = float(np.mean([1 / ((len(PRIMITIVES) - 1) * node) for node in range(1, n_nodes + 1)]))
    found["short_long_rank_correlation"] = spearman(*(np.array([cell[k] for cell in every]) for k in ("short_valid", "valid")))
    found["traits"], drawn_blindly = traits(rows), [row for row in rows if row["name"] in RANDOM]
    if len(by_genotype(drawn_blindly)) > 3:
        found["traits_of_random"] = traits(drawn_blindly)
    most = max(len(there) for seeds in cells.values() for there in seeds.values())
    again = np.array([[float(r["valid"]) for r in sorted(there, key=lambda r: int(r["retrain_seed"]))]
                      for seeds in cells.values() for there in seeds.values() if len(there) == most])  # (cells, retrainings)
    if most > 1:
        found["cells_retrained_often"], found["most_retrainings"] = len(again), most
        found["sd_of_retrainings"] = float(np.sqrt(np.mean(np.var(again, axis=1, ddof=1))))
        # a retraining seed, with its batches and first weights, makes all cells better or worse: what is left without that (two-way analysis of variance)
        left = again - again.mean(0) - again.mean(1, keepdims=True) + again.mean()
        found["sd_beside_retraining_seed"] = float(np.sqrt((left**2).sum() / max(1, (len(again) - 1) * (most - 1))))
    return found


def picture(rows: list[dict], path: Path) -> None:
    """Draw every cell as a point in the row of its arm, and a bar at the arm's mean. There is a panel for each way of retraining."""
    from nni_darts_rnn.plot import canvas

    names, ways = list(dict.fromkeys(row["name"] for row in rows)), by_retraining(rows)
    with canvas.style():
        figure = canvas.new_figure(4 + 3 * len(ways), max(3.2, 0.7 + 0.55 * len(names)))
        figure.set_layout_engine("constrained")
        panels = figure.subplots(1, len(ways), sharey=True, squeeze=False)[0]
        for axes, (way, there) in zip(panels, ways.items()):
            cells = by_cell(there)
            for place, name in enumerate(names):
                values = [mean(retrained, "valid") for retrained in cells.get(name, {}).values()]
                axes.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.5)
                if values:
                    axes.plot([np.mean(values)] * 2, [place - 0.3, place + 0.3], color="black")
            axes.set_title(f"retrained for\n{way}", fontsize="small")
        panels[0].set_yticks(range(len(names)), [textwrap.fill(name, 48) for name in names])
        panels[0].invert_yaxis()
        figure.supxlabel("validation perplexity of the retrained cells (lower is better; bar: mean)")
        canvas.save(figure, [path])
