"""Recipes: the published figures, overrides as numbers and as texts, and a refusal in one line for everything else."""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from nni_darts_rnn.recipes import RECIPES, Recipe, RetrainRecipe, SearchRecipe, get_recipe, override

SHARED = dict(anneal=0, bptt=35, short_bptt_probability=0.05, lr=20, clip=0.25, dropout=0.75, dropout_h=0.25, dropout_x=0.75, dropout_i=0.2, init_range=0.04, ar=0,
              tar=1e-3, eval_batch_size=10)
SEARCH = SHARED | dict(hidden_size=300, n_nodes=8, batch_size=256, weight_decay=5e-7, dropout_e=0, epochs=50, arch_lr=3e-3, arch_weight_decay=1e-3,
                       arch_beta1=0.9, arch_beta2=0.999, relaxation="edge", hvp="finite_difference", epsilon=3e-2, unrolled_lr=None, neumann_terms=0,
                       warmup_epochs=0, alpha_dropout=True, own_gradient=False, reproduce_original=False, optimizer="sgd", draws=1)
RETRAIN = SHARED | dict(hidden_size=850, batch_size=64, test_batch_size=1, bptt_std=5, min_bptt=5, max_bptt_above=20, weight_decay=8e-7,
                        dropout_e=0.1, optimizer="sgd", precision="float32", nonmono=5, epochs=3600, patience=None)


@pytest.mark.parametrize("name, search, retrain", [
    ("penn", SEARCH, RETRAIN),
    ("wikitext-2", SEARCH | dict(dropout_h=0.15), RETRAIN | dict(hidden_size=700, dropout_h=0.15, weight_decay=5e-7)),
])
def test_published_figures(name, search, retrain):
    """Liu et al. 2019, appendix A, as DESIGN's table of recipes has them."""
    recipe = get_recipe(name)
    assert dataclasses.asdict(recipe.search) == search and dataclasses.asdict(recipe.retrain) == retrain
    assert recipe.name == name and recipe == RECIPES[name]


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import search_quality

    return search_quality


def test_the_drawn_recipe_searches_as_the_study_did(study):
    """The settings of the searches that were ahead of random search (benchmarks/search_quality.py), with their six epochs of half a text as three of a whole one."""
    part = study.STUDIES["penn"]
    studied = get_recipe(part.recipe, part.settings | {"search.relaxation": "gumbel", "search.unrolled_lr": 2, "search.epochs": 6, "search.warmup_epochs": 4}).search
    assert get_recipe("drawn").search == dataclasses.replace(studied, epochs=6 * part.share, warmup_epochs=4 * part.share)


def test_the_small_recipe_searches_as_the_best_arm_of_its_study_did(study):
    """The settings of the arm of the example's text whose cells were best, by the stored figures. Searches with eight draws take longer: cells that are better by
    no more than chance are not worth that."""
    import quality_table

    part = study.STUDIES["example"]
    values, means = {}, {}
    for row in study.stored(part.stem):
        values.setdefault(row["name"], []).append(float(row["valid"]))
        means.setdefault(row["name"], {}).setdefault(row["seed"], []).append(float(row["valid"]))
    best = min((name for name in values if "8 draws" not in name), key=lambda name: sum(values[name]) / len(values[name]))
    slower = [name for name in values if "8 draws" in name]
    assert len(slower) == 1
    for name in slower:
        differences = np.array([np.mean(means[name][seed]) - np.mean(means[best][seed]) for seed in sorted(means[best])])
        assert len(differences) == 8 and (differences.mean() > 0 or quality_table.sign_flip(differences) > 0.05)
    command, = (line for line in study.__doc__.splitlines() if f'--name "{best}"' in line and "--study example" in line)
    settings = dict(re.findall(r"--set (\S+?)=(\S+)", command))
    assert len(settings) == 8 and get_recipe(part.recipe, part.settings | settings).search == get_recipe("small").search


def test_every_default_is_itself_allowed_and_explained():
    for recipe in RECIPES.values():
        for part in (recipe.search, recipe.retrain):
            assert override(part, dataclasses.asdict(part)) == part
            assert override(part, {k: str(v) for k, v in dataclasses.asdict(part).items()}) == part  # as texts too
            assert all(field.metadata["help"] for field in dataclasses.fields(part))


