"""One node of either cell at one time step, forward and backward, as Triton kernels.

The description of a cell, its formulas and their derivatives are those of `csrc/cells.cpp`. Here a state has a *slot*: slot 0 is h, the output of the
step before, and slot i + 1 is node i's state s_i, so that node 0 is a node like the others, with one edge, from slot 0, through tanh. A program has
`COLUMNS` units and, where states are normalised, the whole batch of them, so that no two programs need each other.
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
    """Both from one exp: with e = exp(−z), σ = 1/(1+e) and tanh = (1−e)(1+e)/(1+e²), where 1−e must not cancel near 0; e³ must not overflow."""
    x = -tl.where(z < LOW, LOW, z)
    series = x * 0 + 1
    for k in tl.static_range(DEGREE, 1, -1):
        series = 1 + x * (1.0 / k) * series
    m = tl.where(tl.abs(x) < 0.35, x * series, tl.exp(x) - 1)  # exp(x) − 1
    up, e = 2 + m, 1 + m
    both = 1 + e * e
    q = 1 / (up * both)
    return -m * up * up * q, q * both


PLACE = ["t", "first", "last", "slot", "output", "read", "by_product"]  # numbers that differ from launch to launch: one kernel for all of them


@triton.jit(do_not_specialize=PLACE)
def node_forward(pre, states, masked, mask, scale, p, edges, average, t, first, last, slot, output, batch, hidden, plane, slots,
                 NORMALISE: tl.constexpr, EPS: tl.constexpr, MASKED: tl.constexpr, DEGREE: tl.constexpr, LOW: tl.constexpr,
                 ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Slot `slot` at step t from edges first … last; where `output` is 1 and not 0, h' too, into slot 0 at step t + 1.

    pre: the blocks of pre-activations; states (slots, T+1, B, H), `plane` = (T+1)BH; masked likewise, of what the products read; mask (B, H);
    scale (T+1, slots, H); p (E, 5): four probabilities and their sum; edges (E, 4): where c of row 0 and step 0 lies in pre, numbers from row to row,
    slot that is read, whether the backward pass meets this slot first here; average (slots).
    """
    u = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    b = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    here = (b < batch) & (u < hidden)
    at = t * batch * hidden + b * hidden + u
    r = tl.zeros((ROWS, COLUMNS), pre.dtype.element_ty)
    for e in range(first, last):
        stride, source = tl.load(edges + 4 * e + 1), tl.load(edges + 4 * e + 2)
        c_at = pre + tl.load(edges + 4 * e) + (t * batch + b) * stride + u
        c, z = tl.load(c_at, here, 0), tl.load(c_at + hidden, here, 0)
        carried = tl.load(p + 5 * e + 4) * tl.load(states + source * plane + at, here, 0)
        th, sg = tanh_sigmoid(z, DEGREE, LOW)
        m = tl.load(p + 5 * e) * th + tl.load(p + 5 * e + 1) * tl.where(z < 0, 0, z) + tl.load(p + 5 * e + 2) * sg + tl.load(p + 5 * e + 3) * z
        r += carried + gate(c) * (m - carried)
    if NORMALISE:
        wide = tl.where(here, r, 0).to(tl.float64)  # sums over the batch, as torch's BatchNorm's, to more digits than the terms have
        mean = tl.sum(wide, 0)[None, :] / batch
        off = tl.where(here, wide - mean, 0)
        spread = 1 / tl.sqrt(tl.sum(off * off, 0)[None, :] / batch + EPS)
        r = (off * spread).to(r.dtype)
        tl.store(scale + (t * slots + slot) * hidden + u, spread.to(r.dtype), u < hidden)
    tl.store(states + slot * plane + at, r, here)
    last_state = tl.where(output != 0, slot, 1)
    h = tl.load(average + slot) * r
    for k in range(1, last_state):
        h += tl.load(average + k) * tl.load(states + k * plane + at, here, 0)
    tl.store(states + at + batch * hidden, h, here & (output != 0))
    if MASKED:  # what the next product reads
        to = tl.where(output != 0, batch * hidden, slot * plane)
        tl.store(masked + to + at, tl.where(output != 0, h, r) * tl.load(mask + b * hidden + u, here, 0), here)


@triton.jit(do_not_specialize=PLACE)
def node_backward(pre, states, d_states, product, mask, d_h, d_outputs, scale, p, d_p, edges, average, t, first, last, slot, output, read, by_product,
                  batch, hidden, plane, slots, NORMALISE: tl.constexpr, MASKED: tl.constexpr, PROBABILITIES: tl.constexpr,
                  DEGREE: tl.constexpr, LOW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The gradient of slot `slot` at step t is complete once the nodes after it are done; from it those of its edges' pre-activations, over themselves.

    d_states (slots, B, H): what edges have sent to each slot, slot 0 from the step after this one; product (B, H): what came to this slot through the
    weights (`read`: an edge has sent something, `by_product`: there is a product); where `output` is 1 it is slot 0's instead, and d_h (B, H) is made.
    d_p (E, 5, programs), float64: this program's sums, added to.
    """
    u = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    b = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    here = (b < batch) & (u < hidden)
    row = b * hidden + u
    at = t * batch * hidden + row
    ends, goes_on = here & (output != 0), here & (output == 0)
    g = tl.load(product + row, here & (by_product != 0), 0)
    if MASKED:
        g *= tl.load(mask + row, here, 0)
    dh = tl.load(d_h + row, goes_on, 0) + tl.load(d_outputs + at, ends, 0) + tl.load(d_states + row, ends, 0) + tl.where(ends, g, 0)
    tl.store(d_h + row, dh, ends)
    dr = tl.load(average + slot) * dh + tl.load(d_states + slot * batch * hidden + row, goes_on & (read != 0), 0) + tl.where(goes_on, g, 0)
    if NORMALISE:
        s = tl.load(states + slot * plane + at, here, 0)
        wide = dr.to(tl.float64)
        mean, along = tl.sum(wide, 0)[None, :] / batch, tl.sum(wide * s, 0)[None, :] / batch
        spread = tl.load(scale + (t * slots + slot) * hidden + u, u < hidden, 0)
        dr = tl.where(here, spread * (wide - mean - s * along), 0).to(s.dtype)
    for e in range(first, last):
        stride, source = tl.load(edges + 4 * e + 1), tl.load(edges + 4 * e + 2)
        c_at = pre + tl.load(edges + 4 * e) + (t * batch + b) * stride + u
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
        sent = tl.load(to, here & (tl.load(edges + 4 * e + 3) == 0), 0)
        tl.store(to, sent + present * left, here)
        if PROBABILITIES:
            programs = tl.num_programs(0) * tl.num_programs(1)
            mine = d_p + 5 * e * programs + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
            tl.store(mine, tl.load(mine) + tl.sum(tl.sum(left * s, 1), 0))
            tl.store(mine + programs, tl.load(mine + programs) + tl.sum(tl.sum(moved * th, 1), 0))
            tl.store(mine + 2 * programs, tl.load(mine + 2 * programs) + tl.sum(tl.sum(moved * tl.where(z < 0, 0, z), 1), 0))
            tl.store(mine + 3 * programs, tl.load(mine + 3 * programs) + tl.sum(tl.sum(moved * sg, 1), 0))
            tl.store(mine + 4 * programs, tl.load(mine + 4 * programs) + tl.sum(tl.sum(moved * z, 1), 0))
