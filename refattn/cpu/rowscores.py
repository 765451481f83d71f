"""Products of a few query rows with many keys.

The lanes of a vector are shared by rows and features: with R rows (a power of two) in v vectors,
each lane sums every F-th feature of one row, F = v · lanes / R. So no lane is idle, and a key is
loaded once for all rows: F of its features, repeated until they fill a vector.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from refattn.cpu.ahead import ask
from refattn.cpu.host import HOST
from refattn.cpu.simd import (
    I32,
    Vector,
    constant,
    exchange,
    fuse,
    lane_count,
    llvm_float,
    llvm_vector,
    load_from,
)
from refattn.cpu.tile import Tile

KEYS = 8 if HOST.registers >= 32 else 4
"""Keys of a register tile, at most; with two vectors of rows their sums leave registers free."""

STEPS = 4
"""Vectors of a row that are taken at once: the keys' addresses are found once for all."""


def keys_at_once(lanes: int) -> int:
    """Return the keys of a register tile."""
    return min(KEYS, lanes)


def shared_features(rows: int, lanes: int) -> int:
    """Return F: 1 also where the rows are more than two vectors have lanes, and no tile fits."""
    return max(1, min(rows, 2) * lanes // rows)


@intrinsic
def key_count(typing: Any, like: Any) -> Any:
    """Return the keys of a register tile for numbers of the type of `like`, a constant."""
    n = keys_at_once(Vector(like).lanes)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.intp, n)

    return types.intp(like), emit


@intrinsic(prefer_literal=True)
def zero_sums(typing: Any, like: Any, rows: Any) -> Any:
    """Return a tile of zeros: a row for each key, one or two vectors for the query rows."""
    vector = Vector(like)
    tile = Tile(vector, keys_at_once(vector.lanes), min(rows.literal_value, 2))

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        zero = constant(llvm_vector(vector), 0.0)
        return ir.Constant.literal_array([zero] * (tile.rows * tile.vectors))

    return tile(like, rows), emit


@intrinsic(prefer_literal=True)
def add_features(
    typing: Any, tile: Any, k: Any, i: Any, k_row: Any, q: Any, j: Any, rows: Any, steps: Any
) -> Any:
    """Return a tile plus the products of F · `steps` features of keys with those of the rows.

    Args:
        typing: Numba's.
        tile: of `zero_sums`.
        k: keys, by pointer.
        i: index of the first key's first feature.
        k_row: elements from one key to the next.
        q: queries as `rowscores.lay_row` leaves them, by pointer.
        j: index of the same features.
        rows: R, constant.
        steps: as said, constant.
    """
    vector, vectors = tile.vector, tile.vectors
    F = shared_features(rows.literal_value, vector.lanes)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        block, k, i, k_row, q, j = args[:6]

        def plus(index: Any, n: int) -> Any:
            return builder.add(index, ir.Constant(index.type, n))

        few = ir.VectorType(llvm_float(vector.dtype), F)
        nothing = ir.Constant(few, ir.Undefined)
        repeat = ir.Constant(ir.VectorType(I32, vector.lanes), [x % F for x in range(vector.lanes)])
        queries = [
            load_from(builder, q, plus(j, n * vector.lanes), vector)
            for n in range(steps.literal_value * vectors)
        ]
        for y in range(tile.rows):
            place = builder.add(i, builder.mul(k_row, ir.Constant(k_row.type, y)))
            for n, query in enumerate(queries):
                step, v = divmod(n, vectors)
                if v == 0:
                    at = builder.gep(k, [plus(place, step * F)])
                    loaded = builder.load(builder.bitcast(at, few.as_pointer()))
                    loaded.align = vector.dtype.bitwidth // 8
                    key = builder.shuffle_vector(loaded, nothing, repeat)
                old = builder.extract_value(block, y * vectors + v)
                total = fuse(builder, key, query, old)
                block = builder.insert_value(block, total, y * vectors + v)
        return block

    index = types.intp
    return tile(tile, k, index, index, q, index, rows, steps), emit


