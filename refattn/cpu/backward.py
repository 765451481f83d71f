"""Gradients of attention by tiles: the weights are computed again from the logsumexp.

A piece of work is a key-value head and a range of its keys: their gradients belong to it alone, and
the gradients of the queries are kept a range apart, to be summed in order. Heads that share a bias
of n_q x n_k numbers are one piece, and add to its gradient in turn. Nothing is added to by two
threads, so the bits do not depend on who does what.
"""

from __future__ import annotations

from numba import njit, types

from refattn.cpu.backpanel import begin_queries, end_queries, padded, queries_at
from refattn.cpu.band import reach
from refattn.cpu.banded import edge_outer, edge_scores, edge_values, outer, scores
from refattn.cpu.compiling import kernel
from refattn.cpu.copying import fill, rows_of
from refattn.cpu.elementary import exp2, smallest
from refattn.cpu.flags import ALL, NONE, census
from refattn.cpu.gradients import add_d_bias, read_gradients
from refattn.cpu.host import VECTORS
from refattn.cpu.logits import adjust, bar_late, bar_masked, bar_outside, drop, steps_ahead
from refattn.cpu.online import add_weighted_columns, add_weighted_rows, finite_rows, take_off
from refattn.cpu.plan import MORE, Plan, entry, head_read, head_reading, read_job, to_powers
from refattn.cpu.products import ADD, ROW_STEP, multiply, up
from refattn.cpu.simd import (
    advance,
    claim,
    fma,
    lane_count,
    load,
    mul,
    pointer,
    splat,
    store,
    sub,
    where_equal,
    where_less,
)
from refattn.cpu.subnormal import flush, set_control_word
from refattn.rules import BEFORE_BIAS, NO_DISTANCE, NO_SOFTCAP

PANELS = 2
"""Panels of queries that share each tile of keys and values."""


