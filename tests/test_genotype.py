"""Genotypes: round trips, refusals in one line, and the derivation against a slow one written from the paper's sentence."""

import csv
import json
import math
import re
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from nni_darts_rnn.genotype import DARTS_V1, DARTS_V2, DRAWN_V1, ENAS, NAMED, PRIMITIVES, Genotype, derive, edges, load_genotype, number_of_nodes

OPS = ("tanh", "relu", "sigmoid", "identity")


def random_genotype(rng, n, part=False) -> Genotype:
    concat = tuple((1 + rng.permutation(n)[:max(1, n // 2)]).tolist()) if part else ()
    return Genotype(tuple((OPS[rng.integers(4)], int(rng.integers(i))) for i in range(1, n + 1)), concat)


def one_line(error) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


@pytest.mark.parametrize("n", [1, 2, 3, 8, 11, 20])
def test_round_trips(n):
    rng = np.random.default_rng(n)
    for _ in range(20):
        g, part = random_genotype(rng, n), random_genotype(rng, n, part=True)
        assert Genotype.from_sample(g.to_sample()) == g
        for cell in (g, part):
            text = cell.to_json()
            assert "\n" not in text and Genotype.from_json(text) == cell
            assert json.loads(text) == {"recurrent": [[op, j] for op, j in cell.recurrent], "concat": list(cell.concat)}
            assert hash(Genotype.from_json(text)) == hash(cell)


def test_sample_has_the_labels_of_the_space():
    assert Genotype((("relu", 0), ("tanh", 1))).to_sample() == {
        "cell/node_1/input": "0", "cell/node_1/op": "relu", "cell/node_2/input": "1", "cell/node_2/op": "tanh"}


def test_sample_with_numbers_any_order_and_other_labels():
    sample = {"lr": 0.1, "cell/node_2/op": "identity", "cell/node_2/input": 1, "cell/node_1/input": 0, "cell/node_1/op": "sigmoid"}
    assert Genotype.from_sample(sample) == Genotype((("sigmoid", 0), ("identity", 1)))


def test_concat_defaults_to_every_node_and_sequences_become_tuples():
    g = Genotype([["tanh", "0"], ["relu", 1.0]])
    assert g.recurrent == (("tanh", 0), ("relu", 1)) and g.concat == (1, 2) and g.n_nodes == 2
    assert Genotype.from_json('{"recurrent": [["tanh", 0]]}') == Genotype((("tanh", 0),))
    with pytest.raises(AttributeError):
        g.concat = (1,)


def test_text_of_a_genotype_names_each_node():
    assert str(Genotype((("relu", 0), ("tanh", 1)))) == "[relu←0, tanh←1]"
    assert str(Genotype((("relu", 0), ("tanh", 1)), (2,))) == "[relu←0, tanh←1] mean of [2]"


def test_published_cells():
    assert (DARTS_V1.n_nodes, DARTS_V2.n_nodes, ENAS.n_nodes) == (8, 8, 11)
    assert DARTS_V1.concat == DARTS_V2.concat == tuple(range(1, 9)) and ENAS.concat == (2, 5, 6, 9, 10, 11)
    # Liu et al. 2019, figure 5: nodes 2, 3 and 4 of the second-order cell read node 1, nodes 6 and 8 node 5
    assert [i for i, (_, j) in enumerate(DARTS_V2.recurrent, 1) if j == 1] == [2, 3, 4]
    assert [i for i, (_, j) in enumerate(DARTS_V2.recurrent, 1) if j == 5] == [6, 8]
    assert NAMED == {"DARTS_V1": DARTS_V1, "DARTS_V2": DARTS_V2, "ENAS": ENAS, "DRAWN_V1": DRAWN_V1}


def test_the_cell_found_here_is_the_best_stored_one_of_its_search():
    """By validation, of the drawn searches whose cells were retrained for ten epochs."""
    with open(Path(__file__).parents[1] / "benchmarks" / "results" / "search_quality.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["name"] == "second-order, gumbel, α warm-up, ξ = 2" and row["retraining"].startswith("10 epochs")]
    assert len(rows) == 8 and Genotype.from_json(min(rows, key=lambda row: float(row["valid"]))["genotype"]) == DRAWN_V1


@pytest.mark.parametrize("make, words", [
    (lambda: Genotype((("rleu", 0),)), "op 'rleu' of node 1 is none of identity, relu, sigmoid, tanh; did you mean 'relu'?"),
    (lambda: Genotype((("none", 0),)), "op 'none' of node 1"),
    (lambda: Genotype((("tanh", 0), ("relu", 2))), "node 2 reads state 2; only states 0 to 1"),
    (lambda: Genotype((("tanh", 0), ("relu", -1))), "node 2 reads state -1"),
    (lambda: Genotype((("tanh", 1),)), "node 1 reads state 1; only states 0 to 0"),
    (lambda: Genotype(()), "empty"),
    (lambda: Genotype((("tanh", 0),), (0,)), "concat (0,)"),
    (lambda: Genotype((("tanh", 0),), (2,)), "concat (2,)"),
    (lambda: Genotype((("tanh", 0), ("tanh", 1)), (2, 2)), "concat (2, 2)"),
    (lambda: Genotype((("tanh", 0),), ("x",)), "expected recurrent"),
    (lambda: Genotype((("tanh", 0.5),)), "0.5 is no whole number"),
    (lambda: Genotype((("tanh", True),)), "True is no whole number"),
    (lambda: Genotype((("tanh", math.nan),)), "expected recurrent"),
    (lambda: Genotype((("tanh", math.inf),)), "expected recurrent"),
    (lambda: Genotype((("tanh", None),)), "expected recurrent"),
    (lambda: Genotype((("tanh",),)), "expected recurrent"),
    (lambda: Genotype("DARTS_V1"), "expected recurrent"),
    (lambda: load_genotype(namedtuple("Genotype", "recurrent concat")([("tanh", 0)], 5)), "recurrent and concat have to be lists"),
    (lambda: Genotype(None), "expected recurrent"),
    (lambda: Genotype.from_json("no JSON"), "not JSON"),
    (lambda: Genotype.from_json(""), "not JSON"),
    (lambda: Genotype.from_json("[" * 100_000), "not JSON"),
    (lambda: Genotype.from_json("[1, 2]"), "expected {"),
    (lambda: Genotype.from_json('{"concat": [1]}'), "expected {"),
    (lambda: Genotype.from_json('{"recurrent": [["tanh", 0]], "conact": [1]}'), "expected {"),
    (lambda: Genotype.from_json('{"recurrent": 3}'), "expected recurrent"),
    (lambda: Genotype.from_json('{"recurrent": [["tanh", Infinity]]}'), "expected recurrent"),
    (lambda: Genotype.from_sample({}), "no label cell/node_<i>/op"),
    (lambda: Genotype.from_sample({"cell/node_1/op": "tanh"}), "'cell/node_1/input' is missing"),
    (lambda: Genotype.from_sample({"cell/node_2/op": "tanh", "cell/node_2/input": "0"}), "'cell/node_1/op' is missing"),
    (lambda: Genotype.from_sample({"cell/node_1/op": "tanh", "cell/node_1/input": "1"}), "node 1 reads state 1"),
    (lambda: ENAS.to_sample(), "averages all nodes"),
    (lambda: derive(np.zeros(5)), "shape (5,); expected (E, 5)"),
    (lambda: derive(np.zeros((3, 4))), "shape (3, 4)"),
    (lambda: derive(np.zeros((2, 5))), "2 rows"),
    (lambda: derive(np.zeros((0, 5))), "0 rows"),
    (lambda: derive(np.full((3, 5), np.nan)), "NaN"),
    (lambda: derive(np.array([[0, 0, 0, 0, np.inf]])), "NaN or infinite"),
    (lambda: load_genotype("DART_V2"), "did you mean 'DARTS_V2'?"),
    (lambda: load_genotype(None), "genotype: None is none of a Genotype, a name"), (lambda: load_genotype([("tanh", 0)]), "is none of a Genotype, a name"),
    (lambda: load_genotype({"recurrent": 3}), "recurrent"), (lambda: load_genotype({"tanh": 0}), "sample: no label"),
    (lambda: load_genotype("no such file.json"), "neither a file nor one of DARTS_V1, DARTS_V2, ENAS, DRAWN_V1"),
    (lambda: load_genotype("[('tanh', 0), ('relu', 1)] " * 20), "neither a file nor"),
    (lambda: load_genotype('{"recurrent": [["tanh", 1]]}'), "node 1 reads state 1"),
    (lambda: load_genotype("Genotype(recurrent=[('tanh', 1)], concat=range(1, 2))"), "node 1 reads state 1"),
    (lambda: load_genotype("Genotype(recurrent=[('tanh', 0)], concat=range(1, 10**9))"), "is not as published code prints one"),
    (lambda: load_genotype("Genotype(recurrent=[('tanh', 0)], concat=range(1, 1000000000))"), "concat (1, 2) must name"),
    (lambda: load_genotype("Genotype(recurrent=[('tanh', 0)], concat=open('x'))"), "is not as published code prints one"),
    (lambda: load_genotype("Genotype(recurrent=3, concat=4)"), "is not as published code prints one"),
    (lambda: load_genotype("Genotype([('tanh', 0)], range(1, 2))"), "is not as published code prints one"),
    (lambda: load_genotype("Genotype(3, recurrent=[('tanh', 0)], concat=range(1, 2))"), "is not as published code prints one"),
    (lambda: load_genotype("Genotype("), "is not as published code prints one"),
])
def test_refusals(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert words in one_line(error)


def test_load_genotype_takes_what_published_code_has_and_prints():
    """quark0/darts `rnn/genotypes.py`: a named tuple, whose concat is a range."""
    Theirs = namedtuple("Genotype", "recurrent concat")
    for cell in (DARTS_V1, ENAS):
        theirs = Theirs(list(cell.recurrent), range(1, 9) if cell is DARTS_V1 else list(cell.concat))
        assert load_genotype(theirs) == load_genotype(theirs._asdict()) == load_genotype(repr(theirs)) == load_genotype(f" {theirs}\n") == cell


def test_load_genotype_takes_itself_a_name_a_text_a_file_and_a_folder(tmp_path):
    cell = Genotype((("relu", 0), ("tanh", 0)), (2,))
    file = tmp_path / "genotype.json"
    file.write_text(cell.to_json() + "\n", encoding="utf-8")
    for source in (cell, cell.to_json(), f"  {cell.to_json()}", file, str(file), tmp_path, str(tmp_path)):
        assert load_genotype(source) == cell
    assert load_genotype("ENAS") is ENAS
    assert load_genotype(json.loads(ENAS.to_json())) == ENAS and load_genotype(DARTS_V1.to_sample()) == DARTS_V1
    (tmp_path / "with a mark.json").write_text(ENAS.to_json(), encoding="utf-8-sig")
    assert load_genotype(tmp_path / "with a mark.json") == ENAS


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00", b"{", b'{"recurrent": [["tnah", 0]]}'])
def test_a_bad_file_is_named(tmp_path, data):
    file = tmp_path / "cell.json"
    file.write_bytes(data)
    with pytest.raises(ValueError) as error:
        load_genotype(file)
    assert str(file) in one_line(error)


def test_a_folder_without_a_genotype_is_refused(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"genotype {str(tmp_path)!r}: that folder has no genotype.json")):
        load_genotype(tmp_path)


def test_edges_and_their_number():
    assert edges(3) == [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    for n in range(1, 60):
        assert len(edges(n)) == n * (n + 1) // 2 and number_of_nodes(len(edges(n))) == n
    for wrong in set(range(120)) - {n * (n + 1) // 2 for n in range(1, 20)}:
        with pytest.raises(ValueError):
            number_of_nodes(wrong)


def slow_derive(p, primitives=PRIMITIVES) -> tuple:
    """Of each node's (predecessor, primitive) pairs, all but `none`, the strongest; of equal ones the first, by predecessor and then by primitive."""
    n = next(n for n in range(1, 100) if n * (n + 1) // 2 == len(p))
    cell = []
    for node in range(1, n + 1):
        above = node * (node - 1) // 2
        pairs = [(-p[above + j][k], j, k) for j in range(node) for k in range(len(primitives)) if primitives[k] != "none"]
        _, j, k = sorted(pairs)[0]
        cell.append((primitives[k], j))
    return tuple(cell)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("kind", ["softmax", "with ties", "all equal", "none is strong"])
def test_derive_against_the_rule(n, kind):
    rng = np.random.default_rng(n)
    shape = (n * (n + 1) // 2, 5)
    for _ in range(40):
        logits = {"softmax": rng.normal(size=shape), "with ties": rng.integers(0, 2, shape).astype(float), "all equal": np.zeros(shape),
                  "none is strong": rng.normal(size=shape) + [9, 0, 0, 0, 0]}[kind]
        p = np.exp(logits)
        if kind != "with ties":  # rows that are not normalised tie across edges as well
            p /= p.sum(1, keepdims=True)
        assert derive(p).recurrent == slow_derive(p.tolist())
        assert derive(p.tolist()).concat == tuple(range(1, n + 1))


def test_derive_with_other_primitives():
    rng = np.random.default_rng(0)
    for names in (("tanh", "relu"), ("relu", "none", "identity"), ("sigmoid",)):
        for _ in range(20):
            p = rng.random((10, len(names)))
            assert derive(p, names).recurrent == slow_derive(p.tolist(), names)


def test_ties_go_to_the_smaller_predecessor_then_the_earlier_primitive():
    assert derive(np.full((6, 5), 0.2)).recurrent == (("tanh", 0),) * 3
    p = np.zeros((3, 5))
    p[1, 3], p[2, 1] = 0.5, 0.5  # node 2: sigmoid from 0 and tanh from 1 are equal
    assert derive(p).recurrent[1] == ("sigmoid", 0)


def test_a_sample_of_cells_in_scopes():
    cells = {"encoder": Genotype((("tanh", 0), ("relu", 1))), "decoder": Genotype((("relu", 0),))}
    sample = {f"{scope}/{label}": value for scope, cell in cells.items() for label, value in cell.to_sample().items()}
    assert {scope: Genotype.from_sample(sample, scope) for scope in cells} == cells
    with pytest.raises(ValueError, match="decoder, encoder"):
        Genotype.from_sample(sample)


def test_a_pickle_with_a_primitive_that_is_not_registered_here():
    import pickle

    data = pickle.dumps(Genotype((("tanh", 0),))).replace(b"tanh", b"tonh")
    with pytest.raises(ValueError, match="register_primitive"):
        pickle.loads(data)
