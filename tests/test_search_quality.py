"""The comparison of searches: its statistics against hand-made cases, its budget against the operations counted, each arm on a small text."""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import quality_table as figures
import search_arms as arms
import search_quality as quality
import shared_weights as weights

from nni_darts_rnn.corpus import EOS, UNK, Corpus, Vocabulary
from nni_darts_rnn.genotype import DARTS_V2, Genotype
from nni_darts_rnn.model import perplexity
from nni_darts_rnn.recipes import get_recipe

TINY = get_recipe("tiny", {"search.hidden_size": 6, "search.n_nodes": 2, "search.batch_size": 4, "search.eval_batch_size": 2, "search.lr": 1.0,
                           "retrain.hidden_size": 6, "retrain.batch_size": 4, "retrain.eval_batch_size": 3, "retrain.epochs": 1, "retrain.lr": 1.0})


def corpus(n=400) -> Corpus:
    tokens = torch.from_numpy((np.cumsum(np.random.default_rng(0).choice(3, n + 150, p=(0.1, 0.8, 0.1))) % 10).astype(np.int64))
    return Corpus("letters", Vocabulary((EOS, UNK, *"abcdefgh")), *tokens.split((n, 80, 70)))


def test_sign_flip():
    assert figures.sign_flip(np.arange(1.0, 9.0)) == 2 / 256  # no other choice of signs is as far, but all turned round
    assert figures.sign_flip(np.array([1.0, -1.0])) == 1.0
    assert figures.sign_flip(np.array([3.0, 1.0, -1.0])) == 6 / 8  # the sums are 3, 5, 1, 3 and their opposites


def test_ranks():
    assert rankdata(np.array([5.0, 1.0, 3.0, 3.0])).tolist() == [4.0, 1.0, 2.5, 2.5]
    a = np.array([3.0, 1.0, 4.0, 1.5, 9.0])
    b = np.array([2.0, 7.0, 1.0, 8.0, 2.5])
    d = rankdata(a) - rankdata(b)
    assert figures.spearman(a, b) == pytest.approx(1 - 6 * (d**2).sum() / (5 * 24))  # the formula without ties
    assert figures.spearman(a, np.exp(a)) == pytest.approx(1)


def test_what_a_perplexity_goes_with():
    assert figures.depth([["tanh", 0]] * 4) == 1 and figures.depth([["tanh", node] for node in range(4)]) == 2.5
    assert figures.depth([["tanh", 0], ["relu", 1], ["relu", 0]]) == pytest.approx(4 / 3)
    cells = {"star": [["tanh", 0], ["tanh", 0], ["relu", 0]], "fork": [["tanh", 0], ["relu", 1], ["relu", 1]], "chain": [["relu", 0], ["tanh", 1], ["tanh", 2]]}
    rows = [{"genotype": json.dumps({"recurrent": cells[name]}), "valid": valid} for name, valid in (("star", 5.0), ("star", 7.0), ("fork", 6.5), ("chain", 9.0))]
    found = figures.traits(rows)
    assert found["cells"] == 3 and found["with"].keys() == {"depth", "tanh", "relu"}  # no cell has another function
    assert found["with"]["depth"]["rank_correlation"] == pytest.approx(1)
    assert found["with"]["tanh"]["rank_correlation"] == pytest.approx(0)  # 2, 1 and 2 against ranks 1, 2 and 3


def test_budget_is_the_arithmetic():
    """Counted product by product: 13 passes of the mixed cell and the decoder against 3 of the discrete ones, a token each."""
    recipe, words = replace(TINY.search, hidden_size=5, n_nodes=3), 11
    H, decoder = 5, 2 * 5 * 11
    mixed = 2 * (2 * H * 2 * H) + sum(2 * H * 2 * H for node in range(1, 4) for _ in range(node))
    discrete = 2 * (2 * H * 2 * H) + sum(2 * H * 2 * H for _ in range(3))
    assert arms.budget(recipe, words, H) == pytest.approx(13 * (mixed + decoder) / (3 * (discrete + decoder)))
    assert arms.budget(recipe, words, 2 * H) == pytest.approx(13 * (mixed + decoder) / (3 * (4 * discrete + 2 * decoder)))


def test_frequent_words():
    whole = Corpus("t", Vocabulary(("a", EOS, "b", UNK, "c")), torch.tensor([0, 2, 2, 1, 4, 0, 2]), torch.tensor([4, 0]), torch.tensor([3, 2]))
    small = quality.frequent(whole, 4)
    assert small.vocab.words == (EOS, UNK, "b", "a")
    assert [small.vocab.decode([i]) or EOS for i in small.train.tolist()] == ["a", "b", "b", "\n", UNK, "a", "b"]
    assert small.valid.tolist() == [1, 3] and small.test.tolist() == [1, 2]


def test_random_cells_are_drawn_evenly():
    draw = random.Random(0)
    cells = [arms.random_cell(draw, 3) for _ in range(3000)]
    ops = [op for cell in cells for op, _ in cell.recurrent]
    assert all(abs(ops.count(op) / len(ops) - 0.25) < 0.02 for op in ("tanh", "relu", "sigmoid", "identity"))
    third = [cell.recurrent[2][1] for cell in cells]
    assert all(abs(third.count(j) / len(third) - 1 / 3) < 0.04 for j in range(3))


