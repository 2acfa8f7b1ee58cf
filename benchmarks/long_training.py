"""Stores what a long `nni-darts-rnn retrain` on the Penn Treebank left in its folder: the command, the learning curve and both perplexities.

    nni-darts-rnn retrain --corpus penn --recipe penn --genotype DRAWN_V1 --set … --out trained
    python benchmarks/long_training.py trained

The figures are added to those of other folders in results/long_training.json. The picture beside that file shows all of their curves.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
from datetime import date
from pathlib import Path

import torch
from hardware import machine

from nni_darts_rnn.genotype import NAMED, Genotype
from nni_darts_rnn.options import set_words
from nni_darts_rnn.plot.curves import plot_curves
from nni_darts_rnn.recipes import get_recipe
from nni_darts_rnn.trained import read_description

RESULTS = Path(__file__).parent / "results" / "long_training.json"


def stored(folder: Path) -> dict:
    """The figures to store of a folder in which `retrain` has finished."""
    told = read_description(folder)
    genotype, trained = Genotype.from_dict(told["genotype"]), told["extra"]
    recipe = get_recipe("penn", {"retrain": trained["recipe"]})
    cell = next((name for name, named in NAMED.items() if named == genotype), genotype.to_json())
    words = ["nni-darts-rnn", "retrain", "--corpus", "penn", "--recipe", "penn", "--genotype", cell, *set_words(recipe, "retrain"),
             "--seed", str(trained["seed"]), "--threads", str(torch.get_num_threads()), "--out", "trained"]
    with (folder / "retrain.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {"cell": cell, "units": recipe.retrain.hidden_size, "optimizer": recipe.retrain.optimizer, "precision": recipe.retrain.precision,
            "anneal": recipe.retrain.anneal, "dropout": recipe.retrain.dropout, **trained["result"], "curve": [round(float(row["perplexity"]), 3) for row in rows],
            "tokens_per_second": max(float(row["tokens_per_second"]) for row in rows), "command": shlex.join(words),
            "date": date.today().isoformat(), "machine": machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where `nni-darts-rnn retrain` has left its results")
    parser.add_argument("--note", help="a sentence on how it ran, for the results page")
    options = parser.parse_args()
    found = stored(options.folder) | ({"note": options.note} if options.note else {})
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    kept[f"{found['cell']}, {found['units']} units, {found['epochs']} epochs, {found['optimizer']}"] = found
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    plot_curves([{"phase": "validation", "epoch": k + 1, f"{name}_perplexity": value} for name, one in kept.items() for k, value in enumerate(one["curve"])],
                RESULTS.with_suffix(".svg"))
    print(f"{found['command']}\nvalidation {found['valid_perplexity']:.2f}, test {found['test_perplexity']:.2f}, {found['epochs']} epochs, {found['retrain_seconds']:.0f} s")


if __name__ == "__main__":
    main()
