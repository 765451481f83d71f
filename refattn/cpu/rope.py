"""Rotary position embedding on the CPU: the arguments and the tables of the reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refattn.arrays import dtype_name
from refattn.cpu import pool
from refattn.cpu.copying import STORAGES
from refattn.cpu.host import lanes
from refattn.cpu.plan import NDArray, check_numpy, whole_elements
from refattn.cpu.rotation import BLOCK, PIECE, Rotation, rotate_rows, scratch_size
from refattn.rope import (
    RopeResult,
    check_rotation,
    rope_tables_for,
    table_dtype,
    tables_on_heads,
)
from refattn.rope_frequencies import Variant

SMALL = 2**20
"""Features under which a second thread costs more than it brings."""


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
        computing = np.dtype(table_dtype(x))
        rows = whole_elements(x.reshape(1, -1) if x.ndim == 1 else x)
        if cosine.shape != sine.shape:
            cosine, sine = np.broadcast_arrays(cosine, sine)
        tables = [np.require(table, computing, ["C", "A"]) for table in (cosine, sine)]
        plan, axes = _plan(rows, tables, output, pairing)
        about = (np.array([*plan, *axes]),)
        room = scratch_size(plan, lanes(computing.itemsize))
        pool.share(rotate_rows, room, computing, about, threads if x.size > SMALL else 1)
    return output.astype(x.dtype, copy=False)


def _plan(
    x: NDArray, tables: list[NDArray], output: NDArray, pairing: str
) -> tuple[Rotation, list[int]]:
    """Return the plan and what follows it, the leading axes."""
    cosine, sine = tables
    n, d = x.shape[-2:]
    steps = [0 if m == 1 else s for m, s in zip(cosine.shape, cosine.strides, strict=True)]
    steps = [*[0] * (x.ndim - cosine.ndim), *steps]  # of the table, broadcast to x's rows
    leading = [*zip(x.shape[:-2], x.strides[:-2], steps[:-2], strict=True)][::-1]
    plan = Rotation(
        x=x.ctypes.data,
        output=output.ctypes.data,
        cosine=cosine.ctypes.data,
        sine=sine.ctypes.data,
        storage=STORAGES[dtype_name(x)],
        size=x.itemsize,
        groups=math.prod(x.shape[:-2]),
        n=n,
        d=d,
        half=cosine.shape[-1],
        split=int(pairing == "half_split"),
        row=x.strides[-2],
        column=x.strides[-1] // x.itemsize,
        table_row=steps[-2],
        piece=max(1, PIECE // (min(n, BLOCK) * d)),
        axes=len(leading),
    )
    return plan, [number for axis in leading for number in axis]
