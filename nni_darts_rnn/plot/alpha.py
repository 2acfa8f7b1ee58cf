"""α over the epochs, as one heat map for each primitive."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..checks import one_of
from ..genotype import PRIMITIVES, RELAXATIONS, derive, number_of_nodes
from .canvas import GREY, mix, new_figure, op_colours, save, style, targets

MOST = 10**9  # the largest number of an epoch: floats cannot tell much larger ones from the next


def probabilities(history, primitives, relaxation: str = "edge") -> np.ndarray:
    """`history`, α or probabilities, as probabilities (epochs, E, K). If it holds distributions already, it is returned as it is; else its softmax is.

    A softmax is over the primitives of an edge ("edge"), or over those of all edges into a node, without `none` if cells are drawn ("gumbel"), as in
    `MixedRNN.relaxed`. `ValueError` for another shape, and for NaN or infinite values.
    """
    one_of("relaxation", relaxation, RELAXATIONS)
    try:
        a = np.asarray(history, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("history: expected an array of numbers (epochs, E, K), each epoch of the same shape") from None
    if a.ndim != 3 or not a.size or a.shape[2] != len(primitives):
        raise ValueError(f"history has shape {a.shape}; expected (epochs, E, {len(primitives)}) for {', '.join(primitives)}")
    n_nodes = number_of_nodes(a.shape[1])
    if not np.isfinite(a).all():
        raise ValueError("history holds NaN or infinite values; the search has diverged")
    ends = np.cumsum(np.arange(1, n_nodes + 1) if relaxation != "edge" else np.ones(a.shape[1], dtype=int))
    blocks = np.split(a, ends[:-1], axis=1)  # (epochs, i, K) each: what one softmax is over
    if (a >= 0).all() and all(np.allclose(block.sum((1, 2)), 1, atol=1e-3) for block in blocks):
        return a
    kept = np.array([relaxation != "gumbel" or name != "none" for name in primitives])
    blocks = [np.where(kept, np.exp(block - block[..., kept].max((1, 2), keepdims=True)), 0.0) for block in blocks]
    return np.concatenate([block / block.sum((1, 2), keepdims=True) for block in blocks], axis=1)


def epoch_numbers(epochs, count: int) -> list[int]:
    """The numbers of `count` epochs: `epochs`, by default 1, 2, …. `ValueError` unless each is one more than the one before it, and within ±MOST."""
    numbers = list(range(1, count + 1)) if epochs is None else list(epochs)
    if len(numbers) != count or numbers != list(range(numbers[0], numbers[0] + count)):
        raise ValueError(f"epochs: {numbers} are not the numbers of {count} epochs in a row")
    if not -MOST <= numbers[0] <= MOST:
        raise ValueError(f"epochs: they have to lie between {-MOST} and {MOST}")
    return numbers


def plot_alpha(history, path, primitives=PRIMITIVES, relaxation: str = "edge", epochs=None) -> Path:
    """Draw the architecture's probabilities over the epochs as heat maps, to `path` (.svg or .png, or a list of such). Returns the first path.

    Several paths take little more time than one, since the figure is built once. `history` (epochs, E, K) is α or probabilities; of α the softmax is shown, and
    `relaxation` says over what. Each primitive has a map, each node a block of rows, and each state that the node may read a row. A frame marks the op and the
    state that each node would take after the last epoch. `epochs` are the epochs' numbers, by default 1, 2, …; 0 is before the search.

    Where one softmax is over all choices of a node (`relaxation` node and gumbel), later nodes have more choices and smaller probabilities. Colours then show
    a choice's probability as a multiple of the node's even draw, on a logarithmic scale; a choice that is never drawn stays blank.
    """
    paths = targets(path)
    p = probabilities(history, primitives, relaxation)
    by_node = relaxation != "edge"
    count, n_edges, n_ops = p.shape
    start = epoch_numbers(epochs, count)[0] - 0.5
    n_nodes = number_of_nodes(n_edges)
    final = derive(p[-1], primitives)
    first, k = {}, 0  # each node's first row in the picture; a gap of one row is between nodes
    for node in range(1, n_nodes + 1):
        first[node], k = k, k + node + 1
    n_rows = k - 1
    rows = np.full((count, n_rows, n_ops), np.nan)
    for node in range(1, n_nodes + 1):
        e = node * (node - 1) // 2
        rows[:, first[node]:first[node] + node] = p[:, e:e + node]
        if by_node:
            rows[:, first[node]:first[node] + node] *= np.count_nonzero(p[-1, e:e + node])  # an even draw of the node is 1
    if by_node:
        rows[rows == 0] = np.nan

    row_h = min(0.155, 14 / n_rows)  # inches; a very large cell gets thinner rows, not a huge picture
    cell_w, gap, left, right, top, bottom = 1.45, 0.12, 0.95, 0.95, 0.95, 0.55
    width, high = left + n_ops * (cell_w + gap) - gap + right, max(n_rows * row_h, 0.9)
    height = top + high + bottom
    low, up = float(np.nanmin(rows)), float(np.nanmax(rows))
    if by_node:
        low, up = max(min(low, 1 / 1.1), 0.1), max(up, 1.1)  # within a tenth of the even draw α has hardly moved yet
    elif up - low < 0.02:  # α has hardly moved yet; full contrast would suggest otherwise
        low, up = (low + up) / 2 - 0.01, (low + up) / 2 + 0.01
    colours = op_colours(primitives)
    with style():
        from matplotlib.colors import LogNorm, Normalize
        from matplotlib.patches import Rectangle
        from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

        norm = (LogNorm if by_node else Normalize)(low, up, clip=by_node)
        figure = new_figure(width, height)
        for op in range(n_ops):
            axes = figure.add_axes(((left + op * (cell_w + gap)) / width, bottom / height, cell_w / width, high / height))
            image = axes.imshow(rows[:, :, op].T, aspect="auto", interpolation="none", cmap="Blues", norm=norm,
                                extent=(start, start + count, n_rows - 0.5, -0.5))
            axes.set_title(primitives[op], fontsize=10, fontweight="bold", color=mix(colours[primitives[op]], "#000000", 0.2), pad=5,
                           parse_math=False)
            for side in axes.spines.values():
                side.set_visible(False)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1, steps=(1, 2, 5, 10)))
            axes.tick_params(labelsize=8, length=2.5, color=GREY)
            if op == n_ops // 2:
                axes.set_xlabel("epoch", fontsize=9)
            axes.set_yticks([])
            for node, (chosen, j) in enumerate(final.recurrent, start=1):
                axes.add_patch(Rectangle((start, first[node] - 0.5), count, node, fill=False, edgecolor="#C9CED6", linewidth=0.6, clip_on=False))
                if chosen == primitives[op]:
                    axes.add_patch(Rectangle((start, first[node] + j - 0.5), count, 1, fill=False, edgecolor="#D55E00", linewidth=1.5,
                                             clip_on=False, zorder=4))
            if op == 0:
                if row_h > 0.1:
                    axes.set_yticks([row + j for node, row in first.items() for j in range(node)], [str(j) for node in first for j in range(node)])
                    axes.tick_params(axis="y", labelsize=7, length=0, pad=3)
                for node, row in first.items():
                    axes.annotate(f"node {node}", (0, row + (node - 1) / 2), xycoords=("axes fraction", "data"), xytext=(-20, 0),
                                  textcoords="offset points", ha="right", va="center", fontsize=9, fontweight="bold", annotation_clip=False)
                axes.annotate("reads", (0, 1), xycoords="axes fraction", xytext=(-3, 6), textcoords="offset points", ha="right", fontsize=7.5,
                              color=GREY)
        bar_h = min(high, 2.4)
        bar = figure.add_axes(((width - right + 0.2) / width, (bottom + high - bar_h) / height, 0.14 / width, bar_h / height))
        figure.colorbar(image, cax=bar, format=FuncFormatter(lambda v, _: f"{v:.3g}"))
        bar.tick_params(labelsize=8, length=2.5, color=GREY)
        ticks = ((0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.5, 2) if up < 3 * low else (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)) if by_node else ()
        bar.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= up]) if by_node else MaxNLocator(nbins=4, steps=(1, 2, 5, 10)))
        bar.yaxis.set_minor_locator(NullLocator())
        bar.set_title("× even" if by_node else "prob.", fontsize=8, pad=5)
        bar.spines["outline"].set_visible(False)
        figure.text(0.12 / width, 1 - 0.2 / height, "Probability of each choice of a node, beside an even draw" if by_node else "Probability of each op on each edge", fontsize=11, fontweight="bold", va="center")
        figure.text(0.12 / width, 1 - 0.42 / height, "framed: taken after the last epoch", fontsize=8.5, va="center", color="#B34F00")
        return save(figure, paths)
