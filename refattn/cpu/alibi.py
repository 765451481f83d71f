"""The bias of ALiBi on the CPU: each row is a window of one line of distances, times a slope.

A distance depends on j - i alone, or on j alone, so that the rows of a matrix of distances are one
line seen from different places. The line is the reference's; the kernel multiplies and rounds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, types

from refattn.alibi import Alignment, bias_shape, check_bias, distances
from refattn.arrays import Array, dtype_name
from refattn.checks import check_memory
from refattn.cpu import pool
from refattn.cpu.compiling import kernel
from refattn.cpu.copying import NATIVE, STORAGES, copy_stored, item_size, write_vector
from refattn.cpu.host import lanes
from refattn.cpu.plan import NDArray, check_numpy, entry
from refattn.cpu.simd import claim, lane_count, load, mul, pointer, splat

PIECE = 2**15
"""Numbers of the bias that a thread writes at once, about."""

SMALL = 2**20
"""Numbers of the bias under which a second thread costs more than it brings."""


class Bias(NamedTuple):
    """One bias, for the kernel: addresses, sizes, and where the rows see the line."""

    line: int
    """(items, length), in the computing format, and a vector of slack."""
    slopes: int
    output: int
    storage: int
    """Of the output; see `copying.STORAGES`."""
    size: int
    """Bytes of a stored number."""
    items: int
    """Lines: one, or one a batch item."""
    length: int
    """Distances a line."""
    heads: int
    n_q: int
    n_k: int
    step: int
    """Places by which a row sees the line farther on than the row after it: 1 or 0."""
    piece: int
    """Rows that a thread takes at once."""


def alibi_bias(
    slopes: NDArray,
    n_q: int,
    n_k: int,
    *,
    alignment: Alignment = "top_left",
    distance: str = "absolute",
    threads: int | None = None,
) -> NDArray:
    """Return the bias that is added to the logits after they are scaled.

    Spec: ALIBI-S3a, ALIBI-FN10, OWN-ALIBI1, OWN-ROUND1, OWN-MEMORY1.

        B_hij = m_h · D_ij;   absolute: D_ij = -|p_i - j|,  p_i = i + offset

    Args:
        slopes: m (h,), logit units a token.
        n_q: number of queries.
        n_k: number of keys.
        alignment: `top_left` (offset 0), `bottom_right` (offset n_k - n_q), the offset itself,
            or a list of offsets, one a batch item.
        distance: `absolute`, `signed` (m(j - p_i)) or `column` (m j).
        threads: how many; NUMBA_NUM_THREADS if None.

    Returns:
        B (h, n_q, n_k), or (b, h, n_q, n_k) for a list of offsets; dtype of slopes.

    Raises:
        ShapeError, DtypeError, OptionError: as the reference.
        MemoryLimitError: the bias does not fit into the free memory.
        Unsupported: slopes is no NumPy array.
    """
    name = "cpu.alibi_bias"
    count = pool.thread_count(name, threads)
    check_numpy(name, slopes=slopes)
    n_q, n_k, offset = check_bias(name, slopes, n_q, n_k, alignment, distance)
    shape = bias_shape(slopes, n_q, n_k, offset)
    check_memory(name, shape, itemsize=slopes.itemsize, arrays=1)
    output = np.empty(shape, slopes.dtype.newbyteorder("="))
    if output.size:
        computing = np.dtype("float64" if dtype_name(slopes) == "float64" else "float32")
        m = np.array(slopes, computing, order="C")
        line = line_of(n_q, n_k, offset, distance).astype(computing)
        slack = np.zeros(lanes(computing.itemsize), computing)
        read = np.concatenate([line.reshape(-1), slack])
        plan = _plan(line.shape, read, m, output, distance)
        threads = count if output.size > SMALL else 1
        pool.share(bias_rows, slack.size, computing, (np.array(plan),), threads)
    return output.astype(slopes.dtype, copy=False)


def line_of(n_q: int, n_k: int, offset: int | Array, distance: str) -> NDArray:
    """Return the distances of all rows, (items, length), those of the last row first.

    Spec: ALIBI-S3a, OWN-ALIBI1.

        D_ij = line[n_q - 1 - i + j];  column: D_ij = line[j]
    """
    if distance == "column":
        line = distances(1, n_k, offset=offset, distance=distance)
    else:
        line = distances(1, n_q + n_k - 1, offset=offset + (n_q - 1), distance=distance)
    return np.asarray(line.reshape(-1, line.shape[-1]))


def _plan(
    lines: tuple[int, ...], line: NDArray, slopes: NDArray, output: NDArray, distance: str
) -> Bias:
    """Return the plan of a bias whose lines have the shape (items, length)."""
    n_q, n_k = output.shape[-2:]
    return Bias(
        line=line.ctypes.data,
        slopes=slopes.ctypes.data,
        output=output.ctypes.data,
        storage=STORAGES[dtype_name(output)],
        size=output.itemsize,
        items=lines[0],
        length=lines[1],
        heads=slopes.size,
        n_q=n_q,
        n_k=n_k,
        step=int(distance != "column"),
        piece=max(1, PIECE // n_k),
    )


@njit(error_model="numpy")
def bias_row(zero, plan, m, line, output, scratch):
    """Write one row of a bias, its last vector over the end of the one before.

    Spec: ALIBI-S3a.

        B_hij = m_h · D_ij
    """
    lanes, short = lane_count(zero), plan.n_k < lane_count(zero)
    D, target = pointer(line, zero), scratch if short else output
    for first in range(0, plan.n_k, lanes):
        j = max(0, min(first, plan.n_k - lanes))
        write_vector(zero, target, j, mul(splat(m), load(D, j)), plan.storage)
    if short:
        copy_stored(zero, plan.storage, scratch, 1, output, plan.n_k)


@kernel
def bias_rows(zero, scratch, job):
    """Work through the rows of a bias until none is left; run by every thread.

    Args:
        zero: a number of the computing format.
        scratch: address of a vector of numbers, of this thread alone.
        job: address of a job, shared by the threads; its table has the plan, flat.
    """
    i = entry(job, 0, types.int64(0))
    plan = Bias(i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8], i[9], i[10], i[11])
    claimed, slopes = pointer(job, types.int64(0)), pointer(plan.slopes, zero)
    rows, itemsize = plan.items * plan.heads * plan.n_q, item_size(zero, NATIVE)
    t = claim(claimed) * plan.piece
    while t < rows:
        for row in range(t, min(t + plan.piece, rows)):
            head, i_q = row // plan.n_q, row % plan.n_q
            seen = plan.step * (plan.n_q - 1 - i_q) + head // plan.heads * plan.length
            output = plan.output + row * plan.n_k * plan.size
            line = plan.line + seen * itemsize
            bias_row(zero, plan, slopes[head % plan.heads], line, output, scratch)
        t = claim(claimed) * plan.piece
