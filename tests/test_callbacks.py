import copy
import sys
import types
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelEpochException, CancelFitException, CancelTrainException
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import ParamScheduler
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, ValueMetric
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD, OptimWrapper
from fastai.text.data import TensorText

from nni_darts_rnn import epoch_counts
from nni_darts_rnn.bilevel import architecture_gradient
from nni_darts_rnn.callbacks import (
    NTASGD,
    ActivationRegularizer,
    AnnealLR,
    ArchParamUpdate,
    EpochReport,
    NNIReporter,
    PrintGenotype,
    ScaleLRByLength,
    weight_parameters,
)
from nni_darts_rnn.callbacks.valid_stream import ValidStream
from nni_darts_rnn.corpus import EOS, UNK, Corpus, Vocabulary
from nni_darts_rnn.epoch_counts import EpochCounts
from nni_darts_rnn.genotype import Genotype
from nni_darts_rnn.learner import language_dls, lm_learner, search_learner
from nni_darts_rnn.model import activation_regularisation
from nni_darts_rnn.published import original_gradient
from nni_darts_rnn.recipes import get_recipe
from nni_darts_rnn.supernet import MixedRNN
from nni_darts_rnn.weight_step import WeightStep

CELL = Genotype((("tanh", 0), ("relu", 1), ("sigmoid", 0)))
SMALL = get_recipe("tiny", {"retrain.hidden_size": 6, "retrain.batch_size": 4, "retrain.eval_batch_size": 2, "search.hidden_size": 6,
                            "search.n_nodes": 2, "search.batch_size": 4, "search.eval_batch_size": 2, "search.lr": 1.0, "retrain.lr": 1.0,
                            "search.short_bptt_probability": 0.3, "search.weight_decay": 1e-3, "retrain.weight_decay": 1e-3,
                            "search.tar": 0.5, "search.ar": 0.3})


def corpus(n=150, seed=0) -> Corpus:
    generator = torch.Generator().manual_seed(seed)
    vocab = Vocabulary((EOS, UNK, *"abcdefgh"))
    return Corpus("random", vocab, *(torch.randint(len(vocab), (k,), generator=generator) for k in (n, 61, 47)))


def run(learn, epochs=1, **kwargs):
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, **kwargs)
    return learn


def weights_of(module) -> dict:
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Watch(Callback):
    """Remembers weights, gradients (after clipping), rates and lengths of every step, and the weights that each validation saw."""

    order = 70

    def __init__(self):
        self.steps, self.validated, self.after_epochs, self.averaging = [], [], [], []

    def before_train(self):
        self.averaging.append(self.learn.ntasgd.averaging if hasattr(self.learn, "ntasgd") else False)

    def before_step(self):
        w = dict(self.learn.model.named_parameters())
        self.steps.append({"before": {k: p.detach().clone() for k, p in w.items()},
                           "grads": {k: p.grad.clone() for k, p in w.items() if p.grad is not None},
                           "T": self.xb[0].shape[1], "lr": self.opt.hypers[-1]["lr"], "averaging": self.averaging[-1]})

    def after_step(self):
        self.steps[-1]["after"] = {k: p.detach().clone() for k, p in self.learn.model.named_parameters()}

    def after_validate(self):
        self.validated.append({k: p.detach().clone() for k, p in self.learn.model.named_parameters()})

    def after_epoch(self):
        self.after_epochs.append({k: p.detach().clone() for k, p in self.learn.model.named_parameters()})


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_the_rate_falls_along_a_cosine_at_the_end(tmp_path, share):
    watch, recipe = Watch(), get_recipe(SMALL, {"retrain.anneal": share, "retrain.bptt_std": 2.0}).retrain
    learn = run(lm_learner(language_dls(corpus(), recipe, 3, "cpu", tmp_path), CELL, recipe, seed=3, cbs=[watch]), 5)
    ends = [0, *learn.recorder.iters]  # steps done by the end of each epoch; epochs differ in theirs
    places = np.array([epoch + k / (end - begin) for epoch, (begin, end) in enumerate(zip(ends, ends[1:])) for k in range(end - begin)]) / 5
    by_hand = np.where(places < 1 - share, 1, (1 + np.cos(np.pi * (places - 1 + share) / share)) / 2)
    assert len(places) == len(watch.steps) and by_hand[-1] < 0.05
    assert learn.recorder.lrs == pytest.approx(recipe.lr * by_hand, abs=1e-9)
    assert [s["lr"] for s in watch.steps] == pytest.approx([lr * s["T"] / recipe.bptt for lr, s in zip(learn.recorder.lrs, watch.steps)])
    run(learn, 5, lr=7.0)  # a second fit begins with its own full rate
    assert learn.recorder.lrs[0] == 7.0


