"""Where the gradients of one attention go, and how that of the bias is summed on the way."""

from __future__ import annotations

from typing import NamedTuple

from numba import njit

from refattn.cpu.copying import turn
from refattn.cpu.plan import Tensor, tensor_at
from refattn.cpu.simd import (
    add,
    advance,
    lane_count,
    load,
    pointer,
    splat,
    store,
    sum_lanes,
)


class Gradients(NamedTuple):
    """What the backward kernel reads beside the plan, and what it writes."""

    d_output: Tensor
    d_logsumexp: int
    """Address of (b, h, n_q) numbers, or 0."""
    dots: int
    """Address of D = Σ dO ∘ O - dL, (b, h, n_q)."""
    d_query: int
    """Address of (splits, b, h, n_q, d_k): one summand a range of keys."""
    d_key: int
    """Address of (b, h_k, n_k, d_k), both last sizes rounded up."""
    d_value: int
    d_bias: Tensor
    """Stride 0 along an axis that is summed; address 0 where there is no bias."""
    d_bias_split: int
    """Elements from one range of keys to the next, which are summed apart; 0 if they share none."""
    d_slopes: int
    """Address of (splits, b, h)."""
    splits: int
    """Ranges of keys a head."""
    keys: int
    """Keys a range, a multiple of `products.ROW_STEP`."""
    items: int
    """Batch items that are worked on apart: all, or 1 where they add to the same bias."""
    key_heads: int
    """Likewise key-value heads."""
    far: int
    """Address of what `panel.leave_far` wrote, where the logsumexp is extreme, or 0."""


@njit(error_model="numpy")
def read_gradients(i):
    """Return the gradients of `flatten(gradients)`."""
    return Gradients(
        tensor_at(i, 0), i[5], i[6], i[7], i[8], i[9], tensor_at(i, 10), i[15], i[16], i[17],
        i[18], i[19], i[20], i[21],
    )  # fmt: skip


@njit(error_model="numpy")
def add_d_bias(zero, grads, b, h, i, rows, split, j, n, d_added, spare, vectors):
    """Add the gradient of a tile's bias, summed over the axes along which the bias is the same.

    Spec: OWN-BACKWARD1.

    Args:
        zero: a number of the computing format.
        grads: where the gradients go.
        b: batch item.
        h: query head.
        i: the panel's first query row.
        rows: of the panel.
        split: the range of keys.
        j: the tile's first key.
        n: keys of the tile.
        d_added: (n, vectors · lanes), by pointer; 0 in the columns of missing rows.
        spare: scratch, as large, by pointer.
        vectors: of the panel.
    """
    t, lanes = grads.d_bias, lane_count(zero)
    width = vectors * lanes
    place = split * grads.d_bias_split + b * t.batch + h * t.head + i * t.row + j * t.column
    target = advance(pointer(t.address, zero), place)
    if t.column == 0:
        for v in range(vectors):
            total = splat(zero)
            for y in range(n):
                total = add(total, load(d_added, y * width + v * lanes))
            store(spare, v * lanes, total)
        for x in range(rows):
            target[x * t.row] += spare[x]
    elif t.row == 0:
        for y in range(n):
            total = splat(zero)
            for v in range(vectors):
                total = add(total, load(d_added, y * width + v * lanes))
            target[y] += sum_lanes(total)
    else:
        turn(d_added, width, n, rows, spare, n)
        for x in range(rows):
            add_row(zero, advance(spare, x * n), n, advance(target, x * t.row))


@njit(error_model="numpy")
def add_row(zero, row, n, target):
    """Add n numbers to as many."""
    lanes = lane_count(zero)
    y = 0
    while y + lanes <= n:
        store(target, y, add(load(target, y), load(row, y)))
        y += lanes
    while y < n:
        target[y] += row[y]
        y += 1
