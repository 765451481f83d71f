"""Matrices of the second engine: Python integers beside a power of two, or mpmath numbers.

This engine shares no formula with the first: it has its own reading of every option, and sums
exponentials as they stand, because an mpmath number has an unbounded exponent.
"""

from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from mpmath import mp, mpf

Array = Any
"""A NumPy array, of floats or of objects."""


class Matrix(NamedTuple):
    """Element (i, j) is n[i, j]·2^e; n holds integers, or mpmath numbers with NaN among them."""

    n: Array
    e: int


def load(x: Array) -> Matrix:
    """Convert an array of floats without error."""
    flat = [float(t) for t in np.asarray(x).reshape(-1)]
    result = np.empty(len(flat), dtype=object)
    if not np.isfinite(np.asarray(x, dtype=np.float64)).all():
        for k, t in enumerate(flat):
            result[k] = mpf(t)
        return Matrix(result.reshape(np.shape(x)), 0)
    ratios = [Fraction(t) for t in flat]
    denominator = max((r.denominator for r in ratios), default=1)
    for k, r in enumerate(ratios):
        result[k] = r.numerator * (denominator // r.denominator)
    return Matrix(result.reshape(np.shape(x)), 1 - denominator.bit_length())


def matmul(a: Matrix, b: Matrix) -> Matrix:
    """Multiply two matrices."""
    return Matrix(np.dot(a.n, b.n), a.e + b.e)


def real(n: Any, e: int) -> Any:
    """Return n·2^e as an mpmath number."""
    return mp.ldexp(mpf(n), e)


def number(x: Any) -> Any:
    """Return a parameter as an mpmath number: integers and binary64 exactly."""
    return mpf(int(x)) if isinstance(x, int | np.integer) else mpf(float(x))


def total(terms: Any) -> Any:
    """Add mpmath numbers."""
    return mp.fsum(terms)
