"""The real nnictl and a running experiment of it, for the tests that need one."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Experiment:
    """A running NNI experiment, asked through its REST API."""

    def __init__(self, config: Path, folder: Path, cwd: Path, bin_folder: Path = Path(sys.executable).parent):
        # NNI keeps everything below the home folder; python3 in the trial command has to be that of `bin_folder`
        self.nnictl = bin_folder / "nnictl"
        self.env = os.environ | {"HOME": str(folder), "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
        for attempt in range(3):  # nnictl at times asks its server before that listens
            self.port = free_port()
            done = subprocess.run([self.nnictl, "create", "--config", config, "--port", str(self.port)], cwd=cwd, env=self.env, capture_output=True,
                                  text=True, timeout=120)
            found = re.search(r"Experiment ID: \S*?([a-z0-9]{8})\b", re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr))
            if done.returncode == 0 and found and self.running():
                break
        else:
            raise AssertionError(done.stdout + done.stderr)
        self.id = found.group(1)

    def running(self, seconds: float = 30) -> bool:
        """Whether the tuner has come: on a busy machine it may need the 10 seconds after which the manager of NNI 3.0 ends an experiment."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if self.get("check-status")["status"] != "INITIALIZED":
                    return True
            except (urllib.error.URLError, ConnectionError):
                pass
            time.sleep(0.2)
        return False

    def get(self, what: str):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/nni/{what}", timeout=20) as answer:
            return json.load(answer)

    def wait(self, seconds: float) -> list[dict]:
        """The trials, once the experiment is done."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if self.get("check-status")["status"] in ("DONE", "ERROR"):
                    break
            except (urllib.error.URLError, ConnectionError):
                pass
            time.sleep(1)
        assert self.get("check-status")["status"] == "DONE"
        return self.get("trial-jobs")

    def resume(self) -> None:
        """After `stop`, on another port."""
        for attempt in range(3):  # as in `create`
            self.port = free_port()
            subprocess.run([self.nnictl, "resume", self.id, "--port", str(self.port)], env=self.env, capture_output=True, timeout=120)
            if self.running():
                return
            self.stop()
        raise AssertionError(f"{self.id} was not resumed")

    def stop(self) -> None:
        subprocess.run([self.nnictl, "stop", self.id], env=self.env, capture_output=True, timeout=60)
