"""Draws the pictures that the files in a folder allow: cell, α, the cell's animation, learning curves. Trials, `nni-darts-rnn plot` and the report use it."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable
from pathlib import Path

from ..genotype import Genotype, load_genotype
from ..plot import animate_cell, plot_alpha, plot_cell, plot_curves

SOURCES = ("genotype.json", "model.json", "alpha.json", "search.csv", "retrain.csv", "history.csv")


def draw(folder: str | Path, names=None, out: str | Path | None = None) -> tuple[list[Path], dict[str, str]]:
    """Draw the named pictures (default: all) from the files in `folder` into `out` (default: `folder`).

    Returns the paths that were written, and name -> reason for each picture that was not. A missing or damaged source is such a reason, not an exception. An
    `out` that cannot be written raises `OSError`.
    """
    folder, out = Path(folder), Path(out or folder)
    out.mkdir(parents=True, exist_ok=True)
    written, missing, sources = [], {}, {}
    for (read, _), same in itertools.groupby(names or PICTURES, PICTURES.__getitem__):  # a picture in two formats is drawn only once
        paths = [out / name for name in same]
        try:
            if read not in sources:
                sources[read] = read(folder)
            draw_one(paths[0].name, sources[read], paths)
            written += paths
        except ValueError as error:
            missing |= {path.name: str(error) for path in paths}
    return written, missing


def draw_one(name: str, data, path: Path | list[Path]) -> None:
    """Draw the picture `name` from `data`, which its reader returned, to `path` or to each of several."""
    plot = PICTURES[name][1]
    plot(path=path, **data) if isinstance(data, dict) else plot(data, path)


def read_cell(folder: Path) -> Genotype:
    """The cell in the folder of a search, a trial or a trained model. `ValueError` if there is none."""
    if (folder / "genotype.json").is_file():
        return load_genotype(folder)
    if (folder / "model.json").is_file():
        return Genotype.from_dict(_json(folder / "model.json").get("genotype"))
    raise ValueError("there is no genotype.json or model.json")


def read_alpha(folder: Path) -> dict:
    """The arguments of `plot_alpha` from a search's folder: α of every epoch (`history`), primitives, relaxation, epochs. `ValueError` if there is none."""
    if not (folder / "alpha.json").is_file():
        raise ValueError("there is no alpha.json")
    data = _json(folder / "alpha.json")
    primitives = data.get("primitives")
    if not isinstance(primitives, list) or not all(isinstance(name, str) for name in primitives) or "alpha" not in data:
        raise ValueError("alpha.json: expected the keys primitives and alpha")
    try:
        "".join(primitives).encode()
    except UnicodeEncodeError:
        raise ValueError("alpha.json: primitives: half a character is no name") from None
    epochs = data.get("epochs")
    if epochs is not None and not (isinstance(epochs, list) and all(isinstance(epoch, int) for epoch in epochs)):
        raise ValueError("alpha.json: epochs: expected a list of whole numbers")
    return {"history": data["alpha"], "primitives": tuple(primitives), "relaxation": data.get("relaxation", "edge"), "epochs": epochs}


def read_rows(folder: Path) -> list[dict]:
    """The metrics of every epoch of both phases, each row with its phase. `ValueError` if there are none.

    The rows come from search.csv, and from retrain.csv or, if that is missing, fastai's history.csv.
    """
    rows = []
    for phase, names in (("search", ("search.csv",)), ("retrain", ("retrain.csv", "history.csv"))):
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            continue
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                found = list(csv.DictReader(file))
            for row in found:
                epoch = int(row["epoch"])
                # fastai's rows have no phase, and epochs that begin at 0
                rows.append(row if row.get("phase") else {**row, "phase": phase, "epoch": epoch + 1})
        except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
            raise ValueError(f"{path.name}: cannot be read ({type(error).__name__} {error})") from None
    if not rows:
        raise ValueError("there is no search.csv, retrain.csv or history.csv with an epoch in it")
    return rows


PICTURES: dict[str, tuple[Callable, Callable]] = {
    "cell.svg": (read_cell, plot_cell), "cell.png": (read_cell, plot_cell), "cell.gif": (read_alpha, animate_cell),
    "alpha.svg": (read_alpha, plot_alpha), "alpha.png": (read_alpha, plot_alpha),
    "curves.svg": (read_rows, plot_curves), "curves.png": (read_rows, plot_curves)}
"""Name of each picture -> (what reads its numbers from a folder, what draws it)."""


def _json(path: Path) -> dict:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: cannot be read ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path.name}: expected a JSON object")
    return data
