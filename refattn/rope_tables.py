"""Cosine and sine of position times frequency, right to the last bit at any position.

An angle of 100 000 radians computed in float32 has no digit left that a cosine could use, and in
float64 it costs the last sixteen bits. So the turns that a token adds are kept as a fixed-point
fraction of 2^-96 and a tail: an integer position times that fraction, modulo whole turns, is
integer arithmetic, which rounds nothing.
"""

from __future__ import annotations

import math
from decimal import ROUND_FLOOR, Context, Decimal, localcontext
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import is_cupy_array, is_torch_array, to_device

from refattn.arrays import Array, array_namespace, dtype_name
from refattn.checks import (
    DtypeError,
    OptionError,
    ShapeError,
    check_arrays,
    check_option,
    describe,
)
from refattn.rope_frequencies import DIGITS, PI, RopeFrequencies, Variant, rope_frequencies

LARGEST_POSITION = 2**32 - 1
"""Tokens; the product of a position and a 32-bit word of a fraction must fit into 64 bits."""

TABLE_DTYPES = ("float64", "float32")
"""The dtypes of a table."""

TAU_HIGH = 2 * math.pi
"""2π rounded to binary64."""

TAU_LOW = float(Context(prec=DIGITS).fma(2, PI, Decimal(-TAU_HIGH)))
"""What `TAU_HIGH` lacks of 2π."""

SPLITTER = 134217729.0
"""2^27 + 1: splits a binary64 into two halves whose products are exact (Dekker)."""

DOUBT = 2.0**-46
"""Relative width around a binary64 entry within which its exact value surely lies."""

EVEN_BIT = 1
"""Mask of the last bit of a significand."""


class RopeTables(NamedTuple):
    """Frequencies (radians a token), the attention factor, and the tables that carry it."""

    frequencies: Array
    attention_factor: Array
    cosine: Array
    sine: Array


def rope_tables(
    positions: Array,
    *,
    rotary_dim: int,
    base: float = 10000.0,
    variant: Variant | None = None,
    dtype: str = "float64",
) -> RopeTables:
    """Return the cosine and sine of every position and frequency, times the attention factor.

    Spec: OWN-ROPE3, OWN-ROPE4, OWN-ROPE5.

        cosine[..., m, i] = a cos(m θ_i),  sine[..., m, i] = a sin(m θ_i)

    The tables are built by NumPy on the host and then handed to the array library of positions.

    Args:
        positions: m, (..., n), integers, at most 2^32 - 1 in magnitude, tokens.
        rotary_dim: d, even.
        base: see `rope_frequencies`.
        variant: see `rope_frequencies`.
        dtype: "float64" or "float32".

    Returns:
        frequencies: θ, (d/2,), radians a token, correctly rounded.
        attention_factor: a, (), correctly rounded.
        cosine, sine: (..., n, d/2); in float32 correctly rounded.

    Raises:
        OptionError: a position or an option is out of its range.
        DtypeError: positions are not integers, or dtype is no table's.
    """
    frequencies = rope_frequencies(rotary_dim, base=base, variant=variant)
    return tables_of(positions, frequencies, like=positions, dtype=dtype)


def tables_of(
    positions: Array, frequencies: RopeFrequencies, *, like: Array, dtype: str
) -> RopeTables:
    """Return the tables of given frequencies, in the array library and on the device of `like`.

    Spec: OWN-ROPE3, OWN-ROPE5.
    """
    check_option("rope_tables", "dtype", dtype, TABLE_DTYPES)
    m = host_positions(positions)
    cosine, sine = _rounded_tables(m.reshape(-1), frequencies, dtype)
    shape = (*m.shape, len(frequencies.theta))
    theta = np.asarray([round_decimal(t, dtype) for t in frequencies.theta], dtype)
    factor = np.asarray(round_decimal(frequencies.attention_factor, dtype), dtype)
    host = RopeTables(theta, factor, cosine.reshape(shape), sine.reshape(shape))
    xp = array_namespace(like)
    return RopeTables(*(xp.asarray(table, device=like.device) for table in host))


def round_decimal(value: Decimal, dtype: str) -> float:
    """Return a decimal correctly rounded to float64 or float32.

    Spec: OWN-ROPE5.

    A float32 is rounded from the neighbouring float64 with an odd last bit: unlike the nearest
    one, it is never taken for a tie that the decimal is not.
    """
    nearest = float(value)
    if dtype == "float64" or Decimal(nearest) == value:
        return nearest
    odd = int(np.float64(nearest).view(np.int64)) & EVEN_BIT
    return nearest if odd else math.nextafter(nearest, math.inf if value > nearest else -math.inf)