def scratch_size(plan: Plan, lanes: int) -> int:
    """Return how many numbers of scratch a thread of `backward` needs."""
    width, tile = VECTORS * lanes, plan.key_tile + ROW_STEP
    step = max(lanes, ROW_STEP)
    d_k, d_v = (-(-d // step) * step for d in (plan.d_k, plan.d_v))
    panels = PANELS * (width * (3 * d_k + 2 * d_v + 4) + lanes)
    return panels + 4 * tile * width + tile * (d_k + d_v) + lanes * max(d_k, d_v)


@njit(error_model="numpy")
def where_read(reads, cells, P, L, endless, nothing):
    """Return cells, but zero where they were not meant to be read.

    Spec: OWN-POISON1: where the weight is zero, or where that is read too, in an empty row.
    """
    if reads:
        return where_equal(L, endless, nothing, cells)
    return where_less(P, smallest(P), nothing, cells)


@njit(error_model="numpy")
def differentiate(zero, plan, numbers, S, dP, bend, n, queries, factor):
    """Turn logits and dP of a tile into weights P and gradients dS, and then dX of the products.

    Spec: FA1-ALG4 lines 13-17, OWN-SOFTCAP1, OWN-BACKWARD1.

        P = 2^(factor · S - L);  dS = P ∘ (dP - D);  dX = dS ∘ softcap′

    An empty row that is read has P by its policy, and dS = dX = 0.

    Args:
        zero: a number of the computing format.
        plan: of the attention.
        numbers: of the attention.
        S: (n, w), by pointer, logits; becomes P.
        dP: likewise; becomes dX.
        bend: likewise, softcap′; becomes the gradient of what was added to the logits.
        n: keys of the tile.
        queries: of the panel.
        factor: from S to powers of two.
    """
    lanes, vectors = lane_count(zero), queries.vectors
    c, nothing, endless = splat(factor), splat(zero), splat(numbers.infinity)
    reads, empty = plan.reads != 0, splat(numbers.empty)
    odd, barred = queries.finite[0] == zero and not reads, splat(-numbers.infinity)
    for v in range(vectors):
        L, D = load(queries.L, v * lanes), load(queries.D, v * lanes)
        for y in range(n):
            at = (y * vectors + v) * lanes
            P = exp2(fma(load(S, at), c, sub(nothing, L)))
            if reads:
                P = where_equal(L, endless, empty, P)
            if odd:  # -∞ - NaN is NaN, but what is forbidden has no weight
                P = where_equal(load(S, at), barred, nothing, P)
            dS = where_read(reads, mul(P, sub(load(dP, at), D)), P, L, endless, nothing)
            store(S, at, P)
            dX = dS
            if plan.softcap != NO_SOFTCAP:
                dX = where_read(reads, mul(dS, load(bend, at)), P, L, endless, nothing)
            store(dP, at, dX)
            store(bend, at, dS if plan.softcap == BEFORE_BIAS else dX)
    width, step = vectors * lanes, up(n, ROW_STEP)
    fill(zero, advance(S, n * width), width, step - n, width)  # products take whole steps of rows
    fill(zero, advance(dP, n * width), width, step - n, width)


@njit(error_model="numpy", inline="always")
def keep_added(zero, plan, grads, b, h, i, rows, first, split, j, n, d_added, spare, queries):
    """Keep the gradients of what was added to the logits: the bias, and ALiBi's slope.

    Spec: OWN-BACKWARD1, OWN-ALIBI1.

        d_bias_ij = dS_ij;  d_slope = Σ dS_ij distance_ij
    """
    lanes, vectors = lane_count(zero), queries.vectors
    if plan.distance != NO_DISTANCE:
        for v in range(vectors):
            total = load(queries.d_slope, v * lanes)
            for y in range(n):
                steps = steps_ahead(zero, plan, first + v * lanes, j + y)
                total = fma(load(d_added, (y * vectors + v) * lanes), steps, total)
            store(queries.d_slope, v * lanes, total)
    if grads.d_bias.address != 0:
        add_d_bias(zero, grads, b, h, i, rows, split, j, n, d_added, spare, vectors)


@njit(error_model="numpy", inline="always")
def differentiate_tile(
    zero,
    plan,
    numbers,
    grads,
    slope,
    b,
    h,
    i,
    rows,
    first,
    n_q,
    n_k,
    tiles,
    split,
    j,
    n,
    inside,
    queries,
):
    """Add what one panel of queries and one tile of keys contribute to all gradients.

    Spec: FA1-ALG4 lines 10-22.

    Args:
        zero: a number of the computing format.
        plan: of the attention.
        numbers: of the attention.
        grads: where the gradients go.
        slope: ALiBi's m of the head.
        b: batch item.
        h: query head.
        i: the panel's first query row.
        rows: of the panel.
        first: position of row i, tokens.
        n_q: valid queries.
        n_k: valid keys.
        tiles: (K, its stride, V, its stride, dK, dV, S, dP, bend, added), by pointer.
        split: the range of keys.
        j: the tile's first key.
        n: keys of the tile.
        inside: whether every row sees every key of the tile.
        queries: the panel.
    """
    K, k_row, V, v_row, dK, dV, S, dP, bend, added = tiles
    seen, reads = census(plan.mask, b, h, i, rows, j, n), plan.reads != 0
    if seen == NONE and not reads:
        return
    vectors, terms, lanes = queries.vectors, plan.terms != 0, lane_count(zero)
    width, d_k, d_v = vectors * lanes, plan.d_k, plan.d_v
    # lines 11 and 15
    if inside or reads:
        scores(zero, K, k_row, n, queries.Q, width, 0, vectors, d_k, S)
        scores(zero, V, v_row, n, queries.G, width, 0, vectors, d_v, dP)
    else:
        edge_scores(zero, plan, K, k_row, first, rows, j, n, queries.Q, vectors, d_k, S)
        edge_scores(zero, plan, V, v_row, first, rows, j, n, queries.G, vectors, d_v, dP)
    if terms:
        adjust(
            zero, plan, numbers, slope, b, h, i, rows, first, j, n, S, added, vectors, bend, True
        )
    if seen != ALL:
        bar_masked(zero, plan, numbers, b, h, i, rows, j, n, S, width)
    if not inside:
        bar_outside(zero, plan, numbers, first, rows, j, n, n_k, S, vectors)
    bar_late(numbers, i, rows, n_q, n, S, width)
    if plan.keep.address != 0:
        drop(zero, plan, numbers, b, h, i, rows, j, n, dP, vectors, False)
    if grads.far != 0:
        for at in range(0, width, lanes):
            take_off(S, at, n, width, load(queries.m, at))
    # lines 13 and 17
    factor = to_powers(plan, numbers)
    differentiate(zero, plan, numbers, S, dP, bend, n, queries, factor)
    if terms:
        keep_added(zero, plan, grads, b, h, i, rows, first, split, j, n, bend, added, queries)
    whole = reads or (inside and seen == ALL and plan.bias.address == 0)
    # a step of rows goes beyond the tile's last key, where a 0 may meet no NaN
    by_cells = queries.finite[0] == zero and not (whole and (reads or n % ROW_STEP == 0))
    if plan.keep.address != 0:
        drop(zero, plan, numbers, b, h, i, rows, j, n, S, vectors, by_cells)
    # line 21
    if not whole and not finite_rows(zero, K, k_row, n, d_k):
        add_weighted_rows(zero, K, k_row, n, d_k, dP, queries.d_query, vectors)
    elif inside or reads:
        d, dQ = up(d_k, ROW_STEP), queries.d_query
        multiply(zero, K, 1, k_row, d, dP, width, n, dQ, width, vectors, ADD, dQ)
    else:
        dQ = queries.d_query
        edge_values(zero, plan, K, k_row, first, rows, j, n, dP, vectors, d_k, dQ, ADD, dQ)
    # lines 16 and 22
    if by_cells:
        add_weighted_columns(zero, numbers, dP, n, width, queries.Q_rows, padded(d_k, lanes), dK)
        add_weighted_columns(zero, numbers, S, n, width, queries.G_rows, padded(d_v, lanes), dV)
    elif inside or reads:
        outer(zero, dP, width, n, queries.Q_rows, padded(d_k, lanes), 0, vectors, dK)
        outer(zero, S, width, n, queries.G_rows, padded(d_v, lanes), 0, vectors, dV)
    else:
        wide_k, wide_v = padded(d_k, lanes), padded(d_v, lanes)
        edge_outer(zero, plan, dP, first, rows, j, n, queries.Q_rows, wide_k, vectors, dK)
        edge_outer(zero, plan, S, first, rows, j, n, queries.G_rows, wide_v, vectors, dV)


@njit(error_model="numpy", inline="always")
def differentiate_block(zero, plan, numbers, rules, grads, b, h, split, block, scratch):
    """Add what one block of queries, `PANELS` panels, contributes to a range of keys."""
    lanes = lane_count(zero)
    width = VECTORS * lanes
    q0 = block * PANELS * width
    n_q, n_k = rules.query_lengths[b], rules.key_lengths[b]
    valid = min(plan.n_q if plan.reads else n_q, q0 + PANELS * width)
    offset, tile = rules.offsets[b], plan.key_tile + ROW_STEP
    d_k, d_v = padded(plan.d_k, lanes), padded(plan.d_v, lanes)
    keys, values = scratch, advance(scratch, tile * d_k)
    S = advance(values, tile * d_v)
    dP, bend, added = (
        advance(S, tile * width),
        advance(S, 2 * tile * width),
        advance(S, 3 * tile * width),
    )
    buffer = advance(S, 4 * tile * width)
    panels = advance(buffer, lanes * max(d_k, d_v))
    begin = split * grads.keys
    end = max(begin, min(plan.n_k if plan.reads else n_k, (split + 1) * grads.keys))
    low, high = end, begin
    for p in range(PANELS):
        i = q0 + p * width
        rows = max(0, min(width, valid - i))
        if rows > 0:
            bounds = reach(plan, i + offset, rows, n_k)
            low, high = min(low, max(begin, bounds[0])), max(high, min(end, bounds[1]))
            queries = queries_at(zero, plan, panels, p, rows)
            begin_queries(zero, plan, numbers, grads, b, h, i, rows, queries, buffer)
    if plan.reads:
        low, high = begin, end
    low = low // ROW_STEP * ROW_STEP  # rows of gradients are written in such steps
    g = head_read(plan, h)
    first_key = (b * plan.key_heads + g) * up(plan.n_k, ROW_STEP)
    for j in range(low, high, plan.key_tile):
        n = min(plan.key_tile, high - j)
        K, k_row = rows_of(
            zero, plan.storage, plan.key, b, g, j, n, plan.n_k, plan.d_k, ROW_STEP, keys, d_k
        )
        V, v_row = rows_of(
            zero, plan.storage, plan.value, b, g, j, n, plan.n_k, plan.d_v, 1, values, d_v
        )
        dK = advance(pointer(grads.d_key, zero), (first_key + j) * d_k)
        dV = advance(pointer(grads.d_value, zero), (first_key + j) * d_v)
        tiles = (K, k_row, V, v_row, dK, dV, S, dP, bend, added)
        for p in range(PANELS):
            i = q0 + p * width
            rows = max(0, min(width, valid - i))
            lo, hi, all_lo, all_hi = reach(plan, i + offset, rows, n_k)
            if rows > 0 and (plan.reads or (j < hi and j + n > lo)):
                queries = queries_at(zero, plan, panels, p, rows)
                inside = j >= all_lo and j + n <= all_hi
                differentiate_tile(
                    zero, plan, numbers, grads, rules.slopes[h], b, h, i, rows, i + offset, n_q,
                    n_k, tiles, split, j, n, inside, queries,
                )  # fmt: skip
    for p in range(PANELS):
        i = q0 + p * width
        rows = max(0, min(width, valid - i))
        if rows > 0:
            queries = queries_at(zero, plan, panels, p, rows)
            end_queries(zero, plan, numbers, grads, b, h, i, rows, split, queries)


@njit(error_model="numpy")
def scale_keys(zero, plan, numbers, grads, pair, split):
    """Multiply the gradients of a range of keys by the scale."""
    d = padded(plan.d_k, lane_count(zero))
    rows = up(plan.n_k, ROW_STEP)
    dK = advance(pointer(grads.d_key, zero), pair * rows * d)
    for x in range(split * grads.keys * d, min(rows, (split + 1) * grads.keys) * d):
        dK[x] *= numbers.scale


@kernel
def backward(zero, scratch, job):
    """Work through the ranges of keys of an attention until none is left; run by every thread.

    Spec: FA1-ALG4, OWN-BACKWARD1, OWN-GQA1. Differs: OWN-SOFTCAP1.

    Args:
        zero: a number of the computing format.
        scratch: address of `scratch_size` numbers, of this thread alone.
        job: address of a job, as `plan` describes it, shared by the threads. Its output and
            logsumexp hold the forward pass; what it has more is where the gradients go, flat, all
            zeros before.
    """
    plan, numbers, rules = read_job(zero, job)
    grads = read_gradients(entry(job, MORE, types.int64(0)))
    size = PANELS * VECTORS * lane_count(zero)
    blocks, owners = (plan.n_q + size - 1) // size, grads.items * grads.key_heads
    group = plan.heads // plan.key_heads
    room, claimed = pointer(scratch, zero), pointer(job, types.int64(0))
    word = flush()
    t = claim(claimed)
    while t < grads.splits * owners:
        # the first keys first: under a causal mask most queries see them
        split, owner = t // owners, t % owners
        for b in range(owner // grads.key_heads, plan.batch, grads.items):
            for g in range(owner % grads.key_heads, plan.key_heads, grads.key_heads):
                for x in range(group * blocks):
                    member, block = x // blocks, x % blocks
                    h = head_reading(plan, g, member)
                    differentiate_block(zero, plan, numbers, rules, grads, b, h, split, block, room)
                scale_keys(zero, plan, numbers, grads, b * plan.key_heads + g, split)
        t = claim(claimed)
    set_control_word(word)
