"""Linear biases: slopes, distances, the bias in attention."""

from decimal import Decimal, localcontext
from itertools import pairwise
from math import sqrt

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from directional import check_gradients
from refattn.alibi import alibi_bias, alibi_bias_backward, alibi_slopes, distances
from refattn.attention import attention
from refattn.attention_backward import attention_backward
from refattn.checks import DtypeError, OptionError, ShapeError


def _exponents(heads):
    """-log2 of the slopes as numerator and denominator, by recursion as the authors' rule reads."""
    closest = 1
    while closest * 2 <= heads:
        closest *= 2
    if closest == heads:
        return [(8 * h, heads) for h in range(1, heads + 1)]
    return _exponents(closest) + _exponents(2 * closest)[0::2][: heads - closest]


def _rounded_powers(exponents):
    """2^-(p/q), correctly rounded by way of sixty decimal digits."""
    with localcontext() as context:
        context.prec = 60
        return [float(Decimal(2) ** (-Decimal(p) / Decimal(q))) for p, q in exponents]


@pytest.mark.clause("ALIBI-S3b")
def test_eight_heads_have_the_printed_slopes():
    printed = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert alibi_slopes(8).tolist() == printed


@pytest.mark.clause("ALIBI-S3b")
def test_sixteen_heads_have_the_printed_slopes():
    root = sqrt(0.5)  # the square root is correctly rounded, and halving is exact
    printed = [x for k in range(8) for x in (root / 2**k, 0.5 / 2**k)]
    assert alibi_slopes(16).tolist() == printed


@pytest.mark.clause("ALIBI-S3b")
def test_the_slopes_of_sixteen_heads_are_geometric_means_of_those_of_eight():
    eight, sixteen = alibi_slopes(8), alibi_slopes(16)
    np.testing.assert_array_equal(sixteen[1::2], eight)
    np.testing.assert_allclose(sixteen[2::2], np.sqrt(eight[:-1] * eight[1:]), rtol=2e-16)


@pytest.mark.clause("ALIBI-S3c")
def test_twelve_heads_have_the_slopes_of_the_authors_rule():
    first_eight = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]
    every_other_of_sixteen = [sqrt(0.5), sqrt(0.5) / 2, sqrt(0.5) / 4, sqrt(0.5) / 8]
    assert alibi_slopes(12).tolist() == first_eight + every_other_of_sixteen


@pytest.mark.clause("ALIBI-S3c")
def test_three_heads_by_hand():
    assert alibi_slopes(3).tolist() == [2.0**-4, 2.0**-8, 2.0**-2]
    assert alibi_slopes(1).tolist() == [2.0**-8]


@pytest.mark.clause("ALIBI-S3b", "ALIBI-S3c")
@pytest.mark.parametrize("heads", range(1, 65))
def test_every_slope_is_the_correctly_rounded_power(heads):
    assert alibi_slopes(heads).tolist() == _rounded_powers(_exponents(heads))
    geometric = [(8 * h, heads) for h in range(1, heads + 1)]
    assert alibi_slopes(heads, slope_rule="geometric").tolist() == _rounded_powers(geometric)


@pytest.mark.clause("ALIBI-S3b")
@pytest.mark.parametrize("heads", [2, 4, 8, 16, 32, 64, 128])
def test_a_power_of_two_gives_a_geometric_sequence_that_ends_at_one_256th(heads):
    slopes = alibi_slopes(heads)
    np.testing.assert_allclose(slopes[1:] / slopes[:-1], slopes[0], rtol=4e-16)
    assert slopes[-1] == 2.0**-8
    np.testing.assert_array_equal(slopes, alibi_slopes(heads, slope_rule="geometric"))


@pytest.mark.clause("ALIBI-S3c")
@given(st.integers(1, 200))
def test_other_numbers_of_heads_lie_between_two_powers_of_two(heads):
    closest = 2 ** (heads.bit_length() - 1)
    slopes, below, above = (set(alibi_slopes(n).tolist()) for n in (heads, closest, 2 * closest))
    assert below <= slopes <= above
    assert len(slopes) == heads
    ordered = sorted(alibi_slopes(heads)[closest:].tolist(), reverse=True)
    assert ordered == alibi_slopes(heads)[closest:].tolist()


@pytest.mark.clause("ALIBI-S3c")
def test_the_two_rules_differ_by_up_to_a_factor_of_45_for_twelve_heads():
    ratio = alibi_slopes(12) / alibi_slopes(12, slope_rule="geometric")
    assert max(ratio) == pytest.approx(2**5.5)  # head 9: 2^-0.5 against 2^-6


