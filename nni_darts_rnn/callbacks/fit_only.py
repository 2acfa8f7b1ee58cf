"""Base classes of callbacks: those that take no part in a validation outside of a fit, and those that act on the validated epochs of a fit."""

from __future__ import annotations

from fastai.callback.core import Callback


class FitOnly(Callback):
    """Takes no part in `Learner.validate` and `get_preds`. These run `before_fit` … `after_fit` too, but hold the Learner's lock."""

    def __call__(self, event_name):
        if event_name == "before_fit":
            self.run = True  # fastai (2.8) resets it only after `after_fit`, which does not run where Ctrl-C ends a fit, `lr_find` or `validate`
        return super().__call__(event_name)

    def before_fit(self):
        if self.learn.lock.locked():
            self.run = False
        else:
            self.start_fit()

    def start_fit(self):
        """Called instead of `before_fit`, in a fit only."""


class ValidatedEpochs(FitOnly):
    """Knows in `after_epoch` whether the epoch was validated. One that `fit(start_epoch=…)` skips, or that is cancelled, was not."""

    def before_fit(self):
        if not self.learn.lock.locked():
            self.validated = False
        super().before_fit()

    def after_validate(self):
        if self.learn.lock.locked():
            return  # `get_preds(inner=True)`, as in `FetchPredsCallback` and `Learner.summary`, is no validation
        # this event also follows a cancelled validation, as in `lr_find`
        self.validated = not self.learn.recorder.cancel_valid

    def newly_validated(self) -> bool:
        """Whether the epoch that ends has a validation loss. To be asked once an epoch."""
        validated, self.validated = self.validated, False
        return validated
