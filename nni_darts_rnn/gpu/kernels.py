"""The nodes of one level of either cell at one time step, forward and backward, as Triton kernels.

The description of a cell, its formulas and their derivatives are those of `csrc/cells.cpp`. Here a state has a *slot*. Slot 0 is h, the output of the
previous step. The other slots are the nodes' states, node 0's first. So node 0 is a node like the others: it has one edge, from slot 0, through tanh.
A *level* has the nodes whose longest way from h is equally long. They do not read each other and have neighbouring slots. A program has `COLUMNS` units
and, where states are normalised, the whole batch of them, so that no two programs need each other. A level's nodes or edges are divided along the grid's
third axis.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gate(c):
    """σ(c). NaN stays NaN, here and below: a training that has gone wrong must show it."""
    return 1 / (1 + tl.exp(-tl.where(c < -80, -80, c)))


@triton.jit
def tanh_sigmoid(z, DEGREE: tl.constexpr, LOW: tl.constexpr):
    """tanh z and σ(z) from one exp: with e = exp(−z), σ = 1/(1+e) and tanh = (1−e)(1+e)/(1+e²), where 1−e must not cancel near 0; e³ must not overflow."""
    x = -tl.where(z < LOW, LOW, z)
    series = x * 0 + 1
    for k in tl.static_range(DEGREE, 1, -1):
        series = 1 + x * (1.0 / k) * series
    m = tl.where(tl.abs(x) < 0.35, x * series, tl.exp(x) - 1)  # exp(x) − 1
    up, e = 2 + m, 1 + m
    both = 1 + e * e
    q = 1 / (up * both)
    return -m * up * up * q, q * both


ALIGNED = tl.constexpr(16)  # `hidden` is a multiple of this many numbers, so that four numbers of a row are read and written at a time

PLACE = ["t", "first", "last", "output"]  # arguments that differ from launch to launch: one kernel serves all values


@triton.jit(do_not_specialize=PLACE)
def level_forward(pre, states, masked, mask, scale, p, edges, ends, average, t, first, last, output, batch, hidden, plane, slots,
                  NORMALISE: tl.constexpr, EPS: tl.constexpr, MASKED: tl.constexpr, DEGREE: tl.constexpr, LOW: tl.constexpr,
                  UNROLLED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Compute slots first … last − 1 at step t. If `output` is 1, not 0, they are the last level: one program has them all, and writes h' to slot 0 at t + 1.

    pre: the blocks of pre-activations; states (slots, T+1, B, H), `plane` = (T+1)BH; masked: likewise, the masked states that products read; mask (B, H);
    scale (T, slots, H); p (E, 5): four probabilities and their sum; edges (E, 6): where c of row 0 and step 0 lies in pre, numbers from row to row,
    the slot that is read, whether the backward pass meets that slot first here, the node's own slot, whether anything reads the own slot; ends (slots):
    slot k has the edges ends[k-1] … ends[k] − 1; average (slots). `UNROLLED` edges are read at once: if they were read one after the other, each would wait
    for its row of `edges` and then for the data that the row points at.
    """
    u = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    b = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    here = (b < batch) & (u < hidden)
    t, plane = t.to(tl.int64), plane.to(tl.int64)  # offsets exceed 2³¹ at sizes that fit a large card
    at = t * batch * hidden + b * hidden + u
    if MASKED:  # loaded now: after the first write of states it would have to wait for that
        kept = tl.load(mask + b * hidden + u, here, 0)
    h = tl.zeros((ROWS, COLUMNS), pre.dtype.element_ty)
    for k in range(1, tl.where(output != 0, first, 1)):
        h += tl.load(average + k) * tl.load(states + k * plane + at, here, 0)
    for slot in range(first + tl.program_id(2), last, tl.num_programs(2)):
        r = tl.zeros((ROWS, COLUMNS), pre.dtype.element_ty)
        for e in tl.range(tl.load(ends + slot - 1), tl.load(ends + slot), loop_unroll_factor=UNROLLED):
            place, stride, source = tl.load(edges + 6 * e), tl.load(edges + 6 * e + 1), tl.load(edges + 6 * e + 2)
            c_at = pre + tl.multiple_of(place, ALIGNED) + (t * batch + b) * tl.multiple_of(stride, ALIGNED) + u
            c, z = tl.load(c_at, here, 0), tl.load(c_at + hidden, here, 0)
            carried = tl.load(p + 5 * e + 4) * tl.load(states + source * plane + at, here, 0)
            th, sg = tanh_sigmoid(z, DEGREE, LOW)
            m = tl.load(p + 5 * e) * th + tl.load(p + 5 * e + 1) * tl.where(z < 0, 0, z) + tl.load(p + 5 * e + 2) * sg + tl.load(p + 5 * e + 3) * z
            r += carried + gate(c) * (m - carried)
        if NORMALISE:
            wide = tl.where(here, r, 0).to(tl.float64)  # sums over the batch, with more digits than the terms have, as in torch's BatchNorm
            mean = tl.sum(wide, 0)[None, :] / batch
            off = tl.where(here, wide - mean, 0)
            spread = 1 / tl.sqrt(tl.sum(off * off, 0)[None, :] / batch + EPS)
            r = (off * spread).to(r.dtype)
            tl.store(scale + (t * slots + slot) * hidden + u, spread.to(r.dtype), u < hidden)
        tl.store(states + slot * plane + at, r, here)
        h += tl.load(average + slot) * r
        if MASKED:  # what the next products read; nothing reads the last level
            tl.store(masked + slot * plane + at, r * kept, here & (output == 0))
    ends_here = here & (output != 0)
    tl.store(states + at + batch * hidden, h, ends_here)
    if MASKED:
        tl.store(masked + at + batch * hidden, h * kept, ends_here)


