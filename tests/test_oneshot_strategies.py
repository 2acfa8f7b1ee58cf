"""NNI's one-shot strategies on the recurrent space and on real text: what each trains, what it exports, and that the cell retrains."""

from __future__ import annotations

import dataclasses
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from nni.nas import strategy as nni_strategy

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import one_shot

from nni_darts_rnn import strategies
from nni_darts_rnn.corpus import load_corpus
from nni_darts_rnn.learner import retrain
from nni_darts_rnn.recipes import get_recipe
from nni_darts_rnn.space import CellSpace, DartsRnnSpace, MixedCell, RecurrentSpace

pytestmark = pytest.mark.filterwarnings("ignore")  # NNI's and Lightning's advice
RECIPE = get_recipe("tiny", {"search": {"bptt": 16, "batch_size": 16, "eval_batch_size": 16, "arch_lr": 0.05, "epochs": 2},
                             "retrain": {"bptt": 16, "max_bptt_above": 8, "batch_size": 16, "eval_batch_size": 16, "test_batch_size": 16,
                                         "epochs": 1}})
tianshou = pytest.mark.skipif(find_spec("tianshou") is None, reason="tianshou>=0.4.8,<0.5 is not installed (the extra `rl`)")
NAMES = [pytest.param(name, marks=tianshou) if name == "ENAS" else name for name in one_shot.NAMES]


@pytest.fixture(scope="module")
def text():
    whole = load_corpus("pydoc")
    return dataclasses.replace(whole, train=whole.train[:6000], valid=whole.valid[:1500], test=whole.test[:1500])


@pytest.mark.parametrize("name", NAMES)
def test_each_searches_real_text_and_its_cell_retrains(name, text, tmp_path, capsys):
    torch.manual_seed(0)
    genotype, space, strategy = one_shot.search(name, text, RECIPE.search, folder=tmp_path, accelerator="cpu", enable_progress_bar=False)
    assert genotype.n_nodes == RECIPE.search.n_nodes and len(genotype.to_sample()) == 6
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{'default'")]
    perplexities = [float(row.split("'perplexity': ")[1].split(",")[0].rstrip("}")) for row in rows]
    assert len(perplexities) == 1 + RECIPE.search.epochs and perplexities[-1] < 0.7 * perplexities[0]  # the supernet has learned

    mixed = [m for m in space.modules() if isinstance(m, MixedCell)]
    if name in ("SecondOrderDARTS", "DARTS", "GumbelDARTS"):
        cell, = mixed
        assert cell.alpha.shape == (6, 5) and cell.alpha.detach().abs().max() > 0.05  # it moved
        assert type(cell.softmax) is type(strategy.configure_softmax())
        assert genotype == cell.genotype()
    else:
        assert not mixed and isinstance(space.lm.rnn, CellSpace)
    if name == "ENAS":
        assert strategy.oneshot_module.policy.optim.state  # the controller has been updated
    if name == "Proxyless":
        alphas = {label: choice._arch_alpha.detach() for label, choice in choices(space)}
        assert len(alphas) == 6 and all(len(a) == 1 or a.abs().max() > 0.01 for a in alphas.values())  # each learns
        best = {label: choice.names[int(alphas[label].argmax())] for label, choice in choices(space)}
        assert genotype.to_sample() == best

    trained = retrain(text, genotype, RECIPE.retrain, folder=tmp_path, device="cpu")
    assert trained["test_perplexity"] < len(text.vocab) / 2 and trained["model"].rnn.genotype == genotype


def choices(space):
    return [(choice.label, choice) for choice in [*space.lm.rnn.inputs, *space.lm.rnn.ops]]


def test_gumbel_noise_is_drawn_once_per_sequence(monkeypatch):
    drawn, real = [], torch.nn.functional.gumbel_softmax
    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", lambda *args, **kwargs: drawn.append(1) or real(*args, **kwargs))
    supernet = strategies.GumbelDARTS().mutate_model(DartsRnnSpace(7, 4, 3))
    supernet(torch.zeros(9, 5, dtype=torch.long), torch.zeros(5, 4))
    assert len(drawn) == 1


def test_none_is_never_exported():
    for kind in (strategies.DARTS, strategies.GumbelDARTS, strategies.SecondOrderDARTS):
        cell = kind().mutate_model(DartsRnnSpace(7, 4, 3)).lm.rnn
        with torch.no_grad():
            cell.alpha[:, 0] = 9.0
        assert "none" not in cell.export({}).values()


def test_layers_of_one_label_share_alpha_and_export_one_cell():
    class Two(RecurrentSpace):
        def __init__(self):
            super().__init__()
            self.first, self.second = CellSpace(4, 4, 3), CellSpace(4, 4, 3)

        def forward(self, x):
            return self.second(self.first(x))

    supernet = strategies.DARTS().mutate_model(Two())
    assert supernet.first.alpha is supernet.second.alpha
    supernet(torch.randn(3, 2, 4)).sum().backward()
    assert supernet.first.alpha.grad is not None
    sampled = nni_strategy.RandomOneShot().mutate_model(Two())
    memo = {}
    for module in sampled.modules():
        if hasattr(module, "resample"):
            memo.update(module.resample(memo))
    assert sampled.first.genotype() == sampled.second.genotype() == sampled.genotype()

