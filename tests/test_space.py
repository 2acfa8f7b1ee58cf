"""The NNI model space: its labels, what a sample stands for, freezing, sampled paths, one-shot hooks; `load_searched_model`."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from nni.algorithms.hpo.random_tuner import RandomTuner
from nni.common.hpo_utils import validate_search_space
from nni.mutable import Categorical, label_scope
from nni.nas.nn.pytorch import LayerChoice, ModelSpace
from nni.nas.oneshot.pytorch.supermodule.base import BaseSuperNetModule
from nni.nas.strategy import DARTS, ENAS, GumbelDARTS, Proxyless, RandomOneShot

from nni_darts_rnn.cell_trial import read_parameters
from nni_darts_rnn.genotype import DARTS_V1, DARTS_V2, PRIMITIVES, Genotype, derive
from nni_darts_rnn.model import LanguageModel
from nni_darts_rnn.options import checked_seed
from nni_darts_rnn.recipes import get_recipe
from nni_darts_rnn.space import CellSpace, DartsRnnSpace, MixedCell, RecurrentSpace
from nni_darts_rnn.strategy import SecondOrderDARTS
from nni_darts_rnn.supernet import mixed_cell
from nni_darts_rnn.trained import load_searched_model, save_trained

OPS = ("tanh", "relu", "sigmoid", "identity")
SPACES = sorted(Path(__file__).parents[1].glob("search_spaces/*.json"))
V, H, N, T, B = 7, 4, 3, 3, 5
CELL = Genotype((("relu", 0), ("sigmoid", 1), ("tanh", 0)))


def made(n_nodes=N, seed=0, **options) -> DartsRnnSpace:
    torch.manual_seed(seed)
    space = DartsRnnSpace(V, H, n_nodes, **options).double()
    with torch.no_grad():
        for p in space.parameters():
            p.normal_(0, 0.5)
    return space


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(V, (T, B), generator=generator), torch.randn(B, H, generator=generator, dtype=torch.float64)


def discrete(space, genotype) -> LanguageModel:
    model = LanguageModel.from_genotype(V, H, genotype).double()
    weights = {name.removeprefix("lm."): value for name, value in space.state_dict().items()}
    model.load_state_dict(weights)
    return model


def same(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_nodes", [1, 3, 8])
def test_labels_and_candidates(n_nodes):
    found = DartsRnnSpace(V, H, n_nodes).simplify()
    expected = {}
    for i in range(1, n_nodes + 1):
        expected[f"cell/node_{i}/input"] = [str(j) for j in range(i)]
        expected[f"cell/node_{i}/op"] = list(OPS)
    assert {label: list(choice.values) for label, choice in found.items()} == expected
    assert all(isinstance(choice, Categorical) for choice in found.values())  # plain ones: TPE and the web UI take no others


def test_every_sample_is_one_genotype_and_every_genotype_one_sample():
    space = made(2)
    choices = space.simplify()
    cells = set()
    for values in itertools.product(*(c.values for c in choices.values())):
        sample = dict(zip(choices, values))
        cell = Genotype.from_sample(sample)
        assert cell.to_sample() == sample
        cells.add(cell)
    assert len(cells) == 4 * 4 * 2  # ops of two nodes, inputs of the second


@pytest.mark.parametrize("cell", [CELL, Genotype((("identity", 0), ("identity", 0), ("relu", 2)))], ids=str)
def test_frozen_is_the_discrete_model(cell):
    space = made()
    frozen = space.freeze(cell.to_sample())
    assert frozen.lm.rnn.genotype() == cell and space.lm.rnn.genotype() is None
    frozen.load_state_dict(space.state_dict())
    model, (tokens, hidden) = discrete(space, cell), batch()
    same(frozen(tokens, hidden), model(tokens, hidden))
    same(frozen.loss(tokens, tokens, hidden), model.loss(tokens, tokens, hidden))
    assert torch.equal(frozen.init_hidden(3), model.init_hidden(3))


def test_default_choices_run_open():
    """NNI runs an open space with every choice's first candidate (its shape checks do so)."""
    space, (tokens, hidden) = made(), batch()
    first = Genotype((("tanh", 0),) * N)
    same(space(tokens, hidden), discrete(space, first)(tokens, hidden))


def sampled(space):
    """The space under a strategy that samples paths, with what it has sampled, four times."""
    supernet = RandomOneShot().mutate_model(space)
    for _ in range(4):
        yield supernet, Genotype.from_sample(resample(supernet))


def resample(supernet) -> dict:
    """As NNI's one-shot modules do before each batch."""
    memo = {}
    for module in supernet.modules():
        if isinstance(module, BaseSuperNetModule):
            memo.update(module.resample(memo))
    return memo


