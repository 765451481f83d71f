from __future__ import annotations

import math

import array_api_strict
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from direct_attention import assert_output, direct, direct_gradients
from refattn.checks import DtypeError, MemoryLimitError, OptionError, ShapeError
from refattn.standard import standard_attention, standard_attention_backward

N_Q, N_K, D, D_V = 7, 11, 5, 3


def draw(seed: int, n_q=N_Q, n_k=N_K, d=D, d_v=D_V):
    rng = np.random.default_rng(seed)
    shapes = ((n_q, d_v), (n_q, d), (n_k, d), (n_k, d_v))
    return tuple(rng.standard_normal(shape) for shape in shapes)


@pytest.mark.clause("FA1-S22", "FA1-ALG0")
def test_scores_weights_and_output_by_hand():
    query, key = np.asarray([[1.0, 2.0]]), np.asarray([[0.0, 0.0], [math.log(3.0), 0.0]])
    value = np.asarray([[4.0], [8.0]])
    result = standard_attention(query, key, value)
    np.testing.assert_allclose(result.scores, [[0.0, math.log(3.0)]], rtol=1e-15)
    np.testing.assert_allclose(result.weights, [[0.25, 0.75]], rtol=1e-15)
    np.testing.assert_allclose(result.output, [[7.0]], rtol=1e-15)


@pytest.mark.clause("FA1-S22", "FA1-ALG0")
@settings(deadline=None)
@given(shape=st.tuples(*(st.integers(1, n) for n in (7, 11, 5, 4))), scale=st.floats(-3, 3))
def test_the_three_steps_are_attention(shape, scale):
    _, query, key, value = draw(sum(shape), *shape)
    result = standard_attention(query, key, value, scale=scale)
    expected = direct(query, key, value, scale=scale)
    assert_output(result.output, expected)
    exact = scale * (query @ key.T)
    np.testing.assert_allclose(result.scores, exact, atol=float(expected.relative.max()))
    np.testing.assert_allclose(result.weights.sum(axis=-1), np.ones(shape[0]), rtol=1e-14)


@pytest.mark.clause("FA1-S31", "FA1-ALG0")
@pytest.mark.parametrize("level", [-84000.0, -1e4, 1e4])
def test_the_softmax_is_shifted_by_the_maximum_of_the_row(level):
    key = level + np.asarray([[0.0], [math.log(3.0)]])
    result = standard_attention(np.ones((1, 1)), key, np.asarray([[4.0], [8.0]]))
    np.testing.assert_allclose(result.weights, [[0.25, 0.75]], rtol=1e-10)


@pytest.mark.clause("FA1-S31", "FA1-ALG0")
def test_each_row_is_shifted_by_its_own_maximum():
    key = np.asarray([[1e4], [1e4 + 1.0]])
    result = standard_attention(np.asarray([[1.0], [-1.0]]), key, np.asarray([[4.0], [8.0]]))
    share = 1 / (1 + math.e)
    np.testing.assert_allclose(result.weights, [[share, 1 - share], [1 - share, share]], rtol=1e-14)


@pytest.mark.clause("FA1-ALG3")
def test_gradients_by_hand():
    query, key = np.asarray([[1.0]]), np.asarray([[0.0], [math.log(3.0)]])
    value, d_output = np.asarray([[0.0], [4.0]]), np.asarray([[2.0]])
    weights = np.asarray([[0.25, 0.75]])
    result = standard_attention_backward(d_output, query, key, value, weights)
    np.testing.assert_allclose(result.d_value, [[0.5], [1.5]], rtol=1e-15)
    np.testing.assert_allclose(result.d_key, [[-1.5], [1.5]], rtol=1e-15)
    np.testing.assert_allclose(result.d_query, [[1.5 * math.log(3.0)]], rtol=1e-15)


@pytest.mark.clause("FA1-ALG3")
@settings(deadline=None)
@given(shape=st.tuples(*(st.integers(1, n) for n in (7, 11, 5, 4))), scale=st.floats(-2, 2))
def test_gradients_agree_with_the_jacobian_of_the_softmax(shape, scale):
    operands = draw(sum(shape) + 50, *shape)
    weights = standard_attention(*operands[1:], scale=scale).weights
    result = standard_attention_backward(*operands, weights, scale=scale)
    expected = direct_gradients(*operands, scale=scale)
    bounds = (expected.bound_query, expected.bound_key, expected.bound_value)
    for ours, exact, bound in zip(result, expected[:3], bounds, strict=True):
        assert (np.abs(ours - exact) <= bound).all()


