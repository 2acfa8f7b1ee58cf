"""NNI's tuners, an advisor and assessors on the cell itself, through nnictl: every example runs to its end at a tiny size."""

from __future__ import annotations

import json
import re
import shutil
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from nni.algorithms.hpo.random_tuner import RandomTuner
from nnictl import Experiment
from texts import write_texts

from nni_darts_rnn.cell_trial import main, read_parameters
from nni_darts_rnn.corpus import load_corpus
from nni_darts_rnn.genotype import DARTS_V2, Genotype

ROOT = Path(__file__).parents[1]
SIZES = "--set retrain.bptt=16 --set retrain.max_bptt_above=8 --set retrain.batch_size=16"
FLAT, NESTED = (json.loads((ROOT / "search_spaces" / name).read_text()) for name in ("darts_rnn_cell.json", "darts_rnn_cell_nested.json"))
# trials, epochs of each, settings of the algorithm
CHANGES = {"random": (2, 1, {}), "tpe": (2, 8, {"epoch_num": 8, "start_step": 4}), "evolution": (3, 1, {"population_size": 2}),
           "grid": (2, 12, {}), "hyperband": (4, None, {"R": 3})}
ONNX = find_spec("onnx") is not None and find_spec("onnxscript") is not None
STOPPED = ("EARLY_STOPPED", "USER_CANCELED")  # NNI 3.0's local training service says the latter where an assessor has stopped a trial


