"""Bool matrices by tile: which cells a mask lets through, and a number for those it does not.

A tile of numbers is held transposed, S[key][query], and the flags as they were given, usually
[query][key]: squares of their bytes are turned on the way.
"""

from __future__ import annotations

from numba import njit, types

from refattn.cpu.bytes import load_word, put_where_zero, where_byte
from refattn.cpu.copying import fill
from refattn.cpu.simd import advance, lane_count, load, pointer, splat, store

ALL, SOME, NONE = 0, 1, 2
"""How many cells of a tile are True."""

WORD = 8
"""Bytes that are looked at together."""

ONES = 0x0101010101010101
"""A word of bytes that are all True."""


@njit(error_model="numpy")
def flags_at(t, b, h, i, j):
    """Return the flag of a query row and a key, by pointer."""
    place = b * t.batch + h * t.head + i * t.row + j * t.column
    return pointer(t.address + place, types.uint8(0))


@njit(error_model="numpy")
def census(t, b, h, i, rows, j, n):
    """Return whether all, some or none of the cells of a tile are True; all without flags.

    Some may also be said of a tile whose True is another byte than 1.
    """
    if t.address == 0:
        return ALL
    flags = flags_at(t, b, h, i, j)
    rows, n = (rows if t.row != 0 else 1), (n if t.column != 0 else 1)
    none, every = types.uint64(0), types.uint64(ONES)
    for x in range(rows):
        if t.column == 1 and n >= WORD:
            for y in range(0, n, WORD):
                word = load_word(flags, x * t.row + min(y, n - WORD))
                none, every = none | word, every & word
        else:
            for y in range(n):
                word = types.uint64(flags[x * t.row + y * t.column])
                none, every = none | word, every & (word * types.uint64(ONES))
        if none != types.uint64(0) and every != types.uint64(ONES):
            return SOME
    return NONE if none == types.uint64(0) else ALL


@njit(error_model="numpy")
def put_where_false(zero, t, number, b, h, i, rows, j, n, S, width):
    """Write a number into the cells of a tile whose flag is False.

    Args:
        zero: a number of the computing format.
        t: the flags, a tensor of bytes.
        number: as said.
        b: batch item.
        h: query head.
        i: the panel's first query row.
        rows: of the panel.
        j: the tile's first key.
        n: keys of the tile.
        S: (n, width), by pointer.
        width: columns of the panel.
    """
    lanes = lane_count(zero)
    flags = flags_at(t, b, h, i, j)
    if t.row == 0:
        for y in range(n):
            if not flags[y * t.column]:
                fill(number, advance(S, y * width), 0, 1, width)
    elif t.column == 1 and rows >= lanes and n >= lanes:
        # the last squares overlap those before: what is written twice is the same
        for x in range(0, rows, lanes):
            for y in range(0, n, lanes):
                r, c = min(x, rows - lanes), min(y, n - lanes)
                square = advance(flags, r * t.row + c)
                put_where_zero(square, t.row, advance(S, c * width + r), width, number)
    else:
        for x in range(rows):
            for y in range(n):
                if not flags[x * t.row + y * t.column]:
                    S[y * width + x] = number


@njit(error_model="numpy")
def put_where_row_false(zero, t, number, b, h, i, j, n, S):
    """Write a number into the cells of one query row, S[key], whose flag is False."""
    lanes = lane_count(zero)
    flags, y = flags_at(t, b, h, i, j), 0
    while t.column == 1 and y + lanes <= n:
        store(S, y, where_byte(flags, y, load(S, y), splat(number)))
        y += lanes
    while y < n:
        if not flags[y * t.column]:
            S[y] = number
        y += 1
