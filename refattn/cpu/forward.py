"""Attention by tiles: the forward kernel.

The lanes of a vector are queries. A panel of queries is held transposed, Qᵀ[feature][query]; each
tile of keys gives Sᵀ = K Qᵀ and adds Vᵀ Pᵀ to Oᵀ, with K and V read where they lie. Row maxima
and sums are then plain vectors, and no sum ever crosses lanes.
"""

from __future__ import annotations

from numba import njit, types

from refattn.cpu.band import reach
from refattn.cpu.banded import edge_scores, edge_values, scores
from refattn.cpu.compiling import kernel
from refattn.cpu.copying import fetch_rows, rows_of
from refattn.cpu.flags import ALL, NONE, census
from refattn.cpu.host import VECTORS
from refattn.cpu.logits import adjust, bar_late, bar_masked, bar_outside, drop
from refattn.cpu.online import add_weighted_rows, finite_rows, scale_panel, softmax_tile
from refattn.cpu.panel import begin_panel, end_panel, leave_empty, panel_at
from refattn.cpu.plan import MORE, TABLE, Plan, head_read, read_job, to_powers
from refattn.cpu.products import ROW_STEP, SCALE, multiply, up
from refattn.cpu.simd import (
    advance,
    claim,
    lane_count,
    pointer,
)
from refattn.cpu.subnormal import flush, set_control_word


