"""What a training step needs beyond fastai's own callbacks: AR/TAR, a learning rate for its place in the fit and its length, and a check for finite numbers."""

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
    """`RNNRegularizer` (`alpha`: AR, `beta`: TAR) that checks the number of time steps where fastai's checks the batch size, so a batch of one step gives no NaN."""

    def after_loss(self):
        if self.training:
            raw, dropped = self.rnn.raw_out.transpose(0, 1), self.rnn.out.transpose(0, 1)  # (T, B, H)
            self.learn.loss_grad = self.learn.loss_grad + activation_regularisation(raw, dropped, self.alpha, self.beta)


class AnnealLR(FitOnly):
    """Over the last `share` of the fit the learning rate falls to 0 along a cosine, as in `Learner.fit_flat_cos(pct_start=1 - share)`.

    Unlike there, the rate depends only on the epoch and on the number of the batch in it. So a fit that is resumed after any batch has the right rate,
    and a longer fit that resumes at the end of a shorter one begins at the full rate again.
    """

    order, run_valid = ParamScheduler.order, False

    def __init__(self, share: float):
        if not fraction("share", share, below=False):
            raise ValueError(f"share: {share!r} of a fit is none; leave AnnealLR out")
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
    """Trains a batch of T time steps with the learning rate × T/bptt. Schedulers and loggers see the rate without that factor."""

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

    after_cancel_train = after_cancel_epoch = after_cancel_batch  # a batch that is cancelled ends here


class FiniteNumbers(FitOnly):
    """Raises `NotFinite` in a step whose loss or gradient is NaN or infinite, before the weights move."""

    order, run_valid = GradientClip.order + 1, False

    def start_fit(self):
        if self.learn.opt is not None:
            self.learn.opt.zero_grad()  # gradients that a fit has left which ended within a step, by this callback or by Ctrl-C

    def before_step(self):
        check_finite(training_loss=self.learn.loss_grad, gradient_of_the_weights=[p.grad for p in self.model.parameters()])
