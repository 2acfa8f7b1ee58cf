"""What a pass of either cell uses on a GPU: its memory, and every time step as a CUDA graph that is recorded once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
from torch import Tensor

from .. import supernet
from .kernels import ALIGNED, level_backward, level_forward
from .levels import layout

if TYPE_CHECKING:
    from ..graph import Graph

BUSY = 128  # tiles of 64 by 64 results that keep a large GPU busy


class Key(NamedTuple):
    """What a plan depends on, apart from the number of time steps."""

    graph: Graph
    B: int
    H: int
    masked: bool
    mixed: bool
    dtype: torch.dtype
    device: torch.device
    precision: str  # of float32 products
    stream: int


def pieces(rows: int, inner: int, columns: int) -> int:
    """The number of parts into which the sum over `inner` of a product (rows, inner) (inner, columns) is cut: as many as keep a GPU busy, where the result
    has too few tiles for that, each a long sum. A part's length is a multiple of four, as cuBLAS reads four numbers at once."""
    tiles = -(-rows // 64) * -(-columns // 64)
    allowed = [cut for cut in range(1, inner // 128 + 1) if inner % (4 * cut) == 0]
    if rows < 32 or inner < 512 or tiles > BUSY // 2 or not allowed:  # of few rows cuBLAS has kernels of its own
        return 1
    return next((cut for cut in allowed if tiles * cut >= BUSY), allowed[-1])


class Plan:
    """Memory, and the recorded steps, of passes of up to T time steps. Slots are those of `kernels.py`; `block[k]` belongs to slot k, for k = 0 … N+1.

    H is `key.H` rounded up to a multiple of ALIGNED, so that every row begins where cuBLAS and the kernels can read many numbers at once. In inputs and
    weights the added columns are 0. What is computed from them is finite, meets rows of zeros in every product, and is in no result.
    """

    def __init__(self, key: Key, T: int):
        graph, B, H, N = key.graph, key.B, triton.cdiv(key.H, ALIGNED.value) * ALIGNED.value, key.graph.n_nodes
        self.key, self.T, self.N, self.H = key, T, N, H
        new = dict(dtype=key.dtype, device=key.device)
        self.order = torch.tensor(list(graph.arrays["order"]), device=key.device)
        nodes, self.levels, edges, ends, runs = layout(graph)
        readers = [*zip(graph.arrays["first"], graph.arrays["count"]), (0, 0)]
        self.readers = [(0, 1), *(readers[node] for node in nodes)]  # of each slot's readers: the first in `order`, and how many; h has node 0
        widths = [count * 2 * H for _, count in self.readers]
        self.pre = torch.zeros(T * B * sum(widths), **new)
        self.block = [part.view(T, B, width) for part, width in zip(self.pre.split([T * B * width for width in widths]), widths)]  # (T,B,count·2H)
        self.W = [torch.zeros(H, width, **new) for width in widths]
        self.W_t = [torch.zeros(width, H, **new) for width in widths]  # transposed in memory: cuBLAS is up to 3 times as fast then
        self.states = torch.zeros(N + 2, T + 1, B, H, **new)
        self.masked = torch.zeros(N + 2, T + 1, B, H, **new) if key.masked else self.states
        self.mask = torch.zeros(B, H, **new)
        self.scale = torch.empty(T if graph.normalise else 0, N + 2, H, **new)
        self.average = torch.tensor((0.0, *(graph.average[node] for node in nodes)), **new)
        offsets = [sum(widths[:k]) * T * B for k in range(N + 2)]
        integers = dict(dtype=torch.int64, device=key.device)
        self.edges = torch.tensor([(offsets[edge.source] + edge.place * 2 * H, widths[edge.source], edge.source, edge.met_first, edge.target,
                                    widths[edge.target] > 0) for edge in edges], **integers)
        self.ends, self.runs = torch.tensor(ends, **integers), torch.tensor(runs, **integers)
        one_hot = [[float(not key.mixed and edge.op == k) for k in range(4)] + [1.0] for edge in edges]
        one_hot[0][0] = 1.0  # node 0 is a tanh
        self.p = torch.tensor(one_hot, **new)  # (E+1, 5); each pass overwrites that of a mixed cell
        self.d_states = torch.empty(N + 2, B, H, **new)
        self.product, self.d_h = torch.empty(N + 2, B, H, **new), torch.empty(B, H, **new)
        self.pieces = [(pieces(B, H, width), pieces(B, width, H)) for width in widths]  # of each slot's products, forward and backward
        self.parts = torch.empty(max(max(there * width, back * H) * B for (there, back), width in zip(self.pieces, widths)), **new)
        self.d_outputs = torch.zeros(T, B, H, **new)
        self._tile(B, H, graph.normalise)
        self.d_p = torch.zeros(len(self.edges), 5, self.grid[0] * self.grid[1], dtype=torch.float64, device=key.device)
        self.fixed = dict(num_warps=max(4, min(16, self.rows * self.columns // 128)), NORMALISE=graph.normalise, MASKED=key.masked, ROWS=self.rows, COLUMNS=self.columns,
                          **(dict(DEGREE=8, LOW=-29.0) if key.dtype == torch.float32 else dict(DEGREE=15, LOW=-230.0)))
        self.recorded: dict[str, list] = {}  # by the names of the step functions: one CUDA graph for each time step

    def _tile(self, B: int, H: int, normalise: bool) -> None:
        """Set the rows and columns of a program's tile, and the number of programs: enough to fill a GPU, with tiles wide enough to read whole sectors."""
        if normalise:
            self.rows = triton.next_power_of_2(B)
            self.columns = max(4, min(32, 1024 // self.rows, triton.next_power_of_2(H)))
        else:
            self.columns = min(128, triton.next_power_of_2(H))
            self.rows = min(triton.next_power_of_2(B), 512 // self.columns)
        self.grid = (triton.cdiv(H, self.columns), triton.cdiv(B, self.rows))

    def load_weights(self, W0_h: Tensor, Ws: Tensor, p: Tensor | None, mask: Tensor | None, transposed: bool) -> None:
        """Load W0_h (H, 2H), Ws (N, H, 2H), p (E, 4) or None, mask (B, H) or None for the passes that follow; `transposed`: backward passes will follow."""
        H = self.key.H
        self._used(self.W[0])[:H] = W0_h.unflatten(-1, (1, 2, H))
        ordered = Ws.index_select(0, self.order).unflatten(-1, (2, H))
        for W, (first, count) in zip(self.W[1:], self.readers[1:]):
            self._used(W)[:H] = ordered[first:first + count].transpose(0, 1)  # (count, H, 2, H) -> (H, count, 2, H)
        if transposed:
            for W, W_t in zip(self.W, self.W_t):
                W_t.copy_(W.t())
        if p is not None:
            self.p[1:, :4] = p
            self.p[1:, 4] = p.sum(1)
        if mask is not None:
            self.mask[:, :H] = mask

    def _used(self, rows: Tensor) -> Tensor:
        """The columns (…, count, 2, key.H) of rows (…, count·2H), without those that fill them up."""
        return rows.unflatten(-1, (-1, 2, self.H))[..., :self.key.H]

    def forward(self, x_proj: Tensor, h0: Tensor) -> Tensor:
        """x_proj (T, B, 2H), h0 (B, H) -> a copy of the outputs (T, B, H)."""
        T, H = len(x_proj), self.key.H
        if H < self.H:
            self.block[0][:T] = 0  # NaN from an earlier pass would stay in the columns that fill up
        self._used(self.block[0][:T])[:] = x_proj.unflatten(-1, (1, 2, H))
        self.states[0, 0, :, :H] = h0
        if self.key.masked:
            torch.mul(self.states[0, 0], self.mask, out=self.masked[0, 0])
        self._take_steps(self.step_forward, range(T))
        return self.states[0, 1:T + 1, :, :H].clone(memory_format=torch.contiguous_format)

    def step_forward(self, t: int) -> None:
        self.block[0][t].addmm_(self.masked[0, t], self.W[0])  # (B, H) (H, 2H)
        for first, last, _, _ in self.levels:
            output = last == self.N + 2
            level_forward[(*self.grid, 1 if output else last - first)](
                self.pre, self.states, self.masked, self.mask, self.scale, self.p, self.edges, self.ends, self.average, t, first, last, int(output),
                self.key.B, self.H, self.states[0].numel(), self.N + 2, EPS=supernet.BATCHNORM_EPS,
                UNROLLED=4 if self.key.mixed else 1, **self.fixed)
            for k in range(first, last):
                if self.readers[k][1]:
                    self._multiply(self.masked[k, t], self.W[k], self.pieces[k][0], self.block[k][t])  # (B, H) (H, count·2H)

    def backward(self, d_outputs: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
        """d_outputs (T, B, H) -> gradients of x_proj, h0, W0_h, Ws where `needs` is True, and of p (E, 5) or None."""
        T, N, H = len(d_outputs), self.N, self.key.H
        self.d_outputs[:T, :, :H] = d_outputs
        self.d_states[0].zero_()  # nothing comes from beyond the last step
        self.product[0].zero_()
        if needs[4]:
            self.d_p.zero_()
        self._take_steps(self.step_backward_p if needs[4] else self.step_backward, reversed(range(T)))
        d_x = self._used(self.block[0][:T]).clone(memory_format=torch.contiguous_format).flatten(2) if needs[0] else None
        d_h0 = (self.d_states[0] + (self.product[0] * self.mask if self.key.masked else self.product[0]))[:, :H].contiguous() if needs[1] else None
        d_W0_h, d_Ws = None, None
        if needs[2]:
            d_W0_h = self._weight_gradient(0, T).flatten(1)
        if needs[3]:
            ordered = torch.zeros(N, H, 2 * H, dtype=self.key.dtype, device=self.key.device)
            for k, (first, count) in enumerate(self.readers[1:], start=1):
                if count:
                    ordered[first:first + count] += self._weight_gradient(k, T).flatten(2).transpose(0, 1)  # (count, H, 2H)
            d_Ws = torch.empty_like(ordered).index_copy_(0, self.order, ordered)
        return [d_x, d_h0, d_W0_h, d_Ws, self.d_p[1:].sum(2) if needs[4] else None]

    def _weight_gradient(self, k: int, T: int) -> Tensor:
        """(H, count, 2, H)."""
        return self._used(self.masked[k, :T].flatten(0, 1).t() @ self.block[k][:T].flatten(0, 1))[:self.key.H]  # (H, T·B) (T·B, count·2H)

    def step_backward(self, t: int, probabilities: bool = False) -> None:
        for first, last, run, runs in reversed(self.levels):
            for k in range(first, last):
                if self.readers[k][1]:
                    self._multiply(self.block[k][t], self.W_t[k], self.pieces[k][1], self.product[k])  # (B, count·2H) (count·2H, H)
            level_backward[(*self.grid, runs)](
                self.pre, self.states, self.d_states, self.product, self.mask, self.d_h, self.d_outputs, self.scale, self.p, self.d_p, self.edges, self.runs,
                self.average, t, run, int(last == self.N + 2), self.key.B, self.H, self.states[0].numel(), self.N + 2,
                PROBABILITIES=probabilities, **self.fixed)
        self._multiply(self.block[0][t], self.W_t[0], self.pieces[0][1], self.product[0])  # (B, 2H) (2H, H)

    def _multiply(self, x: Tensor, W: Tensor, cut: int, out: Tensor) -> None:
        """x (B, K) W (K, n) -> out (B, n), as `cut` products at once and their sum. Nothing is allocated, because nothing should be in a recording."""
        if cut == 1:
            torch.mm(x, W, out=out)
            return
        parts = self.parts[:cut * out.numel()].view(cut, *out.shape)
        torch.bmm(x.view(len(x), cut, -1).transpose(0, 1), W.view(cut, -1, W.shape[1]), out=parts)  # (cut, B, K/cut) (cut, K/cut, n)
        torch.sum(parts, 0, out=out)

    def step_backward_p(self, t: int) -> None:
        self.step_backward(t, probabilities=True)

    def _take_steps(self, step, times) -> None:
        """Take step(t) for each t, from its recording where there is one."""
        recorded = self.recorded.get(step.__name__)
        for t in times:
            if recorded is None or torch.cuda.is_current_stream_capturing():
                step(t)
            else:
                recorded[t].replay()

    def record(self, backward: bool) -> None:
        """Record every step as a CUDA graph, before a pass begins: what the steps compute here is lost. Recording needs a stream of its own."""
        steps = [self.step_forward, *([self.step_backward] if backward else []), *([self.step_backward_p] if backward and self.key.mixed else [])]
        missing = [step for step in steps if step.__name__ not in self.recorded]
        if self.key.device.type != "cuda" or not missing or torch.cuda.is_current_stream_capturing():
            return
        stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for step in missing:
                step(0)  # compiles the kernels and sets cuBLAS up, which must not happen in a recording
                # cuBLAS's workspace must be the recording's own: others clear the usual one (Lightning, when a fit ends), and a replay would still write to it
                torch._C._cuda_clearCublasWorkspaces()
                graphs = [torch.cuda.CUDAGraph() for _ in range(self.T)]
                for t, graph in enumerate(graphs):
                    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                    try:
                        step(t)
                    finally:  # one left open would refuse this process any other use of the GPU
                        graph.capture_end()
                torch._C._cuda_clearCublasWorkspaces()
                self.recorded[step.__name__] = graphs
        torch.cuda.current_stream().wait_stream(stream)
