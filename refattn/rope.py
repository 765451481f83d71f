"""Rotary position embedding: position as rotation of pairs of features.

The paper turns each pair of features of a query or key by an angle proportional to its position.
The product of the two then depends on their distance alone, and no norm changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import numpy as np

from refattn.arrays import FLOATS, Array, array_namespace, dtype_name, narrow, widen
from refattn.checks import (
    DtypeError,
    OptionError,
    ShapeError,
    check_floats,
    check_option,
    check_shapes,
    describe,
    is_integer,
)
from refattn.rope_frequencies import Variant, rope_frequencies
from refattn.rope_tables import RopeTables, tables_of
from refattn.rope_variants import check_rotary_dim

PAIRINGS = ("interleaved", "half_split")
"""Features (2i, 2i+1) form a pair, as in the paper, or features (i, i + d/2)."""


class RopeOptions(TypedDict, total=False):
    """The options of `rope`, for functions that hand them on."""

    base: float
    rotary_dim: int | None
    variant: Variant | None
    pairing: str


class RopeResult(NamedTuple):
    """What rope returns; the tables carry the attention factor."""

    output: Array
    frequencies: Array
    attention_factor: Array
    cosine: Array
    sine: Array


def rope(
    x: Array,
    positions: Array,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    variant: Variant | None = None,
    pairing: str = "interleaved",
) -> RopeResult:
    """Return features rotated by their positions, with the tables used.

    Spec: ROPE-EQ34, OWN-ROPE1, OWN-ROPE2, OWN-ROPE3, OWN-ROPE4, OWN-ROPE5, OWN-ROUND1.

        R_m x = x ⊗ cos(mθ) + (-x_2, x_1, -x_4, x_3, ...) ⊗ sin(mθ)

    Args:
        x: queries or keys, (..., n, d).
        positions: m, (n,), or (b, n) for x of (b, ..., n, d); integers, tokens.
        base: base of the frequencies.
        rotary_dim: r, even: the first r features rotate, the others stay; d if None.
        variant: see `rope_frequencies`.
        pairing: "interleaved" or "half_split".

    Returns:
        output: (..., n, d), in x's dtype.
        frequencies: (r/2,), radians a token, in the computing dtype, as all that follows.
        attention_factor: ().
        cosine, sine: (n, r/2) or (b, n, r/2).

    Raises:
        ShapeError: positions fit no axis of x.
        DtypeError: x is not floating, or positions are not integers.
        OptionError: rotary_dim is odd or above d, or another option is refused.
    """
    tables = rope_tables_for("rope", x, positions, base, rotary_dim, variant)
    output = rotate(x, *tables_on_heads(x, tables), pairing=pairing)
    return RopeResult(output, *tables)


def rope_backward(
    d_output: Array,
    positions: Array,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    variant: Variant | None = None,
    pairing: str = "interleaved",
) -> Array:
    """Return the gradient of rope's input: the transpose of the rotation turns back.

    Spec: ROPE-EQ34, OWN-ROPE1, OWN-ROPE2, OWN-ROPE3, OWN-ROPE4, OWN-ROUND1.

        dx = R_mᵀ dO = R_{-m} dO, times the attention factor as in the forward pass

    Args:
        d_output: dO, (..., n, d).
        positions: as in `rope`, and so are all others.
        base: base of the frequencies.
        rotary_dim: r.
        variant: see `rope_frequencies`.
        pairing: "interleaved" or "half_split".

    Returns:
        d_x: (..., n, d), in d_output's dtype.

    Raises:
        RefattnError: as `rope`.
    """
    tables = rope_tables_for("rope_backward", d_output, positions, base, rotary_dim, variant)
    cosine, sine = tables_on_heads(d_output, tables)
    return rotate(d_output, cosine, -sine, pairing=pairing)


@np.errstate(all="ignore")  # IEEE values travel silently, whatever the array library
def rotate(x: Array, cosine: Array, sine: Array, *, pairing: str = "interleaved") -> Array:
    """Return features rotated by the angles of given tables.

    Spec: ROPE-EQ34, OWN-ROPE1, OWN-ROPE2, OWN-ROUND1.

        (u, v) → (u cos - v sin, u sin + v cos)  for each pair (u, v)

    Args:
        x: (..., n, d).
        cosine: cos(mθ), (..., n, r/2), leading axes broadcastable to x's, r ≤ d, of x's dtype
            or its computing dtype. Features r ... d-1 stay.
        sine: sin(mθ), likewise.
        pairing: "interleaved" or "half_split".

    Returns:
        output: (..., n, d), in x's dtype.

    Raises:
        ShapeError: the tables differ, are wider than x, or do not broadcast to it.
        DtypeError: a dtype is not floating, or the tables do not compute as x does.
        OptionError: the pairing is unknown.
    """
    check_rotation("rotate", x, cosine, sine, pairing)
    X, cos, sin = widen(x), widen(cosine), widen(sine)
    half = cosine.shape[-1]
    xp = array_namespace(x)
    if pairing == "interleaved":
        u, v = X[..., 0 : 2 * half : 2], X[..., 1 : 2 * half : 2]
    else:
        u, v = X[..., :half], X[..., half : 2 * half]
    turned = (u * cos - v * sin, u * sin + v * cos)
    if pairing == "interleaved":
        rotated = xp.reshape(xp.stack(turned, axis=-1), (*x.shape[:-1], 2 * half))
    else:
        rotated = xp.concat(turned, axis=-1)
    return narrow(xp.concat([rotated, X[..., 2 * half :]], axis=-1), x)


def check_rotation(function: str, x: Array, cosine: Array, sine: Array, pairing: str) -> None:
    """Check that tables fit the features that they rotate.

    Raises:
        ShapeError, DtypeError, OptionError: as `rotate`.
    """
    arrays = {"x": x, "cosine": cosine, "sine": sine}
    check_shapes(function, x=(x, "... d"), cosine=(cosine, "... r/2"), sine=(sine, "... r/2"))
    dtypes = {name: dtype_name(array) for name, array in arrays.items()}
    for name, dtype in dtypes.items():
        if dtype not in FLOATS:
            check_floats(function, **{name: arrays[name]})
        if (dtype == "float64") != (dtypes["x"] == "float64"):
            raise DtypeError(
                f"{name} has dtype {dtype}, but x has dtype {dtypes['x']}; "
                f"both must compute in one format {describe(function, arrays)}"
            )
    check_option(function, "pairing", pairing, PAIRINGS)
    half, d, rows = cosine.shape[-1], x.shape[-1], tuple(x.shape[:-1])
    if 2 * half > d:
        raise ShapeError(
            f"cosine has {half} angles, but x has d={d} features, two an angle "
            f"{describe(function, arrays)}"
        )
    for name, table in (("cosine", cosine), ("sine", sine)):
        if not _broadcasts(tuple(table.shape[:-1]), rows):
            raise ShapeError(
                f"{name} has leading axes {tuple(table.shape[:-1])}, but x has {rows}; "
                f"the first must broadcast to the second {describe(function, arrays)}"
            )


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Tell whether a shape broadcasts to a target without enlarging it."""
    ends = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(size in (1, goal) for size, goal in ends)


