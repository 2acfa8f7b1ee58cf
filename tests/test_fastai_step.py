"""Whether the step that a fastai fit takes is the one that α's gradient unrolled: callbacks may change or cancel it, and are then noticed."""

from functools import partial

import pytest
import torch
from fastai.callback.core import Callback, CancelBatchException, CancelStepException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from test_callbacks import run
from torch import nn

from nni_darts_rnn.callbacks import ArchParamUpdate, weight_parameters
from nni_darts_rnn.taken_step import UnrolledStep


class Mixed(nn.Module):
    """Two layers, mixed by `alpha`; the second one's share is in `beta.alpha` too."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.beta = nn.Linear(3, 2), nn.Linear(3, 2), nn.Module()
        self.alpha, self.beta.alpha = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))

    def forward(self, x):  # (B, 3) -> (B, 2)
        p = self.alpha.softmax(0)
        return p[0] * self.first(x).tanh() + p[1] * self.beta.alpha.exp() * self.second(x)


def mixed(cbs=(), valid=None, model=None, n=16, **settings) -> Learner:
    torch.manual_seed(0)
    pairs = [(torch.randn(3), torch.randn(2)) for _ in range(2 * n)]
    train = DataLoader(pairs[:n], bs=4)
    update = ArchParamUpdate(DataLoader(pairs[n:], bs=4) if valid is None else valid, **settings)
    return Learner(DataLoaders(train, DataLoader(pairs[n:], bs=4)), Mixed() if model is None else model, nn.MSELoss(), opt_func=partial(OptimWrapper, opt=torch.optim.SGD), lr=0.3,
                   splitter=weight_parameters, cbs=[update, *cbs])


class At(Callback):
    """Does `what(callback)` at one event of the training."""

    run_valid = False

    def __init__(self, event, what, order=0):
        self.order = order
        setattr(self, event, lambda: what(self))


def halve(cb):
    for p in weight_parameters(cb.model):
        if p.grad is not None:
            p.grad.mul_(0.5)


def penalise(cb):
    cb.learn.loss_grad = cb.learn.loss_grad + cb.learn.pred.square().mean()


def faster(cb):
    cb.learn.opt.set_hyper("lr", 0.6)


CHANGES = {
    "gradients, before the step, first": (At("before_step", halve), "the gradients are no longer those"),
    "gradients, before the step, last": (At("before_step", halve, 70), "the gradients are no longer those"),
    "gradients, after the backward pass": (At("after_backward", halve, 63), "the gradients are no longer those"),
    "gradients, before α's turn": (At("after_backward", halve), "loss_func of the model on this batch, run again, has other gradients"),
    "rate": (At("before_step", faster), r"lr: 0\.6 in the weights' step, but 0\.3"),
    "loss": (At("after_loss", penalise), "loss_func of the model on this batch, run again, has other gradients"),
}


@pytest.mark.parametrize("own_gradient", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_a_callback_that_changes_the_step_is_refused(name, own_gradient):
    callback, words = CHANGES[name]
    with pytest.raises(ValueError, match=words):
        run(mixed([callback], own_gradient=own_gradient))
    run(mixed([callback], hvp="first_order"))


@pytest.mark.parametrize("own_gradient", [False, True])
@pytest.mark.parametrize("cbs", [[], [GradientClip(0.1)], [GradientClip(100.0)], [At("before_batch", faster)]], ids=["nothing", "clipped", "not clipped", "rate before the batch"])
def test_a_step_that_is_unrolled_as_it_is_taken_is_not(cbs, own_gradient):
    learn = run(mixed(cbs, own_gradient=own_gradient), 2)
    assert not torch.equal(learn.model.alpha, torch.zeros(2)) and learn.arch_param_update.hook is None
    assert not learn.opt.opt._optimizer_step_pre_hooks


def test_alpha_waits_for_a_step_that_may_be_cancelled():
    moves, alphas = [], []

    def every_second(cb):
        alphas.append(cb.model.alpha.detach().clone())
        if cb.iter % 2:
            raise CancelStepException

    learn = run(mixed([At("before_step", every_second)]))
    alphas.append(learn.model.alpha.detach())
    moves = [not torch.equal(a, b) for a, b in zip(alphas, alphas[1:])]
    assert moves == [True, False, True, False]


@pytest.mark.parametrize("own_gradient", [False, True])
def test_gradients_that_a_cancelled_batch_leaves_are_refused(own_gradient):
    """As in an accumulation by hand."""

    def every_second(cb):
        if cb.iter % 2 == 0:
            raise CancelBatchException

    with pytest.raises(ValueError, match="a batch was cancelled after its backward pass and left its gradients"):
        run(mixed([At("before_step", every_second)], own_gradient=own_gradient))


def test_mixup_is_no_change_of_the_step():
    run(mixed([MixUp(0.4)]))


class Bfloat(MixedPrecision):
    """fastai's own in bfloat16, on the CPU: with a scaler that does nothing."""

    def before_fit(self):
        self.autocast, self.scales = torch.autocast("cpu", torch.bfloat16), []
        self.learn.scaler = torch.amp.GradScaler("cpu", enabled=False)


