"""Pictures of a search: the cell as a graph, α over the epochs, the most likely cell as an animation, learning curves.

Needs matplotlib, imported only when a picture is made. Nothing here touches pyplot or leaves rcParams changed. Every file is
written whole or not at all, and the same input gives the same bytes (with the same matplotlib and fonts).
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .genotype import PRIMITIVES, Genotype, derive, number_of_nodes

OP_COLOURS = {"tanh": "#0072B2", "relu": "#D55E00", "sigmoid": "#009E73", "identity": "#A8528C", "none": "#8A8A8A"}
"""Colour of each primitive: Okabe and Ito's palette, told apart by colour-blind readers too (its purple darkened for contrast)."""

_OTHER_COLOURS = ("#B87900", "#2B8CC4", "#5B4FA2", "#7A5C3E")  # for registered primitives, in order of name
_INK, _GREY, _LANE = "#2B2F36", "#7B828C", "#A3ABB6"
_RC = {"svg.fonttype": "none", "svg.hashsalt": "nni_darts_rnn", "font.family": "sans-serif", "mathtext.fontset": "dejavusans",
       "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica"],
       "axes.edgecolor": _GREY, "axes.labelcolor": _INK, "text.color": _INK, "xtick.color": _INK, "ytick.color": _INK}


# ---------------------------------------------------------------------------------------------------------------- layout

_NODE_W, _NODE_H, _PILL_H, _FONT = 0.38, 0.34, 0.23, 9.5  # inches; points
_SPACING = {0: 0.56, 1: 0.36, 2: 0.19}  # inches between two rows, a row and a lane, two lanes


class Box(NamedTuple):
    """A rectangle: its centre and its full width and height, in inches; y grows upwards."""

    x: float
    y: float
    w: float
    h: float


class Edge(NamedTuple):
    """A line from (x0, y0) to (x2, y1): a smooth bend up to x1, then straight on. `op` is None where nothing is applied.

    With x0 = x1 the line starts vertically, from a node's upper or lower side, and turns a rounded corner.
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
        """Start, end of a straight line, and two control points and end of a cubic Bézier curve; a straight line to (x2, y1) follows."""
        if self.x0 != self.x1:
            xm = (self.x0 + self.x1) / 2
            return [(self.x0, self.y0), (self.x0, self.y0), (xm, self.y0), (xm, self.y1), (self.x1, self.y1)]
        r = min(0.13, abs(self.y1 - self.y0))
        turn = self.y1 - math.copysign(r, self.y1 - self.y0)
        return [(self.x0, self.y0), (self.x0, turn), (self.x0, (turn + self.y1 * 2) / 3), (self.x0 + r / 3, self.y1), (self.x0 + r, self.y1)]

    def points(self, n: int = 40) -> list[tuple[float, float]]:
        """Points along the line, for whoever wants to know what it touches."""
        start, *bezier = (np.array(point) for point in self.bend())
        t = np.linspace(0, 1, n)[:, None]
        curve = sum(c * (1 - t) ** (3 - k) * t ** k * q for k, (c, q) in enumerate(zip((1, 3, 3, 1), bezier)))
        line = [start + (bezier[0] - start) * t, curve, bezier[-1] + (np.array([self.x2, self.y1]) - bezier[-1]) * t]
        return [(float(x), float(y)) for x, y in np.concatenate(line)]


@dataclass(frozen=True)
class Layout:
    """Where everything of a cell is drawn. `boxes` has the keys x, h, 0, 1, …, N, mean and out; `labels` has one box per node's op."""

    boxes: dict[str, Box]
    labels: dict[str, Box]
    edges: tuple[Edge, ...]
    width: float
    height: float


