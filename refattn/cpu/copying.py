"""Bringing rows of an input into scratch memory: strided, 16-bit, or transposed."""

from __future__ import annotations

from numba import njit, types

from refattn.cpu.halves import load_bfloat16, load_float16, store_bfloat16, store_float16
from refattn.cpu.products import ROW_STEP, up
from refattn.cpu.simd import (
    advance,
    from_bits,
    lane_count,
    load,
    pointer,
    prefetch,
    store,
    transpose,
)

NATIVE, FLOAT16, BFLOAT16 = 0, 1, 2
"""How an input is stored: in the computing format, or in 16 bits beside float32."""

STORAGES = {"float64": NATIVE, "float32": NATIVE, "float16": FLOAT16, "bfloat16": BFLOAT16}
"""The storage of each dtype."""


@njit(error_model="numpy")
def read(zero, address, index, storage):
    """Return one number of an input, widened exactly to the computing format."""
    if storage == NATIVE:
        return pointer(address, zero)[index]
    half = types.uint32(pointer(address, types.uint16(0))[index])
    if storage == BFLOAT16:
        return zero + from_bits(types.uint32(half << types.uint32(16)))
    rest = types.uint32((half & types.uint32(0x7FFF)) << types.uint32(13))
    if rest >= types.uint32(0x7C00 << 13):  # infinity or NaN
        size = from_bits(types.uint32(rest | types.uint32(0x7F800000)))
    else:  # the exponent's bias differs by 112
        size = from_bits(rest) * types.float32(2.0**112)
    return zero + (-size if half & types.uint32(0x8000) else size)


@njit(error_model="numpy")
def read_vector(zero, address, index, storage):
    """Return as many numbers of an input as a vector has lanes, widened exactly."""
    if storage == NATIVE:
        return load(pointer(address, zero), index)
    halves = pointer(address, types.uint16(0))
    if storage == BFLOAT16:
        return load_bfloat16(halves, index, zero)
    return load_float16(halves, index, zero)


@njit(error_model="numpy")
def write_vector(zero, address, index, value, storage):
    """Write a vector to an output, each number rounded once to its storage."""
    halves = pointer(address, types.uint16(0))
    if storage == NATIVE:
        store(pointer(address, zero), index, value)
    elif storage == BFLOAT16:
        store_bfloat16(halves, index, value)
    else:
        store_float16(halves, index, value)


@njit(error_model="numpy")
def copy_stored(zero, storage, source, column, target, n):
    """Copy n stored numbers, `column` elements apart, to the address of a row, bit for bit."""
    if storage != NATIVE:
        halves, to = pointer(source, types.uint16(0)), pointer(target, types.uint16(0))
        for x in range(n):
            to[x] = halves[x * column]
    else:
        numbers, out = pointer(source, zero), pointer(target, zero)
        for x in range(n):
            out[x] = numbers[x * column]


@njit(error_model="numpy")
def copy_rows(zero, address, storage, row, column, rows, columns, target, target_row):
    """Copy rows of an input into scratch, widened exactly.

    Args:
        zero: a number of the computing format.
        address: of the first element.
        storage: `NATIVE`, `FLOAT16` or `BFLOAT16`; only `NATIVE` in float64.
        row: elements from one row to the next.
        column: elements from one column to the next.
        rows: how many.
        columns: how many.
        target: scratch, by pointer.
        target_row: elements from one of its rows to the next.
    """
    lanes = lane_count(zero)
    for r in range(rows):
        source, to = r * row, r * target_row
        c = 0
        while column == 1 and c + lanes <= columns:
            store(target, to + c, read_vector(zero, address, source + c, storage))
            c += lanes
        while c < columns:
            target[to + c] = read(zero, address, source + c * column, storage)
            c += 1


@njit(error_model="numpy")
def fill(zero, target, target_row, rows, columns):
    """Write a number into rows of scratch."""
    for r in range(rows):
        for c in range(columns):
            target[r * target_row + c] = zero


@njit(error_model="numpy")
def copy_transposed(zero, address, storage, row, column, rows, columns, target, width, buffer):
    """Copy rows of an input into the columns of a panel, widened; missing rows become zero.

    Args:
        zero: a number of the computing format.
        address: of the first element.
        storage: as in `copy_rows`.
        row: elements from one row to the next.
        column: elements from one column to the next.
        rows: how many there are.
        columns: how many, the panel's rows.
        target: the panel, (columns, width), by pointer.
        width: the panel's columns, a multiple of the lanes and at least `rows`.
        buffer: scratch of lanes · columns numbers, by pointer.
    """
    lanes = lane_count(zero)
    size = item_size(zero, storage)
    for i in range(0, width, lanes):
        n = max(0, min(lanes, rows - i))
        start = address + i * row * size
        source, source_row = pointer(start, zero), row
        if storage != NATIVE or column != 1 or n < lanes:
            copy_rows(zero, start, storage, row, column, n, columns, buffer, columns)
            fill(zero, advance(buffer, n * columns), columns, lanes - n, columns)
            source, source_row = buffer, columns
        turn(source, source_row, lanes, columns, advance(target, i), width)


@njit(error_model="numpy")
def turn(source, source_row, rows, columns, target, target_row):
    """Write target[c, r] = source[r, c]: whole squares by vectors, the rest one by one."""
    lanes = lane_count(source[0])
    for r in range(0, rows, lanes):
        n = min(lanes, rows - r)
        c = 0
        while n == lanes and c + lanes <= columns:
            transpose(
                advance(source, r * source_row + c),
                source_row,
                advance(target, c * target_row + r),
                target_row,
            )
            c += lanes
        while c < columns:
            for i in range(r, r + n):
                target[c * target_row + i] = source[i * source_row + c]
            c += 1


@njit(error_model="numpy")
def item_size(zero, storage):
    """Return the bytes of one stored number."""
    if storage != NATIVE:
        return 2
    return 4 if lane_count(zero) == lane_count(types.float32(0)) else 8


@njit(error_model="numpy")
def rows_of(zero, storage, t, b, h, j, n, n_k, d, d_step, target, target_row):
    """Return n rows of keys or values as a pointer and a stride: in place where that can be.

    They are copied where they are 16-bit or strided, where the register tiles would read beyond
    a row's end (d is no multiple of d_step) or, in whole steps of rows, beyond the last row.
    """
    start = t.address + (b * t.batch + h * t.head + j * t.row) * item_size(zero, storage)
    if storage == NATIVE and t.column <= 1 and d % d_step == 0 and j + up(n, ROW_STEP) <= n_k:
        return pointer(start, zero), t.row
    copy_rows(zero, start, storage, t.row, t.column, n, d, target, target_row)
    return target, target_row


@njit(error_model="numpy")
def fetch_rows(zero, storage, t, b, h, j, n, d):
    """Ask for n rows of keys or values ahead of their use, where they are read in place."""
    if storage != NATIVE or t.column != 1:
        return
    size = item_size(zero, storage)
    line = 64 // size
    rows = pointer(t.address + (b * t.batch + h * t.head + j * t.row) * size, zero)
    for y in range(n):
        for x in range(0, d, line):
            prefetch(rows, y * t.row + x)
