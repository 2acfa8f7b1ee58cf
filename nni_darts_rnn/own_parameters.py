"""The parameters of the trial that this process runs: the same ones each time the trial is started.

NNI 3.0 lists the parameters of each trial. But trials that begin together get the tuner's draws in the order in which they ask, whatever the list says. When
`nnictl resume` starts a trial again, it gets what is listed, which may have gone to another trial. So a trial keeps the parameters that it got first. This
module can go once NNI lists for a trial what it gave it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from .files import write_json

NAME = "parameters.json"
"""The file in the trial's folder with the parameters that the tuner drew, and the number by which the tuner knows them."""


def own_parameters() -> dict:
    """The parameters that the tuner drew for this trial; {} outside an experiment. `ValueError` with one line if the file that keeps them is damaged."""
    import nni.trial

    drawn, kept = nni.get_next_parameter() or {}, Path(os.environ.get("NNI_OUTPUT_DIR", ".")) / NAME
    if nni.trial._params is None or nni.get_trial_id() == "STANDALONE":
        return dict(drawn)
    if kept.exists():
        try:
            found = json.loads(kept.read_text(encoding="utf-8"))  # with its number, so that the tuner takes the results as those of this draw
            if not isinstance(found, dict) or not isinstance(found.get("parameters"), dict) or "parameter_id" not in found:
                raise ValueError("expected an object with parameter_id and parameters")
            nni.trial._params = found
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{kept}: damaged ({error}); the trial no longer knows what the tuner drew for it") from None
    else:
        write_json(kept, nni.trial._params)
    return dict(nni.trial._params["parameters"])
