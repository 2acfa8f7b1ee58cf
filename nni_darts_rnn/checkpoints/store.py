"""The checkpoints of a run: when one is written, which are kept, which one a run resumes from, and to which run they belong."""

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
"""Name of the folder of checkpoints in the folder of a run's results."""
NAME = re.compile(r"(search|retrain)-\d{6,}-\d{8,}")
"""Names of checkpoints; other files in that folder are not ours."""
RESUME = ("auto", "must", "never")


@dataclass(frozen=True)
class Every:
    """How often a checkpoint is written, besides the one at the end of every epoch: every `seconds`, every `steps`, or never."""

    seconds: float | None = None
    steps: int | None = None

    @classmethod
    def parse(cls, text: str) -> Every:
        """"90s", "5min", "1h", "100steps" or "never". `ValueError` with one line otherwise."""
        if text == "never":
            return cls()
        found = re.fullmatch(r"(\d{1,9}) ?(s|min|h|steps?)", str(text))
        if not found or not int(found[1]):
            raise ValueError(f"--checkpoint-every: {text!r} must be like 90s, 5min, 1h, 100steps, or never")
        number, unit = int(found[1]), found[2]
        return cls(steps=number) if unit.startswith("step") else cls(seconds=number * {"s": 1, "min": 60, "h": 3600}[unit])


@dataclass(frozen=True)
class Keeping:
    """How a run saves its state and resumes. `resume`: "auto" resumes if there is a checkpoint, "must" refuses to begin anew, "never" begins anew."""

    every: Every = Every(seconds=300)
    resume: str = "auto"

    def __post_init__(self):
        one_of("--resume", self.resume, RESUME)


USUAL = Keeping()


class AnotherRun(ValueError):
    """Raised for a good checkpoint of a run with other settings."""


class Checkpoints:
    """The checkpoints of one phase ("search", "retrain") of a run, in `folder`.

    `identity` (JSON) is what a run must have in common with the one that wrote them: recipe, seed, corpus, …. The two newest are kept, and the newest
    from the end of an epoch, to which `roll_back` returns.
    """

    def __init__(self, folder: str | Path, phase: str, identity: dict, every: Every = Keeping.every):
        self.folder, self.phase, self.every = Path(folder), phase, every
        self.identity = json.loads(json.dumps(identity))
        self.last, self.steps = time.monotonic(), 0

    def due(self) -> bool:
        """Counts a step. Whether a checkpoint is due after it."""
        self.steps += 1
        if self.every.steps is not None:
            return self.steps >= self.every.steps
        return self.every.seconds is not None and time.monotonic() - self.last >= self.every.seconds

    def save(self, epoch: int, batch: int, state: dict) -> bool:
        """Writes what a run needs to resume with batch `batch` of epoch `epoch`, both counted from 0. Returns False where the disk refuses it: then it
        warns, the checkpoint before stays, and the run goes on."""
        self.last, self.steps = time.monotonic(), 0
        path = self._path((epoch, batch))
        try:
            write_checkpoint(path, state, {"phase": self.phase, "epoch": epoch, "batch": batch, "identity": self.identity})
        except OSError as error:
            if not path.with_suffix(DESCRIPTION).exists():
                path.with_suffix(TENSORS).unlink(missing_ok=True)  # tensors without a description are no checkpoint, and the disk may be full
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
        """The state of the newest intact checkpoint, with its "epoch" and "batch", or None where there is no checkpoint.

        Warns of a damaged one and takes the one before it. `ValueError` with one line where all are damaged, `AnotherRun` where they are of another run.
        """
        return self._newest(self._positions())

    def roll_back(self) -> dict:
        """The state at the newest end of an epoch, or at the beginning of the run. Removes the checkpoints after it."""
        state = self._newest([position for position in self._positions() if position[1] == 0])
        if state is None:
            raise ValueError(f"{self.folder}: no checkpoint of the {self.phase} to return to")
        for position in self._positions():
            if position > (state["epoch"], state["batch"]):
                self._remove(position)
        return state

    def __bool__(self) -> bool:
        """Whether there is a checkpoint."""
        return bool(self._positions())

    def clear(self) -> None:
        """Removes this phase's checkpoints."""
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
        self._path(position).with_suffix(DESCRIPTION).unlink(missing_ok=True)  # first, as tensors without it are no checkpoint
        self._path(position).with_suffix(TENSORS).unlink(missing_ok=True)


