"""NNI's multi-trial strategies with `FastaiEvaluator`: in the sequential engine and as trials of NNI's local training service."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from nni.nas.evaluator import Evaluator
from nni.nas.space import RawFormatModelSpace
from nnictl import free_port
from texts import write_texts

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import multi_trial  # noqa: E402

from nni_darts_rnn import strategies  # noqa: E402
from nni_darts_rnn.corpus import load_corpus  # noqa: E402
from nni_darts_rnn.fastai_evaluator import FastaiEvaluator  # noqa: E402
from nni_darts_rnn.genotype import Genotype  # noqa: E402
from nni_darts_rnn.learner import language_dls, lm_learner  # noqa: E402
from nni_darts_rnn.model import perplexity  # noqa: E402
from nni_darts_rnn.recipes import get_recipe  # noqa: E402
from nni_darts_rnn.search import make_space  # noqa: E402
from nni_darts_rnn.space import DartsRnnSpace  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # NNI's and fastai's advice
SETTINGS = {"bptt": 16, "max_bptt_above": 8, "batch_size": 16, "eval_batch_size": 16, "test_batch_size": 16}
RECIPE = get_recipe("tiny", {"retrain": SETTINGS, "search": {"bptt": 16, "batch_size": 16, "eval_batch_size": 16, "n_nodes": 2}})
NO_TIANSHOU = find_spec("tianshou") is None
NAMES = [pytest.param(name, marks=pytest.mark.skipif(NO_TIANSHOU, reason="tianshou>=0.4.8,<0.5 is not installed (the extra `rl`)"))
         if name == "PolicyBasedRL" else name for name in multi_trial.NAMES]


@pytest.fixture(scope="module")
def text():
    whole = load_corpus("pydoc")
    return dataclasses.replace(whole, train=whole.train[:4000], valid=whole.valid[:1000], test=whole.test[:1000])


@pytest.mark.parametrize("name", NAMES)
def test_each_in_the_sequential_engine(name, text, tmp_path):
    torch.manual_seed(0)
    strategy = multi_trial.make_strategy(name, 4)
    found = multi_trial.run(make_space(len(text.vocab), RECIPE.search), FastaiEvaluator(text, RECIPE, device="cpu"), strategy, 4, folder=tmp_path)
    cells, results, epochs = zip(*found)
    assert len(found) >= 4 and list(results) == sorted(results, reverse=True)
    assert all(-math.log(len(text.vocab)) < r < 0 for r in results)  # nats per token
    assert len(set(cells)) > 1
    if name != "PolicyBasedRL":  # whose policy may draw a cell again, which is then there with the result that it had
        assert len(found) == len(set(cells)) == 4
    for result, each in zip(results, epochs):
        assert len(each) == RECIPE.retrain.epochs and max(each) == pytest.approx(result)  # the best epoch's weights are the model's


def test_a_result_is_minus_the_nats_of_the_best_epoch_and_repeats(text, monkeypatch):
    monkeypatch.setattr("nni.trial._params", None)  # what NNI's sequential engine leaves behind
    space = make_space(len(text.vocab), RECIPE.search)
    sample = {label: choice.values[-1] for label, choice in space.simplify().items()}
    evaluator, results = FastaiEvaluator(text, RECIPE, {"epochs": 1}, seed=3, device="cpu"), []
    for _ in range(2):
        model = RawFormatModelSpace(space, evaluator).freeze(sample)
        frozen = model.executable_model()
        with Evaluator.mock_runtime(model):
            results.append(evaluator.evaluate(frozen))
        assert model.metric == results[-1] == pytest.approx(-math.log(perplexity(frozen.lm, text.valid, 16, RECIPE.retrain.bptt)), rel=1e-6)
    assert results[0] == results[1]


def test_a_strategy_that_draws_in_the_same_process_draws_on(text, monkeypatch):
    monkeypatch.setattr("nni.trial._params", None)
    space = make_space(len(text.vocab), RECIPE.search)
    sample = {label: choice.values[-1] for label, choice in space.simplify().items()}
    evaluator = FastaiEvaluator(text, RECIPE, epochs=0, device="cpu")
    torch.manual_seed(5)
    np.random.seed(5)
    wanted = [(torch.rand(()).item(), np.random.rand()) for _ in range(3)]
    torch.manual_seed(5)
    np.random.seed(5)
    for each in wanted:
        assert (torch.rand(()).item(), np.random.rand()) == each
        model = RawFormatModelSpace(space, evaluator).freeze(sample)
        with Evaluator.mock_runtime(model):
            evaluator.evaluate(model.executable_model())
        model = RawFormatModelSpace(space, evaluator).freeze(sample)
        evaluator._execute(model)


def test_the_size_is_that_of_the_space(text, monkeypatch):
    """By which it is decided whether compiling pays; a recipe's own is for `make_space`."""
    monkeypatch.setattr("nni.trial._params", None)
    asked = []
    monkeypatch.setattr("nni_darts_rnn.fastai_evaluator.take_fast_path", lambda corpus, recipe, device, n_nodes: asked.append((recipe.hidden_size, recipe.epochs, n_nodes)))
    space = DartsRnnSpace(len(text.vocab), hidden_size=12, n_nodes=2)
    model = RawFormatModelSpace(space, FastaiEvaluator(text, RECIPE, epochs=0, device="cpu")).freeze({label: choice.values[-1] for label, choice in space.simplify().items()})
    with Evaluator.mock_runtime(model):
        model.evaluator.evaluate(model.executable_model())
    assert asked == [(12, 1, 2)] and RECIPE.retrain.hidden_size != 12


