"""A recurrent cell as a graph of edges between states: the one description that all fast forms read."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

from .genotype import Genotype

OPS = ("tanh", "relu", "sigmoid", "identity")  # the enum Op of csrc/edges.h; the mixture of all four comes next
MIX = len(OPS)


class Graph(NamedTuple):
    """The edges of a cell. `arrays` has `incoming`, `source` and `op` as in csrc/cell.h. For gpu/ it also has an order in which the nodes that read the same
    state are neighbours."""

    n_nodes: int
    normalise: bool
    average: tuple[float, ...]  # (N+1)
    n_edges: int
    arrays: dict[str, ctypes.Array]  # order, first, count (N), incoming (N+1), source, slot, op (E)

    @property
    def mixed(self) -> bool:
        """Whether its edges are mixtures."""
        return self.arrays["op"][0] == MIX

    @classmethod
    def of(cls, edges: list[tuple[int, int, int]], order: list[int], concat: tuple[int, ...], n_nodes: int, normalise: bool) -> Graph:
        """The graph of `edges` (node, state it reads, op), node by node. In `order`, the nodes that read the same state are neighbours."""
        columns = [sorted(order.index(node) for node, j, _ in edges if j == state) for state in range(n_nodes)]
        first = [c[0] if c else 0 for c in columns]
        integers = {
            "order": [node - 1 for node in order],
            "first": first,
            "count": [len(c) for c in columns],
            "incoming": [sum(node <= i for node, _, _ in edges) for i in range(n_nodes + 1)],
            "source": [j for _, j, _ in edges],
            "slot": [order.index(node) - first[j] for node, j, _ in edges],
            "op": [op for _, _, op in edges],
        }
        average = tuple(1 / len(concat) if i in concat else 0.0 for i in range(n_nodes + 1))
        arrays = {name: (ctypes.c_int64 * len(values))(*values) for name, values in integers.items()}
        return cls(n_nodes, normalise, average, len(edges), arrays)


@functools.lru_cache(maxsize=64)
def mixed_graph(n_nodes: int, normalise: bool = True) -> Graph:
    """The mixed cell's graph: every node reads every earlier state, each through all nonlinearities."""
    nodes = range(1, n_nodes + 1)
    return Graph.of([(i, j, MIX) for i in nodes for j in range(i)], list(nodes), tuple(nodes), n_nodes, normalise)


@functools.lru_cache(maxsize=64)
def discrete_graph(genotype: Genotype) -> Graph:
    """A discrete cell's graph: one edge a node."""
    edges = [(node, j, OPS.index(op)) for node, (op, j) in enumerate(genotype.recurrent, start=1)]
    order = sorted(range(1, genotype.n_nodes + 1), key=lambda node: (genotype.recurrent[node - 1][1], node))
    return Graph.of(edges, order, genotype.concat, genotype.n_nodes, False)
