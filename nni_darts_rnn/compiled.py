"""Either cell over a whole sequence in C++ (`csrc/cells.cpp`): the buffers that the C++ code works on, and the two calls."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from . import supernet
from .exports import CellStruct
from .extension import State
from .graph import Graph
from .workspace import give, take

SECOND_CACHE = 2**21
"""Bytes of second cache for each core: processors have a half to two MiB."""
FEW_ROWS = 6
"""Rows of the batch for a thread; fewer do not fill a tile of csrc/product.h."""


class Run(NamedTuple):
    """What a forward pass leaves: its results, and the buffers the backward pass reads."""

    graph: Graph
    parts: int  # bfloat16 numbers for an operand of a product: see the function `parts`
    by_units: bool  # how the threads divide the work: see the function `by_units`
    outputs: Tensor  # (T, B, H)
    workspace: Tensor  # the memory of the larger buffers
    buffers: dict[str, Tensor | None]  # by their names in csrc/cell.h


def run_forward(graph: Graph, x_proj: Tensor, h0: Tensor, W0_h: Tensor, Ws: Tensor, p: Tensor | None, mask: Tensor | None,
                keep: bool, rounded: bool = False) -> Run:
    """Run the cell on tensors without a graph. With `keep` the buffers hold every time step, for `run_backward`.

    x_proj, h0, W0_h, Ws and mask are as in `supernet.mixed_cell`. p is (E, 4), in the order of `graph.OPS`, for a mixed cell, and None for a discrete one.
    `rounded` asks for bfloat16 operands in the products of a float32 cell. On a processor that would not gain from that, they keep all digits.
    """
    (T, B, _), H, N, E = x_proj.shape, h0.shape[1], graph.n_nodes, graph.n_edges
    steps, new, units = (T if keep else 1), x_proj.new_empty, by_units(B, (N + 1) * 2 * H * H * x_proj.element_size())
    n_parts = parts(x_proj.dtype, rounded, H, B if units else B // torch.get_num_threads())
    inputs = {name: t.contiguous() for name, t in (("x_proj", x_proj), ("h0", h0), ("W0_h", W0_h), ("Ws", Ws))}
    workspace, large = take("cell", {"pre": (T * E if keep else 1) * B * 2 * H, "states": (N + 1) * steps * B * H, "scale": steps * (N + 1) * H,
                                     "packed": (N + 1) * 2 * room(n_parts, H, H)}
                             | ({"packed_back": (N + 1) * room(n_parts, 2 * H, H)} if keep else {})
                             | ({} if mask is None else {"masked": N * steps * B * H, "previous": steps * B * H}), x_proj.dtype)
    buffers = {
        **inputs, "mask": None if mask is None else mask.contiguous(),
        "p": new(E, 4).zero_() if p is None else p.contiguous(),
        "present": new(E).fill_(1) if p is None else p.sum(1), "average": x_proj.new_tensor(graph.average),
        "pre0": new(steps, B, 2 * H), **large,
    }
    result = Run(graph, n_parts, units, new(T, B, H), workspace, buffers)
    arguments = _arguments(result, keep)
    State.loaded.forward[x_proj.dtype](ctypes.byref(arguments))
    if not keep:
        give("cell", workspace)
    return result


def run_backward(run: Run, d_outputs: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Gradients of x_proj, h0, W0_h, Ws where `needs` is True, and d_p (N(N+1)/2, 5) or None. Uses up the buffers: gradients overwrite pre-activations."""
    N, (B, H), new = run.graph.n_nodes, d_outputs.shape[1:], d_outputs.new_empty
    d_h0, d_W0_h, d_Ws = (new(shape) if need else None for need, shape in zip(needs[1:4], ((B, H), (H, 2 * H), (N, H, 2 * H))))
    d_p = new(N * (N + 1) // 2, 5, dtype=torch.float64).zero_() if needs[4] else None
    scratch = {"d_outputs": d_outputs.contiguous(), "d_states": new(N + 1, B, H), "d_masked": new(N, B, H), "carry": new(B, H).zero_(), "d_h": new(B, H)}
    arguments = _arguments(run, True, **scratch, d_h0=d_h0, d_W0_h=d_W0_h, d_Ws=d_Ws, d_p=d_p)
    State.loaded.backward[d_outputs.dtype](ctypes.byref(arguments))
    give("cell", run.workspace)
    return [run.buffers["pre0"] if needs[0] else None, d_h0, d_W0_h, d_Ws, d_p]


def _arguments(run: Run, keep: bool, **more: Tensor | None) -> CellStruct:
    """The struct of csrc/cell.h."""
    graph, (T, B, H) = run.graph, run.outputs.shape
    struct = CellStruct(T, B, H, graph.n_nodes, graph.n_edges, torch.get_num_threads(), graph.normalise, keep, run.by_units, run.parts, supernet.BATCHNORM_EPS,
                        **{name: ctypes.addressof(graph.arrays[name]) for name in ("incoming", "source", "op")})
    return struct.hold({**run.buffers, "outputs": run.outputs, **more})


def parts(dtype: torch.dtype, rounded: bool, smallest: int, rows: int) -> int:
    """How many bfloat16 numbers stand for each operand of a product (bfloat.h): 1 if operands are to be rounded, 2 where torch may use fewer digits than
    float32's (`torch.set_float32_matmul_precision`), 3 for all digits; 0, the operand as it is, where a processor would not gain from that.

    The smallest matrix has `smallest` rows or columns. A thread multiplies about `rows` rows with a matrix.
    """
    if not State.loaded.rounds or dtype != torch.float32:
        return 0
    if rounded:
        return int(smallest >= 16)
    if rows < 16 or 3 * smallest < 2 * padded(smallest):  # tiles of 16 rows and 32 terms, too empty to be faster
        return 0
    return 3 if torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee") else 2


def by_units(batch: int, weights: int) -> bool:
    """Whether a cell's threads divide its units, not the rows of its batch: for few rows, and matrices (`weights` bytes in all) too large for a second cache.

    A thread that has all units reads every matrix at every time step, from the third cache or from memory. With half of the units it reads half of each, and
    takes the other half of every state from the other thread's cache. With two threads this was measured to be faster up to a batch of 14. At 300, 512 and 850
    units a forward pass of 1 row took 0.54 to 0.63 of the time, and of 8 rows 0.66 to 0.82. Where the matrices fit the second cache (128 units) it took 1.6
    times as long.
    """
    threads = torch.get_num_threads()
    return threads > 1 and batch < FEW_ROWS * threads and weights > SECOND_CACHE


def room(parts: int, rows: int, columns: int) -> int:
    """How many numbers a packed matrix needs room for."""
    return padded(columns) * (parts * padded(rows) // 2 if parts else rows)


def padded(columns: int) -> int:
    """The columns of a matrix with its last panel filled up: a panel has at most 32, whatever the machine's registers (product.h)."""
    return -(-columns // 32) * 32
