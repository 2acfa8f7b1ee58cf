"""An NNI experiment, read from its folder: which trials there are, and which is best.

This module only reads: the trials' folders, and NNI's own database, which knows what an unfinished trial was asked to do. It works while an experiment runs
and after it has ended. It trusts nothing in a folder, and executes none of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from ..checks import did_you_mean, one_line
from ..options import add_run_options
from .trial_folder import Trial, read_trial

CELLS = "nni_darts_rnn.cell_trial"
LATEST = 8  # how many experiments a message names
TEXTS = ("experimentName", "trialCommand", "trialCodeDirectory")  # what must be text in an experiment's profile
OVER = ("STOPPED", "DONE", "ERROR")
CORPUS_NAMES = ("pydoc", "penn", "wikitext-2", "wikitext-103")  # the same as `corpus.NAMES`, whose import would load torch


@dataclass(frozen=True)
class Experiment:
    """One experiment. `started` and `ended` are seconds since 1970, or None. `options` are those of the trial command (corpus, recipe, …)."""

    id: str
    folder: Path
    name: str
    status: str
    started: float | None
    ended: float | None
    options: argparse.Namespace
    trials: tuple[Trial, ...]

    def ranking(self) -> list[Trial]:
        """The finished trials. The one whose retrained cell has the lowest validation perplexity comes first."""
        return sorted((t for t in self.trials if t.result), key=lambda t: (t.result.valid_perplexity, t.id))

    def unfinished(self) -> list[Trial]:
        return [t for t in self.trials if not t.result]

    def best(self) -> Trial:
        """The first trial of the ranking. `ValueError` if none has finished."""
        ranking = self.ranking()
        if not ranking:
            if any(t.status in ("running", "waiting") for t in self.trials) or not self.trials:
                raise ValueError(f"experiment {self.id}: no trial has finished yet ({self.count()})")
            raise ValueError(f"experiment {self.id}: no trial has a result ({self.count()}); `nni-darts-rnn report {self.id}` says what ended them")
        return ranking[0]

    def count(self) -> str:
        """How many trials are in each state, such as `2 succeeded, 1 running`."""
        states = [t.status for t in self.trials]
        return ", ".join(f"{states.count(s)} {s}" for s in ("succeeded", "running", "waiting", "failed", "stopped") if s in states) or "no trials"


def known_experiments() -> dict[str, dict]:
    """NNI's own list of the experiments on this machine: id -> what NNI keeps about it, the latest first. Empty where there is no readable list."""
    try:
        # the file of `nni.tools.nnictl.config_utils.Experiments`: that class takes seconds to import, takes a lock, and writes
        listed = json.loads((Path.home() / "nni-experiments" / ".experiment").read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home folder
        return {}
    entries = {key: value for key, value in listed.items() if isinstance(value, dict)} if isinstance(listed, dict) else {}
    return dict(sorted(entries.items(), key=lambda item: -(_seconds(item[1].get("startTime")) or 0)))


def _folder(name: str, entry: dict) -> Path:
    """The folder of the experiment with the id `name`, as NNI's list has it."""
    return Path(entry.get("logDir") or Path.home() / "nni-experiments") / name


def load_experiment(name: str | Path) -> Experiment:
    """The experiment with the id `name`, or in the folder `name`. For anything else, `ValueError` with one line that names the latest known ids."""
    known = known_experiments()
    if str(name) in known:
        entry = known[str(name)]
        folder = _folder(str(name), entry)
        if not folder.is_dir():
            raise ValueError(f"experiment {name}: its folder {folder} is gone")
        return read_experiment(folder, entry, own=True)
    if os.path.isdir(name):
        folder = Path(name).resolve()
        entry = known.get(folder.name, {})
        return read_experiment(folder, entry, own=bool(entry) and _folder(folder.name, entry).resolve() == folder)
    latest = ", ".join(list(known)[:LATEST]) + (f" and {len(known) - LATEST} older" if len(known) > LATEST else "")
    ids = f"known ids: {latest}" if known else "NNI knows no experiment on this machine"
    raise ValueError(f"experiment {str(name)!r} is neither an id nor a folder; {ids}" + did_you_mean(name, known))


def read_experiment(folder: Path, entry: dict | None = None, own: bool = False) -> Experiment:
    """The experiment in `folder`; `ValueError` if the folder is not an experiment's.

    `entry` is what NNI's list has of it. `own` says that this folder is the one in NNI's list. Environment variables in the trial command are replaced only
    then: somebody else's experiment must not choose which variables are read.
    """
    entry = entry or {}
    jobs, profile = _database(folder / "db" / "nni.sqlite")
    folders = {path.name: path for path in sorted(folder.glob("environments/*/trials/*")) if path.is_dir()}
    if not jobs and not folders and not profile:
        raise ValueError(f"{folder}: not an NNI experiment's folder (no database and no environments/*/trials in it)")
    params = profile.get("params") or {}
    status = _status(entry)
    options = _trial_options(params.get("trialCommand"), params.get("trialCodeDirectory"), own)
    trials = []
    for trial_id in dict.fromkeys([*jobs, *folders]):
        job = jobs.get(trial_id, {})
        where = folders.get(trial_id) or Path(job.get("logPath") or folder)
        trials.append(read_trial(trial_id, where, job, options, alive=status not in (*OVER, "VIEWED", "unknown")))
    started, ended = (_seconds(entry.get(key) or profile.get(key)) for key in ("startTime", "endTime"))
    return Experiment(str(entry.get("id") or profile.get("id") or folder.name), folder,
                      str(params.get("experimentName") or entry.get("experimentName") or ""),
                      "running" if status == "NO_MORE_TRIAL" else status.lower().replace("_", " "), started, ended, options, tuple(trials))


def _status(entry: dict) -> str:
    """NNI's word for an experiment's state. It is STOPPED if the manager's process is gone and NNI noted no end, as `nnictl` also says once it has looked."""
    import psutil  # a dependency of NNI, which asks it too

    status, pid = str(entry.get("status") or "unknown"), entry.get("pid")
    return "STOPPED" if status not in OVER and type(pid) is int and 0 < pid < 2**31 and not psutil.pid_exists(pid) else status


def _seconds(milliseconds) -> float | None:
    """Milliseconds as seconds. None for what is not a time, also for one after the year 9999."""
    possible = isinstance(milliseconds, (int, float)) and not isinstance(milliseconds, bool) and 0 <= milliseconds < 253_402_300_800_000
    return milliseconds / 1000 if possible else None


def _database(path: Path) -> tuple[dict, dict]:
    """NNI's database: trial id -> {"event", "data", "logPath"}, the latest of each that is not null, and the experiment's profile.

    Both are empty if there is no such file. `ValueError` if it cannot be read.
    """
    jobs: dict[str, dict] = {}
    profile: dict = {}
    if not path.is_file():
        return jobs, profile
    try:
        # read-only, because the experiment may be running
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=5)) as database:
            database.row_factory = sqlite3.Row
            for row in database.execute("select trialJobId, event, data, logPath from TrialJobEvent order by rowid"):
                if not all(isinstance(row[key], (str, type(None))) for key in row.keys()) or row["trialJobId"] is None:
                    raise ValueError("a trial of what is no text")
                job = jobs.setdefault(row["trialJobId"], {})
                job |= {key: row[key] for key in ("event", "data", "logPath") if row[key] is not None}
            row = database.execute("select * from ExperimentProfile order by revision desc limit 1").fetchone()
            if row is not None:
                profile = dict(row)
                profile["params"] = json.loads(profile["params"])
                if not isinstance(profile["params"], dict) or not all(isinstance(profile["params"].get(key, ""), (str, type(None))) for key in TEXTS):
                    raise ValueError("its profile is no experiment's")
    except (sqlite3.Error, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: NNI's database cannot be read ({one_line(error)})") from None
    return jobs, profile


class _Quiet(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def _trial_options(command: str | None, code_folder: str | None, own: bool):
    """The options of a trial command of this package, or the defaults if it is another command.

    `drawn` is among them: whether the trials train a cell that the tuner draws. Environment variables in the corpus options are replaced if the experiment is
    the user's `own`.
    """
    parser = _Quiet(add_help=False)
    add_run_options(parser)
    try:
        words = shlex.split(command or "")
        ours = [k for k, word in enumerate(words) if word in ("nni_darts_rnn.trial", CELLS)]
        options = parser.parse_known_args(words[ours[0] + 1:] if ours else [])[0]
        options.drawn = bool(ours) and words[ours[0]] == CELLS
        for name in ("corpus", "corpus_folder", "corpus_mirror"):  # where NNI started the trial, its shell did this
            if own and isinstance(getattr(options, name), str):
                setattr(options, name, os.path.expandvars(getattr(options, name)))
    except ValueError:
        options = parser.parse_args([])
        options.drawn = False
    return located(options, code_folder) if code_folder else options


def located(options: argparse.Namespace, folder: str | Path) -> argparse.Namespace:
    """The options of a trial that ran in `folder`, with its corpus paths joined to `folder`, so that commands work elsewhere too."""
    found = argparse.Namespace(**vars(options))
    for name in ("corpus", "corpus_folder"):
        value = getattr(found, name)
        if value and not (name == "corpus" and value in CORPUS_NAMES) and (Path(folder) / value).is_dir():
            setattr(found, name, str(Path(folder) / value))
    return found