def layout(genotype: Genotype) -> Layout:
    """Positions of a cell's nodes, labels and lines; pure arithmetic, no drawing.

    Each node reads one state, so the cell is a tree, drawn from left to right by depth. A node that goes into the mean gets
    a lane of its own to the right, as if it had one leaf more. The drawing is therefore planar: no two lines cross.
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

    # From the leaves up: the rows (a leaf) and lanes (an inner node's way to the mean) of each subtree, top to bottom, and
    # which of them the subtree's root lines up with. The deepest child stays level with its parent; the others go to the
    # side that is lower so far.
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
            # The lane last, hence outermost: it leaves the node vertically, past the lines to all children.
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

    # Columns: node, room for the bends, room for the longest label, next node.
    x_node, bend_end = [0.0], []
    for d in range(1, max(depth.values()) + 1):
        here = [i for i in depth if depth[i] == d]
        spans = [abs(y_node[i] - y_node[parent[i]]) for i in here]
        bend_end.append(x_node[-1] + _NODE_W / 2 + (0.08 if max(spans) < 1e-9 else 0.24 + 0.13 * min(max(spans), 3.0)))
        pill = max(_text_width(genotype.recurrent[i - 1][0]) for i in here)
        x_node.append(bend_end[-1] + pill + 0.3 + _NODE_W / 2)
    bend_end.append(x_node[-1] + _NODE_W / 2 + 0.12)

    boxes = {str(i): Box(x_node[depth[i]], y_node[i], _NODE_W, _NODE_H) for i in range(n + 1)}
    boxes["x"] = Box(-1.0, y_node[0] + 0.32, 0.52, _NODE_H)
    boxes["h"] = Box(-1.0, y_node[0] - 0.32, 0.52, _NODE_H)
    top, bottom = max(y_lane.values()) + 0.2, min(y_lane.values()) - 0.2
    middle, tall = (top + bottom) / 2, max(top - bottom, 0.64)
    boxes["mean"] = Box(bend_end[-1] + 0.42, middle, 0.3, tall)
    # The output level with state 0 where the bar allows it.
    boxes["out"] = Box(boxes["mean"].x + 0.78, min(max(y_node[0], middle - tall / 2 + 0.2), middle + tall / 2 - 0.2), 0.46, _NODE_H)

    def right(b: Box) -> float:
        return b.x + b.w / 2

    edges, labels = [], {}
    start = boxes["0"].x - _NODE_W / 2
    for name, dy in (("x", 0.07), ("h", -0.07)):
        edges.append(Edge(name, "0", None, right(boxes[name]), boxes[name].y, start - 0.12, y_node[0] + dy, start))
    for i, j in parent.items():
        op, box, d = genotype.recurrent[i - 1][0], boxes[str(i)], depth[i]
        edges.append(Edge(str(j), str(i), op, right(boxes[str(j)]), y_node[j], bend_end[d - 1], box.y, box.x - box.w / 2))
        labels[str(i)] = Box((bend_end[d - 1] + box.x - box.w / 2 - 0.12) / 2, box.y, _text_width(op), _PILL_H)
    wall = boxes["mean"].x - boxes["mean"].w / 2
    for i, y in sorted(y_lane.items()):
        box = boxes[str(i)]
        if children[i]:
            edges.append(Edge(str(i), "mean", None, box.x, box.y + math.copysign(_NODE_H / 2, y - box.y), box.x, y, wall))
        else:
            edges.append(Edge(str(i), "mean", None, right(box), y, right(box) + 0.1, y, wall))
    out, mean_right = boxes["out"], right(boxes["mean"])
    edges.append(Edge("mean", "out", None, mean_right, out.y, mean_right + 0.05, out.y, out.x - out.w / 2))

    # Move everything into the first quadrant, with a margin.
    margin, every = 0.14, [*boxes.values(), *labels.values()]
    dx, dy = margin - min(b.x - b.w / 2 for b in every), margin - min(b.y - b.h / 2 for b in every)
    width = max(b.x + b.w / 2 for b in every) + dx + margin
    height = max(b.y + b.h / 2 for b in every) + dy + margin
    return Layout({k: b._replace(x=b.x + dx, y=b.y + dy) for k, b in boxes.items()},
                  {k: b._replace(x=b.x + dx, y=b.y + dy) for k, b in labels.items()},
                  tuple(e._replace(x0=e.x0 + dx, y0=e.y0 + dy, x1=e.x1 + dx, y1=e.y1 + dy, x2=e.x2 + dx) for e in edges), width, height)


def _level_leaf(node: int, spine: dict, children: dict) -> int:
    """The leaf whose row is (about) level with `node`."""
    while children[node]:
        node = spine[node] if spine[node] != node else children[node][len(children[node]) // 2]
    return node


def _extent(items: list) -> float:
    return sum(_SPACING[1] if lane else _SPACING[0] for _, lane in items)


def _text_width(text: str) -> float:
    """Width in inches of a label's pill. An estimate, so that the picture does not depend on which fonts are installed."""
    em = sum(0.4 if c in "iljtfr|.,:;'!()[] " else 0.95 if c in "mwMW@%" else 0.64 for c in text)
    return em * _FONT / 72 + 0.16


