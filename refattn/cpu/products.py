"""Products of a matrix with a panel: every multiplication of the kernels, in register tiles."""

from __future__ import annotations

from typing import Any

from numba import njit

from refattn.cpu.host import HOST
from refattn.cpu.simd import advance
from refattn.cpu.tile import add_outer, add_tile, scale_add_tile, store_tile, zero_tile

STORE, ADD, SCALE = 0, 1, 2
"""What becomes of the old C: replaced, added to, or scaled column by column and added to."""

ROWS = {1: 8, 2: 8, 3: 8, 4: 4} if HOST.registers >= 32 else {1: 8, 2: 4, 3: 4, 4: 2}
"""Rows of a register tile by its vectors: enough sums to hide their latency, and no spill."""

ROW_STEP = 8
"""Rows of a product come in multiples of this; what is beyond the true rows is never read."""


def _product(vectors: int) -> Any:
    """Return the product for panels of a fixed number of vectors."""
    rows = ROWS[vectors]

    def product(zero, A, a_row, a_col, n, B, b_row, depth, C, c_row, mode, scales):
        for r in range(0, n, rows):
            tile = zero_tile(zero, rows, vectors)
            a, c = advance(A, r * a_row), r * c_row
            for k in range(depth):
                tile = add_outer(tile, a, k * a_col, a_row, B, k * b_row)
            if mode == STORE:
                store_tile(tile, C, c, c_row)
            elif mode == ADD:
                add_tile(tile, C, c, c_row)
            else:
                scale_add_tile(tile, C, c, c_row, scales)

    # cached kernels are linked by name: two products of one name would be taken for each other
    product.__name__ = product.__qualname__ = f"product_{vectors}"
    return njit(error_model="numpy", nogil=True)(product)


_product_1, _product_2, _product_3, _product_4 = (_product(v) for v in (1, 2, 3, 4))


@njit(error_model="numpy", nogil=True)
def multiply(zero, A, a_row, a_col, n, B, b_row, depth, C, c_row, vectors, mode, scales):
    """Write C = A B, C = C + A B, or C = C ∘ scales + A B.

    Each element is summed in order of k from 0, then joins the old C.

    Args:
        zero: a number of the computing format.
        A: (n, depth), by pointer; element (r, k) at r·a_row + k·a_col.
        a_row: as said.
        a_col: as said.
        n: rows, rounded up to `ROW_STEP`: C has that many, and A is readable there.
        B: (depth, vectors · lanes), rows `b_row` apart.
        b_row: as said.
        depth: terms of each sum.
        C: (n, vectors · lanes), rows `c_row` apart.
        c_row: as said.
        vectors: width of the panel, 1 to 4.
        mode: `STORE`, `ADD` or `SCALE`.
        scales: (vectors · lanes,), by pointer, read under `SCALE` only.
    """
    if vectors == 4:
        _product_4(zero, A, a_row, a_col, n, B, b_row, depth, C, c_row, mode, scales)
    elif vectors == 3:
        _product_3(zero, A, a_row, a_col, n, B, b_row, depth, C, c_row, mode, scales)
    elif vectors == 2:
        _product_2(zero, A, a_row, a_col, n, B, b_row, depth, C, c_row, mode, scales)
    elif vectors == 1:
        _product_1(zero, A, a_row, a_col, n, B, b_row, depth, C, c_row, mode, scales)
