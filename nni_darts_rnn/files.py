"""Write files completely or not at all, and lock them."""

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
except ImportError:  # Windows: no locks there
    fcntl = None

PARTIAL = ".nni-darts-rnn-partial-"  # a prefix that no other program uses


@contextlib.contextmanager
def whole(path: str | Path):
    """Yield a temporary path with the name of `path`, in a new folder beside it. If the block ends without an error, the file is renamed to `path`; otherwise
    it is removed.

    The data are on the disk before the file gets its name, so a power failure leaves either the old file or the new one. The temporary file has a folder to
    itself because its writer may first write other files beside it (safetensors from 0.8 on), and a kill would leave those there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=path.parent))
    temporary = folder / path.name
    try:
        temporary.touch()
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # its writer may have made it unreadable for NNI's server and for colleagues
        _to_disk(temporary)
        os.replace(temporary, path)
        if os.name == "posix":
            _to_disk(path.parent)  # so that the new name is on the disk too
    except OSError as error:
        if error.errno and error.filename is None:  # the error of a failed write does not name the file
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def at_home(path: str | Path, setting: str) -> Path:
    """The path, with `~` replaced by the home folder. `ValueError` with one line, which begins with `setting`, if that folder is not known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{setting}: {str(path)!r} begins with a home folder that this machine does not know; give the whole path") from None


def cache_folder(what: str = "") -> Path:
    """`$XDG_CACHE_HOME/nni_darts_rnn`, by default `~/.cache/nni_darts_rnn`, or the folder `what` in it. It may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else at_home("~/.cache", "XDG_CACHE_HOME")) / "nni_darts_rnn" / what


def _to_disk(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hold(path: str | Path, wait: bool = True) -> BinaryIO:
    """Open the lock file at `path`, made if need be, and lock it until the returned file is closed. The system frees the lock of a process that dies.

    If another process holds the lock, wait for it; with `wait=False`, `BlockingIOError`. On Windows nothing is locked.
    """
    lock = open(path, "ab")
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        lock.close()
        error.filename = str(path)  # some file systems have no locks; the system's error does not name the file
        raise
    return lock


def remove_partial(folder: str | Path) -> None:
    """Remove the half-written files that killed processes left in the folder. Call it only where no other process writes."""
    for path in Path(folder).glob(PARTIAL + "*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:  # earlier versions left files, not folders
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
    """JSON text of `data` (not empty). It begins with the SHA-256 of all the rest, so that `check_seal` notices any change."""
    body = json.dumps({key: value for key, value in data.items() if key != "checksum"})
    return _SEAL % hashlib.sha256(body.encode()).hexdigest() + body[1:]


def check_seal(text: str) -> None:
    """`ValueError` unless the text is, byte for byte, one that `sealed` made."""
    body = "{" + text[len(_SEAL) - 2 + 64:]
    if text[:-len(body) + 1] != _SEAL % hashlib.sha256(body.encode()).hexdigest():
        raise ValueError("its checksum is missing or wrong: the file is damaged")


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text, completely or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, data) -> Path:
    """Write `data` as JSON, completely or not at all."""
    return write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: str | Path, rows: list[dict]) -> Path:
    """Write dictionaries as the rows of a CSV file, completely or not at all. Columns are in the order of first appearance; missing values are empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return Path(path)
