"""Numbers with a majorant of their rounding error: value, accumulated units, operand units.

A `Known` x states that a computed x̂ obeys |x̂ - x| ≤ u·accumulated + v·operand to first order,
where u is the unit roundoff of the arithmetic and v that of the operand format. The second
order is kept where two errors meet, for every u up to `SECOND_ACCUMULATED`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FUNCTION = 8.0
"""Rounding units granted to one exp, log or tanh: an error of 4 ulp, an ulp being 2u."""

EXTRA = 8.0
"""Rounding units granted beside each sum: scaling, constants, division, the last rounding."""

SECOND_ACCUMULATED = 2.0**-13
"""The u up to which the product of two accumulated errors is covered."""

SECOND_OPERAND = 2.0**-8
"""The v up to which the product of two operand errors is covered: bfloat16's."""


REACH_ACCUMULATED = 2.0**-11
"""The largest effective u of any profile: how far an argument of tanh may be off."""


class Known(NamedTuple):
    """A value and the two majorants of its error."""

    value: Array
    accumulated: Array
    operand: Array


def exact(value: Array) -> Known:
    """Return a value that every implementation is given exactly."""
    value = np.asarray(value, np.float64)
    zero = np.zeros_like(value)
    return Known(value, zero, zero)


def stored(x: Known) -> Known:
    """Round a value to the operand format."""
    return x._replace(operand=x.operand + np.abs(x.value))


def rounded(x: Known, units: float = 1.0) -> Known:
    """Round a value a number of times in the arithmetic."""
    return x._replace(accumulated=x.accumulated + units * np.abs(x.value))


def plus(*terms: Known) -> Known:
    """Add terms in any order: each partial sum is at most Σ|x|."""
    magnitude = (len(terms) - 1) * sum((np.abs(x.value) for x in terms), np.zeros(()))
    return Known(
        np.asarray(sum(x.value for x in terms)),
        np.asarray(sum(x.accumulated for x in terms)) + magnitude,
        np.asarray(sum(x.operand for x in terms)),
    )


def times(x: Known, y: Known, units: float = 1.0) -> Known:
    """Multiply elementwise, with a number of roundings."""
    (X, ax, ox), (Y, ay, oy) = x, y
    X_abs, Y_abs = np.abs(X), np.abs(Y)
    return Known(
        X * Y,
        X_abs * ay + ax * (Y_abs + SECOND_ACCUMULATED * ay) + units * X_abs * Y_abs,
        (X_abs + SECOND_ACCUMULATED * ax + SECOND_OPERAND * ox) * oy
        + ox * (Y_abs + SECOND_ACCUMULATED * ay),
    )


def _einsum(spec: str, x: Array, y: Array) -> Array:
    return np.asarray(np.einsum(spec, x, y, optimize=True))


def contract(spec: str, x: Known, y: Known, length: Array | float) -> Known:
    """Contract two tensors (einsum's notation) over `length` terms, in any order."""
    (X, ax, ox), (Y, ay, oy) = x, y
    X_abs, Y_abs = np.abs(X), np.abs(Y)
    return Known(
        _einsum(spec, X, Y),
        _einsum(spec, X_abs, ay)
        + _einsum(spec, ax, Y_abs + SECOND_ACCUMULATED * ay)
        + (length + EXTRA) * _einsum(spec, X_abs, Y_abs),
        _einsum(spec, X_abs + SECOND_ACCUMULATED * ax + SECOND_OPERAND * ox, oy)
        + _einsum(spec, ox, Y_abs + SECOND_ACCUMULATED * ay),
    )


def total(x: Known, axes: tuple[int, ...], length: float, keepdims: bool = False) -> Known:
    """Sum over axes in any order; `length` counts the terms that can be other than zero."""
    magnitude = np.sum(np.abs(x.value), axis=axes, keepdims=keepdims)
    return Known(
        np.sum(x.value, axis=axes, keepdims=keepdims),
        np.sum(x.accumulated, axis=axes, keepdims=keepdims) + (length + EXTRA) * magnitude,
        np.sum(x.operand, axis=axes, keepdims=keepdims),
    )


def larger(x: Known, y: Known) -> Known:
    """Return x with the larger of two majorants: a value that is computed in one of two ways."""
    return x._replace(
        accumulated=np.maximum(x.accumulated, y.accumulated),
        operand=np.maximum(x.operand, y.operand),
    )


def scaled(x: Known, factor: Array | float) -> Known:
    """Multiply by an exact number, without rounding."""
    magnitude = np.abs(factor)
    return Known(x.value * factor, x.accumulated * magnitude, x.operand * magnitude)


def tanh(x: Known) -> Known:
    """Return tanh x, whose error may be absolute: FUNCTION·u whatever the value.

    The slope 1 - tanh² is taken at the end nearer to zero of the interval x may lie in.
    """
    slope = steepest(x)
    T = np.tanh(x.value)
    return Known(T, slope * x.accumulated + FUNCTION, slope * x.operand)


def steepest(x: Known) -> Array:
    """Return the largest slope of tanh over the interval that x may lie in."""
    reach = REACH_ACCUMULATED * x.accumulated + SECOND_OPERAND * x.operand
    nearest = np.minimum(np.maximum(np.abs(x.value) - reach, 0.0), 300.0)
    return np.asarray(np.cosh(nearest) ** -2)
