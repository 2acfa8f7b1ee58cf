"""Checkpoints of a retraining, written by a fastai callback; and a Learner whose `fit` can begin in the middle."""

from __future__ import annotations

import contextlib
import time

import torch
from fastai.callback.core import Callback
from fastai.learner import CancelEpochException, Learner

from ..callbacks import NTASGD, BestModel, EpochReport
from ..epoch_counts import perplexity_of
from ..fastai_streams import StreamLoader
from ..health import check_epoch, check_finite
from .file import random_state, restore_random_state
from .stopping import StopRequest
from .store import Checkpoints


class ResumableLearner(Learner):
    """A Learner whose `fit` can begin at `first_epoch`. fastai's `fit(start_epoch=…)` also runs the callbacks of the epochs before it.

    Before every epoch, `fit` calls `converged`; once that returns True, it ends normally.
    """

    first_epoch = 0
    patience: int | None = None

    @property
    def _averaging(self) -> NTASGD | None:
        return next((cb for cb in self.cbs if isinstance(cb, NTASGD)), None)

    def converged(self) -> bool:
        averaging = self._averaging
        return self.patience is not None and averaging is not None and averaging.since_best() >= self.patience

    def load(self, *args, **kwargs):
        """fastai's `load`. The file may also be from the other side of NT-ASGD's switch from SGD to ASGD; the optimizer is then changed to fit it."""
        super().load(*args, **kwargs)
        averaging = self._averaging
        if averaging is not None:
            averaging.kept = None  # left by an interrupted validation; the loaded weights replace them
        torch_optimizer = getattr(self.opt, "opt", None)
        if isinstance(torch_optimizer, (torch.optim.SGD, torch.optim.ASGD)):
            averages = "lambd" in torch_optimizer.param_groups[0]
            if averages != isinstance(torch_optimizer, torch.optim.ASGD):
                state = self.opt.state_dict()
                self.create_opt()
                if averages:
                    assert averaging is not None, "a file with averages, for a Learner without NTASGD"
                    averaging.start_averaging()
                self.opt.load_state_dict(state)
        return self

    def export(self, *args, **kwargs):
        """fastai's `export`. Whether it succeeds or not, this Learner keeps its optimizer and its text."""
        optimizer, dls = self.opt, self.dls
        try:
            super().export(*args, **kwargs)
        finally:
            self.opt, self.dls = optimizer, dls

    @contextlib.contextmanager
    def _text_as_it_was(self):
        """Keep the training text at its epoch. A whole pass over the text normally moves it to the next epoch's batch lengths; a pass that trains nothing
        must not."""
        train = self.dls.train
        epoch = train.dataset.epoch if isinstance(train, StreamLoader) else None
        try:
            yield
        finally:
            if epoch is not None:
                train.set_epoch(epoch)

    def _do_epoch_validate(self, *args, **kwargs):
        with self._text_as_it_was():
            super()._do_epoch_validate(*args, **kwargs)

    def _do_fit(self):
        with self._text_as_it_was() if hasattr(self, "lr_finder") else contextlib.nullcontext():
            self._epochs()

    def _epochs(self):
        first, self.first_epoch = self.first_epoch, 0  # 0 again for the next `fit`
        for epoch in range(first, self.n_epoch):
            if self.converged():  # before the epoch, so that a fit that stopped after its last epoch ends there when resumed
                break
            self.epoch = epoch
            self._with_events(self._do_epoch, "epoch", CancelEpochException)


