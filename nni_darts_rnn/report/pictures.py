"""The report's pictures, drawn anew from numbers, as parts of an HTML page."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from ..outputs import figures
from .trial_folder import Trial
from .words import anchor, esc


def cell_picture(trial: Trial, key: str) -> str:
    cell = trial.result.genotype
    said = "; ".join(f"node {i} reads {'the input' if j == 0 else f'node {j}'} through {op}" for i, (op, j) in enumerate(cell.recurrent, start=1))
    return picture("cell.svg", cell, key + "-cell", f"Cell of trial {trial.id}: {said}")


def folder_picture(trial: Trial, name: str, label: str) -> str:
    try:
        found = figures.PICTURES[name][0](trial.folder)
    except ValueError as error:
        return f'<p class="missing">Not drawn: {esc(error)}.</p>'
    return picture(name, found, f"{anchor(trial)}-{name[:-4]}", f"{label}, trial {trial.id}")


def picture(name: str, data, key: str, label: str) -> str:
    """The picture `name` of `data`, as a `<figure>` with inline SVG whose ids begin with `key`. If it cannot be drawn, a paragraph says why."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            figures.draw_one(name, data, path)
            svg = path.read_text(encoding="utf-8")
    except ValueError as error:
        return f'<p class="missing">Not drawn: {esc(error)}.</p>'
    what, svg = name[:-4], inline_svg(svg, re.sub("[^A-Za-z0-9-]", "-", key), label)
    return f'<figure class="{what}" tabindex="0" role="group" aria-label="{what}">{svg}</figure>'


def inline_svg(svg: str, key: str, label: str) -> str:
    """matplotlib's SVG as a part of a page: no XML head and no style, `key` before every id, its width as the upper limit, `label` for screen readers."""
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{key}-\1"', svg)
    svg = re.sub(r'href="#([^"]*)"', rf'href="#{key}-\1"', svg)
    svg = re.sub(r'url\(#([^)]*)\)', rf'url(#{key}-\1)', svg)
    width, height = (float(re.search(rf'<svg[^>]*\b{side}="([\d.]+)pt"', svg).group(1)) for side in ("width", "height"))
    head = f'role="img" aria-label="{esc(label)}" style="--w:{width * 4 / 3:.0f}px;aspect-ratio:{width:g}/{height:g}"'
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', lambda found: f"{found.group(1)} {head}", svg, count=1)
    # the page itself is the background of the drawing
    return re.sub(r'(<g id="[^"]*patch_1">\s*<path[^>]*style="fill: )#ffffff', r"\1none", svg, count=1).strip()
