"""A panel: some queries in work, transposed, with the statistics of their rows.

The lanes of a vector are queries, so that row maxima and sums are plain vectors.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from numba import njit

from refattn.cpu.copying import copy_transposed, fill, item_size, turn
from refattn.cpu.elementary import exp2, ones, smallest
from refattn.cpu.host import VECTORS
from refattn.cpu.plan import to_powers
from refattn.cpu.products import ROW_STEP, up
from refattn.cpu.simd import (
    add,
    advance,
    div,
    fma,
    lane_count,
    load,
    maximum,
    mul,
    pointer,
    splat,
    store,
    sub,
    where_equal,
    where_less,
)


class Panel(NamedTuple):
    """Some queries in work, by pointers into scratch; w columns, one a query."""

    Q: Any
    """Qᵀ, (d_k, w)."""
    O: Any
    """Oᵀ, (d_v, w), not yet divided by l."""
    m: Any
    """Row maxima, (w,), of S; -∞ before any key. At the end in powers of two, with the sink."""
    l: Any
    """Row sums, (w,)."""
    alpha: Any
    """What the last tile scales the sums before it by, (w,)."""
    read: Any
    """0, or NaN where a forbidden cell that is read spoils the row, (w,)."""
    S: Any
    """Logits, then weights, of one tile, (keys, w); all panels share it."""
    added: Any
    """Bias of one tile and -∞ where a mask forbids, likewise."""
    vectors: Any
    """w in vectors."""


@njit(error_model="numpy")
def panel_at(zero, plan, panels, p, size, S, added, rows):
    """Return a panel of a block; S and added are shared by all."""
    lanes = lane_count(zero)
    width = VECTORS * lanes
    Q = advance(panels, p * size)
    O = advance(Q, plan.d_k * width)
    m = advance(O, up(plan.d_v, ROW_STEP) * width)
    l, alpha, read = advance(m, width), advance(m, 2 * width), advance(m, 3 * width)
    return Panel(Q, O, m, l, alpha, read, S, added, (rows + lanes - 1) // lanes)


@njit(error_model="numpy")
def begin_panel(zero, plan, numbers, b, h, i, rows, panel, buffer):
    """Load a panel of queries and set its statistics to those of no key.

    Spec: FA1-ALG1 lines 2 and 8.
    """
    width, q = panel.vectors * lane_count(zero), plan.query
    size = item_size(zero, plan.storage)
    start = q.address + (b * q.batch + h * q.head + i * q.row) * size
    copy_transposed(
        zero, start, plan.storage, q.row, q.column, rows, plan.d_k, panel.Q, width, buffer
    )
    if plan.negative:
        for x in range(plan.d_k * width):
            panel.Q[x] = -panel.Q[x]
    fill(zero, panel.O, width, up(plan.d_v, ROW_STEP), width)
    fill(-numbers.infinity, panel.m, width, 1, width)
    fill(zero, panel.l, width, 1, width)
    fill(zero, panel.read, width, 1, width)


@njit(error_model="numpy")
def end_panel(zero, plan, numbers, b, h, i, rows, sink, panel, far):
    """Divide by the row sums and write output and logsumexp; an empty row is 0 and -∞.

    Spec: FA1-ALG1 lines 12-13, OWN-SINK1, OWN-LSE1, OWN-EMPTY1.

    Args:
        zero: a number of the computing format.
        plan: of the attention.
        numbers: of the attention.
        b: batch item.
        h: query head.
        i: the panel's first query row.
        rows: of the panel.
        sink: of the head.
        panel: of the queries.
        far: address of what `leave_far` writes, or 0.
    """
    O, m, l, vectors = panel.O, panel.m, panel.l, panel.vectors
    lanes = lane_count(zero)
    width = vectors * lanes
    c, s = splat(to_powers(plan, numbers)), splat(sink * numbers.log2_e)
    sunk = plan.sinks != 0 and sink > -numbers.infinity
    for v in range(vectors):
        top, total = mul(load(m, v * lanes), c), load(l, v * lanes)
        store(panel.alpha, v * lanes, load(m, v * lanes))
        weight = ones(total)
        if sunk:
            high = maximum(s, top)
            weight = exp2(sub(top, high))
            total = fma(total, weight, exp2(sub(s, high)))
            top = high
        store(m, v * lanes, top)
        store(l, v * lanes, total)
        if plan.reads:  # but for an empty row, whose weights are 0 whatever its logits
            total = where_equal(total, splat(zero), total, add(total, load(panel.read, v * lanes)))
            store(l, v * lanes, total)
        divisor = where_less(total, smallest(total), ones(total), total)
        share = div(weight, divisor)  # one slow division a vector, not one a feature
        for x in range(plan.d_v):
            at = x * width + v * lanes
            store(O, at, mul(load(O, at), share))
    out = plan.output
    place = b * out.batch + h * out.head + i * out.row
    turn(O, width, plan.d_v, rows, advance(pointer(out.address, zero), place), out.row)
    L = pointer(plan.logsumexp, zero)
    for r in range(rows):
        at = (b * plan.heads + h) * plan.n_q + i + r
        L[at] = m[r] * 0.6931471805599453 + math.log(l[r])
    if far != 0:
        at = (b * plan.heads + h) * plan.n_q + i
        leave_far(zero, plan, numbers, rows, panel, advance(pointer(far, zero), at))


@njit(error_model="numpy")
def leave_far(zero, plan, numbers, rows, panel, far):
    """Write m and r of every row: P = 2^(c · (S - m) + r) also where L is too large to hold ln ℓ.

    Args:
        zero: a number of the computing format.
        plan: of the attention.
        numbers: of the attention.
        rows: of the panel.
        panel: of the queries, as `end_panel` leaves it, with m as it was in alpha.
        far: two numbers of each row of the attention, all m first, by pointer to the first row's m.
    """
    c, every = to_powers(plan, numbers), plan.batch * plan.heads * plan.n_q
    for r in range(rows):
        m, behind = panel.alpha[r], panel.m[r]
        if m == -numbers.infinity:  # no key: any weight of -∞ is 0
            m = behind = zero
        far[r] = m
        far[every + r] = m * c - behind - math.log(panel.l[r]) * numbers.log2_e


@njit(error_model="numpy")
def leave_empty(zero, plan, numbers, b, h, first, last, sink):
    """Write the query rows beyond the query length: 0, and -∞ or the sink.

    Spec: OWN-LENGTH1, OWN-EMPTY1, OWN-SINK1.
    """
    out, L = plan.output, pointer(plan.logsumexp, zero)
    O = pointer(out.address, zero)
    for i in range(first, last):
        fill(zero, advance(O, b * out.batch + h * out.head + i * out.row), 0, 1, plan.d_v)
        L[(b * plan.heads + h) * plan.n_q + i] = sink if plan.sinks else -numbers.infinity
