"""Either cell over a whole sequence on a GPU: products by cuBLAS, levels of nodes by `kernels.py`, and every time step a CUDA graph that is made once.

A step is some twenty small kernels, which take less time to run than Python needs to start them. So a `Plan` owns the memory of one kind of pass and
records each step's kernels on it. A pass copies its inputs in, replays T graphs, and copies its outputs out. A plan for long sequences also serves short
ones, which use its first steps. Where nothing can be recorded (Triton's interpreter on a CPU, which the tests use) the same steps run one kernel at a
time. A forward pass inside somebody else's recording runs the readable cell (`extension.gpu_ready`).
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .plan import Key, Plan

if TYPE_CHECKING:
    from ..graph import Graph

CHUNK = 64  # time steps at a time where nothing is kept for a backward pass
SPARE = 4  # kinds of plans kept for the next pass; a search or a retraining has one for training, and others for validation


class Spare:
    """Plans that no pass is using, the last used last."""

    plans: list[Plan] = []
    lock = threading.Lock()  # so that no two threads take the same one


class Lease:
    """A pass's hold on a plan: the plan is free again when nobody can ask for the backward pass any more."""

    def __init__(self, plan: Plan):
        self.plan = plan

    def __del__(self, spare: list[Plan] = Spare.plans):  # a default, as `Spare` may be gone when Python ends
        spare.append(self.plan)


class Run(NamedTuple):
    """What a forward pass leaves for the backward pass."""

    outputs: Tensor | None  # (T, B, H)
    lease: Lease


def run_forward(graph: Graph, x_proj: Tensor, h0: Tensor, W0_h: Tensor, Ws: Tensor, p: Tensor | None, mask: Tensor | None, keep: bool,
                rounded: bool = False) -> Run:
    """As `compiled.run_forward`, but no product is rounded more than TF32 does. Without `keep` the plan is free again at once."""
    with _on(x_proj):
        stream = torch.cuda.current_stream().cuda_stream if x_proj.is_cuda else 0
        key = Key(graph, h0.shape[0], h0.shape[1], mask is not None, p is not None, x_proj.dtype, x_proj.device, torch.backends.cuda.matmul.fp32_precision, stream)
        T = len(x_proj)
        plan = _take(key, T if keep else min(T, CHUNK))
        plan.record(keep)
        plan.load_weights(W0_h, Ws, p, mask, keep)
        lease = Lease(plan)
        if keep:
            return Run(plan.forward(x_proj, h0), lease)
        outputs = []
        for part in x_proj.split(CHUNK):
            outputs.append(plan.forward(part, h0))
            h0 = outputs[-1][-1]
        return Run(outputs[0] if len(outputs) == 1 else torch.cat(outputs), lease)


def run_backward(run: Run, d_outputs: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """As `compiled.run_backward`; it uses up what the forward pass left."""
    with _on(d_outputs):
        return run.lease.plan.backward(d_outputs, needs)


def _on(tensor: Tensor):
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _take(key: Key, T: int) -> Plan:
    with Spare.lock:
        found = next((plan for plan in reversed(Spare.plans) if plan.key == key and plan.T >= T), None)
        found = found or next((plan for plan in reversed(Spare.plans) if plan.key == key), None)
        if found is not None:
            Spare.plans.remove(found)
            if found.T >= T:
                return found
            del found  # too short: its memory is freed for a longer one
        kinds: list[Key] = []  # the last used first; of each kind all plans stay that were in use at once, as by a model's layers
        for kind in [plan.key for plan in reversed(Spare.plans)]:  # no name here holds a plan, whose memory may be for the new one
            if kind not in kinds:
                kinds.append(kind)
        Spare.plans[:] = [plan for plan in Spare.plans if plan.key in kinds[:SPARE]]
    with torch.inference_mode(False):  # a later pass may not be in inference mode, and could not use memory made in it
        try:
            return Plan(key, -(-T // 8) * 8)
        except torch.OutOfMemoryError:  # other kinds may have it, or what a pass left that failed for want of it
            Spare.plans.clear()
        return Plan(key, -(-T // 8) * 8)
