"""The logits of a tile beside the plain product: scale, softcap, ALiBi, bias, masks, dropout.

A tile is held transposed, S[key][query]; a forbidden cell becomes -∞ whatever it held. A limit:
an allowed pair whose logit is -∞, of an infinite query or key, is then taken for a forbidden one.
"""

from __future__ import annotations

from numba import njit

from refattn.cpu.copying import copy_rows, copy_transposed, fill, item_size, read
from refattn.cpu.elementary import ones, tanh
from refattn.cpu.flags import flags_at, put_where_false
from refattn.cpu.simd import (
    add,
    advance,
    convert,
    fma,
    lane_count,
    lane_numbers,
    load,
    maximum,
    mul,
    splat,
    store,
    sub,
    where_equal,
    where_less,
)
from refattn.rules import ABSOLUTE, AFTER_BIAS, BEFORE_BIAS, COLUMN, NO_DISTANCE, NO_SOFTCAP

STEP = 32
"""Keys of a tile whose logits are made together: they stay in the first level of the cache."""


@njit(error_model="numpy", inline="always")
def adjust(zero, plan, numbers, slope, b, h, i, rows, first, j, n, S, added, vectors, bend, bent):
    """Turn the products of a tile into logits.

    Spec: OWN-SOFTCAP1, OWN-BIAS1, ALIBI-S3a, OWN-ALIBI1.

        S ← softcap(scale · S) + (alibi + bias), or softcap(scale · S + alibi + bias)

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
        j: the tile's first key.
        n: keys of the tile.
        S: (n, vectors · lanes), by pointer.
        added: scratch, as large and 2 · `STEP` rows at least.
        vectors: of the panel.
        bend: as S; the softcap's derivative is written here if `bent`, else see `read_all`.
        bent: as said.
    """
    width = vectors * lane_count(zero)
    for y in range(0, n, STEP):
        keys, T = min(STEP, n - y), advance(S, y * width)
        bend_y, factor = advance(bend, y * width), numbers.scale
        if plan.softcap == BEFORE_BIAS:
            soften(zero, numbers, factor, keys, T, vectors, bend_y, bent)
            factor = numbers.one
        if plan.distance != NO_DISTANCE:
            add_distances(zero, plan, slope, factor, first, j + y, keys, T, vectors)
            factor = numbers.one
        if plan.bias.address != 0:
            load_bias(zero, plan, numbers, b, h, i, rows, j + y, keys, added, width)
            add_bias(zero, plan, numbers, factor, keys, T, added, vectors)
            factor = numbers.one
        elif plan.distance == NO_DISTANCE and plan.softcap == NO_SOFTCAP:
            scale_cells(zero, factor, keys, T, vectors)
        if plan.softcap == AFTER_BIAS:
            soften(zero, numbers, factor, keys, T, vectors, bend_y, bent)
        if plan.reads and not bent:
            read_all(zero, keys, T, bend, vectors)
        # after a softcap, what was forbidden is a cap away from 0
        if plan.bias.address != 0 and (plan.softcap == AFTER_BIAS or plan.reads):
            bar_added(zero, numbers, keys, T, added, vectors)


@njit(error_model="numpy")
def soften(zero, numbers, factor, n, S, vectors, bend, bent):
    """Write c·tanh(factor · S / c), and its derivative 1 - tanh² if it is asked for."""
    lanes = lane_count(zero)
    inner, cap = splat(factor / numbers.softcap), splat(numbers.softcap)
    for at in range(0, n * vectors * lanes, lanes):
        t = tanh(mul(load(S, at), inner))
        if bent:
            store(bend, at, sub(ones(t), mul(t, t)))
        store(S, at, mul(cap, t))


@njit(error_model="numpy")
def scale_cells(zero, factor, n, S, vectors):
    """Write factor · S."""
    lanes = lane_count(zero)
    for at in range(0, n * vectors * lanes, lanes):
        store(S, at, mul(load(S, at), splat(factor)))


@njit(error_model="numpy")
def add_distances(zero, plan, slope, factor, first, j, n, S, vectors):
    """Write factor · S + slope · distance.

    Spec: ALIBI-S3a, OWN-ALIBI1.
    """
    lanes = lane_count(zero)
    m, c = splat(slope), splat(factor)
    for v in range(vectors):
        for y in range(n):
            at = (y * vectors + v) * lanes
            steps = steps_ahead(zero, plan, first + v * lanes, j + y)
            store(S, at, fma(m, steps, mul(load(S, at), c)))


@njit(error_model="numpy")
def steps_ahead(zero, plan, position, key):
    """Return ALiBi's factor of the slope for a vector of queries and one key."""
    ahead = sub(splat(convert(key - position, zero)), lane_numbers(zero))
    return steps_of(zero, plan, ahead, splat(convert(key, zero)))


@njit(error_model="numpy")
def steps_of(zero, plan, ahead, column):
    """Return ALiBi's factor of the slope for vectors of steps ahead and of keys."""
    if plan.distance == COLUMN:
        return column
    if plan.distance == ABSOLUTE:
        return sub(splat(zero), maximum(ahead, sub(splat(zero), ahead)))
    return ahead


