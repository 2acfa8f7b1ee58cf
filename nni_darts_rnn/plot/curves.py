"""Draws learning curves."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np

from .canvas import GREY, new_figure, save, style, targets


def plot_curves(rows, path) -> Path:
    """Draw learning curves to `path` (.svg or .png, or a list of such): one panel for each phase, with perplexity on a logarithmic scale.

    `rows` is a list of dicts or the name of a CSV file, with phase, epoch and one or more columns whose names end in `perplexity`. Each such column is drawn as
    a line, with a mark at its lowest point. Empty and non-finite values are left out. If two rows have the same epoch, the later one counts. Returns the first
    path. `ValueError` for a row without phase or epoch, for what is not a number, for a perplexity that is not above 0, and if nothing is left to draw.
    """
    paths = targets(path)
    phases = _curves(rows)
    names = list(dict.fromkeys(name for lines in phases.values() for name in lines))
    palette = ("#0072B2", "#D55E00", "#009E73", "#A8528C", "#B87900", "#2B8CC4")
    values = [v for lines in phases.values() for line in lines.values() for v in line.values()]
    low, high = min(values), max(values)
    pad = max((high / low) ** 0.08, 1.01)
    with style():
        from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

        panel, left, gap, right, top, bottom = 4.2, 0.75, 0.3, 0.25, 0.5, 0.55
        many = max(map(len, phases.values()))
        below = 0.22 * many + 0.1 if many > 2 else 0.0  # a legend of more than two entries is put below, or it would cover the lines
        width, height = left + len(phases) * (panel + gap) - gap + right, 3.6 + below
        bottom += below
        figure = new_figure(width, height)
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
            axes.yaxis.set_major_locator(FixedLocator(_log_ticks(low / pad, high * pad)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1, steps=(1, 2, 5, 10)))
            axes.margins(x=0.05)
            axes.grid(axis="y", color="#E3E6EA", linewidth=0.8)
            axes.set_axisbelow(True)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            axes.tick_params(labelsize=9, length=3, color=GREY, labelleft=k == 0)
            axes.set_xlabel("epoch", fontsize=10)
            axes.set_title(phase, fontsize=11, fontweight="bold", loc="left", parse_math=False)
            if k == 0:
                axes.set_ylabel("perplexity", fontsize=10)
            where = dict(loc="upper left", bbox_to_anchor=(-0.02, -0.16), borderaxespad=0) if below else dict(loc="upper right")
            legend = axes.legend(fontsize=9, framealpha=0.85, edgecolor="none", **where)
            legend.set_zorder(6)
            for text in legend.get_texts():
                text.set_parse_math(False)  # a column's name is not a formula
        return save(figure, paths)


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between `low` and `high`, the ends of the axis, spread on its logarithmic scale.

    They are powers of ten if three of these fit, else in steps of 1-2-5, else in finer steps. If no steps give three, `low` is the only one.
    """
    for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), tuple(k / 10 for k in range(10, 100)), tuple(k / 100 for k in range(100, 1000))):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [float(f"{s * 10.0 ** d:.6g}") for d in decades for s in steps]
        ticks = [t for t in ticks if low <= t <= high]
        if len(ticks) >= 3:
            spread = []
            for tick in ticks:  # equal steps crowd on a logarithmic scale, so a tick is at least a tenth of the axis from the last
                if not spread or math.log(tick / spread[-1]) >= math.log(high / low) / 10:
                    spread.append(tick)
            return spread
    return [float(f"{low:.4g}")]


def _curves(rows) -> dict[str, dict[str, dict[float, float]]]:
    """phase → column → epoch → perplexity, with the epochs in order."""
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
