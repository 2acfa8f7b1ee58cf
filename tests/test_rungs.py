"""Successive halving over seeds: a seed's next trial goes on where its last one ended."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
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
from nni_darts_rnn.rungs import configuration_folder

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
    monkeypatch.setattr(pipeline, "_draw", lambda *args: None)  # pictures take longer than all the rest
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


TWO = """
import os, sys
import nni, nni_darts_rnn.learner, nni_darts_rnn.pipeline, nni_darts_rnn.search
from nni_darts_rnn.trial import main
nni.get_next_parameter = lambda: {"seed": 3, "TRIAL_BUDGET": 1}
nni_darts_rnn.pipeline._draw = lambda *args: None
for folder in sys.argv[1:3]:
    if os.fork() == 0:
        os.environ["NNI_OUTPUT_DIR"] = folder
        os._exit(main(sys.argv[3:]))
sys.exit(any([os.wait()[1] for _ in range(2)]))
"""
"""Two trials, for which one process imports."""


def test_two_trials_of_a_seed_at_once_wait_for_each_other(tmp_path, corpus):
    trials = tmp_path / "a" / "trials"
    for name in ("one", "two"):
        (trials / name).mkdir(parents=True)
    words = ["--corpus", str(corpus), "--recipe", "tiny", "--device", "cpu", "--threads", "1", *(word for size in SIZES for word in ("--set", size))]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", TWO, trials / "one", trials / "two", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert digest(trials / "one" / "model.safetensors") == digest(trials / "two" / "model.safetensors")


@pytest.mark.parametrize("budget", [0, 0.5, "many"])
def test_a_budget_that_is_no_number_of_epochs(tmp_path, corpus, monkeypatch, budget):
    with pytest.raises(ValueError, match="retrain.epochs: "):
        run_trial(tmp_path / "trial", corpus, monkeypatch, {"seed": 3, "TRIAL_BUDGET": budget})
    assert not list((tmp_path / "trial").iterdir()) and not (tmp_path / "rungs").exists()


def test_a_configuration_is_one_whatever_its_budget_and_the_order_of_its_settings(tmp_path):
    one, same, another = ({"seed": 3, "search.lr": 0.1, "TRIAL_BUDGET": 1}, {"TRIAL_BUDGET": 9, "search.lr": 0.1, "seed": 3}, {"seed": 3, "search.lr": 0.2})
    folders = [configuration_folder(drawn, tmp_path / "environment" / "trials" / "a", None) for drawn in (one, same, another)]
    assert folders[0] == folders[1] != folders[2] and {folder.parent for folder in folders} == {tmp_path / "environment" / "rungs"}


def test_a_folder_for_rungs_that_nothing_would_be_kept_in(tmp_path, corpus, monkeypatch):
    with pytest.raises(ValueError, match=r"--rungs \S+: the tuner gave no TRIAL_BUDGET"):
        run_trial(tmp_path / "trial", corpus, monkeypatch, {"seed": 3}, "--rungs", str(tmp_path / "rungs"))
    assert not list((tmp_path / "trial").iterdir()) and not (tmp_path / "rungs").exists()


def make_advisor(kind, monkeypatch, *arguments, mode="serial", resume=False):
    """An advisor of brackets of nine, as NNI starts it, and the list of what it sends."""
    sent: list = []
    environment = msg_dispatcher_base.dispatcher_env_vars
    monkeypatch.setattr(msg_dispatcher_base, "dispatcher_env_vars", environment._replace(NNI_TUNER_COMMAND_CHANNEL="ws://_unittest_halving"))
    advisor = kind("minimize", 9, 3, mode, *arguments)
    monkeypatch.setattr(advisor, "send", lambda command, text: sent.append((command, json.loads(text) if text.startswith("{") else text)))
    if resume:
        advisor.load_checkpoint()
    advisor.process_command(CommandType.Initialize, {"seed": {"_type": "randint", "_value": [1, 1000]}})
    sent.clear()
    return advisor, sent


def sent_by(kind, monkeypatch, *arguments) -> list:
    """What the advisor answers when it is asked for ten trials, in a bracket of nine."""
    advisor, sent = make_advisor(kind, monkeypatch, *arguments)
    advisor.handle_request_trial_jobs(10)
    return sent


def metric(name: str, value: float, kind: str = "FINAL", sequence: int = 0) -> dict:
    return {"parameter_id": name, "trial_job_id": f"job of {name}", "type": kind, "sequence": sequence, "value": json.dumps({"default": value})}


def end(name: str, how: str = "SUCCEEDED") -> dict:
    return {"trial_job_id": f"job of {name}", "event": how, "hyper_params": json.dumps({"parameter_id": name})}


def run_to_its_end(advisor, sent, values: dict[int, float | None], first: int = 0) -> None:
    """Trials end one after the other, each asked for when the one before it has ended; `values`: of seeds, their perplexity, or None for one that fails."""
    for k in range(first, 13):
        if k == len(sent):
            break
        name, seed = sent[k][1]["parameter_id"], sent[k][1]["parameters"]["seed"]
        advisor.process_command(CommandType.ReportMetricData, metric(name, 0.1, "PERIODICAL"))  # a supernet's, say: no result
        value = values.get(seed, 200.0)
        if value is not None:
            advisor.process_command(CommandType.ReportMetricData, metric(name, value))
        advisor.process_command(CommandType.TrialEnd, end(name, "FAILED" if value is None else "SUCCEEDED"))
        advisor.process_command(CommandType.RequestTrialJobs, 1)


def rungs(sent) -> list[tuple[int, int]]:
    """(seed, epochs) of every trial sent."""
    return [(job["parameters"]["seed"], job["parameters"]["TRIAL_BUDGET"]) for _, job in sent]


SEEDS = np.random.RandomState(1).randint(1, 1000, 9).tolist()  # what a Hyperband with seed 1 draws


@pytest.mark.parametrize("results", [9, 5, 3, 2, 1])
def test_the_best_of_those_with_a_result_go_on(monkeypatch, results):
    advisor, sent = make_advisor(Hyperband, monkeypatch, 1)
    values = {seed: 100.0 - k if k >= 9 - results else None for k, seed in enumerate(SEEDS)}  # the first ones fail
    advisor.process_command(CommandType.RequestTrialJobs, 1)
    run_to_its_end(advisor, sent, values)
    goes_on = min(3, results)
    wanted = [(seed, 1) for seed in SEEDS] + [(seed, 3) for seed in SEEDS[::-1][:goes_on]] + [(SEEDS[-1], 9)]
    assert rungs(sent)[:len(wanted)] == wanted
    assert all(job["parameter_id"].startswith("0-1_0_") for _, job in sent[len(wanted):])  # then the next bracket


def test_a_rung_that_nobody_finishes_is_the_last_of_its_bracket(monkeypatch):
    advisor, sent = make_advisor(Hyperband, monkeypatch, 1)
    advisor.process_command(CommandType.RequestTrialJobs, 1)
    run_to_its_end(advisor, sent, dict.fromkeys(range(1000)))
    assert rungs(sent)[:9] == [(seed, 1) for seed in SEEDS] and sent[9][1]["parameter_id"].startswith("0-1_0_")
    monkeypatch.setattr(NniHyperband, "save_checkpoint", lambda self: None)
    advisor, sent = make_advisor(NniHyperband, monkeypatch, mode="parallelism")
    advisor.process_command(CommandType.RequestTrialJobs, 9)
    advisor.is_created_in_previous_exp = lambda name: False
    with pytest.raises(IndexError):  # NNI's own
        for _, job in list(sent):
            advisor.process_command(CommandType.TrialEnd, end(job["parameter_id"], "FAILED"))


@pytest.mark.parametrize("mode", ["serial", "parallelism"])
@pytest.mark.parametrize("stopped", range(1, 13))
def test_a_resumed_experiment_goes_on_where_it_was(tmp_path, monkeypatch, stopped, mode):
    """The same trials as undisturbed, after as many have ended; one more runs when NNI is stopped, and one is drawn that NNI had not begun and so has lost."""
    monkeypatch.setenv("NNI_CHECKPOINT_DIRECTORY", str(tmp_path))
    values = {seed: float(seed) for seed in range(1000)}
    advisor, whole = make_advisor(Hyperband, monkeypatch, 1, mode=mode)
    advisor.process_command(CommandType.RequestTrialJobs, 2 if mode == "parallelism" else 1)
    run_to_its_end(advisor, whole, values)
    (tmp_path / "hyperband.json").unlink()
    advisor, sent = make_advisor(Hyperband, monkeypatch, 1, mode=mode)
    advisor.process_command(CommandType.RequestTrialJobs, 2 if mode == "parallelism" else 1)
    for k in range(stopped):
        run_to_its_end(advisor, sent[:k + 1], values, first=k)
    running, before = [sent[stopped][1]], sent[:stopped + 1]
    advisor, after = make_advisor(Hyperband, monkeypatch, 1, mode=mode, resume=True)
    advisor.process_command(CommandType.ImportData, [])
    advisor.process_command(CommandType.AddCustomizedTrialJob, running)
    advisor.process_command(CommandType.RequestTrialJobs, 1 if mode == "parallelism" else 0)
    sent = before + after
    monkeypatch.setattr(advisor, "send", lambda command, text: sent.append((command, json.loads(text))))
    run_to_its_end(advisor, sent, values, first=stopped)
    for undisturbed, resumed in zip(whole[:13], sent[:13], strict=True):
        assert resumed[1]["parameters"] == undisturbed[1]["parameters"]
        assert resumed[1]["parameter_id"].rpartition("_")[0] == undisturbed[1]["parameter_id"].rpartition("_")[0]  # bracket and rung


def test_an_experiment_is_resumed_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setenv("NNI_CHECKPOINT_DIRECTORY", str(tmp_path))
    advisor, sent = make_advisor(Hyperband, monkeypatch, 1)
    advisor.process_command(CommandType.RequestTrialJobs, 1)
    running = sent[0][1]
    for value in (5.0, 4.0, 3.0):
        advisor, sent = make_advisor(Hyperband, monkeypatch, 1, resume=True)
        advisor.process_command(CommandType.AddCustomizedTrialJob, [running])
        advisor.process_command(CommandType.ReportMetricData, metric(running["parameter_id"], value))
        advisor.process_command(CommandType.TrialEnd, end(running["parameter_id"]))
        advisor.process_command(CommandType.RequestTrialJobs, 1)
        running = sent[-1][1]
    bracket = json.loads((tmp_path / "hyperband.json").read_text())["brackets"]["0-2"]
    assert bracket["num_finished_configs"] == [3] and len(bracket["configs_perf"][0]) == 3


def test_an_experiment_without_its_state_is_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setenv("NNI_CHECKPOINT_DIRECTORY", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="there is no hyperband.json in .* to go on from; create the experiment again, with `--rungs`"):
        make_advisor(Hyperband, monkeypatch, 1, resume=True)


def test_a_state_that_cannot_be_kept_ends_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("NNI_CHECKPOINT_DIRECTORY", str(tmp_path))
    advisor, sent = make_advisor(Hyperband, monkeypatch, 1)
    (tmp_path / "hyperband.json").unlink()
    (tmp_path / "hyperband.json").mkdir()
    advisor.process_command(CommandType.RequestTrialJobs, 2)
    assert len(sent) == 2 and "Hyperband: its state was not kept" in caplog.text


def test_a_trial_that_a_user_added_is_none_of_the_brackets(monkeypatch):
    advisor, sent = make_advisor(Hyperband, monkeypatch, 1)
    advisor.process_command(CommandType.RequestTrialJobs, 9)
    for name in (None, "0-2_0_99", "7-1_0_0"):
        advisor.process_command(CommandType.ReportMetricData, metric(name, 1.0))
        advisor.process_command(CommandType.TrialEnd, end(name))
    assert advisor.brackets["0-2"].configs_perf == [{}] and advisor.brackets["0-2"].num_finished_configs == [0]


def test_results_and_ends_come_in_their_order(monkeypatch):
    """NNI's has a queue for results and requests and one for ends, with a thread each."""
    for kind, queues in ((NniHyperband, 2), (Hyperband, 1)):
        advisor, _ = make_advisor(kind, monkeypatch)
        for command, data in ((CommandType.RequestTrialJobs, 1), (CommandType.ReportMetricData, metric("a", 1.0)), (CommandType.TrialEnd, end("a"))):
            advisor.enqueue_command(command, data)
        assert [q.qsize() for q in (advisor.default_command_queue, advisor.assessor_command_queue)] == ([3, 0] if queues == 1 else [2, 1])


