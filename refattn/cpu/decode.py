"""Attention of a few queries to many keys: every key is read once, in order, by all its queries.

The keys of a head are cut into parts of a fixed size, each with its own maximum, sum and output;
the parts are merged in order, so the bits do not depend on the number of threads.
"""

from __future__ import annotations

import math

from numba import njit, types

from refattn.cpu.band import key_head, query_head, reach
from refattn.cpu.copying import copy_rows, fill, item_size, rows_of
from refattn.cpu.elementary import exp2
from refattn.cpu.host import VECTORS
from refattn.cpu.plan import OPEN, Plan, Rules, read_numbers, read_plan
from refattn.cpu.products import ADD, multiply, up
from refattn.cpu.simd import (
    add,
    advance,
    claim,
    fma,
    lane_count,
    load,
    maximum,
    mul,
    pointer,
    splat,
    store,
    sum_lanes,
    transpose,
)
from refattn.cpu.tile import add_outer, add_tile, zero_tile

PART = 512
"""Keys a part."""

TILE = 64
"""Keys that are copied at once where they cannot be read in place."""

MOST_ROWS = 4
"""Query rows that share a key-value head, at most."""

WIDE = 8
"""Vectors of a row of values that are summed at once: rows are then read as they lie."""

ROOM_ROWS = 8
"""Rows that scratch has, as many as the tallest register tile."""


