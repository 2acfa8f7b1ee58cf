"""The most likely cell of each epoch, as a moving picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..files import whole
from ..genotype import PRIMITIVES, derive
from .alpha import epoch_numbers, probabilities
from .canvas import new_figure, style, target
from .cell import draw_cell, inches_axes
from .geometry import Layout, layout


def animate_cell(history, path, primitives=PRIMITIVES, fps: float = 4, max_frames: int = 60, relaxation: str = "edge", epochs=None) -> Path:
    """Write the most likely cell of each epoch as frames of `path` (.gif). `history`, `relaxation` and `epochs` as for `plot_alpha`.

    Nodes that changed since the frame before have a ring. Of more than `max_frames` epochs, evenly spaced ones are shown.
    """
    path = target(path, (".gif",))
    p = probabilities(history, primitives, relaxation)
    numbers = epoch_numbers(epochs, len(p))
    shown = sorted({round(k) for k in np.linspace(0, len(p) - 1, min(len(p), max(2, max_frames)))})
    cells = [derive(p[k], primitives) for k in shown]
    places = {cell: layout(cell) for cell in cells}
    width, height, room = max(a.width for a in places.values()), max(a.height for a in places.values()), 0.5
    width = max(width, 4.5)
    with style(), whole(path) as temporary:
        from matplotlib.animation import PillowWriter
        from matplotlib.patches import Rectangle

        figure = new_figure(width, height + room)
        writer = PillowWriter(fps=fps)  # type: ignore[arg-type]  # parts of a frame are fine
        dpi = min(80, 900 / width)
        hold = max(1, round(2 * fps))  # the last cell stays for two seconds
        with writer.saving(figure, temporary, dpi):
            before = None
            for k, cell in zip(shown, cells):
                figure.clear()
                place = places[cell]
                axes = inches_axes(figure, width, height, room)
                changed = {i for i in range(1, cell.n_nodes + 1) if before and cell.recurrent[i - 1] != before.recurrent[i - 1]}
                axes.text(0.14, height + 0.3, f"epoch {numbers[k]} of {numbers[-1]}", fontsize=12, fontweight="bold", va="center")
                axes.add_patch(Rectangle((0.14, height + 0.06), width - 0.28, 0.05, facecolor="#E9ECF0", linewidth=0))
                axes.add_patch(Rectangle((0.14, height + 0.06), (width - 0.28) * (k + 1) / len(p), 0.05, facecolor="#0072B2", linewidth=0))
                draw_cell(axes, cell, _centred(place, width, height), changed)
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
