"""Published corpora fetched once from a mirror: pinned checksums, broken downloads continued, archives not trusted."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import logging
import lzma
import os
import re
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from ..files import cache_folder, digest, hold

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid", "test")


class Source(NamedTuple):
    """What a mirror serves for one corpus. Checksums are SHA-256 in hexadecimal."""

    files: dict[str, str]
    """File name on the mirror -> checksum: three texts, or one archive that holds them."""
    texts: dict[str, str]
    """Split -> checksum of its text, where it is known; such texts are also accepted out of any archive or folder."""


_PENN = {"train": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
         "valid": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
         "test": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"}

SOURCES = {
    # Mikolov's files, as in his simple-examples.tgz.
    "penn": Source({f"ptb.{split}.txt": _PENN[split] for split in SPLITS}, _PENN),
    # The archives published with Merity et al. 2016; the checksums are those that mlx-data and Julia's CorpusLoaders pin.
    "wikitext-2": Source({"wikitext-2-v1.zip": "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c"}, {}),
    "wikitext-103": Source({"wikitext-103-v1.zip": "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590"}, {}),
}

_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
_LARGEST = 2 << 30  # bytes of one download or one text; WikiText-103's training text is 0.54e9
_TRIES = 4
_TIMEOUT = 30  # seconds without a byte


@contextlib.contextmanager
def made_once(target: Path):
    """Make the folder `target`: the block fills the folder it is given, which becomes `target` when the block ends well and vanishes otherwise.

    It is given None where `target` is there already. Of several processes one does the work and the others wait; the system frees the
    lock of a process that dies. `ValueError` with one line when the cache cannot be written.
    """
    if target.is_dir():
        yield None
        return
    new, hint = target.with_name(target.name + ".new"), "XDG_CACHE_HOME says where the cache is"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = hold(target.with_name(target.name + ".lock"))
    except OSError as error:
        raise ValueError(f"{target.parent}: cannot be written ({error.strerror}); {hint}") from None
    with lock:
        if target.is_dir():  # made by another process in the meantime
            yield None
            return
        shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
        try:
            new.mkdir()
            yield new
            os.replace(new, target)
        except OSError as error:
            raise ValueError(f"{target}: cannot be written ({error.strerror or error}); {hint}") from None
        finally:
            shutil.rmtree(new, ignore_errors=True)


def find_text(folder: Path, split: str) -> Path | None:
    """The text of `split` in a folder, under one of its usual names, or None."""
    return next((folder / name for name in names(split) if (folder / name).exists()), None)


def names(split: str) -> tuple[str, ...]:
    """What the text of `split` may be called."""
    return f"{split}.txt", f"ptb.{split}.txt", f"wiki.{split}.tokens"


def check_texts(name: str, folder: Path) -> None:
    """`ValueError` when a text of the published corpus `name` has a known checksum and not that."""
    for split, expected in SOURCES[name].texts.items():
        path = find_text(folder, split)
        if path is not None and path.is_file() and digest(path) != expected:
            raise ValueError(f"{path}: not the published {split} text of {name} (its SHA-256 is not {expected[:12]}…); "
                             "for a text of your own give its folder as the corpus")


def fetch(name: str, mirror: str) -> Path:
    """The folder in the cache with train.txt, valid.txt and test.txt of corpus `name`, downloaded from `mirror` if it is not there.

    `mirror` is the URL of a folder that holds the corpus's published files, or of an archive. Only https is taken, http from this
    machine itself, and file. Raises `ValueError` with one line; what was downloaded till then is kept and used by the next call.
    """
    source, target, path = SOURCES[name], cache_folder("corpora") / name, urlsplit(check_url(mirror)).path
    if path.endswith(_ARCHIVES):
        file = PurePosixPath(unquote(path)).name
        wanted = {file: (mirror, source.files.get(file))}
        if file not in source.files and not source.texts:
            raise ValueError(f"mirror {mirror!r}: of the archives of {name} only {', '.join(source.files)} has a known checksum")
    else:
        wanted = {file: (f"{mirror.rstrip('/')}/{file}", sha256) for file, sha256 in source.files.items()}
    with made_once(target) as new:
        if new:
            parts = {file: target.with_name(f"{name}-{file}.part") for file in wanted}
            for file, (url, sha256) in wanted.items():
                download(url, parts[file], sha256)
            try:
                for file, part in parts.items():
                    if file.endswith(_ARCHIVES):
                        unpack(part, new)
                    else:
                        shutil.copyfile(part, new / f"{next(s for s in SPLITS if file in names(s))}.txt")
                check_texts(name, new)
            finally:  # whole and used, or refused: of no further use either way
                for part in parts.values():
                    part.unlink(missing_ok=True)
    return target


def check_url(url: str) -> str:
    """`url` if it is https, file, or http of this machine itself; `ValueError` otherwise."""
    try:
        parts = urlsplit(url)
        allowed = {"https": bool(parts.hostname), "http": _is_loopback(parts.hostname), "file": True}.get(parts.scheme, False)
    except ValueError:
        allowed = False
    if not allowed:
        raise ValueError(f"mirror {url!r}: allowed are https://…, file:///… and http:// of this machine itself")
    return url


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


class _SafeRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, file, code, message, headers, new_url):
        check_url(new_url)  # https must not lead to plain http
        return super().redirect_request(request, file, code, message, headers, new_url)


def download(url: str, part: Path, sha256: str | None) -> None:
    """Make `part` the file at `url`, going on where an earlier call was cut off. `sha256` None: whoever reads the file checks it.

    Raises `ValueError` with one line: not there, cut off again and again (what came is kept), or another checksum (nothing is kept).
    """
    check_url(url)
    handlers = [_SafeRedirect()] + ([urllib.request.ProxyHandler({})] if _is_loopback(urlsplit(url).hostname) else [])
    opener, failure = urllib.request.build_opener(*handlers), ""
    for _ in range(_TRIES):
        have = part.stat().st_size if part.exists() else 0
        if not (have and sha256 and digest(part) == sha256):
            logger.info("downloading %s from byte %d", url, have)
            try:
                have = _append(opener, url, part, have)
            except urllib.error.HTTPError as error:
                if error.code < 500:
                    raise ValueError(f"{url}: {error.code} {error.reason}") from None
                failure = f"{error.code} {error.reason}"
                continue
            except ValueError:  # too large, or led elsewhere
                part.unlink(missing_ok=True)
                raise
            except (OSError, http.client.HTTPException) as error:
                failure = str(getattr(error, "reason", "") or error) or type(error).__name__
                continue
        if sha256 is None or digest(part) == sha256:
            return
        part.unlink()
        if not have:
            raise ValueError(f"{url}: wrong checksum, the published file has SHA-256 {sha256}; nothing was kept")
        failure = "wrong checksum after going on with a broken download"  # begun from another file perhaps: once more from nothing
    kept = part.stat().st_size if part.exists() else 0
    raise ValueError(f"{url}: {failure}; {kept:,} bytes are kept and the next call goes on from there")


def _append(opener, url: str, part: Path, have: int) -> int:
    """Read `url` from byte `have` on to the end of `part`; from 0 where the server knows no ranges. The byte it began at."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = opener.open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: there is nothing after byte `have`, so it is whole or of another file; the checksum tells
            raise
        return have
    with response:
        begin = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        start = have if response.status == 206 and begin and int(begin[1]) == have else 0
        if response.status == 206 and not start:
            if have:
                return _append(opener, url, part, 0)
            raise ConnectionError("the server answered with a range, where none was asked for")
        length = response.headers.get("Content-Length")
        with open(part, "ab" if start else "wb") as file:
            _copy(response, file, url, _LARGEST - start)
    # A connection that closes early reads like an end of file.
    if length is not None and part.stat().st_size < start + int(length):
        raise ConnectionError("the connection closed early")
    return start


