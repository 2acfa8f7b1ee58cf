"""What the benchmarks share: the machine they run on, its peak speed, the time and memory that something takes, and how results are stored."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import torch


def add_options(parser, results: Path) -> None:
    """Add the options of a benchmark whose steps take turns. `results` is the file that `--save` writes by default."""
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="what the versions run on, and what the peak is of")
    parser.add_argument("--save", nargs="?", type=Path, const=results, help=f"write JSON (default {results.name})")


def use(options) -> None:
    """Set the number of threads, and make new tensors on the chosen device from here on."""
    torch.set_num_threads(options.threads)
    if options.device == "gpu":
        torch.set_default_device("cuda")


def made(script: str, arguments: list[str] | None, **more) -> dict:
    """How a result was made: the command, the date, the machine, and `more`.

    `script` is the benchmark's `__file__`. `arguments` are those that its `main` was given; None means those of this process.
    """
    return {"command": f"python benchmarks/{Path(script).name} " + " ".join(sys.argv[1:] if arguments is None else arguments),
            "date": date.today().isoformat(), "machine": machine(), **more}


def keep(path: Path | None, found: dict) -> None:
    """Write `found` to `path` as JSON, unless `path` is None."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n")


def on_gpu() -> bool:
    return torch.get_default_device().type == "cuda"


def machine() -> dict:
    model = next((line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__, "system": platform.platform(),
            **({"gpu": torch.cuda.get_device_name()} if on_gpu() else {})}


def _wait() -> None:
    if on_gpu():
        torch.cuda.synchronize()


def seconds(step) -> float:
    """Seconds of one call of `step`, until the work that it started on a GPU has ended. If the call returns a number, that counts instead."""
    _wait()
    start = time.perf_counter()
    counted = step()
    _wait()
    return time.perf_counter() - start if counted is None else counted


TURN = 0.05
"""The least seconds of a turn. A step of a few milliseconds is repeated, because its first run finds in the caches what the step before it left there."""


def turn(step) -> float:
    """The shortest run of a step in one turn, in seconds."""
    best, spent = float("inf"), 0.0
    while spent < TURN:
        took = seconds(step)
        best, spent = min(best, took), spent + took
    return best


def shortest(steps: dict, rounds: int) -> dict[str, float]:
    """The shortest run of each step in seconds. The steps take turns, and the first turn of each only warms up."""
    best = dict.fromkeys(steps, float("inf"))
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            took = turn(step)
            if round_:
                best[name] = min(best[name], took)
    return best


def gemm_peak(repeats: int = 5) -> float:
    """The most FLOP/s that matrix products in float32 reach: those of torch.mm, and on a CPU also the package's own.

    torch.mm is tried with square shapes and with those of the cell and of the decoder at the paper's size. The package's own product is the faster one where
    the BLAS leaves registers of the machine unused, as MKL does with those of AVX-512 on processors that are not Intel's.
    """
    best = 0.0
    for m, k, n in ((1024,) * 3, (2048,) * 3, (3072,) * 3, (256, 300, 4800), (8960, 300, 600), (512, 300, 10000)):
        a, b, c = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
        best = max(best, 2 * m * k * n / shortest({"mm": functools.partial(_multiply, a, b, c)}, repeats)["mm"])
    return best if on_gpu() else max(best, _own_product(torch.get_num_threads()))


def _own_product(threads: int) -> float:
    """FLOP/s of the product of `product.h` in float32 on `threads` threads at once: the best few milliseconds of half a second. 0 without a compiler."""
    from nni_darts_rnn import extension

    if not extension.available():
        return 0.0
    function = _compiled_product()
    with ThreadPoolExecutor(threads) as pool:  # ctypes releases the interpreter lock during a call
        return sum(pool.map(function, [0.5] * threads, [0.0] * threads))


class Products:
    """As much arithmetic as a step has, in matrix products alone: the package's own on data in the caches, or torch.mm on a GPU or without a compiler.

    Over the seconds of a whole step the machine does less than in its best few milliseconds. The difference is what other processes take.
    """

    def __init__(self, flops: float):
        from nni_darts_rnn import extension

        self.flops, self.threads = flops, torch.get_num_threads()
        self.own = not on_gpu() and extension.available() and _compiled_product()

    def __call__(self, *_) -> None:
        if not self.own:
            a, b, c = (torch.zeros(2048, 2048) for _ in range(3))
            for _ in range(max(1, round(self.flops / (2 * 2048**3)))):
                _multiply(a, b, c)
            return
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(self.own, [0.0] * self.threads, [self.flops / self.threads] * self.threads))


@functools.lru_cache(maxsize=1)
def _compiled_product():
    """The function of benchmarks/product.cpp, built now: (seconds, flops) -> FLOP/s of its best few milliseconds. It runs until both have passed."""
    from nni_darts_rnn import build

    with tempfile.TemporaryDirectory() as folder:
        target, source = Path(folder, "product.so"), Path(__file__).with_name("product.cpp")
        subprocess.run([*build.compiler(), *build.flags(), "-shared", f"-I{build.SOURCES}", str(source), "-o", str(target)], check=True)
        function = ctypes.CDLL(str(target)).product_flops
    function.argtypes, function.restype = [ctypes.c_double] * 2, ctypes.c_double
    return function


def _multiply(a, b, c) -> None:
    torch.mm(a, b, out=c)


def peak_gb() -> float:
    """The most memory that this process has held, in GB: allocated on the GPU if tensors are made there, else resident."""
    if on_gpu():
        return torch.cuda.max_memory_allocated() / 1e9
    # ru_maxrss also counts the parent's memory from before exec
    high = next((line for line in _lines("/proc/self/status") if line.startswith("VmHWM")), None)  # kB
    return (int(high.split()[1]) if high else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e6


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
