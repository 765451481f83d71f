"""Rotary position embedding: position as rotation of pairs of features.

The paper turns each pair of features of a query or key by an angle proportional to its position.
The product of the two then depends on their distance alone, and no norm changes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refattn.arrays import Array, array_namespace, dtype_name, narrow, widen
from refattn.checks import (
    OptionError,
    ShapeError,
    check_floats,
    check_option,
    check_shapes,
    describe,
)
from refattn.rope_frequencies import Variant, one_frequency, rope_frequencies
from refattn.rope_tables import RopeTables, rope_tables, tables_of

PAIRINGS = ("interleaved", "half_split")
"""Features (2i, 2i+1) form a pair, as in the paper, or features (i, i + d/2)."""


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
    tables = _tables("rope", x, positions, base, rotary_dim, variant)
    output = rotate(x, *_on_heads(x, tables), pairing=pairing)
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
    tables = _tables("rope_backward", d_output, positions, base, rotary_dim, variant)
    cosine, sine = _on_heads(d_output, tables)
    return rotate(d_output, cosine, -sine, pairing=pairing)


@np.errstate(all="ignore")  # IEEE values travel silently, whatever the array library
def rotate(x: Array, cosine: Array, sine: Array, *, pairing: str = "interleaved") -> Array:
    """Return features rotated by the angles of given tables.

    Spec: ROPE-EQ34, OWN-ROPE1, OWN-ROPE2, OWN-ROUND1.

        (u, v) → (u cos - v sin, u sin + v cos)  for each pair (u, v)

    Args:
        x: (..., n, d).
        cosine, sine: (..., n, r/2), leading axes broadcastable to x's, r ≤ d, of x's dtype or
            its computing dtype. Features r ... d-1 stay.
        pairing: "interleaved" or "half_split".

    Returns:
        output: (..., n, d), in x's dtype.

    Raises:
        ShapeError: the tables differ, are wider than x, or do not broadcast to it.
        DtypeError: a dtype is not floating, or the tables do not compute as x does.
        OptionError: the pairing is unknown.
    """
    arrays = {"x": x, "cosine": cosine, "sine": sine}
    check_shapes("rotate", x=(x, "... d"), cosine=(cosine, "... r/2"), sine=(sine, "... r/2"))
    check_floats("rotate", x=x)
    X, cos, sin = widen(x), widen(cosine), widen(sine)
    check_floats("rotate", x=X, cosine=cos, sine=sin)
    check_option("rotate", "pairing", pairing, PAIRINGS)
    half, d = cosine.shape[-1], x.shape[-1]
    if 2 * half > d:
        raise ShapeError(
            f"cosine has {half} angles, but x has d={d} features, two an angle "
            f"{describe('rotate', arrays)}"
        )
    if not _broadcasts(tuple(cosine.shape[:-1]), tuple(x.shape[:-1])):
        raise ShapeError(
            f"cosine has leading axes {tuple(cosine.shape[:-1])}, but x has {tuple(x.shape[:-1])}; "
            f"the first must broadcast to the second {describe('rotate', arrays)}"
        )
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


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Tell whether a shape broadcasts to a target without enlarging it."""
    ends = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(size in (1, goal) for size, goal in ends)


def rotation_matrix(
    positions: Array,
    *,
    d: int,
    base: float = 10000.0,
    variant: Variant | None = None,
    dtype: str = "float64",
) -> Array:
    """Return the block-diagonal rotation matrix of every position.

    Spec: ROPE-EQ15, OWN-ROPE4, OWN-ROPE5.

        R_m = diag of blocks ((cos mθ_i, -sin mθ_i), (sin mθ_i, cos mθ_i)),  i = 1 ... d/2

    Args:
        positions: m, (..., n), integers, tokens.
        d: number of features, even.
        base: base of the frequencies.
        variant: see `rope_frequencies`.
        dtype: "float64" or "float32".

    Returns:
        R: (..., n, d, d).

    Raises:
        OptionError: an option is refused.
        DtypeError: positions are not integers.
    """
    tables = rope_tables(positions, rotary_dim=d, base=base, variant=variant, dtype=dtype)
    return block_diagonal(_blocks(tables.cosine, tables.sine))


def block_diagonal(blocks: Array) -> Array:
    """Return square blocks (..., k, 2, 2) on the diagonal of matrices (..., 2k, 2k).

    Spec: ROPE-EQ15.
    """
    xp = array_namespace(blocks)
    k = blocks.shape[-3]
    diagonal = xp.eye(k, dtype=blocks.dtype, device=blocks.device)[:, None, :, None]
    spread = blocks[..., :, :, None, :] * diagonal  # (..., k, 2, k, 2)
    return xp.reshape(spread, (*blocks.shape[:-3], 2 * k, 2 * k))


def _blocks(cosine: Array, sine: Array) -> Array:
    """Return the 2x2 rotation of every entry of the tables, (..., 2, 2)."""
    xp = array_namespace(cosine)
    first, second = xp.stack([cosine, -sine], axis=-1), xp.stack([sine, cosine], axis=-1)
    return xp.stack([first, second], axis=-2)


