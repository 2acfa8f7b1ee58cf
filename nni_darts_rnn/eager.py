"""The mixed cell over a whole sequence in torch operations, with a backward pass written by hand: the fast path of a CPU where nothing was compiled.

The description of a cell, the formulas, their derivatives and the names are those at the head of `csrc/cells.cpp`. So is what is kept for the backward pass:
σ(c) and z in place of the products (of node 0, σ(c) and tanh z), and the states. The batch is the last axis of everything, so a state is (H, B). Products are
up to a third faster in MKL that way round, and c and z of an edge are each one piece of memory. The readable forms leave the backward pass to autograd. Here
there is one product for all edges that leave a state, no graph, and no gradient that nobody asked for. (The discrete cell would gain nothing.)

torch's tanh takes five times as long as its σ on an AMD EPYC with AVX2. So where z comes from normalised states, tanh z is computed as 2 σ(2z) − 1, which is
off by 1e-7 at most in float32. For small z that would be too much, and in a cell without normalisation every z can be small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import supernet
from .graph import Graph
from .workspace import give, take

GRAIN = 1 << 18  # numbers in one operand of an element-wise operation: some ten operands must fit a cache
aten = torch.ops.aten


@dataclass(frozen=True)
class Shares:
    """The primitives' shares p in n mixtures, (n, 1, 1) each."""

    tanh: Tensor
    relu: Tensor
    sigmoid: Tensor
    identity: Tensor
    present: Tensor  # P
    row: Tensor  # P, (1, n)

    @classmethod
    def of(cls, p: Tensor) -> Shares:  # (n, 4)
        (tanh, relu, sigmoid, identity), present = (column[:, None, None].contiguous() for column in p.unbind(1)), p.sum(1)
        return cls(tanh, relu, sigmoid, identity, present[:, None, None], present[None])


@dataclass(frozen=True)
class Group:
    """n edges from one state to neighbouring nodes, which are computed at once."""

    edges: list[int]  # rows of p
    nodes: slice  # the nodes that they lead to
    shares: Shares
    first: bool  # whether they are the first edges of these nodes
    by_sigmoid: bool  # whether tanh z is computed from σ(2z)
    c: tuple[Tensor, ...]  # for each step (n, H, B)
    z: tuple[Tensor, ...]


@dataclass(frozen=True)
class Source:
    """All edges that leave one of the states 0 … N−1."""

    groups: list[Group]
    rows: slice  # its edges' weights: count·2H of the N·2H rows of all nodes
    block: Tensor  # (T, count·2H, B): pre-activations, or their gradients


class Run(NamedTuple):
    """What a forward pass leaves for the backward pass."""

    graph: Graph
    outputs: Tensor | None  # (T, B, H)
    inputs: tuple  # W0_h, Ws, mask (H, B) or None
    workspace: Tensor
    hidden: Tensor  # (T+1, H, B): h0 and the outputs
    pre0: Tensor  # (T, 2H, B)
    sources: list  # of `Source`
    states: Tensor  # (N+1, T, H, B)
    scale: Tensor  # (T, N+1, H): 1/√(v + eps)