@pytest.mark.parametrize("wrong, line", [
    (dict(optimize_mode="minimise"), "optimize_mode: 'minimise' is none of maximize, minimize; did you mean 'minimize'?"),
    (dict(exec_mode="series"), "exec_mode: 'series' is none of parallelism, serial; did you mean 'serial'?"),
    (dict(R=0), "R: 0 must be a whole number of at least 1"),
    (dict(eta=1), "eta: 1 must be a whole number of at least 2"),
    (dict(seed="one"), "seed: 'one' must be a whole number of at least 0"),
])
def test_arguments_of_the_advisor(monkeypatch, wrong, line):
    told = []
    monkeypatch.setattr(Hyperband, "report_error", lambda self, text: told.append(text))
    environment = msg_dispatcher_base.dispatcher_env_vars
    monkeypatch.setattr(msg_dispatcher_base, "dispatcher_env_vars", environment._replace(NNI_TUNER_COMMAND_CHANNEL="ws://_unittest_halving"))
    with pytest.raises(ValueError) as raised:
        Hyperband(**wrong)
    assert str(raised.value) == line and told == [f"Hyperband: {line}"]


def test_hyperband_draws_the_same_again(monkeypatch):
    def seeds(seed):
        return [job["parameters"]["seed"] for _, job in sent_by(Hyperband, monkeypatch, seed)]

    assert seeds(1) == seeds(1) != seeds(2) and len(set(seeds(1))) == 9
    assert seeds(1) == np.random.RandomState(1).randint(1, 1000, 9).tolist()