# --------------------------------------------------------------------------------------------------------------- writing

def _target(path, allowed: tuple[str, ...] = (".svg", ".png")) -> Path:
    path = Path(path)
    if path.suffix.lower() not in allowed:
        raise ValueError(f"{path}: a picture is written as {' or '.join(allowed)}, not {path.suffix or 'without a suffix'}")
    return path


@contextlib.contextmanager
def _whole(path: Path):
    """A temporary name beside `path` that becomes `path` if the block succeeds and vanishes if not."""
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(6)}{path.suffix.lower()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _style():
    """Matplotlib's defaults and ours for the time of one picture, whatever the caller's rcParams say."""
    import matplotlib.style

    with matplotlib.style.context(["default", _RC]):
        yield


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path: Path, few_colours: bool = False) -> Path:
    # No date and no program version, which would make two equal pictures differ.
    with _whole(path) as temporary:
        if path.suffix.lower() == ".svg":
            figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})
            return path
        figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})
        if few_colours:  # a palette instead of 24 bits: a third of the size, and no difference to see in line art
            from PIL import Image

            image = Image.open(io.BytesIO(temporary.read_bytes())).convert("RGB")
            image.quantize(256, dither=Image.Dither.NONE).save(temporary, format="png", optimize=True, dpi=(160, 160))
    return path


# ------------------------------------------------------------------------------------------------------------------ cell

def _mix(colour: str, other: str, part: float) -> str:
    """`colour` with `part` of `other` in it."""
    pairs = [(int(colour[k:k + 2], 16), int(other[k:k + 2], 16)) for k in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in pairs)


def _colours(ops) -> dict[str, str]:
    others = sorted({op for op in ops if op not in OP_COLOURS})
    return {**OP_COLOURS, **{op: _OTHER_COLOURS[k % len(_OTHER_COLOURS)] for k, op in enumerate(others)}}


def _useful(genotype: Genotype) -> set[int]:
    """The states that the output depends on."""
    useful = set(genotype.concat) | {0}
    for i in range(genotype.n_nodes, 0, -1):
        if i in useful:
            useful.add(genotype.recurrent[i - 1][1])
    return useful


