"""Asking for memory ahead of its use, a little with every step of the work before it.

A product that waits for its rows wastes as much time as they take to arrive; a burst of requests
would wait as well, since a core has only some dozen under way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import njit, types

from refattn.cpu.copying import item_size
from refattn.cpu.simd import pointer, prefetch

LINE = 64
"""Bytes that come from memory at once."""


class Ahead(NamedTuple):
    """Rows of keys or values that are asked for while others are worked on."""

    address: Any
    """Of the first row; 0 for none."""
    row: Any
    """Bytes from one row to the next."""
    size: Any
    """Bytes of a number."""


@njit(error_model="numpy")
def rows_ahead(zero, plan, t, b, g, j):
    """Return the rows of a key-value head from j on, or none if their numbers lie apart."""
    size = item_size(zero, plan.storage)
    start = t.address + (b * t.batch + g * t.head + j * t.row) * size
    return Ahead(start if t.column == 1 else 0, t.row * size, size)


@njit(error_model="numpy")
def none_ahead():
    """Return that nothing is asked for."""
    return Ahead(0, 0, 1)


@njit(error_model="numpy")
def ask(ahead, y, n, x, features):
    """Ask for some features, from x on, of the rows y, ..., y + n - 1; it changes no value.

    A line of which x is not the first number was asked for before.
    """
    if ahead.address == 0 or x * ahead.size % LINE != 0:
        return
    lines = pointer(ahead.address, types.uint8(0))
    for z in range(x * ahead.size, (x + features) * ahead.size, LINE):
        for i in range(y, y + n):
            prefetch(lines, i * ahead.row + z)