def test_named_cells_are_an_arm(tmp_path):
    assert arms.find_cell("DARTS_V2", corpus(), 0.5, TINY, 3, tmp_path) == DARTS_V2


def test_beginning():
    whole = corpus()
    assert arms.beginning(whole, 0.5).train.tolist() == whole.train[:200].tolist() and len(arms.beginning(whole, 1.0).train) == len(whole.train)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arm", arms.ARMS)
def test_each_arm_finds_a_cell_and_the_same_one_again(arm, tmp_path):
    found = [arms.find_cell(arm, corpus(), 0.5, TINY, 3, tmp_path / str(k)) for k in range(2)]
    assert found[0] == found[1] and isinstance(found[0], Genotype) and found[0].n_nodes == 2


def test_rows_have_the_supernets_last_perplexity(tmp_path):
    for seed, last in ((1, "30.5"), (2, None)):
        folder = tmp_path / "an arm, changed" / str(seed)
        folder.mkdir(parents=True)
        (folder / "rows.json").write_text(json.dumps([{"seed": seed, "supernet_valid": "7"}]))
        if last:
            (folder / "search.csv").write_text(f"phase,epoch,perplexity\nsearch,0,99\nsearch,1,{last}\n")
    assert quality.collect(tmp_path / "an arm, changed") == [{"seed": 1, "supernet_valid": "30.5"}, {"seed": 2, "supernet_valid": "7"}]


def test_agreement():
    one, other = [["relu", 0], ["tanh", 1]], [["relu", 0], ["tanh", 0]]
    assert figures.agreement([one, other]) == 0.5 and figures.agreement([one, one, other]) == pytest.approx(2 / 3) and figures.agreement([one]) is None


def test_summary(tmp_path):
    def row(name, seed, again, valid):
        return {"name": name, "arm": name, "retraining": "3 epochs", "seed": seed, "retrain_seed": again, "genotype": json.dumps({"recurrent": [["relu", 0]], "concat": [seed]}),
                "short_valid": valid + 10, "valid": valid, "test": valid + 1, "search_seconds": 5, "retrain_seconds": 1}

    rows = [row("second-order", s, r, 50.0 + s + r) for s in (1, 2, 3) for r in (0, 1)] + [row("random", s, r, 52.0 + s + r) for s in (1, 2, 3) for r in (0, 1)]
    found = figures.summary(rows)
    arm = found["arms"]["second-order"]
    assert (arm["seeds"], arm["retrainings"]) == (3, 2) and arm["valid_mean"] == 52.5 and arm["valid_sd"] == pytest.approx(1.0)
    assert arm["minus_random"] == -2 and arm["p_random"] == 2 / 8 and arm["best_valid"] == 51.5 and arm["best_test"] == 52.5
    assert arm["agreement"] == 1 and found["agreement_by_chance"] == 1 / 4
    assert found["short_long_rank_correlation"] == pytest.approx(1) and found["sd_of_retrainings"] == pytest.approx(0.5**0.5)
    assert found["sd_beside_retraining_seed"] == pytest.approx(0, abs=1e-6) and arm["supernet_valid"] is None
    assert (found["cells_retrained_often"], found["most_retrainings"]) == (6, 2) and "traits_of_random" not in found
    first_order = figures.summary([row | {"test": 2 * row["valid"], "name": row["name"].replace("random", "first-order, gumbel, α warm-up")} for row in rows])["arms"]["second-order"]
    assert first_order["minus_first-order, gumbel, α warm-up"] == -2 and first_order["minus_first-order, gumbel, α warm-up_test"] == -4
    ops = ["tanh", "relu", "sigmoid", "identity"]
    blind = [row("one", s, 0, 50.0 + s) | {"genotype": json.dumps({"recurrent": [[ops[s], 0]]})} for s in range(4)]
    found = figures.summary(blind + [row("second-order", 1, 0, 9.0) | {"genotype": json.dumps({"recurrent": [["relu", 0], ["relu", 0]]})}])
    assert found["traits"]["cells"] == 5 and found["traits_of_random"] == figures.traits(blind)
    rows[0]["valid"] += 1.0  # one of 6 cells × 2: what is left is 1/4 in each way but for the means over 6
    left = figures.summary(rows)["sd_beside_retraining_seed"]
    assert left == pytest.approx((((1 - 1 / 6) ** 2 / 4 * 2 + 5 * (1 / 12) ** 2 * 2) / 5) ** 0.5)
    longer = [row | {"retraining": "10 epochs", "valid": 100 - row["valid"]} for row in rows if row["name"] == "random"]
    figures.picture(rows + longer, tmp_path / "p.svg")
    assert all(words in (tmp_path / "p.svg").read_text() for words in ("second-order", "3 epochs", "10 epochs"))
    assert figures.ways_agree(longer + [row for row in rows if row["name"] == "random"]) == [{"ways": ["3 epochs", "10 epochs"], "cells": 3, "rank_correlation": pytest.approx(-1)}]