def host_positions(positions: Array) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return positions as NumPy's int64.

    Raises:
        DtypeError: they are no array, or not integers.
        ShapeError: they are a scalar.
        OptionError: one is beyond `LARGEST_POSITION`.
    """
    check_arrays("rope_tables", positions=positions)
    where = describe("rope_tables", {"positions": positions})
    if "int" not in dtype_name(positions):
        raise DtypeError(
            f"positions have dtype {dtype_name(positions)}, but they must be integers {where}"
        )
    if len(positions.shape) == 0:
        raise ShapeError(f"positions have 0 axes, but (..., n) has at least 1 {where}")
    on_device = is_cupy_array(positions) or is_torch_array(positions)
    m = np.asarray(to_device(positions, "cpu") if on_device else positions)
    if m.size and max(-int(m.min()), int(m.max())) > LARGEST_POSITION:
        raise OptionError(
            f"positions reach from {m.min()} to {m.max()}, but their magnitude must be at most "
            f"{LARGEST_POSITION} {where}"
        )
    return m.astype(np.int64)


def _rounded_tables(m: Any, frequencies: RopeFrequencies, dtype: str) -> tuple[Any, Any]:
    """Return tables (n, d/2) in a dtype; a float32 that float64 leaves in doubt, from decimals."""
    tables = []
    for sine, wave in enumerate(_cosine_sine(m, frequencies.theta)):
        table = wave * float(frequencies.attention_factor)
        rounded = table.astype(dtype)
        if dtype == "float32":
            low, high = (table * (1 + side * DOUBT) for side in (-1, 1))
            for i, j in np.argwhere(low.astype(dtype) != high.astype(dtype)):
                rounded[i, j] = round_decimal(_exact_entry(int(m[i]), j, frequencies, sine), dtype)
        tables.append(rounded)
    return tables[0], tables[1]


def _cosine_sine(m: Any, theta: tuple[Decimal, ...]) -> tuple[Any, Any]:
    """Return cos and sin of m θ in float64, (n, d/2).

    |m θ| is quadrant · π/2 + a + b with |a| ≤ π/4 and |b| < 2^-52.
    """
    quadrant, a, b = _reduced_angles(np.abs(m)[:, None], *_turns_a_token(theta))
    cos_a, sin_a = np.cos(a), np.sin(a)
    cos, sin = cos_a - sin_a * b, sin_a + cos_a * b
    cosine = np.choose(quadrant, [cos, -sin, -cos, sin])
    sine = np.choose(quadrant, [sin, cos, -sin, -cos])
    negative = (m < 0)[:, None] ^ np.asarray([t < 0 for t in theta])
    return cosine, np.where(negative, -sine, sine)


def _turns_a_token(theta: tuple[Decimal, ...]) -> tuple[Any, Any, Any]:
    """Return |θ|/(2π) modulo 1 as words of 64 and of 32 bits and a binary64 below 2^-96."""
    words = []
    with localcontext(Context(prec=DIGITS)):
        for t in theta:
            turns = abs(t) / (2 * PI)
            scaled = (turns - turns.to_integral_value(ROUND_FLOOR)) * 2**96
            whole = int(scaled.to_integral_value(ROUND_FLOOR))
            words.append((whole >> 32, whole & 0xFFFFFFFF, float(scaled - whole) * 2.0**-96))
    first, second, tail = zip(*words, strict=True)
    return np.asarray(first, np.uint64), np.asarray(second, np.uint64), np.asarray(tail)


def _reduced_angles(m: Any, first: Any, second: Any, tail: Any) -> tuple[Any, Any, Any]:
    """Return the quadrant and the rest, in radians as a sum of two floats, of m turns each."""
    m = m.astype(np.uint64)
    carried = m * second  # exact: 32 x 32 bits
    turns = m * first + (carried >> np.uint64(32))  # wraps at whole turns, of 2^64 units
    below = (carried & np.uint64(0xFFFFFFFF)).astype(np.float64) * 2.0**-96 + m * tail
    quadrant = (turns + np.uint64(2**61)) >> np.uint64(62)
    rest = (turns - (quadrant << np.uint64(62))).view(np.int64)
    high = rest.astype(np.float64)
    low = (rest - high.astype(np.int64)).astype(np.float64) * 2.0**-64 + below
    high = high * 2.0**-64
    a = high * TAU_HIGH
    b = _product_error(high, TAU_HIGH, a) + high * TAU_LOW + low * TAU_HIGH
    return (quadrant & np.uint64(3)).astype(np.int64), a, b


def _product_error(x: Any, y: float, product: Any) -> Any:
    """Return x·y - product, exactly (Dekker)."""
    x_high = SPLITTER * x - (SPLITTER * x - x)
    y_high = SPLITTER * y - (SPLITTER * y - y)
    x_low, y_low = x - x_high, y - y_high
    return ((x_high * y_high - product) + x_high * y_low + x_low * y_high) + x_low * y_low


def _exact_entry(m: int, pair: int, frequencies: RopeFrequencies, sine: int) -> Decimal:
    """Return one entry of a table to half of `DIGITS`: the Taylor series of the reduced angle."""
    with localcontext(Context(prec=DIGITS)):
        turns = m * frequencies.theta[pair] / (2 * PI)
        angle = (turns - turns.to_integral_value()) * 2 * PI
        term, total, k = (angle, angle, 1) if sine else (Decimal(1), Decimal(1), 0)
        while abs(term) > Decimal(10) ** -DIGITS:
            term = -term * angle * angle / ((k + 1) * (k + 2))
            total, k = total + term, k + 2
        return total * frequencies.attention_factor
