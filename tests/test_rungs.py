"""Successive halving over seeds: a seed's next trial goes on where its last one ended."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from nni.algorithms.hpo.hyperband_advisor import Hyperband as NniHyperband
from nni.runtime import msg_dispatcher_base
from nni.runtime.tuner_command_channel import CommandType
from nnictl import Experiment
from test_resume import rows
from texts import write_texts

from nni_darts_rnn import fused, pipeline, trial
from nni_darts_rnn.corpus import load_corpus
from nni_darts_rnn.extension import SWITCH
from nni_darts_rnn.files import digest
from nni_darts_rnn.hyperband import Hyperband
from nni_darts_rnn.recipes import get_recipe
from nni_darts_rnn.report.experiments import load_experiment

ROOT = Path(__file__).parents[1]
TIMES = {"seconds", "search_seconds", "retrain_seconds"}
SIZES = ["search.bptt=16", "search.batch_size=16", "retrain.bptt=16", "retrain.max_bptt_above=8", "retrain.batch_size=16",
         "retrain.test_batch_size=16", "search.eval_batch_size=16", "retrain.eval_batch_size=16"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder with the first lines of Python's documentation."""
    return write_texts(tmp_path_factory.mktemp("corpus"), load_corpus("pydoc"), train=6000, valid=1000, test=1000)


def run_trial(folder: Path, corpus: Path, monkeypatch, parameters: dict, *options: str) -> tuple[dict, list[dict]]:
    """A trial as NNI runs it in `folder`: its result and what it reported."""
    reported: list[dict] = []
    words = ["--corpus", str(corpus), "--recipe", "tiny", "--device", "cpu", *options]
    for size in SIZES:
        words += ["--set", size]
    folder.mkdir(parents=True)
    monkeypatch.setenv("NNI_OUTPUT_DIR", str(folder))
    return trial.run(trial.make_parser().parse_args(words), parameters, reported.append), reported


def test_a_seed_goes_on_from_its_last_trial(tmp_path, corpus, monkeypatch):
    monkeypatch.setenv(SWITCH, "1")  # a rung's cell is compiled, as it may have to be trained for long; the whole of one so small would not be
    trials = tmp_path / "experiment" / "environments" / "local-env" / "trials"
    first, _ = run_trial(trials / "a", corpus, monkeypatch, {"seed": 3, "TRIAL_BUDGET": 1})
    second, reported = run_trial(trials / "b", corpus, monkeypatch, {"seed": 3, "TRIAL_BUDGET": 3})
    whole, _ = run_trial(tmp_path / "whole" / "trial", corpus, monkeypatch, {"seed": 3, "retrain.epochs": 3})
    assert [(row["phase"], row["epoch"]) for row in reported] == [("retrain", 2), ("retrain", 3)]  # neither searched nor trained again
    assert second["search_seconds"] == pytest.approx(first["search_seconds"], rel=0.1)
    for key in whole.keys() - TIMES:
        assert second[key] == whole[key], key
    assert rows(trials / "a" / "retrain.csv") == rows(tmp_path / "whole" / "trial" / "retrain.csv")[:1]
    for name in ("retrain.csv", "search.csv"):
        assert rows(trials / "b" / name) == rows(tmp_path / "whole" / "trial" / name)
    for name in ("model.safetensors", "genotype.json", "alpha.json"):
        assert digest(trials / "b" / name) == digest(tmp_path / "whole" / "trial" / name)
    assert digest(trials / "a" / "model.safetensors") != digest(trials / "b" / "model.safetensors")
    assert not (trials / "b" / "checkpoint").exists() and (trials / "b" / "report.html").exists()
    kept, = (trials.parent / "rungs").iterdir()
    assert kept.name.startswith("seed-3-")
    with pytest.raises(ValueError, match="other settings"):  # a folder of --rungs is of one recipe
        run_trial(tmp_path / "c", corpus, monkeypatch, {"seed": 3, "TRIAL_BUDGET": 3}, "--rungs", str(kept.parent), "--set", "retrain.lr=1")
    again, reported = run_trial(tmp_path / "d", corpus, monkeypatch, {"seed": 3, "TRIAL_BUDGET": 3}, "--rungs", str(kept.parent))
    assert not reported and all(again[key] == second[key] for key in second.keys() - TIMES)


