"""TensorBoard's view of a run. Without the package `tensorboard`, nothing is written.

A run's folder gets `tensorboard/search` and `tensorboard/retrain`. NNI's web page opens them too: it looks for a folder of that name in a trial's.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

FOLDER = "tensorboard"
PICTURES = {"search": ("cell.png", "alpha.png", "curves.png"), "retrain": ("cell.png", "curves.png")}


@contextlib.contextmanager
def watched(folder: Path, phase: str, report: Callable[[dict], None] | None) -> Iterator[Callable[[dict], None] | None]:
    """In the context: a function to call in the place of `report`, which also writes each row's numbers for TensorBoard. On success, adds the pictures in
    `folder`.

    When a run goes on after a stop, TensorBoard drops what the earlier part wrote from the first new epoch on. A failure to write only gives a warning, and
    stops the writing: no run is lost by it.
    """
    if importlib.util.find_spec("tensorboard") is None:
        yield report
        return
    log = _Log(folder, phase)

    def both(row: dict) -> None:
        log.attempt(log.add, row)
        if report is not None:
            report(row)

    try:
        yield both
        log.attempt(log.add_pictures)
    finally:
        log.attempt(log.close)


class _Log:
    def __init__(self, folder: Path, phase: str):
        self.folder, self.phase, self.works = folder, phase, True
        self.epoch: int | None = None  # the last one that this part of the run has reported

    def attempt(self, write: Callable, *what) -> None:
        if self.works:
            try:
                write(*what)
            except (OSError, ValueError) as error:  # ValueError: TensorBoard wants names that are UTF-8
                self.works = False
                warnings.warn(f"nothing more is written for TensorBoard: {error}", stacklevel=2)

    @functools.cached_property
    def writer(self):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder / FOLDER / self.phase), purge_step=self.epoch)  # with no epoch nothing is dropped

    def add(self, row: dict) -> None:
        self.epoch = row["epoch"]
        for name, value in row.items():
            if name not in ("default", "epoch") and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                self.writer.add_scalar(name, value, self.epoch)
        self.writer.flush()  # an epoch can take minutes, and its row should be visible at once

    def add_pictures(self) -> None:
        import numpy as np
        from PIL import Image

        epoch = self._last_epoch() if self.epoch is None else self.epoch
        for name in PICTURES[self.phase]:
            if (self.folder / name).is_file():
                with Image.open(self.folder / name) as image:
                    self.writer.add_image(name.partition(".")[0], np.asarray(image.convert("RGB")), epoch, dataformats="HWC")

    def _last_epoch(self) -> int:
        """The last epoch of an earlier part of the run, for a part that had no epoch left to train."""
        from .figures import read_rows

        return max(int(row["epoch"]) for row in read_rows(self.folder) if row["phase"] == self.phase)

    def close(self) -> None:
        if "writer" in vars(self):
            self.writer.close()