def test_the_rate_is_fastais_flat_cos(tmp_path):
    recipe = get_recipe(SMALL, {"retrain.anneal": 0.25, "retrain.short_bptt_probability": 0, "retrain.bptt_std": 0}).retrain  # epochs of equal length
    ours = run(lm_learner(language_dls(corpus(), recipe, 3, "cpu", tmp_path), CELL, recipe, seed=3), 3)
    plain = get_recipe(SMALL, {"retrain.short_bptt_probability": 0, "retrain.bptt_std": 0}).retrain
    theirs = lm_learner(language_dls(corpus(), plain, 3, "cpu", tmp_path), CELL, plain, seed=3)
    with theirs.no_bar(), theirs.no_logging():
        theirs.fit_flat_cos(3, recipe.lr, div_final=1e12, pct_start=0.75)
    assert ours.recorder.lrs == pytest.approx(theirs.recorder.lrs, rel=1e-6)  # fastai adds its place up batch by batch
    for a, b in zip(ours.model.parameters(), theirs.model.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


def test_adam_by_hand(tmp_path):
    """Kingma and Ba 2015, algorithm 1, with the step's rate × length/bptt and the clipped gradient; weight decay 0, as the smallest here is."""
    recipe = get_recipe(SMALL, {"retrain.optimizer": "adam", "retrain.lr": 0.02, "retrain.nonmono": None, "retrain.weight_decay": 0, "retrain.bptt_std": 2.0}).retrain
    watch = Watch()
    run(lm_learner(language_dls(corpus(), recipe, 3, "cpu", tmp_path), CELL, recipe, seed=3, cbs=[watch]), 4)
    assert watch.averaging == [False] * 4 and len({s["T"] for s in watch.steps}) > 1
    for name, w in watch.steps[0]["before"].items():
        w, m, v = w.double(), 0.0, 0.0
        for t, s in enumerate(watch.steps, 1):
            g = s["grads"][name].double()
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            w = w - 0.02 * s["T"] / recipe.bptt * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            assert torch.allclose(s["after"][name].double(), w, atol=2e-6), (name, t)


def scripted(values) -> ValueMetric:
    values = iter(values)
    return ValueMetric(lambda: next(values), "scripted")


def averaging_learner(tmp_path, values, nonmono=1, cbs=(), **options):
    recipe = get_recipe(SMALL, {"retrain.nonmono": nonmono, **options}).retrain
    learn = lm_learner(language_dls(corpus(), recipe, 3, "cpu", tmp_path), CELL, recipe, seed=3, cbs=cbs)
    learn.metrics = [scripted(values)]
    learn.ntasgd.monitor = learn.best_model.monitor = "scripted"
    learn.best_model.comp = np.less
    return learn


def test_averaging_starts_after_nonmono_epochs_without_improvement(tmp_path):
    values = [5.0, 4.0, 3.0, 2.9, 3.5, 3.2, 1.0, 1.0]
    watch = Watch()
    learn = run(averaging_learner(tmp_path, values, nonmono=2, cbs=[watch]), len(values))
    # by hand: 3.2 is the first value above the best of those three epochs earlier and more, min(5, 4, 3); then no way back
    assert watch.averaging == [False] * 6 + [True] * 2
    assert learn.ntasgd.logs == values
    never = Watch()
    run(averaging_learner(tmp_path, values, nonmono=None, cbs=[never]), len(values))
    assert never.averaging == [False] * len(values)


def test_validation_and_the_saved_model_are_the_averages(tmp_path):
    watch = Watch()
    learn = run(averaging_learner(tmp_path, [1.0, 2.0, 3.0, 0.5, 0.4, 0.6], cbs=[watch]), 6)
    assert watch.averaging == [False] * 3 + [True] * 3
    iterates = [s["after"] for s in watch.steps if s["averaging"]]
    done = [sum(1 for s in watch.steps[:int(n)] if s["averaging"]) for n in learn.recorder.iters]  # by the end of each epoch
    for epoch in (3, 4, 5):
        used = iterates[1:done[epoch]]  # torch's average begins with the second step
        for name, seen in watch.validated[epoch].items():
            mean = torch.stack([w[name].double() for w in used]).mean(0)
            assert torch.allclose(seen.double(), mean, atol=1e-6)
            assert not torch.allclose(seen, iterates[done[epoch] - 1][name], atol=1e-4)
        assert same(watch.after_epochs[epoch], iterates[done[epoch] - 1])  # and training goes on from the weights of the iteration
    best = dict(learn.model.named_parameters())
    assert all(torch.equal(best[name], seen) for name, seen in watch.validated[4].items())


def test_each_step_is_sgd_with_the_rate_of_its_own_length(tmp_path):
    watch = Watch()
    learn = run(averaging_learner(tmp_path, [1.0, 2.0, 3.0, 0.5], cbs=[watch], **{"retrain.bptt_std": 2.0}), 4)
    bptt, wd = SMALL.retrain.bptt, SMALL.retrain.weight_decay
    assert len({s["T"] for s in watch.steps}) > 2 and {s["averaging"] for s in watch.steps} == {True, False}
    for s in watch.steps:
        lr = SMALL.retrain.lr * s["T"] / bptt
        assert s["lr"] == pytest.approx(lr)
        for name, w in s["before"].items():
            assert torch.allclose(s["after"][name], w - lr * (s["grads"][name] + wd * w), atol=1e-6)
        assert torch.linalg.vector_norm(torch.cat([g.flatten() for g in s["grads"].values()])) <= SMALL.retrain.clip * 1.001
    assert set(learn.recorder.lrs) == {SMALL.retrain.lr}


def test_schedulers_and_loggers_see_the_plain_rate(tmp_path):
    watch = Watch()
    recipe = SMALL.search
    learn = search_learner(language_dls(corpus(), recipe, 3, "cpu", tmp_path), recipe, cbs=[watch])
    run(learn, 2, cbs=ParamScheduler({"lr": lambda pct: 2.0 - pct}))
    plain = learn.recorder.lrs
    assert plain[0] == 2.0 and plain[-1] < 1.2 and sorted(plain, reverse=True) == plain
    assert [s["lr"] for s in watch.steps] == pytest.approx([lr * s["T"] / recipe.bptt for lr, s in zip(plain, watch.steps)])


def test_rate_is_restored_when_a_batch_is_cancelled(tmp_path):
    from fastai.callback.core import CancelBatchException

    class Skip(Callback):
        order = ScaleLRByLength.order + 5

        def before_batch(self):
            raise CancelBatchException

    recipe = SMALL.retrain
    learn = run(lm_learner(language_dls(corpus(), recipe, 0, "cpu", tmp_path), CELL, recipe, cbs=[Skip()]), 1)
    assert learn.opt.hypers[-1]["lr"] == recipe.lr


@pytest.mark.parametrize("kind", [CancelTrainException, CancelEpochException])
def test_rate_is_restored_when_an_epoch_ends_within_a_batch(tmp_path, kind):
    class Enough(Callback):
        def after_loss(self):
            if self.training and self.iter == 2:
                raise kind

    recipe = get_recipe(SMALL, {"retrain.short_bptt_probability": 0.9}).retrain
    watch = Watch()
    learn = run(lm_learner(language_dls(corpus(), recipe, 0, "cpu", tmp_path), CELL, recipe, cbs=[Enough(), watch]), 4)
    assert learn.opt.hypers[-1]["lr"] == recipe.lr and len(watch.steps) == 8
    assert [s["lr"] for s in watch.steps] == pytest.approx([recipe.lr * s["T"] / recipe.bptt for s in watch.steps])


def test_two_epochs_a_stop_and_two_more_equal_four(tmp_path):
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    whole = run(averaging_learner(tmp_path / "a", values, cbs=[keep := Watch()]), 6)

    first = run(averaging_learner(tmp_path / "b", values[:4], cbs=[Watch()]), 4)
    first_last = first.watch.after_epochs[-1]
    saved = copy.deepcopy((first.ntasgd.state_dict(), torch.get_rng_state(), first.dls.train.dataset.epoch))
    assert saved[0]["averages"] is not None

    second = averaging_learner(tmp_path / "c", values[4:], cbs=[Watch()])
    second.model.load_state_dict(first_last | {"lm.decoder.weight": first_last["lm.encoder.weight"]})
    second.ntasgd.load_state_dict(saved[0])
    second.dls.train.set_epoch(saved[2])
    torch.set_rng_state(saved[1])
    run(second, 2)
    assert same(second.watch.validated[-1], keep.validated[-1])
    assert same(second.watch.after_epochs[-1], keep.after_epochs[-1])
    assert second.ntasgd.logs == whole.ntasgd.logs


def test_validate_and_predictions_touch_nothing(tmp_path):
    learn = run(averaging_learner(tmp_path, [1.0, 2.0, 3.0, 0.5, 0.7]), 5)
    before, logs = weights_of(learn.model), list(learn.ntasgd.logs)
    files = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert {p.name for p in files} == {"best.pth", "history.csv"}
    learn.metrics = []
    learn.validate()
    predictions, targets = learn.get_preds(concat_dim=1)  # batches differ in length, not in number of streams
    assert predictions.shape == (*targets.shape, 10) and torch.allclose(predictions.sum(-1), torch.ones(targets.shape))
    assert same(weights_of(learn.model), before) and learn.ntasgd.logs == logs
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files


def test_best_model_is_loaded_without_unpickling(tmp_path, monkeypatch):
    seen, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: seen.append(kwargs.get("weights_only")) or load(*args, **kwargs))
    run(averaging_learner(tmp_path, [1.0, 2.0]), 2)
    assert seen == [True]