def _draw_cell(axes, genotype: Genotype, place: Layout, changed=()) -> None:
    """The cell on axes measured in inches. Nodes in `changed` get a ring."""
    from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
    from matplotlib.path import Path as Curve

    def box(b: Box, fill, line, rounding, width=1.1, dashed=False, order=3, grow=0.0):
        w, h = b.w + grow, b.h + grow
        axes.add_patch(FancyBboxPatch((b.x - w / 2, b.y - h / 2), w, h, boxstyle=f"round,pad=0,rounding_size={min(rounding, w / 2, h / 2)}",
                                      facecolor=fill, edgecolor=line, linewidth=width, linestyle="--" if dashed else "-", zorder=order))

    def text(b: Box, words, size, colour=_INK, math=False, **kw):
        drop = 0.0 if math or kw.get("rotation") else 0.011  # these words have few descenders; centred by the font's box they look high
        axes.text(b.x, b.y - drop, words, fontsize=size, color=colour, ha="center", va="center", zorder=5, parse_math=math, **kw)

    colours, useful = _colours(op for op, _ in genotype.recurrent), _useful(genotype)
    for e in place.edges:
        lane = e.target == "mean"
        colour = colours[e.op] if e.op else _LANE if lane else _GREY
        dashed = e.op is not None and int(e.target) not in useful
        tip = 0.09 if lane else 0.11
        axes.add_patch(PathPatch(Curve(e.bend() + [(e.x2 - tip * 0.8, e.y1)],
                                       [Curve.MOVETO, Curve.LINETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4, Curve.LINETO]),
                                 facecolor="none", edgecolor=colour, linewidth=1.1 if lane else 1.6, linestyle="--" if dashed else "-",
                                 capstyle="butt", zorder=1 if lane else 2))
        half = tip * 0.38
        axes.add_patch(Polygon([(e.x2 - tip, e.y1 + half), (e.x2, e.y1), (e.x2 - tip, e.y1 - half)], facecolor=colour, linewidth=0, zorder=2))
    for name, b in place.labels.items():
        op = genotype.recurrent[int(name) - 1][0]
        box(b, _mix(colours[op], "#ffffff", 0.88), _mix(colours[op], "#ffffff", 0.35), 1, width=0.8)
        text(b, op, _FONT, _mix(colours[op], "#000000", 0.3))
    for i in range(genotype.n_nodes + 1):
        b = place.boxes[str(i)]
        if i == 0:
            box(b, "#E9ECF0", _INK, 0.09)
            text(b, "0", 11, fontweight="bold")
            continue
        colour = colours[genotype.recurrent[i - 1][0]]
        if i in changed:
            box(b, "none", "#E69F00", 0.13, width=2.2, grow=0.12)
        if i in useful:
            box(b, colour, _mix(colour, "#000000", 0.25), 0.09)
            text(b, str(i), 11, "#ffffff", fontweight="bold")
        else:  # nothing that reaches the output reads this node
            box(b, "#ffffff", colour, 0.09, dashed=True)
            text(b, str(i), 11, colour, fontweight="bold")
    for name, words in (("x", "$x_t$"), ("h", "$h_{t-1}$"), ("out", "$h_t$")):
        box(place.boxes[name], "#ffffff", _GREY, 1)
        text(place.boxes[name], words, 11, math=True)
    box(place.boxes["mean"], "#E9ECF0", _GREY, 0.09)
    text(place.boxes["mean"], "mean", _FONT, rotation=90)


def _inches(figure, width: float, height: float, title_room: float = 0.0):
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(0, height + title_room))
    return axes


def plot_cell(genotype: Genotype, path, title: str | None = None) -> Path:
    """Draw a cell to `path` (.svg or .png): x and h make state 0, each node reads one state through its op, their mean is the output.

    Nodes that the output does not depend on are dashed.
    """
    path = _target(path)
    place, room = layout(genotype), 0.36 if title else 0.0
    with _style():
        figure = _figure(place.width, place.height + room)
        axes = _inches(figure, place.width, place.height, room)
        if title:
            axes.text(0.14, place.height + 0.14, title, fontsize=12, fontweight="bold", va="center", parse_math=False)
        _draw_cell(axes, genotype, place)
        return _save(figure, path, few_colours=True)


# --------------------------------------------------------------------------------------------------------------- history

