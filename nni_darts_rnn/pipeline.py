"""Search, derive, retrain, test: the phases of a run and what each leaves in its folder."""

from __future__ import annotations

import math
import os
import platform
import time
import warnings
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .corpus import Corpus
from .files import write_csv, write_json
from .genotype import Genotype
from .recipes import Recipe, RetrainRecipe, SearchRecipe
from .tensorboard import watched


def package_versions() -> dict[str, str]:
    """Versions of Python and of every package that a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("nni-darts-rnn", "nni", "torch", "pytorch-lightning", "fastai", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def check_fits(corpus: Corpus, *parts: SearchRecipe | RetrainRecipe) -> None:
    """`ValueError`, before anything is trained or written, where a text is too short for the streams that a part of the recipe asks for, or
    where the weights and their gradient alone are more than this machine's memory."""
    for part in parts:
        if isinstance(part, SearchRecipe):
            prefix, texts = "search", {"batch_size": [("training", corpus.train), ("α's", corpus.valid if corpus.alpha is None else corpus.alpha)],
                                       "eval_batch_size": [("validation", corpus.valid)]}
        else:
            prefix, texts = "retrain", {"batch_size": [("training", corpus.train)], "eval_batch_size": [("validation", corpus.valid)],
                                        "test_batch_size": [("test", corpus.test)]}
        for field, read in texts.items():
            for what, tokens in read:
                B = getattr(part, field)
                if len(tokens) < 2 * B:
                    raise ValueError(f"{prefix}.{field}: {B} streams need a text of at least {2 * B} tokens, but {what} text has {len(tokens)}")
        V, H = len(corpus.vocab), part.hidden_size
        needed, there = 8 * (V * H + V + 4 * H * H), _memory()  # float32 twice; of the cell only W0, whose size every cell shares
        if needed > there:
            raise ValueError(f"{prefix}.hidden_size: {H} units for {V:,} words need {needed / 1e9:,.0f} GB for the weights and their gradient alone, "
                             f"but this machine has {there / 1e9:,.0f} GB of memory; take fewer units, or put <unk> for rare words")


def _memory() -> float:
    """Bytes of memory of this machine, or infinity where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return math.inf


def take_fast_path(corpus: Corpus, recipe: SearchRecipe | RetrainRecipe, n_nodes: int | None = None) -> str | None:
    """Turns the compiled cells on where they save more than compiling them costs; a line that says what would make this run faster, if anything.

    The decision depends on the sizes of the run alone, so a run and its repetition take the same path.
    """
    from . import fused

    search, n_nodes = (True, recipe.n_nodes) if isinstance(recipe, SearchRecipe) else (False, n_nodes)
    steps = recipe.epochs * len(corpus.train) / (recipe.batch_size * recipe.bptt)
    # a search step is worth 13 forward passes (four gradients and one of the weights), a training step 3
    work = fused.eager_seconds(recipe.bptt, recipe.batch_size, recipe.hidden_size, len(corpus.vocab), n_nodes,
                               passes=steps * (13 if search else 3), edges=None if search else n_nodes)
    fused.prepare(work)
    return fused.why_not()


def search_phase(corpus: Corpus, recipe: SearchRecipe, seed: int, folder: Path, report=None, progress: bool = False, device: str = "auto") -> dict:
    """Searches, and leaves genotype.json, alpha.json, search.csv and their pictures in `folder`. Returns genotype, perplexity, seconds, rows."""
    from .search import search

    take_fast_path(corpus, recipe)
    with watched(folder, "search", report) as report:
        result = search(corpus, recipe, seed, report, progress, device, folder)
        _draw(folder, "cell.svg", "cell.png", "cell.gif", "alpha.svg", "alpha.png", "curves.svg", "curves.png")
    return {"genotype": result.genotype, "supernet_valid_perplexity": result.rows[-1]["perplexity"], "search_seconds": result.seconds,
            "rows": result.rows}


def retrain_phase(corpus: Corpus, genotype: Genotype, recipe: RetrainRecipe, seed: int, folder: Path, report=None, progress: bool = False,
                  device: str = "auto") -> dict:
    """Trains the genotype from scratch and tests it; leaves retrain.csv, model.safetensors, model.json and pictures in `folder`.

    Ctrl-C after the first epoch: the best model so far is tested and left there, then `KeyboardInterrupt` goes on.
    Returns valid_perplexity, test_perplexity, parameters, retrain_seconds, epochs, rows.
    """
    from .learner import retrain
    from .trained import save_trained

    rows: list[dict] = []

    def keep(row: dict) -> None:
        rows.append(row)
        # after every epoch, so that what a run that is stopped had reached can be seen
        write_csv(folder / "retrain.csv", [{k: v for k, v in row.items() if k != "default"} for row in rows])
        if report is not None:
            report(row)

    take_fast_path(corpus, recipe, genotype.n_nodes)
    with watched(folder, "retrain", report) as report:
        outcome = retrain(corpus, genotype, recipe, seed, folder, keep, progress, device)
        model = outcome.pop("model")
        summary = {"valid_perplexity": outcome["valid_perplexity"], "test_perplexity": outcome["test_perplexity"],
                   "parameters": outcome["parameters"], "retrain_seconds": outcome["seconds"], "epochs": outcome["epochs"]}
        save_trained(folder, model, corpus.vocab.words, {"corpus": corpus.name, "seed": seed, "recipe": asdict(recipe), "result": summary})
        _draw(folder, "cell.svg", "cell.png", "curves.svg", "curves.png")
    if outcome["interrupted"]:
        raise KeyboardInterrupt
    return summary | {"rows": rows}


def _draw(folder: Path, *names: str) -> None:
    """Pictures of what is in the folder. A picture that cannot be made is no reason to lose the run that it shows."""
    from .figures import draw

    try:
        missing = draw(folder, names)[1]
    except OSError as error:
        missing = {folder.name: str(error)}
    for name, why in missing.items():
        warnings.warn(f"{name} was not drawn: {why}", stacklevel=2)


def whole_run(corpus: Corpus, recipe: Recipe, seed: int, folder: Path, report=None, progress: bool = False, device: str = "auto") -> dict:
    """A trial: search, retraining, test. Leaves everything the two phases leave, and result.json, which it returns as a dictionary."""
    check_fits(corpus, recipe.search, recipe.retrain)
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
