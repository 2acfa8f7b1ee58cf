"""Experiments read from their folders, and the commands for afterwards: plot, best, retrain --from, init."""

import json
import os
import random
import shlex
import shutil
import sqlite3
import subprocess
import sys
import zipfile
from importlib.metadata import PackagePath
from pathlib import Path

import pytest

from nni_darts_rnn import cli, corpus
from nni_darts_rnn.commands import afterwards, starter
from nni_darts_rnn.files import write_csv, write_json, write_text
from nni_darts_rnn.genotype import DARTS_V1, DARTS_V2, Genotype
from nni_darts_rnn.options import differences
from nni_darts_rnn.outputs import figures
from nni_darts_rnn.recipes import get_recipe, override
from nni_darts_rnn.report.experiments import CORPUS_NAMES, known_experiments, load_experiment

ROOT = Path(__file__).parents[1]
SMALL = ["--recipe", "tiny", "--device", "cpu", "--set", "search.batch_size=4", "--set", "search.eval_batch_size=4", "--set", "search.n_nodes=2",
         "--set", "search.hidden_size=4", "--set", "retrain.hidden_size=4", "--set", "retrain.epochs=1", "--set", "retrain.batch_size=4",
         "--set", "retrain.eval_batch_size=4", "--set", "retrain.test_batch_size=4"]


def write_trial(folder: Path, valid: float, cell: Genotype = DARTS_V2, seed: int = 1, recipe=None, epochs: int = 3) -> Path:
    """What a finished trial leaves, but for the weights."""
    recipe = recipe or get_recipe("small")
    write_text(folder / "genotype.json", cell.to_json() + "\n")
    n = cell.n_nodes * (cell.n_nodes + 1) // 2
    alpha = [[[1e-3 * ((e * 7 + k * 3 + epoch * (e + k)) % 11) for k in range(5)] for e in range(n)] for epoch in range(epochs)]
    write_json(folder / "alpha.json", {"primitives": ["none", "tanh", "relu", "sigmoid", "identity"], "epochs": list(range(epochs)), "alpha": alpha})
    write_csv(folder / "search.csv", [{"phase": "search", "epoch": e, "perplexity": 900 / (e + 1)} for e in range(epochs)])
    write_csv(folder / "retrain.csv", [{"phase": "retrain", "epoch": e + 1, "perplexity": valid + 40 / (e + 1)} for e in range(epochs)])
    write_json(folder / "result.json", {
        "seed": seed, "corpus": "pydoc", "recipe": recipe.to_dict(), "genotype": cell.to_json(), "supernet_valid_perplexity": 300.0,
        "valid_perplexity": valid, "test_perplexity": valid - 2, "unigram_perplexity": 512.0, "bigram_perplexity": 204.5, "parameters": 163190, "search_seconds": 61.0, "retrain_seconds": 30.0,
        "seconds": 92.0, "versions": {"python": "3.11.7", "torch": "2.14.1"}})
    return folder


def write_experiment(home: Path, trials: dict[str, tuple[str, dict]], command="--corpus pydoc --recipe small --threads 1", status="DONE",
                     name="cells", key="abcd1234", module="trial", pid=None) -> Path:
    """An experiment in NNI's list and NNI's database; `trials`: id -> (last event, parameters). Its folder."""
    from nni.tools.nnictl.config_utils import Experiments

    root = home / "nni-experiments"
    root.mkdir(parents=True, exist_ok=True)
    Experiments(str(root)).add_experiment(key, 8080, 1_700_000_000_000, "local", name, endTime=1_700_000_300_000, status=status, pid=pid, logDir=str(root))
    folder = root / key
    (folder / "db").mkdir(parents=True)
    database = sqlite3.connect(folder / "db" / "nni.sqlite")
    database.executescript("create table TrialJobEvent (timestamp integer, trialJobId text, event text, data text, logPath text, sequenceId integer,"
                           " message text, environmentId text); create table ExperimentProfile (params text, id text, execDuration integer,"
                           " startTime integer, endTime integer, logDir text, nextSequenceId integer, revision integer);")
    for number, (trial, (event, parameters)) in enumerate(trials.items()):
        where = folder / "environments" / "local-env" / "trials" / trial
        where.mkdir(parents=True)
        data = json.dumps({"parameter_id": number, "parameters": parameters})
        for what in dict.fromkeys(["WAITING", "RUNNING", event] if event != "WAITING" else ["WAITING"]):
            database.execute("insert into TrialJobEvent values (0, ?, ?, ?, ?, 0, null, 'local-env')",
                             (trial, what, data if what in ("WAITING", "RUNNING") else None, str(where)))
    params = {"experimentName": name, "trialCommand": f"python3 -m nni_darts_rnn.{module} {command}", "trialCodeDirectory": str(home)}
    database.execute("insert into ExperimentProfile values (?, ?, 0, 1700000000000, null, ?, 2, 1)", (json.dumps(params), key, str(folder)))
    database.commit()
    database.close()
    return folder


