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
from texts import write_texts

from nni_darts_rnn.corpus import load_corpus
from nni_darts_rnn.genotype import load_genotype

SMALL = ["--recipe", "tiny", "--threads", "1", "--set", "search.batch_size=64", "--set", "search.bptt=64", "--set", "search.epochs=500",
         "--set", "retrain.bptt=64", "--set", "retrain.epochs=500"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
    """The option for the first lines of Python's documentation: an epoch of all of them takes as long as the imports."""
    return ["--corpus", str(write_texts(tmp_path_factory.mktemp("corpus"), load_corpus("pydoc"), train=10000, valid=2000, test=2000))]


def interrupt_after(command: list[str], file: Path, lines: int, module="cli", signum=signal.SIGINT) -> subprocess.CompletedProcess:
    """Runs the command, sends it the signal once `file` has that many lines, and waits for its end."""
    process = subprocess.Popen([sys.executable, "-m", f"nni_darts_rnn.{module}", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONWARNINGS": "ignore", "NNI_OUTPUT_DIR": str(file.parent)},
                               # as a terminal starts it: a script that runs in the background hands down an ignored SIGINT
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if file.is_file() and len(file.read_text().splitlines()) > lines:
            break
        time.sleep(0.2)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.parametrize("command, table", [(["search"], "search.csv"), (["retrain", "--genotype", "DARTS_V2"], "retrain.csv")])
def test_ctrl_c(tmp_path, corpus, command, table):
    out = tmp_path / "out"
    done = interrupt_after([*command, *corpus, *SMALL, "--out", str(out)], out / table, 2)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr and "interrupted" in done.stderr
    assert len((out / table).read_text().splitlines()) >= 3
    if command[0] == "search":
        assert load_genotype(out / "genotype.json").n_nodes == 3
        assert len(json.loads((out / "alpha.json").read_text())["alpha"]) >= 2
    else:
        from nni_darts_rnn.trained import load_trained

        assert load_trained(out)[0].rnn.genotype == load_genotype("DARTS_V2")
        left = json.loads((out / "model.json").read_text())["extra"]["result"]
        assert f"the best model of {left['epochs']} epochs is in {out}: test perplexity {left['test_perplexity']:.2f}" in done.stderr


def test_an_interrupt_that_an_import_swallowed_stops_the_run(tmp_path, monkeypatch, capsys):
    """As a bare `except:` about an import of fastai's does. The search would take 500 epochs."""
    from nni_darts_rnn import cli, pipeline

    swallowed, real = [], pipeline.check_fits

    def importing(*args):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except:  # noqa: E722
            swallowed.append(True)
        return real(*args)

    monkeypatch.setattr(pipeline, "check_fits", importing)
    monkeypatch.chdir(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.main(["search", *SMALL, "--set", "search.batch_size=32", "--set", "search.bptt=8", "--out", "out"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert swallowed and "interrupted" in capsys.readouterr().err and len((tmp_path / "out" / "search.csv").read_text().splitlines()) == 2  # the untrained supernet's


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_trial_that_is_stopped_ends_by_the_signal(tmp_path, corpus, signum):
    """NNI lists it as stopped then; whatever ends with a status of its own has failed for NNI."""
    done = interrupt_after([*corpus, *SMALL], tmp_path / "search.csv", 2, "trial", signum)
    assert done.returncode == -signum, done.stderr
    assert done.stderr.splitlines()[-1].startswith("stopped; the trial goes on from its checkpoint") and list(tmp_path.glob("checkpoint/search-*.json"))
