"""What a training step needs beside fastai's own callbacks: AR/TAR, the rate of a batch's length, and that its numbers are finite."""

from __future__ import annotations

from fastai.callback.core import Callback
from fastai.callback.rnn import RNNRegularizer
from fastai.callback.schedule import ParamScheduler
from fastai.callback.training import GradientClip

from ..health import check_finite
from ..model import activation_regularisation
from .fit_only import FitOnly


class ActivationRegularizer(RNNRegularizer):
    """`RNNRegularizer` (`alpha`: AR, `beta`: TAR) that counts time steps where fastai's counts the batch, so a batch of one step gives no NaN."""

    def after_loss(self):
        if self.training:
            raw, dropped = self.rnn.raw_out.transpose(0, 1), self.rnn.out.transpose(0, 1)  # (T, B, H)
            self.learn.loss_grad = self.learn.loss_grad + activation_regularisation(raw, dropped, self.alpha, self.beta)


class ScaleLRByLength(Callback):
    """A batch of T steps is trained with the learning rate × T/bptt. Schedulers and loggers see the plain rate."""

    order, run_valid = ParamScheduler.order + 1, False

    def __init__(self, bptt: int):
        self.bptt, self.plain = bptt, None

    def before_batch(self):
        self.plain = [hyper["lr"] for hyper in self.opt.hypers]
        self.opt.set_hyper("lr", [lr * self.xb[0].shape[1] / self.bptt for lr in self.plain])

    def after_step(self):
        if self.plain is not None:
            self.opt.set_hyper("lr", self.plain)
            self.plain = None

    def after_cancel_batch(self):
        self.after_step()


class FiniteNumbers(FitOnly):
    """`NotFinite` in the step whose loss or gradient is NaN or infinite, before the weights take it."""

    order, run_valid = GradientClip.order + 1, False

    def before_step(self):
        check_finite(training_loss=self.learn.loss_grad, gradient_of_the_weights=[p.grad for p in self.model.parameters()])
