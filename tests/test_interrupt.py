"""Ctrl-C at the terminal: exit status 130, and what was finished is kept and usable."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nni_darts_rnn.genotype import load_genotype

SMALL = ["--recipe", "tiny", "--threads", "1", "--set", "search.batch_size=64", "--set", "search.bptt=64", "--set", "search.epochs=500",
         "--set", "retrain.bptt=64", "--set", "retrain.epochs=500"]


def interrupt_after(command: list[str], file: Path, lines: int) -> subprocess.CompletedProcess:
    """Runs the command, sends it SIGINT once `file` has that many lines, and waits for its end."""
    process = subprocess.Popen([sys.executable, "-m", "nni_darts_rnn.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONWARNINGS": "ignore"},
                               # as a terminal starts it: a script that runs in the background hands down an ignored SIGINT
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if file.is_file() and len(file.read_text().splitlines()) > lines:
            break
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.parametrize("command, table", [(["search"], "search.csv"), (["retrain", "--genotype", "DARTS_V2"], "retrain.csv")])
def test_ctrl_c(tmp_path, command, table):
    out = tmp_path / "out"
    done = interrupt_after([*command, *SMALL, "--out", str(out)], out / table, 2)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr and "interrupted" in done.stderr
    assert len((out / table).read_text().splitlines()) >= 3
    if command[0] == "search":
        assert load_genotype(out / "genotype.json").n_nodes == 3
        assert len(json.loads((out / "alpha.json").read_text())["alpha"]) >= 2
    else:
        from nni_darts_rnn.trained import load_trained

        assert load_trained(out)[0].rnn.genotype == load_genotype("DARTS_V2")
