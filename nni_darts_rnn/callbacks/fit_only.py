"""Base classes of callbacks: one for those that take part in fits alone, and one for those that act on the epochs that a fit has validated."""

from __future__ import annotations

from fastai.callback.core import Callback


class FitOnly(Callback):
    """A callback that does not run in `Learner.validate` and `get_preds`. These send `before_fit` … `after_fit` too, and hold the Learner's lock meanwhile."""

    def __call__(self, event_name):
        if event_name == "before_fit":
            self.run = True  # fastai (2.8) resets it only after `after_fit`, which never comes if Ctrl-C ends a fit, `lr_find` or `validate`
        return super().__call__(event_name)

    def before_fit(self):
        if self.learn.lock.locked():
            self.run = False
        else:
            self.start_fit()

    def start_fit(self):
        """Called in place of `before_fit`, in a real fit alone."""


class ValidatedEpochs(FitOnly):
    """Knows in `after_epoch` whether the epoch was validated. An epoch that `fit(start_epoch=…)` skips, or that is cancelled, was not."""

    def before_fit(self):
        if not self.learn.lock.locked():
            self.validated = False
        super().before_fit()

    def after_validate(self):
        if self.learn.lock.locked():
            return  # `get_preds(inner=True)`, as in `FetchPredsCallback` and `Learner.summary`: not a validation of the fit
        # a cancelled validation, such as that of `lr_find`, sends this event too
        self.validated = not self.learn.recorder.cancel_valid

    def newly_validated(self) -> bool:
        """Whether the epoch that has just ended has a validation loss. To be asked once an epoch: it then forgets the answer."""
        validated, self.validated = self.validated, False
        return validated
