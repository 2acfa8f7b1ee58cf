"""Either cell over a whole sequence in C++ (`csrc/cells.cpp`): the buffers that it works on, and the two calls."""

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


class Run(NamedTuple):
    """What a forward pass leaves: its results, and the buffers the backward pass reads."""

    graph: Graph
    rounded: bool  # the operands of products, to bfloat16
    outputs: Tensor  # (T, B, H)
    workspace: Tensor  # the memory of the larger buffers
    buffers: dict[str, Tensor | None]  # by the names that csrc/cell.h has for them


def run_forward(graph: Graph, x_proj: Tensor, h0: Tensor, W0_h: Tensor, Ws: Tensor, p: Tensor | None, mask: Tensor | None,
                keep: bool, rounded: bool = False) -> Run:
    """Run the cell on tensors without a graph; with `keep` the buffers hold every time step, for `run_backward`.

    x_proj, h0, W0_h, Ws and mask as in `supernet.mixed_cell`; p (E, 4), in the order of `graph.OPS`, for a mixed cell, None for a discrete one.
    `rounded` asks for bfloat16 operands in the products of a float32 cell; they stay whole on a processor that would gain nothing.
    """
    (T, B, _), H, N, E = x_proj.shape, h0.shape[1], graph.n_nodes, graph.n_edges
    steps, new = (T if keep else 1), x_proj.new_empty
    inputs = {name: t.contiguous() for name, t in (("x_proj", x_proj), ("h0", h0), ("W0_h", W0_h), ("Ws", Ws))}
    workspace, large = take("cell", {"pre": (T * E if keep else 1) * B * 2 * H, "states": (N + 1) * steps * B * H, "scale": steps * (N + 1) * H, "packed": (N + 1) * H * padded(2 * H)}
                             | ({"packed_back": (N + 1) * 2 * H * padded(H)} if keep else {})
                             | ({} if mask is None else {"masked": N * steps * B * H, "previous": steps * B * H}), x_proj.dtype)
    buffers = {
        **inputs, "mask": None if mask is None else mask.contiguous(),
        "p": new(E, 4).zero_() if p is None else p.contiguous(),
        "present": new(E).fill_(1) if p is None else p.sum(1), "average": x_proj.new_tensor(graph.average),
        "pre0": new(steps, B, 2 * H), **large,
    }
    result = Run(graph, rounded and rounds(x_proj.dtype, H), new(T, B, H), workspace, buffers)
    arguments = _arguments(result, keep)
    State.loaded.forward[x_proj.dtype](ctypes.byref(arguments))
    if not keep:
        give("cell", workspace)
    return result


def run_backward(run: Run, d_outputs: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Gradients of x_proj, h0, W0_h, Ws where `needs` says so and d_p (N(N+1)/2, 5) or None. Uses up the buffers: pre-activations become their gradients."""
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
    struct = CellStruct(T, B, H, graph.n_nodes, graph.n_edges, torch.get_num_threads(), graph.normalise, keep, run.rounded, supernet.BATCHNORM_EPS,
                        **{name: ctypes.addressof(graph.arrays[name]) for name in ("incoming", "source", "op")})
    return struct.hold({**run.buffers, "outputs": run.outputs, **more})


def rounds(dtype: torch.dtype, smallest: int) -> bool:
    """Whether this processor gains from bfloat16 in the products of these numbers, of which the smallest matrix has so many rows or columns: packed in
    tiles of 32 terms (bfloat.h), those of fewer than 16 would outgrow the room that is allotted for whole numbers."""
    return State.loaded.rounds and dtype == torch.float32 and smallest >= 16


def padded(columns: int) -> int:
    """Columns of a matrix in panels: at most 32 to a panel, whatever the machine's registers (product.h)."""
    return -(-columns // 32) * 32