def trial_folder(experiment: Path, trial: str) -> Path:
    return experiment / "environments" / "local-env" / "trials" / trial


def run(*argv) -> int:
    try:
        return cli.main([str(a) for a in argv])
    except SystemExit as leaving:
        return leaving.code


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_mixed(home: Path) -> Path:
    """Two finished trials, one running, one failed, one waiting; the experiment runs."""
    folder = write_experiment(home, {"aaaaa": ("SUCCEEDED", {"seed": 1}), "bbbbb": ("SUCCEEDED", {"seed": 2, "search.arch_lr": 0.02}),
                                     "ccccc": ("RUNNING", {"seed": 3}), "ddddd": ("FAILED", {"seed": 4, "search.arch_lrr": 1}),
                                     "eeeee": ("WAITING", {"seed": 5})}, status="RUNNING")
    write_trial(trial_folder(folder, "aaaaa"), 80.0)
    write_trial(trial_folder(folder, "bbbbb"), 70.0, DARTS_V1, 2, get_recipe("small", {"search.arch_lr": 0.02, "retrain.clip": None}))
    write_csv(trial_folder(folder, "ccccc") / "search.csv", [{"phase": "search", "epoch": 0, "perplexity": 2000.0}])
    write_text(trial_folder(folder, "ddddd") / "trial.stderr", "warning\nerror: setting 'search.arch_lrr' is no field\n")
    return folder


@pytest.fixture
def mixed(home):
    return write_mixed(home)


def test_a_running_experiment(mixed):
    experiment = load_experiment("abcd1234")
    assert experiment.folder == mixed and experiment.name == "cells" and experiment.status == "running" and experiment.options.recipe == "small"
    assert {t.id: t.status for t in experiment.trials} == {"aaaaa": "succeeded", "bbbbb": "succeeded", "ccccc": "running", "ddddd": "failed",
                                                            "eeeee": "waiting"}
    assert [t.id for t in experiment.ranking()] == ["bbbbb", "aaaaa"] and experiment.best().result.genotype == DARTS_V1
    trials = {t.id: t for t in experiment.trials}
    assert trials["ddddd"].note == "error: setting 'search.arch_lrr' is no field" and trials["ddddd"].commands() == []  # its last words
    assert trials["ccccc"].seed == 3 and trials["ccccc"].recipe == get_recipe("small")
    assert load_experiment(mixed).ranking() == load_experiment(str(mixed)).ranking() == experiment.ranking()


def test_an_experiment_whose_tuner_draws_cells(home, capsys):
    drawn = {f"cell/node_{i}/{what}": value for i in (1, 2) for what, value in (("op", "relu"), ("input", "0"))} | {"seed": 4, "retrain.lr": 3.0}
    folder = write_experiment(home, {"aaaaa": ("SUCCEEDED", drawn), "bbbbb": ("RUNNING", drawn), "ccccc": ("WAITING", {"cell/node_1/op": "relu"})},
                              "--corpus texts --recipe tiny --threads 1", status="RUNNING", module="cell_trial")
    (home / "texts").mkdir()
    cell = Genotype((("relu", 0), ("relu", 0)))
    write_trial(trial_folder(folder, "aaaaa"), 80.0, cell, 4, get_recipe("tiny", {"retrain.lr": 3.0}))
    trials = {t.id: t for t in load_experiment("abcd1234").trials}
    for name in ("aaaaa", "bbbbb"):  # one that has ended tells it itself, of the other only NNI knows
        (command,) = trials[name].commands("again")  # nothing was searched
        assert shlex.split(command) == ["nni-darts-rnn", "retrain", "--corpus", str(home / "texts"), "--recipe", "tiny", "--seed", "4", "--threads", "1",
                                        "--set", "retrain.lr=3.0", "--genotype", cell.to_json(), "--out", "again"]
        assert not trials[name].note
    assert trials["ccccc"].commands() == [] and "cell/node_1" in trials["ccccc"].note  # what its settings lack
    assert run("report", "abcd1234", "--out", home / "report.html") == 0
    page = (home / "report.html").read_text()
    assert "nni-darts-rnn search" not in page and str(home / "texts") in page


def test_a_rung_whose_rate_fell_cannot_be_repeated_by_commands(home, capsys):
    folder = write_experiment(home, {"aaaaa": ("SUCCEEDED", {"seed": 1, "TRIAL_BUDGET": 3}), "bbbbb": ("SUCCEEDED", {"seed": 2})})
    for name in ("aaaaa", "bbbbb"):
        write_trial(trial_folder(folder, name), 80.0, recipe=get_recipe("small", {"retrain.epochs": 3}))
    assert [t.repeats() for t in load_experiment("abcd1234").trials] == [False, True]
    assert run("report", "abcd1234", "--out", home / "report.html") == 0
    page = (home / "report.html").read_text()
    assert page.count("The numbers may differ") == page.count("give the same numbers") == 1


