"""The scripts under examples/ at tiny sizes: they do what they say."""

import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from nni_darts_rnn.genotype import Genotype
from nni_darts_rnn.recipes import get_recipe

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_fastai_search_stopped_and_run_again_is_the_whole_search(tmp_path):
    from test_routes import corpus

    assert len((EXAMPLES / "fastai_search.py").read_text().splitlines()) < 40
    script = example("fastai_search")
    settings = {"search.bptt": 6, "search.batch_size": 4, "search.eval_batch_size": 4}
    kept = {}
    for folder, epochs in (("whole", (3,)), ("parts", (1, 3))):
        (tmp_path / folder).mkdir()
        for n in epochs:
            cell = script.search(corpus(400), get_recipe("tiny", settings | {"search.epochs": n}), tmp_path / folder)
        kept[folder] = torch.load(tmp_path / folder / "search.pt", weights_only=True)
    assert isinstance(cell, Genotype) and kept["whole"]["epoch"] == kept["parts"]["epoch"] == 3
    for name, tensor in kept["whole"]["model"].items():
        assert torch.equal(tensor, kept["parts"]["model"][name]), name
    assert torch.equal(kept["whole"]["random"], kept["parts"]["random"])
    assert "nni" not in re.findall(r"^(?:from|import) (\w+)", (EXAMPLES / "fastai_search.py").read_text(), re.M)


def test_time_series_learns_on_a_real_record(capsys):
    script = example("time_series")
    x, cut = script.eeg()
    assert x.shape == (800, 4) and torch.isfinite(x).all() and cut == 640
    found = script.main(["--steps", "120"])
    assert found["DartsRNN"] < found["the sample before"] and math.isfinite(found["nn.GRU"])
    assert "DartsRNN" in capsys.readouterr().out


def test_transfer_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = example("transfer")
    monkeypatch.setattr(script, "PACKAGES", ("matplotlib", "pandas"))
    found = script.main(["--epochs", "1", "--paragraphs", "120", "--labels", "8", "--units", "12"])
    assert set(found) == {"with the encoder", "from scratch"} and all(0 < value < 1 for value in found.values())
    assert "This function returns" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_importing_an_example_runs_nothing(name, capsys):
    before = set(sys.modules)
    example(name)
    assert not capsys.readouterr().out and before <= set(sys.modules)


@pytest.mark.parametrize("words", ["one_shot DARTS --recipe smal", "one_shot DARTS --corpus pydok", "multi_trial Random --recipe smal",
                                   "time_series --genotype DRAWN_V2", "transfer --genotype DRAWN_V2"])
def test_a_misspelt_name_is_one_line(words, capsys):
    name, *rest = words.split()
    with pytest.raises(SystemExit, match="2"):
        example(name).main(rest)
    assert re.search(f"error: .*{rest[-1]}.* did you mean", capsys.readouterr().err.splitlines()[-1])


def test_fastai_search_names_a_misspelt_recipe(tmp_path):
    ran = subprocess.run([sys.executable, "-W", "ignore", EXAMPLES / "fastai_search.py", "smal"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode and re.fullmatch(r"recipe 'smal' .*did you mean 'small'\?\n", ran.stderr) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", sorted(EXAMPLES.glob("*.yml")), ids=lambda path: path.stem)
def test_the_web_page_knows_which_result_is_best(config):
    """It asks the tuner's options, whether the tuner has a use for them or not; without one it takes the largest."""
    settings = yaml.safe_load(config.read_text())
    chosen = settings.get("tuner") or settings["advisor"]
    assert chosen["classArgs"]["optimize_mode"] == ("maximize" if "--maximize" in config.read_text() else "minimize")


def test_the_strategy_of_an_example_has_the_recipes_settings():
    module, recipe = example("one_shot"), get_recipe("small", {"search.epsilon": 0.01, "search.arch_beta1": 0.5}).search
    ours, _ = module.make_strategy("SecondOrderDARTS", recipe)
    assert ours.warmup_epochs == 4 and [ours.second_order[name] for name in ("unrolled_lr", "epsilon", "arc_betas")] == [2.0, 0.01, (0.5, 0.999)]
    for name in ("DARTS", "GumbelDARTS", "Proxyless"):
        assert module.make_strategy(name, recipe)[0].warmup_epochs == 4