def scratch_size(plan: Plan, lanes: int) -> int:
    """Return how many numbers of scratch a thread of `forward` needs."""
    d_k, d_v, tile = plan.d_k, -(-plan.d_v // ROW_STEP) * ROW_STEP, plan.key_tile + ROW_STEP
    width = VECTORS * lanes
    panels = plan.panels * width * (d_k + d_v + 4)
    return panels + 2 * tile * width + tile * (d_k + d_v) + width * max(d_k, d_v)


@njit(error_model="numpy", inline="always")
def attend_tile(
    zero, plan, numbers, slope, b, h, i, rows, first, n_q, n_k, K, k_row, V, v_row, j, n, inside,
    finite, panel,
):  # fmt: skip
    """Attend from one panel of queries to one tile of keys.

    Spec: FA1-ALG1 lines 9-13.

    Args:
        zero: a number of the computing format.
        plan: of the attention.
        numbers: of the attention.
        slope: ALiBi's m of the head.
        b: batch item.
        h: query head.
        i: the panel's first query row.
        rows: of the panel.
        first: position of row i, tokens.
        n_q: valid queries.
        n_k: valid keys.
        K: the tile's keys, by pointer.
        k_row: elements from one key to the next.
        V: the tile's values, likewise.
        v_row: likewise.
        j: the tile's first key.
        n: keys of the tile.
        inside: whether every row sees every key of the tile.
        finite: whether the values are known to be finite.
        panel: of the queries.
    """
    seen, reads = census(plan.mask, b, h, i, rows, j, n), plan.reads != 0
    if seen == NONE and not reads:
        return
    Q, O, S, added, vectors = panel.Q, panel.O, panel.S, panel.added, panel.vectors
    width, terms = vectors * lane_count(zero), plan.terms != 0
    # line 9
    if inside or reads:
        scores(zero, K, k_row, n, Q, width, 0, vectors, plan.d_k, S)
    else:
        edge_scores(zero, plan, K, k_row, first, rows, j, n, Q, vectors, plan.d_k, S)
    if terms:
        adjust(
            zero, plan, numbers, slope, b, h, i, rows, first, j, n, S, added, vectors, panel.read,
            False,
        )  # fmt: skip
    if seen != ALL:
        bar_masked(zero, plan, numbers, b, h, i, rows, j, n, S, width)
    if not inside:
        bar_outside(zero, plan, numbers, first, rows, j, n, n_k, S, vectors)
    bar_late(numbers, i, rows, n_q, n, S, width)
    # lines 10-11
    softmax_tile(zero, numbers, S, n, panel, to_powers(plan, numbers))
    # line 12, the division by l left to the end
    d_v, alpha = plan.d_v, panel.alpha
    allowed = reads or (inside and seen == ALL and plan.bias.address == 0)
    given = plan.mask.address != 0 or plan.bias.address != 0
    all_read = allowed or finite or (not given and finite_rows(zero, V, v_row, n, d_v))
    if plan.keep.address != 0:
        drop(zero, plan, numbers, b, h, i, rows, j, n, S, vectors, not all_read)
    if not all_read:
        scale_panel(O, alpha, d_v, vectors, zero)
        add_weighted_rows(zero, V, v_row, n, d_v, S, O, vectors)
    elif inside or reads:
        d = up(d_v, ROW_STEP)
        multiply(zero, V, 1, v_row, d, S, width, n, O, width, vectors, SCALE, alpha)
    else:
        edge_values(zero, plan, V, v_row, first, rows, j, n, S, vectors, d_v, O, SCALE, alpha)


@njit(error_model="numpy")
def divide(plan, scratch, d_v, width):
    """Return the parts of the scratch memory of a block, in the order in which they lie."""
    tile = up(plan.key_tile, ROW_STEP)
    keys, values = scratch, advance(scratch, tile * plan.d_k)
    S = advance(values, tile * d_v)
    added = advance(S, tile * width)
    buffer = advance(added, tile * width)
    return keys, values, S, added, buffer, advance(buffer, width * max(plan.d_k, plan.d_v))


@njit(error_model="numpy", inline="always")
def attend_block(zero, plan, numbers, rules, b, h, block, scratch, far):
    """Attend from one block of queries, `plan.panels` panels, to all keys in reach.

    Spec: FA1-ALG1 lines 6-14, its loops exchanged: rows of Q outside, so that O is written once.
    """
    slopes, sinks = rules.slopes, rules.sinks
    width = VECTORS * lane_count(zero)
    q0 = block * plan.panels * width
    last = min(plan.n_q, q0 + plan.panels * width)
    n_q, n_k, offset = rules.query_lengths[b], rules.key_lengths[b], rules.offsets[b]
    valid = last if plan.reads else max(q0, min(last, n_q))
    count = (valid - q0 + width - 1) // width
    leave_empty(zero, plan, numbers, b, h, valid, last, sinks[h])
    d_v = up(plan.d_v, ROW_STEP)
    keys, values, S, added, buffer, panels = divide(plan, scratch, d_v, width)
    panel_size = width * (plan.d_k + d_v + 4)
    low, high = n_k, 0
    for p in range(count):
        i = q0 + p * width
        rows = min(width, valid - i)
        panel = panel_at(zero, plan, panels, p, panel_size, S, added, rows)
        begin_panel(zero, plan, numbers, b, h, i, rows, panel, buffer)
        bounds = reach(plan, i + offset, rows, n_k)
        low, high = min(low, bounds[0]), max(high, bounds[1])
    if plan.reads:
        low, high = 0, plan.n_k
    g = head_read(plan, h)
    # tiles begin at the same keys for every panel, whatever else is in its block
    for j in range(low // plan.key_tile * plan.key_tile, high, plan.key_tile):
        n = min(plan.key_tile, high - j)
        K, k_row = rows_of(
            zero, plan.storage, plan.key, b, g, j, n, plan.n_k, plan.d_k, 1, keys, plan.d_k
        )
        V, v_row = rows_of(
            zero, plan.storage, plan.value, b, g, j, n, plan.n_k, plan.d_v, ROW_STEP, values, d_v
        )
        ahead = min(plan.key_tile, high - j - n)
        given = plan.mask.address != 0 or plan.bias.address != 0
        finite = given and finite_rows(zero, V, v_row, n, plan.d_v)
        for p in range(count):
            i = q0 + p * width
            rows = min(width, valid - i)
            lo, hi, all_lo, all_hi = reach(plan, i + offset, rows, n_k)
            # whole steps of rows from the tile's first key on, so that none beyond its last is read
            start, stop = max(j, lo // ROW_STEP * ROW_STEP), min(j + n, hi)
            if plan.reads:
                start, stop = j, j + n
            if start < stop:
                panel = panel_at(zero, plan, panels, p, panel_size, S, added, rows)
                K_p, V_p = advance(K, (start - j) * k_row), advance(V, (start - j) * v_row)
                # the next tile's share that comes while this panel is worked on
                y, stop_y = ahead * p // count, ahead * (p + 1) // count
                fetch_rows(zero, plan.storage, plan.key, b, g, j + n + y, stop_y - y, plan.d_k)
                fetch_rows(zero, plan.storage, plan.value, b, g, j + n + y, stop_y - y, plan.d_v)
                inside = start >= all_lo and stop <= all_hi
                attend_tile(
                    zero, plan, numbers, slopes[h], b, h, i, rows, i + offset, n_q, n_k,
                    K_p, k_row, V_p, v_row, start, stop - start, inside, finite, panel,
                )  # fmt: skip
    for p in range(count):
        i = q0 + p * width
        rows = min(width, valid - i)
        panel = panel_at(zero, plan, panels, p, panel_size, S, added, rows)
        end_panel(zero, plan, numbers, b, h, i, rows, sinks[h], panel, far)


@kernel
def forward(zero, scratch, job):
    """Work through the blocks of an attention until none is left; run by every thread.

    Args:
        zero: a number of the computing format.
        scratch: address of `scratch_size` numbers, of this thread alone.
        job: address of a job, as `plan` describes it, shared by the threads. What it has more:
            where `panel.leave_far` writes, or nothing.
    """
    plan, numbers, rules = read_job(zero, job)
    far = pointer(job, types.int64(0))[TABLE + MORE]
    size = plan.panels * VECTORS * lane_count(zero)
    blocks, pairs = (plan.n_q + size - 1) // size, plan.batch * plan.heads
    room, claimed = pointer(scratch, zero), pointer(job, types.int64(0))
    word = flush()
    t = claim(claimed)
    while t < blocks * pairs:
        # the last blocks first: under a causal mask they are the longest
        block, pair = blocks - 1 - t // pairs, t % pairs
        b, h = pair // plan.heads, pair % plan.heads
        attend_block(zero, plan, numbers, rules, b, h, block, room, far)
        t = claim(claimed)
    set_control_word(word)
