"""The product of rotated features as a complex sum, summed by parts, and its bound."""

import array_api_strict
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refattn.checks import DtypeError, OptionError, ShapeError
from refattn.rope_decay import (
    abel_scores,
    complex_scores,
    complex_scores_backward,
    phase_sums,
    rope_decay,
    score_bound,
)

DISTANCES = np.array([0, 1, -1, 17, 250, 131071])


def features(k=6, d=10, seed=0):
    return np.random.default_rng(seed).normal(size=(k, d))


def turned(x, positions):
    """Pairs of features times e^{imθ}, as complex numbers, by NumPy."""
    d = x.shape[-1]
    theta = 10000.0 ** (-np.arange(0, d, 2) / d)
    return (x[:, 0::2] + 1j * x[:, 1::2]) * np.exp(1j * positions[:, None] * theta)


@pytest.mark.clause("ROPE-EQ35")
def test_the_complex_sum_is_the_product_of_rotated_features():
    q, k = features(), features(seed=1)
    m, n = np.array([3, 1, 4, 1, 5, 900]), np.array([2, 7, 1, 8, 2, 8])
    z_q, z_k = turned(q, m), turned(k, n)
    product = np.sum(z_q.real * z_k.real + z_q.imag * z_k.imag, axis=-1)
    np.testing.assert_allclose(complex_scores(q, k, m - n), product, rtol=0, atol=1e-12)


@pytest.mark.clause("ROPE-EQ35", "ROPE-EQ36")
def test_four_features_at_distance_one_by_hand():
    # h_0 = (1 + 2i)(3 - 4i)* and h_1 = (5)(6i)*, phases e^{i} and e^{0.01 i}.
    q, k = np.array([[1.0, 2.0, 5.0, 0.0]]), np.array([[3.0, -4.0, 0.0, 6.0]])
    h = [(1 + 2j) * (3 + 4j), 5 * (-6j)]
    expected = (h[0] * np.exp(1j) + h[1] * np.exp(0.01j)).real
    for scores in (complex_scores, abel_scores):
        np.testing.assert_allclose(scores(q, k, np.array([1])), [expected], rtol=1e-14)


