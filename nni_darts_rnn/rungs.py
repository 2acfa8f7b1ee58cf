"""Hyperband's trials: a configuration for few epochs of retraining, and again for more where it is among the best.

Hyperband makes each of these a trial of its own, which would begin from nothing. Here a configuration has a folder, beside the trials' or wherever the
user wants it, where its search and its retraining stay; the next trial of it goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from .files import whole
from .recipes import flatten

BUDGET = "TRIAL_BUDGET"
"""What NNI's Hyperband calls a trial's number of epochs among its parameters."""


def recipe_fields(parameters: dict) -> dict:
    """A tuner's parameters without the seed, and with the budget as what it is here, the field `retrain.epochs`, which then is no parameter of its own (`ValueError`)."""
    if BUDGET in parameters and "retrain.epochs" in flatten(parameters):
        raise ValueError(f"retrain.epochs: the search space opens it, but Hyperband gives the epochs, as {BUDGET}; leave it out of the search space")
    return {"retrain.epochs" if key == BUDGET else key: value for key, value in parameters.items() if key != "seed"}


def configuration_folder(parameters: dict, trial_folder: Path, rungs: str | None) -> Path:
    """Where the configuration is kept: in `rungs`, or in the experiment's own folder (of this machine, where there are several)."""
    configuration = {key: value for key, value in parameters.items() if key != BUDGET}
    name = hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:12]
    if "seed" in configuration:
        name = f"seed-{configuration['seed']}-{name}"
    root = Path(rungs) if rungs else trial_folder.absolute().parents[1] / "rungs"  # trials are in <environment>/trials/<trial>
    return root / name


def copy_results(kept: Path, trial_folder: Path) -> None:
    """What the configuration has left so far, without its checkpoints, into the folder of a trial, where NNI and `report` look for it."""
    from .checkpoints.store import FOLDER

    for path in sorted(kept.rglob("*")):
        name = path.relative_to(kept)
        if path.is_file() and name.parts[0] != FOLDER:
            with whole(trial_folder / name) as temporary:
                shutil.copyfile(path, temporary)