@pytest.mark.parametrize("relaxation", ["edge", "node", "gumbel"])
@pytest.mark.parametrize("kind", [SecondOrderDARTS, DARTS, GumbelDARTS])
def test_a_mixed_cell_freezes_to_the_discrete_one_with_its_weights(kind, relaxation):
    if (kind, relaxation) == (GumbelDARTS, "gumbel"):
        pytest.skip("refused: relaxation gumbel draws by itself")
    supernet, (tokens, hidden) = kind().mutate_model(made(relaxation=relaxation)), batch()
    before, sample = torch.get_rng_state(), CELL.to_sample()
    frozen = supernet.freeze(sample)
    assert torch.equal(torch.get_rng_state(), before) and type(frozen.lm.rnn) is CellSpace and frozen.lm.rnn.genotype() == CELL
    assert frozen.lm.rnn.W0 is supernet.lm.rnn.W0 and frozen.training == supernet.training
    same(frozen(tokens, hidden), discrete(frozen, CELL)(tokens, hidden))


@pytest.mark.parametrize("through_the_choices", [False, True])
def test_a_sampled_path_is_the_discrete_model(through_the_choices, monkeypatch):
    if through_the_choices:  # and not by the shortcut for decided cells
        monkeypatch.setattr(CellSpace, "genotype", lambda self: None)
    tokens, hidden = batch()
    seen = set()
    for supernet, cell in sampled(made()):
        assert through_the_choices or supernet.lm.rnn.genotype() == cell
        same(supernet(tokens, hidden), discrete(supernet, cell)(tokens, hidden))
        seen.add(cell)
    assert len(seen) > 1


def test_dropout_of_open_choices_is_that_of_the_discrete_model(monkeypatch):
    tokens, hidden = batch()
    supernet, cell = next(sampled(made(dropout=0.3, dropout_h=0.5, dropout_x=0.4, dropout_i=0.2, dropout_e=0.1)))
    rates = dict(dropout=0.3, dropout_h=0.5, dropout_x=0.4, dropout_i=0.2, dropout_e=0.1)
    model = LanguageModel.from_genotype(V, H, cell, **rates).double()
    model.load_state_dict(discrete(supernet, cell).state_dict())
    monkeypatch.setattr(CellSpace, "genotype", lambda self: None)
    torch.manual_seed(3)
    open_choices = supernet(tokens, hidden)
    torch.manual_seed(3)
    same(open_choices, model(tokens, hidden))


@pytest.mark.parametrize("kind, mixed", [(DARTS, True), (GumbelDARTS, True), (SecondOrderDARTS, True), (Proxyless, False), (RandomOneShot, False),
                                         (ENAS, False)])
def test_which_strategies_get_the_mixed_cell(kind, mixed):
    space, (tokens, hidden) = made(), batch()
    weights = {name: p.clone() for name, p in space.named_parameters()}
    supernet = kind().mutate_model(space)
    assert type(supernet.lm.rnn) is (MixedCell if mixed else CellSpace)
    resample(supernet)
    assert supernet(tokens, hidden).decoded.shape == (T, B, V)
    for name, p in weights.items():
        assert torch.equal(supernet.get_parameter(name), p)  # the weights go along
    if mixed:
        assert supernet.lm.rnn.alpha.shape == (6, 5) and set(supernet.simplify()) == set(CELL.to_sample())
        assert list(supernet.lm.rnn.arch_parameters()) == [supernet.lm.rnn.alpha]


def test_the_mixed_cell_under_darts_is_the_relaxation():
    supernet, (tokens, hidden) = DARTS().mutate_model(made()), batch()
    rnn = supernet.lm.rnn.double()
    with torch.no_grad():
        rnn.alpha.normal_()
    expected = mixed_cell(supernet.lm.encoder.weight[tokens] @ rnn.W0[:H], hidden, rnn.W0[H:], rnn.Ws, torch.softmax(rnn.alpha, -1))
    torch.testing.assert_close(supernet(tokens, hidden).raw, expected, rtol=0, atol=1e-12)


def test_the_mixed_cell_under_gumbel_darts_draws_noise():
    supernet, (tokens, hidden) = GumbelDARTS().mutate_model(made()), batch()
    assert not torch.equal(supernet(tokens, hidden).raw, supernet(tokens, hidden).raw)
    plain = DARTS().mutate_model(made())
    assert torch.equal(plain(tokens, hidden).raw, plain(tokens, hidden).raw)