@pytest.mark.clause("ROPE-EQ36")
@given(s=st.integers(-(2**31), 2**31), d=st.sampled_from([2, 6, 34]), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_summation_by_parts_changes_nothing(s, d, seed):
    q, k, distances = features(1, d, seed), features(1, d, seed + 1), np.array([s])
    direct = complex_scores(q, k, distances)
    np.testing.assert_allclose(abel_scores(q, k, distances), direct, rtol=0, atol=1e-12)


@pytest.mark.clause("ROPE-EQ37")
@given(s=st.integers(-(2**31), 2**31), d=st.sampled_from([2, 6, 34]), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_no_score_exceeds_the_bound(s, d, seed):
    q, k, distances = features(1, d, seed), features(1, d, seed + 1), np.array([s])
    score, bound = complex_scores(q, k, distances), score_bound(q, k, distances)
    assert np.all(np.abs(score) <= bound * (1 + 1e-14))


@pytest.mark.clause("ROPE-EQ37")
def test_the_bound_is_reached_with_one_pair():
    # d = 2: h_1 = 0 and |S_1| = 1, so the bound is |h_0|; at distance 0 with q = k it is met.
    q = np.array([[3.0, 4.0]])
    assert score_bound(q, q, np.array([0])) == complex_scores(q, q, np.array([0])) == 25.0


@pytest.mark.clause("ROPE-EQ35")
def test_gradients_of_the_complex_sum_match_central_differences():
    q, k, ds = features(), features(seed=1), features(1, 6, seed=2)[0]
    for which, gradient in enumerate(complex_scores_backward(ds, q, k, DISTANCES)):
        direction = features(seed=10 + which)
        losses = []
        for side in (1, -1):
            moved = [q, k]
            moved[which] = moved[which] + side * direction
            losses.append(np.sum(ds * complex_scores(*moved, DISTANCES)))
        difference = (losses[0] - losses[1]) / 2  # exact: the sum is bilinear
        np.testing.assert_allclose(np.sum(gradient * direction), difference, rtol=1e-12)


@pytest.mark.clause("ROPE-EQ37")
@pytest.mark.parametrize(("d", "base"), [(2, 10000.0), (10, 10000.0), (128, 500000.0)])
def test_decay_is_the_mean_magnitude_of_the_phase_sums(d, base):
    with mpmath.workdps(40):
        expected = []
        for s in DISTANCES:
            total, mean = mpmath.mpc(0), mpmath.mpf(0)
            for j in range(d // 2):
                total += mpmath.expjpi(
                    int(s) * mpmath.mpf(base) ** (mpmath.mpf(-2 * j) / d) / mpmath.pi
                )
                mean += abs(total) / (d // 2)
            expected.append(float(mean))
    np.testing.assert_allclose(rope_decay(DISTANCES, d=d, base=base), expected, rtol=1e-13)


@pytest.mark.clause("ROPE-EQ37")
def test_decay_at_distance_zero_by_hand_and_its_symmetry():
    assert rope_decay(np.array([0]), d=128) == 32.5  # (64 + 1)/2
    there, back = rope_decay(np.array([7]), d=128), rope_decay(np.array([-7]), d=128)
    np.testing.assert_allclose(there, back, rtol=1e-15)


@pytest.mark.clause("ROPE-EQ37")
def test_decay_falls_as_figure_2_shows():
    decay = rope_decay(np.arange(0, 251), d=128)
    assert np.all(np.diff(decay[:5]) < 0)
    assert decay[0] > 2 * decay[50] > 2 * decay[250]
    assert not np.all(np.diff(decay) < 0)  # it falls, but not from step to step


@pytest.mark.clause("ROPE-EQ36")
def test_phase_sums_by_hand():
    S = phase_sums(np.array([0, 1]), d=4)
    np.testing.assert_array_equal(S[0], [1, 2])
    np.testing.assert_allclose(S[1], [np.exp(1j), np.exp(1j) + np.exp(0.01j)], rtol=1e-15)
    assert phase_sums(np.array([1]), d=4, dtype="float32").dtype == np.complex64


def calls(xp):
    q, k, s = (xp.asarray(a) for a in (features(), features(seed=1), DISTANCES))
    return {
        "scores": (complex_scores(q, k, s), abel_scores(q, k, s), score_bound(q, k, s)),
        "backward": complex_scores_backward(xp.ones(6), q, k, s),
        "sums": (rope_decay(s, d=6), phase_sums(s, d=6, dtype="float32")),
        "float32": (complex_scores(xp.astype(q, xp.float32), xp.astype(k, xp.float32), s),),
    }


@pytest.mark.clause("ROPE-EQ35", "ROPE-EQ36", "ROPE-EQ37")
@pytest.mark.parametrize("name", calls(np))
def test_only_functions_of_the_array_standard_are_used(name):
    for strict, plain in zip(calls(array_api_strict)[name], calls(np)[name], strict=True):
        assert strict.dtype == getattr(array_api_strict, str(plain.dtype))
        np.testing.assert_allclose(np.asarray(strict), plain, rtol=1e-6, atol=1e-6)


Q, S = np.ones((3, 4)), np.arange(3)
REFUSED = {
    "odd": (lambda: complex_scores(Q[:, :3], Q[:, :3], S), OptionError, "query has d=3, but"),
    "rows": (lambda: abel_scores(Q, Q[:2], S), ShapeError, "key has k=2, but query has k=3"),
    "distances": (lambda: score_bound(Q, Q, S[:2]), ShapeError, "distances has k=2, but"),
    "float": (lambda: rope_decay(S * 0.5, d=4), DtypeError, "dtype float64, but they must be"),
    "odd d": (lambda: rope_decay(S, d=5), OptionError, "rotary_dim is 5, but it must be even"),
    "dtypes": (
        lambda: complex_scores(Q, Q.astype(np.float32), S),
        DtypeError,
        "key has dtype float32, but query has dtype float64",
    ),
}


@pytest.mark.clause("ROPE-EQ35", "ROPE-EQ36", "ROPE-EQ37")
@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_with_both_sides(name):
    call, error, sentence = REFUSED[name]
    with pytest.raises(error, match=sentence):
        call()
