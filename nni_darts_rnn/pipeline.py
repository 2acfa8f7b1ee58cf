"""The phases of a run (search, derive, retrain, test), and the files that each leaves in the run's folder."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from .checkpoints.store import USUAL, Checkpoints, Keeping, alone_in, run_identity, unfinished_search
from .corpus import Corpus
from .files import write_json, write_text
from .genotype import Genotype, load_genotype
from .outputs.tensorboard import watched
from .outputs.versions import package_versions
from .recipes import Recipe, RetrainRecipe, SearchRecipe

logger = logging.getLogger(__name__)


def check_fits(corpus: Corpus, *parts: SearchRecipe | RetrainRecipe) -> None:
    """`ValueError`, before anything is trained or written, if a text is too short for the streams that a part of the recipe asks for, or if the weights and
    their gradient alone need more than this machine's memory."""
    from .model import expected_parameters

    for part in parts:
        if isinstance(part, SearchRecipe):
            prefix, texts = "search", {"batch_size": [("training", corpus.train), ("α's", corpus.for_alpha)],
                                       "eval_batch_size": [("validation", corpus.valid)]}
        else:
            prefix, texts = "retrain", {"batch_size": [("training", corpus.without_alpha().train)], "eval_batch_size": [("validation", corpus.valid)],
                                        "test_batch_size": [("test", corpus.test)]}
        _check_streams(part, prefix, texts)
        V, H, N = len(corpus.vocab), part.hidden_size, getattr(part, "n_nodes", 0)
        needed, there = 8 * expected_parameters(V, H, N), _memory()  # float32 twice; a retraining's cell counts as W0 alone, which every cell has
        if needed > there:
            raise ValueError(f"{prefix}.hidden_size: {H} units{f' and {N} nodes' if N else ''} for {V:,} words need {needed / 1e9:,.0f} GB for the weights and their gradient alone, "
                             f"but this machine has {there / 1e9:,.0f} GB of memory; take fewer units, or put <unk> for rare words")


def check_reading(corpus: Corpus, part: RetrainRecipe) -> None:
    """`ValueError` if the validation or the test text is too short for the streams in which it is read."""
    _check_streams(part, "retrain", {"eval_batch_size": [("validation", corpus.valid)], "test_batch_size": [("test", corpus.test)]})


def _check_streams(part, prefix: str, texts: dict[str, list]) -> None:
    for field, read in texts.items():
        for what, tokens in read:
            B = getattr(part, field)
            if len(tokens) < 2 * B:
                raise ValueError(f"{prefix}.{field}: {B} streams need a text of at least {2 * B} tokens, but {what} text has {len(tokens)}")