def test_the_same_seed_with_fewer_epochs_is_judged_by_those(tmp_path, corpus, monkeypatch):
    """Hyperband draws with replacement."""
    run_trial(tmp_path / "a" / "trials" / "first", corpus, monkeypatch, {"seed": 3, "TRIAL_BUDGET": 3})
    told: list[dict] = []
    whole_run = pipeline.whole_run
    monkeypatch.setattr(pipeline, "whole_run", lambda *a, final, **k: whole_run(*a, final=lambda r: (told.append(r), final(r)), **k))
    for budget in (3, 1):
        result, reported = run_trial(tmp_path / "a" / "trials" / f"again-{budget}", corpus, monkeypatch, {"seed": 3, "TRIAL_BUDGET": budget})
        table = [float(row["perplexity"]) for row in rows(tmp_path / "a" / "trials" / f"again-{budget}" / "retrain.csv")]
        assert not reported and len(table) == 3 and result["epochs"] == 3  # the model that lies there
        assert result["valid_perplexity"] == pytest.approx(min(table), rel=1e-6)
        assert told[-1]["valid_perplexity"] == pytest.approx(min(table[:budget]), rel=1e-6)  # the tuner's metric
    assert table[0] > min(table)


def test_two_trials_of_a_seed_at_once_wait_for_each_other(tmp_path, corpus, monkeypatch):
    trials = tmp_path / "a" / "trials"
    monkeypatch.setattr(trial, "_leave_report", lambda *args: None)
    for name in ("one", "two"):
        (trials / name).mkdir(parents=True)
    command = [sys.executable, "-m", "nni_darts_rnn.trial", "--corpus", str(corpus), "--recipe", "tiny", "--device", "cpu", "--threads", "1"]
    for size in SIZES:
        command += ["--set", size]
    code = "import nni, sys; nni.get_next_parameter = lambda: {'seed': 3, 'TRIAL_BUDGET': 1}; from nni_darts_rnn.trial import main; sys.exit(main(sys.argv[1:]))"
    both = [subprocess.Popen([sys.executable, "-c", code, *command[3:]], env=os.environ | {"NNI_OUTPUT_DIR": str(trials / name)}, text=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for name in ("one", "two")]
    for process in both:
        assert process.wait(timeout=240) == 0, process.stderr.read()
    assert digest(trials / "one" / "model.safetensors") == digest(trials / "two" / "model.safetensors")


@pytest.mark.parametrize("budget", [0, 0.5, "many"])
def test_a_budget_that_is_no_number_of_epochs(tmp_path, corpus, monkeypatch, budget):
    with pytest.raises(ValueError, match="retrain.epochs: "):
        run_trial(tmp_path / "trial", corpus, monkeypatch, {"seed": 3, "TRIAL_BUDGET": budget})
    assert not list((tmp_path / "trial").iterdir()) and not (tmp_path / "rungs").exists()


def test_a_folder_for_rungs_that_nothing_would_be_kept_in(tmp_path, corpus, monkeypatch):
    with pytest.raises(ValueError, match=r"--rungs \S+: the tuner gave no TRIAL_BUDGET"):
        run_trial(tmp_path / "trial", corpus, monkeypatch, {"seed": 3}, "--rungs", str(tmp_path / "rungs"))
    assert not list((tmp_path / "trial").iterdir()) and not (tmp_path / "rungs").exists()


def sent_by(kind, monkeypatch, *arguments) -> list:
    """What the advisor answers when it is asked for ten trials, in a bracket of nine."""
    sent: list = []
    environment = msg_dispatcher_base.dispatcher_env_vars
    monkeypatch.setattr(msg_dispatcher_base, "dispatcher_env_vars", environment._replace(NNI_TUNER_COMMAND_CHANNEL="ws://_unittest_halving"))
    monkeypatch.setattr(kind, "send", lambda self, command, text: sent.append((command, json.loads(text))), raising=False)
    advisor = kind("minimize", 9, 3, "serial", *arguments)
    advisor.handle_update_search_space({"seed": {"_type": "randint", "_value": [1, 1000]}})
    advisor.handle_request_trial_jobs(10)
    return sent


def test_hyperband_draws_the_same_again(monkeypatch):
    def seeds(seed):
        return [job["parameters"]["seed"] for _, job in sent_by(Hyperband, monkeypatch, seed)]

    assert seeds(1) == seeds(1) != seeds(2) and len(set(seeds(1))) == 9
    assert seeds(1) == np.random.RandomState(1).randint(1, 1000, 9).tolist()


def test_hyperband_waits_for_the_next_rung(monkeypatch):
    for kind, last in ((NniHyperband, CommandType.NoMoreTrialJobs), (Hyperband, CommandType.NewTrialJob)):
        commands = [command for command, _ in sent_by(kind, monkeypatch)]
        assert commands[:9] == [CommandType.NewTrialJob] * 9 and commands[-1] == last and len(commands) == 9 + (kind is NniHyperband)


def test_the_example_by_nnictl(tmp_path, corpus, monkeypatch):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    path = tmp_path / "examples" / "darts_rnn_halving.yml"
    text = path.read_text()
    sizes = f"--corpus {corpus} --recipe tiny " + " ".join(f"--set {size}" for size in SIZES)
    text = text.replace("--corpus pydoc --recipe small", sizes).replace("R: 9", "R: 3").replace("maxTrialNumber: 13", "maxTrialNumber: 4")
    assert sizes in text
    path.write_text(text)
    experiment = Experiment(path, tmp_path, tmp_path)
    try:
        trials = sorted(experiment.wait(200), key=lambda t: t["sequenceId"])
        assert [t["status"] for t in trials] == ["SUCCEEDED"] * 4
        results = [json.loads((Path(t["logPath"]) / "result.json").read_text()) for t in trials]
        assert [r["recipe"]["retrain"]["epochs"] for r in results] == [1, 1, 1, 3]
        first = {r["seed"]: r["valid_perplexity"] for r in results[:3]}
        assert len(first) == 3 and results[3]["seed"] == min(first, key=first.get)  # the best one went on
        assert len(rows(Path(trials[3]["logPath"]) / "retrain.csv")) == 3
        metrics = [json.loads(json.loads(m["data"])) for m in experiment.get(f"metric-data/{trials[3]['trialJobId']}") if m["type"] == "PERIODICAL"]
        assert [(row["phase"], row["epoch"]) for row in metrics] == [("retrain", 2), ("retrain", 3)]
        kept, = Path(trials[0]["logPath"]).parents[1].glob("rungs")
        assert len(list(kept.iterdir())) == 3
        monkeypatch.setenv("HOME", str(tmp_path))
        again = next(t for t in load_experiment(experiment.id).trials if t.id == trials[3]["trialJobId"]).commands()
        assert "--set retrain.epochs=3" in again[1] and f"--seed {results[3]['seed']}" in again[0]
    finally:
        experiment.stop()


def test_a_rung_takes_the_path_of_a_long_training(tmp_path, corpus, monkeypatch):
    """What a short one would not gain from, it may yet gain from in its next trial, whose numbers are to be those of one training."""
    paths = []
    monkeypatch.setattr(pipeline, "take_fast_path", lambda corpus, recipe, device, n_nodes=None, more=False: paths.append(more))
    run_trial(tmp_path / "e" / "environments" / "local-env" / "trials" / "a", corpus, monkeypatch, {"seed": 3, "TRIAL_BUDGET": 1})
    run_trial(tmp_path / "whole" / "trial", corpus, monkeypatch, {"seed": 3})
    assert paths == [False, True, False, False]  # each a search and a retraining


def test_a_phase_that_may_go_on_is_decided_for_as_a_long_one(corpus, monkeypatch):
    seen = []
    monkeypatch.setattr(fused, "prepare", lambda seconds, device: seen.append(seconds))
    recipe = get_recipe("tiny").retrain
    for more in (False, True):
        pipeline.take_fast_path(load_corpus(str(corpus)), recipe, "cpu", 3, more)
    assert 0 < seen[0] < 40 and seen[1] == float("inf")


@pytest.mark.parametrize("opened", [{"retrain.epochs": 4}, {"retrain": {"epochs": 4}}])
def test_epochs_are_hyperbands(tmp_path, corpus, monkeypatch, opened):
    with pytest.raises(ValueError, match="retrain.epochs: the search space opens it, but Hyperband gives the epochs"):
        run_trial(tmp_path / "trial", corpus, monkeypatch, {"seed": 3, "TRIAL_BUDGET": 1} | opened)
    assert list((tmp_path / "trial").iterdir()) == []
