"""What the commands say: on what they work and what they found to people, on standard error; nothing but JSON to machines."""

import argparse
import errno
import io
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import SMALL, place, status  # noqa: F401 (place is a fixture)

from nni_darts_rnn import cli, epoch_counts
from nni_darts_rnn.talk import Talk


@pytest.fixture
def corpus(place):  # noqa: F811
    return ["--corpus", str(place.parent / "corpus"), *SMALL]


def test_each_phase_says_on_what_it_works_and_the_next_command_works(corpus, capsys, monkeypatch):
    monkeypatch.setattr(epoch_counts, "LOOK", 0.0)
    assert status(cli.main, "search", *corpus, "--out", "found") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["recurrent"]
    for words in (r"corpus corpus: 280 training, 112 validation, 112 test tokens; 8 words", r"searching 2 nodes of 8 units for 1 epoch, recipe tiny, seed 0",
                  r"584 parameters and α on the CPU, \d+ threads?", "results in found", r"search: about \d+ s to go, for 1 epoch in all",
                  r"search epoch 1: validation perplexity [\d.]+, [\d,]+ tokens/s\n",
                  r"found \[.*\] in \d+ s", "next: nni-darts-rnn retrain"):
        assert re.search(words, said.err), words
    follow = said.err.splitlines()[-1].removeprefix("next: nni-darts-rnn ").split()
    assert status(cli.main, *follow, "--out", "trained") == 0
    said = capsys.readouterr()
    assert re.search(r"retrain: about \d+ s to go, for 1 epoch in all", said.err)
    assert "a retraining has no search" not in said.err
    parameters = re.search(r"; ([\d,]+) parameters on the CPU", said.err).group(1)
    assert f"{parameters} parameters; of the same test text: unigram" in said.out  # what it said before is what it trained
    follow = said.err.splitlines()[-1].removeprefix("next: nni-darts-rnn ").split()
    assert follow[0] == "evaluate" and status(cli.main, *follow) == 0
    said = capsys.readouterr()
    assert said.out.startswith("test perplexity ") and "next: " not in said.err  # its pictures have been drawn
    Path("trained", "cell.svg").unlink()
    assert status(cli.main, *follow) == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith("next: nni-darts-rnn plot trained")
    assert status(cli.main, "plot", "found") == 0  # which does not know the text that it was found on
    assert capsys.readouterr().err.splitlines()[-1] == "next: nni-darts-rnn retrain --corpus FOLDER --genotype found"
    assert status(cli.main, "retrain", *corpus, "--genotype", "ENAS", "--out", "other") == 0
    assert "a retraining has no search: without effect here: search.batch_size, search.eval_batch_size, search.n_nodes\n" in capsys.readouterr().err


def test_an_epoch_says_how_long_those_after_it_take(capsys):
    talk = Talk(argparse.Namespace(json=False))
    talk.epochs = 5
    for epoch in (2, 4, 5):
        talk.epoch({"phase": "retrain", "epoch": epoch, "default": 81.234, "seconds": 50.0})
    start = "retrain epoch {}: validation perplexity 81.23"
    assert capsys.readouterr().err.splitlines() == [start.format(2) + ", about 2 min left", start.format(4) + ", about 50 s left", start.format(5)]


def test_machines_get_one_line_of_json_and_no_other_word(corpus, place):  # noqa: F811
    for command in (["search", *corpus, "--out", "found"], ["plot", "found"]):  # the one that imports every host, and a light one
        done = subprocess.run([sys.executable, "-m", "nni_darts_rnn.cli", *command, "--json"], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0 and not done.stderr, done.stderr  # the hosts' warnings that mean nothing are silent too
        (line,) = done.stdout.splitlines()
        assert json.loads(line)["next"].startswith("nni-darts-rnn ")


def test_a_note_that_cannot_be_written_costs_nothing_else(corpus, monkeypatch):
    """Standard error goes into a file at times, and that file's disk may be full."""
    assert status(cli.main, "search", *corpus, "--out", "found") == 0  # from here on notes are told

    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    logging.getLogger("nni_darts_rnn.checkpoints.store").warning("no checkpoint was written")
