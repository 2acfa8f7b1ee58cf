"""What fastai lets one do with a Learner beside one plain fit: interrupt it and go on, look for a rate, save, load and export, other schedules and precisions."""

import contextlib
import copy
import multiprocessing
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, FetchPredsCallback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import Learner
from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import load_learner
from fastai.optimizer import OptimWrapper
from test_callbacks import CELL, SMALL, corpus, run, same, weights_of
from test_fastai_world import language_dls as text_dls

from nni_darts_rnn.callbacks import ActivationRegularizer, ArchParamUpdate, PrintGenotype, weight_parameters
from nni_darts_rnn.learner import language_dls, lm_learner, search_learner
from nni_darts_rnn.recipes import get_recipe
from nni_darts_rnn.supernet import MixedRNN


def learner(folder, kind="retrain", cbs=(), **settings):
    recipe = get_recipe(SMALL, {f"{kind}.{name}": value for name, value in settings.items()})
    make = (lambda *a, **k: lm_learner(a[0], CELL, a[1], **k)) if kind == "retrain" else search_learner
    return make(language_dls(corpus(), getattr(recipe, kind), 0, "cpu", folder), recipe, path=folder, cbs=cbs)


def averaging(folder, **settings):
    """One that has averaged since its first epoch."""
    learn = learner(folder, **settings)
    run(learn, 1)
    learn.ntasgd.start_averaging()
    return run(learn, 1)


def test_a_falling_rate_on_fastais_own_loaders(tmp_path):
    """They answer for attributes that they lack with those of their text."""
    recipe = get_recipe(SMALL, {"search.anneal": 0.5, "retrain.anneal": 0.5})
    dls = text_dls(n=30)
    for learn in (lm_learner(dls, CELL, recipe, path=tmp_path), search_learner(dls, recipe, path=tmp_path)):
        rates = run(learn, 2).recorder.lrs
        assert rates[0] == 1.0 and 0 < rates[-1] < 0.2


class Interrupted(Callback):
    """Ctrl-C in the first validation batch."""

    def before_batch(self):
        if not self.training:
            raise KeyboardInterrupt


@pytest.mark.parametrize("bar", [True, False])
def test_an_interrupted_fit_can_be_gone_on_with(tmp_path, bar, capsys):
    learn = averaging(tmp_path)
    shown = contextlib.nullcontext if bar else learn.no_bar
    with pytest.raises(KeyboardInterrupt), shown():
        learn.fit(1, cbs=Interrupted())
    assert learn.ntasgd.kept  # the averages are in place, and the weights beside them
    trained = [weight.clone() for _, weight in learn.ntasgd.kept]
    learn.remove_cb(learn.best_model)
    watch = []

    class Look(Callback):
        order = 100

        def before_train(self):
            watch.append([p.detach().clone() for p, _ in self.learn.opt.opt.state.items()])

        def before_validate(self):
            watch.append([(p.detach().clone(), state["ax"].clone()) for p, state in self.learn.opt.opt.state.items()])

    with shown():
        learn.fit(1, cbs=Look())
    before, validated = watch
    assert all(torch.equal(a, b) for a, b in zip(before, trained))  # it went on from the weights
    assert all(torch.equal(p, average) for p, average in validated)  # and validated the averages
    assert not all(torch.equal(p.detach(), a) for p, a in zip(learn.opt.opt.state, trained))  # what it trained is there
    assert (tmp_path / "history.csv").read_text().count("\n") == 2  # of this fit alone


def test_skipped_epochs_keep_their_rows_and_print_nothing(tmp_path, capsys):
    recipe = get_recipe(SMALL).search
    kept = []
    for first, last in ((0, 2), (2, 4)):
        learn = search_learner(language_dls(corpus(), recipe, 0, "cpu", tmp_path), recipe, path=tmp_path, cbs=[PrintGenotype()])
        with learn.no_bar(), learn.no_logging():
            learn.fit(last, start_epoch=first)
        kept.append((tmp_path / "search.csv").read_text().splitlines())
        assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [f"epoch {epoch + 1}" for epoch in range(first, last)]
        assert len(learn.print_genotype.genotypes) == last - first
    assert kept[1][:3] == kept[0] and [line.split(",")[0] for line in kept[1]] == ["epoch", "0", "1", "2", "3"]
    assert len({line.count(",") for line in kept[1]}) == 1


