"""The checkpoints of a run that can be stopped at any moment: which ones are kept, from which one the run goes on, and to which run they belong."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..checks import one_line, one_of
from ..files import hold, remove_partial
from .file import DESCRIPTION, TENSORS, read_about, read_state, write_checkpoint

logger = logging.getLogger(__name__)

FOLDER = "checkpoint"
"""The folder of a run's checkpoints, inside the folder of its results."""
NAME = re.compile(r"(search|retrain)-\d{6,}-\d{8,}")
"""The names of checkpoints. Other files in their folder belong to the user."""
RESUME = ("auto", "must", "never")


@dataclass(frozen=True)
class Every:
    """How often a checkpoint is written inside an epoch: after so many `seconds`, after so many `steps`, or never. The end of an epoch always writes one."""

    seconds: float | None = None
    steps: int | None = None

    @classmethod
    def parse(cls, text: str) -> Every:
        """Read "90s", "5min", "1h", "100steps" or "never". `ValueError` with one line for other texts."""
        if text == "never":
            return cls()
        found = re.fullmatch(r"(\d{1,9}) ?(s|min|h|steps?)", str(text))
        if not found or not int(found[1]):
            raise ValueError(f"--checkpoint-every: {text!r} must be like 90s, 5min, 1h, 100steps, or never")
        number, unit = int(found[1]), found[2]
        return cls(steps=number) if unit.startswith("step") else cls(seconds=number * {"s": 1, "min": 60, "h": 3600}[unit])


@dataclass(frozen=True)
class Keeping:
    """How a run writes and uses checkpoints. `resume`: "auto" goes on from a checkpoint if there is one, "must" raises an error if there is none, "never"
    removes what is there and begins anew."""

    every: Every = Every(seconds=300)
    resume: str = "auto"

    def __post_init__(self):
        one_of("--resume", self.resume, RESUME)


USUAL = Keeping()


class AnotherRun(ValueError):
    """A checkpoint belongs to a run with other settings."""


class Checkpoints:
    """The checkpoints of one phase ("search", "retrain") of a run, in `folder`.

    `identity` (recipe, seed, corpus, …; JSON) is what a run must have in common with the one that wrote the checkpoints in order to go on from them. The two
    newest checkpoints are kept, and the newest from an epoch's end, to which `roll_back` returns.
    """

    def __init__(self, folder: str | Path, phase: str, identity: dict, every: Every = Keeping.every):
        self.folder, self.phase, self.every = Path(folder), phase, every
        self.identity = json.loads(json.dumps(identity))
        self.last, self.steps = time.monotonic(), 0

    def due(self) -> bool:
        """Count a step. Returns whether a checkpoint is to be written after it."""
        self.steps += 1
        if self.every.steps is not None:
            return self.steps >= self.every.steps
        return self.every.seconds is not None and time.monotonic() - self.last >= self.every.seconds

    def save(self, epoch: int, batch: int, state: dict) -> bool:
        """Write what a run needs to go on with batch `batch` of epoch `epoch`, both counted from 0. Returns False if the disk does not take it: the run then
        goes on, with a warning and with the checkpoint before."""
        self.last, self.steps = time.monotonic(), 0
        path = self._path((epoch, batch))
        try:
            write_checkpoint(path, state, {"phase": self.phase, "epoch": epoch, "batch": batch, "identity": self.identity})
        except OSError as error:
            if not path.with_suffix(DESCRIPTION).exists():
                path.with_suffix(TENSORS).unlink(missing_ok=True)  # without a description the tensors are no checkpoint, and the disk may be full
            kept = self._positions()
            logger.warning("%s: no checkpoint was written (%s); %s", self.folder, error.strerror or one_line(error),
                           f"the one before stays ({where(*kept[-1])})" if kept else "there is none yet")
            return False
        found = self._positions()
        stay = {*found[-2:], *[position for position in found if position[1] == 0][-1:]}
        for position in found:
            if position not in stay:
                self._remove(position)
        return True

    def load(self) -> dict | None:
        """The state of the newest intact checkpoint, with its "epoch" and "batch"; None if there is no checkpoint.

        A damaged checkpoint is reported, and the one before it is used. `ValueError` with one line if none is intact; `AnotherRun` if one that can
        be read belongs to a run with other settings.
        """
        return self._newest(self._positions())

    def roll_back(self) -> dict:
        """The state at the newest end of an epoch, or at the beginning of the run. Newer checkpoints are removed. `ValueError` if there is no such state."""
        state = self._newest([position for position in self._positions() if position[1] == 0])
        if state is None:
            raise ValueError(f"{self.folder}: no checkpoint of the {self.phase} to return to")
        for position in self._positions():
            if position > (state["epoch"], state["batch"]):
                self._remove(position)
        return state

    def __bool__(self) -> bool:
        """Whether there is a checkpoint of this phase."""
        return bool(self._positions())

    def clear(self) -> None:
        """Remove this phase's checkpoints."""
        for position in self._positions():
            self._remove(position)

    def _newest(self, positions: list[tuple[int, int]]) -> dict | None:
        for i, position in reversed(list(enumerate(positions))):
            try:
                return self._read(position)
            except AnotherRun:
                raise
            except ValueError as error:
                logger.warning("%s%s", error, f"; the one before it is used ({where(*positions[i - 1])})" if i else "")
        if positions:
            raise ValueError(f"{self.folder}: none of the {len(positions)} checkpoints of the {self.phase} is whole; --resume never begins anew")
        return None

    def _read(self, position: tuple[int, int]) -> dict:
        path = self._path(position)
        about = read_about(path)
        if (about.get("phase"), about.get("epoch"), about.get("batch")) != (self.phase, *position):
            raise ValueError(f"{path}{DESCRIPTION}: not the checkpoint that its name says")
        if about.get("identity") != self.identity:
            raise AnotherRun(f"{self.folder} holds an unfinished {self.phase} with other settings ({difference(about.get('identity'), self.identity)}); "
                             "give those to go on, another folder, or --resume never to begin anew")
        return read_state(path, about) | {"epoch": position[0], "batch": position[1]}

    def _path(self, position: tuple[int, int]) -> Path:
        return self.folder / f"{self.phase}-{position[0]:06d}-{position[1]:08d}"

    def _positions(self) -> list[tuple[int, int]]:
        """(epoch, batch) of each checkpoint, the newest last."""
        names = (re.fullmatch(rf"{self.phase}-(\d+)-(\d+)\{DESCRIPTION}", path.name) for path in self.folder.glob(f"{self.phase}-*"))
        return sorted((int(name[1]), int(name[2])) for name in names if name)

    def _remove(self, position: tuple[int, int]) -> None:
        self._path(position).with_suffix(DESCRIPTION).unlink(missing_ok=True)  # first, since without it the tensors are no checkpoint
        self._path(position).with_suffix(TENSORS).unlink(missing_ok=True)


