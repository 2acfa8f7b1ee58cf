"""Checkpoints of a search, written by a Lightning callback."""

from __future__ import annotations

import time

import pytorch_lightning as pl

from ..evaluator import SupernetReport, TaggedBatches
from ..genotype import Genotype
from ..health import check_finite
from .file import random_state, restore_random_state
from .stopping import StopRequest
from .store import Checkpoints


class SearchCheckpoints(pl.Callback):
    """Writes checkpoints from which a search can go on after any step, and lets it go on from one of them, `state`. It must come after `SupernetReport`.

    A checkpoint holds the supernet (weights, α, hidden states of both streams), both optimizers, every random generator, the position in the texts, and what
    `SupernetReport` has counted. Lightning's own checkpoints lack the random generators, and in the middle of an epoch their form differs between
    Lightning's versions.
    """

    def __init__(self, store: Checkpoints, report: SupernetReport, loaders: list[TaggedBatches], state: dict | None, stop: StopRequest):
        self.store, self.report, self.stop = store, report, stop
        self.state, self.rollbacks = state, state["rollbacks"] if state else 0
        self.epoch, self.batch = (state["epoch"], state["batch"]) if state else (0, 0)
        self.before, self.began = (state["seconds"] if state else 0.0), time.perf_counter()
        for loader in loaders:
            loader.start = (self.epoch, self.batch)

    @property
    def seconds(self) -> float:
        """The seconds of the search so far, all parts of a run that was stopped and resumed together."""
        return self.before + time.perf_counter() - self.began

    def on_fit_start(self, trainer, pl_module):
        if self.state is not None:  # before Lightning asks the loaders for the epoch's length
            progress = trainer.fit_loop.epoch_progress.current
            progress.ready = progress.started = progress.processed = progress.completed = self.epoch
            self.report.rows, self.report.alphas = list(self.state["rows"]), list(self.state["alphas"])
            self.report.genotype = Genotype.from_json(self.state["genotype"])

    def on_train_start(self, trainer, pl_module):
        if self.state is None:
            self._save(trainer, pl_module, 0, 0)
            return
        pl_module.load_state_dict(self.state["model"])
        for optimizer, kept in zip(trainer.optimizers, self.state["optimizers"]):
            optimizer.load_state_dict(kept)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.state is not None:  # the first batch after resuming; the epoch's beginning has set hidden states and counts to zero
            if self.batch:
                pl_module.load_state_dict(self.state["model"])
                self.report.counts.go_on(**self.state["in_epoch"])
            restore_random_state(self.state["random"])
            self.state = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.is_last_batch:
            return  # `on_train_epoch_end` saves at once
        done = batch_idx + 1 + (self.batch if trainer.current_epoch == self.epoch else 0)
        if self.store.due() or self.stop.signum is not None:
            self._save(trainer, pl_module, trainer.current_epoch, done, self.report.counts.state())
        self.stop.obey()

    def on_train_epoch_end(self, trainer, pl_module):
        self._save(trainer, pl_module, trainer.current_epoch + 1, 0)
        self.stop.obey()

    def _save(self, trainer, pl_module, epoch: int, batch: int, in_epoch: dict | None = None) -> None:
        check_finite(weights_and_α=list(pl_module.parameters()))  # a rollback must find good weights and α
        self.store.save(epoch, batch, {
            "model": pl_module.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "random": random_state(), "rows": self.report.rows, "alphas": self.report.alphas,
            "genotype": self.report.genotype.to_json(), "in_epoch": in_epoch, "rollbacks": self.rollbacks, "seconds": self.seconds})