def test_looking_for_a_rate_changes_nothing(tmp_path):
    """Also where the text has fewer batches than `lr_find` takes, so that it validates."""
    for learn in (learner(tmp_path), learner(tmp_path, "search"), learner(tmp_path, "search", anneal=0.5, warmup_epochs=0)):
        before = weights_of(learn.model)
        with learn.no_bar(), learn.no_logging():
            learn.lr_find(num_it=30, show_plot=False)
        lowest, highest = learn.recorder.lrs[0], learn.recorder.lrs[-1]
        assert lowest < 1e-6 and highest > 1e-2  # its own rates
        assert same(weights_of(learn.model), before)
        if hasattr(learn, "arch_param_update"):
            assert learn.arch_param_update.epochs_done == 0 and not learn.arch_param_update.adam_optimizer().state
        else:
            assert learn.ntasgd.logs == []
        run(learn)
        assert not same(weights_of(learn.model), before) and len(learn.recorder.values) == 1


@pytest.mark.parametrize("what", ["lr_find", "validate"])
def test_after_an_interrupted_look_a_fit_is_a_whole_one(tmp_path, what):
    """fastai lets a callback that sat one out sit out the next fit too."""
    class Interrupts(Callback):
        def before_batch(self):
            raise KeyboardInterrupt

    learn, rates = learner(tmp_path, anneal=0.5), []
    with learn.no_bar(), learn.no_logging(), pytest.raises(KeyboardInterrupt):
        learn.add_cb(Interrupts())
        learn.lr_find(show_plot=False) if what == "lr_find" else learn.validate()
    learn.remove_cb(Interrupts)
    expected = run(learner(tmp_path, anneal=0.5), 2).recorder
    best = learn.path / learn.model_dir / "best.pth"
    best.unlink()
    rates = run(learn, 2).recorder.lrs
    assert rates == expected.lrs and min(rates) < 0.2 * max(rates) and best.exists()


def test_saved_on_one_side_of_the_switch_and_loaded_on_the_other(tmp_path):
    late = averaging(tmp_path)
    late.save("late")
    early = run(learner(tmp_path), 1)
    early.save("early")
    early.load("late")
    assert early.ntasgd.averaging and same(weights_of(early.model), weights_of(late.model))
    for ours, theirs in zip(early.opt.opt.state.values(), late.opt.opt.state.values()):
        assert torch.equal(ours["ax"], theirs["ax"]) and torch.equal(ours["mu"], theirs["mu"])
    late.load("early")
    assert not late.ntasgd.averaging
    for learn in (early, late):
        before = weights_of(learn.model)
        assert not same(weights_of(run(learn).model), before)


def test_export_keeps_the_learner_and_comes_back(tmp_path):
    learn = averaging(tmp_path)
    text, optimizer = learn.dls.train.dataset.stream, learn.opt
    learn.export()
    assert learn.opt is optimizer and learn.dls.train.dataset.stream is text
    assert (tmp_path / "export.pkl").stat().st_size < 100_000
    again = load_learner(tmp_path / "export.pkl")
    assert same(weights_of(again.model), weights_of(learn.model)) and again.dls.train.dataset.stream.shape == (2, 4)
    run(learn)
    found = run(learner(tmp_path, "search"))
    found.export()
    assert load_learner(tmp_path / "export.pkl").model.genotype() == found.model.genotype()
    on_fastais = run(lm_learner(text_dls(n=30), CELL, SMALL, path=tmp_path))
    on_fastais.export()
    assert same(weights_of(load_learner(tmp_path / "export.pkl").model), weights_of(on_fastais.model))