def where(epoch: int, batch: int) -> str:
    """A position in words, such as `epoch 3, batch 12`, counted from 1."""
    return f"epoch {epoch + 1}, batch {batch + 1}"


def difference(there, here, name: str = "") -> str:
    """The first setting in which two identities differ, with its two values."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*here, *there]:
            if there.get(key) != here.get(key):
                return difference(there.get(key), here.get(key), f"{name}.{key}".strip("."))
    return f"{name}: {there!r} there, {here!r} here"


def run_identity(corpus, recipe, seed: int, **more) -> dict:
    """The `identity` of a phase with this part of a recipe. It tells texts apart by their numbers of tokens and words, and by a hash of the words and of each
    split. Up to 65,536 tokens the whole split is hashed; of a longer one 64 evenly spread parts of 1,024 tokens, so that a large text need not be read."""
    sha = hashlib.sha256("\n".join(corpus.vocab.words).encode())
    splits = {name: tokens for name in ("train", "valid", "test", "alpha") if (tokens := getattr(corpus, name)) is not None}
    for tokens in splits.values():
        parts = [tokens] if len(tokens) <= 1 << 16 else [tokens[i * (len(tokens) >> 6):][:1 << 10] for i in range(64)]
        for part in parts:
            sha.update(part.contiguous().numpy().tobytes())
    text = {"tokens": {name: len(tokens) for name, tokens in splits.items()}, "words": len(corpus.vocab), "sha256": sha.hexdigest()}
    return {"recipe": dataclasses.asdict(recipe), "seed": seed, "corpus": text, **more}


def unfinished_search(kept: Path) -> bool:
    """Whether the folder of checkpoints `kept` holds a search that has not yet trained all of its epochs."""
    search = Checkpoints(kept, "search", {})
    if not search:
        return False
    newest = search._positions()[-1]
    try:
        return newest[0] < read_about(search._path(newest))["identity"]["recipe"]["epochs"]
    except (KeyError, TypeError, ValueError):  # damaged: there is nothing that could go on
        return False


@contextlib.contextmanager
def alone_in(folder: str | Path, wait: bool = False) -> Iterator[Path]:
    """Lock the folder of checkpoints in `folder`, the folder of a run's results, and yield it; it is made if need be. If another process works there, wait
    for it with `wait`, otherwise `ValueError`.

    Half-written files of processes that were killed are removed first. At the end the folder of checkpoints is removed if it is empty.
    """
    folder = Path(folder)
    kept = folder / FOLDER
    with _locked(kept / "lock", f"{folder}: another process is at work in this folder; give another one", wait):
        remove_partial(folder)
        remove_partial(kept)
        for path in kept.glob(f"*{TENSORS}"):
            if NAME.fullmatch(path.stem) and not path.with_suffix(DESCRIPTION).exists():
                path.unlink(missing_ok=True)  # without its description it is no checkpoint
        try:
            yield kept
        finally:
            if {path.name for path in kept.iterdir()} == {"lock"}:
                (kept / "lock").unlink()
                with contextlib.suppress(OSError):  # another process has begun to use the folder
                    kept.rmdir()


@contextlib.contextmanager
def _locked(path: Path, refusal: str, wait: bool) -> Iterator[None]:
    """Hold the lock file. If another process holds it, wait for it with `wait`, otherwise `ValueError(refusal)`. A process that dies loses its locks."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = hold(path, wait)
        except BlockingIOError:
            raise ValueError(refusal) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                break
        lock.close()  # the process that held it before has removed the file in the meantime
    with lock:
        yield
