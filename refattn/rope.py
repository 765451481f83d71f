"""Rotary position embedding: position as rotation of pairs of features.

The paper turns each pair of features of a query or key by an angle proportional to its position.
The product of the two then depends on their distance alone, and no norm changes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from refattn.arrays import Array, array_namespace, dtype_name, narrow, widen
from refattn.checks import (
    DtypeError,
    OptionError,
    ShapeError,
    check_finite,
    check_floats,
    check_option,
    check_shapes,
    describe,
)
from refattn.rope_frequencies import RopeFrequencies, Variant
from refattn.rope_tables import RopeTables, exact_frequency, rope_tables, tables_of

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
        cosine, sine: (..., n, r/2), broadcastable to x's leading axes, r ≤ d; float32 for a
            16-bit x, else of x's dtype. Features r ... d-1 stay.
        pairing: "interleaved" or "half_split".

    Returns:
        output: (..., n, d), in x's dtype.

    Raises:
        ShapeError: the tables differ, or are wider than x, or do not broadcast.
        DtypeError: a dtype is not floating, or the tables are not of the computing dtype.
        OptionError: the pairing is unknown.
    """
    arrays = {"x": x, "cosine": cosine, "sine": sine}
    check_shapes("rotate", x=(x, "... n d"), cosine=(cosine, "... n r/2"), sine=(sine, "... n r/2"))
    check_floats("rotate", x=x)
    check_floats("rotate", **{"widened x": widen(x), "cosine": cosine, "sine": sine})
    check_option("rotate", "pairing", pairing, PAIRINGS)
    half, d = cosine.shape[-1], x.shape[-1]
    if 2 * half > d:
        raise ShapeError(
            f"cosine has {half} angles, but x has d={d} features, two an angle "
            f"{describe('rotate', arrays)}"
        )
    _check_broadcast(arrays)
    xp = array_namespace(x)
    X = widen(x)
    if pairing == "interleaved":
        u, v = X[..., 0 : 2 * half : 2], X[..., 1 : 2 * half : 2]
    else:
        u, v = X[..., :half], X[..., half : 2 * half]
    turned = (u * cosine - v * sine, u * sine + v * cosine)
    if pairing == "interleaved":
        rotated = xp.reshape(xp.stack(turned, axis=-1), (*x.shape[:-1], 2 * half))
    else:
        rotated = xp.concat(turned, axis=-1)
    return narrow(xp.concat([rotated, X[..., 2 * half :]], axis=-1), x)


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
    xp = array_namespace(tables.cosine)
    rows = xp.arange(d)[:, None]
    columns = xp.arange(d)[None, :]
    cosine = xp.repeat(tables.cosine, 2, axis=-1)[..., :, None]  # by row of R
    sine = xp.repeat(tables.sine, 2, axis=-1)[..., :, None]
    zero = xp.zeros_like(cosine)
    above = (columns == rows + 1) & (rows % 2 == 0)
    below = (columns == rows - 1) & (rows % 2 == 1)
    off_diagonal = xp.where(above, -sine, xp.where(below, sine, zero))
    return xp.where(columns == rows, cosine, off_diagonal)


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
    sizes = _check_positions("rope_by_matrix", x, positions, per_item=False)
    xp = array_namespace(x)
    X = widen(x)
    dtype = dtype_name(X)
    R = rotation_matrix(positions, d=sizes["d"], base=base, variant=variant, dtype=dtype)
    return narrow(xp.matmul(R, X[..., None])[..., 0], x)


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
    cosine, sine = tables.cosine[..., 0], tables.sine[..., 0]
    first, second = xp.stack([cosine, -sine], axis=-1), xp.stack([sine, cosine], axis=-1)
    R = xp.stack([first, second], axis=-2)
    return narrow(xp.matmul(R, widen(x)[..., None])[..., 0], x)