def _probabilities(history, primitives) -> np.ndarray:
    """`history` as probabilities (epochs, E, K): as it is if its rows are distributions already, otherwise their softmax."""
    try:
        a = np.asarray(history, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError("history: expected an array of numbers (epochs, E, K), each epoch of the same shape") from None
    if a.ndim != 3 or not a.size or a.shape[2] != len(primitives):
        raise ValueError(f"history has shape {a.shape}; expected (epochs, E, {len(primitives)}) for {', '.join(primitives)}")
    number_of_nodes(a.shape[1])
    if not np.isfinite(a).all():
        raise ValueError("history holds NaN or infinite values; the search has diverged")
    if (a >= 0).all() and np.allclose(a.sum(-1), 1, atol=1e-3):
        return a
    a = np.exp(a - a.max(-1, keepdims=True))
    return a / a.sum(-1, keepdims=True)


def plot_alpha(history, path, primitives=PRIMITIVES) -> Path:
    """Heat map of the architecture's probabilities over the epochs, to `path` (.svg or .png).

    `history` is (epochs, E, K), α or probabilities (α is shown through softmax). One column of maps per primitive, one block of
    rows per node, one row per state it may read. A frame marks the op and the state that each node would take after the last epoch.
    """
    path = _target(path)
    p = _probabilities(history, primitives)
    epochs, n_edges, n_ops = p.shape
    n_nodes = number_of_nodes(n_edges)
    final = derive(p[-1], primitives)
    first, k = {}, 0  # each node's first row in the picture, with one row's gap between nodes
    for node in range(1, n_nodes + 1):
        first[node], k = k, k + node + 1
    n_rows = k - 1
    rows = np.full((epochs, n_rows, n_ops), np.nan)
    for node in range(1, n_nodes + 1):
        e = node * (node - 1) // 2
        rows[:, first[node]:first[node] + node] = p[:, e:e + node]

    row_h = min(0.155, 14 / n_rows)  # inches; a very large cell gets thinner rows, not a poster
    cell_w, gap, left, right, top, bottom = 1.45, 0.12, 0.95, 0.95, 0.95, 0.55
    width, high = left + n_ops * (cell_w + gap) - gap + right, max(n_rows * row_h, 0.9)
    height = top + high + bottom
    low, up = float(p.min()), float(p.max())
    if up - low < 0.02:  # next to nothing has moved yet; full contrast would pretend otherwise
        low, up = (low + up) / 2 - 0.01, (low + up) / 2 + 0.01
    colours = _colours(primitives)
    with _style():
        from matplotlib.patches import Rectangle
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        figure = _figure(width, height)
        for op in range(n_ops):
            axes = figure.add_axes(((left + op * (cell_w + gap)) / width, bottom / height, cell_w / width, high / height))
            image = axes.imshow(rows[:, :, op].T, aspect="auto", interpolation="none", cmap="Blues", vmin=low, vmax=up,
                                extent=(0.5, epochs + 0.5, n_rows - 0.5, -0.5))
            axes.set_title(primitives[op], fontsize=10, fontweight="bold", color=_mix(colours[primitives[op]], "#000000", 0.2), pad=5,
                           parse_math=False)
            for side in axes.spines.values():
                side.set_visible(False)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1, steps=(1, 2, 5, 10)))
            axes.tick_params(labelsize=8, length=2.5, color=_GREY)
            if op == n_ops // 2:
                axes.set_xlabel("epoch", fontsize=9)
            axes.set_yticks([])
            for node, (chosen, j) in enumerate(final.recurrent, start=1):
                axes.add_patch(Rectangle((0.5, first[node] - 0.5), epochs, node, fill=False, edgecolor="#C9CED6", linewidth=0.6, clip_on=False))
                if chosen == primitives[op]:
                    axes.add_patch(Rectangle((0.5, first[node] + j - 0.5), epochs, 1, fill=False, edgecolor="#D55E00", linewidth=1.5,
                                             clip_on=False, zorder=4))
            if op == 0:
                if row_h > 0.1:
                    axes.set_yticks([first[node] + j for node in first for j in range(node)], [str(j) for node in first for j in range(node)])
                    axes.tick_params(axis="y", labelsize=7, length=0, pad=3)
                for node in first:
                    axes.annotate(f"node {node}", (0, first[node] + (node - 1) / 2), xycoords=("axes fraction", "data"), xytext=(-20, 0),
                                  textcoords="offset points", ha="right", va="center", fontsize=9, fontweight="bold", annotation_clip=False)
                axes.annotate("reads", (0, 1), xycoords="axes fraction", xytext=(-3, 6), textcoords="offset points", ha="right", fontsize=7.5,
                              color=_GREY)
        bar_h = min(high, 2.4)
        bar = figure.add_axes(((width - right + 0.2) / width, (bottom + high - bar_h) / height, 0.14 / width, bar_h / height))
        figure.colorbar(image, cax=bar, format=FuncFormatter(lambda v, _: f"{v:.3g}"))
        bar.tick_params(labelsize=8, length=2.5, color=_GREY)
        bar.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=(1, 2, 5, 10)))
        bar.set_title("prob.", fontsize=8, pad=5)
        bar.spines["outline"].set_visible(False)
        figure.text(0.12 / width, 1 - 0.2 / height, "Probability of each op on each edge", fontsize=11, fontweight="bold", va="center")
        figure.text(0.12 / width, 1 - 0.42 / height, "framed: taken after the last epoch", fontsize=8.5, va="center", color="#B34F00")
        return _save(figure, path)


