"""The fast path: both cells over a whole sequence with a hand-written backward, in C++, in torch operations or on a GPU.

`discrete_cell` and `mixed_cell` take and return the same as `cell.discrete_cell` and `supernet.mixed_cell`, up to rounding. For float32 and float64, built-in
primitives and plain autograd, they run `gpu/` on a GPU. On a CPU they run `csrc/cells.cpp` where the extension is in use, and `eager.py` for a mixed cell
where it is not. In all other cases they run the readable forms.
A second derivative (`create_graph=True`) is taken through the readable form automatically; `reference()` avoids the detour where that is known before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cell, compiled, eager, supernet
from .extension import SWITCH, State, available, enable, enabled, gpu_ready, on_gpu, prepare, reference, saved_seconds, why_not
from .genotype import PRIMITIVES, Genotype
from .graph import OPS, Graph, discrete_graph, mixed_graph

__all__ = ["SWITCH", "available", "discrete_cell", "drawn_cell", "enable", "enabled", "mixed_cell", "prepare", "reference", "saved_seconds", "why_not"]

GPU_BATCH = 4096
"""The largest batch for the GPU's kernels: one program of theirs normalises whole columns of it."""


def discrete_cell(x_proj: Tensor, h0: Tensor, W0_h: Tensor, Ws: Tensor, genotype: Genotype, mask: Tensor | None = None) -> Tensor:
    """`cell.discrete_cell`, on the fast path where it applies."""
    compiled_or_gpu, half = on_gpu(x_proj) or enabled(), autocast_dtype(x_proj)
    if half and compiled_or_gpu:  # states keep all digits; only the operands of products are rounded, where that gains something
        x_proj, h0, mask = (t if t is None or t.dtype == torch.float64 else t.float() for t in (x_proj, h0, mask))
    if not (compiled_or_gpu and _applies(x_proj, h0, W0_h, Ws, mask) and len(Ws) == genotype.n_nodes and all(_built_in(op) for op, _ in genotype.recurrent)):
        return cell.discrete_cell(x_proj, h0, W0_h, Ws, genotype, mask)
    if _needs_graph(x_proj, h0, W0_h, Ws):
        def readable(x, h, W0, W, _, m):
            return cell.discrete_cell(x, h, W0, W, genotype, m)

        return _CellFunction.apply(discrete_graph(genotype), None, readable, half == torch.bfloat16, x_proj, h0, W0_h, Ws, None, mask)
    return _forward(discrete_graph(genotype), x_proj, h0, W0_h, Ws, None, mask, half == torch.bfloat16)


def mixed_cell(x_proj: Tensor, h0: Tensor, W0_h: Tensor, Ws: Tensor, probabilities: Tensor, mask: Tensor | None = None,
               primitives=PRIMITIVES, normalise: bool = True) -> Tensor:
    """`supernet.mixed_cell`, on the fast path where it applies."""
    if not _applies_mixed(x_proj, h0, W0_h, Ws, mask, probabilities, primitives, normalise):
        return supernet.mixed_cell(x_proj, h0, W0_h, Ws, probabilities, mask, primitives, normalise)
    graph, places = mixed_graph(len(Ws), normalise), _places(primitives)
    if _needs_graph(x_proj, h0, W0_h, Ws, probabilities):
        return _CellFunction.apply(graph, places, _readable_mixed(primitives, normalise), False, x_proj, h0, W0_h, Ws, probabilities, mask)
    return _forward(graph, x_proj, h0, W0_h, Ws, _mixture(probabilities, places), mask)


