"""An NNI experiment as its folder tells it: which trials there are, what each found, which is best, how to do one again.

Reads only: the trials' `result.json`, and NNI's own database for what a trial that is not finished was asked to do. Works while an
experiment runs and after it has ended. Nothing in a trial's folder is trusted or executed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shlex
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path

from .genotype import Genotype, did_you_mean
from .recipes import RECIPES, Recipe, get_recipe
from .rungs import recipe_fields
from .trial import Parser, add_run_options, checked_recipe, checked_seed

RESULT = "result.json"
CORPUS_NAMES = ("pydoc", "penn", "wikitext-2", "wikitext-103")  # as `corpus.NAMES`, which would import torch
_ENDED = {"SUCCEEDED": "succeeded", "FAILED": "failed", "USER_CANCELED": "stopped", "SYS_CANCELED": "stopped", "EARLY_STOPPED": "stopped"}


@dataclass(frozen=True)
class Result:
    """What a finished trial wrote, checked. Times are seconds; `None` for what its file does not say."""

    genotype: Genotype
    valid_perplexity: float
    test_perplexity: float | None
    supernet_valid_perplexity: float | None
    parameters: int | None
    search_seconds: float | None
    retrain_seconds: float | None
    versions: dict


@dataclass(frozen=True)
class Trial:
    """One trial. `status` is succeeded, running, waiting, failed or stopped; `result` is there once it has finished.

    `recipe` and `seed` are None where the trial's settings are not known; `note` says in one line what went wrong.
    """

    id: str
    folder: Path
    status: str
    options: argparse.Namespace
    result: Result | None = None
    seed: int | None = None
    recipe: Recipe | None = None
    parameters: dict = field(default_factory=dict)
    note: str = ""

    def commands(self, out: str | None = None) -> list[str]:
        """The `nni-darts-rnn` commands that do this trial again, with results in `out`; empty where its settings are not known."""
        if self.recipe is None or self.seed is None:
            return []
        out = out or f"runs/{self.id}"
        shared = corpus_words(self.options) + ["--recipe", self.recipe.name, "--seed", str(self.seed)]
        if self.options.threads:
            shared += ["--threads", str(self.options.threads)]  # sums of another number of threads differ in the last digits
        if self.options.device != "auto":
            shared += ["--device", self.options.device]
        return [shlex.join(["nni-darts-rnn", "search", *shared, *set_words(self.recipe, "search"), "--out", out]),
                shlex.join(["nni-darts-rnn", "retrain", *shared, *set_words(self.recipe, "retrain"), "--genotype", out, "--out", out])]


@dataclass(frozen=True)
class Experiment:
    """`started` and `ended` are seconds since 1970, or None; `options` are the trial command's (corpus, recipe, …)."""

    id: str
    folder: Path
    name: str
    status: str
    started: float | None
    ended: float | None
    options: argparse.Namespace
    trials: tuple[Trial, ...]

    def ranking(self) -> list[Trial]:
        """Finished trials, lowest validation perplexity of the retrained cell first."""
        return sorted((t for t in self.trials if t.result), key=lambda t: (t.result.valid_perplexity, t.id))

    def unfinished(self) -> list[Trial]:
        return [t for t in self.trials if not t.result]

    def best(self) -> Trial:
        """The trial at the head of the ranking; `ValueError` where none has finished."""
        ranking = self.ranking()
        if not ranking:
            raise ValueError(f"experiment {self.id}: no trial has finished yet ({self.count()})")
        return ranking[0]

    def count(self) -> str:
        """Such as `2 succeeded, 1 running`."""
        states = [t.status for t in self.trials]
        return ", ".join(f"{states.count(s)} {s}" for s in ("succeeded", "running", "waiting", "failed", "stopped") if s in states) or "no trials"


def corpus_words(options) -> list[str]:
    """The options that name the corpus again, as a command's words."""
    words = ["--corpus", str(options.corpus or "pydoc")]
    for name in ("corpus_folder", "corpus_mirror"):
        if getattr(options, name):
            words += ["--" + name.replace("_", "-"), str(getattr(options, name))]
    return words + (["--alpha-fraction", f"{options.alpha_fraction:g}"] if options.alpha_fraction else [])


def set_words(recipe: Recipe, part: str) -> list[str]:
    """`--set` for every field of a part that differs from the recipe of that name."""
    return [word for key, (_, value) in differences(recipe).items() if key.startswith(part + ".")
            for word in ("--set", f"{key}={str(value).lower() if value is None or isinstance(value, bool) else value}")]


