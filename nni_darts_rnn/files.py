"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows: processes are not kept apart there
    fcntl = None

PARTIAL = ".nni-darts-rnn-partial-"  # nothing of anybody else is called so


@contextlib.contextmanager
def whole(path: str | Path):
    """Yields a temporary path of the same name, in a folder of its own beside `path`; renamed to `path` when the block ends well, removed otherwise.

    What was written is on the disk before it gets its name, so a machine that loses its power leaves the old file or the new one. The folder is of its own
    because who writes the file may write others beside it first (safetensors from 0.8 on), which a kill would leave there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=path.parent))
    temporary = folder / path.name
    try:
        temporary.touch()
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # who made it may have kept it from NNI's server and from colleagues
        _to_disk(temporary)
        os.replace(temporary, path)
        if os.name == "posix":
            _to_disk(path.parent)  # the new name
    except OSError as error:
        if error.errno and error.filename is None:  # a write that fails does not tell of what
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def at_home(path: str | Path, setting: str) -> Path:
    """The path with the home folder in the place of `~`. `ValueError` with one line that begins with `setting` where that is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{setting}: {str(path)!r} begins with a home folder that this machine does not know; give the whole path") from None


def cache_folder(what: str = "") -> Path:
    """`$XDG_CACHE_HOME/nni_darts_rnn`, by default under `~/.cache`, or `what` in it. It may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else at_home("~/.cache", "XDG_CACHE_HOME")) / "nni_darts_rnn" / what


def _to_disk(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hold(path: str | Path, wait: bool = True) -> BinaryIO:
    """The lock file at `path`, made if need be and held until it is closed; the system frees the lock of a process that dies.

    Where another process holds it: waits, or `BlockingIOError` with `wait=False`.
    """
    lock = open(path, "ab")
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        lock.close()
        error.filename = str(path)  # some file systems have no locks; the system does not tell where
        raise
    return lock


def remove_partial(folder: str | Path) -> None:
    """Removes what a process that was killed left half written in the folder. Only for whoever alone writes there."""
    for path in Path(folder).glob(PARTIAL + "*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:  # versions before left files
            path.unlink(missing_ok=True)


def digest(path: str | Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_SEAL = '{"checksum": "%s", '


def sealed(data: dict) -> str:
    """JSON text of `data` (not empty) that begins with the SHA-256 of all the rest, so that any change to it is noticed."""
    body = json.dumps({key: value for key, value in data.items() if key != "checksum"})
    return _SEAL % hashlib.sha256(body.encode()).hexdigest() + body[1:]


def check_seal(text: str) -> None:
    """`ValueError` where the text is not one of `sealed`, byte for byte."""
    body = "{" + text[len(_SEAL) - 2 + 64:]
    if text[:-len(body) + 1] != _SEAL % hashlib.sha256(body.encode()).hexdigest():
        raise ValueError("its checksum is missing or wrong: the file is damaged")


def write_text(path: str | Path, text: str) -> Path:
    """Writes UTF-8 text, whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, data) -> Path:
    """Writes JSON, whole or not at all."""
    return write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: str | Path, rows: list[dict]) -> Path:
    """Writes dictionaries as CSV, whole or not at all; columns in the order of first appearance, absent values empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return Path(path)
