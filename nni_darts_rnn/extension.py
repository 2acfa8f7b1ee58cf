"""Whether this process uses the compiled extension, `csrc/`, or the GPU's kernels.

Which cells a process uses must not depend on what an earlier process left in the cache. So the extension is used only after a call of `enable` or `prepare`,
or with NNI_DARTS_RNN_FUSED=1; NNI_DARTS_RNN_FUSED=0 turns it off. `build.py` compiles it on first use.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
import warnings

import torch
from torch import Tensor

from .build import Unavailable, load, processor
from .exports import Library

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


def prepare(saving: float, device: torch.device | str = "cpu") -> bool:
    """Use the extension from now on if `saving`, the seconds that it saves a run, is more than a build costs, else not. Returns whether it is in use.

    That number alone decides, neither the cache nor what ran before. A choice made with `enable` stays. A run on a GPU has no use for the extension.
    """
    State.gains = torch.device(device).type == "cpu" and saving > BUILD_SECONDS
    return enabled()


def saved_seconds(T: int, B: int, H: int, N: int, passes: float, mixed: bool) -> float:
    """An estimate from sizes alone, for `prepare`: the seconds that the extension saves `passes` forward passes of the mixed cell, or of a discrete one, on two
    cores. A training step is 3 passes (a search step: `SearchRecipe.passes`).

    It counts element-wise work, which the extension does while a product's result is in cache, and torch's calls. Both are fitted to measured passes of 8 to 300 units.
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
                State.loaded = load()
            except Unavailable as problem:
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
    return State.loaded.rounds if enabled() else "amx_bf16" in processor().split()
