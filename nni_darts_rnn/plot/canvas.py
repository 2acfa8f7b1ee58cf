"""What all pictures share: colours, fonts, figures without pyplot, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from ..files import whole

OP_COLOURS = {"tanh": "#0072B2", "relu": "#D55E00", "sigmoid": "#009E73", "identity": "#A8528C", "none": "#8A8A8A"}
"""The colour of each primitive, from the palette of Okabe and Ito, whose colours colour-blind readers can tell apart (the purple is darkened for contrast)."""

_OTHER_COLOURS = ("#B87900", "#2B8CC4", "#5B4FA2", "#7A5C3E")  # for registered primitives, by alphabetical order
INK, GREY, LANE = "#2B2F36", "#7B828C", "#A3ABB6"
_RC = {"svg.fonttype": "none", "svg.hashsalt": "nni_darts_rnn", "font.family": "sans-serif", "mathtext.fontset": "dejavusans",
       "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica"],
       "axes.edgecolor": GREY, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK}


def mix(colour: str, other: str, part: float) -> str:
    """A mixture of two colours: `part` (0 to 1) of `other`, the rest of `colour`."""
    pairs = [(int(colour[k:k + 2], 16), int(other[k:k + 2], 16)) for k in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in pairs)


def op_colours(ops) -> dict[str, str]:
    """A colour for each op. Registered primitives get theirs in alphabetical order."""
    others = sorted({op for op in ops if op not in OP_COLOURS})
    return {**OP_COLOURS, **{op: _OTHER_COLOURS[k % len(_OTHER_COLOURS)] for k, op in enumerate(others)}}


def targets(path, allowed: tuple[str, ...] = (".svg", ".png")) -> list[Path]:
    """`path`, or the list or tuple of paths that it is, as a list. `ValueError` unless each has one of the `allowed` suffixes."""
    paths = [Path(one) for one in (path if isinstance(path, (list, tuple)) else [path])]
    for one in paths:
        if one.suffix.lower() not in allowed:
            raise ValueError(f"{one}: the name of a picture must end in {' or '.join(allowed)}, not {one.suffix or 'without a suffix'}")
    return paths


@contextlib.contextmanager
def style():
    """In the context, matplotlib's defaults and ours apply, whatever the caller's rcParams are."""
    import matplotlib.style

    with matplotlib.style.context(["default", _RC]):
        yield


def new_figure(width: float, height: float):
    """A figure of `width` × `height` inches, outside pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white")


def save(figure, paths: list[Path], few_colours: bool = False) -> Path:
    """Write the figure to each of `paths`, whole or not at all, and return the first.

    The files have no date and no program version, which would make two equal pictures differ. `few_colours` gives a PNG a palette.
    """
    for path in paths:
        with whole(path) as temporary:
            if path.suffix.lower() == ".svg":
                figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})
                continue
            figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})
            if few_colours:  # 256 colours instead of 24 bits: a third of the size, with no visible difference in line art
                from PIL import Image

                image = Image.open(io.BytesIO(temporary.read_bytes())).convert("RGB")
                image.quantize(256, dither=Image.Dither.NONE).save(temporary, format="png", optimize=True, dpi=(160, 160))
    return paths[0]
