"""A recurrent cell as data: its genotype, the published cells, and the derivation from architecture probabilities."""

from __future__ import annotations

import ast
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .checks import did_you_mean

PRIMITIVES = ("none", "tanh", "relu", "sigmoid", "identity")
"""Primitives of one edge of the supernet, in the order of α's columns (DARTS, section 3.2). `none` is never derived."""
RELAXATIONS = ("edge", "node", "gumbel")  # what one softmax of α runs over (supernet.py)

_known_ops = set(PRIMITIVES) - {"none"}


def register_op(name: str) -> None:
    """Allow `name` as the nonlinearity of a node. Use `cell.register_primitive`, which also says how to compute it."""
    _known_ops.add(name)


def edges(n_nodes: int) -> list[tuple[int, int]]:
    """The E = N(N+1)/2 edges `(node, predecessor)` in the order of α's rows: node by node, predecessor by predecessor."""
    return [(node, j) for node in range(1, n_nodes + 1) for j in range(node)]


def number_of_nodes(n_edges: int) -> int:
    """N for E edges; `ValueError` if no N has that many."""
    n = (int(np.sqrt(8 * n_edges + 1)) - 1) // 2
    if n < 1 or n * (n + 1) // 2 != n_edges:
        raise ValueError(f"{n_edges} rows of α fit no number of nodes; N nodes have N(N+1)/2 edges: 1, 3, 6, 10, …")
    return n