def test_overrides_dotted_and_nested_are_the_same():
    dotted = get_recipe("tiny", {"search.lr": 1.5, "search.epochs": 4, "retrain.hidden_size": 12})
    nested = get_recipe("tiny", {"search": {"lr": 1.5, "epochs": 4}, "retrain": {"hidden_size": 12}})
    mixed = get_recipe("tiny", {"search": {"lr": 1.5}, "search.epochs": 4, "retrain.hidden_size": 12})
    assert dotted == nested == mixed
    tiny = RECIPES["tiny"]
    assert dotted == Recipe("tiny", dataclasses.replace(tiny.search, lr=1.5, epochs=4), dataclasses.replace(tiny.retrain, hidden_size=12))
    assert get_recipe(dotted, {"search.lr": 2}).search == dataclasses.replace(dotted.search, lr=2)
    assert get_recipe("tiny") == get_recipe("tiny", {}) == tiny == RECIPES["tiny"]


@pytest.mark.parametrize("key, text, value", [
    ("search.lr", "3e-3", 3e-3), ("search.lr", " 20 ", 20.0), ("search.epochs", "7", 7), ("search.epochs", "7.0", 7), ("search.epochs", 7.0, 7),
    ("search.clip", "none", None), ("search.clip", "null", None), ("search.clip", None, None), ("search.clip", "0.5", 0.5),
    ("search.unrolled_lr", "None", None), ("search.unrolled_lr", "0", 0.0), ("search.hvp", "exact", "exact"),
    ("search.reproduce_original", "true", True), ("search.reproduce_original", "False", False), ("search.reproduce_original", True, True),
    ("search.anneal", "1", 1.0), ("search.dropout", "0", 0.0), ("search.short_bptt_probability", "1", 1.0), ("retrain.max_bptt_above", "0", 0), ("search.n_nodes", "64", 64),
])
def test_values_and_texts_become_the_fields_type(key, text, value):
    part, _, field = key.partition(".")
    found = getattr(getattr(get_recipe("penn", {key: text}), part), field)
    assert found == value and type(found) is type(value)


def test_recipes_are_frozen():
    for thing, field in ((RECIPES["penn"], "name"), (RECIPES["penn"].search, "lr"), (RECIPES["penn"].retrain, "lr")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, field, 1)


def test_overrides_change_neither_the_named_recipe_nor_what_was_given():
    before, given = RECIPES["penn"].to_dict(), {"search": {"lr": "1"}}
    get_recipe("penn", given)
    assert RECIPES["penn"].to_dict() == before and given == {"search": {"lr": "1"}}


def test_to_dict_is_json_and_comes_back():
    for name, recipe in RECIPES.items():
        data = json.loads(json.dumps(recipe.to_dict()))
        assert data.pop("name") == name
        assert get_recipe("penn", data).search == recipe.search and get_recipe("penn", data).retrain == recipe.retrain


