"""The base of callbacks that a validation does not concern."""

from __future__ import annotations

from fastai.callback.core import Callback


class FitOnly(Callback):
    """Sits out `Learner.validate` and `get_preds`, which run `before_fit` … `after_fit` too (and hold the Learner's lock meanwhile)."""

    def before_fit(self):
        if self.learn.lock.locked():
            self.run = False  # fastai sets it back after `after_fit`
        else:
            self.start_fit()

    def judged(self) -> bool:
        """After `after_validate`: whether the epoch has a validation loss. A cancelled validation, such as `lr_find`'s, comes to that event too."""
        return not self.learn.recorder.cancel_valid

    def start_fit(self):
        """`before_fit` of a real fit."""
