"""Rotation of features by tables, by rope, and by the paper's other forms."""

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refattn.checks import DtypeError, OptionError, ShapeError
from refattn.rope import rope, rope_backward, rotate
from refattn.rope_forms import rope_by_matrix, rotate_complex, rotate_plane, rotation_matrix

PAIRINGS = ("interleaved", "half_split")
COS_1, SIN_1 = 0.5403023058681398, 0.8414709848078965
COS_001, SIN_001 = 0.9999500004166653, 0.009999833334166664
INTEGERS = st.integers(1 - 2**31, 2**31 - 1)


def features(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def plain_rotation(x, positions, *, r, pairing, base=10000.0):
    """The same by loops over scalars in float64, good for small positions."""
    y = x.copy()
    for n, m in enumerate(positions):
        for i in range(r // 2):
            angle = m * base ** (-2 * i / r)
            first, second = (2 * i, 2 * i + 1) if pairing == "interleaved" else (i, i + r // 2)
            u, v = x[..., n, first], x[..., n, second]
            y[..., n, first] = u * np.cos(angle) - v * np.sin(angle)
            y[..., n, second] = u * np.sin(angle) + v * np.cos(angle)
    return y


@pytest.mark.clause("ROPE-EQ34", "ROPE-EQ15")
def test_four_features_at_position_one_by_hand():
    x = np.array([[1.0, 0.0, 0.0, 1.0]])
    expected = [[COS_1, SIN_1, -SIN_001, COS_001]]
    result = rope(x, np.array([1]))
    np.testing.assert_allclose(result.output, expected, rtol=0, atol=2e-16)
    np.testing.assert_array_equal(result.frequencies, [1.0, 0.01])
    assert result.attention_factor == 1.0
    np.testing.assert_allclose(result.cosine, [[COS_1, COS_001]], rtol=0, atol=2e-16)
    np.testing.assert_allclose(result.sine, [[SIN_1, SIN_001]], rtol=0, atol=2e-16)


@pytest.mark.clause("OWN-ROPE1")
def test_half_split_pairs_features_half_a_head_apart_by_hand():
    x = np.array([[1.0, 0.0, 0.0, 1.0]])
    expected = [[COS_1, -SIN_001, SIN_1, COS_001]]
    output = rope(x, np.array([1]), pairing="half_split").output
    np.testing.assert_allclose(output, expected, rtol=0, atol=2e-16)


@pytest.mark.clause("ROPE-EQ34", "OWN-ROPE1", "OWN-ROPE2")
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("r", [2, 6, 14])
def test_rope_is_the_plain_rotation_of_each_pair(pairing, r):
    x, m = features(2, 3, 5, 14), np.array([0, 1, 2, 11, -7])
    output = rope(x, m, rotary_dim=r, pairing=pairing).output
    expected = plain_rotation(x, m, r=r, pairing=pairing)
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-14)


@pytest.mark.clause("OWN-ROPE1")
def test_pairings_differ_by_a_permutation_of_features():
    x, m = features(3, 7, 10), np.arange(7) + 1000
    permutation = np.concatenate([np.arange(0, 10, 2), np.arange(1, 10, 2)])
    half = rope(x[..., permutation], m, pairing="half_split").output
    np.testing.assert_array_equal(half, rope(x, m).output[..., permutation])


@pytest.mark.clause("OWN-ROPE2")
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_features_beyond_rotary_dim_pass_bit_for_bit(pairing):
    x = features(2, 5, 13)
    x[0, 0, 6:9] = [np.nan, np.inf, -0.0]
    output = rope(x, np.arange(5) + 3, rotary_dim=6, pairing=pairing).output
    assert output[..., 6:].tobytes() == x[..., 6:].tobytes()
    assert not np.any(output[..., :6] == x[..., :6])


@pytest.mark.clause("OWN-ROPE2")
def test_partial_rotary_divides_exponents_by_rotary_dim_and_proportional_by_all_features():
    x, m = features(3, 12), np.arange(3)
    partial = rope(x, m, rotary_dim=4).frequencies
    whole = rope(x, m, variant={"kind": "proportional", "partial_rotary_factor": 0.34}).frequencies
    np.testing.assert_allclose(partial, [1.0, 0.01], rtol=1e-15)
    np.testing.assert_allclose(whole, [1.0, 10000 ** (-1 / 6), 0, 0, 0, 0], rtol=1e-15)


@pytest.mark.clause("ROPE-EQ15", "ROPE-EQ34")
@given(m=INTEGERS, seed=st.integers(0, 99), pairing=st.sampled_from(PAIRINGS))
@settings(deadline=None, max_examples=40)
def test_rotation_keeps_the_norm_of_every_pair(m, seed, pairing):
    x = features(1, 10, seed=seed)
    y = rope(x, np.array([m]), pairing=pairing).output
    axis = -1 if pairing == "interleaved" else -2
    shape = (5, 2) if pairing == "interleaved" else (2, 5)
    norm = np.linalg.norm(x.reshape(shape), axis=axis)
    np.testing.assert_allclose(np.linalg.norm(y.reshape(shape), axis=axis), norm, rtol=1e-15)


@pytest.mark.clause("ROPE-EQ15", "OWN-ROPE3")
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_position_zero_changes_nothing(pairing):
    x = features(2, 3, 6)
    output = rope(x, np.zeros(3, np.int64), pairing=pairing).output
    np.testing.assert_array_equal(output, x)


@pytest.mark.clause("ROPE-EQ15", "ROPE-EQ34")
@given(m=INTEGERS, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_the_backward_is_the_rotation_by_the_negative_position_and_undoes_it(m, seed):
    x, positions = features(1, 6, seed=seed), np.array([m])
    y = rope(x, positions).output
    np.testing.assert_array_equal(rope_backward(y, positions), rope(y, -positions).output)
    np.testing.assert_allclose(rope_backward(y, positions), x, rtol=0, atol=4e-15)


@pytest.mark.clause("ROPE-EQ34", "OWN-ROPE4")
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_gradient_matches_central_differences(pairing):
    variant = {"kind": "yarn", "factor": 4.0, "original_length": 64}
    options = {"pairing": pairing, "rotary_dim": 6, "variant": variant, "base": 100.0}
    x, direction, weight = features(2, 5, 7), features(2, 5, 7, seed=1), features(2, 5, 7, seed=2)
    m, step = np.array([0, 3, 5, 90, 1000]), 2.0**-10

    def loss(t):
        return np.sum(weight * np.sin(rope(x + t * direction, m, **options).output))

    difference = (loss(step) - loss(-step)) / (2 * step)
    d_output = weight * np.cos(rope(x, m, **options).output)
    gradient = rope_backward(d_output, m, **options)
    np.testing.assert_allclose(np.sum(gradient * direction), difference, rtol=1e-5)


@pytest.mark.clause("OWN-ROPE3")
def test_each_batch_item_may_have_its_own_positions():
    x = features(2, 3, 5, 4)
    m = np.array([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    result = rope(x, m)
    assert result.cosine.shape == (2, 5, 2)
    for item in range(2):
        np.testing.assert_array_equal(result.output[item], rope(x[item], m[item]).output)


@pytest.mark.clause("OWN-ROPE3")
def test_a_cached_key_keeps_the_position_it_was_rotated_at():
    keys = features(2, 9, 6)
    whole = rope(keys, np.arange(9)).output
    cached = rope(keys[:, :7], np.arange(7)).output
    new = rope(keys[:, 7:], np.arange(2) + 7).output
    np.testing.assert_array_equal(np.concatenate([cached, new], axis=1), whole)


@pytest.mark.clause("OWN-ROPE3")
def test_positions_may_be_of_any_integer_dtype_or_a_list():
    x = features(3, 4)
    expected = rope(x, np.array([2, 5, 7])).output
    for positions in ([2, 5, 7], np.array([2, 5, 7], np.uint8), np.array([2, 5, 7], np.int32)):
        np.testing.assert_array_equal(rope(x, positions).output, expected)


@pytest.mark.clause("ROPE-EQ12", "ROPE-EQ13")
def test_the_plane_turns_the_first_axis_towards_the_second_by_hand():
    x = np.array([[1.0, 0.0], [0.0, 1.0]])
    expected = [[COS_1, SIN_1], [-SIN_1, COS_1]]
    for turn in (rotate_complex, rotate_plane):
        output = turn(x, np.array([4, 4]), frequency=0.25)
        np.testing.assert_allclose(output, expected, rtol=0, atol=2e-16)


@pytest.mark.clause("ROPE-EQ12", "ROPE-EQ13")
def test_a_negative_frequency_turns_the_other_way():
    x, m = features(5, 2), np.array([3, -3, 0, 70000, -70000])
    forward = rotate_plane(x, m, frequency=0.7)
    np.testing.assert_array_equal(rotate_plane(x, -m, frequency=-0.7), forward)
    np.testing.assert_array_equal(rotate_plane(x, m, frequency=-0.7)[2], x[2])
    assert np.all(rotate_plane(x, m, frequency=-0.7)[[0, 1, 3, 4]] != forward[[0, 1, 3, 4]])


@pytest.mark.clause("ROPE-EQ12", "ROPE-EQ13")
@given(m=INTEGERS, frequency=st.floats(-4, 4, allow_subnormal=False), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_complex_multiplication_is_rotation_of_the_plane(m, frequency, seed):
    x, positions = features(1, 2, seed=seed), np.array([m])
    by_matrix = rotate_plane(x, positions, frequency=frequency)
    by_complex = rotate_complex(x, positions, frequency=frequency)
    np.testing.assert_allclose(by_complex, by_matrix, rtol=0, atol=2e-15)


@pytest.mark.clause("ROPE-EQ12")
def test_the_complex_score_is_that_of_the_distance_alone():
    q, k, theta = features(1, 2), features(1, 2, seed=1), 0.3
    m, n = 23, 9
    turned_q = rotate_complex(q, np.array([m]), frequency=theta)[0]
    turned_k = rotate_complex(k, np.array([n]), frequency=theta)[0]
    as_complex = [complex(*z[0]) for z in (q, k)]
    g = (as_complex[0] * as_complex[1].conjugate() * np.exp(1j * (m - n) * theta)).real
    np.testing.assert_allclose(turned_q @ turned_k, g, rtol=1e-13)


@pytest.mark.clause("ROPE-EQ15")
def test_the_rotation_matrix_by_hand():
    R = rotation_matrix(np.array([0, 1]), d=4)
    blocks = [[COS_1, -SIN_1, 0, 0], [SIN_1, COS_1, 0, 0]]
    blocks += [[0, 0, COS_001, -SIN_001], [0, 0, SIN_001, COS_001]]
    np.testing.assert_array_equal(R[0], np.eye(4))
    np.testing.assert_allclose(R[1], blocks, rtol=0, atol=2e-16)


@pytest.mark.clause("ROPE-EQ15", "ROPE-EQ16")
@given(m=INTEGERS, n=INTEGERS)
@settings(deadline=None, max_examples=40)
def test_rotations_are_orthogonal_and_compose_to_the_difference(m, n):
    R_m, R_n, R_nm = (rotation_matrix(np.array([p]), d=10)[0] for p in (m, n, n - m))
    np.testing.assert_allclose(R_m.T @ R_m, np.eye(10), rtol=0, atol=5e-16)
    np.testing.assert_allclose(R_m.T @ R_n, R_nm, rtol=0, atol=5e-16)


@pytest.mark.clause("ROPE-EQ14", "ROPE-EQ34")
def test_the_matrix_form_and_the_elementwise_form_agree():
    x, m = features(2, 3, 5, 14), np.array([0, 1, 131071, -5, 2**32 - 1])
    output = rope_by_matrix(x, m, base=777.0)
    np.testing.assert_allclose(output, rope(x, m, base=777.0).output, rtol=0, atol=1e-15)


@pytest.mark.clause("ROPE-EQ34")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_sixteen_bit_features_are_rounded_once(dtype):
    x, m = features(3, 7, 12).astype(dtype), np.arange(7)
    result = rope(x, m)
    assert result.output.dtype == dtype
    assert result.cosine.dtype == result.sine.dtype == result.frequencies.dtype == np.float32
    exact = plain_rotation(x.astype(np.float64), m, r=12, pairing="interleaved")
    rounded = exact.astype(dtype).astype(np.float64)
    unit = float(ml_dtypes.finfo(dtype).eps) * np.abs(exact)
    error = np.abs(result.output.astype(np.float64) - exact)
    assert np.all(error <= unit / 2 * 1.01 + 1e-7)
    assert np.mean(result.output.astype(np.float64) == rounded) > 0.99


@pytest.mark.clause("ROPE-EQ34")
def test_float32_stays_float32():
    result = rope(features(3, 4).astype(np.float32), np.arange(3))
    assert {part.dtype for part in result} == {np.dtype(np.float32)}


def calls(xp):
    """Every function of the room on small inputs of one array library."""
    x, m = xp.asarray(features(2, 5, 6)), xp.asarray([0, 3, 1, 131071, -4])
    cosine, sine = xp.asarray(features(5, 2)), xp.asarray(features(5, 2, seed=1))
    batch = xp.asarray([[0, 3, 1, 131071, -4], [1, 2, 3, 4, 5]])
    half = {"rotary_dim": 4, "pairing": "half_split"}
    return {
        "rope": rope(x, m),
        "rope in items": rope(x, batch, **half),
        "rope_backward": (rope_backward(x, m, **half),),
        "rotate": (rotate(x, cosine, sine), rotate(x, cosine, sine, pairing="half_split")),
        "rotation_matrix": (rotation_matrix(m, d=6), rotation_matrix(batch, d=4, dtype="float32")),
        "rope_by_matrix": (rope_by_matrix(x, m),),
        "rotate_complex": (rotate_complex(x[..., :2], m, frequency=0.7),),
        "rotate_plane": (rotate_plane(x[..., :2], m, frequency=0.7),),
        "float32": rope(xp.astype(x, xp.float32), m),
    }


@pytest.mark.clause("ROPE-EQ12", "ROPE-EQ13", "ROPE-EQ14", "ROPE-EQ15", "ROPE-EQ34")
@pytest.mark.parametrize("name", calls(np))
def test_only_functions_of_the_array_standard_are_used(name):
    for strict, plain in zip(calls(array_api_strict)[name], calls(np)[name], strict=True):
        assert strict.dtype == getattr(array_api_strict, str(plain.dtype))
        np.testing.assert_allclose(np.asarray(strict), plain, rtol=1e-14, atol=1e-15)


X, M = np.ones((2, 3, 4)), np.arange(3)
REFUSED = {
    "no feature": (lambda: rope(X[..., :3], M), OptionError, "rotary_dim is 3, but .* even"),
    "odd": (lambda: rope(X, M, rotary_dim=3), OptionError, "rotary_dim is 3, but .* even"),
    "zero": (lambda: rope(X, M, rotary_dim=0), OptionError, "rotary_dim is 0, but .* at least 2"),
    "no integer": (lambda: rope(X, M, rotary_dim=2.0), OptionError, "rotary_dim is 2.0, but .* ev"),
    "no object": (lambda: rope(X, M, variant="yarn"), OptionError, "variant is 'yarn', but it"),
    "no kind": (
        lambda: rope(X, M, rotary_dim=2, variant={"f": 1}),
        OptionError,
        "kind is None, but",
    ),
    "above d": (lambda: rope(X, M, rotary_dim=6), OptionError, "rotary_dim is 6, but x has d=4"),
    "length": (lambda: rope(X, M[:2]), ShapeError, "positions has n=2, but x has n=3"),
    "items": (lambda: rope(X, np.ones((5, 3), int)), ShapeError, r"shape \(5, 3\), but x of"),
    "axes": (lambda: rope(X[0], np.ones((1, 3), int)), ShapeError, r"shape \(1, 3\), but x of"),
    "scalar": (lambda: rope(X, np.int64(3)), ShapeError, "positions has 0 axes"),
    "float": (lambda: rope(X, M * 0.5), DtypeError, "dtype float64, but they must be integers"),
    "bool": (lambda: rope(X, M > 1), DtypeError, "dtype bool, but they must be integers"),
    "far": (lambda: rope(X, M + 2**32), OptionError, "magnitude must be at most 4294967295"),
    "integer x": (lambda: rope(X.astype(int), M), DtypeError, "x has dtype int64"),
    "base 0": (lambda: rope(X, M, base=0.0), OptionError, "base is 0.0, but"),
    "base -1": (lambda: rope(X, M, base=-1.0), OptionError, "base is -1.0, but"),
    "base nan": (lambda: rope(X, M, base=np.nan), OptionError, "base is nan, but"),
    "base inf": (lambda: rope(X, M, base=np.inf), OptionError, "base is inf, but"),
    "base tiny": (lambda: rope(X, M, base=1e-70), OptionError, "radians a token, but"),
    "pairing": (lambda: rope(X, M, pairing="neox"), OptionError, "pairing is 'neox', but"),
    "two spans": (
        lambda: rope(X, M, rotary_dim=2, variant={"kind": "proportional"}),
        OptionError,
        "rotary_dim is 2, but variant proportional spans all d=4",
    ),
    "wide table": (lambda: rotate(X, X, X), ShapeError, "cosine has 4 angles, but x has d=4"),
    "two tables": (
        lambda: rotate(X, X[..., :2], X[..., :1]),
        ShapeError,
        "sine has r/2=1, but cosine has r/2=2",
    ),
    "table rows": (
        lambda: rotate(X, np.ones((5, 2)), np.ones((5, 2))),
        ShapeError,
        r"cosine has leading axes \(5,\), but x has \(2, 3\)",
    ),
    "table dtype": (
        lambda: rotate(X, np.ones((3, 2), np.float32), np.ones((3, 2), np.float32)),
        DtypeError,
        "cosine has dtype float32, but x has dtype float64",
    ),
    "no plane": (
        lambda: rotate_plane(X, M, frequency=1.0),
        ShapeError,
        "x has 4 features and positions have 1 axes, but a plane",
    ),
    "frequency": (
        lambda: rotate_complex(X[..., :2], M, frequency=np.inf),
        OptionError,
        "frequency is inf, but it must be finite",
    ),
    "dtype name": (
        lambda: rotation_matrix(M, d=4, dtype="float16"),
        OptionError,
        "dtype is 'float16', but it must be one of float64, float32",
    ),
}


@pytest.mark.clause("ROPE-EQ34", "OWN-ROPE1", "OWN-ROPE2", "OWN-ROPE3")
@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_with_both_sides(name):
    call, error, sentence = REFUSED[name]
    with pytest.raises(error, match=sentence):
        call()