def test_retraining_from_a_trial_of_a_later_version_asks_for_a_recipe(mixed, capsys):
    path = trial_folder(mixed, "bbbbb") / "result.json"
    data = json.loads(path.read_text())
    data["recipe"]["retrain"]["newer"] = 1
    path.write_text(json.dumps(data))
    (mixed / "db" / "nni.sqlite").unlink()  # which would tell the settings too
    assert run("retrain", "--from", "abcd1234") == 2
    assert "this version does not know the recipe of trial bbbbb; give --recipe" in capsys.readouterr().err


def test_what_was_running_when_an_experiment_was_stopped_is_stopped(home):
    write_experiment(home, {"aaaaa": ("RUNNING", {"seed": 1}), "bbbbb": ("USER_CANCELED", {"seed": 2})}, status="STOPPED")
    assert load_experiment("abcd1234").count() == "2 stopped"


def test_a_folder_copied_without_database(mixed, tmp_path):
    bare = tmp_path / "copy"
    (bare / "environments" / "local-env").mkdir(parents=True)
    trial_folder(mixed, "aaaaa").parent.rename(bare / "environments" / "local-env" / "trials")
    assert load_experiment(bare).best().id == "bbbbb"


def test_a_database_without_a_profile_is_of_trials_alone(mixed):
    with sqlite3.connect(mixed / "db" / "nni.sqlite") as database:
        database.execute("delete from ExperimentProfile")
    experiment = load_experiment("abcd1234")
    assert len(experiment.trials) == 5 and experiment.best().id == "bbbbb" and experiment.options.corpus == "pydoc"


@pytest.mark.parametrize("change", [
    lambda text: "", lambda text: text[:len(text) // 2], lambda text: "[]", lambda text: "null", lambda text: text.replace("70.0", "NaN"),
    lambda text: text.replace("70.0", "-1"), lambda text: text.replace("70.0", "0"), lambda text: text.replace("relu", "relou"), lambda text: text.replace('"seed"', '"sed"'),
    lambda text: "[" * 10_000])
def test_a_damaged_result_is_a_failed_trial(mixed, change):
    path = trial_folder(mixed, "bbbbb") / "result.json"
    path.write_text(change(path.read_text()))
    experiment = load_experiment("abcd1234")
    assert experiment.best().id == "aaaaa"
    (bad,) = [t for t in experiment.trials if t.id == "bbbbb"]
    assert bad.status == "failed" and bad.note.startswith("result.json: ") and "\n" not in bad.note


BIG = "1" + "0" * 400  # a whole number that no float holds


def test_whole_numbers_that_no_float_holds(mixed, capsys):
    folder = trial_folder(mixed, "bbbbb")
    result, alpha = folder / "result.json", folder / "alpha.json"
    whole = result.read_text()
    result.write_text(whole.replace("70.0", BIG))
    assert run("best", "abcd1234") == 0 and "best trial  aaaaa" in capsys.readouterr().out
    result.write_text(whole.replace("163190", BIG))
    assert run("best", "abcd1234") == 0 and "best trial  bbbbb" in capsys.readouterr().out
    for text in (f'{{"primitives": ["tanh"], "alpha": [[[{BIG}]]]}}', f'{{"primitives": ["tanh"], "alpha": [[[1]]], "epochs": [{BIG}]}}',
                 '{"primitives": ["\\ud800", "tanh"], "alpha": [[[0, 1]]]}'):
        alpha.write_text(text)
        assert run("plot", folder) == 0 and "not drawn: cell.gif, alpha.svg, alpha.png: " in capsys.readouterr().err
        assert run("report", "abcd1234") == 0


def test_a_columns_name_is_no_formula(tmp_path):
    for name in ("$" + "{" * 3000 + "}" * 3000 + "$perplexity", r"$\frac{$ perplexity"):
        (tmp_path / "retrain.csv").write_text(f"phase,epoch,{name}\nretrain,1,3\n")
        assert figures.draw(tmp_path, ["curves.svg"])[1] == {}


def test_unknown_experiments_are_refused_in_one_line(mixed, capsys):
    for command in (["best"], ["report"], ["retrain", "--from"]):
        assert run(*command, "abcd1235") == 2
        text = capsys.readouterr()
        assert not text.out and len(text.err.splitlines()) == 1
        assert "'abcd1235' is neither an id nor a folder; known ids: abcd1234; did you mean 'abcd1234'?" in text.err
    listed = mixed.parent / ".experiment"
    entries = json.loads(listed.read_text())
    listed.write_text(json.dumps(entries | {f"old{k:02}": {"startTime": k} for k in range(20)}))
    assert run("best", "abcd1235") == 2
    assert "; known ids: abcd1234, old19, old18, old17, old16, old15, old14, old13 and 13 older; did you mean" in capsys.readouterr().err
    (mixed.parents[1] / "empty").mkdir()
    assert run("best", mixed.parents[1] / "empty") == 2 and "not an NNI experiment's folder" in capsys.readouterr().err
    (mixed / "db" / "nni.sqlite").write_bytes(b"no database")
    assert run("best", "abcd1234") == 2 and "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("change", [
    "update ExperimentProfile set params = '[1]'", "update ExperimentProfile set params = null", "update ExperimentProfile set params = '5'",
    "update ExperimentProfile set params = replace(hex(zeroblob(50000)), '0', '[')", """update ExperimentProfile set params = '{"trialCommand": 5}'""",
    "alter table ExperimentProfile drop column params", "update TrialJobEvent set trialJobId = null", "update TrialJobEvent set trialJobId = x'ff'",
    "update TrialJobEvent set logPath = x'ff'"])
