"""The compiled extension, `csrc/`: when a process uses it, and how it is built, cached, loaded and checked.

Which cells a process uses must not depend on what an earlier one left in the cache, so the extension is used only once `enable` or `prepare` was
called, or with NNI_DARTS_RNN_FUSED=1; NNI_DARTS_RNN_FUSED=0 turns it off. It is compiled on first use (six seconds on new machines, up to twenty on older ones)
and kept in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from .exports import Library
from .files import cache_folder, digest, hold

SOURCES = Path(__file__).with_name("csrc")
BUILD_SECONDS = 12.0
"""Between what a build costs on two new cores, 6 s, and on older ones, up to 20: what the fast path must save before `prepare` turns it on."""

SWITCH = "NNI_DARTS_RNN_FUSED"


class State:
    """What this process has decided and loaded."""

    on: bool | None = None  # what a user has said; None: nothing, then the GPU's kernels are used, and the extension where a run gains from it
    gains = False  # whether the run at hand does
    forced_off = 0  # depth of `reference()`
    loaded: Library | None = None
    problem: str | None = None  # why there is no library although one was asked for
    told: set[str] = set()  # of what would make this process faster
    loading = threading.RLock()  # held while it is looked for, built and checked, for which it is in `loaded` before all may have it


def enable(on: bool = True) -> bool:
    """Use the extension from now on in this process, building it if need be (or neither it nor the GPU's kernels). Returns whether it is in use."""
    State.on = bool(on)
    return enabled()


def prepare(eager_seconds: float, device: torch.device | str = "cpu") -> bool:
    """Use the extension from now on if a run that takes `eager_seconds` without it saves more than a build costs, else not: decided on that number alone, neither on
    the cache nor on what ran before. After `enable` that stays as it is. Returns whether it is in use.

    A run on a GPU has no use for it.
    """
    State.gains = torch.device(device).type == "cpu" and eager_seconds * 0.3 > BUILD_SECONDS  # it takes a third less time at the paper's size, and half as much or less elsewhere
    return enabled()


def eager_seconds(T: int, B: int, H: int, V: int, N: int, passes: float, edges: int | None = None) -> float:
    """Seconds that `passes` forward passes' worth of work take without the extension on two cores, from sizes alone; for `prepare`.

    A training step is 3 of them (a search step: `SearchRecipe.passes`). `edges` defaults to the mixed cell's N(N+1)/2; a discrete cell has N.
    """
    edges = N * (N + 1) // 2 if edges is None else edges
    flops = 4 * T * B * H * H * (edges + 2) + 2 * T * B * H * V
    return passes * (flops / 120e9 + T * B * H * edges * 10e-9 + T * N * 130e-6)  # GEMMs, element-wise work, calls


@contextlib.contextmanager
def reference():
    """Inside, everything runs in its readable form, of which derivatives of any order exist."""
    State.forced_off += 1
    try:
        yield
    finally:
        State.forced_off -= 1


def enabled() -> bool:
    """Whether the extension is asked for and there."""
    switch = _switch()
    asked = State.gains if State.on is None else State.on
    return switch != "0" and (asked or switch == "1") and available()


def _switch() -> str | None:
    """What the environment says; `ValueError` with one line for what is neither on nor off."""
    switch = os.environ.get(SWITCH)
    if switch not in (None, "", "0", "1"):
        raise ValueError(f"{SWITCH}: {switch!r} must be 0 (off) or 1 (on)")
    return switch


def available() -> bool:
    """Whether the extension is there, built now if need be."""
    if _switch() == "0":
        return False
    with State.loading:
        if State.loaded is None and State.problem is None:
            try:
                State.loaded = _load()
            except _Unavailable as problem:
                State.problem = str(problem)
                if problem.unexpected:
                    State.told.add(State.problem)
                    warnings.warn(f"{State.problem}; the slower cells that need no compiler are used", stacklevel=3)
        return State.loaded is not None


def on_gpu(tensor: Tensor) -> bool:
    """Whether the GPU's kernels are the ones for this tensor: also on a CPU where Triton interprets them."""
    return tensor.is_cuda or (tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def gpu_ready(tensor: Tensor) -> bool:
    """Whether the GPU's kernels can be compiled, which takes some seconds in the first run on a machine. They need no `enable`: Triton comes with torch.

    Not within a CUDA graph that somebody records: its replays would write to a `Plan`'s memory, which by then is another pass's, or free.
    """
    wanted = _switch() != "0" and State.on is not False
    if not (wanted and _has_triton()):
        return False
    return not tensor.is_cuda or (torch.cuda.get_device_capability(tensor.device) >= (7, 0) and not torch.cuda.is_current_stream_capturing())


@functools.lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_not(device: torch.device | str = "cpu", precision: str = "float32") -> str | None:
    """One line that says what would make this process faster on `device`, or why that `precision` does not; None where nothing would."""
    if _switch() == "0":
        return f"the fast path is turned off by {SWITCH}=0"
    if torch.device(device).type == "cuda":
        return None if _has_triton() else "Triton is not installed; install it for searches 8 to 19 times as fast on a GPU"
    if precision == "bfloat16" and not rounds(device):
        return "precision bfloat16 would gain nothing here: a processor with AMX, Linux and a compiler that knows it (g++ from 11 on) are needed; products keep all digits"
    return State.problem


def rounds(device: torch.device | str) -> bool:
    """Whether a training in bfloat16 has its products in it on `device`: on a GPU, and where the processor has tiles for them, without which they take longer than
    float32's, whether compiled or torch's own."""
    if torch.device(device).type != "cpu":
        return True
    return State.loaded.rounds if enabled() else "amx_bf16" in _processor().split()


class _Unavailable(Exception):
    def __init__(self, message: str, unexpected: bool = False):
        super().__init__(message)
        self.unexpected = unexpected


def _openmp() -> list[str]:
    """The OpenMP library that torch has loaded, linked by its path: a second one would bring a second pool of threads to fight over the cores."""
    try:
        maps = os.fsdecode(Path("/proc/self/maps").read_bytes())
    except OSError:
        return ["-fopenmp"]
    files = {line.split(maxsplit=5)[5] for line in maps.splitlines() if len(line.split(maxsplit=5)) == 6}
    loaded = sorted(file for file in files if re.fullmatch(r"/.*/lib(gomp|iomp5|omp)[-.][^/]*", file))
    of_torch = [path for path in loaded if "torch" in path]
    return (of_torch or loaded or ["-fopenmp"])[:1]


@functools.lru_cache(maxsize=1)
def _processor() -> str:
    """What -march=native depends on."""
    with contextlib.suppress(OSError):
        for line in os.fsdecode(Path("/proc/cpuinfo").read_bytes()).splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


def _compiler() -> list[str]:
    """The C++ compiler as the start of a command: $CXX, or the first that is found."""
    for candidate in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        try:
            command = shlex.split(candidate or "")
        except ValueError as error:
            raise _Unavailable(f"CXX: {candidate!r} is no command ({error})", unexpected=True) from None
        if command and shutil.which(command[0]):
            return command
    raise _Unavailable("no C++ compiler found; install g++ for searches 1.4 to 6 times as fast")


def _flags() -> list[str]:
    tuned = ["-march=native", "-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else ["-mcpu=native"]
    return ["-O3", *tuned, "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-fPIC"]


def _load() -> Library:
    """The extension from the cache, compiled first if it is not there."""
    if os.name != "posix":
        raise _Unavailable("the fast cells need Linux or macOS, where searches are 1.4 to 6 times as fast")
    sources = [path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*"))]
    key = "\n".join([*sources, *_flags(), *_openmp(), _processor(), platform.machine(), torch.__version__])
    name = f"cells-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    try:
        folder = cache_folder()
        library = _cached(folder, name)
        if library is None:
            folder.mkdir(parents=True, exist_ok=True)
            with hold(folder / f"{name}.lock"):
                library = _cached(folder, name) or _compile(folder, name)  # another process may have built it while this one waited
        return library
    except (OSError, ValueError):  # a folder that cannot be written, or no home: this process alone then
        with tempfile.TemporaryDirectory(prefix="nni_darts_rnn-") as alone:
            return _compile(Path(alone), name)


def _cached(place: Path, name: str) -> Library | None:
    """The library of that name, if it is there and as it was when it was built: the rest of its name is the file's SHA-256. Loading a damaged one would
    end the process. What is no good goes, and is built again."""
    for path in place.glob(f"{name}-*.so"):
        with contextlib.suppress(OSError, _Unavailable):
            if path.stem == f"{name}-{digest(path)[:16]}":
                return _checked(Library(path))
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _compile(place: Path, name: str) -> Library:
    """csrc/*.cpp, with what they include, as a library in `place`, which appears whole or not at all, and only once it was loaded and computes right."""
    compiler = _compiler()
    for killed in place.glob(f".build-{name}-*"):  # while it compiled; who calls holds this name's lock
        shutil.rmtree(killed, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".build-{name}-", dir=place) as folder:
        linked, compiled = Path(folder, "cells.so"), {path: Path(folder, f"{path.stem}.o") for path in sorted(SOURCES.glob("*.cpp"))}
        with ThreadPoolExecutor() as both:
            list(both.map(_run, ([*compiler, *_flags(), "-c", str(path), "-o", str(result)] for path, result in compiled.items())))
        _run([*compiler, "-shared", *map(str, compiled.values()), *_openmp(), "-o", str(linked)])
        try:
            library = _checked(Library(linked))
        except OSError as error:
            raise _Unavailable(f"the compiled cells cannot be loaded ({_last_line(str(error))})", unexpected=True) from None
        with linked.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(linked, place / f"{name}-{digest(linked)[:16]}.so")
        return library


def _run(command: list[str]) -> None:
    """A command of the compiler's."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Unavailable(f"compiling the fast cells failed ({_last_line(str(error))})", unexpected=True) from None
    if run.returncode:
        lines = run.stderr.splitlines()
        errors = [line for line in lines if "cannot find" in line] or [line for line in lines if "error" in line] or lines or ["no message"]
        raise _Unavailable(f"compiling the fast cells failed ({_last_line(errors[0])})", unexpected=True)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:200]


def _checked(library: Library) -> Library:
    """The library, once small cells come out of it right: a compiler that gets them wrong must not go unnoticed."""
    from . import cell, compiled  # here, since compiled imports this module
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
            raise _Unavailable("the compiled cells compute wrong numbers on this machine", unexpected=True)
    return library