def test_the_mixed_cell_exports_by_the_papers_rule():
    rnn = DARTS().mutate_model(made()).lm.rnn
    with torch.no_grad():
        rnn.alpha.normal_(generator=torch.Generator().manual_seed(0))
        rnn.alpha[:, 0] += 3  # `none` is strong and never taken
    p = torch.softmax(rnn.alpha.detach(), -1)
    sample = rnn.export({})
    assert Genotype.from_sample(sample) == derive(p.numpy()) == rnn.genotype()
    assert made().freeze(sample).lm.rnn.genotype() == rnn.genotype()
    assert rnn.export({"cell/node_1/op": "tanh"}) == {k: v for k, v in sample.items() if k != "cell/node_1/op"}
    probabilities = rnn.export_probs({})
    assert list(probabilities) == ["cell/node_1/from_0", "cell/node_2/from_0", "cell/node_2/from_1", "cell/node_3/from_0", "cell/node_3/from_1",
                                   "cell/node_3/from_2"]
    for row, values in zip(p, probabilities.values()):
        assert list(values) == list(PRIMITIVES) and list(values.values()) == pytest.approx(row.tolist(), abs=1e-6)
    assert rnn.resample({}) == {}


@pytest.mark.parametrize("options, words", [
    (dict(vocab_size=0), "vocab_size: 0"), (dict(vocab_size=V, n_nodes=0), "n_nodes: 0"), (dict(vocab_size=V, hidden_size=2.5), "size: 2.5"),
    (dict(vocab_size=V, dropout_h=1.0), "dropout_h: 1.0"), (dict(vocab_size=V, primitives=("tanh", "swish")), "swish"),
    (dict(vocab_size=V, primitives=("tanh", "tanh")), "named once"), (dict(vocab_size=V, primitives=("none",)), "one not 'none'")])
def test_refusals(options, words):
    with pytest.raises(ValueError, match=words) as error:
        DartsRnnSpace(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["DARTS_V2", DARTS_V2, DARTS_V2.to_json()], ids=["name", "genotype", "json"])
def test_load_searched_model_of_a_genotype(source):
    model = load_searched_model(source, V, H, dropout=0.5, dropout_h=0.1)
    assert isinstance(model, LanguageModel) and model.rnn.genotype == DARTS_V2
    assert (model.vocab_size, model.hidden_size, model.dropout, model.rnn.dropout_h) == (V, H, 0.5, 0.1)


@pytest.mark.parametrize("given", [{"vocab_size": 5}, {"hidden_size": 77}, {"dropout": 0.9}])
def test_a_trained_model_has_its_own_sizes(tmp_path, given):
    save_trained(tmp_path, load_searched_model(CELL, V, H), [str(k) for k in range(V)])
    with pytest.raises(ValueError, match=f"{next(iter(given))}: .* holds a trained model, which has its own"):
        load_searched_model(tmp_path, **given)


def test_load_searched_model_of_files(tmp_path):
    (tmp_path / "genotype.json").write_text(CELL.to_json(), encoding="utf-8")
    for source in (tmp_path, tmp_path / "genotype.json", str(tmp_path)):
        assert load_searched_model(source, V, H).rnn.genotype == CELL
    trained = discrete(made(), CELL)
    save_trained(tmp_path, trained, [f"w{i}" for i in range(V)])
    loaded, (tokens, hidden) = load_searched_model(tmp_path), batch()
    assert not loaded.training and loaded.rnn.genotype == CELL
    same(loaded(tokens, hidden), trained.eval()(tokens, hidden))


@pytest.mark.parametrize("source, size, words", [
    ("DARTS_V1", None, "vocab_size: needed"), (DARTS_V1, None, "vocab_size: needed"), ("DARTS_1", V, "did you mean 'DARTS_V1'?"),
    ("nowhere/genotype.json", V, "neither a file nor one of"), ("x" * 300, V, "neither a file nor one of")])
def test_load_searched_model_refusals(source, size, words):
    with pytest.raises(ValueError) as error:
        load_searched_model(source, size, H)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.name)
def test_search_spaces_are_nnis_and_every_draw_is_a_trials(path):
    space = json.loads(path.read_text(encoding="utf-8"))
    assert validate_search_space(space)
    for i in range(20):
        tuner = RandomTuner(seed=i)
        tuner.update_search_space(space)
        drawn = tuner.generate_parameters(0)
        if "cell" in path.name:
            _, _, drawn = read_parameters(drawn)
        checked_seed(drawn.pop("seed", 0))
        get_recipe("penn", drawn)


def test_there_are_search_spaces():
    assert "darts_rnn.json" in {path.name for path in SPACES}