def drawn_cell(x_proj: Tensor, h0: Tensor, W0_h: Tensor, Ws: Tensor, probabilities: Tensor, mask: Tensor | None = None,
               primitives=PRIMITIVES) -> Tensor:
    """`supernet.mixed_cell` without BatchNorm where `probabilities` (E, K) are one-hot in each node's rows.

    Only that one discrete cell runs, forward and backward. If the probabilities need a gradient, the other edges run forward as well.
    """
    if on_gpu(x_proj):  # recording steps for each drawn cell would take longer there than running all edges
        return mixed_cell(x_proj, h0, W0_h, Ws, probabilities, mask, primitives, normalise=False)
    genotype = supernet.one_hot_genotype(probabilities.detach(), primitives)
    one_hot = genotype.n_nodes == len(Ws)  # False where they are NaN
    if one_hot and not _needs_graph(probabilities):
        return discrete_cell(x_proj, h0, W0_h, Ws, genotype, mask)
    if not (one_hot and enabled() and _applies_mixed(x_proj, h0, W0_h, Ws, mask, probabilities, primitives)):
        return mixed_cell(x_proj, h0, W0_h, Ws, probabilities, mask, primitives, normalise=False)
    return _CellFunction.apply(discrete_graph(genotype), _places(primitives), _readable_mixed(primitives, False), False, x_proj, h0, W0_h, Ws, probabilities, mask)


def _readable_mixed(primitives, normalise: bool):
    names = tuple(primitives)
    return lambda *tensors: supernet.mixed_cell(*tensors, names, normalise)


def _places(primitives) -> tuple[tuple[int, int], ...]:
    """(column of the probabilities, op) for each primitive that is a function."""
    return tuple((k, OPS.index(name)) for k, name in enumerate(primitives) if name != "none")