def _sources(graph: Graph, blocks: list[Tensor], p: Tensor, at_once: int) -> list[Source]:
    """The sources from the blocks (T, count·2H, B) of the states 0 … N−1. State j has the edges to nodes j+1 … N."""
    N, (T, width, B) = graph.n_nodes, blocks[-1].shape
    sources = []
    for state, block in enumerate(blocks):
        halves = block.view(T, -1, 2, width // 2, B).permute(2, 0, 1, 3, 4)  # (T, count, 2, H, B) -> (2, T, count, H, B)
        groups = []
        for node in range(state + 1, N + 1, at_once):
            nodes = range(node, min(node + at_once, N + 1))
            edges = [i * (i - 1) // 2 + state for i in nodes]
            c, z = halves[:, :, node - state - 1:nodes.stop - state - 1].unbind(0)  # (T, n, H, B) each
            groups.append(Group(edges, slice(node, nodes.stop), Shares.of(p[edges]), state == 0, graph.normalise, c.unbind(0), z.unbind(0)))
        sources.append(Source(groups, slice(state * width, N * width), block))
    return sources


def run_forward(graph: Graph, x_proj: Tensor, h0: Tensor, W0_h: Tensor, Ws: Tensor, p: Tensor, mask: Tensor | None, keep: bool, rounded: bool = False) -> Run:
    """As `compiled.run_forward`, for a mixed cell. Its products are never rounded."""
    (T, B, _), H, N, new = x_proj.shape, h0.shape[1], graph.n_nodes, x_proj.new_empty
    steps, at_once = T if keep else 1, max(1, min(N, GRAIN // (B * H)))
    workspace, large = take("cell", {"states": (N + 1) * steps * H * B, **{str(j): steps * (N - j) * 2 * H * B for j in range(N)}}, x_proj.dtype)
    blocks = [large[str(j)].view(steps, (N - j) * 2 * H, B) for j in range(N)]
    mask = None if mask is None else mask.t().contiguous()
    run = Run(graph, new(T, B, H), (W0_h, Ws, mask), workspace, new(steps + 1, H, B), new(steps, 2 * H, B), _sources(graph, blocks, p, at_once),
              large["states"].view(N + 1, steps, H, B), new(steps, N + 1, H))
    W = Ws.transpose(1, 2).flatten(0, 1)  # (N, H, 2H) -> (N·2H, H)
    average, mean, masked = x_proj.new_tensor(graph.average)[None], new(H), new(H, B)  # (1, N+1)
    m, spare, sums = new(at_once, H, B), new(at_once, H, B), new(N + 1, H, B)

    def finish(r: Tensor, state: Tensor, scale: Tensor) -> None:
        if graph.normalise:
            aten.native_batch_norm.out(r[None], None, None, None, None, True, 0.0, supernet.BATCHNORM_EPS, out=state[None], save_mean=mean, save_invstd=scale)

    h = run.hidden[0].copy_(h0.t())
    for t, (x, output) in enumerate(zip(x_proj.unbind(0), run.outputs.unbind(0))):
        k = t if keep else 0
        r = sums if graph.normalise else run.states[:, k]
        states, sums_of, scale = run.states[:, k].unbind(0), r.unbind(0), run.scale[k].unbind(0)

        c, z = torch.addmm(x.t(), W0_h.t(), _masked(h, mask, masked), out=run.pre0[k]).chunk(2)  # (H, B) each
        torch.lerp(h, z.tanh_(), c.sigmoid_(), out=sums_of[0])
        finish(sums_of[0], states[0], scale[0])
        for j, source in enumerate(run.sources):
            torch.mm(W[source.rows], _masked(states[j], mask, masked), out=source.block[k])  # (count·2H, H) (H, B)
            for group in source.groups:
                n = len(group.edges)
                _edges_forward(group, group.c[k].sigmoid_(), group.z[k], states[j], r[group.nodes], m[:n], spare[:n])
            finish(sums_of[j + 1], states[j + 1], scale[j + 1])
        h = run.hidden[k + 1]
        torch.mm(average, run.states[:, k].flatten(1), out=h.view(1, -1))  # (1, N+1) (N+1, H·B)
        output.copy_(h.t())
    if not keep:
        give("cell", workspace)
    return run


def run_backward(run: Run, d_outputs: Tensor, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """As `compiled.run_backward`."""
    graph, (W0_h, Ws, mask) = run.graph, run.inputs
    (T, B, H), N, new = d_outputs.shape, graph.n_nodes, d_outputs.new_empty
    W = Ws.transpose(0, 1).flatten(1)  # (N, H, 2H) -> (H, N·2H)
    average = d_outputs.new_tensor(graph.average)[:, None, None]
    d_W0_h = new(H, 2 * H).zero_() if needs[2] else None
    d_W = new(N * 2 * H, H).zero_() if needs[3] else None
    d_p = new(graph.n_edges, 5, dtype=torch.float64).zero_() if needs[4] else None
    scratch, masked, zeros, ones, dh = new(6, len(run.sources[0].groups[0].edges), H, B), new(H, B), new(H).zero_(), new(H).fill_(1), new(H, B).zero_()
    all_ds = new(N + 1, H, B)
    all_dr = torch.empty_like(all_ds) if graph.normalise else all_ds
    ds, dr = all_ds.unbind(0), all_dr.unbind(0)

    def through(W: Tensor, d_pre: Tensor, to: Tensor) -> None:
        """to += m∘(W dpre)"""
        if mask is None:
            to.addmm_(W, d_pre)  # (H, count·2H) (count·2H, B)
        else:
            to.addcmul_(torch.mm(W, d_pre, out=masked), mask)

    def finish(ds: Tensor, dr: Tensor, state: Tensor, scale: Tensor) -> None:
        if graph.normalise:  # torch's own, on the normalised states (mean 0, deviation 1), with `scale` as the weight
            dr.copy_(aten.native_batch_norm_backward(ds[None], state[None], scale, None, None, zeros, ones, True, 0.0, [True, False, False])[0][0])

    for t in reversed(range(T)):
        states, scale = run.states[:, t].unbind(0), run.scale[t].unbind(0)

        dh += d_outputs[t].t()
        torch.mul(average, dh, out=all_ds)  # (N+1, 1, 1) (H, B)
        finish(ds[N], dr[N], states[N], scale[N])
        for j in reversed(range(N)):
            source = run.sources[j]
            for group in source.groups:
                sums = _edges_backward(group, group.c[t], group.z[t], states[j], all_dr[group.nodes], ds[j], scratch[:, :len(group.edges)].unbind(0), needs[4])
                if d_p is not None and sums is not None:
                    d_p[group.edges] += sums
            through(W[:, source.rows], source.block[t], ds[j])
            if d_W is not None:
                d_W[source.rows].addmm_(source.block[t], _masked(states[j], mask, masked).t())  # (count·2H, B) (B, H)
            finish(ds[j], dr[j], states[j], scale[j])
        h, d_pre0 = run.hidden[t], run.pre0[t]
        c, tanh = d_pre0.chunk(2)  # (H, B) each
        moved = torch.mul(dr[0], c, out=masked)
        torch.sub(dr[0], moved, out=dh)
        torch.mul(torch.sub(tanh, h).mul_(dh), c, out=c)
        aten.tanh_backward.grad_input(moved, tanh, grad_input=tanh)
        through(W0_h, d_pre0, dh)
        if d_W0_h is not None:
            d_W0_h.addmm_(_masked(h, mask, masked), d_pre0.t())  # (H, B) (B, 2H)

    give("cell", run.workspace)
    d_Ws = None if d_W is None else d_W.view(N, 2 * H, H).transpose(1, 2).contiguous()
    return [run.pre0.transpose(1, 2).contiguous() if needs[0] else None, dh.t().contiguous() if needs[1] else None, d_W0_h, d_Ws, d_p]


def _masked(s: Tensor, mask: Tensor | None, out: Tensor) -> Tensor:
    """s∘m, (H, B), or s itself without a mask."""
    return s if mask is None else torch.mul(s, mask, out=out)


def _tanh(group: Group, z: Tensor, out: Tensor) -> Tensor:
    """σ(2z) if the group is `by_sigmoid`, else tanh z."""
    return torch.add(z, z, out=out).sigmoid_() if group.by_sigmoid else torch.tanh(z, out=out)


def _tanh_share(group: Group, f: Tensor, out: Tensor) -> Tensor:
    """p tanh z, from f, the result of `_tanh`."""
    if group.by_sigmoid:
        return torch.mul(f, 2 * group.shares.tanh, out=out).sub_(group.shares.tanh)
    return torch.mul(f, group.shares.tanh, out=out)


def _edges_forward(group: Group, c: Tensor, z: Tensor, s: Tensor, r: Tensor, m: Tensor, spare: Tensor) -> None:
    """Add P s + σ(c)∘(M − P s) to r; if the group is its nodes' first, write it to r instead. c is σ(c) already; c, z, r (n, H, B), s (H, B)."""
    share = group.shares
    _tanh_share(group, _tanh(group, z, spare), m)
    m.addcmul_(torch.sigmoid(z, out=spare), share.sigmoid).addcmul_(torch.clamp_min(z, 0, out=spare), share.relu).addcmul_(z, share.identity)
    carried = torch.mul(share.present, s, out=spare)
    if group.first:
        torch.lerp(carried, m, c, out=r)
    else:
        r += torch.lerp(carried, m, c, out=m)


def _edges_backward(group: Group, c: Tensor, z: Tensor, s: Tensor, dr: Tensor, ds: Tensor, scratch: tuple[Tensor, ...], probabilities: bool) -> Tensor | None:
    """Overwrite σ(c), z (n, H, B) with dc, dz, and add P dr∘(1 − σ) of all n edges to ds (H, B). With `probabilities`, return the sums (n, 5) for dp."""
    (moved, left, m, f, g, spare), share = scratch, group.shares
    torch.sub(dr, torch.mul(dr, c, out=moved), out=left)  # dr∘σ, dr∘(1 − σ)
    ds.view(1, -1).addmm_(share.row, left.flatten(1))  # (1, n) (n, H·B)
    _tanh_share(group, _tanh(group, z, f), m)
    m.addcmul_(torch.sigmoid(z, out=g), share.sigmoid).addcmul_(z, share.identity).addcmul_(torch.clamp_min(z, 0, out=spare), share.relu)
    sums = None
    if probabilities:
        relu = _sum(moved, spare, spare)
        tanh = _sum(moved, f, spare)
        tanh = 2 * tanh - moved.sum((1, 2)) if group.by_sigmoid else tanh
        sums = torch.stack([_sum(left, s, spare), tanh, relu, _sum(moved, g, spare), _sum(moved, z, spare)], 1)  # the order of csrc/edges.h
    torch.mul(m.addcmul_(share.present, s, value=-1).mul_(left), c, out=c)
    if group.by_sigmoid:
        f.addcmul_(f, f, value=-1).mul_(4 * share.tanh)  # tanh' = 4 σ(2z)(1 − σ(2z))
    else:
        f.mul_(f).mul_(-share.tanh).add_(share.tanh)
    f.addcmul_(g.addcmul_(g, g, value=-1), share.sigmoid).addcmul_(torch.gt(z, 0, out=spare), share.relu).add_(share.identity)
    torch.mul(moved, f, out=z)
    return sums


def _sum(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Σ a∘b of each edge: (n, H, B) -> (n)."""
    return torch.mul(a, b, out=out).sum((1, 2))