@intrinsic(prefer_literal=True)
def store_folded(typing: Any, tile: Any, s: Any, j: Any, s_row: Any, rows: Any) -> Any:
    """Write the sums over the lanes of each row: s[row, j + key]."""
    vector = tile.vector
    F = shared_features(rows.literal_value, vector.lanes)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for v in range(tile.vectors):
            sums = [builder.extract_value(args[0], y * tile.vectors + v) for y in range(tile.rows)]
            for r, part in _folded(builder, vector.lanes, sums, F):
                row = ir.Constant(args[3].type, v * vector.lanes // F + r)
                place = builder.add(args[2], builder.mul(args[3], row))
                at = builder.bitcast(builder.gep(args[1], [place]), part.type.as_pointer())
                builder.store(part, at).align = vector.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(tile, s, types.intp, types.intp, rows), emit


def _folded(builder: Any, lanes: int, sums: list[Any], F: int) -> Any:
    """Yield the rows of one vector a key, and for each its sums over F lanes, one lane a key.

    As in `transpose`, pairs of vectors exchange lanes at distance 1, 2, 4, ...; where the lanes are
    features the two results are added, and one is left.
    """
    keys, step = len(sums), 1
    left = dict(enumerate(sums))
    while step < max(keys, F):
        low, high = (ir.Constant(ir.VectorType(I32, lanes), s) for s in exchange(lanes, step))
        for y in [y for y in left if not y & step]:
            upper = left[y]
            lower = left.pop(y | step, upper)  # itself where there are fewer keys than features
            first = builder.shuffle_vector(upper, lower, low)
            second = builder.shuffle_vector(upper, lower, high)
            if step < F:
                left[y] = builder.fadd(first, second)
            else:
                left[y], left[y | step] = first, second
        step *= 2
    for start in range(0, lanes, max(keys, F)):
        few = ir.Constant(ir.VectorType(I32, keys), list(range(start, start + keys)))
        for y, whole in left.items():
            yield (start + y) // F, builder.shuffle_vector(whole, whole, few)


def _rows_product(rows: int) -> Any:
    """Return the product of keys with a fixed number of rows."""
    vectors = min(rows, 2)

    def rows_product(zero, K, k_row, n, Q, d, S, s_row, ahead):
        lanes, keys = lane_count(zero), key_count(zero)
        F = max(1, vectors * lanes // rows)
        for y in range(0, n, keys):
            tile = zero_sums(zero, rows)
            x = 0
            while x + STEPS * F <= d:
                ask(ahead, y, keys, x, STEPS * F)
                at, place = x // F * vectors * lanes, y * k_row + x
                tile = add_features(tile, K, place, k_row, Q, at, rows, STEPS)
                x += STEPS * F
            while x < d:
                at, place = x // F * vectors * lanes, y * k_row + x
                tile = add_features(tile, K, place, k_row, Q, at, rows, 1)
                x += F
            store_folded(tile, S, y, s_row, rows)

    # cached kernels are linked by name: two products of one name would be taken for each other
    rows_product.__name__ = rows_product.__qualname__ = f"rows_product_{rows}"
    return njit(error_model="numpy", nogil=True)(rows_product)


_rows_1, _rows_2, _rows_4, _rows_8, _rows_16, _rows_32 = (
    _rows_product(rows) for rows in (1, 2, 4, 8, 16, 32)
)


@njit(error_model="numpy")
def rows_together(zero, rows):
    """Return how many rows the next product takes: a power of two that they fill nearly."""
    together = 2 * lane_count(zero)
    while 4 * rows < 3 * together and together > 1:
        together //= 2
    return together


@njit(error_model="numpy")
def lay_row(zero, row, d, r, together, Q):
    """Put one of some rows that are multiplied together where the product reads it.

    Args:
        zero: a number of the computing format.
        row: of d features, by pointer.
        d: as said.
        r: its number among them.
        together: of `rows_together`.
        Q: scratch of all of them, by pointer.
    """
    width = min(together, 2) * lane_count(zero)
    F = width // together
    for x in range(d):
        Q[x // F * width + r * F + x % F] = row[x]


@njit(error_model="numpy", nogil=True)
def rows_times_keys(zero, K, k_row, n, Q, together, d, S, s_row, ahead):
    """Write the products of n keys with some rows.

    Args:
        zero: a number of the computing format.
        K: (n, d), by pointer; readable up to the next multiple of `key_count` keys.
        k_row: elements from one key to the next.
        n: keys.
        Q: rows, each brought there by `lay_row`.
        together: of `rows_together`.
        d: features, whole vectors.
        S: (together, n), by pointer; written in whole tiles of keys.
        s_row: elements from one row of S to the next.
        ahead: what is asked for meanwhile.
    """
    lanes = lane_count(zero)
    if together == 1:
        _rows_1(zero, K, k_row, n, Q, d, S, s_row, ahead)
    elif together == 2:
        _rows_2(zero, K, k_row, n, Q, d, S, s_row, ahead)
    elif together == 4:
        _rows_4(zero, K, k_row, n, Q, d, S, s_row, ahead)
    elif together == 8 and lanes >= 4:  # constants: what a vector has no lanes for is left out
        _rows_8(zero, K, k_row, n, Q, d, S, s_row, ahead)
    elif together == 16 and lanes >= 8:
        _rows_16(zero, K, k_row, n, Q, d, S, s_row, ahead)
    elif together == 32 and lanes >= 16:
        _rows_32(zero, K, k_row, n, Q, d, S, s_row, ahead)
