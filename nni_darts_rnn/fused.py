"""The fast path: both cells over a whole sequence in C++ with a hand-written backward, and cross-entropy without a logits tensor.

`discrete_cell` and `mixed_cell` take and return what `cell.discrete_cell` and `supernet.mixed_cell` do, to rounding. They run `csrc/cells.cpp`
where it applies (CPU, float32 or float64, built-in primitives, plain autograd) and the readable forms elsewhere. Which of the two a process uses
must not depend on what an earlier one left in the cache, so the extension is used only once `enable` or `prepare` was called, or with
NNI_DARTS_RNN_FUSED=1; NNI_DARTS_RNN_FUSED=0 turns it off. It is compiled on first use (about five seconds) and kept in the user's cache folder.
A second derivative (`create_graph=True`) is taken through the readable form by itself; `reference()` avoids the detour where that is known before.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cell, supernet
from .genotype import PRIMITIVES, Genotype

SOURCE = Path(__file__).with_name("csrc") / "cells.cpp"
OPS = ("tanh", "relu", "sigmoid", "identity")  # the enum Op of cells.cpp; the mixture of all four comes next
MIX = len(OPS)
BUILD_SECONDS = 8.0
"""What a build costs at most on two cores, and so what the fast path must save before `prepare` turns it on."""

SWITCH = "NNI_DARTS_RNN_FUSED"
_CHUNK = {"cpu": 1 << 22, "cuda": 1 << 26}  # numbers in one block of logits: the CPU's cache, and enough for a GPU to be busy


class _State:
    """What this process has decided and loaded."""

    on = False
    forced_off = 0  # depth of `reference()`
    library: _Library | None = None
    problem: str | None = None  # why there is no library although one was asked for
    spare: list[Tensor] = []  # one workspace of a finished pass, for the next one: fresh pages cost as much as the arithmetic on them


# --- when it is used ---------------------------------------------------------------------------------------------------------------------------


def enable(on: bool = True) -> bool:
    """Use the extension from now on in this process, building it if need be (or stop using it). Returns whether it is in use."""
    _State.on = bool(on)
    return enabled()


def release() -> None:
    """Give back the memory that is kept from one sequence for the next, as large as the longest needed."""
    _State.spare.clear()


def prepare(eager_seconds: float) -> bool:
    """`enable` if a run that takes `eager_seconds` without it saves more than a build costs: decided on that number alone, not on the cache."""
    if eager_seconds * 0.5 > BUILD_SECONDS:  # at least twice as fast at every size
        enable()
    return enabled()


def eager_seconds(T: int, B: int, H: int, V: int, N: int, passes: float, edges: int | None = None) -> float:
    """Seconds that `passes` forward passes' worth of work take with the readable cells on two cores, from sizes alone; for `prepare`.

    A search step is 13 of them, a training step 3. `edges` defaults to the mixed cell's N(N+1)/2; a discrete cell has N.
    """
    edges = N * (N + 1) // 2 if edges is None else edges
    flops = 4 * T * B * H * H * (edges + 2) + 2 * T * B * H * V
    return passes * (flops / 120e9 + T * B * H * edges * 10e-9 + T * N * 130e-6)  # GEMMs, element-wise work, calls


@contextlib.contextmanager
def reference():
    """Inside, everything runs in its readable form, of which derivatives of any order exist."""
    _State.forced_off += 1
    try:
        yield
    finally:
        _State.forced_off -= 1


def enabled() -> bool:
    """Whether the extension is asked for and there."""
    switch = os.environ.get(SWITCH)
    return switch != "0" and (_State.on or switch == "1") and available()


def available(build: bool = True) -> bool:
    """Whether the extension is there; `build=False` only loads what an earlier process compiled."""
    if os.environ.get(SWITCH) == "0":
        return False
    if _State.library is None and _State.problem is None:
        try:
            _State.library = _load(build)
        except _Unavailable as problem:
            _State.problem = str(problem)
            if problem.unexpected:
                warnings.warn(f"{_State.problem}; the slower readable cells are used", stacklevel=3)
    return _State.library is not None


def why_not() -> str | None:
    """One line that says what would make this process faster, or None where nothing would."""
    if os.environ.get(SWITCH) == "0":
        return f"the fast path is turned off by {SWITCH}=0"
    return _State.problem


# --- compiling and loading ---------------------------------------------------------------------------------------------------------------------


class _Unavailable(Exception):
    def __init__(self, message: str, unexpected: bool = False):
        super().__init__(message)
        self.unexpected = unexpected


class _Cell(ctypes.Structure):
    """struct Cell of cells.cpp; shapes are given there."""

    _fields_ = ([(name, ctypes.c_int64) for name in ("steps", "batch", "hidden", "nodes", "edges", "threads", "normalise", "keep")]
                + [("eps", ctypes.c_double)]
                + [(name, ctypes.c_void_p) for name in (
                    "order", "first", "count", "incoming", "source", "slot", "op", "gemm",
                    "x_proj", "h0", "W0_h", "Ws", "mask", "p", "present", "average",
                    "pre0", "pre", "states", "masked", "previous", "outputs", "scale", "W_cat", "W_back", "W0_back",
                    "d_outputs", "d_states", "scratch", "carry", "d_h", "d_h0", "d_W0_h", "d_Ws", "d_W_cat", "d_p")])


class _Library:
    """The loaded extension: `forward[dtype]`, `backward[dtype]`, `softmax_rows[dtype]`, and BLAS's `gemm[dtype]` as an address."""

    def __init__(self, path: Path):
        library = ctypes.CDLL(str(path))
        library.cell_struct_size.restype = ctypes.c_int64
        if library.cell_struct_size() != ctypes.sizeof(_Cell):
            raise OSError(f"{path.name} does not fit this version of fused.py")
        self.forward, self.backward, self.softmax_rows, self.gemm = {}, {}, {}, {}
        for dtype, name, blas in ((torch.float32, "float", "sgemm_"), (torch.float64, "double", "dgemm_")):
            self.gemm[dtype] = _blas(blas)
            for table, function in ((self.forward, "cell_forward_"), (self.backward, "cell_backward_")):
                table[dtype] = getattr(library, function + name)
                table[dtype].argtypes, table[dtype].restype = [ctypes.POINTER(_Cell)], None
            rows = getattr(library, "softmax_rows_" + name)
            rows.argtypes = [ctypes.c_int64] * 2 + [ctypes.c_void_p] * 3 + [ctypes.c_double, ctypes.c_void_p, ctypes.c_int64]
            rows.restype = ctypes.c_int64
            self.softmax_rows[dtype] = rows


