"""A search of a few batches through an NNI strategy and Lightning's Trainer, for `search_step.py`, where it takes turns with other versions."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings

import pytorch_lightning as pl
import torch
from hardware import on_gpu
from nni.nas import strategy as nni_strategy

from nni_darts_rnn import fused, get_recipe, search_evaluator
from nni_darts_rnn.corpus import Corpus, Vocabulary
from nni_darts_rnn.search import make_space, make_strategy

STEPS = 2  # batches in each call
QUIET = ("nni", "pytorch_lightning.utilities.rank_zero", "nni_darts_rnn.evaluator")  # loggers that show only errors here


class ThroughNNI:
    """A call runs a short search on the package's space and returns the seconds of its fastest step.

    `first_order` takes NNI's stock first-order `DARTS`, else the package's second-order strategy. `fast` takes the compiled cell, else the readable one.

    Every call is a search of its own, in the caller's thread. OpenMP keeps a team of threads for each thread that calls it. If the teams together have more
    threads than the machine has cores, they stop spinning between operations, and small operations become two to three times slower.
    """

    def __init__(self, size, first_order: bool, fast: bool):
        self.size, self.first_order, self.fast = size, first_order, fast
        self.recipe = get_recipe("penn", {"search": {"hidden_size": size.H, "n_nodes": size.N, "batch_size": size.B, "eval_batch_size": size.B,
                                                     "bptt": size.T, "short_bptt_probability": 0.0, "epochs": 1,
                                                     "lr": 1.0}}).search  # at the paper's 20, a search on random words may diverge and be given up
        words = torch.randint(size.V, (size.B * (size.T * STEPS + 1),), device="cpu")
        few = words[:size.B * (size.T + 1)]
        self.corpus = Corpus("random words", Vocabulary(["<eos>", "<unk>", *(f"w{i}" for i in range(size.V - 2))]), words, few, few)
        warnings.simplefilter("ignore")  # advice of NNI and Lightning
        for name in QUIET:
            logging.getLogger(name).setLevel(logging.ERROR)

    def __call__(self, train, valid) -> float:
        fused.enable(self.fast)
        strategy = nni_strategy.DARTS(gradient_clip_val=self.recipe.clip) if self.first_order else make_strategy(self.recipe)
        accelerator = "gpu" if on_gpu() else "cpu"
        with torch.device("cpu"), contextlib.nullcontext() if self.fast else fused.reference():  # Lightning moves model and batches
            supernet, clock = strategy.mutate_model(make_space(self.size.V, self.recipe)), Clock(accelerator)
            evaluator = search_evaluator(self.corpus, self.recipe, callbacks=[clock], accelerator=accelerator, enable_progress_bar=False)
            strategy.mutate_evaluator(evaluator).evaluate(supernet)
        return min(clock.seconds)


class Clock(pl.Callback):
    """Keeps the seconds of each step, without what Lightning does between two steps."""

    def __init__(self, accelerator: str):
        self.seconds, self.wait = [], torch.cuda.synchronize if accelerator == "gpu" else lambda: None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.wait()
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.wait()
        self.seconds.append(time.perf_counter() - self.began)
