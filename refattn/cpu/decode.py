"""Attention of a few queries to many keys: every key is read once, in order, by all its queries.

The keys of a head are cut into parts of a fixed size, each with its own maximum, sum and output;
who finishes the last part of a head merges them in order, so the bits do not depend on the number
of threads. The rows of a key-value head are those of all query heads that read it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import njit, types

from refattn.cpu.ahead import none_ahead, rows_ahead
from refattn.cpu.band import reach
from refattn.cpu.compiling import kernel
from refattn.cpu.copying import copy_rows, fill, item_size, rows_of
from refattn.cpu.elementary import exp2
from refattn.cpu.flags import ALL, NONE, SOME
from refattn.cpu.merging import leave_part, merge_head
from refattn.cpu.online import add_weighted_columns, finite_rows, largest
from refattn.cpu.plan import MORE, Plan, entry, head_reading, read_job, to_powers
from refattn.cpu.products import up
from refattn.cpu.rowlogits import adjust_row, bar_row, group_census
from refattn.cpu.rowscores import lay_row, rows_times_keys, rows_together
from refattn.cpu.rowvalues import TALL, add_row_values
from refattn.cpu.simd import (
    add,
    advance,
    claim,
    lane_count,
    load,
    mul,
    pointer,
    splat,
    store,
    sub,
    sum_lanes,
)

PART = 512
"""Keys a part."""

TILE = 64
"""Keys that are worked on together, and copied where they cannot be read in place."""

FEW_ROWS = 32
"""Query rows of a key-value head for which this kernel is the faster one."""

MOST_ROWS = 128
"""Rows for which it is worth its parts: where few rows are one head's, or the heads are few."""


class Room(NamedTuple):
    """Scratch of a thread, by pointers."""

    Q: Any
    """Queries as `lay_row` leaves them, (rows, d_k)."""
    O: Any
    """Outputs, (rows, d_v), d in whole vectors."""
    P: Any
    """Products, then weights, of a part, (rows, PART + lanes)."""
    copied: Any
    """Keys or values of a tile, (TILE, d); at other times a row."""
    added: Any
    """Bias of a row, (PART + lanes,)."""


