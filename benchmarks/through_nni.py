"""A search through NNI's own strategy and Lightning's Trainer, one batch at a time: `search_step.py` lets it take turns with other versions."""

from __future__ import annotations

import logging
import threading
import warnings

import pytorch_lightning as pl
import torch
from nni.nas import strategy as nni_strategy

from nni_darts_rnn import fused, get_recipe, search_evaluator
from nni_darts_rnn.corpus import Corpus, Vocabulary
from nni_darts_rnn.search import make_space, make_strategy

STEPS = 40  # batches of random words; more than a comparison takes


class ThroughNNI(pl.Callback):
    """Call it for one step of the strategy, NNI's stock first-order `DARTS` or the package's second-order one, each on the package's space.

    Lightning's loop runs in a thread of its own and waits before every batch. What it does between two batches is not counted.
    """

    def __init__(self, size, first_order: bool, fast: bool):
        self.fast, self.go, self.done, self.finished = fast, threading.Semaphore(0), threading.Semaphore(0), False
        recipe = get_recipe("penn", {"search": {"hidden_size": size.H, "n_nodes": size.N, "batch_size": size.B, "eval_batch_size": size.B, "bptt": size.T,
                                                "short_bptt_probability": 0.0, "epochs": 1}}).search
        words = torch.randint(size.V, (size.B * (size.T * STEPS + 1),))
        few = words[:size.B * (size.T + 1)]
        corpus = Corpus("random words", Vocabulary(["<eos>", "<unk>", *(f"w{i}" for i in range(size.V - 2))]), words, few, few)
        strategy = nni_strategy.DARTS(gradient_clip_val=recipe.clip) if first_order else make_strategy(recipe)
        warnings.simplefilter("ignore")  # NNI's and Lightning's advice
        for name in ("nni", "pytorch_lightning.utilities.rank_zero"):
            logging.getLogger(name).setLevel(logging.ERROR)
        supernet = strategy.mutate_model(make_space(size.V, recipe))
        evaluator = search_evaluator(corpus, recipe, callbacks=[self], accelerator="cpu", enable_progress_bar=False)
        self.evaluator, self.supernet, threads = strategy.mutate_evaluator(evaluator), supernet, torch.get_num_threads()
        self.thread = threading.Thread(target=self._run, args=(threads,), daemon=True)
        self.thread.start()
        self._wait()

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)  # OpenMP counts them thread by thread
        try:
            self.evaluator.evaluate(self.supernet)
        finally:
            self.finished = True
            self.done.release()

    def _wait(self) -> None:
        self.done.acquire()
        if self.finished:
            raise RuntimeError(f"Lightning's loop ended, by an error that it has printed or after {STEPS} batches")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.done.release()  # set up, or the batch before this one is done
        self.go.acquire()

    def __call__(self, train, valid) -> None:
        fused.enable(self.fast)
        self.go.release()
        self._wait()
