"""Computes where each part of a cell is drawn. It draws nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from ..genotype import Genotype

NODE_W, NODE_H, PILL_H, FONT = 0.38, 0.34, 0.23, 9.5  # inches; FONT in points
_SPACING = {0: 0.56, 1: 0.36, 2: 0.19}  # inches between two rows (0), a row and a lane (1), two lanes (2)


class Box(NamedTuple):
    """A rectangle in inches: its centre, its full width and its full height. y grows upwards."""

    x: float
    y: float
    w: float
    h: float


class Edge(NamedTuple):
    """A line from (x0, y0) to (x2, y1): a smooth bend as far as x1, then a straight line. `op` is None where no op is applied.

    If x0 = x1, the line starts vertically at a node's upper or lower side and turns a rounded corner.
    """

    source: str
    target: str
    op: str | None
    x0: float
    y0: float
    x1: float
    y1: float
    x2: float

    def bend(self) -> list[tuple[float, float]]:
        """Five points: the start, the end of a straight line, and a cubic Bézier curve's two control points and end. A straight line to (x2, y1) follows."""
        if self.x0 != self.x1:
            xm = (self.x0 + self.x1) / 2
            return [(self.x0, self.y0), (self.x0, self.y0), (xm, self.y0), (xm, self.y1), (self.x1, self.y1)]
        r = min(0.13, abs(self.y1 - self.y0))
        turn = self.y1 - math.copysign(r, self.y1 - self.y0)
        return [(self.x0, self.y0), (self.x0, turn), (self.x0, (turn + self.y1 * 2) / 3), (self.x0 + r / 3, self.y1), (self.x0 + r, self.y1)]

    def moved(self, dx: float, dy: float) -> Edge:
        return self._replace(x0=self.x0 + dx, y0=self.y0 + dy, x1=self.x1 + dx, y1=self.y1 + dy, x2=self.x2 + dx)


@dataclass(frozen=True)
class Layout:
    """Where each part of a cell is drawn. `boxes` has the keys x, h, 0, 1, …, N, mean and out. `labels` has one box for each node's op."""

    boxes: dict[str, Box]
    labels: dict[str, Box]
    edges: tuple[Edge, ...]
    width: float
    height: float

    def moved(self, dx: float, dy: float, width: float, height: float) -> Layout:
        """The same layout moved by (`dx`, `dy`), on a sheet of `width` × `height` inches."""
        boxes, labels = ({name: b._replace(x=b.x + dx, y=b.y + dy) for name, b in every.items()} for every in (self.boxes, self.labels))
        return Layout(boxes, labels, tuple(e.moved(dx, dy) for e in self.edges), width, height)