def differences(recipe: Recipe) -> dict[str, tuple]:
    """Field -> (value in the recipe of that name, value here), where they differ."""
    named, found = RECIPES[recipe.name], {}
    for part in ("search", "retrain"):
        there, here = getattr(named, part), getattr(recipe, part)
        for f in dataclasses.fields(here):
            if getattr(there, f.name) != getattr(here, f.name):
                found[f"{part}.{f.name}"] = getattr(there, f.name), getattr(here, f.name)
    return found


# ------------------------------------------------------------------------------------------------------------- finding

def known_experiments() -> dict[str, dict]:
    """NNI's own list of the experiments on this machine, id -> what NNI keeps about each; the latest first."""
    try:
        # the file of `nni.tools.nnictl.config_utils.Experiments`, read here because that class takes seconds to import, a lock, and writes
        listed = json.loads((Path.home() / "nni-experiments" / ".experiment").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    entries = {key: value for key, value in listed.items() if isinstance(value, dict)} if isinstance(listed, dict) else {}
    return dict(sorted(entries.items(), key=lambda item: -(_seconds(item[1].get("startTime")) or 0)))


def load_experiment(name: str | Path) -> Experiment:
    """The experiment of an id, or of an experiment's folder. `ValueError` with one line, naming the known ids, for anything else."""
    known = known_experiments()
    if str(name) in known:
        entry = known[str(name)]
        folder = Path(entry.get("logDir") or Path.home() / "nni-experiments") / str(name)
        if not folder.is_dir():
            raise ValueError(f"experiment {name}: its folder {folder} is gone")
        return read_experiment(folder, entry)
    if os.path.isdir(name):
        folder = Path(name).resolve()
        return read_experiment(folder, known.get(folder.name, {}))
    ids = "known ids: " + ", ".join(known) if known else "NNI knows no experiment on this machine"
    raise ValueError(f"experiment {str(name)!r} is neither an id nor a folder; {ids}" + did_you_mean(name, known))


def read_experiment(folder: Path, entry: dict | None = None) -> Experiment:
    """What an experiment's folder holds; `entry` is NNI's in its list of experiments. `ValueError` where it is no such folder."""
    entry = entry or {}
    jobs, profile = _database(folder / "db" / "nni.sqlite")
    folders = {path.name: path for path in sorted(folder.glob("environments/*/trials/*")) if path.is_dir()}
    if not jobs and not folders and not profile:
        raise ValueError(f"{folder}: not an NNI experiment's folder (no database and no environments/*/trials in it)")
    params = profile.get("params") or {}
    status = str(entry.get("status") or "unknown")
    options = _trial_options(params.get("trialCommand"), params.get("trialCodeDirectory"))
    trials = []
    for trial_id in dict.fromkeys([*jobs, *folders]):
        job = jobs.get(trial_id, {})
        where = folders.get(trial_id) or Path(job.get("logPath") or folder)
        trials.append(read_trial(trial_id, where, job, options, alive=status not in ("STOPPED", "DONE", "ERROR", "unknown")))
    started, ended = (_seconds(entry.get(key) or profile.get(key)) for key in ("startTime", "endTime"))
    return Experiment(str(entry.get("id") or profile.get("id") or folder.name), folder,
                      str(params.get("experimentName") or entry.get("experimentName") or ""),
                      status.lower().replace("_", " "), started, ended, options, tuple(trials))


def _seconds(milliseconds) -> float | None:
    return milliseconds / 1000 if isinstance(milliseconds, (int, float)) and not isinstance(milliseconds, bool) else None


def _database(path: Path) -> tuple[dict, dict]:
    """NNI's database: trial id -> {"event", "data", "logPath"} of its latest state, and the experiment's profile. Empty where there is none."""
    jobs: dict[str, dict] = {}
    profile: dict = {}
    if not path.is_file():
        return jobs, profile
    try:
        # read-only: the experiment may be running
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=5)) as database:
            database.row_factory = sqlite3.Row
            for row in database.execute("select trialJobId, event, data, logPath from TrialJobEvent order by rowid"):
                job = jobs.setdefault(row["trialJobId"], {})
                job |= {key: row[key] for key in ("event", "data", "logPath") if row[key] is not None}
            row = database.execute("select * from ExperimentProfile order by revision desc limit 1").fetchone()
            if row is not None:
                profile = dict(row)
                profile["params"] = json.loads(profile["params"])
    except (sqlite3.Error, ValueError) as error:
        raise ValueError(f"{path}: NNI's database cannot be read ({_line(error)})") from None
    return jobs, profile


