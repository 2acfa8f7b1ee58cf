"""A run in a child process that is killed again and again, for the tests of going on. Run as a program: it imports once and forks for each attempt.

    python crashes.py FOLDER PHASE:SEED:KILLS:WHEN [PHASE:SEED:KILLS:WHEN …]

runs the phase once without interruption in FOLDER/PHASE-WHEN/whole, then in FOLDER/PHASE-WHEN/killed with KILLS SIGKILLs, and prints as a line of JSON how
many kills there were and how many of them fell between two files of a checkpoint. WHEN they fall: `anywhere`, or `in-write`, in the writing of a file.
"""

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

import nni_darts_rnn.files
import nni_darts_rnn.learner
import nni_darts_rnn.search
import nni_darts_rnn.trained
from nni_darts_rnn import pipeline
from nni_darts_rnn.checkpoints.store import Every, Keeping
from nni_darts_rnn.corpus import EOS, UNK, Corpus, Vocabulary
from nni_darts_rnn.genotype import Genotype
from nni_darts_rnn.recipes import get_recipe

CELL = Genotype((("tanh", 0), ("relu", 1), ("sigmoid", 0)))
RECIPE = get_recipe("tiny", {
    "search.hidden_size": 4, "search.n_nodes": 2, "search.batch_size": 4, "search.eval_batch_size": 2, "search.epochs": 3,
    "search.short_bptt_probability": 0.4, "search.warmup_epochs": 1, "search.anneal": 0.6, "retrain.hidden_size": 4, "retrain.batch_size": 4,
    "retrain.eval_batch_size": 3, "retrain.test_batch_size": 1, "retrain.epochs": 5, "retrain.lr": 20.0, "retrain.nonmono": 1, "retrain.anneal": 0.7,
    "retrain.short_bptt_probability": 0.4})


def corpus() -> Corpus:
    """A small text in which each word mostly follows the one before it in the alphabet."""
    draw = np.random.default_rng(0)
    tokens = (np.cumsum(draw.choice(3, 320, p=(0.1, 0.8, 0.1))) % 10).astype(np.int64)
    return Corpus("letters", Vocabulary((EOS, UNK, *"abcdefgh")), *torch.from_numpy(tokens).split((170, 80, 70)))


def phase(name: str, folder: Path, every: int = 1) -> None:
    """The phase, with its checkpoints left behind, so that a test can look into the last one."""
    keeping = Keeping(Every(steps=every))
    # pictures take longer than all the rest
    with patch.object(pipeline, "_draw"), patch.object(pipeline.Checkpoints, "clear"):
        if name == "search":
            pipeline.search_phase(corpus(), RECIPE.search, 3, folder, device="cpu", keeping=keeping)
        else:
            pipeline.retrain_phase(corpus(), CELL, RECIPE.retrain, 3, folder, device="cpu", keeping=keeping)


def in_child(work) -> int:
    """The process that does the work and ends."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return pid


def kill_in_write(countdown: int) -> None:
    """SIGKILL for this very process when it comes to its `countdown`-th write: before the data, in their middle, or before or after the new name."""
    left = [countdown]

    def here(original):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            done = original(*args, **kwargs)
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return done
        return call

    nni_darts_rnn.files._to_disk = here(nni_darts_rnn.files._to_disk)
    os.replace = here(os.replace)


def main(folder: str, *runs: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for run in runs:
        name, seed, kills, how = run.split(":")
        crash(name, Path(folder) / f"{name}-{how}", int(seed), int(kills), how)


def crash(name: str, folder: Path, seed: int, kills: int, how: str) -> None:
    draw = random.Random(seed)
    began = time.perf_counter()
    os.waitpid(in_child(lambda: phase(name, folder / "whole")), 0)
    whole = time.perf_counter() - began
    killed = torn = attempts = 0
    while True:
        attempts += 1
        last = killed >= kills

        def work():
            if how == "in-write" and not last:
                kill_in_write(draw.randint(1, 40))
            phase(name, folder / "killed")

        pid = in_child(work)
        draw.random()  # the child's draw is the child's
        if how != "in-write" and not last:
            time.sleep(draw.uniform(0.02, 0.6 * whole))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            killed += 1
            kept = folder / "killed" / "checkpoint"
            torn += any(path.name.startswith(".nni-darts-rnn-partial-") or not path.with_suffix(".json").exists() for path in kept.glob("*.safetensors")) or any(
                kept.glob(".nni-darts-rnn-partial-*"))
        elif os.WEXITSTATUS(status):
            sys.exit("a run that went on failed")
        elif last:
            break
        else:  # done before its kill came: once more from the beginning
            for path in sorted((folder / "killed").rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
    print(json.dumps({"killed": killed, "torn": torn, "attempts": attempts, "seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
