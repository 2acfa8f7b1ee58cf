"""The examples for other machines, read by NNI's own configuration classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from nni.experiment.config import ExperimentConfig
from nni.experiment.config.training_services import AmlConfig, DlcConfig, KubeflowConfig, OpenpaiConfig, RemoteConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
SERVICES = {"remote": RemoteConfig, "kubeflow": KubeflowConfig, "openpai": OpenpaiConfig, "dlc": DlcConfig, "aml": AmlConfig}


def checked(path: Path, tmp_path: Path, **changes) -> ExperimentConfig:
    """The configuration as nnictl reads it; files and folders of the example's own machines are put in their place."""
    text = path.read_text(encoding="utf-8")
    (tmp_path / "id_rsa").write_text("a key")
    text = text.replace("~/.ssh/id_rsa", str(tmp_path / "id_rsa")).replace("/mnt/openpai", str(tmp_path))
    config = yaml.safe_load(text)
    config["trainingService"] |= changes
    copy = EXAMPLES / f".{path.stem}-test.yml"  # beside the example, whose paths are relative
    copy.write_text(yaml.safe_dump(config), encoding="utf-8")
    try:
        return ExperimentConfig.load(copy).canonical_copy()
    finally:
        copy.unlink()


@pytest.mark.parametrize("name, kind", SERVICES.items())
def test_each_example_is_what_nni_reads(name, kind, tmp_path):
    config = checked(EXAMPLES / f"darts_rnn_{name}.yml", tmp_path)
    service = config.training_service
    assert type(service) is kind and service.platform == name
    assert config.search_space == {"seed": {"_type": "choice", "_value": [1, 2]}}
    command = service.master.command if name == "kubeflow" else config.trial_command
    assert command.startswith("python3 -m nni_darts_rnn.trial --corpus pydoc")
    assert config.nni_manager_ip and config.tuner.name == "GridSearch"


@pytest.mark.parametrize("name, changes, words", [
    ("remote", {"machineList": []}, "machine"), ("kubeflow", {"operator": "mpi-operator"}, ""), ("openpai", {"localStorageMountPoint": "/no/such"}, "local_storage"),
    ("aml", {"workspaceNames": "x"}, "workspacenames"), ("dlc", {"podCount": None}, "")])
def test_nni_refuses_a_wrong_one(name, changes, words, tmp_path):
    with pytest.raises((ValueError, AssertionError, AttributeError)) as error:
        checked(EXAMPLES / f"darts_rnn_{name}.yml", tmp_path, **changes)
    assert words in str(error.value)
