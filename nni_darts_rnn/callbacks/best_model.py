"""The best model of a fit, kept on disk during the fit."""

from __future__ import annotations

import errno

import torch
from fastai.callback.tracker import SaveModelCallback, TrackerCallback
from fastai.learner import save_model

from ..files import whole
from .fit_only import ValidatedEpochs


class BestModel(ValidatedEpochs, SaveModelCallback):
    """`SaveModelCallback` without its message. It loads tensors only. It never leaves a half-written file, and never loads a file that another fit left
    behind."""

    def __init__(self, monitor: str = "valid_loss", comp=None, min_delta: float = 0.0, fname: str = "best", with_opt: bool = False):
        super().__init__(monitor=monitor, comp=comp, min_delta=min_delta, fname=fname, with_opt=with_opt)

    def start_fit(self):
        self.last_saved_path = None
        TrackerCallback.before_fit(self)

    def after_epoch(self):
        if not self.newly_validated():
            return
        TrackerCallback.after_epoch(self)
        if self.new_best:
            self._save(self.fname)

    def _save(self, name):
        path = self.learn.path / self.learn.model_dir / f"{name}.pth"
        with whole(path) as temporary:
            try:
                save_model(temporary, self.learn.model, self.learn.opt, with_opt=self.with_opt)
            except RuntimeError as error:  # torch's error when the disk is full
                raise OSError(errno.ENOSPC, f"the best model cannot be written ({error})", str(path)) from None
        self.last_saved_path = path

    def after_fit(self):
        if self.last_saved_path is not None:
            self.learn.load(self.fname, with_opt=self.with_opt, weights_only=True)

    def state_dict(self) -> dict:
        """The state for resuming: the best value and, once there is one, the model that had it (without its optimizer)."""
        kept = None if self.last_saved_path is None else torch.load(self.last_saved_path, map_location="cpu", weights_only=True)
        return {"best": float(self.best), "model": kept["model"] if self.with_opt and kept else kept}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`. Call it after `before_fit`, which resets the best value. It writes the file anew."""
        self.best = state["best"]
        if state["model"] is not None:
            path = self.learn.path / self.learn.model_dir / f"{self.fname}.pth"
            with whole(path) as temporary:
                torch.save(state["model"], temporary)
            self.last_saved_path = path
