"""Rotary position embedding on the CPU: rows of features, turned by the tables of the reference.

Every operation is rounded by itself, in the order of the reference's text, so that both give the
same bits; memory, not arithmetic, is what the kernel waits for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types

from refattn.arrays import dtype_name
from refattn.cpu import pool
from refattn.cpu.copying import (
    NATIVE,
    STORAGES,
    copy_stored,
    item_size,
    read_vector,
    write_vector,
)
from refattn.cpu.host import lanes
from refattn.cpu.plan import NDArray, check_numpy, whole_elements
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
from refattn.rope import (
    RopeResult,
    check_rotation,
    rope_tables_for,
    table_dtype,
    tables_on_heads,
)
from refattn.rope_frequencies import Variant

BLOCK = 64
"""Rows of one head that are turned before the next head: their tables stay in the cache."""

PIECE = 2**15
"""Features that a thread takes at once, about."""

SMALL = 2**18
"""Features under which a second thread costs more than it brings."""


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


def rope(
    x: NDArray,
    positions: Any,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    variant: Variant | None = None,
    pairing: str = "interleaved",
    threads: int | None = None,
) -> RopeResult:
    """Return features rotated by their positions, with the tables used.

    Spec: ROPE-EQ34, OWN-ROPE1, OWN-ROPE2, OWN-ROPE3, OWN-ROUND1.

        R_m x = x ⊗ cos(mθ) + (-x_2, x_1, -x_4, x_3, ...) ⊗ sin(mθ)

    The tables are those of `refattn.rope_tables`, and making them takes longer than the rotation:
    where queries and keys, or many layers, share positions, make them once and call `rotate`.

    Args:
        x: queries or keys, (..., n, d), any strides.
        positions: m, (n,), or (b, n) for x of (b, ..., n, d); integers, tokens.
        base: base of the frequencies.
        rotary_dim: r, even: the first r features rotate, the others stay; d if None.
        variant: see `refattn.rope_frequencies.rope_frequencies`.
        pairing: "interleaved" or "half_split".
        threads: how many; NUMBA_NUM_THREADS if None.

    Returns:
        output: (..., n, d), in x's dtype; frequencies, attention_factor, cosine, sine: as the
            reference.

    Raises:
        ShapeError, DtypeError, OptionError: as the reference.
        Unsupported: x is no NumPy array.
    """
    count = pool.thread_count("cpu.rope", threads)
    check_numpy("cpu.rope", x=x)
    tables = rope_tables_for("cpu.rope", x, positions, base, rotary_dim, variant)
    output = _rotated("cpu.rope", x, *tables_on_heads(x, tables), pairing, count)
    return RopeResult(output, *tables)


def rope_backward(
    d_output: NDArray,
    positions: Any,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    variant: Variant | None = None,
    pairing: str = "interleaved",
    threads: int | None = None,
) -> NDArray:
    """Return the gradient of rope's input: the transpose of the rotation turns back.

    Spec: ROPE-EQ34, OWN-ROPE1, OWN-ROPE2, OWN-ROPE3, OWN-ROUND1.

        dx = R_mᵀ dO = R_{-m} dO, times the attention factor as in the forward pass

    Args:
        d_output: dO, (..., n, d), any strides.
        positions: as in `rope`, and so are all others.
        base: base of the frequencies.
        rotary_dim: r.
        variant: see `refattn.rope_frequencies.rope_frequencies`.
        pairing: "interleaved" or "half_split".
        threads: how many; NUMBA_NUM_THREADS if None.

    Returns:
        d_x: (..., n, d), in d_output's dtype.

    Raises:
        ShapeError, DtypeError, OptionError: as the reference.
        Unsupported: d_output is no NumPy array.
    """
    name = "cpu.rope_backward"
    count = pool.thread_count(name, threads)
    check_numpy(name, d_output=d_output)
    tables = rope_tables_for(name, d_output, positions, base, rotary_dim, variant)
    cosine, sine = tables_on_heads(d_output, tables)
    return _rotated(name, d_output, cosine, -sine, pairing, count)


def rotate(
    x: NDArray,
    cosine: NDArray,
    sine: NDArray,
    *,
    pairing: str = "interleaved",
    threads: int | None = None,
) -> NDArray:
    """Return features rotated by the angles of given tables.

    Spec: ROPE-EQ34, OWN-ROPE1, OWN-ROPE2, OWN-ROUND1.

        (u, v) → (u cos - v sin, u sin + v cos)  for each pair (u, v)

    Args:
        x: (..., n, d), any strides.
        cosine: cos(mθ), (..., n, r/2), leading axes broadcastable to x's, r ≤ d, of x's dtype
            or its computing dtype. Features r ... d-1 stay.
        sine: sin(mθ), likewise.
        pairing: "interleaved" or "half_split".
        threads: how many; NUMBA_NUM_THREADS if None.

    Returns:
        output: (..., n, d), in x's dtype.

    Raises:
        ShapeError, DtypeError, OptionError: as the reference.
        Unsupported: an argument is no NumPy array.
    """
    count = pool.thread_count("cpu.rotate", threads)
    check_numpy("cpu.rotate", x=x, cosine=cosine, sine=sine)
    return _rotated("cpu.rotate", x, cosine, sine, pairing, count)


def _rotated(
    function: str, x: NDArray, cosine: NDArray, sine: NDArray, pairing: str, threads: int
) -> NDArray:
    """Check the tables, run the kernel and return its output."""
    check_rotation(function, x, cosine, sine, pairing)
    output = np.empty(x.shape, x.dtype.newbyteorder("="))
    if x.size:
        from refattn.cpu.kernels import rotate_rows

        computing = np.dtype(table_dtype(x))
        rows = whole_elements(x.reshape(1, -1) if x.ndim == 1 else x)
        if cosine.shape != sine.shape:
            cosine, sine = np.broadcast_arrays(cosine, sine)
        tables = [np.require(table, computing, ["C", "A"]) for table in (cosine, sine)]
        plan, starts = _plan(rows, tables, output, pairing)
        room = scratch_size(plan, lanes(computing.itemsize))
        about = (np.array(plan), starts)
        pool.share(rotate_rows, room, computing, about, threads if x.size > SMALL else 1)
    return output.astype(x.dtype, copy=False)


def _plan(
    x: NDArray, tables: list[NDArray], output: NDArray, pairing: str
) -> tuple[Rotation, NDArray]:
    """Return the plan, and where each group of rows starts in x and in the tables, in bytes."""
    cosine, sine = tables
    n, d = x.shape[-2:]
    missing = (0,) * (x.ndim - cosine.ndim)
    steps = [0 if m == 1 else s for m, s in zip(cosine.shape, cosine.strides, strict=True)]
    steps = [*missing, *steps]  # of the table, broadcast to x's rows
    starts = np.array([_starts(x.shape, x.strides), _starts(x.shape, steps)])
    plan = Rotation(
        x=x.ctypes.data,
        output=output.ctypes.data,
        cosine=cosine.ctypes.data,
        sine=sine.ctypes.data,
        storage=STORAGES[dtype_name(x)],
        size=x.itemsize,
        groups=starts.shape[1],
        n=n,
        d=d,
        half=cosine.shape[-1],
        split=int(pairing == "half_split"),
        row=x.strides[-2],
        column=x.strides[-1] // x.itemsize,
        table_row=steps[-2],
        piece=max(1, PIECE // (min(n, BLOCK) * d)),
    )
    return plan, starts


def _starts(shape: Sequence[int], strides: Sequence[int]) -> NDArray:
    """Return the bytes from an array's start to every block of its last two axes."""
    starts = np.zeros(1, np.int64)
    for n, step in zip(shape[:-2], strides[:-2], strict=True):
        if n > 1:
            starts = np.add.outer(starts, np.arange(n) * step).reshape(-1)
    return starts


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


def rotate_rows(zero, scratch, counter, integers, starts):
    """Work through blocks of rows until none is left; run by every thread.

    Args:
        zero: a number of the computing format.
        scratch: address of `scratch_size` numbers, of this thread alone.
        counter: address of the number of pieces that were claimed, shared by the threads.
        integers: the plan, flat.
        starts: (2, groups), bytes to each group of rows in x and in the tables.
    """
    i = integers
    plan = Rotation(
        i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8], i[9], i[10], i[11], i[12], i[13],
        i[14],
    )  # fmt: skip
    claimed = pointer(counter, types.int64(0))
    blocks = -(-plan.n // BLOCK) * plan.groups
    t = claim(claimed) * plan.piece
    while t < blocks:
        for block in range(t, min(t + plan.piece, blocks)):
            group, low = block % plan.groups, block // plan.groups * BLOCK
            for m in range(low, min(low + BLOCK, plan.n)):
                x = plan.x + starts[0, group] + m * plan.row
                table = starts[1, group] + m * plan.table_row
                output = plan.output + (group * plan.n + m) * plan.d * plan.size
                turn_row(zero, plan, x, plan.cosine + table, plan.sine + table, output, scratch)
        t = claim(claimed) * plan.piece
