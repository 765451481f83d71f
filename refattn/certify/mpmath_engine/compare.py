"""Does a stored value agree with what the second engine computes?

The second engine has no error bounds, so it computes every value at two precisions; the
difference, enlarged, stands for the error. A value that does not agree is computed again at a
higher precision, and only a disagreement at the highest one counts.
"""

from typing import Any

from mpmath import isinf, isnan, mpf

from refattn.certify.rounding import FLOAT64, Dyadic, round_dyadic, same

LEVELS = (160, 320, 640, 1280, 2560)
"""Precisions in bits; each value is compared at two neighbouring ones."""

SLACK = 10
"""The difference of two precisions is enlarged by 2^10."""

NOISE_LEVEL = 640
"""From this precision on, a value that shrinks as fast as the precision grows is a zero."""


def dyadic(x: Any) -> Dyadic:
    """Return a finite mpmath number as n·2^e."""
    sign, man, exp, _ = mpf(x)._mpf_
    return Dyadic(-int(man) if sign else int(man), int(exp))


def _exact(x: float) -> Dyadic:
    p, q = x.as_integer_ratio()
    return Dyadic(p, 1 - q.bit_length())


def _scaled(a: Dyadic, e: int) -> int:
    return a.n << (a.e - e)


def agrees(stored: float, rough: Any, fine: Any, bits: int) -> bool:
    """Tell whether a stored float64 is the rounding of a value known at two precisions."""
    if isnan(fine) or isnan(rough):
        return stored != stored
    if isinf(fine):
        return bool(mpf(stored) == fine)
    if stored != stored:
        return False
    a, b = dyadic(rough), dyadic(fine)
    e = min(a.e, b.e)
    error = abs(_scaled(a, e) - _scaled(b, e)) << SLACK
    n = _scaled(b, e)
    error += abs(n) >> (bits - 20)
    low, high = round_dyadic(n - error, e, FLOAT64), round_dyadic(n + error, e, FLOAT64)
    if stored in (float("inf"), float("-inf")):
        return same(low, high) and abs(low.n) > 1 << 59 and (low.n > 0) == (stored > 0)
    if same(low, high):
        return same(low, _exact(stored))
    if stored == 0 and bits >= NOISE_LEVEL:
        return abs(n) <= abs(_scaled(a, e)) >> (bits // 2 - 60)
    return _between(stored, low, high)


def _between(stored: float, low: Dyadic, high: Dyadic) -> bool:
    """Accept either neighbour where the value is a midpoint, or nearly one, of float64."""
    value = _exact(stored)
    if not (same(low, value) or same(high, value)):
        return False
    e = min(low.e, high.e)
    gap = abs(_scaled(high, e) - _scaled(low, e))
    return gap << max(0, e - min(low.e, high.e)) <= 1 << (max(low.e, high.e) - e)
