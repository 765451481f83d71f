"""2ˣ and tanh on vectors, by a polynomial that is fitted once for both.

    2ˣ = 2ⁿ (1 + f·g(f)),  n the integer nearest to x,  f = x - n in [-1/2, 1/2]

g is the Chebyshev fit of (2ᶠ - 1)/f (mpmath.chebyfit at 40 digits, rounded to the format).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit, types
from numba.extending import intrinsic

from refattn.cpu.avx512 import fraction, scale_by_power
from refattn.cpu.host import HOST
from refattn.cpu.simd import (
    add,
    constant,
    div,
    fma,
    fuse,
    llvm_vector,
    maximum,
    mul,
    power_of_two,
    sub,
    where_less,
)

GROWTH = {
    32: (
        0.00015453163359779865,
        0.0013390863314270973,
        0.009618083015084267,
        0.055503569543361664,
        0.24022650718688965,
        0.6931471824645996,
    ),
    64: (
        4.4549605981865186e-10,
        7.072585949269223e-09,
        1.0178062445845774e-07,
        1.321544258792169e-06,
        1.525273382983612e-05,
        0.0001540353044173605,
        0.0013333558146416936,
        0.009618129107606888,
        0.0555041086648216,
        0.24022650695910097,
        0.6931471805599453,
    ),
}
"""Coefficients of g, highest power first, by the bits of the format.

Relative error of 1 + f·g(f) in exact arithmetic: 9.2e-9 (float32), 2.0e-17 (float64), both under
an eighth of an ulp; a test states them again at 40 digits.
"""

LOG2_E = 1.4426950408889634
"""log₂ e: logits times this are powers of two."""


@intrinsic
def growth(typing: Any, f: Any) -> Any:
    """Return g(f) = (2ᶠ - 1)/f for |f| ≤ 1/2, by Horner's scheme."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first, *rest = GROWTH[f.dtype.bitwidth]
        total = constant(llvm_vector(f), first)
        for coefficient in rest:
            total = fuse(builder, total, args[0], constant(llvm_vector(f), coefficient))
        return total

    return f(f), emit


EXTREME = {4: 2.0**20, 8: 2.0**49}
"""By bytes of a format: a power of two's exponent that is known to less than an eighth."""


def _constant(sentence: str, single: float, double: float) -> Callable[..., Any]:
    """Return the intrinsic of a vector whose number depends on the format alone."""

    def declare(typing: Any, like: Any) -> Any:
        number = single if like.dtype == types.float32 else double

        def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return constant(llvm_vector(like), number)

        return like(like), emit

    declare.__doc__ = sentence
    function: Callable[..., Any] = intrinsic(declare)
    return function


ones = _constant("Return 1 in every lane.", 1.0, 1.0)
twos = _constant("Return 2 in every lane.", 2.0, 2.0)
two_log2_e = _constant("Return 2 log₂ e.", 2 * LOG2_E, 2 * LOG2_E)
saturated = _constant("Return an exponent beyond which tanh is 1.", 60.0, 60.0)
negative_saturated = _constant("Return the exponent below which tanh is -1.", -60.0, -60.0)
extreme = _constant("Return an exponent known to less than an eighth.", *EXTREME.values())
smallest = _constant("Return the smallest normal number.", 2.0**-126, 2.0**-1022)
lowest_exponent = _constant("Return the exponent below which 2ˣ is 0.", -127.0, -1023.0)
rounding_shift = _constant(
    "Return 3/2 · 2ᵐ + bias: added to x, it leaves n + bias in the lowest bits.",
    1.5 * 2.0**23 + 127,
    1.5 * 2.0**52 + 1023,
)


def exp2_by_shift(x):
    """Return 2ˣ for x up to 127 (float32) or 1023 (float64); 0 far below, NaN for NaN.

    Error under 1 ulp, except that results below the smallest normal number may be 0.
    """
    x = maximum(lowest_exponent(x), x)
    shifted = add(x, rounding_shift(x))
    f = sub(x, sub(shifted, rounding_shift(x)))
    return mul(fma(f, growth(f), ones(x)), power_of_two(shifted))


def exp2_by_avx512(x):
    """Return the same in a quarter less instructions: two of AVX-512 find n and multiply by 2ⁿ."""
    f = fraction(x)
    return scale_by_power(fma(f, growth(f), ones(x)), sub(x, f))


exp2 = njit(error_model="numpy")(exp2_by_avx512 if HOST.name == "avx512" else exp2_by_shift)
"""See `exp2_by_shift`."""


@njit(error_model="numpy")
def tanh(x):
    """Return tanh x = E/(E + 2), E = e²ˣ - 1, relative error within a few ulp everywhere."""
    t = mul(x, two_log2_e(x))
    t = where_less(saturated(x), t, saturated(x), t)
    t = where_less(t, negative_saturated(x), negative_saturated(x), t)
    shifted = add(t, rounding_shift(t))
    f = sub(t, sub(shifted, rounding_shift(t)))
    power = power_of_two(shifted)
    E = fma(power, mul(f, growth(f)), sub(power, ones(x)))
    return div(E, add(E, twos(x)))
