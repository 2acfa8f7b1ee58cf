"""The fast path: both cells over a whole sequence with a hand-written backward, in C++ or on a GPU.

`discrete_cell` and `mixed_cell` take and return what `cell.discrete_cell` and `supernet.mixed_cell` do, to rounding. For float32 and float64, built-in
primitives and plain autograd they run `csrc/cells.cpp` on a CPU, where the extension is in use, and `gpu/` on a GPU; else the readable forms.
A second derivative (`create_graph=True`) is taken through the readable form by itself; `reference()` avoids the detour where that is known before.
"""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import cell, supernet
from .extension import (
    SWITCH,
    CellStruct,
    State,
    available,
    eager_seconds,
    enable,
    enabled,
    gpu_ready,
    in_large_pages,
    on_gpu,
    prepare,
    reference,
    why_not,
)
from .genotype import PRIMITIVES, Genotype

__all__ = ["SWITCH", "available", "discrete_cell", "drawn_cell", "eager_seconds", "enable", "enabled", "mixed_cell", "prepare", "reference", "why_not"]

OPS = ("tanh", "relu", "sigmoid", "identity")  # the enum Op of cells.cpp; the mixture of all four comes next
MIX = len(OPS)
GPU_BATCH = 4096
"""The largest batch for the GPU's kernels, of which one program normalises whole columns."""


class Graph(NamedTuple):
    """The edges of a cell as cells.cpp reads them."""

    n_nodes: int
    normalise: bool
    average: tuple[float, ...]  # (N+1)
    n_edges: int
    arrays: dict[str, ctypes.Array]  # order, first, count (N), incoming (N+1), source, slot, op (E)

    @property
    def mixed(self) -> bool:
        """Whether its edges are mixtures."""
        return self.arrays["op"][0] == MIX

    @classmethod
    def of(cls, edges: list[tuple[int, int, int]], order: list[int], concat: tuple[int, ...], n_nodes: int, normalise: bool) -> Graph:
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
        return cls(n_nodes, normalise, average, len(edges), arrays)


@functools.lru_cache(maxsize=64)
def mixed_graph(n_nodes: int, normalise: bool = True) -> Graph:
    """Every node reads every earlier state, each through all nonlinearities."""
    nodes = range(1, n_nodes + 1)
    return Graph.of([(i, j, MIX) for i in nodes for j in range(i)], list(nodes), tuple(nodes), n_nodes, normalise)


@functools.lru_cache(maxsize=64)
def discrete_graph(genotype: Genotype) -> Graph:
    """One edge a node."""
    edges = [(node, j, OPS.index(op)) for node, (op, j) in enumerate(genotype.recurrent, start=1)]
    order = sorted(range(1, genotype.n_nodes + 1), key=lambda node: (genotype.recurrent[node - 1][1], node))
    return Graph.of(edges, order, genotype.concat, genotype.n_nodes, False)


def discrete_cell(x_proj: Tensor, h0: Tensor, W0_h: Tensor, Ws: Tensor, genotype: Genotype, mask: Tensor | None = None) -> Tensor:
    """`cell.discrete_cell`, the fast way where it applies."""
    if not (_applies(x_proj, h0, W0_h, Ws, mask) and len(Ws) == genotype.n_nodes and all(map(_built_in, (op for op, _ in genotype.recurrent)))):
        return cell.discrete_cell(x_proj, h0, W0_h, Ws, genotype, mask)
    if _needs_graph(x_proj, h0, W0_h, Ws):
        readable = functools.partial(_readable_discrete, genotype)
        return _CellFunction.apply(discrete_graph(genotype), None, readable, x_proj, h0, W0_h, Ws, None, mask)
    return _run_forward(discrete_graph(genotype), x_proj, h0, W0_h, Ws, None, mask, keep=False).outputs


def mixed_cell(x_proj: Tensor, h0: Tensor, W0_h: Tensor, Ws: Tensor, probabilities: Tensor, mask: Tensor | None = None,
               primitives=PRIMITIVES, normalise: bool = True) -> Tensor:
    """`supernet.mixed_cell`, the fast way where it applies."""
    if not _applies_mixed(x_proj, h0, W0_h, Ws, mask, probabilities, primitives):
        return supernet.mixed_cell(x_proj, h0, W0_h, Ws, probabilities, mask, primitives, normalise)
    graph, places = mixed_graph(len(Ws), normalise), _places(primitives)
    if _needs_graph(x_proj, h0, W0_h, Ws, probabilities):
        readable = functools.partial(_readable_mixed, tuple(primitives), normalise)
        return _CellFunction.apply(graph, places, readable, x_proj, h0, W0_h, Ws, probabilities, mask)
    return _run_forward(graph, x_proj, h0, W0_h, Ws, _mixture(probabilities, places), mask, keep=False).outputs