class TwoCells(RecurrentSpace):
    def __init__(self, both, **other):
        super().__init__()
        self.one, self.two = CellSpace(H, H, 2, relaxation=both), CellSpace(H, H, **{"n_nodes": 2, "relaxation": both} | other)

    def forward(self, x):
        return self.two(self.one(x))


@pytest.mark.parametrize("both, name, value", [("edge", "n_nodes", 3), ("edge", "relaxation", "node"), ("gumbel", "draws", 2)])
def test_cells_of_one_space_that_differ_are_refused(both, name, value):
    with pytest.raises(ValueError, match=f"^{name}: {re.escape(repr(value))} of one CellSpace, .* of another; all of a space are one cell"):
        DARTS().mutate_model(TwoCells(both, **{name: value}))
    supernet = DARTS().mutate_model(TwoCells(both))
    assert supernet.one.alpha is supernet.two.alpha


class Scoped(RecurrentSpace):
    def __init__(self):
        super().__init__()
        with label_scope("encoder"):
            self.one = CellSpace(H, H, 2)
        with label_scope("decoder"):
            self.two, self.three = CellSpace(H, H, 2), CellSpace(H, H, 2)

    def forward(self, x):
        return self.three(self.two(self.one(x)))


def test_each_label_scope_has_a_cell_of_its_own():
    supernet = DARTS().mutate_model(Scoped())
    assert supernet.one.alpha is not supernet.two.alpha and supernet.two.alpha is supernet.three.alpha
    with torch.no_grad():
        supernet.one.alpha[0, 1] = supernet.two.alpha[0, 2] = 5
    sample = {**supernet.one.export({}), **supernet.two.export({})}
    assert sample.keys() == Scoped().simplify().keys() and list(supernet.two.export_probs({}))[0] == "decoder/cell/node_1/from_0"
    found = Scoped().freeze(sample)
    assert [cell.genotype().recurrent[0][0] for cell in (found.one, found.two, found.three)] == [PRIMITIVES[1], PRIMITIVES[2], PRIMITIVES[2]]


def test_a_frozen_space_whose_cell_was_not_chosen_has_none():
    class Either(RecurrentSpace):
        def __init__(self):
            super().__init__()
            self.layer = LayerChoice({"cell": CellSpace(3, 3, 1), "other": torch.nn.Linear(3, 3)}, label="layer")

        def forward(self, x):
            return self.layer(x)

    sample = {"cell/node_1/input": "0", "cell/node_1/op": "relu"}
    assert Either().freeze({"layer": "other"} | sample).genotype() is None
    assert Either().freeze({"layer": "cell"} | sample).genotype() == Genotype((("relu", 0),))


def test_a_relaxation_that_a_plain_model_space_would_ignore_is_refused():
    class Plain(ModelSpace):
        def __init__(self, **options):
            super().__init__()
            self.rnn = CellSpace(3, 4, 2, **options)

        def forward(self, x):
            return self.rnn(x)

    x = torch.randn(2, 3, 3)
    with pytest.raises(ValueError, match="RecurrentSpace"):
        SecondOrderDARTS().mutate_model(Plain(relaxation="node"))(x)
    SecondOrderDARTS(mutation_hooks=[MixedCell.mutate]).mutate_model(Plain(relaxation="node"))(x)
    Proxyless().mutate_model(Plain(relaxation="node")).rnn  # samples paths, whatever the relaxation


def test_weights_of_another_frozen_cell_are_refused():
    one, two = (made().freeze(Genotype((("relu", 0), ("sigmoid", j), ("tanh", 0))).to_sample()) for j in (0, 1))
    with pytest.raises(RuntimeError, match="the weights are of"):
        two.load_state_dict(one.state_dict())
    two.load_state_dict(dict(one.state_dict()))
    made().load_state_dict(one.state_dict())  # an open space takes any
    one.load_state_dict(made().state_dict())


def test_a_frozen_language_model_is_saved_as_the_discrete_one(tmp_path):
    frozen = made().freeze(CELL.to_sample()).float()
    save_trained(tmp_path, frozen.lm, "abcdefg")
    again = load_searched_model(tmp_path)
    assert again.rnn.genotype == CELL
    tokens = torch.randint(V, (T, B))
    torch.testing.assert_close(again(tokens, again.init_hidden(B)).decoded, frozen.eval()(tokens, frozen.init_hidden(B)).decoded)
    for open_model in (made().lm, SecondOrderDARTS().mutate_model(made()).lm):
        with pytest.raises(ValueError, match="only a language model of one discrete cell"):
            save_trained(tmp_path, open_model, "abcdefg")