def test_interrupted_validation_leaves_the_weights_of_the_iteration(tmp_path):
    from fastai.callback.core import CancelFitException

    class Stop(Callback):
        order = NTASGD.order + 1  # the averages are in place by then

        def before_validate(self):
            if self.epoch == 3:
                raise CancelFitException

    watch = Watch()
    learn = averaging_learner(tmp_path, [1.0, 2.0, 3.0, 4.0], cbs=[watch])
    learn.remove_cb(learn.best_model)
    run(learn, 6, cbs=[Stop()])
    assert learn.ntasgd.averaging
    assert same({k: p.detach() for k, p in learn.model.named_parameters()}, watch.steps[-1]["after"])


def test_regularizer_is_the_formula_and_survives_one_time_step():
    for T in (1, 4):
        raw, dropped = torch.randn(2, T, 3), torch.randn(2, T, 3)
        regularizer = ActivationRegularizer(alpha=0.5, beta=2.0)
        regularizer.learn = types.SimpleNamespace(training=True, loss_grad=torch.tensor(1.0), rnn=types.SimpleNamespace(raw_out=raw, out=dropped))
        regularizer.after_loss()
        expected = 1 + 0.5 * dropped.square().mean() + (2 * (raw[:, 1:] - raw[:, :-1]).square().mean() if T > 1 else 0)
        assert torch.allclose(regularizer.learn.loss_grad, expected)


