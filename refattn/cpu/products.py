"""Products of a matrix with a panel: every multiplication of the kernels, in register tiles."""

from __future__ import annotations

from typing import Any

from numba import njit

from refattn.cpu.host import HOST
from refattn.cpu.simd import advance
from refattn.cpu.tile import add_outer, add_tile, scale_add_tile, store_tile, zero_tile

STORE, ADD, SCALE = 0, 1, 2
"""What becomes of the old C: replaced, added to, or scaled column by column and added to."""

ROWS = {1: 8, 2: 8, 3: 8, 4: 6} if HOST.registers >= 32 else {1: 8, 2: 4, 3: 4, 4: 2}
"""Rows of a register tile by its vectors: enough sums to hide their latency, and no spill."""

LAST_ROWS = {8: 8, 6: 4, 4: 4, 2: 2}
"""Rows of the last tiles of a product by those of the others: 6 does not divide what 8 does."""

ROW_STEP = 8
"""Rows of a product come in multiples of this; what is beyond the true rows is never read."""


@njit(error_model="numpy")
def up(n, step):
    """Return n rounded up to a multiple of a step."""
    return (n + step - 1) // step * step


def _block(rows: int, vectors: int) -> Any:
    """Return the product for one register tile of a fixed size."""

    def block(zero, A, a_row, a_col, B, b_row, depth, C, c_row, mode, scales):
        tile = zero_tile(zero, rows, vectors)
        for k in range(depth):
            tile = add_outer(tile, A, k * a_col, a_row, B, k * b_row)
        if mode == STORE:
            store_tile(tile, C, 0, c_row)
        elif mode == ADD:
            add_tile(tile, C, 0, c_row)
        else:
            scale_add_tile(tile, C, 0, c_row, scales)

    # cached kernels are linked by name: two blocks of one name would be taken for each other
    block.__name__ = block.__qualname__ = f"block_{rows}_{vectors}"
    return njit(error_model="numpy", nogil=True)(block)


def _product(vectors: int) -> Any:
    """Return the product for panels of a fixed number of vectors."""
    rows = ROWS[vectors]
    last_rows = LAST_ROWS[rows]
    many, last = _block(rows, vectors), _block(last_rows, vectors)

    def product(zero, A, a_row, a_col, n, B, b_row, depth, C, c_row, mode, scales):
        # n is even: 6 divides n - 4 (n mod 3)
        end = n - last_rows * (n % 3) if last_rows < rows else n
        for r in range(0, end, rows):
            A_r, C_r = advance(A, r * a_row), advance(C, r * c_row)
            many(zero, A_r, a_row, a_col, B, b_row, depth, C_r, c_row, mode, scales)
        for r in range(end, n, last_rows):
            A_r, C_r = advance(A, r * a_row), advance(C, r * c_row)
            last(zero, A_r, a_row, a_col, B, b_row, depth, C_r, c_row, mode, scales)

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