@triton.jit(do_not_specialize=PLACE)
def level_backward(pre, states, d_states, product, mask, d_h, d_outputs, scale, p, d_p, edges, runs, average, t, first, output,
                   batch, hidden, plane, slots, NORMALISE: tl.constexpr, MASKED: tl.constexpr, PROBABILITIES: tl.constexpr,
                   DEGREE: tl.constexpr, LOW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Overwrite a level's pre-activations at step t with their gradients. Those of the level's slots are complete once the levels after it are done.

    runs: the k-th run of edges that read one slot, within a level, is runs[k] … runs[k+1] − 1. A program along the third axis has one of the level's
    runs, of which `first` is the first, so that no two programs add to one slot's gradient. Each program computes its nodes' gradients anew.
    d_states (slots, B, H): what edges have sent to each slot, to slot 0 from the step after this one; product (slots, B, H): what each slot got through
    the weights. If `output` is 1 the level is the last, and d_h (B, H) is computed. d_p (E, 5, programs), float64: this program's sums, added to.
    """
    u = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    b = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    here = (b < batch) & (u < hidden)
    row = b * hidden + u
    t, plane = t.to(tl.int64), plane.to(tl.int64)
    at = t * batch * hidden + row
    ends, goes_on = here & (output != 0), here & (output == 0)
    dh = tl.load(product + row, ends, 0)
    if MASKED:
        kept = tl.load(mask + row, here, 0)
        dh *= kept
    dh += tl.load(d_h + row, goes_on, 0) + tl.load(d_outputs + at, ends, 0) + tl.load(d_states + row, ends, 0)
    tl.store(d_h + row, dh, ends)
    run = runs + first + tl.program_id(2)
    for e in range(tl.load(run), tl.load(run + 1)):
        place, stride, source = tl.load(edges + 6 * e), tl.load(edges + 6 * e + 1), tl.load(edges + 6 * e + 2)
        slot, read = tl.load(edges + 6 * e + 4), tl.load(edges + 6 * e + 5) != 0
        mine = slot * batch * hidden + row
        came = tl.load(product + mine, here & read, 0)
        if MASKED:
            came *= kept
        dr = tl.load(average + slot) * dh + tl.load(d_states + mine, here & read, 0) + came
        if NORMALISE:
            own = tl.load(states + slot * plane + at, here, 0)
            wide = dr.to(tl.float64)
            mean, along = tl.sum(wide, 0)[None, :] / batch, tl.sum(wide * own, 0)[None, :] / batch
            spread = tl.load(scale + (t * slots + slot) * hidden + u, u < hidden, 0)
            dr = tl.where(here, spread * (wide - mean - own * along), 0).to(own.dtype)
        c_at = pre + tl.multiple_of(place, ALIGNED) + (t * batch + b) * tl.multiple_of(stride, ALIGNED) + u
        c, z = tl.load(c_at, here, 0), tl.load(c_at + hidden, here, 0)
        s = tl.load(states + source * plane + at, here, 0)
        p_tanh, p_relu, p_sigmoid, p_identity = tl.load(p + 5 * e), tl.load(p + 5 * e + 1), tl.load(p + 5 * e + 2), tl.load(p + 5 * e + 3)
        present = tl.load(p + 5 * e + 4)
        th, sg = tanh_sigmoid(z, DEGREE, LOW)
        m = p_tanh * th + p_relu * tl.where(z < 0, 0, z) + p_sigmoid * sg + p_identity * z
        slope = p_tanh * (1 - th * th) + tl.where(z > 0, p_relu, 0) + p_sigmoid * sg * (1 - sg) + p_identity
        opened = gate(c)
        moved, left = dr * opened, dr * (1 - opened)
        tl.store(c_at, left * opened * (m - present * s), here)
        tl.store(c_at + hidden, moved * slope, here)
        to = d_states + source * batch * hidden + row
        sent = tl.load(to, here & (tl.load(edges + 6 * e + 3) == 0), 0)
        tl.store(to, sent + present * left, here)
        if PROBABILITIES:
            programs = tl.num_programs(0) * tl.num_programs(1)
            sums = d_p + 5 * e * programs + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
            tl.store(sums, tl.load(sums) + tl.sum(tl.sum(left * s, 1), 0))
            tl.store(sums + programs, tl.load(sums + programs) + tl.sum(tl.sum(moved * th, 1), 0))
            tl.store(sums + 2 * programs, tl.load(sums + 2 * programs) + tl.sum(tl.sum(moved * tl.where(z < 0, 0, z), 1), 0))
            tl.store(sums + 3 * programs, tl.load(sums + 3 * programs) + tl.sum(tl.sum(moved * sg, 1), 0))
            tl.store(sums + 4 * programs, tl.load(sums + 4 * programs) + tl.sum(tl.sum(moved * z, 1), 0))