def drawn_cell(x_proj: Tensor, h0: Tensor, W0_h: Tensor, Ws: Tensor, probabilities: Tensor, mask: Tensor | None = None,
               primitives=PRIMITIVES) -> Tensor:
    """`supernet.mixed_cell` without BatchNorm where `probabilities` (E, K) are one-hot in each node's rows.

    What runs is the one cell, backward too; a gradient of the probabilities costs the other edges' forward pass beside that.
    """
    if on_gpu(x_proj):  # there each cell would be recorded as steps of its own, more slowly than all edges run
        return mixed_cell(x_proj, h0, W0_h, Ws, probabilities, mask, primitives, normalise=False)
    genotype = supernet.one_hot_genotype(probabilities.detach(), primitives)
    if not _needs_graph(probabilities):
        return discrete_cell(x_proj, h0, W0_h, Ws, genotype, mask)
    readable = functools.partial(_readable_mixed, tuple(primitives), False)
    if not _applies_mixed(x_proj, h0, W0_h, Ws, mask, probabilities, primitives):
        return readable(x_proj, h0, W0_h, Ws, probabilities, mask)
    return _CellFunction.apply(discrete_graph(genotype), _places(primitives), readable, x_proj, h0, W0_h, Ws, probabilities, mask)


def _readable_discrete(genotype, x_proj, h0, W0_h, Ws, probabilities, mask):
    return cell.discrete_cell(x_proj, h0, W0_h, Ws, genotype, mask)


def _readable_mixed(primitives, normalise, x_proj, h0, W0_h, Ws, probabilities, mask):
    return supernet.mixed_cell(x_proj, h0, W0_h, Ws, probabilities, mask, primitives, normalise)


def _places(primitives) -> tuple[tuple[int, int], ...]:
    """(column of the probabilities, op) for each primitive that is a function."""
    return tuple((k, OPS.index(name)) for k, name in enumerate(primitives) if name != "none")