def started(config: Path, folder: Path, cwd: Path) -> Experiment:
    """An experiment whose tuner is there. NNI gives that ten seconds to start, which a busy machine may not."""
    for _ in range(3):
        experiment = Experiment(config, folder, cwd)
        while (status := experiment.get("check-status")["status"]) != "ERROR":
            if experiment.get("trial-jobs"):
                return experiment
            time.sleep(0.5)
        experiment.stop()
    raise AssertionError(f"{config.name}: {status}")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All examples side by side: name -> (experiment, trials)."""
    folder = tmp_path_factory.mktemp("nni")
    for name in ("examples", "search_spaces"):
        shutil.copytree(ROOT / name, folder / name)
    write_texts(folder, load_corpus("pydoc"), train=6000, valid=1000, test=1000)
    # one cell, trained twice: the second learns nothing and has to be stopped
    poor = {f"cell/node_1/{key}": {"_type": "choice", "_value": [value]} for key, value in (("input", "0"), ("op", "tanh"))}
    (folder / "search_spaces" / "poor.json").write_text(json.dumps(poor | {"retrain.lr": {"_type": "choice", "_value": [5.0, 1e-9]}}))
    running = {}
    try:
        for name, (n, epochs, settings) in CHANGES.items():
            path = folder / "examples" / f"cell_{name}.yml"
            config = yaml.safe_load(path.read_text())
            command = config["trialCommand"].replace("--corpus pydoc --recipe small", f"--corpus {folder} --recipe tiny {SIZES}")
            assert SIZES in command
            config["trialCommand"] = re.sub(r" --set retrain.epochs=\d+", "", command) + (f" --set retrain.epochs={epochs}" if epochs else "")
            if ONNX and name == "random":
                config["trialCommand"] += " --onnx"
            config |= {"maxTrialNumber": n, "trialConcurrency": 1}
            if name == "grid":
                config["searchSpaceFile"] = "../search_spaces/poor.json"
            for part in ("tuner", "advisor", "assessor"):
                known = config.get(part, {}).get("classArgs", {})
                known.update((key, value) for key, value in settings.items() if key in known)
            path.write_text(yaml.safe_dump(config))
            running[name] = started(path, folder / name, folder)
        yield {name: (experiment, experiment.wait(200)) for name, experiment in running.items()}
    finally:
        with ThreadPoolExecutor() as threads:
            for experiment in running.values():
                threads.submit(experiment.stop)


@pytest.mark.parametrize("name", CHANGES)
def test_every_example_runs_to_its_end(finished, name):
    experiment, trials = finished[name]
    n, epochs, _ = CHANGES[name]
    assert len(trials) == n
    cells = []
    for trial in trials:
        folder = Path(trial["logPath"])
        assert trial["status"] in ("SUCCEEDED", *STOPPED), (folder / "trial.stderr").read_text()
        cells.append(Genotype.from_json((folder / "genotype.json").read_text()))
        metrics = [(m["type"], json.loads(json.loads(m["data"]))) for m in experiment.get(f"metric-data/{trial['trialJobId']}")]
        steps = [row for kind, row in metrics if kind == "PERIODICAL"]
        assert [row["epoch"] for row in steps] == list(range(1, len(steps) + 1)) and steps
        if trial["status"] == "SUCCEEDED":
            final, = (row for kind, row in metrics if kind == "FINAL")
            result = json.loads((folder / "result.json").read_text())
            assert Genotype.from_json(result["genotype"]) == cells[-1] and (folder / "model.safetensors").is_file()
            wanted = result["valid_perplexity"]
            assert final["default"] == pytest.approx(1 / wanted if name == "tpe" else wanted)
            assert len(steps) == (epochs or result["recipe"]["retrain"]["epochs"])
    assert all(cell.n_nodes == (1 if name == "grid" else 8) for cell in cells)
    if name in ("random", "tpe"):
        assert len(set(cells)) == n


def test_what_a_trial_leaves_is_served(finished):
    """NNI's web page reads a trial's files through its server: pictures, tables, and model.onnx for its Visualization."""
    experiment, trials = finished["random"]
    for trial in trials:
        for name in ("cell.svg", "curves.png", "retrain.csv", "result.json", *(["model.onnx"] if ONNX else [])):
            with urllib.request.urlopen(f"http://127.0.0.1:{experiment.port}/api/v1/nni/trial-file/{trial['trialJobId']}/{name}", timeout=20) as answer:
                assert answer.read() == (Path(trial["logPath"]) / name).read_bytes(), name


def test_hyperband_gives_each_trial_its_own_number_of_epochs(finished):
    _, trials = finished["hyperband"]
    epochs = [json.loads((Path(t["logPath"]) / "result.json").read_text())["recipe"]["retrain"]["epochs"] for t in trials]
    assert set(epochs) == {1, 3}


def test_the_assessor_stops_a_poor_trial(finished):
    _, (good, poor) = finished["grid"][0], sorted(finished["grid"][1], key=lambda t: t["sequenceId"])
    assert good["status"] == "SUCCEEDED" and poor["status"] in STOPPED
    with open(Path(poor["logPath"]) / "retrain.csv", encoding="utf-8") as file:
        assert 2 <= len(file.readlines()) - 1 < 12  # epochs


@pytest.mark.parametrize("space", [FLAT, NESTED], ids=["flat", "nested"])
def test_what_a_tuner_draws_is_a_cell(space):
    tuner = RandomTuner(seed=0)
    tuner.update_search_space(space)
    cells = {read_parameters(tuner.generate_parameters(i))[0] for i in range(20)}
    assert len(cells) == 20 and all(cell.n_nodes == 8 for cell in cells)


def test_both_spaces_hold_the_published_cell():
    flat = DARTS_V2.to_sample()
    assert flat.keys() == FLAT.keys() and all(value in FLAT[key]["_value"] for key, value in flat.items())
    nested = {f"cell/node_{i}": {"_name": op, "input": str(j)} for i, (op, j) in enumerate(DARTS_V2.recurrent, start=1)}
    for key, value in nested.items():
        assert {"_name": value["_name"], "input": NESTED[key]["_value"][0]["input"]} in NESTED[key]["_value"]
        assert value["input"] in NESTED[key]["_value"][0]["input"]["_value"]
    assert read_parameters(flat | {"seed": 3, "TRIAL_BUDGET": 2}) == (DARTS_V2, 3, {"retrain.epochs": 2})
    assert read_parameters(nested | {"retrain.lr": 1.0}) == (DARTS_V2, 0, {"retrain.lr": 1.0})
    for more in ({"cell/node_1": nested["cell/node_1"] | {"retrain.lr": 1.0}}, {"search": {"lr": 1.0}}, {"search.lr": 1.0}):
        with pytest.raises(ValueError, match="setting '(retrain.lr|search|search.lr)': (in a choice of cell/node_1 only its input|a trial of a cell has no search)"):
            read_parameters(nested | more)


@pytest.mark.parametrize("parameters, words", [
    ({"seed": 1}, "the tuner drew no cell"), ({"cell/node_1/op": "tan", "cell/node_1/input": "0"}, "did you mean 'tanh'"),
    ({"cell/node_1/op": "tanh"}, "cell/node_1/input"), ({"cell/node_1": {"_name": "tanh"}}, "label 'cell/node_1/input' is missing"),
    ({"cell/node_1/op": "tanh", "cell/node_1/input": "0", "search.epochs": 1}, "has no search"),
    ({"cell/node_1/op": "tanh", "cell/node_1/input": "0", "retrain.epoch": 1}, "did you mean 'retrain.epochs'"),
    ({"cell/node_1/op": "tanh", "cell/node_1/input": "0", "cell/node_3/input": "0"}, "node_3/input"),
    ({"cell/node_1/op": "tanh", "cell/node_1/input": "0", "TRIAL_BUDGET": 0.5}, "retrain.epochs: 0.5")])
def test_refusals(parameters, words, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("nni.get_next_parameter", lambda: parameters)
    monkeypatch.chdir(tmp_path)
    assert main(["--recipe", "tiny"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1 and not list(tmp_path.iterdir())