# α

class Expected(Callback):
    """Computes, just before `ArchParamUpdate` does, the gradient it should find; with no help of fastai's, from the language model alone."""

    order, run_valid = ScaleLRByLength.order, False  # after it, as it is added later

    def __init__(self, recipe, valid_loader, original):
        self.recipe, self.loader, self.original, self.grads, self.hidden_seen = recipe, valid_loader, original, [], []

    def before_train(self):
        self.valid = [b for _ in range(20) for b in self.loader]
        self.h_valid = None

    def before_batch(self):
        r, lm = self.recipe, copy.deepcopy(self.learn.model.lm)
        (x, y), (xv, yv) = (self.xb[0], self.yb[0]), self.valid.pop(0)
        names = [n for n, _ in lm.named_parameters() if n != "rnn.alpha"]
        B = len(x)
        hidden = self.learn.model.hidden if len(self.learn.model.hidden) == B else lm.init_hidden(B)
        self.hidden_seen.append(float(hidden.abs().sum()))
        self.h_valid = lm.init_hidden(B) if self.h_valid is None else self.h_valid

        class Loss(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.lm = lm

            def forward(self, *arguments):
                return self.lm.loss(*arguments)

        def losses(w, a, tokens, targets, h):
            state = {f"lm.{n}": t for n, t in zip(names, w)} | {"lm.rnn.alpha": a[0]}
            state |= {n: b.clone() for n, b in Loss().named_buffers()}
            return torch.func.functional_call(Loss(), state, (tokens.t(), targets.t(), h))

        def train(w, a, _):
            nll, raw, dropped, _ = losses(w, a, x, y, hidden)
            return nll if self.original else nll + activation_regularisation(raw, dropped, r.ar, r.tar)

        def valid(w, a, _):
            rates = {(m, rate): getattr(m, rate) for m, names in ((lm, ("dropout", "dropout_i", "dropout_e")), (lm.rnn, ("dropout_x", "dropout_h"))) for rate in names}
            for m, rate in rates if not r.alpha_dropout else ():
                setattr(m, rate, 0.0)
            nll, _, _, self.after = losses(w, a, xv, yv, self.h_valid)
            for (m, rate), before in rates.items():
                setattr(m, rate, before)
            return nll

        w, a, lr = [lm.get_parameter(n) for n in names], [lm.rnn.alpha], r.lr * x.shape[1] / r.bptt
        if self.original:
            result = original_gradient(train, w, a, None, None, lr, r.weight_decay, r.clip, valid_loss=valid, tied=[names.index("encoder.weight")])
        else:
            result = architecture_gradient(train, w, a, None, None, WeightStep.sgd(len(w), lr, r.weight_decay, r.clip), r.hvp, r.epsilon,
                                           r.neumann_terms, valid)
        self.grads.append(result.grads[0])
        self.h_valid = self.after.detach()


class Found(Callback):
    order, run_valid = ArchParamUpdate.order + 1, False

    def __init__(self):
        self.grads = []

    def after_backward(self):
        self.grads.append(self.learn.arch_param_update.last.grads[0])


@pytest.mark.parametrize("options", [{}, {"hvp": "exact"}, {"hvp": "first_order"}, {"reproduce_original": True}, {"neumann_terms": 1},
                                     {"alpha_dropout": False}, {"own_gradient": True}])
def test_alpha_gradient_is_bilevels_on_the_same_data(tmp_path, options):
    recipe = get_recipe(SMALL, {"search": options}).search
    dls = language_dls(corpus(300), recipe, 3, "cpu", tmp_path)
    expected, found = Expected(recipe, dls.arch, recipe.reproduce_original), Found()
    learn = search_learner(dls, recipe, seed=3, cbs=[expected, found])
    learn.model.double()
    learn.remove_cbs([learn.recorder, learn.metrics_csv])  # fastai's smoothed loss is float32 only
    run(learn)
    assert len(found.grads) == len(expected.grads) > 5 and expected.hidden_seen[0] == 0 < expected.hidden_seen[-1]
    for a, b in zip(found.grads, expected.grads):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-13)
    assert float(expected.grads[0].abs().max()) > 1e-9


