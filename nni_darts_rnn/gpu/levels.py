"""The order in which the GPU computes the nodes of a cell: level by level, the nodes of one level at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ..graph import Graph


class Level(NamedTuple):
    """Nodes whose longest way from node 0 is equally long, so that none reads another. Slots and runs are numbered from the cell's first."""

    first: int  # slots first … last − 1
    last: int
    run: int  # runs `run` … `run + runs − 1`, each of edges that read one slot
    runs: int


class Edge(NamedTuple):
    """An edge from slot `source` to slot `target`. Its pre-activations are the `place`-th of those of its source."""

    target: int
    source: int
    place: int
    op: int  # of `graph.OPS`
    met_first: bool  # whether the backward pass (from the last level to the first, within a level in this order) meets this reader of its source first


class Layout(NamedTuple):
    """Slot 0 is h, and slot k is the state of node nodes[k − 1]. Slots go level by level; within a level, the nodes that read the earliest slot come first."""

    nodes: list[int]  # N+1, node 0 first
    levels: list[Level]
    edges: list[Edge]  # E+1, target by target; node 0's, from h, first
    ends: list[int]  # N+2: slot k has the edges ends[k-1] … ends[k] − 1
    runs: list[int]  # bounds of the runs: runs[k] … runs[k+1] − 1


def layout(graph: Graph) -> Layout:
    """The layout of a cell whose nodes each read one state, or each read all earlier ones (then each node is a level): a level's edges from one slot are
    neighbours."""
    arrays, incoming = graph.arrays, {0: [(-1, 0, 0)]}  # `incoming`: of each node: the node read (−1: h), its edge's place and op
    for node in range(1, graph.n_nodes + 1):
        incoming[node] = [(arrays["source"][e], arrays["slot"][e], arrays["op"][e]) for e in range(arrays["incoming"][node - 1], arrays["incoming"][node])]
    depth = {-1: -1}
    for node, reads in incoming.items():
        depth[node] = 1 + max(depth[source] for source, _, _ in reads)
    slots, ends = {-1: 0}, [0]
    levels: list[Level] = []
    edges: list[Edge] = []
    runs: list[int] = []
    for level in range(max(depth.values()) + 1):
        first, run = len(slots), len(runs)
        members = [node for node in incoming if depth[node] == level]
        for node in sorted(members, key=lambda node: slots[incoming[node][0][0]]):
            slots[node] = len(slots)
            for source, place, op in incoming[node]:
                if len(runs) == run or edges[-1].source != slots[source]:
                    runs.append(len(edges))
                edges.append(Edge(slots[node], slots[source], place, op, False))
            ends.append(len(edges))
        levels.append(Level(first, len(slots), run, len(runs) - run))
    runs.append(len(edges))
    met: set[int] = set()
    for level in reversed(levels):
        for e in range(runs[level.run], runs[level.run + level.runs]):
            edges[e] = edges[e]._replace(met_first=edges[e].source not in met)
            met.add(edges[e].source)
    return Layout(list(slots)[1:], levels, edges, ends, runs)
