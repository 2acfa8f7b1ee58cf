"""The most likely cell of each epoch, as an animation."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from ..files import whole
from ..genotype import PRIMITIVES, derive
from .alpha import epoch_numbers, probabilities
from .canvas import new_figure, style, targets
from .cell import draw_cell, inches_axes
from .geometry import layout


def animate_cell(history, path, primitives=PRIMITIVES, max_frames: int = 60, relaxation: str = "edge", epochs=None) -> Path:
    """Write the most likely cell of each epoch as the frames of a GIF at `path`. `history`, `relaxation` and `epochs` are as for `plot_alpha`.

    A frame lasts a quarter of a second, the last one two seconds more. A ring marks each node that changed since the frame before. If there are more than
    `max_frames` epochs, evenly spaced ones are shown, the first and the last among them.
    """
    path, *more = targets(path, (".gif",))
    if more:
        raise ValueError(f"{more[0]}: an animation is written to one file, here {path}")
    p = probabilities(history, primitives, relaxation)
    numbers = epoch_numbers(epochs, len(p))
    shown = sorted({round(k) for k in np.linspace(0, len(p) - 1, min(len(p), max(2, max_frames)))})
    cells = [derive(p[k], primitives) for k in shown]
    places = {cell: layout(cell) for cell in cells}
    width, height, room = max(a.width for a in places.values()), max(a.height for a in places.values()), 0.5
    width = max(width, 4.5)
    with style(), whole(path) as temporary:
        from matplotlib.patches import Rectangle
        from PIL import Image

        frames, before = [], None
        for k, cell in zip(shown, cells):
            figure, place = new_figure(width, height + room), places[cell]
            axes = inches_axes(figure, width, height, room)
            changed = {i for i in range(1, cell.n_nodes + 1) if before and cell.recurrent[i - 1] != before.recurrent[i - 1]}
            axes.text(0.14, height + 0.3, f"epoch {numbers[k]} of {numbers[-1]}", fontsize=12, fontweight="bold", va="center")
            axes.add_patch(Rectangle((0.14, height + 0.06), width - 0.28, 0.05, facecolor="#E9ECF0", linewidth=0))
            axes.add_patch(Rectangle((0.14, height + 0.06), (width - 0.28) * (k + 1) / len(p), 0.05, facecolor="#0072B2", linewidth=0))
            draw_cell(axes, cell, place.moved((width - place.width) / 2, (height - place.height) / 2, width, height), changed)
            frame = io.BytesIO()
            figure.savefig(frame, format="png", dpi=min(80, 900 / width), pil_kwargs={"compress_level": 1})
            frames.append(Image.open(frame).convert("RGB"))
            before = cell
        lasting = [250] * (len(frames) - 1) + [2250]  # milliseconds
        frames[0].save(temporary, format="gif", save_all=True, append_images=frames[1:], duration=lasting, loop=0)
    return path
