"""Shows the web page of a NAS experiment that has ended: `python3 -m nni_darts_rnn.nas_view ID --port 8080`; `nnictl stop ID` ends it.

`nnictl view` of NNI 3.0 shows experiments of a tuner. For one of a NAS strategy it fails with "`search_space` field can not be customized", because
the stored configuration holds fields that NNI itself fills in. This can go once `nnictl view` shows such experiments.
"""

from __future__ import annotations

import sys
from pathlib import Path

from .options import Parser, quiet_hosts


def view(experiment_id: str, port: int = 8080, folder: str | None = None):
    """Starts the page in the background and returns NNI's `Experiment`. `folder`: the folder of experiments, if it is not the one that NNI noted.

    `ValueError` with one line where NNI knows no such experiment, `folder` has none, or it still runs.
    """
    from nni.experiment import Experiment
    from nni.experiment.config import ExperimentConfig
    from nni.experiment.launcher import get_stopped_experiment_config, get_stopped_experiment_config_json
    from nni.tools.nnictl.config_utils import Experiments
    from nni.tools.nnictl.nnictl_utils import update_experiment

    class Stopped(Experiment):
        def load_checkpoint(self) -> None:
            """Nothing: the configuration is already here, and NNI would check it again."""

    if folder is not None:
        if not (Path(folder) / experiment_id / "db" / "nni.sqlite").is_file():
            raise ValueError(f"experiment {experiment_id!r}: not in the folder {folder}, which has to hold {experiment_id}/db/nni.sqlite")
        update_experiment()
        if Experiments().get_all_experiments().get(experiment_id, {}).get("status", "STOPPED") != "STOPPED":
            raise ValueError(f"experiment {experiment_id!r}: it still runs; see nnictl experiment list")
    stored = get_stopped_experiment_config_json(experiment_id, folder)
    if stored is None:
        raise ValueError(f"experiment {experiment_id!r}: NNI has no ended experiment of that id on this machine; see nnictl experiment list --all")
    if stored.get("experimentType") == "nas":
        # fields that a NAS configuration refuses from anybody, and fills in itself from the current folder
        stored = {key: value for key, value in stored.items() if key not in ("searchSpace", "trialCommand", "trialCodeDirectory")}
        training = {key: value for key, value in stored["trainingService"].items() if key not in ("trialCommand", "trialCodeDirectory")}
        return Stopped(ExperimentConfig(**stored | {"trainingService": training}), id=experiment_id).view(port, non_blocking=True)
    return Experiment(get_stopped_experiment_config(experiment_id, folder), id=experiment_id).view(port, non_blocking=True)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python3 -m nni_darts_rnn.nas_view", description="Shows a NAS experiment that has ended in NNI's web page.")
    parser.add_argument("experiment", help="its id")
    parser.add_argument("--port", type=int, default=8080, help="of the web page; default 8080")
    parser.add_argument("--folder", help="the folder of experiments, where NNI's list does not say it")
    arguments = parser.parse_args(argv)
    quiet_hosts()
    try:
        view(arguments.experiment, arguments.port, arguments.folder)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"http://127.0.0.1:{arguments.port}; nnictl stop {arguments.experiment} ends it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
