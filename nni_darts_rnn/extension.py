"""The compiled extension, `csrc/`: when a process uses it, and how it is built, cached, loaded and checked.

Which cells a process uses must not depend on what an earlier process left in the cache. So the extension is used only after a call of `enable` or `prepare`,
or with NNI_DARTS_RNN_FUSED=1; NNI_DARTS_RNN_FUSED=0 turns it off. It is compiled on first use (six seconds on new machines, up to twenty on older ones)
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
"""What the fast path must save before `prepare` turns it on. It lies between the cost of a build on two new cores, 6 s, and on older ones, up to 20."""

SWITCH = "NNI_DARTS_RNN_FUSED"


class State:
    """What this process has decided and loaded."""

    on: bool | None = None  # the user's choice; None, no choice: the GPU's kernels are used, and the extension where a run gains from it
    gains = False  # whether the run at hand gains from the extension
    forced_off = 0  # depth of `reference()`
    loaded: Library | None = None
    problem: str | None = None  # why there is no library although one was asked for
    told: set[str] = set()  # hints and problems that the user has been told
    loading = threading.RLock()  # held while the extension is looked for, built and checked: for the check it is in `loaded` already


def enable(on: bool = True) -> bool:
    """Use the extension from now on in this process, and build it if need be. With `on=False`, use neither the extension nor the GPU's kernels.
    Returns whether the extension is in use."""
    State.on = bool(on)
    return enabled()


def prepare(saved_seconds: float, device: torch.device | str = "cpu") -> bool:
    """Use the extension from now on if the seconds that it saves a run are more than a build costs, else not. Returns whether it is in use.

    That number alone decides, neither the cache nor what ran before. A choice made with `enable` stays. A run on a GPU has no use for the extension.
    """
    State.gains = torch.device(device).type == "cpu" and saved_seconds > BUILD_SECONDS
    return enabled()


def saved_seconds(T: int, B: int, H: int, N: int, passes: float, mixed: bool) -> float:
    """An estimate from sizes alone, for `prepare`: the seconds that the extension saves `passes` forward passes of the mixed cell, or of a discrete one, on two
    cores. A training step is 3 passes (a search step: `SearchRecipe.passes`).

    It counts what becomes element-wise work within a product, and torch's calls. Both are fitted to measured passes of 64 to 300 units.
    """
    edges, call = (N * (N + 1) // 2, 200e-6) if mixed else (N, 65e-6)
    return passes * (T * B * H * edges * 10e-9 + T * N * call)


@contextlib.contextmanager
def reference():
    """Within the context, everything runs in its readable form, which has derivatives of any order."""
    State.forced_off += 1
    try:
        yield
    finally:
        State.forced_off -= 1


def enabled() -> bool:
    """Whether the extension is asked for and available."""
    switch = _switch()
    asked = State.gains if State.on is None else State.on
    return switch != "0" and (asked or switch == "1") and available()


def _switch() -> str | None:
    """The value of the environment variable, or None; `ValueError` with one line for a value that is neither on nor off."""
    switch = os.environ.get(SWITCH)
    if switch not in (None, "", "0", "1"):
        raise ValueError(f"{SWITCH}: {switch!r} must be 0 (off) or 1 (on)")
    return switch


def available() -> bool:
    """Whether the extension is there. It is built now if need be."""
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
    """Whether the GPU's kernels apply to this tensor: on a GPU, and on a CPU where Triton interprets them."""
    return tensor.is_cuda or (tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def gpu_ready(tensor: Tensor) -> bool:
    """Whether the GPU's kernels can be used. They need no `enable`: Triton comes with torch. The first run on a machine compiles them, in some seconds.

    They cannot be used while somebody records a CUDA graph: its replays would write to a `Plan`'s memory, which by then belongs to another pass, or is free.
    """
    wanted = _switch() != "0" and State.on is not False
    if not (wanted and _has_triton()):
        return False
    return not tensor.is_cuda or (torch.cuda.get_device_capability(tensor.device) >= (7, 0) and not torch.cuda.is_current_stream_capturing())


@functools.lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_not(device: torch.device | str = "cpu", precision: str = "float32") -> str | None:
    """One line that says what would make this process faster on `device`, or why this `precision` would not; None if there is nothing to say."""
    if _switch() == "0":
        return f"the fast path is turned off by {SWITCH}=0"
    if torch.device(device).type == "cuda":
        return None if _has_triton() else "Triton is not installed; install it for searches 8 to 19 times as fast on a GPU"
    if precision == "bfloat16" and not rounds(device):
        return "precision bfloat16 would gain nothing here: a processor with AMX, Linux and a compiler that knows it (g++ from 11 on) are needed; products keep all digits"
    return State.problem


def rounds(device: torch.device | str) -> bool:
    """Whether a training in bfloat16 computes its products in bfloat16 on `device`: on a GPU, and where the processor has tiles for them. Without tiles they
    take longer than float32's, whether compiled or torch's own."""
    if torch.device(device).type != "cpu":
        return True
    return State.loaded.rounds if enabled() else "amx_bf16" in _processor().split()


class _Unavailable(Exception):
    def __init__(self, message: str, unexpected: bool = False):
        super().__init__(message)
        self.unexpected = unexpected


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
def _processor() -> str:
    """The processor's features, on which -march=native depends."""
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
    except (OSError, ValueError):  # the folder cannot be written, or there is no home: build for this process alone
        with tempfile.TemporaryDirectory(prefix="nni_darts_rnn-") as alone:
            return _compile(Path(alone), name)


def _cached(place: Path, name: str) -> Library | None:
    """The library of that name, if it is there and unchanged since it was built: the rest of the file's name is its SHA-256. Loading a damaged library would
    end the process. A library that is no good is deleted, and is then built again."""
    for path in place.glob(f"{name}-*.so"):
        with contextlib.suppress(OSError, _Unavailable):
            if path.stem == f"{name}-{digest(path)[:16]}":
                return _checked(Library(path))
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _compile(place: Path, name: str) -> Library:
    """Compile csrc/*.cpp, with what they include, to a library in `place`. It appears whole or not at all, and only after it was loaded and computed right."""
    compiler = _compiler()
    for killed in place.glob(f".build-{name}-*"):  # left by a process that was killed: the caller holds this name's lock
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
    """Run a command of the compiler."""
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
    """The library, after a check that it computes small cells correctly: a compiler that gets them wrong must not go unnoticed."""
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
