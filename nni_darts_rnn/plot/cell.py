"""Draws a cell as a graph."""

from __future__ import annotations

from pathlib import Path

from ..genotype import Genotype
from .canvas import GREY, INK, LANE, mix, new_figure, op_colours, save, style, targets
from .geometry import FONT, Box, Layout, layout


def _useful(genotype: Genotype) -> set[int]:
    """The states that the output depends on."""
    useful = set(genotype.concat) | {0}
    for i in range(genotype.n_nodes, 0, -1):
        if i in useful:
            useful.add(genotype.recurrent[i - 1][1])
    return useful


def draw_cell(axes, genotype: Genotype, place: Layout, changed=()) -> None:
    """Draw the cell on axes that are measured in inches. The nodes in `changed` get a ring."""
    from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon
    from matplotlib.path import Path as Curve

    def box(b: Box, fill, line, rounding, width=1.1, dashed=False, grow=0.0):
        w, h = b.w + grow, b.h + grow
        axes.add_patch(FancyBboxPatch((b.x - w / 2, b.y - h / 2), w, h, boxstyle=f"round,pad=0,rounding_size={min(rounding, w / 2, h / 2)}",
                                      facecolor=fill, edgecolor=line, linewidth=width, linestyle="--" if dashed else "-", zorder=3))

    def text(b: Box, words, size, colour=INK, math=False, **kw):
        drop = 0.0 if math or kw.get("rotation") else 0.011  # few descenders: centred by the font's box, such text looks too high
        axes.text(b.x, b.y - drop, words, fontsize=size, color=colour, ha="center", va="center", zorder=5, parse_math=math, **kw)

    colours, useful = op_colours(op for op, _ in genotype.recurrent), _useful(genotype)
    for e in place.edges:
        lane = e.target == "mean"
        colour = colours[e.op] if e.op else LANE if lane else GREY
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
        box(b, mix(colours[op], "#ffffff", 0.88), mix(colours[op], "#ffffff", 0.35), 1, width=0.8)
        text(b, op, FONT, mix(colours[op], "#000000", 0.3))
    for i in range(genotype.n_nodes + 1):
        b = place.boxes[str(i)]
        if i == 0:
            box(b, "#E9ECF0", INK, 0.09)
            text(b, "0", 11, fontweight="bold")
            continue
        colour = colours[genotype.recurrent[i - 1][0]]
        if i in changed:
            box(b, "none", "#E69F00", 0.13, width=2.2, grow=0.12)
        if i in useful:
            box(b, colour, mix(colour, "#000000", 0.25), 0.09)
            text(b, str(i), 11, "#ffffff", fontweight="bold")
        else:  # the output does not depend on this node
            box(b, "#ffffff", colour, 0.09, dashed=True)
            text(b, str(i), 11, colour, fontweight="bold")
    for name, words in (("x", "$x_t$"), ("h", "$h_{t-1}$"), ("out", "$h_t$")):
        box(place.boxes[name], "#ffffff", GREY, 1)
        text(place.boxes[name], words, 11, math=True)
    box(place.boxes["mean"], "#E9ECF0", GREY, 0.09)
    text(place.boxes["mean"], "mean", FONT, rotation=90)


def inches_axes(figure, width: float, height: float, title_room: float = 0.0):
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(0, height + title_room))
    return axes


def plot_cell(genotype: Genotype, path, title: str | None = None) -> Path:
    """Draw a cell to `path` (.svg or .png, or a list of such). Returns the first path.

    x and h make state 0, each node reads one state through its op, and the output is the mean of the nodes in `concat`. Nodes that the output does not depend
    on are dashed.
    """
    paths = targets(path)
    place, room = layout(genotype), 0.36 if title else 0.0
    with style():
        figure = new_figure(place.width, place.height + room)
        axes = inches_axes(figure, place.width, place.height, room)
        if title:
            axes.text(0.14, place.height + 0.14, title, fontsize=12, fontweight="bold", va="center", parse_math=False)
        draw_cell(axes, genotype, place)
        return save(figure, paths, few_colours=True)