def _copy(source, target, what: str, limit: int) -> None:
    while block := source.read(1 << 16):
        limit -= len(block)
        if limit < 0:
            raise ValueError(f"{what}: more than {_LARGEST:,} bytes; refused")
        target.write(block)


def unpack(archive: Path, folder: Path) -> None:
    """Write train.txt, valid.txt and test.txt of a zip or tar archive into `folder`. Nothing else of it is written, and no path of it used.

    Raises `ValueError` for an archive that is broken, lacks a text or has it twice, or names a path outside itself.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                _pick(archive, folder, [(i.filename, not i.is_dir()) for i in opened.infolist()], opened.open)
        else:
            with tarfile.open(archive) as opened:
                members = list(opened)
                links = [m.name for m in members if not (m.isfile() or m.isdir())]
                if links:
                    raise ValueError(f"{archive.name}: {links[0]!r} is a link or device; refused")
                _pick(archive, folder, [(m.name, m.isfile()) for m in members], opened.extractfile)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, RuntimeError, NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk: bz2's, of its data, has none
            raise
        raise ValueError(f"{archive.name}: no archive that can be read ({(str(error) or type(error).__name__).splitlines()[0]})") from None


def _pick(archive: Path, folder: Path, members: list[tuple[str, bool]], opener) -> None:
    """`members`: names, and whether they are files."""
    for name, _ in members:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", name):
            raise ValueError(f"{archive.name}: it names {name!r}, a path outside the archive; refused")
    for split in SPLITS:
        found = [name for name, is_file in members if is_file and PurePosixPath(name).name in names(split)]
        if len(found) != 1:
            raise ValueError(f"{archive.name}: {'several files' if found else 'no file'} called {' or '.join(names(split))}")
        with opener(found[0]) as source, open(folder / f"{split}.txt", "wb") as target:
            _copy(source, target, f"{archive.name}: {found[0]}", _LARGEST)
