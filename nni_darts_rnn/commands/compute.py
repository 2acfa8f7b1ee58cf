"""The commands that compute, `search`, `retrain` and `evaluate`; and `recipes`, which prints the table of recipes."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from ..options import checked_recipe, checked_seed, corpus_words, keeping, open_corpus, prepare_torch, set_words, settings, without_search
from ..recipes import Recipe, RetrainRecipe, get_recipe
from ..report.experiments import CORPUS_NAMES, load_experiment
from ..report.trial_folder import RESULT, as_folder
from ..talk import Talk, answer, many

READING = ("retrain.bptt", "retrain.eval_batch_size", "retrain.test_batch_size")  # the only fields that decide how a text is read to measure perplexity
MOST_EPOCHS = 1000  # limit for a retraining that ends once it no longer improves


def search(arguments) -> None:
    from ..pipeline import check_fits, search_phase

    keep = keeping(arguments)
    recipe, seed, corpus, talk = _start(arguments)
    check_fits(corpus, recipe.search)
    folder = _out(arguments, Path(corpus.name).name, seed)
    talk(f"corpus {corpus.describe()}")
    s = recipe.search
    talk(f"searching {many(s.n_nodes, 'node')} of {many(s.hidden_size, 'unit')} for {many(s.epochs, 'epoch')}, recipe {recipe.name}, seed {seed}; "
         f"{_size(corpus, s.hidden_size, s.n_nodes)} and α on {_machine(arguments)}; results in {folder}")
    talk.epochs = s.epochs
    found = search_phase(corpus, s, seed, folder, talk.epoch, talk.progress, arguments.device, keep)
    talk(f"found {found['genotype']} in {found['search_seconds']:.0f} s")
    then = ["nni-darts-rnn", "retrain", *corpus_words(arguments), "--recipe", recipe.name, *set_words(recipe, "retrain"), "--genotype",
            folder / "genotype.json"]
    answer(arguments, {"genotype": json.loads(found["genotype"].to_json()), "supernet_valid_perplexity": found["supernet_valid_perplexity"],
                       "seconds": found["search_seconds"], "folder": str(folder)}, found["genotype"].to_json(), then)


def retrain(arguments) -> None:
    name, keep = _choose_cell(arguments), keeping(arguments)
    given = arguments.genotype
    recipe, seed, corpus, talk = _start(arguments)
    from ..checkpoints.store import FOLDER, unfinished_search
    from ..genotype import NAMED
    from ..pipeline import check_fits, retrain_phase

    check_fits(corpus, recipe.retrain)
    if isinstance(given, str) and given not in NAMED and os.path.exists(given):  # the path of a file or a folder, not a name
        found = Path(given if os.path.isdir(given) else os.path.dirname(given))
        if (arguments.out is None or found.resolve() != Path(arguments.out).resolve()) and unfinished_search(found / FOLDER):
            raise ValueError(f"--genotype {given}: {found} holds an unfinished search, whose cell may still change; let it end first")
    folder = _out(arguments, name or Path(corpus.name).name, seed)
    if (folder / RESULT).is_file():  # a trial's figures, by which `best` and `report` would go on naming the model that takes its model's place
        raise ValueError(f"{folder} holds the result of a trial, whose model would be replaced; give another folder for the results")
    talk(f"corpus {corpus.describe()}")
    if (unread := without_search(arguments)) is not None:
        talk(unread)
    r = recipe.retrain
    end = "" if r.patience is None else f" or until {r.patience} bring no better validation perplexity"
    talk(f"training {arguments.genotype} with {many(r.hidden_size, 'unit')} for up to {many(r.epochs, 'epoch')}{end}, recipe {recipe.name}, seed {seed}; "
         f"{_size(corpus, r.hidden_size, arguments.genotype.n_nodes)} on {_machine(arguments)}; results in {folder}")
    talk.epochs, talk.about = r.epochs, "about" if r.patience is None else "at most"
    done = retrain_phase(corpus, arguments.genotype, r, seed, folder, talk.epoch, talk.progress, arguments.device, keep)
    done.pop("rows")
    done["folder"] = str(folder)
    answer(arguments, done,
           f"test perplexity {done['test_perplexity']:.2f} (validation {done['valid_perplexity']:.2f}), {done['parameters']:,} parameters; "
           f"of the same test text: unigram {done['unigram_perplexity']:.2f}, interpolated bigram {done['bigram_perplexity']:.2f}",
           ["nni-darts-rnn", "evaluate", folder, *corpus_words(arguments)])


def evaluate(arguments) -> None:
    from .. import fused
    from ..checks import did_you_mean
    from ..model import choose_device, perplexity
    from ..pipeline import check_reading
    from ..text.baselines import counted
    from ..trained import load_trained, read_description

    for key in settings(arguments):
        if key not in READING:
            raise ValueError(f"--set {key}: evaluating uses only these fields of a recipe: {', '.join(READING)}" + did_you_mean(key, READING))
    extra = read_description(arguments.model).get("extra")
    extra = extra if isinstance(extra, dict) else {}  # written by the user, in another form than ours
    if arguments.corpus is None:
        arguments.corpus = text = extra.get("corpus", "pydoc")
        if text not in CORPUS_NAMES:  # a folder, of which the model knows only the name
            raise ValueError(f"--corpus: give the text that {arguments.model} was trained on, {text}")
    if arguments.recipe is None:  # as its training read the text: perplexity depends a little on the batches
        trained = extra.get("recipe")
        arguments.recipe = get_recipe("small", {key: trained[name] for key in READING if isinstance(trained, dict) and (name := key.partition(".")[2]) in trained})
    recipe, _, corpus, talk = _start(arguments)
    check_reading(corpus, recipe.retrain)
    model, words = load_trained(arguments.model)
    if tuple(words) != tuple(corpus.vocab.words):
        called = f", {extra['corpus']}," if "corpus" in extra else ""
        raise ValueError(f"{arguments.model} was trained on another vocabulary ({len(words)} words) than that of {corpus.name} ({len(corpus.vocab)}); "
                         f"give the text of its training{called} as --corpus")
    talk(f"corpus {corpus.describe()}")
    device = choose_device(arguments.device)
    model.to(device)
    r = recipe.retrain
    cell, streams = model.rnn, ((corpus.valid, r.eval_batch_size), (corpus.test, r.test_batch_size))
    saved = sum(fused.saved_seconds(len(text) // B, B, cell.hidden_size, cell.n_nodes, 1, mixed=False) for text, B in streams)
    fused.prepare(saved, device)
    found = {"valid_perplexity": perplexity(model, corpus.valid, r.eval_batch_size, r.bptt),
             "test_perplexity": perplexity(model, corpus.test, r.test_batch_size, r.bptt), **counted(corpus)}
    answer(arguments, found, f"test perplexity {found['test_perplexity']:.2f}, validation {found['valid_perplexity']:.2f}; "
           f"of the same test text: unigram {found['unigram_perplexity']:.2f}, interpolated bigram {found['bigram_perplexity']:.2f}",
           [] if (Path(arguments.model) / "cell.svg").is_file() else ["nni-darts-rnn", "plot", Path(arguments.model)])


def recipes(arguments) -> None:
    from ..recipes import RECIPES

    if arguments.json:
        print(json.dumps({name: recipe.to_dict() for name, recipe in RECIPES.items()}, indent=2))
        return
    for part in ("search", "retrain"):
        print(f"{part + '.*':30}" + "".join(f"{name:>18}" for name in RECIPES))
        for field in dataclasses.fields(getattr(RECIPES["penn"], part)):
            values = "".join(f"{str(getattr(getattr(recipe, part), field.name)):>18}" for recipe in RECIPES.values())
            choices = field.metadata["choices"]
            print(f"{part + '.' + field.name:30}{values}   {field.metadata['help']}" + (f" ({', '.join(choices)})" if choices else ""))
        print()


def _start(arguments):
    """Check every setting, then open the corpus. Returns (recipe, seed, corpus, talk)."""
    seed, recipe = checked_seed(getattr(arguments, "seed", 0)), checked_recipe(arguments, {})
    if getattr(arguments, "genotype", None) is not None:
        from ..genotype import load_genotype

        arguments.genotype = load_genotype(arguments.genotype)
    prepare_torch(arguments)
    return recipe, seed, open_corpus(arguments), Talk(arguments)


def _size(corpus, H: int, N: int) -> str:
    from ..model import expected_parameters

    return f"{expected_parameters(len(corpus.vocab), H, N):,} parameters"


def _machine(arguments) -> str:
    import torch

    from ..model import choose_device

    if choose_device(arguments.device).type == "cuda":
        return torch.cuda.get_device_name()
    n = torch.get_num_threads()
    return f"the CPU, {many(n, 'thread')}"


def _out(arguments, name: str, seed: int) -> Path:
    folder = arguments.out or Path("runs") / f"{arguments.command}-{name}-{seed}"
    if arguments.resume == "must" and not folder.exists():
        raise ValueError(f"--resume must: there is no {folder} to go on in")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _to_convergence(recipe: Recipe) -> Recipe:
    """A trial's recipe, changed so that the retraining goes on for as long as it improves; a trial's own retraining is often short. Adam and little dropout are
    ahead in short trainings only, so a recipe with Adam gets SGD with averaging, and the search's dropout."""
    r = recipe.retrain
    changed = {"epochs": max(MOST_EPOCHS, r.epochs), "anneal": 0.0}
    if r.optimizer == "adam":
        changed |= {name: getattr(RetrainRecipe(), name) for name in ("optimizer", "lr", "nonmono")}
        changed |= {name: getattr(recipe.search, name) for name in ("dropout", "dropout_h", "dropout_x", "dropout_i")}
    nonmono = changed.get("nonmono", r.nonmono) or 0
    changed["patience"] = r.patience if (r.patience or 0) > nonmono + 1 else max(10, 2 * nonmono)
    return get_recipe(recipe, {"retrain": changed})