def _memory() -> float:
    """This machine's memory in bytes, or infinity where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return math.inf


def take_fast_path(corpus: Corpus, recipe: SearchRecipe | RetrainRecipe, device: str, n_nodes: int | None = None, more: bool = False) -> None:
    """Turn the compiled cells on for a phase in which they save more time than their compilation takes, and off for any other phase. Also log a line
    about what would make such a run faster, each such line once in a process.

    The decision depends on the sizes of the phase alone. So a trial's retraining and the command that repeats it take the same path. With `more` the phase
    may later be continued for more epochs, and counts as a long one.
    """
    from . import fused
    from .extension import State
    from .model import choose_device

    words = len(corpus.vocab)
    if isinstance(recipe, SearchRecipe):
        tokens, n_nodes, precision = corpus.train, recipe.n_nodes, "float32"
        passes = recipe.passes_of(0, recipe.epochs, words)
    else:
        tokens, precision, passes = corpus.without_alpha().train, recipe.precision, 3 * recipe.epochs
    steps = len(tokens) / (recipe.batch_size * recipe.bptt)  # of an epoch
    saved = fused.saved_seconds(recipe.bptt, recipe.batch_size, recipe.hidden_size, n_nodes, steps * passes, mixed=isinstance(recipe, SearchRecipe))
    where = choose_device(device)
    fused.prepare(math.inf if more else saved, where)
    hint = fused.why_not(where, precision)
    if hint is not None and hint not in State.told:
        State.told.add(hint)
        logger.info("%s", hint)


def search_phase(corpus: Corpus, recipe: SearchRecipe, seed: int, folder: Path, report=None, progress: bool = False, device: str = "auto",
                 keeping: Keeping = USUAL) -> dict:
    """Search, and leave genotype.json, alpha.json, search.csv and their pictures in `folder`. Returns genotype, supernet_valid_perplexity, search_seconds and
    rows (the metrics of every epoch).

    The search writes checkpoints to `folder`/checkpoint, and the same call resumes from there (see `Keeping`). They are removed at the end. `ValueError` where
    another process works in the folder, or where it holds an unfinished search with other settings, a trained model or, if the search would begin anew, an
    unfinished retraining.
    """
    with alone_in(folder) as kept:
        if (folder / "model.json").exists():
            raise ValueError(f"{folder} holds a trained model; a search there would leave the cell of another beside it; give another folder for the results")
        _check_retraining(kept, folder, keeping.resume == "never")
        store = _store(kept, "search", run_identity(corpus, recipe, seed), keeping)
        found = _search_phase(corpus, recipe, seed, folder, report, progress, device, store)
        store.clear()
    return found


def _search_phase(corpus, recipe, seed, folder, report, progress, device, store) -> dict:
    from .nas_layers import import_layers

    import_layers()
    from .search import search

    take_fast_path(corpus, recipe, device)
    with watched(folder, "search", report) as report:
        result = search(corpus, recipe, seed, report, progress, device, folder, store)
        _draw(folder)
    return {"genotype": result.genotype, "supernet_valid_perplexity": result.rows[-1]["perplexity"], "search_seconds": result.seconds,
            "rows": result.rows}


def retrain_phase(corpus: Corpus, genotype: Genotype | str, recipe: RetrainRecipe, seed: int, folder: Path, report=None, progress: bool = False,
                  device: str = "auto", keeping: Keeping = USUAL, final: Callable[[dict], None] | None = None) -> dict:
    """Train the genotype from scratch and test it. Leaves retrain.csv, genotype.json, model.safetensors, model.json and pictures in `folder`.

    The training writes checkpoints to `folder`/checkpoint and resumes from there, as `search_phase` does. On Ctrl-C after the first epoch, the best model so
    far is tested and left in `folder` too, and then `KeyboardInterrupt` is raised. The same goes for `FloatingPointError`, where the numbers went wrong for
    good. Returns valid_perplexity, test_perplexity, unigram_perplexity and bigram_perplexity (of the test text, by counts of words), parameters,
    retrain_seconds, epochs and rows; `final` gets these before the checkpoints are removed.
    `ValueError` where another process works in the folder, or where it holds another cell, a training with other settings or an unfinished search.
    """
    genotype = load_genotype(genotype)
    with alone_in(folder) as kept:
        if unfinished_search(kept):
            raise ValueError(f"{folder} holds an unfinished search, whose cell may still change; let it end first, or give another folder for the results")
        _check_cell(folder, genotype)  # before `resume="never"` removes the checkpoints of another run
        store = _store(kept, "retrain", _retrain_identity(corpus, genotype, recipe, seed), keeping)
        done = _retrain_phase(corpus, genotype, recipe, seed, folder, report, progress, device, store, more=False)
        if final is not None:
            final(done)
        store.clear()
    return done


def _retrain_identity(corpus, genotype, recipe, seed) -> dict:
    return run_identity(corpus.without_alpha(), recipe, seed, genotype=genotype.to_json())


def _retrain_phase(corpus, genotype, recipe, seed, folder, report, progress, device, store, more) -> dict:
    from .learner import retrain
    from .text.baselines import counted
    from .trained import save_trained

    if not (folder / "genotype.json").exists():
        write_text(folder / "genotype.json", genotype.to_json() + "\n")
    take_fast_path(corpus, recipe, device, genotype.n_nodes, more)
    with watched(folder, "retrain", report) as report:
        outcome = retrain(corpus, genotype, recipe, seed, folder, report, progress, device, store)
        summary = {name: outcome[name] for name in ("valid_perplexity", "test_perplexity", "parameters")}
        summary |= {"retrain_seconds": outcome["seconds"], "epochs": outcome["epochs"]}
        save_trained(folder, outcome["model"], corpus.vocab.words, {"corpus": corpus.name, "seed": seed, "recipe": asdict(recipe), "result": summary})
        _draw(folder, "cell.svg", "cell.png", "curves.svg", "curves.png")
    if outcome["ended_by"] is not None:
        logger.info("retrain: the best model of %d epochs is in %s: test perplexity %.2f (validation %.2f)", summary["epochs"], folder,
                    summary["test_perplexity"], summary["valid_perplexity"])
        raise outcome["ended_by"]
    return summary | counted(corpus.without_alpha()) | {"rows": outcome["rows"]}


def _check_cell(folder: Path, genotype: Genotype) -> None:
    """`ValueError` if the folder's genotype.json is another cell. It would stay there, and the pictures, which are drawn from it, would show the wrong cell."""
    path = folder / "genotype.json"
    if path.exists() and load_genotype(path) != genotype:
        raise ValueError(f"{path} holds another cell than the one to train, {genotype.to_json()}; give another folder for the results")