@pytest.mark.clause("OWN-ALIBI1")
def test_the_three_distance_forms_by_hand():
    shape = {"n_q": 2, "n_k": 4, "offset": 1}
    assert distances(**shape).tolist() == [[-1, 0, -1, -2], [-2, -1, 0, -1]]
    assert distances(**shape, distance="signed").tolist() == [[-1, 0, 1, 2], [-2, -1, 0, 1]]
    assert distances(**shape, distance="column").tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]


@pytest.mark.clause("ALIBI-S3a")
def test_the_bias_of_a_causal_row_is_the_printed_vector():
    bias = alibi_bias(np.array([0.5, 0.125]), 3, 3)
    assert bias[0, 2].tolist() == [-1.0, -0.5, 0.0]  # m [-(i - 1), ..., -1, 0] for i = 3
    assert bias[1, 1, :2].tolist() == [-0.125, 0.0]
    assert bias.shape == (2, 3, 3)


@pytest.mark.clause("OWN-ALIBI1", "OWN-CAUSAL1")
def test_alignment_moves_the_queries():
    m = np.array([1.0])
    assert alibi_bias(m, 2, 5).tolist() == [[[0, -1, -2, -3, -4], [-1, 0, -1, -2, -3]]]
    expected = [[[-3, -2, -1, 0, -1], [-4, -3, -2, -1, 0]]]
    assert alibi_bias(m, 2, 5, alignment="bottom_right").tolist() == expected
    assert alibi_bias(m, 2, 5, alignment=3).tolist() == expected
    items = alibi_bias(m, 2, 5, alignment=[0, 3])
    assert items.shape == (2, 1, 2, 5)
    assert items[1].tolist() == expected
    assert items[0].tolist() == alibi_bias(m, 2, 5).tolist()


B, H, N_Q, N_K, D = 2, 3, 5, 7, 11