@pytest.mark.parametrize("name, overrides, words", [
    ("pen", {}, "recipe 'pen' is none of penn, wikitext-2, drawn, small, tiny; did you mean 'penn'?"),
    ("wikitext2", {}, "did you mean 'wikitext-2'?"),
    ("", {}, "recipe '' is none of"),
    (None, {}, "recipe None is none of"),
    ("penn", {"search.learning_rate": 1}, "setting 'search.learning_rate' is no field of a recipe"),
    ("penn", {"search.arch_lrr": 1}, "did you mean 'search.arch_lr'?"),
    ("penn", {"retrain.arch_lr": 1}, "setting 'retrain.arch_lr' is no field"),
    ("penn", {"retrain": {"hiden_size": 3}}, "did you mean 'retrain.hidden_size'?"),
    ("penn", {"lr": 1}, "use search.<field> or retrain.<field>"),
    ("penn", {"serch.lr": 1}, "did you mean 'search.lr'?"),
    ("penn", {"search": 1}, "use search.<field> or retrain.<field>"),
    ("penn", {"search.": 1}, "setting 'search.'"),
    ("penn", {"search.lr.x": 1}, "setting 'search.lr.x'"),
    ("penn", {"search": {"lr": {"x": 1}}}, "setting 'search.lr.x'"),
    ("penn", {3: 1}, "setting 3 is no field"),
    ("penn", {"search.lr": "fast"}, "search.lr: 'fast' must be a number of at least 0"),
    ("penn", {"search.lr": math.nan}, "search.lr: nan must be a number of at least 0"),
    ("penn", {"search.lr": "nan"}, "search.lr: 'nan' must be a number"),
    ("penn", {"search.lr": math.inf}, "search.lr: inf must be a number"),
    ("penn", {"search.lr": -1}, "search.lr: -1 must be a number of at least 0"),
    ("penn", {"search.lr": True}, "search.lr: True must be a number"),
    ("penn", {"search.lr": None}, "search.lr: None must be a number"),
    ("penn", {"search.lr": [1]}, "search.lr: [1] must be a number"),
    ("penn", {"search.lr": 10 ** 400}, "must be a number of at least 0"),
    ("penn", {"search.epochs": 1.5}, "search.epochs: 1.5 must be a whole number of at least 1"),
    ("penn", {"search.epochs": 0}, "search.epochs: 0 must be a whole number of at least 1"),
    ("penn", {"search.epochs": math.inf}, "search.epochs: inf must be a whole number"),
    ("penn", {"search.epochs": "none"}, "search.epochs: 'none' must be a whole number"),
    ("penn", {"search.n_nodes": 0}, "search.n_nodes: 0 must be a whole number of at least 1 and at most 64"),
    ("penn", {"search.n_nodes": 65}, "at most 64"),
    ("penn", {"search.batch_size": 1}, "search.batch_size: 1 must be a whole number of at least 2"),
    ("penn", {"search.eval_batch_size": 1}, "at least 2"),
    ("penn", {"search.dropout": 1}, "search.dropout: 1 must be a number of at least 0 and below 1"),
    ("penn", {"search.dropout_h": -0.1}, "search.dropout_h: -0.1"),
    ("penn", {"search.arch_beta2": 1.0}, "and below 1"),
    ("penn", {"search.short_bptt_probability": 1.1}, "and at most 1"),
    ("penn", {"search.epsilon": 0}, "search.epsilon: 0"),
    ("penn", {"search.clip": 0}, "search.clip: 0"),
    ("penn", {"retrain.clip": 0}, "retrain.clip: 0"),
    ("penn", {"search.clip": "nan"}, "search.clip: 'nan'"),
    ("penn", {"search.hvp": "exakt"}, "search.hvp: 'exakt' is none of finite_difference, exact, first_order; did you mean 'exact'?"),
    ("penn", {"search.hvp": None}, "search.hvp: None is none of"),
    ("penn", {"search.reproduce_original": "maybe"}, "must be true or false"),
    ("penn", {"search.reproduce_original": 1}, "must be true or false"),
    ("penn", {"retrain.min_bptt": 56}, "retrain.min_bptt: 56 must be at most bptt + max_bptt_above = 55"),
    ("tiny", {"retrain.nonmono": 4, "retrain.patience": 4}, "retrain.patience: 4 must be at least retrain.nonmono + 2 = 6"),
    ("tiny", {"retrain.nonmono": 4, "retrain.patience": 5}, "averaging, which begins after 5 epochs without improvement, would never be tried"),
    ("penn", {"search.reproduce_original": True, "search.hvp": "exact"}, "search.reproduce_original: the published code has a finite difference"),
    ("penn", {"search.reproduce_original": True, "search.neumann_terms": 2}, "search.reproduce_original: the published code has a finite difference"),
    ("penn", {"search.neumann_terms": 2, "search.hvp": "first_order"}, "search.neumann_terms: 2 terms belong to the second-order gradient"),
    ("penn", {"search.neumann_terms": 2, "search.unrolled_lr": 0}, "search.neumann_terms: 2 terms belong to the second-order gradient"),
    ("penn", {"retrain.init_range": 1e300}, "and at most 1000"),
    ("penn", {"search.epsilon": 1e300}, "search.epsilon: 1e+300 must be a number of at least 1e-12, and at most 1e+30"),
    ("penn", {"search.epochs": 3, "search.warmup_epochs": 3}, "search.warmup_epochs: 3 must be below search.epochs = 3: α would never move"),
    ("tiny", {"retrain.anneal": 0.5, "retrain.patience": 4}, "retrain.anneal: 0.5 needs a fixed number of epochs"),
    ("penn", {"search.draws": 0}, "search.draws: 0 must be a whole number of at least 1"),
    ("penn", {"search.draws": 4}, "search.draws: 4 cells are drawn with search.relaxation = gumbel alone; with edge give 1"),
    ("penn", {"search.draws": 257, "search.relaxation": "gumbel"}, "search.draws: 257 cells have at least a stream each; give at most search.batch_size = 256"),
    ("penn", {"search.optimizer": "adam"}, "search.lr: 20 is a rate for SGD; search.optimizer = adam takes at most 0.1, and 0.003 is usual"),
    ("penn", {"search.optimizer": "adam", "search.lr": 0.01, "search.reproduce_original": True}, "search.optimizer: the published code has SGD"),
    ("drawn", {"search.optimizer": "adam", "search.lr": 0.01}, "search.unrolled_lr: 2 is too large for search.optimizer = adam, which moves each weight"),
    ("penn", {"search.optimizer": "adam", "search.lr": 0.01, "search.neumann_terms": 1}, "neither reproduce_original = False nor neumann_terms = 1; give sgd, or false and 0"),
    ("penn", {"retrain.optimizer": "adm"}, "retrain.optimizer: 'adm' is none of sgd, adam; did you mean 'adam'?"),
    ("penn", {"retrain.optimizer": "adam", "retrain.lr": 0.005}, "retrain.nonmono: 5 turns averaging on, which needs retrain.optimizer = sgd; with adam give none"),
    ("penn", {"retrain.optimizer": "adam", "retrain.nonmono": None}, "retrain.lr: 20 is a rate for SGD; retrain.optimizer = adam takes at most 0.1"),
    ("tiny", {"search.anneal": 1.1}, "search.anneal: 1.1 must be a number of at least 0 and at most 1"),
    ("tiny", {"retrain.anneal": 1.1}, "retrain.anneal: 1.1 must be a number of at least 0 and at most 1"),
    ("tiny", {"retrain.bptt": 1, "retrain.max_bptt_above": 0}, "retrain.min_bptt: 3 must be at most bptt + max_bptt_above = 1"),
    ("penn", {"search.reproduce_original": True, "search.clip": None}, "search.reproduce_original"),
])
def test_refusals(name, overrides, words):
    with pytest.raises(ValueError) as error:
        get_recipe(name, overrides)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_as_many_cells_may_be_drawn_as_there_are_streams():
    assert get_recipe("penn", {"search.draws": 256, "search.relaxation": "gumbel"}).search.draws == RECIPES["penn"].search.batch_size


