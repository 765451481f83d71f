"""Frequencies of the paper and of every variant, against formulas in mpmath written here."""

import mpmath
import numpy as np
import pytest

from refattn.checks import OptionError
from refattn.rope import rope
from refattn.rope_frequencies import rope_frequencies

LLAMA3 = {
    "kind": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_length": 8192,
}
YARN = {"kind": "yarn", "factor": 40.0, "original_length": 4096}
LONGROPE = {
    "kind": "longrope",
    "short_factor": [1.0, 1.25, 1.5],
    "long_factor": [2.0, 4.5, 64.0],
    "original_length": 4096,
    "factor": 32.0,
}


def floats(d, **options):
    return [float(t) for t in rope_frequencies(d, **options).theta]


def factor(d, **options):
    return float(rope_frequencies(d, **options).attention_factor)


def paper(d, base=10000.0):
    with mpmath.workdps(50):
        return [mpmath.mpf(base) ** (mpmath.mpf(-2 * i) / d) for i in range(d // 2)]


@pytest.mark.clause("ROPE-EQ15")
def test_frequencies_of_eight_features_by_hand():
    assert floats(8) == [1.0, 0.1, 0.01, 0.001]
    assert floats(8, variant={"kind": "default"}) == [1.0, 0.1, 0.01, 0.001]
    assert floats(4, base=4.0) == [1.0, 0.5]
    assert factor(8) == 1.0


@pytest.mark.clause("ROPE-EQ15", "OWN-ROPE5")
@pytest.mark.parametrize(("d", "base"), [(128, 10000.0), (34, 500000.0), (6, 0.3)])
def test_frequencies_are_right_to_eighty_digits(d, base):
    with mpmath.workdps(110):
        for i, theta in enumerate(rope_frequencies(d, base=base).theta):
            exact = mpmath.mpf(base) ** (mpmath.mpf(-2 * i) / d)
            assert abs(mpmath.mpf(str(theta)) / exact - 1) < mpmath.mpf(10) ** -80


@pytest.mark.clause("OWN-ROPE4")
def test_linear_divides_every_frequency_by_hand():
    assert floats(4, variant={"kind": "linear", "factor": 8}) == [0.125, 0.00125]


@pytest.mark.clause("OWN-ROPE4")
def test_linear_is_rotation_by_positions_divided_by_the_factor():
    x, m = np.random.default_rng(0).normal(size=(5, 6)), np.arange(5)
    stretched = rope(x, 4 * m, variant={"kind": "linear", "factor": 4.0}).output
    np.testing.assert_allclose(stretched, rope(x, m).output, rtol=0, atol=1e-15)


@pytest.mark.clause("OWN-ROPE4")
def test_dynamic_raises_the_base_beyond_the_original_length():
    variant = {"kind": "dynamic", "factor": 2.0, "original_length": 1000}
    for length in (None, 1, 1000):
        given = variant if length is None else {**variant, "length": length}
        assert floats(6, variant=given) == [float(t) for t in paper(6)]
    with mpmath.workdps(50):  # f L/L₀ - (f - 1) = 2 · 3 - 1 = 5, and d/(d - 2) = 3/2
        expected = [float(t) for t in paper(6, mpmath.mpf(10000) * 5 ** mpmath.mpf("1.5"))]
    assert floats(6, variant={**variant, "length": 3000}) == expected


@pytest.mark.clause("OWN-ROPE4")
@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_keeps_fast_frequencies_and_divides_slow_ones(truncate):
    d = 64
    with mpmath.workdps(50):
        pairs = [
            d * mpmath.log(4096 / (2 * mpmath.pi * beta)) / (2 * mpmath.log(10000))
            for beta in (32, 1)
        ]
        low, high = (mpmath.floor(pairs[0]), mpmath.ceil(pairs[1])) if truncate else pairs
        assert 0 < low < high < d // 2
        expected = []
        for i, theta in enumerate(paper(d)):
            share = min(max((i - low) / (high - low), mpmath.mpf(0)), mpmath.mpf(1))
            expected.append(float(theta * (1 - share) + theta / 40 * share))
    result = floats(d, variant={**YARN, "truncate": truncate})
    assert result == expected
    assert result[: int(low) + 1] == [float(t) for t in paper(d)][: int(low) + 1]
    np.testing.assert_allclose(
        result[int(high) + 1 :], [float(t / 40) for t in paper(d)][int(high) + 1 :], rtol=1e-15
    )


@pytest.mark.clause("OWN-ROPE4")
def test_yarns_ramp_is_a_step_where_its_ends_fall_together():
    # 2π·β = L₀ at pair 0, and both betas there: every later pair is divided.
    variant = {"kind": "yarn", "factor": 2.0, "original_length": 6, "beta_fast": 1.0}
    with pytest.raises(OptionError, match="ramp starts at pair 0, but ends at pair"):
        floats(8, variant={**variant, "truncate": False})
    assert floats(8, variant=variant) == [1.0, 0.05, 0.005, 0.0005]


@pytest.mark.clause("OWN-ROPE4")
def test_yarns_ramp_may_end_beyond_the_last_pair_but_not_beyond_the_last_feature():
    for length, high in ((10**6, 6), (10**12, 7)):  # ρ(1) = 5.2 and 11.2, of 8 features
        variant = {"kind": "yarn", "factor": 2, "original_length": length, "beta_fast": 1e5}
        with mpmath.workdps(50):
            turns = length / (2 * mpmath.pi * 10**5)
            low = mpmath.floor(8 * mpmath.log(turns) / (2 * mpmath.log(10**4)))
            share = [max((i - low) / (high - low), mpmath.mpf(0)) for i in range(4)]
            pairs = zip(paper(8), share, strict=True)
            expected = [float(theta * (1 - s) + theta / 2 * s) for theta, s in pairs]
        assert floats(8, variant=variant) == expected
    assert expected == [float(theta) for theta in paper(8)]  # the ramp starts at pair 6


@pytest.mark.clause("OWN-ROPE4")
def test_yarns_attention_factor():
    assert factor(8, base=100.0, variant=YARN) == float(1 + mpmath.log(40) / 10)
    assert factor(8, base=100.0, variant={**YARN, "factor": 0.5}) == 1.0
    assert factor(8, base=100.0, variant={**YARN, "attention_factor": 0.75}) == 0.75
    both = {**YARN, "mscale": 0.5, "mscale_all_dim": 2.0}
    ratio = (1 + 0.05 * mpmath.log(40)) / (1 + 0.2 * mpmath.log(40))
    assert factor(8, base=100.0, variant=both) == pytest.approx(float(ratio), rel=1e-15)
    zero = {**YARN, "mscale": 0.5, "mscale_all_dim": 0.0}
    assert factor(8, base=100.0, variant=zero) == float(1 + mpmath.log(40) / 10)


@pytest.mark.clause("OWN-ROPE4", "OWN-ROPE2")
def test_the_attention_factor_multiplies_scores_by_its_square_and_not_what_passes():
    x, m = np.random.default_rng(0).normal(size=(2, 5, 10)), np.arange(5)
    plain = {"kind": "yarn", "factor": 4.0, "original_length": 512, "attention_factor": 1.0}
    one, double = (
        rope(x, m, rotary_dim=6, variant={**plain, "attention_factor": a}).output for a in (1, 2)
    )
    np.testing.assert_array_equal(double[..., :6], 2 * one[..., :6])
    np.testing.assert_array_equal(double[..., 6:], x[..., 6:])


@pytest.mark.clause("OWN-ROPE4")
def test_longrope_divides_by_the_factors_of_short_or_of_long_texts():
    theta = paper(6)
    for length, factors in ((None, "short"), (4096, "short"), (4097, "long")):
        given = LONGROPE if length is None else {**LONGROPE, "length": length}
        divisors = LONGROPE[f"{factors}_factor"]
        expected = [float(t / f) for t, f in zip(theta, divisors, strict=True)]
        assert floats(6, variant=given) == expected


@pytest.mark.clause("OWN-ROPE4")
def test_longropes_attention_factor():
    with mpmath.workdps(50):  # ln 32 / ln 4096 = 5/12
        assert factor(6, variant=LONGROPE) == float(mpmath.sqrt(mpmath.mpf(17) / 12))
    assert factor(6, variant={**LONGROPE, "factor": 1.0}) == 1.0
    assert factor(6, variant={**LONGROPE, "attention_factor": 1.5}) == 1.5


@pytest.mark.clause("OWN-ROPE4")
def test_llama3_keeps_short_waves_divides_long_ones_and_blends_between():
    d, kept, divided, blended = 128, 0, 0, 0
    result = floats(d, base=500000.0, variant=LLAMA3)
    for value, theta in zip(result, paper(d, 500000.0), strict=True):
        wave = 2 * mpmath.pi / theta
        if wave < 2048:
            kept += 1
            assert value == float(theta)
        elif wave > 8192:
            divided += 1
            assert value == float(theta / 8)
        else:
            blended += 1
            smooth = (8192 / wave - 1) / 3
            expected = (1 - smooth) * theta / 8 + smooth * theta
            assert value == pytest.approx(float(expected), rel=1e-14)
    assert min(kept, divided, blended) > 3


@pytest.mark.clause("OWN-ROPE4", "OWN-ROPE2")
@pytest.mark.parametrize(("share", "count"), [(0, 0), (0.25, 2), (0.7, 7), (0.99, 9), (1.0, 10)])
def test_proportional_turns_a_share_of_the_pairs(share, count):
    variant = {"kind": "proportional", "partial_rotary_factor": share, "factor": 2.0}
    expected = [float(t / 2) for t in paper(20)][:count] + [0.0] * (10 - count)
    assert floats(20, variant=variant) == expected
    assert floats(20, variant={"kind": "proportional"}) == [float(t) for t in paper(20)]


@pytest.mark.clause("OWN-ROPE4")
def test_a_factor_of_one_leaves_the_paper():
    lists = {"short_factor": [1] * 4, "long_factor": [1] * 4, "length": 9999}
    for variant in (
        {"kind": "linear", "factor": 1},
        {**YARN, "factor": 1},
        {**LLAMA3, "factor": 1},
        {**LONGROPE, "factor": 1, **lists},
    ):
        result = rope_frequencies(8, base=100.0, variant=variant)
        paper_values = [float(t) for t in paper(8, 100.0)]
        np.testing.assert_allclose([float(t) for t in result.theta], paper_values, rtol=1e-15)
        assert result.attention_factor == 1


REFUSED = {
    "kind": ({"kind": "ntk"}, "variant's kind is 'ntk', but it must be one of default, linear"),
    "no kind": ({"factor": 2.0}, "variant's kind is None, but"),
    "missing": ({"kind": "linear"}, "variant linear lacks factor, but it needs"),
    "unknown": ({"kind": "linear", "factor": 2, "beta": 1}, "has beta, but it takes only factor"),
    "none": ({"kind": "default", "factor": 2}, "has factor, but it takes only no numbers"),
    "zero": ({"kind": "linear", "factor": 0}, "factor 0, but it must be finite and above zero"),
    "nan": ({"kind": "linear", "factor": np.nan}, "factor nan, but it must be finite"),
    "text": ({"kind": "linear", "factor": "8"}, "factor '8', but it must be finite"),
    "bool": ({"kind": "linear", "factor": True}, "factor True, but it must be finite"),
    "length": ({**YARN, "original_length": 4096.0}, "4096.0, but it must be an integer"),
    "truncate": ({**YARN, "truncate": 1}, "truncate 1, but it must be true or false"),
    "mscale": ({**YARN, "mscale": -1.0}, "mscale -1.0, but it must be finite and not negative"),
    "betas": ({**YARN, "beta_fast": 0.5}, "beta_fast 0.5, but beta_slow 1; the first must"),
    "ramp": (
        {**YARN, "original_length": 1, "beta_fast": 3000, "beta_slow": 2000},
        "ramp starts at pair 0, but ends at pair -3",
    ),
    "bands": ({**LLAMA3, "high_freq_factor": 1}, "low_freq_factor 1, but high_freq_factor 1"),
    "entries": ({**LONGROPE, "short_factor": [1.0]}, "short_factor of 1 entries, but rotary_dim 6"),
    "no list": ({**LONGROPE, "long_factor": 2.0}, "long_factor of no entries, but rotary_dim 6"),
    "entry": ({**LONGROPE, "long_factor": [1, 0, 1]}, "entry of long_factor 0, but it must be"),
    "alone": (
        {k: v for k, v in LONGROPE.items() if k != "factor"},
        "neither factor nor attention_factor",
    ),
    "logarithm": ({**LONGROPE, "original_length": 1}, "original_length 1, but its logarithm"),
    "share": (
        {"kind": "proportional", "partial_rotary_factor": 1.5},
        "partial_rotary_factor 1.5, but it must be from 0 to 1",
    ),
}


@pytest.mark.clause("OWN-ROPE4")
@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_variant_is_refused_with_both_sides(name):
    variant, sentence = REFUSED[name]
    with pytest.raises(OptionError, match=sentence):
        rope_frequencies(6, variant=variant)


@pytest.mark.clause("OWN-ROPE4")
def test_dynamic_and_yarn_refuse_what_their_formulas_divide_by():
    dynamic = {"kind": "dynamic", "factor": 2.0, "original_length": 8}
    with pytest.raises(OptionError, match="rotary_dim is 2, but variant dynamic needs"):
        rope_frequencies(2, variant=dynamic)
    with pytest.raises(OptionError, match="base is 1, but yarn needs one above 1"):
        rope_frequencies(8, base=1.0, variant=YARN)