def test_a_database_of_somebody_elses_is_refused_in_one_line(mixed, capsys, change):
    with sqlite3.connect(mixed / "db" / "nni.sqlite") as database:
        database.execute(change)
    for command in ("best", "report"):
        assert run(command, mixed) == 2
        said = capsys.readouterr().err
        assert "NNI's database cannot be read" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("moment", ["9e999", "99999999999999999"])
def test_a_moment_that_no_calendar_has(mixed, moment):
    (mixed.parent / ".experiment").unlink()
    with sqlite3.connect(mixed / "db" / "nni.sqlite") as database:
        database.execute(f"update ExperimentProfile set startTime = {moment}, endTime = {moment}")
    assert run("report", mixed) == 0 and "<dt>Started</dt>" not in Path("report.html").read_text()


def test_nothing_known_and_nothing_finished(home, capsys):
    assert known_experiments() == {}
    assert run("best", "abcd1234") == 2 and "NNI knows no experiment on this machine" in capsys.readouterr().err
    folder = write_experiment(home, {"aaaaa": ("RUNNING", {"seed": 1})}, status="RUNNING")
    assert run("best", "abcd1234") == 2
    assert capsys.readouterr().err == "nni-darts-rnn: error: experiment abcd1234: no trial has finished yet (1 running)\n"
    trial_folder(folder, "bbbbb").mkdir()  # of which NNI has not told its database yet
    assert run("best", "abcd1234") == 2
    assert capsys.readouterr().err == "nni-darts-rnn: error: experiment abcd1234: no trial has finished yet (1 running, 1 waiting)\n"


def test_an_experiment_of_failures_says_where_the_reasons_are(home, capsys):
    folder = write_experiment(home, {"aaaaa": ("FAILED", {"seed": 1}), "bbbbb": ("FAILED", {"seed": 2})}, status="DONE")
    (trial_folder(folder, "aaaaa") / "trial.stderr").touch()  # of one that said nothing
    (trial_folder(folder, "aaaaa").parent / "notes.txt").touch()  # no trial
    assert run("best", "abcd1234") == 2
    assert capsys.readouterr().err == ("nni-darts-rnn: error: experiment abcd1234: no trial has a result (2 failed); `nni-darts-rnn report abcd1234` says what ended them\n")


def test_best(mixed, capsys):
    assert run("best", "abcd1234") == 0
    text = capsys.readouterr()
    assert "bbbbb, seed 2: validation perplexity 70.00, test 68.00, 163,190 parameters" in text.out and str(trial_folder(mixed, "bbbbb")) in text.out
    assert text.err == "next: nni-darts-rnn retrain --from abcd1234\n" and "none yet: nni-darts-rnn plot draws them" in text.out
    assert run("best", "abcd1234", "--json") == 0
    text = capsys.readouterr()
    found = json.loads(text.out)
    assert not text.err and found["trial"] == "bbbbb" and found["parameters"] == {"seed": 2, "search.arch_lr": 0.02} and found["finished"] == 2
    assert Genotype.from_json(json.dumps(found["genotype"])) == DARTS_V1 and found["next"].startswith("nni-darts-rnn retrain --from")


def test_the_best_of_results_that_say_little(mixed, capsys):
    path = trial_folder(mixed, "bbbbb") / "result.json"
    data = json.loads(path.read_text())
    write_json(path, data | {"test_perplexity": None, "parameters": None})
    (path.parent / "cell.svg").touch()
    assert run("best", "abcd1234") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "best trial  bbbbb, seed 2: validation perplexity 70.00" in lines and "pictures    cell.svg" in lines


def test_an_experiment_of_which_nni_does_not_list_the_folder_is_where_nni_puts_them(mixed):
    listed = mixed.parent / ".experiment"
    entries = json.loads(listed.read_text())
    del entries["abcd1234"]["logDir"]
    listed.write_text(json.dumps(entries))
    assert load_experiment("abcd1234").folder == mixed


