"""What fastai lets one do with a Learner beside one plain fit: interrupt it and go on, look for a rate, save, load and export, other schedules and precisions."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import Learner  # noqa: F401 (and `lr_find`, `fit_one_cycle`)
from fastai.learner import load_learner
from test_callbacks import CELL, SMALL, corpus, run, same, weights_of
from test_fastai_world import language_dls as text_dls

from nni_darts_rnn.callbacks import PrintGenotype
from nni_darts_rnn.learner import language_dls, lm_learner, search_learner
from nni_darts_rnn.recipes import get_recipe


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
    dls = text_dls()
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
    on_fastais = run(lm_learner(text_dls(), CELL, SMALL, path=tmp_path))
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
    learn = run(learner(tmp_path, nonmono=1, patience=2, lr=30.0), 200)
    ended = len(learn.recorder.values)
    assert ended < 200
    logs = list(learn.ntasgd.logs)
    assert logs.index(min(logs)) == len(logs) - 3
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