def _applies_mixed(x_proj: Tensor, h0: Tensor, W0_h: Tensor, Ws: Tensor, mask: Tensor | None, probabilities: Tensor, primitives,
                   normalise: bool = False) -> bool:
    """Whether `_applies` holds, the primitives are the package's own, each named once, and every edge has a row of probabilities."""
    ops, n = [name for name in primitives if name != "none"], len(Ws)
    if autocast_dtype(x_proj) is not None or (normalise and len(h0) < 2):  # a batch of one has no variance
        return False
    return (0 < len(ops) == len(set(ops)) and all(map(_built_in, ops)) and probabilities.shape == (n * (n + 1) // 2, len(primitives))
            and _applies(x_proj, h0, W0_h, Ws, mask, probabilities))


def _built_in(op: str) -> bool:
    """Whether `op` is computed by the package's own function, not by one registered under its name."""
    function = cell.ACTIVATIONS.get(op)
    return op in OPS and (function is getattr(torch, op, None) or getattr(function, "__module__", "") == cell.__name__)


def _applies(x_proj: Tensor, h0: Tensor, W0_h: Tensor, Ws: Tensor, mask: Tensor | None, *others: Tensor) -> bool:
    """Whether one of the fast forms can take these tensors. Shapes that do not fit are left to the readable form and its error messages."""
    if State.forced_off or not plain() or not (gpu_ready(x_proj) if on_gpu(x_proj) else x_proj.device.type == "cpu"):
        return False
    tensors = [x_proj, h0, W0_h, Ws, *others, *([] if mask is None else [mask])]
    if x_proj.dtype not in (torch.float32, torch.float64) or subclassed(tensors):
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
    """Whether one of the tensors may have arithmetic of its own or no memory to point at (a distributed tensor, one without numbers, one that wraps others),
    or holds the negatives of its numbers in memory, as the imaginary part of a conjugate does."""
    return any(type(t) not in (Tensor, torch.nn.Parameter) or t.is_neg() for t in tensors)


def plain() -> bool:
    """Whether none of these is active, which must see every operation: torch.compile, a trace, a torch.func transform, forward-mode differentiation, a
    dispatch mode."""
    if torch._C._get_tracing_state() is not None or torch.autograd.forward_ad._current_level >= 0 or torch._C._len_torch_dispatch_stack():
        return False
    return not torch.compiler.is_compiling() and not getattr(torch._C, "_are_functorch_transforms_active", lambda: False)()


def _needs_graph(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _mixture(probabilities: Tensor, places: tuple[tuple[int, int], ...]) -> Tensor:
    """probabilities (E, K) -> (E, 4), in the order of OPS; an absent primitive has probability 0."""
    p = probabilities.new_zeros(len(probabilities), len(OPS))
    for k, place in places:
        p[:, place] = probabilities[:, k]
    return p


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype in which autocast computes products on this tensor's device, or None without autocast."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) else None


def _engine(x_proj: Tensor):
    """The module whose `run_forward` and `run_backward` apply to this tensor."""
    if on_gpu(x_proj):
        from .gpu import sequence  # here, since it imports Triton

        return sequence
    return compiled if enabled() else eager


def _forward(graph: Graph, x_proj: Tensor, h0: Tensor, W0_h: Tensor, Ws: Tensor, p: Tensor | None, mask: Tensor | None, rounded: bool = False) -> Tensor:
    """The outputs (T, B, H), without what a backward pass needs."""
    return _run(_engine(x_proj), graph, (x_proj, h0, W0_h, Ws), p, mask, False, rounded).outputs


def _run(engine, graph: Graph, tensors, p: Tensor | None, mask: Tensor | None, keep: bool, rounded: bool):
    """Call the engine's `run_forward` with autocast off: the engine itself decides the precision of its products."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        return engine.run_forward(graph, *(t.detach() for t in tensors), p, mask, keep=keep, rounded=rounded)


class _CellFunction(torch.autograd.Function):
    """Either cell: (graph, places, readable form, whether products may round to bfloat16, x_proj, h0, W0_h, Ws, probabilities, mask) -> outputs."""

    @staticmethod
    def forward(ctx, graph, places, readable, rounded, *tensors):
        ctx.graph, ctx.places, ctx.readable, ctx.rounded, ctx.engine = graph, places, readable, rounded, _engine(tensors[0])
        # hooks, such as those of checkpointing, are there to keep less: the backward pass then runs the forward pass again
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        run = _CellFunction.run(ctx, tensors, keep=not hooked)
        ctx.run = None if hooked else run._replace(outputs=None)  # saved with the other tensors: autograd notices a change in place there, and no cycle is made
        ctx.save_for_backward(*tensors, run.outputs)
        ctx.set_materialize_grads(False)
        return run.outputs

    @staticmethod
    def run(ctx, tensors, keep=True):
        *others, probabilities, mask = tensors
        p = _mixture(probabilities.detach(), ctx.places) if ctx.graph.mixed else None
        return _run(ctx.engine, ctx.graph, others, p, mask, keep, ctx.rounded)

    @staticmethod
    def backward(ctx, d_outputs):
        if d_outputs is None:
            return (None,) * 10
        *tensors, outputs = ctx.saved_tensors
        needs = ctx.needs_input_grad[4:]
        if any(t is not None and t.dtype != d_outputs.dtype for t in (*tensors, outputs)):
            raise RuntimeError("a tensor that was saved for the backward pass came back from its hook in another dtype")
        if readable_only(d_outputs):
            return (None,) * 4 + differentiable(ctx.readable, tensors, needs, d_outputs)
        # the first backward pass uses up the buffers, so a second one through the same graph runs the forward pass again
        run, ctx.run = ctx.run or _CellFunction.run(ctx, tensors), None
        *grads, d_p = ctx.engine.run_backward(run._replace(outputs=outputs), d_outputs.resolve_neg(), needs)
        d_probabilities = None
        if d_p is not None:
            d_probabilities = torch.zeros_like(tensors[4], memory_format=torch.contiguous_format)
            for k, place in ctx.places:
                d_probabilities[:, k] = d_p[:, 0] + d_p[:, 1 + place]
        return (None,) * 4 + (*grads, d_probabilities, None)


def readable_only(d_output: Tensor) -> bool:
    """Whether a backward pass needs the readable form: it is to be differentiated again (`create_graph`), is of many gradients at once (`is_grads_batched`),
    or is itself transformed, traced or recorded, though its forward pass was not."""
    recorded = d_output.is_cuda and torch.cuda.is_current_stream_capturing()  # as in `extension.gpu_ready`
    return recorded or torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(d_output) or not plain()


@torch.enable_grad()
def differentiable(function, tensors: list[Tensor | None], needs, d_output: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of `function(*tensors)` that can be differentiated again."""
    # aliases, because one of the tensors may have been computed from another, and autograd must not follow that path here
    aliases = [None if t is None else t.view_as(t) for t in tensors]
    wanted = [a for a, need in zip(aliases, needs) if need]
    grads = iter(torch.autograd.grad(function(*aliases), wanted, d_output, create_graph=True, allow_unused=True))
    return tuple(next(grads) if need else None for need in needs)