def test_a_corpus_of_ones_own_is_read_without_the_folder_of_the_trials(home, monkeypatch):
    read = []
    monkeypatch.setattr("nni_darts_rnn.commands.compute.open_corpus", lambda arguments: read.append(arguments) or 1 / 0)
    folder = write_experiment(home, {"aaaaa": ("SUCCEEDED", {"seed": 1})}, "--corpus penn --corpus-folder ptb --corpus-mirror https://example.org --recipe small")
    write_trial(trial_folder(folder, "aaaaa"), 80.0)
    for own in ([], ["--corpus", "texts"]):
        with pytest.raises(ZeroDivisionError):
            run("retrain", "--from", "abcd1234", *own)
    assert [(a.corpus, a.corpus_folder, a.corpus_mirror) for a in read] == [("penn", "ptb", "https://example.org"), ("texts", None, None)]


def test_commands_name_what_differs_from_the_recipe(home, mixed):
    best = load_experiment("abcd1234").best()
    search, retrain = best.commands()
    assert search == "nni-darts-rnn search --corpus pydoc --recipe small --seed 2 --threads 1 --set search.arch_lr=0.02 --out runs/bbbbb"
    assert retrain == ("nni-darts-rnn retrain --corpus pydoc --recipe small --seed 2 --threads 1 --set retrain.clip=none --genotype runs/bbbbb "
                       "--out runs/bbbbb")
    assert set(differences(best.recipe)) == {"search.arch_lr", "retrain.clip"}


def test_commands_name_the_device_and_no_number_of_threads_that_was_not_given(home):
    write_experiment(home, {"aaaaa": ("RUNNING", {"seed": 2})}, "--corpus pydoc --recipe small --device cpu")
    search, retrain = load_experiment("abcd1234").trials[0].commands()
    assert search == "nni-darts-rnn search --corpus pydoc --recipe small --seed 2 --device cpu --out runs/aaaaa"
    assert retrain == "nni-darts-rnn retrain --corpus pydoc --recipe small --seed 2 --device cpu --genotype runs/aaaaa --out runs/aaaaa"


@pytest.mark.parametrize("given, expected", [
    ({"retrain.lr": 7.0, "retrain.anneal": 0.5}, dict(optimizer="sgd", lr=7.0, nonmono=2, patience=10)),
    ({"retrain.lr": 7.0, "retrain.anneal": 0.0, "retrain.patience": 4}, dict(optimizer="sgd", lr=7.0, nonmono=2, patience=4)),
    ({"retrain.nonmono": 8, "retrain.anneal": 0.0, "retrain.patience": 10}, dict(optimizer="sgd", nonmono=8, patience=10)),
    ({"retrain.nonmono": None, "retrain.anneal": 0.0, "retrain.patience": 1}, dict(optimizer="sgd", nonmono=None, patience=10)),
    ({"retrain.nonmono": 8}, dict(optimizer="sgd", nonmono=8, patience=16)),
    ({"retrain.optimizer": "adam", "retrain.lr": 0.004, "retrain.nonmono": None}, dict(optimizer="sgd", lr=20.0, nonmono=5, patience=10)),
    ({"retrain.optimizer": "adam", "retrain.lr": 0.004, "retrain.nonmono": None, "retrain.anneal": 0, "retrain.patience": 4, "retrain.dropout": 0.01, "retrain.dropout_h": 0.01},
     dict(optimizer="sgd", lr=20.0, nonmono=5, patience=10, dropout=0.3, dropout_h=0.1))])
def test_how_the_best_cell_is_trained_on(home, given, expected, monkeypatch, capsys):
    """By SGD and averaging, until it gets no better, whatever its trial had."""
    trained, recipe = [], get_recipe("small", given)
    monkeypatch.setattr("nni_darts_rnn.pipeline.retrain_phase", lambda corpus, cell, recipe, *_: trained.append(recipe) or 1 / 0)
    folder = write_experiment(home, {"aaaaa": ("SUCCEEDED", {"seed": 1})}, "--corpus pydoc --recipe small " + " ".join(f"--set {k}={v}" for k, v in given.items()))
    write_trial(trial_folder(folder, "aaaaa"), 80.0, recipe=recipe)
    with pytest.raises(ZeroDivisionError):
        run("retrain", "--from", "abcd1234")
    found, = trained
    assert found == override(recipe.retrain, expected | dict(epochs=1000, anneal=0))
    assert ("retrained with Adam; here with SGD" in capsys.readouterr().err) == ("retrain.optimizer" in given)


