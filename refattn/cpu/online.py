"""The online softmax of one tile, and weighted values where a plain product may not be taken."""

from __future__ import annotations

from numba import njit

from refattn.cpu.elementary import exp2, extreme, ones
from refattn.cpu.simd import (
    add,
    div,
    fma,
    lane_count,
    load,
    maximum,
    mul,
    splat,
    store,
    sub,
    sum_lanes,
    where_equal,
    where_less,
)


@njit(error_model="numpy")
def softmax_tile(zero, numbers, S, n, panel, factor):
    """Replace the logits of a tile by weights, and bring the row statistics forward.

    Spec: FA1-ALG1 lines 10-11.

        m_new = max(m, m̃);  P̃ = 2^(c · (S - m_new));  ℓ_new = α ℓ + Σ P̃;  α = 2^(c · (m - m_new))

    Args:
        zero: a number of the computing format.
        numbers: of the attention.
        S: (n, vectors · lanes), by pointer, becomes P̃.
        n: keys of the tile.
        panel: of the queries, whose m, l and alpha are written.
        factor: c, from S to powers of two, positive.
    """
    m, l, alpha, vectors = panel.m, panel.l, panel.alpha, panel.vectors
    lanes = lane_count(zero)
    row = vectors * lanes
    c, lowest, nothing = splat(factor), splat(-numbers.infinity), splat(zero)
    for v in range(vectors):
        at = v * lanes
        # line 10
        m_tilde = largest(S, at, n, row, lowest)
        m_old = load(m, at)
        m_new = maximum(m_tilde, m_old)
        # a row that has seen no allowed key yet is shifted by nothing: -∞ - (-∞) is no number
        shift, taken = where_less(lowest, m_new, m_new, nothing), nothing
        if some_beyond(mul(shift, c), extreme(c)):
            take_off(S, at, n, row, shift)
            taken = shift
        top = mul(sub(shift, taken), c)
        negative, P_sum = sub(nothing, top), nothing
        for y in range(n):
            P_tilde = exp2(fma(load(S, at + y * row), c, negative))
            store(S, at + y * row, P_tilde)
            P_sum = add(P_sum, P_tilde)
        # line 11
        a = exp2(sub(mul(sub(m_old, taken), c), top))
        store(l, at, fma(load(l, at), a, P_sum))
        store(m, at, m_new)
        store(alpha, at, a)


@njit(error_model="numpy")
def some_beyond(x, limit):
    """Return whether |x| is larger than a limit in some lane."""
    nothing = sub(x, x)
    size = maximum(x, sub(nothing, x))
    return sum_lanes(where_less(limit, size, ones(x), nothing)) != 0


@njit(error_model="numpy")
def take_off(S, at, n, row, shift):
    """Subtract the maximum before the scale: c · m, rounded, would be far from c · S there."""
    for y in range(n):
        store(S, at + y * row, sub(load(S, at + y * row), shift))


@njit(error_model="numpy")
def largest(S, at, n, row, lowest):
    """Return the maximum of n vectors that lie `row` elements apart, by four chains.

    A maximum waits for the one before it. NaN is dropped: `maximum` keeps its second argument's.
    """
    m_0 = m_1 = m_2 = m_3 = lowest
    y = 0
    while y + 4 <= n:
        m_0 = maximum(load(S, at + y * row), m_0)
        m_1 = maximum(load(S, at + (y + 1) * row), m_1)
        m_2 = maximum(load(S, at + (y + 2) * row), m_2)
        m_3 = maximum(load(S, at + (y + 3) * row), m_3)
        y += 4
    while y < n:
        m_0 = maximum(load(S, at + y * row), m_0)
        y += 1
    return maximum(maximum(m_0, m_1), maximum(m_2, m_3))


@njit(error_model="numpy")
def scale_panel(O, alpha, d, vectors, zero):
    """Multiply every row of a panel by the same vectors."""
    lanes = lane_count(zero)
    for x in range(d):
        for v in range(vectors):
            at = (x * vectors + v) * lanes
            store(O, at, mul(load(O, at), load(alpha, v * lanes)))


@njit(error_model="numpy")
def finite_rows(zero, V, v_row, n, d):
    """Return whether n rows hold finite numbers only: 0 · x is 0 for these alone."""
    lanes = lane_count(zero)
    total = odd = nothing = splat(zero)
    rest = zero
    for y in range(n):
        c = 0
        while c + 2 * lanes <= d:  # two chains: a sum waits for the one before
            total = fma(load(V, y * v_row + c), nothing, total)
            odd = fma(load(V, y * v_row + c + lanes), nothing, odd)
            c += 2 * lanes
        while c < d:
            rest += V[y * v_row + c] * zero
            c += 1
    return sum_lanes(add(total, odd)) + rest == zero


@njit(error_model="numpy")
def add_weighted_rows(zero, V, v_row, n, d, P, O, vectors):
    """Add Vᵀ Pᵀ to Oᵀ, where a weight of +0 reads nothing of its row.

    Spec: OWN-POISON1.
    """
    lanes, most = lane_count(zero), div(ones(splat(zero)), splat(zero))
    for y in range(n):
        for v in range(vectors):
            weight = load(P, (y * vectors + v) * lanes)
            # ∞ only for a weight too small to be normal; a NaN reads
            inverse = div(ones(weight), weight)
            for x in range(d):
                at = (x * vectors + v) * lanes
                old = load(O, at)
                total = fma(weight, splat(V[y * v_row + x]), old)
                store(O, at, where_equal(inverse, most, old, total))


@njit(error_model="numpy")
def add_weighted_columns(zero, numbers, P, n, width, rows, d, C):
    """Add P · rows to C, where a weight of +0 reads nothing of its row.

    Spec: OWN-POISON1.
    """
    lanes = lane_count(zero)
    for y in range(n):
        for i in range(width):
            weight = P[y * width + i]
            if weight != zero or numbers.one / weight < zero:  # a NaN is not zero, and reads
                for x in range(0, d, lanes):
                    old = load(C, y * d + x)
                    store(C, y * d + x, fma(splat(weight), load(rows, i * d + x), old))