def table_dtype(x: Array) -> str:
    """Return the computing dtype of x by name."""
    return "float64" if dtype_name(x) == "float64" else "float32"


def check_positions(function: str, x: Array, positions: Array) -> Array:
    """Return positions as an array that fits x: (n,), or (b, n) for x of (b, ..., n, d).

    Raises:
        ShapeError: they fit no axis of x.
        DtypeError: x is no array, or positions are neither an array nor a list of integers.
    """
    if isinstance(positions, Sequence) and all(map(is_integer, positions)):
        positions = array_namespace(x).asarray(list(positions))
    check_shapes(function, x=(x, "... n d"), positions=(positions, "... n"))
    axes = len(positions.shape)
    if axes > 2 or (axes == 2 and (len(x.shape) < 3 or positions.shape[0] != x.shape[0])):
        raise ShapeError(
            f"positions have shape {tuple(positions.shape)}, but x of {tuple(x.shape)} needs (n,), "
            f"or (b, n) where x is (b, ..., n, d) "
            f"{describe(function, {'x': x, 'positions': positions})}"
        )
    return positions


def rope_tables_for(
    function: str,
    x: Array,
    positions: Array,
    base: float,
    rotary_dim: int | None,
    variant: Variant | None,
) -> RopeTables:
    """Return the tables of x's positions in its computing dtype, after checking all."""
    check_floats(function, x=x)
    positions = check_positions(function, x, positions)
    d = x.shape[-1]
    r = d if rotary_dim is None else rotary_dim
    where = describe(function, {"x": x, "positions": positions})
    check_rotary_dim(function, r)
    if r > d:
        raise OptionError(f"rotary_dim is {r}, but x has d={d}; it must be at most that {where}")
    frequencies = rope_frequencies(r, base=base, variant=variant)
    if r < d and variant is not None and variant["kind"] == "proportional":
        raise OptionError(
            f"rotary_dim is {r}, but variant proportional spans all d={d} features; give it "
            f"partial_rotary_factor instead {where}"
        )
    return tables_of(positions, frequencies, like=x, dtype=table_dtype(x))


def tables_on_heads(x: Array, tables: RopeTables) -> tuple[Array, Array]:
    """Return tables (b, n, r/2) as (b, 1, ..., 1, n, r/2), one 1 for each axis between."""
    cosine, sine = tables.cosine, tables.sine
    if len(cosine.shape) == 2:
        return cosine, sine
    b, n, half = cosine.shape
    shape = (b, *[1] * (len(x.shape) - 3), n, half)
    xp = array_namespace(cosine)
    return xp.reshape(cosine, shape), xp.reshape(sine, shape)
