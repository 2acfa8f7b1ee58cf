"""Cross-entropy of a linear layer by blocks of rows, without holding all its logits (R, V)."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from .compiled import padded, parts, room
from .exports import CrossEntropyStruct
from .extension import State, enabled
from .fused import autocast_dtype, differentiable, plain, readable_only, subclassed
from .workspace import give, take

_CHUNK = {"cpu": 1 << 22, "cuda": 1 << 26}  # numbers in one block of logits: what the CPU's cache holds, and enough to keep a GPU busy
_FEW = 128  # packing the weights pays from this many rows on


def linear_cross_entropy(dropped: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """F.cross_entropy(F.linear(dropped, weight, bias), targets), the mean nats per row, without holding all logits (R, V).

    dropped (R, H), weight (V, H), bias (V) or None, targets (R) of 0 … V−1. Logits are made for a block of rows at a time. Where a gradient is
    wanted, the block's share of it is computed at once, so nothing of size V is kept for a row. Works on any device, with or without the
    extension, and under autocast.
    """
    if State.forced_off or not plain() or dropped.device.type not in ("cpu", "cuda") or not _fits(dropped, weight, bias, targets):
        return _readable_cross_entropy(dropped, weight, bias, targets)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (dropped, weight, bias)]
    if any(needs):
        return _LinearCrossEntropy.apply(dropped, weight, bias, targets)
    return _cross_entropy(dropped, weight, bias, targets, needs)[0]


def _fits(dropped: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> bool:
    """Whether these are plain tensors as above, on one device and of one dtype (under autocast several). Others are left to torch and its error messages."""
    numbers = [dropped, weight, *([] if bias is None else [bias])]
    if subclassed([*numbers, targets]) or any(t.device != dropped.device or t.layout != torch.strided for t in (*numbers, targets)):
        return False
    if not (dropped.dim() == weight.dim() == 2 and targets.dim() == 1 and targets.dtype == torch.int64):
        return False
    autocast = autocast_dtype(dropped) is not None  # autocast leaves float64 as it is
    if any(not t.is_floating_point() or (t.dtype == torch.float64 if autocast else t.dtype != dropped.dtype) for t in numbers):
        return False
    (R, H), V = dropped.shape, len(weight)
    return min(R, H, V) > 0 and weight.shape == (V, H) and len(targets) == R and (bias is None or bias.shape == (V,))


def _readable_cross_entropy(dropped, weight, bias, targets):
    return F.cross_entropy(F.linear(dropped, weight, bias), targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dropped, weight, bias, targets):
        ctx.save_for_backward(dropped, weight, bias, targets)
        loss, *ctx.grads = _cross_entropy(dropped, weight, bias, targets, ctx.needs_input_grad)
        ctx.autocast = autocast_dtype(dropped)
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        with torch.autocast(d_loss.device.type, ctx.autocast, enabled=ctx.autocast is not None):
            if readable_only(d_loss):
                return differentiable(_readable_cross_entropy, ctx.saved_tensors, ctx.needs_input_grad, d_loss)
            grads, ctx.grads = ctx.grads, None  # they are the caller's from here on
            if grads is None:  # a second pass through a retained graph
                grads = _cross_entropy(*ctx.saved_tensors, ctx.needs_input_grad)[1:]
        if d_loss.device.type != "cpu" or d_loss != 1:  # on a GPU the comparison would wait for it; it is 1 for a loss that `backward` is called on
            # a gradient scaler's factor may be beyond float16's range
            grads = [None if g is None else g.mul_(d_loss.to(g.dtype)) if g.dtype.itemsize >= 4 else (g.float() * d_loss).to(g.dtype) for g in grads]
        return (*grads, None)


@torch.no_grad()
def _cross_entropy(dropped: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, needs) -> list[Tensor | None]:
    """The loss and its gradients with respect to dropped, weight and bias, each None where `needs` is False."""
    device = dropped.device.type
    dtype = autocast_dtype(dropped) or dropped.dtype
    with torch.autocast(device, enabled=False):
        compiles = device == "cpu" and weight.dtype in (torch.float32, torch.float64) and len(dropped) >= _FEW and enabled()
        if compiles and (dtype == dropped.dtype == weight.dtype or dtype == torch.bfloat16 and weight.dtype == torch.float32):
            return _compiled(dropped.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype), targets, needs, dtype == torch.bfloat16)
        x, w = dropped.to(dtype), weight.to(dtype)
        b = None if bias is None else bias.to(dtype)
        return _by_blocks(x, w, b, targets, needs, dropped.dtype, weight.dtype)


def _compiled(x: Tensor, w: Tensor, b: Tensor | None, targets: Tensor, needs, rounded: bool) -> list[Tensor | None]:
    """`_by_blocks` in C++ (csrc/cross_entropy.cpp), `rounded` as in `compiled.run_forward`."""
    (R, H), V = x.shape, len(w)
    x, w, b, y = x.contiguous(), w.contiguous(), None if b is None else b.contiguous(), targets.contiguous()
    nll = x.new_empty(R, dtype=torch.float64)
    grads = [x.new_empty(shape) if need else None for shape, need in zip(((R, H), (V, H), (V,)), needs)]
    n_parts = parts(x.dtype, rounded, min(H, V), State.loaded.block // torch.get_num_threads())
    sizes = {"logits": State.loaded.block * V, "packed": room(n_parts, H, V)}
    if needs[0]:
        sizes["packed_back"] = room(n_parts, V, H)
    if needs[1]:
        sizes["d_w_transposed"] = padded(V) * H
    workspace, scratch = take("loss", sizes, x.dtype)
    arguments = CrossEntropyStruct(R, H, V, torch.get_num_threads(), n_parts, 1 / R if any(needs[:3]) else 0.0)
    arguments.hold({"x": x, "w": w, "b": b, "targets": y, "nll": nll, **dict(zip(("d_x", "d_w", "d_b"), grads)), **scratch})
    bad = State.loaded.cross_entropy[x.dtype](ctypes.byref(arguments))
    give("loss", workspace)
    if bad >= 0:
        raise IndexError(f"Target {int(y[bad])} is out of bounds.")
    return [nll.mean().to(x.dtype), *grads]


def _by_blocks(x: Tensor, w: Tensor, b: Tensor | None, targets: Tensor, needs, x_dtype: torch.dtype, w_dtype: torch.dtype) -> list[Tensor | None]:
    """Loss and gradients for x, w and b in the dtype to compute in. The gradients have `x_dtype` and `w_dtype`, from which x, w and b were cast.

    This function can go once every supported torch has `F.linear_cross_entropy`, as 2.14 has. In one process on two cores the shortest of four runs took
    494 ms there and 508 here (8,960 rows, 300 units, 10,000 words).
    """
    (R, H), V, dtype = x.shape, len(w), x.dtype
    rows = max(64, _CHUNK.get(x.device.type, _CHUNK["cuda"]) // V)
    wide = dtype if dtype.itemsize >= 4 else torch.float32  # for sums over many blocks
    d_x = torch.empty_like(x, dtype=x_dtype) if needs[0] else None
    d_w = torch.zeros(H, V, dtype=wide, device=w.device) if needs[1] else None  # transposed, as w_t: MKL is up to a fifth faster that way round
    d_b = torch.zeros(V, dtype=wide, device=w.device) if needs[2] else None
    nats = torch.zeros((), dtype=torch.float64, device=x.device)
    space = x.new_empty(min(rows, R), V)  # one block of logits, reused for all blocks
    w_t = w.t().contiguous() if R >= _FEW else w.t()
    for start in range(0, R, rows):
        part, y = x[start:start + rows], targets[start:start + rows, None]
        logits = torch.mm(part, w_t, out=space[:len(part)])  # (rows, H) (H, V) -> (rows, V)
        logits = logits if dtype == wide else logits.float()
        if b is not None:
            logits += b
        top, chosen = logits.amax(1), logits.gather(1, y).squeeze(1)  # (rows,) each
        d = torch.softmax(logits, 1, out=logits)
        nats += (top - chosen - d.amax(1).log()).sum(dtype=torch.float64)  # the largest of a row's shares is 1/Σ exp(logit − top)
        if not any(needs[:3]):
            continue
        d.scatter_add_(1, y, d.new_full(y.shape, -1))
        if d_b is not None:
            d_b += d.sum(0)
        d = d.to(dtype)
        if d_x is not None:
            d_x[start:start + rows] = d @ w  # (rows, V) (V, H)
        if d_w is not None:
            if wide == dtype:
                d_w.addmm_(part.t(), d)  # (H, rows) (rows, V)
            else:
                d_w += part.t() @ d
    d_w = None if d_w is None else d_w.t().contiguous()  # (V, H)
    grads = [None if d is None else d.mul_(1 / R).to(of) for d, of in ((d_x, x_dtype), (d_w, w_dtype), (d_b, w_dtype))]
    return [(nats / R).to(x_dtype if x_dtype.itemsize >= 4 else torch.float32), *grads]
