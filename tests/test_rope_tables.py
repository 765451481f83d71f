"""Cosine and sine right to the last bit, against mpmath and python-flint at high precision."""

from decimal import Context, Decimal, localcontext

import flint
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refattn.rope_frequencies import PI, RopeFrequencies
from refattn.rope_tables import (
    _exact_entry,
    _reduced_angles,
    _turns_a_token,
    rope_tables,
    round_decimal,
    tables_of,
)

LAST = 131071
POSITIONS = np.unique(
    np.concatenate(
        [
            [0, 1, 2, 355, 4095, LAST, -1, -LAST, 2**31, -(2**31), 2**32 - 1],
            np.random.default_rng(0).integers(0, LAST, 61),
        ]
    )
)
SETTINGS = [(10000.0, 128), (500000.0, 34), (1000000.0, 10), (1.5, 6)]


def exact_table(positions, base, d):
    """Cosine and sine by mpmath, 60 digits, as nested lists [position][pair] of (cos, sin)."""
    with mpmath.workdps(60):
        theta = [mpmath.mpf(base) ** (mpmath.mpf(-2 * i) / d) for i in range(d // 2)]
        return [[mpmath.cos_sin(int(m) * t) for t in theta] for m in positions]


def nearest_float32(value):
    """The float32 next to a high-precision number, found among three candidates."""
    guess = np.float32(float(value))
    candidates = [np.nextafter(guess, np.float32(s)) for s in (-np.inf, np.inf)] + [guess]
    with mpmath.workdps(60):
        return min(candidates, key=lambda c: abs(mpmath.mpf(float(c)) - value))


@pytest.mark.clause("OWN-ROPE5")
@pytest.mark.parametrize(("base", "d"), SETTINGS)
def test_float32_tables_are_correctly_rounded_at_any_position(base, d):
    tables = rope_tables(POSITIONS, rotary_dim=d, base=base, dtype="float32")
    expected = exact_table(POSITIONS, base, d)
    for table, wave in ((tables.cosine, 0), (tables.sine, 1)):
        rounded = [[nearest_float32(pair[wave]) for pair in row] for row in expected]
        np.testing.assert_array_equal(table, np.array(rounded, np.float32))


@pytest.mark.clause("OWN-ROPE5")
@pytest.mark.parametrize(("base", "d"), SETTINGS)
def test_float64_tables_are_within_two_units_in_the_last_place(base, d):
    tables = rope_tables(POSITIONS, rotary_dim=d, base=base)
    expected = exact_table(POSITIONS, base, d)
    for table, wave in ((tables.cosine, 0), (tables.sine, 1)):
        for row, exact_row in zip(table, expected, strict=True):
            for entry, pair in zip(row, exact_row, strict=True):
                with mpmath.workdps(60):
                    error = abs(mpmath.mpf(float(entry)) - pair[wave])
                assert error <= 2 * np.spacing(abs(float(entry)))


@pytest.mark.clause("OWN-ROPE5")
def test_position_131071_in_ball_arithmetic():
    flint.ctx.prec = 300
    tables = rope_tables(np.array([LAST]), rotary_dim=128, dtype="float32")
    for i in range(64):
        angle = LAST * (flint.arb(10000).log() * flint.arb(-2 * i) / 128).exp()
        for entry, ball in ((tables.cosine[0, i], angle.cos()), (tables.sine[0, i], angle.sin())):
            half_unit = flint.arb(float(np.spacing(np.abs(entry)))) / 2
            assert abs(flint.arb(float(entry)) - ball) < half_unit
    flint.ctx.prec = 53


@pytest.mark.clause("OWN-ROPE5")
def test_the_common_float32_angle_is_wrong_in_the_third_digit_there():
    theta = np.float32(1) / np.float32(10000) ** (np.arange(0, 128, 2, dtype=np.float32) / 128)
    common = np.cos(np.float32(LAST) * theta)
    tables = rope_tables(np.array([LAST]), rotary_dim=128, dtype="float32")
    assert 1e-3 < np.max(np.abs(common - tables.cosine[0])) < 1e-2


@pytest.mark.clause("OWN-ROPE5")
def test_an_entry_on_the_middle_between_two_float32_is_decided_exactly():
    # The factor is a float32 and a half unit, and a little: cos(0) = 1 leaves it as it is.
    middle = Decimal(1 + 2.0**-24)
    for little, expected in ((Decimal("1e-40"), 1 + 2.0**-23), (Decimal("-1e-40"), 1.0)):
        factor = Context(prec=60).add(middle, little)
        frequencies = RopeFrequencies((Decimal(1),), factor)
        tables = tables_of(np.array([0]), frequencies, like=np.array([0]), dtype="float32")
        assert tables.cosine[0, 0] == np.float32(expected)
        assert tables.attention_factor == np.float32(expected)


@pytest.mark.clause("OWN-ROPE5")
@given(m=st.integers(-(2**32) + 1, 2**32 - 1), theta=st.decimals(-9, 9, places=30))
@settings(deadline=None, max_examples=60)
def test_the_series_for_doubtful_entries_is_cosine_and_sine(m, theta):
    frequencies = RopeFrequencies((theta,), Decimal(1))
    with mpmath.workdps(100):
        angle = m * mpmath.mpf(str(theta))
        for sine, exact in enumerate(mpmath.cos_sin(angle)):
            value = mpmath.mpf(str(_exact_entry(m, 0, frequencies, sine)))
            assert abs(value - exact) < mpmath.mpf(10) ** -80


@pytest.mark.clause("OWN-ROPE5")
@given(st.floats(-(2.0**126), 2.0**126, width=32), st.integers(-1, 1))
@settings(deadline=None, max_examples=100)
def test_a_decimal_is_rounded_to_float32_once(number, side):
    low, high = np.float32(number), np.nextafter(np.float32(number), np.float32(np.inf))
    with localcontext(Context(prec=250)):
        middle = (Decimal(float(low)) + Decimal(float(high))) / 2
        value = middle + side * abs(middle) * Decimal(2) ** -80
    rounded = np.float32(round_decimal(value, "float32"))
    even = low if low.view(np.int32) % 2 == 0 else high
    assert rounded == {-1: low, 0: even, 1: high}[side]


@pytest.mark.clause("OWN-ROPE5")
@given(m=st.integers(0, 2**32 - 1), theta=st.decimals(0, 9, places=30))
@settings(deadline=None, max_examples=60)
def test_an_angle_is_reduced_to_two_floats_without_loss(m, theta):
    quadrant, a, b = _reduced_angles(np.array([[m]]), *_turns_a_token((theta,)))
    assert abs(a[0, 0]) <= np.pi / 4 and abs(b[0, 0]) < 2.0**-52
    with mpmath.workdps(80):
        rest = m * mpmath.mpf(str(theta)) - quadrant[0, 0] * mpmath.pi / 2
        rest -= mpmath.nint(rest / (2 * mpmath.pi)) * 2 * mpmath.pi
        assert abs(rest - mpmath.mpf(a[0, 0]) - mpmath.mpf(b[0, 0])) < mpmath.mpf(2) ** -103


@pytest.mark.clause("OWN-ROPE5")
def test_pi_is_pi():
    with mpmath.workdps(130):
        assert abs(mpmath.mpf(str(PI)) - mpmath.pi) < mpmath.mpf(10) ** -114


@pytest.mark.clause("OWN-ROPE5", "OWN-ROPE4")
def test_the_attention_factor_is_in_the_float32_table_before_rounding():
    variant = {"kind": "yarn", "factor": 32.0, "original_length": 4096}
    tables = rope_tables(POSITIONS, rotary_dim=2, variant=variant, dtype="float32")
    with mpmath.workdps(60):
        a = 1 + mpmath.log(32) / 10
        expected = [nearest_float32(a * mpmath.cos(int(m))) for m in POSITIONS]
        factor = nearest_float32(a)
    np.testing.assert_array_equal(tables.cosine[:, 0], np.array(expected, np.float32))
    assert tables.attention_factor == factor


@pytest.mark.clause("OWN-ROPE3")
def test_tables_of_no_positions_are_empty():
    tables = rope_tables(np.zeros((2, 0), np.int64), rotary_dim=6)
    assert tables.cosine.shape == tables.sine.shape == (2, 0, 3)


@pytest.mark.clause("OWN-ROPE3", "OWN-ROPE5")
@given(m=st.integers(-(2**32) + 1, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_cosine_is_even_and_sine_is_odd_in_the_position(m):
    here, there = (rope_tables(np.array([s * m]), rotary_dim=10) for s in (1, -1))
    np.testing.assert_array_equal(here.cosine, there.cosine)
    np.testing.assert_array_equal(here.sine, -there.sine)
