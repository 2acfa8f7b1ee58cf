"""Numbers that go wrong: noticed in the step that made them; then back to the last good checkpoint with a smaller step, or a clear end."""

from __future__ import annotations

import math

import pytest
import torch
from crashes import CELL, RECIPE, corpus

from nni_darts_rnn import health
from nni_darts_rnn.checkpoints.store import Checkpoints, Every
from nni_darts_rnn.genotype import Genotype
from nni_darts_rnn.health import NotFinite, check_epoch, check_finite, collapse, spread, with_rollbacks
from nni_darts_rnn.recipes import override

pytestmark = pytest.mark.filterwarnings("ignore")
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_is_named(bad):
    good = torch.ones(3, 2)
    check_finite(training_loss=good.sum(), gradient=[good, None], nothing=None, empty=[])
    with pytest.raises(NotFinite, match="^the gradient of the weights is no longer finite$"):
        check_finite(training_loss=good.sum(), gradient_of_the_weights=[good, None, torch.tensor([1.0, bad])])
    with pytest.raises(NotFinite, match="the training loss"):
        check_finite(training_loss=torch.tensor(bad), α=[torch.tensor([bad])])


def test_epochs():
    check_epoch(99.0, 10, "training")
    for bad in (101.0, NAN, INF):
        with pytest.raises(NotFinite, match="the training perplexity is .*, where guessing every word alike has 10"):
            check_epoch(bad, 10, "training")


def do_search(tmp_path, **settings):
    from nni_darts_rnn.search import search

    return search(corpus(), override(RECIPE.search, {"epochs": 2} | settings), 3, device="cpu", folder=tmp_path,
                  store=Checkpoints(tmp_path / "checkpoint", "search", {}, Every()))


def do_retrain(tmp_path, **settings):
    from nni_darts_rnn.learner import retrain

    return retrain(corpus(), CELL, override(RECIPE.retrain, {"epochs": 3} | settings), 3, tmp_path, device="cpu",
                   store=Checkpoints(tmp_path / "checkpoint", "retrain", {}, Every()))


def poison(monkeypatch, where: str, steps: list[int]) -> list[int]:
    """From then on the `steps`-th calls (counted over the whole run, its repetitions included) give NaN in the place that `where` names."""
    from nni_darts_rnn import callbacks, step_settings
    from nni_darts_rnn.evaluator import LanguageModelModule

    calls = []

    def hit() -> bool:
        calls.append(len(calls))
        return calls[-1] in steps

    if where == "search loss":
        original = LanguageModelModule.training_step

        def training_step(self, batch, batch_idx):
            out = original(self, batch, batch_idx)
            weight_step = all(isinstance(a, torch.nn.Parameter) and not a.requires_grad for n, a in self.named_parameters() if n.endswith("alpha"))
            if torch.is_grad_enabled() and weight_step and hit():  # the passes of the architecture gradient are given tensors in α's place
                out["loss"] = out["loss"] * NAN
            return out

        monkeypatch.setattr(LanguageModelModule, "training_step", training_step)
    elif where == "alpha gradient":
        original = step_settings.architecture_gradient

        def architecture_gradient(*args, **kwargs):
            found = original(*args, **kwargs)
            return found._replace(grads=[g * NAN for g in found.grads]) if hit() else found

        monkeypatch.setattr(step_settings, "architecture_gradient", architecture_gradient)
    else:
        original = callbacks.FiniteNumbers.before_step

        def before_step(self):
            if hit():
                if where == "retrain loss":
                    self.learn.loss_grad = self.learn.loss_grad * INF
                else:
                    next(p for p in self.model.parameters() if p.grad is not None).grad[0] = NAN
            original(self)

        monkeypatch.setattr(callbacks.FiniteNumbers, "before_step", before_step)
    return calls


@pytest.mark.parametrize("where, run, said", [
    ("search loss", do_search, "search: the training loss is no longer finite"), ("alpha gradient", do_search, "search: the gradient of α is no longer finite"),
    ("retrain loss", do_retrain, "retrain: the training loss is no longer finite"),
    ("retrain gradient", do_retrain, "retrain: the gradient of the weights is no longer finite")])