def test_rows_take_the_place_of_their_like(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    row = {"name": "one", "retraining": "3 epochs", "seed": 1, "retrain_seed": 0, "valid": 1.0}
    figures.save([row, row | {"retrain_seed": 1}], "s")
    figures.save([row | {"valid": 2.0}, row | {"retraining": "10 epochs", "valid": 3.0}], "s")
    assert [(r["retraining"], r["retrain_seed"], r["valid"]) for r in figures.stored("s")] == [("3 epochs", "1", "1.0"), ("3 epochs", "0", "2.0"), ("10 epochs", "0", "3.0")]


def test_a_seed_retrained_again_has_its_last_stored_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    row = {"name": "one", "retraining": "3 epochs", "seed": 1, "retrain_seed": 0, "genotype": "early"}
    figures.save([row, row | {"seed": 2}, row | {"name": "other", "genotype": "another"}], "s")
    figures.save([row | {"retraining": "10 epochs", "genotype": "late"}], "s")
    monkeypatch.setitem(quality.STUDIES, "penn", quality.Study("s", "penn"))
    options = argparse.Namespace(study="penn", cells_of=None)
    assert {seed: found["genotype"] for seed, found in quality.found_before(options, "one").items()} == {1: "late", 2: "early"}


def test_another_studys_cells_come_without_their_supernets_perplexity(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    monkeypatch.setitem(quality.STUDIES, "penn", quality.Study("s", "penn"))
    figures.save([{"name": "one", "retraining": "3 epochs", "seed": 1, "retrain_seed": 0, "genotype": "its cell", "supernet_valid": 120.0}], "s")
    there = quality.found_before(argparse.Namespace(study="all-words", cells_of=["penn", "one"]), "few words")
    assert {seed: (found["genotype"], found["supernet_valid"]) for seed, found in there.items()} == {1: ("its cell", "")}
    assert quality.found_before(argparse.Namespace(study="penn", cells_of=["penn", "one"]), "few words")[1]["supernet_valid"] == "120.0"


def test_going_down_finds_the_lowest_cell_where_nodes_do_not_depend_on_each_other():
    target = Genotype((("relu", 0), ("tanh", 1), ("identity", 0), ("sigmoid", 3)))
    asked = []

    def judge(cell):
        asked.append(cell)
        return sum(a != b for a, b in zip(cell.recurrent, target.recurrent))

    start = Genotype((("tanh", 0),) * 4)
    assert weights.descend(start, judge) == target
    assert {len(weights.neighbours(start, node)) for node in (1, 2, 3, 4)} == {4, 8, 12, 16} and start in weights.neighbours(start, 2)
    assert weights.descend(start, lambda cell: 1.0) == start  # of equal ones its own


@pytest.mark.parametrize("study", weights.STUDIES.values(), ids=weights.STUDIES)
def test_ways_of_searching_are_recipes_and_have_cells_to_judge(study, monkeypatch, capsys):
    for way, changed in study.ways.items():
        searches = weights.get_recipe(study.recipe, changed).search
        assert searches.relaxation == "gumbel" and all(getattr(searches, key.removeprefix("search.")) == value for key, value in changed.items()), way
    known = weights.known_cells(study)
    assert len(known) > 10 and all(Genotype.from_json(cell).n_nodes == 8 and 50 < perplexity < 130 for cell, perplexity in known.items())
    monkeypatch.setattr("sys.argv", ["shared_weights.py", "--way", "none such"])
    with pytest.raises(SystemExit):
        weights.main()
    assert "--way: none such is none of" in capsys.readouterr().err


def test_what_the_shared_weights_say(monkeypatch):
    """On a small text: the judge's perplexity of α's own cell is the supernet's, in evaluation, and the figures are of the cells given."""
    recipe = replace(TINY, search=replace(TINY.search, relaxation="gumbel", dropout=0.2))
    cells = {random_genotype.to_json(): float(k) for k, random_genotype in enumerate(arms.random_cell(random.Random(k), 2) for k in range(4))}
    models = []
    monkeypatch.setattr(weights, "Judge", lambda supernet, *others, judge=weights.Judge: models.append(supernet) or judge(supernet, *others))
    row = weights.one("clip 0.1", 1, True, corpus(), recipe, cells, retrainings=1)
    assert row["perplexity"] == pytest.approx(perplexity(models[0], corpus().valid, recipe.search.eval_batch_size, recipe.search.bptt), rel=1e-5)
    assert row["lower"]["perplexity"] <= row["perplexity"] and row["best"] <= row["median"] <= row["worst"] and row["cells"] == len(cells)
    assert row["lower"]["retrained"] > 1 and -1 <= row["rank_correlation"] <= 1
    assert "p" not in weights.summary([row])["clip 0.1"]["lower"]
    found = weights.summary([row, row | {"seed": 2, "retrained": row["retrained"] + 1}])["clip 0.1"]
    assert found["seeds"] == 2 and found["lower"]["retrained_alpha"] == pytest.approx(row["retrained"] + 0.5) and found["lower"]["p"] in (0.5, 1.0)
