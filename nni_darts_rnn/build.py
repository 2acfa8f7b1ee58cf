"""How the compiled extension, `csrc/`, is built, cached, loaded and checked. It is compiled once for a machine (six seconds on new ones, up to twenty on
older ones) and kept in the user's cache folder. `extension.py` says when."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .exports import Library
from .files import cache_folder, digest, hold

SOURCES = Path(__file__).with_name("csrc")


class Unavailable(Exception):
    """There is no extension, for the reason that the message gives. `unexpected`: not for want of a compiler or of an operating system that has one."""

    def __init__(self, message: str, unexpected: bool = False):
        super().__init__(message)
        self.unexpected = unexpected


def load() -> Library:
    """The extension from the cache, compiled first if it is not there."""
    if os.name != "posix":
        raise Unavailable("the fast cells need Linux or macOS, where searches are 1.4 to 6 times as fast")
    sources = [path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*"))]
    key = "\n".join([*sources, *flags(), *_openmp(), processor(), platform.machine(), torch.__version__])
    name = f"cells-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    try:
        folder = cache_folder()
        library = _cached(folder, name)
        if library is None:
            folder.mkdir(parents=True, exist_ok=True)
            with hold(folder / f"{name}.lock"):
                library = _cached(folder, name) or _compile(folder, name)  # another process may have built it while this one waited
        return library
    except (OSError, ValueError):  # the folder cannot be written, or there is no home: build for this process alone
        with tempfile.TemporaryDirectory(prefix="nni_darts_rnn-") as alone:
            return _compile(Path(alone), name)


def _openmp() -> list[str]:
    """Linker arguments for the OpenMP library that torch has loaded, by its path: a second library would bring a second pool of threads, and both would fight
    over the cores."""
    try:
        maps = os.fsdecode(Path("/proc/self/maps").read_bytes())
    except OSError:
        return ["-fopenmp"]
    files = {line.split(maxsplit=5)[5] for line in maps.splitlines() if len(line.split(maxsplit=5)) == 6}
    loaded = sorted(file for file in files if re.fullmatch(r"/.*/lib(gomp|iomp5|omp)[-.][^/]*", file))
    of_torch = [path for path in loaded if "torch" in path]
    return (of_torch or loaded or ["-fopenmp"])[:1]


@functools.lru_cache(maxsize=1)
def processor() -> str:
    """The processor's features, on which -march=native depends."""
    with contextlib.suppress(OSError):
        for line in os.fsdecode(Path("/proc/cpuinfo").read_bytes()).splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


def compiler() -> list[str]:
    """The C++ compiler as the start of a command: $CXX, or the first that is found."""
    for candidate in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        try:
            command = shlex.split(candidate or "")
        except ValueError as error:
            raise Unavailable(f"CXX: {candidate!r} is no command ({error})", unexpected=True) from None
        if command and shutil.which(command[0]):
            return command
    raise Unavailable("no C++ compiler found; install g++ for searches 1.4 to 6 times as fast")


def flags() -> list[str]:
    tuned = ["-march=native", "-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else ["-mcpu=native"]
    return ["-O3", *tuned, "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-fPIC"]


def _cached(place: Path, name: str) -> Library | None:
    """The library of that name, if it is there and unchanged since it was built: the rest of the file's name is its SHA-256. Loading a damaged library would
    end the process. A library that is no good is deleted, and is then built again."""
    for path in place.glob(f"{name}-*.so"):
        with contextlib.suppress(OSError, Unavailable):
            if path.stem == f"{name}-{digest(path)[:16]}":
                return _checked(Library(path))
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _compile(place: Path, name: str) -> Library:
    """Compile csrc/*.cpp, with what they include, to a library in `place`. It appears whole or not at all, and only after it was loaded and computed right."""
    command = compiler()
    for killed in place.glob(f".build-{name}-*"):  # left by a process that was killed: the caller holds this name's lock
        shutil.rmtree(killed, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".build-{name}-", dir=place) as folder:
        linked, compiled = Path(folder, "cells.so"), {path: Path(folder, f"{path.stem}.o") for path in sorted(SOURCES.glob("*.cpp"))}
        with ThreadPoolExecutor() as both:
            list(both.map(_run, ([*command, *flags(), "-c", str(path), "-o", str(result)] for path, result in compiled.items())))
        _run([*command, "-shared", *map(str, compiled.values()), *_openmp(), "-o", str(linked)])
        try:
            library = _checked(Library(linked))
        except OSError as error:
            raise Unavailable(f"the compiled cells cannot be loaded ({_last_line(str(error))})", unexpected=True) from None
        with linked.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(linked, place / f"{name}-{digest(linked)[:16]}.so")
        return library


def _run(command: list[str]) -> None:
    """Run a command of the compiler."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"compiling the fast cells failed ({_last_line(str(error))})", unexpected=True) from None
    if run.returncode:
        lines = run.stderr.splitlines()
        errors = [line for line in lines if "cannot find" in line] or [line for line in lines if "error" in line] or lines or ["no message"]
        raise Unavailable(f"compiling the fast cells failed ({_last_line(errors[0])})", unexpected=True)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:200]


def _checked(library: Library) -> Library:
    """The library, after a check that it computes small cells correctly: a compiler that gets them wrong must not go unnoticed."""
    from . import cell, compiled  # here, since what they import imports this module
    from .extension import State
    from .genotype import Genotype
    from .graph import discrete_graph

    generator, genotype = torch.Generator().manual_seed(0), Genotype((("tanh", 0), ("sigmoid", 0)))
    for dtype, B, H, off in ((torch.float64, 3, 4, 1e-10), (torch.float32, 32 * torch.get_num_threads(), 32, 1e-4)):  # the second in tiles, where there are any
        shapes = (2, B, 2 * H), (B, H), (H, 2 * H), (2, H, 2 * H)
        x, h, W0, Ws = (torch.randn(shape, generator=generator, dtype=dtype, device="cpu") / H**0.5 for shape in shapes)
        State.loaded, before = library, State.loaded
        try:
            got = compiled.run_forward(discrete_graph(genotype), x, h, W0, Ws, None, None, keep=False).outputs
        finally:
            State.loaded = before
        if not torch.allclose(got.double(), cell.discrete_cell(x.double(), h.double(), W0.double(), Ws.double(), genotype), rtol=0, atol=off):
            raise Unavailable("the compiled cells compute wrong numbers on this machine", unexpected=True)
    return library
