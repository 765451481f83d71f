"""Rotation of rows of features by tables: the kernel.

Every operation is rounded by itself, in the order of the reference's text, so that both give the
same bits; memory, not arithmetic, is what it waits for.
"""

from __future__ import annotations

from typing import NamedTuple

from numba import njit, types

from refattn.cpu.compiling import kernel
from refattn.cpu.copying import NATIVE, copy_stored, item_size, read_vector, write_vector
from refattn.cpu.plan import entry
from refattn.cpu.simd import (
    add,
    claim,
    even_lanes,
    lane_count,
    load,
    mul,
    odd_lanes,
    pointer,
    sub,
    zip_high,
    zip_low,
)

BLOCK = 64
"""Rows of one head that are turned before the next head: their tables stay in the cache."""

PIECE = 2**15
"""Features that a thread takes at once, about."""


class Rotation(NamedTuple):
    """One rotation, for the kernel: addresses, sizes, and distances in bytes."""

    x: int
    output: int
    cosine: int
    sine: int
    storage: int
    """Of x and of the output; see `copying.STORAGES`."""
    size: int
    """Bytes of a stored number."""
    groups: int
    """How many times n rows: the leading axes of x, flat."""
    n: int
    d: int
    half: int
    """Pairs that rotate."""
    split: int
    """1 if the pairs are half-split, 0 if interleaved."""
    row: int
    """From one row of x to the next, bytes."""
    column: int
    """From one feature of x to the next, stored numbers."""
    table_row: int
    piece: int
    """Blocks of rows that a thread takes at once."""
    axes: int
    """Leading axes of x; `AXES` integers of each follow the plan, the last axis first."""


PLAN = len(Rotation._fields)
"""Integers of a plan."""

AXES = 3
"""Length of an axis, and bytes from one item to the next in x and in the tables."""


def scratch_size(plan: Rotation, lanes: int) -> int:
    """Return how many numbers of scratch a thread of `rotate_rows` needs."""
    return 6 * lanes + plan.d


@njit(error_model="numpy")
def turn_pairs(zero, plan, source, cosine, sine, target):
    """Rotate every pair of a row, read and written at addresses, in vectors of pairs.

    Spec: ROPE-EQ34, OWN-ROPE1.

        (u, v) → (u cos - v sin, u sin + v cos)

    The last vector ends with the last pair and overlaps the one before; where there are fewer
    pairs than lanes, what follows the row at source, tables and target is read and overwritten.
    """
    lanes, half, storage = lane_count(zero), plan.half, plan.storage
    for first in range(0, half, lanes):
        i = max(0, min(first, half - lanes))
        j, k = (i, half + i) if plan.split else (2 * i, 2 * i + lanes)
        u, v = read_vector(zero, source, j, storage), read_vector(zero, source, k, storage)
        if not plan.split:
            u, v = even_lanes(u, v), odd_lanes(u, v)
        cos, sin = load(cosine, i), load(sine, i)
        x, y = sub(mul(u, cos), mul(v, sin)), add(mul(u, sin), mul(v, cos))
        if not plan.split:
            x, y = zip_low(x, y), zip_high(x, y)
        write_vector(zero, target, j, x, storage)
        write_vector(zero, target, k, y, storage)


@njit(error_model="numpy")
def turn_row(zero, plan, x, cosine, sine, output, scratch):
    """Rotate the first pairs of a row and copy its other features; all by address.

    Spec: OWN-ROPE2.

    A row whose features do not lie side by side passes through scratch, and so does all that is
    shorter than a vector.
    """
    lanes, r = lane_count(zero), 2 * plan.half
    width = lanes * item_size(zero, NATIVE)
    source, target, short = x, output, plan.half < lanes
    if short:
        copy_stored(zero, NATIVE, cosine, 1, scratch, plan.half)
        copy_stored(zero, NATIVE, sine, 1, scratch + width, plan.half)
        cosine, sine, target = scratch, scratch + width, scratch + 2 * width
    if short or plan.column != 1:
        source = scratch + 4 * width
        copy_stored(zero, plan.storage, x, plan.column, source, r)
    turn_pairs(zero, plan, source, pointer(cosine, zero), pointer(sine, zero), target)
    if short:
        copy_stored(zero, plan.storage, target, 1, output, r)
    rest = x + r * plan.column * plan.size
    copy_stored(zero, plan.storage, rest, plan.column, output + r * plan.size, plan.d - r)


@njit(error_model="numpy")
def start_of(integers, axes, group):
    """Return the bytes from the start of x to a group of rows, and likewise in the tables."""
    x = table = types.int64(0)
    for axis in range(axes):
        at = PLAN + AXES * axis
        n = integers[at]
        x += group % n * integers[at + 1]
        table += group % n * integers[at + 2]
        group //= n
    return x, table


@kernel
def rotate_rows(zero, scratch, job):
    """Work through blocks of rows until none is left; run by every thread.

    Args:
        zero: a number of the computing format.
        scratch: address of `scratch_size` numbers, of this thread alone.
        job: address of a job, shared by the threads; its table has the plan, flat, and then the
            leading axes.
    """
    i = entry(job, 0, types.int64(0))
    plan = Rotation(
        i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8], i[9], i[10], i[11], i[12], i[13],
        i[14], i[15],
    )  # fmt: skip
    claimed = pointer(job, types.int64(0))
    blocks = -(-plan.n // BLOCK) * plan.groups
    t = claim(claimed) * plan.piece
    while t < blocks:
        for block in range(t, min(t + plan.piece, blocks)):
            group, low = block % plan.groups, block // plan.groups * BLOCK
            x_start, table_start = start_of(i, plan.axes, group)
            for m in range(low, min(low + BLOCK, plan.n)):
                x = plan.x + x_start + m * plan.row
                table = table_start + m * plan.table_row
                output = plan.output + (group * plan.n + m) * plan.d * plan.size
                turn_row(zero, plan, x, plan.cosine + table, plan.sine + table, output, scratch)
        t = claim(claimed) * plan.piece