def _blas(name: str) -> int:
    """The address of a BLAS function in the library that torch itself multiplies with, so that both share one pool of threads."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        with contextlib.suppress(OSError, AttributeError):
            return ctypes.cast(getattr(ctypes.CDLL(str(path)), name), ctypes.c_void_p).value
    raise _Unavailable("this build of torch exports no BLAS, which the fast cells need; torch from PyPI does (about 5x faster searches)")


def _openmp() -> list[str]:
    """The OpenMP library that torch has loaded, linked by its path: a second one would bring a second pool of threads to fight over the cores."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return ["-fopenmp"]
    loaded = sorted(set(re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)[-.][^/\s]*)$", maps, re.MULTILINE)))
    of_torch = [path for path in loaded if "torch" in path]
    return (of_torch or loaded or ["-fopenmp"])[:1]


def _processor() -> str:
    """What -march=native depends on."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


def _compiler() -> list[str]:
    """The C++ compiler as the start of a command: $CXX, or the first that is found."""
    for candidate in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        command = shlex.split(candidate or "")
        if command and shutil.which(command[0]):
            return command
    raise _Unavailable("no C++ compiler found; install g++ for about 5x faster searches")


def _flags() -> list[str]:
    tuned = ["-march=native", "-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else ["-mcpu=native"]
    return ["-O3", *tuned, "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC"]


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nni_darts_rnn"


def _load(build: bool) -> _Library:
    """The extension from the cache, compiled first if it is not there."""
    if os.name != "posix":
        raise _Unavailable("the fast cells need Linux or macOS; there searches are about 5x faster")
    key = hashlib.sha256("\n".join([SOURCE.read_text(), *_flags(), *_openmp(), _processor(), platform.machine(), torch.__version__]).encode())
    name = f"cells-{key.hexdigest()[:16]}.so"
    with contextlib.ExitStack() as stack:
        try:
            folder = _cache_folder()
            if not (folder / name).exists():
                if not build:
                    raise _Unavailable("the fast cells are not compiled yet")
                folder.mkdir(parents=True, exist_ok=True)
                with _locked(folder / f"{name}.lock"):
                    if not (folder / name).exists():  # another process may have built it while this one waited
                        _compile(folder / name)
        except (OSError, RuntimeError):  # a folder that cannot be written, or no home: this process alone then
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nni_darts_rnn-")))
            _compile(folder / name)
        try:
            return _checked(_Library(folder / name))
        except OSError as error:
            raise _Unavailable(f"the compiled cells cannot be loaded ({_last_line(str(error))})", unexpected=True) from None


@contextlib.contextmanager
def _locked(path: Path):
    """One process at a time; the lock goes with the process that holds it."""
    import fcntl  # not on Windows, where this is not reached

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(target: Path) -> None:
    """cells.cpp -> target, which appears whole or not at all."""
    compiler = _compiler()
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as folder:
        compiled, linked = Path(folder, "cells.o"), Path(folder, "cells.so")
        for command in ([*compiler, *_flags(), "-c", str(SOURCE), "-o", str(compiled)],
                        [*compiler, "-shared", str(compiled), *_openmp(), "-o", str(linked)]):
            try:
                run = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise _Unavailable(f"compiling the fast cells failed ({_last_line(str(error))})", unexpected=True) from None
            if run.returncode:
                errors = [line for line in run.stderr.splitlines() if "error" in line] or run.stderr.splitlines() or ["no message"]
                raise _Unavailable(f"compiling the fast cells failed ({_last_line(errors[0])})", unexpected=True)
        os.replace(linked, target)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:200]


def _checked(library: _Library) -> _Library:
    """The library, once a tiny cell comes out of it right: a BLAS with other conventions must not go unnoticed."""
    generator = torch.Generator().manual_seed(0)
    x, h, W0, Ws = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 3, 8), (3, 4), (4, 8), (2, 4, 8)))
    genotype = Genotype((("tanh", 0), ("sigmoid", 0)))
    _State.library, before = library, _State.library
    try:
        got = _run_forward(discrete_graph(genotype), x, h, W0, Ws, None, None, keep=False).outputs
    finally:
        _State.library = before
    if not torch.allclose(got, cell.discrete_cell(x, h, W0, Ws, genotype), rtol=0, atol=1e-10):
        raise _Unavailable("the compiled cells compute wrong numbers on this machine", unexpected=True)
    return library


# --- the cells ---------------------------------------------------------------------------------------------------------------------------------


class Graph(NamedTuple):
    """The edges of a cell as cells.cpp reads them."""

    n_nodes: int
    mixed: bool
    average: tuple[float, ...]  # (N+1)
    n_edges: int
    arrays: dict[str, ctypes.Array]  # order, first, count (N), incoming (N+1), source, slot, op (E)

    @classmethod
    def of(cls, edges: list[tuple[int, int, int]], order: list[int], concat: tuple[int, ...], n_nodes: int) -> Graph:
        """From edges (node, state it reads, op), node by node; `order` has the nodes that read one state side by side."""
        columns = [sorted(order.index(node) for node, j, _ in edges if j == state) for state in range(n_nodes)]
        first = [c[0] if c else 0 for c in columns]
        integers = {
            "order": [node - 1 for node in order],
            "first": first,
            "count": [len(c) for c in columns],
            "incoming": [sum(node <= i for node, _, _ in edges) for i in range(n_nodes + 1)],
            "source": [j for _, j, _ in edges],
            "slot": [order.index(node) - first[j] for node, j, _ in edges],
            "op": [op for _, _, op in edges],
        }
        average = tuple(1 / len(concat) if i in concat else 0.0 for i in range(n_nodes + 1))
        arrays = {name: (ctypes.c_int64 * len(values))(*values) for name, values in integers.items()}
        return cls(n_nodes, edges[0][2] == MIX, average, len(edges), arrays)


@functools.lru_cache(maxsize=64)
def mixed_graph(n_nodes: int) -> Graph:
    """Every node reads every earlier state, each through all nonlinearities."""
    nodes = range(1, n_nodes + 1)
    return Graph.of([(i, j, MIX) for i in nodes for j in range(i)], list(nodes), tuple(nodes), n_nodes)


@functools.lru_cache(maxsize=64)
def discrete_graph(genotype: Genotype) -> Graph:
    """One edge a node."""
    edges = [(node, j, OPS.index(op)) for node, (op, j) in enumerate(genotype.recurrent, start=1)]
    order = sorted(range(1, genotype.n_nodes + 1), key=lambda node: (genotype.recurrent[node - 1][1], node))
    return Graph.of(edges, order, genotype.concat, genotype.n_nodes)


def discrete_cell(x_proj: Tensor, h0: Tensor, W0_h: Tensor, Ws: Tensor, genotype: Genotype, mask: Tensor | None = None) -> Tensor:
    """`cell.discrete_cell`, the fast way where it applies."""
    if not (_applies(x_proj, h0, W0_h, Ws, mask) and len(Ws) == genotype.n_nodes and all(map(_built_in, (op for op, _ in genotype.recurrent)))):
        return cell.discrete_cell(x_proj, h0, W0_h, Ws, genotype, mask)
    if _needs_graph(x_proj, h0, W0_h, Ws):
        readable = functools.partial(_readable_discrete, genotype)
        return _CellFunction.apply(discrete_graph(genotype), None, readable, x_proj, h0, W0_h, Ws, None, mask)
    return _run_forward(discrete_graph(genotype), x_proj, h0, W0_h, Ws, None, mask, keep=False).outputs


def mixed_cell(x_proj: Tensor, h0: Tensor, W0_h: Tensor, Ws: Tensor, probabilities: Tensor, mask: Tensor | None = None,
               primitives=PRIMITIVES) -> Tensor:
    """`supernet.mixed_cell`, the fast way where it applies."""
    names = [name for name in primitives if name != "none"]
    n = len(Ws)
    if not (_applies(x_proj, h0, W0_h, Ws, mask, probabilities) and names and all(map(_built_in, names)) and len(set(names)) == len(names)
            and probabilities.shape == (n * (n + 1) // 2, len(primitives))):
        return supernet.mixed_cell(x_proj, h0, W0_h, Ws, probabilities, mask, primitives)
    places = tuple((k, OPS.index(name)) for k, name in enumerate(primitives) if name != "none")
    if _needs_graph(x_proj, h0, W0_h, Ws, probabilities):
        readable = functools.partial(_readable_mixed, tuple(primitives))
        return _CellFunction.apply(mixed_graph(n), places, readable, x_proj, h0, W0_h, Ws, probabilities, mask)
    return _run_forward(mixed_graph(n), x_proj, h0, W0_h, Ws, _mixture(probabilities, places), mask, keep=False).outputs


def _readable_discrete(genotype, x_proj, h0, W0_h, Ws, probabilities, mask):
    return cell.discrete_cell(x_proj, h0, W0_h, Ws, genotype, mask)


def _readable_mixed(primitives, x_proj, h0, W0_h, Ws, probabilities, mask):
    return supernet.mixed_cell(x_proj, h0, W0_h, Ws, probabilities, mask, primitives)


def _built_in(op: str) -> bool:
    """Whether `op` is computed as the package computes it, not by something registered under its name."""
    function = cell.ACTIVATIONS.get(op)
    return op in OPS and (function is getattr(torch, op, None) or getattr(function, "__module__", "") == cell.__name__)


def _applies(x_proj: Tensor, h0: Tensor, W0_h: Tensor, Ws: Tensor, mask: Tensor | None, *others: Tensor) -> bool:
    """Whether cells.cpp can take these tensors. Shapes that do not fit are left to the readable form and its error messages."""
    if _State.forced_off or not enabled() or not _plain():
        return False
    tensors = [x_proj, h0, W0_h, Ws, *others, *([] if mask is None else [mask])]
    if x_proj.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled("cpu") or torch.overrides.has_torch_function(tensors):
        return False
    if any(t.device.type != "cpu" or t.dtype != x_proj.dtype or t.layout != torch.strided or t.numel() == 0 for t in tensors):
        return False
    if h0.dim() != 2 or x_proj.dim() != 3 or Ws.dim() != 3 or (mask is not None and (mask.requires_grad or mask.shape != h0.shape)):
        return False
    B, H = h0.shape
    return (x_proj.shape[1:] == (B, 2 * H) and W0_h.shape == (H, 2 * H) and Ws.shape[1:] == (H, 2 * H)
            and max(len(x_proj) * B, 2 * len(Ws) * H) < 2**31)  # BLAS counts in 32 bits


def _plain() -> bool:
    """Not under torch.compile or a torch.func transform, which must see through what is computed."""
    return not torch.compiler.is_compiling() and not getattr(torch._C, "_are_functorch_transforms_active", lambda: False)()


def _needs_graph(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


class _Forward(NamedTuple):
    """What a forward pass leaves: its results, and the buffers the backward pass reads."""

    outputs: Tensor  # (T, B, H)
    workspace: Tensor  # the memory of the larger buffers
    buffers: dict[str, Tensor | None]  # by the names that cells.cpp has for them


def _mixture(probabilities: Tensor, places: tuple[tuple[int, int], ...]) -> Tensor:
    """probabilities (E, K) -> (E, 4), in the order of OPS; an absent primitive has probability 0."""
    p = probabilities.new_zeros(len(probabilities), len(OPS))
    for k, place in places:
        p[:, place] = probabilities[:, k]
    return p


def _run_forward(graph: Graph, x_proj: Tensor, h0: Tensor, W0_h: Tensor, Ws: Tensor, p: Tensor | None, mask: Tensor | None,
                 keep: bool) -> _Forward:
    """Run the cell; with `keep` the buffers hold every time step, for `_run_backward`. p (E, 4) for a mixed cell, None for a discrete one."""
    T, B, H, N, E = len(x_proj), *h0.shape, graph.n_nodes, graph.n_edges
    steps, new = (T if keep else 1), x_proj.new_empty
    inputs = {name: t.detach().contiguous() for name, t in (("x_proj", x_proj), ("h0", h0), ("W0_h", W0_h), ("Ws", Ws))}
    workspace, large = _take({"pre": steps * B * E * 2 * H, "states": (N + 1) * steps * B * H, "scale": steps * (N + 1) * H, "W_cat": N * 2 * H * H}
                             | ({"W_back": N * 2 * H * H, "W0_back": 2 * H * H} if keep else {})
                             | ({} if mask is None else {"masked": N * steps * B * H, "previous": steps * B * H}), x_proj.dtype)
    buffers = {
        **inputs, "mask": None if mask is None else mask.detach().contiguous(),
        "p": new(E, 4).zero_() if p is None else p.detach().contiguous(),
        "present": new(E).fill_(1) if p is None else p.detach().sum(1), "average": torch.tensor(graph.average, dtype=x_proj.dtype),
        "pre0": new(steps, B, 2 * H), **large,
    }
    result = _Forward(new(T, B, H), workspace, buffers)
    arguments = _arguments(graph, result, keep)
    _State.library.forward[x_proj.dtype](ctypes.byref(arguments))
    if not keep:
        _give(workspace)
    return result


def _run_backward(graph: Graph, saved: _Forward, d_outputs: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Gradients of x_proj, h0, W0_h, Ws where `needs` says so and d_p (E, 5) or None. Uses up the buffers: pre-activations become their gradients."""
    N, (B, H), new = graph.n_nodes, d_outputs.shape[1:], d_outputs.new_empty
    d_h0, d_W0_h, d_Ws, d_W_cat = (new(shape) if need else None for need, shape in zip(
        (needs[1], needs[2], needs[3], needs[3]), ((B, H), (H, 2 * H), (N, H, 2 * H), (N, H, 2 * H))))
    d_p = torch.zeros(graph.n_edges, 5, dtype=torch.float64) if needs[4] else None
    scratch = {"d_outputs": d_outputs.contiguous(), "d_states": new(N + 1, B, H), "scratch": new(B, H), "carry": new(B, H).zero_(), "d_h": new(B, H)}
    arguments = _arguments(graph, saved, True, **scratch, d_h0=d_h0, d_W0_h=d_W0_h, d_Ws=d_Ws, d_W_cat=d_W_cat, d_p=d_p)
    _State.library.backward[d_outputs.dtype](ctypes.byref(arguments))
    _give(saved.workspace)
    return [saved.buffers["pre0"] if needs[0] else None, d_h0, d_W0_h, d_Ws, d_p]