@dataclass(frozen=True)
class Genotype:
    """A discrete recurrent cell.

    `recurrent[i-1] = (op, j)` means that node i ≥ 1 reads state j < i through the nonlinearity `op`
    (state 0 is made from the input and the previous hidden state). The output is the mean of the states named in `concat`
    (default: all nodes). Raises `ValueError` with one line when the cell cannot be built.
    """

    recurrent: tuple[tuple[str, int], ...]
    concat: tuple[int, ...] = ()

    def __post_init__(self):
        try:
            recurrent = tuple((str(op), _integer(j)) for op, j in self.recurrent)
            concat = tuple(_integer(c) for c in self.concat) or tuple(range(1, len(recurrent) + 1))
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"genotype: expected recurrent = ((op, predecessor), …) and concat = (node, …): {error}") from None
        if not recurrent:
            raise ValueError("genotype: recurrent is empty; at least one node is needed")
        for node, (op, j) in enumerate(recurrent, start=1):
            if op not in _known_ops:
                raise ValueError(f"genotype: op {op!r} of node {node} is none of {', '.join(sorted(_known_ops))}"
                                 + did_you_mean(op, _known_ops) + "; one of your own has to be registered first, with register_primitive")
            if not 0 <= j < node:
                raise ValueError(f"genotype: node {node} reads state {j}; only states 0 to {node - 1} come before it")
        bad = [c for c in concat if not 1 <= c <= len(recurrent)]
        if bad or len(set(concat)) != len(concat):
            raise ValueError(f"genotype: concat {concat} must name each of the nodes 1 to {len(recurrent)} at most once")
        object.__setattr__(self, "recurrent", recurrent)
        object.__setattr__(self, "concat", concat)

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.__post_init__()  # a pickle may come from a process with primitives that this one does not know

    @property
    def n_nodes(self) -> int:
        return len(self.recurrent)

    def __str__(self) -> str:
        body = ", ".join(f"{op}←{j}" for op, j in self.recurrent)
        all_nodes = self.concat == tuple(range(1, self.n_nodes + 1))
        return f"[{body}]" + ("" if all_nodes else f" mean of {list(self.concat)}")

    def to_json(self) -> str:
        """One line of JSON: `{"recurrent": [[op, predecessor], …], "concat": [node, …]}`."""
        return json.dumps({"recurrent": [list(pair) for pair in self.recurrent], "concat": list(self.concat)})

    @classmethod
    def from_json(cls, text: str) -> Genotype:
        """The inverse of `to_json`; `ValueError` for text that is no genotype."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"genotype: not JSON ({error})") from None
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data) -> Genotype:
        """The genotype of `{"recurrent": …, "concat": …}`, as in JSON or in the named tuple of published code; `ValueError` for anything else."""
        if not isinstance(data, dict) or "recurrent" not in data or set(data) - {"recurrent", "concat"}:
            raise ValueError('genotype: expected {"recurrent": [[op, predecessor], …], "concat": [node, …]}')
        return cls(data["recurrent"], data.get("concat", ()))

    def to_sample(self) -> dict[str, str]:
        """This cell as an NNI sample of `DartsRnnSpace`. `ValueError` if `concat` is not all nodes, as the space has no such choice."""
        if self.concat != tuple(range(1, self.n_nodes + 1)):
            raise ValueError(f"genotype: a sample of the space averages all nodes; concat here is {self.concat}")
        sample = {}
        for node, (op, j) in enumerate(self.recurrent, start=1):
            sample[f"cell/node_{node}/input"] = str(j)
            sample[f"cell/node_{node}/op"] = op
        return sample

    @classmethod
    def from_sample(cls, sample: dict, scope: str = "") -> Genotype:
        """The cell that an NNI sample stands for (labels `cell/node_<i>/input` and `cell/node_<i>/op`; others are ignored). `scope` is that of the cell's
        `label_scope`, where it has one: "encoder" for `encoder/cell/node_<i>/op`."""
        prefix = f"{scope}/cell/node_" if scope else "cell/node_"
        n_nodes = sum(str(key).startswith(prefix) and str(key).endswith("/op") for key in sample)
        try:
            recurrent = [(sample[f"{prefix}{i}/op"], sample[f"{prefix}{i}/input"]) for i in range(1, n_nodes + 1)]
        except KeyError as error:
            raise ValueError(f"sample: label {error} is missing") from None
        if not recurrent:
            scopes = sorted({str(key).removesuffix("/cell/node_1/op") for key in sample if str(key).endswith("/cell/node_1/op")})
            raise ValueError(f"sample: no label {prefix}<i>/op; " + (f"give one of its scopes: {', '.join(scopes)}" if scopes else "is this a sample of DartsRnnSpace?"))
        return cls(tuple(recurrent))


def _integer(value) -> int:
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def derive(probabilities, primitives=PRIMITIVES) -> Genotype:
    """The genotype of probabilities (E, K), by the paper's rule (section 2.4; quark0/darts `rnn/model_search.py: genotype`).

    Each node keeps the edge whose strongest primitive other than `none` is strongest, and that primitive.
    Ties go to the smaller predecessor, then to the earlier primitive. Softmax is monotone only within a row: give
    probabilities, not α, when rows of α have different offsets. Raises `ValueError` for NaN or a wrong shape.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 2 or p.shape[1] != len(primitives):
        raise ValueError(f"probabilities have shape {p.shape}; expected (E, {len(primitives)}) for {', '.join(primitives)}")
    if not np.isfinite(p).all():
        raise ValueError("probabilities hold NaN or infinite values; the search has diverged")
    ops = [k for k, name in enumerate(primitives) if name != "none"]
    strength = p[:, ops]  # (E, K or K-1)
    recurrent, row = [], 0
    for node in range(1, number_of_nodes(len(p)) + 1):
        block = strength[row:row + node]  # (predecessors, ops)
        j = int(block.max(axis=1).argmax())
        recurrent.append((primitives[ops[int(block[j].argmax())]], j))
        row += node
    return Genotype(tuple(recurrent))


DARTS_V1 = Genotype((("relu", 0), ("relu", 1), ("tanh", 2), ("relu", 3), ("relu", 4), ("identity", 1), ("relu", 5), ("relu", 1)))
"""First-order DARTS, Penn Treebank (quark0/darts `rnn/genotypes.py`); published test perplexity 57.6."""