def test_what_nni_calls_a_branch_of_a_nested_choice_is_no_setting():
    assert get_recipe("penn", {"search": {"_name": "slow", "lr": 1}}).search == SearchRecipe(lr=1.0)


def test_override_of_one_part():
    assert override(RetrainRecipe(), {"lr": "1"}) == RetrainRecipe(lr=1.0)
    with pytest.raises(ValueError, match="setting 'lrr' is no field"):
        override(RetrainRecipe(), {"lrr": "1"})


@pytest.mark.parametrize("settings, expected", [
    ({}, 10), ({"search.own_gradient": True}, 13), ({"search.reproduce_original": True}, 13), ({"search.hvp": "first_order"}, 5), ({"search.unrolled_lr": 0}, 5),
    ({"search.neumann_terms": 2}, 22), ({"search.warmup_epochs": 3}, 3)], ids=str)
def test_the_arithmetic_of_a_step(settings, expected):
    """Beside the benchmark's count, which is made otherwise, from the operations of each part."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from step_size import Size

    recipe = get_recipe("penn", settings).search
    assert recipe.passes(2, 10_000) == pytest.approx(expected)
    drawn = get_recipe("penn", {"search.relaxation": "gumbel"}).search
    size = Size(35, 256, 300, 10_000)
    assert drawn.passes(0, 10_000) * size.forward(36) == pytest.approx(size.drawn_flops())


@pytest.mark.parametrize("recipe", [recipe.search for recipe in RECIPES.values()], ids=list(RECIPES))
@pytest.mark.parametrize("first", [0, 1, 5])
def test_the_passes_of_many_epochs_are_their_sum(recipe, first):
    end = max(recipe.epochs, first + 1)
    assert recipe.passes_of(first, end, 500) == pytest.approx(sum(recipe.passes(epoch, 500) for epoch in range(first, end)), rel=1e-12)
    assert recipe.passes_of(first, 10**30, 500) == pytest.approx(1e30 * recipe.passes(recipe.warmup_epochs, 500))
