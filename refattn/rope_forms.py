"""Rotary position embedding as the paper derives it: complex numbers, the plane, one big matrix.

All are equal to the elementwise form of `rope.py`; each states one equation literally.
"""

from __future__ import annotations

import numpy as np

from refattn.arrays import Array, array_namespace, narrow, widen
from refattn.checks import ShapeError, check_floats, describe
from refattn.rope import check_positions, rope_tables_for, table_dtype, tables_on_heads
from refattn.rope_frequencies import Variant, one_frequency
from refattn.rope_tables import RopeTables, rope_tables, tables_of


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
    tables = rope_tables_for("rope_by_matrix", x, positions, base, None, variant)
    cosine, sine = tables_on_heads(x, tables)
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
