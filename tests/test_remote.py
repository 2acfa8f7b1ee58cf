"""The remote example through a real SSH server: two machines on this one, each with a home of its own; one is killed while it works."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from nnictl import Experiment, free_port

ROOT = Path(__file__).parents[1]
SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin")
pytestmark = [pytest.mark.skipif(SSHD is None or shutil.which("ssh-keygen") is None, reason="OpenSSH's sshd and ssh-keygen are not installed"),
              pytest.mark.skipif(not Path("/proc").is_dir(), reason="a machine's processes are found in /proc")]
TINY = "--recipe tiny --set search.bptt=64 --set search.batch_size=64 --set retrain.epochs=1 --threads 1"


class Machine:
    """An SSH server with its own port, keys, configuration and home folder. All that runs on it has that home in its environment."""

    def __init__(self, folder: Path, authorized: Path):
        self.home, self.port = folder / "home", free_port()
        (self.home / "tmp").mkdir(parents=True)
        keygen("ed25519", folder / "host_key")
        (folder / "sshd_config").write_text("\n".join([
            f"Port {self.port}", "ListenAddress 127.0.0.1", f"HostKey {folder / 'host_key'}", f"AuthorizedKeysFile {authorized}",
            f"PidFile {folder / 'sshd.pid'}", "StrictModes no", "UsePAM no", "PasswordAuthentication no", "PermitRootLogin prohibit-password",
            "Subsystem sftp internal-sftp", f"SetEnv HOME={self.home} TMPDIR={self.home / 'tmp'} OMP_NUM_THREADS=1", ""]))
        with contextlib.suppress(OSError):
            Path("/run/sshd").mkdir(exist_ok=True)  # where sshd locks itself in; only root's needs it
        self.server = subprocess.Popen([SSHD, "-D", "-f", folder / "sshd_config", "-E", folder / "sshd.log"])

    def processes(self) -> list[int]:
        found, mark = [], f"HOME={self.home}".encode()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def kill(self) -> int:
        """As if the power went: the server and all that runs. How many processes ran."""
        self.server.kill()
        self.server.wait(10)
        running = self.processes()
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return len(running)


def keygen(kind: str, path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", path], check=True, timeout=60)


@pytest.fixture
def machines(tmp_path):
    keygen("rsa", tmp_path / "key")
    both = []
    try:
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            both.append(Machine(tmp_path / name, tmp_path / "key.pub"))
        yield both
    finally:
        for machine in both:
            machine.kill()


def test_two_machines_of_which_one_is_killed(machines, tmp_path):
    for name in ("examples", "search_spaces"):
        shutil.copytree(ROOT / name, tmp_path / name)
    path = tmp_path / "examples" / "darts_rnn_remote.yml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert "--recipe small" in config["trialCommand"]
    config["trialCommand"] = config["trialCommand"].replace("--recipe small", TINY)
    config |= {"nniManagerIp": "127.0.0.1", "maxTrialNumber": 3, "searchSpace": {"seed": {"_type": "choice", "_value": [1, 2, 3]}}}
    del config["searchSpaceFile"]
    shown = config["trainingService"]["machineList"][0]
    config["trainingService"]["machineList"] = [
        shown | {"host": "127.0.0.1", "port": m.port, "user": os.environ.get("USER", "root"), "sshKeyFile": str(tmp_path / "key"),
                 "pythonPath": str(Path(sys.executable).parent)} for m in machines]
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    experiment = Experiment(path, tmp_path / "manager", tmp_path)
    try:
        one, two = machines
        for _ in range(120):  # until both machines work
            time.sleep(1)
            running = [t for t in experiment.get("trial-jobs") if t["status"] == "RUNNING"]
            if len(running) == 2:
                break
        assert {Path(t["logPath"]).parts[-3] for t in running} == {"remote-worker1", "remote-worker2"}
        lost = next(t["trialJobId"] for t in running if "remote-worker1" in t["logPath"])
        while not list(one.home.glob("nni-experiments/*/environments/*/trials/*")):
            time.sleep(0.2)
        assert one.kill() >= 2  # NNI's keeper of the trials, and a trial
        trials = {t["trialJobId"]: t for t in experiment.wait(240)}
        assert len(trials) == 3 and trials.pop(lost)["status"] != "SUCCEEDED"
        assert [t["status"] for t in trials.values()] == ["SUCCEEDED"] * 2
        for name, trial in trials.items():
            assert "remote-worker2" in trial["logPath"]
            final = json.loads(json.loads(trial["finalMetricData"][0]["data"]))  # came back to this machine
            folder, = two.home.glob(f"nni-experiments/*/environments/remote-worker2/trials/{name}")
            assert json.loads((folder / "result.json").read_text())["valid_perplexity"] == pytest.approx(final["default"])
        assert not list((tmp_path / "manager").glob("**/result.json"))  # nothing is shared
    finally:
        experiment.stop()