class Deep(Mixed):
    """Whose gradients in bfloat16 are far from float32's."""

    def __init__(self):
        super().__init__()
        self.deep = nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU())))

    def forward(self, x):  # (B, 3) -> (B, 2)
        return super().forward(self.deep(x))


def test_a_training_pass_under_autocast_is_no_change():
    for seed in range(3):
        torch.manual_seed(seed)
        learn = run(mixed([Bfloat()], model=Deep()))
        assert not torch.equal(learn.model.alpha, torch.zeros(2))


def test_alpha_that_is_unfrozen_joins_the_others():
    learn = mixed(warmup_epochs=1)
    learn.model.beta.alpha.requires_grad_(False)
    run(learn, 2)
    alpha, kept = learn.model.alpha.detach().clone(), learn.arch_param_update.arch_opt
    learn.model.beta.alpha.requires_grad_(True)
    run(learn)
    update = learn.arch_param_update
    assert update.arch_opt is kept and update.epochs_done == 3 and not torch.equal(learn.model.alpha, alpha) and learn.model.beta.alpha != 0
    again = mixed(warmup_epochs=1)
    again.arch_param_update.load_state_dict(learn.arch_param_update.state_dict())


class Draws:
    """Batches whose loader draws a number for each, as one that augments does."""

    def __init__(self):
        self.drawn = []

    def __iter__(self):
        for _ in range(3):
            self.drawn.append(float(torch.rand(())))
            yield torch.ones(4, 3), torch.ones(4, 2)


def test_what_draws_batches_for_alpha_goes_on_with_random_numbers_of_its_own():
    valid = Draws()
    drawing, plain = mixed(valid=valid), mixed(valid=[(torch.ones(4, 3), torch.ones(4, 2))])
    ends = []
    for learn in (drawing, plain):
        torch.manual_seed(1)
        run(learn)
        ends.append(torch.get_rng_state())
    assert len(set(valid.drawn)) == len(valid.drawn) == 4  # of 4 batches: once around, and once again
    assert torch.equal(drawing.model.alpha, plain.model.alpha) and torch.equal(*ends)


class InAList(Mixed):
    def __init__(self):
        super().__init__()
        self.kept = [self.first.weight]

    def forward(self, x):
        return super().forward(x) + self.kept[0].sum()


def test_each_model_is_asked_for_weights_that_it_keeps_apart():
    learn = run(mixed())
    learn.model, learn.opt = InAList(), None
    with pytest.raises(ValueError, match="has other gradients than the training pass|keeps weights of its own"):
        run(learn)


def test_one_process():
    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

        def forward(self, x):
            return self.module(x)

    with pytest.raises(ValueError, match="ArchParamUpdate searches in one process"):
        run(mixed(model=Wrapped(Mixed())))


def test_a_rate_that_is_a_tensor_may_not_change_in_place_either():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=torch.tensor(0.25))
    step = UnrolledStep(optimizer)
    step.check()
    optimizer.param_groups[0]["lr"].mul_(2)
    with pytest.raises(ValueError, match=r"^lr: 0\.5 in the weights' step, but 0\.25 when that was unrolled"):
        step.check()
    UnrolledStep(optimizer, 0.25).check()  # a rate of its own
