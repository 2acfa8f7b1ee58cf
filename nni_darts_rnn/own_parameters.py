"""The parameters of the trial that this process is, the same ones whenever it is started.

NNI 3.0 gives trials that begin together what the tuner drew in the order in which they ask, whatever it lists for each; a trial that `nnictl resume` starts again gets what
is listed, which may be another one's. So a trial keeps what it got first. This can go once NNI lists for a trial what it gave it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from .files import write_json

NAME = "parameters.json"
"""In the trial's folder: what the tuner drew, and the number by which the tuner knows it."""


def own_parameters() -> dict:
    """What the tuner drew for this trial; outside of an experiment nothing, {}. `ValueError` with one line where what the trial has kept is damaged."""
    import nni.trial

    drawn, kept = nni.get_next_parameter() or {}, Path(os.environ.get("NNI_OUTPUT_DIR", ".")) / NAME
    if nni.trial._params is None or nni.get_trial_id() == "STANDALONE":
        return dict(drawn)
    if kept.exists():
        try:
            found = json.loads(kept.read_text(encoding="utf-8"))  # with its number, so results reach the tuner as of this draw
            if not isinstance(found, dict) or not isinstance(found.get("parameters"), dict) or "parameter_id" not in found:
                raise ValueError("expected an object with parameter_id and parameters")
            nni.trial._params = found
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{kept}: damaged ({error}); the trial no longer knows what the tuner drew for it") from None
    else:
        write_json(kept, nni.trial._params)
    return dict(nni.trial._params["parameters"])
