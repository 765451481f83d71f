import math
from fractions import Fraction

import flint
import ml_dtypes
import numpy as np
import pytest
from flint import arb, fmpq

from refattn.certify import Ambiguous, Midpoint
from refattn.certify.rounding import (
    FLOAT64,
    NARROW,
    round_dyadic,
    round_rational,
    settle_ball,
    settle_exact,
    to_float,
)

FLOAT32, FLOAT16, BFLOAT16 = NARROW
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
FORMATS = pytest.mark.parametrize("fmt", NARROW, ids=lambda fmt: fmt.name)

pytestmark = pytest.mark.clause("OWN-EXACT1")


def rounded(x, fmt):
    p, q = x.as_integer_ratio()
    direct = to_float(round_dyadic(p, 1 - q.bit_length(), fmt))
    assert to_float(round_rational(p, q, fmt)) == direct
    return direct


def wide_floats(count):
    """Random floats over all exponents, and short significands, which tie often."""
    rng = np.random.default_rng(7)
    bits = rng.integers(0, 2**64, count, dtype=np.uint64).view(np.float64)
    near = np.ldexp(rng.standard_normal(count), rng.integers(-170, 130, count))
    short = np.ldexp(
        rng.integers(-(2**13), 2**13, count).astype(float), rng.integers(-165, 125, count)
    )
    return np.concatenate([bits[np.isfinite(bits)], near, short])


@FORMATS
def test_rounding_of_random_floats_is_the_cast_of_the_array_library(fmt):
    values = wide_floats(20_011)
    with np.errstate(all="ignore"):
        if fmt.name == "bfloat16":
            # ml_dtypes casts float64 to bfloat16 through float32; from float32 it rounds once
            values = values.astype(np.float32).astype(np.float64)
            values = values[np.isfinite(values)]
        expected = values.astype(DTYPES[fmt.name]).astype(np.float64)
    assert [rounded(x, fmt) for x in values.tolist()] == expected.tolist()


@pytest.mark.parametrize("fmt", [FLOAT16, BFLOAT16], ids=lambda fmt: fmt.name)
def test_every_midpoint_of_a_16_bit_format_goes_to_the_even_neighbour(fmt):
    finite = np.arange(0, 0x7C00 if fmt is FLOAT16 else 0x7F80, dtype=np.uint16)
    values = finite.view(DTYPES[fmt.name]).astype(np.float64).tolist()
    for k in range(len(values) - 1):
        low, high = Fraction(values[k]), Fraction(values[k + 1])
        middle, step = (low + high) / 2, (high - low) / 1024
        p, q = middle.as_integer_ratio()
        even = values[k] if k % 2 == 0 else values[k + 1]
        assert to_float(round_dyadic(p, 1 - q.bit_length(), fmt)) == even
        for x, side in ((middle - step, values[k]), (middle + step, values[k + 1])):
            p, q = x.as_integer_ratio()
            assert to_float(round_dyadic(p, 1 - q.bit_length(), fmt)) == side


def test_rational_numbers_round_to_float64_as_python_divides_integers():
    rng = np.random.default_rng(11)
    for shift in (0, 1000, 1074):
        for p, q in rng.integers(1, 2**62, (2_003, 2)).tolist():
            assert to_float(round_rational(-p, q << shift, FLOAT64)) == -(p / (q << shift))


def test_overflow_starts_at_the_midpoint_above_the_largest_number():
    for fmt, largest in ((FLOAT16, 65504), (FLOAT64, (2**53 - 1) << 971)):
        half_ulp = 1 << (fmt.emax - fmt.p)
        assert to_float(round_dyadic(largest + half_ulp - 1, 0, fmt)) == largest
        assert to_float(round_dyadic(largest + half_ulp, 0, fmt)) == math.inf
        assert to_float(round_dyadic(-largest - half_ulp, 0, fmt)) == -math.inf


def test_a_rational_tie_of_float64_goes_to_even():
    assert settle_exact(1 + fmpq(1, 2**53)) == 1.0
    assert settle_exact(1 + fmpq(3, 2**53)) == 1.0 + 2.0**-51


def test_zero_and_underflow_are_stored_as_positive_zero():
    for x in (settle_exact(fmpq(0)), settle_exact(fmpq(-1, 2**1080)), settle_ball(arb(0, 1e-400))):
        assert x == 0 and math.copysign(1, x) == 1
    assert math.copysign(1, settle_ball(arb(fmpq(-1, 2**1080)))) == 1


def test_a_ball_is_settled_only_when_both_ends_round_alike():
    assert settle_ball(arb(1, 2.0**-60)) == 1.0
    assert settle_ball(arb(1, 2.0**-50)) is None
    assert settle_ball(arb(1 + 2.0**-30, 1) / 3) is None


def test_a_ball_across_a_midpoint_of_a_narrow_format_is_undecided():
    assert settle_ball(arb(1 + 2.0**-8, 2.0**-70)) is None


def test_a_float64_that_rounds_twice_to_the_wrong_side_is_refused():
    with pytest.raises(Midpoint, match="bfloat16"):
        settle_exact(1 + fmpq(1, 2**8) + fmpq(1, 2**80))
    flint.ctx.prec = 128
    with pytest.raises(Ambiguous, match="float32"):
        settle_ball(arb(1 + fmpq(1, 2**24) + fmpq(1, 2**80)))
    flint.ctx.prec = 53


def test_a_midpoint_whose_even_neighbour_is_on_the_right_side_is_kept():
    assert settle_exact(1 + fmpq(3, 2**8) + fmpq(1, 2**80)) == 1 + 3 / 2**8
    assert settle_exact(1 + fmpq(1, 2**8)) == 1 + 1 / 2**8
