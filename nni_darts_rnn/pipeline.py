"""Search, derive, retrain, test: the phases of a run and what each leaves in its folder."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .corpus import Corpus
from .files import write_csv, write_json
from .genotype import Genotype
from .recipes import Recipe, RetrainRecipe, SearchRecipe


def package_versions() -> dict[str, str]:
    """Versions of Python and of every package that a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("nni-darts-rnn", "nni", "torch", "pytorch-lightning", "fastai", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def search_phase(corpus: Corpus, recipe: SearchRecipe, seed: int, folder: Path, report=None, progress: bool = False, device: str = "auto") -> dict:
    """Searches, and leaves genotype.json, alpha.json, search.csv, cell.svg in `folder`. Returns genotype, perplexity, seconds, rows."""
    from .plot import plot_cell
    from .search import search

    result = search(corpus, recipe, seed, report, progress, device, folder)
    plot_cell(result.genotype, folder / "cell.svg")
    return {"genotype": result.genotype, "supernet_valid_perplexity": result.rows[-1]["perplexity"], "search_seconds": result.seconds,
            "rows": result.rows}


def retrain_phase(corpus: Corpus, genotype: Genotype, recipe: RetrainRecipe, seed: int, folder: Path, report=None, progress: bool = False,
                  device: str = "auto") -> dict:
    """Trains the genotype from scratch and tests it; leaves retrain.csv, model.safetensors and model.json in `folder`.

    Returns valid_perplexity, test_perplexity, parameters, retrain_seconds, epochs, rows.
    """
    from .learner import retrain
    from .trained import save_trained

    rows: list[dict] = []

    def keep(row: dict) -> None:
        rows.append(row)
        if report is not None:
            report(row)

    outcome = retrain(corpus, genotype, recipe, seed, folder, keep, progress, device)
    model = outcome.pop("model")
    summary = {"valid_perplexity": outcome["valid_perplexity"], "test_perplexity": outcome["test_perplexity"],
               "parameters": outcome["parameters"], "retrain_seconds": outcome["seconds"], "epochs": outcome["epochs"]}
    save_trained(folder, model, corpus.vocab.words, {"corpus": corpus.name, "seed": seed, "recipe": asdict(recipe), "result": summary})
    write_csv(folder / "retrain.csv", [{k: v for k, v in row.items() if k != "default"} for row in rows])
    return summary | {"rows": rows}


def whole_run(corpus: Corpus, recipe: Recipe, seed: int, folder: Path, report=None, progress: bool = False, device: str = "auto") -> dict:
    """A trial: search, retraining, test. Leaves everything the two phases leave, and result.json, which it returns as a dictionary."""
    began = time.perf_counter()
    searched = search_phase(corpus, recipe.search, seed, folder, report, progress, device)
    retrained = retrain_phase(corpus, searched["genotype"], recipe.retrain, seed, folder, report, progress, device)
    result = {
        "seed": seed, "corpus": corpus.name, "recipe": recipe.to_dict(), "genotype": searched["genotype"].to_json(),
        "supernet_valid_perplexity": searched["supernet_valid_perplexity"], "valid_perplexity": retrained["valid_perplexity"],
        "test_perplexity": retrained["test_perplexity"], "parameters": retrained["parameters"], "search_seconds": searched["search_seconds"],
        "retrain_seconds": retrained["retrain_seconds"], "seconds": time.perf_counter() - began, "versions": package_versions(),
    }
    write_json(folder / "result.json", result)
    return result