def evaluated(evaluator, text) -> float:
    space = make_space(len(text.vocab), RECIPE.search)
    model = RawFormatModelSpace(space, evaluator).freeze({label: choice.values[-1] for label, choice in space.simplify().items()})
    with Evaluator.mock_runtime(model):
        return evaluator.evaluate(model.executable_model())


def test_numbers_that_go_wrong_are_told_in_one_line(text, monkeypatch):
    monkeypatch.setattr("nni.trial._params", None)
    with pytest.raises(FloatingPointError, match=r"^the [a-z ]+ is no longer finite; lower the learning rate or the clipping norm$"):
        evaluated(FastaiEvaluator(text, RECIPE, {"lr": 1e30, "clip": None}, epochs=2, device="cpu"), text)


def test_a_short_test_text_is_no_obstacle(text, monkeypatch):
    """It is not read: a strategy goes by validation."""
    monkeypatch.setattr("nni.trial._params", None)
    assert evaluated(FastaiEvaluator(dataclasses.replace(text, test=text.test[:20]), RECIPE, epochs=0, device="cpu"), text) < 0


def test_a_learner_without_a_time_column_reports_its_epochs(text, tmp_path, monkeypatch):
    monkeypatch.setattr("nni.trial._params", None)
    said = []
    monkeypatch.setattr("nni.report_intermediate_result", said.append)

    def learner(model):
        learn = lm_learner(language_dls(text, RECIPE.retrain), model.lm, RECIPE.retrain, path=tmp_path)
        learn.recorder.add_time, learn.metrics = False, []
        return learn

    assert evaluated(FastaiEvaluator(learner=learner, epochs=2), text) < 0
    assert [row["epoch"] for row in said] == [1, 2] and all(row["default"] == -row["valid_loss"] for row in said)


def test_shared_weights(text, tmp_path):
    """RandomOneShot, then RegularizedEvolution on its weights: nothing is trained any more, and judging a cell twice gives the same."""
    found = multi_trial.shared_weights(text, RECIPE, 6, folder=tmp_path, accelerator="cpu", enable_progress_bar=False)
    untrained = math.log(len(text.vocab))
    assert len({cell for cell, *_ in found}) == 6 and all(-result < untrained - 0.5 for _, result, _ in found)


@pytest.mark.parametrize("options, words", [(["Random"], "only with RegularizedEvolution, not with Random"), (["RegularizedEvolution", "--engine", "ts"], "only with --engine sequential")])
def test_shared_weights_are_for_one_strategy_in_one_process(options, words, capsys):
    with pytest.raises(SystemExit):
        multi_trial.main([*options, "--shared"])
    assert words in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(text, tmp_path_factory):
    """The same text as a folder, which the process of each trial can read."""
    return write_texts(tmp_path_factory.mktemp("text"), text)


@pytest.mark.parametrize("name", NAMES)
def test_each_through_the_local_training_service(name, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("nni.trial._params", None)
    V = len(load_corpus(folder).vocab)
    evaluator = FastaiEvaluator(str(folder), "tiny", SETTINGS, epochs=2, device="cpu")
    strategy = multi_trial.make_strategy(name, 2)
    found = multi_trial.run(make_space(V, RECIPE.search), evaluator, strategy, 2, "ts", free_port(), 2, tmp_path)
    assert len(found) >= 2 and all(-math.log(V) < result < 0 and len(each) == 2 for _, result, each in found)
    trials = list(tmp_path.glob("*/environments/local-env/trials/*/genotype.json"))
    assert {Genotype.from_json(t.read_text()) for t in trials} == {cell for cell, *_ in found}


@pytest.mark.skipif(NO_TIANSHOU, reason="tianshou>=0.4.8,<0.5 is not installed (the extra `rl`)")
@pytest.mark.parametrize("dedup", [True, False])
def test_a_cell_tried_before_is_trained_again_only_when_asked(dedup, text, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(FastaiEvaluator, "evaluate", lambda self, model: trained.append(model.genotype()) or report(trained))
    space = make_space(len(text.vocab), dataclasses.replace(RECIPE.search, n_nodes=1))  # four cells
    strategy = strategies.PolicyBasedRL(dedup=dedup, samples_per_update=3)
    found = multi_trial.run(space, FastaiEvaluator(text, RECIPE), strategy, 12, folder=tmp_path)
    if dedup:
        assert len(trained) == len(set(trained)) <= 4 and len(found) > len(trained)  # the others have the metrics that they had
        assert len({(cell, result) for cell, result, _ in found}) == len(trained)
    else:
        assert len(trained) == 12 and len(set(trained)) <= 4


def report(trained: list) -> None:
    import nni

    nni.report_final_result(float(len(trained)))


@pytest.mark.parametrize("arguments, words", [
    (dict(settings={"hidden_size": 3}), "hidden_size is the model space's"), (dict(epochs=-1), "epochs: -1"), (dict(recipe="tin"), "did you mean 'tiny'"),
    (dict(settings={"epoch": 3}), "did you mean 'retrain.epochs'"), (dict(learner=print), "give epochs"),
    (dict(learner=print, epochs=1, corpus="pydoc"), "no corpus, recipe"),
    (dict(learner=print, epochs=1, device="cpu"), "or device, which the learner has itself"), (dict(learner=print, epochs=1, onnx=True), "only the language model")])
def test_refusals(arguments, words):
    with pytest.raises(ValueError) as error:
        FastaiEvaluator(**arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_refuses_a_space_of_another_vocabulary(text):
    space = make_space(len(text.vocab) + 1, RECIPE.search)
    sample = {label: choice.values[0] for label, choice in space.simplify().items()}
    with pytest.raises(ValueError, match="vocab_size"):
        FastaiEvaluator(text, RECIPE).evaluate(space.freeze(sample))
