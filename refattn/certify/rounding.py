"""Correct rounding of exact numbers and of balls, in integers only.

A value is stored once, as float64. It may be stored when every number of the ball that
encloses it rounds to that float64, and when rounding that float64 once more gives the
correctly rounded value in each narrower format too. No comparison here is made in floats.
"""

import math
from typing import NamedTuple

from flint import arb, fmpq

from refattn.certify.errors import Midpoint


class Format(NamedTuple):
    """A binary floating-point format: precision p in bits, exponents of normal numbers."""

    name: str
    p: int
    emin: int
    emax: int


FLOAT64 = Format("float64", 53, -1022, 1023)
"""IEEE 754 binary64, the format in which expected values are stored."""

NARROW = (
    Format("float32", 24, -126, 127),
    Format("float16", 11, -14, 15),
    Format("bfloat16", 8, -126, 127),
)
"""The formats to which a stored value is rounded once more when it is used."""

INFINITE = 1 << 60
"""Stands for the significand of an overflowed value; no format has one so large."""


class Dyadic(NamedTuple):
    """The number n·2^e; n = ±INFINITE stands for ±∞."""

    n: int
    e: int


def round_dyadic(n: int, e: int, fmt: Format) -> Dyadic:
    """Round n·2^e to the nearest number of a format, ties to the even significand.

    Subnormal numbers are kept; from the midpoint above the largest number on, the result is ∞.
    """
    magnitude = abs(n)
    least = max(magnitude.bit_length() + e - fmt.p, fmt.emin - fmt.p + 1)
    if least > e:
        shift = least - e
        rest = magnitude & ((1 << shift) - 1)
        half = 1 << (shift - 1)
        magnitude >>= shift
        if rest > half or (rest == half and magnitude & 1):
            magnitude += 1
        e = least
    if magnitude and magnitude.bit_length() + e > fmt.emax + 1:
        return Dyadic(INFINITE if n > 0 else -INFINITE, 0)
    return Dyadic(-magnitude if n < 0 else magnitude, e)


def round_rational(numerator: int, denominator: int, fmt: Format) -> Dyadic:
    """Round numerator/denominator (denominator > 0) to a format, ties to even.

    The quotient is cut three bits below the last place that can matter, and a non-zero
    remainder is remembered as one more (sticky) bit, so the cut value rounds alike.
    """
    size = abs(numerator).bit_length() - denominator.bit_length()
    cut = min(size - fmt.p - 3, fmt.emin - fmt.p - 3)
    if cut < 0:
        quotient, rest = divmod(abs(numerator) << -cut, denominator)
    else:
        quotient, rest = divmod(abs(numerator), denominator << cut)
    sticky = 2 * quotient + (1 if rest else 0)
    return round_dyadic(-sticky if numerator < 0 else sticky, cut - 1, fmt)


def to_float(value: Dyadic) -> float:
    """Convert a rounded number to a Python float, exactly; zero becomes +0."""
    if abs(value.n) == INFINITE:
        return math.inf if value.n > 0 else -math.inf
    if value.n == 0:
        return 0.0
    spare = max(0, abs(value.n).bit_length() - FLOAT64.p)
    return math.ldexp(value.n >> spare, value.e + spare)


def same(a: Dyadic, b: Dyadic) -> bool:
    """Tell whether two rounded numbers are equal, also when their exponents differ."""
    if a == b or (a.n == 0 and b.n == 0):
        return True
    if INFINITE in (abs(a.n), abs(b.n)):
        return False
    low = min(a.e, b.e)
    return a.n << (a.e - low) == b.n << (b.e - low)


def is_tie(value: Dyadic, fmt: Format) -> bool:
    """Tell whether a number lies exactly between two neighbours of a format."""
    n = abs(value.n)
    least = max(n.bit_length() + value.e - fmt.p, fmt.emin - fmt.p + 1)
    shift = least - value.e
    return shift > 0 and n & ((1 << shift) - 1) == 1 << (shift - 1)


def ties(value: Dyadic) -> list[Format]:
    """Name the narrow formats in which a float64 lies exactly between two neighbours.

    Such a number has at most p + 1 significant bits, which few float64 have.
    """
    n = abs(value.n)
    if n in (0, INFINITE) or n.bit_length() - (n & -n).bit_length() + 1 > NARROW[0].p + 1:
        return []
    return [fmt for fmt in NARROW if is_tie(value, fmt)]


def ball_ends(ball: arb) -> tuple[int, int, int]:
    """Return (low, high, e) with the ball equal to [low·2^e, high·2^e]."""
    middle, e_middle = (int(part) for part in ball.mid().man_exp())
    radius, e_radius = (int(part) for part in ball.rad().man_exp())
    e = min(e_middle, e_radius)
    middle <<= e_middle - e
    radius <<= e_radius - e
    return middle - radius, middle + radius, e


def settle_ball(ball: arb) -> float | None:
    """Return the one float64 that serves every number of a ball, or None when it needs more bits.

    Where both ends round to zero the value is +0, whatever its sign.

    Raises:
        Midpoint: rounding that float64 to a narrower format differs from rounding once.
    """
    if not ball.is_finite():
        return None
    low, high, e = ball_ends(ball)
    value, other = round_dyadic(low, e, FLOAT64), round_dyadic(high, e, FLOAT64)
    if not same(value, other):
        return None
    for fmt in ties(value):
        shared = min(e, value.e)
        below = (low << (e - shared)) - (value.n << (value.e - shared))
        above = (high << (e - shared)) - (value.n << (value.e - shared))
        if below <= 0 <= above:
            return None
        twice = round_dyadic(value.n, value.e, fmt)
        if not same(twice, round_dyadic(low, e, fmt)):
            raise Midpoint(to_float(value), fmt.name)
    return to_float(value)


def settle_exact(value: fmpq) -> float:
    """Round an exact rational to float64, ties to even, zero as +0.

    Raises:
        Midpoint: rounding that float64 to a narrower format differs from rounding once.
    """
    numerator, denominator = int(value.p), int(value.q)
    rounded = round_rational(numerator, denominator, FLOAT64)
    for fmt in ties(rounded):
        once = round_rational(numerator, denominator, fmt)
        if not same(once, round_dyadic(rounded.n, rounded.e, fmt)):
            raise Midpoint(to_float(rounded), fmt.name)
    return to_float(rounded)