def _applies_mixed(x_proj: Tensor, h0: Tensor, W0_h: Tensor, Ws: Tensor, mask: Tensor | None, probabilities: Tensor, primitives) -> bool:
    """`_applies`, and the primitives are the package's own, once each, with a row of probabilities for every edge."""
    names, n = [name for name in primitives if name != "none"], len(Ws)
    return (_applies(x_proj, h0, W0_h, Ws, mask, probabilities) and bool(names) and all(map(_built_in, names)) and len(set(names)) == len(names)
            and probabilities.shape == (n * (n + 1) // 2, len(primitives)))


def _built_in(op: str) -> bool:
    """Whether `op` is computed as the package computes it, not by something registered under its name."""
    function = cell.ACTIVATIONS.get(op)
    return op in OPS and (function is getattr(torch, op, None) or getattr(function, "__module__", "") == cell.__name__)


def _applies(x_proj: Tensor, h0: Tensor, W0_h: Tensor, Ws: Tensor, mask: Tensor | None, *others: Tensor) -> bool:
    """Whether cells.cpp or the GPU's kernels can take these tensors. Shapes that do not fit are left to the readable form and its error messages."""
    if State.forced_off or not plain() or not (gpu_ready(x_proj) if on_gpu(x_proj) else x_proj.device.type == "cpu" and enabled()):
        return False
    tensors = [x_proj, h0, W0_h, Ws, *others, *([] if mask is None else [mask])]
    if x_proj.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(x_proj.device.type) or subclassed(tensors):
        return False
    if any(t.device != x_proj.device or t.dtype != x_proj.dtype or t.layout != torch.strided or t.numel() == 0 for t in tensors):
        return False
    if h0.dim() != 2 or x_proj.dim() != 3 or Ws.dim() != 3 or (mask is not None and (mask.requires_grad or mask.shape != h0.shape)):
        return False
    B, H = h0.shape
    if on_gpu(x_proj) and B > GPU_BATCH:
        return False
    return x_proj.shape[1:] == (B, 2 * H) and W0_h.shape == (H, 2 * H) and Ws.shape[1:] == (H, 2 * H)


def subclassed(tensors: list[Tensor]) -> bool:
    """Whether one of them has arithmetic of its own. `has_torch_function` would say so under `torch.set_default_device` too."""
    return any(type(t) not in (Tensor, torch.nn.Parameter) and torch.overrides.has_torch_function((t,)) for t in tensors)


def plain() -> bool:
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
                 keep: bool):
    """Run the cell; with `keep` the buffers hold every time step, for `_run_backward`. p (E, 4) for a mixed cell, None for a discrete one."""
    if on_gpu(x_proj):
        from .gpu import sequence

        return sequence.run_forward(graph, x_proj.detach(), h0.detach(), W0_h.detach(), Ws.detach(), p, mask, keep)
    T, B, H, N, E = len(x_proj), *h0.shape, graph.n_nodes, graph.n_edges
    steps, new = (T if keep else 1), x_proj.new_empty
    inputs = {name: t.detach().contiguous() for name, t in (("x_proj", x_proj), ("h0", h0), ("W0_h", W0_h), ("Ws", Ws))}
    workspace, large = _take({"pre": steps * B * E * 2 * H, "states": (N + 1) * steps * B * H, "scale": steps * (N + 1) * H, "packed": (N + 1) * H * padded(2 * H)}
                             | ({"packed_back": (N + 1) * 2 * H * padded(H)} if keep else {})
                             | ({} if mask is None else {"masked": N * steps * B * H, "previous": steps * B * H}), x_proj.dtype)
    buffers = {
        **inputs, "mask": None if mask is None else mask.detach().contiguous(),
        "p": new(E, 4).zero_() if p is None else p.detach().contiguous(),
        "present": new(E).fill_(1) if p is None else p.detach().sum(1), "average": x_proj.new_tensor(graph.average),
        "pre0": new(steps, B, 2 * H), **large,
    }
    result = _Forward(new(T, B, H), workspace, buffers)
    arguments = _arguments(graph, result, keep)
    State.loaded.forward[x_proj.dtype](ctypes.byref(arguments))
    if not keep:
        _give(workspace)
    return result


def _run_backward(graph: Graph, saved, d_outputs: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Gradients of x_proj, h0, W0_h, Ws where `needs` says so and d_p (N(N+1)/2, 5) or None. Uses up the buffers: pre-activations become their gradients."""
    if not isinstance(saved, _Forward):
        from .gpu import sequence

        return sequence.run_backward(saved, d_outputs, needs)
    N, (B, H), new = graph.n_nodes, d_outputs.shape[1:], d_outputs.new_empty
    d_h0, d_W0_h, d_Ws = (new(shape) if need else None for need, shape in zip(needs[1:4], ((B, H), (H, 2 * H), (N, H, 2 * H))))
    d_p = new(N * (N + 1) // 2, 5, dtype=torch.float64).zero_() if needs[4] else None
    scratch = {"d_outputs": d_outputs.contiguous(), "d_states": new(N + 1, B, H), "scratch": new(B, H), "carry": new(B, H).zero_(), "d_h": new(B, H)}
    arguments = _arguments(graph, saved, True, **scratch, d_h0=d_h0, d_W0_h=d_W0_h, d_Ws=d_Ws, d_p=d_p)
    State.loaded.backward[d_outputs.dtype](ctypes.byref(arguments))
    _give(saved.workspace)
    return [saved.buffers["pre0"] if needs[0] else None, d_h0, d_W0_h, d_Ws, d_p]


def _arguments(graph: Graph, run: _Forward, keep: bool, **more: Tensor | None) -> CellStruct:
    """The struct that cells.cpp reads. Addresses only: the caller's tensors must outlive the call."""
    tensors = {**run.buffers, "outputs": run.outputs, **more}
    T, B, H = run.outputs.shape
    return CellStruct(T, B, H, graph.n_nodes, graph.n_edges, torch.get_num_threads(), graph.normalise, keep, supernet.BATCHNORM_EPS,
                 **{name: ctypes.addressof(array) for name, array in graph.arrays.items()},
                 **{name: t.data_ptr() for name, t in tensors.items() if t is not None})


def padded(columns: int) -> int:
    """Columns of a matrix in panels: at most 32 to a panel, whatever the machine's registers (product.h)."""
    return -(-columns // 32) * 32


def _take(sizes: dict[str, int], dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Uninitialised buffers of these many numbers, one after the other in one piece of memory: the spare one if that is large enough."""
    lengths = [-(-size // 16) * 16 for size in sizes.values()]  # whole cache lines
    spare = State.spare.pop() if State.spare else None
    if spare is None or spare.dtype != dtype or spare.numel() < sum(lengths):
        del spare
        spare = in_large_pages(torch.empty(sum(lengths), dtype=dtype, device="cpu"))
    return spare, dict(zip(sizes, spare[:sum(lengths)].split(lengths)))


def _give(workspace: Tensor) -> None:
    State.spare[:] = [workspace]


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
    def run(ctx, tensors):
        *others, probabilities, mask = tensors
        p = _mixture(probabilities.detach(), ctx.places) if ctx.graph.mixed else None
        return _run_forward(ctx.graph, *others, p, mask, keep=True)

    @staticmethod
    def backward(ctx, d_outputs):
        if d_outputs is None:
            return (None,) * 9
        *tensors, outputs = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():  # create_graph: whoever asks wants to differentiate again
            return (None,) * 3 + differentiable(ctx.readable, tensors, needs, d_outputs)
        # a second backward pass through the same graph finds the buffers used up
        run, ctx.run = ctx.run or _CellFunction.run(ctx, tensors), None
        *grads, d_p = _run_backward(ctx.graph, run._replace(outputs=outputs), d_outputs, needs)
        d_probabilities = None
        if d_p is not None:
            d_probabilities = torch.zeros_like(tensors[4], memory_format=torch.contiguous_format)
            for k, place in ctx.places:
                d_probabilities[:, k] = d_p[:, 0] + d_p[:, 1 + place]
        return (None,) * 3 + (*grads, d_probabilities, None)


def differentiable(function, tensors: list[Tensor | None], needs, d_output: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of `function(*tensors)` that can be differentiated again."""
    # aliases, because one of the tensors may have been computed from another, and that path is not ours to follow
    aliases = [None if t is None else t.view_as(t) for t in tensors]
    wanted = [a for a, need in zip(aliases, needs) if need]
    grads = iter(torch.autograd.grad(function(*aliases), wanted, d_output, create_graph=True, allow_unused=True))
    return tuple(next(grads) if need else None for need in needs)