def animate_cell(history, path, primitives=PRIMITIVES, fps: float = 4, max_frames: int = 60) -> Path:
    """Write the most likely cell of each epoch as frames of `path` (.gif). `history` as for `plot_alpha`.

    Nodes that changed since the frame before have a ring. Of more than `max_frames` epochs, evenly spaced ones are shown.
    """
    path = _target(path, (".gif",))
    p = _probabilities(history, primitives)
    shown = sorted({round(k) for k in np.linspace(0, len(p) - 1, min(len(p), max(2, max_frames)))})
    cells = [derive(p[k], primitives) for k in shown]
    places = {cell: layout(cell) for cell in cells}
    width, height, room = max(a.width for a in places.values()), max(a.height for a in places.values()), 0.5
    width = max(width, 4.5)
    with _style(), _whole(path) as temporary:
        from matplotlib.animation import PillowWriter
        from matplotlib.patches import Rectangle

        figure = _figure(width, height + room)
        writer = PillowWriter(fps=fps)
        dpi = min(80, 900 / width)
        hold = max(1, round(2 * fps))  # the last cell stays for two seconds
        with writer.saving(figure, temporary, dpi):
            before = None
            for k, cell in zip(shown, cells):
                figure.clear()
                place = places[cell]
                axes = _inches(figure, width, height, room)
                changed = {i for i in range(1, cell.n_nodes + 1) if before and cell.recurrent[i - 1] != before.recurrent[i - 1]}
                axes.text(0.14, height + 0.3, f"epoch {k + 1} of {len(p)}", fontsize=12, fontweight="bold", va="center")
                axes.add_patch(Rectangle((0.14, height + 0.06), width - 0.28, 0.05, facecolor="#E9ECF0", linewidth=0))
                axes.add_patch(Rectangle((0.14, height + 0.06), (width - 0.28) * (k + 1) / len(p), 0.05, facecolor="#0072B2", linewidth=0))
                _draw_cell(axes, cell, _centred(place, width, height), changed)
                writer.grab_frame()
                before = cell
            for _ in range(hold):
                writer.grab_frame()
    return path


def _centred(place: Layout, width: float, height: float) -> Layout:
    dx, dy = (width - place.width) / 2, (height - place.height) / 2
    return Layout({k: b._replace(x=b.x + dx, y=b.y + dy) for k, b in place.boxes.items()},
                  {k: b._replace(x=b.x + dx, y=b.y + dy) for k, b in place.labels.items()},
                  tuple(e._replace(x0=e.x0 + dx, y0=e.y0 + dy, x1=e.x1 + dx, y1=e.y1 + dy, x2=e.x2 + dx) for e in place.edges), width, height)


# ---------------------------------------------------------------------------------------------------------------- curves