def test_an_export_that_fails_leaves_the_learner_as_it_was(tmp_path):
    learn = run(learner(tmp_path))
    learn.cannot = (k for k in range(3))  # a generator cannot be pickled
    with pytest.raises(TypeError, match="generator"):
        learn.export()
    assert learn.dls.train.dataset.stream.shape == (37, 4)
    run(learn)


def test_one_cycle_goes_on_over_the_switch(tmp_path):
    learn = learner(tmp_path, nonmono=1)
    learn.add_cb(Switch := type("Switch", (Callback,), {"after_epoch": lambda self: self.learn.ntasgd.averaging or self.learn.ntasgd.start_averaging()}))
    assert Switch
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(3, 1.0)
    assert learn.ntasgd.averaging and len(learn.recorder.values) == 3
    assert learn.recorder.lrs[-1] < 0.05 < 0.5 < max(learn.recorder.lrs)


def test_mixed_precision(tmp_path):
    learn = learner(tmp_path)
    full = run(learner(tmp_path)).recorder.values[-1][0]
    run(learn.to_fp16())
    assert learn.recorder.values[-1][0] == pytest.approx(full, rel=0.02)


class Scaled(MixedPrecision):
    """fastai's own, on the CPU: full precision, but the loss scaled."""

    def __init__(self, init_scale: float):
        super().__init__()
        self.init_scale = init_scale

    def before_fit(self):
        self.autocast, self.scales = torch.autocast("cpu", enabled=False), []
        self.learn.scaler = torch.amp.GradScaler("cpu", init_scale=self.init_scale, growth_interval=10 ** 6)


def test_a_scaled_loss_moves_alpha_as_a_plain_one(tmp_path):
    plain, scaled, beyond = (learner(tmp_path, "search") for _ in range(3))
    alpha = plain.model.lm.rnn.alpha.detach().clone()
    scaled.add_cb(Scaled(2.0 ** 12))
    for learn in (plain, scaled):
        torch.manual_seed(1)  # of the masks
        run(learn)
    assert (plain.model.lm.rnn.alpha - alpha).abs().max() > 1e-3
    assert torch.allclose(scaled.model.lm.rnn.alpha, plain.model.lm.rnn.alpha, atol=1e-4)
    # a gradient beyond float32: the scaler leaves the weights' step out, and α stays too
    before, seen = weights_of(beyond.model), []
    beyond.add_cbs([Scaled(2.0 ** 127), Callback(after_batch=lambda _: seen.append(same(weights_of(beyond.model), before)))])
    run(beyond)
    assert seen[0] and not seen[-1]


def test_a_new_fit_trains_although_the_last_one_had_converged(tmp_path):
    learn = run(learner(tmp_path, nonmono=1, patience=3, lr=30.0), 200)
    ended = len(learn.recorder.values)
    assert ended < 200
    logs = list(learn.ntasgd.logs)
    assert logs.index(min(logs)) == len(logs) - 4
    run(learn, 1)
    assert len(learn.recorder.values) == 1 and len(learn.ntasgd.logs) == len(logs) + 1


def test_a_look_at_a_batch_changes_no_epoch(tmp_path):
    plain = run(learner(tmp_path), 2)

    class Looks(Callback):
        def after_batch(self):
            if self.training:
                self.dls.one_batch()

    learn = learner(tmp_path)
    learn.dls.one_batch()
    run(learn, 2, cbs=Looks())
    assert same(weights_of(learn.model), weights_of(plain.model))


def test_the_smoothed_loss_of_no_batch_is_no_number(tmp_path):
    learn = learner(tmp_path)
    learn.recorder.smooth_loss.reset()
    assert np.isnan(learn.recorder.smooth_loss.value)
    assert copy.deepcopy(learn.recorder.smooth_loss).count == 0