def _problem(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"query": (B, H, N_Q, D), "key": (B, H, N_K, D), "value": (B, H, N_K, 2)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def _softmax(S):
    e = np.exp(S - S.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.clause("ALIBI-FN10", "ALIBI-S3a")
def test_the_bias_is_added_after_the_scale_and_is_not_scaled():
    arrays, slopes = _problem(), alibi_slopes(H)
    D_ij = -abs(np.arange(N_Q)[:, None] - np.arange(N_K)[None, :])
    product, bias = arrays["query"] @ arrays["key"].swapaxes(-1, -2), slopes[:, None, None] * D_ij
    actual = attention(**arrays, slopes=slopes).output
    right = _softmax(product / sqrt(D) + bias) @ arrays["value"]
    wrong = _softmax((product + bias) / sqrt(D)) @ arrays["value"]
    np.testing.assert_allclose(actual, right, rtol=1e-12)
    assert abs(actual - wrong).max() > 1e-3


@pytest.mark.clause("ALIBI-S3a", "OWN-BIAS1")
def test_slopes_are_the_same_as_their_bias():
    arrays, slopes = _problem(1), alibi_slopes(H)
    options = {"alignment": "bottom_right", "causal": True}
    bias = alibi_bias(slopes, N_Q, N_K, alignment="bottom_right")
    by_slopes = attention(**arrays, slopes=slopes, **options)
    by_bias = attention(**arrays, bias=bias[None], **options)
    np.testing.assert_array_equal(by_slopes.output, by_bias.output)
    np.testing.assert_array_equal(by_slopes.logsumexp, by_bias.logsumexp)


@pytest.mark.clause("OWN-ALIBI1")
def test_under_a_causal_mask_the_forms_differ_in_the_logsumexp_only():
    arrays, slopes, offset = _problem(2), alibi_slopes(H), 2
    options = {"slopes": slopes, "causal": True, "alignment": offset}
    absolute, signed, column = (
        attention(**arrays, distance=form, **options) for form in ("absolute", "signed", "column")
    )
    np.testing.assert_array_equal(signed.output, absolute.output)
    np.testing.assert_allclose(column.output, absolute.output, rtol=1e-12)
    shift = slopes[:, None] * (np.arange(N_Q) + offset)
    np.testing.assert_allclose(column.logsumexp - absolute.logsumexp, [shift] * B, rtol=1e-9)


@pytest.mark.clause("OWN-ALIBI1")
def test_without_a_causal_mask_the_absolute_form_stands_apart():
    arrays, slopes = _problem(3), alibi_slopes(H)
    absolute, signed, column = (
        attention(**arrays, slopes=slopes, distance=form).output
        for form in ("absolute", "signed", "column")
    )
    np.testing.assert_allclose(column, signed, rtol=1e-12)
    assert abs(absolute - signed).max() > 1e-2


@pytest.mark.clause("ALIBI-S3a", "OWN-ALIBI1")
@pytest.mark.parametrize("distance", ["absolute", "signed", "column"])
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right", -1, [0, 4]])
def test_the_gradient_of_the_slopes_matches_central_differences(distance, alignment):
    rng = np.random.default_rng(4)
    options = {"alignment": alignment, "distance": distance}
    m = rng.normal(size=H)
    d_bias = rng.normal(size=alibi_bias(m, N_Q, N_K, **options).shape)
    check_gradients(
        lambda a: float((alibi_bias(a["m"], N_Q, N_K, **options) * d_bias).sum()),
        {"m": m},
        {"m": alibi_bias_backward(d_bias, **options)},
    )


@pytest.mark.clause("ALIBI-S3a", "OWN-BACKWARD1")
def test_the_gradient_of_attention_with_slopes_is_that_of_its_bias():
    arrays, slopes = _problem(5), alibi_slopes(H)
    d_output = np.random.default_rng(6).normal(size=(B, H, N_Q, 2))
    bias = np.broadcast_to(alibi_bias(slopes, N_Q, N_K), (B, H, N_Q, N_K)).copy()
    d_bias = attention_backward(d_output, **arrays, bias=bias).d_bias
    d_slopes = attention_backward(d_output, **arrays, slopes=slopes).d_slopes
    np.testing.assert_allclose(alibi_bias_backward(d_bias), d_slopes, rtol=1e-12)


@pytest.mark.clause("OWN-ALIBI1", "ALIBI-S3b")
def test_only_standard_functions_are_used():
    xp = array_api_strict
    slopes = alibi_slopes(H, xp=xp)
    assert np.asarray(slopes).tolist() == alibi_slopes(H).tolist()
    for options in ({"distance": "column"}, {"alignment": [0, 3]}, {"distance": "signed"}):
        bias = alibi_bias(slopes, N_Q, N_K, **options)
        expected = alibi_bias(alibi_slopes(H), N_Q, N_K, **options)
        np.testing.assert_array_equal(np.asarray(bias), expected)
        d_slopes = alibi_bias_backward(bias, **options)
        np.testing.assert_array_equal(
            np.asarray(d_slopes), alibi_bias_backward(expected, **options)
        )


@pytest.mark.clause("OWN-ROUND1", "OWN-ALIBI1")
def test_distances_that_a_narrow_dtype_does_not_hold_are_exact():
    m = np.array([0.70703125], dtype=ml_dtypes.bfloat16)
    bias = alibi_bias(m, 1, 302)
    assert bias.dtype == ml_dtypes.bfloat16
    # 0.70703125 * 301 = 212.81640625, which bfloat16 rounds to 213; 301 alone would become 300
    assert float(bias[0, 0, 301]) == -213.0
    many = np.full((1, 1, 4099), 1.0, dtype=np.float16)
    # 0 + 1 + ... + 4098 = 8398851 is beyond float16: the sum is taken in float32 and then rounds
    assert alibi_bias_backward(many)[0] == -np.inf
    assert alibi_bias_backward(many[..., :256])[0] == np.float16(-32640.0)
    # 0 + 1 + ... + 299 = 44850, whose nearest bfloat16 is 44800; a bfloat16 sum stops far below
    brain = np.ones((1, 1, 300), dtype=ml_dtypes.bfloat16)
    assert float(alibi_bias_backward(brain)[0]) == -44800.0


@pytest.mark.clause("ALIBI-S3c")
@pytest.mark.parametrize(
    ("heads", "rule"),
    [(0, "authors"), (-3, "authors"), (8.0, "authors"), (8, "press")],
)
def test_slopes_refuse_bad_options(heads, rule):
    with pytest.raises(OptionError, match=r", but it must be .*\[alibi_slopes\]$"):
        alibi_slopes(heads, slope_rule=rule)


@pytest.mark.clause("OWN-ALIBI1")
def test_bias_refuses_what_does_not_fit():
    m = np.array([0.5])
    with pytest.raises(OptionError, match="n_q is -1, but it must be an integer of at least 0"):
        alibi_bias(m, -1, 3)
    with pytest.raises(OptionError, match="distance is 'manhattan', but it must be one of"):
        alibi_bias(m, 2, 3, distance="manhattan")
    with pytest.raises(OptionError, match="alignment is 'middle'"):
        alibi_bias(m, 2, 3, alignment="middle")
    with pytest.raises(ShapeError, match="slopes has 2 axes"):
        alibi_bias(m[None], 2, 3)
    with pytest.raises(DtypeError, match="slopes has dtype int64"):
        alibi_bias(np.array([1]), 2, 3)
    with pytest.raises(ShapeError, match="alignment has 3 offsets, but d_bias has shape"):
        alibi_bias_backward(np.ones((2, 1, 2, 3)), alignment=[0, 1, 2])


@pytest.mark.clause("ALIBI-S3b")
def test_slopes_fall_from_head_to_head():
    assert all(a > b for a, b in pairwise(alibi_slopes(64).tolist()))