@pytest.mark.clause("FA1-ALG3")
@pytest.mark.parametrize("operand", [1, 2, 3])
def test_gradients_are_the_slopes_of_the_forward_pass(operand):
    operands = list(draw(1))
    direction = np.random.default_rng(2).standard_normal(operands[operand].shape)

    def loss(step):
        moved = list(operands)
        moved[operand] = moved[operand] + step * direction
        return float(np.sum(operands[0] * standard_attention(*moved[1:], scale=0.7).output))

    h = 1e-4
    slope = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    weights = standard_attention(*operands[1:], scale=0.7).weights
    result = standard_attention_backward(*operands, weights, scale=0.7)
    assert slope == pytest.approx(float(np.sum(result[operand - 1] * direction)), rel=1e-9)


@pytest.mark.clause("FA1-ALG3")
def test_logit_gradients_of_a_row_sum_to_zero():
    d_output, query, key, value = draw(3)
    shifted = key + np.ones(D)  # moves every logit of a row by the same amount
    weights = standard_attention(query, key, value).weights
    base = standard_attention_backward(d_output, query, key, value, weights)
    moved = standard_attention_backward(d_output, query, shifted, value, weights)
    np.testing.assert_allclose(base.d_query, moved.d_query, rtol=1e-11, atol=1e-12)


@pytest.mark.clause("FA1-ALG0", "FA1-ALG3", "OWN-ROUND1")
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_sixteen_bits_are_computed_in_float32_and_rounded_once(dtype):
    narrow = [x.astype(dtype) for x in draw(4)]
    wide = [x.astype(np.float32) for x in narrow]
    ours, exact = standard_attention(*narrow[1:]), standard_attention(*wide[1:])
    assert ours.output.dtype == dtype and ours.weights.dtype == np.float32
    np.testing.assert_array_equal(ours.output, exact.output.astype(dtype))
    np.testing.assert_array_equal(ours.weights, exact.weights)
    back = standard_attention_backward(*narrow, ours.weights)
    exact_back = standard_attention_backward(*wide, exact.weights)
    for a, b in zip(back, exact_back, strict=True):
        np.testing.assert_array_equal(a, b.astype(dtype))


@pytest.mark.clause("FA1-ALG0", "FA1-ALG3")
def test_only_standard_array_functions_are_used():
    operands = draw(5)
    strict = [array_api_strict.asarray(x) for x in operands]
    ours, theirs = standard_attention(*operands[1:]), standard_attention(*strict[1:])
    back = standard_attention_backward(*operands, ours.weights)
    strict_back = standard_attention_backward(*strict, theirs.weights)
    for a, b in zip((*ours, *back), (*theirs, *strict_back), strict=True):
        np.testing.assert_array_equal(a, np.asarray(b))


@pytest.mark.clause("FA1-ALG0", "FA1-ALG3")
@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"key": np.ones((11, 4))}, ShapeError, "key has d_k=4, but query has d_k=5"),
        ({"key": np.ones((0, 5)), "value": np.ones((0, 3))}, ShapeError, "key has n_k=0"),
        ({"query": np.ones((7, 5), np.float32)}, DtypeError, "but query has dtype float32"),
        ({"scale": math.nan}, OptionError, "scale is nan"),
        ({"weights": np.ones((7, 10))}, ShapeError, "weights has n_k=10, but value has n_k=11"),
        ({"weights": np.ones((7, 11), np.float32)}, DtypeError, "weights has dtype float32"),
        ({"d_output": np.ones((2, 7, 3))}, ShapeError, "d_output has leading axes (2,)"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(change, error, sentence):
    names = ("d_output", "query", "key", "value")
    arguments = dict(zip(names, draw(6), strict=True)) | {"weights": np.ones((7, 11))} | change
    with pytest.raises(error) as caught:
        standard_attention_backward(**arguments)
    assert sentence in str(caught.value) and "standard_attention_backward" in str(caught.value)
    assert "\n" not in str(caught.value)
    if not {"weights", "d_output"} & set(change):
        del arguments["weights"], arguments["d_output"]
        with pytest.raises(error, match="standard_attention"):
            standard_attention(**arguments)


@pytest.mark.clause("OWN-MEMORY1", "FA1-ALG0", "FA1-ALG3")
def test_matrices_that_do_not_fit_are_refused_before_they_are_made():
    n = 2**24  # 2^48 scores of 8 bytes
    query, value = np.broadcast_to(1.0, (n, 2)), np.broadcast_to(1.0, (n, 1))
    with pytest.raises(MemoryLimitError, match="standard_attention"):
        standard_attention(query, query, value)
    with pytest.raises(MemoryLimitError, match="standard_attention_backward"):
        standard_attention_backward(value, query, query, value, np.broadcast_to(1.0, (n, n)))
