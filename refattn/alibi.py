"""Linear biases in place of position embeddings.

The paper adds to every logit a penalty proportional to the distance between query and key, with
one fixed slope a head; nothing else in attention changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import ldexp
from typing import Any, TypeAlias

import numpy as np

from refattn.arrays import Array, array_namespace, narrow, widen
from refattn.checks import (
    ShapeError,
    check_counts,
    check_floats,
    check_memory,
    check_option,
    check_shapes,
)
from refattn.masks import position_offset, relative_positions

Alignment: TypeAlias = str | int | Sequence[int]
"""`top_left`, `bottom_right`, an offset, or one offset a batch item."""

DISTANCES = ("absolute", "signed", "column")
"""Forms of the distance that a slope multiplies."""

SLOPE_RULES = ("authors", "geometric")
"""Rules for slopes; they differ where the number of heads is not a power of two."""

FRACTION_BITS = 52
"""Bits after the leading one of a binary64."""


def _power_of_half(exponent: Fraction) -> float:
    """Return 2^(-exponent), correctly rounded to binary64.

    Spec: ALIBI-S3b, ALIBI-S3c.

        2^(-p/q) = 2^(-⌈p/q⌉) · 2^(r/q),  r = -p mod q,  and 2^(r/q) is irrational unless r = 0
    """
    whole = -(-exponent.numerator // exponent.denominator)
    root = exponent.denominator
    remainder = whole * root - exponent.numerator
    if remainder == 0:
        return ldexp(1.0, -whole)
    # One bit beyond the significand, by bisection: the largest b with b^q <= 2^(53q + r).
    target = 1 << ((FRACTION_BITS + 1) * root + remainder)
    low, high = 1 << (FRACTION_BITS + 1), 1 << (FRACTION_BITS + 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**root <= target else (low, middle)
    return ldexp((low + 1) // 2, -FRACTION_BITS - whole)


def _geometric(heads: int) -> list[Fraction]:
    """Return the exponents 8/n, 16/n, ..., 8 of a geometric sequence of slopes."""
    return [Fraction(8 * h, heads) for h in range(1, heads + 1)]


def _exponents(heads: int, slope_rule: str) -> list[Fraction]:
    """Return -log2 of every slope, exactly."""
    closest = 1 << (heads.bit_length() - 1)
    if slope_rule == "geometric" or closest == heads:
        return _geometric(heads)
    return _geometric(closest) + _geometric(2 * closest)[0::2][: heads - closest]


def alibi_slopes(heads: int, *, slope_rule: str = "authors", xp: Any = np) -> Array:
    """Return the slope m of every head, each correctly rounded to binary64.

    Spec: ALIBI-S3b, ALIBI-S3c.

        n a power of two, or slope_rule = geometric:  m_h = 2^(-8h/n),  h = 1..n
        otherwise, c the largest power of two below n:
            m = (slopes of c), then the 1st, 3rd, 5th, ... of the slopes of 2c, n - c of them

    Args:
        heads: n, the number of heads.
        slope_rule: `authors` (their code) or `geometric` (the paper's general sentence).
        xp: the array library of the result.

    Returns:
        m (heads,), float64, in logit units a token.

    Raises:
        OptionError: heads is no integer of at least 1, or slope_rule has no such name.
    """
    check_option("alibi_slopes", "slope_rule", slope_rule, SLOPE_RULES)
    (heads,) = check_counts("alibi_slopes", heads=heads)
    slopes = [_power_of_half(exponent) for exponent in _exponents(heads, slope_rule)]
    return xp.asarray(slopes, dtype=xp.float64)


def distances(
    n_q: int, n_k: int, *, offset: int | Array = 0, distance: str = "absolute", xp: Any = np
) -> Array:
    """Return what a slope multiplies, for every query and key.

    Spec: ALIBI-S3a, OWN-ALIBI1.

        p_i = i + offset;   absolute: -|p_i - j|   signed: j - p_i   column: j

    Args:
        n_q: number of queries.
        n_k: number of keys.
        offset: position of query 0, tokens: an integer, or (b, 1, 1, 1), one a batch item.
        distance: one of `DISTANCES`.
        xp: the array library of the result.

    Returns:
        D, int64, tokens: (n_q, n_k), or (b, 1, n_q, n_k) for offsets of a batch.
    """
    relative = relative_positions(n_q, n_k, offset=offset, xp=xp)
    if distance == "column":
        return xp.broadcast_to(xp.arange(n_k, dtype=xp.int64), relative.shape)
    return -xp.abs(relative) if distance == "absolute" else relative


@np.errstate(all="ignore")  # IEEE values travel silently, whatever the array library
def alibi_bias(
    slopes: Array,
    n_q: int,
    n_k: int,
    *,
    alignment: Alignment = "top_left",
    distance: str = "absolute",
) -> Array:
    """Return the bias that is added to the logits after they are scaled.

    Spec: ALIBI-S3a, ALIBI-FN10, OWN-ALIBI1, OWN-MEMORY1.

        B_hij = m_h · D_ij;   absolute: D_ij = -|p_i - j|,  p_i = i + offset

    Args:
        slopes: m (h,), logit units a token.
        n_q: number of queries.
        n_k: number of keys.
        alignment: `top_left` (offset 0), `bottom_right` (offset n_k - n_q), the offset itself,
            or a list of offsets, one a batch item.
        distance: `absolute`, `signed` (m(j - p_i)) or `column` (m j).

    Returns:
        B (h, n_q, n_k), or (b, h, n_q, n_k) for a list of offsets; dtype of slopes.

    Raises:
        ShapeError: slopes is not a vector.
        DtypeError: slopes is not floating.
        OptionError: a length is no integer of at least 0, or an alignment or distance that has no
            such name.
        MemoryLimitError: the distances and the bias do not fit into the free memory.
    """
    n_q, n_k, offset = check_bias("alibi_bias", slopes, n_q, n_k, alignment, distance)
    check_memory("alibi_bias", bias_shape(slopes, n_q, n_k, offset), itemsize=8, arrays=2)
    xp = array_namespace(slopes)
    m = widen(slopes)
    D = xp.astype(distances(n_q, n_k, offset=offset, distance=distance, xp=xp), m.dtype)
    return narrow(m[:, None, None] * D, slopes)


def check_bias(
    function: str, slopes: Array, n_q: int, n_k: int, alignment: Alignment, distance: str
) -> tuple[int, int, int | Array]:
    """Return the lengths of a bias and the offset of its query positions, after checking all.

    Raises:
        ShapeError, DtypeError, OptionError: as `alibi_bias`.
    """
    check_shapes(function, slopes=(slopes, "h"))
    check_floats(function, slopes=slopes)
    check_option(function, "distance", distance, DISTANCES)
    n_q, n_k = check_counts(function, least=0, n_q=n_q, n_k=n_k)
    xp = array_namespace(slopes)
    return n_q, n_k, position_offset(function, n_q, n_k, alignment=alignment, xp=xp)


def bias_shape(slopes: Array, n_q: int, n_k: int, offset: int | Array) -> tuple[int, ...]:
    """Return (h, n_q, n_k), or (b, h, n_q, n_k) for one offset a batch item."""
    items = () if isinstance(offset, int) else tuple(offset.shape[:1])
    return (*items, slopes.shape[0], n_q, n_k)


@np.errstate(all="ignore")
def alibi_bias_backward(
    d_bias: Array, *, alignment: Alignment = "top_left", distance: str = "absolute"
) -> Array:
    """Return the gradient of the slopes from the gradient of the bias.

    Spec: ALIBI-S3a, OWN-ALIBI1.

        dm_h = Σ_ij dB_hij · D_ij    (also over the batch)

    Args:
        d_bias: dB (..., h, n_q, n_k).
        alignment: as for `alibi_bias`; a list of offsets needs d_bias (b, h, n_q, n_k).
        distance: as for `alibi_bias`.

    Returns:
        dm (h,), dtype of d_bias.

    Raises:
        ShapeError: d_bias has too few axes, or not one batch item an offset.
        DtypeError: d_bias is not floating.
        OptionError: an alignment or distance that has no such name.
    """
    sizes = check_shapes("alibi_bias_backward", d_bias=(d_bias, "... h n_q n_k"))
    check_floats("alibi_bias_backward", d_bias=d_bias)
    check_option("alibi_bias_backward", "distance", distance, DISTANCES)
    xp = array_namespace(d_bias)
    n_q, n_k = sizes["n_q"], sizes["n_k"]
    offset = position_offset("alibi_bias_backward", n_q, n_k, alignment=alignment, xp=xp)
    dB = widen(d_bias)
    D = xp.astype(distances(n_q, n_k, offset=offset, distance=distance, xp=xp), dB.dtype)
    if D.ndim == 4 and (dB.ndim != 4 or dB.shape[0] != D.shape[0]):
        raise ShapeError(
            f"alignment has {D.shape[0]} offsets, but d_bias has shape {tuple(dB.shape)}; "
            f"it must be (b, h, n_q, n_k) with one offset a batch item [alibi_bias_backward]"
        )
    others = tuple(axis for axis in range(dB.ndim) if axis != dB.ndim - 3)
    return narrow(xp.sum(dB * D, axis=others), d_bias)