def where(epoch: int, batch: int) -> str:
    """Such as `epoch 3, batch 12`; words count from 1, arguments from 0."""
    return f"epoch {epoch + 1}, batch {batch + 1}"


def difference(there, here, name: str = "") -> str:
    """In words, the first setting in which two identities differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*here, *there]:
            if there.get(key) != here.get(key):
                return difference(there.get(key), here.get(key), f"{name}.{key}".strip("."))
    return f"{name}: {there!r} there, {here!r} here"


def run_identity(corpus, recipe, seed: int, **more) -> dict:
    """`identity` of a phase with this part of a recipe. A corpus is identified by its numbers of tokens and words, and by a hash of its words and of each
    split: all of a split up to 65,536 tokens, else 64 evenly spread parts, so that a large one is not read for this."""
    sha = hashlib.sha256("\n".join(corpus.vocab.words).encode())
    splits = {name: tokens for name in ("train", "valid", "test", "alpha") if (tokens := getattr(corpus, name)) is not None}
    for tokens in splits.values():
        parts = [tokens] if len(tokens) <= 1 << 16 else [tokens[i * (len(tokens) >> 6):][:1 << 10] for i in range(64)]
        for part in parts:
            sha.update(part.contiguous().numpy().tobytes())
    text = {"tokens": {name: len(tokens) for name, tokens in splits.items()}, "words": len(corpus.vocab), "sha256": sha.hexdigest()}
    return {"recipe": dataclasses.asdict(recipe), "seed": seed, "corpus": text, **more}


def unfinished_search(kept: Path) -> bool:
    """Whether the folder of checkpoints holds a search that has not trained all of its epochs."""
    search = Checkpoints(kept, "search", {})
    if not search:
        return False
    newest = search._positions()[-1]
    try:
        return newest[0] < read_about(search._path(newest))["identity"]["recipe"]["epochs"]
    except (KeyError, TypeError, ValueError):  # damaged, so it cannot be resumed
        return False


@contextlib.contextmanager
def alone_in(folder: str | Path, wait: bool = False) -> Iterator[Path]:
    """Makes and locks the folder of checkpoints in the folder of results, and yields it. Where another process holds it: waits, or `ValueError`.

    Removes files that a killed process left half written and, at the end, the folder of checkpoints if it is empty.
    """
    folder = Path(folder)
    kept = folder / FOLDER
    with _locked(kept / "lock", f"{folder}: another process is at work in this folder; give another one", wait):
        remove_partial(folder)
        remove_partial(kept)
        for path in kept.glob(f"*{TENSORS}"):
            if NAME.fullmatch(path.stem) and not path.with_suffix(DESCRIPTION).exists():
                path.unlink(missing_ok=True)  # tensors without a description, which was never written or is already removed
        try:
            yield kept
        finally:
            if {path.name for path in kept.iterdir()} == {"lock"}:
                (kept / "lock").unlink()
                with contextlib.suppress(OSError):  # another process has begun to use it
                    kept.rmdir()


@contextlib.contextmanager
def _locked(path: Path, refusal: str, wait: bool) -> Iterator[None]:
    """Holds the lock file. Where another process holds it: waits, or `ValueError(refusal)`. The system releases the lock of a process that dies."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = hold(path, wait)
        except BlockingIOError:
            raise ValueError(refusal) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                break
        lock.close()  # the last holder has removed this file in the meantime
    with lock:
        yield