def test_back_to_the_last_good_checkpoint_with_a_smaller_step(tmp_path, monkeypatch, caplog, where, run, said):
    first = 2 if where == "alpha gradient" else 9  # in the second epoch; α does not move in the first
    calls = poison(monkeypatch, where, [first])
    run(tmp_path)
    said_here = [record.getMessage() for record in caplog.records if "back to" in record.getMessage()]
    assert said_here == [f"{said}; back to the beginning of epoch 2 with 0.5 times the learning rate (1 of at most 4 times)"]
    assert len(calls) > first + 1
    rows = (tmp_path / f"{said.split(':')[0]}.csv").read_text().splitlines()[1:]
    epochs = [int(row.split(",")[1]) for row in rows]
    assert epochs == ([0, 1, 2] if run is do_search else [1, 2, 3])  # no epoch twice, none missing


def test_the_smaller_rate_is_the_one_that_is_used(tmp_path, monkeypatch):
    poison(monkeypatch, "retrain loss", [9, 10])
    outcome = do_retrain(tmp_path)
    whole = do_retrain(tmp_path / "other")
    shares = [row["lr"] / of["lr"] for row, of in zip(outcome["rows"], whole["rows"], strict=True)]  # the whole run's own rates fall, as `anneal` says
    assert whole["rows"][0]["lr"] == 20.0 and shares == pytest.approx([1, 1 / 4, 1 / 4])
    assert outcome["rows"][0]["perplexity"] == whole["rows"][0]["perplexity"]
    state = Checkpoints(tmp_path / "checkpoint", "retrain", {}).load()
    assert state["rollbacks"] == 2


def test_a_search_that_goes_on_knows_how_often_it_went_back_and_how_long_it_took(tmp_path, monkeypatch):
    poison(monkeypatch, "search loss", [9, 10])
    do_search(tmp_path)
    store = Checkpoints(tmp_path / "checkpoint", "search", {}, Every())
    state = store.load()
    assert state["rollbacks"] == 2 and 0 < state["seconds"] < 60
    store.save(state["epoch"], 0, state | {"seconds": 100.0})
    do_search(tmp_path, epochs=3)
    assert store.load()["rollbacks"] == 2 and 100 < store.load()["seconds"] < 160


@pytest.mark.parametrize("where, run, name", [("search loss", do_search, "search"), ("retrain loss", do_retrain, "retrain")])
def test_a_bounded_number_of_times(tmp_path, monkeypatch, caplog, where, run, name):
    poison(monkeypatch, where, list(range(1, 1000)))
    with pytest.raises(FloatingPointError, match=rf"^{name}: the training loss is no longer finite, and smaller learning rates down to 0.0625 times "
                                                 rf"{name}.lr did not help; lower {name}.lr or {name}.clip$"):
        run(tmp_path)
    assert sum("back to" in record.getMessage() for record in caplog.records) == health.ROLLBACKS


def test_the_best_model_so_far_is_not_lost(tmp_path, monkeypatch):
    poison(monkeypatch, "retrain loss", list(range(9, 1000)))
    outcome = do_retrain(tmp_path)
    assert isinstance(outcome["ended_by"], FloatingPointError) and math.isfinite(outcome["test_perplexity"]) and outcome["epochs"] == 1


def test_the_count_goes_on_with_the_run(tmp_path, caplog):
    store = Checkpoints(tmp_path, "search", {})
    store.save(1, 0, {"rollbacks": 3, "weight": torch.zeros(1)})
    factors = []

    def once(state, factor):
        factors.append(factor)
        raise NotFinite("α is no longer finite")

    with pytest.raises(FloatingPointError, match="α is no longer finite, and"):
        with_rollbacks(store, "search", 5, once)
    assert factors == [0.5**3, 0.5**4]
    assert [record.getMessage() for record in caplog.records] == [
        "search: goes on from epoch 2, batch 1",
        "search: α is no longer finite; back to the beginning of epoch 2 with 0.0625 times the learning rate (4 of at most 4 times)"]


def test_a_phase_that_is_over_does_not_say_that_it_goes_on(tmp_path, caplog):
    store = Checkpoints(tmp_path, "search", {})
    store.save(2, 0, {"rollbacks": 0})
    assert with_rollbacks(store, "search", 2, lambda state, factor: (state["epoch"], factor)) == (2, 1.0) and not caplog.records