def _arguments(graph: Graph, run: _Forward, keep: bool, **more: Tensor | None) -> _Cell:
    """The struct that cells.cpp reads. Addresses only: the caller's tensors must outlive the call."""
    tensors = {**run.buffers, "outputs": run.outputs, **more}
    T, B, H = run.outputs.shape
    return _Cell(T, B, H, graph.n_nodes, graph.n_edges, torch.get_num_threads(), graph.mixed, keep, supernet.BATCHNORM_EPS,
                 gemm=_State.library.gemm[run.outputs.dtype], **{name: ctypes.addressof(array) for name, array in graph.arrays.items()},
                 **{name: t.data_ptr() for name, t in tensors.items() if t is not None})


def _take(sizes: dict[str, int], dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Uninitialised buffers of these many numbers, one after the other in one piece of memory: the spare one if that is large enough."""
    lengths = [-(-size // 16) * 16 for size in sizes.values()]  # whole cache lines
    spare = _State.spare.pop() if _State.spare else None
    if spare is None or spare.dtype != dtype or spare.numel() < sum(lengths):
        del spare
        spare = torch.empty(sum(lengths), dtype=dtype)
    return spare, dict(zip(sizes, spare[:sum(lengths)].split(lengths)))


def _give(workspace: Tensor) -> None:
    _State.spare[:] = [workspace]


class _CellFunction(torch.autograd.Function):
    """Either cell: (graph, places, readable form, x_proj, h0, W0_h, Ws, probabilities, mask) -> outputs."""

    @staticmethod
    def forward(ctx, graph, places, readable, *tensors):
        ctx.graph, ctx.places, ctx.readable = graph, places, readable
        run = _CellFunction.run(ctx, tensors)
        ctx.run = run._replace(outputs=None)  # saved with the other tensors, where a change in place is noticed and no cycle is made
        ctx.save_for_backward(*tensors, run.outputs)
        ctx.set_materialize_grads(False)
        return run.outputs

    @staticmethod
    def run(ctx, tensors) -> _Forward:
        *others, probabilities, mask = tensors
        p = None if probabilities is None else _mixture(probabilities.detach(), ctx.places)
        return _run_forward(ctx.graph, *others, p, mask, keep=True)

    @staticmethod
    def backward(ctx, d_outputs):
        if d_outputs is None:
            return (None,) * 9
        *tensors, outputs = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():  # create_graph: whoever asks wants to differentiate again
            return (None,) * 3 + _differentiable(ctx.readable, tensors, needs, d_outputs)
        # a second backward pass through the same graph finds the buffers used up
        run, ctx.run = ctx.run or _CellFunction.run(ctx, tensors), None
        *grads, d_p = _run_backward(ctx.graph, run._replace(outputs=outputs), d_outputs, needs)
        d_probabilities = None
        if d_p is not None:
            d_probabilities = torch.zeros_like(tensors[4], memory_format=torch.contiguous_format)
            for k, place in ctx.places:
                d_probabilities[:, k] = d_p[:, 0] + d_p[:, 1 + place]
        return (None,) * 3 + (*grads, d_probabilities, None)


def _differentiable(function, tensors: list[Tensor | None], needs, d_output: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of `function(*tensors)` that can be differentiated again."""
    # aliases, because one of the tensors may have been computed from another, and that path is not ours to follow
    aliases = [None if t is None else t.view_as(t) for t in tensors]
    wanted = [a for a, need in zip(aliases, needs) if need]
    grads = iter(torch.autograd.grad(function(*aliases), wanted, d_output, create_graph=True, allow_unused=True))
    return tuple(next(grads) if need else None for need in needs)


# --- the decoder and the loss ------------------------------------------------------------------------------------------------------------------


def linear_cross_entropy(dropped: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """F.cross_entropy(F.linear(dropped, weight, bias), targets) without the logits (R, V): mean nats per row.

    dropped (R, H), weight (V, H), bias (V) or None, targets (R) of 0 … V−1. Logits are made for a block of rows at a time, and where a gradient
    is wanted the block's share of it is computed at once, so nothing of size V is kept for a row. On any device, with or without the extension,
    under autocast.
    """
    if _State.forced_off or not _plain() or torch.overrides.has_torch_function((dropped, weight, targets)) or targets.dim() != 1 or not len(targets):
        return _readable_cross_entropy(dropped, weight, bias, targets)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (dropped, weight, bias)]
    if any(needs):
        return _LinearCrossEntropy.apply(dropped, weight, bias, targets)
    return _cross_entropy(dropped, weight, bias, targets, needs)[0]


def _readable_cross_entropy(dropped, weight, bias, targets):
    return F.cross_entropy(F.linear(dropped, weight, bias), targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dropped, weight, bias, targets):
        ctx.save_for_backward(dropped, weight, bias, targets)
        loss, *grads = _cross_entropy(dropped, weight, bias, targets, ctx.needs_input_grad)
        ctx.grads = grads
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        if torch.is_grad_enabled():
            return _differentiable(_readable_cross_entropy, ctx.saved_tensors, ctx.needs_input_grad, d_loss)
        return (*(None if g is None else g * d_loss.to(g.dtype) for g in ctx.grads), None)


@torch.no_grad()
def _cross_entropy(dropped: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, needs) -> list[Tensor | None]:
    """The loss and its gradients with respect to dropped, weight and bias, each None where `needs` has False."""
    device = dropped.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dropped.dtype
    with torch.autocast(device, enabled=False):
        x, w = dropped.to(dtype), weight.to(dtype)
        b = None if bias is None else bias.to(dtype)
        (R, H), V = x.shape, len(w)
        rows = max(64, _CHUNK.get(device, _CHUNK["cuda"]) // V)
        d_x = torch.empty_like(dropped) if needs[0] else None
        d_w = torch.zeros(V, H, dtype=w.dtype if dtype.itemsize >= 4 else torch.float32, device=w.device) if needs[1] else None
        d_b = torch.zeros(V, dtype=torch.float32 if dtype.itemsize < 4 else dtype, device=w.device) if needs[2] else None
        nats = torch.zeros((), dtype=torch.float64, device=x.device)
        space = x.new_empty(min(rows, R), V)  # one block of logits, used again and again
        for start in range(0, R, rows):
            part, y = x[start:start + rows], targets[start:start + rows]
            logits = torch.mm(part, w.t(), out=space[:len(part)])  # (rows, H) (H, V) -> (rows, V)
            nll, d = _softmax_rows(logits, b, y, 1 / R if any(needs[:3]) else 0.0)  # (rows,), (rows, V)
            nats += nll.sum(dtype=torch.float64)
            if d_b is not None:
                d_b += d.sum(0)
            if dtype.itemsize < 4:
                d = d.to(dtype)
            if d_x is not None:
                if d_x.dtype == dtype:
                    torch.mm(d, w, out=d_x[start:start + rows])  # (rows, V) (V, H)
                else:
                    d_x[start:start + rows] = d @ w
            if d_w is not None:
                if d_w.dtype == dtype:
                    d_w.addmm_(d.t(), part)  # (V, rows) (rows, H)
                else:
                    d_w += d.t() @ part
        loss = (nats / R).to(dropped.dtype if dtype.itemsize >= 4 else torch.float32)
        return [loss, d_x, None if d_w is None else d_w.to(weight.dtype), None if d_b is None else d_b.to(bias.dtype)]


def _softmax_rows(logits: Tensor, bias: Tensor | None, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Logits (R, V) without their bias -> nats (R) and scale·(softmax − onehot), in the logits' place where possible (rubbish if scale is 0)."""
    if logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.float64) and targets.dtype == torch.int64 and enabled():
        y, nll = targets.contiguous(), torch.empty(len(logits), dtype=torch.float64)
        b = None if bias is None else bias.contiguous()
        bad = _State.library.softmax_rows[logits.dtype](*logits.shape, logits.data_ptr(), None if b is None else b.data_ptr(), y.data_ptr(), scale,
                                                        nll.data_ptr(), torch.get_num_threads())
        if bad >= 0:
            raise IndexError(f"Target {int(y[bad])} is out of bounds.")
        return nll, logits
    logits = logits if logits.dtype.itemsize >= 4 else logits.float()
    if bias is not None:
        logits += bias
    total = logits.logsumexp(1)  # (R,)
    nll = total - logits.gather(1, targets[:, None]).squeeze(1)
    if scale:
        logits.sub_(total[:, None]).exp_().mul_(scale)
        logits.scatter_add_(1, targets[:, None], logits.new_full((len(targets), 1), -scale))
    return nll, logits
