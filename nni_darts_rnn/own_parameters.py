"""The parameters of the trial that this process runs: the same ones each time the trial is started.

NNI 3.0 lists the parameters of each trial. But trials that begin together get the tuner's draws in the order in which they ask, whatever the list says, so
its web page and `nnictl experiment export` show the results of one beside the parameters of another. Here a trial takes what NNI's server lists for it.
Each draw is listed for one trial, so each is still tried once. Where the server cannot be asked (trials on other machines), a trial takes what it gets
first and keeps that, because `nnictl resume` would give it what is listed. This module can go once NNI gives a trial what it lists for it.
"""

from __future__ import annotations

import json
import os
import time
import urllib.request
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
        nni.trial._params = _listed(nni.get_trial_id()) or nni.trial._params
        write_json(kept, nni.trial._params)
    return dict(nni.trial._params["parameters"])


def _listed(trial: str, tries: int = 20) -> dict | None:
    """What NNI's server on this machine lists for this trial, with the number by which the tuner knows it; None if there is no such server. The trial may
    begin a moment before the list has it, so the server is asked `tries` times."""
    server, found, _ = os.environ.get("NNI_TRIAL_COMMAND_CHANNEL", "").partition("/env/")
    if os.environ.get("NNI_PLATFORM") != "local" or not found:
        return None
    open_here = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # no proxy for this machine itself
    for _ in range(tries):
        try:
            with open_here(f"{server.replace('ws://', 'http://', 1)}/api/v1/nni/trial-jobs/{trial}", timeout=5) as answer:
                record = json.loads(json.load(answer)["hyperParameters"][-1])
            if isinstance(record.get("parameters"), dict) and "parameter_id" in record:
                return record
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            pass
        time.sleep(0.5)
    return None
