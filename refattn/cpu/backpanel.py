"""A panel of queries in the backward pass: both ways round, with what the weights are made from."""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import njit

from refattn.cpu.copying import copy_rows, copy_transposed, fill, item_size, turn
from refattn.cpu.host import VECTORS
from refattn.cpu.online import finite_rows
from refattn.cpu.products import ROW_STEP, up
from refattn.cpu.simd import advance, fma, lane_count, load, pointer, splat, sum_lanes


class Queries(NamedTuple):
    """Some queries in work, by pointers into scratch; w of them."""

    Q: Any
    """Qᵀ, (d_k, w)."""
    G: Any
    """dOᵀ, (d_v, w)."""
    d_query: Any
    """dQᵀ, (d_k, w), not yet scaled."""
    Q_rows: Any
    """Q, (w, d_k rounded up)."""
    G_rows: Any
    """dO, (w, d_v rounded up)."""
    L: Any
    """Logsumexp in powers of two, (w,); ∞ where a row is empty or missing: its weights are 0."""
    m: Any
    """What is taken off the logits first where they are extreme, (w,); L is then without it."""
    D: Any
    """Σ dO ∘ O - dL, (w,)."""
    d_slope: Any
    """Sums for ALiBi's slope, (w,)."""
    finite: Any
    """One number: 1 if Q and dO are finite and L is no NaN, so that a weight of 0 reads nothing."""
    vectors: Any
    """w in vectors."""


@njit(error_model="numpy")
def padded(d, lanes):
    """Return d rounded up to whole vectors and to whole rows of a register tile."""
    return up(d, max(lanes, ROW_STEP))


@njit(error_model="numpy")
def queries_at(zero, plan, panels, p, rows):
    """Return a panel of a block."""
    lanes = lane_count(zero)
    w, d_k, d_v = VECTORS * lanes, padded(plan.d_k, lanes), padded(plan.d_v, lanes)
    Q = advance(panels, p * (w * (3 * d_k + 2 * d_v + 4) + lanes))
    G = advance(Q, d_k * w)
    dQ = advance(G, d_v * w)
    Q_rows = advance(dQ, d_k * w)
    G_rows = advance(Q_rows, d_k * w)
    L = advance(G_rows, d_v * w)
    m, D = advance(L, w), advance(L, 2 * w)
    d_slope, finite = advance(L, 3 * w), advance(L, 4 * w)
    vectors = (rows + lanes - 1) // lanes
    return Queries(Q, G, dQ, Q_rows, G_rows, L, m, D, d_slope, finite, vectors)


@njit(error_model="numpy")
def load_both_ways(zero, t, storage, b, h, i, rows, d, w, transposed, flat, buffer):
    """Load rows of an input into a panel, once as columns and once as rows; zeros beyond."""
    row = padded(d, lane_count(zero))
    start = t.address + (b * t.batch + h * t.head + i * t.row) * item_size(zero, storage)
    copy_transposed(zero, start, storage, t.row, t.column, rows, d, transposed, w, buffer)
    fill(zero, flat, row, w, row)
    copy_rows(zero, start, storage, t.row, t.column, rows, d, flat, row)


@njit(error_model="numpy")
def dot(zero, a, b, n):
    """Return the sum of products of n numbers: whole vectors first, then the rest one by one."""
    lanes, total, rest = lane_count(zero), splat(zero), zero
    x = 0
    while x + lanes <= n:
        total = fma(load(a, x), load(b, x), total)
        x += lanes
    while x < n:
        rest += a[x] * b[x]
        x += 1
    return sum_lanes(total) + rest


@njit(error_model="numpy")
def begin_queries(zero, plan, numbers, grads, b, h, i, rows, queries, buffer):
    """Load a panel of queries and of output gradients, and what their weights are made from.

    Spec: FA1-ALG4 line 10, OWN-BACKWARD1.

        D_i = Σ_x dO_ix O_ix - dL_i
    """
    lanes = lane_count(zero)
    w, d_k, d_v = queries.vectors * lanes, padded(plan.d_k, lanes), padded(plan.d_v, lanes)
    Q, Q_rows, G, G_rows = queries.Q, queries.Q_rows, queries.G, queries.G_rows
    load_both_ways(zero, plan.query, plan.storage, b, h, i, rows, plan.d_k, w, Q, Q_rows, buffer)
    d_output = grads.d_output
    load_both_ways(zero, d_output, plan.storage, b, h, i, rows, plan.d_v, w, G, G_rows, buffer)
    finite = finite_rows(zero, Q_rows, d_k, rows, d_k) and finite_rows(zero, G_rows, d_v, rows, d_v)
    queries.finite[0] = numbers.one if finite else zero
    if plan.negative:
        for x in range(plan.d_k * w):
            Q[x] = -Q[x]
        for x in range(w * d_k):
            Q_rows[x] = -Q_rows[x]
    fill(zero, queries.d_query, w, d_k, w)
    fill(zero, queries.d_slope, w, 1, w)
    fill(zero, queries.D, w, 1, w)
    fill(zero, queries.m, w, 1, w)
    fill(numbers.infinity, queries.L, w, 1, w)
    L, dots = pointer(plan.logsumexp, zero), pointer(grads.dots, zero)
    O = pointer(plan.output.address, zero)
    for r in range(rows):
        at = (b * plan.heads + h) * plan.n_q + i + r
        D = dot(zero, advance(G_rows, r * d_v), advance(O, at * plan.d_v), plan.d_v)
        if grads.d_logsumexp != 0:
            D -= pointer(grads.d_logsumexp, zero)[at]
        dots[at] = queries.D[r] = D
        if L[at] != -numbers.infinity:
            queries.L[r] = L[at] * numbers.log2_e
            if grads.far != 0:
                far = advance(pointer(grads.far, zero), at)
                queries.m[r], queries.L[r] = far[0], -far[plan.batch * plan.heads * plan.n_q]
        if L[at] != L[at]:
            queries.finite[0] = zero


@njit(error_model="numpy")
def end_queries(zero, plan, numbers, grads, b, h, i, rows, split, queries):
    """Write what a range of keys contributes to the gradients of a panel's queries.

    Spec: FA1-ALG4 line 21.
    """
    w, d = queries.vectors * lane_count(zero), plan.d_k
    factor = -numbers.scale if plan.negative else numbers.scale
    for x in range(d * w):
        queries.d_query[x] *= factor
    pair = (split * plan.batch + b) * plan.heads + h
    target = advance(pointer(grads.d_query, zero), (pair * plan.n_q + i) * d)
    turn(queries.d_query, w, d, rows, target, d)
    total = zero
    for r in range(rows):
        total += queries.d_slope[r]
    pointer(grads.d_slopes, zero)[pair] += total