def suits(plan: Plan) -> bool:
    """Return whether a plan is for `decode`: few rows, all of them seeing the same keys."""
    rows = plan.n_q * (plan.heads // plan.key_heads)
    banded = plan.left < OPEN or plan.right < OPEN
    return rows <= MOST_ROWS and not plan.terms and (plan.n_q == 1 or not banded)


def scratch_size(plan: Plan, lanes: int) -> int:
    """Return how many numbers of scratch a thread of `decode` needs."""
    d = -(-max(plan.d_k, plan.d_v) // lanes) * lanes
    return ROOM_ROWS * (2 * d + PART + lanes) + TILE * d + 2 * lanes * lanes


def parts_of(plan: Plan) -> int:
    """Return the number of parts of a head's keys."""
    return -(-plan.n_k // PART)


@njit(error_model="numpy")
def dot_rows(zero, K, k_row, n, Q, rows, d, squares, logits):
    """Write the products of n keys with each query: lanes are features, then keys.

    Each vector sums its own share of the features; a square of them is turned and added up.

    Args:
        zero: a number of the computing format.
        K: (n, d), by pointer.
        k_row: elements from one key to the next.
        n: keys.
        Q: (rows, d), by pointer.
        rows: queries.
        d: features, whole vectors.
        squares: scratch, two squares of lanes.
        logits: (rows, PART + lanes), by pointer; written in whole vectors.
    """
    lanes = lane_count(zero)
    turned = advance(squares, lanes * lanes)
    for j in range(0, n, lanes):
        keys = min(lanes, n - j)
        for r in range(rows):
            for y in range(keys):
                k, q = (j + y) * k_row, r * d
                total = mul(load(K, k), load(Q, q))
                for x in range(lanes, d, lanes):
                    total = fma(load(K, k + x), load(Q, q + x), total)
                store(squares, y * lanes, total)
            transpose(squares, lanes, turned, lanes)
            total = load(turned, 0)
            for x in range(1, lanes):
                total = add(total, load(turned, x * lanes))
            store(logits, r * (PART + lanes) + j, total)


@njit(error_model="numpy")
def weigh_row(zero, numbers, P, n):
    """Turn n products into weights, and return their maximum in powers of two and their sum.

    Spec: FA1-ALG1 line 10.
    """
    lanes = lane_count(zero)
    for j in range(n, up(n, lanes)):
        P[j] = -numbers.infinity
    c, m_tilde = splat(numbers.scale_log2_e), splat(-numbers.infinity)
    for j in range(0, n, lanes):
        m_tilde = maximum(load(P, j), m_tilde)
    store(P, up(n, lanes), m_tilde)
    largest = -numbers.infinity
    for i in range(up(n, lanes), up(n, lanes) + lanes):
        largest = max(largest, P[i])
    m = largest * numbers.scale_log2_e
    shift = splat(-m if m > -numbers.infinity else zero)
    total = splat(zero)
    for j in range(0, n, lanes):
        P_tilde = exp2(fma(load(P, j), c, shift))
        store(P, j, P_tilde)
        total = add(total, P_tilde)
    return m, sum_lanes(total)


@njit(error_model="numpy")
def load_queries(zero, plan, b, g, group, Q, d):
    """Load the query rows that read one key-value head, padded with zeros."""
    q = plan.query
    fill(zero, Q, d, ROOM_ROWS, d)
    for member in range(group):
        h = query_head(member, g, plan.heads, plan.key_heads, plan.tiled_heads)
        start = q.address + (b * q.batch + h * q.head) * item_size(zero, plan.storage)
        rows = advance(Q, member * plan.n_q * d)
        copy_rows(zero, start, plan.storage, q.row, q.column, plan.n_q, plan.d_k, rows, d)
    if plan.negative:
        for x in range(group * plan.n_q * d):
            Q[x] = -Q[x]


@njit(error_model="numpy")
def add_values(zero, P, rows, n, V, v_row, O, d):
    """Add P V to O; one row at a time where whole rows of V can be read in order.

    Args:
        zero: a number of the computing format.
        P: (rows, PART + lanes), by pointer.
        rows: queries.
        n: keys.
        V: (n, d), by pointer.
        v_row: elements from one key to the next.
        O: (ROOM_ROWS, d), by pointer.
        d: features, whole vectors.
    """
    lanes = lane_count(zero)
    x = 0
    while x + WIDE * lanes <= d:
        for r in range(rows):
            weights, V_x = advance(P, r * (PART + lanes)), advance(V, x)
            tile = zero_tile(zero, 1, WIDE)
            for y in range(n):
                tile = add_outer(tile, weights, y, 0, V_x, y * v_row)
            add_tile(tile, O, r * d + x, d)
        x += WIDE * lanes
    while x < d:
        wide = min(VECTORS, (d - x) // lanes)
        V_x, O_x = advance(V, x), advance(O, x)
        P_row = PART + lanes
        multiply(zero, P, P_row, 1, MOST_ROWS, V_x, v_row, n, O_x, d, wide, ADD, O_x)
        x += wide * lanes


@njit(error_model="numpy")
def decode_part(zero, plan, numbers, b, g, low, high, scratch, group, parts, stride):
    """Write maximum, sum and output of every query over the keys low, ..., high - 1.

    Spec: FA1-ALG1 lines 9-12.

    Args:
        zero: a number of the computing format.
        plan: of the attention.
        numbers: of the attention.
        b: batch item.
        g: key-value head.
        low: first key.
        high: end of the keys, at most `PART` after the first.
        scratch: of this thread.
        group: query heads that read the head.
        parts: results of the head's first query, by pointer: m, ℓ, O unnormalised.
        stride: elements from one query's results to the next.
    """
    lanes, rows = lane_count(zero), group * plan.n_q
    d_k, d_v = up(plan.d_k, lanes), up(plan.d_v, lanes)
    d = max(d_k, d_v)
    Q, O, P = scratch, advance(scratch, ROOM_ROWS * d), advance(scratch, 2 * ROOM_ROWS * d)
    copied = advance(P, ROOM_ROWS * (PART + lanes))
    squares = advance(copied, TILE * d)
    load_queries(zero, plan, b, g, group, Q, d_k)
    fill(zero, copied, d, TILE, d)
    k, v = plan.key, plan.value
    for j in range(low, high, TILE):  # line 9
        n = min(TILE, high - j)
        K, k_row = rows_of(
            zero, plan.storage, k, b, g, j, n, plan.n_k, plan.d_k, lanes, copied, d_k
        )
        dot_rows(zero, K, k_row, n, Q, rows, d_k, squares, advance(P, j - low))
    for r in range(rows):  # line 10
        m, total = weigh_row(zero, numbers, advance(P, r * (PART + lanes)), high - low)
        parts[r * stride] = m
        parts[r * stride + 1] = total
    fill(zero, O, d_v, ROOM_ROWS, d_v)
    for j in range(low, high, TILE):  # line 12
        n = min(TILE, high - j)
        V, v_row = rows_of(
            zero, plan.storage, v, b, g, j, n, plan.n_k, plan.d_v, lanes, copied, d_v
        )
        add_values(zero, advance(P, j - low), rows, n, V, v_row, O, d_v)
    for r in range(rows):
        for x in range(plan.d_v):
            parts[r * stride + 2 + x] = O[r * d_v + x]


@njit(error_model="numpy")
def merge_parts(zero, plan, numbers, sink, parts, count, O):
    """Merge the parts of one query in order, write its output and return its logsumexp.

    Spec: FA1-ALG1 lines 11-13, OWN-SINK1, OWN-EMPTY1.
    """
    stride = plan.d_v + 2
    m = sink * numbers.log2_e if plan.sinks else -numbers.infinity
    for s in range(count):
        m = max(m, parts[s * stride])
    shift = m if m > -numbers.infinity else zero
    total = zero
    if plan.sinks:
        total += 2.0 ** (sink * numbers.log2_e - shift)
    fill(zero, O, 0, 1, plan.d_v)
    for s in range(count):
        weight = 2.0 ** (parts[s * stride] - shift)
        total += weight * parts[s * stride + 1]
        for x in range(plan.d_v):
            O[x] += weight * parts[s * stride + 2 + x]
    if total != zero:
        for x in range(plan.d_v):
            O[x] /= total
    return m * 0.6931471805599453 + math.log(types.float64(total))


def decode(zero, scratch, counter, integers, reals, offsets, n_q, n_k, slopes, sinks, place):
    """Work through the parts of all heads until none is left; run by every thread.

    Args:
        zero: a number of the computing format.
        scratch: address of `scratch_size` numbers, of this thread alone.
        counter: address of the number of parts that were claimed, shared by the threads.
        integers: the plan, flat.
        reals: the numbers, likewise.
        offsets: see `plan.Rules`; likewise the next four.
        n_q: query lengths.
        n_k: key lengths.
        slopes: by head.
        sinks: by head.
        place: (address of (b, h_k, rows, parts, 2 + d_v) numbers, parts).
    """
    plan, numbers = read_plan(integers), read_numbers(reals)
    rules = Rules(offsets, n_q, n_k, slopes, sinks)
    group, claimed = plan.heads // plan.key_heads, pointer(counter, types.int64(0))
    count, stride = place[1], plan.d_v + 2
    pairs, rows = plan.batch * plan.key_heads, group * plan.n_q
    results = pointer(place[0], zero)
    t = claim(claimed)
    while t < pairs * count:
        pair, part = t // count, t % count
        b, g = pair // plan.key_heads, pair % plan.key_heads
        low, high, _, _ = reach(plan, rules.offsets[b], plan.n_q, rules.key_lengths[b])
        low, high = max(low, part * PART), min(high, (part + 1) * PART)
        first = advance(results, (pair * rows * count + part) * stride)
        if low < high:
            room = pointer(scratch, zero)
            decode_part(zero, plan, numbers, b, g, low, high, room, group, first, count * stride)
        else:
            for r in range(rows):
                fill(zero, advance(first, r * count * stride), 0, 1, stride)
                first[r * count * stride] = -numbers.infinity
        t = claim(claimed)


def merge_all(zero, integers, reals, query_lengths, sinks, place):
    """Merge the parts of every query; arguments as `decode`."""
    plan, numbers = read_plan(integers), read_numbers(reals)
    group, count = plan.heads // plan.key_heads, place[1]
    results, L = pointer(place[0], zero), pointer(plan.logsumexp, zero)
    out = pointer(plan.output.address, zero)
    for b in range(plan.batch):
        for h in range(plan.heads):
            g = key_head(h, plan.heads, plan.key_heads, plan.tiled_heads)
            member = h // plan.key_heads if plan.tiled_heads else h % group
            pair = b * plan.key_heads + g
            for i in range(plan.n_q):
                row = (pair * group + member) * plan.n_q + i
                parts = advance(results, row * count * (plan.d_v + 2))
                at = (b * plan.heads + h) * plan.n_q + i
                seen = count if i < query_lengths[b] else 0
                O = advance(out, at * plan.d_v)
                L[at] = merge_parts(zero, plan, numbers, sinks[h], parts, seen, O)
