"""Products of the weights of a few query rows with the values; lanes are features."""

from __future__ import annotations

from typing import Any

from numba import njit, types

from refattn.cpu.ahead import LINE
from refattn.cpu.host import HOST
from refattn.cpu.simd import advance, lane_count, pointer, prefetch
from refattn.cpu.tile import add_outer, add_tile, zero_tile

TALL = 4
"""Rows of the taller register tile."""

WIDE = 4 if HOST.registers >= 32 else 2
"""Vectors of a register tile where a row of values has so many left."""

WHOLE = 8
"""Vectors of the tile of one row: rows of values are then read nearly as they lie."""


def _value_tile(rows: int, vectors: int) -> Any:
    """Return the product for one register tile of a fixed size."""

    def value_tile(zero, P, p_row, n, V, v_row, O, o_row, ahead, first, last):
        tile = zero_tile(zero, rows, vectors)
        lines = pointer(ahead.address, types.uint8(0))
        for y in range(n):
            for z in range(first, last, LINE):
                prefetch(lines, y * ahead.row + z)
            tile = add_outer(tile, P, y, p_row, V, y * v_row)
        add_tile(tile, O, 0, o_row)

    # cached kernels are linked by name: two tiles of one name would be taken for each other
    value_tile.__name__ = value_tile.__qualname__ = f"value_tile_{rows}_{vectors}"
    return njit(error_model="numpy", nogil=True)(value_tile)


_tall_wide, _tall, _one_whole, _one_wide, _one = (
    _value_tile(rows, vectors)
    for rows, vectors in ((TALL, WIDE), (TALL, 1), (1, WHOLE), (1, WIDE), (1, 1))
)


@njit(error_model="numpy")
def vectors_together(rows, left):
    """Return how many vectors of the values the next tiles take, of those left."""
    if rows <= 2 and left >= WHOLE:
        return WHOLE
    return WIDE if left >= WIDE else 1


@njit(error_model="numpy", nogil=True)
def add_row_values(zero, P, p_row, rows, n, V, v_row, O, d, ahead):
    """Add P V to O.

    Args:
        zero: a number of the computing format.
        P: (rows, n), by pointer; readable up to the next multiple of `TALL` rows.
        p_row: elements from one row of P to the next.
        rows: queries.
        n: keys.
        V: (n, d), by pointer.
        v_row: elements from one key to the next.
        O: (rows, d), by pointer; written up to the next multiple of `TALL` rows.
        d: features, whole vectors.
        ahead: what is asked for meanwhile: each tile asks for its share.
    """
    lanes = lane_count(zero)
    x = 0
    while x < d:
        vectors = vectors_together(rows, (d - x) // lanes)
        start, width = x * ahead.size, vectors * lanes * ahead.size
        r = 0
        while r < rows:
            taken = TALL if rows - r > 2 else 1
            first = start + width * r // rows // LINE * LINE
            last = start + width * min(r + taken, rows) // rows // LINE * LINE
            if ahead.address == 0:
                last = first
            P_r, V_x, O_r = advance(P, r * p_row), advance(V, x), advance(O, r * d + x)
            if taken == TALL and vectors == WIDE:
                _tall_wide(zero, P_r, p_row, n, V_x, v_row, O_r, d, ahead, first, last)
            elif taken == TALL:
                _tall(zero, P_r, p_row, n, V_x, v_row, O_r, d, ahead, first, last)
            elif vectors == WHOLE:
                _one_whole(zero, P_r, p_row, n, V_x, v_row, O_r, d, ahead, first, last)
            elif vectors == WIDE:
                _one_wide(zero, P_r, p_row, n, V_x, v_row, O_r, d, ahead, first, last)
            else:
                _one(zero, P_r, p_row, n, V_x, v_row, O_r, d, ahead, first, last)
            r += taken
        x += vectors * lanes
