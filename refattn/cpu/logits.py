"""The logits of a tile beside the plain product: scale, softcap, ALiBi, bias, masks.

A tile is held transposed, S[key][query]; a forbidden cell becomes -∞ whatever it held.
"""

from __future__ import annotations

from numba import njit, types

from refattn.cpu.copying import read
from refattn.cpu.elementary import ones, tanh
from refattn.cpu.plan import (
    ABSOLUTE,
    AFTER_BIAS,
    BEFORE_BIAS,
    NO_DISTANCE,
    SIGNED,
)
from refattn.cpu.simd import (
    add,
    convert,
    div,
    lane_count,
    lane_numbers,
    load,
    mul,
    pointer,
    splat,
    store,
    sub,
    where_less,
)


@njit(error_model="numpy")
def gather_added(zero, plan, numbers, b, h, i, rows, j, n, added, width):
    """Write the given bias of a tile into scratch, -∞ where the given mask forbids.

    Args:
        zero: a number of the computing format.
        plan: of the attention.
        numbers: of the attention.
        b: batch item.
        h: query head.
        i: the panel's first query row.
        rows: of the panel.
        j: the tile's first key.
        n: keys of the tile.
        added: scratch, (n, width), by pointer.
        width: columns of the panel.
    """
    mask, bias = plan.mask, plan.bias
    allowed = pointer(mask.address + b * mask.batch + h * mask.head, types.uint8(0))
    start = b * bias.batch + h * bias.head
    for y in range(n):
        for x in range(rows):
            total = zero
            if bias.address != 0:
                place = start + (i + x) * bias.row + (j + y) * bias.column
                total = read(zero, bias.address, place, plan.storage)
            if mask.address != 0 and not allowed[(i + x) * mask.row + (j + y) * mask.column]:
                total = -numbers.infinity
            added[y * width + x] = total
        for x in range(rows, width):  # a missing row sees nothing
            added[y * width + x] = -numbers.infinity


@njit(error_model="numpy")
def adjust(zero, plan, numbers, slope, first, j, n, S, added, vectors, bend, bent):
    """Turn the products of a tile into logits.

    Spec: OWN-SOFTCAP1, OWN-BIAS1, ALIBI-S3a, OWN-ALIBI1.

        S ← softcap(scale · S) + (alibi + bias), or softcap(scale · S + alibi + bias)

    Args:
        zero: a number of the computing format.
        plan: of the attention.
        numbers: of the attention.
        slope: ALiBi's m of the head.
        first: position of the panel's first row, tokens.
        j: the tile's first key.
        n: keys of the tile.
        S: (n, vectors · lanes), by pointer.
        added: likewise: bias, -∞ where forbidden.
        vectors: of the panel.
        bend: likewise; the softcap's derivative is written here if `bent`.
        bent: as said.
    """
    lanes = lane_count(zero)
    scale, cap = splat(numbers.scale), splat(numbers.softcap)
    nothing = splat(zero)
    given = plan.mask.address != 0 or plan.bias.address != 0
    for y in range(n):
        for v in range(vectors):
            at = (y * vectors + v) * lanes
            logits = mul(load(S, at), scale)
            if plan.softcap == BEFORE_BIAS:
                logits = _soften(logits, cap, bend, at, bent)
            terms = nothing
            if plan.distance != NO_DISTANCE:
                steps = steps_ahead(
                    zero, plan, convert(first + v * lanes, zero), convert(j + y, zero)
                )
                terms = mul(splat(slope), steps)
            if given:
                terms = add(terms, load(added, at))
            logits = add(logits, terms)
            if plan.softcap == AFTER_BIAS:
                logits = _soften(logits, cap, bend, at, bent)
            if given:
                logits = _bar(numbers, load(added, at), logits)
            store(S, at, logits)


@njit(error_model="numpy")
def _soften(logits, cap, bend, at, bent):
    """Return c·tanh(S/c), and write its derivative 1 - tanh²(S/c) if it is asked for."""
    t = tanh(div(logits, cap))
    if bent:
        store(bend, at, sub(ones(t), mul(t, t)))
    return mul(cap, t)


@njit(error_model="numpy")
def steps_ahead(zero, plan, position, key):
    """Return ALiBi's factor of the slope for a vector of queries and one key."""
    start, column = splat(convert(position, zero)), splat(convert(key, zero))
    ahead = sub(column, add(start, lane_numbers(zero)))
    if plan.distance == ABSOLUTE:
        return where_less(splat(zero), ahead, sub(splat(zero), ahead), ahead)
    if plan.distance == SIGNED:
        return ahead
    return column


@njit(error_model="numpy")
def _bar(numbers, added, logits):
    """Return -∞ in the lanes where -∞ is added, whatever the logits hold there."""
    barred = splat(-numbers.infinity)
    return where_less(
        barred, added, logits, where_less(added, splat(numbers.scale), barred, logits)
    )


@njit(error_model="numpy")
def bar_outside(zero, plan, numbers, first, rows, j, n, S, vectors):
    """Write -∞ into the cells of a tile outside the band.

    Spec: OWN-CAUSAL1, OWN-WINDOW1.

    Args:
        zero: a number of the computing format.
        plan: of the attention.
        numbers: of the attention.
        first: position of the panel's first row, tokens.
        rows: of the panel.
        j: the tile's first key.
        n: keys of the tile.
        S: (n, vectors · lanes), by pointer; read only inside the band.
        vectors: of the panel.
    """
    lanes = lane_count(zero)
    barred = splat(-numbers.infinity)
    for y in range(n):
        low = min(max(0, j + y - plan.right - first), rows)
        high = max(min(rows, j + y + plan.left - first + 1), 0)
        for v in range(vectors):
            at, start = (y * vectors + v) * lanes, v * lanes
            if start >= low and start + lanes <= high:
                continue
            if start + lanes <= low or start >= high:
                store(S, at, barred)
                continue
            lane = add(lane_numbers(zero), splat(convert(start, zero)))
            inside = where_less(lane, splat(convert(low, zero)), barred, load(S, at))
            store(S, at, where_less(lane, splat(convert(high, zero)), inside, barred))