def test_hyperband_waits_for_the_next_rung(monkeypatch):
    for kind, last in ((NniHyperband, CommandType.NoMoreTrialJobs), (Hyperband, CommandType.NewTrialJob)):
        commands = [command for command, _ in sent_by(kind, monkeypatch)]
        assert commands[:9] == [CommandType.NewTrialJob] * 9 and commands[-1] == last and len(commands) == 9 + (kind is NniHyperband)


def small_example(folder: Path, corpus: Path, *more: str) -> Path:
    """The example with three seeds, at a tiny size."""
    shutil.copytree(ROOT / "examples", folder / "examples")
    path = folder / "examples" / "darts_rnn_halving.yml"
    text = path.read_text()
    sizes = f"--corpus {corpus} --recipe tiny " + " ".join(f"--set {size}" for size in (*SIZES, *more))
    text = text.replace("--corpus pydoc --recipe small", sizes).replace("R: 9", "R: 3").replace("maxTrialNumber: 13", "maxTrialNumber: 4")
    assert sizes in text
    path.write_text(text)
    return path


def test_the_example_by_nnictl_stopped_and_resumed(tmp_path, corpus):
    """Two seeds run; the third, which NNI has been given and has not started, is not lost, and the best goes on."""
    experiment = Experiment(small_example(tmp_path, corpus, "search.epochs=8"), tmp_path, tmp_path)
    try:
        end_of_wait = time.monotonic() + 100
        while not any(t["status"] == "RUNNING" and list(Path(t["logPath"]).glob("parameters.json")) for t in experiment.get("trial-jobs")):
            assert time.monotonic() < end_of_wait
            time.sleep(0.5)
        experiment.stop()
        experiment.resume()
        trials = sorted(experiment.wait(200), key=lambda t: t["sequenceId"])
        results = [json.loads((Path(t["logPath"]) / "result.json").read_text()) for t in trials]
        assert [t["status"] for t in trials] == ["SUCCEEDED"] * 4
        assert [r["recipe"]["retrain"]["epochs"] for r in results] == [1, 1, 1, 3]
        first = {r["seed"]: r["valid_perplexity"] for r in results[:3]}
        assert first.keys() == set(np.random.RandomState(1).randint(1, 1000000, 3).tolist()) and results[3]["seed"] == min(first, key=first.get)
    finally:
        experiment.stop()


def test_the_example_by_nnictl(tmp_path, corpus, monkeypatch):
    experiment = Experiment(small_example(tmp_path, corpus), tmp_path, tmp_path)
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