def layout(genotype: Genotype) -> Layout:
    """The positions of a cell's nodes, labels and lines.

    Each node reads one state, so the cell is a tree. It is drawn from left to right by depth. A node that goes into the mean gets a lane of its own to the
    right, as if it had one more leaf. The drawing is therefore planar: no two lines cross.
    """
    n = genotype.n_nodes
    parent = {i: j for i, (_, j) in enumerate(genotype.recurrent, start=1)}
    children: dict[int, list[int]] = {i: [i2 for i2 in parent if parent[i2] == i] for i in range(n + 1)}
    depth, reach, size = {0: 0}, dict.fromkeys(range(n + 1), 0), dict.fromkeys(range(n + 1), 1)
    for i in range(1, n + 1):
        depth[i] = depth[parent[i]] + 1
    for i in range(n, 0, -1):  # children have larger numbers than their parent
        reach[parent[i]] = max(reach[parent[i]], reach[i] + 1)
        size[parent[i]] += size[i]

    # From the leaves up: the rows and lanes of each subtree from top to bottom (a row is a leaf, a lane an inner node's way to the mean), and which of them its
    # root is level with. The deepest child stays level with its parent. The others go above or below it, to the side whose extent is smaller so far.
    order: dict[int, list[tuple[int, bool]]] = {}
    spine: dict[int, int] = {}
    for i in range(n, -1, -1):
        lane = [(i, True)] if i in genotype.concat and children[i] else []
        if not children[i]:
            order[i], spine[i] = [(i, False)], i
        elif reach[i] == 1:  # leaves only: in the order of their numbers
            kids = [(c, False) for c in children[i]]
            order[i], spine[i] = kids + lane, i
        else:
            heavy, *rest = sorted(children[i], key=lambda c: (-reach[c], -size[c], c))
            level = order[heavy].index((_level_leaf(heavy, spine, children), False))
            above, below = order[heavy][:level], order[heavy][level:]
            # The lane comes last and so is outermost: it leaves the node vertically, past the lines to all children.
            for block in [order[c] for c in rest] + [lane]:
                if _extent(above) < _extent(below[1:]):
                    above = block + above
                else:
                    below = below + block
            order[i], spine[i] = above + below, heavy

    y_of: dict[tuple[int, bool], float] = {}
    y, last = 0.0, None
    for item in order[0]:
        if last is not None:
            y -= _SPACING[item[1] + last[1]]
        y_of[item], last = y, item
    y_node: dict[int, float] = {}
    for i in range(n, -1, -1):
        if not children[i]:
            y_node[i] = y_of[i, False]
        elif spine[i] != i:
            y_node[i] = y_node[spine[i]]
        else:
            y_node[i] = (y_node[children[i][0]] + y_node[children[i][-1]]) / 2
    y_lane = {i: y_of.get((i, True), y_node[i]) for i in genotype.concat}

    # The columns are: a node, room for the bends, room for the longest label, the next node.
    x_node, bend_end = [0.0], []
    for d in range(1, max(depth.values()) + 1):
        here = [i for i in depth if depth[i] == d]
        spans = [abs(y_node[i] - y_node[parent[i]]) for i in here]
        bend_end.append(x_node[-1] + NODE_W / 2 + (0.08 if max(spans) < 1e-9 else 0.24 + 0.13 * min(max(spans), 3.0)))
        pill = max(_text_width(genotype.recurrent[i - 1][0]) for i in here)
        x_node.append(bend_end[-1] + pill + 0.3 + NODE_W / 2)
    bend_end.append(x_node[-1] + NODE_W / 2 + 0.12)

    boxes = {str(i): Box(x_node[depth[i]], y_node[i], NODE_W, NODE_H) for i in range(n + 1)}
    boxes["x"] = Box(-1.0, y_node[0] + 0.32, 0.52, NODE_H)
    boxes["h"] = Box(-1.0, y_node[0] - 0.32, 0.52, NODE_H)
    top, bottom = max(y_lane.values()) + 0.2, min(y_lane.values()) - 0.2
    middle, tall = (top + bottom) / 2, max(top - bottom, 0.64)
    boxes["mean"] = Box(bend_end[-1] + 0.42, middle, 0.3, tall)
    # The output is level with state 0, if the bar of the mean reaches that far.
    boxes["out"] = Box(boxes["mean"].x + 0.78, min(max(y_node[0], middle - tall / 2 + 0.2), middle + tall / 2 - 0.2), 0.46, NODE_H)

    def right(b: Box) -> float:
        return b.x + b.w / 2

    edges, labels = [], {}
    start = boxes["0"].x - NODE_W / 2
    for name, dy in (("x", 0.07), ("h", -0.07)):
        edges.append(Edge(name, "0", None, right(boxes[name]), boxes[name].y, start - 0.12, y_node[0] + dy, start))
    for i, j in parent.items():
        op, box, d = genotype.recurrent[i - 1][0], boxes[str(i)], depth[i]
        edges.append(Edge(str(j), str(i), op, right(boxes[str(j)]), y_node[j], bend_end[d - 1], box.y, box.x - box.w / 2))
        labels[str(i)] = Box((bend_end[d - 1] + box.x - box.w / 2 - 0.12) / 2, box.y, _text_width(op), PILL_H)
    wall = boxes["mean"].x - boxes["mean"].w / 2
    for i, y in sorted(y_lane.items()):
        box = boxes[str(i)]
        if children[i]:
            edges.append(Edge(str(i), "mean", None, box.x, box.y + math.copysign(NODE_H / 2, y - box.y), box.x, y, wall))
        else:
            edges.append(Edge(str(i), "mean", None, right(box), y, right(box) + 0.1, y, wall))
    out, mean_right = boxes["out"], right(boxes["mean"])
    edges.append(Edge("mean", "out", None, mean_right, out.y, mean_right + 0.05, out.y, out.x - out.w / 2))

    # Move everything into the first quadrant, with a margin.
    margin, every = 0.14, [*boxes.values(), *labels.values()]
    dx, dy = margin - min(b.x - b.w / 2 for b in every), margin - min(b.y - b.h / 2 for b in every)
    width = max(b.x + b.w / 2 for b in every) + dx + margin
    height = max(b.y + b.h / 2 for b in every) + dy + margin
    return Layout(boxes, labels, tuple(edges), 0, 0).moved(dx, dy, width, height)


def _level_leaf(node: int, spine: dict, children: dict) -> int:
    """The leaf whose row is level with `node`, or about so."""
    while children[node]:
        node = spine[node] if spine[node] != node else children[node][len(children[node]) // 2]
    return node


def _extent(items: list) -> float:
    return sum(_SPACING[1] if lane else _SPACING[0] for _, lane in items)


def _text_width(text: str) -> float:
    """The width of a label's pill in inches. It is an estimate, so that the picture does not depend on the installed fonts."""
    em = sum(0.4 if c in "iljtfr|.,:;'!()[] " else 0.95 if c in "mwMW@%" else 0.64 for c in text)
    return em * FONT / 72 + 0.16