def plot_curves(rows, path) -> Path:
    """Learning curves, one panel per phase, to `path` (.svg or .png), with perplexity on a logarithmic scale.

    `rows` is a list of dicts or the name of a CSV file, with phase, epoch and one or more columns named `perplexity` or
    `…_perplexity`, each drawn as a line. Empty and non-finite values are left out; of two rows for one epoch the later counts.
    The lowest point of each line is marked.
    """
    path = _target(path)
    phases = _curves(rows)
    names = list(dict.fromkeys(name for lines in phases.values() for name in lines))
    palette = ("#0072B2", "#D55E00", "#009E73", "#A8528C", "#B87900", "#2B8CC4")
    values = [v for lines in phases.values() for line in lines.values() for v in line.values()]
    low, high = min(values), max(values)
    pad = max((high / low) ** 0.08, 1.01)
    with _style():
        from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

        panel, left, gap, right, top, bottom = 4.2, 0.75, 0.3, 0.25, 0.5, 0.55
        width, height = left + len(phases) * (panel + gap) - gap + right, 3.6
        figure = _figure(width, height)
        for k, (phase, lines) in enumerate(phases.items()):
            axes = figure.add_axes(((left + k * (panel + gap)) / width, bottom / height, panel / width, (height - top - bottom) / height))
            for name, line in lines.items():
                x, y, colour = list(line), list(line.values()), palette[names.index(name) % len(palette)]
                best = int(np.argmin(y))
                words = f"{name.replace('_', ' ')} (lowest {y[best]:.4g}, epoch {x[best]:g})"
                axes.plot(x, y, color=colour, linewidth=1.8, label=words, marker="o" if len(x) < 25 else None, markersize=3)
                axes.plot(x[best], y[best], "o", color=colour, markersize=6, markeredgecolor="white", markeredgewidth=1, zorder=4)
            axes.set_yscale("log")
            axes.set_ylim(low / pad, high * pad)
            axes.yaxis.set_major_locator(FixedLocator(_log_ticks(low, high)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1, steps=(1, 2, 5, 10)))
            axes.margins(x=0.05)
            axes.grid(axis="y", color="#E3E6EA", linewidth=0.8)
            axes.set_axisbelow(True)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            axes.tick_params(labelsize=9, length=3, color=_GREY, labelleft=k == 0)
            axes.set_xlabel("epoch", fontsize=10)
            axes.set_title(phase, fontsize=11, fontweight="bold", loc="left", parse_math=False)
            if k == 0:
                axes.set_ylabel("perplexity", fontsize=10)
            legend = axes.legend(fontsize=9, loc="upper right", framealpha=0.85, edgecolor="none")
            legend.set_zorder(6)
        return _save(figure, path)


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between `low` and `high`, evenly spread on a logarithmic scale: 1-2-5 steps, finer where these are too few."""
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), tuple(k / 10 for k in range(10, 100)), tuple(k / 100 for k in range(100, 1000))):
        decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        ticks = [float(f"{s * 10.0 ** d:.6g}") for d in decades for s in steps]
        ticks = [t for t in ticks if low / 1.02 <= t <= high * 1.02]
        if len(ticks) >= 4:
            spread = []
            for tick in ticks:  # equal steps crowd on a logarithmic scale: none closer to the last than a tenth of the axis
                if not spread or math.log(tick / spread[-1]) >= math.log(high / low) / 10:
                    spread.append(tick)
            return spread
    return [float(f"{low:.4g}")]


def _curves(rows) -> dict[str, dict[str, dict[float, float]]]:
    """phase → column → epoch → perplexity."""
    where = "rows"
    if isinstance(rows, (str, Path)):
        where = str(rows)
        with open(rows, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    phases: dict[str, dict[str, dict[float, float]]] = {}
    for number, row in enumerate(rows, start=1):
        try:
            phase, epoch = str(row["phase"]), float(row["epoch"])
            points = {key: float(v) for key, v in row.items() if key and str(key).endswith("perplexity") and v not in (None, "")}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{where}: row {number} needs phase, epoch and perplexity: {type(error).__name__} {error}") from None
        for name, value in points.items():
            if value <= 0:
                raise ValueError(f"{where}: row {number}: a perplexity of {value:g} is not possible")
            if math.isfinite(value) and math.isfinite(epoch):
                phases.setdefault(phase, {}).setdefault(name, {})[epoch] = value
    if not phases:
        raise ValueError(f"{where}: no row has a perplexity to draw")
    return {phase: {name: dict(sorted(line.items())) for name, line in lines.items()} for phase, lines in phases.items()}
