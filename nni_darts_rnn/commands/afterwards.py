"""The commands that follow a search: `plot`, `best` and `report`; and `init`, which writes the examples into a folder."""

from __future__ import annotations

import json

from ..outputs import figures
from ..report.experiments import CORPUS_NAMES, load_experiment
from ..talk import Talk, answer


def plot(arguments) -> None:
    folder, talk = arguments.folder, Talk(arguments)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected one with {', '.join(figures.SOURCES)}")
    if all(not (folder / name).is_file() for name in figures.SOURCES):
        raise ValueError(f"{folder}: nothing to draw; expected {', '.join(figures.SOURCES)}")
    written, missing = figures.draw(folder, out=arguments.out)
    if not written:
        raise ValueError(f"{folder}: {'; '.join(dict.fromkeys(missing.values()))}")
    for why in dict.fromkeys(missing.values()):
        talk(f"not drawn: {', '.join(name for name in missing if missing[name] == why)}: {why}")
    answer(arguments, {"pictures": [str(path) for path in written], "missing": missing}, "\n".join(map(str, written)), _after(folder))


def _after(folder) -> list:
    """The next command, word by word: `evaluate` for a trained model, `retrain` for a cell, nothing if the folder has neither."""
    if not (folder / "model.safetensors").is_file():
        return ["nni-darts-rnn", "retrain", "--corpus", "FOLDER", "--genotype", folder] if (folder / "genotype.json").is_file() else []
    try:
        corpus = json.loads((folder / "model.json").read_text(encoding="utf-8"))["extra"]["corpus"]
    except (OSError, ValueError, KeyError, TypeError):
        corpus = None
    return ["nni-darts-rnn", "evaluate", folder, "--corpus", corpus if corpus in CORPUS_NAMES else "FOLDER"]


def best(arguments) -> None:
    experiment = load_experiment(arguments.experiment)
    trial = experiment.best()
    result = trial.result
    pictures = {name: str(trial.folder / name) for name in figures.PICTURES if (trial.folder / name).is_file()}
    data = {"experiment": experiment.id, "status": experiment.status, "trials": len(experiment.trials), "finished": len(experiment.ranking()),
            "trial": trial.id, "folder": str(trial.folder), "seed": trial.seed, "parameters": trial.parameters,
            "genotype": json.loads(result.genotype.to_json()), "valid_perplexity": result.valid_perplexity, "test_perplexity": result.test_perplexity,
            "weights": result.parameters, "pictures": pictures}
    test = "" if result.test_perplexity is None else f", test {result.test_perplexity:.2f}"
    weights = "" if result.parameters is None else f", {result.parameters:,} parameters"
    words = [f"experiment  {experiment.id} {experiment.status}: {experiment.count()}",
             f"best trial  {trial.id}, seed {trial.seed}: validation perplexity {result.valid_perplexity:.2f}{test}{weights}",
             f"cell        {result.genotype}", f"folder      {trial.folder}",
             f"pictures    {', '.join(pictures) or 'none yet: nni-darts-rnn plot draws them'}"]
    answer(arguments, data, "\n".join(words), ["nni-darts-rnn", "retrain", "--from", arguments.experiment])


def report(arguments) -> None:
    from ..report.page import write_report

    experiment, talk = load_experiment(arguments.experiment), Talk(arguments)
    talk(f"experiment {experiment.id} {experiment.status}: {experiment.count()}; drawing")
    path = write_report(experiment, arguments.out)
    then = ["nni-darts-rnn", "best", arguments.experiment] if experiment.ranking() else []
    answer(arguments, {"experiment": experiment.id, "report": str(path), "trials": len(experiment.trials), "finished": len(experiment.ranking())},
           str(path), then)


def init(arguments) -> None:
    from .starter import CONFIG, write_examples

    written = write_examples(arguments.folder, arguments.force)
    answer(arguments, {"files": [str(path) for path in written]}, "\n".join(map(str, written)),
           ["nnictl", "create", "--config", arguments.folder / CONFIG])
