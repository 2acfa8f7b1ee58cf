"""What a training step needs beside fastai's own callbacks: AR/TAR, the rate of its place in the fit and of its length, and that its numbers are finite."""

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
    """`RNNRegularizer` (`alpha`: AR, `beta`: TAR) that counts time steps where fastai's counts the batch, so a batch of one step gives no NaN."""

    def after_loss(self):
        if self.training:
            raw, dropped = self.rnn.raw_out.transpose(0, 1), self.rnn.out.transpose(0, 1)  # (T, B, H)
            self.learn.loss_grad = self.learn.loss_grad + activation_regularisation(raw, dropped, self.alpha, self.beta)


class AnnealLR(FitOnly):
    """Over the last `share` of the fit the learning rate falls to 0 along a cosine, as in `Learner.fit_flat_cos(pct_start=1 - share)`.

    Unlike that, the rate depends on nothing but the epoch and the batch's number in it, so a fit that goes on after any batch goes on with it, and a
    longer fit that goes on from the end of a shorter one begins at the full rate again.
    """

    order, run_valid = ParamScheduler.order, False

    def __init__(self, share: float):
        if not fraction("share", share, below=False):
            raise ValueError(f"share: {share!r} of a fit is none; leave AnnealLR out")
        self.share, self.full = share, []

    def start_fit(self):
        self.full, self.run = [], not hasattr(self.learn, "lr_finder")  # which sets rates of its own

    def before_batch(self):
        self.full = self.full or [hyper["lr"] for hyper in self.opt.hypers]
        skipped = already_trained(self.dls.train)
        done = (self.epoch + (skipped + self.iter) / (skipped + self.n_iter)) / self.n_epoch
        factor = annealed(done, self.share)
        self.opt.set_hyper("lr", [lr * factor for lr in self.full])


class ScaleLRByLength(Callback):
    """A batch of T steps is trained with the learning rate × T/bptt. Schedulers and loggers see the plain rate."""

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

    after_cancel_train = after_cancel_epoch = after_cancel_batch  # a batch that is left in its middle has no other end


class FiniteNumbers(FitOnly):
    """`NotFinite` in the step whose loss or gradient is NaN or infinite, before the weights take it."""

    order, run_valid = GradientClip.order + 1, False

    def start_fit(self):
        if self.learn.opt is not None:
            self.learn.opt.zero_grad()  # what a fit that was ended within a step, by this callback or by Ctrl-C, has left

    def before_step(self):
        check_finite(training_loss=self.learn.loss_grad, gradient_of_the_weights=[p.grad for p in self.model.parameters()])
