"""The README's main command at a tiny size, with the real nnictl: trials succeed, results are where they should be, bad keys are refused."""

from __future__ import annotations

import csv
import json
import re
import shutil
import urllib.request
from pathlib import Path

from nnictl import Experiment

ROOT = Path(__file__).parents[1]


def test_all_trials_succeed_and_report(finished):
    experiment, trials, _ = finished
    assert [t["status"] for t in trials] == ["SUCCEEDED", "SUCCEEDED"]
    for trial in trials:
        metrics = [(m["type"], json.loads(json.loads(m["data"]))) for m in experiment.get(f"metric-data/{trial['trialJobId']}")]
        steps = [row for kind, row in metrics if kind == "PERIODICAL"]
        assert [(r["phase"], r["epoch"]) for r in steps] == [("search", 1), ("retrain", 1)]
        assert all(r["default"] == r["perplexity"] > 1 for r in steps)
        assert all("alpha_entropy" in r for r in steps if r["phase"] == "search")
        assert all(r["tokens_per_second"] > 0 for r in steps)
        final = [row for kind, row in metrics if kind == "FINAL"]
        assert len(final) == 1 and {"default", "test_perplexity", "parameters", "seconds"} <= set(final[0])
        untrained = next(csv.DictReader((Path(trial["logPath"]) / "search.csv").open()))  # which is no intermediate result
        assert untrained["epoch"] == "0" and 1 < final[0]["default"] < float(untrained["perplexity"])


def test_what_a_trial_leaves(finished):
    experiment, trials, top = finished
    from nni_darts_rnn.genotype import Genotype
    from nni_darts_rnn.trained import load_trained

    seeds = []
    for trial in trials:
        folder = Path(trial["logPath"])
        for name in ("genotype.json", "alpha.json", "search.csv", "retrain.csv", "cell.svg", "model.safetensors", "model.json", "result.json"):
            assert (folder / name).stat().st_size > 0, name
        for name in ("cell.svg", "report.html"):  # as NNI's server gives them to a browser
            with urllib.request.urlopen(f"http://127.0.0.1:{experiment.port}/api/v1/nni/trial-file/{trial['trialJobId']}/{name}", timeout=20) as answer:
                assert answer.read() == (folder / name).read_bytes()
        result = json.loads((folder / "result.json").read_text())
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert f"Trial {trial['trialJobId']}" in page and f"{result['test_perplexity']:,.2f}" in page and page.count("<svg") == 3
        command = f"nni-darts-rnn search --corpus {top / 'short'} --recipe tiny --seed {result['seed']}"
        assert command in re.sub(r" \\\n\s*", " ", page) and "<script" not in page
        seeds.append(result["seed"])
        assert json.loads(trial["hyperParameters"][-1])["parameters"]["seed"] == result["seed"]  # what NNI's page shows beside the results
        genotype = Genotype.from_json((folder / "genotype.json").read_text())
        assert Genotype.from_json(result["genotype"]) == genotype
        model, words = load_trained(folder)
        assert model.rnn.genotype == genotype and len(words) == model.vocab_size
        assert len(json.loads((folder / "alpha.json").read_text())["alpha"]) == 2  # before the search and after its epoch
    assert sorted(seeds) == [1, 2]


def test_a_key_that_is_no_field_fails_the_trial(tmp_path):
    for name in ("examples", "search_spaces"):
        shutil.copytree(ROOT / name, tmp_path / name)
    space = tmp_path / "search_spaces" / "darts_rnn.json"
    space.write_text(json.dumps({"seed": {"_type": "choice", "_value": [1]}, "search.arch_lrr": {"_type": "choice", "_value": [0.1]}}))
    config = tmp_path / "examples" / "darts_rnn.yml"
    config.write_text(config.read_text().replace("maxTrialNumber: 2", "maxTrialNumber: 1"))
    experiment = Experiment(config, tmp_path, tmp_path)  # from another folder
    try:
        trials = experiment.wait(120)
        assert [t["status"] for t in trials] == ["FAILED"]
        folder = Path(trials[0]["logPath"])
        said = (folder / "trial.stderr").read_text()
        assert "search.arch_lrr" in said and "did you mean 'search.arch_lr'" in said and "Traceback" not in said
        assert not (folder / "genotype.json").exists()
    finally:
        experiment.stop()