def suits(plan: Plan) -> bool:
    """Return whether a plan is for `decode`; the batch has no say, it would change the bits."""
    rows = plan.n_q * (plan.heads // plan.key_heads)
    if plan.keep.address or plan.reads:
        return False
    return rows <= FEW_ROWS or (rows <= MOST_ROWS and (plan.n_q <= 16 or plan.heads <= 4))


def scratch_size(plan: Plan, lanes: int) -> int:
    """Return how many numbers of scratch a thread of `decode` needs."""
    d = -(-max(plan.d_k, plan.d_v) // lanes) * lanes
    return (MOST_ROWS + 2 * lanes) * (2 * d + PART + lanes) + TILE * d + PART + lanes


def parts_of(plan: Plan) -> int:
    """Return the number of parts of a head's keys; at least one, which may be empty."""
    return max(1, -(-plan.n_k // PART))


def results_size(plan: Plan, lanes: int) -> int:
    """Return how many numbers the results of all parts are; see `merging`."""
    rows = plan.batch * plan.heads * plan.n_q * parts_of(plan)
    return rows * (-(-plan.d_v // lanes) + 1) * lanes


@njit(error_model="numpy")
def room_at(zero, plan, scratch):
    """Return the scratch of a thread; there is room for more rows than are together."""
    lanes = lane_count(zero)
    d, rows = up(max(plan.d_k, plan.d_v), lanes), MOST_ROWS + 2 * lanes
    Q = pointer(scratch, zero)
    O, P = advance(Q, rows * d), advance(Q, 2 * rows * d)
    copied = advance(P, rows * (PART + lanes))
    return Room(Q, O, P, copied, advance(copied, TILE * d))


@njit(error_model="numpy")
def load_rows(zero, plan, b, g, valid, room):
    """Load the queries that read one key-value head: of each query head its valid rows."""
    q, d = plan.query, up(plan.d_k, lane_count(zero))
    rows, first, together = plan.heads // plan.key_heads * valid, 0, 0
    fill(zero, room.Q, d, up(rows, 2 * lane_count(zero)), d)
    for r in range(rows):
        if r == first + together:
            first, together = r, rows_together(zero, rows - r)
        member, i = r // valid, r % valid
        place = b * q.batch + head_reading(plan, g, member) * q.head + i * q.row
        start = q.address + place * item_size(zero, plan.storage)
        copy_rows(zero, start, plan.storage, q.row, q.column, 1, plan.d_k, room.copied, d)
        if plan.negative:
            for x in range(plan.d_k):
                room.copied[x] = -room.copied[x]
        lay_row(zero, room.copied, plan.d_k, r - first, together, advance(room.Q, first * d))


@njit(error_model="numpy")
def score_part(zero, plan, b, g, low, high, rows, room):
    """Write the products of the rows with the keys low, ..., high - 1 into P.

    Spec: FA1-ALG1 line 9.
    """
    p_row, d, k = PART + lane_count(zero), up(plan.d_k, lane_count(zero)), plan.key
    fill(zero, advance(room.copied, plan.d_k), d, TILE, d - plan.d_k)
    for j in range(low, high, TILE):
        n = min(TILE, high - j)
        K, k_row = rows_of(
            zero, plan.storage, k, b, g, j, n, plan.n_k, plan.d_k, lane_count(zero), room.copied, d
        )
        ahead = rows_ahead(zero, plan, k, b, g, j + TILE)
        if j + TILE >= high:
            ahead = rows_ahead(zero, plan, plan.value, b, g, low)
        r = 0
        while r < rows:
            together = rows_together(zero, rows - r)
            Q, S = advance(room.Q, r * d), advance(room.P, r * p_row + j - low)
            rows_times_keys(zero, K, k_row, n, Q, together, d, S, p_row, ahead)
            ahead = none_ahead()
            r += together


@njit(error_model="numpy")
def weigh_row(zero, numbers, P, n, factor):
    """Turn n logits into weights, and return the logits' maximum and the sum of the weights.

    Spec: FA1-ALG1 line 10.

        m = max S;  P̃ = 2^(factor · (S - m));  ℓ = Σ P̃
    """
    lanes = lane_count(zero)
    whole = up(n, lanes)
    for j in range(n, whole):
        P[j] = -numbers.infinity
    store(P, whole, largest(P, 0, whole // lanes, lanes, splat(-numbers.infinity)))
    m = -numbers.infinity
    for j in range(whole, whole + lanes):
        m = max(m, P[j])
    c, shift = splat(factor), splat(m if m > -numbers.infinity else zero)
    total = splat(zero)
    for j in range(0, whole, lanes):
        P_tilde = exp2(mul(sub(load(P, j), shift), c))
        store(P, j, P_tilde)
        total = add(total, P_tilde)
    return m, sum_lanes(total)


@njit(error_model="numpy")
def weigh_part(
    zero, plan, numbers, slopes, first, b, g, low, high, valid, masked, room, parts, row_step
):
    """Turn the products of a part into weights, and write maximum and sum of every row.

    Spec: FA1-ALG1 line 10.

    Args:
        zero: a number of the computing format.
        plan: of the attention.
        numbers: likewise.
        slopes: by query head.
        first: position of query row 0, tokens.
        b: batch item.
        g: key-value head.
        low: first key.
        high: end of the keys.
        valid: rows of each query head.
        masked: whether the mask forbids some of the keys.
        room: of this thread.
        parts: results of the first row in this part, by pointer.
        row_step: elements from one row's results to the next.
    """
    n, d = high - low, up(plan.d_v, lane_count(zero))
    factor = to_powers(plan, numbers)
    for r in range(plan.heads // plan.key_heads * valid):
        h, i = head_reading(plan, g, r // valid), r % valid
        P = advance(room.P, r * (PART + lane_count(zero)))
        if plan.terms:
            slope, added = slopes[h], room.added
            adjust_row(zero, plan, numbers, slope, b, h, i, first + i, low, n, P, added)
        bar_row(zero, plan, numbers, b, h, i, first + i, low, n, P, masked)
        m, total = weigh_row(zero, numbers, P, n, factor)
        parts[r * row_step + d], parts[r * row_step + d + 1] = m, total


@njit(error_model="numpy")
def add_read_values(zero, numbers, P, p_row, rows, n, V, O, d):
    """Add P V to O where a weight of zero reads nothing; the bits of `add_row_values`.

    Spec: OWN-POISON1.
    """
    total = advance(O, MOST_ROWS * d)
    for r in range(rows):
        fill(zero, total, 0, 1, d)
        add_weighted_columns(zero, numbers, advance(P, r * p_row), 1, n, V, d, total)
        for x in range(0, d, lane_count(zero)):
            store(O, r * d + x, add(load(O, r * d + x), load(total, x)))


@njit(error_model="numpy")
def value_part(zero, plan, numbers, b, g, low, high, rows, plain, room, parts, row_step):
    """Write the weighted values of a part for every row; plain if every row sees every key.

    Spec: FA1-ALG1 line 12, OWN-POISON1.
    """
    p_row, d, v = PART + lane_count(zero), up(plan.d_v, lane_count(zero)), plan.value
    fill(zero, room.O, d, up(rows, TALL), d)
    fill(zero, advance(room.copied, plan.d_v), d, TILE, d - plan.d_v)
    for j in range(low, high, TILE):
        n = min(TILE, high - j)
        V, v_row = rows_of(
            zero, plan.storage, v, b, g, j, n, plan.n_k, plan.d_v, lane_count(zero), room.copied, d
        )
        P = advance(room.P, j - low)
        if plain or finite_rows(zero, V, v_row, n, plan.d_v):
            ahead = rows_ahead(zero, plan, v, b, g, j + TILE) if j + TILE < high else none_ahead()
            add_row_values(zero, P, p_row, rows, n, V, v_row, room.O, d, ahead)
        else:
            start = v.address + (b * v.batch + g * v.head + j * v.row) * item_size(
                zero, plan.storage
            )
            copy_rows(zero, start, plan.storage, v.row, v.column, n, plan.d_v, room.copied, d)
            add_read_values(zero, numbers, P, p_row, rows, n, room.copied, room.O, d)
    for r in range(rows):
        for x in range(0, d, lane_count(zero)):
            store(parts, r * row_step + x, load(room.O, r * d + x))


@njit(error_model="numpy")
def attend_part(
    zero, plan, numbers, slopes, first, b, g, low, high, valid, plain, masked, room, parts, row_step
):
    """Attend from the rows of a key-value head to one part of its keys.

    Spec: FA1-ALG1 lines 9-12.
    """
    rows = plan.heads // plan.key_heads * valid
    score_part(zero, plan, b, g, low, high, rows, room)
    weigh_part(
        zero, plan, numbers, slopes, first, b, g, low, high, valid, masked, room, parts, row_step
    )
    value_part(zero, plan, numbers, b, g, low, high, rows, plain, room, parts, row_step)


@kernel
def decode(zero, scratch, job):
    """Work through the parts of all heads until none is left; run by every thread.

    Args:
        zero: a number of the computing format.
        scratch: address of `scratch_size` numbers, of this thread alone.
        job: address of a job, as `plan` describes it, shared by the threads. What it has more:
            address of `results_size` numbers, parts, address of the numbers of finished parts by
            key-value head, zeros before.
    """
    plan, numbers, rules = read_job(zero, job)
    more = entry(job, MORE, types.int64(0))
    claimed, finished = pointer(job, types.int64(0)), pointer(more[2], types.int64(0))
    results, count, room = pointer(more[0], zero), more[1], room_at(zero, plan, scratch)
    d, group = up(plan.d_v, lane_count(zero)), plan.heads // plan.key_heads
    row_step = count * (d + lane_count(zero))
    loaded = -1
    t = claim(claimed)
    while t < plan.batch * plan.key_heads * count:
        pair, part = t // count, t % count
        b, g = pair // plan.key_heads, pair % plan.key_heads
        first, valid = rules.offsets[b], rules.query_lengths[b]
        low, high, all_low, all_high = reach(plan, first, valid, rules.key_lengths[b])
        low, high = max(low, part * PART), min(high, (part + 1) * PART)
        head = advance(results, pair * group * plan.n_q * row_step)
        parts = advance(head, part * (d + lane_count(zero)))
        allowed = ALL
        if plan.mask.address != 0 and low < high:
            allowed = group_census(plan, b, g, valid, low, high - low)
        if valid > 0 and low < high and allowed != NONE:
            if loaded != pair:
                load_rows(zero, plan, b, g, valid, room)
                loaded = pair
            plain = low >= all_low and high <= all_high and allowed == ALL
            attend_part(
                zero, plan, numbers, rules.slopes, first, b, g, low, high, valid,
                plain and plan.bias.address == 0, allowed == SOME, room, parts, row_step,
            )  # fmt: skip
        else:
            leave_part(zero, numbers, group * valid, parts, row_step, d)
        if claim(advance(finished, pair)) == count - 1:
            merge_head(zero, plan, numbers, b, g, rules.sinks, valid, head, count, room.O)
        t = claim(claimed)
