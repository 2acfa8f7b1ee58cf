"""Fetch published corpora once, from a mirror. Checksums are pinned, downloads that break off are continued, and archives are not trusted."""

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
    """Name of a file on the mirror -> its checksum. The files are the three texts, or one archive that holds them."""
    texts: dict[str, str]
    """Split -> checksum of its text, where known. Such texts are then accepted from any archive or folder."""


_PENN = {"train": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
         "valid": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
         "test": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"}

SOURCES = {
    # Mikolov's files, as in his simple-examples.tgz.
    "penn": Source({f"ptb.{split}.txt": _PENN[split] for split in SPLITS}, _PENN),
    # The archives that Merity et al. 2016 published. mlx-data and Julia's CorpusLoaders pin the same checksums.
    "wikitext-2": Source({"wikitext-2-v1.zip": "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c"}, {}),
    "wikitext-103": Source({"wikitext-103-v1.zip": "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590"}, {}),
}

_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
_LARGEST = 2 << 30  # bytes of one download or one text; WikiText-103's training text is 0.54e9
_TRIES = 4
_TIMEOUT = 30  # seconds to wait for the next byte


@contextlib.contextmanager
def made_once(target: Path):
    """Make the folder `target` once. The block is given a new folder and fills it. If the block ends without an error, that folder becomes `target`;
    otherwise it is removed.

    If `target` exists already, the block is given None. Of several processes one does the work while the others wait; the system frees the lock of a
    process that dies. `ValueError` with one line if the cache cannot be written.
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
        if target.is_dir():  # another process has made it in the meantime
            yield None
            return
        shutil.rmtree(new, ignore_errors=True)  # a killed process may have left it
        try:
            new.mkdir()
            yield new
            os.replace(new, target)
        except OSError as error:
            raise ValueError(f"{target}: cannot be written ({error.strerror or error}); {hint}") from None
        finally:
            shutil.rmtree(new, ignore_errors=True)


def find_text(folder: Path, split: str) -> Path | None:
    """The path of the text of `split` in a folder, under one of its usual names, or None."""
    return next((folder / name for name in names(split) if (folder / name).exists()), None)


def names(split: str) -> tuple[str, ...]:
    """The names that the text of `split` may have."""
    return f"{split}.txt", f"ptb.{split}.txt", f"wiki.{split}.tokens"


def check_texts(name: str, folder: Path) -> None:
    """`ValueError` if the folder has a text of the published corpus `name` whose checksum is not the known one."""
    for split, expected in SOURCES[name].texts.items():
        path = find_text(folder, split)
        if path is not None and path.is_file() and digest(path) != expected:
            raise ValueError(f"{path}: not the published {split} text of {name} (its SHA-256 is not {expected[:12]}…); "
                             "for a text of your own give its folder as the corpus")


def fetch(name: str, mirror: str) -> Path:
    """The folder in the cache with train.txt, valid.txt and test.txt of the corpus `name`. They are downloaded from `mirror` if the folder does not exist.

    `mirror` is the URL of a folder with the corpus's published files, or of an archive. It must be https, file, or http of this machine itself. `ValueError`
    with one line if that fails; what has been downloaded by then is kept, and the next call goes on from there.
    """
    source, target, path = SOURCES[name], cache_folder("corpora") / name, urlsplit(check_url(mirror)).path
    if path.endswith(_ARCHIVES):
        file = PurePosixPath(unquote(path)).name
        wanted = {file: (mirror, source.files.get(file))}
        if file not in source.files and not source.texts:
            raise ValueError(f"mirror {mirror!r}: no archive of {name} with a known checksum; give the URL of {', '.join(source.files)}")
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
            finally:  # the parts are now either used or refused, so nobody needs them any more
                for part in parts.values():
                    part.unlink(missing_ok=True)
    return target


def check_url(url: str) -> str:
    """`url` if it is https, file, or http of this machine itself, otherwise `ValueError`."""
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
        check_url(new_url)  # https must not lead to plain http elsewhere
        return super().redirect_request(request, file, code, message, headers, new_url)


def download(url: str, part: Path, sha256: str | None) -> None:
    """Make `part` the file at `url`, continuing what an earlier call left of it. With a `sha256` of None, whoever reads the file has to check it.

    `ValueError` with one line if the server refuses the file, or if the download breaks off again and again (what has come is kept), or if the file is too
    large, is redirected to a URL that is not allowed, or has another checksum (nothing is kept).
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
            except ValueError:  # too large, or redirected to a URL that is not allowed
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
        failure = "wrong checksum after going on with a broken download"  # the first part may be of another file: once more from the beginning
    kept = part.stat().st_size if part.exists() else 0
    raise ValueError(f"{url}: {failure}; {kept:,} bytes are kept and the next call goes on from there")


def _append(opener, url: str, part: Path, have: int) -> int:
    """Append the bytes of `url` from `have` on to `part`, or write it from 0 if the server knows no ranges. Returns the byte at which it began."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = opener.open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: nothing follows byte `have`, so `part` is complete or of another file; the checksum tells
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
    # a connection that closes early looks like the end of the file
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
    """Write train.txt, valid.txt and test.txt of a zip or tar archive into `folder`. Nothing else is unpacked, and no path from the archive is used.

    `ValueError` if the archive is broken, lacks a text or has it twice, holds a link or a device, names a path outside itself, or has a text that is too large.
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
        if isinstance(error, OSError) and error.errno is not None:  # an error of the disk; bz2's, about its data, has no errno
            raise
        raise ValueError(f"{archive.name}: no archive that can be read ({(str(error) or type(error).__name__).splitlines()[0]})") from None


def _pick(archive: Path, folder: Path, members: list[tuple[str, bool]], opener) -> None:
    """Write the texts among `members`: (name, whether it is a file)."""
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