def test_a_trials_own_parameters_go_before_those_that_nni_lists(home):
    """NNI may list for trials that begin together what it gave to each other."""
    listed = {"aaaaa": ("SUCCEEDED", {"seed": 1, "search.lr": 0.1}), "bbbbb": ("RUNNING", {"seed": 2, "search.lr": 0.2}), "ccccc": ("RUNNING", {"seed": 3})}
    folder = write_experiment(home, listed, status="RUNNING")
    write_trial(trial_folder(folder, "aaaaa"), 80.0, seed=2, recipe=get_recipe("small", {"search.lr": 0.2}))
    for trial, given in (("aaaaa", {"seed": 2, "search.lr": 0.2}), ("bbbbb", {"seed": 1, "search.lr": 0.1})):
        write_json(trial_folder(folder, trial) / "parameters.json", {"parameter_id": 0, "parameters": given})
    write_text(trial_folder(folder, "ccccc") / "parameters.json", "damaged")
    trials = {t.id: t for t in load_experiment("abcd1234").trials}
    assert [trials[t].parameters for t in ("aaaaa", "bbbbb", "ccccc")] == [{"seed": 2, "search.lr": 0.2}, {"seed": 1, "search.lr": 0.1}, {"seed": 3}]
    assert trials["bbbbb"].seed == 1 and trials["bbbbb"].recipe.search.lr == 0.1


def test_what_a_rungs_own_page_says_of_doing_it_again(home):
    """Without NNI's database, as in the trial, it knows of its budget by what it keeps."""
    from nni_darts_rnn.report.trial_folder import read_trial

    options, told = load_experiment(write_experiment(home, {"aaaaa": ("RUNNING", {})})).options, []
    folder = write_trial(home / "trial", 80.0)
    for given in ({"seed": 1}, {"seed": 1, "TRIAL_BUDGET": 2}):
        write_json(folder / "parameters.json", {"parameter_id": 0, "parameters": given})
        told.append(any("NNI_DARTS_RNN_FUSED=1" in command for command in read_trial("aaaaa", folder, {}, options, alive=False).commands()))
    assert told == [False, True]


def test_what_was_stopped_is_stopped_while_it_is_viewed(home):
    write_experiment(home, {"aaaaa": ("SUCCEEDED", {}), "bbbbb": ("RUNNING", {})}, status="VIEWED")
    assert [t.status for t in load_experiment("abcd1234").trials][1] == "stopped"


def test_what_ran_when_nnis_manager_was_killed_is_stopped(home):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for key, pid, expected in (("abcd1234", ended.pid, ("stopped", "stopped")), ("bbcd1234", os.getpid(), ("running", "running")),
                               ("cbcd1234", 2**40, ("running", "running"))):
        write_experiment(home, {"aaaaa": ("RUNNING", {})}, status="RUNNING", key=key, pid=pid)
        found = load_experiment(key)
        assert (found.status, found.trials[0].status) == expected


def test_an_id_is_no_path(home, monkeypatch):
    """An experiment's and a trial's are what a database says, which may be somebody else's."""
    folder = write_experiment(home, {"aaaaa": ("SUCCEEDED", {"seed": 1})})
    write_trial(trial_folder(folder, "aaaaa"), 80.0)
    (folder.parent / ".experiment").unlink()
    with sqlite3.connect(folder / "db" / "nni.sqlite") as database:
        database.execute("update ExperimentProfile set id = 'x/../../../out'")
        database.execute("update TrialJobEvent set trialJobId = '../../b', logPath = ?", (str(trial_folder(folder, "aaaaa")),))
    shutil.move(trial_folder(folder, "aaaaa"), trial_folder(folder, "aaaaa").parents[1] / "moved")
    with sqlite3.connect(folder / "db" / "nni.sqlite") as database:
        database.execute("update TrialJobEvent set logPath = ?", (str(trial_folder(folder, "aaaaa").parents[1] / "moved"),))
    made = []
    monkeypatch.setattr("nni_darts_rnn.pipeline.retrain_phase", lambda *arguments: made.append(arguments[4]) or 1 / 0)
    here = home / "deep" / "work"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    with pytest.raises(ZeroDivisionError):
        run("retrain", "--from", folder, "--recipe", "tiny")
    assert [path.parent for path in made] == [Path("runs")] and made[0].resolve().parent == here / "runs"
    assert all("../" not in command for command in load_experiment(folder).trials[0].commands())


def test_variables_of_the_shell_in_a_trials_command(home, monkeypatch):
    monkeypatch.setenv("TEXTS", str(home / "texts"))
    write_experiment(home, {"aaaaa": ("RUNNING", {})}, "--corpus $TEXTS/one --corpus-folder ${TEXTS}")
    options = load_experiment("abcd1234").options
    assert (options.corpus, options.corpus_folder) == (str(home / "texts" / "one"), str(home / "texts"))


def test_a_folder_from_elsewhere_reads_no_variable(home, monkeypatch):
    """They may be secrets, and a command that it names may take them to a mirror."""
    monkeypatch.setenv("SECRET", "hunter2")
    folder = write_experiment(home, {"aaaaa": ("SUCCEEDED", {"seed": 1})}, "--corpus penn --corpus-mirror https://example.org/$SECRET")
    write_trial(trial_folder(folder, "aaaaa"), 80.0)
    elsewhere = home / "elsewhere" / "abcd1234"
    shutil.copytree(folder, elsewhere)
    assert load_experiment("abcd1234").options.corpus_mirror == load_experiment(folder).options.corpus_mirror == "https://example.org/hunter2"
    assert load_experiment(elsewhere).options.corpus_mirror == "https://example.org/$SECRET"
    assert run("report", elsewhere) == 0 and "hunter2" not in (home / "report.html").read_text()


