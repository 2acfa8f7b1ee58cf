"""A trial, read from its folder: what it found, what it was asked to do, and the commands that repeat it.

This module only reads: the `result.json` of a finished trial, and for an unfinished one what the tuner drew and the end of its error output. The caller passes
what NNI's database has of the trial. Nothing in the folder is trusted or executed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ..cell_trial import read_parameters
from ..checks import one_line
from ..genotype import Genotype
from ..options import checked_recipe, checked_seed, corpus_words, set_words
from ..own_parameters import NAME as PARAMETERS
from ..recipes import Recipe, get_recipe
from ..rungs import BUDGET, recipe_fields

RESULT = "result.json"
_ENDED = {"SUCCEEDED": "failed", "FAILED": "failed", "USER_CANCELED": "stopped", "SYS_CANCELED": "stopped", "EARLY_STOPPED": "stopped"}


@dataclass(frozen=True)
class Result:
    """What a finished trial wrote, after checks. Times are in seconds. What its file does not have is None."""

    genotype: Genotype
    valid_perplexity: float
    test_perplexity: float | None
    supernet_valid_perplexity: float | None
    parameters: int | None
    search_seconds: float | None
    retrain_seconds: float | None
    versions: dict
    unigram_perplexity: float | None = None  # of the test text, as `text.baselines` counts it
    bigram_perplexity: float | None = None


def as_folder(name: str) -> str:
    """An id as the name of a folder. In somebody else's database an id may be any text."""
    return re.sub(r"[^\w.-]|^\.+$", "-", name)


@dataclass(frozen=True)
class Trial:
    """One trial. `status` is succeeded, running, waiting, failed or stopped. `result` is None until it has finished.

    `recipe` and `seed` are None if the trial's settings are not known. `cell` is the cell that a tuner drew, None if the trial searches. `note` says in one
    line what went wrong.
    """

    id: str
    folder: Path
    status: str
    options: argparse.Namespace
    result: Result | None = None
    seed: int | None = None
    recipe: Recipe | None = None
    cell: Genotype | None = None
    parameters: dict = field(default_factory=dict)
    note: str = ""

    def commands(self, out: str | None = None) -> list[str]:
        """The `nni-darts-rnn` commands that repeat this trial, with results in `out`. Empty if its settings are not known."""
        if self.recipe is None or self.seed is None:
            return []
        out = out or f"runs/{as_folder(self.id)}"
        shared = ["--recipe", self.recipe.name, "--seed", str(self.seed)]
        if self.options.threads:
            shared += ["--threads", str(self.options.threads)]  # with another number of threads, sums differ in the last digits
        if self.options.device != "auto":
            shared += ["--device", self.options.device]
        genotype = self.cell.to_json() if self.cell else out
        retrain = ["retrain", *corpus_words(self.options), *shared, *set_words(self.recipe, "retrain"), "--genotype", genotype, "--out", out]
        search = ["search", *corpus_words(self.options, searches=True), *shared, *set_words(self.recipe, "search"), "--out", out]
        search, retrain = (["nni-darts-rnn", *words] for words in (search, retrain))
        if BUDGET in self.parameters and not self.cell:
            from ..extension import SWITCH  # here, since it imports torch

            retrain = ["env", f"{SWITCH}=1", *retrain]  # as in the trial, a rung of successive halving, which runs compiled because it may go on for long
        return [shlex.join(words) for words in ([retrain] if self.cell else [search, retrain])]

    def repeats(self) -> bool:
        """Whether those commands give the same numbers.

        A rung of successive halving may not, if its learning rate falls at the end: it may have gone on from a shorter one, whose rate had fallen already.
        """
        return BUDGET not in self.parameters or self.recipe is None or not self.recipe.retrain.anneal


def read_trial(trial_id: str, folder: Path, job: dict, options, alive: bool) -> Trial:
    """The trial in `folder`. `job` is what NNI's database has of it, and `alive` says whether its experiment still runs."""
    drew, result, note = _parameters(folder, job), None, ""
    known, parameters = drew is not None or bool(job.get("data")), drew or {}
    seed, recipe, cell, drawn = parameters.get("seed", 0) if known else None, None, None, getattr(options, "drawn", False)
    if (folder / RESULT).is_file():
        try:
            result, seed, recipe = read_result(folder / RESULT)
            cell = result.genotype if drawn else None
        except ValueError as error:
            note = str(error)
    event = str(job.get("event") or "")
    if result:
        status = "succeeded"
    elif note:
        status = "failed"
    elif event in _ENDED:
        status = _ENDED[event]  # SUCCEEDED without a result means failed
        note = _last_words(folder) if status == "failed" else ""
    else:
        status = ("waiting" if event in ("", "WAITING", "UNKNOWN") else "running") if alive else "stopped"
    if recipe is None and known:
        try:
            if drawn:
                cell, seed, fields = read_parameters(parameters)
            else:
                seed, fields = checked_seed(seed), recipe_fields(parameters)
            recipe = checked_recipe(options, fields)
        except ValueError as error:
            seed, recipe = seed if isinstance(seed, int) else None, None
            note = note or str(error)
    return Trial(trial_id, folder, status, options, result, seed, recipe, cell, parameters, note)


def read_result(path: Path) -> tuple[Result, int, Recipe | None]:
    """Read a `result.json`: (result, seed, recipe). The recipe is None if this version does not know it. `ValueError` with one line if the rest is wrong."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        cell = data["genotype"]
        genotype = Genotype.from_json(cell) if isinstance(cell, str) else Genotype.from_dict(cell)
        valid = _number(data["valid_perplexity"])
        if valid is None or valid <= 0:
            raise ValueError(f"valid_perplexity: {data['valid_perplexity']!r} is not a perplexity")
        parameters = _number(data.get("parameters"))
        versions = data.get("versions")
        result = Result(genotype, valid, _number(data.get("test_perplexity")), _number(data.get("supernet_valid_perplexity")),
                        None if parameters is None else int(parameters), _number(data.get("search_seconds")), _number(data.get("retrain_seconds")),
                        versions if isinstance(versions, dict) else {}, _number(data.get("unigram_perplexity")), _number(data.get("bigram_perplexity")))
        seed = checked_seed(data["seed"])
    except KeyError as error:
        raise ValueError(f"{path.name}: {error} is missing") from None
    except (OSError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: cannot be read ({one_line(error)})") from None
    recipe = None
    with contextlib.suppress(KeyError, TypeError, ValueError):
        kept = data["recipe"]
        recipe = get_recipe(kept["name"], {part: kept[part] for part in ("search", "retrain")})
    return result, seed, recipe


def _number(value) -> float | None:
    """`value` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:  # an int may be too large for a float
        return None
    return value


def _parameters(folder: Path, job: dict) -> dict | None:
    """What the tuner drew: the trial's own file if there is one, else NNI's entry. None if neither can be read.

    The file comes first because NNI may list another trial's parameters (`own_parameters`).
    """
    for text in (lambda: (folder / PARAMETERS).read_text(encoding="utf-8"), lambda: job["data"]):
        with contextlib.suppress(OSError, LookupError, TypeError, ValueError, RecursionError):
            found = json.loads(text())["parameters"]
            if isinstance(found, dict):
                return found
    return None


def _last_words(folder: Path) -> str:
    """The last line of a trial's standard error, cut to 300 characters. Empty if there is none."""
    try:
        with (folder / "trial.stderr").open("rb") as file:
            file.seek(max(0, os.path.getsize(folder / "trial.stderr") - 4096))
            lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    except OSError:
        return ""
    return lines[-1][:300] if lines else ""
