"""Either cell over a whole sequence on a GPU: products by cuBLAS, levels of nodes by `kernels.py`, and every time step a CUDA graph that is made once.

A step is some twenty small kernels, which take less time to run than Python needs to start them. So a `Plan` owns the memory of one kind of pass and
records each step's kernels on it; a pass copies its inputs in, replays T graphs, and copies its outputs out. A plan for long sequences serves short
ones, whose steps are its first. Where there is nothing to record on (Triton's interpreter on a CPU, which the tests use, or inside a recording that
somebody else makes) the same steps are taken one kernel at a time.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
from torch import Tensor

from .. import supernet
from .kernels import level_backward, level_forward
from .levels import layout

if TYPE_CHECKING:
    from ..graph import Graph

CHUNK = 64  # time steps at a time where nothing is kept for a backward pass
SPARE = 4  # plans kept for the next pass; a search or a retraining has one for training, and others for validation


class Key(NamedTuple):
    """What a plan depends on, beside the number of time steps."""

    graph: Graph
    B: int
    H: int
    masked: bool
    mixed: bool
    dtype: torch.dtype
    device: torch.device
    precision: str  # of float32 products
    stream: int


class Run(NamedTuple):
    """What a forward pass leaves for the backward pass."""

    outputs: Tensor | None  # (T, B, H)
    plan: Plan


class Spare:
    """Plans that no pass is using, the last used last."""

    plans: list[Plan] = []
    lock = threading.Lock()  # so that no two threads take the same one


def run_forward(graph: Graph, x_proj: Tensor, h0: Tensor, W0_h: Tensor, Ws: Tensor, p: Tensor | None, mask: Tensor | None, keep: bool,
                rounded: bool = False) -> Run:
    """As `compiled.run_forward`, but no product is rounded beyond what TF32 does. Without `keep` the plan is free again at once."""
    with _on(x_proj):
        stream = torch.cuda.current_stream().cuda_stream if x_proj.is_cuda else 0
        key = Key(graph, h0.shape[0], h0.shape[1], mask is not None, p is not None, x_proj.dtype, x_proj.device, torch.backends.cuda.matmul.fp32_precision, stream)
        T = len(x_proj)
        plan = _take(key, T if keep else min(T, CHUNK))
        plan.record(keep)
        plan.load_weights(W0_h, Ws, p, mask, keep)
        if keep:
            return Run(plan.forward(x_proj, h0), plan)
        outputs = []
        for part in x_proj.split(CHUNK):
            outputs.append(plan.forward(part, h0))
            h0 = outputs[-1][-1]
        Spare.plans.append(plan)
        return Run(outputs[0] if len(outputs) == 1 else torch.cat(outputs), plan)


def run_backward(run: Run, d_outputs: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """As `compiled.run_backward`; the plan is free afterwards."""
    with _on(d_outputs):
        grads = run.plan.backward(d_outputs, needs)
    Spare.plans.append(run.plan)
    return grads


def _on(tensor: Tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _take(key: Key, T: int) -> Plan:
    with Spare.lock:
        found = next((plan for plan in reversed(Spare.plans) if plan.key == key), None)
        if found is not None:
            Spare.plans.remove(found)
            if found.T >= T:
                return found
            del found  # too short: its memory is for the longer one
        del Spare.plans[:-SPARE]
    with torch.inference_mode(False):  # a later pass may be one that such memory is not for
        return Plan(key, -(-T // 8) * 8)


class Plan:
    """Memory, and the recorded steps, of passes of up to T time steps. Slots are those of `kernels.py`; `block[k]` belongs to slot k, for k = 0 … N+1."""

    def __init__(self, key: Key, T: int):
        graph, B, H, N = key.graph, key.B, key.H, key.graph.n_nodes
        self.key, self.T, self.N = key, T, N
        new = dict(dtype=key.dtype, device=key.device)
        self.order = torch.tensor(list(graph.arrays["order"]), device=key.device)
        nodes, self.levels, edges, ends, runs = layout(graph)
        readers = [*zip(graph.arrays["first"], graph.arrays["count"]), (0, 0)]
        self.readers = [(0, 1), *(readers[node] for node in nodes)]  # of each slot: first of its nodes in `order`, and how many; h's is node 0
        widths = [count * 2 * H for _, count in self.readers]
        self.pre = torch.empty(T * B * sum(widths), **new)
        self.block = [part.view(T, B, width) for part, width in zip(self.pre.split([T * B * width for width in widths]), widths)]  # (T,B,count·2H)
        self.W = [torch.empty(H, width, **new) for width in widths]
        self.W_t = [torch.empty(width, H, **new) for width in widths]  # transposed in memory: cuBLAS is up to 3 times as fast then
        self.states = torch.empty(N + 2, T + 1, B, H, **new)
        self.masked = torch.empty(N + 2, T + 1, B, H, **new) if key.masked else self.states
        self.mask = torch.empty(B, H, **new)
        self.scale = torch.empty(T if graph.normalise else 0, N + 2, H, **new)
        self.average = torch.tensor((0.0, *(graph.average[node] for node in nodes)), **new)
        offsets = [sum(widths[:k]) * T * B for k in range(N + 2)]
        integers = dict(dtype=torch.int64, device=key.device)
        self.edges = torch.tensor([(offsets[edge.source] + edge.place * 2 * H, widths[edge.source], edge.source, edge.met_first, edge.target,
                                    widths[edge.target] > 0) for edge in edges], **integers)
        self.ends, self.runs = torch.tensor(ends, **integers), torch.tensor(runs, **integers)
        one_hot = [[float(not key.mixed and edge.op == k) for k in range(4)] + [1.0] for edge in edges]
        one_hot[0][0] = 1.0  # node 0 is a tanh
        self.p = torch.tensor(one_hot, **new)  # (E+1, 5); a mixed cell's is written over in each pass
        self.d_states = torch.empty(N + 2, B, H, **new)
        self.product, self.d_h = torch.empty(N + 2, B, H, **new), torch.empty(B, H, **new)
        self.d_outputs = torch.empty(T, B, H, **new)
        self._tile(B, H, graph.normalise)
        self.d_p = torch.zeros(len(self.edges), 5, self.grid[0] * self.grid[1], dtype=torch.float64, device=key.device)
        self.fixed = dict(num_warps=max(4, min(16, self.rows * self.columns // 128)), NORMALISE=graph.normalise, MASKED=key.masked, ROWS=self.rows, COLUMNS=self.columns,
                          **(dict(DEGREE=8, LOW=-29.0) if key.dtype == torch.float32 else dict(DEGREE=15, LOW=-230.0)))
        self.recorded: dict[str, list] = {}  # by the names of the steps, a CUDA graph a time step

    def _tile(self, B: int, H: int, normalise: bool) -> None:
        """Rows and columns of a program's tile, and how many programs there are: enough of them to fill a GPU, wide enough to read whole sectors."""
        if normalise:
            self.rows = triton.next_power_of_2(B)
            self.columns = max(4, min(32, 1024 // self.rows, triton.next_power_of_2(H)))
        else:
            self.columns = min(128, triton.next_power_of_2(H))
            self.rows = min(triton.next_power_of_2(B), 512 // self.columns)
        self.grid = (triton.cdiv(H, self.columns), triton.cdiv(B, self.rows))

    def load_weights(self, W0_h: Tensor, Ws: Tensor, p: Tensor | None, mask: Tensor | None, transposed: bool) -> None:
        """W0_h (H, 2H), Ws (N, H, 2H), p (E, 4) or None, mask (B, H) or None, for the passes that follow; `transposed` if there will be backward passes."""
        H = self.key.H
        self.W[0].copy_(W0_h)
        ordered = Ws.index_select(0, self.order)
        for W, (first, count) in zip(self.W[1:], self.readers[1:]):
            W.view(H, count, 2 * H).copy_(ordered[first:first + count].transpose(0, 1))  # (count, H, 2H) -> (H, count, 2H)
        if transposed:
            for W, W_t in zip(self.W, self.W_t):
                W_t.copy_(W.t())
        if p is not None:
            self.p[1:, :4] = p
            self.p[1:, 4] = p.sum(1)
        if mask is not None:
            self.mask.copy_(mask)

    def forward(self, x_proj: Tensor, h0: Tensor) -> Tensor:
        """x_proj (T, B, 2H), h0 (B, H) -> a copy of the outputs (T, B, H)."""
        T = len(x_proj)
        self.block[0][:T] = x_proj
        self.states[0, 0] = h0
        if self.key.masked:
            torch.mul(self.states[0, 0], self.mask, out=self.masked[0, 0])
        self._take_steps(self.step_forward, range(T))
        return self.states[0, 1:T + 1].clone()

    def step_forward(self, t: int) -> None:
        self.block[0][t].addmm_(self.masked[0, t], self.W[0])  # (B, H) (H, 2H)
        for first, last, _, _ in self.levels:
            output = last == self.N + 2
            level_forward[(*self.grid, 1 if output else last - first)](
                self.pre, self.states, self.masked, self.mask, self.scale, self.p, self.edges, self.ends, self.average, t, first, last, int(output),
                self.key.B, self.key.H, self.states[0].numel(), self.N + 2, EPS=supernet.BATCHNORM_EPS, **self.fixed)
            for k in range(first, last):
                if self.readers[k][1]:
                    torch.mm(self.masked[k, t], self.W[k], out=self.block[k][t])  # (B, H) (H, count·2H)

    def backward(self, d_outputs: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
        """d_outputs (T, B, H) -> gradients of x_proj, h0, W0_h, Ws where `needs` says so, and of p (E, 5) or None."""
        T, N, H = len(d_outputs), self.N, self.key.H
        self.d_outputs[:T] = d_outputs
        self.d_states[0].zero_()  # nothing comes from beyond the last step
        self.product[0].zero_()
        if needs[4]:
            self.d_p.zero_()
        self._take_steps(self.step_backward_p if needs[4] else self.step_backward, reversed(range(T)))
        d_x = self.block[0][:T].clone() if needs[0] else None
        d_h0 = self.d_states[0] + (self.product[0] * self.mask if self.key.masked else self.product[0]) if needs[1] else None
        d_W0_h, d_Ws = None, None
        if needs[2]:
            d_W0_h = self._weight_gradient(0, T)
        if needs[3]:
            ordered = torch.zeros(N, H, 2 * H, dtype=self.key.dtype, device=self.key.device)
            for k, (first, count) in enumerate(self.readers[1:], start=1):
                if count:
                    ordered[first:first + count] += self._weight_gradient(k, T).view(H, count, 2 * H).transpose(0, 1)  # (count, H, 2H)
            d_Ws = torch.empty_like(ordered).index_copy_(0, self.order, ordered)
        return [d_x, d_h0, d_W0_h, d_Ws, self.d_p[1:].sum(2) if needs[4] else None]

    def _weight_gradient(self, k: int, T: int) -> Tensor:
        return self.masked[k, :T].flatten(0, 1).t() @ self.block[k][:T].flatten(0, 1)  # (H, T·B) (T·B, count·2H)

    def step_backward(self, t: int, probabilities: bool = False) -> None:
        for first, last, run, runs in reversed(self.levels):
            for k in range(first, last):
                if self.readers[k][1]:
                    torch.mm(self.block[k][t], self.W_t[k], out=self.product[k])  # (B, count·2H) (count·2H, H)
            level_backward[(*self.grid, runs)](
                self.pre, self.states, self.d_states, self.product, self.mask, self.d_h, self.d_outputs, self.scale, self.p, self.d_p, self.edges, self.runs,
                self.average, t, run, int(last == self.N + 2), self.key.B, self.key.H, self.states[0].numel(), self.N + 2,
                PROBABILITIES=probabilities, **self.fixed)
        torch.mm(self.block[0][t], self.W_t[0], out=self.product[0])  # (B, 2H) (2H, H)

    def step_backward_p(self, t: int) -> None:
        self.step_backward(t, probabilities=True)

    def _take_steps(self, step, times) -> None:
        """step(t) for each t, from its recording where there is one."""
        recorded = self.recorded.get(step.__name__)
        for t in times:
            if recorded is None or torch.cuda.is_current_stream_capturing():
                step(t)
            else:
                recorded[t].replay()

    def record(self, backward: bool) -> None:
        """Every step as a CUDA graph, before a pass begins: what it computes is lost. On a stream of its own, as recording asks for."""
        steps = [self.step_forward, *([self.step_backward] if backward else []), *([self.step_backward_p] if backward and self.key.mixed else [])]
        missing = [step for step in steps if step.__name__ not in self.recorded]
        if self.key.device.type != "cuda" or not missing or torch.cuda.is_current_stream_capturing():
            return
        stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for step in missing:
                step(0)  # compiles the kernels and sets cuBLAS up, which must not happen in a recording
                # cuBLAS's workspace must be the recording's own: others clear the usual one (Lightning, when a fit ends), and a replay would write to it
                torch._C._cuda_clearCublasWorkspaces()
                graphs = [torch.cuda.CUDAGraph() for _ in range(self.T)]
                for t, graph in enumerate(graphs):
                    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                    step(t)
                    graph.capture_end()
                torch._C._cuda_clearCublasWorkspaces()
                self.recorded[step.__name__] = graphs
        torch.cuda.current_stream().wait_stream(stream)