class _Quiet(Parser):
    def error(self, message: str):
        raise ValueError(message)


def _trial_options(command: str | None, code_folder: str | None):
    """The options of a trial command of ours; defaults where it is another command."""
    parser = _Quiet(add_help=False)
    add_run_options(parser)
    try:
        words = shlex.split(command or "")
        ours = [k for k, word in enumerate(words) if word == "nni_darts_rnn.trial"]
        options = parser.parse_known_args(words[ours[0] + 1:] if ours else [])[0]
    except ValueError:
        options = parser.parse_args([])
    for name in ("corpus", "corpus_folder"):
        value = getattr(options, name)
        # relative to where the trials ran, which is not where the next command is typed
        if code_folder and value and not (name == "corpus" and value in CORPUS_NAMES) and (Path(code_folder) / value).is_dir():
            setattr(options, name, str(Path(code_folder) / value))
    return options


# -------------------------------------------------------------------------------------------------------------- trials

def read_trial(trial_id: str, folder: Path, job: dict, options, alive: bool) -> Trial:
    """What a trial's folder holds; `job` is what NNI's database has of it, `alive` whether its experiment still runs."""
    parameters, result, note = _parameters(job.get("data")), None, ""
    seed, recipe = parameters.get("seed", 0) if job.get("data") else None, None
    if (folder / RESULT).is_file():
        try:
            result, seed, recipe = read_result(folder / RESULT)
        except ValueError as error:
            note = str(error)
    event = str(job.get("event") or "")
    if result:
        status = "succeeded"
    elif note:
        status = "failed"
    elif event in _ENDED:
        status = "failed" if event == "SUCCEEDED" else _ENDED[event]
        note = note or (_last_words(folder) if status == "failed" else "")
    else:
        status = {"": "unknown", "WAITING": "waiting", "UNKNOWN": "waiting"}.get(event, "running") if alive else "stopped"
    if recipe is None and job.get("data"):
        try:
            seed = checked_seed(seed)
            recipe = checked_recipe(options, recipe_fields(parameters))
        except ValueError as error:
            seed, recipe = seed if isinstance(seed, int) else None, None
            note = note or str(error)
    return Trial(trial_id, folder, status, options, result, seed, recipe, parameters, note)


def read_result(path: Path) -> tuple[Result, int, Recipe | None]:
    """A `result.json`: (result, seed, recipe). The recipe is None where it is not one of this version's. `ValueError` with one line otherwise."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        cell = data["genotype"]
        genotype = Genotype.from_json(cell if isinstance(cell, str) else json.dumps(cell))
        valid = _number(data["valid_perplexity"])
        if valid is None or valid <= 0:
            raise ValueError(f"valid_perplexity: {data['valid_perplexity']!r} is not a perplexity")
        parameters = _number(data.get("parameters"))
        versions = data.get("versions")
        result = Result(genotype, valid, _number(data.get("test_perplexity")), _number(data.get("supernet_valid_perplexity")),
                        None if parameters is None else int(parameters), _number(data.get("search_seconds")), _number(data.get("retrain_seconds")),
                        versions if isinstance(versions, dict) else {})
        seed = checked_seed(data["seed"])
    except KeyError as error:
        raise ValueError(f"{path.name}: {error} is missing") from None
    except (OSError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: cannot be read ({_line(error)})") from None
    recipe = None
    with contextlib.suppress(KeyError, TypeError, ValueError):
        kept = data["recipe"]
        recipe = get_recipe(kept["name"], {part: kept[part] for part in ("search", "retrain")})
    return result, seed, recipe


def _number(value) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def _parameters(text: str | None) -> dict:
    with contextlib.suppress(TypeError, ValueError, AttributeError):
        found = json.loads(text).get("parameters")
        return found if isinstance(found, dict) else {}
    return {}


def _last_words(folder: Path) -> str:
    """The last line of a trial's standard error."""
    try:
        with (folder / "trial.stderr").open("rb") as file:
            file.seek(max(0, os.path.getsize(folder / "trial.stderr") - 4096))
            lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return lines[-1][:300] if lines else ""


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
