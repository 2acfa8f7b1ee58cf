"""What a benchmark runs on, the most that it could do there, and how long something took."""

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
    """The options of a benchmark whose steps take turns; `results`: where `--save` keeps them."""
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="what the versions run on, and what the peak is of")
    parser.add_argument("--save", nargs="?", type=Path, const=results, help=f"write JSON (default {results.name})")


def use(options) -> None:
    """What is made from here on is on the chosen device."""
    torch.set_num_threads(options.threads)
    if options.device == "gpu":
        torch.set_default_device("cuda")


def made(script: str, arguments: list[str] | None, **more) -> dict:
    """By which command, when and where, and with what more; `script`: its `__file__`, `arguments`: those that its `main` was given."""
    return {"command": f"python benchmarks/{Path(script).name} " + " ".join(sys.argv[1:] if arguments is None else arguments),
            "date": date.today().isoformat(), "machine": machine(), **more}


def keep(path: Path | None, found: dict) -> None:
    """Writes what was found, where it is to be saved."""
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
    """Of one call, to the end of what it has started on a GPU; of what it counts itself, where it returns that."""
    _wait()
    start = time.perf_counter()
    counted = step()
    _wait()
    return time.perf_counter() - start if counted is None else counted


TURN = 0.05
"""Seconds of a turn, at least: a step of a few milliseconds is repeated, since it begins with what the one before it has left in the caches."""


def turn(step) -> float:
    """Shortest seconds of a step in one turn."""
    best, spent = float("inf"), 0.0
    while spent < TURN:
        took = seconds(step)
        best, spent = min(best, took), spent + took
    return best


def shortest(steps: dict, rounds: int) -> dict[str, float]:
    """Shortest seconds of each, taking turns, after one turn to warm up."""
    best = dict.fromkeys(steps, float("inf"))
    for round_ in range(rounds + 1):
        for name, step in steps.items():
            took = turn(step)
            if round_:
                best[name] = min(best[name], took)
    return best


def gemm_peak(repeats: int = 5) -> float:
    """FLOP/s of the best of several torch.mm shapes, squares and those of the cell and of the decoder at the paper's size, and of the package's own
    product, which is the faster one where the BLAS leaves registers of the machine unused (MKL, of AVX-512, on processors not Intel's)."""
    best = 0.0
    for m, k, n in ((1024,) * 3, (2048,) * 3, (3072,) * 3, (256, 300, 4800), (8960, 300, 600), (512, 300, 10000)):
        a, b, c = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
        best = max(best, 2 * m * k * n / shortest({"mm": functools.partial(_multiply, a, b, c)}, repeats)["mm"])
    return best if on_gpu() else max(best, _own_product(torch.get_num_threads()))


def _own_product(threads: int) -> float:
    """FLOP/s of `product.h` in float32 on so many threads at once, the best few milliseconds of half a second; 0 without a compiler."""
    from nni_darts_rnn import extension

    if not extension.available():
        return 0.0
    function = _compiled_product()
    with ThreadPoolExecutor(threads) as pool:  # a foreign function leaves the interpreter to others
        return sum(pool.map(function, [0.5] * threads, [0.0] * threads))


class Products:
    """As much arithmetic as a step has, in matrix products alone: the package's own, from cache, or torch.mm without a compiler. What the machine
    does over so many seconds is less than its best few milliseconds, by as much as others on it take."""

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
    """benchmarks/product.cpp: (seconds, flops) -> FLOP/s of its best few milliseconds, once both have passed."""
    from nni_darts_rnn import extension

    with tempfile.TemporaryDirectory() as folder:
        target, source = Path(folder, "product.so"), Path(__file__).with_name("product.cpp")
        subprocess.run([*extension._compiler(), *extension._flags(), "-shared", f"-I{extension.SOURCES}", str(source), "-o", str(target)], check=True)
        function = ctypes.CDLL(str(target)).product_flops
    function.argtypes, function.restype = [ctypes.c_double] * 2, ctypes.c_double
    return function


def _multiply(a, b, c) -> None:
    torch.mm(a, b, out=c)


def peak_gb() -> float:
    """The most memory that this process has had: resident, or allocated on the GPU."""
    if on_gpu():
        return torch.cuda.max_memory_allocated() / 1e9
    # ru_maxrss would count the parent's memory from before exec
    high = next((line for line in _lines("/proc/self/status") if line.startswith("VmHWM")), None)  # kB
    return (int(high.split()[1]) if high else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e6


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