class Twice(torch.nn.Module):
    """A model of a user's own, of two mixed layers: (B, T, 3) -> (B, T, 3)."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = MixedRNN(3, 4, n_nodes=2), MixedRNN(4, 4, n_nodes=2), torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.second(self.first(x.transpose(0, 1))).transpose(0, 1))  # (B, T, 3) -> (T, B, 3) -> (B, T, 3)


def own(cbs, workers=0) -> Learner:
    torch.manual_seed(0)
    series = [(torch.randn(5, 3), torch.randn(5, 3)) for _ in range(16)]
    train, valid = DataLoader(series[:8], bs=4), DataLoader(series[8:], bs=4, num_workers=workers)
    for cb in cbs:
        if isinstance(cb, ArchParamUpdate):
            cb.valid_batches = valid
    return Learner(DataLoaders(train, valid), Twice(), torch.nn.MSELoss(), opt_func=partial(OptimWrapper, opt=torch.optim.SGD), lr=0.1, splitter=weight_parameters, cbs=cbs)


def moved(learn, alpha) -> bool:
    before = alpha.detach().clone()
    run(learn)
    return not torch.equal(alpha, before)


def test_alpha_of_each_model_moves_that_a_callback_meets():
    update = ArchParamUpdate([])
    for _ in range(2):  # as over folds
        learn = own([update])
        assert moved(learn, learn.model.first.alpha)
        learn.remove_cb(update)
    learn = own([ArchParamUpdate([])])
    run(learn)
    learn.model, learn.opt = Twice(), None
    assert moved(learn, learn.model.first.alpha)
    learn.model.load_state_dict(weights_of(learn.model), assign=True)
    learn.opt = None
    assert moved(learn, learn.model.first.alpha)


def test_alpha_that_is_frozen_stays_so():
    learn = own([ArchParamUpdate([])])
    frozen = learn.model.second.alpha.requires_grad_(False)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(1, cbs=Interrupted())
    before = frozen.clone()
    assert moved(learn, learn.model.first.alpha)
    assert torch.equal(frozen, before) and not frozen.requires_grad and learn.model.first.alpha.requires_grad
    learn.model.first.alpha.requires_grad_(False)
    with pytest.raises(ValueError, match="every alpha of the model is frozen"):
        run(learn)


class Once(Callback):
    """Ctrl-C after the first backward pass, before the weights take their step."""

    order = 100

    def before_step(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize("make", [lambda folder: learner(folder), lambda folder: learner(folder, "search", warmup_epochs=0), lambda folder: own([ArchParamUpdate([])])])
def test_a_fit_begins_without_the_gradient_of_one_that_was_interrupted(tmp_path, make):
    first = []

    class Look(Callback):
        order = -100

        def before_backward(self):
            first.append(all(p.grad is None or not p.grad.any() for p in self.learn.model.parameters()))

    learn = make(tmp_path)
    with pytest.raises(KeyboardInterrupt), learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=Once())
    assert any(p.grad is not None and p.grad.any() for p in learn.model.parameters())
    run(learn, cbs=Look())
    assert first[0]


def test_a_fit_after_one_whose_numbers_went_wrong(tmp_path):
    learn = learner(tmp_path)
    learn.save("start")
    with pytest.raises(FloatingPointError):
        run(learn, lr=1e20)
    learn.load("start")
    assert len(run(learn, lr=0.1).recorder.values) == 1


def test_predictions_within_a_fit_that_averages_cost_no_training(tmp_path):
    class Look(Callback):
        def before_epoch(self):
            self.learn.get_preds(inner=True, concat_dim=1)

    learn = averaging(tmp_path)
    learn.remove_cb(learn.best_model)
    before = weights_of(learn.model.lm)
    run(learn, cbs=Look())
    assert not same(weights_of(learn.model.lm), before)


@pytest.mark.parametrize("clips", [(0.5, 0.05), (0.05, 0.5)])
def test_of_two_clips_the_smaller_one_is_unrolled(clips):
    found = []
    for norms in (clips, (0.05,)):
        learn = own([ArchParamUpdate([], hvp="exact"), *map(GradientClip, norms)])
        run(learn)
        found.append(learn.model.first.alpha.detach())
    assert torch.allclose(*found, rtol=0, atol=1e-5)


def test_two_regularizers_act_as_one(tmp_path):
    found = []
    for cbs, tar in (([], 0.5), ([ActivationRegularizer(alpha=0.0, beta=0.3)], 0.2)):
        learn = learner(tmp_path, "search", cbs, tar=tar, warmup_epochs=0)
        run(learn)
        found.append(learn.model.lm.rnn.alpha.detach())
    assert torch.allclose(*found, rtol=0, atol=1e-4)


def even(learn):
    """The validation text as three batches of one length."""
    loader = learn.dls.valid
    T = len(next(iter(loader))[1][0])
    return loader.new(type(loader.dataset)(loader.dataset.stream[:1 + 3 * T], loader.dataset.rule, loader.dataset.seed))


def test_a_summary_and_predictions_after_each_epoch(tmp_path, capsys):
    for learn in (learner(tmp_path), learner(tmp_path, "search", relaxation="node", epochs=2, warmup_epochs=1)):
        assert "Total params" in learn.summary()
    learn = learner(tmp_path)
    assert len(run(learn, cbs=FetchPredsCallback(dl=even(learn))).recorder.values) == 1


@pytest.mark.parametrize("look", [lambda learn: learn.lr_find(num_it=20, show_plot=False), lambda learn: learn.validate(ds_idx=0)], ids=["lr_find", "validate"])
def test_the_next_fit_trains_the_batches_that_it_would_have(tmp_path, look):
    found = []
    for looks in (False, True):
        learn = learner(tmp_path)
        if looks:
            with learn.no_bar(), learn.no_logging():
                look(learn)
        torch.manual_seed(1)
        found.append(weights_of(run(learn).model))
    assert same(*found)


def test_what_is_loaded_after_an_interrupted_validation_is_trained_on(tmp_path):
    learn = averaging(tmp_path)
    learn.save("good")
    with pytest.raises(KeyboardInterrupt), learn.no_bar():
        learn.fit(1, cbs=Interrupted())
    learn.load("good")
    good, seen = weights_of(learn.model.lm), []

    class Look(Callback):
        def before_train(self):
            seen.append(weights_of(self.learn.model.lm))

    run(learn, cbs=Look())
    assert same(seen[0], good)


def test_a_copied_search_asks_for_the_text_that_alpha_learns_from(tmp_path):
    learn = learner(tmp_path, "search")
    again = copy.deepcopy(learn)
    with pytest.raises(ValueError, match="valid_batches: a copy of a Learner, or one from load_learner, comes without them"):
        run(again)
    again.arch_param_update.valid_batches = learn.arch_param_update.valid_batches
    assert len(run(again).recorder.values) == 1


@pytest.mark.parametrize("axis", [0, 1])
def test_all_predictions_of_streams_come_along_either_axis(tmp_path, axis):
    learn = learner(tmp_path)
    loader = even(learn)
    with learn.no_bar(), learn.no_logging():
        decoded, targets = learn.get_preds(dl=loader, concat_dim=axis)[:2]
    assert len(loader) == 3 and len(decoded) == len(targets)
    assert torch.equal(targets, torch.cat([y for _, y in loader], axis))


def test_a_copy_ends_by_its_own_patience(tmp_path):
    learn = learner(tmp_path, patience=3, nonmono=1, lr=30.0)
    pickle.dumps(learn)
    ended = [len(run(one, 60).recorder.values) for one in (copy.deepcopy(learn), learn)]
    assert ended[0] < 60 and ended[1] < 60


def test_workers_end_with_the_fit():
    learn = own([ArchParamUpdate([])], workers=1)
    run(learn)
    assert not multiprocessing.active_children()


def test_a_model_of_fewer_words_than_the_text_is_refused(tmp_path):
    recipe = get_recipe(SMALL)
    with pytest.raises(ValueError, match="vocab_size: the model has 5 words, but the DataLoaders have 10"):
        lm_learner(language_dls(corpus(), recipe.retrain, 0, "cpu", tmp_path), CELL, recipe, path=tmp_path, vocab_size=5)