@njit(error_model="numpy", inline="always")
def load_bias(zero, plan, numbers, b, h, i, rows, j, n, added, width):
    """Write the given bias of up to `STEP` keys into scratch, (n, width), and more behind it."""
    t = plan.bias
    start = b * t.batch + h * t.head + i * t.row + j * t.column
    if t.row == 0:
        for y in range(n):
            number = read(zero, t.address, start + y * t.column, plan.storage)
            fill(number, advance(added, y * width), 0, 1, width)
    else:
        address = t.address + start * item_size(zero, plan.storage)
        if t.row == 1:
            copy_rows(zero, address, plan.storage, t.column, 1, n, rows, added, width)
        else:
            buffer = advance(added, STEP * width)
            copy_transposed(
                zero, address, plan.storage, t.row, t.column, rows, n, added, width, buffer
            )
    if rows < width:  # a missing row sees nothing
        fill(-numbers.infinity, advance(added, rows), width, n, width - rows)


@njit(error_model="numpy")
def add_bias(zero, plan, numbers, factor, n, S, added, vectors):
    """Write factor · S + bias, and -∞ where the bias is -∞, whatever S holds unless it is read.

    Spec: OWN-BIAS1, OWN-POISON1.
    """
    lanes = lane_count(zero)
    c, barred = splat(factor), splat(-numbers.infinity)
    hidden = splat(numbers.infinity - numbers.infinity) if plan.reads else barred  # NaN: no cell
    for at in range(0, n * vectors * lanes, lanes):
        bias = load(added, at)
        store(S, at, where_equal(bias, hidden, barred, fma(load(S, at), c, bias)))


@njit(error_model="numpy")
def bar_added(zero, numbers, n, S, added, vectors):
    """Write -∞ where the bias is -∞."""
    lanes = lane_count(zero)
    barred = splat(-numbers.infinity)
    for at in range(0, n * vectors * lanes, lanes):
        store(S, at, where_equal(load(added, at), barred, barred, load(S, at)))


@njit(error_model="numpy", inline="always")
def bar_masked(zero, plan, numbers, b, h, i, rows, j, n, S, width):
    """Write -∞ into the cells of a tile that the given mask forbids, and into missing rows.

    Spec: OWN-MASK1, OWN-POISON1.
    """
    put_where_false(zero, plan.mask, -numbers.infinity, b, h, i, rows, j, n, S, width)
    if rows < width:
        fill(-numbers.infinity, advance(S, rows), width, n, width - rows)


@njit(error_model="numpy", inline="always")
def bar_late(numbers, i, rows, n_q, n, S, width):
    """Write -∞ into the rows at and beyond the query length, which are there if all cells are read.

    Spec: OWN-LENGTH1, OWN-POISON1.
    """
    if i + rows > n_q:
        late = max(n_q - i, 0)
        fill(-numbers.infinity, advance(S, late), width, n, width - late)


@njit(error_model="numpy")
def read_all(zero, n, S, read, vectors):
    """Make a row's `read` NaN where a logit is NaN or ∞, though its cell be forbidden.

    Spec: OWN-POISON1: ∞ + (-∞) is NaN.
    """
    lanes = lane_count(zero)
    nothing = splat(zero)
    for v in range(vectors):
        total = load(read, v * lanes)
        for y in range(n):
            logit = load(S, (y * vectors + v) * lanes)
            total = fma(maximum(nothing, logit), nothing, total)
        store(read, v * lanes, total)


@njit(error_model="numpy")
def drop(zero, plan, numbers, b, h, i, rows, j, n, S, vectors, marked):
    """Divide the cells of a tile by the keep probability; 0 for those that are not kept.

    Spec: OWN-DROPOUT1. If `marked`, a dropped weight is -0: it reads, as one that was 0 does not.
    """
    scale_cells(zero, numbers.kept, n, S, vectors)
    width, t = vectors * lane_count(zero), plan.keep
    if not marked:
        put_where_false(zero, t, zero, b, h, i, rows, j, n, S, width)
        return
    flags = flags_at(t, b, h, i, j)
    for y in range(n):
        for x in range(rows):
            if not flags[x * t.row + y * t.column] and S[y * width + x] != zero:
                S[y * width + x] = -zero


@njit(error_model="numpy")
def bar_outside(zero, plan, numbers, first, rows, j, n, n_k, S, vectors):
    """Write -∞ into the cells of a tile outside the band, and beyond the valid keys.

    Spec: OWN-CAUSAL1, OWN-WINDOW1, OWN-LENGTH1.

    Args:
        zero: a number of the computing format.
        plan: of the attention.
        numbers: of the attention.
        first: position of the panel's first row, tokens.
        rows: of the panel.
        j: the tile's first key.
        n: keys of the tile.
        n_k: valid keys.
        S: (n, vectors · lanes), by pointer; read only inside the band.
        vectors: of the panel.
    """
    lanes = lane_count(zero)
    barred = splat(-numbers.infinity)
    for y in range(n):
        low = min(max(0, j + y - plan.right - first), rows)
        high = max(min(rows, j + y + plan.left - first + 1), 0) if j + y < n_k else 0
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