def _choose_cell(arguments) -> str | None:
    """Complete `arguments`. With `--from` the cell is that of the experiment's best trial, and so are corpus and recipe unless others are given; otherwise
    corpus and recipe are the usual ones unless others are given. Returns a name for the results with `--from`, else None. `ValueError` without a cell."""
    name = None
    if arguments.experiment is not None:
        experiment = load_experiment(arguments.experiment)
        trial = experiment.best()
        arguments.genotype, name = trial.result.genotype, as_folder(f"{experiment.id}-{trial.id}")
        how = ""
        if arguments.recipe is None:
            if trial.recipe is None:
                raise ValueError(f"--from {arguments.experiment}: this version does not know the recipe of trial {trial.id}; give --recipe")
            arguments.recipe = _to_convergence(trial.recipe)
            if trial.recipe.retrain.optimizer == "adam":
                how = ", retrained with Adam; here with SGD, averaging, and dropout as in its search"
        if arguments.corpus is None:
            for option in ("corpus", "corpus_folder", "corpus_mirror"):
                setattr(arguments, option, getattr(arguments, option) or getattr(trial.options, option))
        Talk(arguments)(f"best of experiment {experiment.id} ({experiment.count()}): trial {trial.id}, "
                        f"validation perplexity {trial.result.valid_perplexity:.2f}{how}")
    elif arguments.genotype is None:
        raise ValueError("the following arguments are required: --genotype or --from")
    arguments.corpus = "pydoc" if arguments.corpus is None else arguments.corpus  # an empty text stays, and is refused later
    arguments.recipe = "small" if arguments.recipe is None else arguments.recipe
    return name