def test_worse_than_guessing_is_said(caplog):
    health.name_poor("search", 9.9, 10)
    health.name_poor("search", 8.0000001, 8)  # a uniform model's, rounded
    assert not caplog.records
    health.name_poor("search", 12.3, 10)
    assert "search: a validation perplexity of 12.3 is worse than guessing every word alike (10); search.lr may be too large" in caplog.text


def test_a_retraining_that_ends_worse_than_guessing_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("nni_darts_rnn.learner.perplexity", lambda *args: 1000.0)
    do_retrain(tmp_path, epochs=1)
    assert "retrain: a validation perplexity of 1000 is worse than guessing every word alike" in caplog.text


def test_nothing_to_return_to(tmp_path):
    def once(state, factor):
        raise NotFinite("α is no longer finite")

    with pytest.raises(FloatingPointError, match="search: α is no longer finite; .*: no checkpoint of the search to return to"):
        with_rollbacks(Checkpoints(tmp_path, "search", {}), "search", 5, once)


def test_weights_that_start_too_wide_are_named(tmp_path):
    """The untrained supernet is hopeless already, and there is no epoch to return to."""
    with pytest.raises(FloatingPointError, match="search: the untrained supernet's validation perplexity is .*; lower search.init_range or search.lr"):
        do_search(tmp_path, init_range=1000.0)


@pytest.mark.parametrize("run, clip", [(do_search, 0.25), (do_search, None), (do_retrain, 0.25), (do_retrain, None)])
def test_at_a_learning_rate_of_a_thousand_nothing_is_silent(tmp_path, caplog, run, clip):
    """Either it is said that the numbers went wrong, or the perplexity is better than guessing."""
    try:
        done = run(tmp_path, lr=1000.0, clip=clip)
        end = done.rows[-1]["perplexity"] if run is do_search else done["valid_perplexity"]
    except FloatingPointError as error:
        assert "lower" in str(error)
        return
    assert "times the learning rate" in caplog.text or "worse than guessing" in caplog.text or end < 10


def test_spread_and_collapse():
    primitives = ("none", "tanh", "relu", "sigmoid", "identity")
    even = torch.full((3, 5), 0.2)
    assert spread(even, primitives) == {"alpha_entropy": pytest.approx(math.log(5)), "none_share": pytest.approx(0.2), "identity_share": pytest.approx(0.2)}
    assert spread(torch.eye(5)[1:2], ("a", "b", "c", "d", "e")) == {"alpha_entropy": pytest.approx(0)}
    cell = Genotype((("tanh", 0), ("relu", 1), ("sigmoid", 0)))
    assert collapse(spread(even, primitives), cell) is None
    assert "none has 60% of the weight" in collapse({"none_share": 0.6, "identity_share": 0.1}, cell)
    assert "identity has 60% of the weight" in collapse({"none_share": 0.1, "identity_share": 0.6}, cell)
    copies = Genotype((("identity", 0), ("identity", 1), ("identity", 0)))
    assert "3 of the cell's 3 nodes are identity" in collapse(spread(even, primitives), copies)
    assert collapse({}, Genotype((("identity", 0),))) is None


def test_a_collapsing_search_is_named_and_logged_each_epoch(tmp_path, caplog, monkeypatch):
    from nni_darts_rnn import supernet

    original = supernet.MixedRNN.__init__

    def mostly_none(self, *args, **kwargs):
        original(self, *args, **kwargs)
        with torch.no_grad():
            self.alpha[:, self.primitives.index("none")] += 3

    monkeypatch.setattr(supernet.MixedRNN, "__init__", mostly_none)
    found = do_search(tmp_path, epochs=1, warmup_epochs=0)
    assert all({"alpha_entropy", "none_share", "identity_share"} <= set(row) for row in found.rows) and found.rows[0]["none_share"] > 0.5
    assert [record.getMessage().split(":")[0] for record in caplog.records if "none has" in record.getMessage()] == ["search, epoch 0", "search, epoch 1"]
    assert "none_share" in (tmp_path / "search.csv").read_text().splitlines()[0]