class Hidden(Callback):
    def __init__(self):
        self.seen = []

    def after_batch(self):
        self.seen.append(self.learn.model.hidden)


def count_call(module, _):
    module.calls += 1


@pytest.mark.parametrize("two", [False, True], ids=["one input", "two inputs"])
def test_alpha_moves_in_a_model_of_other_data(tmp_path, two):
    """One that answers with its prediction alone, here for batches of three, which are no triples; or takes two inputs."""
    class Forecast(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.readout = MixedRNN(2, 4, 2), torch.nn.Linear(4, 2)

        def forward(self, x, shift=0.0):
            return self.readout(self.rnn(x.transpose(0, 1)).transpose(0, 1)) + shift

    torch.manual_seed(0)
    data = [[torch.randn(5, 2) for _ in range(2 + two)] for _ in range(12)]
    train, valid = DataLoader(data[:6], bs=3, n_inp=1 + two), DataLoader(data[6:], bs=3)
    found, seen, loss_func = [], Found(), torch.nn.MSELoss()

    class Expected(Callback):
        order, run_valid = ArchParamUpdate.order - 0.5, False

        def before_batch(self):
            model, batch = copy.deepcopy(self.learn.model), (self.xb, self.yb)
            names = [name for name, _ in model.named_parameters() if name != "rnn.alpha"]

            def loss(w, a, batch):
                state = {**dict(zip(names, w)), "rnn.alpha": a[0]}
                return loss_func(torch.func.functional_call(model, state, tuple(batch[0])), *batch[1])

            w, other = [model.get_parameter(name) for name in names], list(valid)[len(found)]
            found.append(architecture_gradient(loss, w, [model.rnn.alpha], batch, (other[:-1], other[-1:]), WeightStep.sgd(len(w), 0.1)).grads[0])

    learn = Learner(DataLoaders(train, valid), Forecast(), loss_func, opt_func=partial(OptimWrapper, opt=torch.optim.SGD), lr=0.1, path=tmp_path,
                    splitter=weight_parameters, cbs=[Expected(), ArchParamUpdate(valid), seen])
    before = learn.model.rnn.alpha.detach().clone()
    run(learn)
    assert len(found) == len(seen.grads) == 2 and not torch.equal(learn.model.rnn.alpha, before)
    for expected, grad in zip(found, seen.grads):
        assert torch.allclose(grad, expected, rtol=1e-4, atol=1e-6)


class Classify(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.dropout, self.readout = MixedRNN(2, 4, 2), torch.nn.Dropout(0.5), torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.readout(self.dropout(self.rnn(x.transpose(0, 1))[-1]))


def classifier(tmp_path, valid_batches, cbs, **options) -> Learner:
    torch.manual_seed(0)
    data = [(torch.randn(5, 2), torch.tensor(int(i >= 12))) for i in range(24)]
    train, valid = DataLoader(data[:12], bs=4), DataLoader(data[12:], bs=4)
    update = ArchParamUpdate(valid if valid_batches == "loader" else list(valid), **options)
    torch.manual_seed(0)
    return Learner(DataLoaders(train, valid), Classify(), CrossEntropyLossFlat(), opt_func=partial(OptimWrapper, opt=torch.optim.SGD), lr=0.1, path=tmp_path,
                   splitter=weight_parameters, cbs=[update, *cbs])


def test_mixed_targets_are_of_the_training_text_alone(tmp_path):
    """`MixUp` puts a loss of its own in the place of the Learner's, with the training batch's targets; α learns from the validation text as it is."""
    seen = []

    class Valid(Callback):
        order, run_valid = ArchParamUpdate.order + 1, False

        def after_backward(self):
            seen.append(float(self.learn.arch_param_update.last.valid_loss))

    learn = classifier(tmp_path, "list", [MixUp(0.4), Valid()])
    with torch.no_grad():
        learn.model.readout.weight.zero_()
        learn.model.readout.bias.copy_(torch.tensor([5.0, -5.0]))
    learn.lr = 1e-9
    run(learn)
    assert seen == pytest.approx([10.0] * 3, abs=1e-3)  # the training text is of one class, the validation text of the other


@pytest.mark.parametrize("options", [{}, {"own_gradient": True}, {"hvp": "first_order"}], ids=str)
def test_reading_the_validation_text_draws_no_random_numbers(tmp_path, options):
    """torch's DataLoader draws a seed from the global generator whenever it is read from its beginning."""
    found = [run(classifier(tmp_path, source, [], arch_lr=0, arch_weight_decay=0, **options), 2).model for source in ("loader", "list")]
    assert same(weights_of(found[0]), weights_of(found[1]))


def test_batches_for_alpha_are_plain_tensors_again_and_again():
    text = [(TensorText(torch.full((2, 3), float(k))), TensorText(torch.ones(2)), k) for k in range(2)]
    stream = ValidStream(text, 0, [])
    for k in (0, 1, 0):
        inputs, targets = stream.next(1, "cpu")
        assert len(inputs) == 1 and float(inputs[0][0, 0]) == k and targets[1] == k
        assert type(inputs[0]) is type(targets[0]) is torch.Tensor


def test_batches_for_alpha_that_come_to_an_end_are_refused():
    one = (torch.ones(2, 3), torch.ones(2))
    for batches, before in (([], 0), ((batch for batch in [one, one]), 2)):
        stream = ValidStream(batches, 0, [])
        for _ in range(before):
            stream.next(1, "cpu")
        with pytest.raises(ValueError, match="^valid_batches gives no batch, or none when it is read again"):
            stream.next(1, "cpu")


def test_batches_for_alpha_are_those_of_the_epoch(tmp_path):
    for epoch in (0, 2):
        alone, read = (language_dls(corpus(), SMALL.search, 3, "cpu", tmp_path).arch for _ in range(2))
        alone.set_epoch(epoch)
        wanted, stream = [x for x, _ in alone], ValidStream(read, epoch, [])
        for expected in wanted + wanted:
            assert torch.equal(stream.next(1, "cpu")[0][0], expected)


@pytest.mark.parametrize("options, words", [
    ({"neumann_terms": -1}, "neumann_terms: -1 must be at least 0"), ({"neumann_terms": 2, "hvp": "first_order"}, "neumann_terms: 2 terms"),
    ({"reproduce_original": True, "hvp": "exact"}, "reproduce_original: the published code"), ({"unrolled_lr": -1}, "unrolled_lr: -1 must be at least 0"),
    ({"warmup_epochs": float("nan")}, "warmup_epochs: nan"), ({"own_gradient": "false"}, "own_gradient: 'false' must be True or False"),
    ({"arch_betas": (0.9,)}, "arch_betas: .0.9,. must be two numbers"), ({"arch_lr": "0.1"}, "arch_lr: '0.1' must be a number"),
    ({"alpha_dropout": 1}, "alpha_dropout: 1 must be True or False")], ids=str)
def test_settings_that_the_strategy_refuses_are_refused_here_too(options, words):
    with pytest.raises(ValueError, match=words):
        ArchParamUpdate([], **options)


@pytest.mark.parametrize("make, words", [
    (lambda: NTASGD(0), "nonmono: 0 must be a whole number of at least 1"), (lambda: NTASGD(2.5), "nonmono: 2.5 must be a whole number"),
    (lambda: AnnealLR(1.5), "share: 1.5 must be a number of at least 0 and at most 1"), (lambda: AnnealLR(0), "share: 0 must be above 0; for a constant learning rate leave AnnealLR out"),
    (lambda: AnnealLR("0.5"), "share: '0.5' must be a number"), (lambda: AnnealLR(float("nan")), "share: nan must be a number"),
    (lambda: ScaleLRByLength(0), "bptt: 0 must be a whole number of at least 1"), (lambda: PrintGenotype(every=0), "every: 0 must be a whole number of at least 1")],
    ids=lambda value: value if isinstance(value, str) else "")
def test_arguments_that_are_not_allowed(make, words):
    with pytest.raises(ValueError) as refused:
        make()
    assert str(refused.value).startswith(words)


def test_monitor_that_is_not_recorded(tmp_path):
    recipe = SMALL.retrain
    learn = lm_learner(language_dls(corpus(), recipe, 3, "cpu", tmp_path), CELL, recipe, seed=3, cbs=[NTASGD(2, monitor="valid_los")])
    with pytest.raises(ValueError, match="monitor: 'valid_los' is none of train_loss, valid_loss.*; did you mean 'valid_loss'"):
        run(learn, 1)


def test_alpha_step_leaves_no_trace(tmp_path):
    """With α's rate 0, weights, buffers, hidden states and random state are those of a run without the callback, bit for bit."""
    recipe = get_recipe(SMALL, {"search.arch_lr": 0, "search.arch_weight_decay": 0}).search
    ends = []
    for with_callback in (True, False):
        learn = search_learner(language_dls(corpus(), recipe, 3, "cpu", tmp_path), recipe, seed=3, cbs=[hidden := Hidden()])
        rnn = learn.model.lm.rnn
        rnn.register_buffer("calls", torch.zeros(()))  # as a BatchNorm's statistics: changed in place by every forward pass
        rnn.register_forward_pre_hook(count_call)
        if not with_callback:
            learn.remove_cb(learn.arch_param_update)
            rnn.alpha.requires_grad_(False)
        run(learn, 2)
        ends.append((weights_of(learn.model), dict(enumerate(hidden.seen)), {"random": torch.get_rng_state()}))
    assert all(same(a, b) for a, b in zip(*ends))
    assert ends[0][0]["lm.rnn.calls"] == len(ends[0][1])


def test_search_moves_alpha_and_its_optimizer_is_not_the_weights(tmp_path, capsys):
    recipe = SMALL.search
    learn = search_learner(language_dls(corpus(), recipe, 3, "cpu", tmp_path), recipe, seed=3, cbs=[PrintGenotype(every=2)])
    alpha = learn.model.lm.rnn.alpha
    start = alpha.detach().clone()
    run(learn, 2)
    assert not any(p is alpha for params in learn.opt.param_lists for p in params)
    assert len([p for params in learn.opt.param_lists for p in params]) == len(list(learn.model.parameters())) - 1
    # Adam's first steps have the size of its rate, whatever the gradient's
    assert (alpha - start).abs().max() > recipe.arch_lr
    assert alpha.requires_grad and alpha.grad is None
    assert learn.print_genotype.genotypes[-1] == learn.model.genotype() and len(learn.print_genotype.genotypes) == 2
    assert capsys.readouterr().out == f"epoch 2: {learn.model.genotype()}\n"  # every second one


def test_warmup_epochs(tmp_path, caplog):
    recipe = get_recipe(SMALL, {"search.epochs": 2, "search.warmup_epochs": 1}).search
    learn = search_learner(language_dls(corpus(), recipe, 3, "cpu", tmp_path), recipe, seed=3)
    start = learn.model.lm.rnn.alpha.detach().clone()
    run(learn, 1)
    assert torch.equal(learn.model.lm.rnn.alpha, start)
    assert [r.getMessage() for r in caplog.records] == ["search: α has not moved yet; it waits for warmup_epochs=1 epochs; 1 have been trained"]
    run(learn, 1)
    assert not torch.equal(learn.model.lm.rnn.alpha, start) and len(caplog.records) == 1


def test_of_a_warm_up_that_there_is_not_nothing_is_said(tmp_path, caplog):
    class Ends(Callback):
        def before_batch(self):
            raise CancelFitException

    learn = search_learner(language_dls(corpus(), SMALL.search, 3, "cpu", tmp_path), SMALL.search, seed=3)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=Ends())
    assert learn.arch_param_update.last is None and not caplog.records


def test_a_search_stopped_and_resumed_is_the_whole_search(tmp_path):
    recipe = SMALL.search

    def new():
        return search_learner(language_dls(corpus(), recipe, 3, "cpu", tmp_path), recipe, seed=3)

    whole = run(new(), 3)
    first = run(new(), 2)
    saved = copy.deepcopy((first.model.state_dict(), first.arch_param_update.state_dict(), torch.get_rng_state(), first.dls.train.dataset.epoch))
    second = new()
    second.model.load_state_dict(saved[0])
    second.arch_param_update.load_state_dict(saved[1])
    second.dls.train.set_epoch(saved[3])
    torch.set_rng_state(saved[2])
    run(second, 1)
    assert same(weights_of(second.model), weights_of(whole.model))


@pytest.mark.parametrize("break_it, message", [
    (lambda learn: setattr(learn, "opt_func", SGD), "unrolls a torch optimizer"),
    (lambda learn: setattr(learn, "splitter", lambda model: list(model.parameters())), "splitter=weight_parameters"),
    (lambda learn: setattr(learn, "opt_func", partial(learn.opt_func.func, opt=torch.optim.RMSprop)), "unrolls torch.optim.SGD, Adam and AdamW; not RMSprop"),
    (lambda learn: learn.add_cb(GradientAccumulation(8)), "remove GradientAccumulation"),
    (lambda learn: learn.add_cb(ArchParamUpdate(learn.dls.arch)), "more than one ArchParamUpdate"),
    (lambda learn: setattr(learn.gradient_clip, "norm_type", float("inf")), "norm_type=2"),
    (lambda learn: (setattr(learn.arch_param_update, "own_gradient", True), learn.add_cb(MixUp())), "own_gradient: MixUp and similar callbacks change the batch"),
    (lambda learn: (setattr(learn.arch_param_update, "reproduce_original", True), setattr(learn, "opt_func", partial(learn.opt_func.func, opt=partial(
        torch.optim.SGD, momentum=0.9)))), "plain SGD"),
])
def test_a_learner_that_cannot_search_says_why(tmp_path, break_it, message):
    learn = search_learner(language_dls(corpus(), SMALL.search, 0, "cpu", tmp_path), SMALL.search)
    break_it(learn)
    with pytest.raises(ValueError, match=message):
        run(learn)


def test_a_model_without_alpha_is_refused(tmp_path):
    dls = language_dls(corpus(), SMALL.search, 0, "cpu", tmp_path)
    with pytest.raises(ValueError, match="nothing to search"):
        run(lm_learner(dls, CELL, SMALL, cbs=[ArchParamUpdate(dls.arch)]))


def test_epoch_report(tmp_path):
    rows = []
    recipe = SMALL.retrain
    learn = lm_learner(language_dls(corpus(), recipe, 0, "cpu", tmp_path), CELL, recipe, cbs=[EpochReport(rows.append, "retrain")])
    run(learn, 3)
    assert [row["epoch"] for row in rows] == [1, 2, 3] and {row["phase"] for row in rows} == {"retrain"}
    for row, (_, valid_loss, perplexity) in zip(rows, learn.recorder.values):
        assert row["default"] == row["perplexity"] == pytest.approx(perplexity) == pytest.approx(torch.tensor(valid_loss).exp().item())
        assert row["tokens_per_second"] > 0 and row["seconds"] > 0 and row["lr"] == recipe.lr and "alpha_entropy" not in row
    # an epoch's training loss is the mean over its tokens, without AR/TAR; here the first one's, near ln V
    assert rows[0]["train_loss"] == pytest.approx(torch.tensor(10.0).log().item(), abs=0.3)
    learn.validate()
    assert len(rows) == 3


def test_a_phase_says_how_long_it_will_take_once(monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr(epoch_counts.time, "perf_counter", lambda: now[0])
    caplog.set_level("INFO", "nni_darts_rnn")
    counts = EpochCounts("search")
    for left in range(199, -1, -1):  # two epochs of 100 batches; the first batch takes a minute, the others half a second
        now[0] += 60 if left == 199 else 0.5
        if left == 99:
            counts.begin()
        counts.add(10, torch.tensor(0.5), 2, left)
    (record,) = caplog.records
    assert record.getMessage() == "search: about 98 s to go, for 2 epochs in all"  # 195 batches
    assert counts.tokens == 1000 and counts.loss == pytest.approx(0.5) and counts.seconds == 49.5
    again = EpochCounts("search")
    again.go_on(**counts.state())
    assert (again.tokens, again.loss, again.seconds) == (counts.tokens, counts.loss, counts.seconds)


@pytest.mark.parametrize("lengths", [(13, 15), (15, 13), (3, 15)])  # of two epochs; (3: the rest of one that another process began)
def test_what_is_to_go_counts_batches_that_were_done(monkeypatch, caplog, lengths):
    now = [100.0]
    monkeypatch.setattr(epoch_counts.time, "perf_counter", lambda: now[0])
    caplog.set_level("INFO", "nni_darts_rnn")
    counts = EpochCounts("retrain")
    for epoch, n in enumerate(lengths):
        for batch in range(n):
            now[0] += 0.15
            counts.add(10, torch.tensor(0.5), 8, (8 - epoch - 1) * n + n - batch - 1)
    (record,) = caplog.records
    left = {13: 6 * 15 + 12, 15: 7 * 15, 3: 6 * 15 + 3}[lengths[0]]  # after the 14 batches of 0.15 s that two seconds take, beside the first
    said = record.getMessage()
    assert said.startswith("retrain: about ") and said.endswith(" s to go, for 8 epochs in all")
    assert float(said.split()[2]) == pytest.approx(left * 0.15, abs=1)


def test_search_report_has_the_entropy_of_alpha(tmp_path):
    recipe = SMALL.search
    report = EpochReport(phase="search")
    run(search_learner(language_dls(corpus(), recipe, 0, "cpu", tmp_path), recipe, cbs=[report]), 1)
    assert 1.5 < report.rows[0]["alpha_entropy"] <= torch.tensor(5.0).log().item() + 1e-9


@pytest.mark.parametrize("trial, expected", [("STANDALONE", 0), ("aBcD", 2)])
def test_nni_hears_of_epochs_only_inside_a_trial(tmp_path, monkeypatch, trial, expected):
    heard = []
    stand_in = types.SimpleNamespace(get_trial_id=lambda: trial, report_intermediate_result=heard.append)
    monkeypatch.setitem(sys.modules, "nni", stand_in)
    recipe = SMALL.retrain
    run(lm_learner(language_dls(corpus(), recipe, 0, "cpu", tmp_path), CELL, recipe, cbs=[NNIReporter("retrain")]), 2)
    assert len(heard) == expected and all(row["default"] > 1 for row in heard)


def test_fit_from_a_later_epoch(tmp_path):
    recipe = SMALL.retrain
    learn = lm_learner(language_dls(corpus(), recipe, 0, "cpu", tmp_path), CELL, recipe, cbs=[report := EpochReport()])
    run(learn, 3, start_epoch=1)
    assert [row["epoch"] for row in report.rows] == [2, 3] and len(learn.ntasgd.logs) == 2


def test_a_weight_that_happens_to_be_named_alpha_is_no_architecture():
    from nni_darts_rnn.callbacks.arch_passes import architecture_parameters, weight_parameters

    class Snake(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.alpha = torch.nn.Parameter(torch.ones(4))

    model = torch.nn.ModuleDict({"rnn": MixedRNN(3, 4, 2), "activation": Snake()})
    assert list(architecture_parameters(model)) == ["rnn.alpha"]
    assert any(p is model["activation"].alpha for p in weight_parameters(model))
    assert list(architecture_parameters(Snake())) == ["alpha"]  # a supernet of one's own
