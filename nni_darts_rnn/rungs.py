"""Hyperband's trials: each configuration is retrained for a few epochs, and the best ones for more in another trial.

Each of these trials would begin anew. Here a configuration has a folder of its own, beside those of the trials or wherever the user wants it, which
keeps its search and its retraining; the next trial of that configuration resumes from there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from .files import whole
from .recipes import flatten

BUDGET = "TRIAL_BUDGET"
"""Name of the parameter in which NNI's Hyperband passes a trial's number of epochs."""


def recipe_fields(parameters: dict) -> dict:
    """A tuner's parameters without the seed, and with Hyperband's budget as the field `retrain.epochs`. `ValueError` where both are given."""
    if BUDGET in parameters and "retrain.epochs" in flatten(parameters):
        raise ValueError(f"retrain.epochs: the search space opens it, but Hyperband gives the epochs, as {BUDGET}; leave it out of the search space")
    return {"retrain.epochs" if key == BUDGET else key: value for key, value in parameters.items() if key != "seed"}


def configuration_folder(parameters: dict, trial_folder: Path, rungs: str | None) -> Path:
    """The folder of a configuration: in `rungs`, or in the experiment's folder (each of several machines has its own)."""
    configuration = {key: value for key, value in parameters.items() if key != BUDGET}
    name = hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:12]
    if "seed" in configuration:
        name = f"seed-{configuration['seed']}-{name}"
    root = Path(rungs) if rungs else trial_folder.absolute().parents[1] / "rungs"  # trials are in <environment>/trials/<trial>
    return root / name


def copy_results(kept: Path, trial_folder: Path) -> None:
    """Copies what a configuration has so far, without its checkpoints, into the folder of a trial, where NNI and `report` look for it."""
    from .checkpoints.store import FOLDER

    for path in sorted(kept.rglob("*")):
        name = path.relative_to(kept)
        if path.is_file() and name.parts[0] != FOLDER:
            with whole(trial_folder / name) as temporary:
                shutil.copyfile(path, temporary)