DARTS_V2 = Genotype((("sigmoid", 0), ("relu", 1), ("relu", 1), ("identity", 1), ("tanh", 2), ("sigmoid", 5), ("tanh", 3), ("relu", 5)))
"""Second-order DARTS, Penn Treebank (quark0/darts `rnn/genotypes.py`); published test perplexity 55.7."""

ENAS = Genotype((("tanh", 0), ("tanh", 1), ("relu", 1), ("tanh", 3), ("tanh", 3), ("relu", 3), ("relu", 4), ("relu", 7), ("relu", 8),
                 ("relu", 8), ("relu", 8)), (2, 5, 6, 9, 10, 11))
"""ENAS, Penn Treebank (Pham et al. 2018, listed in quark0/darts `rnn/genotypes.py`); published test perplexity 58.6 as trained by the DARTS authors, 55.8 in its own paper."""

DRAWN_V1 = Genotype((("relu", 0), ("relu", 0), ("tanh", 0), ("relu", 0), ("relu", 0), ("identity", 0), ("tanh", 0), ("identity", 0)))
"""The best of eight cells that this package's search with drawn cells and ξ = 2 found at a small size of the Penn Treebank (2,000 words, 64 units).
docs/results.md says how, and what it and other cells reached at that size. It has not been trained at the paper's size."""

NAMED = {"DARTS_V1": DARTS_V1, "DARTS_V2": DARTS_V2, "ENAS": ENAS, "DRAWN_V1": DRAWN_V1}


def _printed(text: str) -> Genotype:
    """The genotype from the text that published code prints. The text is parsed and never run."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        parts = {part.arg: part.value for part in call.keywords} if isinstance(call, ast.Call) and not call.args else {}
        if parts.keys() != {"recurrent", "concat"}:
            raise ValueError
        named = parts["concat"]
        if isinstance(named, ast.Call) and isinstance(named.func, ast.Name) and named.func.id == "range":
            nodes = range(*map(ast.literal_eval, named.args))
        else:
            nodes = ast.literal_eval(named)
        recurrent = tuple(ast.literal_eval(parts["recurrent"]))
        concat = tuple(nodes[:len(recurrent) + 1])  # one node too many is enough for it to be refused
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"genotype {text!r} is not as published code prints one: Genotype(recurrent=[(op, predecessor), …], concat=range(1, 9))") from None
    return Genotype(recurrent, concat)


def load_genotype(source: Genotype | str | Path) -> Genotype:
    """A genotype from any of its forms: a `Genotype`, a name in `NAMED`, a JSON text, a dict or a file of it, a sample of NNI's, the named tuple of published
    code, or that as printed, `Genotype(recurrent=[('tanh', 0), …], concat=range(1, 9))`. `ValueError` for anything else; it suggests the nearest name."""
    if isinstance(source, Genotype):
        return source
    if isinstance(source, tuple) and {"recurrent", "concat"} <= set(getattr(source, "_fields", ())):
        try:
            return Genotype(tuple(source.recurrent), tuple(source.concat))
        except TypeError:
            raise ValueError(f"genotype {source!r}: recurrent and concat have to be lists, as published code has them") from None
    if isinstance(source, dict):  # from JSON, or NNI's export
        return Genotype.from_dict(source) if "recurrent" in source else Genotype.from_sample(source)
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"genotype: {source!r} is none of a Genotype, a name ({', '.join(NAMED)}), a JSON text, a path of one, a dict, or the named tuple of published code")
    text = str(source)
    if text in NAMED:
        return NAMED[text]
    if text.lstrip().startswith("{"):
        return Genotype.from_json(text)
    if text.lstrip().startswith("Genotype("):
        return _printed(text)
    path = Path(text)
    if os.path.isdir(text):  # False for text that cannot be a path, where Path.is_dir raises
        path = path / "genotype.json"
        if not path.is_file():
            raise ValueError(f"genotype {text!r}: that folder has no genotype.json")
    if not os.path.isfile(path):
        raise ValueError(f"genotype {text!r} is neither a file nor one of {', '.join(NAMED)}" + did_you_mean(text, NAMED))
    try:
        return Genotype.from_json(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
