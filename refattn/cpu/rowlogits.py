"""The logits of one query row beside the plain product; lanes are keys.

The rules are those of `logits`, whose lanes are queries; here a row lies as it is, S[key].
"""

from __future__ import annotations

from numba import njit

from refattn.cpu.band import reach
from refattn.cpu.copying import copy_rows, fill, item_size
from refattn.cpu.flags import ALL, SOME, census, put_where_row_false
from refattn.cpu.logits import add_bias, bar_added, scale_cells, soften, steps_of
from refattn.cpu.plan import AFTER_BIAS, BEFORE_BIAS, NO_DISTANCE, NO_SOFTCAP, query_head
from refattn.cpu.products import up
from refattn.cpu.simd import (
    add,
    advance,
    convert,
    fma,
    lane_count,
    lane_numbers,
    load,
    mul,
    splat,
    store,
)


@njit(error_model="numpy")
def adjust_row(zero, plan, numbers, slope, b, h, i, position, j, n, S, added):
    """Turn the products of a row with n keys into logits; see `logits.adjust`.

    Spec: OWN-SOFTCAP1, OWN-BIAS1, ALIBI-S3a, OWN-ALIBI1.

    Args:
        zero: a number of the computing format.
        plan: of the attention.
        numbers: likewise.
        slope: ALiBi's m of the head.
        b: batch item.
        h: query head.
        i: query row.
        position: of the row, tokens.
        j: first key.
        n: keys.
        S: (n,), by pointer; read and written in whole vectors.
        added: scratch, likewise.
    """
    vectors, factor = up(n, lane_count(zero)) // lane_count(zero), numbers.scale
    if plan.softcap == BEFORE_BIAS:
        soften(zero, numbers, factor, 1, S, vectors, S, False)
        factor = numbers.one
    if plan.distance != NO_DISTANCE:
        add_row_distances(zero, plan, slope, factor, position, j, n, S)
        factor = numbers.one
    if plan.bias.address != 0:
        t = plan.bias
        place = b * t.batch + h * t.head + i * t.row + j * t.column
        start = t.address + place * item_size(zero, plan.storage)
        copy_rows(zero, start, plan.storage, t.row, t.column, 1, n, added, n)
        add_bias(zero, plan, numbers, factor, 1, S, added, vectors)
        factor = numbers.one
    elif plan.distance == NO_DISTANCE and plan.softcap == NO_SOFTCAP:
        scale_cells(zero, factor, 1, S, vectors)
    if plan.softcap == AFTER_BIAS:
        soften(zero, numbers, factor, 1, S, vectors, S, False)
        if plan.bias.address != 0:  # what was forbidden is a cap away from 0 now
            bar_added(zero, numbers, 1, S, added, vectors)


@njit(error_model="numpy")
def add_row_distances(zero, plan, slope, factor, position, j, n, S):
    """Write factor · S + slope · distance.

    Spec: ALIBI-S3a, OWN-ALIBI1.
    """
    m, c = splat(slope), splat(factor)
    for y in range(0, n, lane_count(zero)):
        ahead = add(splat(convert(j + y - position, zero)), lane_numbers(zero))
        column = add(splat(convert(j + y, zero)), lane_numbers(zero))
        store(S, y, fma(m, steps_of(zero, plan, ahead, column), mul(load(S, y), c)))


@njit(error_model="numpy")
def bar_row(zero, plan, numbers, b, h, i, position, j, n, S, masked):
    """Write -∞ into the cells of a row outside the band, and where the given mask forbids.

    Spec: OWN-CAUSAL1, OWN-WINDOW1, OWN-MASK1, OWN-POISON1.
    """
    low, high, _, _ = reach(plan, position, 1, j + n)
    low = min(max(low - j, 0), n)
    high = max(min(high - j, n), low)
    fill(-numbers.infinity, S, 0, 1, low)
    fill(-numbers.infinity, advance(S, high), 0, 1, n - high)
    if masked:
        put_where_row_false(zero, plan.mask, -numbers.infinity, b, h, i, j, n, S)


@njit(error_model="numpy")
def group_census(plan, b, g, rows, j, n):
    """Return whether all, some or none of n keys are allowed by the mask to a key-value head.

    Args:
        plan: of the attention.
        b: batch item.
        g: key-value head.
        rows: of each query head that reads it.
        j: first key.
        n: keys.
    """
    group, found = plan.heads // plan.key_heads, ALL
    for member in range(group if plan.mask.head != 0 else 1):
        allowed = census(plan.mask, b, query_head(plan, g, member), 0, rows, j, n)
        if member > 0 and allowed != found:
            return SOME
        found = allowed
    return found
