"""The page on a space of one's own, as it stands: its twenty lines, and every strategy of NNI on them."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from nni.nas.experiment import NasExperiment
from nni.nas.experiment.config import NasExperimentConfig

from nni_darts_rnn import DartsRNN, Genotype, strategies
from nni_darts_rnn.space import MixedCell

pytestmark = pytest.mark.filterwarnings("ignore")  # NNI's and Lightning's advice
BLOCKS = re.findall(r"^```python\n(.*?)^```$", (Path(__file__).parents[1] / "docs" / "own_space.md").read_text(encoding="utf-8"), re.M | re.S)
TIANSHOU = pytest.mark.skipif(find_spec("tianshou") is None, reason="tianshou>=0.4.8,<0.5 is not installed (the extra `rl`)")


@pytest.fixture(scope="module")
def page():
    """The names that the page's blocks define, its last one left out."""
    names = {"__name__": "own_space"}
    for block in BLOCKS[:-1]:
        exec(compile(block, "docs/own_space.md", "exec"), names)
    return names


def run(space, evaluator, strategy, folder, config=None) -> Genotype:
    experiment = NasExperiment(space, evaluator, strategy, config)
    experiment.config.experiment_working_directory = folder
    experiment.run()
    sample = experiment.export_top_models(formatter="dict")[0]
    experiment.stop()
    return Genotype.from_sample(sample)


def test_it_is_twenty_lines():
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(lines) <= 20, len(lines)


@pytest.mark.parametrize("name", ["SecondOrderDARTS", "DARTS", "GumbelDARTS", "Proxyless", "RandomOneShot", pytest.param("ENAS", marks=TIANSHOU)])
def test_every_one_shot_strategy_runs(name, page, tmp_path):
    space, options = page["Forecast"](), {} if name == "RandomOneShot" else {"gradient_clip_val": 1.0}
    weights = space.head.weight.detach().clone()
    cell = run(space, page["evaluator"](accelerator="cpu", enable_model_summary=False), getattr(strategies, name)(**options), tmp_path)
    assert cell.n_nodes == 4 and {op for op, _ in cell.recurrent} <= {"tanh", "relu", "sigmoid", "identity", "sin"}
    assert not torch.equal(space.head.weight, weights)  # it has trained
    mixed = [m for m in space.modules() if isinstance(m, MixedCell)]
    if name in ("SecondOrderDARTS", "DARTS", "GumbelDARTS"):
        assert len(mixed) == 2 and mixed[0].alpha is mixed[1].alpha and mixed[0].alpha.shape == (10, 6)
    else:
        assert not mixed


@pytest.mark.parametrize("name", ["Random", "GridSearch", "RegularizedEvolution", "TPE", pytest.param("PolicyBasedRL", marks=TIANSHOU)])
def test_every_multi_trial_strategy_runs(name, page, tmp_path):
    options = {"population_size": 2, "sample_size": 1} if name == "RegularizedEvolution" else {}
    strategy = getattr(strategies, name)(**options)
    cell = run(page["Forecast"](), page["fastai_evaluator"], strategy, tmp_path, NasExperimentConfig("sequential", "raw", max_trial_number=2))
    models = list(strategy.list_models())
    assert len(models) >= 2 and all(model.metric < 0 and len(model.metrics.intermediates) == 1 for model in models)
    assert cell.n_nodes == 4


def test_the_found_layer_has_the_primitive_too(page):
    rnn = DartsRNN(2, 8, Genotype((("sin", 0), ("tanh", 1))), num_layers=2)
    output, _ = rnn(torch.randn(5, 3, 2))
    output.sum().backward()
    assert all(p.grad is not None for p in rnn.parameters())