class RetrainCheckpoints(Callback):
    """Writes checkpoints from which a retraining can go on after any step, and lets it go on from one of them, `state`.

    A checkpoint holds the weights, the hidden state, the optimizer's state (Adam's, or the averages once NT-ASGD averages), the best model so far, every
    random generator, the position in the text, and what `EpochReport` and fastai's Recorder have counted. The Learner must be a `ResumableLearner`, and its
    training loader a `StreamLoader`. After each epoch fastai's lists of every step's rate and loss are emptied, so that a run of days does not fill the
    memory.
    """

    order, run_valid = 100, False  # after all callbacks that change the state

    def __init__(self, store: Checkpoints, state: dict | None, stop: StopRequest, vocab_size: int):
        self.store, self.state, self.stop, self.vocab_size = store, state, stop, vocab_size
        self.rollbacks = state["rollbacks"] if state else 0
        self.first = (state["epoch"], state["batch"]) if state else (0, 0)
        self.past, self.began = (state["seconds"] if state else 0.0), time.perf_counter()

    @property
    def seconds(self) -> float:
        """The seconds of training so far, all parts of a run that was stopped and resumed together."""
        return self.past + time.perf_counter() - self.began

    def _cb(self, kind):
        return next(cb for cb in self.learn.cbs if isinstance(cb, kind))

    def before_fit(self):
        if self.state is None:
            self._save(0, 0)
            return
        state, rate = self.state, self.opt.hypers[-1]["lr"]
        self.learn.first_epoch = self.first[0]
        self.learn.train_iter = state["train_iter"]
        self.model.load_state_dict(state["model"])
        self._cb(NTASGD).load_state_dict(state["averaging"])
        if state["optimizer"] is not None:
            self.opt.opt.load_state_dict(state["optimizer"])
        self.opt.set_hyper("lr", rate)  # after a rollback it is smaller than the checkpoint's
        self._cb(BestModel).load_state_dict(state["best"])
        self._cb(EpochReport).rows = list(state["rows"])
        self.recorder.values = [list(values) for values in state["values"]]
        self.recorder.smooth_loss.count, self.recorder.smooth_loss.val = state["smooth_loss"]
        self.dls.train.go_on(*self.first)

    def before_train(self):
        if self.state is not None and self.first[1]:  # in the middle of an epoch; its beginning has set these to zero
            self.model.hidden = self.state["hidden"].to(self.model.hidden.device)
            self._cb(EpochReport).counts.go_on(**self.state["in_epoch"])

    def before_batch(self):
        if self.state is not None:
            restore_random_state(self.state["random"])
            self.state = None

    def after_batch(self):
        if self.iter + 1 == self.n_iter:
            return  # `after_epoch` saves soon
        if self.store.due() or self.stop.signum is not None:
            done = self.iter + 1 + (self.first[1] if self.epoch == self.first[0] else 0)
            self._save(self.epoch, done, self._cb(EpochReport).counts.state())
        self.stop.obey()

    def after_validate(self):
        if self.learn.lock.locked():
            return  # inside `Learner.validate`
        valid_loss = float(self.recorder.log[list(self.recorder.metric_names).index("valid_loss")])
        check_epoch(self._cb(EpochReport).row["train_perplexity"], self.vocab_size, "training")
        check_epoch(perplexity_of(valid_loss), self.vocab_size, "validation")

    def after_epoch(self):
        if self.learn.lock.locked():
            return
        self.recorder.lrs, self.recorder.losses = [], []
        self._save(self.epoch + 1, 0)
        self.stop.obey()

    def _save(self, epoch: int, batch: int, in_epoch: dict | None = None) -> None:
        check_finite(weights=list(self.model.parameters()))  # a rollback must find good weights
        smooth, averaging = self.recorder.smooth_loss, self._cb(NTASGD)
        self.store.save(epoch, batch, {
            "model": self.model.state_dict(), "hidden": self.model.hidden, "averaging": averaging.state_dict(),
            "optimizer": None if averaging.averaging else self.opt.opt.state_dict(),  # while averaging, it is in `averaging`
            "best": self._cb(BestModel).state_dict(), "random": random_state(), "rows": self._cb(EpochReport).rows,
            "values": [list(values) for values in self.recorder.values], "smooth_loss": (smooth.count, smooth.val),
            "train_iter": self.learn.train_iter, "in_epoch": in_epoch, "rollbacks": self.rollbacks, "seconds": self.seconds})