@np.errstate(all="ignore")
def rope_by_matrix(
    x: Array, positions: Array, *, base: float = 10000.0, variant: Variant | None = None
) -> Array:
    """Return features rotated as the paper writes it, by one matrix a position.

    Spec: ROPE-EQ14, ROPE-EQ15, OWN-ROUND1.

        f(x_m, m) = R_m x_m

    Args:
        x: projected queries or keys W x_m, (..., n, d), d even.
        positions: m, (n,), integers, tokens.
        base: base of the frequencies.
        variant: see `rope_frequencies`.

    Returns:
        output: (..., n, d), in x's dtype.

    Raises:
        RefattnError: as `rope`.
    """
    tables = _tables("rope_by_matrix", x, positions, base, None, variant)
    cosine, sine = _on_heads(x, tables)
    R = block_diagonal(_blocks(cosine, sine))
    return narrow(array_namespace(x).matmul(R, widen(x)[..., None])[..., 0], x)


@np.errstate(all="ignore")
def rotate_complex(x: Array, positions: Array, *, frequency: float) -> Array:
    """Return points of the plane, as complex numbers, turned by their positions.

    Spec: ROPE-EQ12, OWN-ROPE5, OWN-ROUND1.

        f(x_m, m) = x_m e^{imθ}

    Args:
        x: projected queries or keys, (..., n, 2): real and imaginary part.
        positions: m, (n,), integers, tokens.
        frequency: θ, radians a token.

    Returns:
        output: (..., n, 2), in x's dtype.

    Raises:
        ShapeError: x has not two features, or positions not x's length.
        DtypeError: x is not floating, or positions are not integers.
        OptionError: frequency is not finite, or beyond the largest one.
    """
    tables = _plane_tables("rotate_complex", x, positions, frequency)
    xp = array_namespace(x)
    X = widen(x)
    point = X[..., 0] + 1j * X[..., 1]
    turned = point * (tables.cosine[..., 0] + 1j * tables.sine[..., 0])
    return narrow(xp.stack([xp.real(turned), xp.imag(turned)], axis=-1), x)


@np.errstate(all="ignore")
def rotate_plane(x: Array, positions: Array, *, frequency: float) -> Array:
    """Return points of the plane turned by their positions, by 2x2 matrices.

    Spec: ROPE-EQ13, OWN-ROPE5, OWN-ROUND1.

        f(x_m, m) = ((cos mθ, -sin mθ), (sin mθ, cos mθ)) x_m

    Args:
        x: projected queries or keys, (..., n, 2).
        positions: m, (n,), integers, tokens.
        frequency: θ, radians a token.

    Returns:
        output: (..., n, 2), in x's dtype.

    Raises:
        RefattnError: as `rotate_complex`.
    """
    tables = _plane_tables("rotate_plane", x, positions, frequency)
    xp = array_namespace(x)
    R = _blocks(tables.cosine[..., 0], tables.sine[..., 0])
    return narrow(xp.matmul(R, widen(x)[..., None])[..., 0], x)


def _plane_tables(function: str, x: Array, positions: Array, frequency: float) -> RopeTables:
    """Return the tables of one frequency for points (..., n, 2)."""
    check_floats(function, x=x)
    positions = check_positions(function, x, positions)
    if x.shape[-1] != 2 or len(positions.shape) != 1:
        raise ShapeError(
            f"x has {x.shape[-1]} features and positions have {len(positions.shape)} axes, but a "
            f"plane has 2 features and (n,) 1 axis "
            f"{describe(function, {'x': x, 'positions': positions})}"
        )
    return tables_of(positions, one_frequency(frequency), like=x, dtype=table_dtype(x))


def table_dtype(x: Array) -> str:
    """Return the computing dtype of x by name."""
    return dtype_name(widen(x))


def check_positions(function: str, x: Array, positions: Array) -> Array:
    """Return positions as an array that fits x: (n,), or (b, n) for x of (b, ..., n, d).

    Raises:
        ShapeError: they fit no axis of x.
    """
    if not hasattr(positions, "shape"):
        positions = array_namespace(x).asarray(positions)
    check_shapes(function, x=(x, "... n d"), positions=(positions, "... n"))
    axes = len(positions.shape)
    if axes > 2 or (axes == 2 and (len(x.shape) < 3 or positions.shape[0] != x.shape[0])):
        raise ShapeError(
            f"positions have shape {tuple(positions.shape)}, but x of {tuple(x.shape)} needs (n,), "
            f"or (b, n) where x is (b, ..., n, d) "
            f"{describe(function, {'x': x, 'positions': positions})}"
        )
    return positions


def _tables(
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
    if r > d:
        raise OptionError(f"rotary_dim is {r}, but x has d={d}; it must be at most that {where}")
    if r < d and variant is not None and variant.get("kind") == "proportional":
        raise OptionError(
            f"rotary_dim is {r}, but variant proportional spans all d={d} features; give it "
            f"partial_rotary_factor instead {where}"
        )
    frequencies = rope_frequencies(r, base=base, variant=variant)
    return tables_of(positions, frequencies, like=x, dtype=table_dtype(x))


def _on_heads(x: Array, tables: RopeTables) -> tuple[Array, Array]:
    """Return tables (b, n, r/2) as (b, 1, ..., 1, n, r/2), one 1 for each axis between."""
    cosine, sine = tables.cosine, tables.sine
    if len(cosine.shape) == 2:
        return cosine, sine
    b, n, half = cosine.shape
    shape = (b, *[1] * (len(x.shape) - 3), n, half)
    xp = array_namespace(cosine)
    return xp.reshape(cosine, shape), xp.reshape(sine, shape)