def _check_retraining(kept: Path, folder: Path, anew: bool) -> None:
    """`ValueError` if a retraining waits in the folder and no search does, or `anew` says that one begins all the same: it would replace the retraining's cell."""
    if (anew or not Checkpoints(kept, "search", {})) and Checkpoints(kept, "retrain", {}):
        raise ValueError(f"{folder} holds an unfinished retraining, whose cell a search would replace; let it end first, or give another folder for the results")


def _store(kept: Path, phase: str, identity: dict, keeping: Keeping) -> Checkpoints:
    store = Checkpoints(kept, phase, identity, keeping.every)
    if keeping.resume == "never":
        store.clear()
    if keeping.resume == "must" and not store:
        raise ValueError(f"--resume must: {kept} holds no checkpoint of a {phase}")
    return store


def _draw(folder: Path, *names: str) -> None:
    """Draw pictures of what is in the folder, by default all. A picture that cannot be made costs a warning, and not the run that it shows."""
    from .outputs.figures import draw

    try:
        missing = draw(folder, names)[1]
    except OSError as error:
        missing = {folder.name: str(error)}
    for name, why in missing.items():
        warnings.warn(f"{name} was not drawn: {why}", stacklevel=2)


def whole_run(corpus: Corpus, recipe: Recipe, seed: int, folder: Path, report=None, device: str = "auto",
              keeping: Keeping = USUAL, final: Callable[[dict], None] | None = None, more: bool = False) -> dict:
    """A trial: search, retraining, test. Leaves all that the two phases leave, and result.json, whose content it returns as a dictionary.

    It writes checkpoints as the phases do. A call that resumes does not repeat a finished phase. `final` gets the result before the checkpoints are removed.
    With `more` they stay, and the same call with a larger `retrain.epochs` continues from the last epoch. Two such calls for one folder wait for each other.
    A call with fewer epochs than have been trained already gives `final` the best validation perplexity of its own epochs; all else in the result describes
    the model that is there.
    """
    check_fits(corpus, recipe.search, recipe.retrain)
    with alone_in(folder, wait=more) as kept:
        store = _store(kept, "search", run_identity(corpus, recipe.search, seed), keeping)
        searched = _search_phase(corpus, recipe.search, seed, folder, report, False, device, store)
        genotype, rest = searched["genotype"], replace(keeping, resume="auto" if keeping.resume == "must" else keeping.resume)
        identity = _retrain_identity(corpus, genotype, recipe.retrain, seed)
        if more:
            del identity["recipe"]["epochs"]
        last = _store(kept, "retrain", identity, rest)
        retrained = _retrain_phase(corpus, genotype, recipe.retrain, seed, folder, report, False, device, last, more)
        result = {
            "seed": seed, "corpus": corpus.name, "recipe": recipe.to_dict(), "genotype": genotype.to_json(),
            "supernet_valid_perplexity": searched["supernet_valid_perplexity"], "valid_perplexity": retrained["valid_perplexity"],
            "test_perplexity": retrained["test_perplexity"], "unigram_perplexity": retrained["unigram_perplexity"],
            "bigram_perplexity": retrained["bigram_perplexity"], "parameters": retrained["parameters"], "epochs": retrained["epochs"],
            "search_seconds": searched["search_seconds"],
            "retrain_seconds": retrained["retrain_seconds"], "seconds": searched["search_seconds"] + retrained["retrain_seconds"],
            "versions": package_versions(),
        }
        write_json(folder / "result.json", result)
        if final is not None:
            own = [row["perplexity"] for row in retrained["rows"][:recipe.retrain.epochs]]
            final(result if len(own) == len(retrained["rows"]) else result | {"valid_perplexity": min(own)})
        if not more:
            last.clear()
            store.clear()
    return result