def test_a_corpus_in_a_relative_folder_is_found_from_elsewhere(home):
    (home / "my texts").mkdir()
    (home / "pydoc").mkdir()  # a name goes before a folder
    write_experiment(home, {"aaaaa": ("RUNNING", {})}, "--corpus 'my texts' --alpha-fraction 0.1 && echo done")
    write_experiment(home, {"aaaaa": ("RUNNING", {})}, "--corpus pydoc", key="bbcd1234")
    write_experiment(home, {"aaaaa": ("RUNNING", {})}, "--corpus", key="cbcd1234")
    assert f"--corpus '{home / 'my texts'}' --alpha-fraction 0.1 " in load_experiment("abcd1234").trials[0].commands()[0]
    assert load_experiment("bbcd1234").options.corpus == load_experiment("cbcd1234").options.corpus == "pydoc"
    assert CORPUS_NAMES == corpus.NAMES


def test_do_it_again_gives_the_same_numbers_and_retrain_from(home, capsys):
    """A real trial; the printed commands; `retrain --from`, which takes its corpus and recipe."""
    from nni_darts_rnn import trial

    folder = home / "texts"
    folder.mkdir()
    draw = random.Random(0)  # no text that repeats itself: streams alike in every word have no variance for BatchNorm
    for split, count in (("train", 40), ("valid", 16), ("test", 16)):
        lines = [" ".join(draw.choices("the a cat dog sat ran on mat".split(), k=6)) for _ in range(count)]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    experiment = write_experiment(home, {"aaaaa": ("SUCCEEDED", {"seed": 0})}, f"--corpus texts {' '.join(SMALL)}")
    where = trial_folder(experiment, "aaaaa")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NNI_OUTPUT_DIR", str(where))
        assert trial.main(["--corpus", str(folder), *SMALL]) == 0
    assert {"cell.svg", "cell.png", "alpha.svg", "alpha.png", "curves.svg"} <= set(os.listdir(where))
    done = load_experiment("abcd1234").best()
    for command in done.commands(str(home / "again")):
        assert run(*shlex.split(command)[1:], "--json") == 0
    assert (home / "again" / "alpha.json").read_bytes() == (where / "alpha.json").read_bytes()
    capsys.readouterr()
    assert run("retrain", "--from", "abcd1234", "--set", "retrain.patience=3") == 0
    text = capsys.readouterr()
    assert "trial aaaaa" in text.err and "up to 1,000 epochs or until 3 bring no better validation perplexity" in text.err
    assert "at most" in text.err and "Traceback" not in text.err
    out = home / "runs" / "retrain-abcd1234-aaaaa-0"
    assert text.err.splitlines()[-1] == "next: " + shlex.join(["nni-darts-rnn", "evaluate", str(out.relative_to(home)), "--corpus", str(folder)])
    assert json.loads((out / "model.json").read_text())["hidden_size"] == 4
    values = [float(line.split(",")[2]) for line in (out / "retrain.csv").read_text().splitlines()[1:]]
    assert len(values) == 1000 or values.index(min(values)) == len(values) - 1 - 3  # it had converged
    again = json.loads((home / "again" / "model.json").read_text())["extra"]["result"]
    assert again["valid_perplexity"] == pytest.approx(done.result.valid_perplexity, rel=1e-6)


def test_plot(mixed, capsys):
    folder = trial_folder(mixed, "aaaaa")
    assert run("plot", folder, "--json") == 0
    text = capsys.readouterr()
    assert {Path(p).name for p in json.loads(text.out)["pictures"]} == set(figures.PICTURES) <= set(os.listdir(folder)) and not text.err
    out = folder.parents[4] / "pictures"
    assert run("plot", trial_folder(mixed, "ccccc"), "--out", out) == 0
    text = capsys.readouterr()
    assert sorted(os.listdir(out)) == ["curves.png", "curves.svg"] and "not drawn: cell.gif, alpha.svg, alpha.png: there is no alpha.json" in text.err


def test_what_comes_after_plot(tmp_path):
    def following() -> str:
        return shlex.join(map(str, afterwards._after(tmp_path)))

    assert following() == ""
    write_text(tmp_path / "genotype.json", DARTS_V1.to_json())
    assert following() == f"nni-darts-rnn retrain --corpus FOLDER --genotype {tmp_path}"  # a cell is trained
    (tmp_path / "model.safetensors").touch()
    assert following() == f"nni-darts-rnn evaluate {tmp_path} --corpus FOLDER"  # a trained model is tested
    for extra, text in (({"corpus": "wikitext-2"}, "wikitext-2"), ({"corpus": "my texts"}, "FOLDER"), ("notes", "FOLDER"), ({}, "FOLDER")):
        write_json(tmp_path / "model.json", {"extra": extra})
        assert following() == f"nni-darts-rnn evaluate {tmp_path} --corpus {text}"


