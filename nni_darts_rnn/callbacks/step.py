"""Callbacks of a training step beside fastai's own: AR/TAR, a learning rate that depends on the place in the fit and on the length, a check for NaN."""

from __future__ import annotations

from fastai.callback.core import Callback
from fastai.callback.rnn import RNNRegularizer
from fastai.callback.schedule import ParamScheduler
from fastai.callback.training import GradientClip

from ..checks import fraction, whole_number
from ..fastai_streams import already_trained
from ..health import check_finite
from ..model import activation_regularisation
from ..recipes import annealed
from .fit_only import FitOnly


class ActivationRegularizer(RNNRegularizer):
    """`RNNRegularizer` (`alpha`: AR, `beta`: TAR) that leaves out TAR for a batch of one time step. fastai's (2.8) leaves it out for a batch of one sequence,
    and gives NaN for one time step."""

    def after_loss(self):
        if self.training:
            raw, dropped = self.rnn.raw_out.transpose(0, 1), self.rnn.out.transpose(0, 1)  # (T, B, H)
            self.learn.loss_grad = self.learn.loss_grad + activation_regularisation(raw, dropped, self.alpha, self.beta)


class AnnealLR(FitOnly):
    """Lets the learning rate fall to 0 along a cosine over the last `share` of the fit, as `Learner.fit_flat_cos(pct_start=1 - share)` does.

    Unlike there, the rate follows from the epoch, the batch's number in it, and the number of epochs alone. So a fit that is resumed after any batch continues
    with the same rate. A longer fit that continues a finished shorter one begins with the full rate again.
    """

    order, run_valid = ParamScheduler.order, False

    def __init__(self, share: float):
        if not fraction("share", share, below=False):
            raise ValueError(f"share: {share!r} must be above 0; for a constant learning rate leave AnnealLR out")
        self.share, self.full = share, []

    def start_fit(self):
        self.full, self.run = [], not hasattr(self.learn, "lr_finder")  # `lr_find` sets rates of its own

    def before_batch(self):
        self.full = self.full or [hyper["lr"] for hyper in self.opt.hypers]
        skipped = already_trained(self.dls.train)
        done = (self.epoch + (skipped + self.iter) / (skipped + self.n_iter)) / self.n_epoch
        factor = annealed(done, self.share)
        self.opt.set_hyper("lr", [lr * factor for lr in self.full])


class ScaleLRByLength(Callback):
    """Trains a batch of T time steps with the learning rate × T/bptt. Schedulers and loggers see the rate without this factor."""

    order, run_valid = ParamScheduler.order + 1, False

    def __init__(self, bptt: int):
        self.bptt, self.plain = whole_number("bptt", bptt), None

    def before_batch(self):
        self.plain = [hyper["lr"] for hyper in self.opt.hypers]
        self.opt.set_hyper("lr", [lr * self.xb[0].shape[1] / self.bptt for lr in self.plain])

    def after_step(self):
        if self.plain is not None:
            self.opt.set_hyper("lr", self.plain)
            self.plain = None

    def after_cancel_batch(self):
        self.after_step()

    after_cancel_train = after_cancel_epoch = after_cancel_batch  # if these cancel a batch midway, no event of the batch follows


class FiniteNumbers(FitOnly):
    """Raises `NotFinite` in a step whose loss or gradient is NaN or infinite, before the weights take the step."""

    order, run_valid = GradientClip.order + 1, False

    def start_fit(self):
        if self.learn.opt is not None:
            self.learn.opt.zero_grad()  # gradients of a fit that ended within a step, by this callback or by Ctrl-C

    def before_step(self):
        check_finite(training_loss=self.learn.loss_grad, gradient_of_the_weights=[p.grad for p in self.model.parameters()])
