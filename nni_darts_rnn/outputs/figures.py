"""The pictures that a folder's files allow: cell, α, its animation, learning curves. Used by trials, by `nni-darts-rnn plot` and by the report."""

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
    """Draws the named pictures (default: all of them) from the files in `folder` into `out` (default: there). Returns those written, and name -> why not for the others.

    A source that is missing or damaged is a reason, not an exception; only that `out` cannot be written is (`OSError`).
    """
    folder, out = Path(folder), Path(out or folder)
    out.mkdir(parents=True, exist_ok=True)
    written, missing, sources = [], {}, {}
    for (read, _), same in itertools.groupby(names or PICTURES, PICTURES.__getitem__):  # one picture in two formats is drawn once
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
    """Draws one picture of what its reader returned: to `path`, or to each of several."""
    plot = PICTURES[name][1]
    plot(path=path, **data) if isinstance(data, dict) else plot(data, path)


def read_cell(folder: Path) -> Genotype:
    """The cell of a search's, trial's or trained model's folder. `ValueError` where there is none."""
    if (folder / "genotype.json").is_file():
        return load_genotype(folder)
    if (folder / "model.json").is_file():
        return Genotype.from_dict(_json(folder / "model.json").get("genotype"))
    raise ValueError("there is no genotype.json or model.json")


def read_alpha(folder: Path) -> dict:
    """α of every epoch (history), primitives, relaxation and epochs as `plot_alpha` wants them, of a search's folder. `ValueError` where there is none."""
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
    """Metrics of every epoch of both phases, each with its phase, whichever of the package's ways wrote them. `ValueError` where there are none."""
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
                # fastai counts epochs from 0 and knows of no phases
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
"""What reads the numbers of each picture, and what draws it."""


def _json(path: Path) -> dict:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: cannot be read ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path.name}: expected a JSON object")
    return data
