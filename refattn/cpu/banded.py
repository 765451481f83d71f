"""Products of a tile, whole or only where the band of causal and window rules lets a query see."""

from __future__ import annotations

from numba import njit

from refattn.cpu.band import lanes_seeing, reach
from refattn.cpu.host import VECTORS
from refattn.cpu.products import ADD, ROW_STEP, STORE, multiply, up
from refattn.cpu.simd import advance, lane_count

GROUP = 16
"""Keys of a tile at the edge of the band whose queries are found together."""

CHUNK = 64
"""Features summed at once; the sums of chunks are then added (a shorter sum rounds less)."""


@njit(error_model="numpy")
def scores(zero, K, k_row, n, Q, width, start, vectors, d, S):
    """Write Sᵀ = K Qᵀ for some vectors of a panel, its d features summed chunk by chunk."""
    for x in range(0, d, CHUNK):
        depth = min(CHUNK, d - x)
        mode = STORE if x == 0 else ADD
        multiply(
            zero,
            advance(K, x),
            k_row,
            1,
            up(n, ROW_STEP),
            advance(Q, x * width + start),
            width,
            depth,
            advance(S, start),
            width,
            vectors,
            mode,
            S,
        )


@njit(error_model="numpy")
def vectors_seeing(zero, plan, first, rows, j, n, vectors):
    """Return the first vector of a panel that sees some of n keys, and how many follow."""
    lanes = lane_count(zero)
    low, high = lanes_seeing(plan, first, rows, j, n)
    start = low // lanes
    return start, max(0, min(vectors, (high + lanes - 1) // lanes) - start)


@njit(error_model="numpy")
def seen_by_all(plan, first, rows, j, n):
    """Return how many of n keys, from the first on, every row of a panel sees: whole groups."""
    all_low, all_high = max(0, first + rows - 1 - plan.left), first + plan.right + 1
    return 0 if j < all_low else max(0, min(n, all_high - j)) // GROUP * GROUP


@njit(error_model="numpy")
def edge_scores(zero, plan, K, k_row, first, rows, j, n, Q, vectors, d, S):
    """Write Sᵀ = K Qᵀ at the edge of the band, only for the vectors that see some key."""
    width = vectors * lane_count(zero)
    whole = seen_by_all(plan, first, rows, j, n)
    if whole > 0:
        scores(zero, K, k_row, whole, Q, width, 0, vectors, d, S)
    for y in range(whole, n, GROUP):
        keys = min(GROUP, n - y)
        start, seeing = vectors_seeing(zero, plan, first, rows, j + y, keys, vectors)
        K_y, S_y = advance(K, y * k_row), advance(S, y * width)
        start *= lane_count(zero)
        scores(zero, K_y, k_row, keys, Q, width, start, seeing, d, S_y)


@njit(error_model="numpy")
def edge_values(zero, plan, V, v_row, first, rows, j, n, P, vectors, d, O, mode, scales):
    """Add Vᵀ Pᵀ to Oᵀ at the edge of the band, for each vector of queries from the keys it sees.

    `mode` and `scales` are those of `products.multiply`.
    """
    lanes = lane_count(zero)
    width, rows_out = vectors * lanes, up(d, ROW_STEP)
    for start in range(0, width, lanes):
        low, high, _, _ = reach(plan, first + start, min(lanes, rows - start), j + n)
        low, high = max(low, j) - j, max(high, j) - j
        V_l, P_l = advance(V, low * v_row), advance(P, low * width + start)
        depth, O_v, scales_v = max(0, high - low), advance(O, start), advance(scales, start)
        multiply(
            zero, V_l, 1, v_row, rows_out, P_l, width, depth, O_v, width, 1, mode, scales_v
        )  # fmt: skip


@njit(error_model="numpy")
def outer(zero, P, width, n, rows, d, start, vectors, C):
    """Add P · rows to C: n keys, the queries of some vectors of a panel.

    Args:
        zero: a number of the computing format.
        P: (n, width), by pointer.
        width: of the panel.
        n: keys; rows up to the next whole step are zero.
        rows: (width, d), by pointer.
        d: features, whole vectors.
        start: the first query.
        vectors: of queries.
        C: (n, d), by pointer.
    """
    lanes = lane_count(zero)
    for x in range(0, d, VECTORS * lanes):
        wide = min(VECTORS, (d - x) // lanes)
        B, C_x = advance(rows, start * d + x), advance(C, x)
        depth = vectors * lanes
        multiply(
            zero, advance(P, start), width, 1, up(n, ROW_STEP), B, d, depth, C_x, d, wide, ADD, C_x
        )


@njit(error_model="numpy")
def edge_outer(zero, plan, P, first, rows, j, n, inputs, d, vectors, C):
    """Add P · inputs to C at the edge of the band, only for the vectors that see some key."""
    lanes = lane_count(zero)
    width = vectors * lanes
    for y in range(0, n, GROUP):
        keys = min(GROUP, n - y)
        start, seeing = vectors_seeing(zero, plan, first, rows, j + y, keys, vectors)
        P_y, C_y = advance(P, y * width), advance(C, y * d)
        outer(zero, P_y, width, keys, inputs, d, start * lanes, seeing, C_y)