def test_plot_reads_what_fastai_wrote(tmp_path):
    (tmp_path / "history.csv").write_text("epoch,train_loss,valid_loss,perplexity,time\n0,5.5,5.4,221.4,00:26\n1,5.3,5.2,181.3,00:26\n")
    assert [(r["phase"], r["epoch"]) for r in figures.read_rows(tmp_path)] == [("retrain", 1), ("retrain", 2)]


@pytest.mark.parametrize("name, text, words", [
    (None, "", "nothing to draw"), ("alpha.json", "{}", "alpha.json: expected the keys"), ("alpha.json", "[", "alpha.json: cannot be read"),
    ("genotype.json", "{}", "genotype.json:"), ("search.csv", "phase,epoch\n", "with an epoch in it"),
    ("search.csv", "epoch,perplexity\nx,1\n", "search.csv"),
    ("model.json", "[]", "model.json: expected a JSON object")])
def test_plot_refuses_in_one_line(tmp_path, capsys, name, text, words):
    if name:
        (tmp_path / name).write_text(text)
    before = os.listdir(tmp_path)
    assert run("plot", tmp_path) == 2
    said = capsys.readouterr()
    assert words in said.err and len(said.err.splitlines()) == 1 and not said.out and os.listdir(tmp_path) == before
    assert run("plot", tmp_path / "nowhere") == 2 and "no such folder" in capsys.readouterr().err


def test_the_example_of_a_wheel_that_lies_in_a_folder_of_its_own(tmp_path, monkeypatch):
    """As `pip install --target` puts it, whose record tells of another place."""
    for name, source in starter.example_files().items():
        write_text(tmp_path / "share" / "nni_darts_rnn" / name, source.read_text(encoding="utf-8"))
    there = starter.example_files().keys()
    monkeypatch.setattr(starter, "__file__", str(tmp_path / "nni_darts_rnn" / "commands" / "starter.py"))
    monkeypatch.setattr(starter, "files", lambda name: [PackagePath("../../share/nni_darts_rnn/examples/darts_rnn.yml")])
    monkeypatch.setattr(PackagePath, "locate", lambda self: tmp_path / "nowhere", raising=False)
    assert starter.example_files() == {name: tmp_path / "share" / "nni_darts_rnn" / name for name in there}


def test_init_writes_the_example_and_replaces_nothing(tmp_path, capsys):
    assert run("init", tmp_path / "mine") == 0
    text = capsys.readouterr()
    config = tmp_path / "mine" / "examples" / "darts_rnn.yml"
    assert text.err == f"next: nnictl create --config {config}\n" and str(config) in text.out
    assert config.read_bytes() == (ROOT / "examples" / "darts_rnn.yml").read_bytes()
    space = config.parent / next(line.split()[1] for line in config.read_text().splitlines() if line.startswith("searchSpaceFile"))
    assert json.loads(space.read_text())["seed"]
    assert run("init", tmp_path / "mine", "--json") == 0  # the same files again: nothing is lost
    assert len(json.loads(capsys.readouterr().out)["files"]) == len(starter.example_files())
    config.write_text("mine")
    space.unlink()
    assert run("init", tmp_path / "mine") == 2 and "--force" in capsys.readouterr().err
    assert config.read_text() == "mine" and not space.exists()
    assert run("init", tmp_path / "mine", "--force") == 0 and space.exists() and config.read_text() != "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "search_spaces").touch()
    assert run("init", tmp_path / "other") == 2 and "search_spaces is a file, but a folder of that name is needed" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["search_spaces"]


def test_init_from_a_wheel(tmp_path):
    """The wheel holds the files, and `init` finds them where pip puts them."""
    source = tmp_path / "source"
    for name in ("nni_darts_rnn", "examples", "search_spaces"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-c", "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))", str(tmp_path)]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "prefix" / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (data,) = site.glob("*.data/data")
    (data / "share").rename(tmp_path / "prefix" / "share")  # as pip does with its scheme, and writes to RECORD
    (record,) = site.glob("*.dist-info/RECORD")
    record.write_text(record.read_text().replace(f"{data.parent.name}/data/share", "../share"))
    done = subprocess.run([sys.executable, "-m", "nni_darts_rnn.cli", "init", str(tmp_path / "mine"), "--json"], cwd=tmp_path, timeout=60,
                          env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine" / "examples" / "darts_rnn.yml").is_file() and (tmp_path / "mine" / "search_spaces" / "darts_rnn.json").is_file()
