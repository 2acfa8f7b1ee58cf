"""The bases of callbacks that a validation beside a fit does not concern, and of those that follow a fit's validated epochs."""

from __future__ import annotations

from fastai.callback.core import Callback


class FitOnly(Callback):
    """Sits out `Learner.validate` and `get_preds`, which run `before_fit` … `after_fit` too (and hold the Learner's lock meanwhile)."""

    def __call__(self, event_name):
        if event_name == "before_fit":
            self.run = True  # fastai (2.8) sets it back after `after_fit` only, which never comes where Ctrl-C ends a fit, `lr_find` or `validate`
        return super().__call__(event_name)

    def before_fit(self):
        if self.learn.lock.locked():
            self.run = False
        else:
            self.start_fit()

    def start_fit(self):
        """`before_fit` of a real fit."""


class ValidatedEpochs(FitOnly):
    """Knows in `after_epoch` whether the epoch was validated: one that `fit(start_epoch=…)` skips, or that somebody cancels, was not."""

    def before_fit(self):
        if not self.learn.lock.locked():
            self.validated = False
        super().before_fit()

    def after_validate(self):
        if self.learn.lock.locked():
            return  # `get_preds(inner=True)`, as in `FetchPredsCallback` and `Learner.summary`, is no validation
        # a cancelled validation, such as `lr_find`'s, comes to this event too
        self.validated = not self.learn.recorder.cancel_valid

    def newly_validated(self) -> bool:
        """Asked once after an epoch: whether it has a validation loss."""
        validated, self.validated = self.validated, False
        return validated
